"""Metrics against closed forms, scikit-image and published values."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import common
from bench import metrics


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
    metrics.perceptual_net.cache_clear()

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
    metrics.import_torchvision()
    import DISTS_pytorch
    import lpips
    import torchvision

    assert lpips.LPIPS and DISTS_pytorch.DISTS and torchvision.models.vgg16


def test_missing_weights_are_named_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics.perceptual_net.cache_clear()
    x, y = two_images(height=64, width=64)
    for distance, file in (
        (metrics.lpips_distance, "models/alexnet-owt-7be5be79.pth"),
        (metrics.dists_distance, "models/vgg16-397923af.pth"),
        (lambda x, y: metrics.fid([x], [y]), "fid_weights/pt_inception-2015-12-05-6726825d.pth"),
        (lambda x, y: metrics.kid([x], [y]), "fid_weights/pt_inception-2015-12-05-6726825d.pth"),
        (lambda x, y: metrics.clip_score([x], [y]), "open_clip_model.safetensors"),
    ):
        with pytest.raises(common.UserError, match=f"put https://.*{file} into {tmp_path}"):
            distance(x, y)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    x, y = two_images(height=64, width=64)
    for net, distance in (
        ("alex", metrics.lpips_distance),
        ("inception", lambda x, y: metrics.fid([x], [y])),
    ):
        metrics.perceptual_net.cache_clear()
        metrics.inception.cache_clear()
        metrics.weights_file(net).parent.mkdir(parents=True, exist_ok=True)
        metrics.weights_file(net).write_bytes(b"half a download")
        with pytest.raises(
            common.UserError, match=f"{metrics.weights_file(net).name}: no readable"
        ):
            distance(x, y)


# ---- sets of features ---------------------------------------------------------------------------


def features(n, d, seed, shift=0.0):
    """Correlated features (n, d) in float64, such as a network's."""
    mix = torch.randn(d, d, generator=common.generator(d)).double() / d**0.5
    return torch.randn(n, d, generator=common.generator(seed)).double() @ mix + shift


def frechet(x, y):
    return metrics.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def test_frechet_distance_of_one_dimension():
    mean_a, var_a, mean_b, var_b = torch.tensor([3.0, 4.0, 1.0, 0.25]).split(1)
    distance = metrics.frechet_distance(mean_a, var_a[:, None], mean_b, var_b[:, None])
    assert distance == pytest.approx((3 - 1) ** 2 + (2 - 0.5) ** 2)


def test_frechet_distance_of_covariances_that_commute():
    """Where both have the same axes, the widths along each are subtracted: |A^.5 - B^.5|^2."""
    axes, _ = torch.linalg.qr(torch.randn(6, 6, generator=common.generator(0)).double())
    a, b = torch.rand(2, 6, generator=common.generator(1)).double()
    a[0] = b[1] = 0  # singular covariances are not a special case
    zero = torch.zeros(6)
    distance = metrics.frechet_distance(zero, axes * a @ axes.T, zero, axes * b @ axes.T)
    assert distance == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item())


@pytest.mark.parametrize("n", [20, 200])  # fewer images than features, and more
def test_frechet_distance_equals_that_of_pytorch_fid(n):
    metrics.import_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = (features(n, 32, seed, shift).numpy() for seed, shift in ((1, 0), (2, 0.3)))
    moments = [x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)]
    expected = calculate_frechet_distance(*moments)
    assert metrics.frechet_distance(*map(torch.from_numpy, moments)) == pytest.approx(
        expected, rel=1e-5
    )


def test_frechet_distance_of_few_images_is_exact():
    """There the last trace is the sum of the singular values of all products of two features."""
    x, y = features(20, 256, 1), features(15, 256, 2, 0.1)
    a, b = (z - z.mean(0) for z in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 19
    expected += b.square().sum() / 14 - 2 * torch.linalg.svdvals(a @ b.T).sum() / (19 * 14) ** 0.5
    assert frechet(x, y) == pytest.approx(expected.item(), abs=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_equals_the_sum_written_out():
    x, y = features(5, 7, 1).numpy(), features(4, 7, 2, 0.5).numpy()

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 7 + 1) ** 3

    expected = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    expected += sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / (4 * 3)
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (5 * 4)
    found = metrics.kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 9), m=st.integers(2, 9))
