"""common.py: image files, the command line, crops, checkpoints, and the training loop on a toy."""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import common
from tests.fake_cuda import fake_cuda

REPO = Path(__file__).resolve().parents[1]
CPU = common.Runtime(torch.device("cpu"))


def drawn_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth uint8 pixels (H, W, channels)."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(y / (5 + c + seed) + x / (9 + 2 * c)) for c in range(channels)]
    return (127.5 + 127 * np.stack(planes, -1)).astype(np.uint8)


def loaded(path: Path) -> np.ndarray:
    """load_image as (H, W, 3), after a check of what it promises of every image."""
    image = common.load_image(path)
    assert image.dtype == torch.float32 and image.shape[0] == 3 and image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1
    return image.permute(1, 2, 0).numpy()


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colour (H, W, C) of 8 bits seen over white: (H, W, C) in [0, 1]."""
    share = alpha.astype(float)[..., None] / 255
    return color / 255 * share + (1 - share)


# ---- image files ------------------------------------------------------------------------------


def test_rgb_is_read_exactly(tmp_path):
    pixels = drawn_pixels(20, 31)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), pixels.astype(np.float32) / 255)


def test_gray_is_repeated(tmp_path):
    pixels = drawn_pixels(20, 31, 1)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "x.png")
    expected = np.repeat(pixels, 3, axis=2).astype(np.float32) / 255
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_laid_over_white(tmp_path, channels):
    pixels = drawn_pixels(20, 31, channels)
    Image.fromarray(pixels, mode="LA" if channels == 2 else "RGBA").save(tmp_path / "x.png")
    expected = over_white(pixels[..., :-1], pixels[..., -1])
    expected = np.broadcast_to(expected, (20, 31, 3))
    np.testing.assert_allclose(loaded(tmp_path / "x.png"), expected, atol=1.01 / 255)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_is_looked_up(tmp_path, transparent):
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    colors = np.array([[0, 0, 0], [250, 3, 9], [4, 200, 8], [1, 2, 180], [90, 90, 90]], np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette(colors.tobytes())
    alpha = np.array([255, 255, 0, 255, 128] if transparent else [255] * 5, np.uint8)
    image.save(tmp_path / "x.png", **({"transparency": alpha.tobytes()} if transparent else {}))
    with Image.open(tmp_path / "x.png") as written:
        assert written.mode == "P" and ("transparency" in written.info) == transparent
    expected = over_white(colors[indices], alpha[indices])
    np.testing.assert_allclose(loaded(tmp_path / "x.png"), expected, atol=1.01 / 255)


def test_one_transparent_color_is_white(tmp_path):
    pixels = drawn_pixels(10, 10)
    pixels[2:5, 2:5] = (255, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=(255, 0, 255))
    pixels[2:5, 2:5] = 255
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), pixels.astype(np.float32) / 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_keeps_its_precision(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    pixels = loaded(tmp_path / f"x{suffix}")
    np.testing.assert_allclose(pixels[..., 0], values / 65535, atol=1e-7, rtol=0)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


def test_a_rotated_jpeg_comes_upright(tmp_path):
    pixels, exif = drawn_pixels(24, 40), Image.Exif()
    Image.fromarray(pixels).save(tmp_path / "plain.jpg", quality=95)
    exif[0x0112] = 6  # "the camera was turned by 90 degrees": show it turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    plain, turned = loaded(tmp_path / "plain.jpg"), loaded(tmp_path / "turned.jpg")
    assert turned.shape == (40, 24, 3)
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def test_a_bad_file_is_a_value_error_that_names_it(tmp_path):
    Image.fromarray(drawn_pixels(64, 64)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("truncated.jpg", "text.png", "empty.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            common.load_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_damaged_file_is_an_image_or_a_value_error(tmp_path, suffix):
    path, gen = tmp_path / f"x{suffix}", common.generator(1)
    Image.fromarray(drawn_pixels(24, 31)).save(path)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for position in torch.randint(len(whole), (3,), generator=gen).tolist():
            damaged[position] ^= 1 + position % 255
        path.write_bytes(damaged)
        try:
            loaded(path)
        except ValueError as error:
            assert path.name in str(error)


def test_an_image_of_8_bits_survives_a_round_trip(tmp_path):
    image = torch.randint(0, 256, (3, 17, 23), generator=common.generator(2)).float() / 255
    common.save_image(tmp_path / "new" / "x.png", image)
    assert torch.equal(common.load_image(tmp_path / "new" / "x.png"), image)
    common.save_image(tmp_path / "x.png", torch.tensor([-0.3, 0.4999 / 255, 1.7]).view(3, 1, 1))
    assert (common.load_image(tmp_path / "x.png").flatten() * 255).tolist() == [0, 0, 255]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.txt"
    for content in (None, "old"):
        if content:
            path.write_text(content)
        with pytest.raises(RuntimeError), common.replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError("the disk is full")
        assert [p.name for p in tmp_path.iterdir()] == (["x.txt"] if content else [])
    assert path.read_text() == "old"
    with common.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_images_are_listed_in_depth_sorted_and_once(tmp_path):
    for name in ("b.PNG", "a/d.jpg", "a/c.webp", "notes.txt", ".x.png.1.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = common.list_images([str(tmp_path), str(tmp_path / "b.PNG")], "--hr")
    assert listed == [tmp_path / "a/c.webp", tmp_path / "a/d.jpg", tmp_path / "b.PNG"]


def test_a_missing_or_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(common.UserError, match="--hr .*nowhere: no such"):
        common.list_images([str(tmp_path / "nowhere")], "--hr")
    with pytest.raises(common.UserError, match="--hr .*: no images"):
        common.list_images([str(tmp_path)], "--hr")


def test_images_are_cut_to_a_multiple_of_the_scale():
    image = torch.rand(3, 67, 50, generator=common.generator(0))
    assert torch.equal(common.crop_to_multiple(image, 4, "x"), image[:, :64, :48])
    with pytest.raises(ValueError, match="small.png"):
        common.crop_to_multiple(image[:, :31], 4, "small.png")


# ---- command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """A Config as the stages have."""

    steps: int = 100  # training steps, 50 % of them on crops
    learning_rate: float = 1e-4  # of AdamW
    out: str = "runs/x"  # folder
    sizes: tuple[int, ...] = (1, 2)  # several numbers
    photos: tuple[str, ...] = ()  # files
    bf16: bool = True  # precision
    skip: bool = False


PRESETS = {"paper": {}, "small": {"steps": 7, "sizes": (5,), "bf16": False}}


def test_a_flag_beats_the_preset_and_the_preset_beats_the_default(capsys):
    parse = common.parse_args
    assert parse(Flags, PRESETS, "", ["--preset", "paper"]) == Flags()
    small = parse(Flags, PRESETS, "", ["--preset", "small"])
    assert small == replace(Flags(), steps=7, sizes=(5,), bf16=False)
    argv = ["--preset", "small", "--steps", "9", "--bf16", "--learning-rate", "0.5"]
    assert parse(Flags, PRESETS, "", argv) == Flags(9, 0.5, sizes=(5,))
    assert parse(Flags, {}, "", []) == Flags()
    assert "preset small" in capsys.readouterr().out


def test_the_default_preset_depends_on_the_device(capsys, monkeypatch):
    for cuda, steps in ((True, 100), (False, 7)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert common.parse_args(Flags, PRESETS, "", []).steps == steps


def test_tuples_and_switches_are_flags():
    argv = ["--sizes", "3", "4", "5", "--photos", "a", "b", "--no-bf16", "--skip"]
    flags = common.parse_args(Flags, {}, "", argv)
    assert flags == Flags(sizes=(3, 4, 5), photos=("a", "b"), bf16=False, skip=True)


@pytest.mark.parametrize(
    "argv",
    [["--stepz", "3"], ["--step", "3"], ["--steps", "x"], ["--preset", "huge"], ["stray"]],
    ids=" ".join,
)
def test_an_unknown_flag_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        common.parse_args(Flags, PRESETS, "", argv)
    assert stopped.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_the_help_text_is_the_comment_of_the_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        common.parse_args(Flags, {}, "what it does", ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "what it does" in text and "training steps, 50 % of them on crops" in text


@dataclass(frozen=True)
class Writing:
    """Config of a stage that writes one image."""

    out: str = "out"  # folder
    seed: int = 0  # of all draws
    device: str = "cpu"  # cpu or cuda


@pytest.mark.parametrize("argv", [["--out", "FILE"], ["--device", "abacus"]], ids=" ".join)
def test_an_impossible_value_is_one_sentence(argv, tmp_path, monkeypatch, capsys):
    def main(cfg: Writing, rt: common.Runtime) -> None:
        common.save_image(Path(cfg.out) / "x.png", torch.zeros(3, 8, 8))

    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr(sys, "argv", ["stage.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        common.launch(main, Writing, {}, "")
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message.startswith("error: ") and "\n" not in message


# ---- randomness -------------------------------------------------------------------------------


def test_generators_are_reproducible_and_independent():
    # A shorter key is no prefix of a longer one, a large number no pair of small ones.
    keys = [(0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32,), (2**62, 1), (1, 2**31)]
    draws = [torch.randn(4000, generator=common.generator(*key)) for key in keys]
    again = [torch.randn(4000, generator=common.generator(*key)) for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    correlation = np.corrcoef(torch.stack(draws)) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.08


def test_nothing_draws_from_the_global_generator(photos):
    state = torch.get_rng_state()
    crops(photos)[0]
    torch.randn(3, generator=common.generator(0))
    assert torch.equal(torch.get_rng_state(), state)


# ---- crops ------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Three drawn photos."""
    for seed in range(3):
        pixels = drawn_pixels(40 + seed, 50, seed=7 * seed)
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        common.save_image(tmp_path / "photos" / f"{seed}.png", image)
    return sorted((tmp_path / "photos").iterdir())


