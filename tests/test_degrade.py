"""degrade.py: the drawn distributions, each operation against a reference, and D itself."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, special, stats
from torch import Tensor

import common
import degrade
from degrade import Degradation

REPO = Path(__file__).resolve().parents[1]
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)


def drawn_image(height: int, width: int, seed: int = 0) -> Tensor:
    """An image (3, H, W) of 8-bit values: waves, an edge, a little noise."""
    gen = common.generator(seed, height, width)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    period = 4 + 30 * torch.rand(3, 2, generator=gen)
    waves = torch.stack([torch.sin(y / p[0] + x / p[1]) for p in period])
    image = 0.5 + 0.25 * waves + 0.2 * (x > width / 3).float()
    image += 0.05 * torch.randn(3, height, width, generator=gen)
    return common.to_uint8(image).float() / 255


def drawn_batch(batch: int, height: int, width: int) -> Tensor:
    return torch.stack([drawn_image(height, width, seed) for seed in range(batch)])


def identity(batch: int, scale: int = 1) -> Degradation:
    """Parameters that change nothing but the size."""
    return Degradation(
        blur_sigma=torch.ones(batch, 2, 2),
        blur_angle=torch.zeros(batch, 2),
        blur_shape=torch.ones(batch, 2),
        blur_plateau=torch.zeros(batch, 2, dtype=torch.bool),
        blur_size=torch.ones(batch, 3, dtype=torch.long),
        sinc_cutoff=torch.zeros(batch, 3),
        resize=torch.ones(batch, 2),
        resize_mode=torch.arange(3 * batch).view(batch, 3) % 3,
        gaussian_std=torch.zeros(batch, 2),
        poisson_scale=torch.zeros(batch, 2),
        gray_noise=torch.zeros(batch, 2, dtype=torch.bool),
        jpeg_quality=torch.zeros(batch, 2, dtype=torch.long),
        jpeg_last=torch.arange(batch) % 2 == 0,
        scale=torch.full((batch,), scale),
        seed=torch.arange(batch),
    )


# ---- drawing theta ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theta() -> Degradation:
    return degrade.sample_degradation(20_000, "realesrgan", generator=common.generator(7))


def assert_probability(events: Tensor, p: float) -> None:
    """The share of true events lies within 4 standard deviations of p."""
    deviation = 4 * math.sqrt(p * (1 - p) / len(events))
    assert abs(events.double().mean().item() - p) <= deviation


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Values lie in [low, high] and pass a Kolmogorov-Smirnov test."""
    assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
    assert stats.kstest(values.double(), "uniform", (low, high - low)).pvalue > 1e-4


def assert_shares(values: Tensor, choices: tuple, probabilities: tuple) -> None:
    """Values are of the choices only and pass a chi-square test of their probabilities."""
    counts = np.array([(values == choice).sum().item() for choice in choices])
    assert counts.sum() == len(values)
    expected = np.array(probabilities) * len(values) / sum(probabilities)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("stage", [0, 1])
def test_blur_is_drawn_as_published(theta, stage):
    blurred = theta.blur_size[:, stage] > 1
    if stage == 0:
        assert blurred.all()
    else:
        assert_probability(blurred, 0.8)
    sizes = theta.blur_size[blurred, stage]
    assert_shares(sizes, KERNEL_SIZES, (1,) * len(KERNEL_SIZES))
    cutoff = theta.sinc_cutoff[:, stage]
    assert (cutoff[~blurred] == 0).all()
    assert_probability(cutoff[blurred] > 0, 0.1)
    small = theta.blur_size[:, stage] < 13
    assert_uniform(cutoff[(cutoff > 0) & small], math.pi / 3, math.pi)
    assert_uniform(cutoff[(cutoff > 0) & ~small], math.pi / 5, math.pi)

    width, height = theta.blur_sigma[:, stage].unbind(1)
    high = (3.0, 1.5)[stage]
    assert_uniform(width, 0.2, high)
    isotropic = width == height
    assert_uniform(height[~isotropic], 0.2, high)
    assert_uniform(theta.blur_angle[~isotropic, stage], -math.pi, math.pi)
    assert (theta.blur_angle[isotropic, stage] == 0).all()


