"""RSA-FT as a Step: closed forms, the paper-literal twin, call counts, restoration (float64 unless said)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.func import functional_call

from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum, plain_step
from rsaft.sampling import Sampling, ode
from rsaft.types import Batch, Loss, Rollout, Sample, Step
from tests.helpers import PROMPTS, Counting, TinyFlow, batch_of, count_calls, toy_reward
from tests.reference.rsa_ft import rsa_ft_gradient

SAMPLING = Sampling(num_steps=4, guidance=1.0)


def score_of(backbone: Any, reward: Any = toy_reward) -> ImageScore:
    return ImageScore(backbone, {"toy": reward}, WeightedSum({"toy": 1.0}))


def flow() -> TinyFlow:
    return TinyFlow(dtype=torch.float64)


def gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    return found


def run(step: Step, backbone: Any, algorithm: Any, batches: Sequence[Batch], state: Any = None, reward=toy_reward):
    params = backbone.parameters()
    rollouts = [algorithm.rollout(backbone, batch) for batch in batches]
    output = step(rollouts, score_of(backbone, reward), params, state)
    return gradients(params), output


@dataclass(frozen=True)
class LinearRollout:
    """x_0 = M theta + n_i for sample i: a generator whose gradients are known."""

    theta: torch.Tensor
    matrix: torch.Tensor
    noise: torch.Tensor
    batch: Batch
    num_steps: int = 1

    def prefix(self, start=None, stop=None):
        return None

    def tail(self, prefix) -> Sample:
        x = (self.noise + self.matrix @ self.theta).view(len(self.noise), 3, 2, 2)
        return Sample(x, self.batch.prompts, torch.arange(len(x)))

    def select(self, rows):
        return LinearRollout(self.theta, self.matrix, self.noise[list(rows)], self.batch.select(rows))


@dataclass(frozen=True)
class QuadraticScore:
    """r = -(x - a)' Q (x - a) / 2 of the flat image."""

    q: torch.Tensor
    a: torch.Tensor

    def view(self, sample: Sample) -> torch.Tensor:
        return sample.latents

    def __call__(self, view: torch.Tensor, sample: Sample) -> Loss:
        d = view.flatten(1) - self.a
        r = -0.5 * torch.einsum("bi,ij,bj->b", d, self.q, d)
        return Loss(-r.mean(), r, r.detach()[:, None], torch.ones(len(r), dtype=torch.bool))


def linear_problem() -> tuple[LinearRollout, QuadraticScore]:
    source = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    root = normal(12, 12)
    theta = torch.nn.Parameter(normal(7))
    rollout = LinearRollout(theta, normal(12, 7), normal(3, 12), batch_of(["a", "b", "c"]))
    return rollout, QuadraticScore(root @ root.T / 12, normal(12))


@pytest.mark.parametrize(("mode", "rho", "rho_w"), [("both", 0.3, 0.2), ("weight", 0.3, 0.2), ("input", 0.3, 0.2)])
def test_gradient_on_a_quadratic_reward_of_a_linear_generator_has_its_closed_form(mode, rho, rho_w):
    rollout, score = linear_problem()
    q, a, m = score.q, score.a, rollout.matrix
    x = rollout.noise + m @ rollout.theta.detach()
    g_x = (a - x) @ q
    delta = -rho * g_x / g_x.norm(dim=1, keepdim=True) if mode != "weight" else torch.zeros_like(x)
    g_theta = m.T @ g_x.sum(dim=0)
    eps = -rho_w * g_theta / g_theta.norm() if mode != "input" else torch.zeros_like(g_theta)
    expected = -(m.T @ ((a - (x + m @ eps + delta)) @ q).mean(dim=0))
    RSAFT(rho=rho, rho_w=rho_w, mode=mode)([rollout], score, [rollout.theta])
    torch.testing.assert_close(rollout.theta.grad, expected, rtol=1e-12, atol=1e-12)


def literal_gradient(backbone, batch: Batch, k: int, rho: float, rho_w: float, mode: str) -> list[torch.Tensor]:
    """Algorithm 1 with the whole trajectory a function of theta; states before the last k steps are detached."""
    names = [n for n, p in backbone.network.named_parameters() if p.requires_grad]
    schedule = backbone.schedule(SAMPLING.num_steps)
    text = backbone.encode(batch.prompts)
    x_T = DRaFT(k=k, sampling=SAMPLING).rollout(backbone, batch)._x_T

    def x_0(theta):
        def denoise(x, t):
            args = (x, text, text.mean(1), torch.full((len(x),), t, dtype=x.dtype))
            weights = dict(zip(names, theta, strict=True))
            return functional_call(backbone.network, weights, args, {"return_dict": False})[0]

        split = SAMPLING.num_steps - k
        middle = ode(denoise, schedule, x_T, start=0, stop=split).detach()
        return backbone.decode(ode(denoise, schedule, middle, start=split, stop=SAMPLING.num_steps))

    return rsa_ft_gradient(
        x_0, lambda x: toy_reward(x, batch.prompts), backbone.parameters(), rho=rho, rho_w=rho_w, mode=mode
    )


