"""degrade.py: the drawn distributions, each operation against a reference, and D itself."""

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


def only(batch: int, *operations: str, scale: int = 1) -> Degradation:
    """Parameters of just these operations (and the resize to LR), to be filled in."""
    theta = degrade.bicubic(batch, scale)
    codes = [degrade.OPERATIONS.index(name) for name in (*operations, "resize 3")]
    theta.order[:, : len(codes)] = torch.tensor(codes)
    theta.seed = torch.arange(batch)
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


def assert_shares(values: Tensor, choices: tuple, probabilities: tuple) -> None:
    """Values are of the choices only and pass a chi-square test of their probabilities."""
    counts = np.array([(values == choice).sum().item() for choice in choices])
    assert counts.sum() == len(values)
    expected = np.array(probabilities) * len(values) / sum(probabilities)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("stage", [0, 1])
def test_blur_is_drawn_as_published(theta, stage):
    assert_probability(performed(theta, f"blur {stage + 1}"), (1.0, 0.8)[stage])
    sizes = theta.blur_size[:, stage]
    assert_shares(sizes, KERNEL_SIZES, (1,) * len(KERNEL_SIZES))
    cutoff = theta.sinc_cutoff[:, stage]
    assert_probability(cutoff > 0, 0.1)
    assert_uniform(cutoff[(cutoff > 0) & (sizes < 13)], math.pi / 3, math.pi)
    assert_uniform(cutoff[(cutoff > 0) & (sizes >= 13)], math.pi / 5, math.pi)

    width, height = theta.blur_sigma[:, stage].unbind(1)
    high = (3.0, 1.5)[stage]
    assert_uniform(width, 0.2, high)
    isotropic = width == height
    assert_uniform(height[~isotropic], 0.2, high)
    assert_uniform(theta.blur_angle[~isotropic, stage], -math.pi, math.pi)
    assert (theta.blur_angle[isotropic, stage] == 0).all()
    assert (theta.sharpen == 0).all()


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
    factor = theta.resize[:, stage] * (1, 4)[stage]
    assert_shares(torch.sign(factor - 1), (1, -1, 0), probabilities)
    assert_uniform(factor[factor > 1], 1, high)
    assert_uniform(factor[factor < 1], low, 1)
    kept = factor == 1  # of the HR size: nothing to do; of the LR size: still a resize
    assert torch.equal(
        performed(theta, f"resize {stage + 1}"), ~kept if stage == 0 else kept | True
    )


@pytest.mark.parametrize(("stage", "std", "scale"), [(0, 30, 3), (1, 25, 2.5)])
def test_noise_is_drawn_as_published(theta, stage, std, scale):
    gaussian, poisson = theta.gaussian_std[:, stage] * 255, theta.poisson_scale[:, stage]
    assert ((gaussian > 0) ^ (poisson > 0)).all()
    assert_probability(gaussian > 0, 0.5)
    assert torch.equal(performed(theta, f"gaussian {stage + 1}"), gaussian > 0)
    assert torch.equal(performed(theta, f"poisson {stage + 1}"), poisson > 0)
    assert_uniform(gaussian[gaussian > 0], 1, std)
    assert_uniform(poisson[poisson > 0], 0.05, scale)
    assert_probability(theta.gray_noise[:, stage], 0.4)


def test_jpeg_and_the_final_filter_are_drawn_as_published(theta):
    for stage in (0, 1):
        assert_shares(theta.jpeg_quality[:, stage], tuple(range(30, 96)), (1,) * 66)
    for step in (0, 1, 2):
        assert_shares(theta.resize_mode[:, step], (0, 1, 2), (1, 1, 1))
    final = performed(theta, "blur 3")
    assert_probability(final, 0.8)
    assert_shares(theta.blur_size[:, 2], KERNEL_SIZES, (1,) * len(KERNEL_SIZES))
    assert_uniform(theta.sinc_cutoff[final, 2], math.pi / 3, math.pi)
    assert_probability(jpeg_last(theta), 0.5)
    assert (theta.scale == 4).all()
    assert len(theta.seed.unique()) == len(theta)


def jpeg_last(theta: Degradation) -> Tensor:
    return place(theta, "jpeg 2") > place(theta, "resize 3")


def test_the_operations_of_real_esrgan_come_in_their_order(theta):
    rounds = [
        ["blur 1", "resize 1", "gaussian 1", "poisson 1", "jpeg 1"],
        ["blur 2", "resize 2", "gaussian 2", "poisson 2"],
    ]
    names = [[degrade.OPERATIONS[i] for i in row if i] for row in theta[:500].order.tolist()]
    orders = set()
    for row in names:
        expected = [name for name in rounds[0] + rounds[1] if name in row]
        assert row[: len(expected)] == expected
        orders.add(tuple(row[len(expected) :]))
    assert orders == {
        ("jpeg 2", "resize 3", "blur 3"),
        ("jpeg 2", "resize 3"),
        ("resize 3", "blur 3", "jpeg 2"),
        ("resize 3", "jpeg 2"),
    }


