"""common/files.py, common/photos.py: what is a photo, what its pixels mean, how it is written."""

import contextlib
import io
import itertools
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from common import UserError
from common.cli import launch
from common.files import list_images, photo_names, photo_suffixes, replacing
from common.photos import MAX_PIXELS, crop_to_multiple, load_image, orientation, save_image
from common.runtime import make_generator
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
        photo_suffixes.cache_clear()
        if package:
            assert names_in(tmp_path) == ["IMG_1.HEIC"]
        else:
            with pytest.raises(UserError, match=r"1 \.heic \(pip install pillow-heif to"):
                names_in(tmp_path)
    photo_suffixes.cache_clear()


# ---- their names ------------------------------------------------------------------------------


def test_names_of_photos_depend_on_their_path_below_the_folder_given(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    files = [x / "a.png", x / "b" / "a.jpg", x / "b.c.png", y / "B" / "z, 1.png"]
    folders = [str(x), str(y)]
    assert photo_names(files, folders) == ["a", "b_a", "b.c", "B_z_1"]
    assert photo_names(files[1:], folders) == ["b_a", "b.c", "B_z_1"]
    assert photo_names(files[1:2], [str(files[1])]) == ["a"]
    # They are never equal, apart from upper and lower case.
    names = ("a.png", "A.jpg", "a.webp", "b/c.png", "b_C.png")
    files = [folder / name for folder in (x, y) for name in names]
    named = photo_names(files, folders)
    assert len({name.casefold() for name in named}) == len(files)
    assert photo_names(files[::-1], folders) == named[::-1]


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


@pytest.mark.filterwarnings("error")
def test_a_photo_may_be_large(tmp_path, monkeypatch):
    Image.new("1", (20000, 10000)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width * image.height < MAX_PIXELS
    monkeypatch.setattr("common.photos.MAX_PIXELS", 2 * 10**8 - 1)
    with pytest.raises(ValueError, match="20000 x 10000 pixels are more than 199999999"):
        load_image(tmp_path / "x.png")


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


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    for content in ("half of the ne", "new"):
        with contextlib.suppress(RuntimeError), replacing(path) as temporary:
            temporary.write_text(content)
            assert path.read_text() == "old"
            if content != "new":
                raise RuntimeError("the disk is full")
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_text() == ("new" if content == "new" else "old")


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
