"""What cannot be done with sharded weights is refused before anything is split, in one sentence with a way out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rsaft
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, DRTune, plain_step
from rsaft.rdrl.sharding import shard_if_asked, why_not
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling

CONFIG = TrainConfig(batch_size=8, eval_samples=8, shard=True)
FOUR_STEPS = Sampling(num_steps=4)


def reason(folder: Path, *, algorithm: Any = None, step: Any = plain_step, config: Any = CONFIG, **load: Any) -> Any:
    backbone = rsaft.load_backbone(folder, device="cpu", **load)
    return why_not(config, backbone, algorithm or DRaFT(sampling=FOUR_STEPS), step, world=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora": rsaft.LoRA(rank=2)}, "an adapter's are small; set model.lora to null"),
        pytest.param({"compile": True}, "set model.compile to false", marks=pytest.mark.slow),
        ({"dtype": "fp16"}, "set model.dtype to bf16 or fp32"),
        ({"algorithm": DRTune(k=2, sampling=FOUR_STEPS)}, "set algorithm.backend to graph"),
        ({"config": replace(CONFIG, eval_samples=5)}, "5 samples do not split over 2; set train.eval_samples to a"),
        ({"step": RSAFT(eps_group="micro_batch")}, "set step.eps_group to global"),
        ({"step": RSAFT(eps_share=0.125)}, "hold 4 samples .* set train.micro_batch to a multiple of 8"),
        (
            {"step": RSAFT(eps_share=0.5), "config": replace(CONFIG, micro_batch=1)},
            "hold 1 samples .* set train.micro_batch to a multiple of 2",
        ),
    ],
)
def test_what_sharded_weights_cannot_do_has_a_reason_and_a_way_out(tiny_sd, settings, sentence):
    assert re.search(sentence, reason(tiny_sd, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step": RSAFT(eps_share=0.25)},
        {"step": RSAFT(eps_every=4)},
        {"dtype": "bf16"},
        {"algorithm": DRTune(k=2, backend="graph", sampling=FOUR_STEPS)},
    ],
)
def test_the_rest_can_be_sharded(tiny_sd, settings):
    assert reason(tiny_sd, **settings) is None


def test_one_process_has_nothing_to_shard(tiny_sd):
    backbone = rsaft.load_backbone(tiny_sd, device="cpu")
    before = type(backbone.network)
    shard_if_asked(CONFIG, backbone, DRaFT(sampling=FOUR_STEPS), plain_step)
    assert type(backbone.network) is before


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_settings_of_accelerate_that_would_be_ignored_are_refused(tiny_sd, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    backbone = rsaft.load_backbone(tiny_sd, device="cpu")
    with pytest.raises(ConfigError, match=f"found {name}; .* start with torchrun"):
        shard_if_asked(CONFIG, backbone, DRaFT(sampling=FOUR_STEPS), plain_step)
