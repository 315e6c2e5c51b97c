"""bench/remainder.py: planted remainders are measured; how much a condition shows of them."""

import numpy as np
import pytest
import torch
from drawn import bicubic_for_realdgen, inputs_of, scenes

from bench import remainder
from bench.kernels import bicubic_kernel, reduced_by
from common.images import save_image
from tests.tiny import normal


def test_a_filtered_image_has_no_remainder_and_planted_noise_is_found():
    hr = scenes(1, 512)[0]
    linear = reduced_by(bicubic_kernel(), hr)
    noise = 3 / 255 * normal(3, 128, 128)
    none, found = remainder.remainders(hr, torch.stack([linear, linear + noise]))
    inner = (..., slice(8, -8), slice(8, -8))
    assert 255 * none[inner].std() < 0.3
    assert 255 * (found - noise)[inner].std() < 0.5


def test_the_measures_of_white_noise_are_its_size_everywhere():
    """std at all levels of detail, a flat spectrum, and channels as they were mixed."""
    gray, colour = normal(1, 256, 256), normal(3, 256, 256)
    noise = 4 / 255 * (0.6**0.5 * gray + 0.4**0.5 * colour)
    steps = torch.linspace(0, 0.15, 256).expand(3, 256, 256) * normal(3, 256, 256, seed=1)
    found = remainder.measures(noise, 0.5 + steps)
    white = (1 - 1 / 25) ** 0.5  # what the mean of 25 pixels leaves
    np.testing.assert_allclose(found["detail"][1:], [4 * white] * 4, rtol=0.06)
    np.testing.assert_allclose(found["spectrum"], [4] * 4, rtol=0.12)
    assert found["channels"] == pytest.approx([0.6], abs=0.03)
    assert found["std"] == pytest.approx([4], rel=0.05)


def test_the_divergence_of_two_gaussians_is_that_of_the_closed_form():
    a, b = 10 / 255 * normal(200_000), 14 / 255 * normal(200_000, seed=1)
    closed = np.log(14 / 10) + 10**2 / (2 * 14**2) - 1 / 2
    assert remainder.histogram_kld(a, b) == pytest.approx(closed, abs=0.01)
    assert remainder.histogram_kld(a, 10 / 255 * normal(200_000, seed=2)) < 0.002


@pytest.fixture
def fewer_steps(monkeypatch):
    monkeypatch.setattr(remainder, "PROBE_STEPS", 60)


def test_other_lr_is_told_apart_by_its_noise_and_equal_lr_is_not(fewer_steps):
    real = scenes(8, 64)
    noise = 8 / 255 * normal(8, 3, 64, 64)
    assert remainder.told_apart(real, real + noise, 0) > 0.9
    assert remainder.told_apart(real, real, 0) == pytest.approx(0.5, abs=0.01)


def test_a_condition_that_holds_the_remainder_shows_it_and_another_one_does_not(fewer_steps):
    left, linear = 5 / 255 * normal(12, 3, 128, 128), 20 / 255 * normal(12, 3, 128, 128, seed=2)
    shows = torch.cat([normal(12, 2, 128, 128), 3 * left - 1], dim=1)
    assert remainder.predicted_share(shows, linear, left, 0) > 0.9
    assert remainder.predicted_share(linear + left, linear, left, 0) > 0.7  # the LR itself
    half = left + 5 / 255 * normal(12, 3, 128, 128, seed=1)  # noise of the same size: R^2 is 1/2
    assert 0.35 < remainder.predicted_share(half, linear, left, 0) < 0.52
    assert abs(remainder.predicted_share(normal(12, 5, 128, 128), linear, left, 0)) < 0.05


def test_the_table_has_a_row_for_each_kind_of_lr(tmp_path, monkeypatch):
    for number, hr in enumerate(scenes(6, 256)):
        camera = "ab"[number // 4]  # of the first five, one is alone
        lr = reduced_by(bicubic_kernel(), hr) + 4 / 255 * normal(3, 64, 64, seed=number)
        save_image(tmp_path / f"set/HR/{camera}_{number}.png", hr)
        save_image(tmp_path / f"set/LR/{camera}_{number}.png", lr)
    bicubic_for_realdgen(monkeypatch)
    monkeypatch.setattr(remainder, "told_apart", lambda real, other, seed: 0.5)
    inputs = inputs_of(pairs=(str(tmp_path / "set"),), table=("remainder",), images=5)
    values, text = remainder.table_remainder("remainder", inputs)()
    rows = values["set"]["rows"]
    assert values["set"]["n"] == 4
    assert rows["real LR"]["std"][0] == pytest.approx(4, rel=0.1)
    assert rows["real LR"]["kld"] == 0 and rows["kernel"]["std"][0] < 0.5
    for name in ("kernel, white noise", "kernel, remainder of another scene"):
        assert rows[name]["std"][0] == pytest.approx(rows["real LR"]["std"][0], rel=0.1)
        assert rows[name]["kld"] < 0.05 < rows["RealDGen"]["kld"]
    assert values["set"]["between seeds"] == 0 and all(f"| {name} |" in text for name in rows)
