"""MPS: several dimensions of preference (Zhang et al., 2024, "Learning Multi-dimensional Human Preference for
Text-to-Image Generation"; Kwai-Kolors/MPS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source, find_file, load_strictly, read_weights
from rsaft.rewards.clip_features import VIT_H, clip_of, cosine, named_as_transformers
from rsaft.rewards.frozen import Frozen, Precision, check_inputs, network_device, network_dtype, wide
from rsaft.rewards.mps_cross import cross_model_like, our_names
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

HUB_ID = "RE-N-Y/mpsv1"
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The words that select the overall score; other lists select other dimensions (README of Kwai-Kolors/MPS)."""


class MPS(Frozen):
    """Multi-dimensional preference score: image tokens read those words of the prompt that a condition is about.

    - Checkpoint: `RE-N-Y/mpsv1` (imscore's copy; size not seen); the original is a pickled module on Google Drive,
      whose state_dict() loads here too. MIT (code).
    - Scale: exp(logit_scale) times a cosine; about 9 in practice.
    - Text: 77 tokens, padding included, which the network reads too; the rest is cut off.
    - Preprocessing: `clip_preprocess`, the shorter side to 224, centre crop: what lies outside the square is not seen.
    - Cost: one forward of a ViT-H/14 for images and one without graph for prompts and condition, and four layers of
      cross-attention; about 1.1 billion parameters, 4.4 GB in fp32.

    Args:
        path_or_id: hub id, folder or file.
        condition: the words that a prompt's words are compared with.
        threshold: how near a word must be to the condition to be read, as a share of the nearest's similarity: 0.3 in
            the authors' evaluation scripts, 0.01 in their module and in imscore. The share is of this prompt's words;
            the authors take the largest of the batch, and evaluate one image at a time, where that is the same.
        device: where to put it; this process's GPU if there is one.
        dtype: of weights and arithmetic; norms, cosine and scale are fp32 all the same.
        tokenizer: folder or hub id of a CLIP tokenizer; None looks beside the weights, then takes that of `VIT_H`.
        exact: round pixels as PIL does, for numbers that are compared with published ones.

    Raises:
        ConfigError: in one sentence, if something is missing or does not fit.
    """

    def __init__(
        self,
        path_or_id: Source = HUB_ID,
        *,
        condition: str = OVERALL,
        threshold: float = 0.3,
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype = "fp32",
        tokenizer: Source | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ConfigError(
                f"MPS: threshold is a share of the largest similarity, 0 <= threshold < 1; got {threshold}."
            )
        self.condition, self.threshold, self.exact = condition, threshold, exact
        where, chosen = network_device(device), network_dtype(dtype, "MPS")
        path = find_file(path_or_id, ("model.safetensors", "pytorch_model.bin"), "MPS")
        clip, cross = _parts(read_weights(path, "MPS"), path)
        self.clip = clip_of(
            named_as_transformers(clip, path, "MPS"),
            path,
            path_or_id,
            reward="MPS",
            device=where,
            dtype=chosen,
            tokenizer=tokenizer,
            default_tokenizer=VIT_H,
        )
        with torch.device("meta"):
            self.cross = cross_model_like(cross, str(path), "MPS")
        load_strictly(self.cross, {k: v.to(where, chosen, copy=True) for k, v in cross.items()}, path, "MPS")
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The score of each image for its prompt, fp32, on the device of `images`."""
        check_inputs(images, prompts, "MPS")
        image = self._image_tokens(clip_preprocess(images, self.clip.size, exact=self.exact))
        words, meaning, read = self._text(prompts)
        seen = self.cross(image, words, read)[:, 0]
        return self.clip.scale * cosine(seen, meaning).to(images.device)

    def _image_tokens(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
        """All tokens, projected without the last normalisation, which CLIP has for its first token only."""
        projection = self.clip.network.visual_projection
        pixels = pixels.to(projection.weight.device, projection.weight.dtype)
        return projection(self.clip.network.vision_model(pixel_values=pixels).last_hidden_state)

    @torch.no_grad()
    def _text(self, prompts: Sequence[str]) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"], Bool[Tensor, "b t"]]:
        """Features of each prompt's tokens, of its end, and which tokens are near a word of the condition."""
        network = self.clip.network
        output = network.text_model(input_ids=self.clip.token_ids([*prompts, self.condition]))
        words, meaning = (network.text_projection(x) for x in (output.last_hidden_state, output.pooler_output))
        near = (wide(words[:-1]) @ wide(words[-1]).T).amax(dim=2)
        read = near / near.amax(dim=1, keepdim=True) > self.threshold
        return words[:-1], meaning[:-1], read


def _parts(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of CLIP and of the cross-attention; imscore puts `mps.` before every name."""
    weights = {key.removeprefix("mps."): value for key, value in weights.items()}
    for prefix in ("model.", "cross_model."):
        if not any(key.startswith(prefix) for key in weights):
            raise ConfigError(
                f"MPS: '{path}' lacks the keys '{prefix}...'; it holds '{next(iter(weights))}', and this is no MPS."
            )
    clip = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    cross = {k.removeprefix("cross_model."): value for k, value in weights.items() if k.startswith("cross_model.")}
    for key in weights:
        if not key.startswith(("model.", "cross_model.")):
            raise ConfigError(f"MPS: '{path}' holds the key '{key}', which this model does not have.")
    return clip, our_names(cross)
