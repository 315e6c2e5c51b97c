"""Aligned pairs of HR and real LR images: find them, read them, compare them with generated ones.

In: a folder of aligned pairs: HR/ and LR/ (or GT/ and LQ/, in any case) with the same file names,
or NAMEx4 in LR/ for NAME in HR/, or RealSR, DRealSR or RealVSR as released (data/README.md).
Out: a list of Pair; the distances of a method's images to the real ones. All tables use it.
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

from bench.metrics import METRICS, SET_METRICS
from common import UserError, require
from common.files import list_images, open_photo
from common.images import load_image, orientation, to_uint8
from common.runtime import make_generator
from generate import SCALE

# ---- the pairs of a folder ----------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An HR image and the real LR image of the same scene."""

    index: int  # among all pairs of the folder, readable or not: random draws depend on it
    name: str  # below LR/, without suffix; in a release what HR and LR share
    hr: Path
    lr: Path
    size: tuple[int, int]  # of the LR image, (h, w)
    full: bool  # whether the LR file has the size of HR and must be reduced
    scene: str  # frames of one video share it
    release: str  # RealSR, DRealSR or RealVSR if the folder has its layout, else ""
    others: tuple[Path, ...] = ()  # files of LR of other scenes of its camera

    @property
    def reference(self) -> Path:
        """File of the LR whose degradation is imitated: the first of the others, or its own."""
        return self.others[0] if self.others else self.lr


def camera_of(name: str) -> str:
    """The camera in a name below LR/: its sub-folder, else the leading letters of the file name."""
    folder, slash, _ = name.partition("/")
    return folder if slash else re.split(r"[\W\d_]", name, maxsplit=1)[0]


# Patterns of the paths of HR and LR files below the folder, without suffix, by the name of a
# release; {0} is the scale, {1} is Test or Train. The groups in brackets make the name of a pair.
LAYOUTS = (
    ("RealSR", r"(?:.*/)?[^/]+/{1}/{0}/([^/]+)_HR", r"(?:.*/)?[^/]+/{1}/{0}/([^/]+)_LR{0}"),
    ("DRealSR", r"(?:.*/)?{1}_x{0}/(?i:{1})_HR/([^/]+)_x{0}",
     r"(?:.*/)?{1}_x{0}/(?i:{1})_LR/([^/]+)_x1"),
    ("DRealSR", r"(?i:{1})_HR/([^/]+)_x{0}", r"(?i:{1})_LR/([^/]+)_x1"),
    ("RealVSR", r"GT_(?i:{1})/([^/]+)/(\d+)", r"LQ_(?i:{1})/([^/]+)/(\d+)"),
    ("", r"(?i:HR|GT|test_HR)/(.+)", r"(?i:LR|LQ|test_LR)/(.+)x{0}"),
    ("", r"(?i:HR|GT|test_HR)/(.+)", r"(?i:LR|LQ|test_LR)/(.+)"),
)  # fmt: skip
BY_CHANCE = (2, len(LAYOUTS) - 2)  # these may match some names of a later layout
FRAMES = 200  # of RealVSR, drawn at random as in the paper (Section 3.2)


def by_name(images: list[tuple[str, Path]], pattern: str) -> dict[str, Path]:
    """The images whose path without suffix has this pattern, by the name of their pair."""
    found: dict[str, Path] = {}
    for path, file in images:
        if match := re.fullmatch(pattern, path):
            name = "_".join(match.groups())
            require(name not in found, f"{file}: {found.get(name)} has the same name.")
            found[name] = file
    return found


def find_files(
    folder: Path, scale: int = SCALE, part: str = "Test"
) -> tuple[dict[str, tuple[Path, Path]], str]:
    """HR and LR file of each pair by name, and the release whose layout this is, or "".

    UserError if the files do not form pairs. part: Test or Train of a release; of the second there
    may be none.
    """
    flag = f"--pairs {folder}"
    require(folder.is_dir(), f"{flag}: no such folder.")
    files = list_images([str(folder)], "--pairs")
    images = [(file.relative_to(folder).with_suffix("").as_posix(), file) for file in files]
    for number, (release, *patterns) in enumerate(LAYOUTS):
        hr, lr = (by_name(images, pattern.format(scale, part)) for pattern in patterns)
        unpaired = sorted(hr.keys() ^ lr.keys())
        if part == "Train" and not release:
            return {}, ""
        if unpaired and number in BY_CHANCE:
            continue
        if hr or lr:
            counts = f"{len(hr)} HR and {len(lr)} LR images"
            names = f"{len(unpaired)} names are of one kind only, such as {', '.join(unpaired[:2])}"
            require(not unpaired, f"{flag}: {counts}; {names}.")
            return {name: (hr[name], file) for name, file in lr.items()}, release
    layouts = "HR/ and LR/ with the same names, or RealSR, DRealSR or RealVSR as released"
    raise UserError(f"{flag}: no images as {layouts} (see data/README.md).")


