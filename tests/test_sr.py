"""bench/sr.py: the networks and their files, pairs and their crops, training, enlarging."""

import subprocess
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import degrade
from bench import metrics, sr
from bench.sr import Config
from common import UserError
from common.checkpoint import load_checkpoint, save_weights
from common.images import load_image, save_image
from common.photos import Photos, dihedral
from common.runtime import make_generator
from tests.tiny import CPU, REPO, equal, small_net, uniform

TINY = Config(sr="fsrcnn", compile=False, batch_size=2, crop=16, bf16=False, learning_rate=1e-3)


def save_pairs(folder: Path, sizes: list[tuple[int, int]], names: tuple[str, str] = ("hr", "lr")):
    """Pairs 0.png, 1.png, ... of these LR sizes; returns the folder as a flag."""
    for i, (h, w) in enumerate(sizes):
        hr = uniform(3, 4 * h, 4 * w, seed=i)
        save_image(folder / names[0] / f"{i}.png", hr)
        save_image(folder / names[1] / f"{i}.png", F.avg_pool2d(hr, 4))
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    return save_pairs(tmp_path / "pairs", [(20, 24), (18, 19), (32, 17)])


def weights_of(path: str | Path) -> dict[str, Tensor]:
    return sr.load_network(path).state_dict()


# ---- networks ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    ("name", "millions"),
    [("swinir-l", 0.93), ("swinir", 11.90), ("rrdb", 16.70), ("hat", 20.77), ("fsrcnn", 0.02)],
)
def test_a_network_has_its_shape_and_size_and_comes_back_from_its_file(name, millions, tmp_path):
    torch.manual_seed(0)
    net = sr.sr_network(name).eval()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    lr = uniform(1, 3, 16, 16)
    large = net(lr)
    assert large.shape == (1, 3, 64, 64)
    large.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    save_weights(tmp_path / "net.safetensors", net.state_dict(), config=asdict(Config(sr=name)))
    assert equal(net.state_dict(), weights_of(tmp_path / "net.safetensors"))
    if name != "fsrcnn":  # spandrel does not know it
        import spandrel

        loaded = spandrel.ModelLoader("cpu").load_from_file(tmp_path / "net.safetensors")
        assert loaded.eval().scale == 4
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(lr), large.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_an_untrained_fsrcnn_is_close_to_bicubic_and_has_the_size_of_the_paper(scale):
    d, s, m = 56, 12, 4
    weights = 3 * d * 25 + d * s + m * 9 * s * s + s * d + 3 * d * 81
    biases_and_slopes = 2 * (d + s + m * s + d) + 3
    net, lr = sr.sr_network("fsrcnn", scale), uniform(1, 3, 17, 15)
    assert sum(p.numel() for p in net.parameters()) == weights + biases_and_slopes
    bicubic = F.interpolate(lr, scale_factor=scale, mode="bicubic")
    assert (net(lr) - bicubic).abs().mean() < 0.02


def test_tiles_of_a_batch_equal_the_whole_images_and_are_small():
    net, lr, seen = small_net(), uniform(2, 3, 101, 75), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    whole = sr.super_resolve(net, lr[1:])
    assert seen == [(101, 75)]
    torch.testing.assert_close(whole, net(lr[1:]).detach())
    seen.clear()
    tiled = sr.super_resolve(net, lr, tile=48)[1:]
    assert len(seen) > 4 and set(seen) == {(48, 48)}
    # The edge of a tile has next to no weight.
    torch.testing.assert_close(tiled, whole, rtol=0, atol=5e-4)
    inner = (..., slice(72, 120), slice(72, 104))  # where no tile begins or ends
    torch.testing.assert_close(tiled[inner], whole[inner], rtol=0, atol=1e-6)


@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (17, 33)])
def test_images_of_any_size_are_mirrored_to_fit_the_windows_of_a_network(h, w):
    net, lr = sr.sr_network("swinir-l").eval(), uniform(1, 3, h, w)
    mirrored = np.pad(lr.numpy(), ((0, 0), (0, 0), (0, -h % 8), (0, -w % 8)), "reflect")
    expected = net(torch.from_numpy(mirrored)).detach()[:, :, : 4 * h, : 4 * w].clamp(0, 1)
    torch.testing.assert_close(sr.super_resolve(net, lr), expected)


# ---- pairs ------------------------------------------------------------------------------------


def crops_of_pairs(folder: str, seed: int = 0) -> sr.PairCrops:
    """Crops of 16 LR pixels of the pairs of a folder, which are decoded beside it."""
    read = partial(sr.read_pair, scale=4)
    photos = Photos(sr.training_files(folder, 4, CPU), Path(f"{folder}-decoded"), CPU, read)
    return sr.PairCrops(photos, 16, 1, seed)


