"""Transfer, leakage and diversity: planted cameras, leaks and noise are found, and nothing else."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_factors import scenes as drawn

import common
import degrade
from bench import factors, transfer

ROOT = Path(transfer.__file__).parent
CPU = torch.device("cpu")
CAMERAS = {"soft": ("blur", 1.5), "grainy": ("noise", 6.0), "sharp": ("sharpen", 1.2)}


def plain(hr, lr_ref, seeds):
    return degrade.degrade(hr, degrade.bicubic(len(hr), 4))


def taken(camera, hr, seed):
    """LR of hr (B, 3, H, W) by a planted camera, with fresh noise of 1 level."""
    factor, level = CAMERAS[camera]
    lr = degrade.degrade(hr, factors.only(factor, torch.full((len(hr),), level), noise=seed))
    noise = torch.randn(lr.shape, generator=common.generator(seed))
    return (lr + noise / 255).clamp(0, 1)


@pytest.fixture(scope="module")
def planted():
    """Four scenes of each planted camera, no scene twice."""
    hr = drawn(12)
    pairs = []
    for number, x in enumerate(hr):
        camera = list(CAMERAS)[number % 3]
        lr = common.to_uint8(taken(camera, x[None], number)[0]) / 255
        pairs.append(("set", camera, f"{camera}_{number}", x, lr))
    return transfer.gather(pairs, 48)[0]


# ---- the scenes ---------------------------------------------------------------------------------


def test_hr_and_lr_keep_the_same_middle_and_small_cameras_are_left_out(capsys):
    pairs = []
    for number in range(4):
        lr = torch.rand(3, 37, 41, generator=common.generator(number))
        hr = F.interpolate(lr[None], scale_factor=4)[0]
        pairs.append(("set", "a", str(number), hr, lr))
    small = torch.zeros(3, 16, 16)
    few = [("set", "b", str(i), torch.zeros(3, 128, 128), torch.zeros(3, 32, 32)) for i in range(3)]
    scenes, out = transfer.gather([*pairs, *few, ("set", "a", "tiny", small, small)], 32)
    assert [scene.half for scene in scenes] == [0, 1, 0, 1] and out == ["set b (3)"]
    for scene in scenes:
        assert scene.hr.shape == (3, 128, 128)
        torch.testing.assert_close(F.avg_pool2d(scene.hr, 4), scene.middle)
    assert "skipped: set tiny" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="no camera has 4 scenes"):
        transfer.gather(few, 32)


def test_contents_are_drawn_evenly(planted):
    chosen = transfer.contents_of(planted, 6, seed=1)
    assert len({(planted[i].camera, planted[i].half) for i in chosen}) == 6
    assert sorted(transfer.contents_of(planted, 99, seed=1)) == list(range(12))


def test_references_are_other_scenes_of_the_half_of_the_content(planted):
    sources = [("set", camera) for camera in CAMERAS]
    for content, scene in enumerate(planted):
        chosen = transfer.references(planted, content, sources, seed=0)
        assert [planted[r].source for r in chosen] == sources and content not in chosen
        assert {planted[r].half for r in chosen} == {scene.half}


# ---- transfer -----------------------------------------------------------------------------------


def test_no_classifier_judges_a_scene_of_the_half_it_was_trained_on(planted, monkeypatch):
    sources = [("set", camera) for camera in CAMERAS]
    trained = []

    def train(scenes, seen, own, half, gen):
        def judge(x):
            assert (x == 1 - half).all()
            return torch.zeros(x.shape[:-1], dtype=torch.long)

        trained.append(half)
        return judge

    halves = torch.tensor([[float(scene.half)] for scene in planted])
    real_train = transfer.train
    monkeypatch.setattr(transfer, "train", train)
    made = {"method": halves[:, None].expand(-1, 3, -1)}
    found = transfer.judge(planted, sources, [], halves, range(12), made, common.generator(0))
    assert trained == [1, 0]
    assert found["method"] == (pytest.approx(1 / 3), pytest.approx(1 / 3), 36)  # blind: chance
    used = []
    monkeypatch.setattr(transfer, "discriminant", used.extend)
    real_train(planted, list(halves), sources, 1, common.generator(0))
    assert len(used) == 3 and torch.cat(used).unique().tolist() == [1]


def test_planted_cameras_are_told_apart_and_who_ignores_the_reference_gets_chance(planted):
    camera_by_pixels = {scene.lr.numpy().tobytes(): scene.camera for scene in planted}

    def obeys(hr, lr_ref, seeds):
        cameras = [camera_by_pixels[x.numpy().tobytes()] for x in lr_ref]
        return torch.cat([taken(c, x[None], 99) for c, x in zip(cameras, hr, strict=True)])

    def one_camera(hr, lr_ref, seeds):
        return taken("soft", hr, seeds[0])

    compared = {"bicubic": plain, "obeys": obeys, "one camera": one_camera}
    result = transfer.table_transfer(planted, compared, 6, 0, CPU)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["obeys"]["n"] == 18 and rows["real LR"]["n"] == 12
    assert np.mean(rows["real LR"]["share"]) > 0.9
    assert np.mean(rows["obeys"]["share"]) > 0.9
    for name in ("bicubic", "one camera"):  # of each classifier, not only on average
        np.testing.assert_allclose(rows[name]["share"], 1 / 3)
        np.testing.assert_allclose(rows[name]["content"], 1 / 3, atol=0.35)
    np.testing.assert_allclose(rows["obeys"]["content"], 1 / 3, atol=0.12)
    text = transfer.markdown_transfer(result)
    assert "| set | bicubic | 33.3% ± 0.0 |" in text and "nan" not in text


def test_features_see_noise_and_blur_and_hardly_the_contrast_of_the_scene(planted):
    hr = drawn(4)
    at_once = {camera: transfer.features(taken(camera, hr, 5))[:, :-3] for camera in CAMERAS}
    low = transfer.features(0.3 + 0.6 * (plain(hr, [], []) - 0.3))[:, :-3]
    full = transfer.features(plain(hr, [], []))[:, :-3]
    apart = (at_once["soft"] - at_once["grainy"]).norm(dim=1).mean()
    assert (low - full).norm(dim=1).mean() < apart / 5


# ---- leakage ------------------------------------------------------------------------------------


def test_a_planted_share_is_measured_and_found_and_nothing_else_is():
    gen = common.generator(3)
    ref = [torch.randn(6, 500, generator=gen).double() for _ in range(2)]
    noise = [0.3 * torch.randn(4, 6, 500, generator=gen).double() for _ in range(2)]
    content = torch.randn(4, 1, 500, generator=gen).double()
    for share in (0.0, 0.02, 0.1):
        made = [content + n + share * r for n, r in zip(noise, ref, strict=True)]
        found = transfer.leak(made, ref)
        assert found["share"] == pytest.approx(share, abs=0.008)
        assert found["z"] > 3 if share else abs(found["z"]) < 3
    same = [content.expand(-1, 6, -1) for _ in ref]
    assert transfer.leak(same, ref) == {"share": 0, "z": 0}


def test_z_is_in_standard_deviations_of_all_permutations():
    gen = common.generator(4)
    ref, made = torch.randn(4, 9, generator=gen), torch.randn(3, 4, 9, generator=gen)
    orders = [list(order) for order in itertools.permutations(range(4))]
    shares = [transfer.leak([made.double()], [ref[o].double()])["share"] for o in orders]
    z = (shares[0] - np.mean(shares)) / np.std(shares)
    assert transfer.leak([made.double()], [ref.double()])["z"] == pytest.approx(z)
    assert np.mean(shares) == pytest.approx(0)


def test_a_method_that_copies_some_of_its_reference_is_found_out(planted):
    def leaks(hr, lr_ref, seeds):
        return torch.lerp(plain(hr, lr_ref, seeds), torch.stack(lr_ref), 0.04)

    def draws(hr, lr_ref, seeds):
        lr = plain(hr, lr_ref, seeds)
        noise = [torch.randn(lr.shape[1:], generator=common.generator(s)) for s in seeds]
        assert len(set(seeds)) == len(seeds)
        return lr + 0.03 * torch.stack(noise)

    compared = {"bicubic": plain, "Real-ESRGAN": draws, "RealDGen": leaks}
    one = [transfer.Scene("set", "one", s.lr, s.middle, s.hr, s.half) for s in planted]
    result = transfer.table_leakage(one, compared, 3, 6, 0, CPU)
    assert result["sets"] == {"set": [3, [6]]}
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["bicubic"]["detail"] == rows["bicubic"]["colour"] == {"share": 0, "z": 0}
    assert abs(rows["Real-ESRGAN"]["detail"]["z"]) < 3
    assert rows["RealDGen"]["detail"]["share"] == pytest.approx(0.04, abs=0.01)
    assert rows["RealDGen"]["colour"]["share"] == pytest.approx(0.04, abs=0.01)
    assert rows["RealDGen"]["detail"]["z"] > 3
    more = rows["RealDGen, 5% of the reference blended in"]["detail"]["share"]
    assert more == pytest.approx(0.05 + 0.95 * 0.04, abs=0.01)
    assert "| set | bicubic | 0.00% | 0.0 |" in transfer.markdown_leakage(result)


# ---- diversity ----------------------------------------------------------------------------------


def test_bicubic_has_no_diversity_noise_has_its_own_and_a_reference_only_when_looked_at(
    planted, monkeypatch
):
    monkeypatch.setattr(transfer, "distance", lambda x, y: (x - y).abs().mean((1, 2, 3)))

    def noisy(hr, lr_ref, seeds):
        noise = [torch.randn(3, 48, 48, generator=common.generator(s)) for s in seeds]
        return plain(hr, lr_ref, seeds) + 5 / 255 * torch.stack(noise)

    def brightness(hr, lr_ref, seeds):  # that of the reference
        shift = torch.stack([x.mean() for x in lr_ref])
        return plain(hr, lr_ref, seeds) * 0.2 + shift[:, None, None, None] / 2

    compared = {"bicubic": plain, "noisy": noisy, "looks": brightness}
    result = transfer.table_diversity(planted, compared, 2, 8, 0, CPU)
    rows = {row["method"]: row for row in result["rows"]}
    for kind in transfer.KINDS:
        assert rows["bicubic"][f"{kind} std"] == rows["bicubic"][f"{kind} LPIPS"] == [0, 0]
        few = {"noise": 0, "references": 1, "cameras": 1}[kind]
        assert (min(rows["looks"][f"{kind} std"]) > 0.1) == bool(few)
        assert (min(rows["noisy"][f"{kind} std"]) > 0.1) == (kind == "noise")
    np.testing.assert_allclose(rows["noisy"]["noise std"], 5, atol=0.6)
    np.testing.assert_allclose(rows["noisy"]["measured"], 5, rtol=0.2)
    assert rows["noisy"]["nearest"] <= rows["noisy"]["to real"]
    text = transfer.markdown_diversity(result)
    assert "| set | bicubic | 0.00 | 0.000 | 0.00 | 0.000 | 0.00 | 0.000 |" in text


def test_one_sample_has_no_spread():
    assert all(map(math.isnan, transfer.spread(torch.rand(1, 3, 32, 32)).values()))


# ---- the command --------------------------------------------------------------------------------


def run(folder, *arguments):
    command = [sys.executable, str(ROOT / "benchmark.py"), "--device", "cpu", *arguments]
    command += ["--checkpoint", str(ROOT / "data/pretrained/diffusion.safetensors")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of two cameras with four scenes and of one with a single scene."""
    folder = tmp_path_factory.mktemp("pairs")
    for number, x in enumerate(drawn(9, 128)):
        camera = ["soft", "grainy"][number % 2] if number < 8 else "sharp"
        common.save_image(folder / f"set/HR/{camera}_{number}.png", x)
        lr = taken(camera, x[None], number)[0]
        common.save_image(folder / f"set/LR/{camera}_{number}.png", lr)
    return folder


