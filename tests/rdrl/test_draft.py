"""DRaFT-K and DRaFT-LV against an unrolled reference, their cost, and the laws of a rollout."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from torch import nn

from rsaft.backbones import LoRA, load_backbone
from rsaft.backbones.decode import to_images
from rsaft.errors import ConfigError
from rsaft.randomness import normal
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum, plain_step
from rsaft.sampling import Sampling
from rsaft.schedules import Schedule
from tests import asserts
from tests.helpers import (
    PROMPTS,
    Counting,
    TinyFlow,
    batch_of,
    count_calls,
    gradient_of,
    randomize_,
    relative_difference,
    toy_reward,
)
from tests.reference import draft as reference

T = 4
KINDS = ("eps", "v", "flow")


@lru_cache
def _float64(kind: str, folder: str | None):
    """A float64 backbone and its network, every trainable value non-zero."""
    if kind == "flow":
        backbone = TinyFlow(dtype=torch.float64)
    else:
        backbone = load_backbone(folder, lora=LoRA(rank=2, alpha=4), dtype="fp64")
        randomize_(backbone.parameters())
    return backbone


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backbone(kind, tiny_sd, tiny_sd_v):
    return _without_grad(_float64(kind, {"eps": str(tiny_sd), "v": str(tiny_sd_v), "flow": None}[kind]))


@pytest.fixture
def sd(tiny_sd):
    return _without_grad(_float64("eps", str(tiny_sd)))


def _without_grad(backbone):
    for p in backbone.parameters():
        p.grad = None
    return backbone


def _reference_gradient(backbone, kind, batch, *, k, lv, guidance):
    """The reference's own network calls, guidance and decoding: only the noise is drawn by rsaft."""
    cond, uncond = (backbone.encode(p) for p in (batch.prompts, [""] * len(batch.prompts)))
    if kind != "flow":
        cond, uncond = cond.text, uncond.text
    draw = partial(
        normal,
        backbone.latent_shape,
        seed=batch.seed,
        step=batch.step,
        sample_ids=batch.sample_ids,
        device=backbone.device,
        dtype=torch.float64,
    )
    if kind == "flow":
        grid = reference.flow_grid(backbone.scheduler, T)

        def network(x, t, text):
            return backbone.network(x, text, text.mean(1), torch.full((len(x),), t), return_dict=False)[0]

        decoder = backbone.decoder
    else:
        grid = reference.ddim_grid(backbone.pipe.scheduler, T, kind)

        def network(x, t, text):
            return backbone.network(x, t, encoder_hidden_states=text).sample

        def decoder(z):
            return backbone.pipe.vae.decode(z / backbone.pipe.vae.config.scaling_factor).sample

    def decode(z):
        image = decoder(z) / 2 + 0.5
        return image + (image.clamp(0, 1) - image).detach()

    return reference.draft_gradient(
        grid,
        reference.guided(network, cond, uncond, guidance),
        decode,
        toy_reward,
        draw(purpose="rollout"),
        [draw(purpose=f"draft-lv-{j}") for j in range(lv)],
        batch.prompts,
        backbone.parameters(),
        k,
    )


def _gradient(backbone, batch, **settings):
    """The gradient that a plain step on the toy reward leaves in `.grad`."""
    score = ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
    params = backbone.parameters()
    plain_step([DRaFT(**settings).rollout(backbone, batch)], score, params)
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    _without_grad(backbone)
    return gradient


@pytest.mark.parametrize("k", [1, 3, T])
def test_gradient_equals_the_unrolled_graph_with_the_state_detached_before_step_T_minus_K(backbone, kind, k):
    batch = batch_of(step=3, seed=1)
    ours = _gradient(backbone, batch, k=k, sampling=Sampling(T, guidance=3.0))
    theirs = _reference_gradient(backbone, kind, batch, k=k, lv=0, guidance=3.0)
    assert theirs.abs().max() > 1e-7
    assert relative_difference(ours, theirs) <= 1e-9


def test_low_variance_gradient_is_the_mean_over_one_plus_n_predictions(backbone, kind):
    batch = batch_of(step=3, seed=1)
    ours = _gradient(backbone, batch, k=1, lv=2, sampling=Sampling(T, guidance=3.0))
    theirs = _reference_gradient(backbone, kind, batch, k=1, lv=2, guidance=3.0)
    assert relative_difference(ours, theirs) <= 1e-9


def test_low_variance_without_extra_samples_is_draft_1(sd):
    batch = batch_of()
    asserts.assert_same_sample(
        *(
            r.tail(r.prefix())
            for r in (
                DRaFT(k=1, lv=0, sampling=Sampling(T)).rollout(sd, batch),
                DRaFT(k=1, sampling=Sampling(T)).rollout(sd, batch),
            )
        )
    )


