"""bench/leakage.py: planted leaks and noise are found, and nothing else."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import fake_net, inputs_of
from drawn import scenes as drawn

import degrade
from bench import factors, leakage
from common.images import save_image, to_uint8
from common.runtime import make_generator

CAMERAS = {"soft": ("blur", 1.5), "grainy": ("noise", 6.0), "sharp": ("sharpen", 1.2)}


def plain(hr, lr_ref, seeds):
    return degrade.degrade(hr, degrade.bicubic_reduction(len(hr), 4))


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
        scenes.append(leakage.Scene(camera, number // 3 % 2, lr, x))
    return scenes


def inputs_with(monkeypatch, methods, crop=48, **flags):
    """Inputs of these flags, with these methods in place of all others."""
    monkeypatch.setattr(leakage, "syntheses", lambda net, sampler: methods)
    monkeypatch.setattr("generate.load_generator", lambda *_: fake_net())
    return inputs_of(crop=crop, **flags)


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
    inputs = inputs_with(monkeypatch, {}, crop=32, pairs=(str(tmp_path / "set"),))
    scenes, left_out = leakage.scenes_of("set", inputs)
    assert [scene.half for scene in scenes] == [0, 1, 0, 1, 0] and left_out == ["set b (1)"]
    for scene in scenes:
        assert scene.hr.shape == (3, 128, 128)
        torch.testing.assert_close(F.avg_pool2d(scene.hr, 4), scene.lr)


def test_contents_are_drawn_evenly(planted):
    chosen = leakage.contents_of(planted, 6, seed=1)
    assert len({(planted[i].camera, planted[i].half) for i in chosen}) == 6
    assert sorted(leakage.contents_of(planted, 99, seed=1)) == list(range(12))


def test_no_content_is_of_the_half_that_gives_references(planted, monkeypatch):
    half_of = {scene.lr.numpy().tobytes(): scene.half for scene in planted}
    half_of |= {scene.hr.numpy().tobytes(): scene.half for scene in planted}
    seen = set()

    def remember(hr, lr_ref, seeds):
        seen.add(
            (half_of[hr[0].numpy().tobytes()], *(half_of[x.numpy().tobytes()] for x in lr_ref))
        )
        return plain(hr, lr_ref, seeds)

    leakage.leakage(planted, inputs_with(monkeypatch, {"remember": remember}, images=8))
    assert {(halves[0], *set(halves[1:])) for halves in seen} == {(1, 0)}


def test_a_planted_share_is_measured_and_found_and_nothing_else_is():
    gen = make_generator(3)
    ref = [torch.randn(6, 500, generator=gen).double() for _ in range(2)]
    noise = [0.3 * torch.randn(4, 6, 500, generator=gen).double() for _ in range(2)]
    content = torch.randn(4, 1, 500, generator=gen).double()
    for planted_share in (0.0, 0.02, 0.1):
        lr = [content + n + planted_share * r for n, r in zip(noise, ref, strict=True)]
        share, z = leakage.leak(lr, ref)
        assert share == pytest.approx(planted_share, abs=0.008)
        assert z > 3 if planted_share else abs(z) < 3
    assert leakage.leak([content.expand(-1, 6, -1) for _ in ref], ref) == (0, 0)


def test_z_is_in_standard_deviations_of_all_permutations():
    gen = make_generator(4)
    ref = torch.randn(4, 9, generator=gen).double()
    lr = torch.randn(3, 4, 9, generator=gen).double()
    orders = [list(order) for order in itertools.permutations(range(4))]
    shares = [leakage.leak([lr], [ref[order]])[0] for order in orders]
    z = (shares[0] - np.mean(shares)) / np.std(shares)
    assert leakage.leak([lr], [ref])[1] == pytest.approx(z)
    assert np.mean(shares) == pytest.approx(0)


def test_leaks_and_noise_have_their_size(planted, monkeypatch):
    def leaks(hr, lr_ref, seeds):
        return torch.lerp(plain(hr, lr_ref, seeds), torch.stack([*lr_ref]), 0.04)

    def noisy(hr, lr_ref, seeds):
        noise = [torch.randn(3, 48, 48, generator=make_generator(s)) for s in seeds]
        return plain(hr, lr_ref, seeds) + 5 / 255 * torch.stack(noise)

    methods = {"bicubic": plain, "noisy": noisy, "leaks": leaks}
    inputs = inputs_with(monkeypatch, methods, images=8)
    rows = leakage.leakage(planted, inputs)
    assert rows["bicubic"] == {"share": 0, "z": 0, "references": 0, "noises": 0}
    assert rows["noisy"]["noises"] == pytest.approx(5, abs=0.3)
    assert rows["noisy"]["references"] == pytest.approx(0, abs=1e-9)  # the noise is the same
    assert rows["leaks"]["share"] == pytest.approx(0.04, abs=0.01) and rows["leaks"]["noises"] == 0
    assert rows["leaks"]["references"] > 0.5
    blended = rows["leaks, 1% of the reference blended in"]["share"]
    assert blended == pytest.approx(0.01 + 0.99 * rows["leaks"]["share"], abs=0.003)