@pytest.mark.parametrize("mode", ["input", "weight", "both"])
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_equals_the_paper_literal_algorithm(mode, k):
    backbone, batch = flow(), batch_of(PROMPTS[:3])
    expected = literal_gradient(backbone, batch, k, 0.2, 0.1, mode)
    found, _ = run(RSAFT(0.2, 0.1, mode=mode), backbone, DRaFT(k=k, sampling=SAMPLING), [batch])
    plain, _ = run(plain_step, backbone, DRaFT(k=k, sampling=SAMPLING), [batch])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)
    assert any(float((f - p).abs().max()) > 1e-6 for f, p in zip(found, plain, strict=True))


ALGORITHMS = [DRaFT(k=1, sampling=SAMPLING), DRaFT(k=2, sampling=SAMPLING), DRaFT(k=1, lv=2, sampling=SAMPLING)]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["draft-1", "draft-2", "draft-lv"])
@pytest.mark.parametrize("mode", ["none", "input", "weight", "both"])
@pytest.mark.parametrize("reuse", ["resample", "cached", 2])
def test_radius_zero_is_the_plain_step_bit_for_bit(algorithm, mode, reuse):
    backbone = TinyFlow()
    batches = [batch_of(PROMPTS[:2]), batch_of(PROMPTS[2:], first_id=2)]
    plain, a = run(plain_step, backbone, algorithm, batches)
    found, b = run(RSAFT(0.0, 0.0, mode=mode, reuse=reuse), backbone, algorithm, batches)
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))
    assert all(torch.equal(x.rewards, y.rewards) for x, y in zip(a.losses, b.losses, strict=True))


@pytest.mark.parametrize("mode", ["input", "weight", "both"])
def test_micro_batches_share_one_epsilon_and_give_the_whole_batchs_gradient(mode):
    backbone, algorithm = flow(), DRaFT(sampling=SAMPLING)
    whole, _ = run(RSAFT(0.2, 0.1, mode=mode), backbone, algorithm, [batch_of(PROMPTS)])
    parts = [batch_of([p], first_id=i) for i, p in enumerate(PROMPTS)]
    split, _ = run(RSAFT(0.2, 0.1, mode=mode), backbone, algorithm, parts)
    for s, w in zip(split, whole, strict=True):
        torch.testing.assert_close(s, w, rtol=1e-10, atol=1e-13)


def test_an_epsilon_for_each_micro_batch_is_the_mean_of_their_own_updates():
    backbone, algorithm = flow(), DRaFT(sampling=SAMPLING)
    step = RSAFT(0.2, 0.1, eps_group="micro_batch")
    parts = [batch_of(PROMPTS[:2]), batch_of(PROMPTS[2:], first_id=2)]
    alone = [run(step, backbone, algorithm, [part])[0] for part in parts]
    together, _ = run(step, backbone, algorithm, parts)
    for t, a, b in zip(together, *alone, strict=True):
        torch.testing.assert_close(t, (a + b) / 2, rtol=1e-10, atol=1e-13)


def test_scaling_the_reward_scales_the_gradient_and_nothing_else():
    backbone, algorithm, batches = flow(), DRaFT(sampling=SAMPLING), [batch_of(PROMPTS)]
    one, _ = run(RSAFT(0.2, 0.1), backbone, algorithm, batches)
    two, _ = run(RSAFT(0.2, 0.1), backbone, algorithm, batches, reward=lambda x, p: 2 * toy_reward(x, p))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-10, atol=1e-13)


