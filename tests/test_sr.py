"""sr.py: the networks and their files, pairs and their crops, the training, the command."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
import degrade
from bench import metrics, sr
from bench.sr import Config
from data.pack import Photos

REPO = Path(__file__).resolve().parents[1]
CPU = common.Runtime(torch.device("cpu"))
TINY = Config(sr="fsrcnn", compile=False, batch_size=2, crop=16, bf16=False, learning_rate=1e-3)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=common.generator(seed, *shape))


def save_pairs(folder: Path, sizes: list[tuple[int, int]], names: tuple[str, str] = ("hr", "lr")):
    """Pairs 0.png, 1.png, ... of these LR sizes; returns the folder as a flag."""
    for i, (h, w) in enumerate(sizes):
        hr = uniform(3, 4 * h, 4 * w, seed=i)
        common.save_image(folder / names[0] / f"{i}.png", hr)
        common.save_image(folder / names[1] / f"{i}.png", F.avg_pool2d(hr, 4))
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    return save_pairs(tmp_path / "pairs", [(20, 24), (18, 19), (32, 17)])


# ---- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [("swinir-l", 0.93), ("swinir", 11.90), ("rrdb", 16.70), ("hat", 20.77), ("fsrcnn", 0.02)],
)
def test_a_network_has_its_shape_and_size_and_comes_back_from_its_file(name, millions, tmp_path):
    torch.manual_seed(0)
    net = sr.sr_network(name).eval()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    lr = uniform(2, 3, 16, 24)
    made = net(lr)
    assert made.shape == (2, 3, 64, 96)
    made.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    sr.save_network(tmp_path / "net.safetensors", net, Config(sr=name))
    with torch.no_grad():
        again = sr.load_network(tmp_path / "net.safetensors")(lr)
        torch.testing.assert_close(again, made.detach(), rtol=0, atol=1e-6)
        if name != "fsrcnn":  # which spandrel does not know
            import spandrel

            loaded = spandrel.ModelLoader("cpu").load_from_file(tmp_path / "net.safetensors")
            assert loaded.eval().scale == 4
            torch.testing.assert_close(loaded.model(lr), made.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_fsrcnn_has_as_many_parameters_as_the_paper_s_formula(scale):
    d, s, m = 56, 12, 4
    weights = 3 * d * 25 + d * s + m * 9 * s * s + s * d + 3 * d * 81
    biases_and_slopes = 2 * (d + s + m * s + d) + 3
    net = sr.sr_network("fsrcnn", scale)
    assert sum(p.numel() for p in net.parameters()) == weights + biases_and_slopes
    assert net(uniform(1, 3, 7, 5)).shape == (1, 3, 7 * scale, 5 * scale)


def test_an_untrained_fsrcnn_is_close_to_bicubic():
    lr = uniform(1, 3, 16, 16)
    bicubic = F.interpolate(lr, scale_factor=4, mode="bicubic")
    assert (sr.sr_network("fsrcnn")(lr) - bicubic).abs().mean() < 0.02


def test_mirrored_is_numpy_s_reflection():
    for n in (1, 2, 3, 7, 8, 9):
        expected = np.pad(np.arange(n), (0, -n % 8), "reflect" if n > 1 else "edge")
        assert sr.mirrored(n, 8).tolist() == expected.tolist()


def small_net() -> nn.Module:
    """One convolution, so that what a pixel sees is known."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.abs() / 5)
    return net


def test_tiles_equal_the_whole_image_and_are_small():
    net, lr, seen = small_net(), uniform(1, 3, 101, 75), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    whole = sr.super_resolve(net, lr)
    assert seen == [(101, 75)] and whole.shape == (1, 3, 404, 300)
    assert 0 < whole.min() and whole.max() < 1
    torch.testing.assert_close(whole, net(lr).detach())
    seen.clear()
    tiled = sr.super_resolve(net, lr, tile=48)
    assert len(seen) > 4 and set(seen) == {(48, 48)}
    # Where a tile sees its edge, it has next to no weight.
    torch.testing.assert_close(tiled, whole, rtol=0, atol=5e-4)
    inner = (..., slice(72, 120), slice(72, 104))  # where no tile begins or ends
    torch.testing.assert_close(tiled[inner], whole[inner], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 33), (40, 71)])
