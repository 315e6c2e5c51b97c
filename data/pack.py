"""Photos to train on: decoded once, mapped into memory, read in random crops.

The stages use Photos and Crops. For sets that many runs need, the command writes one array of
neighbouring crops (N, 3, size, size) of 8 bits: native pixels, never resized, without flat ones.

    python data/pack.py --photos data/sample/lr --out data/lr.npy --size 128
    python diffusion.py --lr data/lr.npy --hr data/sample/hr
"""

import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# ---- photos to train on -----------------------------------------------------------------------

Item = Path | tuple[Path, ...]  # a photo, or several files of which `read` makes one array


def open_pack(path: Path) -> np.ndarray:
    """Crops (N, 3, side, side) of a packed file, uint8, mapped into memory; or UserError."""
    try:
        crops = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise common.UserError(f"{path}: no readable .npy file ({error}).") from None
    found = f"{crops.dtype} of shape {crops.shape}"
    right = crops.dtype == np.uint8 and crops.ndim == 4 and crops.shape[1] == 3 and len(crops) > 0
    wrong = f"{path}: {found}, not uint8 (N, 3, side, side): make it with data/pack.py."
    common.require(right, wrong)
    return crops


def read_photo(file: Path) -> np.ndarray:
    """A photo as uint8 (3, H, W); ValueError if it can't be read."""
    return common.to_uint8(common.load_image(file)).numpy()


def decode(items: Sequence[Item], target: Path, read: Callable[..., np.ndarray]) -> None:
    """Write the pixels of all photos into one file, and their rows of Photos.table beside it."""

    def work(item: Item) -> np.ndarray | str:
        try:
            return read(item)
        except ValueError as error:
            return str(error)

    main = common.process_rank() == 0
    table, bad, start = [], [], 0
    with common.replacing(target) as temporary, open(temporary, "wb") as pixels:
        photos = common.in_parallel(work, items, min(8, os.cpu_count() or 1))
        for photo in tqdm(photos, "decoding photos", len(items), disable=not main or None):
            if isinstance(photo, str):
                bad.append(photo)
                continue
            pixels.write(np.ascontiguousarray(photo).data)
            table.append((0, start, *photo.shape))
            start += photo.size
        first = "".join(bad[:1])
        common.require(len(table) > 0, f"no photo can be read of {len(items)} ({first}).")
        with common.replacing(target.with_suffix(".npy")) as index, open(index, "wb") as file:
            np.save(file, np.array(table, np.int64))
    if bad and main:
        print(f"skipped {len(bad)} of {len(items)} photos: unreadable (the first: {first})")
    for old in target.parent.iterdir():  # of photos that have changed since, or of a killed run
        if old.stem != target.stem and old.suffix in (".pixels", ".npy", ".tmp"):
            old.unlink()


class Photos:
    """Photos to train on, uint8 (C, H, W), mapped into memory from files on the disk.

    The first process of a node decodes each photo once, into `folder`; all processes and later runs
    read from there. Each crop of a packed file counts as a photo. Unreadable photos are left out.
    """

    table: np.ndarray  # int64 (N, 5): number of the map, start of the photo in it, C, H, W

    def __init__(
        self,
        items: Sequence[Item],
        folder: Path,
        rt: common.Runtime,
        read: Callable[..., np.ndarray] = read_photo,
    ) -> None:
        packs = [open_pack(x) for x in items if isinstance(x, Path) and x.suffix == ".npy"]
        photos = [x for x in items if not isinstance(x, Path) or x.suffix != ".npy"]
        self.maps = [pack.reshape(-1) for pack in packs]
        rows = [
            (i, k * p[0].size, *p.shape[1:]) for i, p in enumerate(packs) for k in range(len(p))
        ]
        self.table = np.array(rows, np.int64).reshape(-1, 5)
        if photos:
            files = [f for x in photos for f in (x if isinstance(x, tuple) else (x,))]
            facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            pixels = folder / f"{zlib.crc32(json.dumps(facts).encode()):08x}.pixels"
            if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not pixels.is_file():
                decode(photos, pixels, read)
            common.wait_for_all(rt)
            table = np.load(pixels.with_suffix(".npy"))
            table[:, 0] = len(self.maps)
            self.maps.append(np.memmap(pixels, np.uint8, "r"))
            self.table = np.concatenate([self.table, table])

    def __getitem__(self, index: int) -> np.ndarray:
        """Photo of a row of the table, uint8 (C, H, W)."""
        i, start, C, H, W = self.table[index].tolist()
        return self.maps[i][start : start + C * H * W].reshape(C, H, W)


def dihedral(x: Tensor, draw: int) -> Tensor:
    """Images (..., n, n) turned by a multiple of 90 degrees and perhaps flipped: 8 ways."""
    x = x.rot90(draw % 4, (-2, -1))
    return x.flip(-1) if draw % 8 >= 4 else x


