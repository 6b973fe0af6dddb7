"""Silence where diffusers, transformers and peft speak of what is meant."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_bars() -> Iterator[None]:
    """Without the bars of diffusers and transformers, and diffusers' notes on arguments that it passes itself."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        for log in shown:
            log.enable_progress_bar()


@contextmanager
def silent_reload() -> Iterator[None]:
    """Also without notes on a second adapter and on text encoders that the file has no keys for; errors are raised."""
    with silent_bars(), _at_level(logging.CRITICAL, "diffusers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


@contextmanager
def silent_truncation() -> Iterator[None]:
    """Without the notes on a prompt that is cut to the text encoder's length, which would come at every update."""
    with _at_level(logging.ERROR, "diffusers"), _at_level(logging.ERROR, "transformers"):
        yield


@contextmanager
def _at_level(level: int, name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
