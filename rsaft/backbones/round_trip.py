"""What an exported file gives back, compared with what was trained: at save time, beside the trained weights.

diffusers takes a file without its keys or its scale in silence, so nothing is believed that was not compared: the
weights layer by layer, and the denoiser's output on a fixed input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rsaft.backbones.lora import ADAPTER
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.backbones.quiet import silent_reload
from rsaft.errors import ExportError

_BESIDE = "rsaft_beside"  # name of the reloaded adapter
_REPORT = "keep the run's own checkpoint and report this"


def adapter_difference(
    backbone: DiffusersBackbone, load: Callable[[str], object], *, source: str, exact: bool
) -> float:
    """Load an adapter from a file beside the trained one, on the same network, and compare the two.

    Args:
        backbone: with a trained adapter; it is left as it was, whatever happens.
        load: loads the file into the pipeline or network, under the adapter's name that it is given.
        source: the file, for the error.
        exact: whether the layers' scale B A must be equal, or may be rounded.

    Returns:
        The largest absolute difference of the denoiser's outputs on a fixed input.

    Raises:
        ExportError: if the file cannot be loaded, nothing is loaded from it, or a layer has another adapter.
    """
    network = backbone.network
    expected = probe(backbone)
    try:
        with silent_reload(), torch.random.fork_rng(devices=[]):  # peft draws initial values before it loads the file's
            load(_BESIDE)
        if _BESIDE not in network.peft_config:
            raise ExportError(f"export to {source}: no adapter is found in the file; {_REPORT}.")
        _check_layers(network, source=source, exact=exact)
        network.set_adapter(_BESIDE)
        return _max_difference(probe(backbone), expected)
    except (ValueError, RuntimeError, LookupError, OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ExportError(f"export to {source}: the file does not load back ({reason}); {_REPORT}.") from error
    finally:
        network.set_adapter(ADAPTER)
        if _BESIDE in network.peft_config:
            network.delete_adapters(_BESIDE)


def network_difference(
    backbone: DiffusersBackbone, reloaded: Any, written: Mapping[str, Tensor], *, source: str
) -> float:
    """Put a reloaded network in the trained one's place, and compare.

    Args:
        backbone: left as it was.
        reloaded: of the same kind as the backbone's network, without adapters.
        written: the tensors that `reloaded` must hold.
        source: the folder, for the error.

    Returns:
        The largest absolute difference of the denoiser's outputs on a fixed input.

    Raises:
        ExportError: if a tensor is not the one that was written.
    """
    expected = probe(backbone)
    trained = backbone.network
    try:
        backbone.network = reloaded.to(backbone.device).eval()
        found = reloaded.state_dict()
        changed = sorted(
            {n for n in written if n not in found or not torch.equal(found[n], written[n])}
            | found.keys() - written.keys()
        )
        if changed:
            raise ExportError(f"export to {source}: {changed[0]} comes back changed; {_REPORT}.")
        return _max_difference(probe(backbone), expected)
    finally:
        backbone.network = trained


@torch.no_grad()
def probe(backbone: DiffusersBackbone) -> Tensor:
    """The denoiser's output on a fixed input; the empty prompt, because a prompt cache always holds it.

    A compiled network runs as it was written: a reloaded one is not compiled, and the two are to be equal.
    """
    noise = torch.randn((1, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        denoise = backbone.denoiser([""], guidance=1.0, detach_unconditional=False)
        return denoise(noise.to(backbone.device, backbone.dtype), 500.0)


def layer_update(layer: Any, *, adapter: str = ADAPTER, rounded_to: torch.dtype | None = None) -> Tensor:
    """scale B A, what one layer's adapter adds to its weight, in at least fp32.

    Args:
        layer: a peft layer.
        adapter: its name.
        rounded_to: first round A and B to this dtype.
    """
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if rounded_to is not None:
        a, b = a.to(rounded_to), b.to(rounded_to)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return layer.scaling[adapter] * (b.to(dtype) @ a.to(dtype))


@torch.no_grad()
def _check_layers(network: Any, *, source: str, exact: bool) -> None:
    from peft.tuners.lora import LoraLayer

    for name, layer in network.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not {ADAPTER, _BESIDE} <= set(layer.lora_A):
            raise ExportError(f"export to {source}: layer {name} comes back without its adapter; {_REPORT}.")
        # diffusers loads adapters in the network's dtype: a half-precision network computes in it anyway
        dtype = layer.lora_A[_BESIDE].weight.dtype
        expected = layer_update(layer, rounded_to=dtype)
        allowed = 0.0 if exact else 8 * torch.finfo(dtype).eps * float(expected.abs().max())
        if not _max_difference(layer_update(layer, adapter=_BESIDE), expected) <= allowed:
            raise ExportError(f"export to {source}: layer {name} comes back with another adapter; {_REPORT}.")


def _max_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b|; infinite if one of them is not finite."""
    difference = float((a - b).abs().max())
    return difference if math.isfinite(difference) else math.inf