def test_low_variance_keeps_the_plain_samples_first(sd):
    batch = batch_of()
    plain = DRaFT(k=1, sampling=Sampling(T)).rollout(sd, batch)
    extra = DRaFT(k=1, lv=2, sampling=Sampling(T)).rollout(sd, batch)
    sample = extra.tail(extra.prefix())
    assert torch.equal(sample.latents[:2], plain.tail(plain.prefix()).latents)
    assert sample.prompts == batch.prompts * 3
    assert sample.index.tolist() == [0, 1] * 3


class PerSampleWeights:
    """A flow Backbone v = tanh(w_i x) with a weight of its own for each sample: w.grad holds b gradients."""

    def __init__(self, b: int) -> None:
        self.w = nn.Parameter(torch.full((b, 1, 1, 1), 0.7, dtype=torch.float64))
        self.latent_shape, self.device, self.dtype = (1, 1, 1), torch.device("cpu"), torch.float64

    def parameters(self):
        return [self.w]

    def schedule(self, num_steps):
        assert num_steps == 1
        return Schedule((0.0, 1.0), (1.0, 0.0), (1000.0,), "flow")

    def denoiser(self, prompts, *, guidance, detach_unconditional):
        return lambda x, t: torch.tanh(self.w * x)

    def decode(self, latents):
        return to_images(latents.expand(-1, 3, 1, 1))


@pytest.mark.parametrize("n", [1, 3])
def test_variance_of_the_gradient_falls_as_one_over_one_plus_n(n):
    # One step from pure noise: the base prediction and the n extra ones are independent and alike.
    # The ratio of two variances of 4000 draws has a standard error of about 4 %.
    b = 4000
    backbone = PerSampleWeights(b)
    batch = batch_of(["a"] * b)

    def variance(lv):
        return (b * _gradient(backbone, batch, k=1, lv=lv, sampling=Sampling(1))).var()

    assert variance(n) / variance(0) == pytest.approx(1 / (1 + n), rel=0.15)


@pytest.mark.parametrize(
    ("settings", "prefix", "tail", "recomputed"),
    [
        ({"k": 1}, T - 1, 1, 0),
        ({"k": T}, 0, T, 0),
        ({"k": 3, "gradient_checkpointing": True}, T - 3, 3, 3),
        ({"k": 1, "lv": 2}, T - 1, 3, 0),
        ({"k": 1, "lv": 2, "gradient_checkpointing": True}, T - 1, 3, 3),
    ],
)
def test_network_calls_are_T_plus_lv_and_checkpointing_repeats_those_with_gradient(
    sd, settings, prefix, tail, recomputed
):
    rollout = DRaFT(sampling=Sampling(T), **settings).rollout(sd, batch_of())
    asserts.assert_calls(rollout, sd, sd.network, prefix=prefix, tail=tail, recomputed=recomputed)


@pytest.mark.parametrize("lv", [0, 2])
def test_a_micro_batch_costs_one_decode_and_one_reward_call(sd, lv):
    reward = Counting()
    score = ImageScore(sd, {"toy": reward}, WeightedSum({"toy": 1.0}))
    algorithm = DRaFT(lv=lv, sampling=Sampling(2))
    rollouts = [algorithm.rollout(sd, batch_of(first_id=i)) for i in (0, 2)]
    with count_calls(sd.pipe.vae.decoder) as decodes:
        plain_step(rollouts, score, sd.parameters())
    assert (decodes.total, decodes.rows) == (2, [2 * (1 + lv)] * 2)
    assert (reward.calls, reward.images) == (2, 4 * (1 + lv))


def test_micro_batches_give_the_gradient_of_the_whole_batch(sd):
    batch, algorithm = batch_of(PROMPTS), DRaFT(k=2, sampling=Sampling(T))
    score = ImageScore(sd, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
    gradients = []
    for parts in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
        plain_step([algorithm.rollout(sd, batch.select(rows)) for rows in parts], score, sd.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in sd.parameters()]))
        _without_grad(sd)
    assert relative_difference(gradients[1], gradients[0]) <= asserts.TOLERANCE


LAWS = [DRaFT(k=2, sampling=Sampling(T)), DRaFT(k=1, lv=2, sampling=Sampling(T))]


