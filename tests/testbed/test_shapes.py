"""The shapes world: what it draws, and that its judge is kind to right pictures and to nothing else."""

import pytest
import torch
import torch.nn.functional as F

from rsaft.testbed import shapes


@pytest.fixture(scope="module")
def gold():
    return shapes.gold()


@pytest.fixture(scope="module")
def pictures():
    return shapes.real(96, seed=0, split="test")


def values(prompt):
    return next(
        (size, colour, shape, position)
        for size in shapes.SIZES
        for colour in shapes.COLOURS
        for shape in shapes.SHAPES
        for position in shapes.POSITIONS
        if prompt == f"a {size} {colour} {shape} at the {position}"
    )


def misses(prompts, attribute):
    """For each caption, one that differs from it in this attribute only."""
    which, generator = list(shapes.ATTRIBUTES).index(attribute), torch.Generator().manual_seed(0)
    out = []
    for prompt in prompts:
        miss = prompt
        while values(miss)[which] == values(prompt)[which]:
            miss = shapes.near_miss(prompt, generator)
        out.append(miss)
    return out


def blur(images, width):
    return F.avg_pool2d(F.pad(images, (width // 2,) * 4, mode="replicate"), width, 1)


def empty():
    """A picture (1, 3, 32, 32) of ground and light without any shape."""
    ramp, none = shapes.LIGHT * torch.linspace(0, 1, 32), torch.zeros(32, 32)
    return 0.12 + torch.stack([ramp.expand(32, 32), none, ramp[:, None].expand(32, 32)])[None]


def adversarial(images):
    """A fixed high-contrast checkerboard over the picture, of the kind that reward hacking draws."""
    cells = torch.arange(32).div(2, rounding_mode="floor")
    return (images + 0.3 * ((cells[:, None] + cells) % 2 * 2 - 1)).clamp(0, 1)


def test_captions_are_all_216_combinations():
    assert len(shapes.PROMPTS) == len(set(shapes.PROMPTS)) == 216
    assert "a small red circle at the top left" in shapes.PROMPTS


def test_prompt_split_is_disjoint_and_complete():
    train, held_out = set(shapes.PROMPTS_TRAIN), set(shapes.PROMPTS_EVAL)
    assert not train & held_out
    assert train | held_out == set(shapes.PROMPTS)
    assert 0.18 < len(held_out) / 216 < 0.22


@pytest.mark.parametrize("side", [shapes.PROMPTS_TRAIN, shapes.PROMPTS_EVAL], ids=["train", "eval"])
def test_every_attribute_value_occurs_on_both_sides_of_the_prompt_split(side):
    for which, allowed in enumerate(shapes.ATTRIBUTES.values()):
        assert {values(prompt)[which] for prompt in side} == set(allowed)


def test_real_is_deterministic():
    first, second = (shapes.real(8, seed=3, split="train") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_real_ignores_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    shapes.real(4, seed=0, split="train")
    assert torch.equal(before, torch.get_rng_state())


def test_splits_and_seeds_share_no_picture():
    prompts = list(shapes.PROMPTS[:8])
    drawn = [shapes.real_for(prompts, seed=s, split=split) for s in range(4) for split in shapes.SPLITS]
    assert len({x.numpy().tobytes() for batch in drawn for x in batch}) == 8 * len(drawn)


def test_real_pictures_are_float32_in_the_unit_range(pictures):
    images, prompts = pictures
    assert images.shape == (96, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert len(prompts) == 96


def test_near_miss_differs_in_exactly_one_attribute():
    generator = torch.Generator().manual_seed(0)
    for prompt in shapes.PROMPTS:
        miss = shapes.near_miss(prompt, generator)
        assert sum(a != b for a, b in zip(values(prompt), values(miss), strict=True)) == 1


def test_near_miss_varies_every_attribute():
    generator, prompt = torch.Generator().manual_seed(0), shapes.PROMPTS[0]
    drawn = [values(shapes.near_miss(prompt, generator)) for _ in range(200)]
    assert all(any(miss[i] != values(prompt)[i] for miss in drawn) for i in range(4))


def test_gold_is_high_on_real_pictures(gold, pictures):
    score = gold(*pictures)
    assert score.mean() > 0.9
    assert score.min() > 0.7


@pytest.mark.parametrize("attribute", list(shapes.ATTRIBUTES))
def test_gold_is_low_when_one_attribute_is_wrong(gold, pictures, attribute):
    images, prompts = pictures
    assert gold(images, misses(prompts, attribute)).mean() < 0.05


@pytest.mark.parametrize(
    ("spoil", "most"),
    [
        (lambda x: blur(x, 3), 0.7),
        (lambda x: blur(x, 5), 0.45),
        (lambda x: (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), 0.05),
        (lambda x: (x + empty()) / 2, 0.55),
        (lambda x: empty().expand_as(x), 0.0),
        (lambda x: torch.full_like(x, 0.16), 0.0),
        (torch.zeros_like, 0.0),
        (torch.ones_like, 0.0),
        (adversarial, 0.0),
    ],
    ids=["blur 3x3", "blur 5x5", "noise .1", "half contrast", "empty", "blank", "black", "white", "pattern"],
)
def test_gold_is_low_on_a_spoilt_picture(gold, pictures, spoil, most):
    images, prompts = pictures
    assert gold(spoil(images), prompts).mean() <= most


def test_gold_is_lower_on_a_captions_average_than_on_its_pictures(gold):
    prompts = list(shapes.PROMPTS[::9])
    average = torch.stack([shapes.real_for([p] * 48, seed=1, split="judge").mean(0) for p in prompts])
    assert gold(average, prompts).mean() < 0.55


def test_gold_is_zero_on_the_average_of_all_pictures(gold):
    average = shapes.real(256, seed=2, split="judge")[0].mean(0, keepdim=True)
    assert gold(average.expand(216, -1, -1, -1), shapes.PROMPTS).max() == 0


def test_gold_falls_steadily_as_noise_grows(gold, pictures):
    images, prompts = pictures
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    means = [gold((images + s * noise).clamp(0, 1), prompts).mean() for s in (0, 0.01, 0.02, 0.04, 0.08)]
    assert means == sorted(means, reverse=True)


def test_gold_does_not_depend_on_the_batch(gold, pictures):
    images, prompts = pictures
    alone = torch.cat([gold(images[i : i + 1], prompts[i : i + 1]) for i in range(16)])
    # Only the order of sums inside a matrix product differs.
    torch.testing.assert_close(gold(images, prompts)[:16], alone, atol=1e-4, rtol=0)


def test_gold_is_deterministic_and_needs_no_gradient(gold, pictures):
    images, prompts = pictures
    score = gold(images.clone().requires_grad_(), prompts)
    assert not score.requires_grad
    assert torch.equal(score, shapes.gold()(images, prompts))


def test_parts_lie_between_gold_and_picture(gold, pictures):
    images, prompts = pictures
    wrong = misses(prompts[:48], "colour") + list(prompts[48:])
    parts, score = gold.parts(images, wrong), gold(images, wrong)
    assert set(parts) == {"picture", *shapes.ATTRIBUTES}
    for name in shapes.ATTRIBUTES:
        assert (parts[name] >= score - 1e-4).all()
        assert (parts[name] <= parts["picture"] + 1e-6).all()


@pytest.mark.parametrize("attribute", list(shapes.ATTRIBUTES))
def test_a_wrong_attribute_lowers_its_own_part_only(gold, pictures, attribute):
    images, prompts = pictures
    parts = gold.parts(images, misses(prompts, attribute))
    assert parts.pop(attribute).mean() < 0.1
    assert all(part.mean() > 0.88 for part in parts.values())


def test_parts_are_all_zero_without_a_shape(gold):
    parts = gold.parts(empty(), [shapes.PROMPTS[0]])
    assert all((part == 0).all() for part in parts.values())


def test_unknown_caption_is_named(gold):
    with pytest.raises(ValueError, match="a tiny dog"):
        gold(torch.zeros(1, 3, 32, 32), ["a tiny dog"])


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"train, judge, test.*'val'"):
        shapes.real(1, seed=0, split="val")


def test_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed must be in"):
        shapes.real(1, seed=-1, split="train")


def test_gold_refuses_a_picture_that_is_not_finite(gold):
    with pytest.raises(ValueError, match="finite"):
        gold(torch.full((1, 3, 32, 32), float("nan")), [shapes.PROMPTS[0]])


def test_gold_refuses_a_wrong_number_of_prompts(gold):
    with pytest.raises(ValueError, match="one prompt each"):
        gold(torch.zeros(2, 3, 32, 32), [shapes.PROMPTS[0]])
