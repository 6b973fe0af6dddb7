"""A short digest of the model that a run begins from, to tell whether files made from a model fit another run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rsaft.backbones.pipeline import DiffusersBackbone

VALUES = 64  # of each tensor that are read
_ENCODER = ("encoder.", "quant_conv.")  # of the VAE; sampling does without


@torch.no_grad()
def fingerprint(backbone: DiffusersBackbone) -> str:
    """sha256 of names, shapes, dtypes and 64 evenly spaced values of each tensor of the base denoiser and the decoder.

    An adapter does not count, so it stays while one is trained. Where the whole network is trained, it is that of the
    kept copy, or of the weights as they are. It does not depend on the device or on how weights lie in files. The same
    checkpoint in another precision is another model, as its samples differ.

    It is no hash of all weights: a change between the values that are read is not seen. Fine-tuning and merging change
    every value; a flipped bit in a file is what checksums of files are for. The text encoders do not count.

    Cost: reads 64 values a tensor; about a second for billions of weights.
    """
    network = backbone.network if backbone.kept_base is None else backbone.kept_base
    digest = hashlib.sha256()
    for part, module in (("denoiser", network), ("decoder", backbone.pipe.vae)):
        for name, tensor in sorted(_base_tensors(module), key=lambda item: item[0]):
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_some_values(tensor))
    return digest.hexdigest()


def _base_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the checkpoint's names, without adapters and the VAE's encoder."""
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name and not name.startswith(_ENCODER):
            yield name.replace(".base_layer.", "."), tensor


def _some_values(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    few = flat[:: max(1, len(flat) // VALUES)][:VALUES]
    return few.cpu().contiguous().view(torch.uint8).numpy().tobytes()
