"""A judge that knows what each reward's collapse looks like: a small classifier of (image, base image) pairs.

PG-OT's agent compares images with a knowledge base of collapses, one for each reward (App. D.1), through a large
vision-language model. Here the knowledge is a linear classifier of a few statistics, learned from examples: images of
runs on one reward alone that were let go too far, beside the untuned model's images of the same prompts and noises.

    pairs = {"sound": pair_features(early, base), "hpsv2": pair_features(collapsed, base), ...}
    judge = LearnedJudge.train(pairs)
    judge.save(path)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsaft.errors import CheckpointError, ConfigError
from rsaft.files import write_atomic
from rsaft.pareto.context import Context, Verdict
from rsaft.types import Images

SOUND = "sound"  # the class of pairs without a collapse
FORMAT = 1
STATISTICS = (
    "saturation", "dark_share", "clipped_share", "edge_density", "high_frequency_energy", "fft_peak", "colour_entropy",
)  # fmt: skip
SCALES = 4  # octaves of the luma, from single pixels up
FEATURES = (
    *STATISTICS,
    *(f"{what}_{c}" for what in ("mean", "deviation") for c in ("red", "green", "blue")),
    *(f"{way}_{2**i}" for i in range(SCALES) for way in ("across", "down")),
    "drift",
)  # columns of `pair_features`
_CHUNK = 8  # images at a time
_HELD_OUT = 5  # one pair in so many calibrates
_LEAST = 10  # pairs of a class, from which on it gives some to the calibration


def pair_features(images: Images, base_images: Images) -> Float[Tensor, "n d"]:
    """What changed from base image i to image i: one row of FEATURES a pair, float64, on the CPU.

    Differences of the statistics of `rsaft.metrics.image_statistics`, of the mean and standard deviation of each
    channel, and of the log energy of steps across and down at four scales (stripes, blur, noise); and `drift`. Scales
    are in pixels, so a judge serves the size of image that it has learned from.

    Returns:
        A row is NaN where one of its images is not finite.

    Raises:
        ValueError: if these are no images, or the shapes differ.

    Cost: two Fourier transforms of each image.
    """
    from rsaft.metrics.image_statistics import drift  # its package draws plots, and takes long to import

    if images.shape != base_images.shape:
        raise ValueError(
            f"pair_features: one base image of the same size for each image; got shapes {tuple(images.shape)} and "
            f"{tuple(base_images.shape)}."
        )
    rows = [torch.zeros(0, len(FEATURES), dtype=torch.float64)]
    for now, base in zip(images.split(_CHUNK), base_images.split(_CHUNK), strict=True):
        moved = drift(now, base)
        change = _described(now) - _described(base)
        rows.append(torch.cat([change, moved[:, None].double().cpu()], dim=1))
    return torch.cat(rows)


def _described(images: Images) -> Float[Tensor, "n d"]:
    from rsaft.metrics.image_statistics import ROUNDING, image_statistics

    statistics = image_statistics(images)
    x = images.detach().float().clamp(0, 1)
    columns = [statistics[name] for name in STATISTICS]
    columns += [*x.mean((2, 3)).unbind(1), *x.std((2, 3)).unbind(1)]
    luma = (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    for _ in range(SCALES):
        for axis in (3, 2):
            steps = luma.diff(dim=axis).square().mean((1, 2, 3)) if luma.shape[axis] > 1 else luma.new_zeros(len(luma))
            columns.append(torch.log10(steps + ROUNDING))
        luma = F.avg_pool2d(luma, 2) if min(luma.shape[2:]) > 1 else luma
    return torch.stack(columns, dim=1).double().cpu()


@dataclass(frozen=True, eq=False)
class LearnedJudge:
    """Multinomial logistic regression on `pair_features`; classes "sound" and one for each reward's collapse.

    p(class | pair) = softmax(((features - mean) / scale @ weight + bias) / temperature), over "sound" and the rewards
    in training alone: a removed reward can do nothing more. The verdict is of the mean over samples.
    """

    classes: tuple[str, ...]  # "sound" first
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, " c"]
    temperature: float = 1.0  # >= 1, from held-out pairs (Guo et al., 2017)
    accuracy: float | None = None  # on the held-out pairs; None: there were too few to hold any out
    threshold: float = 0.5  # breakdown from this mean probability of all collapses together

    def __post_init__(self) -> None:
        tensors = (self.mean, self.scale, self.weight, self.bias)
        shapes = [tuple(x.shape) for x in tensors]
        d, c = len(FEATURES), len(self.classes)
        if self.classes[:1] != (SOUND,) or len(set(self.classes)) < max(c, 2) or shapes != [(d,), (d,), (d, c), (c,)]:
            raise ConfigError(
                f"LearnedJudge: classes are '{SOUND}' first and then rewards, each once, with a weight for each of "
                f"{d} features; got {self.classes} and shapes {shapes}."
            )
        finite = all(bool(x.isfinite().all()) for x in tensors) and bool((self.scale > 0).all())
        if not finite or not self.temperature >= 1 or not 0 < self.threshold < 1:
            raise ConfigError(
                "LearnedJudge: weights are finite, scale above 0, temperature at least 1, threshold in (0, 1); got "
                f"temperature {self.temperature} and threshold {self.threshold}, or weights that are not."
            )

    def probabilities(self, features: Float[Tensor, "n d"], active: Sequence[str]) -> Float[Tensor, "n c"]:
        """Of "sound" and then each of `active` that has a class, in the order of `classes`; rows sum to 1."""
        kept = [i for i, name in enumerate(self.classes) if name == SOUND or name in active]
        logits = (features.double() - self.mean) / self.scale @ self.weight + self.bias
        return (logits[:, kept] / self.temperature).softmax(dim=1)

    def __call__(self, context: Context) -> Verdict:
        """Breakdown where the collapses' mean probability is `threshold` or more, by the likeliest active reward.

        Images that are not finite are left out; if none is finite, that is a breakdown by an unknown reward.

        Raises:
            ConfigError: if the context has no image, or no reward in training has a class.
        """
        names = [name for name in self.classes[1:] if name in context.active]
        if not len(context.images) or not names:
            raise ConfigError(
                f"LearnedJudge: it needs images, and knows the collapses of {', '.join(self.classes[1:])}; got "
                f"{len(context.images)} images, and {', '.join(context.active)} in training."
            )
        features = pair_features(context.images, context.base_images)
        features = features[features.isfinite().all(dim=1)]
        if not len(features):
            return Verdict(True, analysis="no image is finite")
        # Sorted, so that the sum does not depend on the samples' order.
        sound, *collapsed = self.probabilities(features, context.active).sort(dim=0).values.mean(dim=0).tolist()
        likeliest = max(range(len(names)), key=collapsed.__getitem__)
        shown = zip((SOUND, *names), (sound, *collapsed), strict=True)
        analysis = ", ".join(f"{name} {p:.3f}" for name, p in shown)
        if 1 - sound >= self.threshold:
            return Verdict(True, names[likeliest], min(1.0, collapsed[likeliest]), analysis)
        return Verdict(False, confidence=min(1.0, sound), analysis=analysis)

    @classmethod
    def train(
        cls, features: Mapping[str, Float[Tensor, "_ d"]], *, l2: float = 1e-3, threshold: float = 0.5
    ) -> LearnedJudge:
        """The judge of these examples; the same ones in another order give the same judge.

        Each class counts alike, whatever its number of pairs. With 10 finite pairs or more of every class, every fifth
        is held out once to fit the temperature and measure the accuracy; the weights are then fitted to all.

        Args:
            features: `pair_features` of each class: "sound" (honest training too, not the base alone), and one name for
                each reward as the run calls it.
            l2: weight of half the squared norm of `weight`, beside the mean negative log-likelihood.
            threshold: of the verdict.

        Raises:
            ConfigError: if "sound" or a reward is missing, or a class has no finite pair.

        Cost: seconds for thousands of pairs.
        """
        classes = (SOUND, *sorted(set(features) - {SOUND}))
        finite = {name: rows[rows.isfinite().all(dim=1)].double() for name, rows in features.items()}
        empty = [name for name in classes if not len(finite.get(name, ()))]
        if empty or len(classes) < 2 or not l2 > 0:
            raise ConfigError(
                f"LearnedJudge.train: give finite pairs of '{SOUND}' and of a reward's collapse, and l2 > 0; got "
                f"l2 = {l2}, classes {classes}, and no finite pair of {empty or 'none'}."
            )
        rows = torch.cat([_in_order(finite[name]) for name in classes])
        labels = torch.cat([torch.full((len(finite[name]),), i) for i, name in enumerate(classes)])
        temperature, accuracy = _calibrated(rows, labels, l2)
        fitted = _fitted(rows, labels, l2)
        return cls(classes, *fitted, temperature=temperature, accuracy=accuracy, threshold=threshold)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all; `load` gives an equal judge."""
        about = {
            "format": FORMAT, "classes": self.classes, "features": FEATURES, "temperature": self.temperature,
            "accuracy": self.accuracy, "threshold": self.threshold,
        }  # fmt: skip
        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "scale", "weight", "bias")}
        write_atomic(path, safetensors.torch.save(tensors, metadata={"learned_judge": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> LearnedJudge:
        """The judge that `save` wrote.

        Raises:
            CheckpointError: if there is none, or it is damaged or of another version's features.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["learned_judge"])
                tensors = {name: file.get_tensor(name) for name in ("mean", "scale", "weight", "bias")}
            if about["format"] != FORMAT or tuple(about["features"]) != FEATURES:
                raise ValueError("it is of another version of rsaft")
            numbers = {name: about[name] for name in ("temperature", "accuracy", "threshold")}
            return cls(tuple(about["classes"]), **{k: x.double() for k, x in tensors.items()}, **numbers)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} holds no learned judge ({error}); train it again.") from error


def _in_order(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows in lexical order, which the given one then does not matter to."""
    return torch.tensor(sorted(rows.tolist()), dtype=torch.float64)


def _fitted(rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"], l2: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, scale, weight and bias at the minimum, which is unique but for a shift of all biases."""
    mean = rows.mean(dim=0)
    scale = rows.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-9, scale, 1.0)
    z, c = (rows - mean) / scale, int(labels.max()) + 1
    share = 1 / (c * torch.bincount(labels, minlength=c).double())[labels]
    with torch.enable_grad():
        weight = torch.zeros(rows.shape[1], c, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(c, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=1000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (share * F.cross_entropy(z @ weight + bias, labels, reduction="none")).sum()
            value = value + l2 / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    return mean, scale, weight.detach(), (bias - bias.mean()).detach()


def _calibrated(rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"], l2: float) -> tuple[float, float | None]:
    """Temperature of the least negative log-likelihood on held-out pairs, and the accuracy there."""
    counts = torch.bincount(labels)
    if int(counts.min()) < _LEAST:
        return 1.0, None
    place = torch.cat([torch.arange(int(n)) for n in counts])  # within the class
    held = place % _HELD_OUT == _HELD_OUT // 2
    mean, scale, weight, bias = _fitted(rows[~held], labels[~held], l2)
    logits, truth = (rows[held] - mean) / scale @ weight + bias, labels[held]
    temperatures = torch.logspace(0, 1, 41, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits / t, truth) for t in temperatures])
    return float(temperatures[losses.argmin()]), float((logits.argmax(dim=1) == truth).double().mean())