def coordinates(h: int, w: int) -> Tensor:
    """An image (3, h, w) whose red and green are the row and the column of a pixel."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([y, x, torch.zeros_like(x)]).float() / 255


def test_crops_of_both_images_are_of_the_same_place_and_turned_alike(tmp_path):
    """HR shows the coordinates of LR, and in blue the place within 4 x 4 pixels."""
    h, w = 21, 30
    lr = coordinates(h, w)
    hr = lr.repeat_interleave(4, 1).repeat_interleave(4, 2)
    hr[2] = torch.arange(16).view(4, 4).repeat(h, w) / 255
    save_image(tmp_path / "pairs" / "hr" / "a.png", hr)
    save_image(tmp_path / "pairs" / "lr" / "a.png", lr)
    batch, turns, places = crops_of_pairs(str(tmp_path / "pairs")).batch(0, 100), set(), set()
    for hr_crop, lr_crop in zip(*sr.split(batch.float() / 255), strict=True):
        assert hr_crop.shape == (3, 64, 64) and lr_crop.shape == (3, 16, 16)
        assert torch.equal(F.max_pool2d(hr_crop[:2], 4), lr_crop[:2])
        top, left = (int(round(lr_crop[c].min().item() * 255)) for c in (0, 1))
        original = hr[:, 4 * top : 4 * top + 64, 4 * left : 4 * left + 64]
        same = [k for k in range(8) if torch.allclose(dihedral(original, k), hr_crop)]
        assert len(same) == 1
        turns |= set(same)
        places.add((top, left))
    assert turns == set(range(8))
    assert {p[0] for p in places} == set(range(6)) and {p[1] for p in places} == set(range(15))


def test_crops_depend_on_seed_and_number_alone(pairs):
    one, again, other = (crops_of_pairs(pairs, seed) for seed in (0, 0, 1))
    batch = next(again.batches([3], 4, CPU.device))
    assert torch.equal(batch, one.batch(3, 4).float() / 255)
    assert not torch.equal(one.batch(3, 4), one.batch(4, 4))
    assert not torch.equal(one.batch(3, 4), other.batch(3, 4))


def test_unreadable_pairs_are_skipped_and_counted_and_hidden_files_left_out(tmp_path, capsys):
    folder = save_pairs(tmp_path / "p", [(20, 20)] * 4, ("HR", "LR"))
    (tmp_path / "p/HR/1.png").write_bytes(b"no image")
    (tmp_path / "p/HR/._0.png").touch()
    (tmp_path / "p/LR/3.png").rename(tmp_path / "p/LR/3.PNG")
    cut = tmp_path / "p/LR/2.png"
    cut.write_bytes(cut.read_bytes()[:300])  # its header is whole
    crops = crops_of_pairs(folder)
    hidden, first, second = capsys.readouterr().out.splitlines()
    assert "1 hidden or system" in hidden
    assert first.startswith("skipped 1 of 4 pairs") and "HR/1.png" in first
    assert second.startswith("skipped 1 of 3 photos") and str(cut) in second
    assert len(crops.rows) == 2 and crops.batch(0, 20).shape == (20, 51, 16, 16)


@pytest.mark.parametrize("size, turn", [((20, 24), 6), ((20, 24), 3), ((20, 20), 8)])
def test_a_pair_of_which_exif_turns_one_image_is_skipped(tmp_path, capsys, size, turn):
    folder, exif = tmp_path / "p", Image.Exif()
    save_pairs(folder, [size, (20, 24)])
    exif[0x0112] = turn
    with Image.open(folder / "hr" / "0.png") as image:
        image.save(folder / "hr" / "0.png", exif=exif)
    assert len(crops_of_pairs(str(folder)).rows) == 1
    message = capsys.readouterr().out
    assert "skipped 1 of 2" in message and "hr/0.png: EXIF turns" in message
    with Image.open(folder / "lr" / "0.png") as image:
        image.save(folder / "lr" / "0.png", exif=exif)
    assert len(crops_of_pairs(str(folder)).rows) == 2  # both are turned alike


def test_hr_that_is_a_little_larger_is_cut_at_the_right_and_at_the_bottom(tmp_path):
    exact, larger = (save_pairs(tmp_path / name, [(20, 24)]) for name in ("exact", "larger"))
    hr = load_image(f"{larger}/hr/0.png")
    save_image(f"{larger}/hr/0.png", F.pad(hr, (0, 3, 0, 1)))
    first, second = (crops_of_pairs(folder).batch(0, 9) for folder in (exact, larger))
    assert torch.equal(first, second)
    save_image(f"{larger}/hr/0.png", F.pad(hr, (0, 4)))
    with pytest.raises(UserError, match="0 has 100 x 80 and 24 x 20 pixels, which is not"):
        sr.training_files(larger, 4, CPU)


def test_of_a_release_train_is_trained_on_and_test_alone_is_refused(tmp_path):
    for name in ("Canon/Train/4/Canon_1", "Canon/Test/4/Canon_2", "Nikon/Test/4/Nikon_3"):
        hr = uniform(3, 128, 128)
        save_image(tmp_path / "x" / f"{name}_HR.png", hr)
        save_image(tmp_path / "x" / f"{name}_LR4.png", F.avg_pool2d(hr, 4))
    folder = tmp_path / "x/Canon/Train/4"
    found = sr.training_files(str(tmp_path / "x"), 4, CPU)
    assert found == [(folder / "Canon_1_LR4.png", folder / "Canon_1_HR.png")]
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="of RealSR only Test is there"):
        sr.training_files(str(tmp_path / "x"), 4, CPU)


# ---- training ---------------------------------------------------------------------------------


def test_sr_loss_is_l1_and_a_weighted_distance(monkeypatch):
    hr, lr = uniform(2, 3, 64, 64), uniform(2, 3, 16, 16)

    def distance(a: Tensor, b: Tensor, normalize: bool) -> Tensor:
        assert torch.equal(b, hr) and normalize
        return torch.full((2, 1, 1, 1), 3.0)

    monkeypatch.setattr(metrics, "perceptual_net", lambda *args: distance)
    gray = lambda lr: torch.full((2, 3, 64, 64), 0.5)  # noqa: E731
    expected = (hr - 0.5).abs().mean().item()
    assert sr.sr_loss(gray, hr, lr, 0.0)["loss"].item() == pytest.approx(expected)
    assert sr.sr_loss(gray, hr, lr, 0.2)["loss"].item() == pytest.approx(expected + 0.6)


def test_each_image_of_a_batch_is_degraded_in_its_own_way():
    hr = uniform(1, 3, 64, 64).repeat(4, 1, 1, 1)
    lr = sr.degraded(hr, "bsrgan", 4, make_generator(0))
    assert torch.equal(lr, sr.degraded(hr, "bsrgan", 4, make_generator(0)))
    assert all(not torch.equal(lr[0], lr[b]) for b in (1, 2, 3))


def test_a_few_steps_on_one_pair_beat_bicubic():
    photo = load_image(REPO / "data" / "sample" / "hr" / "coffee.jpg")
    hr = photo[None, :, 100:196, 200:296]
    lr = degrade.degrade(hr, degrade.bicubic_reduction(1, 4))
    torch.manual_seed(0)
    net = sr.sr_network("fsrcnn")
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(80):
        opt.zero_grad()
        sr.sr_loss(net, hr, lr, 0.0)["loss"].backward()
        opt.step()
    bicubic = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert F.mse_loss(sr.super_resolve(net, lr), hr) < 0.8 * F.mse_loss(bicubic, hr)


@pytest.mark.parametrize("name", ["fsrcnn", "swinir-l"])
def test_training_resumes_exactly_and_returns_the_averaged_weights(tmp_path, pairs, name):
    """Also where paths are dropped at random, as in SwinIR."""
    source = {"pairs": pairs} if name == "fsrcnn" else {"hr": (pairs + "/hr",), "recipe": "bsrgan"}
    cfg = replace(TINY, sr=name, name="a", **source)
    for out, runs in {"once": [2], "twice": [1, 2]}.items():
        for steps in runs:
            torch.manual_seed(steps)
            file = sr.train(replace(cfg, out=str(tmp_path / out), steps=steps), CPU)
            assert file == tmp_path / out / "a.safetensors"
    once, twice = (load_checkpoint(tmp_path / out / "a.pt") for out in ("once", "twice"))
    assert equal(once["net"], twice["net"]) and equal(once["ema"], twice["ema"])
    assert not equal(once["net"], once["ema"])
    assert equal(weights_of(file), once["ema"]) and equal(
        weights_of(tmp_path / "once/a.pt"), once["ema"]
    )


def test_training_goes_on_from_given_weights(tmp_path, pairs):
    cfg = replace(TINY, pairs=pairs, steps=1, learning_rate=1e-30)
    first = sr.train(replace(cfg, out=str(tmp_path / "a")), CPU)
    go_on = replace(cfg, out=str(tmp_path / "b"), seed=1)
    again, other = (
        weights_of(sr.train(replace(go_on, name=name, start_from=start), CPU))
        for name, start in (("again", str(first)), ("other", ""))
    )
    expected = weights_of(first)
    assert all((v - again[k]).abs().max() < 1e-25 for k, v in expected.items())
    assert any((v - other[k]).abs().max() > 1e-3 for k, v in expected.items())
    with pytest.raises(UserError, match="--start-from .*another configuration"):
        sr.train(replace(go_on, sr="swinir-l", start_from=str(first)), CPU)


@pytest.mark.slow
def test_perceptual_training_runs(tmp_path, pairs):
    if metrics.missing_weights("vgg"):
        pytest.skip("needs the weights of VGG")
    cfg = replace(TINY, pairs=pairs, out=str(tmp_path / "out"), steps=1, perceptual_weight=1.0)
    assert sr.train(cfg, CPU) == tmp_path / "out" / "fsrcnn-pairs-perceptual.safetensors"


# ---- the command ------------------------------------------------------------------------------


def command(cwd: Path, *flags: object) -> subprocess.CompletedProcess:
    """The command with these flags, in this process."""
    tiny = "--preset smoke --device cpu --steps 1 --crop 16".split()
    return commands.run("bench.sr", *tiny, *flags, cwd=cwd)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--sr foo", "swinir-l"),
        ("--scale 3", "--scale 3"),
        ("--recipe foo", "--recipe foo"),
        ("--hr nowhere", "nowhere"),
        ("--pairs pairs --recipe bicubic", "--recipe"),
        ("--pairs pairs/hr", "no images as HR/ and LR/"),
        ("--pairs pairs --scale 2", "not --scale 2"),
        ("--pairs pairs --crop 33", "33 x 33"),
        ("--crop 8", "--crop 8"),
        ("--batch-size 0", "--batch-size 0"),
        ("--perceptual-weight -1", "--perceptual-weight -1"),
        ("--upscale pairs/lr", "runs/sr/fsrcnn-realesrgan.safetensors is missing: train it"),
        ("--upscale pairs/lr --start-from other.pt", "other.pt: not a network of bench.sr"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(tmp_path, pairs, flags, word):
    torch.save({"ema": {}, "config": {"widths": [1]}}, tmp_path / "other.pt")
    commands.assert_refused(command(tmp_path, *flags.split()), word)
    written = {file.parts[-3] for file in (tmp_path / "runs").rglob("*.*") if file.suffix}
    # Photos are decoded before their sizes are compared with a crop.
    assert written == ({"photos"} if "--crop 33" in flags else set())


def test_a_name_belongs_to_one_source(tmp_path, pairs):
    assert command(tmp_path, "--pairs", pairs, "--name", "a").returncode == 0
    before = (tmp_path / "runs/sr/a.pt").read_bytes()
    done = command(tmp_path, "--hr", pairs + "/hr", "--name", "a")
    commands.assert_refused(done, "give another --name")
    assert (tmp_path / "runs/sr/a.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["fsrcnn-pairs", "other"])
def test_images_are_enlarged_by_the_named_network_and_a_corrupt_one_is_skipped(
    tmp_path, pairs, name
):
    for number, file in enumerate(("fsrcnn-pairs", "other")):
        torch.manual_seed(number)
        net = sr.sr_network("fsrcnn")
        target = tmp_path / f"runs/sr/{file}.safetensors"
        save_weights(target, net.state_dict(), config=asdict(Config(sr="fsrcnn")))
    (tmp_path / "pairs/lr/1.png").write_bytes(b"no image")
    source = (
        ["--start-from", "runs/sr/other.safetensors"] if name == "other" else ["--pairs", pairs]
    )
    # Some CPUs have bf16, which rounds more coarsely than the files.
    done = command(tmp_path, *source, "--upscale", f"{pairs}/lr", "--no-bf16")
    assert done.returncode == 0, done.stderr
    assert f"skipped: {pairs}/lr/1.png" in done.stdout
    assert f"2 images in runs/sr/{name}, 1 skipped" in done.stdout
    out = tmp_path / "runs/sr" / name
    assert {file.name for file in out.glob("*.png")} == {"0.png", "2.png"}
    net = sr.load_network(f"{out}.safetensors")
    expected = sr.super_resolve(net, load_image(f"{pairs}/lr/0.png")[None])[0]
    found = load_image(out / "0.png")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51 / 255)


def test_the_command_trains_from_an_empty_folder(tmp_path):
    flags = "--sr fsrcnn --recipe bicubic --preset smoke --steps 2 --crop 16".split()
    done = commands.run("bench.sr", *flags, cwd=tmp_path, as_main=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    names = {"fsrcnn-bicubic.pt", "fsrcnn-bicubic.safetensors", "log.jsonl"}
    decoded = {name for name in files if name.startswith("runs/sr/photos/hr/")}
    assert files - decoded == {f"runs/sr/{name}" for name in (*names, ".realdgen")}
    assert sorted(Path(name).suffix for name in decoded) == [".npy", ".pixels"]
