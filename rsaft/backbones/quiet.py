"""Silence where diffusers, transformers and peft speak of what is meant."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_bars() -> Iterator[None]:
    """Without the bars of diffusers and transformers, and diffusers' note on an argument that it passes to itself."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            yield
    finally:
        for log in shown:
            log.enable_progress_bar()


@contextmanager
def silent_reload() -> Iterator[None]:
    """Also without notes on a second adapter and on text encoders that the file has no keys for; errors are raised."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with silent_bars(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        logger.setLevel(level)
