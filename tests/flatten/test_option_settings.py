"""The options of flattening as keys of a run file, and in the memory estimate of `rsaft check`."""

from typing import Any

import pytest

from rsaft.backbones import LoRA
from rsaft.config import Model, json_schema, to_dict, validate
from rsaft.config.assemble import load_model
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT
from rsaft.rdrl.memory import Planned
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from tests.asserts import assert_estimate_is_allocated
from tests.helpers import PROMPTS, batch_of, toy_reward


def run_file(**step: Any) -> dict[str, Any]:
    return {
        "model": {"path": "testbed:fashion"},
        "prompts": {"train": "testbed:fashion"},
        "algorithm": {"type": "draft"},
        "rewards": {"toy": {"type": "testbed", "world": "fashion"}},
        "objective": {"type": "weighted_sum", "weights": {"toy": 1.0}},
        "step": {"type": "rsaft", **step},
    }


OPTIONS: dict[str, Any] = {"space": "image", "delta_steps": 3, "draws": 6, "project": True, "sharpness_tau": 0.1}


def test_the_options_are_keys_of_a_run_file():
    config = validate(run_file(**OPTIONS))
    assert config.step == RSAFT(**OPTIONS)
    assert validate(to_dict(config)) == config
    smooth = validate(run_file(smoothing="gaussian", norm="rms", space="latent"))
    assert smooth.step == RSAFT(smoothing="gaussian", norm="rms", space="latent")


def test_the_schema_explains_the_options():
    keys = json_schema()["$defs"]["RSAFT"]["properties"]
    assert all(keys[name]["description"] for name in ("smoothing", *OPTIONS))
    assert keys["delta_steps"]["type"] == "integer"


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ({"delta_steps": 0}, "config.step.delta_steps: delta_steps counts gradient steps, so delta_steps >= 1; got 0."),
        ({"delta_steps": 1.5}, "config.step.delta_steps: allowed is an integer; got 1.5."),
        ({"draws": 5}, "config.step.draws: noise is drawn in pairs u and -u, so draws is 2, 4, 6, ...; got 5."),
        ({"smoothing": "box"}, "config.step.smoothing: allowed is 'gaussian'; got 'box'."),
        ({"space": "pixel"}, "config.step.space: allowed is 'image' or 'latent'; got 'pixel'."),
        ({"project": 1.5}, "config.step.project: allowed is true or false; got 1.5."),
        ({"sharpness_tau": 0}, "config.step.sharpness_tau: "),
        ({"sharpness_tau": 1, "rho": 0}, "config.step.sharpness_tau: "),
        (
            {"smoothing": "gaussian", "mode": "weight"},
            "config.step.smoothing: smoothing moves images, and mode weight moves none; set mode to input or both.",
        ),
        (
            {"smoothing": "gaussian", "norm": "linf"},
            "config.step.norm: Gaussian noise has no largest value, so linf is no size of it; set l2 or rms.",
        ),
        (
            {"project": True, "space": "latent"},
            "config.step.project: project keeps pixels in [0, 1], and latents have no such bounds; "
            "set project to false.",
        ),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_sentence_that_begins_with_its_key(step, sentence):
    with pytest.raises(ConfigError) as caught:
        validate(run_file(**step))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    "step",
    [
        RSAFT(mode="input", smoothing="gaussian", space="latent", draws=8, project=False),
        pytest.param(RSAFT(mode="both", delta_steps=3, project=True, sharpness_tau=0.1), marks=pytest.mark.slow),
    ],
    ids=["smoothing-latent", "steps-project-weights"],
)
def test_the_memory_estimate_is_what_a_real_step_with_the_options_allocates(step):
    backbone = load_model(Model("tiny:sd3", lora=LoRA(rank=2), resolution=32), seed=0)
    plan = Planned(
        algorithm=DRaFT(sampling=Sampling(num_steps=2, guidance=3.0)),
        rewards={"toy": toy_reward},
        held_out={},
        step=step,
        prompts=PROMPTS,
        config=TrainConfig(batch_size=4, micro_batch=2, eval_batch=2, ema=None),
    )
    assert_estimate_is_allocated(backbone, plan, [batch_of(PROMPTS[:2]), batch_of(PROMPTS[2:], first_id=2)])
