"""bench/figure1.py: sets of one blur and one noise, distances of F_deg, and the picture."""

import numpy as np
import pytest
import torch
from drawn import bicubic_for_realdgen, inputs_of, scenes, write_pairs
from PIL import Image

import degrade
import generate
from bench import factors, figure1
from bench.figure1 import GRID
from bench.pairs import find_pairs
from common.images import save_image
from common.runtime import make_generator


def test_a_set_has_its_blur_and_its_noise_and_nothing_else(tmp_path):
    hr = scenes(1)
    lr = degrade.degrade(hr, figure1.blurred_and_noisy((0.8, 0.0), 3))
    assert torch.equal(lr, degrade.degrade(hr, factors.only("blur", torch.tensor([0.8]))))
    flat = torch.full((1, 3, 256, 256), 0.5)
    lr, again, other = (
        degrade.degrade(flat, figure1.blurred_and_noisy((0.5, 9.0), seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(lr, again) and not torch.equal(lr, other)
    assert 255 * lr.std().item() == pytest.approx(9, rel=0.05)
    figure1.write_set(tmp_path, scenes(3), (0.8, 5.0), seed=0)
    blur, noise = figure1.place_of(find_pairs(tmp_path)[0])
    assert blur == pytest.approx(0.8, abs=0.1) and noise == pytest.approx(5, rel=0.2)


def test_the_rank_correlation_is_one_where_the_nearer_is_the_better():
    np.testing.assert_allclose(figure1.distances((0.3, 0.0))[[0, 2, 6, 8]], [0, 1, 1, 2**0.5])
    near = [{"place": p, "psnr": (30 - figure1.distances(p) ** 3).tolist()} for p in GRID]
    far = [{"place": p, "psnr": (30 + figure1.distances(p)).tolist()} for p in GRID[:1]]
    same = [{"place": GRID[0], "psnr": [30.0] * 9}]
    found = [figure1.rank_correlation(tests) for tests in (near, far, same)]
    assert found == pytest.approx([1, -1, 0], abs=0.05)  # rounding breaks some ties


def test_the_plane_keeps_what_lies_in_a_plane():
    gen = make_generator(0)
    flat = torch.randn(20, 2, generator=gen).double() * torch.tensor([3.0, 1.0])
    turned = torch.linalg.qr(torch.randn(30, 30, generator=gen).double())[0][:, :2]
    points, shares = figure1.plane(flat @ turned.T + 7)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(flat, flat))
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]


def test_nearness_is_one_for_what_is_as_near_as_real_ones_are():
    degradations = torch.tensor([[0.0], [2.0], [4.0], [6.0], [4.0], [-5.0]]).double()
    labels = ["real A", "real A", "real B", "near", "same", "far"]
    assert figure1.nearness(labels, degradations) == {"near": 1.0, "same": 0.0, "far": 2.5}
    assert figure1.nearness(labels[2:], degradations[2:]) == {}  # one real image has no neighbour


def test_the_figure_shows_every_test_and_every_image(tmp_path, monkeypatch):
    """F_deg is an image's mean and spread; a bicubic reduction stands in for RealDGen."""

    def degradation_of(net, lr):
        return torch.stack([lr.mean(), lr.std(), lr.diff().abs().mean()])[None]

    samplers = bicubic_for_realdgen(monkeypatch)
    monkeypatch.setattr(generate, "degradation_of", degradation_of)
    for i, photo in enumerate(scenes(8)):
        save_image(tmp_path / "photos" / f"{i}.png", photo)
    folders = {"pairs": (str(write_pairs(tmp_path / "RealSR")),), "hr": (str(tmp_path / "photos"),)}
    inputs = inputs_of(**folders, out=str(tmp_path / "out"), crop=32, sr_steps=20, images=8)
    result, text = figure1.table_figure1("figure1", inputs)()
    tests = result["tests"]
    assert [test["place"] for test in tests[:9]] == GRID and tests[9]["name"] == "RealSR"
    assert [test["n"] for test in tests] == [2] * 9 + [5]
    best = [int(np.argmax(test["psnr"][:3])) for test in tests[:3]]
    assert best[0] == 0 < best[2], "the training set of about the test's own blur is the best"
    # Held-out photos are in no training set, and all sets have the same HR images.
    root = next((tmp_path / "out/figure1").iterdir())
    train, test = (
        [{f.read_bytes() for f in folder.glob("hr/*.png")} for folder in (root / kind).iterdir()]
        for kind in ("train", "test")
    )
    assert all(x == train[0] for x in train) and all(x == test[0] for x in test)
    assert (len(train[0]), len(test[0])) == (6, 2) and not train[0] & test[0]
    methods = ["bicubic", "Real-ESRGAN", "BSRGAN", "RealDGen T=0", "RealDGen"]
    counts = {label: result["labels"].count(label) for label in result["labels"]}
    real = {"real RealSR Canon": 2, "real RealSR Nikon": 2}
    assert counts == real | dict.fromkeys(methods, 4)
    assert {sampler.t_start for sampler in samplers} == {0, generate.Sampler.t_start}
    assert result["nearness"]["RealDGen"] == pytest.approx(result["nearness"]["bicubic"])
    assert f"{result['rank']:.3f} over all tests" in text and "0.02 M" in text
    with Image.open(tmp_path / "out/figure1.png") as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("RGB")).std() > 20
