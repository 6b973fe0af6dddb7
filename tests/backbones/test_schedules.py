"""Our trajectories against diffusers' schedulers, step by step, with the same network."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from rsaft.backbones import load_backbone
from rsaft.backbones.schedules import ddim_schedule, flow_schedule
from rsaft.errors import ConfigError
from rsaft.sampling import initial_noise, ode
from tests.helpers import PROMPTS, TinyFlow, relative_difference

STEPS = (1, 5, 10, 50)
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def sd(tiny_sd, tiny_sd_v):
    folders = {"eps": tiny_sd, "v": tiny_sd_v}
    return {(k, d): load_backbone(folders[k], dtype=d) for k in folders for d in ("fp32", "fp64")}


def _ours(backbone, denoise, x, num_steps):
    """The whole trajectory: num_steps + 1 points."""
    schedule, points = backbone.schedule(num_steps), [x]
    for i in range(num_steps):
        points.append(ode(denoise, schedule, points[-1], start=i, stop=i + 1))
    return torch.stack(points)


def _diffusers(scheduler, denoise, x, num_steps):
    scheduler.set_timesteps(num_steps)
    points = [x]
    for t in scheduler.timesteps:
        points.append(scheduler.step(denoise(points[-1], float(t)), t, points[-1], return_dict=False)[0])
    return torch.stack(points)


def _in_y_and_s(backbone, denoise, x, num_steps):
    """The same trajectory as straight lines y' = y + (s' - s) u; its last point alone."""
    schedule = backbone.schedule(num_steps)
    for i in range(num_steps):
        y, s, u = schedule.ysu(denoise(x, schedule.timesteps[i]), x, i)
        flow, alpha = schedule.prediction == "flow", schedule.alphas[i + 1]
        s_next = schedule.sigmas[i + 1] if flow else schedule.sigmas[i + 1] / alpha
        x = (y + (s_next - s) * u) * (1 if flow else alpha)
    return x


def _start(backbone, guidance=3.0):
    denoise = backbone.denoiser(PROMPTS[:2], guidance=guidance, detach_unconditional=False)
    return denoise, initial_noise(backbone, seed=0, purpose="parity", step=0, sample_ids=[0, 1])


def _in_float64(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("kind", ["eps", "v"])
@torch.no_grad()
def test_trajectory_equals_ddim_in_float32(sd, kind, num_steps, record_property):
    backbone = sd[kind, "fp32"]
    denoise, x = _start(backbone)
    theirs = _diffusers(DDIMScheduler.from_config(backbone.pipe.scheduler.config), denoise, x, num_steps)
    difference = relative_difference(_ours(backbone, denoise, x, num_steps), theirs)
    record_property("difference", difference)
    assert difference <= max(1e-6, num_steps * 2**-24)  # of the largest latent; one fp32 rounding a step


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("kind", ["eps", "v"])
@torch.no_grad()
def test_trajectory_equals_ddim_in_float64(sd, kind, num_steps, record_property):
    backbone = sd[kind, "fp64"]
    denoise, x = _start(backbone)
    scheduler = _in_float64(DDIMScheduler.from_config(backbone.pipe.scheduler.config))
    difference = relative_difference(
        _ours(backbone, denoise, x, num_steps), _diffusers(scheduler, denoise, x, num_steps)
    )
    record_property("difference", difference)
    assert difference <= 1e-12


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_trajectory_equals_euler_flow_matching_in_float32(shift, num_steps, record_property):
    backbone = TinyFlow(shift=shift)
    denoise, x = _start(backbone)
    theirs = _diffusers(FlowMatchEulerDiscreteScheduler(shift=shift), denoise, x, num_steps)
    difference = relative_difference(_ours(backbone, denoise, x, num_steps), theirs)
    record_property("difference", difference)
    assert difference <= 1e-6


@pytest.mark.parametrize("num_steps", [1, 10])
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@torch.no_grad()
def test_straight_lines_in_y_and_s_give_the_same_final_latents(sd, kind, num_steps, record_property):
    backbone = TinyFlow(dtype=torch.float64) if kind == "flow" else sd[kind, "fp64"]
    denoise, x = _start(backbone)
    difference = relative_difference(
        _in_y_and_s(backbone, denoise, x, num_steps), _ours(backbone, denoise, x, num_steps)[-1]
    )
    record_property("difference", difference)
    assert difference <= 1e-12


def test_sd15_grid_of_five_steps_by_hand():
    schedule = ddim_schedule(DDIMScheduler(**SD15), 5)
    assert schedule.timesteps == (801, 601, 401, 201, 1)
    alpha_bar = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    expected = [float(alpha_bar[t]) ** 0.5 for t in (801, 601, 401, 201, 1, 0)]  # set_alpha_to_one=False: ends at 0
    assert schedule.alphas == pytest.approx(expected, rel=1e-5)
    assert [a**2 + s**2 for a, s in zip(schedule.alphas, schedule.sigmas, strict=True)] == pytest.approx([1] * 6)


def test_the_last_step_reaches_clean_latents_if_the_checkpoint_says_so():
    schedule = ddim_schedule(DDIMScheduler(**{**SD15, "set_alpha_to_one": True}), 5)
    assert (schedule.alphas[-1], schedule.sigmas[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, PNDMScheduler])
def test_a_checkpoint_with_another_scheduler_keeps_its_noise_levels(tiny_sd, scheduler, tmp_path):
    pipe = load_backbone(tiny_sd).pipe
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert load_backbone(tmp_path).schedule(5) == load_backbone(tiny_sd).schedule(5)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_step_ends_at_the_noise_level_that_the_next_one_begins_with(spacing):
    # diffusers' DDIM steps to t - 1000 // 6 on all three, and calls the network at the grid's next t.
    scheduler = DDIMScheduler(**{**SD15, "timestep_spacing": spacing})
    schedule = ddim_schedule(scheduler, 6)
    levels = [float(scheduler.alphas_cumprod[int(t)]) ** 0.5 for t in schedule.timesteps]
    assert schedule.alphas[:-1] == pytest.approx(levels)
    scheduler.set_timesteps(6)
    landings = scheduler.timesteps[:-1] - 1000 // 6
    assert torch.equal(landings, scheduler.timesteps[1:]) == (spacing == "leading")


def test_flow_grid_of_four_steps_by_hand():
    # sigma = 3 u / (1 + 2 u) for shift 3; diffusers' grid runs evenly from u = 1 to its own smallest level
    schedule = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=1.0), 4)
    assert schedule.sigmas == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-6)
    assert schedule.alphas == pytest.approx([0, 0.333, 0.666, 0.999, 1], abs=1e-6)
    shifted = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    assert shifted.sigmas[0] == 1
    assert shifted.sigmas[-1] == 0
    assert all(a > b for a, b in zip(shifted.sigmas[1:-1], schedule.sigmas[1:-1], strict=True))


def test_a_schedule_leaves_the_scheduler_as_it_was():
    scheduler = DDIMScheduler(**SD15)
    scheduler.set_timesteps(7)
    ddim_schedule(scheduler, 5)
    assert scheduler.num_inference_steps == 7


def test_a_prediction_type_without_a_conversion_is_refused():
    with pytest.raises(ConfigError, match=r"prediction_type: found 'sample', .*\['epsilon', 'v_prediction'\]"):
        ddim_schedule(DDIMScheduler(prediction_type="sample"), 5)


def test_a_scheduler_without_betas_is_refused():
    with pytest.raises(ConfigError, match=r"scheduler: EDMEulerScheduler has no beta schedule"):
        ddim_schedule(EDMEulerScheduler(), 5)  # its noise levels would silently be DDIM's own


def test_more_steps_than_noise_levels_are_refused():
    with pytest.raises(ConfigError, match=r"num_steps <= 1000; got 1001"):
        ddim_schedule(DDIMScheduler(), 1001)


def test_a_grid_that_runs_out_of_noise_levels_is_refused():
    # 1000 steps and an offset of 1 would start at level 1000 of 0..999; diffusers fails on it too.
    with pytest.raises(
        ConfigError, match=r"num_steps: 1000 steps with .* steps_offset 1 start past its 1000 noise levels"
    ):
        ddim_schedule(DDIMScheduler(**SD15), 1000)
