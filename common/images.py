"""Read and write images."""

import contextlib
import functools
import io
import re
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw, ImageFile, ImageOps
from torch import Tensor

from common.files import open_photo, replacing

# Reading takes 8 bytes a pixel (of WebP and JPEG 2000 up to 20) and keeps 3: .8 GB for a photo of
# 100 megapixels. 8 threads with 2 photos each in wait, which may be pairs, stay below 24 GiB.
MAX_PIXELS = 3 * 2**26  # some phones make 200 megapixels
LARGE = 2**26  # pixels; photos above it are decoded one at a time
one_large_photo = threading.Lock()
Image.MAX_IMAGE_PIXELS = None  # of Pillow; its message names no size
Image.core.set_block_size(2**26)  # bytes: larger ones than malloc keeps when they are freed
LOST: defaultdict[str, set[str]] = defaultdict(set)  # what reading has lost, and of which photos


def lost_sentence() -> str:
    """What was lost of the photos read since the last call, with counts; "" for nothing."""
    counts = [f"{what} of {len(LOST[what])}" for what in sorted(LOST)]
    LOST.clear()
    return f"lost in reading: {', '.join(counts)} photos" if counts else ""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image; 1, upright, if EXIF is missing or damaged."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises errors of many types
        return 1


@functools.lru_cache(16)
def transform_to_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The transform from an ICC profile to sRGB; None if it is sRGB itself, or damaged."""
    colors = Image.fromarray(np.indices((18, 18, 18), np.uint8).reshape(3, 18, -1).T * 15)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        stored = colors.convert(mode)
        seen = transform.apply(stored)
    except Exception:  # of many types
        return None
    change = ImageChops.difference(seen, stored.convert("RGB"))
    return transform if np.max(change.getextrema()) > 2 else None


def pixels_of(file: ImageFile.ImageFile, lost: set[str]) -> Tensor:
    """Pixels of an opened image as in load_pixels(), whose losses are added to `lost`."""
    if file.width * file.height > MAX_PIXELS:
        raise ValueError(f"{file.width} x {file.height} pixels are more than {MAX_PIXELS}")
    mode, tile, tags = file.mode, str(file.tile[:1]), getattr(file, "tag_v2", {})  # tags of TIFF
    bits, signed, planar = tags.get(258, (8,)), 2 in tags.get(339, ()), tags.get(284) == 2
    deep = mode.startswith("I")  # gray of 16 bits, which Pillow's convert() would clip
    if (
        (mode == "F" or mode == "I" and file.format not in ("PNG", "PPM"))  # of 32 bits
        or (signed or deep and tags.get(262) == 0)  # white is 0
        or (planar and "raw" in tile and bits[0] > 8)  # Pillow reads them as 8 bits
    ):
        raise ValueError("numbers of a rare kind: convert it to RGB of 8 or 16 bits")
    if deep or bits[0] > 8 or re.search(r";1[26]|ppm.*, \d{4,}\)", tile):
        lost.add("16 bits")
    with contextlib.suppress(Exception):  # damaged frames; MPO has a preview, PSD layers
        if getattr(file, "is_animated", False) and file.format not in ("MPO", "PSD"):
            lost.add("further pages or frames")
    file.load()
    with contextlib.suppress(Exception):  # damaged EXIF
        ImageOps.exif_transpose(file, in_place=True)
    transform, gray = transform_to_srgb(file.info.get("icc_profile") or b""), mode in ("L", "LA")
    fitting = ("L", "RGB") if gray else ("CMYK",) if mode == "CMYK" else ("RGB",)
    if deep or transform and transform.input_mode not in fitting:
        transform = None
    perhaps_12_bits, (W, H) = re.search(r"(I|LA|RGBA?);1[26]", tile), file.size
    x, highest = np.empty((3, H, W), np.float32 if deep else np.uint8), 0
    rows = max(1, 2**20 // W)  # at a time, to save memory
    for top in range(0, H, rows):
        image: Any = file.crop((0, top, W, min(H, top + rows)))
        if image.has_transparency_data and not deep:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                lost.add("alpha")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if not deep:
            image = image.convert(transform.input_mode if transform else "L" if gray else "RGB")
        highest = max(highest, np.max(image.getextrema())) if perhaps_12_bits else 0
        if transform:
            image = transform.apply(image).convert("L" if gray else "RGB")
        values = np.asarray(image, np.float32) / 65535 if deep else np.asarray(image)
        x[:, top : top + rows] = np.atleast_3d(values).transpose(2, 0, 1)
    if perhaps_12_bits and highest < (4096 if deep else 16):
        raise ValueError("numbers of 16 bits that use only 12 of them: scale them up")
    return torch.from_numpy(x)


def load_pixels(path: str | Path) -> Tensor:
    """Read an image file as RGB (3, H, W): uint8, or float32 in [0, 1] for gray of 16 bits.

    ValueError if that is impossible. Gray is repeated, alpha is laid over white, EXIF rotation is
    applied, colours are converted to sRGB. Of several pages or frames the first is read. What of
    the photo is lost is counted for lost_sentence().
    """
    lost: set[str] = set()
    try:
        with open_photo(path) as file:
            large = file.width * file.height > LARGE
            with one_large_photo if large else contextlib.nullcontext():
                x = pixels_of(file, lost)
    except Exception as error:  # Pillow raises errors of many types for a damaged file
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason})") from None
    for what in lost:
        LOST[what].add(str(path))
    return x


def load_image(path: str | Path) -> Tensor:
    """Read an image file as float32 RGB (3, H, W) in [0, 1], by load_pixels()."""
    x = load_pixels(path)
    return x if x.is_floating_point() else x.float().div_(255)


def crop_to_multiple(image: Tensor, scale: int, path: str | Path) -> Tensor:
    """Cut an image (3, H, W) to a multiple of the scale; ValueError if it is too small."""
    H, W = (side // scale * scale for side in image.shape[1:])
    if min(H, W) < 8 * scale:
        size = f"{image.shape[2]} x {image.shape[1]} pixels"
        raise ValueError(f"{path}: {size} are too few at scale {scale}")
    return image[:, :H, :W]


def is_gray(x: Tensor) -> bool:
    """Whether all three channels of an image (3, H, W) are equal."""
    return torch.equal(x[0], x[1]) and torch.equal(x[1], x[2])


def to_uint8(x: Tensor) -> Tensor:
    """Round an image in [0, 1] to 8 bits; one of 8 bits stays as it is."""
    return x if x.dtype == torch.uint8 else x.clamp(0, 1).mul_(255).round_().to(torch.uint8)


def save_png(path: str | Path, image: Image.Image) -> None:
    """Write an image as PNG: whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", compress_level=1)


