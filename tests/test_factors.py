"""The measures of blur, noise, sharpening and compression, and retrieval by code."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import scenes
from scipy import ndimage

import additions
import degrade
import generate
from bench import factors
from bench.inputs import Config, Inputs, resolved
from common.files import list_images
from common.photos import crop_to_multiple, load_image, resized, save_image
from common.runtime import Runtime, make_generator

ROOT = Path(generate.__file__).parent
CPU = Runtime(torch.device("cpu"))


def truth(hr, lr_ref, theta, seeds):
    return degrade.degrade(hr, theta)


@pytest.mark.parametrize(
    "factor, least", [("blur", 0.95), ("noise", 0.95), ("sharpen", 0.95), ("jpeg", 0.9)]
)
def test_the_measure_of_a_factor_rises_with_the_factor(factor, least):
    hr = scenes()
    banks = [factors.reductions(x) for x in hr]
    found = factors.follow(hr, banks, truth, factor, seed=0)
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
    given, asked = {}, []  # the parameters of each reference, by its pixels
    original = degrade.degrade

    def remember(hr, theta, generator=None):
        lr = original(hr, theta, generator)
        given.update({x.numpy().tobytes(): theta[[i]] for i, x in enumerate(lr)})
        return lr

    def answer(net, hr, lr_ref, sampler, seeds):
        asked.append(sampler)
        assert len(set(seeds)) == len(seeds) == factors.LEVELS
        if obeys:
            theta = degrade.Degradation.cat([given[x.numpy().tobytes()] for x in lr_ref])
        else:
            theta = factors.only("noise", torch.full((len(hr),), 5.0), noise=seeds[0])
            theta.seed = torch.tensor(seeds) % 2**31
        return original(hr, theta)[:, None], {"kept": torch.zeros(len(hr)).long()}

    for number, x in enumerate(scenes(4)):
        save_image(tmp_path / f"{number}.png", x)
    monkeypatch.setattr(factors, "FACTORS", {k: factors.FACTORS[k] for k in ("blur", "noise")})
    monkeypatch.setattr(degrade, "degrade", remember)
    monkeypatch.setattr(generate, "generate", answer)
    sampler = generate.Sampler("light", 7, 5, 0.5, candidates=4, grain=obeys)
    cfg = Config(**vars(sampler), hr=(str(tmp_path),), t_starts=(0, 9), crop=48)
    inputs = Inputs(resolved(cfg, CPU), CPU)
    rows = factors.table_factors("factors", inputs)()[0]["rows"]
    alone = replace(sampler, candidates=1, soften=generate.NOT_SOFTENED, remainder=0.0)
    no_diffusion = replace(alone, t_start=0, start="reconstruct")
    assert set(asked) == {no_diffusion, replace(alone, t_start=9)}
    assert [row["factor"] for row in rows[::3]] == list(factors.FACTORS)
    # Repeats where noise is drawn: with grain from T = 0, too.
    assert [len(row["rank"]) for row in rows[:3]] == [4, 8 if obeys else 4, 8]
    for row in rows:
        mean = np.mean(row["rank"])
        obeyed = obeys or row["answer"] == "truth"
        assert mean > 0.9 if obeyed else abs(mean) < 0.6, row["factor"]


def test_retrieval_finds_the_same_theta_by_theta_and_not_by_chance():
    theta, other = (torch.randn(64, 5, generator=make_generator(seed)) for seed in (1, 2))
    assert factors.retrieval(theta, theta + 1e-4) == {"top-1": 1, "top-5": 1}
    assert factors.retrieval(theta, other)["top-5"] < 0.25
    # A code that says nothing is no better than chance, although each distance is the smallest.
    assert factors.retrieval(torch.ones(64, 5), torch.ones(64, 5)) == {"top-1": 0, "top-5": 0}


def test_devices_are_sub_folders_and_give_two_files_each(tmp_path):
    photos = scenes(6, 64)
    for device, count in (("a", 3), ("b", 2), ("c", 1)):
        for number in range(count):
            save_image(tmp_path / device / f"{number}.png", photos[len(device) + number])
    save_image(tmp_path / "d/0.png", photos[0][:, :16])  # too small
    save_image(tmp_path / "d/1.png", photos[1])
    files = list_images([str(tmp_path)], "--lr")
    queries, candidates = factors.device_crops(files, 32, 9, seed=0)
    assert queries.shape == candidates.shape == (2, 3, 32, 32)
    assert not any(torch.equal(q, c) for q, c in zip(queries, candidates, strict=True))
    assert factors.device_crops(files[:3], 32, 9, seed=0) == []  # one device


def test_a_head_that_says_twice_the_sharpness_needs_softening_by_a_half(monkeypatch):
    """It is asked about LR of the recipe camera, with the remainder behind it."""
    original, made = degrade.degrade, []

    def remember(hr, theta, generator=None):
        made.append((theta, original(hr, theta, generator)))
        return made[-1][1]

    def twice(lr):
        theta, clean = made[-1]
        assert 0.5 / 255 < (lr - clean).std() < 8 / 255, "no remainder"
        return 2 * additions.effects_from(additions.effects_of(theta))[0], None, None

    nets = SimpleNamespace(e_deg=lambda lr: lr, named=twice)
    monkeypatch.setattr(degrade, "degrade", remember)
    found = factors.amplitudes_to_soften(nets, scenes(3), seed=0)
    assert found == pytest.approx([0.5] * 5) and len(made) == 3 * factors.DRAWS
    orders = torch.cat([theta.order[:, 0] for theta, _ in made])
    assert (orders == degrade.OPERATIONS.index("resize 3")).all(), "not the recipe camera"


@torch.no_grad()
def test_the_shipped_head_reads_noise_and_compression_as_they_are():
    """Of the sample photos, which it was not trained on; `grain` adds what is read here."""
    nets = generate.load_generator("", torch.device("cpu")).extractors
    noises, losses = torch.tensor([0.0, 15.0, 18.0]), torch.tensor([20.0, 40.0, 60.0])
    for file in sorted((ROOT / "data/sample/hr").iterdir()):
        hr = crop_to_multiple(load_image(file), 4, file).repeat(3, 1, 1, 1)
        lr = degrade.degrade(hr, factors.only("noise", noises))
        _, noise, quality = nets.named(nets.e_deg(lr))
        noise = noise.mean(1)  # of the bands
        assert noise[0] < generate.FAINT and quality.min() >= generate.UNCOMPRESSED, file
        np.testing.assert_allclose(255 * noise[1:], noises[1:], rtol=0.25, err_msg=str(file))
        lr = degrade.degrade(hr, factors.only("jpeg", losses))
        *_, quality = nets.named(nets.e_deg(lr))
        np.testing.assert_allclose(quality, 100 - losses, atol=20, err_msg=str(file))
