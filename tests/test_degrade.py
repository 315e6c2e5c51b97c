"""degrade.py: the drawn distributions, each operation against a reference, D, the command."""

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import linalg, ndimage, special, stats
from torch import Tensor

import common
import degrade
from degrade import Degradation
from tests.fake_cuda import fake_cuda

REPO = Path(__file__).resolve().parents[1]
OPENCV = tuple(map(degrade.MODES.index, ("coverage", "bilinear", "bicubic")))
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


def bytes_of(x: Tensor) -> np.ndarray:
    """An image (3, H, W) as uint8 (H, W, 3)."""
    return common.to_uint8(x).permute(1, 2, 0).numpy()


def only(batch: int, *operations: str, scale: int = 1) -> Degradation:
    """Parameters of just these operations (and the resize to LR), to be filled in."""
    theta = degrade.bicubic(batch, scale)
    codes = [degrade.OPERATIONS.index(name) for name in (*operations, "resize 3")]
    theta.order[:, : len(codes)] = torch.tensor(codes)
    theta.seed = torch.arange(batch)
    return theta


def of_all_recipes(batch: int, seed: int) -> Degradation:
    """Parameters of a batch for each recipe, joined."""
    draw = common.generator(seed)
    parts = [degrade.sample_degradation(batch, r, generator=draw) for r in degrade.RECIPES]
    return Degradation.cat(parts)


def without_noise(theta: Degradation) -> Degradation:
    noisy = torch.tensor([name[:5] in ("gauss", "poiss") for name in degrade.OPERATIONS])
    theta.order[noisy[theta.order]] = 0
    return theta


def performed(theta: Degradation, operation: str) -> Tensor:
    """Which images go through this operation."""
    return (theta.order == degrade.OPERATIONS.index(operation)).any(1)


def place(theta: Degradation, operation: str) -> Tensor:
    """At which step each image goes through it."""
    return (theta.order == degrade.OPERATIONS.index(operation)).long().argmax(1)


# ---- drawing theta ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theta() -> Degradation:
    return degrade.sample_degradation(20_000, "realesrgan", generator=common.generator(6))