def stored_sizes(hr: Path, lr: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of both images, from their headers.

    ValueError if an image can't be read, or if EXIF turns the two differently.
    """
    try:
        with open_photo(hr) as large, open_photo(lr) as small:
            alike = orientation(large) == orientation(small)
            sizes = large.size, small.size
    except Exception as error:  # Pillow raises errors of many types
        raise ValueError(f"{hr} or {lr}: no image ({error})") from None
    if not alike:
        raise ValueError(f"{hr}: EXIF turns this image and its LR image differently")
    return sizes


def find_pairs(folder: Path, part: str = "Test") -> tuple[list[Pair], int]:
    """The readable pairs of a folder, and how many can't be read; UserError if sizes don't fit.

    part: Test or Train of a release. Of Train, which may be large, only the headers are read. Some
    releases (RealVSR, RealSR before version 3) store LR images at the size of HR.
    """
    flag = f"--pairs {folder}"
    files, release = find_files(folder, part=part)
    found = sorted(files.items())
    if release == "RealVSR":
        order = torch.randperm(len(found), generator=make_generator(0))[:FRAMES]
        found = [found[i] for i in sorted(order.tolist())]
    pairs: list[Pair] = []
    for index, (name, (hr, lr)) in enumerate(found):
        try:
            (W, H), (w, h) = stored_sizes(hr, lr)
            if part == "Test":
                H, W = load_image(hr).shape[1:]
                h, w = load_image(lr).shape[1:]
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        size = (H // SCALE, W // SCALE)
        full = bool(release) and (h, w) == (H, W)
        sizes = f"{name} has {W} x {H} HR and {w} x {h} LR pixels"
        wrong = f"{flag}: {sizes}, not {size[1]} x {size[0]} (scale {SCALE})."
        require(full or (h, w) == size, wrong)
        require(min(size) >= 32, f"{flag}: the LR image {name} is under 32 x 32 pixels.")
        scene = name.partition("_")[0] if release == "RealVSR" else name
        pairs.append(Pair(index, name, hr, lr, size, full, scene, release))
    require(bool(pairs) or part == "Train", f"{flag}: none of its pairs can be read.")
    return pairs, len(found) - len(pairs)


# ---- their images -------------------------------------------------------------------------------


def resized_by_pillow(x: Tensor, h: int, w: int) -> Tensor:
    """Pillow's bicubic resize of x (B, 3, H, W) in [0, 1]: (B, 3, h, w), rounded to 8 bits."""
    images = [Image.fromarray(v) for v in to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()]
    resized = [np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(x.device) / 255


def load_hr(pair: Pair) -> Tensor:
    """The HR image (3, 4h, 4w) in [0, 1], cut at the right and at the bottom."""
    h, w = (SCALE * side for side in pair.size)
    return load_image(pair.hr)[:, :h, :w]


def load_lr(file: Path, full: bool = False) -> Tensor:
    """A real LR image (3, h, w) in [0, 1]; full: the file has the size of HR and is reduced."""
    image = load_image(file)
    h, w = (side // SCALE for side in image.shape[1:])
    if not full:
        return image
    return resized_by_pillow(image[None, :, : SCALE * h, : SCALE * w], h, w)[0]


# ---- which pairs give references ----------------------------------------------------------------


def with_other_scenes(pairs: Sequence[Pair], seed: int, train: Sequence[Pair] = ()) -> list[Pair]:
    """The pairs whose camera has other scenes, which are put in `others`.

    The other scenes are those of Train, or without it those of `pairs`. The scenes of a camera are
    put in a random order, and each pair is given the next one, so that all are used alike.
    """
    found = []
    for number, camera in enumerate(sorted({camera_of(pair.name) for pair in train or pairs})):
        tested, scenes = (
            [pair for pair in part if camera_of(pair.name) == camera]
            for part in (pairs, train or pairs)
        )
        order = torch.randperm(len(scenes), generator=make_generator(seed, number)).tolist()
        for k, pair in enumerate(tested):
            start = (k if train else order.index(k) + 1) % len(order)
            usable = [i for i, p in enumerate(scenes) if train or p.scene != pair.scene]
            if usable:
                first = next(i for i in order[start:] + order[:start] if i in usable)
                at = usable.index(first)
                others = tuple(scenes[i].lr for i in usable[at:] + usable[:at])
                found.append(replace(pair, others=others))
    return sorted(found, key=lambda pair: pair.index)


def sets_with_other_scenes(
    sets: dict[str, list[Pair]], seed: int, train: dict[str, list[Pair]], needed: str = "two"
) -> dict[str, list[Pair]]:
    """with_other_scenes() of each set, by its name; UserError for a set without such pairs."""
    found = {name: with_other_scenes(v, seed, train.get(name, ())) for name, v in sets.items()}
    for name, pairs in found.items():
        missing = f"--pairs {name}: no camera has {needed} scenes."
        if train.get(name):
            missing = f"--pairs {name}: Train has no camera of Test."
        require(bool(pairs), missing)
    return found


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs that give references, and those to test on: every other scene of each camera."""
    split: tuple[list[Pair], list[Pair]] = ([], [])
    scenes: dict[str, dict[str, int]] = {}
    for pair in pairs:
        numbers = scenes.setdefault(camera_of(pair.name), {})
        split[numbers.setdefault(pair.scene, len(numbers)) % 2].append(pair)
    return split


# ---- distances of a method's images to the real ones --------------------------------------------

# HR (B, 3, 4h, 4w) -> LR (B, 3, h, w), or LR -> HR
Method = Callable[[Tensor, Sequence[Pair]], Tensor]


@torch.no_grad()
def evaluate(
    method: Method,
    pairs: Sequence[Pair],
    metrics: Sequence[str],
    device: torch.device,
    batch_size: int = 1,
    upwards: bool = False,
) -> dict[str, Any]:
    """Distances of a method's images to the real ones: values of each image, means, seconds.

    method: HR -> LR, or LR -> HR if `upwards`; metrics: names of METRICS and SET_METRICS. The
    method's images are first rounded to 8 bits, as if they were saved.
    """
    each = [m for m in metrics if m in METRICS]
    seconds, images = 0.0, {}
    outputs, targets = [], []  # batches of 8 bits
    pending = sorted(pairs, key=lambda pair: pair.size)
    bar = tqdm(total=len(pairs), unit="image", leave=False)
    while pending:
        batch = [pair for pair in pending[:batch_size] if pair.size == pending[0].size]
        pending = pending[len(batch) :]
        hr = torch.stack([load_hr(pair) for pair in batch]).to(device)
        lr = torch.stack([load_lr(pair.lr, pair.full) for pair in batch]).to(device)
        x, target = (lr, hr) if upwards else (hr, lr)
        began = time.perf_counter()
        output = to_uint8(method(x, batch)).cpu()
        seconds += time.perf_counter() - began
        outputs.append(output)
        targets.append(to_uint8(target).cpu())
        output = output.to(device) / 255
        values = torch.stack([METRICS[m](output, target).double().cpu() for m in each], dim=1)
        values = values.clamp(max=100.0)  # equal images get 100 dB, so that there is a mean
        for pair, row in zip(batch, values.tolist(), strict=True):
            images[pair.name] = dict(zip(each, row, strict=True))
        bar.update(len(batch))
    bar.close()
    mean = {m: float(np.mean([row[m] for row in images.values()])) for m in each}
    for m in [m for m in metrics if m in SET_METRICS and len(pairs) > 1]:
        sets = ((x.to(device) / 255 for x in batches) for batches in (outputs, targets))
        mean[m] = SET_METRICS[m](*sets)
    return {"n": len(pairs), "seconds": seconds, "mean": mean, "images": images}


# ---- tables as text -----------------------------------------------------------------------------


def table_text(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; its first `words` columns are aligned left, the others right."""
    marks = ["---"] * words + ["---:"] * (len(heads) - words)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, marks, *rows))
