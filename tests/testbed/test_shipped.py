"""The two worlds as they are shipped: frozen, small, and with rewards that can be fooled where the judge cannot."""

import hashlib
import importlib
import json

import pytest
import torch

from rsaft import testbed
from rsaft.sampling import Sampling, sample
from rsaft.testbed import fashion, shapes


@pytest.fixture(scope="module", params=testbed.WORLDS)
def world(request):
    return testbed.load(request.param)


@pytest.fixture(scope="module")
def real(world):
    """60 right pictures of one caption each, the captions, and the same captions with one attribute wrong."""
    if world.name == "fashion":  # photographs of the judge's own bank, which no reward ever saw
        gray = torch.from_numpy(fashion.np.load(fashion.BANK)["gray"][:, :6]).flatten(0, 1).float() / 255
        prompts = [fashion.caption("red", fashion.CLASSES[i // 6]) for i in range(60)]
        images = fashion.tint(gray, [0] * 60)
    else:
        images, prompts = shapes.real(60, seed=0, split="test")
    generator = torch.Generator().manual_seed(0)
    near_miss = importlib.import_module(f"rsaft.testbed.{world.name}").near_miss
    return images, prompts, [near_miss(prompt, generator) for prompt in prompts]


@pytest.mark.parametrize("name", testbed.WORLDS)
def test_the_shipped_files_are_the_frozen_ones(name):
    shipped = testbed.DATA / name
    listed = json.loads((shipped / "HASHES.json").read_text())
    present = {p.relative_to(shipped).as_posix(): p for p in shipped.rglob("*") if p.is_file()}
    present.pop("HASHES.json")
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()} == listed


def test_the_shipped_files_name_no_place_of_the_machine_that_built_them():
    texts = {path: path.read_text() for path in testbed.DATA.rglob("*.json") if path.name != "tokenizer.json"}
    assert len(texts) > 10
    assert not [path for path, text in texts.items() if '"/' in text]


def test_the_shipped_worlds_are_small_and_the_photographs_licensed():
    assert sum(p.stat().st_size for p in testbed.DATA.rglob("*") if p.is_file()) < 20_000_000
    assert "MIT" in (testbed.DATA / "fashion" / "LICENSE").read_text()


def test_a_shipped_world_has_a_train_reward_and_three_held_out_ones(world):
    assert set(world.held_out) == {"cnn2", "vit", "mixer"}
    assert not set(world.prompts_train) & set(world.prompts_eval)
    assert all(not p.requires_grad for r in (world.reward, *world.held_out.values()) for p in r.parameters())


def test_the_judge_finds_the_base_better_than_chance_and_short_of_real_pictures(world, real):
    images, prompts, wrong = real
    made = sample(world.backbone, prompts, Sampling(num_steps=10, guidance=1.0), seed=0, batch_size=60)
    base = world.gold(made, prompts).mean()
    assert world.gold(made, wrong).mean() + 0.2 < base < world.gold(images, prompts).mean()


def test_every_shipped_reward_prefers_the_right_caption(world, real):
    images, prompts, wrong = real
    for reward in (world.reward, *world.held_out.values()):
        assert (reward(images, prompts) > reward(images, wrong)).float().mean() > 0.6


def test_an_image_climbed_against_the_train_reward_fools_it_and_not_the_judge(world, real):
    images, prompts = real[0][::3], real[1][::3]
    x = images.clone()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(world.reward(x.requires_grad_(), prompts).sum(), x)
        x = (x + 0.03 * gradient.sign()).clamp(0, 1).detach()
    assert (world.reward(x, prompts) > world.reward(images, prompts)).float().mean() > 0.9
    assert world.gold(x, prompts).mean() < 0.2 * world.gold(images, prompts).mean()
