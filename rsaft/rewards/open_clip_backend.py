"""The same weights run by open_clip_torch, in whose code HPSv2 was trained: another backend, and a check on ours."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError, MissingExtraError
from rsaft.rewards.checkpoint import Source, find_file, load_strictly, read_weights
from rsaft.rewards.clip_features import WEIGHT_FILES, clip_config, named_as_transformers
from rsaft.rewards.clip_tokens import Cleaning, check_tokens, load_tokens
from rsaft.rewards.frozen import Frozen, Precision, network_device, network_dtype
from rsaft.rewards.open_clip_layout import Activation, to_open_clip

Backend = Literal["transformers", "open_clip"]
_OWN_VOCABULARY = 49408  # tokens of the vocabulary that open_clip ships


class OpenClip(Frozen):
    """open_clip's CLIP, only read. `text_features` has no graph."""

    def __init__(self, network: Any, tokens: Callable[[Sequence[str]], Tensor], size: int, scale: float) -> None:
        super().__init__()
        self.network, self.tokens, self.size, self.scale = network, tokens, size, scale
        self.freeze()

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Projected features of normalised pixels, in the network's dtype and not normalised."""
        weight = self.network.text_projection
        return self.network.encode_image(pixels.to(weight.device, weight.dtype))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Projected features of prompts, in the network's dtype and not normalised."""
        return self.network.encode_text(self.tokens(list(prompts)).to(self.network.text_projection.device))


def check_backend(backend: str, reward: str) -> None:
    """Raises: ConfigError if there is no such backend."""
    if backend not in ("transformers", "open_clip"):
        raise ConfigError(f"{reward}: backend is 'transformers' or 'open_clip'; got {backend!r}.")


def load_open_clip(
    checkpoint: Source,
    *,
    reward: str,
    files: Sequence[str] = WEIGHT_FILES,
    device: str | torch.device | None = None,
    dtype: Precision | torch.dtype = "fp32",
    tokenizer: Source | None = None,
    default_tokenizer: Source | None = None,
    clean: Cleaning | None = None,
    activation: Activation = "gelu",
) -> OpenClip:
    """As `clip_features.load_clip`, run by open_clip, with open_clip's own tokenizer unless another is named.

    Raises:
        MissingExtraError: if open_clip_torch is not installed, or is and does not work.
        ConfigError: if the weights do not fit.
    """
    open_clip = import_open_clip(reward)
    path = find_file(checkpoint, files, reward)
    weights = named_as_transformers(read_weights(path, reward), path, reward)
    config = clip_config(weights, path, checkpoint, activation, reward)
    network = open_clip.model.CLIP(**_architecture(config))
    load_strictly(network, to_open_clip(weights), path, reward)
    network.to(network_device(device), network_dtype(dtype, reward))
    text = config.text_config
    if tokenizer is None and text.vocab_size == _OWN_VOCABULARY:
        tokens = open_clip.SimpleTokenizer(context_length=text.max_position_embeddings)
    else:
        fallback = checkpoint if default_tokenizer is None else default_tokenizer
        tokens = load_tokens(tokenizer, path.parent, fallback, text.max_position_embeddings, reward, clean)
        check_tokens(tokens, text.vocab_size, 2, reward)  # open_clip reads where the id is largest
    return OpenClip(network, tokens, config.vision_config.image_size, float(weights["logit_scale"].float().exp()))


def import_open_clip(reward: str) -> Any:
    """The module open_clip.

    Raises:
        MissingExtraError: says in one sentence what is wrong with it.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise MissingExtraError(f'{reward}: backend="open_clip" needs open_clip_torch: pip install "rsaft[openclip]".')
    _declare_torchvision_operators()
    try:
        return importlib.import_module("open_clip")
    except Exception as error:  # a torchvision that does not fit torch fails in many ways
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise MissingExtraError(
            f'{reward}: backend="open_clip": open_clip_torch is installed and cannot be imported ({reason}); install '
            'the torchvision that belongs to your torch (constraints.txt), or use backend="transformers".'
        ) from error


@functools.cache  # an operator is declared once
def _declare_torchvision_operators() -> None:
    """Let a torchvision built for CUDA be imported beside a torch built for the CPU.

    Its library then cannot be loaded, and `import torchvision` dies of the operators that are missing, which CLIP never
    calls. They are declared here, and raise if something does call them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or torch.version.cuda is not None:
        return
    try:
        for library in Path((found.submodule_search_locations or [""])[0]).glob("_C*.so"):
            ctypes.CDLL(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _architecture(config: Any) -> dict[str, Any]:
    """Arguments of open_clip's CLIP for a CLIPConfig of transformers."""
    vision, text = config.vision_config, config.text_config
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }
