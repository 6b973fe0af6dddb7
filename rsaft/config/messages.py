"""One sentence for a wrong setting: the key's path, what was found, what is allowed, and what was probably meant."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
}
"""What is allowed, by the first word of pydantic's error type (int_parsing, int_from_float, ...)."""

_LEADING_NAME = re.compile(r"((?:[a-z_]\w*\.)*)([a-z_]\w*)(:?) ")


def explain(error: ValidationError, cls: type, value: Any, path: str) -> str:
    """One sentence for the first thing that pydantic found wrong with `value`, which should describe a `cls`.

    Args:
        error: of a validation of {"": value}, so that each location begins with "".
        cls: the dataclass.
        value: the settings as they were read.
        path: of `value` among the settings, as in "config.algorithm".
    """
    details = error.errors(include_url=False)
    first, owner = details[0], _Owner(path, cls, value)
    for part in first["loc"][1:]:
        owner = owner.below(part)
    same_place = [d for d in details if d["type"] == first["type"] or _is_member(d, first)]
    return _sentence(first, same_place, owner)


def unknown_key(path: str, key: str, allowed: Iterable[str]) -> str:
    """The sentence for a key that means nothing."""
    names = list(allowed)
    listed = f"allowed are {', '.join(names)}" if names else "there is nothing to set here"
    return f"{path}.{key}: unknown key; {listed}{did_you_mean(key, names)}"


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """The end of a sentence: a question if something allowed is near to what was found, else a full stop."""
    near = get_close_matches(found, list(allowed), n=1)
    return f"; did you mean '{near[0]}'?" if near else "."


def shown(value: Any) -> str:
    """A value for a message: on one line, and short."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def field_names(cls: type) -> list[str]:
    """The keys that a dataclass has."""
    return [field.name for field in dataclasses.fields(cls)]


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A place among the settings: its path, the dataclass that it should be if it is one, and what was found there."""

    path: str
    cls: type | None
    value: Any
    parent: type | None = None

    def below(self, part: str | int) -> _Owner:
        """The place one part of pydantic's location further down; the names of a union's members lead nowhere."""
        if isinstance(part, int) and isinstance(self.value, Sequence) and not isinstance(self.value, str):
            inside = self.value[part] if part < len(self.value) else None
            return _Owner(f"{self.path}[{part}]", None, inside, self.cls)
        is_field = self.cls is not None and part in field_names(self.cls)
        is_key = isinstance(self.value, Mapping) and part in self.value
        if not (is_field or is_key):
            return self
        inside = self.value.get(part) if isinstance(self.value, Mapping) else None
        cls = _dataclass_in(typing.get_type_hints(self.cls)[str(part)]) if is_field and self.cls else None
        return _Owner(f"{self.path}.{part}", cls, inside, self.cls)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type hint names, be it with `| None`."""
    options = [hint, *typing.get_args(hint)]
    return next((t for t in options if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def _is_member(error: ErrorDetails, first: ErrorDetails) -> bool:
    """Whether two errors are the refusals of one value by two members of a union."""
    return error["loc"][:-1] == first["loc"][:-1] and error["input"] is first["input"]


def _sentence(first: ErrorDetails, same_place: Sequence[ErrorDetails], owner: _Owner) -> str:
    kind = first["type"]
    if kind == "unexpected_keyword_argument":
        path, _, key = owner.path.rpartition(".")
        return unknown_key(path, key, field_names(owner.parent) if owner.parent else [])
    if kind == "missing":
        return f"{owner.path}: this key is missing{_what(owner.cls)}."
    if kind == "dataclass_type":
        return f"{owner.path}: a mapping is expected{_what(owner.cls)}; got {shown(owner.value)}."
    if kind == "value_error":
        return _own_words(str(first["ctx"]["error"]), owner)
    if kind in ("too_long", "too_short"):
        return f"{owner.path}: {first['msg'].removesuffix('.')}; got {shown(first['input'])}."
    literals = [name for d in same_place if "ctx" in d for name in _quoted(str(d["ctx"].get("expected", "")))]
    expected = [*_others(same_place), *[f"'{name}'" for name in literals]]
    hint = did_you_mean(owner.value, literals) if isinstance(owner.value, str) else "."
    return f"{owner.path}: allowed is {' or '.join(dict.fromkeys(expected))}; got {shown(first['input'])}{hint}"


def _what(cls: type | None) -> str:
    return f" with the keys {', '.join(field_names(cls))}" if cls else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _others(errors: Sequence[ErrorDetails]) -> list[str]:
    """What is allowed, of the errors that are not about a fixed list of names."""
    return [
        _EXPECTED.get(e["type"].split("_")[0], e["msg"].removeprefix("Input should be "))
        for e in errors
        if e["type"] != "literal_error"
    ]


def _own_words(message: str, owner: _Owner) -> str:
    """The sentence of a dataclass's own check, behind the path of the key that it begins with, if it does."""
    match = _LEADING_NAME.match(message)
    if match and owner.cls and match[2] in field_names(owner.cls):
        text = message[match.end() :] if match[3] else message
        return f"{owner.path}.{match[2]}: {text}"
    return f"{owner.path}: {message}"
