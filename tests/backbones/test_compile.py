"""`compile=True` changes no result."""

from __future__ import annotations

import shutil

import pytest
import torch

import rsaft
from rsaft.backbones import LoRA, load_backbone
from rsaft.backbones.compiled import check_compiled
from rsaft.errors import ConfigError
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


@needs_compiler
@pytest.mark.slow
def test_the_switch_compiles_the_network_in_place(tiny_of):
    plain, compiled = (load_backbone(tiny_of("sd3"), compile=flag) for flag in (False, True))
    assert plain.network._compiled_call_impl is None
    assert compiled.network._compiled_call_impl is not None
    assert list(compiled.network.state_dict()) == list(plain.network.state_dict())


def _compiled_by(backbone, change):
    """Compile with a backend that runs each graph as it is, and then changes what comes out."""
    torch._dynamo.reset()
    backbone.network.compile(backend=lambda graph, inputs: lambda *given: change(graph(*given)))


@pytest.mark.slow
def test_a_network_that_is_compiled_rightly_passes_its_check(tiny_of):
    backbone = load_backbone(tiny_of("sd"), lora=LoRA(rank=2))
    _compiled_by(backbone, lambda outputs: outputs)
    assert check_compiled(backbone) == (0.0, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda outputs: tuple(1.01 * x for x in outputs), id="output", marks=pytest.mark.slow),
        # The same values with half the gradient, as a fault in generated backward code has it.
        pytest.param(lambda outputs: tuple(x.detach() + 0.5 * (x - x.detach()) for x in outputs), id="gradient-alone"),
    ],
)
def test_a_network_that_is_compiled_wrongly_is_refused(tiny_of, change):
    backbone = load_backbone(tiny_of("sd"), lora=LoRA(rank=2))
    _compiled_by(backbone, change)
    with pytest.raises(ConfigError, match=r"model.compile: .* its gradient by [0-9.]+e-0[12]"):
        check_compiled(backbone)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="a fault of torch 2.13")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_where_torch_compiles_wrongly_the_load_is_refused(tiny_of, family):
    with pytest.raises(ConfigError, match=r"its gradient by .* set model.compile to false"):
        load_backbone(tiny_of(family), lora=LoRA(rank=2), compile=True, device="cpu")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
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
