"""LoRA through peft's `add_adapter`: settings, attachment, and the checks that a pure tail needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rsaft.errors import ConfigError

ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the denoiser, by default on its attention: W + (alpha / rank) B A.

    Cost: 2 * rank * width trainable values a layer, kept in fp32 whatever the network's dtype.
    """

    rank: int = 8
    alpha: float | int = 8.0  # the adapter is scaled by alpha / rank
    targets: tuple[str, ...] | None = None  # ends of module names; null takes the attention of the model's family
    dropout: float = 0.0  # only 0: see below

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is the width of the adapter, so rank >= 1; got {self.rank}.")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha scales the adapter, so alpha > 0; got {self.alpha}.")
        if self.dropout != 0:
            raise ConfigError(
                f"lora.dropout: two passes over one rollout must agree bit for bit, so dropout is 0; "
                f"got {self.dropout}; use weight decay instead."
            )


def attach(network: Any, lora: LoRA, *, seed: int) -> None:
    """Freeze `network` and add one adapter to it; its factors are fp32 and the only trainable tensors.

    Args:
        network: a diffusers model.
        lora: the adapter's settings, targets included.
        seed: of the adapter's initial A (B starts at 0).

    Raises:
        ConfigError: if no module matches one of `lora.targets`.
    """
    from peft import LoraConfig

    targets = list(lora.targets or ())
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [t for t in targets if not any(name == t or name.endswith("." + t) for name in linear)]
    if unmatched or not targets:
        ends = sorted(
            {name.rsplit(".", 1)[-1] if not name[-1].isdigit() else ".".join(name.split(".")[-2:]) for name in linear}
        )
        raise ConfigError(
            f"lora.targets: no linear layer ends in one of {unmatched}; this network's layers end in {ends}."
        )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws A from the CPU's global generator
        network.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=targets,
                lora_dropout=0.0,
                init_lora_weights="gaussian",
            ),
            adapter_name=ADAPTER,
        )
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
