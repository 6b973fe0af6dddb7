"""The KL term: zero at the base model, equal to its formula, pure; and its gate."""

from __future__ import annotations

import pytest
import torch

from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.randomness import integer, normal
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ImageScore, OverRated, ReFL, WeightedSum, WithKL, plain_step
from rsaft.sampling import Sampling
from rsaft.types import Algorithm, BackboneWithBase, Rollout, Sample
from tests.helpers import (
    TinyFlow,
    batch_of,
    count_calls,
    gradient_of,
    randomize_,
    relative_difference,
    tiny_folder,
    toy_reward,
)

SAMPLING = Sampling(4, guidance=1.0)
DRAFT = DRaFT(k=1, sampling=SAMPLING)
TRAINERS = {
    "draft": DRAFT,
    "draft-lv": DRaFT(k=1, lv=2, sampling=SAMPLING),
    "refl": ReFL(last=2, sampling=SAMPLING),
    "alignprop": AlignProp(truncation=2, sampling=SAMPLING, gradient_checkpointing=False),
    "drtune": DRTune(k=2, early_stop=2, sampling=SAMPLING),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: tiny_folder(tmp_path_factory.mktemp("kl") / family, family) for family in ("sd", "sd3")}


def load(folders, family="sd", *, lora=True, moved=True, dtype="fp64"):
    adapter = LoRA(rank=2, alpha=4) if lora else None
    backbone = load_backbone(folders[family], lora=adapter, dtype=dtype, keep_base=True)
    if moved:
        randomize_(backbone.parameters(), scale=0.3) if lora else _move(backbone.parameters())
    return backbone


@torch.no_grad()
def _move(params):
    source = torch.Generator().manual_seed(1)
    for p in params:
        p.add_(0.02 * torch.randn(p.shape, generator=source, dtype=p.dtype))


def sample_of(algorithm, backbone, batch=None):
    rollout = algorithm.rollout(backbone, batch or batch_of())
    return rollout.tail(rollout.prefix())


def literal_distance(backbone, base, x_0, batch):
    """Eq. 1 from the schedule's numbers and two networks."""
    schedule = backbone.schedule(4)
    keys = {"seed": batch.seed, "step": batch.step}
    i = integer(0, 4, purpose="kl-step", **keys)
    eps = normal(
        backbone.latent_shape,
        purpose="kl-noise",
        sample_ids=batch.sample_ids,
        dtype=torch.float64,
        device=backbone.device,
        **keys,
    )
    x_t = schedule.alphas[i] * x_0.detach() + schedule.sigmas[i] * eps
    outputs = [
        b.denoiser(batch.prompts, guidance=1.0, detach_unconditional=False)(x_t, schedule.timesteps[i])
        for b in (backbone, base)
    ]
    return ((outputs[0] - outputs[1].detach()) ** 2).mean((1, 2, 3))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_term_is_zero_at_the_base_model_and_nowhere_else(folders, family, lora):
    at_base = sample_of(WithKL(DRAFT, 1.0), load(folders, family, lora=lora, moved=False))
    assert at_base.penalty.tolist() == [0.0, 0.0]
    away = sample_of(WithKL(DRAFT, 1.0), load(folders, family, lora=lora))
    assert (away.penalty > 0).all()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_value_and_gradient_are_those_of_its_formula(folders, family, lora):
    backbone, base = load(folders, family, lora=lora), load(folders, family, lora=lora, moved=False)
    sample = sample_of(WithKL(DRAFT, 0.7), backbone)
    expected = 0.7 * literal_distance(backbone, base, sample.latents, batch_of())
    torch.testing.assert_close(sample.penalty, expected, rtol=1e-10, atol=0)
    params = backbone.parameters()
    found, wanted = gradient_of(sample.penalty.sum(), params), gradient_of(expected.sum(), params)
    assert relative_difference(found, wanted) < 1e-9


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_keeps_its_sample_and_its_gradient_and_the_term_is_a_mean_over_the_batch(folders, name):
    backbone = load(folders)
    plain, with_kl = sample_of(TRAINERS[name], backbone), sample_of(WithKL(TRAINERS[name], 1.0), backbone)
    assert torch.equal(plain.latents, with_kl.latents)
    params = backbone.parameters()
    same = [gradient_of(s.latents.square().sum(), params) for s in (plain, with_kl)]
    assert torch.equal(*same)
    rows = [(with_kl.index == row).nonzero()[0, 0] for row in (0, 1)]
    torch.testing.assert_close(with_kl.penalty.mean(), torch.stack([with_kl.penalty[r] for r in rows]).mean())


@pytest.mark.parametrize("name", TRAINERS)
def test_a_tail_called_twice_gives_the_same_term(folders, name):
    rollout = WithKL(TRAINERS[name], 1.0).rollout(load(folders, dtype="fp32"), batch_of())
    assert isinstance(rollout, Rollout)
    prefix = rollout.prefix()
    first, second = rollout.tail(prefix), rollout.tail(prefix)
    assert torch.equal(first.penalty, second.penalty)


