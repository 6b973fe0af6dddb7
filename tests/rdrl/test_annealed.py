"""Sampling between base and tuned model: its limits, and its mixture by hand."""

import pytest
import torch

import rsaft
from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.rdrl.annealed import Annealed
from rsaft.sampling import Sampling
from rsaft.types import Backbone
from tests.helpers import randomize_, tiny_folder


@pytest.fixture(scope="module", params=["sd", "sd3"])
def pair(request, tmp_path_factory):
    """(tuned, base) of one tiny pipeline in float64."""
    folder = tiny_folder(tmp_path_factory.mktemp("annealed") / request.param, request.param)
    tuned = load_backbone(folder, lora=LoRA(rank=2), dtype="fp64")
    randomize_(tuned.parameters(), scale=0.3)
    return tuned, load_backbone(folder, dtype="fp64")


def images(backbone):
    return rsaft.sample(backbone, ["a cat", "rain"], Sampling(4, guidance=1.0), seed=0)


def test_without_annealing_it_is_the_tuned_model(pair):
    annealed = Annealed(pair[0], power=0.0)
    assert isinstance(annealed, Backbone)
    torch.testing.assert_close(images(annealed), images(pair[0]), rtol=0, atol=1e-12)


def test_with_an_endless_one_it_is_the_base_model(pair):
    torch.testing.assert_close(images(Annealed(pair[0], power=1e6)), images(pair[1]), rtol=0, atol=1e-12)


def test_in_between_it_mixes_by_the_timestep(pair):
    x = torch.randn(1, *pair[0].latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = {"guidance": 2.0, "detach_unconditional": False}
    tuned, base = (backbone.denoiser(["a"], **keys)(x, 250.0) for backbone in pair)
    found = Annealed(pair[0], power=2.0).denoiser(["a"], **keys)(x, 250.0)
    torch.testing.assert_close(found, base + 0.75**2 * (tuned - base), rtol=1e-10, atol=1e-12)


def test_a_negative_power_is_refused(pair):
    with pytest.raises(ConfigError, match="power >= 0; got -1"):
        Annealed(pair[0], power=-1.0)
