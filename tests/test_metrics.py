"""Metrics against closed forms, scikit-image, pytorch-fid and published values."""

import re
import sys

import commands
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bench import metrics
from common import UserError
from common.images import load_image, save_image, to_uint8
from common.runtime import make_generator
from tests.drawn import psnr_y

LOADERS = (metrics.perceptual_net, metrics.inception, metrics.clip)


def two_images(batch=2, height=37, width=50):
    x = torch.rand(batch, 3, height, width, generator=make_generator(1))
    eps = torch.randn(x.shape, generator=make_generator(2))
    return x, (x + 0.1 * eps).clamp(0, 1)


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """A folder for weights, which is empty; no network is in memory."""
    for load in LOADERS:
        load.cache_clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    yield tmp_path
    for load in LOADERS:
        load.cache_clear()


# ---- two images ---------------------------------------------------------------------------------


def test_psnr_of_a_constant_difference_is_its_level():
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(metrics.psnr(x, y).float(), torch.tensor([20.0, 40.0]))
    assert metrics.psnr(x, x).isinf().all()


@pytest.mark.parametrize("kind", ["RGB", "Y"])
def test_psnr_and_ssim_equal_scikit_image(kind):
    x, y = two_images()
    psnr, ssim = (metrics.METRICS[f"{name} {kind}"](x, y) for name in ("PSNR", "SSIM"))
    if kind == "Y":
        x, y = metrics.rgb_to_y(x), metrics.rgb_to_y(y)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i, (a, b) in enumerate(zip(x.double().numpy(), y.double().numpy(), strict=True)):
        assert psnr[i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))
        expected = structural_similarity(a, b, channel_axis=0, data_range=1, **window)
        assert ssim[i].item() == pytest.approx(expected, abs=1e-5)


def test_luma_of_known_colours():
    colours = {
        (0, 0, 0): 16.0,
        (1, 1, 1): 235.0,
        (1, 0, 0): 16 + 65.481,
        (0.5, 0.25, 0.75): 16 + 0.5 * 65.481 + 0.25 * 128.553 + 0.75 * 24.966,
    }
    y = metrics.rgb_to_y(torch.tensor(list(colours)).view(-1, 3, 1, 1))
    assert y.shape == (len(colours), 1, 1, 1)
    torch.testing.assert_close(y.flatten() * 255, torch.tensor(list(colours.values())))


def test_deep_distances_have_their_published_values(no_weights, shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "weights"))

    def load(*names):
        files = [shared / "weights" / "reference" / f"{name}.png" for name in names]
        return torch.stack([load_image(file) for file in files])

    distance = metrics.lpips_distance(load("ex_ref", "ex_ref"), load("ex_p0", "ex_p1"))
    np.testing.assert_allclose(distance, [0.7219, 0.1376], atol=1e-4)
    distance = metrics.dists_distance(load("r0", "r0"), load("r1", "r0"))
    np.testing.assert_allclose(distance, [0.3347, 0.0], atol=1e-4)


# ---- weights ------------------------------------------------------------------------------------


def test_missing_weights_are_named_and_never_downloaded(no_weights, capsys):
    for net, metric in (
        ("alex", metrics.lpips_distance),
        ("vgg", metrics.dists_distance),
        ("inception", lambda x, y: metrics.fid([x], [y])),
        ("clip", lambda x, y: metrics.clip_score([x], [y])),
    ):
        with pytest.raises(UserError, match=f"put {metrics.WEIGHTS[net]} into {no_weights}"):
            metric(*two_images())
    names = metrics.available_metrics(torch.device("cpu"))
    assert names == ["PSNR RGB", "PSNR Y", "SSIM RGB", "SSIM Y"]
    lines = capsys.readouterr().out.splitlines()
    missing = ["no LPIPS", "no DISTS", "no FID, KID", "no CLIP-Score"]
    assert [line.split(":")[0] for line in lines] == missing
    names = metrics.available_metrics(torch.device("cpu"), ("DISTS", "PSNR Y"))
    assert names == ["PSNR Y"] and capsys.readouterr().out.startswith("no DISTS:")
    assert not list(no_weights.iterdir())


