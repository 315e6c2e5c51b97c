"""common/files.py, images.py: what is a photo, what its pixels mean, how it is written."""

import contextlib
import io
import itertools
import os
import struct
import sys
import threading
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps
from safetensors.torch import save_file

from bench.pairs import stored_sizes
from common import UserError, images
from common.cli import launch
from common.files import list_images, photo_formats, photo_names, photo_suffixes, replacing
from common.folder import RECORD, close_all, out_folder
from common.images import (
    MAX_PIXELS,
    crop_to_multiple,
    is_gray,
    load_image,
    load_pixels,
    lost_sentence,
    orientation,
    save_image,
    to_uint8,
)
from common.photos import Photos
from common.runtime import make_generator
from tests.commands import PEAK, in_another, peak
from tests.tiny import CPU, REPO
from tools import pack


def drawn_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth uint8 pixels (H, W, channels)."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(y / (5 + c + seed) + x / (9 + 2 * c)) for c in range(channels)]
    return (127.5 + 127 * np.stack(planes, -1)).astype(np.uint8)


def loaded(path: Path) -> np.ndarray:
    """load_image as (H, W, 3), after a check of what it promises of every image."""
    image = load_image(path)
    assert image.dtype == torch.float32 and image.shape[0] == 3 and image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1
    return image.permute(1, 2, 0).numpy()


# ---- which files are photos -------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_in(folder: Path) -> list[str]:
    files = list_images([str(folder)], "--hr")
    return [file.relative_to(folder).as_posix() for file in files]


def test_photos_are_listed_in_depth_sorted_once_and_without_files_of_the_system(tmp_path, capsys):
    touch(tmp_path, "b.PNG", "a/d.jpg", "a/c.webp", "a/._c.png", ".DS_Store", "Thumbs.db",
          ".hidden/d.png", ".thumbnails/e.png", "a/@eaDir/c.png/THUMB.jpg", "__MACOSX/f.png",
          ".ipynb_checkpoints/g-checkpoint.png")  # fmt: skip
    expected = [tmp_path / name for name in ("a/c.webp", "a/d.jpg", "b.PNG")]
    assert list_images([str(tmp_path), str(tmp_path / "b.PNG")], "--hr") == expected
    assert "left out 8 files: 8 hidden or system" in capsys.readouterr().out
    assert names_in(tmp_path / ".hidden") == ["d.png"]  # if the user asks for it


def test_what_is_left_out_is_printed_once_and_counted_by_reason(tmp_path, capsys):
    touch(tmp_path, "a.png", "b.NEF", "c.nef", "d.txt", "e")
    for _ in range(2):
        assert names_in(tmp_path) == ["a.png"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"--hr {tmp_path}: left out 4 files: 2 .nef, 1 .txt, 1 without suffix"
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="--hr .*no images found; left out 4 files: 2 .nef"):
        names_in(tmp_path)
    with pytest.raises(UserError, match="--hr .*nowhere: no such"):
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
    suffixes = photo_suffixes()
    assert suffixes >= {".png", ".jpg", ".jpeg", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tga"}
    assert not suffixes & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".ico", ".txt", ".npy"}
    pixels = drawn_pixels(24, 32)
    for suffix in suffixes:
        try:
            Image.fromarray(pixels).save(tmp_path / f"x{suffix.upper()}")
        except (OSError, ValueError, KeyError):  # Pillow can't write RGB in this format
            (tmp_path / f"x{suffix.upper()}").unlink(missing_ok=True)
    found = list_images([str(tmp_path)], "--hr")
    assert len(found) == len([*tmp_path.iterdir()]) > 20
    for file in found:
        assert np.abs(loaded(file) - pixels / 255).mean() < 0.05, file