def test_a_row_alone_has_the_term_that_it_has_in_the_batch(folders):
    rollout = WithKL(DRAFT, 1.0).rollout(load(folders), batch_of())
    both, alone = (r.tail(r.prefix()) for r in (rollout, rollout.select([1])))
    torch.testing.assert_close(alone.penalty, both.penalty[1:], rtol=1e-10, atol=0)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_inside_base_is_the_base_model_and_afterwards_the_trained_one(folders, lora):
    backbone, untouched = load(folders, lora=lora), load(folders, lora=lora, moved=False)
    assert isinstance(backbone, BackboneWithBase)
    x = torch.randn(1, *backbone.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise, base = (b.denoiser(["a"], guidance=1.0, detach_unconditional=False) for b in (backbone, untouched))
    before, names = denoise(x, 500.0), [p.requires_grad for p in backbone.network.parameters()]
    with backbone.base():
        assert torch.equal(denoise(x, 500.0), base(x, 500.0))
    with pytest.raises(RuntimeError, match="inside"), backbone.base():
        raise RuntimeError("inside")
    assert torch.equal(denoise(x, 500.0), before)
    assert [p.requires_grad for p in backbone.network.parameters()] == names


def test_without_a_kept_copy_the_whole_networks_base_is_refused(folders):
    backbone = load_backbone(folders["sd"])
    with pytest.raises(ConfigError, match=r"load it with keep_base=True"):
        sample_of(WithKL(DRAFT, 1.0), backbone)


def test_it_costs_two_calls_one_of_them_with_gradient(folders):
    backbone = load(folders)
    counted = []
    for algorithm in (DRAFT, WithKL(DRAFT, 1.0)):
        with count_calls(backbone.network) as calls:
            sample_of(algorithm, backbone)
        counted.append((calls.with_grad, calls.without_grad))
    assert counted == [(1, 3), (2, 4)]


def test_rsa_ft_without_radii_is_the_plain_step_with_the_same_term(folders):
    found = []
    for step in (plain_step, RSAFT(0.0, 0.0)):
        backbone = load(folders)
        algorithm: Algorithm = WithKL(DRAFT, 2.0)
        score = ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
        step([algorithm.rollout(backbone, batch_of())], score, backbone.parameters())
        found.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    assert torch.equal(*found)


def test_the_term_holds_a_training_near_its_base(folders):
    distances = []
    for algorithm in (DRAFT, WithKL(DRAFT, 1e4)):
        backbone = load(folders, moved=False, dtype="fp32")
        randomize_(backbone.parameters(), scale=0.1)
        optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
        score = ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
        for step in range(8):
            optimizer.zero_grad()
            plain_step([algorithm.rollout(backbone, batch_of(step=step))], score, backbone.parameters())
            optimizer.step()
        with torch.no_grad():
            distances.append(float(sample_of(WithKL(DRAFT, 1.0), backbone, batch_of(step=99)).penalty.mean()))
    assert distances[1] < 0.5 * distances[0]


REFERENCES = {"proxy": [0.0, 1.0, 2.0, 3.0], "a": [0.0, 1.0, 2.0, 3.0], "b": [0.0, 10.0, 20.0, 30.0]}
NAMES = ("b", "proxy", "a")


def test_the_gate_holds_back_what_the_proxy_over_rates_and_only_that():
    gate = OverRated("proxy", REFERENCES, margin=0.1)
    hacked = [-5.0, 9.0, -5.0]  # wins all by the proxy, none by the others
    liked = [99.0, 9.0, 9.0]  # wins all by all
    under_rated = [99.0, -5.0, 9.0]
    half = [99.0, 9.0, -5.0]  # one of the others agrees: 1 - 0.5
    assert gate(torch.tensor([hacked, liked, under_rated, half]), NAMES).tolist() == [1, 0, 0, 1]
    assert OverRated("proxy", REFERENCES, margin=0.5)(torch.tensor([hacked, half]), NAMES).tolist() == [1, 0]


def test_a_samples_gate_does_not_depend_on_its_batch():
    gate = OverRated("proxy", REFERENCES)
    rewards = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(gate(rewards, NAMES)[3:5], gate(rewards[3:5], NAMES))


def test_a_gate_switches_the_penalty_of_its_samples_off():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    penalty = torch.tensor([1.0, 3.0])
    sample = Sample(torch.zeros(2, 4, 4, 4), ("a", "b"), torch.arange(2), penalty)
    rewards = {"toy": toy_reward}

    def value(gate):
        return float(ImageScore(TinyFlow(), rewards, WeightedSum({"toy": 1.0}), gate)(images, sample).value)

    closed = value(lambda r, names: torch.zeros(2))
    assert value(None) - closed == pytest.approx(2.0, rel=1e-6)
    assert value(lambda r, names: torch.tensor([0.0, 1.0])) - closed == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: WithKL(DRAFT, 0.0), "kl.weight multiplies a loss, so weight > 0; got 0.0"),
        (lambda: OverRated("proxy", {"proxy": [1.0]}), "at least one other reward"),
        (lambda: OverRated("proxy", {"a": [1.0], "b": [1.0]}), "references are needed of the proxy"),
        (lambda: OverRated("proxy", {"proxy": [1.0], "a": []}), "the references of 'a' are empty"),
        (lambda: OverRated("proxy", REFERENCES)(torch.zeros(1, 2), ("proxy", "a")), "'b' has references and is not"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()
