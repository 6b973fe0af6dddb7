"""`compile=True` changes no result."""

from __future__ import annotations

import shutil

import pytest
import torch

import rsaft
from rsaft.backbones import LoRA, load_backbone
from rsaft.rdrl import DRaFT
from rsaft.sampling import Sampling
from tests import asserts
from tests.helpers import batch_of, randomize_, relative_difference

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)


def _gradient(backbone):
    """Final latents and the toy reward's gradient, with a prefix and a tail of one step each."""
    guidance = 1.0 if backbone.family.name == "flux" else 3.0
    rollout = DRaFT(k=1, sampling=Sampling(2, guidance=guidance)).rollout(backbone, batch_of())
    sample = rollout.tail(rollout.prefix())
    return sample.latents.detach(), asserts.reward_gradient(backbone, sample)


def test_three_timesteps_are_one_graph_with_the_same_images(tiny_of):
    # Dynamo alone: generating code takes minutes, and is left to the slow test.
    plain, captured = (load_backbone(tiny_of("flux")) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    captured.network.compile(backend="eager")
    images = [rsaft.sample(backbone, ["a cat"], Sampling(3, guidance=2.0), seed=0) for backbone in (captured, plain)]
    assert torch.equal(*images)
    counters = torch._dynamo.utils.counters
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})


def test_the_switch_compiles_the_network_in_place(tiny_of):
    plain, compiled = (load_backbone(tiny_of("sd3"), compile=flag) for flag in (False, True))
    assert plain.network._compiled_call_impl is None
    assert compiled.network._compiled_call_impl is not None
    assert list(compiled.network.state_dict()) == list(plain.network.state_dict())


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param("sd", marks=pytest.mark.xfail(strict=True, reason="torch 2.13 on a CPU: docs/backbones.md")),
        "sd3",
        "flux",
    ],
)
def test_compiled_networks_change_no_result_beyond_1e_4(tiny_of, family, record_property):
    lora, sampling = LoRA(rank=2, alpha=4), Sampling(2, guidance=1.0)
    backbones = [load_backbone(tiny_of(family), lora=lora, compile=flag) for flag in (True, False)]
    for backbone in backbones:
        randomize_(backbone.parameters())
    images = [rsaft.sample(backbone, ["a cat", "rain"], sampling, seed=0) for backbone in backbones]
    differences = [float((images[0] - images[1]).abs().max())]
    differences += [relative_difference(a, b) for a, b in zip(*map(_gradient, backbones), strict=True)]
    record_property("difference", max(differences))
    assert max(differences) <= 1e-4