def assert_probability(events: Tensor, p: float) -> None:
    """The share of true events lies within 4 standard deviations of p."""
    deviation = 4 * math.sqrt(p * (1 - p) / len(events))
    assert abs(events.double().mean().item() - p) <= deviation


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Values lie in [low, high] and pass a Kolmogorov-Smirnov test."""
    assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
    assert stats.kstest(values.double(), "uniform", (low, high - low)).pvalue > 1e-4


def assert_shares(values: Tensor, choices: tuple, probabilities: tuple | None = None) -> None:
    """Values are of the choices only and pass a chi-square test of their probabilities."""
    counts = np.array([(values == choice).sum().item() for choice in choices])
    assert counts.sum() == len(values)
    shares = np.array(probabilities or [1] * len(choices))
    assert stats.chisquare(counts, shares * len(values) / shares.sum()).pvalue > 1e-4


@pytest.mark.parametrize(("stage", "share", "widest"), [(0, 1.0, 3.0), (1, 0.8, 1.5)])
def test_blur_is_drawn_as_published(theta, stage, share, widest):
    assert_probability(performed(theta, f"blur {stage + 1}"), share)
    sizes, cutoff = theta.blur_size[:, stage], theta.sinc_cutoff[:, stage]
    assert_shares(sizes, KERNEL_SIZES)
    assert_probability(cutoff > 0, 0.1)
    assert_uniform(cutoff[(cutoff > 0) & (sizes < 13)], math.pi / 3, math.pi)
    assert_uniform(cutoff[(cutoff > 0) & (sizes >= 13)], math.pi / 5, math.pi)
    width, height = theta.blur_sigma[:, stage].unbind(1)
    anisotropic, angle = width != height, theta.blur_angle[:, stage]
    assert_uniform(width, 0.2, widest)
    assert_uniform(height[anisotropic], 0.2, widest)
    assert_uniform(angle[anisotropic], -math.pi, math.pi)
    assert (angle[~anisotropic] == 0).all() and (theta.sharpen == 0).all()
    shape, plateau = theta.blur_shape[:, stage], theta.blur_plateau[:, stage]
    generalized = ~plateau & (shape != 1)
    kind = anisotropic + 2 * generalized + 4 * plateau
    assert_shares(kind, (0, 1, 2, 3, 4, 5), (0.45, 0.25, 0.12, 0.03, 0.12, 0.03))
    # Half of the exponents are below one; a plateau's range starts there, so half are equal to one.
    assert_probability(shape[generalized] < 1, 0.5)
    assert_uniform(shape[generalized & (shape < 1)], 0.5, 1)
    assert_uniform(shape[generalized & (shape > 1)], 1, 4)
    assert_probability(shape[plateau] == 1, 0.5)
    assert_uniform(shape[plateau & (shape != 1)], 1, 2)


@pytest.mark.parametrize(
    ("stage", "probabilities", "low", "high", "std", "scale"),
    [(0, (0.2, 0.7, 0.1), 0.15, 1.5, 30, 3), (1, (0.3, 0.4, 0.3), 0.3, 1.2, 25, 2.5)],
)
def test_resize_noise_and_jpeg_are_drawn_as_published(
    theta, stage, probabilities, low, high, std, scale
):
    factor = theta.resize[:, stage] * (1, 4)[stage]
    assert_shares(torch.sign(factor - 1), (1, -1, 0), probabilities)
    assert_uniform(factor[factor > 1], 1, high)
    assert_uniform(factor[factor < 1], low, 1)
    # A factor of 1 is no resize of the HR size, but it is one in round 2, of the LR size.
    resized = performed(theta, f"resize {stage + 1}")
    assert torch.equal(resized, factor != 1) if stage == 0 else resized.all()
    gaussian, poisson = theta.gaussian_std[:, stage] * 255, theta.poisson_scale[:, stage]
    assert ((gaussian > 0) ^ (poisson > 0)).all()
    assert_probability(gaussian > 0, 0.5)
    assert torch.equal(performed(theta, f"gaussian {stage + 1}"), gaussian > 0)
    assert torch.equal(performed(theta, f"poisson {stage + 1}"), poisson > 0)
    assert_uniform(gaussian[gaussian > 0], 1, std)
    assert_uniform(poisson[poisson > 0], 0.05, scale)
    assert_probability(theta.gray_noise[:, stage], 0.4)
    assert_shares(theta.jpeg_quality[:, stage], tuple(range(30, 96)))


def test_the_last_steps_are_drawn_as_published(theta):
    for step in (0, 1, 2):
        assert_shares(theta.resize_mode[:, step], (0, 1, 2))
    final = performed(theta, "blur 3")
    assert_probability(final, 0.8)
    assert_shares(theta.blur_size[:, 2], KERNEL_SIZES)
    assert_uniform(theta.sinc_cutoff[final, 2], math.pi / 3, math.pi)
    assert_probability(place(theta, "jpeg 2") > place(theta, "resize 3"), 0.5)
    assert (theta.scale == 4).all() and len(theta.seed.unique()) == len(theta)


def test_the_operations_of_real_esrgan_come_in_their_order(theta):
    rounds = ["blur 1", "resize 1", "gaussian 1", "poisson 1", "jpeg 1",
              "blur 2", "resize 2", "gaussian 2", "poisson 2"]  # fmt: skip
    orders = set()
    for row in theta[:500].order.tolist():
        names = [degrade.OPERATIONS[i] for i in row if i]
        expected = [name for name in rounds if name in names]
        assert names[: len(expected)] == expected
        orders.add(tuple(names[len(expected) :]))
    assert orders == {
        ("jpeg 2", "resize 3", "blur 3"),
        ("jpeg 2", "resize 3"),
        ("resize 3", "blur 3", "jpeg 2"),
        ("resize 3", "jpeg 2"),
    }


@pytest.fixture(scope="module")
def bsrgan() -> Degradation:
    return degrade.sample_degradation(20_000, "bsrgan", generator=common.generator(8))


def test_bsrgan_halves_first_and_compresses_last(bsrgan):
    halved = performed(bsrgan, "resize 1")
    assert_probability(halved, 0.25)
    assert (place(bsrgan, "resize 1")[halved] == 0).all() and (bsrgan.resize[:, 0] == 0.5).all()
    # One half of the halvings is antialiased, the other of OpenCV's three modes in equal shares.
    assert_shares(bsrgan.resize_mode[halved, 0], (*OPENCV, 3), (1, 1, 1, 3))
    assert (place(bsrgan, "jpeg 2") == 8).all()
    other = degrade.sample_degradation(500, "bsrgan", 2, common.generator(0))
    assert not performed(other, "resize 1").any()


def test_bsrgan_shuffles_its_operations(bsrgan):
    six = ("blur 1", "blur 2", "resize 2", "resize 3", "gaussian 1", "jpeg 1")
    rows = performed(bsrgan, "jpeg 1")
    assert_probability(rows, 0.9)
    places = torch.stack([place(bsrgan, name) for name in six], 1)[rows]
    assert (places[:, 2] < places[:, 3]).all()
    _, counts = places.argsort(1).unique(dim=0, return_counts=True)
    assert len(counts) == 360  # 6! / 2
    assert stats.chisquare(counts).pvalue > 1e-4
    shifted = performed(bsrgan, "blur 3")
    assert_probability(shifted, 0.25)
    assert (place(bsrgan, "resize 2") == place(bsrgan, "blur 3") + 1)[shifted].all()


@pytest.mark.parametrize("halved", [False, True])
def test_bsrgan_blur_and_resize_are_drawn_as_published(bsrgan, halved):
    rows = bsrgan[performed(bsrgan, "resize 1") == halved]
    s = 2 if halved else 4
    for i in (0, 1):
        width, height = rows.blur_sigma[:, i].unbind(1)
        isotropic = width == height
        assert_probability(isotropic, 0.5)
        assert_uniform(width[isotropic], 0, 2 + 0.2 * s)
        assert_uniform(width[~isotropic].square(), 0, 4 + s)
        assert_uniform(height[~isotropic].square(), 0, 4 + s)
        assert_uniform(rows.blur_angle[~isotropic, i], 0, math.pi)
        assert_shares(rows.blur_size[:, i], tuple(range(7, 26, 2)))
    factor = (0.5 if halved else 1.0) / rows.resize[:, 1]
    shifted = performed(rows, "blur 3")
    torch.testing.assert_close(factor[shifted], torch.full_like(factor[shifted], float(s)))
    assert_uniform(factor[~shifted], 1, 2 * s)
    assert (rows.resize_mode[shifted, 1] == degrade.MODES.index("bilinear")).all()
    assert_uniform(rows.blur_sigma[shifted, 2, 0], 0.1, 0.6 * s)
    assert (rows.blur_size[shifted, 2] == 25).all()
    assert_shares(rows.resize_mode[~shifted, 1], OPENCV)
    assert_shares(rows.resize_mode[:, 2], OPENCV)


def test_bsrgan_noise_and_jpeg_are_drawn_as_published(bsrgan):
    mixed = (bsrgan.colour_mix != torch.eye(3)).flatten(1).any(1)
    assert_shares(bsrgan.gray_noise[:, 0] + 2 * mixed, (0, 1, 2), (0.4, 0.4, 0.2))
    level = (bsrgan.gaussian_std[:, 0] * 255).round()
    assert_shares(level[~mixed], tuple(range(2, 26)))
    assert (level[mixed] == 25).all() and performed(bsrgan, "gaussian 1").all()
    for i in (0, 1):
        assert_shares(bsrgan.jpeg_quality[:, i], tuple(range(30, 96)))
    # The covariances mix @ mix^T against those that NumPy's sampler takes from its SVD.
    rng = np.random.default_rng(0)  # noqa: NPY002
    expected = []
    for _ in range(4000):
        U = linalg.orth(rng.random((3, 3)))
        covariance = np.abs(U.T @ np.diag(rng.random(3)) @ U)
        _, value, vector = np.linalg.svd(covariance)
        expected.append(vector.T @ np.diag(value) @ vector)
    mix = bsrgan.colour_mix[mixed].double()
    drawn = (mix @ mix.mT).numpy()
    for i, j in ((0, 0), (1, 1), (0, 1), (1, 2)):
        assert stats.ks_2samp(drawn[:, i, j], np.array(expected)[:, i, j]).pvalue > 1e-4


def test_downsampling_behind_a_shifted_gaussian_is_what_bsrgan_publishes():
    """A kernel shifted by (s - 1) / 2 with bilinear interpolation, then every s-th pixel."""
    hr, s, sigma = drawn_image(64, 48), 4, 1.7
    theta = only(1, "blur 3", "resize 2", scale=4)
    theta.blur_sigma[:, 2], theta.blur_size[:, 2] = sigma, 25
    theta.resize[:, 1], theta.resize_mode[:, 1] = 1 / s, degrade.MODES.index("bilinear")
    kernel = slow_kernel("gaussian", 25, (sigma, sigma), 0.0, 1.0, 0.0)
    shifted = ndimage.shift(kernel, -(s - 1) / 2, order=1, mode="constant")
    shifted /= shifted.sum()
    planes = [ndimage.convolve(plane, shifted, mode="mirror")[::s, ::s] for plane in hr.numpy()]
    expected = torch.from_numpy(np.stack(planes)).clamp(0, 1)
    lr = degrade.degrade(hr[None], theta)[0]
    inner = (slice(None), slice(4, -4), slice(4, -4))  # the border is mirrored elsewhere
    assert (lr - expected)[inner].abs().max() < 1.5 / 255


def test_wide_leaves_out_each_of_its_factors_at_times():
    theta = degrade.sample_degradation(20_000, "wide", generator=common.generator(4))
    shares = {"blur 1": 0.8, "gaussian 2": 0.5, "blur 3": 0.5, "jpeg 2": 0.5}
    for name, share in shares.items():
        assert_probability(performed(theta, name), share)
    any_of_them = torch.stack([performed(theta, name) for name in shares]).any(0)
    assert_probability(any_of_them, 1 - 0.2 * 0.5**3)
    assert (theta.blur_size[:, 0] == degrade.KERNEL_SIZE).all()
    assert_shares(theta.resize_mode[:, 1], (0, 1, 2, 3))


def test_the_camera_recipe_sharpens_half_of_its_images():
    theta = degrade.sample_degradation(2000, "camera", generator=common.generator(3))
    assert_probability(theta.sharpen[:, 2] > 0, 0.5)
    assert torch.equal(performed(theta, "blur 3"), theta.sharpen[:, 2] > 0)
    assert not performed(theta, "jpeg 1").any() and not performed(theta, "gaussian 1").any()


def test_what_one_image_draws_is_independent(theta):
    names = ("resize", "resize_mode", "sinc_cutoff", "gaussian_std", "gray_noise", "jpeg_quality",
             "blur_size")  # fmt: skip
    columns = [c.double() for name in names for c in getattr(theta, name).unbind(1)]
    columns += [theta.blur_sigma[:, 0, 0].double(), theta.blur_sigma[:, 1, 0].double()]
    columns.append((place(theta, "jpeg 2") > place(theta, "resize 3")).double())
    correlation = np.corrcoef(torch.stack(columns))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(len(theta))


def test_theta_depends_on_the_generator_alone():
    draws = [degrade.sample_degradation(3, generator=common.generator(5, i)) for i in (0, 0, 1)]
    assert draws[0].to_json() == draws[1].to_json() != draws[2].to_json()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(common.UserError, match="realesrgan"):
        degrade.sample_degradation(1, "no such recipe")


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
        elif kind == "plateau":
            kernel[i, j] = 1 / (1 + q**shape)
        else:
            kernel[i, j] = math.exp(-0.5 * q**shape)
    return kernel / kernel.sum()


@pytest.mark.parametrize("kind", ["gaussian", "generalized", "plateau", "sinc"])
@pytest.mark.parametrize(
    ("size", "sigma", "angle", "shape", "cutoff"),
    [
        (7, (0.2, 0.7), 0.3, 0.5, 1.1),
        (13, (2.9, 0.3), -2.9, 1.7, 3.1),
        (21, (1.4, 1.4), 0.0, 4.0, 0.7),
        (1, (1.0, 1.0), 0.0, 1.0, 2.0),
    ],
)
def test_kernel_equals_its_formula(kind, size, sigma, angle, shape, cutoff):
    shape = 1.0 if kind == "gaussian" else shape
    expected, identity = np.zeros((25, 25)), np.zeros((25, 25))
    inside = slice(12 - size // 2, 13 + size // 2)
    expected[inside, inside] = slow_kernel(kind, size, sigma, angle, shape, cutoff)
    identity[12, 12] = 1
    theta = degrade.bicubic(1, 4)
    theta.blur_sigma[:], theta.blur_angle[:] = torch.tensor(sigma), angle
    theta.blur_shape[:], theta.blur_plateau[:] = shape, kind == "plateau"
    theta.blur_size[:], theta.sinc_cutoff[:] = size, cutoff if kind == "sinc" else 0.0
    theta.sharpen[:, 2] = 0.7
    plain, _, sharp = degrade.blur_kernels(theta)[0]
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)
    unsharp_mask = identity + 0.7 * (identity - expected)
    np.testing.assert_allclose(sharp, unsharp_mask, rtol=1e-5, atol=1e-6)


def test_every_drawn_kernel_sums_to_one():
    total = degrade.blur_kernels(of_all_recipes(100, seed=2)).sum((2, 3))
    torch.testing.assert_close(total, torch.ones_like(total))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 12), st.integers(0, 99))
def test_blur_equals_scipy_at_any_size(height, width, half, seed):
    gen, side = common.generator(seed), 2 * half + 1
    image = torch.rand(1, 3, height, width, generator=gen)
    kernel = torch.rand(side, side, generator=gen)
    kernel /= kernel.sum()
    result = degrade.blur(image, F.pad(kernel, (12 - half,) * 4)[None])
    for plane, expected in zip(result[0], image[0], strict=True):
        expected = ndimage.correlate(expected, kernel, mode="mirror")
        np.testing.assert_allclose(plane, expected, atol=2e-6)


# ---- resize -----------------------------------------------------------------------------------


def covered(n: int, m: int) -> np.ndarray:
    """OpenCV's INTER_AREA along one side, (m, n): how much of each pixel lies under a new one."""
    weights = np.zeros((m, n))
    for i, j in np.ndindex(m, n):
        under = min(j + 1, (i + 1) * n / m) - max(j, i * n / m)
        weights[i, j] = max(under, 0) * m / n
    return weights


