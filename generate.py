"""Stage 3: make LR/HR training pairs from HR photos and unrelated real LR photos. Section 2.3, A.6.

Input: HR photos, real LR photos whose camera is to be imitated, and the weights of stage 2.
Output: a folder of pairs (hr/NAME.png, lr/NAME.png), pairs.jsonl and preview.png. Each HR image
draws one reference; its F_deg is averaged with those of others in its folder. K candidates are
denoised from a noised start image (Algorithm 2), and the filter keeps the best one.

    python generate.py
    python generate.py --hr data/hr --lr-ref data/lr --out out/pairs --candidates 4
"""

import bisect
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import additions
import degrade
import diffusion
from common import require
from common.checkpoint import find_checkpoint, fingerprint, load_checkpoint
from common.cli import check_ranges, launch
from common.files import find_photos, image_size, keys_of, outside, photo_names, write_text
from common.images import (
    centre,
    crop_to_multiple,
    is_gray,
    load_image,
    load_pixels,
    lost_sentence,
    resized,
    save_image,
    save_sheet,
    to_uint8,
)
from common.pairs import PairFolder, without_time
from common.runtime import (
    Runtime,
    autocast,
    autocast_dtype,
    in_batches,
    in_parallel,
    make_generator,
    of_all,
    print_once,
    wait_for_all,
)
from common.tiles import TILE, in_tiles
from diffusion import DecoupledDDPM

SCALE = 4  # HR size / LR size. It is the VQ-VAE's factor, so content and LR have the same grid.

# ---- the method -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How LR is made. The defaults are the best measured; the preset paper has the paper's."""

    start: str = "reconstruct"  # start image: reconstruct (Rec_lr), or D: realesrgan (paper), light
    t_start: int = 15  # T, steps of noise on it; behind D each image draws its own from 0..T
    num_steps: int = 8  # network evaluations
    eta: float = 1.0  # 0 is DDIM; 1 with as many evaluations as steps is DDPM (the paper)
    candidates: int = 1  # K, of which the filter keeps the best
    grain: bool = True  # add the noise and JPEG that E_deg reads in the reference; the paper: no
    average: int = 8  # mean F_deg of up to this many references of the same folder; the paper: 1


STARTS = ("reconstruct", "realesrgan", "light")
PAIRINGS = ("photo", "folder")
CANDIDATES = 4  # K where the filter is to have a choice. Not in the paper: how many.
S = TypeVar("S", bound=Sampler)


