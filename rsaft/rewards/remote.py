"""A reward that another process computes, reached over HTTP: for models that need an environment of their own.

Request: POST, JSON with `prompts` and `images`. Encoding "png": a list of base64 PNG files, 8 bits a channel. Encoding
"raw": base64 of all values as little-endian float32, with `shape` beside it. Answer: JSON `{"scores": [...]}`, a number
for each prompt. `examples/reward_server.py` answers so.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rsaft.errors import ConfigError, RewardError
from rsaft.types import Images

_BASE64 = 4 / 3  # characters a byte
_LONGEST_ANSWER = 2**20  # bytes, and 64 for each score


@dataclass(frozen=True)
class RemoteReward:
    """Scores from a server. Has no gradient: for policy-gradient trainers, and as a held-out reward.

    Cost: one request for each `max_mib` of images; with "png" pixels are rounded to 8 bits.
    """

    url: str  # http:// or https://
    encoding: Literal["png", "raw"] = "png"
    timeout: float = 60.0  # seconds that one request may take
    retries: int = 3  # tries after the first, when the server is busy, broken or away
    backoff: float = 1.0  # seconds before the first retry; doubles with each
    max_mib: float = 64.0  # largest request; more images go in several

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url: a reward server's address begins with http:// or https://; got '{self.url}'.")
        if self.timeout <= 0 or self.retries < 0 or self.backoff < 0 or self.max_mib <= 0:
            raise ConfigError(
                "RemoteReward: timeout and max_mib are above 0, retries and backoff at least 0; got "
                f"{self.timeout}, {self.max_mib}, {self.retries} and {self.backoff}."
            )

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores on the images' device, fp32.

        Raises:
            RewardError: if the server refuses, or gives no usable answer after all retries.
            ConfigError: if one image alone is larger than `max_mib`.
        """
        pixels = images.detach().float().cpu()
        rows = self._rows(pixels)
        scores: list[float] = []
        for first in range(0, len(prompts), rows):
            part = slice(first, first + rows)
            scores += self._scores(pixels[part], list(prompts[part]))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _rows(self, pixels: Tensor) -> int:
        """Images that fit a request."""
        largest = pixels[0].numel() * (4 if self.encoding == "raw" else 1) * _BASE64 if len(pixels) else 1
        rows = int(self.max_mib * 2**20 / largest)
        if not rows:
            raise ConfigError(
                f"max_mib: an image of {tuple(pixels.shape[1:])} takes up to {largest / 2**20:.1f} MiB as "
                f"{self.encoding}, and {self.max_mib:g} are allowed; raise max_mib."
            )
        return rows

    def _scores(self, pixels: Tensor, prompts: list[str]) -> list[float]:
        body: dict[str, Any] = {"prompts": prompts}
        if self.encoding == "raw":
            body |= {"shape": list(pixels.shape), "images": _text(pixels.numpy().astype("<f4").tobytes())}
        else:
            body["images"] = [_text(_png(image)) for image in pixels]
        answer = self._post(json.dumps(body).encode(), len(prompts))
        try:
            scores = [float(score) for score in json.loads(answer)["scores"]]
        except (ValueError, TypeError, KeyError) as error:
            raise RewardError(
                f'reward server {self.url}: answered {answer[:80]!r}, and {{"scores": [...]}} is asked for.'
            ) from error
        if len(scores) != len(prompts):
            raise RewardError(f"reward server {self.url}: gave {len(scores)} scores for {len(prompts)} images.")
        return scores

    def _post(self, body: bytes, num_scores: int) -> bytes:
        """The answer; tries again while the server is busy, broken or away."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        longest = _LONGEST_ANSWER + 64 * num_scores
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer: bytes = response.read(longest + 1)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}{_said(error)}"
                if error.code < 500 and error.code != 429:  # the request is at fault, and would be again
                    raise RewardError(f"reward server {self.url}: refused the request, {reason}") from error
            except (OSError, HTTPException) as error:  # URLError, timeouts, resets; no HTTP at all
                reason = str(error)
            else:
                if len(answer) > longest:
                    raise RewardError(f"reward server {self.url}: its answer is longer than {longest} bytes.")
                return answer
        raise RewardError(
            f"reward server {self.url}: no answer in {self.retries + 1} tries, the last one: {reason}; "
            "is it running, and is timeout long enough?"
        )


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of the answer's body, if it arrives."""
    try:
        return f": {error.read(200).decode(errors='replace')}"
    except (OSError, HTTPException):
        return ""


def _png(image: Float[Tensor, "3 h w"]) -> bytes:
    levels = (image.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
