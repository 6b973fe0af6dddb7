"""The model card's lines load the trained model, whatever its family."""

from __future__ import annotations

import pytest
import torch

from rsaft.backbones import LoRA, export_weights, load_backbone
from rsaft.rdrl.model_card import write_model_card
from tests.helpers import randomize_, tiny_folder


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=6), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_lines_of_the_card_load_the_trained_network(tmp_path, monkeypatch, family, lora):
    backbone = load_backbone(tiny_folder(tmp_path / "base", family), lora=lora)
    randomize_(backbone.parameters())
    export_weights(backbone, tmp_path / "checkpoints" / "step-000003" / "adapter")
    card = write_model_card(tmp_path, backbone, evaluations=[], step=3, best=0).read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    loaded = getattr(names["pipe"], backbone.family.network).state_dict()
    trained = backbone.network.state_dict()

    def values(tensors):  # adapters have other names when they are loaded
        return {name.replace(".default_0.", ".default."): t for name, t in tensors.items()}

    assert values(loaded).keys() == trained.keys()
    assert all(torch.equal(t, trained[name]) for name, t in values(loaded).items())