def middle_of(photo: Tensor) -> Tensor:
    """The middle 512 x 512 of a photo (..., h, w), from a corner of JPEG's blocks of 8 x 8 on."""
    top, left = (max(0, n - 512) // 16 * 8 for n in photo.shape[-2:])
    return photo[..., top : top + 512, left : left + 512]


def degradation_of(net: DecoupledDDPM, lr_ref: Tensor) -> Tensor:
    """F_deg (B, D) of references (B, 3, h, w) or one (3, h, w), also of 8 bits; or of F_deg (D,).

    Only the middle of a large photo is read, because F_deg is an average over the image.
    """
    device = next(net.parameters()).device
    if lr_ref.ndim == 1:
        return lr_ref[None].to(device, non_blocking=True)
    lr = middle_of(lr_ref if lr_ref.ndim == 4 else lr_ref[None]).to(device, non_blocking=True)
    if not lr.is_floating_point():  # as photos are read
        lr = lr.float() / 255
    with precision(device):
        return net.extractors.e_deg(lr).float()


def start_images(
    hr: Tensor, lr_hat: Tensor, sampler: Sampler, seeds: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Start images (B, 3, h, w), and steps of noise on each: lr_hat with T, or D(HR) with 0..T.

    Deviation: the paper starts from D(HR). A few steps do not remove D's blur and noise.
    """
    if sampler.start == "reconstruct":
        return lr_hat, [sampler.t_start] * len(hr)
    draws = [make_generator(seed) for seed in seeds]
    thetas = [degrade.sample_degradation(1, sampler.start, SCALE, draw) for draw in draws]
    t_start = [int(torch.randint(sampler.t_start + 1, (), generator=draw)) for draw in draws]
    return degrade.degrade(hr, degrade.Degradation.cat(thetas)), t_start


def errors(
    net: DecoupledDDPM, lr: Tensor, degradation: Tensor, content: Tensor
) -> tuple[Tensor, Tensor]:
    """How far images (B, 3, h, w) are from their HR content and their reference's degradation.

    ||E_cont(up(lr)) - E_cont(hr)|| (root mean square), ||E_deg(lr) - E_deg(ref)||: (B,) each. A.6.
    """
    lr_content = net.extractors.content(resized(lr, *(4 * n for n in lr.shape[2:])))
    # Not in the paper: which distances. RMS makes that of F_cont independent of the image's size.
    content_error = (lr_content - content).float().square().mean((1, 2, 3)).sqrt()
    return content_error, (net.extractors.e_deg(lr) - degradation).float().norm(dim=1)


def keep_best(content_error: Tensor, degradation_error: Tensor) -> Tensor:
    """The filter: the candidate (B,) with the smallest sum of both errors (B, K). A.6.

    Not in the paper: each error is divided by its mean over the candidates.
    """
    both = (content_error, degradation_error)
    relative = [e / e.mean(1, keepdim=True).clamp(min=1e-12) for e in both]
    return (relative[0] + relative[1]).argmin(1)


@torch.no_grad()
def generate(
    net: DecoupledDDPM,
    hr: Tensor,
    lr_ref: Sequence[Tensor],
    sampler: Sampler,
    seeds: Sequence[int],
    scored: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LR images with the content of hr and the degradation of lr_ref. Algorithm 2, A.6.

    hr (B, 3, H, W) in [0, 1], sizes multiples of 4; lr_ref: B images (3, h, w) of any size, or
    F_deg (D,); seeds: B numbers, from which image b draws. Returns candidates (B, K, 3, H/4, W/4)
    and "kept" (B,), the best of them; where K > 1, or if `scored`, also the "content" and the
    "degradation" errors (B, K). On a CPU no result depends on the other images, bit for bit.
    """
    assert len(lr_ref) == len(seeds) == len(hr), "one reference and one seed for each image"
    if hr.device.type == "cpu" and len(hr) > 1:
        return one_by_one(net, hr, lr_ref, sampler, seeds, scored)
    with precision(hr.device):
        B, K, (h, w) = len(hr), sampler.candidates, (n // SCALE for n in hr.shape[2:])
        hr, nets = padded(hr, net), net.extractors
        degradation = torch.cat([degradation_of(net, ref) for ref in lr_ref])  # F_deg (B, D)
        content = nets.content(hr)  # F_cont (B, z, H/4, W/4)
        grid = content.shape[2:]
        lr_hat = in_tiles(partial(nets.reconstruct, degradation), grid, hr, content).float()
        lr_hat = additions.soften(lr_hat, net.calibration.soften).clamp(0, 1)
        c = in_tiles(partial(net.condition, degradation), grid, content, lr_hat)
        x, t_start = start_images(hr, lr_hat, sampler, seeds)

        def eps_pred(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return in_tiles(lambda x_t, c: net(x_t, t, c), grid, x_t, c)

        x, c, degradation, content = (
            v.repeat_interleave(K, 0) for v in (x, c, degradation, content)
        )
        t_start, draws = [t for t in t_start for _ in range(K)], generators(hr.device, seeds, K)
        lr = diffusion.sample(eps_pred, x, c, t_start, sampler.num_steps, draws, sampler.eta)
        lr = lr[..., :h, :w]
        if sampler.grain:
            lr = with_grain(net, lr, degradation, generators(hr.device, seeds, K, 1))

        candidates = lr.unflatten(0, (B, K))
        if K == 1 and not scored:
            return candidates, {"kept": torch.zeros(B, dtype=torch.long, device=hr.device)}
        content_error, degradation_error = errors(net, lr, degradation, content[..., :h, :w])
        scores = {"content": content_error.view(B, K), "degradation": degradation_error.view(B, K)}
        return candidates, scores | {"kept": keep_best(*scores.values())}


def chosen(lr: Tensor, scores: dict[str, Tensor]) -> Tensor:
    """The candidates (B, 3, h, w) that the filter keeps, from the two results of generate()."""
    return lr[torch.arange(len(lr), device=lr.device), scores["kept"].to(lr.device)]


# ---- helpers of generate() ----------------------------------------------------------------------


def precision(device: torch.device) -> torch.autocast:
    """16 bits on a GPU. On a CPU float32: sums in bf16 depend on the number of threads."""
    return autocast(device, autocast_dtype(device, training=False))


def one_by_one(
    net: DecoupledDDPM,
    hr: Tensor,
    lr_ref: Sequence[Tensor],
    sampler: Sampler,
    seeds: Sequence[int],
    scored: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """generate() of each image alone."""
    rows = [slice(b, b + 1) for b in range(len(hr))]
    made = [generate(net, hr[b], lr_ref[b], sampler, seeds[b], scored) for b in rows]
    scores = {key: torch.cat([score[key] for _, score in made]) for key in made[0][1]}
    return torch.cat([lr for lr, _ in made]), scores


def padded(hr: Tensor, net: DecoupledDDPM) -> Tensor:
    """hr (B, 3, H, W), extended at the right and the bottom to sizes that all networks take.

    The U-Net halves the grid, and tiles keep to blocks of 8 pixels.
    """
    H, W = hr.shape[2:]
    large = max(H, W) > SCALE * TILE
    multiple = SCALE * max(2 ** (len(net.widths) - 1), 8 if large else 1)
    return F.pad(hr, (0, -W % multiple, 0, -H % multiple), mode="replicate")


def generators(
    device: torch.device, seeds: Sequence[int], K: int, *purpose: int
) -> list[torch.Generator]:
    """A generator of the device for each candidate of each image; a GPU draws other noise."""
    return [make_generator(seed, k, *purpose, device=device) for seed in seeds for k in range(K)]


def with_grain(
    net: DecoupledDDPM, lr: Tensor, degradation: Tensor, draws: Sequence[torch.Generator]
) -> Tensor:
    """Not in the paper: the noise and JPEG of the references on generated LR (B K, 3, h, w)."""
    nets = net.extractors
    read = lambda x: nets.effects(nets.e_deg(x))  # noqa: E731
    return additions.add_grain(lr, nets.effects(degradation), read, net.calibration, draws)


def load_generator(checkpoint: str, device: torch.device) -> DecoupledDDPM:
    """The trained model, ready to generate; "" looks in runs/diffusion, then in data/pretrained.

    UserError if it can't be used.
    """
    path = find_checkpoint(checkpoint, "diffusion", "python diffusion.py")
    net = diffusion.load(load_checkpoint(path), str(path))
    net.eval().requires_grad_(False)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_grain(net: DecoupledDDPM, name: str) -> None:
    """UserError if the weights have no head to read noise and JPEG; a sentence if uncalibrated."""
    headless = f"{name}: E_deg as printed can't read noise and JPEG"
    require(not net.extractors.as_printed, f"{headless}: give --preset paper, or --no-grain.")
    if net.calibration == additions.Calibration():
        no = "nothing is softened, and noise and JPEG are added even if faint"
        print_once(f"{name}: E_deg was not calibrated (tools.calibrate), so {no}")


def with_sampler_of(net: DecoupledDDPM, cfg: S, name: str) -> S:
    """The settings, with the paper's sampler if the weights are as printed and no flag changes one.

    UserError if these weights can't do what the settings want; name: of the weights.
    """
    default = all(getattr(cfg, f.name) == f.default for f in fields(Sampler))
    if net.as_printed and default:
        print_once(f"{name}: trained as printed, so the sampler is that of --preset paper")
        return replace(cfg, **PRESETS["paper"])
    if cfg.grain:
        check_grain(net, name)
    return cfg


# ---- references ---------------------------------------------------------------------------------


class References:
    """Reference photos. code() computes the F_deg of those that are needed, each once."""

    def __init__(self, files: list[Path], given: Sequence[str], net: DecoupledDDPM, average: int):
        self.files, self.net, self.average = files, net, average
        self.keys = keys_of(files, given)
        self.degradations: dict[int, Tensor] = {}  # (D,) each
        self.gray: dict[int, bool] = {}
        self.usable = np.ones(len(files), bool)  # until code() finds otherwise
        self.seen: set[int] = set()  # by code()
        names = photo_names(files, given)
        self.hashes = np.array([zlib.crc32(os.fsencode(name)) for name in names], np.uint64)
        self.folders: dict[Path, list[int]] = {}  # a folder usually holds the photos of one camera
        for r, file in enumerate(files):
            self.folders.setdefault(file.parent, []).append(r)

    def read(self, r: int) -> tuple[Tensor, int, bool] | None:
        """The middle of reference r, r, and whether it is gray; None if it can't be used."""
        try:
            photo = load_pixels(self.files[r])
            if min(photo.shape[1:]) < 16:
                raise ValueError(f"{self.files[r]}: a reference needs 16 x 16 pixels")
            return middle_of(photo).clone(), r, is_gray(photo)
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            return None

    @torch.no_grad()
    def code_batch(self, photos: list[tuple[Tensor, int, bool]]) -> tuple[Tensor, dict[int, bool]]:
        """F_deg (B, D), on the device, of what read() returned; which of them are gray."""
        lr_ref = torch.stack([photo for photo, *_ in photos])
        return degradation_of(self.net, lr_ref), {r: gray for _, r, gray in photos}

    def code(self, needed: Callable[[], set[int]], rt: Runtime) -> None:
        """Compute the F_deg of what needed() names in all processes, a share of it in each.

        It is asked again, because other references are drawn where one can't be used.
        """
        while new := sorted(set().union(*of_all(needed() - self.seen, rt))):
            self.seen.update(new)
            mine = tqdm(new[rt.rank :: rt.world_size], "references", disable=not rt.is_main)
            coded = list(in_batches(self.read, self.code_batch, mine, rt.device))
            batches = [(codes.cpu(), gray) for codes, gray in coded]  # synchronises the GPU once
            for codes, gray in itertools.chain(*of_all(batches, rt)):
                self.degradations |= zip(gray, codes, strict=True)
                self.gray |= gray
            self.usable[new] = [r in self.degradations for r in new]

    def needed(self, seeds: Iterable[int]) -> set[int]:
        """The references whose F_deg the pairs with these seeds take."""
        return {i for seed in seeds for i in self.averaged(self.draw(seed))}

    def averaged(self, r: int) -> list[int]:
        """Reference r and the next ones in its folder, the first after the last."""
        folder = self.folders[self.files[r].parent]
        first = bisect.bisect_left(folder, r)
        return [folder[(first + i) % len(folder)] for i in range(min(self.average, len(folder)))]

    def mean_degradation(self, r: int) -> tuple[Tensor, bool]:
        """The mean F_deg (D,) of those that can be used of averaged(r); whether all are gray."""
        usable = [i for i in self.averaged(r) if self.usable[i]]
        mean = torch.stack([self.degradations[i] for i in usable]).mean(0)
        return mean, all(self.gray[i] for i in usable)

    def draw(self, seed: int) -> int:
        """A usable reference for this seed; UserError if there is none.

        Rendezvous hashing: each reference gets a number made of the seed and its name, and the
        largest wins. So a new reference changes few of the draws.
        """
        require(bool(self.usable.any()), "no usable image found in --lr-ref: see the files above.")
        mixed = (self.hashes ^ np.uint64(seed % 2**64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return int(np.where(self.usable, mixed ^ (mixed >> np.uint64(32)), np.uint64(0)).argmax())


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Sampler):
    """Settings of generation; every field is a flag."""

    hr: tuple[str, ...] = ()  # HR photos: folders or files (default: data/hr, else data/sample/hr)
    lr_ref: tuple[str, ...] = ()  # real LR photos (default: data/lr, else data/sample/lr)
    out: str = "out/generated"  # folder of the pairs
    checkpoint: str = ""  # weights (default: runs/diffusion, else data/pretrained)
    pairing: str = "photo"  # who draws a reference: each photo, or each folder for all its photos
    max_error: tuple[float, ...] = (math.inf, math.inf)  # drop pairs: content, degradation error
    seed: int = 0  # an image draws from (seed, its path below --hr)
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {"start": "realesrgan", "t_start": 300, "num_steps": 300, "eta": 1.0,
              "candidates": CANDIDATES, "grain": False, "average": 1},
    # arXiv:2303.06994, with weights of diffusion.py --without content degradation.
    "syndiff": {"start": "light", "t_start": 250, "num_steps": 12, "eta": 0.0, "candidates": 1,
                "grain": False, "average": 1},
}  # fmt: skip
RANGES = {"t_start": (0, 1000), "num_steps": (1, 1000), "candidates": (1, 1000), "eta": (0, 1),
          "average": (1, 2**31), "max_error": (0, math.inf)}  # fmt: skip


@dataclass
class Job:
    """One pair to make. load() and make() add the fields with a default."""

    name: str
    file: Path
    key: str  # its path below --hr
    seed: int
    reference_seed: int
    gray: bool = False
    hr: Tensor = torch.empty(0)
    lr: Tensor = torch.empty(0)
    degradation: Tensor = torch.empty(0)  # (D,) of the reference, or the mean of several
    row: dict = field(default_factory=dict)  # its line in pairs.jsonl


def check_config(cfg: Config) -> None:
    """UserError if a flag can't be right, whatever the files hold."""
    check_ranges(cfg, RANGES)
    require(cfg.start in STARTS, f"--start {cfg.start}: choose {', '.join(STARTS)}.")
    require(cfg.pairing in PAIRINGS, f"--pairing {cfg.pairing}: choose {', '.join(PAIRINGS)}.")
    require(len(cfg.max_error) == 2, "--max-error takes two: content, degradation.")


def pairs_to_make(cfg: Config, files: Sequence[Path]) -> list[Job]:
    """All pairs of a run. Their seeds depend on --seed and the name alone, or the folder's path."""
    jobs = []
    for file, name, key in zip(
        files, photo_names(files, cfg.hr), keys_of(files, cfg.hr), strict=True
    ):
        seed = make_generator(cfg.seed, name).initial_seed()
        folder = make_generator(cfg.seed, str(Path(key).parent)).initial_seed()
        jobs.append(Job(name, file, key, seed, folder if cfg.pairing == "folder" else seed))
    return jobs


def save_preview(path: Path, out: Path, rows: Sequence[dict]) -> None:
    """Write a picture of a few pairs: the middle of HR | LR reference | generated LR | bicubic."""
    pictures = []
    for row in rows:
        hr, lr_ref, lr = map(load_image, (out / row["hr"], row["lr_ref"], out / row["lr"]))
        bicubic = resized(hr[None], *lr.shape[1:])[0].clamp(0, 1)
        small = [centre(x, 96, 288) for x in (lr_ref, lr, bicubic)]
        pictures.append([centre(hr, 96 * SCALE, 288), *small])
    save_sheet(path, ("HR", "LR reference", "generated LR", "bicubic"), pictures)


class Maker:
    """Makes the pairs of a run: load() reads a photo, make() generates, save() writes."""

    def __init__(self, cfg: Config, rt: Runtime) -> None:
        check_config(cfg)
        self.cfg, self.rt, self.out = cfg, rt, Path(cfg.out)
        files = outside(find_photos(cfg.hr, "hr", "--hr"), self.out, "--hr")
        lr_ref = outside(find_photos(cfg.lr_ref, "lr", "--lr-ref"), self.out, "--lr-ref")
        weights = find_checkpoint(cfg.checkpoint, "diffusion", "python diffusion.py")
        net = self.net = load_generator(cfg.checkpoint, rt.device)
        cfg = self.cfg = with_sampler_of(net, cfg, str(weights))
        too_long = f"--t-start {cfg.t_start}: the weights know {net.t_max} steps."
        require(cfg.t_start <= net.t_max, too_long)
        if rt.is_main:
            print(f"weights {weights}; {len(files)} HR photos, {len(lr_ref)} references, "
                  f"F_deg is the mean of up to {cfg.average} of one folder")  # fmt: skip
        self.references = References(lr_ref, cfg.lr_ref, net, cfg.average)
        self.jobs = pairs_to_make(cfg, files)
        limits = [None if limit == math.inf else limit for limit in cfg.max_error]
        self.settings = {f.name: getattr(cfg, f.name) for f in fields(Sampler)}
        self.settings |= {"pairing": cfg.pairing, "max_error": limits}
        self.settings |= {"seed": cfg.seed, "weights": fingerprint(weights)}
        names = [job.name for job in self.jobs]
        places = ("source", "lr_ref", "averaged")
        self.folder = PairFolder(self.out, names, "lr_ref", places, rt, self.settings)

    def row_of(self, job: Job) -> tuple[int, dict]:
        """The reference of a pair, and its row of the table as far as it is known in advance."""
        r = self.references.draw(job.reference_seed)
        averaged = self.references.averaged(r)
        lr_ref, *others = (str(self.references.files[i]) for i in averaged)
        facts: dict[str, Any] = {"source": str(job.file), "lr_ref": lr_ref, "averaged": others}
        facts["photo"] = self.folder.facts("photo", job.key, job.file)
        facts["references"] = [self.facts_of(i) for i in averaged]
        return r, self.folder.row(job.name, **facts, **self.settings)

    def facts_of(self, r: int) -> list:
        """What reference r is, as it stands in the table."""
        return self.folder.facts("lr", self.references.keys[r], self.references.files[r])

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that are not done. The table on the disk loses the others' rows first."""
        before, draw = self.folder.before, self.references.draw
        used = {f[0]: f for row in before.values() for f in row.get("references", [])[:1]}
        listed = [(r, used[key]) for r, key in enumerate(self.references.keys) if key in used]
        known = {r for r, f in listed if without_time(self.facts_of(r)) == without_time(f)}
        earlier = [job for job in jobs if job.name in before]
        self.references.code(lambda: {draw(job.reference_seed) for job in earlier} - known, self.rt)

        def verdict(job: Job) -> tuple[dict, str]:
            row = self.row_of(job)[1]
            return row, self.folder.reason(row)

        self.folder.start(in_parallel(verdict, earlier, 8))
        return [job for job in jobs if job.name not in self.folder.kept]

    def load(self, job: Job) -> tuple[Tensor, Job] | None:
        """The HR image, and the job with its row and F_deg; None if the photo is unusable."""
        try:
            hr = to_uint8(crop_to_multiple(load_pixels(job.file), SCALE, job.file))
            r, row = self.row_of(job)
        except (ValueError, OSError) as error:
            tqdm.write(f"skipped: {error}")
            return None
        degradation, gray = self.references.mean_degradation(r)
        gray = gray and is_gray(hr)
        return hr, replace(job, hr=hr, row=row, degradation=degradation, gray=gray)

    def make(self, loaded: list[tuple[Tensor, Job]]) -> list[Job]:
        """The jobs with the LR images (3, h, w) that the filter keeps."""
        jobs = [job for _, job in loaded]
        hr = torch.stack([job.hr for job in jobs]).to(self.rt.device).float() / 255
        degradations, seeds = [job.degradation for job in jobs], [job.seed for job in jobs]
        scored = min(self.cfg.max_error) < math.inf
        lr, scores = generate(self.net, hr, degradations, self.cfg, seeds, scored)
        kept, lr = scores["kept"].tolist(), lr.cpu()
        for b, job in enumerate(jobs):
            if job.gray:  # of a gray photo and gray references
                lr[b] = lr[b, :, 1:2]
        made = []
        for b, job in enumerate(jobs):
            row = job.row | {"kept": kept[b], "dropped": False}
            for name, limit in zip(("content", "degradation"), self.cfg.max_error, strict=True):
                if name in scores:
                    row[f"{name}_errors"] = [float(f"{e:.4g}") for e in scores[name][b].tolist()]
                    row["dropped"] |= row[f"{name}_errors"][kept[b]] > limit
            made.append(replace(job, lr=lr[b, kept[b]], row=row))
        return made

    def save(self, jobs: list[Job]) -> list[dict]:
        """Write the pairs that are not dropped. Returns the rows of all finite images."""
        rows = []
        for job in jobs:
            if not job.lr.isfinite().all():
                tqdm.write(f"skipped: {job.file}: the output of the network is not finite")
                continue
            if not job.row["dropped"]:
                save_image(self.out / job.row["hr"], job.hr)
                save_image(self.out / job.row["lr"], job.lr)
            rows.append(job.row)
        return rows

    def run(self) -> None:
        """Make this process's share of the missing pairs, while threads read and write files."""
        jobs = self.missing(self.jobs[self.rt.rank :: self.rt.world_size])
        seeds = [job.reference_seed for job in jobs]
        self.references.code(lambda: self.references.needed(seeds), self.rt)
        with tqdm(total=len(jobs), unit="pair", disable=not self.rt.is_main) as progress:
            made = in_batches(self.load, self.make, jobs, self.rt.device)
            for rows in in_parallel(self.save, made, 2 if self.rt.device.type == "cpu" else 16):
                self.folder.add(rows)
                progress.update(len(rows))


def main(cfg: Config, rt: Runtime) -> None:
    """Make the missing pairs, then the table, the lists and the preview."""
    maker = Maker(cfg, rt)
    maker.run()
    wait_for_all(rt)
    if not rt.is_main:
        return
    out, preview = maker.out, maker.out / "preview.png"
    rows = maker.folder.finish()
    pairs = [row for row in rows if not row["dropped"]]
    sizes = [(row, image_size(out / row["hr"])) for row in pairs]
    names = "".join(f"{Path(row['lr']).name} ({h},{w},3)\n" for row, (w, h) in sizes)
    write_text(out / "meta_info.txt", names)  # as BasicSR writes it, of HR
    both = "".join(f"{row['hr']}, {row['lr']}\n" for row in pairs)
    write_text(out / "meta_info_realesrgan.txt", both)
    if pairs and not preview.is_file():
        save_preview(preview, out, pairs[:4])
    maker.folder.close()
    if sentence := lost_sentence():
        print(sentence)
    seen = f"; look at {preview}" if pairs else ""
    print(f"{len(pairs)} pairs in {out}, {len(rows) - len(pairs)} dropped, "
          f"{len(maker.jobs) - len(rows)} images skipped{seen}")  # fmt: skip


if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
