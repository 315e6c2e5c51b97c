"""common/tiles.py, bench/sr.py: images in tiles, --upscale, published weights, ranges of flags."""

import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import metrics, sr
from common import UserError
from common.checkpoint import save_weights
from common.images import is_gray, load_pixels, save_image, to_uint8
from common.tiles import in_bands, in_tiles
from tests.drawn import psnr_y
from tests.tiny import CPU, small_net, uniform

TINY = sr.Config(sr="fsrcnn", compile=False, batch_size=2, crop=16, bf16=False, name="a", steps=1)


# ---- tiles ------------------------------------------------------------------------------------


SIZE = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, st.sampled_from([1, 2, 3]))
def test_tiles_cover_an_image_of_any_size(h, w, tile, overlap, scale):
    """Also where a side of the image, or the tile, is no larger than the overlap."""
    x, sizes = uniform(2, 3, h, w), []

    def function(x: Tensor) -> Tensor:
        sizes.append((x.shape[-2], x.shape[-1]))
        return x

    torch.testing.assert_close(in_tiles(function, (h, w), x, tile=tile, overlap=overlap), x)
    enlarged = lambda x: function(x).repeat_interleave(scale, 1).repeat_interleave(scale, 2)  # noqa: E731
    bands = [*in_bands(enlarged, x[0], tile=tile, overlap=overlap)]
    assert set(sizes) == {(min(h, tile), min(w, tile))}
    result, expected = torch.cat(bands, dim=1), to_uint8(enlarged(x[0]))
    assert result.dtype == torch.uint8 and torch.equal(result, expected)


@settings(max_examples=100, deadline=None)
@given(SIZE, SIZE, st.integers(6, 40), st.integers(4, 40))
def test_tiles_of_a_local_function_are_the_whole(h, w, tile, overlap):
    """The function darkens edges, but those of a tile have next to no weight."""
    hr, x, smooth = uniform(2, 3, 4 * h, 4 * w), uniform(2, 3, h, w), nn.AvgPool2d(3, 1, 1)

    def function(hr: Tensor, x: Tensor) -> Tensor:
        return F.avg_pool2d(hr, 4) + smooth(x)

    made = in_tiles(function, (h, w), hr, x, tile=tile, overlap=overlap)
    torch.testing.assert_close(made, function(hr, x), atol=2e-3, rtol=0)
    made = torch.cat([*in_bands(smooth, x[0], tile=tile, overlap=overlap)], dim=1)
    difference = made.int() - to_uint8(smooth(x[0])).int()
    assert difference.abs().max() <= 1


