"""Photos to train on: decoded once, mapped into memory, read in random crops."""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError, require
from common.files import replacing
from common.folder import TEMPORARY, open_folder_of
from common.images import load_pixels, lost_sentence, to_uint8
from common.runtime import (
    Runtime,
    in_parallel,
    local_rank,
    make_generator,
    of_all,
    process_rank,
)

Item = Path | tuple[Path, ...]  # a photo, or several files of which `read` makes one array


def open_pack(path: Path) -> np.ndarray:
    """Crops (N, 3, side, side) of a packed file, uint8, mapped into memory; or UserError."""
    try:
        crops = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: no readable .npy file ({error}).") from None
    found = f"{crops.dtype} of shape {crops.shape}"
    right = crops.dtype == np.uint8 and crops.ndim == 4 and crops.shape[1] == 3 and len(crops) > 0
    wrong = f"{path}: {found}, not uint8 (N, 3, side, side): make it with tools/pack.py."
    require(right, wrong)
    return crops


def read_photo(file: Path) -> np.ndarray:
    """A photo as uint8 (3, H, W); ValueError if it can't be read."""
    return to_uint8(load_pixels(file)).numpy()


def decode(items: Sequence[Item], target: Path, read: Callable[..., np.ndarray]) -> None:
    """Write the pixels of all photos into one file, and their rows of Photos.table beside it."""

    def work(item: Item) -> np.ndarray | str:
        try:
            return read(item)
        except ValueError as error:
            return str(error)

    main, index_file = process_rank() == 0, target.with_suffix(".npy")
    table, bad, start = [], [], 0
    if folder := open_folder_of(target):
        folder.claim([target, index_file])
    with replacing(target) as temporary, open(temporary, "wb") as pixels:
        photos = in_parallel(work, items, min(8, os.cpu_count() or 1))
        shown = tqdm(photos, "decoding photos", len(items), disable=not main or None)
        for item, photo in zip(items, shown, strict=True):
            if isinstance(photo, str):
                bad.append(photo)
                continue
            pixels.write(np.ascontiguousarray(photo).data)
            folder_of = (item if isinstance(item, Path) else item[0]).parent
            table.append((0, start, *photo.shape, zlib.crc32(str(folder_of).encode())))
            start += photo.size
        first = "".join(bad[:1])
        require(len(table) > 0, f"no photo can be read of {len(items)} ({first}).")
        with replacing(index_file) as index, open(index, "wb") as file:
            np.save(file, np.array(table, np.int64))
    if bad and main:
        print(f"skipped {len(bad)} of {len(items)} photos: unreadable (the first: {first})")
    if main and (sentence := lost_sentence()):
        print(sentence)


def remove_old(folder: Path, stems: set[str]) -> None:
    """Remove decoded photos but those of these names, and what killed runs have left."""
    ours = rf"realdgen-[0-9a-f]{{8}}\.(pixels|npy)|{re.escape(TEMPORARY)}.*\.tmp"
    for old in folder.iterdir():
        if re.fullmatch(ours, old.name) and old.stem not in stems:
            old.unlink(missing_ok=True)  # several nodes may share the folder