def test_heic_is_read_with_pillow_heif_and_else_the_package_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "IMG_1.HEIC")
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "none")
    register = lambda: Image.EXTENSION.update({".heic": "HEIF"})  # noqa: E731
    for package in (None, types.SimpleNamespace(register_heif_opener=register)):
        monkeypatch.setitem(sys.modules, "pillow_heif", package)
        photo_formats.cache_clear()
        photo_suffixes.cache_clear()
        if package:
            assert names_in(tmp_path) == ["IMG_1.HEIC"]
        else:
            with pytest.raises(UserError, match=r"1 \.heic \(pip install pillow-heif to"):
                names_in(tmp_path)
    photo_formats.cache_clear()
    photo_suffixes.cache_clear()


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 64 64 rectfill\n%%EOF\n"
)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_drawing_is_not_opened_whatever_its_name(tmp_path, monkeypatch, suffix):
    """Pillow would run Ghostscript on it."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("it was run"))
    (tmp_path / f"x{suffix}").write_bytes(EPS)
    with pytest.raises(ValueError, match=f"x{suffix}: not a readable image"):
        load_image(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match="no image"):
        stored_sizes(tmp_path / f"x{suffix}", tmp_path / f"x{suffix}")


def test_all_photos_are_opened_as_one_of_the_listed_formats():
    assert not set(photo_formats()) & set(
        "EPS FITS FLI GRIB HDF5 ICNS IM IPTC MPEG PDF WMF".split()
    )
    files = [
        file for folder in ("", "common", "bench", "tools") for file in (REPO / folder).glob("*.py")
    ]
    found = [
        line for file in files for line in file.read_text().splitlines() if "Image.open(" in line
    ]
    known = [
        "    return Image.open(path, formats=photo_formats())",
        "        Image.open(file).load()",
    ]
    assert sorted(found) == sorted(known)  # the other reads what it has written itself


# ---- their names ------------------------------------------------------------------------------


def test_names_of_photos_depend_on_their_path_below_the_folder_given(tmp_path):
    """Neither on how the folder was typed, nor on the other photos, nor on later folders."""
    files = ("a.png", "b/a.jpg", "b.c.png", "B/z, 1.png", "sub/b.png", "sub/B.jpg", "A.jpg",
             "a.webp", "b_A.png", "x" * 250 + ".png")  # fmt: skip

    def names_of(given: list[str], *files: str) -> list[str]:
        return photo_names([Path(file) for file in files], given)

    first, *rest = (
        names_of([top], *(f"{top}/{f}" for f in files)) for top in ("hr", "/d/hr", "../x/hr")
    )
    assert rest == [first, first] and max(map(len, first)) < 220
    assert names_of(["hr"], *(f"hr/{f}" for f in files[:4])) == ["a", "b_a", "b.c", "B_z_1"]
    assert names_of(["hr"], *(f"hr/{f}" for f in files[1:4])) == ["b_a", "b.c", "B_z_1"]
    assert names_of(["hr/b/a.jpg"], "hr/b/a.jpg") == ["a"]
    hr = [f"hr/{f}" for f in files]
    more = names_of(["hr", "other"], *hr, "other/a.png", "other/new.png")
    assert more[:-2] == first and more[-2].startswith("a-") and more[-1] == "new"
    assert names_of(["hr", "hr/sub"], *hr) == first
    # They are never equal, apart from upper and lower case, and their order does not matter.
    assert len({name.casefold() for name in more}) == len(more)
    assert names_of(["hr"], *hr[::-1]) == first[::-1]


@pytest.mark.parametrize("name", [b"caf\xe9.png", "日本語.png".encode()])
def test_names_that_the_console_cannot_print_do_not_end_a_run(tmp_path, monkeypatch, name):
    try:
        touch(tmp_path, os.fsdecode(name))
    except OSError:
        pytest.skip("this file system has no such names")
    console = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["pack.py", "--photos", str(tmp_path)])
    launch(lambda cfg, rt: print(*names_in(Path(cfg.photos[0]))), pack.Config, {}, "")
    console.flush()
    assert console.buffer.getvalue().endswith(b".png\n")  # type: ignore[attr-defined]
    given = list_images([str(tmp_path)], "--hr")
    assert os.fsencode(photo_names(given, [str(tmp_path)])[0]) == name[:-4]


# ---- what pixels mean -------------------------------------------------------------------------


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P"])
def test_gray_is_repeated_and_what_is_transparent_is_laid_over_white(tmp_path, mode, transparent):
    """In L, RGB and P a colour may be transparent; in P also partly."""
    pixels = drawn_pixels(20, 31, len(mode))
    image = Image.fromarray(pixels[..., 0] if len(mode) == 1 else pixels, mode=mode)
    color, share = pixels / 255, np.ones((20, 31, 1))
    flags = {"L": int(pixels[2, 3, 0]), "RGB": tuple(pixels[2, 3].tolist()), "P": bytes(range(256))}
    if mode == "P":
        palette = drawn_pixels(1, 256)[0]
        image.putpalette(palette.tobytes())
        color = palette[pixels[..., 0]] / 255
        share = pixels / 255 if transparent else share
    elif mode.endswith("A"):
        color, share = color[..., :-1], color[..., -1:]
    elif transparent:
        share = 1.0 - (pixels == pixels[2, 3]).all(-1, keepdims=True)
    extra = {"transparency": flags[mode]} if transparent and mode in flags else {}
    image.save(tmp_path / "x.png", **extra)
    expected = np.broadcast_to(color * share + (1 - share), (20, 31, 3))
    np.testing.assert_allclose(loaded(tmp_path / "x.png"), expected, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_keeps_its_precision(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    expected = (values / 65535)[..., None].repeat(3, 2)
    np.testing.assert_allclose(loaded(tmp_path / f"x{suffix}"), expected, atol=1e-7, rtol=0)


# Kinds of TIFF that must be read; all others may be refused, but not be read wrongly.
READ = {("u1", "minisblack"), ("u1", "miniswhite"), ("u1", "rgb"), ("u2", "minisblack"),
        ("u2", "rgb")}  # fmt: skip


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_any_kind_is_read_rightly_or_refused(tmp_path, order, compression):
    y, x = np.mgrid[:24, :32]
    rgb = np.stack([0.5 + 0.4 * np.sin(y / (5 + c) + x / 7) for c in range(3)], -1)
    path, read = tmp_path / "x.tif", set()
    types = "u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"
    kinds = "minisblack", "miniswhite", "rgb", "rgb in planes"
    for dtype, kind in itertools.product(types, kinds):
        color, _, planes = kind.partition(" in ")
        truth = rgb if color == "rgb" else rgb[..., :1]
        values = 1 - truth if color == "miniswhite" else truth
        values = values if dtype[0] == "f" else (values * np.iinfo(dtype).max).round()
        values = np.moveaxis(values, -1, 0) if planes else values
        tifffile.imwrite(
            path, values.squeeze().astype(order + dtype), photometric=color, byteorder=order,
            planarconfig="separate" if planes else None, compression=compression,
        )  # fmt: skip
        try:
            pixels = loaded(path)
        except ValueError as error:
            assert "x.tif: not a readable image (" in str(error)
        else:
            read.add((dtype, color))
            expected = np.broadcast_to(truth, rgb.shape)
            np.testing.assert_allclose(pixels, expected, atol=1 / 255, err_msg=f"{dtype} {kind}")
    assert read <= READ and (order == ">" or read == READ)


@pytest.mark.parametrize(("suffix", "channels"), [(".png", 1), (".tif", 1), (".tif", 3)])
def test_16_bit_numbers_of_a_12_bit_camera_are_refused(tmp_path, suffix, channels):
    path = tmp_path / f"x{suffix}"
    for top in (4095, 4096):
        values = np.linspace(0, top, 60 * channels).round().astype(np.uint16)
        if channels == 1:
            Image.fromarray(values.reshape(6, 10)).save(path)
        else:
            tifffile.imwrite(path, values.reshape(6, 10, 3), photometric="rgb")
        if top == 4095:
            with pytest.raises(ValueError, match="use only 12"):
                loaded(path)
        else:
            assert loaded(path).max() < 0.07


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_all_turns_of_exif_come_upright(tmp_path, suffix):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(drawn_pixels(24, 40)).save(tmp_path / f"x{suffix}", exif=exif)
        with Image.open(tmp_path / f"x{suffix}") as image:
            assert orientation(image) == turn
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(
            loaded(tmp_path / f"x{suffix}"), expected.astype(np.float32) / 255
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sound_pixels_are_read_whatever_their_exif(tmp_path):
    exif, gen = Image.Exif(), make_generator(3)
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "a camera's name", {0x9003: "2024:01:01"}
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


def test_8_bits_are_read_as_8_bits_and_16_bits_as_numbers(tmp_path):
    pixels = drawn_pixels(24, 31)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    x = load_pixels(tmp_path / "x.png")
    assert x.dtype == torch.uint8 and torch.equal(x, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(to_uint8(x), x) and torch.equal(load_image(tmp_path / "x.png"), x / 255)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "y.png")
    assert torch.equal(load_pixels(tmp_path / "y.png"), load_image(tmp_path / "y.png"))


def test_gray_is_what_has_three_equal_channels(tmp_path):
    pixels = drawn_pixels(9, 7)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "x.png")
    gray = load_image(tmp_path / "x.png")
    assert is_gray(gray) and is_gray(load_pixels(tmp_path / "x.png"))
    for channel in range(3):
        tinted = gray.clone()
        tinted[channel, 8, 6] += 1 / 255
        assert not is_gray(tinted)


# ---- large photos -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_photo_may_be_large_and_one_that_is_too_large_is_not_decoded(tmp_path, monkeypatch):
    Image.new("1", (20000, 10000)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width * image.height < MAX_PIXELS
    monkeypatch.setattr("common.images.MAX_PIXELS", 2 * 10**8 - 1)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda file: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="20000 x 10000 pixels are more than 199999999"):
        load_image(tmp_path / "x.png")


def peaks_of_reading(*files: Path) -> list[float]:
    """The most memory, in bytes a pixel, that reading files as 8 bits and as numbers takes."""
    load_image(REPO / "data/sample/hr/coffee.jpg")
    before, peaks = peak(), []
    for read in (load_pixels, load_image):
        for file in files:
            x = None
            x = read(file)
        peaks.append((peak() - before) / x[0].numel())
    return peaks


@pytest.mark.skipif(not PEAK.is_file(), reason="needs Linux")
def test_reading_a_photo_takes_8_bytes_a_pixel_and_17_as_numbers(tmp_path):
    pixels = np.tile(drawn_pixels(100, 100, 4), (40, 30, 1))  # 12 megapixels
    Image.fromarray(pixels).save(tmp_path / "alpha.png", compress_level=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = icc_profile(b"RGB ", P3)
    Image.fromarray(pixels[..., :3]).save(tmp_path / "x.jpg", exif=exif, icc_profile=profile)
    files = tmp_path / "alpha.png", tmp_path / "x.jpg"
    eight_bits, numbers = in_another(peaks_of_reading, *files)
    assert 3 < eight_bits < 9 and 12 < numbers < 17


@pytest.mark.parametrize("large", [False, True])
def test_large_photos_are_decoded_one_at_a_time(tmp_path, monkeypatch, large):
    Image.fromarray(drawn_pixels(24, 31)).save(tmp_path / "x.png")
    monkeypatch.setattr(images, "LARGE", 24 * 31 - large)
    inside, most = [], []
    both = threading.Barrier(2)

    def decode(*args: object) -> torch.Tensor:
        inside.append(1)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        most.append(len(inside))
        inside.pop()
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(images, "pixels_of", decode)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load_pixels, [tmp_path / "x.png"] * 2))
    assert max(most) == (1 if large else 2)


# ---- profiles ---------------------------------------------------------------------------------

# Columns of the matrices from linear RGB to XYZ of D50: of Display P3, and of sRGB.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def icc_profile(space: bytes, columns: Sequence[Sequence[float]] = (), gamma: float = 1.8) -> bytes:
    """An ICC profile (version 2.1) with a matrix and a gamma; of gray with a gamma alone."""

    def fixed(numbers: Sequence[float]) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(v * 65536) for v in numbers))

    d50 = (0.9642, 1, 0.8249)
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(d50)}
    for name, column in zip(b"rgb", columns, strict=False):
        tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(column)
        tags[bytes([name]) + b"TRC"] = curve
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value
    header = bytes(4) + struct.pack(">I", 0x02100000) + b"mntr" + space + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + fixed(d50) + bytes(48)
    return struct.pack(">I", start + len(data)) + bytes(4) + header[4:] + table + data


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB numbers of linear ones."""
    linear = linear.clip(0, 1)
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(values: np.ndarray, columns: Sequence[Sequence[float]] = P3) -> np.ndarray:
    """Values (..., 3) in [0, 1] of a profile with these columns and gamma 1.8, in sRGB."""
    matrix = np.linalg.inv(np.array(SRGB).T) @ np.array(columns).T
    return encoded((values**1.8) @ matrix.T)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg", ".avif"])
