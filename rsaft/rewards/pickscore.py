"""PickScore: which of two images people picked, from a fine-tuned CLIP (Kirstain et al., 2023, arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.rewards.checkpoint import Source
from rsaft.rewards.clip_features import VIT_H, cosine, load_clip
from rsaft.rewards.frozen import Frozen, Precision, check_inputs
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

HUB_ID = "yuvalkirstain/PickScore_v1"


class PickScore(Frozen):
    """PickScore v1: scaled cosine of image and prompt under a CLIP that was tuned on the Pick-a-Pic comparisons.

    - Checkpoint: `yuvalkirstain/PickScore_v1`, 3.94 GB (fp32); the code is MIT, for the weights no licence was seen.
    - Scale: exp(logit_scale), about 100, times the cosine: 18 to 24 in practice. Some papers divide by 26, or by 100.
    - Text: 77 tokens; the rest is cut off.
    - Preprocessing: `clip_preprocess`, the shorter side to 224, centre crop: what lies outside the square is not seen.
    - Cost: one forward of a ViT-H/14 for images and one without graph for prompts; 986 million parameters, 3.9 GB in
      fp32.

    Args:
        path_or_id: hub id, folder or file.
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
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype = "fp32",
        tokenizer: Source | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.exact = exact
        self.clip = load_clip(
            path_or_id,
            reward="PickScore",
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            default_tokenizer=VIT_H,
        )
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """exp(logit_scale) times the cosine of each image with its prompt, fp32, on the device of `images`."""
        check_inputs(images, prompts, "PickScore")
        features = self.clip.image_features(clip_preprocess(images, self.clip.size, exact=self.exact))
        return self.clip.scale * cosine(features, self.clip.text_features(prompts)).to(images.device)