def slow_resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize an image (3, H, W) with Pillow, by OpenCV's definition, or with torch."""
    if mode == "antialiased":
        planes = [Image.fromarray(plane) for plane in image.numpy()]
        resized = [np.asarray(p.resize(size[::-1], Image.Resampling.BICUBIC)) for p in planes]
        return torch.from_numpy(np.stack(resized))
    if mode == "coverage":
        down, across = (covered(n, m) for n, m in zip(image.shape[1:], size, strict=True))
        return torch.from_numpy(down @ image.double().numpy() @ across.T).float()
    options = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(image[None], size, mode=mode, **options)[0]


def on_a_canvas(images: list[Tensor], beyond: float = 0.0) -> tuple[Tensor, Tensor]:
    """Images (3, H, W) in the top left corners of one tensor, and their sizes."""
    size = torch.tensor([image.shape[1:] for image in images])
    canvas = torch.full((len(images), 3, *size.amax(0).tolist()), beyond)
    for b, image in enumerate(images):
        canvas[b, :, : image.shape[1], : image.shape[2]] = image
    return canvas, size


def test_resize_equals_interpolate_for_images_of_several_sizes_and_modes():
    sizes = [(64, 48), (64, 48), (37, 51), (10, 7), (1, 1), (63, 2), (29, 29), (40, 40)]
    new = [(16, 12), (71, 95), (37, 50), (64, 61), (9, 5), (10, 1), (29, 29), (6, 59)]
    sizes, new = (of * len(degrade.MODES) for of in (sizes, new))
    gen = common.generator(2)
    images = [torch.rand(3, *size, generator=gen) for size in sizes]
    turn = [
        degrade.Step(b, 0, before, after, b % len(degrade.MODES))
        for b, (before, after) in enumerate(zip(sizes, new, strict=True))
    ]
    ((at, weight, size),) = degrade.resize_weights([turn], torch.device("cpu"))
    results = degrade.resize(on_a_canvas(images, beyond=9.0)[0], at, weight, size)
    for image, result, step in zip(images, results, turn, strict=True):
        h, w = step.new_size
        expected = slow_resize(image, (h, w), degrade.MODES[step.value])
        torch.testing.assert_close(result[:, :h, :w], expected, atol=2e-5, rtol=0)