@pytest.mark.parametrize("stage", [0, 1])
def test_kinds_of_kernels_are_drawn_as_published(theta, stage):
    anisotropic = theta.blur_sigma[:, stage, 0] != theta.blur_sigma[:, stage, 1]
    shape, plateau = theta.blur_shape[:, stage], theta.blur_plateau[:, stage]
    generalized = ~plateau & (shape != 1)
    kind = anisotropic + 2 * generalized + 4 * plateau
    assert_shares(kind, (0, 1, 2, 3, 4, 5), (0.45, 0.25, 0.12, 0.03, 0.12, 0.03))
    # Half of the exponents are below one; of a plateau, where the range starts at one, equal to it.
    assert_probability(shape[generalized] < 1, 0.5)
    assert_uniform(shape[generalized & (shape < 1)], 0.5, 1)
    assert_uniform(shape[generalized & (shape > 1)], 1, 4)
    assert_probability(shape[plateau] == 1, 0.5)
    assert_uniform(shape[plateau & (shape != 1)], 1, 2)


@pytest.mark.parametrize(
    ("stage", "probabilities", "low", "high"),
    [(0, (0.2, 0.7, 0.1), 0.15, 1.5), (1, (0.3, 0.4, 0.3), 0.3, 1.2)],
)
def test_resize_is_drawn_as_published(theta, stage, probabilities, low, high):
    factor = theta.resize[:, stage]
    assert_shares(torch.sign(factor - 1), (1, -1, 0), probabilities)
    assert_uniform(factor[factor > 1], 1, high)
    assert_uniform(factor[factor < 1], low, 1)


@pytest.mark.parametrize(("stage", "std", "scale"), [(0, 30, 3), (1, 25, 2.5)])
def test_noise_is_drawn_as_published(theta, stage, std, scale):
    gaussian, poisson = theta.gaussian_std[:, stage] * 255, theta.poisson_scale[:, stage]
    assert ((gaussian > 0) ^ (poisson > 0)).all()
    assert_probability(gaussian > 0, 0.5)
    assert_uniform(gaussian[gaussian > 0], 1, std)
    assert_uniform(poisson[poisson > 0], 0.05, scale)
    assert_probability(theta.gray_noise[:, stage], 0.4)


def test_jpeg_and_the_final_filter_are_drawn_as_published(theta):
    for stage in (0, 1):
        assert_shares(theta.jpeg_quality[:, stage], tuple(range(30, 96)), (1,) * 66)
    for step in (0, 1, 2):
        assert_shares(theta.resize_mode[:, step], (0, 1, 2), (1, 1, 1))
    final = theta.blur_size[:, 2] > 1
    assert_probability(final, 0.8)
    assert_shares(theta.blur_size[final, 2], KERNEL_SIZES, (1,) * len(KERNEL_SIZES))
    assert (theta.sinc_cutoff[~final, 2] == 0).all()
    assert_uniform(theta.sinc_cutoff[final, 2], math.pi / 3, math.pi)
    assert_probability(theta.jpeg_last, 0.5)
    assert (theta.scale == 4).all()
    assert len(theta.seed.unique()) == len(theta)


def test_what_one_image_draws_is_independent(theta):
    names = ("resize", "resize_mode", "gaussian_std", "gray_noise", "jpeg_quality", "blur_size")
    columns = [c for name in names for c in getattr(theta, name).double().unbind(1)]
    columns += [theta.blur_sigma[:, 0, 0], theta.blur_sigma[:, 1, 0], theta.jpeg_last]
    correlation = np.corrcoef(torch.stack([c.double() for c in columns]))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(len(theta))


