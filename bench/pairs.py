"""HR images and real LR images of the same scenes: found, read, and what a method makes of them.

In: a folder of aligned pairs: HR/ and LR/ (or GT/ and LQ/, in any case) with the same file names,
or NAMEx4 in LR/ for NAME in HR/, or RealSR, DRealSR or RealVSR as published (data/README.md). Out:
a list of Pair, and, for a method that makes LR from HR or HR from LR, its distance to the truth by
each metric. Shared by all tables.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
from bench.metrics import METRICS, SET_METRICS

# ---- the pairs of a folder ----------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An HR image and the real LR image of the same scene."""

    index: int  # among all pairs of the folder, readable or not: random draws depend on it
    name: str  # below LR/, without suffix; of published sets what HR and LR share
    hr: Path
    lr: Path
    size: tuple[int, int]  # of LR, (h, w)
    scale: int  # HR size / LR size, rounded down
    shrink: int  # size of the LR file / LR size
    reference: Path  # file of the real LR whose degradation RealDGen is to imitate


def camera_of(name: str) -> str:
    """The camera in a name below LR/: its sub-folder, else the leading letters of the file name."""
    folder, slash, _ = name.partition("/")
    return folder if slash else re.split(r"[\W\d_]", name, maxsplit=1)[0]


# A layout: the HR and the LR files below the folder, without suffix, and the scales it comes in (0:
# to be seen from the sizes). {0} is the scale, what is in brackets makes the name of the pair.
LAYOUTS = (
    (r"(?i:HR|GT)/(.+)", r"(?i:LR|LQ)/(.+)x{0}", (4, 3, 2)),
    (r"(?i:HR|GT)/(.+)", r"(?i:LR|LQ)/(.+)", (0,)),
    (r"[^/]+/Test/{0}/([^/]+)_HR", r"[^/]+/Test/{0}/([^/]+)_LR{0}", (4, 3, 2)),  # RealSR
    (r"Test_x{0}/test_HR/([^/]+)_x{0}", r"Test_x{0}/test_LR/([^/]+)_x1", (4, 3, 2)),  # DRealSR
    (r"GT_test/([^/]+)/(0+)", r"LQ_test/([^/]+)/(0+)", (4,)),  # RealVSR, the first frames
)


def by_name(images: list[tuple[str, Path]], pattern: str) -> dict[str, Path]:
    """The images whose path without suffix is of this pattern, by the name in its brackets."""
    found: dict[str, Path] = {}
    for path, file in images:
        if match := re.fullmatch(pattern, path):
            name = "_".join(match.groups())
            common.require(name not in found, f"{file}: {found.get(name)} has the same name.")
            found[name] = file
    return found


def find_files(folder: Path, published: bool = True) -> tuple[dict[str, tuple[Path, Path]], int]:
    """HR and LR file by name, and the scale that the layout tells, else 0; UserError if not pairs.

    published: the test halves of RealSR, DRealSR and RealVSR are known, too.
    """
    here = f"--pairs {folder}"
    common.require(folder.is_dir(), f"{here}: no such folder.")
    files = common.list_images([str(folder)], "--pairs")
    images = [(file.relative_to(folder).with_suffix("").as_posix(), file) for file in files]
    for *patterns, scales in LAYOUTS if published else LAYOUTS[:2]:
        for scale in scales:  # of several the largest
            hr, lr = (by_name(images, pattern.format(scale)) for pattern in patterns)
            alone = sorted(hr.keys() ^ lr.keys())
            if alone and (*patterns, scales) == LAYOUTS[0]:
                continue  # names that end so by chance, if at all
            if hr or lr:
                counts = f"{len(hr)} HR and {len(lr)} LR images"
                names = f"{len(alone)} names are of one kind only, such as {', '.join(alone[:2])}"
                common.require(not alone, f"{here}: {counts}; {names}.")
                return {name: (hr[name], file) for name, file in lr.items()}, scale
    known = "HR/ and LR/ with the same names"
    known += ", or RealSR, DRealSR or RealVSR as published" if published else ""
    raise common.UserError(f"{here}: no images as {known} (see data/README.md).")