# ---- noise ------------------------------------------------------------------------------------


def shot(images: list[Tensor], scale: float, gray: list[bool]) -> list[Tensor]:
    """The images with Poisson noise, drawn together."""
    x, size = on_a_canvas(images, beyond=0.123)
    noisy = degrade.poisson(x, torch.full((len(x),), scale), gray, size, common.generator(9))
    return [y[:, :h, :w] for y, (h, w) in zip(noisy, size.tolist(), strict=True)]


@pytest.mark.parametrize("gray", [[True, True], [False, False], [False, True]])
def test_noise_has_its_std_and_is_shared_by_channels_only_if_gray(gray):
    x, std, mix = torch.full((2, 3, 200, 150), 0.5), torch.tensor([0.02, 0.08]), torch.eye(3)
    eps = degrade.gaussian(x, std, gray, mix.expand(2, 3, 3), common.generator(9)) - x
    for noise, deviation in zip(eps, std.tolist(), strict=True):
        assert noise.std().item() == pytest.approx(deviation, rel=0.02)
    assert abs(np.corrcoef(*(e.flatten() for e in eps))[0, 1]) < 0.03
    image = 0.4 + 0.2 * drawn_image(200, 150)
    counts = torch.stack(shot([image, image], 0.3, gray)) - image
    for noise, is_gray in zip([*eps, *counts], gray * 2, strict=True):
        correlation = np.corrcoef(noise.flatten(1))
        assert correlation.min() > 0.999 if is_gray else np.abs(correlation[0, 1:]).max() < 0.03


def test_gaussian_noise_has_the_covariance_of_its_mix():
    mix = torch.tensor([[[1.0, 0.0, 0.3], [0.5, 0.7, 0.0], [0.1, 0.2, 0.4]]])
    image = torch.full((1, 3, 300, 300), 0.5)
    noisy = degrade.gaussian(image, torch.tensor([0.05]), [False], mix, common.generator(9))
    covariance = np.cov((noisy - image)[0].flatten(1)) / 0.05**2
    np.testing.assert_allclose(covariance, mix[0] @ mix[0].T, atol=0.03)


