"""bench/kernels.py: planted kernels are found again, and have their transfer functions."""

import numpy as np
import pytest
import torch
from drawn import scenes
from PIL import Image

from bench import kernels
from common.images import to_uint8


def gaussian_kernel(sigma):
    """A Gaussian (24, 24) of sigma HR pixels around the middle of an LR pixel."""
    x = torch.arange(kernels.TAPS) - kernels.BEFORE - 1.5
    taps = (-(x.double() ** 2) / (2 * sigma**2)).exp()
    return (taps[:, None] * taps) / taps.sum() ** 2


def test_the_bicubic_kernel_is_pillows():
    hr = scenes(1)[0]
    image = Image.fromarray(to_uint8(hr).permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) / 255
    lr = kernels.reduced_by(kernels.bicubic_kernel(), to_uint8(hr) / 255)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(lr.permute(1, 2, 0).numpy()[4:-4, 4:-4], expected[4:-4, 4:-4],
                               atol=1.01 / 255)  # fmt: skip
    assert lr[inner].shape == (3, 40, 40)


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_a_kernel_is_found_again_from_its_images(sigma):
    hr, kernel = scenes(3), gaussian_kernel(sigma)
    equations = []
    for x in hr:
        AA, Ay = kernels.normal_equations(x, kernels.reduced_by(kernel, x)[None])
        equations.append((AA, Ay[0]))
    found = kernels.fitted_kernel(equations)
    f = torch.linspace(0, 0.5, 6)
    expected = (-2 * (np.pi * f.double() * sigma / 4) ** 2).exp()  # of a Gaussian, in closed form
    torch.testing.assert_close(kernels.transfer_function(kernel, f), expected, atol=0.01, rtol=0)
    amplitude = kernels.transfer_function(found, f)
    torch.testing.assert_close(amplitude, expected, atol=0.04, rtol=0)
    error = kernels.reduced_by(found, hr[0]) - kernels.reduced_by(kernel, hr[0])
    assert 255 * error.abs().mean() < 0.5


def test_the_transfer_function_of_bicubic_is_that_of_keys_cubic():
    """The mean over all angles equals a slow sum over the plane."""
    kernel, f = kernels.bicubic_kernel(), torch.tensor([0.0, 0.2, 0.5])
    place = (np.arange(24) - kernels.BEFORE - 1.5) / 4
    expected = []
    for frequency in f.tolist():
        values = []
        for angle in np.arange(24) * np.pi / 24:
            wave = np.cos(2 * np.pi * frequency * (np.sin(angle) * place[:, None]
                                                   + np.cos(angle) * place))  # fmt: skip
            values.append(abs((kernel.numpy() * wave).sum()))
        expected.append(np.mean(values))
    found = kernels.transfer_function(kernel, f)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0] == pytest.approx(1) and 0.5 < found[2] < 0.64


def test_a_planted_tone_of_third_degree_is_found_again():
    """With colours that mix; noise stays away."""
    image = scenes(1)[0]
    red, green, blue = image
    target = torch.stack([0.1 + red * green, 0.8 * green**3, blue - 0.2 * red * green * blue])
    noise = 0.02 * torch.from_numpy(np.random.default_rng(0).standard_normal(target.shape)).float()
    torch.testing.assert_close(kernels.toned(image, target), target, atol=5e-3, rtol=0)
    torch.testing.assert_close(kernels.toned(image, target + noise), target, atol=9e-3, rtol=0)
