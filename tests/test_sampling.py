"""The sampler: pieces of a trajectory fit together, and an image depends on its own key and prompt alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from rsaft.sampling import Sampling, ancestral, checkpointed, initial_noise, ode, sample, step_noises
from tests.helpers import PROMPTS, TinyFlow, count_calls, gradient_of, relative_difference
from tests.rdrl.toy import Toy
from tests.reference.draft import ddim_grid, flow_grid
from tests.reference.refl import posterior_step


@pytest.fixture(scope="module")
def flow():
    return TinyFlow(dtype=torch.float64)


def _denoiser(backbone, prompts=PROMPTS[:2], guidance=2.0, detach=False):
    return backbone.denoiser(prompts, guidance=guidance, detach_unconditional=detach)


def _noise(backbone, ids=(0, 1)):
    return initial_noise(backbone, seed=0, purpose="t", step=0, sample_ids=ids)


@pytest.mark.parametrize("cut", range(6))
def test_a_trajectory_in_two_pieces_is_the_whole_one(flow, cut):
    denoise, schedule, x = _denoiser(flow), flow.schedule(5), _noise(flow)
    with torch.no_grad():
        whole = ode(denoise, schedule, x, start=0, stop=5)
        pieces = ode(denoise, schedule, ode(denoise, schedule, x, start=0, stop=cut), start=cut, stop=5)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize(("start", "stop"), [(2, 1), (-1, 2), (0, 6)])
def test_a_stretch_outside_the_trajectory_is_refused(flow, start, stop):
    with pytest.raises(ValueError, match=f"got start {start} and stop {stop}"):
        ode(_denoiser(flow), flow.schedule(5), _noise(flow), start=start, stop=stop)


def test_no_step_leaves_the_latents_as_they_are(flow):
    x = _noise(flow)
    assert ode(_denoiser(flow), flow.schedule(5), x, start=3, stop=3) is x


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_with_noise_is_diffusers_ddim(kind, eta):
    toy, steps = Toy(kind), 5
    denoise, schedule, x = _denoiser(toy), toy.schedule(steps), _noise(toy)
    noises = step_noises(toy, steps, seed=0, purpose="z", step=0, sample_ids=(0, 1))
    scheduler = DDIMScheduler.from_config(toy.scheduler.config)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        found = ancestral(denoise, schedule, x, noises, eta=eta, start=0, stop=steps)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(denoise(x, float(t)), t, x, eta=eta, variance_noise=noises[:, i]).prev_sample
    assert relative_difference(found, x) <= 1e-6  # diffusers' noise levels are float32


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_with_eta_1_a_step_is_a_draw_from_the_posterior(kind):
    toy, steps = Toy(kind), 5
    denoise, schedule, x = _denoiser(toy), toy.schedule(steps), _noise(toy)
    noises = step_noises(toy, steps, seed=0, purpose="z", step=0, sample_ids=(0, 1))
    grid = flow_grid(toy.scheduler, steps) if kind == "flow" else ddim_grid(toy.scheduler, steps, kind)
    with torch.no_grad():
        found = ancestral(denoise, schedule, x, noises, eta=1.0, start=0, stop=steps)
        for i, t in enumerate(grid.timesteps):
            x = posterior_step(grid, x, denoise(x, t), i, noises[:, i])
    assert relative_difference(found, x) <= 1e-12


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_with_noise_keeps_the_noise_level(kind, eta):
    # A perfect network for x_0 = 0: x_i stays normal with deviation sigma_i, to 1 % with 80 000 values.
    toy, steps = Toy(kind), 4
    schedule = toy.schedule(steps)
    x = torch.randn(2, 40_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noises = torch.randn(2, steps, 40_000, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = schedule.sigmas[0] * x
    for i in range(steps):
        perfect = schedule.prediction_of(torch.zeros_like(x), x / schedule.sigmas[i], i)
        x = ancestral(lambda x, t, out=perfect: out, schedule, x, noises, eta=eta, start=i, stop=i + 1)
        assert float(x.std()) == pytest.approx(schedule.sigmas[i + 1], rel=0.01)


def test_a_stretch_with_noise_fits_together_and_is_refused_outside(flow):
    denoise, schedule, x = _denoiser(flow), flow.schedule(5), _noise(flow)
    noises = step_noises(flow, 5, seed=0, purpose="z", step=0, sample_ids=(0, 1))
    with torch.no_grad():
        whole = ancestral(denoise, schedule, x, noises, eta=1.0, start=0, stop=5)
        half = ancestral(denoise, schedule, x, noises, eta=1.0, start=0, stop=2)
        assert torch.equal(ancestral(denoise, schedule, half, noises, eta=1.0, start=2, stop=5), whole)
        plain = ode(denoise, schedule, x, start=0, stop=5)
        assert torch.equal(ancestral(denoise, schedule, x, noises, eta=0.0, start=0, stop=5), plain)
    with pytest.raises(ValueError, match="got start 2 and stop 6"):
        ancestral(denoise, schedule, x, noises, eta=1.0, start=2, stop=6)


def test_each_step_calls_the_denoiser_once(flow):
    with torch.no_grad(), count_calls(flow.network) as calls:
        ode(_denoiser(flow, guidance=1), flow.schedule(5), _noise(flow), start=1, stop=4)
    assert (calls.total, calls.rows) == (3, [2, 2, 2])


@pytest.mark.parametrize("detach", [False, True])
def test_checkpointing_changes_no_bit_and_repeats_the_calls_in_the_backward_pass(flow, detach):
    gradients = []
    for wrap in (lambda d: d, checkpointed):
        x = ode(wrap(_denoiser(flow, detach=detach)), flow.schedule(2), _noise(flow), start=0, stop=2)
        with count_calls(flow.network) as calls:
            gradients.append(gradient_of(x.square().sum(), flow.parameters()))
    assert torch.equal(*gradients)
    assert calls.total == 4  # two branches of two steps


def test_initial_noise_has_the_backbones_shape_and_dtype(flow):
    assert _noise(flow, (0, 1, 2)).shape == (3, 4, 4, 4)
    assert _noise(flow).dtype == torch.float64
    assert _noise(TinyFlow()).dtype == torch.float32


def test_an_image_does_not_depend_on_its_batch(flow):
    sampling = Sampling(2, guidance=2.0)
    whole = sample(flow, PROMPTS, sampling, seed=0)
    small = sample(flow, PROMPTS, sampling, seed=0, batch_size=3)
    alone = sample(flow, [PROMPTS[2]], sampling, seed=0, sample_ids=[2])
    assert relative_difference(small, whole) <= 1e-12
    assert relative_difference(alone, whole[2:3]) <= 1e-12


def test_another_seed_id_or_prompt_is_another_image(flow):
    sampling = Sampling(2, guidance=2.0)
    images = torch.cat(
        [
            sample(flow, ["a cat"], sampling, seed=0),
            sample(flow, ["a cat"], sampling, seed=1),
            sample(flow, ["a cat"], sampling, seed=0, sample_ids=[1]),
            sample(flow, ["rain"], sampling, seed=0),
        ]
    )
    assert torch.nn.functional.pdist(images.flatten(1)).min() > 0.1


def test_samples_are_images_without_a_graph(flow):
    images = sample(flow, PROMPTS, Sampling(2), seed=0)
    assert images.shape == (4, 3, 8, 8)
    assert not images.requires_grad
    assert images.min() >= 0
    assert images.max() <= 1


def test_sampling_leaves_torchs_global_generator_alone(flow):
    state = torch.get_rng_state()
    sample(flow, PROMPTS[:1], Sampling(2), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("prompts", "ids"), [([], None), (["a", "b"], [0])])
def test_samples_need_prompts_and_as_many_ids(flow, prompts, ids):
    with pytest.raises(ValueError, match=f"got {len(prompts)} prompts"):
        sample(flow, prompts, Sampling(2), seed=0, sample_ids=ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_steps": 0}, "num_steps >= 1; got 0"), ({"guidance": -1}, "guidance >= 0; got -1")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