# ---- BSRGAN


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
    order = places.argsort(1)
    code = (order * torch.tensor([6**i for i in range(6)])).sum(1)
    _, counts = code.unique(return_counts=True)
    assert len(counts) == 360  # 6! / 2
    assert stats.chisquare(counts).pvalue > 1e-4
    shifted = performed(bsrgan, "blur 3")
    assert_probability(shifted, 0.25)
    assert (place(bsrgan, "resize 2") == place(bsrgan, "blur 3") + 1)[shifted].all()


@pytest.mark.parametrize("halved", [False, True])
def test_bsrgan_parameters_are_drawn_as_published(bsrgan, halved):
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
        assert_shares(rows.blur_size[:, i], tuple(range(7, 26, 2)), (1,) * 10)
    factor = (0.5 if halved else 1.0) / rows.resize[:, 1]
    shifted = performed(rows, "blur 3")
    torch.testing.assert_close(factor[shifted], torch.full_like(factor[shifted], float(s)))
    assert_uniform(factor[~shifted], 1, 2 * s)
    assert (rows.resize_mode[shifted, 1] == degrade.MODES.index("bilinear")).all()
    assert_uniform(rows.blur_sigma[shifted, 2, 0], 0.1, 0.6 * s)
    assert (rows.blur_size[shifted, 2] == 25).all()
    for i, chosen in ((1, ~shifted), (2, shifted | True)):
        assert_shares(rows.resize_mode[chosen, i], OPENCV, (1, 1, 1))


def test_bsrgan_noise_and_jpeg_are_drawn_as_published(bsrgan):
    mixed = (bsrgan.colour_mix != torch.eye(3)).flatten(1).any(1)
    kind = bsrgan.gray_noise[:, 0] + 2 * mixed
    assert_shares(kind, (0, 1, 2), (0.4, 0.4, 0.2))
    level = (bsrgan.gaussian_std[:, 0] * 255).round()
    assert_shares(level[~mixed], tuple(range(2, 26)), (1,) * 24)
    assert (level[mixed] == 25).all() and performed(bsrgan, "gaussian 1").all()
    for i in (0, 1):
        assert_shares(bsrgan.jpeg_quality[:, i], tuple(range(30, 96)), (1,) * 66)


def test_bsrgan_correlates_channels_as_numpy_would(bsrgan):
    """The covariances mix @ mix^T against those that NumPy's sampler takes from its SVD."""
    rng = np.random.default_rng(0)  # noqa: NPY002
    expected = []
    for _ in range(4000):
        U = linalg.orth(rng.random((3, 3)))
        covariance = np.abs(U.T @ np.diag(rng.random(3)) @ U)
        _, value, vector = np.linalg.svd(covariance)
        expected.append(vector.T @ np.diag(value) @ vector)
    mixed = (bsrgan.colour_mix != torch.eye(3)).flatten(1).any(1)
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
    kernel = slow_kernel("iso", 25, (sigma, sigma), 0.0, 1.0, 0.0)
    shifted = ndimage.shift(kernel, -(s - 1) / 2, order=1, mode="constant")
    shifted /= shifted.sum()
    planes = [ndimage.convolve(plane, shifted, mode="mirror")[::s, ::s] for plane in hr.numpy()]
    expected = torch.from_numpy(np.stack(planes)).clamp(0, 1)
    lr = degrade.degrade(hr[None], theta)[0]
    inner = (slice(None), slice(4, -4), slice(4, -4))  # the border is mirrored elsewhere
    assert (lr - expected)[inner].abs().max() < 1.5 / 255


# ---- any recipe


def test_what_one_image_draws_is_independent(theta):
    names = (
        "resize",
        "resize_mode",
        "sinc_cutoff",
        "gaussian_std",
        "gray_noise",
        "jpeg_quality",
        "blur_size",
    )
    columns = [c for name in names for c in getattr(theta, name).double().unbind(1)]
    columns += [theta.blur_sigma[:, 0, 0], theta.blur_sigma[:, 1, 0], jpeg_last(theta)]
    correlation = np.corrcoef(torch.stack([c.double() for c in columns]))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(len(theta))


def test_theta_depends_on_the_generator_alone():
    draws = [degrade.sample_degradation(3, generator=common.generator(5, i)) for i in (0, 0, 1)]
    assert draws[0].to_json() == draws[1].to_json() != draws[2].to_json()


