"""HP: an image's own quality, whatever the prompt (Ba et al., 2025, the companion of ICT; BarretBa/ICTHP)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source, find_file
from rsaft.rewards.clip_features import load_clip
from rsaft.rewards.frozen import Frozen, Precision, check_inputs, network_device, network_dtype
from rsaft.rewards.linear_head import load_head
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

HUB_ID = "8y/HP"
BACKBONE_FILES = ("hp_backbone/pytorch_model.bin", "hp_backbone/model.safetensors")
HEAD_FILES = ("hp_scorer/mlp_pytorch_model.bin", "hp_scorer/model.safetensors")


class HP(Frozen):
    """High preference: five linear layers on the image feature of a tuned CLIP, through a sigmoid. Reads no prompt.

    - Checkpoint: `8y/HP`, a folder with `hp_backbone/pytorch_model.bin` (a whole ViT-H/14 under transformers' names)
      and `hp_scorer/mlp_pytorch_model.bin` (sizes not seen); MIT (code).
    - Scale: 0 to 1; the sigmoid's gradient fades towards both ends.
    - Text: none.
    - Preprocessing: `clip_preprocess`, the shorter side to 224, centre crop: what lies outside the square is not seen.
    - Cost: one forward of a ViT-H/14 image tower, 632 million parameters, 2.5 GB in fp32.

    Args:
        path_or_id: hub id or folder with the two files above.
        device: where to put it; this process's GPU if there is one.
        dtype: of CLIP's weights and arithmetic; the layers are fp32 all the same.
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
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.exact = exact
        where, chosen = network_device(device), network_dtype(dtype, "HP")
        if Path(path_or_id).is_file():
            raise ConfigError(f"HP: two files are needed, {BACKBONE_FILES[0]} and {HEAD_FILES[0]}; give their folder.")
        path = find_file(path_or_id, HEAD_FILES, "HP")
        self.head = load_head(path, "HP", device=where, dtype=chosen)
        self.clip = load_clip(
            path_or_id, reward="HP", files=BACKBONE_FILES, device=where, dtype=chosen, reads_text=False
        )
        found, needed = self.clip.network.config.projection_dim, self.head.layers["0"].in_features
        if found != needed:
            raise ConfigError(f"HP: '{path}' reads features of {needed} values, and hp_backbone gives {found}.")
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The score of each image in [0, 1], fp32, on the device of `images`."""
        check_inputs(images, prompts, "HP")
        features = self.clip.image_features(clip_preprocess(images, self.clip.size, exact=self.exact))
        return torch.sigmoid(self.head(features)).to(images.device)  # features are not normalised here (trainer/eval)
