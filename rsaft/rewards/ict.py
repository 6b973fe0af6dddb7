"""ICT: how much of the prompt an image contains (Ba et al., 2025, "Enhancing Reward Models for High-quality Image
Generation: Beyond Text-Image Alignment"; BarretBa/ICTHP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.rewards.checkpoint import Source
from rsaft.rewards.clip_features import VIT_H, cosine, load_clip
from rsaft.rewards.clip_tokens import like_open_clip
from rsaft.rewards.frozen import Frozen, Precision, check_inputs
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

HUB_ID = "8y/ICT"
FILES = ("pytorch_model.bin", "model.safetensors")


class ICT(Frozen):
    """Image-contained text: the cosine of a CLIP that was tuned towards labels up to 1, so details cost no score.

    - Checkpoint: `8y/ICT`, `pytorch_model.bin`, a whole ViT-H/14 under transformers' names (size not seen); MIT (code).
    - Scale: a plain cosine; 0.9 is usual for a good image.
    - Text: 77 tokens of open_clip's tokenizer, cleaned as it does; the rest is cut off.
    - Preprocessing: `clip_preprocess`, the shorter side to 224, centre crop: what lies outside the square is not seen.
    - Cost: one forward of a ViT-H/14 for images and one without graph for prompts; 986 million parameters, 3.9 GB in
      fp32.

    Args:
        path_or_id: hub id, folder or file.
        device: where to put it; this process's GPU if there is one.
        dtype: of weights and arithmetic; norms and cosine are fp32 all the same.
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
            reward="ICT",
            files=FILES,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            default_tokenizer=VIT_H,
            clean=like_open_clip,
        )
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Cosine of each image with its prompt, fp32, on the device of `images`."""
        check_inputs(images, prompts, "ICT")
        features = self.clip.image_features(clip_preprocess(images, self.clip.size, exact=self.exact))
        return cosine(features, self.clip.text_features(prompts)).to(images.device)