@pytest.mark.parametrize("recipe", degrade.RECIPES)
def test_every_recipe_degrades_and_replays_from_json(recipe):
    theta = degrade.sample_degradation(4, recipe, generator=common.generator(1))
    hr = drawn_batch(4, 64, 48)
    lr = degrade.degrade(hr, theta)
    assert lr.shape == (4, 3, 16, 12) and lr.isfinite().all()
    read = Degradation.from_json(theta.to_json())
    assert read.to_json() == theta.to_json()
    for i in range(4):
        assert torch.equal(degrade.degrade(hr[i : i + 1], read[[i]]), lr[i : i + 1])


def test_the_bicubic_recipe_is_pillows_bicubic():
    hr = drawn_image(64, 48)
    lr = degrade.degrade(hr[None], degrade.sample_degradation(1, "bicubic"))[0]
    image = Image.fromarray(bytes_of(hr))
    expected = np.asarray(image.resize((12, 16), Image.Resampling.BICUBIC))
    assert np.abs(bytes_of(lr).astype(int) - expected.astype(int)).max() <= 1


def test_wide_leaves_out_each_of_its_factors_at_times():
    theta = degrade.sample_degradation(20_000, "wide", generator=common.generator(4))
    shares = {"blur 1": 0.8, "gaussian 2": 0.5, "blur 3": 0.5, "jpeg 2": 0.5}
    there = {name: performed(theta, name) for name in shares}
    for name, share in shares.items():
        assert_probability(there[name], share)
    assert_probability(torch.stack([*there.values()]).any(0), 1 - 0.2 * 0.5**3)
    assert (theta.blur_size[:, 0] == degrade.KERNEL_SIZE).all()
    assert_shares(theta.resize_mode[:, 1], (0, 1, 2, 3), (1, 1, 1, 1))


def test_the_camera_recipe_is_the_one_that_sharpens():
    theta = degrade.sample_degradation(2000, "camera", generator=common.generator(3))
    assert_probability(theta.sharpen[:, 2] > 0, 0.5)
    assert torch.equal(performed(theta, "blur 3"), theta.sharpen[:, 2] > 0)
    assert not performed(theta, "jpeg 1").any() and not performed(theta, "gaussian 1").any()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(common.UserError, match="realesrgan"):
        degrade.sample_degradation(1, "no such recipe")


