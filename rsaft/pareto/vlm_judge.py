"""A vision-language model as the judge (PG-OT, App. D), behind any server of the /chat/completions form.

One request shows the untuned model's images, pictures of each reward's collapse if there are any, and the images now;
it says what each reward's collapse looks like, and where the run stands. The reply ends with the paper's line:

    Action: [Remove hpsv2] Strategy: [Offline]

In the paper GPT-4o agreed with people on 90.5 % of 200 such questions, two open models on 87.5 % and 84 % (Table 4). No
model was asked here: the tests use servers that answer what the test wants.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from rsaft.errors import ConfigError
from rsaft.pareto.chat import Patience, UnreadableReply, address, ask, read_key
from rsaft.pareto.context import Context, Verdict

# What the paper found (App. D.1), by names that runs give these rewards.
TEMPLATES: Mapping[str, str] = {
    "clip": "texture pixelation and loss of detail, so that the image looks blurred",
    "ict": "the mildest breakdown: overly smooth transitions and loss of depth",
    **dict.fromkeys(("hps", "hpsv2"), "severe over-saturation, distorted sharpness, and vertical stripes"),
    "hp": "pronounced artefacts at edges and over-saturated colour transitions",
}

FORM = "Action: [Remove <name>|Revert|Continue] Strategy: [Offline|Online]"
_LINE = re.compile(
    r"Action: ?\[?(?:Remove <?(?P<name>[^\s<>\[\]|]{1,100})>?|(?P<word>Revert|Continue))\]? "
    r"Strategy: ?\[?(?P<strategy>Offline|Online)\]?",
    re.IGNORECASE,
)
_AROUND = " \t*`."  # of the line, as models put it in bold or in code
_LONGEST_REPLY = 8000  # characters from its end that are read and logged
_LONGEST_LINE = 200
_SMALLEST = 64  # pixels, below which a picture is not scaled down


@dataclass(frozen=True)
class VLMJudge:
    """Asks a vision-language model. A reply that cannot be read is asked for once more; then the check passes.

    The key is read from an environment variable when it is sent: it is in no setting, message, verdict or log.

    Cost: one request a check; in the paper 0.015 dollars.
    """

    url: str  # https://host/v1; plain http shows the key to whoever is on the way
    model: str  # the server's name for it
    key_variable: str | None = None  # environment variable with the server's key; None: the server wants none
    templates: Mapping[str, str] = field(default_factory=lambda: TEMPLATES)  # reward -> what its collapse looks like
    examples: Mapping[str, Path] = field(default_factory=dict)  # reward -> a picture of its collapse
    max_images: int = 16  # the first so many samples, of each model
    max_side: int = 1024  # pixels of a picture's longer side
    max_mib: float = 4.0  # of a picture as PNG; a larger one is scaled down
    timeout: float = 120.0  # seconds to connect, for each wait, and for the whole answer once it begins
    retries: int = 3  # tries after the first, when the server is busy, broken or away
    backoff: float = 2.0  # seconds before the first retry; doubles with each
    extra: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})  # further fields of the request

    def __post_init__(self) -> None:
        address(self.url)
        if self.max_images < 1 or self.max_side < _SMALLEST or not min(self.max_mib, self.timeout) > 0:
            raise ConfigError(
                f"VLMJudge: max_images is at least 1, max_side at least {_SMALLEST}, max_mib and timeout above 0; got "
                f"{self.max_images}, {self.max_side}, {self.max_mib} and {self.timeout}."
            )
        if self.retries < 0 or self.backoff < 0:
            raise ConfigError(f"VLMJudge: retries and backoff are at least 0; got {self.retries} and {self.backoff}.")
        missing = [f"'{path}' ({name})" for name, path in self.examples.items() if not Path(path).is_file()]
        if missing:
            raise ConfigError(f"VLMJudge: examples are pictures; there is no file {', '.join(missing)}.")

    def __call__(self, context: Context) -> Verdict:
        """The model's verdict; `analysis` is its reply, or what kept it from being read. Confidence is always 1.

        A reward it names may be one that is not in training; the agent then reverts only. "Strategy: Online" counts as
        `stagnant`.

        Raises:
            JudgeError: if the server refuses, or gives no answer after all retries.
            ConfigError: if there is no image, the key is missing, or an example is no picture.
        """
        if not len(context.images):
            raise ConfigError("VLMJudge: it looks at images, and the context has none; choose another judge.")
        key = read_key(self.key_variable)
        patience = Patience(self.timeout, self.retries, self.backoff)
        content, said = self._question(context), ""
        for reminder in ("", f"Your last reply had no line of this form: {FORM}"):
            parts = [*content, _say(reminder)] if reminder else content
            body = {**self.extra, "model": self.model, "messages": [{"role": "user", "content": parts}]}
            try:
                reply = ask(address(self.url), body, key, patience)[-_LONGEST_REPLY:]
            except UnreadableReply as error:
                said = f"[{error}]"
                continue
            verdict = verdict_of(reply, context.active)
            if verdict is not None:
                return verdict
            said = reply
        return Verdict(False, confidence=0.0, analysis=f"No reply could be read, so the check passes. The last: {said}")

    def _question(self, context: Context) -> list[dict[str, Any]]:
        """The parts of the message: text and pictures in turn."""
        from rsaft.metrics.evaluate import image_grid  # its package draws plots, and takes long to import

        def shown(picture: Image.Image) -> dict[str, Any]:
            data = base64.b64encode(png(picture, self.max_side, self.max_mib)).decode("ascii")
            return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

        parts = [_say(TASK), _say("Images of the untuned model:")]
        parts.append(shown(image_grid(context.base_images[: self.max_images], columns=4)))
        for name, path in self.examples.items():
            if name in context.active:
                parts += [_say(f"What images look like when {name} has broken them down:"), shown(_opened(path))]
        parts += [_say("Images now, of the same prompts and noises:")]
        parts.append(shown(image_grid(context.images[: self.max_images], columns=4)))
        return [*parts, _say(_standing(context, self.templates))]


TASK = (
    "You watch over the training of a text-to-image model on several rewards. Weak rewards get exploited: their scores "
    "rise while the images break down. Compare the images now with those of the untuned model, and look for early and "
    "mild signs. A change of content or style alone is no breakdown."
)


def verdict_of(reply: str, active: Sequence[str]) -> Verdict | None:
    """The verdict of a reply with one action line (or the same one several times); None without, or if they differ.

    A name is looked up in `active` as it is, then whatever its case; one that is not there is kept as it is.
    """
    lines = [line.strip(_AROUND) for line in reply.splitlines()]
    matches = [m for line in lines if len(line) <= _LONGEST_LINE and (m := _LINE.fullmatch(line))]
    if len({match.group(0).casefold() for match in matches}) != 1:
        return None
    name, word, strategy = matches[0].group("name", "word", "strategy")
    if name is not None and name not in active:
        alike = [known for known in active if known.casefold() == name.casefold()]
        name = alike[0] if len(alike) == 1 else name
    breakdown = word is None or word.casefold() == "revert"
    return Verdict(breakdown, name, analysis=reply, stagnant=not breakdown and strategy.casefold() == "online")


def png(picture: Image.Image, max_side: int, max_mib: float) -> bytes:
    """The picture on white as PNG, scaled down to `max_side` pixels, and on by halves until it fits `max_mib`.

    Raises:
        ConfigError: if it does not fit at 64 pixels.
    """
    plain = Image.new("RGB", picture.size, "white")
    plain.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
    side = max_side
    while side >= _SMALLEST:
        plain.thumbnail((side, side))
        file = io.BytesIO()
        plain.save(file, "PNG")
        if file.tell() <= max_mib * 2**20:
            return file.getvalue()
        side = min(side, max(plain.size)) // 2
    raise ConfigError(f"max_mib: a picture of {plain.size} does not fit {max_mib:g} MiB; raise max_mib.")


def _standing(context: Context, templates: Mapping[str, str]) -> str:
    known = {name.casefold(): text for name, text in templates.items()}
    looks = [f"- {name}: {known.get(name.casefold(), 'not known')}" for name in context.active]
    return "\n".join(
        [
            f"Step {context.step}. Strategy: {context.strategy}.",
            f"Removed so far: {', '.join(context.removed) or 'none'}.",
            "Rewards in training, and what a breakdown by each looks like:",
            *looks,
            "First say what you see. If the images have broken down, remove the one reward whose signs are strongest; "
            "if you cannot tell which, revert. If they have not, continue. Keep the present strategy, but if it is "
            "offline, nothing has broken down, and the images hardly improve any more, say online.",
            f"End with one line of exactly this form: {FORM}",
        ]
    )


def _say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"VLMJudge: the example '{path}' is no picture ({type(error).__name__}).") from error
