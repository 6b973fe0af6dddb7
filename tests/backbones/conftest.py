"""Folders of tiny pipelines, one a family, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import TinyFamily, tiny_folder


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], Path]:
    """`tiny_of("sd3")` is the folder of a tiny pipeline with random weights. Read it, never write it."""

    @cache
    def folder(family: TinyFamily) -> Path:
        return tiny_folder(tmp_path_factory.mktemp("tiny") / family, family)

    return folder
