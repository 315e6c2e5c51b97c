"""bench/pairs.py: pairs are found, read, given references, and compared with a method's images."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import photo, write, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bench import generated, pairs, sr
from bench.pairs import Pair, camera_of, evaluate, find_pairs, load_hr, load_lr, with_other_scenes
from common.images import load_image, to_uint8

CPU = torch.device("cpu")


def test_camera_is_the_sub_folder_else_the_leading_letters():
    cameras = {"Canon_001_LR4": "Canon", "P1140122_x1": "P", "DSC_1045_x1": "DSC", "0001": "",
               "my-phone/IMG_0001": "my-phone", "Nikon/2020/a_1": "Nikon"}  # fmt: skip
    assert {name: camera_of(name) for name in cameras} == cameras


def pairs_of(cameras, part):
    """Pairs without files: number i is scene i of its camera in Test or Train."""
    names = [f"{camera}_{i}" for i, camera in enumerate(cameras)]
    lr = [Path(part, name) for name in names]
    return [Pair(i, name, lr[i], lr[i], (32, 32), False, name, "")
            for i, name in enumerate(names)]  # fmt: skip


CAMERAS = st.lists(st.sampled_from("ABCD"), max_size=30)


@given(cameras=CAMERAS, seed=st.integers(0, 2**31))
def test_other_scene_is_another_one_of_the_same_camera(cameras, seed):
    pairs = pairs_of(cameras, "Test")
    other = with_other_scenes(pairs, seed)
    assert [pair.index for pair in other] == [
        i for i, c in enumerate(cameras) if cameras.count(c) > 1
    ]
    references = [pair.reference for pair in other]
    assert sorted(references) == sorted(pair.lr for pair in other), "each scene is used once"
    for pair in other:
        alike = {p.lr for p in pairs if camera_of(p.name) == camera_of(pair.name)}
        assert len({*pair.others}) == len(pair.others) and {*pair.others} == alike - {pair.lr}
    assert other == with_other_scenes(pairs, seed)


@given(cameras=CAMERAS, train=CAMERAS.filter(len), seed=st.integers(0, 2**31))
def test_of_a_release_other_scenes_are_those_of_train(cameras, train, seed):
    pairs, references = pairs_of(cameras, "Test"), pairs_of(train, "Train")
    other = with_other_scenes(pairs, seed, references)
    assert [pair.index for pair in other] == [i for i, c in enumerate(cameras) if c in train]
    for camera in "ABCD":
        alike = {p.lr for p in references if camera_of(p.name) == camera}
        mine = [pair for pair in other if camera_of(pair.name) == camera]
        assert all({*pair.others} == alike for pair in mine)
        uses = [sum(pair.reference == lr for pair in mine) for lr in alike]
        assert max(uses, default=0) - min(uses, default=0) <= 1, "all are used alike"


def test_frames_of_one_video_are_no_other_scenes():
    pairs = [replace(pair, scene="AB"[i // 2]) for i, pair in enumerate(pairs_of("XXXX", "Test"))]
    for pair in with_other_scenes(pairs, 0):
        assert {*pair.others} == {p.lr for p in pairs if p.scene != pair.scene}


# Published sets: HR and LR files of a pair's name. RealVSR, and RealSR before version 3, store LR
# images at the HR size.
LAYOUTS = {
    "RealSR": (
        ("Canon_001", "Canon_002", "Nikon_001", "Nikon_002"),
        lambda n: f"{n[:5]}/Test/4/{n}_HR.png",
        lambda n: f"{n[:5]}/Test/4/{n}_LR4.png",
    ),
    "DRealSR": (
        ("Canon_10", "DSC_1045", "P1140122", "sony_2"),
        lambda n: f"Test_x4/test_HR/{n}_x4.png",
        lambda n: f"Test_x4/test_LR/{n}_x1.png",
    ),
    "RealVSR": (
        ("000_00000", "001_00000", "002_00000"),
        lambda n: f"GT_test/{n.replace('_', '/')}.png",
        lambda n: f"LQ_test/{n.replace('_', '/')}.png",
    ),
}


def write_published(folder, layout, full=False):
    """A tiny set as published; full: LR files have the size of HR. Returns the names."""
    names, hr_of, lr_of = LAYOUTS[layout]
    H, W = (192, 128) if layout == "RealVSR" else (201, 193)
    for number, name in enumerate(names):
        hr = photo(number, H, W)
        small = Image.fromarray(hr).resize((W // 4, H // 4), Image.Resampling.BOX)
        stored = Image.fromarray(hr).filter(ImageFilter.BoxBlur(2)) if full else small
        write(folder / hr_of(name), hr)
        write(folder / lr_of(name), np.asarray(stored))
    return names


@pytest.mark.parametrize(
    "layout, full", [("RealSR", False), ("RealSR", True), ("DRealSR", False), ("RealVSR", True)]
)
def test_published_sets_are_read_as_they_are(tmp_path, layout, full):
    names = write_published(tmp_path, layout, full)
    _, hr_of, lr_of = LAYOUTS[layout]
    write(tmp_path / "Canon/Train/4/Canon_009_HR.png", photo(0, 192))  # is not to evaluate on
    found, skipped = find_pairs(tmp_path)
    assert [pair.name for pair in found] == list(names) and skipped == 0
    for pair in found:
        h, w = pair.size
        assert (h, w) == ((48, 32) if layout == "RealVSR" else (50, 48))
        stored = Image.open(tmp_path / hr_of(pair.name)).crop((0, 0, 4 * w, 4 * h))
        hr = to_uint8(load_hr(pair)).permute(1, 2, 0)
        np.testing.assert_array_equal(hr, np.asarray(stored))
        stored = Image.open(tmp_path / lr_of(pair.name))
        if full:
            stored = stored.crop((0, 0, 4 * w, 4 * h)).resize((w, h), Image.Resampling.BICUBIC)
        lr = to_uint8(load_lr(pair.lr, pair.full)).permute(1, 2, 0)
        np.testing.assert_array_equal(lr, np.asarray(stored))


@pytest.mark.parametrize(
    "hr, lr, names",
    [
        ("gt/{}.png", "lq/{}.png", ["a", "bx4"]),
        ("HR/{}.bmp", "LR/{}.png", ["a/1", "b/2"]),
        ("hr/{}.png", "lr/{}x4.png", ["0001", "a/b", "cx2"]),
        ("test_HR/{}_x4.png", "test_LR/{}_x1.png", ["Canon_1", "P2"]),  # DRealSR/Test_x4 itself
    ],
)
def test_pairs_are_found_as_others_lay_them_out(tmp_path, hr, lr, names):
    (tmp_path / "far").mkdir()
    for number, name in enumerate(names):
        write(tmp_path / "far" / hr.format(name), photo(number, 192))
        write(tmp_path / "far" / lr.format(name), photo(number, 48))
    (tmp_path / "set").symlink_to(tmp_path / "far")
    found, skipped = find_pairs(tmp_path / "set")
    assert [(p.name, p.size, p.lr) for p in found] == [
        (name, (48, 48), tmp_path / "set" / lr.format(name)) for name in names
    ]
    assert skipped == 0


def test_an_unreadable_pair_is_skipped_and_leaves_the_others_their_draws(tmp_path):
    write_pairs(tmp_path, ["a1", "a2", "a3", "a4"])
    (tmp_path / "HR/a2.png").write_bytes((tmp_path / "HR/a2.png").read_bytes()[:300])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "LR/a3.png").save(tmp_path / "LR/a3.png", exif=exif)  # turned alone
    found, skipped = find_pairs(tmp_path)
    assert [(p.index, p.name) for p in found] == [(0, "a1"), (3, "a4")] and skipped == 2


# ---- distances of methods to the real LR --------------------------------------------------------


def test_synthetic_lr_depends_on_the_seed_and_not_on_the_batch(tmp_path):
    found = find_pairs(write_pairs(tmp_path))[0]
    hr = torch.stack([load_hr(pair) for pair in found])
    method = generated.synthetic("realesrgan")
    lr = generated.on_pairs(method, 3)(hr, found)
    assert torch.equal(lr[2:4], generated.on_pairs(method, 3)(hr[2:4], found[2:4]))
    assert not torch.equal(lr, generated.on_pairs(method, 4)(hr, found))


def test_values_do_not_depend_on_the_batch_and_are_those_of_8_bit_files(tmp_path):
    folder = write_pairs(tmp_path)
    write(folder / "HR/Canon_3.png", photo(7, 256))  # of another size, so that batches are broken
    write(folder / "LR/Canon_3.png", photo(7, 64))
    found = find_pairs(folder)[0]

    def method(hr, batch):
        return (
            pairs.resized_by_pillow(hr, *batch[0].size) + 0.001
        )  # a quarter of a level: rounded off

    one, four = (evaluate(method, found, ["PSNR RGB", "SSIM Y"], CPU, size) for size in (1, 4))
    assert one["images"] == four["images"] and one["n"] == 6
    hr, lr = (Image.open(folder / f"{kind}/Nikon_2.png") for kind in ("HR", "LR"))
    error = np.asarray(hr.resize((48, 48), Image.Resampling.BICUBIC), float) - np.asarray(lr)
    expected = -10 * math.log10((error**2).mean() / 255**2)
    assert one["images"]["Nikon_2"]["PSNR RGB"] == pytest.approx(expected, abs=1e-4)
    values = [image["SSIM Y"] for image in one["images"].values()]
    assert one["mean"]["SSIM Y"] == pytest.approx(np.mean(values))
    same = evaluate(lambda hr, batch: torch.stack([load_lr(p.lr) for p in batch]), found,
                    ["PSNR Y"], CPU)  # fmt: skip
    assert same["mean"]["PSNR Y"] == 100


def test_set_metrics_see_every_image_once_and_in_pairs(tmp_path, monkeypatch):
    monkeypatch.setitem(
        pairs.SET_METRICS, "FID",
        lambda a, b: max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)),
    )  # fmt: skip
    monkeypatch.setitem(pairs.SET_METRICS, "KID", lambda a, b: sum(len(x) for x in [*a, *b]))
    found = find_pairs(write_pairs(tmp_path))[0]

    def real(hr, batch):
        return torch.stack([load_lr(pair.lr) for pair in batch])

    result = evaluate(real, found, ["PSNR Y", "FID", "KID"], CPU, batch_size=2)
    assert result["mean"]["KID"] == 10 and result["mean"]["FID"] == 0
    assert set(result["images"]["Canon_1"]) == {"PSNR Y"}


def test_the_mean_degradation_is_that_of_the_other_scenes_of_the_camera(tmp_path, monkeypatch):
    found = find_pairs(write_pairs(tmp_path, ["a1", "a2", "a3", "b1"]))[0]
    monkeypatch.setattr(generated.generate, "degradation_of", lambda net, lr: lr.mean((1, 2))[None])
    other = with_other_scenes(found, 0)
    degradations = generated.mean_degradations(other, torch.nn.Linear(1, 1))
    means = [load_image(pair.lr).mean((1, 2)) for pair in found]
    assert set(degradations) == {0, 1, 2}  # there is no other b
    torch.testing.assert_close(degradations[1], (means[0] + means[2]) / 2)
    # Of one other scene: that of the reference.
    one = generated.mean_degradations(other, torch.nn.Linear(1, 1), 1)
    for pair in other:
        torch.testing.assert_close(one[pair.index], load_image(pair.reference).mean((1, 2)))


COLUMNS = ("PSNR RGB", "PSNR Y", "SSIM RGB", "SSIM Y")


def by_scikit_image(real, resized):
    """COLUMNS of two Pillow images, without code of the project."""
    rgb = [np.asarray(image, np.float64) for image in (real, resized)]
    y = [rgb2ycbcr(x / 255)[..., 0] for x in rgb]
    psnr = partial(peak_signal_noise_ratio, data_range=255)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = partial(structural_similarity, data_range=255, **window)
    return [psnr(*rgb), psnr(*y), ssim(*rgb, channel_axis=2), ssim(*y)]


@pytest.mark.parametrize("name", ["RealSR", "DRealSR"])
def test_bicubic_rows_of_the_shared_pairs_are_reproduced_without_our_code(shared, name):
    """Of every fifth pair: Pillow resizes, scikit-image measures."""
    folder, expected = shared / "photos/pairs" / name, []
    larger = {file.stem: file for file in (folder / "HR").iterdir()}
    for file in sorted((folder / "LR").iterdir())[::5]:
        hr, lr = (Image.open(f).convert("RGB") for f in (larger[file.stem], file))
        small, large = (a.resize(b.size, Image.Resampling.BICUBIC) for a, b in ((hr, lr), (lr, hr)))
        expected.append([by_scikit_image(lr, small), by_scikit_image(hr, large)])
    found = find_pairs(folder)[0][::5]
    rows = (evaluate(generated.on_pairs(generated.bicubic, 0), found, COLUMNS, CPU, 8),
            evaluate(sr.enlarging(None), found, COLUMNS, CPU, upwards=True))  # fmt: skip
    for row, numbers in zip(rows, np.mean(expected, axis=0), strict=True):
        mean = [row["mean"][column] for column in COLUMNS]
        np.testing.assert_allclose(mean[:2], numbers[:2], atol=0.01)  # dB
        np.testing.assert_allclose(mean[2:], numbers[2:], atol=0.001)
