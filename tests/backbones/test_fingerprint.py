"""The fingerprint of a base model: what it follows, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rsaft
from rsaft.backbones.export import export
from rsaft.backbones.fingerprint import VALUES, fingerprint
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.testbed.tiny import TINY_FAMILIES
from tests.helpers import tiny_folder


def trained(backbone: DiffusersBackbone) -> DiffusersBackbone:
    """What an update does: every trainable value moves."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.01
    return backbone


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("sd", "flux") else pytest.mark.slow) for f in TINY_FAMILIES]
)
def test_it_is_equal_after_saving_and_loading_and_another_for_other_weights(family, tmp_path: Path):
    first = rsaft.load_backbone(tiny_folder(tmp_path / "a", family), device="cpu")
    found = fingerprint(first)
    first.pipe.save_pretrained(tmp_path / "again")
    assert fingerprint(rsaft.load_backbone(tmp_path / "again", device="cpu")) == found
    other = rsaft.load_backbone(tiny_folder(tmp_path / "b", family, seed=1), device="cpu")
    assert fingerprint(other) != found


def test_training_an_adapter_leaves_it_and_merging_the_adapter_changes_it(tiny_sd: Path, tmp_path: Path):
    found = fingerprint(rsaft.load_backbone(tiny_sd, device="cpu"))
    backbone = trained(rsaft.load_backbone(tiny_sd, lora=rsaft.LoRA(rank=2), device="cpu"))
    assert fingerprint(backbone) == found
    export(backbone, tmp_path / "merged", "merged")
    assert fingerprint(rsaft.load_backbone(tmp_path / "merged", device="cpu")) != found


@pytest.mark.parametrize("keep_base", [True, False])
def test_training_the_whole_network_changes_it_unless_a_copy_is_kept(tiny_sd: Path, keep_base: bool):
    backbone = rsaft.load_backbone(tiny_sd, device="cpu", keep_base=keep_base)
    found = fingerprint(backbone)
    assert (fingerprint(trained(backbone)) == found) == keep_base


def test_it_sees_names_shapes_precision_and_the_decoder_but_not_its_encoder(tiny_sd: Path):
    backbone = rsaft.load_backbone(tiny_sd, lora=rsaft.LoRA(rank=2), device="cpu")
    found = fingerprint(backbone)
    half = rsaft.load_backbone(tiny_sd, lora=rsaft.LoRA(rank=2), dtype="bf16", device="cpu")
    assert fingerprint(half) != found
    vae = backbone.pipe.vae
    vae.encoder.conv_in.weight.data += 1
    assert fingerprint(backbone) == found
    vae.decoder.conv_in.weight.data += 1
    assert fingerprint(backbone) != found


def test_it_is_no_full_hash(tiny_sd: Path):
    backbone = rsaft.load_backbone(tiny_sd, device="cpu")
    found = fingerprint(backbone)
    weight = backbone.network.conv_in.weight.data.flatten()
    assert len(weight) > 2 * VALUES
    with torch.no_grad():
        backbone.network.conv_in.weight.view(-1)[1] += 1  # between the first value that is read and the second
        assert fingerprint(backbone) == found
        backbone.network.conv_in.weight.view(-1)[0] += 1
        assert fingerprint(backbone) != found
