"""Transfer and leakage: planted cameras, leaks and noise are found, and nothing else."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import scenes as drawn

import degrade
from bench import factors, transfer
from bench.inputs import Config, Inputs, resolved
from common import UserError
from common.photos import save_image, to_uint8
from common.runtime import Runtime, make_generator

CPU = Runtime(torch.device("cpu"))
CAMERAS = {"soft": ("blur", 1.5), "grainy": ("noise", 6.0), "sharp": ("sharpen", 1.2)}


def plain(hr, lr_ref, seeds):
    return degrade.degrade(hr, degrade.bicubic(len(hr), 4))


def taken(camera, hr, seed):
    """LR of hr (B, 3, H, W) by a planted camera, with fresh noise of 1 level."""
    factor, level = CAMERAS[camera]
    lr = degrade.degrade(hr, factors.only(factor, torch.full((len(hr),), level), noise=seed))
    noise = torch.randn(lr.shape, generator=make_generator(seed))
    return (lr + noise / 255).clamp(0, 1)


@pytest.fixture(scope="module")
def planted():
    """Four scenes of each planted camera, no scene twice."""
    scenes = []
    for number, x in enumerate(drawn(12)):
        camera = list(CAMERAS)[number % 3]
        lr = to_uint8(taken(camera, x[None], number)[0]) / 255
        scenes.append(transfer.Scene(camera, number // 3 % 2, lr, lr, x))
    return scenes


def inputs_with(monkeypatch, methods, **flags):
    """Inputs of these flags, with these methods in place of all others."""
    monkeypatch.setattr(transfer, "syntheses", lambda net, sampler: methods)
    monkeypatch.setattr("generate.load_generator", lambda *_: SimpleNamespace(t_max=500))
    return Inputs(resolved(Config(crop=48, **flags), CPU), CPU)


def test_hr_and_lr_keep_the_same_middle_and_small_cameras_are_left_out(
    tmp_path, monkeypatch, capsys
):
    sizes = {"a_0": (37, 41), "a_1": (48, 48), "a_2": (40, 33), "a_3": (37, 41)}
    sizes |= {"a_tiny": (32, 35), "b_0": (64, 64)}
    for number, (name, (h, w)) in enumerate(sizes.items()):
        lr = torch.rand(3, h, w, generator=make_generator(number))
        save_image(tmp_path / f"set/LR/{name}.png", lr)
        hr = F.interpolate(lr[None], scale_factor=4)[0]
        save_image(tmp_path / f"set/HR/{name}.png", hr)
    inputs = inputs_with(monkeypatch, {}, pairs=(str(tmp_path / "set"),))
    inputs.cfg = resolved(Config(crop=32, pairs=inputs.cfg.pairs), CPU)
    scenes, left_out = transfer.scenes_of("set", inputs)
    assert [scene.half for scene in scenes] == [0, 1, 0, 1, 0] and left_out == ["set b (1)"]
    for scene in scenes:
        assert scene.hr.shape == (3, 128, 128)
        torch.testing.assert_close(F.avg_pool2d(scene.hr, 4), scene.middle)
    with pytest.raises(UserError, match="transfer needs a set with two cameras"):
        transfer.table_transfer("transfer", inputs)


def test_contents_are_drawn_evenly_and_references_are_other_scenes_of_their_half(planted):
    chosen = transfer.contents_of(planted, 6, seed=1)
    assert len({(planted[i].camera, planted[i].half) for i in chosen}) == 6
    assert sorted(transfer.contents_of(planted, 99, seed=1)) == list(range(12))
    for content, scene in enumerate(planted):
        chosen = transfer.references(planted, content, [*CAMERAS], seed=0)
        assert [planted[r].camera for r in chosen] == [*CAMERAS] and content not in chosen
        assert {planted[r].half for r in chosen} == {scene.half}


def test_no_classifier_judges_a_scene_of_the_half_it_was_trained_on(planted, monkeypatch):
    halves = {scene.lr.numpy().tobytes(): scene.half for scene in planted}
    monkeypatch.setattr(
        transfer,
        "features",
        lambda x: torch.tensor([float(halves[v.numpy().tobytes()]) for v in x]),
    )
    monkeypatch.setattr(transfer, "windows", lambda lr, side, gen: lr[None])
    trained = []

    def discriminant(classes):
        half = torch.cat(classes).unique().item()
        trained.append(half)

        def judge(x):
            assert (x == 1 - half).all()
            return torch.zeros(x.shape[:1], dtype=torch.long) if x.ndim else torch.tensor(0)

        return judge

    monkeypatch.setattr(transfer, "discriminant", discriminant)
    made = {"method": torch.tensor([[float(s.half)] * 3 for s in planted])}
    found = transfer.judge(planted, range(12), made, 32, make_generator(0))
    assert trained == [1, 0] and found["method"] == pytest.approx(1 / 3)  # blind: chance


def test_planted_cameras_are_told_apart_and_who_ignores_the_reference_gets_chance(
    planted, monkeypatch
):
    camera_by_pixels = {scene.lr.numpy().tobytes(): scene.camera for scene in planted}

    def obeys(hr, lr_ref, seeds):
        cameras = [camera_by_pixels[x.numpy().tobytes()] for x in lr_ref]
        return torch.cat([taken(c, x[None], 99) for c, x in zip(cameras, hr, strict=True)])

    methods = {"bicubic": plain, "obeys": obeys,
               "one camera": lambda hr, lr_ref, seeds: taken("soft", hr, seeds[0])}  # fmt: skip
    shares = transfer.transfer(planted, inputs_with(monkeypatch, methods, images=6))
    assert np.mean(shares["real LR"]) > 0.9 and np.mean(shares["obeys"]) > 0.9
    for name in ("bicubic", "one camera"):  # of each classifier, not only on average
        np.testing.assert_allclose(shares[name], [1 / 3] * transfer.CLASSIFIERS)
    text = transfer.text_of_transfer({"set": shares}, {"set": planted})
    assert "| bicubic | 33.3% ± 0.0 |" in text and "| chance | 33.3% |" in text


def test_features_see_noise_and_blur_and_hardly_the_contrast_of_the_scene():
    hr = drawn(4)
    at_once = {camera: transfer.features(taken(camera, hr, 5))[:, :-3] for camera in CAMERAS}
    low = transfer.features(0.3 + 0.6 * (plain(hr, [], []) - 0.3))[:, :-3]
    full = transfer.features(plain(hr, [], []))[:, :-3]
    apart = (at_once["soft"] - at_once["grainy"]).norm(dim=1).mean()
    assert (low - full).norm(dim=1).mean() < apart / 5


def test_a_planted_share_is_measured_and_found_and_nothing_else_is():
    gen = make_generator(3)
    ref = [torch.randn(6, 500, generator=gen).double() for _ in range(2)]
    noise = [0.3 * torch.randn(4, 6, 500, generator=gen).double() for _ in range(2)]
    content = torch.randn(4, 1, 500, generator=gen).double()
    for planted_share in (0.0, 0.02, 0.1):
        made = [content + n + planted_share * r for n, r in zip(noise, ref, strict=True)]
        share, z = transfer.leak(made, ref)
        assert share == pytest.approx(planted_share, abs=0.008)
        assert z > 3 if planted_share else abs(z) < 3
    assert transfer.leak([content.expand(-1, 6, -1) for _ in ref], ref) == (0, 0)


def test_z_is_in_standard_deviations_of_all_permutations():
    gen = make_generator(4)
    ref = torch.randn(4, 9, generator=gen).double()
    made = torch.randn(3, 4, 9, generator=gen).double()
    orders = [list(order) for order in itertools.permutations(range(4))]
    shares = [transfer.leak([made], [ref[order]])[0] for order in orders]
    z = (shares[0] - np.mean(shares)) / np.std(shares)
    assert transfer.leak([made], [ref])[1] == pytest.approx(z)
    assert np.mean(shares) == pytest.approx(0)


def test_leaks_and_noise_have_their_size(planted, monkeypatch):
    def leaks(hr, lr_ref, seeds):
        return torch.lerp(plain(hr, lr_ref, seeds), torch.stack([*lr_ref]), 0.04)

    def noisy(hr, lr_ref, seeds):
        noise = [torch.randn(3, 48, 48, generator=make_generator(s)) for s in seeds]
        return plain(hr, lr_ref, seeds) + 5 / 255 * torch.stack(noise)

    methods = {"bicubic": plain, "noisy": noisy, "leaks": leaks}
    inputs = inputs_with(monkeypatch, methods, images=8)
    rows = transfer.leakage(planted, inputs)
    assert rows["bicubic"] == {"share": 0, "z": 0, "references": 0, "noises": 0}
    assert rows["noisy"]["noises"] == pytest.approx(5, abs=0.3)
    assert rows["noisy"]["references"] == pytest.approx(0, abs=1e-9)  # the noise is the same
    assert rows["leaks"]["share"] == pytest.approx(0.04, abs=0.01) and rows["leaks"]["noises"] == 0
    assert rows["leaks"]["references"] > 0.5
    blended = rows["leaks, 1% of the reference blended in"]["share"]
    assert blended == pytest.approx(0.01 + 0.99 * rows["leaks"]["share"], abs=0.003)