def test_rows_of_theta_are_indexed_and_joined(theta):
    rows = theta[[5, 2]]
    assert len(rows) == 2 and rows.seed.tolist() == theta.seed[[5, 2]].tolist()
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
        expected = np.zeros((25, 25))
        inside = slice(12 - size // 2, 13 + size // 2)
        expected[inside, inside] = slow_kernel(kind, size, sigma, angle, exponent, cutoff)
        theta = degrade.bicubic(1, 4)
        theta.blur_sigma[:], theta.blur_angle[:] = torch.tensor(sigma), angle
        theta.blur_shape[:], theta.blur_plateau[:] = exponent, kind.startswith("plateau")
        theta.blur_size[:], theta.sinc_cutoff[:] = size, cutoff if kind == "sinc" else 0.0
        for kernel in degrade.blur_kernels(theta)[0]:
            np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
        theta.sharpen[:] = 0.7
        identity = np.zeros((25, 25))
        identity[12, 12] = 1
        sharp = identity + 0.7 * (identity - expected)
        np.testing.assert_allclose(degrade.blur_kernels(theta)[0, 0], sharp, rtol=1e-5, atol=1e-6)


def test_every_drawn_kernel_sums_to_one():
    for recipe in degrade.RECIPES:
        theta = degrade.sample_degradation(1000, recipe, generator=common.generator(2))
        total = degrade.blur_kernels(theta).sum((2, 3))
        torch.testing.assert_close(total, torch.ones(1000, 3))


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
    """Resize an image (3, H, W) with torch, where neither Pillow nor OpenCV is the model."""
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
    modes = [i % len(degrade.MODES) for i in range(len(sizes))]
    gen = common.generator(2)
    images = [torch.rand(3, *size, generator=gen) for size in sizes]
    turn = [
        degrade.Step(b, 0, *before, mode, False, after)
        for b, (before, mode, after) in enumerate(zip(sizes, modes, new, strict=True))
    ]
    ((at, weight, size),) = degrade.resize_weights([turn], torch.device("cpu"))
    results = degrade.resize(on_a_canvas(images, beyond=9.0)[0], at, weight, size)
    for image, result, (h, w), mode in zip(images, results, new, modes, strict=True):
        expected = slow_resize(image, (h, w), degrade.MODES[mode])
        torch.testing.assert_close(result[:, :h, :w], expected, atol=2e-5, rtol=0)


# ---- noise ------------------------------------------------------------------------------------


EYE = torch.eye(3)


@pytest.mark.parametrize("gray", [[True, True], [False, False], [False, True]])
def test_gaussian_noise_has_its_std_and_is_shared_by_channels_only_if_gray(gray):
    x, std = torch.full((2, 3, 200, 150), 0.5), torch.tensor([0.02, 0.08])
    eps = degrade.gaussian(x, std, gray, EYE.expand(2, 3, 3), common.generator(9)) - x
    for b in range(2):
        assert eps[b].std().item() == pytest.approx(std[b].item(), rel=0.02)
        correlation = np.corrcoef(eps[b].flatten(1))[0, 1]
        assert correlation > 0.999 if gray[b] else abs(correlation) < 0.03
    assert abs(np.corrcoef(*(e.flatten() for e in eps))[0, 1]) < 0.03


def test_gaussian_noise_has_the_covariance_of_its_mix():
    mix = torch.tensor([[[1.0, 0.0, 0.3], [0.5, 0.7, 0.0], [0.1, 0.2, 0.4]]])
    image = torch.full((1, 3, 300, 300), 0.5)
    noisy = degrade.gaussian(image, torch.tensor([0.05]), [False], mix, common.generator(9))
    covariance = np.cov((noisy - image)[0].flatten(1)) / 0.05**2
    np.testing.assert_allclose(covariance, mix[0] @ mix[0].T, atol=0.03)


def shot(images: list[Tensor], scale: float, gray: tuple[bool, ...] = (False,)) -> list[Tensor]:
    """The images with Poisson noise, drawn together."""
    x, size = on_a_canvas(images, beyond=0.123)
    gray = [*gray] * (len(images) // len(gray))
    noisy = degrade.poisson(x, torch.full((len(x),), scale), gray, size, common.generator(9))
    return [y[:, :h, :w] for y, (h, w) in zip(noisy, size.tolist(), strict=True)]


def test_poisson_noise_has_the_variance_of_its_photons():
    values = torch.arange(200) / 255  # the next power of two is 256: so many photons make white
    image = values.expand(3, 2000, 200).contiguous()
    noise = shot([image], 0.9)[0] - image
    middle = slice(64, 192)  # where nothing is clipped
    expected = 0.9**2 * values / 256
    measured = noise.square().mean((0, 1))
    torch.testing.assert_close(measured[middle], expected[middle], rtol=0.1, atol=0)
    assert noise[..., middle].mean().abs() < 1e-3


def test_poisson_noise_passes_a_chi_square_test():
    image = torch.full((3, 400, 400), 7 / 255)
    image[:, 0, :64] = torch.arange(64) / 255  # 64 levels, so 64 photons per unit
    noisy = shot([image], 1.0)[0][:, 1:]
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
    noisy = shot([flat, drawn_image(80, 80)], 0.2)
    expected = 0.2 * (flat.mean() / 2).sqrt()  # two levels, two photons per unit
    assert (noisy[0] - flat).std().item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("gray", [(True, True), (False, False), (False, True)])
def test_poisson_noise_is_the_same_in_all_channels_only_if_gray(gray):
    x = 0.4 + 0.2 * drawn_image(64, 64)
    for noisy, is_gray in zip(shot([x, x], 0.3, gray), gray, strict=True):
        correlation = np.corrcoef((noisy - x).flatten(1))
        assert correlation.min() > 0.999 if is_gray else np.abs(correlation[0, 1:]).max() < 0.06


def test_noise_differs_between_the_rounds():
    x, theta = torch.full((1, 3, 64, 64), 0.5), only(1, "gaussian 1", "gaussian 2")
    theta.gaussian_std[:] = 0.05
    noise = degrade.degrade(x, theta) - x  # the same noise twice would have a std of .1
    assert noise.std().item() == pytest.approx(0.05 * math.sqrt(2), rel=0.03)


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


def test_jpeg_passes_gradients_straight_through():
    x = drawn_batch(1, 20, 24).requires_grad_()
    y = degrade.jpeg(x, 40)
    assert torch.equal(y.detach(), degrade.jpeg(x.detach(), 40))
    weight = torch.rand_like(x)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("quality", [0, 101])
def test_jpeg_refuses_an_impossible_quality(quality):
    with pytest.raises(ValueError, match=str(quality)):
        degrade.jpeg(torch.zeros(2, 3, 8, 8), torch.tensor([50, quality]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 513),
    width=st.integers(1, 513),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(["4:2:0", "4:4:4"]),
    noisy=st.booleans(),
)
def test_jpeg_equals_pillow_at_any_size_up_to_513(height, width, quality, subsampling, noisy):
    x = drawn_image(height, width)
    if noisy:
        x = torch.rand(3, height, width, generator=common.generator(height, width))
    result = bytes_of(degrade.jpeg(x[None], quality, subsampling)[0])
    np.testing.assert_array_equal(result, pillow(x, quality, subsampling))


@pytest.mark.slow
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_jpeg_equals_pillow_on_real_photos_at_every_quality(shared, subsampling):
    for index, path in enumerate(common.list_images([shared / "photos" / "hr"], "")[:100]):
        x = common.load_image(path)[:, : 300 + index, : 400 - index]
        result = bytes_of(degrade.jpeg(x[None], index + 1, subsampling)[0])
        np.testing.assert_array_equal(result, pillow(x, index + 1, subsampling))


def test_jpeg_refuses_an_unknown_subsampling():
    with pytest.raises(ValueError, match="4:1:1"):
        degrade.jpeg(torch.zeros(1, 3, 8, 8), 50, "4:1:1")


# ---- D ----------------------------------------------------------------------------------------

SIDES = st.integers(1, 24).map(lambda n: 4 * n)


def slow_degrade(hr: Tensor, theta: Degradation) -> Tensor:
    """D without noise for one image (3, H, W), from SciPy, interpolate and Pillow, as published."""
    row = {key: value[0] for key, value in vars(theta).items()}

    def blurred(x: Tensor, i: int) -> Tensor:
        size, cutoff = int(row["blur_size"][i]), float(row["sinc_cutoff"][i])
        kind = "plateau" if row["blur_plateau"][i] else "generalized"
        sigma, angle = row["blur_sigma"][i].tolist(), float(row["blur_angle"][i])
        exponent = float(row["blur_shape"][i])
        kernel = slow_kernel("sinc" if cutoff else kind, size, sigma, angle, exponent, cutoff)
        planes = [ndimage.correlate(plane, kernel, mode="mirror") for plane in x.numpy()]
        smooth = torch.from_numpy(np.stack(planes)).float()
        amount = float(row["sharpen"][i])
        return x + amount * (x - smooth) if amount > 0 else smooth

    def resized(x: Tensor, i: int) -> Tensor:
        factor = float(row["resize"][i]) if i < 2 else 1 / scale
        mode = degrade.MODES[row["resize_mode"][i]]
        return slow_resize(x, (int(H * factor), int(W * factor)), mode)

    def compressed(x: Tensor, i: int) -> Tensor:
        pixels = pillow(x, int(row["jpeg_quality"][i]), "4:2:0")
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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SIDES, SIDES, st.integers(0, 2**31), st.sampled_from(degrade.RECIPES))
def test_lr_has_its_size_and_range_at_any_size_and_seed(height, width, seed, recipe):
    theta = degrade.sample_degradation(3, recipe, generator=common.generator(seed))
    lr = degrade.degrade(drawn_batch(3, height, width), theta)
    assert lr.shape == (3, 3, height // 4, width // 4)
    assert lr.isfinite().all() and lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), atol=1e-4, rtol=0)