def test_poisson_noise_is_distributed_as_its_photons():
    image = torch.full((3, 400, 400), 7 / 255)
    image[:, 0, :64] = torch.arange(64) / 255  # 64 levels, so 64 photons per unit
    noisy = shot([image], 1.0, [False])[0][:, 1:]
    counts = (noisy * 64).round().long().flatten().bincount(minlength=12)[:12].numpy()
    expected = stats.poisson.pmf(np.arange(12), 64 * 7 / 255)
    enough = expected * counts.sum() > 5
    observed = np.append(counts[enough], noisy.numel() - counts[enough].sum())
    expected = np.append(expected[enough], 1 - expected[enough].sum()) * noisy.numel()
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_poisson_counts_the_levels_of_each_image_alone():
    """Few levels make few photons, so more noise; the neighbour on the canvas does not matter."""
    flat = torch.full((3, 60, 60), 0.5)
    flat[:, ::2] = 130 / 255
    noisy = shot([flat, drawn_image(80, 80)], 0.2, [False, False])
    expected = 0.2 * (flat.mean() / 2).sqrt()  # two levels, two photons per unit
    assert (noisy[0] - flat).std().item() == pytest.approx(expected.item(), rel=0.05)


def test_noise_differs_between_the_rounds():
    x, theta = torch.full((1, 3, 64, 64), 0.5), only(1, "gaussian 1", "gaussian 2")
    theta.gaussian_std[:] = 0.05
    noise = degrade.degrade(x, theta) - x  # the same noise twice would have a std of 0.1
    assert noise.std().item() == pytest.approx(0.05 * math.sqrt(2), rel=0.03)


# ---- JPEG -------------------------------------------------------------------------------------


