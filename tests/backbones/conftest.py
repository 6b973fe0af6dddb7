"""Tiny pipelines of every family, and backbones that were trained: each made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from rsaft.backbones import load_backbone
from tests.backbones.exports import SCALED
from tests.helpers import TinyFamily, randomize_, tiny_folder


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], Path]:
    """`tiny_of("sd3")` is the folder of a tiny pipeline with random weights. Read it, never write it."""

    @cache
    def folder(family: TinyFamily) -> Path:
        return tiny_folder(tmp_path_factory.mktemp("tiny") / family, family)

    return folder


@pytest.fixture(scope="session")
def trained(tiny_of):
    """A backbone of a family whose adapter does something; made once, since an export leaves it as it was."""

    @cache
    def backbone(family):
        made = load_backbone(tiny_of(family), lora=SCALED)
        randomize_(made.parameters())
        return made

    return backbone


@pytest.fixture(scope="session")
def fully_trained(tiny_of):
    """The same without an adapter."""

    @cache
    def backbone(family):
        made = load_backbone(tiny_of(family))
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(1.1)
        return made

    return backbone
