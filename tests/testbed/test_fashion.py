"""The fashion world: its captions, its data, and what its judge thinks of right and of wrong images."""

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rsaft.testbed import fashion

LEFT_OUT = 50  # photographs of each class that the judge under test has not seen


@pytest.fixture(scope="module")
def split_bank(tmp_path_factory):
    gray = np.load(fashion.BANK)["gray"]
    path = tmp_path_factory.mktemp("bank") / "bank.npz"
    np.savez_compressed(path, gray=gray[:, :-LEFT_OUT])
    return path, torch.from_numpy(gray[:, -LEFT_OUT:]).float() / 255


@pytest.fixture(scope="module")
def gold(split_bank):
    return fashion.gold(bank=split_bank[0])


@pytest.fixture(scope="module")
def photographs(split_bank):
    """200 photographs that the judge has not seen, with their captions."""
    gray = split_bank[1][:, :20].flatten(0, 1)
    colours = [i % 6 for i in range(200)]
    prompts = [fashion.caption(list(fashion.COLOURS)[i % 6], fashion.CLASSES[i // 20]) for i in range(200)]
    return fashion.tint(gray, colours), prompts


def captions_with(prompts, *, change):
    """The captions with the next class or the next colour."""
    names = list(fashion.COLOURS)
    parsed = [fashion.parse(p) for p in prompts]
    if change == "class":
        return [fashion.caption(names[c], fashion.CLASSES[(k + 1) % 10]) for k, c in parsed]
    return [fashion.caption(names[(c + 1) % 6], fashion.CLASSES[k]) for k, c in parsed]


def blur(images):
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, stride=1)


def class_averages(split_bank, prompts):
    means = split_bank[1].mean(dim=1)
    parsed = [fashion.parse(p) for p in prompts]
    return fashion.tint(means[[k for k, _ in parsed]], [c for _, c in parsed])


def checkerboard(images):
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    return (images + 0.3 * (2.0 * board - 1)).clamp(0, 1)


def test_train_and_eval_prompts_are_disjoint_and_both_hold_every_class_and_colour():
    assert set(fashion.PROMPTS_TRAIN) | set(fashion.PROMPTS_EVAL) == set(fashion.PROMPTS)
    assert not set(fashion.PROMPTS_TRAIN) & set(fashion.PROMPTS_EVAL)
    assert len(fashion.PROMPTS_EVAL) == 12
    for prompts in (fashion.PROMPTS_TRAIN, fashion.PROMPTS_EVAL):
        assert {fashion.parse(p)[0] for p in prompts} == set(range(10))
        assert {fashion.parse(p)[1] for p in prompts} == set(range(6))


def test_a_near_miss_differs_in_exactly_one_attribute():
    generator = torch.Generator().manual_seed(0)
    for prompt in fashion.PROMPTS * 3:
        before, after = fashion.parse(prompt), fashion.parse(fashion.near_miss(prompt, generator))
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_a_foreign_caption_is_refused_by_name():
    with pytest.raises(ValueError, match="not a caption of this world"):
        fashion.parse("a photo of a dog")


def test_real_photographs_score_high(gold, photographs):
    assert gold(*photographs).mean() > 0.6


def test_every_part_is_between_0_and_1(gold, photographs):
    images, prompts = photographs
    for part in gold.parts(torch.cat([images, images * 0]), prompts * 2).values():
        assert part.shape == (400,)
        assert bool(((part >= 0) & (part <= 1)).all())


@pytest.mark.parametrize(("change", "limit"), [("class", 0.25), ("colour", 0.01)])
def test_a_wrong_caption_scores_low(gold, photographs, change, limit):
    images, prompts = photographs
    assert gold(images, captions_with(prompts, change=change)).mean() < limit


@pytest.mark.parametrize(
    ("damage", "share"),
    [
        (blur, 0.5),
        (lambda x: blur(blur(x)), 0.2),
        (lambda x: (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), 0.3),
        (lambda x: (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), 0.01),
        (checkerboard, 0.05),
        (lambda x: x * 0, 0.01),
        (lambda x: x * 0 + x.amax(dim=(2, 3), keepdim=True), 0.01),
    ],
    ids=["blur", "more blur", "noise 0.1", "noise 0.3", "adversarial pattern", "black", "flat colour"],
)
def test_a_damaged_photograph_keeps_less_than_its_share(gold, photographs, damage, share):
    images, prompts = photographs
    assert gold(damage(images), prompts).mean() < share * gold(images, prompts).mean()


def test_the_average_of_a_class_scores_far_below_its_members(gold, photographs, split_bank):
    images, prompts = photographs
    averages = class_averages(split_bank, prompts)
    assert gold(averages, prompts).mean() < 0.4 * gold(images, prompts).mean()


def test_a_slight_colour_cast_costs_a_little_and_not_everything(gold, photographs):
    images, prompts = photographs
    cast = images + 0.1 * images.amax(dim=1, keepdim=True) * torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    kept = gold.parts(cast.clamp(0, 1), prompts)["colour"].mean()
    assert 0.6 < kept < 0.99


def test_gold_is_deterministic_and_each_image_is_judged_alone(gold, photographs):
    images, prompts = photographs
    alone = torch.cat([gold(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    # A sum over another batch is ordered differently: float32 rounding.
    torch.testing.assert_close(alone, gold(images, prompts)[:5], atol=1e-4, rtol=1e-3)


@pytest.fixture
def idx_folder(tmp_path):
    """A miniature of the dataset's four files: 60,000 and 10,000 images are 54,100 and 10 here."""
    generator = np.random.default_rng(0)
    for part, n in (("train", 54_100), ("t10k", 10)):
        labels = np.arange(n, dtype=np.uint8) % 10
        pixels = np.zeros((n, 28, 28), np.uint8)
        pixels[:, 10:18, 10:18] = generator.integers(1, 255, (n, 1, 1))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0" * 8 + labels.tobytes(), 1))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 16 + pixels.tobytes(), 1))
    return tmp_path


def test_real_images_are_tinted_as_their_captions_say(idx_folder):
    images, prompts = fashion.real(20, seed=0, split="test", data=idx_folder)
    assert images.shape == (20, 3, 32, 32)
    for image, prompt in zip(images, prompts, strict=True):
        colour = torch.tensor(list(fashion.COLOURS.values()))[fashion.parse(prompt)[1]]
        torch.testing.assert_close(image[:, 16, 16] / image[:, 16, 16].max(), colour)
    again, same_prompts = fashion.real(20, seed=0, split="test", data=idx_folder)
    assert torch.equal(images, again)
    assert prompts == same_prompts
    assert fashion.real_for(prompts, seed=1, split="judge", data=idx_folder).shape == images.shape


def test_a_missing_dataset_is_named_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data"):
        fashion.real(1, seed=0, split="train", data=tmp_path)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="allowed: train, judge, test"):
        fashion.real(1, seed=0, split="validation")