@pytest.mark.parametrize("algorithm", LAWS, ids=["k2", "lv2"])
class TestLaws:
    """Every trainer's rollout keeps these; see tests/asserts.py."""

    def test_a_tail_called_twice_gives_the_same_bits(self, algorithm, backbone):
        asserts.assert_tail_is_pure(algorithm.rollout(backbone, batch_of()), backbone)

    def test_the_rollout_is_fixed_by_its_batch(self, algorithm, sd):
        asserts.assert_fixed_by_the_batch(algorithm, sd, batch_of())
        asserts.assert_another_step_is_another_draw(algorithm, sd, batch_of())

    def test_selected_rows_are_rows_of_the_whole(self, algorithm, backbone):
        asserts.assert_select_gives_rows(algorithm.rollout(backbone, batch_of(PROMPTS)), [3, 1])

    def test_the_order_of_the_batch_is_irrelevant(self, algorithm, sd):
        asserts.assert_batch_order_is_irrelevant(algorithm, sd, batch_of(PROMPTS), [2, 0, 3])

    def test_the_split_of_the_batch_is_irrelevant(self, algorithm, backbone):
        asserts.assert_split_is_irrelevant(algorithm, backbone, batch_of(PROMPTS[:3]))

    def test_a_stopped_prefix_goes_on_to_the_same_state(self, algorithm, sd):
        asserts.assert_prefix_resumes(algorithm.rollout(sd, batch_of()))

    def test_the_prefix_builds_no_graph(self, algorithm, sd):
        asserts.assert_prefix_has_no_gradient(algorithm.rollout(sd, batch_of()), sd.network)

    def test_checkpointing_changes_no_bit(self, algorithm, backbone):
        settings = {"k": algorithm.k, "lv": algorithm.lv, "sampling": algorithm.sampling}
        plain, recomputed = (
            DRaFT(**settings, gradient_checkpointing=flag).rollout(backbone, batch_of()) for flag in (False, True)
        )
        asserts.assert_same_gradient(plain, recomputed, backbone)

    def test_it_trains_and_leaves_the_weights_alone(self, algorithm, backbone):
        score = ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
        asserts.assert_trains(algorithm, backbone, batch_of(), score)


def test_diffusers_own_checkpointing_changes_no_gradient(tiny_sd):
    backbones = [load_backbone(tiny_sd, dtype="fp64", gradient_checkpointing=flag) for flag in (False, True)]
    plain, recomputed = (_gradient(b, batch_of(), k=2, sampling=Sampling(T)) for b in backbones)
    assert relative_difference(recomputed, plain) <= asserts.TOLERANCE


def test_an_unfinished_prefix_adds_no_step_with_gradient(sd):
    rollout = DRaFT(k=1, sampling=Sampling(T)).rollout(sd, batch_of())
    whole, early = rollout.tail(rollout.prefix()), rollout.tail(rollout.prefix(stop=1))
    assert torch.equal(early.latents, whole.latents)
    assert torch.equal(asserts.reward_gradient(sd, early), asserts.reward_gradient(sd, whole))


def test_a_prefix_cannot_stop_before_its_start(sd):
    rollout = DRaFT(k=1, sampling=Sampling(T)).rollout(sd, batch_of())
    with pytest.raises(ValueError, match="got start 3 and stop 1"):
        rollout.prefix(start=rollout.prefix(), stop=1)


def test_at_the_start_only_the_adapters_B_has_a_gradient(tiny_sd):
    backbone = load_backbone(tiny_sd, lora=LoRA(rank=2, alpha=2))
    rollout = DRaFT(k=1, sampling=Sampling(2)).rollout(backbone, batch_of())
    sample = rollout.tail(rollout.prefix())
    value = toy_reward(backbone.decode(sample.latents), sample.prompts).sum()
    named = {n: p for n, p in backbone.network.named_parameters() if p.requires_grad}
    norms = {n: float(g.norm()) for n, g in zip(named, torch.autograd.grad(value, list(named.values())), strict=True)}
    assert max(norm for n, norm in norms.items() if "lora_A" in n) == 0
    assert min(norm for n, norm in norms.items() if "lora_B" in n) > 0


def test_a_gradient_that_crosses_the_decoder_reaches_the_latents(sd):
    rollout = DRaFT(k=1, sampling=Sampling(2)).rollout(sd, batch_of())
    sample = rollout.tail(rollout.prefix())
    gradient = gradient_of(toy_reward(sd.decode(sample.latents), sample.prompts).sum(), [sample.latents])
    assert gradient.view(2, -1).norm(dim=1).min() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 60}, r"algorithm\.k: .*last k of 50 steps, so 1 <= k <= 50; got 60\."),
        ({"k": 0}, r"got 0\."),
        ({"lv": -1}, r"algorithm\.lv .* lv >= 0; got -1\."),
        ({"k": 2, "lv": 1}, r"defined for k = 1; got 2; set lv to 0\."),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        DRaFT(**settings)
