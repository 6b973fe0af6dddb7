"""Statistics of images against closed forms: constant and pure colours, waves of known frequency, known histograms."""

import inspect
import math

import pytest
import torch

from rsaft.metrics.image_statistics import (
    clipped_share,
    colour_entropy,
    dark_share,
    diversity,
    drift,
    edge_density,
    fft_peak,
    high_frequency_energy,
    image_statistics,
    saturation,
    thumbnails,
)

torch.set_num_threads(1)
STATISTICS = {
    f.__name__: f
    for f in (
        saturation,
        dark_share,
        clipped_share,
        edge_density,
        high_frequency_energy,
        fft_peak,
        colour_entropy,
    )
}
NAMES = list(STATISTICS)
OF_IMAGES = [*STATISTICS.values(), thumbnails]
SIZE = 32


def plain(*colour: float, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, height, width).clone()


def grey(luma: torch.Tensor) -> torch.Tensor:
    return luma.float().expand(1, 3, *luma.shape).clone()


def noise(seed: int = 0, b: int = 4, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(seed))


def photos(b: int = 4, size: int = SIZE) -> torch.Tensor:
    """Noise that was blurred twice, with dark and clipped places: every statistic of it is between its bounds."""
    x = torch.nn.functional.avg_pool2d(noise(5, b, size + 4, size + 4), 3, stride=1)
    x = torch.nn.functional.avg_pool2d(x, 3, stride=1)
    return ((x - 0.5) * 5 + 0.4).clamp(0, 1)