def test_theta_depends_on_the_generator_alone():
    draws = [degrade.sample_degradation(3, generator=common.generator(5, i)) for i in (0, 0, 1)]
    assert draws[0].to_json() == draws[1].to_json() != draws[2].to_json()


@pytest.mark.parametrize("recipe", list(degrade.RECIPES))
def test_every_recipe_degrades(recipe):
    theta = degrade.sample_degradation(4, recipe, generator=common.generator(1))
    lr = degrade.degrade(drawn_batch(4, 64, 48), theta)
    assert lr.shape == (4, 3, 16, 12) and lr.isfinite().all()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(common.UserError, match="realesrgan"):
        degrade.sample_degradation(1, "no such recipe")


def test_rows_of_theta_are_indexed_repeated_and_joined(theta):
    rows = theta[[5, 2]]
    assert len(rows) == 2 and rows.seed.tolist() == theta.seed[[5, 2]].tolist()
    assert rows.repeat(2).seed.tolist() == theta.seed[[5, 5, 2, 2]].tolist()
    assert Degradation.cat([theta[5:6], theta[2:3]]).to_json() == rows.to_json()


# ---- blur -------------------------------------------------------------------------------------


def slow_kernel(
    kind: str, size: int, sigma: tuple, angle: float, shape: float, cutoff: float
) -> np.ndarray:
    """A kernel (size, size) by the formulas of arXiv:2107.10833, one pixel after the other."""
    kernel, half = np.zeros((size, size)), size // 2
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    covariance = turn @ np.diag(np.square(sigma)) @ turn.T
    for i, j in np.ndindex(size, size):
        v = np.array([j - half, i - half], float)
        r, q = np.hypot(*v), v @ np.linalg.solve(covariance, v)
        if kind == "sinc":
            kernel[i, j] = cutoff**2 / (4 * math.pi)
            if r > 0:
                kernel[i, j] = cutoff * special.j1(cutoff * r) / (2 * math.pi * r)
        elif kind.startswith("plateau"):
            kernel[i, j] = 1 / (1 + q**shape)
        elif kind.startswith("generalized"):
            kernel[i, j] = math.exp(-0.5 * q**shape)
        else:
            kernel[i, j] = math.exp(-0.5 * q)
    return kernel / kernel.sum()