def test_any_size_is_resolved_by_a_network_with_windows(size):
    torch.manual_seed(0)
    net = sr.sr_network("swinir-l").eval()
    made = sr.super_resolve(net, uniform(1, 3, *size), tile=48)
    assert made.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert made.isfinite().all() and 0 <= made.min() and made.max() <= 1


def test_images_of_a_batch_are_resolved_as_alone():
    net, lr = small_net(), uniform(3, 3, 20, 60)
    together = sr.super_resolve(net, lr, tile=40)
    torch.testing.assert_close(together[1:2], sr.super_resolve(net, lr[1:2], tile=40))


# ---- pairs ------------------------------------------------------------------------------------


def test_split_is_the_inverse_of_join():
    hr, lr = uniform(2, 3, 32, 24), uniform(2, 3, 8, 6)
    both = sr.join(hr, lr)
    assert both.shape == (2, 51, 8, 6)
    assert all(torch.equal(a, b) for a, b in zip(sr.split(both), (hr, lr), strict=True))


def test_the_eight_ways_to_turn_are_different():
    x = uniform(3, 8, 8).numpy()
    turned = [sr.dihedral(x, draw) for draw in range(8)]
    assert len({t.tobytes() for t in turned}) == 8
    np.testing.assert_array_equal(sr.dihedral(x, 8 * 7 + 3), turned[3])


def crops_of_pairs(folder: str, seed: int = 0) -> sr.PairCrops:
    """Crops of 16 LR pixels of the pairs of a folder, which are decoded beside it."""
    found = list(sr.find_pairs(folder, 4, CPU).items())
    read = partial(sr.read_pair, scale=4)
    photos = Photos(found, Path(f"{folder}-decoded"), CPU, read)
    return sr.PairCrops(photos, 16, 1, seed)


def test_crops_of_both_images_are_of_the_same_place(tmp_path):
    """The images show their coordinates: those of LR, and in HR those within 4 x 4 pixels, too."""
    h, w = 21, 30
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    lr = torch.stack([y, x, torch.zeros_like(x)]).float() / 255
    hr = lr.repeat_interleave(4, 1).repeat_interleave(4, 2)
    within = torch.arange(16).view(4, 4).repeat(h, w) / 255  # place in the 4 x 4
    hr[2] = within
    common.save_image(tmp_path / "pairs" / "hr" / "a.png", hr)
    common.save_image(tmp_path / "pairs" / "lr" / "a.png", lr)
    batch, turns, places = crops_of_pairs(str(tmp_path / "pairs")).batch(0, 100), set(), set()
    for hr_crop, lr_crop in zip(*sr.split(batch.float() / 255), strict=True):
        assert hr_crop.shape == (3, 64, 64) and lr_crop.shape == (3, 16, 16)
        assert torch.equal(F.max_pool2d(hr_crop[:2], 4), lr_crop[:2])
        top, left = (int(round(lr_crop[c].min().item() * 255)) for c in (0, 1))
        original = hr[:, 4 * top : 4 * top + 64, 4 * left : 4 * left + 64].numpy()
        same = [k for k in range(8) if np.allclose(sr.dihedral(original, k), hr_crop)]
        assert len(same) == 1
        turns |= set(same)
        places.add((top, left))
    assert turns == set(range(8))
    assert {p[0] for p in places} == set(range(6)) and {p[1] for p in places} == set(range(15))


def test_crops_depend_on_seed_and_number_alone(pairs, tmp_path):
    one, again, other = (crops_of_pairs(pairs, seed) for seed in (0, 0, 1))
    batch = next(again.batches([3], 4, CPU.device))
    assert batch.shape == (4, 51, 16, 16)
    assert torch.equal(batch, one.batch(3, 4).float() / 255)
    assert not torch.equal(one.batch(3, 4), one.batch(4, 4))
    assert not torch.equal(one.batch(3, 4), other.batch(3, 4))
    photos = Photos(common.list_images([f"{pairs}/hr"], ""), tmp_path / "decoded", CPU)
    first, second = (sr.HRCrops(photos, 16, B, 0, scale=4).batch(5, 3) for B in (1, 3))
    assert first.shape == (3, 3, 64, 64) and torch.equal(first, second)


