"""Figure 1: sets of one blur and one noise, who is near whom, and what the picture shows."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_benchmark import write_pairs
from test_factors import scenes

import benchmark
import common
import degrade
import generate
from bench import factors, figure1, pairs

CPU = common.Runtime(torch.device("cpu"))
GRID = [(0.3, 0.0), (1.1, 0.0), (0.3, 10.0), (1.1, 10.0)]


# ---- sets of one blur and one noise -------------------------------------------------------------


def test_a_set_without_noise_is_blurred_and_reduced_and_nothing_else():
    hr = scenes(1)
    made = degrade.degrade(hr, figure1.blurred_and_noisy((0.8, 0.0), 3))
    blurred = degrade.degrade(hr, factors.only("blur", torch.tensor([0.8])))
    assert torch.equal(made, blurred)


def test_noise_has_its_level_and_depends_on_the_seed():
    hr = torch.full((1, 3, 256, 256), 0.5)
    made, again, other = (
        degrade.degrade(hr, figure1.blurred_and_noisy((0.5, 9.0), seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(made, again) and not torch.equal(made, other)
    assert 255 * made.std().item() == pytest.approx(9, rel=0.05)


def test_blur_and_noise_of_a_set_are_found_again(tmp_path):
    figure1.write_set(tmp_path, scenes(3), (0.8, 5.0), seed=0)
    blur, noise = figure1.place_of(pairs.find_pairs(tmp_path)[0])
    assert blur == pytest.approx(0.8, abs=0.1) and noise == pytest.approx(5, rel=0.2)


# ---- distances ----------------------------------------------------------------------------------


def test_a_distance_is_in_units_of_the_grids_extent():
    np.testing.assert_allclose(figure1.distances((0.3, 0.0), GRID), [0, 1, 1, 2**0.5])
    np.testing.assert_allclose(figure1.distances((0.7, 5.0), GRID), [0.5**0.5] * 4)
    assert figure1.distances((2.0, 3.0), [(0.5, 3.0)])[0] == 1.5  # of a grid without extent


def test_the_rank_correlation_is_one_where_the_nearer_is_the_better():
    near = [{"place": p, "psnr": (30 - figure1.distances(p, GRID) ** 3).tolist()} for p in GRID]
    far = [{"place": p, "psnr": (30 + figure1.distances(p, GRID)).tolist()} for p in GRID]
    same = [{"place": GRID[0], "psnr": [30.0] * 4}]
    found = [figure1.rank_correlation(tests, GRID) for tests in (near, far, same)]
    assert found == pytest.approx([1, -1, 0])


def test_the_plane_keeps_what_lies_in_a_plane():
    gen = common.generator(0)
    flat = torch.randn(20, 2, generator=gen).double() * torch.tensor([3.0, 1.0])
    turned = torch.linalg.qr(torch.randn(30, 30, generator=gen).double())[0][:, :2]
    points, shares = figure1.plane(flat @ turned.T + 7)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(flat, flat))
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]
    torch.testing.assert_close(figure1.plane(flat @ turned.T - 5)[0], points)


def test_nearness_is_one_for_what_is_as_near_as_real_ones_are():
    codes = torch.tensor([[0.0], [2.0], [4.0], [6.0], [6.0], [-5.0]]).double()
    labels = ["real A", "real A", "real B", "near", "same", "far"]
    codes[4] = 4.0
    assert figure1.nearness(labels, codes) == {"near": 1.0, "same": 0.0, "far": 2.5}
    assert figure1.nearness(labels[2:], codes[2:]) == {}  # one real image has no neighbour


# ---- the table and the picture ------------------------------------------------------------------


def test_the_training_set_of_the_tests_own_blur_is_the_best(tmp_path):
    cfg = benchmark.Config(blurs=(0.3, 1.1), noises=(0.0,), sr_preset="smoke", sr_steps=120)
    result = figure1.train_on_grid(scenes(8), {}, tmp_path, cfg, CPU)
    assert [np.argmax(test["psnr"]) for test in result["tests"]] == [0, 1]
    assert [test["n"] for test in result["tests"]] == [2, 2]
    assert all(max(test["psnr"]) > test["bicubic"] for test in result["tests"])
    assert figure1.rank_correlation(result["tests"], result["grid"]) > 0.8
    assert all(cost["memory"] > 0 and cost["parameters"] > 0 for cost in result["costs"])
    # Held-out photos are in no training set, and all sets have the same HR images.
    contents = {
        kind: [
            {file.read_bytes() for file in folder.glob("hr/*.png")}
            for folder in (tmp_path / kind).iterdir()
        ]
        for kind in ("train", "test")
    }
    (train, train_2), (test, test_2) = contents.values()
    assert train == train_2 and test == test_2 and not train & test
    assert (len(train), len(test)) == (6, 2)


@pytest.fixture
def reading_generator(monkeypatch):
    """A generator that answers with the bicubic reduction; E_deg is the image's mean and spread."""
    monkeypatch.setenv("TORCH_HOME", "nowhere")
    seen = []

    def answer(net, hr, lr_ref, sampler, seeds):
        seen.extend(lr_ref)
        lr = pairs.reduced(hr, hr.shape[2] // 4, hr.shape[3] // 4)
        return lr[:, None], {"kept": torch.zeros(len(hr), dtype=torch.long)}

    code = lambda net, lr: torch.stack([lr.mean(), lr.std(), lr.diff().abs().mean()])[None]  # noqa: E731
    monkeypatch.setattr(generate, "load_generator", lambda *_: SimpleNamespace(t_max=500))
    monkeypatch.setattr(generate, "generate", answer)
    monkeypatch.setattr(generate, "code_of", code)
    return seen


@pytest.mark.parametrize("real", [True, False])
def test_the_figure_is_made_with_and_without_real_pairs(tmp_path, reading_generator, real):
    for i, photo in enumerate(scenes(4)):
        common.save_image(tmp_path / "photos" / f"{i}.png", photo)
    for i, photo in enumerate(scenes(3, 64)):
        common.save_image(tmp_path / f"phones/phone{i}/{i}.png", photo)
    given = (str(write_pairs(tmp_path / "RealSR")),) if real else ()
    cfg = benchmark.Config(
        table=("figure1",), pairs=given, hr=(str(tmp_path / "photos"),), out=str(tmp_path / "out"),
        lr=(str(tmp_path / "phones"),), device="cpu", blurs=(0.4, 0.9), noises=(0.0, 8.0), crop=48,
        sr_steps=2, images=4,
    )  # fmt: skip
    benchmark.main(cfg, CPU)
    out = tmp_path / "out"
    result = json.loads((out / "results.json").read_text())["figure1"]
    names = [test["name"] for test in result["tests"]]
    assert names[:2] == ["blur 0.4, noise 0", "blur 0.9, noise 0"]
    assert names[4:] == (["RealSR"] if real else [])
    assert all(len(test["psnr"]) == 4 for test in result["tests"])
    counts = {label: result["labels"].count(label) for label in result["labels"]}
    photos = 4
    cameras = ["RealSR Canon", "RealSR Nikon"] if real else ["phone0", "phone1", "phone2"]
    methods = ["bicubic", "BSRGAN", "Real-ESRGAN", "RealDGen"]
    expected = {f"real {name}": 2 if real else 1 for name in cameras}
    assert counts == expected | dict.fromkeys(methods, photos)
    assert result["nearness"]["RealDGen"] == pytest.approx(result["nearness"]["bicubic"])
    assert len(reading_generator) == photos
    text = (out / "figure1.md").read_text()
    assert "figure1.png" in text and "0.02 M parameters" in text and "| RealDGen |" in text
    assert f"{result['rank']:.3f} over all tests" in text
    with Image.open(out / "figure1.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert figure1.RED in colours and set(figure1.COLOURS[: len(counts)]) <= colours


def test_a_map_is_darkest_where_the_test_is_best_and_its_triangle_where_the_test_is():
    picture = Image.new("RGB", (200, 150), "white")
    test = {"name": "mine", "place": (1.1, 10.0), "psnr": [20.0, 24.0, 23.5, 25.0]}
    figure1.draw_map(ImageDraw.Draw(picture), (10, 40), test, GRID)
    w, h = figure1.CELL
    # A corner of each box; the highest noise is at the top.
    shades = [sum(picture.getpixel((10 + w * x + 3, 40 + h * y + 3)))
              for x, y in ((0, 1), (1, 1), (0, 0), (1, 0))]  # fmt: skip
    assert np.argsort(shades).tolist() == [3, 1, 2, 0] and shades[0] == 3 * 255
    red = np.argwhere((np.asarray(picture) == figure1.RED).all(2))
    assert (red[:, 0] < 40 + h).all() and (red[:, 1] > 10 + w).all() and len(red) > 20


def test_a_test_beyond_the_grid_is_at_its_edge():
    inside = figure1.place_in((0, 0), (0.7, 5.0), (0.3, 1.1), (0.0, 10.0))
    assert inside == figure1.CELL
    beyond = figure1.place_in((0, 0), (9.0, -3.0), (0.3, 1.1), (0.0, 10.0))
    assert beyond == figure1.place_in((0, 0), (1.1, 0.0), (0.3, 1.1), (0.0, 10.0))


def test_cameras_are_told_apart_where_they_are_few(tmp_path):
    few = pairs.find_pairs(Path(write_pairs(tmp_path / "few", ["A_1", "B_1"])))[0]
    names = [f"{letter}_1" for letter in "ABCDEFGH"]
    many = pairs.find_pairs(Path(write_pairs(tmp_path / "many", names)))[0]
    code = lambda lr: lr.mean((1, 2))[None]  # noqa: E731
    labels, codes = figure1.embed({"few": few, "many": many}, {}, code, CPU.device)
    assert labels == ["real few A", "real few B", *["real many"] * 8] and codes.shape == (10, 3)


def test_some_are_spread_evenly():
    assert figure1.some(range(10), 5) == [0, 2, 4, 6, 8]
    assert figure1.some("abc", 9) == ["a", "b", "c"]