def without_noise(theta: Degradation) -> Degradation:
    noisy = torch.tensor([name[:5] in ("gauss", "poiss") for name in degrade.OPERATIONS])
    theta.order[noisy[theta.order]] = 0
    return theta


def test_images_on_one_canvas_are_degraded_as_each_alone(monkeypatch):
    """All recipes at once; where they differ, a rounding in front of a JPEG fell the other way."""
    parts = [
        degrade.sample_degradation(6, r, generator=common.generator(11)) for r in degrade.RECIPES
    ]
    theta = without_noise(Degradation.cat(parts))
    hr = drawn_batch(len(theta), 64, 96)
    alone = degrade.degrade(hr, theta)
    for room in (2**13, 2**30):  # in groups of a few images, and as on a GPU
        monkeypatch.setattr(degrade, "CPU_CANVAS", room)
        together = degrade.degrade(hr, theta, common.generator(0))
        difference = ((alone - together).abs() * 255).round()
        assert (difference > 0).float().mean() < 0.01 and difference.max() < 16
        assert (difference.amax((1, 2, 3)) > 0).float().mean() < 0.35


def test_a_canvas_is_full_of_noise_with_a_generator(monkeypatch):
    theta = only(8, "resize 1", "gaussian 1", "poisson 2", scale=4)
    theta.resize[:, 0] = torch.linspace(0.3, 1.4, 8)
    theta.gaussian_std[:], theta.poisson_scale[:] = 0.05, 0.5
    theta.order[::2, 2] = 0
    hr = torch.full((8, 3, 64, 64), 0.5)
    for room in (2**12, 2**30):
        monkeypatch.setattr(degrade, "CPU_CANVAS", room)
        noise = degrade.degrade(hr, theta, common.generator(1)) - 0.5
        assert (noise.std((1, 2, 3)) > 0.005).all()
        correlation = np.corrcoef(noise.flatten(1))
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 0.2


@settings(max_examples=15, deadline=None, derandomize=True)
@given(SIDES, SIDES, st.integers(0, 2**31), st.sampled_from(degrade.RECIPES))
def test_a_row_does_not_depend_on_the_others(height, width, seed, recipe):
    theta = degrade.sample_degradation(6, recipe, generator=common.generator(seed))
    hr = drawn_batch(6, height, width)
    lr = degrade.degrade(hr, theta)
    before, order = hr.clone(), [4, 0, 5]
    assert torch.equal(degrade.degrade(hr[order], theta[order]), lr[order])
    last = hr.contiguous(memory_format=torch.channels_last)
    assert torch.equal(degrade.degrade(last, theta), lr) and torch.equal(hr, before)
    others = hr.clone()
    others[1:] = 1 - others[1:]
    assert torch.equal(degrade.degrade(others, theta)[0], lr[0])


