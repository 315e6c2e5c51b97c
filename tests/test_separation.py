"""bench/separation.py: retrieval, what the head reads; tools/calibrate.py."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import scenes

import additions
import degrade
import generate
from bench import factors, separation
from common.files import list_images
from common.images import crop_to_multiple, load_image, save_image
from common.runtime import make_generator
from tools import calibrate

ROOT = Path(generate.__file__).parent


def test_retrieval_finds_equal_rows_and_other_rows_only_by_chance():
    rows, others = (torch.randn(64, 5, generator=make_generator(seed)) for seed in (1, 2))
    assert separation.retrieval(rows, rows + 1e-4) == {"top-1": 1, "top-5": 1}
    assert separation.retrieval(rows, others)["top-5"] < 0.25
    # An F_deg that is always the same is no better than chance, although each distance is 0.
    assert separation.retrieval(torch.ones(64, 5), torch.ones(64, 5)) == {"top-1": 0, "top-5": 0}


def test_devices_are_sub_folders_and_give_two_files_each(tmp_path):
    photos = scenes(6, 64)
    for device, count in (("a", 3), ("b", 2), ("c", 1)):
        for number in range(count):
            save_image(tmp_path / device / f"{number}.png", photos[len(device) + number])
    save_image(tmp_path / "d/0.png", photos[0][:, :16])  # too small
    save_image(tmp_path / "d/1.png", photos[1])
    files = list_images([str(tmp_path)], "--lr")
    queries, candidates = separation.device_crops(files, 32, 9, seed=0)
    assert queries.shape == candidates.shape == (2, 3, 32, 32)
    assert not any(torch.equal(q, c) for q, c in zip(queries, candidates, strict=True))
    assert separation.device_crops(files[:3], 32, 9, seed=0) == []  # one device


def test_a_row_is_compared_with_its_own_clean_row_and_the_nearest_other_one():
    clean = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 8.0]])
    degraded = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])  # the last is nearest to row 0
    found = separation.nearest_scene(degraded, clean)
    assert found == pytest.approx({"top-1": 2 / 3, "ratio": 1 / 3})


def test_the_error_of_the_head_stands_beside_the_spread_of_the_truth():
    theta = degrade.sample_degradation(6, generator=make_generator(0))
    true = additions.effects_of(theta)
    mean = true.nanmean(0).expand_as(true)
    lr = torch.rand(6, 3, 8, 8, generator=make_generator(1))
    for read, error in ((true + 0.25, [0.25] * 9), (mean, None)):
        nets = SimpleNamespace(e_deg=lambda x: x.flatten(1), head=lambda degradation, x=read: x)
        found = separation.head_errors(nets, lr, theta)
        spread = [float(np.nanstd(column)) for column in true.T.numpy()]
        assert found["spread"] == pytest.approx(spread, abs=1e-5)
        assert found["error"] == pytest.approx(error or spread, abs=1e-5)


@torch.no_grad()
def test_the_shipped_head_reads_noise_and_compression_as_they_are():
    """In LR of the sample photos, which it was not trained on; --grain adds what it reads."""
    net = generate.load_generator("", torch.device("cpu"))
    nets, calibration = net.extractors, net.calibration
    noises, losses = torch.tensor([0.0, 15.0, 18.0]), torch.tensor([20.0, 40.0, 60.0])
    for file in sorted((ROOT / "data/sample/hr").iterdir()):
        hr = crop_to_multiple(load_image(file), 4, file).repeat(3, 1, 1, 1)
        lr = degrade.degrade(hr, factors.only("noise", noises))
        read = nets.effects(nets.e_deg(lr))
        noise = 255 * read.noise_std.mean(1)  # of the bands
        assert noise[0] < calibration.faint, file
        assert read.quality.min() >= calibration.uncompressed, file
        np.testing.assert_allclose(noise[1:], noises[1:], rtol=0.25, err_msg=str(file))
        lr = degrade.degrade(hr, factors.only("jpeg", losses))
        quality = nets.effects(nets.e_deg(lr)).quality
        np.testing.assert_allclose(quality, 100 - losses, atol=20, err_msg=str(file))


# ---- what tools/calibrate.py measures on the head -----------------------------------------------


def test_a_head_that_reads_twice_the_sharpness_is_calibrated_to_soften_by_a_half(monkeypatch):
    """It reads LR of the recipe camera: with noise by detail, and then without noise and JPEG."""
    original, drawn, photos = calibrate.degrade, [], 3
    clean = []  # what it reads in clean LR of each photo: noise in levels of 255, quality

    def remember(hr, theta, generator=None):
        drawn.append((theta, original(hr, theta, generator)))
        return drawn[-1][1]

    def effects(lr):
        theta, lr_of_d = drawn[-1]
        true = additions.effects_from(additions.effects_of(theta))
        remainder = 255 * (lr - lr_of_d).std()
        if remainder == 0:
            clean.append((1.0 + len(clean), 90 - 10 * len(clean)))
            kinds = {degrade.OPERATIONS[k].split(" ")[0] for k in theta.order[0].tolist()}
            assert kinds <= {"", "blur", "resize"}, "not clean"
            noise, quality = clean[-1]
            return additions.Effects(true.transfer, torch.full((1, 3), noise / 255),
                                     torch.tensor([quality]))  # fmt: skip
        assert 0.5 < remainder < 8
        return true._replace(transfer=2 * true.transfer)

    nets = SimpleNamespace(e_deg=lambda lr: lr, effects=effects)
    monkeypatch.setattr(calibrate, "degrade", remember)
    found = calibrate.calibrate(nets, [*scenes(photos)], seed=0)
    assert found.soften == pytest.approx([0.5] * 5)
    assert clean == [(1.0, 90), (2.0, 80), (3.0, 70)]
    assert (found.faint, found.uncompressed) == (2.9, 71)  # of 95 % of them
    assert len(drawn) == photos * (calibrate.DRAWS + 1)
    orders = torch.cat([theta.order[:, 0] for theta, _ in drawn])
    assert (orders == degrade.OPERATIONS.index("resize 3")).all(), "not the recipe camera"