def crops(files: list[Path], seed: int = 0, rank: int = 0, size: int = 16) -> common.PhotoCrops:
    rt = common.Runtime(torch.device("cpu"), rank, world_size=1)
    return common.PhotoCrops(files, size, 4, seed, rt)


def test_a_crop_depends_on_seed_and_number_alone(photos):
    first, again = crops(photos), crops(photos)
    assert first[5].shape == (3, 16, 16)
    for i in (3, 0, 10**9):
        assert torch.equal(first[i], again[i])
        assert torch.equal(first[i], crops(photos, rank=1)[i])
    items = [data[i] for data in (first, crops(photos, seed=1)) for i in (0, 1)]
    assert len({tuple(item.flatten().tolist()) for item in items}) == 4


def test_crops_keep_to_the_blocks_of_jpeg(tmp_path):
    columns = torch.arange(50).expand(3, 41, 50) / 255
    common.save_image(tmp_path / "a.png", columns)
    data = crops([tmp_path / "a.png"])
    values = [(data[i] * 255).round()[0, 0] for i in range(30)]
    lefts = {int(row.min()) for row in values}
    assert lefts == {0, 8, 16, 24, 32}


def test_crops_are_parts_of_all_photos_some_flipped(photos):
    whole = [common.load_image(file).unfold(1, 16, 1).unfold(2, 16, 1) for file in photos]
    found = set()
    data = crops(photos)
    for i in range(40):
        for flipped, crop in enumerate((data[i], data[i].flip(2))):
            for number, windows in enumerate(whole):
                same = (windows == crop[:, None, None]).all(-1).all(-1).all(0)
                found |= {(number, flipped)} if same.any() else set()
    assert found == {(n, flipped) for n in range(3) for flipped in (0, 1)}


