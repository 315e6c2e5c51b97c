"""bench/factors.py: the measures of blur, noise, sharpening and compression."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import scenes
from scipy import ndimage

import degrade
import generate
from bench import factors
from bench.inputs import Config, Inputs, resolved
from common.images import resized, save_image
from common.runtime import Runtime, make_generator

CPU = Runtime(torch.device("cpu"))


def true_lr(hr, lr_ref, theta, seeds):
    return degrade.degrade(hr, theta)


@pytest.mark.parametrize(
    "factor, least", [("blur", 0.95), ("noise", 0.95), ("sharpen", 0.95), ("jpeg", 0.9)]
)
def test_the_measure_of_a_factor_rises_with_the_factor(factor, least):
    hr = scenes()
    banks = [factors.reductions(x) for x in hr]
    found = factors.follow(hr, banks, true_lr, factor, seed=0)
    assert len(found["rank"]) == 3 and min(found["rank"]) > least
    np.testing.assert_allclose(found["detail"], 1)


def test_measures_have_the_units_of_the_factors():
    hr = scenes(1)[0]
    bank = factors.reductions(hr)
    plain = bank[:1]
    blurred = ndimage.gaussian_filter(hr, (0, 4, 4), mode="mirror", truncate=3)  # 1 LR pixel
    soft = resized(torch.from_numpy(blurred)[None], 48, 48)
    assert factors.blur_of(soft, bank).item() == pytest.approx(1, abs=0.02)
    noise = torch.randn(plain.shape, generator=make_generator(5))
    noisy = plain / 2 + 0.25 + 0.02 * noise  # a change of contrast is no noise
    assert factors.noise_of(noisy, bank).item() == pytest.approx(0.02 * 255, rel=0.1)
    one = torch.from_numpy(ndimage.gaussian_filter(plain, (0, 0, 1, 1), mode="mirror"))
    for amount in (-0.5, 0.0, 0.8):
        sharp = plain + amount * (plain - one)
        assert factors.sharpening_of(sharp, bank).item() == pytest.approx(amount, abs=0.02)
    steps = torch.arange(48) // 8 / 100
    assert factors.blockiness(noise / 100 + steps + steps[:, None]) > 1
    assert factors.blockiness(noise).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("obeys", [True, False])
def test_a_network_that_obeys_its_reference_scores_high_another_one_near_0(
    tmp_path, monkeypatch, obeys
):
    theta_of, samplers = {}, []  # theta_of: the parameters of each reference, by its pixels
    original = degrade.degrade

    def remember(hr, theta, generator=None):
        lr = original(hr, theta, generator)
        theta_of.update({x.numpy().tobytes(): theta[[i]] for i, x in enumerate(lr)})
        return lr

    def fake_generate(net, hr, lr_ref, sampler, seeds):
        samplers.append(sampler)
        assert len(set(seeds)) == len(seeds) == factors.LEVELS
        if obeys:
            theta = degrade.Degradation.cat([theta_of[x.numpy().tobytes()] for x in lr_ref])
        else:
            theta = factors.only("noise", torch.full((len(hr),), 5.0), noise=seeds[0])
            theta.seed = torch.tensor(seeds) % 2**31
        return original(hr, theta)[:, None], {"kept": torch.zeros(len(hr)).long()}

    for number, x in enumerate(scenes(4)):
        save_image(tmp_path / f"{number}.png", x)
    monkeypatch.chdir(tmp_path)  # no runs/ with other weights
    monkeypatch.setattr(factors, "FACTORS", {k: factors.FACTORS[k] for k in ("blur", "noise")})
    monkeypatch.setattr(degrade, "degrade", remember)
    monkeypatch.setattr(generate, "generate", fake_generate)
    sampler = generate.Sampler("light", 7, 5, 0.5, candidates=4, grain=obeys)
    cfg = Config(**vars(sampler), hr=(str(tmp_path),), t_starts=(0, 9), crop=48)
    inputs = Inputs(resolved(cfg, CPU), CPU)
    rows = factors.table_factors("factors", inputs)()[0]["rows"]
    alone = replace(sampler, candidates=1)
    no_diffusion = replace(alone, t_start=0, start="reconstruct")
    assert set(samplers) == {no_diffusion, replace(alone, t_start=9)}
    assert [row["factor"] for row in rows[::3]] == list(factors.FACTORS)
    # Repeats where noise is drawn: with grain from T = 0, too.
    assert [len(row["rank"]) for row in rows[:3]] == [4, 8 if obeys else 4, 8]
    for row in rows:
        mean = np.mean(row["rank"])
        obeyed = obeys or row["lr"] == "truth"
        assert mean > 0.9 if obeyed else abs(mean) < 0.6, row["factor"]
