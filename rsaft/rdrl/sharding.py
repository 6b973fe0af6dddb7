"""Full fine-tuning of a network whose weights, gradients, AdamW and moving average are split over the processes: FSDP2.

Each of n processes holds 1/n of every tensor. A block's whole weights exist only while it computes, forward and
backward; its gradient is summed over processes on the way back. So all processes must call the network equally often,
and gradients reach the weights through `.backward()` alone: what breaks one of these is refused here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsaft import distributed
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import ConfigError, ExportError
from rsaft.flatten.rsa_ft import RSAFT
from rsaft.rdrl.drtune import DRTune
from rsaft.rdrl.train_config import TrainConfig
from rsaft.types import Algorithm, Step


def shard_if_asked(config: TrainConfig, backbone: DiffusersBackbone, algorithm: Algorithm, step: Step) -> None:
    """Split the network over the processes, in place, if `config.shard` and there are several.

    Args:
        config: the loop's settings.
        backbone: as `load_backbone` gives it; each process needs memory for all of it once.
        algorithm, step: what will call the network.

    Raises:
        ConfigError: if another library has wrapped the network, or something cannot be done with a split one.
    """
    _check_unwrapped(backbone)
    world = distributed.world_size()
    if config.shard and world > 1:
        reason = why_not(config, backbone, algorithm, step, world=world)
        if reason is not None:
            raise ConfigError(f"train.shard: {reason}, or set train.shard to false.")
        _shard(backbone.network)


def _shard(network: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    name = type(network).__name__
    blocks = [m for m in network.modules() if type(m).__name__ in network._no_split_modules]  # as accelerate wraps them
    for module in [*reversed(blocks), network]:  # the inner ones first
        # Resharded after every forward, also the outermost: whole weights that stayed would miss a perturbation.
        fully_shard(module, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loop divides by the number of processes
            module.set_force_sum_reduction_for_comms(True)  # gloo can do no other
    type(network).__name__ = name  # it became one of FSDP's own; the export and the model card name diffusers'
    # A warning that changing a block's output in place would be wrong; no family does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def _check_unwrapped(backbone: DiffusersBackbone) -> None:
    """Refuse a network that another library spreads over processes, and settings of accelerate that would do so."""
    found = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if os.environ.get(name) == "true"]
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor
        from torch.nn.parallel import DistributedDataParallel

        wrappers = (DistributedDataParallel, FullyShardedDataParallel)
        found += [type(m).__name__ for m in backbone.network.modules() if isinstance(m, wrappers)]
        found += ["DTensor parameters" for p in backbone.parameters()[:1] if isinstance(p, DTensor)]
    if found:
        raise ConfigError(
            f"processes: found {', '.join(found)}; the loop itself averages gradients over processes, so start with "
            "torchrun, pass the network as load_backbone gives it, and to split it set train.shard to true."
        )


def why_not(
    config: TrainConfig, backbone: DiffusersBackbone, algorithm: Algorithm, step: Step, *, world: int
) -> str | None:
    """What a network that is split over `world` processes cannot do, and the way out; None if it can do all this."""
    micro = config.micro_batch or config.batch_size // world
    if backbone.lora is not None:
        return "it splits the weights of full fine-tuning, and an adapter's are small; set model.lora to null"
    if backbone.network._compiled_call_impl is not None:
        return "a compiled network is not supported; set model.compile to false"
    if backbone.compute_dtype == torch.float16:
        return "fp16 scales gradients at weights, which sharded ones do not allow; set model.dtype to bf16 or fp32"
    if isinstance(algorithm, DRTune) and algorithm.backend == "vjp":
        return "DRTune's backend 'vjp' takes gradients that sharded weights do not have; set algorithm.backend to graph"
    if config.eval_samples % world:
        return (
            f"processes evaluate equal parts, and {config.eval_samples} samples do not split over {world}; set "
            f"train.eval_samples to a multiple of {world}"
        )
    if not isinstance(step, RSAFT):
        return None
    if step.eps_group == "micro_batch":
        return "processes cannot hold different epsilons of one network; set step.eps_group to global"
    if micro % round(1 / step.eps_share):
        return (
            f"every micro-batch takes part in the first pass, and of some that hold {micro} samples step.eps_share "
            f"{step.eps_share} takes none; set train.micro_batch to a multiple of {round(1 / step.eps_share)}"
        )
    return None


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor on `like`'s device; if `like` is sharded, split as it is."""
    if not distributed.is_sharded(like) or distributed.is_sharded(value):
        return value.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor: nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def assembled(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Sharded tensors put together, one after the other, on the first process's CPU; the others get empty ones.

    All processes must call it together. Tensors that are not sharded are passed on, and cost nothing.
    """
    return {group: {name: _whole(t) for name, t in tensors.items()} for group, tensors in groups.items()}


def _whole(tensor: Tensor) -> Tensor:
    if not distributed.is_sharded(tensor):
        return tensor
    full = tensor.full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if distributed.rank() == 0 else full.new_empty(0)


def export_assembled(backbone: DiffusersBackbone, weights: Mapping[str, Tensor], folder: Path) -> None:
    """What `export_weights` does, for a sharded network: write it whole, load it back, and compare all tensors.

    Only the first process calls it. Its output is not compared: the trained network runs on all processes only.

    Args:
        backbone: it is left as it was.
        weights: whole values of its parameters, by their number.
        folder: gets the network's folder, as diffusers reads it.

    Raises:
        ExportError: if a tensor comes back changed.
    """
    from accelerate import init_empty_weights

    network = backbone.network
    written = {name: t.cpu() for name, t in network.state_dict().items() if not distributed.is_sharded(t)}
    written |= {name: weights[str(i)] for i, (name, _) in enumerate(network.named_parameters())}
    with init_empty_weights():
        plain = type(network).from_config(network.config)  # FSDP's class makes instances of the class it wraps
    plain.load_state_dict(written, assign=True)
    plain.save_pretrained(folder / backbone.family.network)
    dtype = next(plain.parameters()).dtype
    reloaded = type(plain).from_pretrained(folder, subfolder=backbone.family.network, dtype=dtype).state_dict()
    changed = [name for name in written if name not in reloaded or not torch.equal(written[name], reloaded[name])]
    if changed or len(reloaded) != len(written):
        raise ExportError(
            f"export to {folder}: {(changed or ['the list of tensors'])[0]} comes back changed; keep the run's own "
            "checkpoint and report this."
        )
