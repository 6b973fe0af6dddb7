"""The sampler: pieces of a trajectory fit together, and an image depends on its own key and prompt alone."""

from __future__ import annotations

import pytest
import torch

from rsaft.sampling import Sampling, checkpointed, initial_noise, ode, sample
from tests.helpers import PROMPTS, TinyFlow, count_calls, gradient_of, relative_difference


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