@pytest.mark.parametrize("kind", [*degrade.KINDS, "sinc"])
def test_kernel_equals_its_formula(kind):
    sizes = (7, 13, 21, 1)
    for size, (w, h), angle, shape, cutoff in zip(
        sizes,
        [(0.2, 0.7), (2.9, 0.3), (1.4, 3.0), (1, 1)],
        [0.3, -2.9, 1.6, 0],
        [0.5, 1.7, 4.0, 1],
        [1.1, 3.1, 0.7, 2],
        strict=True,
    ):
        if kind.endswith("aniso"):
            sigma = (w, h)
        else:
            sigma, angle = (w, w), 0.0
        exponent = shape if kind.startswith(("generalized", "plateau")) else 1.0
        expected = np.zeros((21, 21))
        inside = slice(10 - size // 2, 11 + size // 2)
        expected[inside, inside] = slow_kernel(kind, size, sigma, angle, exponent, cutoff)
        kernel = degrade.blur_kernel(
            torch.tensor([sigma]),
            torch.tensor([angle]),
            torch.tensor([exponent]),
            torch.tensor([kind.startswith("plateau")]),
            torch.tensor([size]),
            torch.tensor([cutoff if kind == "sinc" else 0.0]),
        )
        np.testing.assert_allclose(kernel[0], expected, rtol=1e-5, atol=1e-6)


def test_every_drawn_kernel_sums_to_one(theta):
    rows = theta[:2000]
    for stage, shape in ((0, 0), (1, 1), (2, 1)):
        kernel = degrade.blur_kernel(
            rows.blur_sigma[:, shape],
            rows.blur_angle[:, shape],
            rows.blur_shape[:, shape],
            rows.blur_plateau[:, shape],
            rows.blur_size[:, stage],
            rows.sinc_cutoff[:, stage],
        )
        torch.testing.assert_close(kernel.sum((1, 2)), torch.ones(len(rows)))


def test_blur_equals_scipy_for_images_of_different_sizes_on_one_canvas():
    size = torch.tensor([[40, 33], [5, 9], [40, 1], [23, 50], [1, 50]])
    kernel = torch.rand(len(size), 21, 21, generator=common.generator(0)) / 441
    canvas = torch.rand(len(size), 3, 40, 50, generator=common.generator(1))
    result = degrade.blur(canvas, kernel, size)
    for b, (h, w) in enumerate(size.tolist()):
        for channel in range(3):
            expected = ndimage.correlate(canvas[b, channel, :h, :w], kernel[b], mode="mirror")
            np.testing.assert_allclose(result[b, channel, :h, :w], expected, atol=2e-6)


# ---- resize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", degrade.MODES)
def test_resize_equals_interpolate_for_several_sizes_on_one_canvas(mode):
    size = torch.tensor([[64, 48], [64, 48], [37, 51], [10, 7], [1, 1], [63, 2], [29, 29]])
    new = torch.tensor([[16, 12], [71, 95], [37, 50], [64, 61], [9, 5], [10, 1], [29, 29]])
    canvas = torch.rand(len(size), 3, 64, 51, generator=common.generator(2))
    index = torch.full((len(size),), degrade.MODES.index(mode))
    result = degrade.resize(canvas, size, new, index)
    assert result.shape == (len(size), 3, *new.amax(0).tolist())
    for b, ((h, w), target) in enumerate(zip(size.tolist(), new.tolist(), strict=True)):
        options = {} if mode == "area" else {"align_corners": False}
        expected = F.interpolate(canvas[b : b + 1, :, :h, :w], target, mode=mode, **options)
        torch.testing.assert_close(
            result[b : b + 1, :, : target[0], : target[1]], expected, atol=2e-5, rtol=0
        )


def test_resize_takes_one_mode_for_each_image():
    x = drawn_batch(3, 30, 41)
    size, new = torch.tensor([[30, 41]]).expand(3, 2), torch.tensor([[13, 19]]).expand(3, 2)
    together = degrade.resize(x, size, new, torch.tensor([2, 0, 1]))
    for b, mode in enumerate((2, 0, 1)):
        alone = degrade.resize(x[b : b + 1], size[:1], new[:1], torch.tensor([mode]))
        torch.testing.assert_close(together[b : b + 1], alone)


# ---- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_std_and_is_shared_by_channels_only_if_gray(gray):
    theta = identity(2)
    theta.gaussian_std[:, 0], theta.gray_noise[:] = torch.tensor([0.02, 0.08]), gray
    x = torch.full((2, 3, 200, 150), 0.5)
    size = torch.tensor([[200, 150]]).expand(2, 2)
    eps = degrade.noise(x, size, theta, 0, theta.seed) - x
    assert eps[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert eps[1].std().item() == pytest.approx(0.08, rel=0.02)
    correlation = np.corrcoef(eps.transpose(0, 1).reshape(3, -1)[:, :30000])
    assert correlation[0, 1] > 0.999 if gray else abs(correlation[0, 1]) < 0.03
    assert abs(np.corrcoef(eps[0].flatten(), eps[1].flatten())[0, 1]) < 0.03


def test_poisson_noise_has_the_variance_of_its_photons():
    theta = identity(1)
    theta.poisson_scale[:, 0] = 0.9
    values = torch.arange(200) / 255  # the next power of two is 256: so many photons make white
    x = values.expand(1, 3, 2000, 200).contiguous()
    noise = degrade.noise(x, torch.tensor([[2000, 200]]), theta, 0, theta.seed) - x
    middle = slice(64, 192)  # where nothing is clipped
    expected = 0.9**2 * values / 256
    measured = noise.square().mean((0, 1, 2))
    torch.testing.assert_close(measured[middle], expected[middle], rtol=0.08, atol=0)
    assert noise[..., middle].mean().abs() < 1e-3


def test_noise_differs_between_the_rounds():
    theta = identity(1)
    theta.gaussian_std[:] = 0.05
    x, size = torch.full((1, 3, 64, 64), 0.5), torch.tensor([[64, 64]])
    first, second = (degrade.noise(x, size, theta, stage, theta.seed) for stage in (0, 1))
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.05


def test_gray_poisson_noise_is_the_same_in_all_channels():
    theta = identity(1)
    theta.poisson_scale[:, 1], theta.gray_noise[:] = 0.3, True
    x = 0.4 + 0.2 * drawn_batch(1, 64, 64)
    noise = degrade.noise(x, torch.tensor([[64, 64]]), theta, 1, theta.seed) - x
    assert noise.std() > 0
    torch.testing.assert_close(noise[:, 0], noise[:, 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(noise[:, 0], noise[:, 2], atol=1e-6, rtol=0)


# ---- JPEG -------------------------------------------------------------------------------------


def pillow(x: Tensor, quality: int, subsampling: str) -> np.ndarray:
    """Pillow's round trip of an image (3, H, W): uint8 (H, W, 3)."""
    file = io.BytesIO()
    image = Image.fromarray(common.to_uint8(x).permute(1, 2, 0).numpy())
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))


def bytes_of(x: Tensor) -> np.ndarray:
    return common.to_uint8(x).permute(1, 2, 0).numpy()


def jpeg_cases() -> list[Tensor]:
    """Drawn images, colour noise and saturated noise of odd and even sizes, narrow ones too."""
    gen = common.generator(3)
    images = []
    for index in range(60):
        height, width = (8 + torch.randint(0, 190, (2,), generator=gen)).tolist()
        if index % 5 == 0:
            height, width = torch.randint(1, 12, (2,), generator=gen).tolist()
        noise = torch.rand(3, height, width, generator=gen)
        images.append([drawn_image(height, width, index), noise, noise.round()][index % 3])
    return images


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_jpeg_equals_pillow_in_every_byte(subsampling):
    for index, x in enumerate(jpeg_cases()):
        quality = 100 - 37 * index % 100
        result = bytes_of(degrade.jpeg(x[None], quality, subsampling)[0])
        differing = (result != pillow(x, quality, subsampling)).sum()
        assert differing == 0, f"{differing} bytes at {tuple(x.shape)}, quality {quality}"


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_jpeg_equals_pillow_at_every_quality(subsampling):
    x = drawn_image(27, 38)
    quality = torch.arange(1, 101)
    result = degrade.jpeg(x.expand(100, 3, 27, 38), quality, subsampling)
    for q in quality.tolist():
        np.testing.assert_array_equal(bytes_of(result[q - 1]), pillow(x, q, subsampling))


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_jpeg_equals_pillow_for_images_of_different_sizes_on_one_canvas(subsampling):
    size = torch.tensor([[50, 70], [49, 33], [8, 70], [17, 16], [31, 4], [3, 2]])
    quality = torch.tensor([30, 95, 71, 5, 55, 88])
    canvas = torch.rand(len(size), 3, 50, 70, generator=common.generator(4))
    for b, (h, w) in enumerate(size.tolist()):
        canvas[b, :, :h, :w] = drawn_image(h, w, b)
    result = degrade.jpeg(canvas, quality, subsampling, size)
    for b, (h, w) in enumerate(size.tolist()):
        expected = pillow(canvas[b, :, :h, :w], int(quality[b]), subsampling)
        np.testing.assert_array_equal(bytes_of(result[b, :, :h, :w]), expected)


def test_jpeg_of_quality_zero_leaves_the_image_alone():
    x = torch.rand(2, 3, 20, 24, generator=common.generator(5))
    result = degrade.jpeg(x, torch.tensor([0, 60]))
    assert torch.equal(result[0], x[0]) and not torch.equal(result[1], x[1])


def test_jpeg_refuses_an_unknown_subsampling():
    with pytest.raises(ValueError, match="4:1:1"):
        degrade.jpeg(torch.zeros(1, 3, 8, 8), 50, "4:1:1")


# ---- D ----------------------------------------------------------------------------------------

SIDES = st.integers(1, 24).map(lambda n: 4 * n)


def slow_degrade(hr: Tensor, theta: Degradation) -> Tensor:
    """D without noise for one image (3, H, W), from SciPy, interpolate and Pillow, as published."""
    row = {key: value[0] for key, value in vars(theta).items()}

    def blurred(x: Tensor, stage: int) -> Tensor:
        size, cutoff = int(row["blur_size"][stage]), float(row["sinc_cutoff"][stage])
        kind, shape = "sinc", min(stage, 1)
        if cutoff == 0:
            kind = "plateau" if row["blur_plateau"][shape] else "generalized"
        sigma, angle = row["blur_sigma"][shape].tolist(), float(row["blur_angle"][shape])
        kernel = slow_kernel(kind, size, sigma, angle, float(row["blur_shape"][shape]), cutoff)
        planes = [ndimage.correlate(plane, kernel, mode="mirror") for plane in x.numpy()]
        return torch.from_numpy(np.stack(planes)).float()

    def resized(x: Tensor, height: int, width: int, stage: int) -> Tensor:
        mode = degrade.MODES[row["resize_mode"][stage]]
        options = {} if mode == "area" else {"align_corners": False}
        return F.interpolate(x[None], (height, width), mode=mode, **options)[0].clamp(0, 1)

    def compressed(x: Tensor, stage: int) -> Tensor:
        pixels = pillow(x, int(row["jpeg_quality"][stage]), "4:2:0")
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def to_lr(x: Tensor) -> Tensor:
        return blurred(resized(x, H // scale, W // scale, 2), 2).clamp(0, 1)

    H, W, scale = *hr.shape[1:], int(row["scale"])
    first, second = row["resize"].tolist()
    x = compressed(resized(blurred(hr, 0), int(H * first), int(W * first), 0), 0)
    x = resized(blurred(x, 1), int(H // scale * second), int(W // scale * second), 1)
    return compressed(to_lr(x), 1) if row["jpeg_last"] else to_lr(compressed(x, 1))


def test_degrade_equals_its_slow_version_where_there_is_no_noise():
    theta = degrade.sample_degradation(24, generator=common.generator(10))
    theta.gaussian_std[:] = theta.poisson_scale[:] = 0
    hr = drawn_batch(24, 96, 64)
    lr = degrade.degrade(hr, theta)
    for i in range(24):
        # A rounding that falls differently in front of a JPEG moves a few pixels of one block.
        difference = (lr[i] - slow_degrade(hr[i], theta[[i]])).abs() * 255
        assert (difference > 0.6).float().mean() < 0.01 and difference.max() < 12, i


@settings(max_examples=25, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 2**31))
def test_lr_has_its_size_and_range_at_any_size_and_seed(height, width, seed):
    theta = degrade.sample_degradation(3, generator=common.generator(seed))
    lr = degrade.degrade(drawn_batch(3, height, width), theta)
    assert lr.shape == (3, 3, height // 4, width // 4)
    assert lr.isfinite().all() and lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 2**31))
def test_a_row_does_not_depend_on_the_others(height, width, seed):
    theta = degrade.sample_degradation(6, generator=common.generator(seed))
    hr = drawn_batch(6, height, width)
    lr = degrade.degrade(hr, theta)
    order = [4, 0, 5]
    assert torch.equal(degrade.degrade(hr[order], theta[order]), lr[order])
    others = hr.clone()
    others[1:] = 1 - others[1:]
    assert torch.equal(degrade.degrade(others, theta)[0], lr[0])


def test_theta_read_from_json_replays_bit_for_bit():
    theta = degrade.sample_degradation(5, generator=common.generator(11))
    hr = drawn_batch(5, 64, 96)
    lr = degrade.degrade(hr, theta)
    read = Degradation.from_json(theta.to_json())
    assert torch.equal(degrade.degrade(hr, read), lr)
    for i in range(5):
        assert torch.equal(degrade.degrade(hr[i : i + 1], read[[i]]), lr[i : i + 1])


def test_a_generator_draws_new_noise_for_each_row_of_the_same_theta():
    theta = degrade.sample_degradation(1, "camera", generator=common.generator(12))
    theta.gaussian_std[:] = 0.05
    theta, hr = theta.repeat(2), drawn_batch(1, 64, 64).expand(2, 3, 64, 64)
    replayed = degrade.degrade(hr, theta)
    assert torch.equal(replayed[0], replayed[1])
    fresh = degrade.degrade(hr, theta, common.generator(0))
    assert not torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], replayed[0])
    assert torch.equal(fresh, degrade.degrade(hr, theta, common.generator(0)))
    assert not torch.equal(fresh, degrade.degrade(hr, theta, common.generator(1)))


def test_identity_parameters_change_nothing():
    hr = drawn_batch(3, 45, 32)
    assert torch.equal(degrade.degrade(hr, identity(3)), hr)


def test_identity_parameters_at_scale_4_are_a_plain_resize():
    hr = drawn_batch(3, 48, 32)
    theta = identity(3, scale=4)
    theta.resize_mode[:] = degrade.MODES.index("area")
    expected = (F.avg_pool2d(hr, 4) * 255).round() / 255
    torch.testing.assert_close(degrade.degrade(hr, theta), expected, atol=1.01 / 255, rtol=0)


def test_two_thetas_give_two_images():
    theta = degrade.sample_degradation(2, generator=common.generator(13))
    lr = degrade.degrade(drawn_batch(1, 64, 64).expand(2, 3, 64, 64), theta)
    assert not torch.equal(lr[0], lr[1])


def test_wrong_sizes_are_refused():
    theta = degrade.sample_degradation(2, generator=common.generator(0))
    with pytest.raises(ValueError, match="rows of parameters"):
        degrade.degrade(drawn_batch(3, 32, 32), theta)
    with pytest.raises(ValueError, match="can't be degraded by scale 4"):
        degrade.degrade(drawn_batch(2, 32, 30), theta)


def test_physical_quantities_follow_blur_noise_and_compression():
    steps = 9
    theta = identity(steps, scale=4)
    theta.blur_size[:, 0] = 21
    theta.blur_sigma[:, 0] = torch.linspace(0.2, 3, steps)[:, None]
    theta.gaussian_std[:, 1] = torch.linspace(0, 25 / 255, steps)
    theta.jpeg_quality[:, 1] = torch.linspace(95, 30, steps).long()
    physical = theta.physical()
    assert physical.shape == (steps, 5)
    for column in (0, 3, 4):
        assert (physical[:, column].diff() > 0).all()
    assert (physical[:, [1, 2]] == 0).all()
    drawn = degrade.sample_degradation(500, generator=common.generator(14)).physical()
    assert drawn.isfinite().all() and drawn.min() > -0.5 and drawn.max() < 2


@pytest.mark.gpu
def test_gpu_jpeg_equals_the_cpu_and_theta_may_live_on_either():
    x = drawn_batch(4, 50, 70)
    quality = torch.tensor([5, 40, 75, 100])
    assert torch.equal(degrade.jpeg(x.cuda(), quality.cuda()).cpu(), degrade.jpeg(x, quality))
    theta = degrade.sample_degradation(4, generator=common.generator(0))
    hr = drawn_batch(4, 64, 64).cuda()
    lr = degrade.degrade(hr, theta)
    assert lr.is_cuda and torch.equal(lr, degrade.degrade(hr, theta.to("cuda")))
    torch.testing.assert_close(theta.to("cuda").physical().cpu(), theta.physical())


@pytest.mark.slow
def test_real_esrgan_is_as_far_from_the_real_lr_as_the_public_code(shared):
    folder = shared / "photos" / "pairs" / "RealSR"
    names = sorted(path.name for path in (folder / "HR").glob("*.webp"))
    if len(names) < 50:
        pytest.skip("the RealSR pairs are not there")
    psnrs = []
    for i, name in enumerate(names):
        hr, real = (common.load_image(folder / kind / name)[None] for kind in ("HR", "LR"))
        theta = degrade.sample_degradation(4, generator=common.generator(0, i))
        lr = degrade.degrade(hr.expand(4, -1, -1, -1), theta)
        psnrs += (-10 * (lr - real).square().mean((1, 2, 3)).log10()).tolist()
    assert np.mean(psnrs) == pytest.approx(24.42, abs=0.5)


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with two photos, one of them 16-bit gray, and two bad files."""
    folder = tmp_path / "photos"
    common.save_image(folder / "a.png", drawn_image(66, 49))
    gray = (drawn_image(40, 44)[0].numpy() * 65000 + 7).astype(np.uint16)
    Image.fromarray(gray).save(folder / "b.png")
    (folder / "c.jpg").write_text("not an image")
    common.save_image(folder / "tiny.png", drawn_image(9, 9))
    return folder


def launch(monkeypatch, *argv: object) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, argv)])
    common.launch(degrade.main, degrade.Config, {}, degrade.__doc__)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_the_command_writes_pairs_that_replay_and_a_second_run_changes_nothing(photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, REPO / "degrade.py", "--hr", photos, "--out", out, "--device", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "2 pairs" in run.stdout and "2 images skipped" in run.stdout
    assert "c.jpg" in run.stdout + run.stderr and "tiny.png" in run.stdout + run.stderr

    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [Path(pair["source"]).name for pair in pairs] == ["a.png", "b.png"]
    files = {pair[kind] for pair in pairs for kind in ("hr", "lr")}
    assert set(contents(out)) == files | {"pairs.jsonl"}
    for pair, shape in zip(pairs, [(3, 64, 48), (3, 40, 44)], strict=True):
        hr, lr = common.load_image(out / pair["hr"]), common.load_image(out / pair["lr"])
        assert hr.shape == shape and lr.shape == (3, shape[1] // 4, shape[2] // 4)
        assert Path(pair["hr"]).name == Path(pair["lr"]).name
        theta = Degradation.from_json([json.dumps(pair["theta"])])
        assert torch.equal(degrade.degrade(hr[None], theta)[0], lr)

    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == times


def test_an_image_is_the_same_in_whatever_run_makes_it(photos, tmp_path, monkeypatch, capsys):
    launch(monkeypatch, "--hr", photos, "--out", tmp_path / "one")
    launch(monkeypatch, "--hr", photos, "--out", tmp_path / "two", "--seed", 3)
    assert contents(tmp_path / "one") != contents(tmp_path / "two")
    # Other parameters into the same folder: the table must describe the images that lie there.
    launch(monkeypatch, "--hr", photos, "--out", tmp_path / "one", "--seed", 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    missing = next((tmp_path / "one" / "lr").iterdir())
    missing.unlink()
    launch(monkeypatch, "--hr", photos, "--out", tmp_path / "one", "--seed", 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--recipe", "wrong"], "wrong"),
        (["--hr", "no/such/folder"], "no/such/folder"),
        (["--scale", "0"], "--scale"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_writes_nothing(
    argv, word, photos, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    argv = ["--hr", photos, *argv] if "--hr" not in argv else argv
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, *argv, "--out", out)
    assert stopped.value.code == 2 and not out.exists()
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and word in message and "\n" not in message


def test_a_folder_without_images_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, "--hr", tmp_path / "empty", "--out", tmp_path / "out")
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert "no images" in capsys.readouterr().err