class Crops:
    """Batches of random crops of photos: batch i depends on (seed, stream, i) and its size alone.

    A crop has `scale` times as many pixels a side as the value `crop` of `flag`. Photos are those
    of the table's `rows`; smaller ones than a crop are left out. UserError if none remains.
    """

    grid = 8  # crops begin at its multiples, so that blocks of JPEG begin at the edge of a crop

    def __init__(
        self,
        photos: Photos,
        crop: int,
        batch_size: int,
        seed: int,
        stream: int = 0,
        scale: float = 1,
        flag: str = "--crop",
        rows: np.ndarray | None = None,
    ) -> None:
        self.photos, self.size, self.batch_size = photos, int(scale * crop), batch_size
        self.key = (seed, stream)
        rows = np.arange(len(photos.table)) if rows is None else rows
        sides = photos.table[rows, 3:].min(axis=1)
        self.rows = rows[sides >= self.size]
        self.left_out = len(rows) - len(self.rows)
        most = int(sides.max() / scale) // 16 * 16
        way_out = f"{flag} {most} is the largest that works" if most else "take larger ones"
        small = f"none of {len(rows)} photos has {self.size} x {self.size} pixels"
        common.require(len(self.rows) > 0, f"{flag} {crop}: {small}; {way_out}.")

    def turned(self, crop: Tensor, draw: int) -> Tensor:
        """A crop (C, size, size), turned in one of 8 ways."""
        return dihedral(crop, draw)

    def batch(self, i: int, count: int) -> Tensor:
        """Batch i, uint8 (count, C, size, size)."""
        draws = torch.randint(2**30, (count, 4), generator=common.generator(*self.key, i))
        crops = []
        for index, *place, draw in draws.tolist():
            photo = self.photos[self.rows[index % len(self.rows)]]
            ends = [n - self.size + 1 for n in photo.shape[1:]]
            y, x = (p % n // self.grid * self.grid for p, n in zip(place, ends, strict=True))
            crop = torch.tensor(photo[:, y : y + self.size, x : x + self.size])
            crops.append(self.turned(crop, draw))
        return torch.stack(crops)

    def batches(self, numbers: Iterable[int], count: int, device: torch.device) -> Iterator[Tensor]:
        """Batches of these numbers, float (count, C, size, size) in [0, 1] on the device."""

        def load(i: int) -> Tensor:
            batch = self.batch(i, count)
            return batch.pin_memory() if device.type == "cuda" else batch

        for batch in common.in_parallel(load, numbers, 1 if device.type == "cpu" else 4):
            batch = batch.to(device, non_blocking=True).float() / 255
            yield batch.contiguous(memory_format=torch.channels_last)


# ---- the command ------------------------------------------------------------------------------


def cut(photo: Tensor, size: int) -> Tensor:
    """Neighbouring crops (N, 3, size, size) of a photo (3, H, W); its edges are left out."""
    H, W = (side // size * size for side in photo.shape[1:])
    top, left = (photo.shape[1] - H) // 2, (photo.shape[2] - W) // 2
    tiles = photo[:, top : top + H, left : left + W].unfold(1, size, size).unfold(2, size, size)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)  # (3, H/size, W/size, ...) -> (N, 3, ...)


def detail(crops: Tensor) -> Tensor:
    """RMS step in levels (N,) between neighbouring 4 x 4 blocks of uint8 crops (N, 3, H, W).

    The noise of an empty sky averages out in a block; its gradient is small from block to block.
    """
    blocks = F.avg_pool2d(crops.float().mean(1), 4)  # (N, H/4, W/4)
    down, right = (blocks.diff(dim=d).square().mean((1, 2)) for d in (1, 2))
    return ((down + right) / 2).sqrt()


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    photos: tuple[str, ...] = ("data/lr",)  # folders or files of photos
    out: str = ""  # file to write (default: the first of --photos, with .npy)
    size: int = 256  # side of a crop; larger than the crops of training, so that places vary
    flat: float = 2.0  # a crop is left out if 4 x 4 blocks differ by fewer levels of 255 (0: none)
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def write_header(file: BinaryIO, count: int, size: int) -> None:
    """Write the header of a .npy file; numpy pads it to the same length for any count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Pack the crops of all photos: the same photos and flags give the same bytes."""
    out, size = Path(cfg.out or Path(cfg.photos[0]).with_suffix(".npy")), cfg.size
    named = out.suffix == ".npy" and not out.is_dir()
    common.require(named, f"--out {out}: must be a file name that ends in .npy.")
    common.check_ranges(cfg, {"size": (8, 2**15), "flat": (0, math.inf)})
    common.require(rt.world_size == 1, "pack.py takes every core: start it without torchrun.")
    files = common.list_images(cfg.photos, "--photos")

    def work(file: Path) -> tuple[np.ndarray, int] | str:
        """The kept crops of a photo and the number of flat ones; or why it can't be used."""
        try:
            photo = torch.from_numpy(read_photo(file))
        except ValueError as error:
            return f"skipped: {error}"
        if min(photo.shape[1:]) < size:
            return f"skipped: {file}: under {size} pixels"
        crops = cut(photo, size)
        kept = crops[detail(crops) >= cfg.flat]
        return kept.numpy(), len(crops) - len(kept)

    threads, count, flat, skipped = torch.get_num_threads(), 0, 0, 0
    torch.set_num_threads(1)  # each thread of in_parallel has a core to itself
    # The number of crops is known in the end, and all of them may not fit into memory: they are
    # written one after the other. A full disk is an error then; with a memory map it is a signal.
    with common.replacing(out) as temporary, open(temporary, "wb") as target:
        write_header(target, 0, size)
        for result in tqdm(common.in_parallel(work, files, threads), total=len(files)):
            if isinstance(result, str):
                tqdm.write(result)
                skipped += 1
                continue
            crops, left = result
            target.write(crops.data)
            count, flat = count + len(crops), flat + left
        common.require(count > 0, f"no crop to keep: {skipped} photos skipped, {flat} crops flat.")
        write_header(target, count, size)
    left_out = f"left out {flat} flat crops and {skipped} photos"
    print(f"{count} crops of {size} x {size} pixels in {out}; {left_out} of {len(files)}")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
