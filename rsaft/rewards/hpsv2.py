"""HPSv2: human preference as the cosine of a fine-tuned CLIP (Wu et al., 2023, arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source
from rsaft.rewards.clip_features import VIT_H, Clip, cosine, load_clip
from rsaft.rewards.clip_tokens import like_open_clip
from rsaft.rewards.frozen import Frozen, Precision, check_inputs
from rsaft.rewards.open_clip_backend import Backend, check_backend, load_open_clip
from rsaft.rewards.preprocess import hpsv2_preprocess
from rsaft.types import Images

Version = Literal["2.0", "2.1"]
HUB_ID = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(Frozen):
    """Human preference score v2: cosine of image and prompt under a CLIP that was tuned on 800,000 comparisons.

    - Checkpoint: `xswu/HPSv2`, `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt`, 1.97 GB each (fp16), Apache-2.0.
    - Scale: a plain cosine, 0.2 to 0.35 in practice; papers print it times 100. 2.0 and 2.1 cannot be compared.
    - Text: 77 tokens, cleaned as open_clip does; the rest is cut off.
    - Preprocessing: `hpsv2_preprocess`, the longer side to 224, zeros around.
    - Cost: one forward of a ViT-H/14 for images and one without graph for prompts; 986 million parameters, 3.9 GB in
      fp32.

    Args:
        path_or_id: hub id, folder or file; None is the published one of `version`.
        version: which file of a hub repository or folder. A file is what it is.
        device: where to put it; this process's GPU if there is one.
        dtype: of weights and arithmetic; norms and cosine are fp32 all the same.
        tokenizer: folder or hub id of a CLIP tokenizer; None looks beside the weights, then takes that of `VIT_H`.
        antialias: as today's torchvision resizes tensors. False is for numbers of older installations.
        backend: "transformers", or "open_clip" to run the same weights in open_clip_torch.

    Raises:
        ConfigError: in one sentence, if something is missing or does not fit.
        MissingExtraError: if open_clip_torch is asked for and does not work.
    """

    def __init__(
        self,
        path_or_id: Source | None = None,
        *,
        version: Version = "2.1",
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype = "fp32",
        tokenizer: Source | None = None,
        antialias: bool = True,
        backend: Backend = "transformers",
    ) -> None:
        super().__init__()
        if version not in FILES:
            raise ConfigError(f"HPSv2: version is '2.0' or '2.1'; got {version!r}.")
        check_backend(backend, "HPSv2")
        self.antialias = antialias
        load = load_clip if backend == "transformers" else load_open_clip
        self.clip: Clip = load(
            HUB_ID if path_or_id is None else path_or_id,
            reward="HPSv2",
            files=[FILES[version], "model.safetensors", "pytorch_model.bin"],
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            default_tokenizer=VIT_H,
            clean=like_open_clip,
        )
        self.freeze()

    def forward(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Cosine of each image with its prompt, fp32, on the device of `images`."""
        check_inputs(images, prompts, "HPSv2")
        features = self.clip.image_features(hpsv2_preprocess(images, self.antialias, self.clip.size))
        return cosine(features, self.clip.text_features(prompts)).to(images.device)