def test_colours_with_a_profile_are_converted_to_srgb(tmp_path, suffix):
    path, lossless = tmp_path / f"x{suffix}", {"lossless": True} if suffix == ".webp" else {}
    quality = {"quality": 100} if suffix in (".jpg", ".avif") else {}
    pixels = drawn_pixels(40, 60)
    Image.fromarray(pixels).save(path, **lossless, **quality)
    stored = loaded(path)  # some formats lose
    Image.fromarray(pixels).save(path, icc_profile=icc_profile(b"RGB ", P3), **lossless, **quality)
    seen = loaded(path)
    np.testing.assert_allclose(seen, in_srgb(stored), atol=2.5 / 255, rtol=0)
    assert np.abs(seen - stored).max() > 20 / 255


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA"])
def test_a_profile_of_rgb_holds_for_all_modes_and_gray_stays_gray(tmp_path, mode):
    image = Image.fromarray(drawn_pixels(40, 60)).convert(mode)
    image.save(tmp_path / "x.png", icc_profile=icc_profile(b"RGB ", P3))
    expected = in_srgb(np.asarray(image.convert("RGB")) / 255)
    seen = loaded(tmp_path / "x.png")
    np.testing.assert_allclose(seen, expected, atol=2.5 / 255, rtol=0)
    assert is_gray(torch.from_numpy(seen).permute(2, 0, 1)) == mode.startswith("L")


