"""The measures of blur, noise, sharpening and compression, and retrieval by code: both tables."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import common
import degrade
import extractors
import generate
from bench import factors

ROOT = Path(factors.__file__).parent


def scenes(batch=3, size=192):
    """Drawn photos (B, 3, size, size): shapes with edges at all scales, and a little grain."""
    images = []
    for number in range(batch):
        gen = common.generator(number)
        noise = [torch.randn(3, size, size, generator=gen).numpy() for _ in range(4)]
        shapes = [
            ndimage.gaussian_filter(x, (0, s, s)) > 0
            for x, s in zip(noise, (2, 4, 8, 24), strict=True)
        ]
        image = 0.25 + 0.12 * np.sum(shapes, axis=0) + 0.01 * noise[0]
        images.append(torch.from_numpy(image).float())
    return torch.stack(images).clamp(0, 1)


# ---- does generated LR follow its reference? ----------------------------------------------------


@pytest.mark.parametrize(
    "factor, least", [("blur", 0.95), ("noise", 0.95), ("sharpen", 0.95), ("jpeg", 0.9)]
)
def test_the_measure_of_a_factor_rises_with_the_factor(factor, least):
    hr = scenes()
    banks = [factors.reductions(x) for x in hr]
    found = factors.follow(hr, banks, factors.truth, factor, seed=0)
    assert len(found["rank"]) == 3 and min(found["rank"]) > least
    np.testing.assert_allclose(found["detail"], 1)


def test_measures_have_the_units_of_the_factors():
    hr = scenes(1)[0]
    bank = factors.reductions(hr)
    plain = bank[:1]
    blurred = ndimage.gaussian_filter(hr, (0, 4, 4), mode="mirror", truncate=3)  # 1 LR pixel
    soft = extractors.resized(torch.from_numpy(blurred)[None], 48, 48)
    assert factors.blur_of(soft, bank).item() == pytest.approx(1, abs=0.02)
    noise = torch.randn(plain.shape, generator=common.generator(5))
    noisy = plain / 2 + 0.25 + 0.02 * noise  # a change of contrast is no noise
    assert factors.noise_of(noisy, bank).item() == pytest.approx(0.02 * 255, rel=0.1)
    one = torch.from_numpy(ndimage.gaussian_filter(plain, (0, 0, 1, 1), mode="mirror"))
    for amount in (-0.5, 0.0, 0.8):
        sharp = plain + amount * (plain - one)
        assert factors.sharpening_of(sharp, bank).item() == pytest.approx(amount, abs=0.02)
    steps = torch.arange(48) // 8 / 100
    assert factors.blockiness(noise / 100 + steps + steps[:, None]) > 1
    assert factors.blockiness(noise).item() == pytest.approx(1, abs=0.1)


def drawn_folder(folder, batch=3):
    for number, image in enumerate(scenes(batch)):
        common.save_image(folder / f"{number}.png", image)
    return folder


@pytest.mark.parametrize("obeys", [True, False])
def test_a_network_that_obeys_its_reference_scores_high_another_one_near_0(monkeypatch, obeys):
    levels = {f: torch.linspace(low, high, 8) for f, (_, low, high) in factors.FACTORS.items()}
    given = {}  # the parameters of each reference, by its pixels
    asked = []
    original = degrade.degrade

    def remember(hr, theta, generator=None):
        lr = original(hr, theta, generator)
        given.update({x.numpy().tobytes(): theta[[i]] for i, x in enumerate(lr)})
        return lr

    def answer(net, hr, lr_ref, sampler, seeds):
        asked.append(sampler)
        assert len(set(seeds)) == len(seeds) == len(levels["blur"])
        if obeys:
            theta = degrade.Degradation.cat([given[x.numpy().tobytes()] for x in lr_ref])
            return original(hr, theta)[:, None], {}
        theta = factors.only("noise", torch.full((len(hr),), 5.0), noise=seeds[0])
        theta.seed = torch.tensor(seeds) % 2**31
        return original(hr, theta)[:, None], {}

    monkeypatch.setattr(degrade, "degrade", remember)
    monkeypatch.setattr(generate, "generate", answer)
    sampler = generate.Sampler("light", 7, 5, 0.5, candidates=4, grain=obeys)
    rows = factors.table_factors(scenes(4), None, (0, 9), 2, sampler, 0)["rows"]
    alone = replace(sampler, candidates=1)
    assert set(asked) == {
        replace(alone, t_start=0, start="reconstruct"),
        replace(alone, t_start=9),
    }
    assert [row["factor"] for row in rows[::3]] == list(factors.FACTORS)
    # Repeats where noise is drawn: with grain from T = 0, too.
    assert [len(row["rank"]) for row in rows[:3]] == [4, 8 if obeys else 4, 8]
    for row in rows:
        mean = np.mean(row["rank"])
        obeyed = obeys or row["answer"] == "truth"
        assert mean > 0.9 if obeyed else abs(mean) < 0.45, row["factor"]


# ---- do the extractors tell degradation and content apart? --------------------------------------


def test_retrieval_finds_the_same_theta_by_theta_and_not_by_chance():
    theta = torch.randn(64, 5, generator=common.generator(1))
    assert set(factors.retrieval(theta, theta + 1e-4).values()) == {1.0}
    assert set(factors.retrieval(theta * 9, theta * 9, standardise=True).values()) == {1.0}
    other = torch.randn(64, 5, generator=common.generator(2))
    found = factors.retrieval(theta, other)
    assert found["L2 top-1"] < 0.1 and found["cosine top-1"] < 0.1 and found["L2 top-5"] < 0.25
    # A code that says nothing is no better than chance, although each distance is the smallest.
    assert set(factors.retrieval(torch.ones(64, 5), torch.ones(64, 5)).values()) == {0.0}


def test_statistics_tell_noise_from_blur():
    hr, found = scenes(2), []
    for seed in range(8):
        theta = [
            factors.only(factor, torch.full((2,), level), noise=seed)
            for factor, level in (("blur", 1.5), ("noise", 15.0))
        ]
        lr = [factors.statistics(degrade.degrade(hr, t)) for t in theta]
        queries, candidates = (torch.stack([x[i] for x in lr]) for i in (0, 1))
        found.append(factors.retrieval(queries, candidates, standardise=True)["L2 top-1"])
    assert np.mean(found) > 0.8  # of two, chance is half


def test_devices_are_sub_folders_and_give_two_files_each(tmp_path):
    photos = scenes(6, 64)
    for device, count in (("a", 3), ("b", 2), ("c", 1)):
        for number in range(count):
            common.save_image(tmp_path / device / f"{number}.png", photos[len(device) + number])
    common.save_image(tmp_path / "d/0.png", photos[0][:, :16])  # too small
    common.save_image(tmp_path / "d/1.png", photos[1])
    files = common.list_images([str(tmp_path)], "--lr")
    queries, candidates = factors.device_crops(files, 32, 9, seed=0)
    assert queries.shape == candidates.shape == (2, 3, 32, 32)
    assert not any(torch.equal(q, c) for q, c in zip(queries, candidates, strict=True))
    assert factors.device_crops(files[:3], 32, 9, seed=0) == []  # one device


def test_both_tables_run_from_the_command_line_with_the_shipped_weights(tmp_path):
    hr = drawn_folder(tmp_path / "hr")
    for device in ("a", "b"):
        for number in range(2):
            common.save_image(tmp_path / "lr" / device / f"{number}.png", scenes(2, 48)[number])
    shipped = ROOT / "data/pretrained"
    command = [sys.executable, str(ROOT / "benchmark.py"), "--table", "factors", "extractors"]
    command += ["--hr", str(hr), "--lr", str(tmp_path / "lr"), "--images", "2", "--crop", "32"]
    command += ["--checkpoint", str(shipped / "diffusion.safetensors"), "--t-starts", "9"]
    command += ["--extractors", str(shipped / "extractors.safetensors"), "--repeats", "1"]
    command += ["--num-steps", "1", "--device", "cpu", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    rows = results["factors"]["rows"]
    assert len(rows) == 4 * 2 and all(np.isfinite(row["rank"]).all() for row in rows)
    assert {row["task"] for row in results["extractors"]["retrieval"]} == {
        "theta, realesrgan",
        "theta, camera",
        "device",
    }
    text = (tmp_path / "out/factors.md").read_text()
    assert "| blur | truth | 1.000 |" in text and "| jpeg | T=9 |" in text
    text = (tmp_path / "out/extractors.md").read_text()
    assert "| device | E_deg |" in text and "| clean, with codebook |" in text
    assert text in done.stdout and "nan" not in text


@torch.no_grad()
def test_the_shipped_head_reads_noise_and_compression_as_they_are():
    """Of the sample photos, which it was not trained on; `grain` adds what is read here."""
    shipped = ROOT / "data/pretrained/extractors.safetensors"
    nets = factors.load_extractors(str(shipped), torch.device("cpu"))
    noises, losses = torch.tensor([0.0, 15.0, 18.0]), torch.tensor([20.0, 40.0, 60.0])
    for file in sorted((ROOT / "data/sample/hr").iterdir()):
        hr = common.crop_to_multiple(common.load_image(file), 4, file).repeat(3, 1, 1, 1)
        noise, quality = nets.named(nets.e_deg(degrade.degrade(hr, factors.only("noise", noises))))
        assert 255 * noise[0] < 1 and quality.min() >= generate.UNCOMPRESSED, file
        np.testing.assert_allclose(255 * noise[1:], noises[1:], rtol=0.25, err_msg=str(file))
        _, quality = nets.named(nets.e_deg(degrade.degrade(hr, factors.only("jpeg", losses))))
        np.testing.assert_allclose(quality, 100 - losses, atol=20, err_msg=str(file))
