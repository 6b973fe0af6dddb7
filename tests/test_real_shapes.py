"""The benchmark on the real architectures: their sizes, and that what it counts is what the steps do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real_models import (
    FLUX_DEV,
    SD3_MEDIUM,
    SD15,
    SHAPES,
    Shape,
    build_backbone,
    build_network,
    build_reward,
    reduced,
)
from benchmarks.real_shapes import STEPS, Settings, Work, count, measure, peak_flops, started, write
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum
from rsaft.sampling import Sampling
from rsaft.types import Batch

CPU = Settings(device="cpu", dtype="fp32", batches=(1,), recompute="off", vae="fp32", compile=False, repeats=1)


def small(shape: Shape, **network: int) -> Shape:
    """Few layers, 32 pixels, three sampling steps."""
    sizes = {**shape.network, **shape.narrow, **network}
    vae = reduced(shape).vae | {"layers_per_block": 1}
    return replace(reduced(shape), network=sizes, vae=vae, resolution=32, num_steps=3, reward=(64, 1))


MMDIT = small(SD3_MEDIUM, num_layers=2)  # with guidance
FLUX = small(FLUX_DEV, num_layers=1, num_single_layers=1)  # with guidance as an input of the network
WORK = Work(parameters=10, lora=1, decoder=5, forward=2e12, network=4e12, decode=3e12, reward=1e12, num_steps=3)


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("SD1.5", 859.52e6, 0.01e6),
        ("SDXL", 2567.46e6, 0.01e6),
        ("SD3 medium", 2.03e9, 0.01e9),
        ("SD3.5 large", 8.06e9, 0.01e9),
        ("Flux.1-dev", 11.90e9, 0.01e9),
    ],
)
def test_a_network_has_the_published_number_of_parameters(name: str, published: float, tolerance: float):
    network = build_network(SHAPES[name], device="meta", dtype=torch.float32)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(published, abs=tolerance)


def test_sd35_medium_with_its_table_of_positions_has_the_published_two_and_a_half_billion_values():
    network = build_network(SHAPES["SD3.5 medium"], device="meta", dtype=torch.float32)
    assert sum(v.numel() for v in network.state_dict().values()) == pytest.approx(2.47e9, abs=0.01e9)


@pytest.mark.parametrize("name", SHAPES)
def test_a_reduced_network_has_the_modules_of_the_true_one(name: str):
    true, narrow = (
        build_network(shape, device="meta", dtype=torch.float32) for shape in (SHAPES[name], reduced(SHAPES[name]))
    )
    assert [type(m) for m in narrow.modules()] == [type(m) for m in true.modules()]
    assert sum(p.numel() for p in narrow.parameters()) < 0.05 * sum(p.numel() for p in true.parameters())


@pytest.mark.parametrize("shape", [pytest.param(MMDIT, marks=pytest.mark.slow), FLUX], ids=["guided", "distilled"])
def test_counted_flops_of_a_step_are_those_that_the_step_performs(shape: Shape):
    work = count(shape)
    backbone = build_backbone(shape, device="cpu", dtype=torch.float32)
    score = ImageScore(backbone, {"r": build_reward(shape, device="cpu")}, WeightedSum({"r": 1.0}))
    sampling = Sampling(num_steps=shape.num_steps, guidance=shape.guidance)
    rollout = DRaFT(k=1, sampling=sampling).rollout(backbone, Batch(("", ""), (0, 1), step=0, seed=0))
    for name, step in STEPS.items():
        # A fused attention kernel computes some of its products again in the backward pass: no work of the model.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step([rollout], score, backbone.parameters())
        assert counter.get_total_flops() == 2 * work.step(name)


def test_work_of_a_step_is_that_of_its_parts():
    assert WORK.step("plain") == 2 * 2e12 + 4e12 + 3e12 + 1e12
    assert WORK.step("RSA-FT") == 2 * WORK.step("plain")


def test_a_network_is_bf16_and_what_is_trained_is_fp32():
    backbone = build_backbone(FLUX, device="cpu", dtype=torch.bfloat16)
    trained = {id(p) for p in backbone.parameters()}
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert {p.dtype for p in backbone.network.parameters() if id(p) not in trained} == {torch.bfloat16}
    assert next(backbone.pipe.vae.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "recompute"),
    [pytest.param(MMDIT, "off", marks=pytest.mark.slow), pytest.param(FLUX, "on", marks=pytest.mark.slow)],
    ids=["guided", "distilled"],
)
def test_both_steps_are_measured_in_the_precision_of_a_gpu(shape: Shape, recompute: str):
    rows = measure(shape, WORK, replace(CPU, dtype="bf16", recompute=recompute))
    assert [(row["step"], row["recompute"]) for row in rows] == [(step, recompute == "on") for step in STEPS]
    assert all(row["seconds"] > 0 and row["finite"] for row in rows)
    assert all(row["peak_gib"] is None and row["mfu"] is None for row in rows)


def test_a_step_that_does_not_fit_is_named_and_tried_once_more_with_recomputation(tmp_path: Path):
    def too_large(rollouts: Any, score: Any, params: Any, state: Any = None) -> Any:
        raise torch.OutOfMemoryError

    rows = measure(MMDIT, WORK, replace(CPU, recompute="auto"), {"plain": too_large})
    assert [(row["recompute"], row["seconds"]) for row in rows] == [(False, None), (True, None)]
    write(_results(tmp_path, rows), tmp_path)
    page = (tmp_path / "real_shapes.md").read_text()
    assert page.count("| plain | does not fit |") == 2


def test_models_of_an_earlier_run_are_kept_for_the_same_settings_only(tmp_path: Path):
    write(_results(tmp_path, []), tmp_path)
    assert list(started(CPU, tmp_path)["models"]) == ["SD3 medium"]
    assert started(replace(CPU, repeats=2), tmp_path)["models"] == {}


def _results(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    results = started(CPU, folder)
    results["models"]["SD3 medium"] = {
        "date": "2026-01-01",
        "resolution": 1024,
        "counted": vars(WORK) | {f"step {step}": WORK.step(step) for step in STEPS},
        "built": {"parameters": WORK.parameters, "resolution": MMDIT.resolution, "num_steps": MMDIT.num_steps},
        "rows": rows,
    }
    return results


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_has_its_published_peak_or_none(device: str, peak: float | None):
    assert peak_flops(device) == peak


@pytest.mark.slow
def test_the_work_of_sd15_is_the_known_one():
    """0.80 TFLOP a call of the UNet at 512 pixels; 0.162 a ViT-L/14, and again for its backward pass to the pixels."""
    work = count(SD15)
    assert work.forward == pytest.approx(2 * 0.80e12, rel=0.02)
    assert work.reward == pytest.approx(2 * 0.162e12, rel=0.03)