def test_a_profile_of_gray_is_converted_and_gray_of_16_bits_stays(tmp_path):
    values = drawn_pixels(40, 60, 1)[..., 0]
    profile = icc_profile(b"GRAY")
    Image.fromarray(values).save(tmp_path / "x.png", icc_profile=profile)
    expected = encoded((values / 255) ** 1.8)[..., None].repeat(3, -1)
    np.testing.assert_allclose(loaded(tmp_path / "x.png"), expected, atol=1.5 / 255, rtol=0)
    assert is_gray(load_image(tmp_path / "x.png"))
    Image.fromarray(values.astype(np.uint16) * 256).save(tmp_path / "y.png", icc_profile=profile)
    assert np.ptp(loaded(tmp_path / "y.png")[..., 0] - values / 65535 * 256) < 1e-6


def test_srgb_damaged_and_unfit_profiles_leave_the_pixels_as_they_are(tmp_path):
    pixels = drawn_pixels(40, 60)
    p3 = icc_profile(b"RGB ", P3)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (
        srgb, p3[:200], p3[:140], bytes(500), b"no profile", p3.replace(b"RGB ", b"CMYK"),
        p3.replace(b"TRC", b"TRX"), icc_profile(b"GRAY"),
    ):  # fmt: skip
        Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=profile)
        assert (load_pixels(tmp_path / "x.png").permute(1, 2, 0).numpy() == pixels).all()


