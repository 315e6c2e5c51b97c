"""Packed crops: photos in, one array of crops (N, 3, size, size) of 8 bits out, to train on.

To cut a crop out of a JPEG, all of it is decoded, and a GPU trains faster than that. Here it is
done once: native pixels, never resized, in neighbouring crops; a stage reads those that it draws.

    python data/pack.py --photos data/sample/lr --out data/lr.npy --size 128
    python diffusion.py --lr data/lr.npy --hr data/sample/hr
"""

import sys
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

# ---- crops of one photo -----------------------------------------------------------------------


def cut(photo: Tensor, size: int) -> Tensor:
    """Neighbouring crops (N, 3, size, size) of a photo (3, H, W); the rest lies round the edges."""
    H, W = (side // size * size for side in photo.shape[1:])
    top, left = (photo.shape[1] - H) // 2, (photo.shape[2] - W) // 2
    tiles = photo[:, top : top + H, left : left + W].unfold(1, size, size).unfold(2, size, size)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)  # (3, H/size, W/size, ...) -> (N, 3, ...)


def detail(crops: Tensor) -> Tensor:
    """RMS step in levels (N,) between neighbouring 4 x 4 blocks of uint8 crops (N, 3, H, W).

    The noise of an empty sky averages out in a block, and its gradient hardly shows in one step.
    """
    blocks = F.avg_pool2d(crops.float().mean(1), 4)  # (N, H/4, W/4)
    down, right = (blocks.diff(dim=d).square().mean((1, 2)) for d in (1, 2))
    return ((down + right) / 2).sqrt()


# ---- the command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    photos: tuple[str, ...] = ("data/lr",)  # folders or files of photos
    out: str = ""  # file to write (default: the first of --photos, with .npy)
    size: int = 256  # side of a crop; give more than is trained on, so that places vary
    per_photo: int = 0  # crops to keep of a photo, drawn at random (0: all)
    flat: float = 2.0  # a crop is left out if 4 x 4 blocks differ by fewer levels of 255 (0: none)
    seed: int = 0  # of the draw for --per-photo
    device: ClassVar[str] = "cpu"


def write_header(file: BinaryIO, count: int, size: int) -> None:
    """Begin a .npy file; numpy pads the header, so that a larger count takes no more room."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Pack the crops of all photos: the same photos and flags give the same bytes."""
    out, size = Path(cfg.out or Path(cfg.photos[0]).with_suffix(".npy")), cfg.size
    named = out.suffix == ".npy" and not out.is_dir()
    common.require(named, f"--out {out}: must be a file name that ends in .npy.")
    common.require(size >= 8, f"--size {size}: must be at least 8.")
    common.require(cfg.per_photo >= 0, f"--per-photo {cfg.per_photo}: must not be negative.")
    common.require(cfg.flat >= 0, f"--flat {cfg.flat}: must not be negative.")
    common.require(rt.world_size == 1, "pack.py takes every core: start it without torchrun.")
    files = common.list_images(cfg.photos, "--photos")

    def work(i: int) -> tuple[bytes, int] | str:
        """The kept crops of photo i and how many were flat; or why it can't be used."""
        try:
            photo = common.to_uint8(common.load_image(files[i]))
        except ValueError as error:
            return f"skipped: {error}"
        if min(photo.shape[1:]) < size:
            return f"skipped: {files[i]}: under {size} pixels"
        crops = cut(photo, size)
        kept = torch.nonzero(detail(crops) >= cfg.flat)[:, 0]
        flat = len(crops) - len(kept)
        if cfg.per_photo:
            order = torch.randperm(len(kept), generator=common.generator(cfg.seed, i))
            kept = kept[order[: cfg.per_photo].sort().values]
        return crops[kept].numpy().tobytes(), flat

    threads, count, flat, skipped = torch.get_num_threads(), 0, 0, 0
    torch.set_num_threads(1)  # each thread of the pool has a core to itself
    # Written as it comes, since neither the count is known before nor memory enough for all; a
    # full disk is an error here, where a memory map would be killed by a signal.
    with common.replacing(out) as temporary, open(temporary, "wb") as file:
        write_header(file, 0, size)
        for result in tqdm(common.in_parallel(work, range(len(files)), threads), total=len(files)):
            if isinstance(result, str):
                tqdm.write(result)
                skipped += 1
                continue
            file.write(result[0])
            count, flat = count + len(result[0]) // (3 * size * size), flat + result[1]
        common.require(count > 0, f"no crop to keep: {skipped} photos skipped, {flat} crops flat.")
        write_header(file, count, size)
    left_out = f"left out {flat} flat crops and {skipped} photos"
    print(f"{count} crops of {size} x {size} pixels in {out}; {left_out} of {len(files)}")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