def save_image(path: str | Path, x: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG: whole or not at all."""
    save_png(path, Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy()))


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, 3, H, W) bicubically with antialiasing, as Pillow does but without rounding."""
    return F.interpolate(image.float(), (height, width), mode="bicubic", antialias=True)


def centre(image: Tensor, size: int, side: int) -> Tensor:
    """The middle size x size pixels of an image, padded with white, as side x side pixels."""
    top, left = (max(0, n - size) // 2 for n in image.shape[1:])
    crop = image[:, top : top + size, left : left + size]
    crop = F.pad(crop, (0, size - crop.shape[2], 0, size - crop.shape[1]), value=1.0)[None]
    if side >= size:
        return F.interpolate(crop, (side, side), mode="nearest")[0]
    return F.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)


def save_sheet(path: str | Path, titles: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> None:
    """Write rows of pictures (3, side, side) under a line of titles."""
    lines = [torch.cat([F.pad(x, (2, 2, 2, 2), value=1.0) for x in row], dim=2) for row in rows]
    body = torch.cat(lines, dim=1).cpu()
    head = Image.new("RGB", (body.shape[2], 18), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(head).text((6 + i * body.shape[2] // len(titles), 3), title, fill="black")
    pixels = torch.from_numpy(np.array(head)).permute(2, 0, 1) / 255
    save_image(path, torch.cat([pixels, body], dim=1))
