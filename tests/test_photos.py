"""common.py: which files are photos, what their pixels mean, how they are written."""

import io
import os
import struct
import subprocess
import sys
import types
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

import common

REPO = Path(__file__).resolve().parents[1]


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


# ---- which files are photos -------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_in(folder: Path) -> list[str]:
    files = common.list_images([str(folder)], "--hr")
    return [file.relative_to(folder).as_posix() for file in files]


def test_photos_are_listed_in_depth_sorted_once_and_without_files_of_the_system(tmp_path, capsys):
    touch(tmp_path, "b.PNG", "a/d.jpg", "a/c.webp", "a/._c.png", ".DS_Store", "Thumbs.db",
          ".hidden/d.png", ".thumbnails/e.png", "a/@eaDir/c.png/THUMB.jpg", "__MACOSX/f.png",
          ".ipynb_checkpoints/g-checkpoint.png")  # fmt: skip
    expected = [tmp_path / name for name in ("a/c.webp", "a/d.jpg", "b.PNG")]
    assert common.list_images([str(tmp_path), str(tmp_path / "b.PNG")], "--hr") == expected
    assert "left out 8 files: 8 hidden or system" in capsys.readouterr().out
    assert names_in(tmp_path / ".hidden") == ["d.png"]  # if the user asks for it