@pytest.mark.parametrize("net", ["alex", "inception"])
def test_damaged_weights_are_one_sentence(no_weights, net):
    file = metrics.weights_file(net)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    with pytest.raises(UserError, match=f"{file}: no readable weights"):
        metrics.available_metrics(torch.device("cpu"))


# ---- two sets of features -----------------------------------------------------------------------


def features(n, d, seed, shift=0.0):
    """Correlated features (n, d) in float64, such as a network's."""
    mix = torch.randn(d, d, generator=make_generator(d)).double() / d**0.5
    return torch.randn(n, d, generator=make_generator(seed)).double() @ mix + shift


def frechet(x, y):
    return metrics.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def test_frechet_distance_of_covariances_that_commute():
    """Where both have the same axes, the widths along each are subtracted: |A^.5 - B^.5|^2."""
    axes, _ = torch.linalg.qr(torch.randn(6, 6, generator=make_generator(0)).double())
    a, b = torch.rand(2, 6, generator=make_generator(1)).double()
    a[0] = b[1] = 0  # singular covariances
    mean = torch.full((6,), 2.0)
    distance = metrics.frechet_distance(0 * mean, axes * a @ axes.T, mean, axes * b @ axes.T)
    assert distance == pytest.approx(6 * 2**2 + (a.sqrt() - b.sqrt()).square().sum().item())


@pytest.mark.filterwarnings("ignore:The `disp` argument")
@pytest.mark.parametrize("n", [20, 200])  # fewer images than features, and more
def test_frechet_distance_equals_that_of_pytorch_fid(n):
    metrics.import_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = (features(n, 32, seed, shift) for seed, shift in ((1, 0), (2, 0.3)))
    moments = [m.numpy() for m in (x.mean(0), x.T.cov(), y.mean(0), y.T.cov())]
    assert frechet(x, y) == pytest.approx(calculate_frechet_distance(*moments), rel=1e-5)


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
        return (np.dot(a, b) / 7 + 1) ** 3

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


# ---- two sets of images -------------------------------------------------------------------------


def colours(x):
    """Mean and spread (B, 6) of the channels of images (B, 3, H, W)."""
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)


def test_set_metrics_do_not_depend_on_how_images_are_batched():
    x, y = two_images(batch=7)
    x, y = x * torch.linspace(0.2, 1, 7).view(-1, 1, 1, 1), y * y
    a, b = colours(x).double(), colours(y).double()
    cosine = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    for metric, expected in (
        (metrics.fid, frechet(a, b)),
        (metrics.kid, metrics.kernel_distance(a, b)),
        (metrics.clip_score, cosine.mean().item()),
    ):
        value = metric(iter(x.split([1, 6])), iter(y.split([3, 3, 1])), colours)
        assert value == pytest.approx(expected)


def test_inception_reads_files_as_pytorch_fid_does(no_weights):
    """With random weights: the claim holds for any."""
    metrics.import_torchvision()
    import torchvision
    from pytorch_fid.fid_score import get_activations

    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    metrics.weights_file("inception").parent.mkdir(parents=True)
    torch.save(net.state_dict(), metrics.weights_file("inception"))
    x = to_uint8(two_images(batch=3)[0]) / 255
    found = metrics.stacked(x.split(2), metrics.inception_features)
    files = [no_weights / f"{i}.png" for i in range(3)]
    for file, image in zip(files, x, strict=True):
        save_image(file, image)
    model = metrics.inception(torch.device("cpu"))
    expected = get_activations(files, model, batch_size=3, num_workers=0)
    assert found.shape == (3, 2048) and found.std(0).max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max())


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


def test_clip_gets_normalised_images_of_its_size(no_weights, monkeypatch):
    monkeypatch.syspath_prepend(no_weights)
    (no_weights / "open_clip.py").write_text(OPEN_CLIP)
    metrics.weights_file("clip").parent.mkdir(parents=True)
    metrics.weights_file("clip").write_text("weights")
    x = torch.tensor([0.7, 0.4, 0.1])[:, None, None].expand(2, 3, 40, 60)
    expected = torch.tensor([[1.0, 0.0, -0.5]]).expand(2, 3)
    torch.testing.assert_close(metrics.clip_features(x), expected, atol=1e-5, rtol=0)
    monkeypatch.delitem(sys.modules, "open_clip")