def test_images_of_several_recipes_may_share_a_batch():
    parts = [
        degrade.sample_degradation(2, r, generator=common.generator(11)) for r in degrade.RECIPES
    ]
    theta = Degradation.cat(parts)
    hr = drawn_batch(len(theta), 64, 96)
    lr = degrade.degrade(hr, theta)
    for i in range(len(theta)):
        assert torch.equal(degrade.degrade(hr[i : i + 1], theta[[i]]), lr[i : i + 1])


def test_a_replay_does_not_depend_on_the_number_of_threads():
    theta = degrade.sample_degradation(8, generator=common.generator(15))
    hr = drawn_batch(8, 128, 192)
    lr = degrade.degrade(hr, theta)
    torch.set_num_threads(2)
    try:
        assert torch.equal(degrade.degrade(hr, theta), lr)
    finally:
        torch.set_num_threads(1)


def test_the_same_theta_gives_two_images_the_same_kernels_and_levels():
    """Where D is linear, degrading the sum is summing the degraded."""
    theta = degrade.sample_degradation(1, generator=common.generator(16))[[0, 0]]
    theta.order[:, 2:] = torch.tensor([degrade.OPERATIONS.index("resize 3"), *[0] * 7])
    theta.resize_mode[:] = degrade.MODES.index("area")
    hr = drawn_batch(2, 64, 64)
    a, b = degrade.degrade(hr, theta)
    both = degrade.degrade((hr.sum(0) / 2)[None], theta[:1])[0]
    assert (both - (a + b) / 2).abs().max() < 1.01 / 255


def test_a_generator_draws_new_noise_for_each_row_of_the_same_theta():
    theta = only(1, "gaussian 2", scale=4)
    theta.gaussian_std[:] = 0.05
    theta, hr = theta[[0, 0]], drawn_batch(1, 64, 64).expand(2, 3, 64, 64)
    replayed = degrade.degrade(hr, theta)
    assert torch.equal(replayed[0], replayed[1])
    fresh = degrade.degrade(hr, theta, common.generator(7))
    assert not torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], replayed[0])
    assert torch.equal(fresh, degrade.degrade(hr, theta, common.generator(7)))
    assert not torch.equal(fresh, degrade.degrade(hr, theta, common.generator(1)))


def test_identity_parameters_change_nothing():
    theta = only(4, "blur 1", "resize 1", "gaussian 1", "resize 2", "blur 3")
    theta.resize_mode[:] = torch.arange(4)[:, None]
    hr = drawn_batch(4, 45, 32)
    assert torch.equal(degrade.degrade(hr, theta), hr)


def test_identity_parameters_at_scale_4_are_a_plain_resize():
    hr, theta = drawn_batch(3, 48, 32), only(3, scale=4)
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


# ---- as on a GPU


@pytest.mark.parametrize("recipe", degrade.RECIPES)
def test_no_operation_leaves_the_gpu_and_launches_do_not_grow_with_the_batch(recipe):
    launches = {}
    for batch in (16, 64, 256) if recipe in ("realesrgan", "bsrgan") else (64,):
        theta = degrade.sample_degradation(batch, recipe, generator=common.generator(0))
        with fake_cuda() as launched:
            hr = torch.zeros(batch, 3, 256, 256, device="cuda:0")
            lr = degrade.degrade(hr, theta, torch.Generator())
        assert lr.device == hr.device and lr.shape == (batch, 3, 64, 64)
        launches[batch] = launched.total()
    assert launches[64] <= 600
    assert launches.get(256, 0) <= 1.2 * launches.get(16, 0)


def test_theta_jpeg_and_blur_of_gpu_images_stay_on_the_gpu():
    theta = degrade.sample_degradation(3, generator=common.generator(0))
    given = torch.tensor([1, 50, 100])
    with fake_cuda():
        x = torch.zeros(3, 3, 20, 30, device="cuda:0")
        for quality in (50, given, given.to("cuda:0")):
            for subsampling in ("4:2:0", "4:4:4"):
                assert degrade.jpeg(x, quality, subsampling).device == x.device
        assert degrade.blur(x, torch.ones(3, 25, 25, device="cuda:0")).device == x.device
        assert theta.to("cuda:0").physical().device == x.device


