"""Reward soups: the sum of the products, loaded by diffusers; and what merging the factors gives instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rsaft.backbones import LoRA, load_backbone
from rsaft.backbones.export import LORA_FILE, export
from rsaft.backbones.soup import adapter_soup, weight_soup
from rsaft.errors import ConfigError
from tests.backbones.exports import fresh_pipeline, images_of, network_of
from tests.helpers import randomize_

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # several adapters on purpose

WEIGHTS = (0.7, -0.2, 0.5)
SETTINGS = (LoRA(rank=3, alpha=7), LoRA(rank=2, alpha=2), LoRA(rank=3, alpha=1))


@pytest.fixture(scope="module", params=["sd", "sd3"])
def adapters(request: pytest.FixtureRequest, tiny_of, tmp_path_factory: pytest.TempPathFactory):
    """(folder of the base, folders of three adapters) of different rank and alpha."""
    folders = []
    for i, lora in enumerate(SETTINGS):
        backbone = load_backbone(tiny_of(request.param), lora=lora)
        randomize_(backbone.parameters(), scale=0.3, seed=i)
        folders.append(tmp_path_factory.mktemp(f"adapter{i}"))
        export(backbone, folders[-1])
    return tiny_of(request.param), folders


def products(base: Path, folder: Path) -> dict[str, Tensor]:
    """s B A of every layer, as diffusers loads them."""
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="one")
    return {
        name: layer.scaling["one"] * layer.lora_B["one"].weight.detach() @ layer.lora_A["one"].weight.detach()
        for name, layer in network_of(pipe).named_modules()
        if "one" in getattr(layer, "lora_A", {})
    }


def test_the_soup_is_the_sum_of_the_products(adapters, tmp_path: Path) -> None:
    base, folders = adapters
    adapter_soup(folders, WEIGHTS, tmp_path)
    parts, whole = [products(base, folder) for folder in folders], products(base, tmp_path)
    assert whole.keys() == parts[0].keys()
    for name, found in whole.items():
        wanted = sum(w * part[name] for w, part in zip(WEIGHTS, parts, strict=True))
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_diffusers_own_sum_of_adapters_gives_the_same_images(adapters, tmp_path: Path) -> None:
    base, folders = adapters
    adapter_soup(folders, WEIGHTS, tmp_path)
    beside, merged = fresh_pipeline(base), fresh_pipeline(base)
    for i, folder in enumerate(folders):
        beside.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=f"a{i}")
    beside.set_adapters(["a0", "a1", "a2"], list(WEIGHTS))
    plain = images_of(merged)
    merged.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    torch.testing.assert_close(images_of(merged), images_of(beside), rtol=0, atol=1e-5)
    assert (images_of(merged) - plain).abs().max() > 1e-3


def test_one_weight_of_one_gives_that_adapter_back(adapters, tmp_path: Path) -> None:
    base, folders = adapters
    adapter_soup(folders, (0.0, 1.0, 0.0), tmp_path)
    alone = products(base, folders[1])
    for name, found in products(base, tmp_path).items():
        torch.testing.assert_close(found, alone[name], rtol=1e-6, atol=1e-9)


def test_merging_the_factors_is_another_model(adapters) -> None:
    """(sum sqrt(w s) B) (sum sqrt(w s) A), as peft's "linear" does, for two adapters of one rank."""
    base, (first, _, third) = adapters
    both = [products(base, folder) for folder in (first, third)]
    pipe = fresh_pipeline(base)
    for i, folder in enumerate((first, third)):
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=f"a{i}")
    errors = []
    for name, layer in network_of(pipe).named_modules():
        if "a0" in getattr(layer, "lora_A", {}):
            roots = [(0.5 * layer.scaling[key]) ** 0.5 for key in ("a0", "a1")]
            a, b = (
                sum(r * part[key].weight.detach() for r, key in zip(roots, ("a0", "a1"), strict=True))
                for part in (layer.lora_A, layer.lora_B)
            )
            wanted = 0.5 * both[0][name] + 0.5 * both[1][name]
            errors.append(float((b @ a - wanted).norm() / wanted.norm()))
    assert min(errors) > 0.3


def test_a_soup_of_whole_networks_is_their_mean() -> None:
    models = [{"w": torch.full((2, 2), value), "b": torch.tensor([value])} for value in (1.0, 3.0)]
    soup = weight_soup(models, (0.25, 0.75))
    assert torch.equal(soup["w"], torch.full((2, 2), 2.5))
    assert torch.equal(soup["b"], torch.tensor([2.5]))


def test_what_cannot_be_merged_is_one_sentence(adapters, tmp_path: Path) -> None:
    _, folders = adapters
    with pytest.raises(ConfigError, match=r"one finite weight for each of 3 models; got \[1.0\]"):
        adapter_soup(folders, (1.0,), tmp_path)
    with pytest.raises(ConfigError, match="is no adapter"):
        adapter_soup([tmp_path / "none"], (1.0,), tmp_path)
    with pytest.raises(ConfigError, match=r"sum to 1; got \[0.5, 0.6\]"):
        weight_soup([{}, {}], (0.5, 0.6))
    with pytest.raises(ConfigError, match="differ in name or shape"):
        weight_soup([{"w": torch.ones(1)}, {"w": torch.ones(2)}], (0.5, 0.5))