def test_the_tables_run_from_the_command_line_with_the_shipped_weights(folder):
    small = "--images 2 --crop 32 --samples 2 --num-steps 1 --candidates 1 --out out".split()
    done = run(folder, "--table", *transfer.TABLES, "--pairs", "set", *small)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "out/results.json").read_text())
    rows = {row["method"]: row for row in results["transfer"]["rows"]}
    assert rows["bicubic"]["share"] == [0.5] * transfer.CLASSIFIERS and rows["RealDGen"]["n"] == 4
    assert results["transfer"]["left out"] == ["set sharp (1)"]
    for table in transfer.TABLES:
        text = (folder / f"out/{table}.md").read_text()
        assert text in done.stdout and "left out: set sharp (1)." in text and "nan" not in text


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--samples", "1"), "--samples 1: must be at least 2."),
        (("--crop", "64"), "--pairs: no camera has 4 scenes, which this table needs."),
        (("--pairs",), "expected at least one argument"),
    ],
)
def test_bad_input_is_one_clear_sentence(folder, arguments, sentence):
    done = run(folder, "--table", "leakage", "--pairs", "set", *arguments)
    assert done.returncode == 2 and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_transfer_needs_two_cameras(planted):
    one = [scene for scene in planted if scene.camera == "soft"]
    with pytest.raises(common.UserError, match="transfer needs two cameras"):
        transfer.table_transfer(one, {"bicubic": plain}, 2, 0, CPU)