def test_hr_crops_are_turned_all_eight_ways_and_keep_to_the_blocks_of_jpeg(tmp_path):
    y, x = torch.meshgrid(torch.arange(90), torch.arange(99), indexing="ij")
    hr = torch.stack([y, x, torch.zeros_like(x)]).float() / 255
    common.save_image(tmp_path / "a.png", hr)
    photos = Photos([tmp_path / "a.png"], tmp_path / "decoded", CPU)
    turns, image = set(), common.to_uint8(hr).numpy()
    for crop in sr.HRCrops(photos, 16, 1, 0, scale=4).batch(0, 100).numpy():
        top, left = crop[:2].min((1, 2)).tolist()
        assert top % 8 == 0 and left % 8 == 0
        original = image[:, top : top + 64, left : left + 64]
        turns |= {k for k in range(8) if np.array_equal(sr.dihedral(original, k), crop)}
    assert turns == set(range(8))


def test_upper_case_folders_and_suffixes_may_differ(tmp_path):
    folder = save_pairs(tmp_path / "p", [(16, 16)], ("HR", "LR"))
    (tmp_path / "p" / "LR" / "0.png").rename(tmp_path / "p" / "LR" / "0.PNG")
    assert len(sr.find_pairs(folder, 4, CPU)) == 1


def test_unreadable_pairs_are_skipped_and_counted(tmp_path, capsys):
    folder = save_pairs(tmp_path / "p", [(20, 20)] * 4)
    (tmp_path / "p" / "hr" / "1.png").write_bytes(b"no image")
    cut = tmp_path / "p" / "lr" / "2.png"
    cut.write_bytes(cut.read_bytes()[:300])  # its header is whole
    crops = crops_of_pairs(folder)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("skipped 1 of 4 pairs") and "hr/1.png" in first
    assert second.startswith("skipped 1 of 3 photos") and str(cut) in second
    assert len(crops.rows) == 2 and crops.batch(0, 20).shape == (20, 51, 16, 16)


@pytest.mark.parametrize("size, turn", [((20, 24), 6), ((20, 24), 3), ((20, 20), 8)])
def test_a_pair_of_which_exif_turns_one_image_is_skipped(tmp_path, capsys, size, turn):
    folder, exif = tmp_path / "p", Image.Exif()
    save_pairs(folder, [size, (20, 24)])
    exif[0x0112] = turn
    with Image.open(folder / "hr" / "0.png") as image:
        image.save(folder / "hr" / "0.png", exif=exif)
    crops = crops_of_pairs(str(folder))
    message = capsys.readouterr().out
    assert "skipped 1 of 2" in message and "hr/0.png: EXIF turns" in message
    assert len(crops.rows) == 1 and crops.batch(0, 9).shape == (9, 51, 16, 16)
    with Image.open(folder / "lr" / "0.png") as image:
        image.save(folder / "lr" / "0.png", exif=exif)  # both are turned alike
    assert len(crops_of_pairs(str(folder)).rows) == 2


def test_hr_that_is_a_little_larger_is_cut_at_the_right_and_at_the_bottom(tmp_path):
    exact, larger = (save_pairs(tmp_path / name, [(20, 24)]) for name in ("exact", "larger"))
    hr = common.load_image(f"{larger}/hr/0.png")
    for more in ((0, 3, 0, 1), (0, 2, 0, 3)):
        common.save_image(f"{larger}/hr/0.png", F.pad(hr, more))
        first, second = (crops_of_pairs(folder).batch(0, 9) for folder in (exact, larger))
        assert torch.equal(first, second)
    common.save_image(f"{larger}/hr/0.png", F.pad(hr, (0, 4)))
    with pytest.raises(common.UserError, match="0 has 100 x 80 and 24 x 20 pixels, which is not"):
        sr.find_pairs(larger, 4, CPU)


def test_hidden_files_are_of_no_pair(tmp_path, capsys):
    folder = save_pairs(tmp_path / "p", [(16, 16)] * 2)
    for name in ("hr/._0.png", "lr/.ipynb_checkpoints/1-checkpoint.png", "hr/@eaDir/1.png"):
        (tmp_path / "p" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / name).touch()
    assert len(sr.find_pairs(folder, 4, CPU)) == 2
    assert "3 hidden or system" in capsys.readouterr().out


# ---- training ---------------------------------------------------------------------------------