# ---- enlarging a photo ------------------------------------------------------------------------


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(32, 128), (101, 75), (7, 200), (200, 32), (1, 1)])
def test_a_photo_in_tiles_is_the_whole_rounded_to_8_bits(size):
    net, lr = small_net(), uniform(3, *size)
    whole = to_uint8(sr.super_resolve(net, lr[None])[0])
    made = pixels(sr.super_resolved_photo(net, lr, tile=48))
    difference = (made.int() - whole.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.02
    eight_bits = to_uint8(lr)
    again = sr.super_resolved_photo(net, eight_bits)
    whole = to_uint8(sr.super_resolve(net, eight_bits[None] / 255)[0])
    assert torch.equal(pixels(again), whole)


def test_sr_of_a_gray_photo_is_gray():
    net, lr = sr.sr_network("fsrcnn"), uniform(1, 40, 50).expand(3, -1, -1)
    assert not is_gray(sr.super_resolve(net, lr[None])[0])
    made = pixels(sr.super_resolved_photo(net, lr, tile=24))
    assert is_gray(made)
    mean = 255 * sr.super_resolve(net, lr[None], tile=24)[0].mean(0)
    assert (made[0] - mean).abs().max() < 1.6
    assert not is_gray(pixels(sr.super_resolved_photo(net, uniform(3, 20, 20))))


def peaks_of_enlarging() -> list[float]:
    """The most memory in MiB that a process has taken after two photos."""
    net, peaks = sr.FSRCNN(4, d=4, s=2, m=1), []
    for side in (400, 900):
        sr.super_resolved_photo(net, torch.zeros(3, side, side, dtype=torch.uint8), tile=128)
        peaks.append(commands.peak() / 2**20)
    return peaks


@pytest.mark.skipif(not commands.PEAK.is_file(), reason="needs Linux")
def test_a_larger_photo_takes_more_memory_for_its_result_only():
    small, large = commands.in_another(peaks_of_enlarging)
    result = 4 * 16 * 0.65e6 / 2**20  # MiB: Pillow takes 4 bytes a pixel
    assert large - small < 1.7 * result


def command(cwd: Path, *flags: object) -> subprocess.CompletedProcess:
    return commands.run("bench.sr", "--device", "cpu", "--no-bf16", *flags, cwd=cwd)


@pytest.fixture
def weights(tmp_path) -> Path:
    """A file of an untrained FSRCNN."""
    torch.manual_seed(0)
    net = sr.sr_network("fsrcnn")
    config = asdict(sr.Config(sr="fsrcnn"))
    save_weights(tmp_path / "net.safetensors", net.state_dict(), config=config)
    return tmp_path / "net.safetensors"


def test_strips_are_enlarged_bad_photos_skipped_and_losses_counted(tmp_path, weights):
    photos = tmp_path / "photos"
    save_image(photos / "strip.png", uniform(3, 32, 300))
    pages = [Image.new("RGB", (20, 20)), Image.new("RGB", (20, 20))]
    pages[0].save(photos / "pages.tif", save_all=True, append_images=pages[1:])
    Image.new("RGBA", (20, 20)).save(photos / "alpha.png")
    (photos / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    flags = ("--upscale", "photos", "--start-from", weights, "--out", "out")
    done = command(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    *_, lost, counts = done.stdout.splitlines()
    assert lost == "lost in reading: alpha of 1, further pages or frames of 1 photos"
    assert counts == "3 images in out/net, 1 skipped"
    assert "skipped: photos/drawing.png: not a readable image" in done.stdout
    assert load_pixels(tmp_path / "out/net/strip.png").shape == (3, 128, 1200)
    assert command(tmp_path, *flags).returncode == 0  # it replaces its own images


def test_a_photo_whose_result_is_not_finite_is_skipped(tmp_path):
    net = sr.sr_network("fsrcnn")
    net.last.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sr.super_resolved_photo(net, uniform(3, 20, 20))


# ---- published weights ------------------------------------------------------------------------

NEW = ((r"model\.0\.", "conv_first."), (r"model\.1\.sub\.23\.", "conv_body."),
       (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
       (r"model\.3\.", "conv_up1."), (r"model\.6\.", "conv_up2."), (r"model\.8\.", "conv_hr."),
       (r"model\.10\.", "conv_last."))  # fmt: skip
BSRGAN = ((r"^body\.", "RRDB_trunk."), (r"\.rdb", ".RDB"), ("conv_body", "trunk_conv"),
          ("conv_up", "upconv"), ("conv_hr", "HRconv"))  # fmt: skip


def renamed(weights: dict[str, Tensor], *tables: tuple) -> dict[str, Tensor]:
    """The weights with their names replaced as the tables say, one after the other."""
    for old, new in [row for table in tables for row in table]:
        weights = {re.sub(old, new, key): value for key, value in weights.items()}
    return weights


def architectures():
    metrics.import_torchvision()
    from spandrel.architectures import ESRGAN, HAT, SwinIR

    return SwinIR.SwinIR, ESRGAN.ESRGAN, HAT.HAT


def published(name: str) -> dict:
    """What a published file of this network holds, with random weights."""
    SwinIR, ESRGAN, HAT = architectures()
    torch.manual_seed(1)
    if name == "swinir-l":
        return {"params": SwinIR(upscale=4, **sr.SWINIR_L | {"img_size": 64}).state_dict()}
    if name == "swinir":
        return {"params": SwinIR(upscale=4, **sr.SWINIR | {"img_size": 64}).state_dict()}
    if name == "hat":
        return {"params_ema": sr.sr_network("hat").state_dict()}
    weights = sr.sr_network("rrdb").state_dict()
    return {"rrdb": weights, "rrdb new": {"params_ema": renamed(weights, NEW)},
            "rrdb BSRGAN": renamed(weights, NEW, BSRGAN),
            "rrdb DataParallel": {f"module.{k}": v for k, v in weights.items()}}[name]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    "name",
    ["swinir-l", "swinir", "hat", "rrdb", "rrdb new", "rrdb BSRGAN", "rrdb DataParallel"],
)
def test_published_weights_are_put_into_the_same_network(tmp_path, name):
    state = published(name)
    torch.save(state, tmp_path / "x.pth")
    torch.manual_seed(2)
    net = sr.sr_network(name.split()[0]).eval()
    sr.put_start(net, str(tmp_path / "x.pth"))
    import spandrel

    weights = {k.removeprefix("module."): v for k, v in {**state}.items()}
    weights = weights.get("params", weights.get("params_ema", weights))
    reference = spandrel.ModelLoader("cpu").load_from_state_dict({**weights}).eval()
    lr = uniform(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(lr), reference.model(lr), rtol=0, atol=1e-6)


def test_other_architectures_and_hyper_parameters_are_named_in_one_sentence(tmp_path):
    SwinIR, ESRGAN, _ = architectures()
    real = sr.SWINIR | sr.LIGHT | {"upsampler": "nearest+conv", "num_heads": [3] * 4}
    files = {
        "six": ESRGAN(scale=4, num_filters=64, num_blocks=6),
        "twice": ESRGAN(scale=2, num_filters=64, num_blocks=23),
        "real": SwinIR(upscale=4, **real),
    }
    for name, net in files.items():
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
    for flags, words in (
        ("rrdb six", ["ESRGAN x4", "num_blocks 6 (here 23)"]),
        ("rrdb twice", ["ESRGAN x2", "scale 2 (here 4)"]),
        ("swinir-l real", ["SwinIR x4", "upsampler nearest+conv (here pixelshuffledirect)",
                           "num_heads [3, 3, 3, 3] (here [6, 6, 6, 6])"]),
        ("swinir-l six", ["ESRGAN x4", "another network (SwinIR)"]),
        ("fsrcnn six", ["ESRGAN x4", "another network (FSRCNN)"]),
    ):  # fmt: skip
        network, name = flags.split()
        with pytest.raises(UserError) as error:
            sr.put_start(sr.sr_network(network), str(tmp_path / f"{name}.pth"))
        assert str(error.value).startswith(f"--start-from {tmp_path}/{name}.pth: ")
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "state", [{}, {"a": 1}, {"a": torch.zeros(2)}, {"params": [1]}, [1], {3: 4}]
)
def test_other_files_are_refused_in_one_sentence(tmp_path, state):
    torch.save(state, tmp_path / "x.pth")
    save_image(tmp_path / "photos/a.png", uniform(3, 20, 20))
    for flags in (["--upscale", "photos"], ["--steps", 1]):
        flags = [*flags, "--sr", "fsrcnn", "--start-from", "x.pth"]
        commands.assert_refused(command(tmp_path, *flags), "x.pth")


def test_published_weights_train_and_enlarge(tmp_path):
    """Network and scale are those of the flags."""
    hr = uniform(3, 80, 80)
    save_image(tmp_path / "pairs/hr/a.png", hr)
    save_image(tmp_path / "pairs/lr/a.png", F.avg_pool2d(hr, 4))
    torch.save(published("swinir-l"), tmp_path / "x.pth")
    flags = ("--sr", "swinir-l", "--start-from", "x.pth", "--no-compile")
    training = ("--pairs", "pairs", "--crop", 16, "--batch-size", 1, "--steps", 1, "--name", "a")
    done = command(tmp_path, *flags, *training, "--learning-rate", 1e-30)
    assert done.returncode == 0, done.stderr
    done = command(tmp_path, *flags, "--upscale", "pairs/lr")
    assert done.returncode == 0, done.stderr
    made = load_pixels(tmp_path / "runs/sr/x/a.png")
    net = sr.load_network(tmp_path / "runs/sr/a.safetensors")
    assert torch.equal(
        made, pixels(sr.super_resolved_photo(net, load_pixels(tmp_path / "pairs/lr/a.png")))
    )


# ---- test -------------------------------------------------------------------------------------


def write_test_pairs(
    folder: Path, sizes=((36, 40), (33, 32))
) -> list[tuple[np.ndarray, Image.Image]]:
    """Pairs as RealSR publishes them; returns HR (H, W, 3) and LR of each."""
    pairs = []
    for i, (h, w) in enumerate(sizes):
        hr = F.interpolate(uniform(1, 3, h, w, seed=i), scale_factor=4, mode="bicubic")[0]
        names = [folder / f"Canon/Test/4/Canon_{i}_{kind}.png" for kind in ("HR", "LR4")]
        save_image(names[0], hr.clamp(0, 1))
        save_image(names[1], F.avg_pool2d(hr, 4).clamp(0, 1))
        pairs.append((np.asarray(Image.open(names[0])), Image.open(names[1])))
    return pairs


def rows_of(done: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """The cells of each row of the printed table, by its second cell."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[1]: [row[0], *row[2:]] for row in cells}


def test_a_network_is_tested_on_pairs_beside_bicubic(tmp_path, weights, no_metric_weights):
    pairs = write_test_pairs(tmp_path / "RealSR")
    net = sr.load_network(weights)
    done = command(tmp_path, "--test", "RealSR", "--start-from", weights)
    assert done.returncode == 0, done.stderr
    rows, expected = rows_of(done), {}
    bicubic = [lr.resize(hr.shape[1::-1], Image.Resampling.BICUBIC) for hr, lr in pairs]
    expected["bicubic"] = [
        psnr_y(hr, np.asarray(x)) for (hr, _), x in zip(pairs, bicubic, strict=True)
    ]
    enlarged = [
        sr.super_resolve(net, pixels(lr)[None] / 255)[0].permute(1, 2, 0).numpy() for _, lr in pairs
    ]
    expected["net.safetensors"] = [
        psnr_y(hr, np.round(255 * x)) for (hr, _), x in zip(pairs, enlarged, strict=True)
    ]
    assert rows.keys() == {"enlarged by", "---", *expected}
    for name, values in expected.items():
        folder, psnr, ssim, lpips, dists, n = rows[name]
        assert (folder, lpips, dists, n) == ("RealSR", "-", "-", "2")
        assert float(psnr) == pytest.approx(np.mean(values), abs=0.006) and 0 < float(ssim) < 1
    missing = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("no ")]
    assert missing == ["no LPIPS", "no DISTS"]
    assert not (tmp_path / "runs").exists()  # nothing is trained or written


def compact(upscale: int = 4, channels: int = 3) -> nn.Module:
    """A small network that is not among those of bench.sr."""
    metrics.import_torchvision()
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(3)
    sizes = {"num_in_ch": channels, "num_out_ch": channels, "num_feat": 8, "num_conv": 2}
    net = Compact(upscale=upscale, act_type="prelu", **sizes)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_published_network_of_any_architecture_is_tested_and_enlarges(
    tmp_path, no_metric_weights, suffix
):
    """No flag names it."""
    pairs, net, file = write_test_pairs(tmp_path / "RealSR"), compact(), f"compact.{suffix}"
    if suffix == "pth":
        torch.save({"params_ema": net.state_dict()}, tmp_path / file)
    else:
        save_file(net.state_dict(), tmp_path / file)
    done = command(tmp_path, "--test", "RealSR", "--start-from", file)
    assert done.returncode == 0, done.stderr
    x = [net(pixels(lr)[None] / 255).clamp(0, 1)[0].permute(1, 2, 0).numpy() for _, lr in pairs]
    values = [psnr_y(hr, np.round(255 * x)) for (hr, _), x in zip(pairs, x, strict=True)]
    assert float(rows_of(done)[file][1]) == pytest.approx(np.mean(values), abs=0.006)
    photo = tmp_path / "RealSR/Canon/Test/4/Canon_1_LR4.png"
    done = command(tmp_path, "--upscale", photo, "--start-from", file, "--out", "out")
    assert done.returncode == 0, done.stderr
    made = load_pixels(tmp_path / "out/compact/Canon_1_LR4.png")
    expected = torch.from_numpy(np.round(255 * x[1])).permute(2, 0, 1)
    assert (made - expected).abs().max() <= 1


def test_what_can_not_be_tested_is_one_sentence(tmp_path, weights, no_metric_weights):
    write_test_pairs(tmp_path / "RealSR")
    torch.save(compact(upscale=2).state_dict(), tmp_path / "twice.pth")
    torch.save(compact(channels=1).state_dict(), tmp_path / "gray.pth")
    broken = {key: value * float("nan") for key, value in compact().state_dict().items()}
    torch.save(broken, tmp_path / "broken.pth")
    torch.save({"params": Executed()}, tmp_path / "code.pth")
    test = ["--test", "RealSR", "--start-from"]
    for flags, words in (
        (["--test", "RealSR"], ["fsrcnn-realesrgan.safetensors is missing", "without --test"]),
        (["--test", "nowhere", "--start-from", weights], ["--pairs nowhere: no such folder"]),
        ([*test, "nowhere.pth"], ["nowhere.pth is missing"]),
        ([*test, "twice.pth"], ["twice.pth: a network of scale 2", "scale 4"]),
        ([*test, "gray.pth"], ["gray.pth", "not for RGB images"]),
        ([*test, "broken.pth"], ["broken.pth", "not finite"]),
        ([*test, "code.pth"], ["code.pth", "holds Python objects"]),
        ([*test, weights, "--upscale", "RealSR"], ["--upscale and --test are two tasks"]),
    ):
        done = command(tmp_path, "--sr", "fsrcnn", *flags)
        commands.assert_refused(done, *words)
    assert not (tmp_path / "executed").exists()


class Executed:
    """Its pickle would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


# ---- ranges of flags --------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(sr.RANGES.keys() - {"steps", "perceptual_weight"}))
def test_a_training_at_the_end_of_a_range_works_or_ends_in_one_sentence(tmp_path, key):
    save_image(tmp_path / "hr/a.png", uniform(3, 80, 80))
    for number, value in enumerate(sr.RANGES[key]):
        changed = {
            key: (value,) * 2 if key == "betas" else value,
            "out": str(tmp_path / str(number)),
        }
        cfg = replace(TINY, hr=(str(tmp_path / "hr"),), **changed)
        try:
            assert sr.train(cfg, CPU).is_file()
        except UserError as error:
            assert f"--{key.replace('_', '-')} {value}" in str(error) or "nothing to train" in str(
                error
            )


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", float("nan")), ("betas", (0.9, 1.0)), ("steps", 0), ("scale", 3),
     ("ema_decay", 1.1), ("seed", -1), ("batch_size", 2**17), ("sr", "foo")],
)  # fmt: skip
def test_what_lies_outside_is_refused_also_where_it_is_not_used(key, value):
    for extra in ({}, {"upscale": ("photos",)}):
        with pytest.raises(UserError, match=f"--{key.replace('_', '-')}"):
            sr.completed(replace(TINY, **extra, **{key: value}))