def test_batches_go_on_where_a_stopped_run_left_off(photos):
    whole = list(crops(photos).batches(range(4), CPU.device))
    rest = list(crops(photos).batches([2, 3], CPU.device))
    assert len(whole) == 4 and whole[0].shape == (4, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_bad_photos_are_skipped_and_counted(photos, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("not an image")
    common.save_image(tmp_path / "tiny.png", torch.zeros(3, 15, 99))
    data = crops([tmp_path / "bad.png", *photos, tmp_path / "tiny.png"])
    assert data.files == photos
    message = capsys.readouterr().out
    assert "2 of 5" in message and "bad.png" in message
    with pytest.raises(common.UserError, match="16 x 16"):
        crops([tmp_path / "bad.png", tmp_path / "tiny.png"])


def test_a_truncated_photo_does_not_stop_the_run_and_is_named_once(photos, tmp_path, capsys):
    Image.fromarray(drawn_pixels(64, 64)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    mixed = crops([photos[0], tmp_path / "truncated.jpg", photos[1]])
    assert torch.stack([mixed[i] for i in range(30)]).shape == (30, 3, 16, 16)
    assert capsys.readouterr().out.count("truncated.jpg") == 1
    with pytest.raises(common.UserError):
        crops([tmp_path / "truncated.jpg"])[0]


# ---- weights ----------------------------------------------------------------------------------


def test_checkpoints_survive_a_round_trip(tmp_path):
    state = {"net": {"weight": torch.rand(3)}, "step": 4, "config": {"out": "x", "sizes": (1, 2)}}
    common.save_checkpoint(tmp_path / "x.pt", state)
    read = common.load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(read["net"].pop("weight"), state["net"].pop("weight")) and read == state


def test_safetensors_are_read_with_their_config(tmp_path):
    weights, metadata = {"a.weight": torch.rand(3, 2).half()}, {"config": json.dumps({"width": 5})}
    save_file(weights, tmp_path / "x.safetensors", metadata)
    read = common.load_checkpoint(tmp_path / "x.safetensors")
    assert read["config"] == {"width": 5} and read["ema"]["a.weight"].dtype == torch.float32
    assert torch.equal(read["ema"]["a.weight"], weights["a.weight"].float())


def test_shipped_weights_keep_their_config_but_no_path_of_the_machine(tmp_path):
    own = {"lr": [str(tmp_path)], "out": str(tmp_path), "widths": [8, 16], "learning_rate": 1e-4}
    state = {"step": 7, "ema": {"a": torch.rand(3)}, "config": own | {"extractors": own}}
    common.save_checkpoint(tmp_path / "x.pt", state)
    files = [tmp_path / "x.pt", tmp_path / "x.safetensors"]
    subprocess.run([sys.executable, Path(common.__file__), *files], check=True)
    read = common.load_checkpoint(files[1])
    kept = {"widths": [8, 16], "learning_rate": 1e-4}
    assert read["config"] == kept | {"extractors": kept}
    torch.testing.assert_close(read["ema"]["a"], state["ema"]["a"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, suffix):
    common.save_checkpoint(tmp_path / "whole.pt", {"net": torch.rand(1000)})
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / f"x{suffix}"
    for data in (b"", b"not a checkpoint", whole[: len(whole) // 2], bytes(1000)):
        path.write_bytes(data)
        with pytest.raises(common.UserError, match=path.name) as error:
            common.load_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(common.UserError, match="missing"):
        common.load_checkpoint(tmp_path / f"missing{suffix}")


class Trap:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self):
        return print, ("the trap was unpickled",)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_with_an_object_in_it_is_refused(tmp_path, capsys):
    torch.save({"net": Trap()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(common.UserError, match=name):
            common.load_checkpoint(tmp_path / name)
    assert "trap" not in capsys.readouterr().out


# ---- training loop ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """The fields that fit reads of a stage's Config."""

    seed: int = 0
    bf16: bool = False
    cooldown: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9
    accumulate: int = 1
    compile: bool = False
    tensorboard: bool = False
    save_every: int = 4
    log_every: int = 1


def toy_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def toy_loss(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Denoising: it uses the batch and the draws."""
    noise = torch.randn(x.shape, generator=generator)
    return {"loss": (net(x + 0.1 * noise) - x).square().mean(), "noise": noise.mean()}


def toy_fit(
    folder: Path, steps: int, net=None, loss=toy_loss, name: str = "last.pt", **settings
) -> nn.Module:
    """fit() on the toy with the photos of a folder."""
    cfg, net = Toy(**settings), net or toy_net()
    groups = [{"params": list(net.parameters()), "lr": 3e-3}]
    data = [crops(sorted((folder / "photos").iterdir()), cfg.seed)]
    return common.fit(CPU, net, loss, data, groups, folder / name, cfg, steps, asdict(cfg))


def same(a, b) -> bool:
    """Equality of nested dicts and lists of tensors and numbers, bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(photos, tmp_path):
    whole = toy_fit(tmp_path, 10, name="whole.pt")
    toy_fit(tmp_path, 6, name="parts.pt")
    assert common.load_checkpoint(tmp_path / "parts.pt")["step"] == 6
    parts = toy_fit(tmp_path, 10, name="parts.pt")
    assert same(whole.state_dict(), parts.state_dict())
    checkpoints = [common.load_checkpoint(tmp_path / f"{name}.pt") for name in ("whole", "parts")]
    assert set(checkpoints[0]) == {"step", "net", "ema", "opt", "config"}
    assert same(*checkpoints)
    # A finished run does nothing more, and another seed is another run.
    assert same(toy_fit(tmp_path, 10, name="parts.pt").state_dict(), parts.state_dict())
    other = toy_fit(tmp_path, 10, name="other.pt", seed=1)
    assert not same(other.state_dict(), parts.state_dict())


@pytest.mark.parametrize(("cooldown", "steps_worth"), [(0.0, 10.0), (0.5, 8.0), (1.0, 5.5)])
def test_the_learning_rate_falls_to_0_over_the_cooldown(photos, tmp_path, cooldown, steps_worth):
    # Adam moves a weight with a constant gradient by the learning rate: 10 steps show their sum.
    # With a cooldown of half of them: six whole ones, then .8, .6, .4 and .2.
    def slope(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": sum(p.sum() for p in net.parameters()) / 1000}

    cfg, groups = Toy(cooldown=cooldown), lambda net: [{"params": [*net.parameters()], "lr": 1e-2}]
    data, path = [crops(photos)], tmp_path / "last.pt"

    def interrupted(*given, **named) -> dict[str, Tensor]:
        if path.is_file():  # written after step 4
            raise InterruptedError
        return slope(*given, **named)

    for loss in (interrupted, slope):
        net = toy_net()
        with contextlib.suppress(InterruptedError):
            common.fit(CPU, net, loss, data, groups(net), path, cfg, 10, {})
    assert common.load_checkpoint(path)["step"] == 10
    moved = toy_net()[0].weight - common.load_checkpoint(path)["net"]["0.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * steps_worth), rtol=1e-3, atol=0)


def test_the_loss_falls(photos, tmp_path):
    toy_fit(tmp_path, 60)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 61))
    losses = [row["loss"] for row in log]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


def test_the_result_is_the_average_of_the_weights_in_eval_mode(photos, tmp_path):
    net = toy_fit(tmp_path, 5)
    state = common.load_checkpoint(tmp_path / "last.pt")
    assert same(dict(net.state_dict()), dict(state["ema"]))
    assert not same(dict(state["ema"]), dict(state["net"]))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_parameters_outside_of_the_groups_stay_as_they_are(photos, tmp_path):
    net, before = toy_net(), toy_net()
    groups = [{"params": list(net[2].parameters()), "lr": 1e-2}]
    data, path = [crops(photos)], tmp_path / "last.pt"
    common.fit(CPU, net, toy_loss, data, groups, path, Toy(), 3, {})
    assert same(dict(net[0].state_dict()), dict(before[0].state_dict()))
    assert not same(dict(net[2].state_dict()), dict(before[2].state_dict()))


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_a_number_stops_and_the_good_checkpoint_stays(
    photos, tmp_path, log_every
):
    calls = []

    def breaking(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        calls.append(1)
        values = toy_loss(net, x, generator)
        return {"loss": values["loss"] * (float("nan") if len(calls) == 6 else 1.0)}

    with pytest.raises(common.UserError, match="nan"):
        toy_fit(tmp_path, 20, loss=breaking, log_every=log_every)
    state = common.load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 4
    assert all(value.isfinite().all() for part in ("net", "ema") for value in state[part].values())


def test_a_gradient_that_is_not_a_number_never_reaches_a_checkpoint(photos, tmp_path):
    calls = []

    def breaking(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        calls.append(1)
        loss = toy_loss(net, x, generator)["loss"]
        if len(calls) == 8:  # the loss is finite, its gradient is not: sqrt at zero
            loss = loss + (loss - loss).sqrt()
        return {"loss": loss}

    with pytest.raises(common.UserError):
        toy_fit(tmp_path, 20, loss=breaking)
    state = common.load_checkpoint(tmp_path / "last.pt")
    assert all(value.isfinite().all() for value in state["net"].values())


@pytest.mark.parametrize("name", ["save_every", "log_every", "accumulate"])
def test_counts_of_training_are_at_least_1(photos, tmp_path, name):
    with pytest.raises(common.UserError, match=f"--{name.replace('_', '-')} 0"):
        toy_fit(tmp_path, 1, **{name: 0})
    assert not (tmp_path / "last.pt").exists()


def test_a_checkpoint_with_other_trained_parameters_is_refused(photos, tmp_path):
    toy_fit(tmp_path, 1)
    net = toy_net()
    groups = [{"params": list(net[2].parameters()), "lr": 1e-2}]
    with pytest.raises(common.UserError, match="another configuration"):
        common.fit(CPU, net, toy_loss, [crops(photos)], groups, tmp_path / "last.pt", Toy(), 2, {})


def test_a_checkpoint_of_another_network_is_refused(photos, tmp_path):
    toy_fit(tmp_path, 1)
    deeper = nn.Sequential(*toy_net(), nn.Conv2d(3, 3, 1))
    wider = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.SiLU(), nn.Conv2d(9, 3, 3, padding=1))
    for net in (deeper, wider):
        with pytest.raises(common.UserError, match="another configuration"):
            toy_fit(tmp_path, 2, net=net)


def test_the_signal_handler_is_put_back(photos, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    toy_fit(tmp_path, 1)
    assert signal.getsignal(signal.SIGTERM) is before

    def failing(*_: object, **__: object) -> dict[str, Tensor]:
        raise RuntimeError("of the loss")

    with pytest.raises(RuntimeError, match="of the loss"):
        toy_fit(tmp_path, 2, loss=failing)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(photos, tmp_path):
    script = "import sys, pathlib, test_common; test_common.toy_slowly(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as run:
        for line in run.stdout:  # until it trains
            if "3/100000" in line:
                break
        run.send_signal(signal.SIGTERM)
        _, message = run.communicate(timeout=60)
    assert run.returncode == 1 and "stopped at step" in message and "Traceback" not in message
    step = common.load_checkpoint(tmp_path / "last.pt")["step"]
    assert 3 <= step < 100_000
    toy_fit(tmp_path, step + 2, save_every=10**6)
    whole = toy_fit(tmp_path, step + 2, name="whole.pt", save_every=10**6)
    resumed = common.load_checkpoint(tmp_path / "last.pt")["ema"]
    assert all(torch.equal(resumed[key], value) for key, value in whole.state_dict().items())


def toy_of(folder: Path, processes: int, accumulate: int, name: str) -> subprocess.CompletedProcess:
    """The toy run of the test below, as torchrun starts it."""
    script = (
        "import sys, pathlib, test_common, common\n"
        "with common.runtime('cpu') as test_common.CPU:\n"
        f"    test_common.toy_fit(pathlib.Path({str(folder)!r}), 6, name={name!r},"
        f" accumulate={accumulate})"
    )
    (folder / f"{name}.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, folder / f"{name}.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_one_process_with_two_batches_does_what_two_processes_do(photos, tmp_path):
    """The same batches and draws, so the same weights up to the order of a sum of two."""
    one = toy_fit(tmp_path, 6, name="one.pt", accumulate=2)
    done = toy_of(tmp_path, 2, 1, "two.pt")
    assert done.returncode == 0, done.stderr
    two = common.load_checkpoint(tmp_path / "two.pt")
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two["ema"][key], value, rtol=1e-5, atol=1e-7)
    other = toy_fit(tmp_path, 6, name="other.pt", accumulate=1)
    assert not torch.equal(other.state_dict()["0.weight"], one.state_dict()["0.weight"])


def test_preview_numbers_are_logged_and_refresh_comes_every_ten_steps(photos, tmp_path):
    net, calls = toy_net(), []
    groups = [{"params": list(net.parameters()), "lr": 3e-3}]
    data = [crops(photos)]
    common.fit(
        CPU, net, toy_loss, data, groups, tmp_path / "last.pt", Toy(save_every=20), 21, {},
        preview=lambda: {"seen": 7.0},
        refresh=lambda x, generator: calls.append((x, torch.rand(1, generator=generator))),
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "seen" in line] == [20, 21]
    assert len(calls) == 3 and torch.equal(
        calls[1][0], next(crops(photos).batches([10], CPU.device))
    )


def test_floating_point_operations_are_counted(photos, tmp_path, capsys):
    """Two convolutions of 3 x 3: forward, gradient of the weights, and of the second's input."""
    toy_fit(tmp_path, 1)
    found = re.search(r"([\d.]+) images/s, ([\d.e+-]+) TFLOP/s", capsys.readouterr().out)
    per_image = 2 * 9 * 3 * 8 * 16 * 16 * (2 + 3)
    assert float(found[2]) * 1e12 / float(found[1]) == pytest.approx(per_image, rel=0.06)


def test_tensorboard_is_optional(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        toy_fit(tmp_path, 1, tensorboard=True)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(photos, tmp_path):
    plain = toy_fit(tmp_path, 3, name="plain.pt")
    net = toy_net()
    groups = [{"params": list(net.parameters()), "lr": 3e-3}]
    cfg, path = Toy(compile=True), tmp_path / "compiled.pt"
    common.fit(CPU, net, toy_loss, [crops(photos)], groups, path, cfg, 3, {}, compiled=[net])
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_kill_9_loses_no_more_than_the_steps_since_the_last_checkpoint(photos, tmp_path):
    script = (
        "import sys, pathlib, test_common; test_common.toy_slowly(pathlib.Path(sys.argv[1]), 4)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as run:
        for line in run.stdout:
            if "11/100000" in line:
                break
        run.kill()
    step = common.load_checkpoint(tmp_path / "last.pt")["step"]
    assert step in (8, 12)
    toy_fit(tmp_path, step + 2, save_every=4)
    whole = toy_fit(tmp_path, step + 2, name="whole.pt", save_every=10**6)
    resumed = common.load_checkpoint(tmp_path / "last.pt")["ema"]
    assert all(torch.equal(resumed[key], value) for key, value in whole.state_dict().items())


def toy_slowly(folder: Path, save_every: int = 10**6) -> None:
    """The toy run that the tests above stop."""

    def pausing(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        time.sleep(0.05)
        return toy_loss(net, x, generator)

    torch.set_num_threads(1)
    toy_fit(folder, 100_000, loss=pausing, save_every=save_every)


def test_names_of_photos_depend_on_their_path_below_the_folder_given(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    files = [here / "a.png", here / "b" / "a.jpg", here / "b.c.png", there / "B" / "z.png"]
    expected = ["a", "b_a", "b.c", "B_z"]
    assert common.photo_names(files, [str(here), str(there)]) == expected
    assert common.photo_names(files[1:], [str(here), str(there)]) == expected[1:]
    assert common.photo_names(files[1:2], [str(files[1])]) == ["a"]


def test_names_of_photos_are_never_equal_but_for_their_case(tmp_path):
    folders = [tmp_path / "x", tmp_path / "y"]
    files = [
        f / name for f in folders for name in ("a.png", "A.jpg", "a.webp", "b/c.png", "b_C.png")
    ]
    names = common.photo_names(files, [*map(str, folders)])
    assert len({name.casefold() for name in names}) == len(files)
    turned = common.photo_names(files[::-1], [*map(str, folders)])
    assert turned == names[::-1]


def test_a_sheet_of_pictures_that_are_on_a_gpu_is_written(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(common, "save_image", lambda path, x: written.append(x))
    with fake_cuda():
        picture = torch.zeros(3, 20, 20, device="cuda:0")
        common.save_sheet(tmp_path / "sheet.png", ("HR", "LR"), [[picture, picture]] * 2)
    assert written[0].device.type == "cpu" and written[0].shape == (3, 18 + 48, 48)


THREADS = """
import threading, torch, common
with common.runtime("cpu") as rt:
    before = open("/proc/self/status").read()
    torch.distributed.all_reduce(torch.ones(1))
    def loss(x, number): return {"loss": (x @ x).sum()}
    common.count_flops(loss, torch.ones(2, 2, requires_grad=True), number=0)
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print("threads", int(status["Threads"]), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="counts threads in /proc")
def test_no_thread_outlives_the_processes_group(tmp_path):
    (tmp_path / "threads.py").write_text(THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, tmp_path / "threads.py"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["threads", "1"] * 2