def test_sr_loss_is_l1_and_a_weighted_distance(monkeypatch):
    hr, lr, calls = uniform(2, 3, 64, 64), uniform(2, 3, 16, 16), []

    def distance(a: Tensor, b: Tensor, normalize: bool) -> Tensor:
        calls.append((a, b, normalize))
        return torch.full((2, 1, 1, 1), 3.0)

    monkeypatch.setattr(metrics, "perceptual_net", lambda *args: distance)
    gray = lambda lr: torch.full((2, 3, 64, 64), 0.5)  # noqa: E731
    expected = (hr - 0.5).abs().mean().item()
    assert sr.sr_loss(gray, hr, lr, 0.0)["loss"].item() == pytest.approx(expected)
    assert not calls
    assert sr.sr_loss(gray, hr, lr, 0.2)["loss"].item() == pytest.approx(expected + 0.6)
    assert torch.equal(calls[0][1], hr) and calls[0][2]


def test_bicubic_recipe_is_the_antialiased_reduction():
    hr = uniform(2, 3, 64, 64)
    lr = sr.degraded(hr, "bicubic", 4, common.generator(0))
    expected = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(lr, expected, rtol=0, atol=0.51 / 255)


def test_each_image_of_a_batch_is_degraded_in_its_own_way():
    hr = uniform(1, 3, 64, 64).repeat(4, 1, 1, 1)
    lr = sr.degraded(hr, "bsrgan", 4, common.generator(0))
    assert torch.equal(lr, sr.degraded(hr, "bsrgan", 4, common.generator(0)))
    assert all(not torch.equal(lr[0], lr[b]) for b in (1, 2, 3))