def test_the_stand_in_for_a_gpu_refuses_to_mix_devices():
    with fake_cuda(), pytest.raises(Exception, match="cuda"):
        torch.zeros(3, device="cuda:0") + torch.zeros(3)


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
    assert physical.shape == (steps, 5)
    for column in (0, 2, 3, 4):
        assert (physical[:, column].diff() > 0).all()
    assert (physical[:, 1] == 0).all()
    # The same parameters of operations that are not performed mean nothing.
    theta.order[:] = only(steps, scale=4).order
    assert (theta.physical() == degrade.bicubic(1, 4).physical()).all()
    for recipe in degrade.RECIPES:
        drawn = degrade.sample_degradation(500, recipe, generator=common.generator(14)).physical()
        assert drawn[:, :3].isfinite().all() and drawn.isfinite().any(0).all()
        assert drawn.nan_to_num().min() > -0.5 and drawn.nan_to_num().max() < 2


def test_noise_and_jpeg_that_a_resize_hides_are_not_named():
    unknown = {
        ("gaussian 1", "jpeg 1", "resize 3"): [True, True],
        ("resize 3", "gaussian 1", "jpeg 1"): [False, False],
        ("jpeg 1", "resize 3", "gaussian 1"): [False, True],
        ("gaussian 1", "resize 3", "poisson 2", "jpeg 1"): [False, False],
        ("resize 3",): [False, False],
    }
    for operations, expected in unknown.items():
        theta = only(1, *operations, scale=4)
        theta.gaussian_std[:], theta.poisson_scale[:], theta.jpeg_quality[:] = 0.05, 1.0, 50
        assert theta.physical()[0, 3:].isnan().tolist() == expected, operations


def test_physical_blur_is_measured_in_lr_pixels_wherever_it_happens():
    """Blurring by 4 px before a reduction by 4 or by 1 px behind it."""
    before, after = only(1, "blur 1", "resize 2", scale=4), only(1, "resize 2", "blur 1", scale=4)
    before.resize[:] = after.resize[:] = 0.25
    before.blur_sigma[:], after.blur_sigma[:] = 4.0, 1.0
    before.blur_size[:] = after.blur_size[:] = degrade.KERNEL_SIZE
    width = [theta.physical()[0, 0].item() for theta in (before, after)]
    assert width[0] == pytest.approx(width[1], abs=0.01)
    assert width[1] == pytest.approx(1 + math.log(1.01) / 4.6)
    after.blur_size[:] = 3  # what a kernel has no room for is no blur
    assert after.physical()[0, 0] < width[1]


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
    assert set(contents(out)) == files | {"pairs.jsonl", "preview.png"}
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


