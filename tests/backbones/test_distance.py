"""How far the weights have moved, against the same in a few lines of linear algebra."""

import torch

from rsaft.backbones import LoRA, load_backbone, weight_distance
from tests.helpers import randomize_


def test_a_model_as_it_was_loaded_has_not_moved(tiny_sd):
    assert weight_distance(load_backbone(tiny_sd, lora=LoRA(rank=2))) == 0
    assert weight_distance(load_backbone(tiny_sd, keep_base=True)) == 0


def test_an_adapters_distance_is_that_of_the_merged_weights(tiny_sd):
    backbone = load_backbone(tiny_sd, lora=LoRA(rank=2, alpha=6))
    randomize_(backbone.parameters())
    before = {name: p.clone() for name, p in load_backbone(tiny_sd).network.named_parameters()}
    distance = weight_distance(backbone)
    backbone.network.fuse_lora()
    moved = base = 0.0
    for name, p in backbone.network.named_parameters():
        if ".base_layer." in name:
            old = before[name.replace(".base_layer.", ".")]
            moved += float((p.detach() - old).double().square().sum())
            base += float(old.double().square().sum()) if name.endswith("weight") else 0.0
    assert abs(distance - (moved / base) ** 0.5) < 1e-6 * distance


def test_a_whole_network_doubled_has_moved_by_its_own_norm(tiny_sd):
    backbone = load_backbone(tiny_sd, keep_base=True)
    with torch.no_grad():
        for p in backbone.parameters():
            p.mul_(2)
    assert abs(weight_distance(backbone) - 1) < 1e-6


def test_without_a_base_the_distance_is_not_known(tiny_sd):
    assert weight_distance(load_backbone(tiny_sd)) is None