def test_a_few_steps_on_one_pair_beat_bicubic():
    photo = common.load_image(REPO / "data" / "sample" / "hr" / "coffee.jpg")
    hr = photo[None, :, 100:196, 200:296]
    lr = degrade.degrade(hr, degrade.bicubic(1, 4))
    torch.manual_seed(0)
    net = sr.sr_network("fsrcnn")
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    values = []
    for _ in range(80):
        loss = sr.sr_loss(net, hr, lr, 0.0)["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        values.append(loss.item())
    bicubic = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert values[-1] < 0.9 * values[0]
    assert F.mse_loss(sr.super_resolve(net, lr), hr) < 0.8 * F.mse_loss(bicubic, hr)


@pytest.mark.parametrize("name", ["fsrcnn", "swinir-l"])
def test_training_resumes_exactly(tmp_path, pairs, name):
    """Also where paths are dropped at random, as in SwinIR."""
    source = {"pairs": pairs} if name == "fsrcnn" else {"hr": (pairs + "/hr",), "recipe": "bsrgan"}
    cfg = replace(TINY, sr=name, name="a", **source)
    for out, runs in {"once": [2], "twice": [1, 2]}.items():
        for steps in runs:
            torch.manual_seed(steps)
            sr.train(replace(cfg, out=str(tmp_path / out), steps=steps), CPU)
    once, twice = (common.load_checkpoint(tmp_path / out / "a.pt") for out in ("once", "twice"))
    for kind in ("net", "ema"):
        assert all(torch.equal(v, twice[kind][k]) for k, v in once[kind].items())
    assert any(not torch.equal(v, once["ema"][k]) for k, v in once["net"].items())


def test_train_returns_the_averaged_weights(tmp_path, pairs):
    path = sr.train(replace(TINY, pairs=pairs, out=str(tmp_path / "out"), steps=3), CPU)
    assert path == tmp_path / "out" / "fsrcnn-pairs.safetensors"
    ema, lr = common.load_checkpoint(path.with_suffix(".pt"))["ema"], uniform(1, 3, 9, 9)
    net = sr.load_network(path)
    assert all(torch.equal(v, ema[k]) for k, v in net.state_dict().items())
    assert torch.equal(net(lr), sr.load_network(path.with_suffix(".pt"))(lr))


def test_training_goes_on_from_given_weights(tmp_path, pairs):
    cfg = replace(TINY, pairs=pairs, steps=1, learning_rate=1e-30)
    first = sr.train(replace(cfg, out=str(tmp_path / "a")), CPU)
    go_on = replace(cfg, out=str(tmp_path / "b"), seed=1)
    again, other = (
        sr.load_network(sr.train(replace(go_on, name=name, start_from=start), CPU)).state_dict()
        for name, start in (("again", str(first)), ("other", ""))
    )
    expected = sr.load_network(first).state_dict()
    assert all((v - again[k]).abs().max() < 1e-25 for k, v in expected.items())
    assert any((v - other[k]).abs().max() > 1e-3 for k, v in expected.items())
    with pytest.raises(common.UserError, match="--start-from .*another configuration"):
        sr.train(replace(go_on, sr="swinir-l", start_from=str(first)), CPU)


def test_perceptual_training_has_its_own_name_and_an_order_does_not_matter(tmp_path, pairs):
    cfg = replace(TINY, pairs=pairs, steps=1)
    first = sr.train(replace(cfg, out=str(tmp_path / "a")), CPU)
    sr.train(replace(cfg, out=str(tmp_path / "b"), seed=1), CPU)
    again = sr.train(replace(cfg, out=str(tmp_path / "c")), CPU)
    one, two = (sr.load_network(path).state_dict() for path in (first, again))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert sr.resolved(replace(cfg, perceptual_weight=1.0)).name == "fsrcnn-pairs-perceptual"


@pytest.mark.slow
def test_perceptual_training_runs(tmp_path, pairs):
    if metrics.missing_weights("vgg"):
        pytest.skip("needs the weights of VGG")
    cfg = replace(TINY, pairs=pairs, out=str(tmp_path / "out"), steps=1, perceptual_weight=1.0)
    assert sr.train(cfg, CPU).is_file()


# ---- the command ------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """Exit code of the command with these flags."""
    argv = ["sr.py", "--preset", "smoke", "--device", "cpu", "--steps", 1, "--crop", 16, *flags]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    try:
        common.launch(sr.train, sr.Config, sr.PRESETS, sr.__doc__ or "")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--sr foo", "swinir-l"),
        ("--scale 3", "--scale 3"),
        ("--recipe foo", "--recipe foo"),
        ("--pairs nowhere", "nowhere"),
        ("--hr nowhere", "nowhere"),
        ("--pairs pairs --recipe bicubic", "--recipe"),
        ("--pairs pairs/hr", "no images as HR/ and LR/"),
        ("--pairs pairs --scale 2", "not --scale 2"),
        ("--pairs pairs --crop 33", "33 x 33"),
        ("--pairs names", "b"),
        ("--pairs sizes", "64 x 64 and 17 x 16"),
        ("--crop 8", "--crop 8"),
        ("--batch-size 0", "--batch-size 0"),
        ("--perceptual-weight -1", "--perceptual-weight -1"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(monkeypatch, tmp_path, pairs, capsys, flags, word):
    monkeypatch.chdir(tmp_path)
    save_pairs(tmp_path / "names", [(16, 16)] * 2)
    (tmp_path / "names" / "lr" / "1.png").rename(tmp_path / "names" / "lr" / "b.png")
    save_pairs(tmp_path / "sizes", [(16, 16)])
    common.save_image(tmp_path / "sizes" / "lr" / "0.png", uniform(3, 16, 17))
    assert command(monkeypatch, *flags.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and word in message
    written = {file.parts[-3] for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    # How large the photos are is known once they are decoded.
    assert written == ({"photos"} if "--crop 33" in flags else set())


def test_a_name_belongs_to_one_source(monkeypatch, tmp_path, pairs, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--pairs", pairs, "--name", "a") == 0
    before = (tmp_path / "runs/sr/a.pt").read_bytes()
    capsys.readouterr()
    assert command(monkeypatch, "--hr", pairs + "/hr", "--name", "a") == 2
    assert "give another --name" in capsys.readouterr().err
    assert (tmp_path / "runs/sr/a.pt").read_bytes() == before


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    torch.save({"ema": {}, "config": {"widths": [1]}}, tmp_path / "other.pt")
    with pytest.raises(common.UserError, match="not a network of sr.py"):
        sr.load_network(tmp_path / "other.pt")


@pytest.mark.parametrize("source", [("--recipe", "bicubic"), ("--pairs", "bicubic")])
def test_the_command_trains_from_an_empty_folder(tmp_path, tmp_path_factory, source):
    if source[0] == "--pairs":
        folder = tmp_path_factory.mktemp("elsewhere") / "bicubic"
        source = ("--pairs", save_pairs(folder, [(20, 24), (18, 19)]))
    flags = [*"--sr fsrcnn --preset smoke --steps 2 --crop 16".split(), *source]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(REPO / "sr.py"), *flags],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    names = {"fsrcnn-bicubic.pt", "fsrcnn-bicubic.safetensors", "log.jsonl"}
    decoded = {name for name in files if name.startswith("runs/sr/photos/")}
    assert files - decoded == {f"runs/sr/{name}" for name in names}
    assert sorted(Path(name).suffix for name in decoded) == [".npy", ".pixels"]
