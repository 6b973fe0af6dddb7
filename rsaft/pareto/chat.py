"""One POST to a server of the /chat/completions form: retries, bounded sizes and times, and a key that stays secret."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rsaft.errors import ConfigError
from rsaft.pareto.context import JudgeError

LONGEST_ANSWER = 2**20  # bytes
_QUOTED = 200  # characters of a refusal that a message quotes
_READ = 8192  # bytes of it that are read: the key is blotted out first, and not cut in half


class UnreadableReply(ValueError):
    """The server answered, but with nothing that a reply can be read from."""


def address(url: str) -> str:
    """The full address of an endpoint, "/chat/completions" added if it is missing.

    Raises:
        ConfigError: if this is no plain http(s) address. One with a user, a password or a query is refused, since it
            would show a secret in logs.
    """
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError("url: a chat server's address has the form https://host/v1; what was given is none.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "url: it holds a user, a query or a fragment, and would be logged; give keys by key_variable."
        )
    plain = url.rstrip("/")
    return plain if plain.endswith("/chat/completions") else f"{plain}/chat/completions"


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None if none is named.

    Raises:
        ConfigError: if the variable is not set, or holds what cannot be sent. The value is not quoted.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"key_variable: the environment variable '{variable}' holds the server's key, one word of ASCII; "
            f"{'what it holds is not' if key else 'it is empty or not set'}."
        )
    return key


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    timeout: float  # seconds to connect, for each wait, and for the whole answer once it begins
    retries: int  # tries after the first, when the server is busy, broken or away
    backoff: float  # seconds before the first retry; doubles with each


def ask(url: str, body: dict[str, Any], key: str | None, patience: Patience) -> str:
    """The text of the reply's first choice, with the key blotted out should the server echo it.

    Redirects are not followed: they would carry the key elsewhere.

    Raises:
        JudgeError: if the server refuses, or gives no answer after all retries.
        UnreadableReply: if the answer is too long, no JSON, or without a text.
    """
    data = json.dumps(body).encode()
    reason = ""
    for attempt in range(patience.retries + 1):
        if attempt:
            time.sleep(patience.backoff * 2 ** (attempt - 1))
        status, answer = _once(url, data, key, patience.timeout)
        if status == 200:
            return _hidden(_text(answer), key)
        reason = _hidden(answer.decode(errors="replace"), key)[:_QUOTED]
        if status is not None and status < 500 and status not in (408, 429):  # the request would fail again
            raise JudgeError(f"chat server {url}: refused the request, {reason}")
    raise JudgeError(
        f"chat server {url}: no answer in {patience.retries + 1} tries, the last one: {reason}; is it running, and is "
        "timeout long enough?"
    )


def _once(url: str, data: bytes, key: str | None, timeout: float) -> tuple[int | None, bytes]:
    """The status and the answer's body; for another status than 200, and for None (no answer), what went wrong.

    No exception leaves here: a traceback shows the request, which has the key.
    """
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with _opener().open(request, timeout=timeout) as response:
            if response.status != 200:
                return response.status, f"{response.status} {response.reason}".encode()
            answer = _read(response, LONGEST_ANSWER + 1, timeout)
            if response.length and len(answer) <= LONGEST_ANSWER:
                return None, b"the answer broke off"
            return 200, answer
    except urllib.error.HTTPError as error:
        said = f"{error.code} {error.reason}: ".encode()
        try:
            with error:
                return error.code, said + _read(error, _READ, timeout)
        except (OSError, http.client.HTTPException):
            return error.code, said
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, resets, half an answer
        return None, (str(error) or type(error).__name__).encode()


def _opener() -> urllib.request.OpenerDirector:
    """urllib's default opener, less its handler of redirects and the schemes that are none of http."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _read(response: Any, limit: int, timeout: float) -> bytes:
    """Up to `limit` bytes; a server that sends them one by one is given up after `timeout` seconds."""
    end, parts, left = time.monotonic() + timeout, [], limit
    while left and (part := response.read1(left)):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > end:
            raise TimeoutError("timed out in the middle of the answer")
    return b"".join(parts)


def _text(answer: bytes) -> str:
    if len(answer) > LONGEST_ANSWER:
        raise UnreadableReply(f"it is longer than {LONGEST_ANSWER} bytes")
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UnreadableReply("it is not of the form of /chat/completions") from error
    if not isinstance(text, str):
        raise UnreadableReply("its content is no text")
    return text


def _hidden(text: str, key: str | None) -> str:
    return text if key is None else text.replace(key, "***")