def pillow(x: Tensor, quality: int) -> np.ndarray:
    """Pillow's round trip of an image (3, H, W): uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(bytes_of(x)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(1, 12), st.integers(1, 513)),
    st.one_of(st.integers(1, 12), st.integers(1, 513)),
    st.integers(1, 100),
    st.sampled_from(["drawn", "noise", "saturated"]),
)
def test_jpeg_equals_pillow_in_every_byte_at_any_size(height, width, quality, content):
    noise = torch.rand(3, height, width, generator=common.generator(height, width))
    x = {"drawn": drawn_image(height, width), "noise": noise, "saturated": noise.round()}[content]
    np.testing.assert_array_equal(bytes_of(degrade.jpeg(x[None], quality)[0]), pillow(x, quality))


def test_jpeg_equals_pillow_at_every_quality():
    x, quality = drawn_image(27, 38), torch.arange(1, 101)
    result = degrade.jpeg(x.expand(100, 3, 27, 38), quality)
    for q in quality.tolist():
        np.testing.assert_array_equal(bytes_of(result[q - 1]), pillow(x, q))


def test_jpeg_equals_pillow_for_images_of_different_sizes_on_one_canvas():
    size = torch.tensor([[50, 70], [49, 33], [8, 70], [17, 16], [31, 4], [3, 2]])
    quality = torch.tensor([30, 95, 71, 5, 55, 88])
    canvas = torch.rand(len(size), 3, 50, 70, generator=common.generator(4))
    for b, (h, w) in enumerate(size.tolist()):
        canvas[b, :, :h, :w] = drawn_image(h, w, b)
    result = degrade.jpeg(canvas, quality, size)
    for b, (h, w) in enumerate(size.tolist()):
        expected = pillow(canvas[b, :, :h, :w], int(quality[b]))
        np.testing.assert_array_equal(bytes_of(result[b, :, :h, :w]), expected)


@pytest.mark.parametrize("quality", [0, 101])
def test_jpeg_refuses_an_impossible_quality(quality):
    with pytest.raises(ValueError, match="1..100"):
        degrade.jpeg(torch.zeros(2, 3, 8, 8), torch.tensor([50, quality]))


# ---- D ----------------------------------------------------------------------------------------

SIDES = st.integers(1, 24).map(lambda n: 4 * n)


def slow_degrade(hr: Tensor, theta: Degradation) -> Tensor:
    """D without noise for one image (3, H, W), from SciPy, interpolate and Pillow, as published."""
    row = {key: value[0] for key, value in vars(theta).items()}

    def blurred(x: Tensor, i: int) -> Tensor:
        size, cutoff = int(row["blur_size"][i]), float(row["sinc_cutoff"][i])
        kind = "sinc" if cutoff else "plateau" if row["blur_plateau"][i] else "generalized"
        sigma, angle = row["blur_sigma"][i].tolist(), float(row["blur_angle"][i])
        kernel = slow_kernel(kind, size, sigma, angle, float(row["blur_shape"][i]), cutoff)
        planes = [ndimage.correlate(plane, kernel, mode="mirror") for plane in x.numpy()]
        smooth = torch.from_numpy(np.stack(planes)).float()
        amount = float(row["sharpen"][i])
        return x + amount * (x - smooth) if amount > 0 else smooth

    def resized(x: Tensor, i: int) -> Tensor:
        factor = float(row["resize"][i]) if i < 2 else 1 / scale
        mode = degrade.MODES[row["resize_mode"][i]]
        return slow_resize(x, (int(H * factor), int(W * factor)), mode)

    def compressed(x: Tensor, i: int) -> Tensor:
        pixels = pillow(x, int(row["jpeg_quality"][i]))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    H, W, scale, x = *hr.shape[1:], int(row["scale"]), hr
    for code in row["order"].tolist():
        kind, _, number = degrade.OPERATIONS[code].partition(" ")
        work = {"blur": blurred, "resize": resized, "jpeg": compressed}.get(kind)
        x = work(x, int(number) - 1) if work else x
    return x.clamp(0, 1)


@pytest.mark.parametrize("recipe", degrade.RECIPES)
def test_degrade_equals_its_slow_version_where_there_is_no_noise(recipe):
    theta = without_noise(degrade.sample_degradation(16, recipe, generator=common.generator(10)))
    hr = drawn_batch(16, 96, 64)
    lr = degrade.degrade(hr, theta)
    slow = torch.stack([slow_degrade(image, theta[[i]]) for i, image in enumerate(hr)])
    difference = ((lr - slow).abs() * 255).amax((1, 2, 3))
    # A rounding that falls differently in front of a JPEG moves a block by a few levels.
    assert (difference < 0.6).float().mean() > 0.6 and difference.max() < 12


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SIDES, SIDES, st.integers(0, 2**31))
def test_each_image_is_degraded_alone_and_replays_from_json(height, width, seed):
    """Of all recipes in one batch: neither neighbours, order nor memory layout matter."""
    theta = of_all_recipes(1, seed)
    hr = drawn_batch(len(theta), height, width)
    lr = degrade.degrade(hr, theta)
    assert lr.shape == (len(theta), 3, height // 4, width // 4)
    assert lr.isfinite().all() and lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), atol=1e-4, rtol=0)
    read = Degradation.from_json(theta.to_json())
    assert read.to_json() == theta.to_json()
    before, order = hr.clone(), [4, 0, 5]
    assert torch.equal(degrade.degrade(hr[order], read[order]), lr[order])
    last = hr.contiguous(memory_format=torch.channels_last)
    assert torch.equal(degrade.degrade(last, theta), lr) and torch.equal(hr, before)


def test_a_replay_does_not_depend_on_the_number_of_threads():
    theta, hr = of_all_recipes(1, seed=15), drawn_batch(len(degrade.RECIPES), 128, 192)
    lr = degrade.degrade(hr, theta)
    torch.set_num_threads(2)
    try:
        assert torch.equal(degrade.degrade(hr, theta), lr)
    finally:
        torch.set_num_threads(1)


def test_images_on_one_canvas_are_degraded_as_each_alone(monkeypatch):
    """All recipes at once; where they differ, a rounding in front of a JPEG fell the other way."""
    theta = without_noise(of_all_recipes(6, seed=11))
    hr = drawn_batch(len(theta), 64, 96)
    alone = degrade.degrade(hr, theta)
    for room in (2**13, 2**30):  # in groups of a few images, and all together
        monkeypatch.setattr(degrade, "CPU_PIXELS", room)
        together = degrade.degrade(hr, theta, common.generator(0))
        difference = ((alone - together).abs() * 255).round()
        assert (difference > 0).float().mean() < 0.01 and difference.max() < 16
        assert (difference.amax((1, 2, 3)) > 0).float().mean() < 0.35


def test_a_generator_draws_new_noise_for_each_image(monkeypatch):
    theta = only(8, "resize 1", "gaussian 1", "poisson 2", scale=4)
    theta.resize[:, 0] = torch.linspace(0.3, 1.4, 8)
    theta.gaussian_std[:], theta.poisson_scale[:], theta.seed[:] = 0.05, 0.5, 0
    theta.order[::2, 2] = 0
    hr = torch.full((8, 3, 64, 64), 0.5)
    for room in (2**12, 2**30):
        monkeypatch.setattr(degrade, "CPU_PIXELS", room)
        lr = [degrade.degrade(hr, theta, common.generator(seed)) for seed in (1, 1, 2)]
        assert torch.equal(lr[0], lr[1]) and not torch.equal(lr[0], lr[2])
        assert (lr[0].std((1, 2, 3)) > 0.005).all()
        correlation = np.corrcoef(lr[0].flatten(1))
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 0.2


def test_identity_parameters_change_nothing():
    theta = only(4, "blur 1", "resize 1", "gaussian 1", "resize 2", "blur 3")
    theta.resize_mode[:] = torch.arange(4)[:, None]
    hr = drawn_batch(4, 45, 32)
    assert torch.equal(degrade.degrade(hr, theta), hr)


def test_the_bicubic_recipe_is_pillows_bicubic():
    hr = drawn_image(64, 48)
    lr = degrade.degrade(hr[None], degrade.sample_degradation(1, "bicubic"))[0]
    expected = Image.fromarray(bytes_of(hr)).resize((12, 16), Image.Resampling.BICUBIC)
    assert np.abs(bytes_of(lr).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_wrong_sizes_are_refused():
    theta = degrade.sample_degradation(2, generator=common.generator(0))
    with pytest.raises(ValueError, match="rows of parameters"):
        degrade.degrade(drawn_batch(3, 32, 32), theta)
    with pytest.raises(ValueError, match="can't be degraded by scale 4"):
        degrade.degrade(drawn_batch(2, 32, 30), theta)
    theta.order[1] = 0
    with pytest.raises(ValueError, match="resize 3"):
        degrade.degrade(drawn_batch(2, 32, 32), theta)


@pytest.mark.parametrize("wrong", [255.0, -0.1, math.nan])
@pytest.mark.parametrize("seed", [None, 0])
def test_hr_outside_0_to_1_is_refused(wrong, seed):
    hr, theta = drawn_batch(2, 32, 32), degrade.sample_degradation(2, "bicubic")
    hr[1, 2, 31, 31] = wrong
    with pytest.raises(ValueError, match="divide 8-bit values by 255"):
        degrade.degrade(hr, theta, None if seed is None else common.generator(seed))


def test_no_operation_leaves_the_gpu_and_launches_do_not_grow_with_the_batch():
    launches = {}
    for batch in (8, 48):
        theta = of_all_recipes(batch, seed=0)
        with fake_cuda() as launched:
            hr = torch.zeros(len(theta), 3, 256, 256, device="cuda:0")
            lr = degrade.degrade(hr, theta, torch.Generator())
        assert lr.device == hr.device and lr.shape == (len(theta), 3, 64, 64)
        launches[batch] = launched.total()
    assert launches[48] <= 1.2 * launches[8] and launches[48] <= 700


def test_theta_jpeg_and_blur_of_gpu_images_stay_on_the_gpu():
    theta, quality = degrade.sample_degradation(3), torch.tensor([1, 50, 100])
    with fake_cuda():
        x = torch.zeros(3, 3, 20, 30, device="cuda:0")
        for given in (50, quality, quality.to("cuda:0")):
            assert degrade.jpeg(x, given).device == x.device
        assert degrade.blur(x, torch.ones(3, 25, 25, device="cuda:0")).device == x.device
        assert theta.to("cuda:0").physical().device == x.device
        with pytest.raises(Exception, match="cuda"):  # the stand-in refuses to mix devices
            x + torch.zeros(30)


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
    fresh = [degrade.degrade(hr, theta, common.generator(s)) for s in (1, 1, 2)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    clean = [
        degrade.degrade(x, without_noise(theta), common.generator(0)).cpu() for x in (hr, hr.cpu())
    ]
    assert ((clean[0] - clean[1]).abs() > 1e-3).float().mean() < 0.01


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


# ---- what theta means -------------------------------------------------------------------------


def test_physical_quantities_follow_blur_noise_and_compression():
    steps = 9
    theta = only(steps, "blur 1", "resize 2", "gaussian 2", "blur 3", "jpeg 2", scale=4)
    theta.blur_sigma[:, 0] = torch.linspace(0.2, 3, steps)[:, None]
    theta.blur_size[:] = degrade.KERNEL_SIZE
    theta.resize[:, 1] = 0.25
    theta.sharpen[:, 2] = torch.linspace(0.1, 1.5, steps)
    theta.gaussian_std[:, 1] = torch.linspace(0, 25 / 255, steps)
    theta.jpeg_quality[:, 1] = torch.linspace(95, 30, steps).long()
    physical = theta.physical()
    assert physical.shape == (steps, 5) and (physical[:, 1] == 0).all()
    assert (physical[:, [0, 2, 3, 4]].diff(dim=0) > 0).all()
    noise, quality = degrade.noise_and_quality(physical)
    torch.testing.assert_close(noise, theta.gaussian_std[:, 1], atol=1e-6, rtol=1e-4)
    assert quality.tolist() == theta.jpeg_quality[:, 1].tolist()
    # The same parameters of operations that are not performed mean nothing.
    theta.order[:] = only(steps, scale=4).order
    assert (theta.physical() == degrade.bicubic(1, 4).physical()).all()
    drawn = of_all_recipes(100, seed=14).physical()
    assert drawn[:, :3].isfinite().all()
    assert drawn.nan_to_num().min() > -0.5 and drawn.nan_to_num().max() < 2


@pytest.mark.parametrize(
    ("operations", "noise_is_nan", "jpeg_is_nan"),
    [
        (("gaussian 1", "jpeg 1", "resize 3"), True, True),
        (("resize 3", "gaussian 1", "jpeg 1"), False, False),
        (("jpeg 1", "resize 3", "gaussian 1"), False, True),
        (("gaussian 1", "resize 3", "poisson 2", "jpeg 1"), False, False),
        (("resize 3",), False, False),
    ],
)
def test_noise_and_jpeg_that_a_resize_hides_are_not_named(operations, noise_is_nan, jpeg_is_nan):
    theta = only(1, *operations, scale=4)
    theta.gaussian_std[:], theta.poisson_scale[:], theta.jpeg_quality[:] = 0.05, 1.0, 50
    assert theta.physical()[0, 3:].isnan().tolist() == [noise_is_nan, jpeg_is_nan]


def test_physical_blur_is_measured_in_lr_pixels_wherever_it_happens():
    """Blurring by 4 px before a reduction by 4 or by 1 px behind it."""
    before, after = only(1, "blur 1", "resize 2", scale=4), only(1, "resize 2", "blur 1", scale=4)
    before.resize[:] = after.resize[:] = 0.25
    before.blur_sigma[:], after.blur_sigma[:] = 4.0, 1.0
    before.blur_size[:] = after.blur_size[:] = degrade.KERNEL_SIZE
    width = [theta.physical()[0, 0].item() for theta in (before, after)]
    assert width[0] == pytest.approx(width[1], abs=0.01)
    assert width[1] == pytest.approx(1 + math.log(1.01) / 4.6)
    after.blur_size[:] = 3  # a small kernel cuts the Gaussian off
    assert after.physical()[0, 0] < width[1]


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


@pytest.fixture
def launch(monkeypatch):
    """Runs the command in this process."""

    def run(*argv: object) -> None:
        monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, argv)])
        common.launch(degrade.main, degrade.Config, {}, degrade.__doc__)

    return run


@pytest.fixture
def refusal(launch, capsys):
    """Runs a command that must fail with exit code 2; gives its one sentence."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            launch(*argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line[:6] == "error:"]
        assert stopped.value.code == 2 and len(lines) == 1
        return lines[0]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def table(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def names(out: Path) -> set[str]:
    """The names of the LR files, which are those of the table and of the HR files."""
    found = {file.stem for file in (out / "lr").iterdir()}
    assert sorted(found) == sorted(Path(row["lr"]).stem for row in table(out))
    assert found == {file.stem for file in (out / "hr").iterdir()}
    return found


def assert_replays(out: Path, row: dict) -> None:
    """The LR file is what theta of the table makes of the HR file."""
    hr, lr = (common.load_image(out / row[side]) for side in ("hr", "lr"))
    theta = Degradation.from_json([json.dumps(row["theta"])])
    assert torch.equal(degrade.degrade(hr[None], theta)[0], lr)


def test_the_command_writes_pairs_that_replay_and_a_second_run_changes_nothing(
    photos, tmp_path, launch
):
    out = tmp_path / "out"
    argv = ["--hr", photos, "--out", out, "--device", "cpu"]
    command = [sys.executable, REPO / "degrade.py", *argv]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "2 pairs" in run.stdout and "2 images skipped" in run.stdout
    assert "c.jpg" in run.stdout + run.stderr and "tiny.png" in run.stdout + run.stderr
    assert [Path(row["source"]).name for row in table(out)] == ["a.png", "b.png"]
    files = {row[side] for row in table(out) for side in ("hr", "lr")}
    assert set(contents(out)) == files | {"pairs.jsonl", "preview.png"}
    for row, shape in zip(table(out), [(3, 64, 48), (3, 40, 44)], strict=True):
        assert common.load_image(out / row["hr"]).shape == shape
        assert_replays(out, row)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    launch(*argv)
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == times


def test_an_image_is_the_same_in_whatever_run_makes_it(photos, tmp_path, launch):
    one, two = tmp_path / "one", tmp_path / "two"
    launch("--hr", photos, "--out", one)
    launch("--hr", photos, "--out", two, "--seed", 3)
    assert contents(one) != contents(two)
    # Other parameters into the same folder: the table must describe the images that lie there.
    launch("--hr", photos, "--out", one, "--seed", 3)
    assert contents(one) == contents(two)
    next((one / "lr").iterdir()).unlink()
    launch("--hr", photos, "--out", one, "--seed", 3)
    assert contents(one) == contents(two)


def test_several_pairs_of_each_photo(photos, tmp_path, launch, capsys):
    out = tmp_path / "out"
    launch("--hr", photos, "--out", out, "--recipe", "bsrgan", "--per-image", 3)
    rows = table(out)
    assert len(rows) == 6 and "6 pairs" in capsys.readouterr().out
    assert len({row["lr"] for row in rows}) == len({row["theta"]["seed"] for row in rows}) == 6
    found = contents(out)
    for i, row in enumerate(rows):
        assert found[row["hr"]] == found[rows[i // 3 * 3]["hr"]]
        assert_replays(out, row)
    Image.open(out / "preview.png").load()


def test_the_folder_holds_what_the_last_command_asked_for(tmp_path, launch, capsys):
    """Photos that are added or taken away, another recipe, other numbers of pairs."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for i, name in enumerate(("b", "c", "d/b")):
        common.save_image(photos / f"{name}.png", drawn_image(40, 40, i))
    launch("--hr", photos, "--out", out, "--recipe", "bsrgan")
    assert names(out) == {"b", "c", "d_b"}
    before = contents(out / "lr")
    common.save_image(photos / "a.png", drawn_image(40, 40, 3))
    launch("--hr", photos, "--out", out, "--recipe", "bsrgan")
    assert names(out) == {"a", "b", "c", "d_b"}
    assert contents(out / "lr").items() > before.items()  # a place in the list changes nothing
    launch("--hr", photos, "--out", out, "--recipe", "wide", "--per-image", 2)
    eight = {f"{name}_{k}" for name in ("a", "b", "c", "d_b") for k in (0, 1)}
    assert names(out) == eight
    (photos / "c.png").unlink()
    capsys.readouterr()
    launch("--hr", photos, "--out", out, "--recipe", "wide")
    assert names(out) == {"a", "b", "d_b"} and "8 pairs of" in capsys.readouterr().out
    removed = {f"{side}/{name}.png" for side in ("hr", "lr") for name in eight}
    assert set(contents(out / "removed")) >= removed  # they are set aside, not deleted
    (photos / "a.png").write_text("not an image any more")
    launch("--hr", photos, "--out", out, "--recipe", "wide")
    assert names(out) == {"b", "d_b"}


def test_results_inside_the_folder_of_photos_are_not_read_as_photos(photos, launch, refusal):
    out = photos / "pairs"
    for _ in range(2):
        launch("--hr", photos, "--out", out)
        assert names(out) == {"a", "b"}
    assert "give another --out" in refusal("--hr", out / "hr", "--out", out)


def test_files_of_others_in_the_folder_are_named_and_kept(photos, tmp_path, refusal):
    mine, others = tmp_path / "mine", tmp_path / "others"
    common.save_image(mine / "hr" / "holiday.png", drawn_image(40, 40))
    (others / "hr").mkdir(parents=True)
    (others / "pairs.jsonl").write_text('{"hr": "hr/a.png", "lr": "lr/a.png", "seed": 1}\n')
    for out, word in ((mine, "holiday.png"), (others, "another command")):
        before = contents(out)
        message = refusal("--hr", photos, "--out", out)
        assert word in message and "give another --out" in message and contents(out) == before


def test_a_killed_run_goes_on_where_it_was(tmp_path, launch):
    for i in range(40):
        common.save_image(tmp_path / "photos" / f"{i:02d}.png", drawn_image(128, 128, i))
    argv = ["--hr", tmp_path / "photos", "--device", "cpu"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch(*argv, "--out", whole)
    command = [sys.executable, REPO / "degrade.py", *argv, "--out", broken]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    part = broken / "pairs.0.jsonl"  # of this process, until the run has finished
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    finished = [json.loads(line)["lr"] for line in part.read_text().splitlines() if line]
    assert 0 < len(finished) < 40
    times = {name: (broken / name).stat().st_mtime_ns for name in finished}
    launch(*argv, "--out", broken)
    assert {name: (broken / name).stat().st_mtime_ns for name in finished} == times
    assert contents(broken) == contents(whole)


def test_a_full_disk_is_one_sentence(photos, tmp_path, monkeypatch, refusal):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "save_image", full)
    assert "No space left" in refusal("--hr", photos, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--recipe", "wrong"], "wrong"),
        (["--per-image", "0"], "--per-image"),
        (["--scale", "0"], "--scale"),
        (["--device", "abacus"], "abacus"),
        (["--hr", "no/such/folder"], "no/such/folder"),
        (["--hr", "empty"], "no images"),
        (["--hr", "photos/c.jpg", "photos/tiny.png"], "none of the HR images"),
    ],
)
def test_a_wrong_flag_or_photo_is_one_sentence_and_writes_nothing(
    argv, word, photos, tmp_path, monkeypatch, refusal
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    argv = argv if "--hr" in argv else ["--hr", photos, *argv]
    assert word in refusal(*argv, "--out", "out") and not (tmp_path / "out").exists()
