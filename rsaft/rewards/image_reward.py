"""ImageReward (Xu et al., 2023): BLIP with cross-attention and an MLP, trained on human comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.blip import blip_from_published
from rsaft.rewards.checkpoint import Source, beside, find_file, read_weights
from rsaft.rewards.frozen import Frozen, Precision, check_inputs, network_device, network_dtype, wide
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

MAX_TOKENS = 35  # with [CLS] and [SEP]
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores (ImageReward/ImageReward.py)


class ImageReward(Frozen):
    """A reward (images in [0, 1], prompts) -> (b,): how people would rate the image for the prompt.

    Hub id: THUDM/ImageReward (now zai-org/ImageReward), `ImageReward.pt` and `med_config.json`. 446,665,953 weights,
    1.79 GB in fp32, of which 459,264 are never used. Licence: Apache-2.0.
    Score: standardised over the training images, about -2 to 2; higher is better.
    Text: 35 tokens of bert-base-uncased, lower-cased, the rest is cut off; the published file holds no vocabulary, so
    it comes from `tokenizer`.
    Preprocessing: as PIL's bicubic, shorter side 224, torchvision's centre crop, OpenAI's mean and deviation.
    Cost: 303 M weights over 197 image tokens and 142 M over 35 text tokens, about 0.13 TFLOP an image forward, and as
    much again backward to the image (counted from the shapes).

    Always in eval mode, also after `.train()`; no gradient reaches its weights. Images do not interact.

    Args:
        path_or_id: a hub id, a folder with ImageReward.pt, or the file itself.
        device: where the networks lie; the GPU if there is one. Images come from anywhere, scores go back there.
        dtype: of the two networks: "fp32", "bf16", "fp16", "fp64". The MLP and the score are fp32 (fp64 for "fp64").
        tokenizer: hub id or folder of bert-base-uncased, or its vocab.txt.
        exact: round to whole 1 / 255 in the resize, as PIL does; see `clip_preprocess`.

    Raises:
        ConfigError: if the checkpoint or the vocabulary is not found or does not have the published layout.
    """

    def __init__(
        self,
        path_or_id: Source = "THUDM/ImageReward",
        *,
        device: str | torch.device | None = None,
        dtype: Precision = "fp32",
        tokenizer: Source = "google-bert/bert-base-uncased",
        exact: bool = False,
    ) -> None:
        super().__init__()
        compute, place = network_dtype(dtype, "image_reward"), network_device(device)
        path = find_file(path_or_id, ["ImageReward.pt"], "image_reward")
        parts = blip_from_published(
            read_weights(path, "image_reward"), path, beside(path, path_or_id, "med_config.json")
        )
        self.vision = parts.vision.to(place, compute)
        self.text = parts.text.to(place, compute)
        self.mlp = parts.mlp.to(place, torch.promote_types(compute, torch.float32))
        self.tokenizer = _tokenizer(tokenizer, self.text.config.vocab_size)
        self.exact = exact
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Standardised score of each image for its prompt, fp32, differentiable to the images.

        Raises:
            ValueError: if there is not one prompt for each image.
        """
        check_inputs(images, prompts, "image_reward")
        device, size = self.vision.device, self.vision.config.image_size
        pixels = clip_preprocess(images.to(device), size=size, rounding="torchvision", exact=self.exact)
        seen = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        read = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        hidden = self.text(read.input_ids, attention_mask=read.attention_mask, encoder_hidden_states=seen)
        with torch.autocast(device.type, enabled=False):  # the last products are fp32 whatever surrounds this
            raw = self.mlp(wide(hidden.last_hidden_state[:, 0])).squeeze(1)
        return ((raw - MEAN) / STD).to(images.device)


def _tokenizer(source: Source, rows: int) -> Any:
    """BERT's tokenizer with BLIP's two tokens, which ImageReward adds and prompts do not use.

    Raises:
        ConfigError: if there is no vocabulary, or it is not that of a network with `rows` embeddings.
    """
    from transformers import BertTokenizer

    # Not `from_pretrained`, which makes an empty vocabulary where it finds none.
    path = find_file(source, ["vocab.txt"], "image_reward's tokenizer, the vocabulary of bert-base-uncased")
    words = path.read_text(encoding="utf-8").splitlines()
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != rows:
        raise ConfigError(
            f"image_reward: the vocabulary '{path}' has {len(tokenizer)} tokens with [DEC] and [ENC], and the "
            f"checkpoint embeds {rows}; give that of bert-base-uncased."
        )
    return tokenizer