def test_several_pairs_of_each_photo(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    launch(monkeypatch, "--hr", photos, "--out", out, "--recipe", "bsrgan", "--per-image", 3)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 6 and "6 pairs" in capsys.readouterr().out
    assert (
        len({pair["lr"] for pair in pairs}) == len({pair["theta"]["seed"] for pair in pairs}) == 6
    )
    found = contents(out)
    for pair in pairs:
        assert found[pair["hr"]] == found[pairs[0 if "/a_" in pair["hr"] else 3]["hr"]]
        hr, lr = (common.load_image(out / pair[side]) for side in ("hr", "lr"))
        theta = Degradation.from_json([json.dumps(pair["theta"])])
        assert torch.equal(degrade.degrade(hr[None], theta)[0], lr)
    Image.open(out / "preview.png").load()


SIDES = ("hr", "lr")


def lr_files(out: Path) -> set[str]:
    """The LR files, which are those of the table and have HR files beside them."""
    names = {file.name for file in (out / "lr").iterdir()}
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert sorted(names) == sorted(Path(row["lr"]).name for row in rows)
    assert names == {file.name for file in (out / "hr").iterdir()}
    return names


def test_the_folder_holds_what_the_last_command_asked_for(tmp_path, monkeypatch, capsys):
    """Photos that are added or taken away, another recipe, other numbers of pairs."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for i, name in enumerate(("b", "c", "d/b")):
        common.save_image(photos / f"{name}.png", drawn_image(40, 40, i))
    launch(monkeypatch, "--hr", photos, "--out", out, "--recipe", "bsrgan")
    assert lr_files(out) == {"b.png", "c.png", "d_b.png"}
    before = contents(out / "lr")
    common.save_image(photos / "a.png", drawn_image(40, 40, 3))
    launch(monkeypatch, "--hr", photos, "--out", out, "--recipe", "bsrgan")
    assert lr_files(out) == {"a.png", "b.png", "c.png", "d_b.png"}
    assert contents(out / "lr").items() > before.items()  # its place in the list changes nothing
    launch(monkeypatch, "--hr", photos, "--out", out, "--recipe", "wide", "--per-image", 2)
    assert lr_files(out) == {f"{n}_{k}.png" for n in ("a", "b", "c", "d_b") for k in (0, 1)}
    (photos / "c.png").unlink()
    capsys.readouterr()
    launch(monkeypatch, "--hr", photos, "--out", out, "--recipe", "wide")
    assert lr_files(out) == {"a.png", "b.png", "d_b.png"}
    assert "8 pairs of before" in capsys.readouterr().out
    gone = {f"{side}/{n}_{k}.png" for side in SIDES for n in ("a", "b", "c", "d_b") for k in (0, 1)}
    assert set(contents(out / "removed")) >= gone  # they are set aside, not deleted
    (photos / "a.png").write_text("not an image any more")
    launch(monkeypatch, "--hr", photos, "--out", out, "--recipe", "wide")
    assert lr_files(out) == {"b.png", "d_b.png"}


def test_a_photo_that_is_replaced_is_degraded_anew(tmp_path, monkeypatch, capsys):
    photo, out = tmp_path / "photos" / "a.png", tmp_path / "out"
    common.save_image(photo, drawn_image(40, 40, 0))
    launch(monkeypatch, "--hr", photo.parent, "--out", out)
    before = contents(out)
    time.sleep(0.02)
    common.save_image(photo, drawn_image(40, 40, 1))
    launch(monkeypatch, "--hr", photo.parent, "--out", out)
    after = contents(out)
    assert all(before[f"{side}/a.png"] != after[f"{side}/a.png"] for side in SIDES)
    assert before["preview.png"] != after["preview.png"]
    assert not (out / "removed").exists()


def test_results_inside_the_folder_of_photos_are_not_read_as_photos(photos, monkeypatch, capsys):
    for _ in range(3):
        launch(monkeypatch, "--hr", photos, "--out", photos / "pairs")
        assert lr_files(photos / "pairs") == {"a.png", "b.png"}
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, "--hr", photos / "pairs" / "hr", "--out", photos / "pairs")
    assert stopped.value.code == 2 and "give another --out" in capsys.readouterr().err


def test_files_of_others_in_the_folder_are_named_and_kept(photos, tmp_path, monkeypatch, capsys):
    mine, others = tmp_path / "mine", tmp_path / "others"
    common.save_image(mine / "hr" / "holiday.png", drawn_image(40, 40))
    (others / "hr").mkdir(parents=True)
    (others / "pairs.jsonl").write_text('{"hr": "hr/a.png", "lr": "lr/a.png", "seed": 1}\n')
    for out, word in ((mine, "holiday.png"), (others, "another command")):
        before = contents(out)
        with pytest.raises(SystemExit) as stopped:
            launch(monkeypatch, "--hr", photos, "--out", out)
        assert stopped.value.code == 2 and contents(out) == before
        message = capsys.readouterr().err.strip()
        assert word in message and "give another --out" in message and "\n" not in message


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    for i in range(40):
        common.save_image(tmp_path / "photos" / f"{i:02d}.png", drawn_image(256, 256, i))
    command = [sys.executable, REPO / "degrade.py", "--hr", tmp_path / "photos", "--device", "cpu"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, "--out", whole], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", broken], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    table = broken / "pairs.0.jsonl"  # of this process, until the run has finished
    while not (table.is_file() and table.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = [json.loads(line) for line in table.read_text().splitlines() if line]
    assert 0 < len(finished) < 40
    for pair in finished:
        assert (broken / pair["lr"]).read_bytes() == (whole / pair["lr"]).read_bytes()
    times = {pair["lr"]: (broken / pair["lr"]).stat().st_mtime_ns for pair in finished}
    subprocess.run([*command, "--out", broken], check=True, capture_output=True)
    assert {name: (broken / name).stat().st_mtime_ns for name in times} == times
    assert contents(broken) == contents(whole)


def test_a_full_disk_is_one_sentence(photos, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "save_image", full)
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, "--hr", photos, "--out", tmp_path / "out")
    assert stopped.value.code == 2 and "No space left" in capsys.readouterr().err


def test_only_bad_images_are_an_error_and_leave_nothing(photos, tmp_path, monkeypatch, capsys):
    bad = [photos / "c.jpg", photos / "tiny.png"]
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, "--hr", *bad, "--out", tmp_path / "out")
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert "none of the HR images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--recipe", "wrong"], "wrong"),
        (["--per-image", "0"], "--per-image"),
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


def test_noise_and_quality_are_read_back_from_what_theta_means():
    theta = degrade.bicubic(5, 4)
    theta.order[:, 1:3] = torch.tensor(
        [degrade.OPERATIONS.index(n) for n in ("gaussian 2", "jpeg 2")]
    )
    theta.gaussian_std[:, 1] = torch.tensor([0.0, 1.0, 5.0, 10.0, 25.0]) / 255
    theta.jpeg_quality[:, 1] = torch.tensor([1, 30, 75, 95, 100])
    noise, quality = degrade.noise_and_quality(theta.physical())
    torch.testing.assert_close(noise, theta.gaussian_std[:, 1], atol=1e-6, rtol=1e-4)
    assert quality.tolist() == theta.jpeg_quality[:, 1].tolist()