class Photos:
    """Photos to train on, uint8 (C, H, W), mapped into memory from files on the disk.

    The first process of a node decodes each photo once, into `folder`; all processes and later runs
    read from there. Each crop of a packed file counts as a photo. Unreadable photos are left out.
    """

    # int64 (N, 6): number of the map, start of the photo in it, C, H, W, number of its folder
    table: np.ndarray

    def __init__(
        self,
        items: Sequence[Item],
        folder: Path,
        rt: Runtime,
        read: Callable[..., np.ndarray] = read_photo,
    ) -> None:
        packs = [open_pack(x) for x in items if isinstance(x, Path) and x.suffix == ".npy"]
        photos = [x for x in items if not isinstance(x, Path) or x.suffix != ".npy"]
        self.maps = [pack.reshape(-1) for pack in packs]
        rows = [  # the folder of a packed crop is not known: each gets another negative number
            (i, k * p[0].size, *p.shape[1:], -(i << 40) - k - 1)
            for i, p in enumerate(packs)
            for k in range(len(p))
        ]
        self.table = np.array(rows, np.int64).reshape(-1, 6)
        if photos:
            files = [f for x in photos for f in (x if isinstance(x, tuple) else (x,))]
            facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            key = zlib.crc32(json.dumps({"columns": 6, "files": facts}).encode())
            pixels = folder / f"realdgen-{key:08x}.pixels"
            if local_rank() == 0 and not pixels.is_file():
                decode(photos, pixels, read)
            keys = of_all(key, rt)  # when all have decoded
            if local_rank() == 0:
                remove_old(folder, {f"realdgen-{key:08x}" for key in keys})
            table = np.load(pixels.with_suffix(".npy"))
            table[:, 0] = len(self.maps)
            self.maps.append(np.memmap(pixels, np.uint8, "r"))
            self.table = np.concatenate([self.table, table])

    def __getitem__(self, index: int) -> np.ndarray:
        """Photo of a row of the table, uint8 (C, H, W)."""
        i, start, C, H, W, _ = self.table[index].tolist()
        return self.maps[i][start : start + C * H * W].reshape(C, H, W)


def dihedral(x: Tensor, draw: int) -> Tensor:
    """Images (..., n, n) turned by a multiple of 90 degrees and perhaps flipped: 8 ways."""
    x = x.rot90(draw % 4, (-2, -1))
    return x.flip(-1) if draw % 8 >= 4 else x


class Crops:
    """Batches of random crops of photos: batch i depends on (seed, stream, i) and its size alone.

    A crop has `scale` times as many pixels a side as the value `crop` of `flag`. Photos are those
    of the table's `rows`; smaller ones than a crop are left out. UserError if none remains.
    Crops of the same rows that differ in `other` show other photos of the same folders, or other
    places of a photo that is alone in its folder.
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
        other: int = 0,
    ) -> None:
        self.photos, self.size, self.batch_size = photos, int(scale * crop), batch_size
        self.key, self.other = (seed, stream), other
        rows = np.arange(len(photos.table)) if rows is None else rows
        sides = photos.table[rows, 3:5].min(axis=1)
        self.rows = rows[sides >= self.size]
        self.folders = photos.table[self.rows, 5]
        self.left_out = len(rows) - len(self.rows)
        most = int(sides.max() / scale) // 16 * 16
        way_out = f"{flag} {most} is the largest that works" if most else "take larger ones"
        small = f"none of {len(rows)} photos has {self.size} x {self.size} pixels"
        require(len(self.rows) > 0, f"{flag} {crop}: {small}; {way_out}.")

    def turned(self, crop: Tensor, draw: int) -> Tensor:
        """A crop (C, size, size), turned in one of 8 ways."""
        return dihedral(crop, draw)

    def neighbour(self, number: int, k: int) -> int:
        """Number of the k-th other photo in the folder of a photo; itself if it is alone."""
        same = np.flatnonzero(self.folders == self.folders[number])
        start = np.searchsorted(same, number) + 1 + k % max(1, len(same) - 1)
        return int(same[start % len(same)])

    def batch(self, i: int, count: int) -> Tensor:
        """Batch i, uint8 (count, C, size, size)."""
        draws = torch.randint(2**30, (count, 4), generator=make_generator(*self.key, i))
        numbers = (draws[:, 0] % len(self.rows)).tolist()
        if self.other:
            draw = make_generator(*self.key, i, self.other)
            draws = torch.randint(2**30, (count, 4), generator=draw)
            numbers = list(map(self.neighbour, numbers, draws[:, 0].tolist()))
        crops = []
        for number, (_, *place, draw) in zip(numbers, draws.tolist(), strict=True):
            photo = self.photos[self.rows[number]]
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

        for batch in in_parallel(load, numbers, 1 if device.type == "cpu" else 4):
            batch = batch.to(device, non_blocking=True).float() / 255
            yield batch.contiguous(memory_format=torch.channels_last)
