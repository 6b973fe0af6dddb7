"""The LAION aesthetic predictor v2 (Schuhmann, 2022, christophschuhmann/improved-aesthetic-predictor)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source, find_file
from rsaft.rewards.clip_features import load_clip, unit
from rsaft.rewards.frozen import Frozen, Precision, check_inputs, network_device, network_dtype
from rsaft.rewards.linear_head import load_head
from rsaft.rewards.preprocess import clip_preprocess
from rsaft.types import Images

HUB_ID = "trl-lib/ddpo-aesthetic-predictor"
FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")
CLIP_ID = "openai/clip-vit-large-patch14"


class AestheticScore(Frozen):
    """LAION aesthetic score: five linear layers on the unit image feature of CLIP ViT-L/14. Reads no prompt.

    There is no activation between the layers, so the score is exactly affine in that feature, 5.2366 + w.e with
    |w| = 17.996: its gradient in feature space is the same for every image, which makes it the easiest of all to hack.

    - Checkpoint: `sac+logos+ava1-l14-linearMSE.pth`, 3.7 MB, Apache-2.0, from the repository named above; TRL keeps a
      copy on the hub, `trl-lib/ddpo-aesthetic-predictor`. And `openai/clip-vit-large-patch14`, 1.7 GB, MIT (code).
    - Scale: 1 to 10 were the ratings; 4 to 7 in practice.
    - Text: none.
    - Preprocessing: `clip_preprocess`, the shorter side to 224, centre crop: what lies outside the square is not seen.
    - Cost: one forward of a ViT-L/14 image tower, 304 million parameters, 1.2 GB in fp32.

    Args:
        path_or_id: of the five layers: hub id, folder or file.
        clip: of CLIP ViT-L/14: hub id, folder or file.
        device: where to put it; this process's GPU if there is one.
        dtype: of CLIP's weights and arithmetic; norm and layers are fp32 all the same.
        exact: round pixels as PIL does, for numbers that are compared with published ones.

    Raises:
        ConfigError: in one sentence, if something is missing or does not fit.
    """

    def __init__(
        self,
        path_or_id: Source = HUB_ID,
        *,
        clip: Source = CLIP_ID,
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype = "fp32",
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.exact = exact
        path = find_file(path_or_id, FILES, "AestheticScore")
        where, chosen = network_device(device), network_dtype(dtype, "AestheticScore")
        self.head = load_head(path, "AestheticScore", device=where, dtype=chosen)
        self.clip = load_clip(
            clip, reward="AestheticScore", device=where, dtype=chosen, activation="quick_gelu", reads_text=False
        )
        found, needed = self.clip.network.config.projection_dim, self.head.layers["0"].in_features
        if found != needed:
            raise ConfigError(
                f"AestheticScore: '{path}' reads features of {needed} values, and the CLIP at '{clip}' gives {found}; "
                f"it was made for {CLIP_ID}."
            )
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The score of each image, fp32, on the device of `images`."""
        check_inputs(images, prompts, "AestheticScore")
        features = self.clip.image_features(clip_preprocess(images, self.clip.size, exact=self.exact))
        return self.head(unit(features)).to(images.device)