def test_both_distances_are_symmetric_and_do_not_see_the_order(seed, n, m):
    x, y = features(n, 5, seed), features(m, 5, seed + 1, 0.5)
    for distance in (frechet, metrics.kernel_distance):
        value = distance(x, y)
        assert distance(y, x) == pytest.approx(value, abs=1e-6)
        assert distance(x.flip(0), y) == pytest.approx(value, abs=1e-6)


def test_of_small_sets_of_one_distribution_kid_is_0_on_average_and_fid_is_not():
    draws = [(features(20, 16, 2 * i), features(20, 16, 2 * i + 1)) for i in range(200)]
    kids = np.array([metrics.kernel_distance(x, y) for x, y in draws])
    assert abs(kids.mean()) < 3 * kids.std() / len(kids) ** 0.5
    assert min(frechet(x, y) for x, y in draws) > 1
    assert metrics.kernel_distance(features(20, 16, 0), features(20, 16, 1, 1.0)) > 1


# ---- sets of images -----------------------------------------------------------------------------


def colours(x):
    """Features (B, 6) that say a little about images (B, 3, H, W)."""
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)


def test_set_metrics_read_batches_of_any_size_once():
    x, y = two_images(batch=7)
    x, y = x * torch.linspace(0.2, 1, 7).view(-1, 1, 1, 1), y * y
    batches = [iter(v.split(sizes)) for sizes in ([1, 6], [3, 3, 1]) for v in (x, y)]
    for metric, expected in (
        (metrics.fid, frechet(colours(x).double(), colours(y).double())),
        (metrics.kid, metrics.kernel_distance(colours(x), colours(y))),
    ):
        assert metric(batches.pop(0), batches.pop(0), colours) == pytest.approx(expected)
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
               for a, b in zip(colours(x).numpy(), colours(y).numpy(), strict=True)]  # fmt: skip
    assert metrics.clip_score([x], y.split(2), colours) == pytest.approx(np.mean(cosines))
    assert metrics.clip_score([x], [x], colours) == pytest.approx(1)


def test_inception_reads_files_as_pytorch_fid_does(tmp_path, monkeypatch):
    """With random weights, of which the metric takes no notice."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics.import_torchvision()
    import torchvision
    from pytorch_fid.fid_score import get_activations

    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    metrics.weights_file("inception").parent.mkdir(parents=True)
    torch.save(net.state_dict(), metrics.weights_file("inception"))
    metrics.inception.cache_clear()
    x = common.to_uint8(two_images(batch=3)[0]) / 255
    found = metrics.stacked(x.split(2), metrics.inception_features)
    assert found.shape == (3, 2048) and found.dtype == torch.float64
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, x, strict=True):
        common.save_image(file, image)
    model = metrics.inception(torch.device("cpu"))
    expected = get_activations(files, model, batch_size=3, num_workers=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max())
    assert found.std(0).max() > 0, "features that differ from image to image"
    metrics.inception.cache_clear()


OPEN_CLIP = """
import torch

class Visual:
    image_mean, image_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

class Net:
    visual = Visual
    def eval(self):
        return self
    def encode_image(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return x.mean((2, 3))

def create_model(name, pretrained, device):
    assert name == "ViT-B-32-quickgelu" and open(pretrained).read() == "weights"
    return Net()
"""


def test_clip_gets_normalised_images_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    metrics.clip.cache_clear()
    (tmp_path / "open_clip.py").write_text(OPEN_CLIP)
    metrics.weights_file("clip").parent.mkdir(parents=True)
    metrics.weights_file("clip").write_text("weights")
    assert metrics.missing_for("clip") == ""
    x = torch.tensor([0.7, 0.4, 0.1])[:, None, None].expand(2, 3, 40, 60)
    expected = torch.tensor([[1.0, 0.0, -0.5]]).expand(2, 3)
    torch.testing.assert_close(metrics.clip_features(x), expected, atol=1e-5, rtol=0)
    assert metrics.clip_score([x], [1 - x]) < 0.1
    metrics.clip.cache_clear()
    monkeypatch.delitem(sys.modules, "open_clip")


def test_what_is_missing_is_said_in_one_line_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    names = metrics.available_metrics(torch.device("cpu"))
    assert names == ["PSNR RGB", "PSNR Y", "SSIM RGB", "SSIM Y"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "no LPIPS",
        "no DISTS",
        "no FID, KID",
        "no CLIP-Score",
    ]
    assert all(str(tmp_path) in line for line in lines)
    assert not list(tmp_path.iterdir())