def test_cmyk_with_a_profile_is_seen_by_it(tmp_path):
    """The profile's table shows each ink alone as its Lab colour; paper is white."""
    lab = np.zeros((2, 2, 2, 2, 3))
    for ink in np.ndindex(2, 2, 2, 2):
        share = np.array(ink[:3]) * 0.5
        light = 100 * (1 - share.mean()) * (0.2 if ink[3] else 1)
        lab[ink] = light, 30 * (ink[1] - ink[0]), 30 * (ink[2] - ink[1])
    table = (lab * (2.55, 1, 1) + (0, 128, 128)).round().astype(np.uint8).tobytes()
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    line = bytes(range(256))
    tag = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + line * 4 + table + line * 3
    head = bytearray(icc_profile(b"CMYK")[:128])
    head[12:16], head[20:24] = b"prtr", b"Lab "
    body = struct.pack(">I", 1) + b"A2B0" + struct.pack(">II", 144, len(tag)) + tag
    profile = struct.pack(">I", 128 + len(body)) + bytes(head[4:]) + body
    pixels = drawn_pixels(40, 60, 4) // 128 * 255
    pixels[:, 30:] = 0
    Image.fromarray(pixels, mode="CMYK").save(tmp_path / "x.tif", icc_profile=profile)
    seen = loaded(tmp_path / "x.tif")
    np.testing.assert_allclose(seen[:, 30:], 1, atol=1.5 / 255)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(
        Image.fromarray(pixels, mode="CMYK"), source, ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    np.testing.assert_array_equal(seen, np.asarray(expected, np.float32) / 255)
    Image.fromarray(pixels, mode="CMYK").save(tmp_path / "y.tif")
    assert np.abs(loaded(tmp_path / "y.tif") - seen).max() > 0.1


def test_threads_may_share_a_profile(tmp_path):
    pixels = drawn_pixels(300, 400)
    Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=icc_profile(b"RGB ", P3))
    first = load_pixels(tmp_path / "x.png")
    with ThreadPoolExecutor(8) as pool:
        for again in pool.map(load_pixels, [tmp_path / "x.png"] * 40):
            assert torch.equal(again, first)


