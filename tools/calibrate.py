"""Measure on weights of stage 1 how far their head misreads LR, and store that with the weights.

In: clean HR photos and a checkpoint of extractors.py. Out: the same checkpoint with a calibration
(additions.Calibration), which diffusion.py takes over and generate.py uses: five amplitudes that
soften the output of Rec_lr, the noise that the head cannot tell from none, and the JPEG quality
that it cannot tell from no compression. LR is drawn by the recipe camera, so no pair is needed.

    python -m tools.calibrate --checkpoint runs/extractors/last.pt --hr data/hr
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import additions
import extractors
from bench.inputs import middles
from common import require
from common.checkpoint import add_fact, find_checkpoint, load_checkpoint
from common.cli import check_ranges, launch
from common.files import find_photos
from common.runtime import Runtime, make_generator
from degrade import OPERATIONS, degrade, sample_degradation
from generate import SCALE

DRAWS = 4  # of LR for each photo
RECIPE = "camera"


def softening(nets: extractors.Extractors, hr: Tensor, seed: int, number: int) -> list[Tensor]:
    """Transfer functions (DRAWS, 5) of LR of an HR photo (1, 3, H, W), and what the head reads.

    Behind D comes noise as real LR has it in its detail, which the head takes for sharpness.
    """
    true, read = [], []
    for i in range(DRAWS):
        draw = make_generator(seed, "soften", DRAWS * number + i)
        theta = sample_degradation(1, RECIPE, SCALE, draw)
        lr = degrade(hr, theta, draw)
        lr = additions.noise_by_detail(lr, draw)
        true.append(additions.effects_from(additions.effects_of(theta)).transfer)
        read.append(nets.effects(nets.e_deg(lr)).transfer.cpu())
    return [torch.cat(true), torch.cat(read)]


def read_in_clean_lr(nets: extractors.Extractors, hr: Tensor, draw: torch.Generator) -> list[float]:
    """Noise std in levels of 255 and JPEG quality that the head reads in LR that has neither."""
    theta = sample_degradation(1, RECIPE, SCALE, draw)
    clean = [OPERATIONS[k].partition(" ")[0] in ("blur", "resize") for k in theta.order[0].tolist()]
    theta.order[0] *= torch.tensor(clean)
    effects = nets.effects(nets.e_deg(degrade(hr, theta, draw)))
    return [255 * effects.noise_std.mean().item(), effects.quality.item()]


@torch.no_grad()
def calibrate(
    nets: extractors.Extractors, photos: list[Tensor], seed: int
) -> additions.Calibration:
    """The calibration of weights, measured on HR photos (3, H, W).

    soften: mean transfer function over the mean that the head reads. faint, uncompressed: 95 % of
    clean LR is read as having less noise, and a higher quality.
    """
    functions, clean = [], []
    for number, hr in enumerate(tqdm(photos, unit="photo")):
        functions.append(softening(nets, hr[None], seed, number))
        clean.append(read_in_clean_lr(nets, hr[None], make_generator(seed, "clean", number)))
    true, read = (torch.cat(of).mean(0) for of in zip(*functions, strict=True))
    noise, quality = torch.tensor(clean).T
    return additions.Calibration(
        soften=tuple(round(v, 2) for v in (true / read).tolist()),
        faint=round(noise.quantile(0.95).item(), 1),
        uncompressed=int(quality.quantile(0.05)),
    )


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    checkpoint: str = ""  # weights to calibrate (default: runs/extractors, else data/pretrained)
    hr: tuple[str, ...] = ()  # HR photos (default: data/hr, else data/sample/hr)
    crop: int = 128  # side of the LR images, pixels; smaller photos are left out
    soften: tuple[float, ...] = ()  # five amplitudes to store, in place of the measured ones
    faint: float = -1.0  # noise std to store, in levels of 255 (-1: as measured)
    uncompressed: int = 0  # JPEG quality to store (0: as measured)
    seed: int = 0
    device: str = "auto"


RANGES = {"crop": (8, 2**14), "soften": (0, 4), "faint": (-1, 255), "uncompressed": (0, 100)}


def main(cfg: Config, rt: Runtime) -> None:
    """Measure, print, and store the calibration in the checkpoint."""
    check_ranges(cfg, RANGES)
    require(len(cfg.soften) in (0, 5), "--soften takes five amplitudes.")
    require(rt.world_size == 1, "tools.calibrate is one process: start it without torchrun.")
    path = find_checkpoint(cfg.checkpoint, "extractors", "python extractors.py")
    files = find_photos(cfg.hr, "hr", "--hr")
    nets = extractors.load(load_checkpoint(path), str(path)).to(rt.device).requires_grad_(False)
    printed = f"{path}: weights of --as-printed have no head, so there is nothing to calibrate."
    require(not nets.as_printed, printed)
    side = SCALE * cfg.crop
    photos = [photo.to(rt.device) for photo in middles(files, side, cfg.seed)]
    require(bool(photos), f"--hr: no photo has {side} x {side} pixels: give a smaller --crop.")
    measured = calibrate(nets, photos, cfg.seed)
    print(f"measured on {len(photos)} photos: {measured}")
    stored = additions.Calibration(
        cfg.soften or measured.soften,
        measured.faint if cfg.faint < 0 else cfg.faint,
        cfg.uncompressed or measured.uncompressed,
    )
    add_fact(path, "calibration", asdict(stored))
    print(f"{path}: {stored}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
