"""CLIPScore: alignment of image and prompt under an untuned CLIP (Hessel et al., 2021, arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source
from rsaft.rewards.clip_features import Clip, cosine, load_clip
from rsaft.rewards.frozen import Frozen, Precision, check_inputs
from rsaft.rewards.open_clip_backend import Backend, check_backend, load_open_clip
from rsaft.rewards.open_clip_layout import Activation
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

HUB_ID = "openai/clip-vit-large-patch14"
Scale = Literal["cosine", "torchmetrics", "hessel"]


class CLIPScore(Frozen):
    """CLIPScore: the cosine of image and prompt under CLIP.

    - Checkpoint: `openai/clip-vit-large-patch14`, ViT-L/14, 428 million parameters, 1.7 GB in fp32, MIT (code); or any
      other CLIP, as `laion/CLIP-ViT-H-14-laion2B-s32B-b79K` (986 million, 3.9 GB). Scores of two CLIPs cannot be
      compared.
    - Scale: "cosine", 0.15 to 0.4 in practice; "torchmetrics" is max(100 cos, 0), "hessel" is the paper's
      2.5 max(cos, 0). Both have no gradient where the cosine is negative.
    - Text: 77 tokens; the rest is cut off.
    - Preprocessing: `clip_preprocess`, the shorter side to 224, centre crop: what lies outside the square is not seen.
    - Cost: one forward of the image tower and one without graph of the text tower.

    Args:
        path_or_id: hub id, folder or file, under the names of transformers or open_clip.
        scale: see above.
        device: where to put it; this process's GPU if there is one.
        dtype: of weights and arithmetic; norms and cosine are fp32 all the same.
        tokenizer: folder or hub id of a CLIP tokenizer; None looks beside the weights, then at `path_or_id`.
        activation: of a checkpoint without config.json: "gelu" for LAION's CLIPs, "quick_gelu" for OpenAI's.
        exact: round pixels as PIL does, for numbers that are compared with published ones.
        backend: "transformers", or "open_clip" to run the same weights in open_clip_torch.

    Raises:
        ConfigError: in one sentence, if something is missing or does not fit.
        MissingExtraError: if open_clip_torch is asked for and does not work.
    """

    def __init__(
        self,
        path_or_id: Source = HUB_ID,
        *,
        scale: Scale = "cosine",
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype = "fp32",
        tokenizer: Source | None = None,
        activation: Activation = "gelu",
        exact: bool = False,
        backend: Backend = "transformers",
    ) -> None:
        super().__init__()
        if scale not in ("cosine", "torchmetrics", "hessel"):
            raise ConfigError(f"CLIPScore: scale is 'cosine', 'torchmetrics' or 'hessel'; got {scale!r}.")
        if activation not in ("gelu", "quick_gelu"):
            raise ConfigError(f"CLIPScore: activation is 'gelu' or 'quick_gelu'; got {activation!r}.")
        check_backend(backend, "CLIPScore")
        self.scale, self.exact = scale, exact
        load = load_clip if backend == "transformers" else load_open_clip
        self.clip: Clip = load(
            path_or_id,
            reward="CLIPScore",
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            activation=activation,
        )
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The scaled cosine of each image with its prompt, fp32, on the device of `images`."""
        check_inputs(images, prompts, "CLIPScore")
        features = self.clip.image_features(clip_preprocess(images, self.clip.size, exact=self.exact))
        score = cosine(features, self.clip.text_features(prompts)).to(images.device)
        if self.scale == "cosine":
            return score
        return (100.0 if self.scale == "torchmetrics" else 2.5) * score.clamp_min(0)
