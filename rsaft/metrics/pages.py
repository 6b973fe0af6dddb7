"""How the HTML pages are made: their templates, filled in with everything escaped and nothing left out in silence."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates() -> Environment:
    """The folder `templates`; parts that pages share are in parts.html and shared.css."""
    return Environment(
        loader=PackageLoader("rsaft.metrics"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