def stored_sizes(hr: Path, lr: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of both images by their headers; ValueError if EXIF turns them unlike."""
    try:
        with Image.open(hr) as large, Image.open(lr) as small:
            alike = common.orientation(large) == common.orientation(small)
            sizes = large.size, small.size
    except Exception as error:  # Pillow raises errors of many types
        raise ValueError(f"{hr} or {lr}: no image ({error})") from None
    if not alike:
        raise ValueError(f"{hr}: EXIF turns this image and its LR image unlike")
    return sizes


def find_pairs(folder: Path) -> tuple[list[Pair], int]:
    """The readable pairs of a folder, and the number of the others; UserError if they don't fit.

    Published LR images of the HR size (RealVSR, RealSR 1 and 2) are to be shrunk by the scale.
    """
    here = f"--pairs {folder}"
    files, published = find_files(folder)
    pairs: list[Pair] = []
    for index, (name, (hr, lr)) in enumerate(sorted(files.items())):
        try:
            stored_sizes(hr, lr)
            H, W = common.load_image(hr).shape[1:]
            h, w = common.load_image(lr).shape[1:]
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        scale = pairs[0].scale if pairs else published or max(2, H // h)
        size = (H // scale, W // scale)
        full = pairs[0].shrink > 1 if pairs else published > 0 and (h, w) == (H, W)
        right = (H, W) if full else size
        wrong = f"{name} has {W} x {H} HR and {w} x {h} LR pixels, not {right[1]} x {right[0]}"
        common.require((h, w) == right, f"{here}: {wrong} as scale {scale} has it.")
        common.require(min(size) >= 32, f"{here}: the LR image {name} is under 32 x 32 pixels.")
        shrink = scale if full else 1
        pairs.append(Pair(index, name, hr, lr, size, scale, shrink, lr))
    common.require(bool(pairs), f"{here}: none of its pairs can be read.")
    return pairs, len(files) - len(pairs)


# ---- their images -------------------------------------------------------------------------------


def reduced(x: Tensor, h: int, w: int) -> Tensor:
    """Pillow's bicubic reduction (B, 3, h, w) of 8-bit images; x (B, 3, H, W) in [0, 1]."""
    images = [Image.fromarray(v) for v in common.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()]
    small = [np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(x.device) / 255


def load_hr(pair: Pair) -> Tensor:
    """The HR image (3, H, W) in [0, 1], cut at the right and at the bottom to scale times LR."""
    h, w = (pair.scale * side for side in pair.size)
    return common.load_image(pair.hr)[:, :h, :w]


def load_lr(path: Path, shrink: int) -> Tensor:
    """A real LR image (3, h, w) in [0, 1]; bicubically reduced to 1/shrink if that is not 1."""
    image = common.load_image(path)
    h, w = (side // shrink for side in image.shape[1:])
    return image if shrink == 1 else reduced(image[None, :, : shrink * h, : shrink * w], h, w)[0]


def other_scenes(cameras: Sequence[str], seed: int) -> dict[int, int]:
    """For each image another one of the same camera, each used once; no entry where there is none.

    The images of a camera are put in a random order, and each is given its successor.
    """
    other = {}
    for number, camera in enumerate(sorted(set(cameras))):
        members = [i for i, c in enumerate(cameras) if c == camera]
        order = torch.randperm(len(members), generator=common.generator(seed, number)).tolist()
        for here, successor in zip(order, order[1:] + order[:1], strict=True):
            if here != successor:
                other[members[here]] = members[successor]
    return other


def with_other_scenes(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs that have one, each with the LR of another scene of its camera as reference."""
    other = sorted(other_scenes([camera_of(pair.name) for pair in pairs], seed).items())
    return [replace(pairs[i], reference=pairs[j].lr) for i, j in other]


# ---- how near is what a method makes of them? ---------------------------------------------------

DECIMALS = {"PSNR RGB": 2, "PSNR Y": 2, "FID": 2, "KID": 4}  # of the others 3
Method = Callable[[Tensor, list[Pair]], Tensor]


@torch.no_grad()
def evaluate(
    name: str,
    method: Method,
    pairs: list[Pair],
    metrics: list[str],
    batch_size: int,
    device: torch.device,
    upwards: bool = False,
) -> dict[str, Any]:
    """One row of a table: the LR that a method makes of each HR image, against the real LR.

    Or `upwards`, the HR that it makes of each real LR image, against the HR image.
    metrics: some of METRICS, of which every image has its value, and of SET_METRICS.
    """
    seconds, images = 0.0, {}
    each = [m for m in metrics if m in METRICS]
    all_made, all_real = [], []  # batches of 8 bits
    pending = sorted(pairs, key=lambda pair: pair.size)
    bar = tqdm(total=len(pairs), desc=name, unit="image")
    while pending:
        batch = [pair for pair in pending[:batch_size] if pair.size == pending[0].size]
        pending = pending[len(batch) :]
        hr = torch.stack([load_hr(pair) for pair in batch]).to(device)
        lr = torch.stack([load_lr(pair.lr, pair.shrink) for pair in batch]).to(device)
        given, wanted = (lr, hr) if upwards else (hr, lr)
        began = time.perf_counter()
        made = common.to_uint8(method(given, batch)).cpu()  # 8 bits, as in the files of real use
        seconds += time.perf_counter() - began
        all_made.append(made)
        all_real.append(common.to_uint8(wanted).cpu())
        made = made.to(device) / 255
        values = torch.stack([METRICS[m](made, wanted).double().cpu() for m in each], dim=1)
        values = values.clamp(max=100.0)  # equal images: 100 dB, so that there is a mean
        for pair, row in zip(batch, values.tolist(), strict=True):
            images[pair.name] = dict(zip(each, row, strict=True))
        bar.update(len(batch))
    bar.close()
    mean = {m: sum(row[m] for row in images.values()) / len(images) for m in each if images}
    for m in [m for m in metrics if m in SET_METRICS and len(pairs) > 1]:
        both = ((x.to(device) / 255 for x in batches) for batches in (all_made, all_real))
        mean[m] = SET_METRICS[m](*both)
    return {"method": name, "n": len(pairs), "seconds": seconds, "mean": mean, "images": images}
