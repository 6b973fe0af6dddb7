"""LearnedJudge tells synthetic collapses apart, passes honest change, and is a convex problem solved to its minimum."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from scipy.optimize import minimize
from torch import Tensor

from rsaft.errors import CheckpointError, ConfigError
from rsaft.pareto import Context, LearnedJudge
from rsaft.pareto.learned_judge import FEATURES, STATISTICS, _fitted, pair_features
from tests.pareto.contexts import COLLAPSES, blurred, glaring, pictures, restyled, striped

ACTIVE = ("clip", "hp", "hps")


def examples(n: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Features of n pairs of each class; each class has base images of its own."""
    changes = {"sound": restyled, **COLLAPSES}
    return {
        name: pair_features(change(base, seed + i + 100), base)
        for i, (name, change) in enumerate(changes.items())
        for base in [pictures(n, seed + i)]
    }


@pytest.fixture(scope="module")
def judge() -> LearnedJudge:
    return LearnedJudge.train(examples())


def context(change: Callable[..., Tensor], *, n: int = 16, seed: int = 7, active: tuple[str, ...] = ACTIVE) -> Context:
    base = pictures(n, 1000 + seed)
    return Context(100, active, prompts=("a cat",) * n, images=change(base, 2000 + seed), base_images=base)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reward", sorted(COLLAPSES))
def test_a_collapse_is_attributed_to_its_reward(judge: LearnedJudge, reward: str, seed: int):
    verdict = judge(context(COLLAPSES[reward], seed=seed))
    assert (verdict.breakdown, verdict.reward) == (True, reward)
    assert verdict.confidence > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_honest_change_passes(judge: LearnedJudge, seed: int):
    verdict = judge(context(restyled, seed=seed))
    assert not verdict.breakdown
    assert verdict.confidence > 0.8


def test_images_equal_to_the_bases_pass(judge: LearnedJudge):
    assert not judge(context(lambda base, seed: base.clone())).breakdown


def test_a_stronger_collapse_than_any_example_is_still_attributed(judge: LearnedJudge):
    for change, reward in [
        (lambda base, seed: striped(base, seed, 0.3), "hps"),
        (lambda base, seed: glaring(base, seed, 4.0), "hp"),
        (lambda base, seed: blurred(base, seed, 7), "clip"),
    ]:
        assert judge(context(change)).reward == reward


def test_a_removed_reward_is_never_named(judge: LearnedJudge):
    for change in (*COLLAPSES.values(), restyled):
        verdict = judge(context(change, active=("clip", "ict")))
        assert verdict.reward in (None, "clip")
        assert "hps" not in verdict.analysis
    probabilities = judge.probabilities(pair_features(*_pair()), ("clip", "ict"))
    assert probabilities.shape == (6, 2)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6, dtype=torch.float64))


def _pair() -> tuple[Tensor, Tensor]:
    base = pictures(6, 50)
    return striped(base, 51), base


def test_the_verdict_does_not_depend_on_the_samples_order(judge: LearnedJudge):
    here = context(striped)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    there = replace(here, images=here.images[order], base_images=here.base_images[order])
    # Rounding differs with the place in a chunk (fp32 statistics).
    assert judge(there).confidence == pytest.approx(judge(here).confidence, abs=1e-5)
    assert judge(there).reward == judge(here).reward


def test_examples_in_another_order_give_the_same_judge_bit_for_bit():
    features = examples(12)
    generator = torch.Generator().manual_seed(3)
    shuffled = {name: rows[torch.randperm(len(rows), generator=generator)] for name, rows in features.items()}
    first, second = LearnedJudge.train(features), LearnedJudge.train(dict(reversed(shuffled.items())))
    assert _same(first, second)


def _same(a: LearnedJudge, b: LearnedJudge) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "scale", "weight", "bias"))
    rest = [(x.classes, x.temperature, x.accuracy, x.threshold) for x in (a, b)]
    return tensors and rest[0] == rest[1]