# ---- two folders of images ----------------------------------------------------------------------


def write_folders(folder, sizes=((40, 50), (36, 33))):
    """Folders a and b with an image of each size, one of them below a sub-folder."""
    gen, images = np.random.default_rng(0), []
    for name, size in zip(("x/1.png", "2.png"), sizes, strict=True):
        a = gen.integers(0, 256, (*size, 3), np.uint8)
        b = np.clip(a + gen.normal(0, 9, a.shape), 0, 255).astype(np.uint8)
        for side, image in zip("ab", (a, b), strict=True):
            file = folder / side / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        images.append((a, b))
    return images


def compare(folder, *names):
    return commands.run("bench.metrics", "--compare", *names, "--device", "cpu", cwd=folder)


def test_two_folders_are_compared_by_name(tmp_path, no_weights):
    images = write_folders(tmp_path)
    (tmp_path / "b/2.png").rename(tmp_path / "b/2.PNG")
    done = compare(tmp_path, "a", "b")
    assert done.returncode == 0, done.stderr
    *missing, line = done.stdout.splitlines()
    expected = np.mean([psnr_y(a, b) for a, b in images])
    weights = np.array([65.481, 128.553, 24.966]) / 255
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = np.mean([
        structural_similarity(a @ weights + 16, b @ weights + 16, data_range=255, **window)
        for a, b in images
    ])  # fmt: skip
    start = f"2 images: PSNR Y {expected:.2f} dB, SSIM Y {ssim:.3f}, LPIPS -, DISTS -"
    assert line == start
    assert [text.split(":")[0] for text in missing] == ["no LPIPS", "no DISTS"]
    assert "100.00 dB, SSIM Y 1.000" in compare(tmp_path, "a", "a").stdout


def test_the_deep_metrics_of_two_folders_are_means_too(tmp_path, no_weights, shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "weights"))
    for number, (a, b) in enumerate((("ex_ref", "ex_p0"), ("ex_ref", "ex_p1"))):
        for side, name in (("a", a), ("b", b)):
            x = load_image(shared / "weights" / "reference" / f"{name}.png")
            save_image(tmp_path / side / f"{number}.png", x)
    done = compare(tmp_path, "a", "b")
    assert done.returncode == 0 and "no LPIPS" not in done.stdout, done.stderr
    found = dict(re.findall(r"(LPIPS|DISTS) ([\d.]+)", done.stdout))
    assert float(found["LPIPS"]) == pytest.approx((0.7219 + 0.1376) / 2, abs=6e-4)
    assert 0 < float(found["DISTS"]) < 1


def test_folders_that_do_not_fit_are_one_sentence(tmp_path, no_weights):
    write_folders(tmp_path)
    write_folders(tmp_path / "larger", ((44, 50), (36, 33)))
    write_folders(tmp_path / "tiny", ((20, 50), (36, 33)))
    write_folders(tmp_path / "alone", ((40, 50), (36, 33)))
    (tmp_path / "alone/b/2.png").unlink()
    for names, words in (
        (["a"], ["name two folders"]),
        (["a", "nowhere"], ["nowhere is no folder"]),
        (["a", "alone/b"], ["1 names are in one folder only, such as 2"]),
        (["a", "larger/b"], ["x/1 has 50 x 40 and 50 x 44 pixels"]),
        (["tiny/a", "tiny/b"], ["x/1 is under 32 x 32 pixels"]),
    ):
        commands.assert_refused(compare(tmp_path, *names), "--compare", *words)
    (tmp_path / "b/2.png").write_bytes(b"no image")
    done = compare(tmp_path, "a", "b")
    assert "skipped: b/2.png: not a readable image" in done.stdout and "1 images:" in done.stdout
    (tmp_path / "b/x/1.png").write_bytes(b"no image")
    commands.assert_refused(compare(tmp_path, "a", "b"), "none of the images can be read")
