"""Pack photos into one file of crops, for sets of photos that many trainings use.

In: photos. Out: an array (N, 3, size, size) of 8 bits, of neighbouring crops: native pixels, never
resized, without flat ones.

    python -m tools.pack --photos data/sample/lr --out data/lr.npy --size 128
    python diffusion.py --lr data/lr.npy --hr data/sample/hr
"""

import math
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
from common import require
from common.cli import check_ranges, launch
from common.files import list_images, replacing
from common.folder import out_folder
from common.images import lost_sentence
from common.photos import read_photo
from common.runtime import Runtime, in_parallel


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


RANGES = {"size": (8, 2**15), "flat": (0, math.inf)}


def write_header(file: BinaryIO, count: int, size: int) -> None:
    """Write the header of a .npy file; numpy pads it to the same length for any count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    photos: tuple[str, ...] = ("data/lr",)  # folders or files of photos
    out: str = ""  # file to write (default: the first of --photos, with .npy)
    size: int = 256  # side of a crop; larger than the crops of training, so that places vary
    flat: float = 2.0  # a crop is left out if 4 x 4 blocks differ by fewer levels of 255 (0: none)
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: Runtime) -> None:
    """Pack the crops of all photos: the same photos and flags give the same bytes."""
    out, size = Path(cfg.out or Path(cfg.photos[0]).with_suffix(".npy")), cfg.size
    named = out.suffix == ".npy" and not out.is_dir()
    require(named, f"--out {out}: must be a file name that ends in .npy.")
    check_ranges(cfg, RANGES)
    require(rt.world_size == 1, "tools/pack.py takes every core: start it without torchrun.")
    out_folder(out.parent, rt).check([out])
    files = list_images(cfg.photos, "--photos")

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
    with replacing(out) as temporary, open(temporary, "wb") as target:
        write_header(target, 0, size)
        for result in tqdm(in_parallel(work, files, threads), total=len(files)):
            if isinstance(result, str):
                tqdm.write(result)
                skipped += 1
                continue
            crops, left = result
            target.write(crops.data)
            count, flat = count + len(crops), flat + left
        require(count > 0, f"no crop to keep: {skipped} photos skipped, {flat} crops flat.")
        write_header(target, count, size)
    if sentence := lost_sentence():
        print(sentence)
    left_out = f"left out {flat} flat crops and {skipped} photos"
    print(f"{count} crops of {size} x {size} pixels in {out}; {left_out} of {len(files)}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
