"""Rewards from Qwen2-VL and Qwen2.5-VL: a trained reward head, the odds of an answer, or an expected grade."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source, find_file
from rsaft.rewards.frozen import Frozen, Precision, check_inputs, network_device, network_dtype, wide
from rsaft.rewards.qwen_checkpoint import REWARD_TOKEN, load_qwen, load_reward_model
from rsaft.rewards.qwen_patches import FACTOR, PATCH, qwen_patches, qwen_size
from rsaft.types import Images

Readout = Literal["yes_no", "digit", "reward_token"]
Positions = Literal["grid", "sequence"]

# VQAScore's question (Lin et al., 2024, Sec. 3), and one of our own for a grade.
TEMPLATES = {
    "yes_no": 'Does this figure show "{prompt}"? Please answer yes or no.',
    "digit": 'How well does this image match the text "{prompt}"? Answer with one digit: 1 is not at all, 5 is fully.',
}
ANSWERS = {"yes_no": ("Yes", "No"), "digit": ("1", "2", "3", "4", "5")}

# What Qwen's chat template makes of one image and a question.
_IMAGE = "<|image_pad|>"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_BEFORE = f"{_SYSTEM}<|im_start|>user\n<|vision_start|>{_IMAGE}<|vision_end|>"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"


class VLMReward(Frozen):
    """A reward (images in [0, 1], prompts) -> (b,) read off a Qwen2-VL or Qwen2.5-VL, differentiable to the images.

    Three readouts:
    - "yes_no": P(first answer) / (P(first) + P(second)) for the next token, as in VQAScore (which divides by all
      tokens instead) and ArtifactReward (arXiv 2601.03468: ask for artifacts, `answers=("No", "Yes")`).
    - "digit": the expected digit, sum of d P(d) over 1..5, with P over these five tokens.
    - "reward_token": a head 3584-1024-16-2 on the token `<|Reward|>`; its first output, the mean mu, as in HPSv3.

    Hub ids: Qwen/Qwen2.5-VL-7B-Instruct (8.3 G weights, 16.6 GB in bf16, Apache-2.0), Qwen/Qwen2-VL-7B-Instruct (the
    same size, Apache-2.0), or another of the two families. For "reward_token" MizzenAI/HPSv3, HPSv3.safetensors over
    Qwen/Qwen2-VL-7B-Instruct (package MIT; the licence of the weights is on the hub's page). None was loaded here:
    tests use tiny networks in the published layouts.
    Score: 0 to 1 ("yes_no"), 1 to 5 ("digit"), unbounded ("reward_token").
    Text: the model's own context, 32,768 tokens; a longer prompt is refused, not cut.
    Preprocessing: bicubic as PIL's to multiples of 28 between min_pixels and max_pixels, OpenAI's mean and deviation,
    14 x 14 patches, 2 x 2 to a token.
    Cost: 448 x 448 is 256 tokens; with a text of 500 about 12 TFLOP an image forward, and as much again backward to
    the image (2 x weights x tokens, not timed). Activations are kept: a frozen network in eval mode does not use
    transformers' gradient checkpointing.

    Always in eval mode, also after `.train()`; no gradient reaches its weights. Images do not interact: texts are
    padded on the right, and padding is masked.

    Args:
        path_or_id: a hub id or folder of a Qwen2-VL or Qwen2.5-VL; for "reward_token" a file, or a folder or hub id
            with `weights`.
        readout: see above.
        template: the question, with {prompt} where the prompt goes. `TEMPLATES` has the defaults. A reward head
            was trained with one instruction, so "reward_token" has no default; HPSv3's are INSTRUCTION and
            prompt_with_special_token of hpsv3/dataset/data_collator_qwen.py, one after the other.
        answers: of "yes_no": the wished one and the other, each one token.
        log_odds: "yes_no" as log(P(first) / P(second)), unbounded, whose gradient does not vanish where P is near 1.
        base: for "reward_token": hub id or folder with the config and the tokenizer.
        weights: for "reward_token": the file's name in a folder or on the hub.
        device: where the network lies; the GPU if there is one. Images come from anywhere, scores go back there.
        dtype: of the network. The last product and the score are fp32 (fp64 for "fp64").
        min_pixels, max_pixels: of the resized image. Both 448 * 448 for "reward_token" as in HPSv3, else 56 * 56 and
            1280 * 28 * 28 as transformers' processor.
        positions: "grid" gives image tokens their row and column (M-RoPE), as Qwen's own code; "sequence" numbers all
            tokens one after the other, as HPSv3's forward pass does (with transformers 4.45.2, which it pins). By
            default "sequence" for "reward_token", else "grid".
        exact: round to whole 1 / 255 in the resize, as PIL does; see `clip_preprocess`.
        attention: "sdpa", or "eager", which has second derivatives.

    Raises:
        ConfigError: if a checkpoint is not found or has another layout, or a setting does not fit the readout.
    """

    def __init__(
        self,
        path_or_id: Source = "Qwen/Qwen2.5-VL-7B-Instruct",
        readout: Readout = "yes_no",
        *,
        template: str | None = None,
        answers: tuple[str, str] | None = None,
        log_odds: bool = False,
        base: Source = "Qwen/Qwen2-VL-7B-Instruct",
        weights: str = "HPSv3.safetensors",
        device: str | torch.device | None = None,
        dtype: Precision = "bf16",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        positions: Positions | None = None,
        exact: bool = False,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        super().__init__()
        self.template = _checked_template(readout, template, answers, log_odds)
        if positions not in (None, *get_args(Positions)):
            raise ConfigError(f"vlm: positions is one of {', '.join(get_args(Positions))}; got '{positions}'.")
        headed = readout == "reward_token"
        self.readout, self.log_odds, self.exact = readout, log_odds, exact
        self.positions: Positions = positions or ("sequence" if headed else "grid")
        self.min_pixels = min_pixels or (448 * 448 if headed else 56 * 56)
        self.max_pixels = max_pixels or (448 * 448 if headed else 1280 * 28 * 28)
        qwen_size(448, 448, self.min_pixels, self.max_pixels)  # refuses bounds that are none
        compute, place = network_dtype(dtype, "vlm"), network_device(device)
        self.tokenizer = _tokenizer(base if headed else path_or_id, headed)
        head: nn.Module
        if headed:
            path = find_file(path_or_id, [weights], "vlm")
            whole, head = load_reward_model(path, base, len(self.tokenizer), compute, attention)
        else:
            whole = load_qwen(path_or_id, compute, attention)
            head = _answer_rows(whole, self.tokenizer, answers or ANSWERS[readout])
        self.config = whole.config
        self.network = whole.model.to(place)
        self.head = head.to(place)
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Score of each image for its prompt, fp32, differentiable to the images.

        Raises:
            ValueError: if there is not one prompt for each image, or a prompt holds one of the model's special tokens.
        """
        check_inputs(images, prompts, "vlm")
        place = self.network.device
        patches = qwen_patches(images.to(place), self.min_pixels, self.max_pixels, self.exact)
        size = qwen_size(images.shape[-2], images.shape[-1], self.min_pixels, self.max_pixels)
        rows, columns = (side // PATCH for side in size)
        ids, mask = self._read(prompts, rows * columns * PATCH**2 // FACTOR**2)
        ids, mask = ids.to(place), mask.to(place)
        sequence = torch.arange(ids.shape[1], device=place).expand(3, *ids.shape)
        states = self.network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=sequence if self.positions == "sequence" else None,
            mm_token_type_ids=(ids == self.config.image_token_id).int(),
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, rows, columns]], device=place).expand(len(ids), 3),
            use_cache=False,
        ).last_hidden_state
        at = self._reading_place(ids, mask)
        with torch.autocast(place.type, enabled=False):  # the last products are fp32 whatever surrounds this
            outputs = self.head(wide(states[torch.arange(len(ids), device=place), at]))
            return self._score(outputs).to(images.device)

    def _score(self, outputs: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
        if self.readout == "reward_token":
            return outputs[:, 0]
        if self.readout == "yes_no":
            odds = outputs[:, 0] - outputs[:, 1]
            return odds if self.log_odds else torch.sigmoid(odds)
        digits = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype, device=outputs.device)
        return outputs.softmax(dim=1) @ digits

    def _read(self, prompts: Sequence[str], image_tokens: int) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        """Token ids of the whole texts, padded on the right, and the mask of what is no padding."""
        before = _BEFORE.replace(_IMAGE, _IMAGE * image_tokens)
        texts = [before + self.template.replace("{prompt}", prompt) + _AFTER for prompt in prompts]
        read = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = read.input_ids, read.attention_mask
        limit = self.config.text_config.max_position_embeddings
        if ids.shape[1] > limit:
            raise ValueError(
                f"vlm: a prompt makes a text of {ids.shape[1]} tokens, and {limit} are allowed; shorten it."
            )
        wanted = {self.config.image_token_id: image_tokens}
        if self.readout == "reward_token":
            wanted[self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)] = 1
        for token, count in wanted.items():
            wrong = ((ids == token).sum(dim=1) != count).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(
                    f"vlm: prompt {prompts[wrong[0]]!r} holds the special token "
                    f"'{self.tokenizer.convert_ids_to_tokens(token)}'; take it out."
                )
        return ids, mask

    def _reading_place(self, ids: Int[Tensor, "b n"], mask: Int[Tensor, "b n"]) -> Int[Tensor, " b"]:
        """Where the head reads: at the reward token, or at the last token, which predicts the answer."""
        if self.readout == "reward_token":
            return (ids == self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)).int().argmax(dim=1)
        return mask.sum(dim=1) - 1