def wave(down: int, across: int, amplitude: float = 0.25, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """A grey wave with that many periods an image, in an odd phase."""
    y, x = torch.arange(height).double()[:, None] / height, torch.arange(width).double() / width
    return grey(0.5 + amplitude * torch.cos(2 * torch.pi * (down * y + across * x) + 0.3))


def checkerboard(amplitude: float = 0.25) -> torch.Tensor:
    cells = torch.arange(SIZE)[:, None] + torch.arange(SIZE)
    return grey(0.5 + amplitude * (1 - 2 * (cells % 2)))


CLOSED = {  # saturation, dark, clipped, edges, high frequencies, peak, entropy
    "black": ((0.0, 0.0, 0.0), (0, 1, 1, 0, 0, 0, 0)),
    "white": ((1.0, 1.0, 1.0), (0, 0, 1, 0, 0, 0, 0)),
    "grey": ((0.3, 0.3, 0.3), (0, 0, 0, 0, 0, 0, 0)),
    "red": ((1.0, 0.0, 0.0), (1, 0, 1, 0, 0, 0, 0)),
    "blue": ((0.0, 0.0, 0.8), (0.8, 1, 2 / 3, 0, 0, 0, 0)),  # luma 0.114 * 0.8 = 0.091
}


@pytest.mark.parametrize("colour", CLOSED)
@pytest.mark.parametrize("size", [(32, 32), (17, 30), (2, 2)])
def test_statistics_of_one_colour_are_known(colour, size):
    rgb, expected = CLOSED[colour]
    found = image_statistics(plain(*rgb, height=size[0], width=size[1]))
    assert list(found) == NAMES
    torch.testing.assert_close(torch.cat(list(found.values())), torch.tensor(expected).float(), atol=1e-6, rtol=0)


def test_rounding_of_a_constant_image_is_no_frequency():
    values = torch.linspace(0.05, 0.95, 40).view(-1, 1, 1, 1).expand(-1, 3, 17, 30)
    assert torch.equal(high_frequency_energy(values), torch.zeros(40))
    torch.testing.assert_close(fft_peak(values), torch.zeros(40), atol=1e-6, rtol=0)


def test_saturation_is_the_mean_range_of_the_channels():
    x = plain(0.9, 0.4, 0.1)
    x[..., :8] = 0.5  # a quarter of the pixels is grey
    torch.testing.assert_close(saturation(x), torch.tensor([0.75 * 0.8]))


def test_dark_share_counts_pixels_below_the_threshold():
    x = plain(0.2, 0.2, 0.2)
    x[..., :3, :] = 0.05
    torch.testing.assert_close(dark_share(x), torch.tensor([3 / SIZE]))
    assert dark_share(x, 0.04) == 0
    assert dark_share(x, 0.21) == 1


def test_clipped_share_counts_values_that_round_to_0_or_255():
    levels = torch.tensor([0.0, 0.49, 0.51, 128.0, 254.49, 254.51, 255.0, 300.0]) / 255
    x = levels.expand(1, 3, 2, 8)
    torch.testing.assert_close(clipped_share(x), torch.tensor([5 / 8]))  # 0, 0.49, 254.51, 255, and 300 when clamped


def test_edge_density_of_a_step_is_one_column_of_places():
    x = plain(0.0, 0.0, 0.0, height=20, width=30)
    x[..., 11:] = 1
    torch.testing.assert_close(edge_density(x), torch.tensor([1 / 29]))


def test_edge_density_sees_a_pixel_checkerboard_everywhere():
    # Differences are 0.5 both ways: a gradient of 0.5 sqrt(2) a pixel.
    steepness = 0.5 * math.sqrt(2) * SIZE
    assert edge_density(checkerboard(), steepness * 0.999) == 1
    assert edge_density(checkerboard(), steepness * 1.001) == 0


@pytest.mark.parametrize("size", [16, 32, 64])
def test_edge_density_of_a_ramp_does_not_depend_on_the_resolution(size):
    ramp = grey(((torch.arange(size) + 0.5) / size).expand(size, size))  # 1 luma a side
    assert edge_density(ramp, 0.99) == 1
    assert edge_density(ramp, 1.01) == 0


@pytest.mark.parametrize("waves", [(0, 3), (5, 0), (4, 4), (5, 13), (0, 12), (15, 1), (16, 16)])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_high_frequency_energy_of_a_wave_is_all_or_nothing(waves, size):
    height, width = size
    radius = math.hypot(waves[0] / height, waves[1] / width)
    assert abs(radius - 0.25) > 2 / 32  # else its neighbours in the spectrum lie on both sides
    expected = torch.tensor([float(radius > 0.25)])
    found = high_frequency_energy(wave(*waves, height=height, width=width))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_high_frequency_energy_of_two_waves_is_in_the_ratio_of_their_squares():
    both = wave(2, 3, 0.1) + wave(0, 13, 0.2) - 0.5
    torch.testing.assert_close(high_frequency_energy(both), torch.tensor([0.8]), atol=1e-5, rtol=0)


def test_high_frequency_energy_of_white_noise_is_the_area_beyond_a_circle():
    found = high_frequency_energy(noise(height=128, width=128))
    torch.testing.assert_close(found, torch.full((4,), 1 - math.pi / 16), atol=0.02, rtol=0)


def test_a_ramp_has_no_high_frequencies_although_its_borders_do_not_meet():
    ramp = grey((torch.arange(SIZE) / SIZE).expand(SIZE, SIZE))
    assert high_frequency_energy(ramp) < 1e-4


def test_a_blur_lowers_the_high_frequency_energy():
    x = noise(height=SIZE + 2, width=SIZE + 2)
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1)
    assert (high_frequency_energy(blurred) < 0.5 * high_frequency_energy(x[..., 1:-1, 1:-1])).all()


@pytest.mark.parametrize("amplitude", [0.01, 0.25])
@pytest.mark.parametrize("waves", [(0, 8), (5, 0), (7, 11)])
@pytest.mark.parametrize("width", [32, 48])
def test_fft_peak_of_a_wave_matches_its_closed_form(amplitude, waves, width):
    q = (1 / 255) ** 2 / 12
    expected = math.log10(1 + amplitude**2 * SIZE * width / (9 * q))
    found = fft_peak(wave(*waves, amplitude, width=width))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-3, rtol=0)


def test_fft_peak_sees_a_pixel_checkerboard():
    q = (1 / 255) ** 2 / 12  # a real frequency has no twin, so all of the amplitude is in one: four times the power
    expected = math.log10(1 + 4 * 0.25**2 * SIZE**2 / (9 * q))
    torch.testing.assert_close(fft_peak(checkerboard()), torch.tensor([expected]), atol=1e-3, rtol=0)