# ---- what is lost -----------------------------------------------------------------------------


def test_what_reading_loses_is_counted_in_one_sentence(tmp_path, capsys):
    frames = [Image.fromarray(drawn_pixels(24, 31, 3, k)) for k in range(3)]
    lost_sentence()
    for i, suffix in enumerate((".tif", ".webp", ".gif", ".png", ".avif")):
        frames[0].save(tmp_path / f"{i}{suffix}", save_all=True, append_images=frames[1:])
    rgba = Image.fromarray(drawn_pixels(24, 31, 4))
    rgba.save(tmp_path / "alpha.png")
    rgba.save(tmp_path / "alpha.webp")
    Image.fromarray(drawn_pixels(24, 31, 1)[..., 0].astype(np.uint16) * 257).save(
        tmp_path / "d.png"
    )
    tifffile.imwrite(tmp_path / "d.tif", drawn_pixels(24, 31).astype(np.uint16) * 257)
    (tmp_path / "d.ppm").write_bytes(b"P6 2 2 65535 " + bytes(range(200, 224)))
    frames[0].save(tmp_path / "whole.mpo", save_all=True, append_images=frames[1:2])  # a preview
    frames[0].save(tmp_path / "whole.jpg")
    Image.fromarray(drawn_pixels(24, 31, 3)).convert("RGBA").save(tmp_path / "opaque.png")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "0.tif").read_bytes()[:200])
    files = sorted(tmp_path.iterdir())
    for file in [*files, *files]:  # each counts once
        with contextlib.suppress(ValueError):
            load_image(file)
    expected = "lost in reading: 16 bits of 3, alpha of 2, further pages or frames of 5 photos"
    assert lost_sentence() == expected
    assert lost_sentence() == ""
    Photos([f for f in files if f.name != "cut.tif"], tmp_path / "decoded", CPU)
    assert capsys.readouterr().out == expected + "\n"
    load_image(tmp_path / "whole.jpg")
    assert lost_sentence() == ""


# ---- damage, and writing ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_damaged_file_is_an_image_or_a_value_error(tmp_path, suffix):
    path, gen = tmp_path / f"x{suffix}", make_generator(1)
    Image.fromarray(drawn_pixels(24, 31)).save(path)
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"x{suffix}"):
            loaded(path)
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
    image = torch.randint(0, 256, (3, 17, 23), generator=make_generator(2)).float() / 255
    save_image(tmp_path / "new" / "x.png", image)
    assert torch.equal(load_image(tmp_path / "new" / "x.png"), image)
    save_image(tmp_path / "x.png", torch.tensor([-0.3, 0.4999 / 255, 1.7]).view(3, 1, 1))
    assert (load_image(tmp_path / "x.png").flatten() * 255).tolist() == [0, 0, 255]


@pytest.mark.parametrize("inside", [False, True])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, inside):
    """Also in a folder of results."""
    path, others = tmp_path / "x.txt", {RECORD} if inside else set()
    if inside:
        out_folder(tmp_path, CPU)
    for content in ("old", "half of the ne", "new"):
        with contextlib.suppress(RuntimeError), replacing(path) as temporary:
            temporary.write_text(content)
            assert content == "old" or path.read_text() == "old"
            if content.startswith("half"):
                raise RuntimeError("the disk is full")
        assert {file.name for file in tmp_path.iterdir()} == {path.name, *others}
        assert path.read_text() == ("new" if content == "new" else "old")
    close_all()


def test_images_are_cut_to_a_multiple_of_the_scale():
    image = torch.rand(3, 67, 50, generator=make_generator(0))
    assert torch.equal(crop_to_multiple(image, 4, "x"), image[:, :64, :48])
    with pytest.raises(ValueError, match="small.png"):
        crop_to_multiple(image[:, :31], 4, "small.png")


def test_files_can_be_read_by_others_as_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "x.safetensors") as temporary:
            save_file({"a": torch.rand(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644