def _checked_template(readout: str, template: str | None, answers: tuple[str, str] | None, log_odds: bool) -> str:
    """The question to ask.

    Raises:
        ConfigError: if the settings do not fit the readout.
    """
    if readout not in get_args(Readout):
        raise ConfigError(f"vlm: readout '{readout}' is unknown; allowed are {', '.join(get_args(Readout))}.")
    if readout != "yes_no" and (answers is not None or log_odds):
        raise ConfigError(f"vlm: answers and log_odds belong to the readout yes_no; leave them out for {readout}.")
    if readout == "reward_token" and (template is None or template.count(REWARD_TOKEN) != 1):
        raise ConfigError(
            f"vlm: a reward head reads the instruction that it was trained with, so template has no default, and "
            f"{REWARD_TOKEN} once in it; HPSv3's is in hpsv3/dataset/data_collator_qwen.py, with {{prompt}} for "
            "{text_prompt}."
        )
    return TEMPLATES[readout] if template is None else template


def _tokenizer(source: Source, headed: bool) -> Any:
    """Qwen's tokenizer; with the reward token if there is a reward head.

    Raises:
        ConfigError: if none is found.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=Path(source).exists())
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"vlm: '{source}' has no tokenizer ({reason}); give the hub id or folder of a Qwen-VL."
        ) from error
    if len(tokenizer.encode(_IMAGE, add_special_tokens=False)) != 1:
        raise ConfigError(
            f"vlm: the tokenizer of '{source}' has no token {_IMAGE}; give the hub id or folder of a Qwen-VL."
        )
    if headed:
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return tokenizer


def _answer_rows(whole: Any, tokenizer: Any, answers: Sequence[str]) -> nn.Linear:
    """The rows of the language head that belong to the answers, in fp32 at least.

    Raises:
        ConfigError: if an answer is not one token.
    """
    ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
    for answer, tokens in zip(answers, ids, strict=True):
        if len(tokens) != 1:
            raise ConfigError(
                f"vlm: an answer is one token, and {answer!r} is {len(tokens)} of this tokenizer's; take another."
            )
    rows = wide(whole.lm_head.weight.detach()[[tokens[0] for tokens in ids]])
    head = nn.Linear(rows.shape[1], len(rows), bias=False, device="meta")
    head.weight = nn.Parameter(rows.clone())
    return head