def test_fft_peak_leaves_the_longest_waves_to_composition():
    assert fft_peak(wave(1, 1)) < 0.01 * fft_peak(wave(8, 0))


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_faint_grid_raises_fft_peak(period):
    x = photos(size=64) * 0.8
    grid = torch.zeros(64, 64)
    grid[::period] = grid[:, ::period] = 0.15
    assert (fft_peak(x + grid) > fft_peak(x) + 0.3).all()


def test_fft_peak_of_white_noise_is_that_of_exponential_powers():
    # The largest of n / 2 exponentials is about ln(n / 2), their median ln 2.
    found = fft_peak(noise(height=128, width=128))
    torch.testing.assert_close(
        found, torch.full((4,), math.log10(math.log(128**2 / 2) / math.log(2))), atol=0.3, rtol=0
    )


@pytest.mark.parametrize("bins", [2, 8])
def test_colour_entropy_of_equally_frequent_colours_is_their_logarithm(bins):
    levels = (torch.arange(bins) + 0.5) / bins
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, bins, bins**2)
    torch.testing.assert_close(colour_entropy(cube, bins), torch.tensor([3 * math.log2(bins)]))


def test_colour_entropy_of_a_known_histogram():
    x = plain(0.9, 0.1, 0.1)
    x[..., : SIZE // 2] = 0.1
    x[..., : SIZE // 4] = 1.0  # shares 1/2, 1/4, 1/4
    torch.testing.assert_close(colour_entropy(x), torch.tensor([1.5]))


def test_colour_entropy_counts_eight_bit_values_by_their_leading_bits():
    x = (torch.arange(256) / 255).expand(1, 3, 2, 256)
    torch.testing.assert_close(colour_entropy(x), torch.tensor([3.0]))


@pytest.mark.parametrize(
    "turned",
    [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3), lambda x: x.rot90(1, (2, 3))],
    ids=["upside down", "mirrored", "transposed", "turned"],
)
@pytest.mark.parametrize("size", [(32, 32), (21, 32)])
def test_flips_and_turns_change_no_statistic(turned, size):
    x = photos()[..., : size[0], : size[1]]
    before, after = image_statistics(x), image_statistics(turned(x).contiguous())
    for name in NAMES:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_statistic_of_a_photo_is_inside_its_bounds(name):
    found = image_statistics(photos())[name]
    assert (found > 0).all()
    assert len(set(found.tolist())) > 1


@pytest.mark.parametrize("statistic", OF_IMAGES)
def test_a_statistic_does_not_depend_on_the_other_images(statistic):
    x = photos()
    alone = torch.cat([statistic(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(statistic(x), alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistic(x.flip(0)), alone.flip(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("statistic", OF_IMAGES)
def test_an_image_that_is_not_finite_is_nan_and_touches_no_other(statistic, bad):
    x = photos()
    clean = statistic(x)
    x[1, 2, 3, 4] = bad
    found = statistic(x)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_fp32_without_a_graph_whatever_the_images(dtype):
    x = photos().to(dtype).requires_grad_()
    found, expected = image_statistics(x), image_statistics(x.detach().float())
    for name in NAMES:
        assert found[name].dtype == torch.float32
        assert not found[name].requires_grad
        assert torch.equal(found[name], expected[name])


def test_values_outside_the_range_are_clamped():
    x = photos() * 3 - 1
    found, expected = image_statistics(x), image_statistics(x.clamp(0, 1))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("size", [1, 8])  # an evaluation without images says 1 x 1
def test_statistics_of_no_images_are_empty(size):
    x = torch.zeros(0, 3, size, size)
    assert drift(x, x).shape == (0,)
    found = image_statistics(x)
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(NAMES, (0,))


def test_thumbnails_are_means_over_areas():
    x = noise(height=64, width=96)
    expected = x.view(4, 3, 16, 4, 16, 6).mean((3, 5))
    torch.testing.assert_close(thumbnails(x, 16), expected)


def test_a_side_no_longer_than_the_thumbnail_stays():
    x = noise(height=20, width=64)
    assert torch.equal(thumbnails(x, 64), x)
    torch.testing.assert_close(thumbnails(x), x.view(4, 3, 20, 32, 2).mean(4))
    torch.testing.assert_close(thumbnails(x.mT), thumbnails(x).mT)


def test_drift_of_a_change_of_brightness_is_its_size():
    x = noise() * 0.5
    torch.testing.assert_close(drift(x + 0.2, x), torch.full((4,), 0.2))
    assert torch.equal(drift(x, x), torch.zeros(4))


def test_drift_does_not_see_what_a_thumbnail_averages_out():
    x = plain(0.5, 0.5, 0.5, height=64, width=64)
    x[..., ::2] += 0.25
    x[..., 1::2] -= 0.25
    assert drift(x, plain(0.5, 0.5, 0.5, height=64, width=64)) < 1e-6


def test_drift_is_nan_where_either_image_is_not_finite():
    x, base = noise(0), noise(1)
    clean = drift(x, base)
    x[0, 0, 0, 0], base[2, 1, 5, 5] = math.nan, math.inf
    found = drift(x, base)
    assert found.isnan().tolist() == [True, False, True, False]
    assert torch.equal(found[[1, 3]], clean[[1, 3]])


PROMPTS = ["a", "b", "a", "c", "b", "a", "a", "b"]


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))


def test_diversity_is_the_mean_distance_to_the_others_of_the_prompt():
    x, expected = features(), []
    for i in range(8):
        others = [(x[i] - x[j]).norm() for j in range(8) if j != i and PROMPTS[j] == PROMPTS[i]]
        expected.append(sum(others) / len(others) if others else torch.tensor(math.nan))
    found = diversity(x, PROMPTS)
    torch.testing.assert_close(found, torch.stack(expected), equal_nan=True)
    assert found.isnan().tolist() == [prompt == "c" for prompt in PROMPTS]


def test_diversity_does_not_depend_on_the_order():
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    found = diversity(features()[order], [PROMPTS[i] for i in order.tolist()])
    torch.testing.assert_close(found, diversity(features(), PROMPTS)[order], equal_nan=True)


def test_diversity_of_a_prompt_does_not_depend_on_the_other_prompts():
    alone = [i for i, prompt in enumerate(PROMPTS) if prompt == "b"]
    found = diversity(features()[alone], ["b"] * 3)
    assert torch.equal(found, diversity(features(), PROMPTS)[alone])


def test_diversity_of_equal_samples_is_exactly_0_also_in_large_groups():
    same = torch.full((64, 30), 1000.1)
    assert torch.equal(diversity(same, ["a"] * 64), torch.zeros(64))


def test_diversity_treats_a_sample_that_is_not_finite_as_absent():
    x = features()
    x[2, 1] = math.nan
    found = diversity(x, PROMPTS)
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert found[2].isnan()
    torch.testing.assert_close(found[kept], diversity(x[kept], [PROMPTS[i] for i in kept]), equal_nan=True)


def test_diversity_of_nothing_is_empty():
    assert diversity(torch.zeros(0, 5), []).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(2, 3, 1, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["one channel", "no batch", "one row", "integers"],
)
@pytest.mark.parametrize("statistic", OF_IMAGES)
def test_what_is_no_image_is_refused(statistic, images):
    with pytest.raises(ValueError, match=r"floating point in \[0, 1\], of shape \(b, 3, h, w\)"):
        inspect.unwrap(statistic)(images)  # without the tests' own check of shapes


def test_settings_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="bins >= 1; got 0"):
        colour_entropy(noise(), 0)
    with pytest.raises(ValueError, match="size >= 1; got 0"):
        thumbnails(noise(), 0)
    with pytest.raises(ValueError, match=r"one base image .* got shapes \(4, 3, 32, 32\) and \(2, 3, 32, 32\)"):
        inspect.unwrap(drift)(noise(), noise(b=2))
    with pytest.raises(ValueError, match=r"one prompt a row; got shape \(8, 5\) and 2 prompts"):
        diversity(features(), ["a", "b"])