def test_the_weights_are_at_the_minimum_that_scipy_finds():
    features = examples(12)
    rows = torch.cat([features[name] for name in ("sound", *ACTIVE)])
    labels = torch.arange(4).repeat_interleave(12)
    mean, scale, weight, bias = _fitted(rows, labels, 1e-3)
    z = (rows - mean) / scale

    def loss(flat: Tensor) -> Tensor:
        w, b = flat[:-4].view(-1, 4), flat[-4:]
        return F.cross_entropy(z @ w + b, labels) + 1e-3 / 2 * w.square().sum()  # classes are equally large

    def with_gradient(x):
        flat = torch.tensor(x, requires_grad=True)
        value = loss(flat)
        value.backward()
        return value.item(), flat.grad.numpy()

    start = torch.zeros(weight.numel() + 4, dtype=torch.float64).numpy()
    found = minimize(with_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    ours = torch.cat([weight.flatten(), bias])
    assert abs(with_gradient(ours.numpy())[1]).max() < 1e-7
    assert float(loss(ours)) == pytest.approx(found.fun, abs=1e-10)
    torch.testing.assert_close(weight, torch.tensor(found.x[:-4]).view(-1, 4), rtol=0, atol=1e-4)


def test_each_class_counts_alike_whatever_its_number():
    """Classes with the same mean cannot be told apart, so all are equally likely, though one has six times as many."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, len(FEATURES), generator=generator, dtype=torch.float64) for n in (10, 60)]
    rows = torch.cat([x - x.mean(dim=0) for x in parts])
    _, _, weight, bias = _fitted(rows, torch.tensor([0] * 10 + [1] * 60), 1e-3)
    torch.testing.assert_close(weight, torch.zeros_like(weight), rtol=0, atol=1e-8)
    torch.testing.assert_close(bias, torch.zeros_like(bias), rtol=0, atol=1e-8)


def test_the_confidence_is_calibrated_where_classes_cannot_be_told_apart():
    """Labels at random: a judge without calibration is sure of noise, one with it is at the share of the classes."""
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(60, len(FEATURES), generator=generator, dtype=torch.float64) for name in ("sound", "a")}
    judge = LearnedJudge.train(noise)
    assert judge.temperature > 2
    assert judge.accuracy == pytest.approx(0.5, abs=0.25)
    fresh = torch.randn(200, len(FEATURES), generator=generator, dtype=torch.float64)
    sure, unsure = (j.probabilities(fresh, ("a",)).amax(dim=1).mean() for j in (replace(judge, temperature=1.0), judge))
    assert float(unsure) < 0.65 < float(sure)


def test_with_few_examples_nothing_is_held_out():
    judge = LearnedJudge.train(examples(9))
    assert (judge.temperature, judge.accuracy) == (1.0, None)
    assert LearnedJudge.train(examples(10)).accuracy is not None


def test_separable_classes_are_all_right_on_held_out_pairs(judge: LearnedJudge):
    assert judge.accuracy == 1.0
    assert judge.classes == ("sound", "clip", "hp", "hps")


def test_a_saved_judge_is_exactly_the_one_that_is_loaded(judge: LearnedJudge, tmp_path: Path):
    path = tmp_path / "folder" / "judge.safetensors"
    judge.save(path)
    loaded = LearnedJudge.load(path)
    assert _same(loaded, judge)
    assert loaded(context(striped)) == judge(context(striped))
    assert [file.name for file in path.parent.iterdir()] == ["judge.safetensors"]


def _rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["learned_judge"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    safetensors.torch.save_file(tensors, path, metadata={"learned_judge": json.dumps(about)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: safetensors.torch.save_file({"mean": torch.zeros(1)}, path),
        lambda path: _rewritten(path, lambda about, tensors: about.update(format=2)),
        lambda path: _rewritten(path, lambda about, tensors: about["features"].reverse()),
        lambda path: _rewritten(path, lambda about, tensors: about.pop("threshold")),
        lambda path: _rewritten(path, lambda about, tensors: about.update(temperature=0.5)),
        lambda path: _rewritten(path, lambda about, tensors: about.update(classes=["sound", "a"])),
        lambda path: _rewritten(path, lambda about, tensors: tensors["weight"].fill_(torch.nan)),
    ],
    ids=["gone", "cut", "empty", "other file", "format", "features", "field", "temperature", "classes", "nan"],
)
def test_a_damaged_file_is_refused_in_one_sentence(judge: LearnedJudge, tmp_path: Path, damage: Callable[[Path], None]):
    path = tmp_path / "judge.safetensors"
    judge.save(path)
    damage(path)
    with pytest.raises(CheckpointError, match="holds no learned judge") as raised:
        LearnedJudge.load(path)
    assert "\n" not in str(raised.value)


def test_a_feature_is_a_difference_to_the_base_that_has_its_name():
    base = pictures(10, 0)
    assert pair_features(base, base).abs().max() == 0
    brighter = (base + torch.tensor([0.1, 0.0, 0.0]).view(1, 3, 1, 1)).clamp(0, 1)
    changed = dict(zip(FEATURES, pair_features(brighter, base).T, strict=True))
    torch.testing.assert_close(changed["mean_red"], (brighter - base)[:, 0].mean((1, 2)).double())
    assert changed["mean_green"].abs().max() == changed["deviation_blue"].abs().max() == 0
    stripes = dict(zip(FEATURES, pair_features(striped(base, 1), restyled(base, 1)).T, strict=True))
    assert stripes["across_1"].min() > 0.1
    assert stripes["down_1"].abs().max() < 0.1
    assert len(FEATURES) == len(set(FEATURES)) == len(STATISTICS) + 6 + 8 + 1


def test_features_do_not_depend_on_the_other_pairs():
    base = pictures(11, 0)
    now = glaring(base, 1)
    alone = torch.cat([pair_features(now[i : i + 1], base[i : i + 1]) for i in range(11)])
    torch.testing.assert_close(pair_features(now, base), alone, rtol=1e-4, atol=1e-5)  # fp32 sums


def test_images_that_are_not_finite_are_left_out_and_none_left_is_a_breakdown(judge: LearnedJudge):
    here = context(restyled)
    images = here.images.clone()
    images[3, 0, 0, 0] = torch.nan
    assert not judge(replace(here, images=images)).breakdown
    verdict = judge(replace(here, images=torch.full_like(images, torch.nan)))
    assert (verdict.breakdown, verdict.reward, verdict.analysis) == (True, None, "no image is finite")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: LearnedJudge.train({"sound": torch.zeros(3, len(FEATURES))}), "give finite pairs"),
        (lambda: LearnedJudge.train({"a": ONES, "b": ONES}), r"no finite pair of \['sound'\]"),
        (lambda: LearnedJudge.train({"sound": ONES, "a": ONES * torch.nan}), r"no finite pair of \['a'\]"),
        (lambda: LearnedJudge.train({"sound": ONES, "a": ONES}, l2=0.0), "l2 = 0.0"),
        (lambda: LearnedJudge.train({"sound": ONES, "a": ONES}, threshold=1.0), r"threshold in \(0, 1\)"),
        (lambda: LearnedJudge.train({"sound": ONES, "a": ONES})(context(restyled)), "knows the collapses of a; got 16"),
        (lambda: LearnedJudge.train({"sound": ONES, "a": ONES})(Context(1, ("a",))), "got 0 images"),
    ],
)
def test_what_it_cannot_learn_or_judge_is_refused(call: Callable[[], object], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        call()


ONES = torch.ones(3, len(FEATURES))
