"""Metrics against closed forms, scikit-image and published values."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import common
import metrics


def two_images(batch=2, height=37, width=50):
    x = torch.rand(batch, 3, height, width, generator=common.generator(1))
    eps = torch.randn(x.shape, generator=common.generator(2))
    return x, (x + 0.1 * eps).clamp(0, 1)


# ---- one image with another ---------------------------------------------------------------------


def test_psnr_of_a_constant_difference_is_its_level():
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(metrics.psnr(x, y).float(), torch.tensor([20.0, 40.0]))
    assert metrics.psnr(x, x).isinf().all()


def test_psnr_equals_scikit_image_for_each_image():
    x, y = two_images()
    expected = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1)
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(metrics.psnr(x, y), expected, atol=1e-5)


@pytest.mark.parametrize("to_y", [False, True])
def test_ssim_equals_scikit_image(to_y):
    x, y = two_images()
    if to_y:
        x, y = metrics.rgb_to_y(x), metrics.rgb_to_y(y)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1, **options
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(x, y), expected, atol=1e-5)
    np.testing.assert_allclose(metrics.ssim(x, x), 1)


def test_luma_of_known_colours():
    colours = {
        (0, 0, 0): 16.0,
        (1, 1, 1): 235.0,
        (1, 0, 0): 16 + 65.481,
        (0, 1, 0): 16 + 128.553,
        (0, 0, 1): 16 + 24.966,
        (0.5, 0.25, 0.75): 16 + 0.5 * 65.481 + 0.25 * 128.553 + 0.75 * 24.966,
    }
    x = torch.tensor(list(colours)).view(-1, 3, 1, 1)
    y = metrics.rgb_to_y(x)
    assert y.shape == (len(colours), 1, 1, 1)
    torch.testing.assert_close(y.flatten() * 255, torch.tensor(list(colours.values())))


def test_deep_distances_have_their_published_values(shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "weights"))
    common.perceptual_net.cache_clear()

    def load(name):
        return common.load_image(shared / "weights" / "reference" / f"{name}.png")[None]

    reference = load("ex_ref").repeat(2, 1, 1, 1)
    distance = metrics.lpips_distance(reference, torch.cat([load("ex_p0"), load("ex_p1")]))
    np.testing.assert_allclose(distance, [0.7219, 0.1376], atol=1e-4)
    r0, r1 = load("r0"), load("r1")
    np.testing.assert_allclose(metrics.dists_distance(r0, r1), [0.3347], atol=1e-4)
    both = metrics.dists_distance(torch.cat([r0, r0]), torch.cat([r1, r0]))
    np.testing.assert_allclose(both, [0.3347, 0.0], atol=1e-4)


def test_packages_of_the_metrics_load_whatever_torchvisions_operators_do():
    common.import_torchvision()
    import DISTS_pytorch
    import lpips
    import torchvision

    assert lpips.LPIPS and DISTS_pytorch.DISTS and torchvision.models.vgg16


def test_missing_weights_are_named_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    common.perceptual_net.cache_clear()
    x, y = two_images(height=64, width=64)
    for distance, file in (
        (metrics.lpips_distance, "alexnet-owt-7be5be79.pth"),
        (metrics.dists_distance, "vgg16-397923af.pth"),
    ):
        with pytest.raises(common.UserError, match=file):
            distance(x, y)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "hub" / "checkpoints" / common.WEIGHTS["alex"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    common.perceptual_net.cache_clear()
    with pytest.raises(common.UserError, match="no readable weights"):
        metrics.lpips_distance(*two_images(height=64, width=64))