def test_what_is_left_out_is_printed_once_and_counted_by_reason(tmp_path, capsys):
    touch(tmp_path, "a.png", "b.NEF", "c.nef", "d.txt", "e")
    for _ in range(2):
        assert names_in(tmp_path) == ["a.png"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"--hr {tmp_path}: left out 4 files: 2 .nef, 1 .txt, 1 without suffix"
    (tmp_path / "a.png").unlink()
    with pytest.raises(common.UserError, match="--hr .*no images found; left out 4 files: 2 .nef"):
        names_in(tmp_path)
    with pytest.raises(common.UserError, match="--hr .*nowhere: no such"):
        names_in(tmp_path / "nowhere")


def test_links_are_followed_but_not_in_a_circle(tmp_path, capsys):
    far, near = tmp_path / "far", tmp_path / "near"
    touch(far, "phone/a.png", "b.png")
    near.mkdir()
    (near / "phone").symlink_to(far / "phone")
    (near / "c.png").symlink_to(far / "b.png")
    (near / "gone.png").symlink_to(far / "gone.png")
    (far / "phone" / "up").symlink_to(near)
    (near / "self").symlink_to(near / "self")
    assert names_in(near) == ["c.png", "phone/a.png"]
    line = capsys.readouterr().out
    assert "1 links in a circle" in line and "1 broken links" in line
    assert names_in(far) == ["b.png", "phone/a.png", "phone/up/c.png"]


def test_every_format_that_pillow_reads_counts_and_is_read(tmp_path):
    suffixes = common.photo_suffixes()
    assert suffixes >= {".png", ".jpg", ".jpeg", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tga"}
    assert not suffixes & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".ico", ".txt", ".npy"}
    for feature, suffix in (("avif", ".avif"), ("jpg_2000", ".jp2")):
        assert (suffix in suffixes) or not features.check(feature)
    pixels = drawn_pixels(24, 32)
    for suffix in suffixes:
        try:
            Image.fromarray(pixels).save(tmp_path / f"x{suffix.upper()}")
        except (OSError, ValueError, KeyError):  # Pillow can't write RGB in this format
            (tmp_path / f"x{suffix.upper()}").unlink(missing_ok=True)
    found = common.list_images([str(tmp_path)], "--hr")
    assert len(found) == len([*tmp_path.iterdir()]) > 20
    for file in found:
        assert np.abs(loaded(file) - pixels / 255).mean() < 0.05, file


def test_heic_is_read_with_pillow_heif_and_else_the_package_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "IMG_1.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    common.photo_suffixes.cache_clear()
    with pytest.raises(common.UserError, match=r"1 \.heic \(pip install pillow-heif to read them"):
        names_in(tmp_path)
    register = lambda: Image.EXTENSION.update({".heic": "HEIF"})  # noqa: E731
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    fake = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    common.photo_suffixes.cache_clear()
    assert names_in(tmp_path) == ["IMG_1.HEIC"]
    common.photo_suffixes.cache_clear()


# ---- their names ------------------------------------------------------------------------------


def test_names_of_photos_depend_on_their_path_below_the_folder_given(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    files = [x / "a.png", x / "b" / "a.jpg", x / "b.c.png", y / "B" / "z, 1.png"]
    expected = ["a", "b_a", "b.c", "B_z_1"]
    assert common.photo_names(files, [str(x), str(y)]) == expected
    assert common.photo_names(files[1:], [str(x), str(y)]) == expected[1:]
    assert common.photo_names(files[1:2], [str(files[1])]) == ["a"]


def test_names_of_photos_are_never_equal_but_for_their_case(tmp_path):
    folders = [tmp_path / "x", tmp_path / "y"]
    names = ("a.png", "A.jpg", "a.webp", "b/c.png", "b_C.png")
    files = [folder / name for folder in folders for name in names]
    named = common.photo_names(files, [*map(str, folders)])
    assert len({name.casefold() for name in named}) == len(files)
    assert common.photo_names(files[::-1], [*map(str, folders)]) == named[::-1]


@dataclass(frozen=True)
class Listing:
    """Config of a stage that prints the names of photos."""

    hr: str = ""  # folder
    seed: int = 0  # of all draws
    device: str = "cpu"  # cpu or cuda


@pytest.mark.parametrize("name", [b"caf\xe9.png", "日本語.png".encode()])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_console_cannot_print_do_not_end_a_run(
    tmp_path, monkeypatch, name, encoding
):
    try:
        touch(tmp_path, os.fsdecode(name))
    except OSError:
        pytest.skip("this file system has no such names")
    console = io.TextIOWrapper(io.BytesIO(), encoding, "strict")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["stage.py", "--hr", str(tmp_path)])
    common.launch(lambda cfg, rt: print(*names_in(Path(cfg.hr))), Listing, {}, "")
    console.flush()
    assert console.buffer.getvalue().endswith(b".png\n")  # type: ignore[attr-defined]
    given = common.list_images([str(tmp_path)], "--hr")
    assert os.fsencode(common.photo_names(given, [str(tmp_path)])[0]) == name[:-4]


# ---- what pixels mean -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_gray_is_repeated_and_alpha_is_laid_over_white(tmp_path, mode):
    pixels = drawn_pixels(20, 31, len(mode))
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode=mode)
    image.save(tmp_path / "x.png")
    color, share = pixels / 255, np.ones(1)
    if mode.endswith("A"):
        color, share = color[..., :-1], color[..., -1:]
    expected = np.broadcast_to(color * share + (1 - share), (20, 31, 3))
    tolerance = 1.01 / 255 if mode.endswith("A") else 1e-7
    np.testing.assert_allclose(loaded(tmp_path / "x.png"), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_is_looked_up(tmp_path, transparent):
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    colors = np.array([[0, 0, 0], [250, 3, 9], [4, 200, 8], [1, 2, 180], [90, 90, 90]], np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette(colors.tobytes())
    alpha = np.array([255, 255, 0, 255, 128] if transparent else [255] * 5, np.uint8)
    image.save(tmp_path / "x.png", **({"transparency": alpha.tobytes()} if transparent else {}))
    share = alpha[indices][..., None] / 255
    expected = colors[indices] / 255 * share + (1 - share)
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
    expected = (values / 65535)[..., None].repeat(3, 2)
    np.testing.assert_allclose(loaded(tmp_path / f"x{suffix}"), expected, atol=1e-7, rtol=0)


def write_tiff(path, values, bits, kind="u", photometric=1, planar=1, order="<", compress=False):
    """Numbers (H, W, C), W even, as a TIFF with one strip a plane, by the letter of TIFF 6.0."""
    H, W, C = values.shape
    planes = [values] if planar == 1 else [*np.moveaxis(values, -1, 0)]
    if bits == 12:
        a, b = values[:, ::2, 0].astype(int), values[:, 1::2, 0].astype(int)
        packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
        strips = [packed.astype(np.uint8).tobytes()]
    else:
        strips = [plane.astype(f"{order}{kind}{bits // 8}").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compress else strips
    sizes = [len(strip) for strip in strips]
    starts = np.cumsum([8, *sizes])[:-1].tolist()
    tags = {256: [W], 257: [H], 258: [bits] * C, 259: [8 if compress else 1], 262: [photometric],
            273: starts, 277: [C], 278: [H], 279: sizes, 284: [planar],
            339: [" uif".index(kind)] * C}  # fmt: skip
    end = 8 + sum(sizes) + 2 + 12 * len(tags) + 4
    table, long_values = struct.pack(f"{order}H", len(tags)), b""
    for tag, content in tags.items():
        kind_of_tag = 4 if tag in (273, 279) else 3
        data = struct.pack(order + " HL"[kind_of_tag - 2] * len(content), *content)
        if len(data) > 4:
            long_values += data
            data = struct.pack(f"{order}L", end + len(long_values) - len(data))
        table += struct.pack(f"{order}HHL", tag, kind_of_tag, len(content)) + data.ljust(4, b"\0")
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}L", 8 + sum(sizes))
    path.write_bytes(magic + b"".join(strips) + table + bytes(4) + long_values)


# Kinds of TIFF that must be read; all others may be refused, but not be read wrongly.
READ = {("u", 8, 0), ("u", 8, 1), ("u", 8, 2), ("u", 12, 1), ("u", 16, 0), ("u", 16, 1),
        ("u", 16, 2), ("f", 32, 1)}  # fmt: skip


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_any_kind_is_read_rightly_or_refused(tmp_path, order, compress):
    y, x = np.mgrid[:24, :32]
    rgb = np.stack([0.5 + 0.4 * np.sin(y / (5 + c) + x / 7) for c in range(3)], -1)
    kinds = [("u", bits) for bits in (8, 12, 16, 32)] + [("i", bits) for bits in (8, 16, 32)]
    path, read = tmp_path / "x.tif", set()
    for kind, bits in [*kinds, ("f", 16), ("f", 32), ("f", 64)]:
        white = {"u": 2**bits - 1, "i": 2 ** (bits - 1) - 1, "f": 1}[kind]
        for photometric, planar in ((0, 1), (1, 1), (2, 1), (2, 2)):
            truth = rgb if photometric == 2 else rgb[..., :1]
            if bits == 12 and photometric == 2:
                continue
            values = (1 - truth if photometric == 0 else truth) * white
            values = values if kind == "f" else values.round()
            write_tiff(path, values, bits, kind, photometric, planar, order, compress)
            try:
                pixels = loaded(path)
            except ValueError as error:
                assert "x.tif: not a readable image (" in str(error)
            else:
                read.add((kind, bits, photometric))
                expected = np.broadcast_to(truth, rgb.shape)
                np.testing.assert_allclose(pixels, expected, atol=1 / 255, err_msg=str(read))
    assert read <= READ and (order == ">" or read == READ)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_numbers_of_a_12_bit_camera_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for top, channels in ((4095, 1), (4096, 1), (4095, 3), (4096, 3)):
        values = np.linspace(0, top, 60 * channels).round().reshape(6, 10, channels)
        if channels == 1:
            Image.fromarray(values[..., 0].astype(np.uint16)).save(path)
        elif suffix == ".tif":
            write_tiff(path, values, 16, photometric=2)
        else:
            continue  # Pillow writes no PNG of that kind
        if top == 4095:
            with pytest.raises(ValueError, match="use only 12"):
                loaded(path)
        else:
            assert loaded(path).max() < 0.07


def test_float_images_are_read_as_they_are_or_refused(tmp_path):
    dark = np.linspace(0, 0.3, 60, dtype=np.float32).reshape(6, 10)
    Image.fromarray(dark).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(loaded(tmp_path / "x.tif")[..., 1], dark)
    for value in (1.01, 255, -0.01, np.nan, np.inf):
        dark[2, 3] = value
        Image.fromarray(dark).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=r"x.tif: .*outside of 0 to 1"):
            loaded(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_all_turns_of_exif_come_upright(tmp_path, suffix):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(drawn_pixels(24, 40)).save(tmp_path / f"x{suffix}", exif=exif)
        with Image.open(tmp_path / f"x{suffix}") as image:
            assert common.orientation(image) == turn
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(
            loaded(tmp_path / f"x{suffix}"), expected.astype(np.float32) / 255
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("turn", [1, 6])
def test_sound_pixels_are_read_whatever_their_exif(tmp_path, turn):
    exif, gen = Image.Exif(), common.generator(3)
    exif[0x0112], exif[0x010F], exif[0x8769] = turn, "a camera's name", {0x9003: "2024:01:01"}
    Image.fromarray(drawn_pixels(24, 40)).save(tmp_path / "x.jpg", exif=exif)
    whole, upright = (tmp_path / "x.jpg").read_bytes(), loaded(tmp_path / "x.jpg")
    start, end = whole.index(b"Exif") + 6, whole.index(b"Exif") + len(exif.tobytes())
    for _ in range(60):
        damaged = bytearray(whole)
        for position in torch.randint(start, end, (3,), generator=gen).tolist():
            damaged[position] = int(torch.randint(256, (), generator=gen))
        (tmp_path / "x.jpg").write_bytes(damaged)
        pixels = loaded(tmp_path / "x.jpg")
        assert np.sort(pixels.sum(2), None) == pytest.approx(np.sort(upright.sum(2), None))


@pytest.mark.filterwarnings("error")
def test_a_photo_may_be_large(tmp_path, monkeypatch):
    Image.new("1", (20000, 10000)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width * image.height < common.MAX_PIXELS
    monkeypatch.setattr(common, "MAX_PIXELS", 2 * 10**8 - 1)
    with pytest.raises(ValueError, match="20000 x 10000 pixels are more than 199999999"):
        common.load_image(tmp_path / "x.png")


MEMORY = """
import sys, common
def memory(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))
open("/proc/self/clear_refs", "w").write("5")  # forget an earlier peak
before = memory("VmRSS")
x = common.load_image(sys.argv[1])
print((memory("VmHWM") - before) * 1024 / (4 * x.numel()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory in /proc")
def test_a_photo_needs_less_than_twice_the_memory_of_its_pixels(tmp_path):
    Image.new("RGB", (4000, 3000), "gray").save(tmp_path / "x.png")
    command = [sys.executable, "-c", MEMORY, tmp_path / "x.png"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 2


def test_a_bad_file_is_a_value_error_that_names_it(tmp_path):
    Image.fromarray(drawn_pixels(64, 64)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "text.png", "empty.png", "missing.png"):
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


def test_images_are_cut_to_a_multiple_of_the_scale():
    image = torch.rand(3, 67, 50, generator=common.generator(0))
    assert torch.equal(common.crop_to_multiple(image, 4, "x"), image[:, :64, :48])
    with pytest.raises(ValueError, match="small.png"):
        common.crop_to_multiple(image[:, :31], 4, "small.png")