def test_epsilon_of_a_share_is_the_epsilon_of_those_samples():
    backbone, algorithm = flow(), DRaFT(sampling=SAMPLING)
    share = RSAFT(0.0, 0.1, mode="weight", eps_share=0.25, eps_every=2)
    whole = RSAFT(0.0, 0.1, mode="weight", eps_every=2)
    _, of_share = run(share, backbone, algorithm, [batch_of(PROMPTS)])
    _, of_first = run(whole, backbone, algorithm, [batch_of(PROMPTS[:1])])
    for a, b in zip(of_share.state.eps, of_first.state.eps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_kept_epsilon_serves_its_number_of_updates_and_is_then_renewed():
    backbone, algorithm = flow(), DRaFT(sampling=SAMPLING)
    step, state, kept = RSAFT(0.0, 0.1, mode="weight", eps_every=3), None, []
    for update in range(6):
        _, output = run(step, backbone, algorithm, [batch_of(PROMPTS[:2], step=update)], state)
        state = output.state
        kept.append(state.eps[0])
    assert [torch.equal(kept[i], kept[i + 1]) for i in range(5)] == [True, True, False, True, True]


def test_weights_are_unchanged_by_a_step():
    backbone = TinyFlow()
    before = [p.detach().clone() for p in backbone.parameters()]
    run(RSAFT(0.2, 0.1), backbone, DRaFT(sampling=SAMPLING), [batch_of(PROMPTS)])
    assert all(torch.equal(p, b) for p, b in zip(backbone.parameters(), before, strict=True))


def test_weights_are_restored_when_the_reward_fails_in_the_second_pass():
    backbone = TinyFlow()
    before = [p.detach().clone() for p in backbone.parameters()]
    reward = Counting()

    def failing(images, prompts):
        if reward.calls == 1:
            raise RuntimeError("reward server is gone")
        return reward(images, prompts)

    with pytest.raises(RuntimeError, match="server is gone"):
        run(RSAFT(0.2, 0.1), backbone, DRaFT(sampling=SAMPLING), [batch_of(PROMPTS)], reward=failing)
    assert all(torch.equal(p, b) for p, b in zip(backbone.parameters(), before, strict=True))


COSTS = [
    # settings, denoiser calls, of them with gradient, decodes, reward calls, denoiser rows
    (RSAFT(mode="none"), 4, 1, 1, 1, 16),
    (RSAFT(mode="input"), 4, 1, 1, 2, 16),
    (RSAFT(mode="weight"), 8, 2, 2, 2, 32),
    (RSAFT(mode="both"), 8, 2, 2, 2, 32),
    (RSAFT(mode="both", delta_from="perturbed"), 8, 2, 2, 3, 32),
    (RSAFT(mode="weight", reuse="cached"), 5, 2, 2, 2, 20),
    (RSAFT(mode="both", reuse="cached"), 5, 2, 2, 2, 20),
    (RSAFT(mode="weight", reuse=2), 6, 2, 2, 2, 24),
    (RSAFT(mode="weight", eps_share=0.25), 8, 2, 2, 2, 20),
    (RSAFT(mode="both", eps_share=0.25), 8, 2, 2, 3, 20),
]


@pytest.mark.parametrize(("step", "calls", "with_grad", "decodes", "rewards", "rows"), COSTS, ids=lambda v: str(v)[:60])
def test_calls_equal_the_cost_table(step, calls, with_grad, decodes, rewards, rows):
    backbone, reward = TinyFlow(), Counting()
    with count_calls(backbone.network) as network, count_calls(backbone.decoder) as decoder:
        run(step, backbone, DRaFT(k=1, sampling=SAMPLING), [batch_of(PROMPTS)], reward=reward)
    assert (network.total, network.with_grad, decoder.total, reward.calls) == (calls, with_grad, decodes, rewards)
    assert sum(network.rows) == rows


def test_a_kept_epsilon_costs_a_plain_step():
    backbone, algorithm = TinyFlow(), DRaFT(sampling=SAMPLING)
    step = RSAFT(mode="weight", eps_every=2)
    _, first = run(step, backbone, algorithm, [batch_of(PROMPTS)])
    with count_calls(backbone.network) as network:
        run(step, backbone, algorithm, [batch_of(PROMPTS)], first.state)
    assert (network.total, network.with_grad) == (4, 1)


def test_both_perturbations_are_logged_with_their_norms():
    backbone = TinyFlow()
    _, output = run(RSAFT(0.2, 0.1), backbone, DRaFT(sampling=SAMPLING), [batch_of(PROMPTS)])
    assert output.logs["rsaft/eps_norm"] == pytest.approx(0.1, rel=1e-5)
    assert output.logs["rsaft/delta_rms_255"] == pytest.approx(0.2 / (3 * 8 * 8) ** 0.5 * 255, rel=1e-4)
    assert output.logs["rsaft/delta_cosine"] > 0.9999


def test_epsilon_cosine_of_a_half_precision_network_is_logged():
    backbone = TinyFlow()
    step = RSAFT(0.0, 1e-3, mode="weight", network_dtype="bf16")
    _, output = run(step, backbone, DRaFT(sampling=SAMPLING), [batch_of(PROMPTS)])
    assert 0.0 < output.logs["rsaft/eps_cosine"] < 0.9


def test_protocols_are_met():
    backbone = TinyFlow()
    assert isinstance(RSAFT(), Step)
    assert isinstance(DRaFT(sampling=SAMPLING).rollout(backbone, batch_of()), Rollout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho is a radius"),
        ({"rho_w": float("inf")}, "rho_w is a radius"),
        ({"reuse": 0}, "reuse >= 1"),
        ({"eps_share": 0.0}, "0 < eps_share <= 1"),
        ({"eps_share": 0.7}, r"step\.eps_share: .* is 1 / n; got 0\.7, and the nearest is 0\.5 \(1 / 2\)\."),
        ({"eps_share": 0.9}, r"got 0\.9, and the nearest is 1 \(1 / 1\)\."),
        ({"eps_share": 0.34}, r"got 0\.34, and the nearest is 0\.333333 \(1 / 3\)\."),
        ({"eps_every": 0}, "eps_every >= 1"),
        ({"eps_group": "micro_batch", "eps_every": 2}, "eps_group"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RSAFT(**settings)
