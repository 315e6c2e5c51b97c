"""Stage 3: make LR/HR training pairs from HR photos and unrelated real LR photos. Section 2.3, A.6.

Input: HR photos, real LR photos whose camera is to be imitated, and the weights of stage 2.
Output: a folder of pairs (hr/NAME.png, lr/NAME.png), pairs.jsonl and preview.png. Each HR image
draws one reference; its code is averaged with those of others in its folder. K candidates are
denoised from a noised start image (Algorithm 2), and the filter keeps the best one.

    python generate.py
    python generate.py --hr data/hr --lr-ref data/lr --out out/pairs --candidates 4
"""

import math
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import diffusion
import extractors
from data.folder import PairFolder
from diffusion import DecoupledDDPM

SCALE = 4  # HR size / LR size. It is the VQ-VAE's factor, so content and LR have the same grid.
# The head of the shipped weights can't tell less noise (std) than FAINT from no noise, nor a JPEG
# quality above UNCOMPRESSED from no compression.
FAINT, UNCOMPRESSED = 3 / 255, 88
# What real LR has beside filtered HR looks like sharpness to E_deg. So Rec_lr's answer is filtered
# by these amplitudes at degrade.FREQUENCIES: the mean transfer function of LR of the recipe camera
# over the mean that the head reads in it behind add_remainder. That takes no pairs;
# `benchmark.py --table extractors` prints it, also for other weights.
SOFTER = (1.07, 1.02, 0.94, 0.79, 0.62)
AS_READ = (1.0,) * 5  # no softening

# ---- the method -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How LR is made. The defaults are the best measured; the preset paper has the paper's."""

    start: str = "reconstruct"  # start image: reconstruct (Rec_lr), or D: realesrgan (paper), light
    t_start: int = 2  # T, steps of noise on it; behind D each image draws its own from 0..T
    num_steps: int = 1  # network evaluations
    eta: float = 0.0  # 0 is DDIM; 1 with as many evaluations as steps is DDPM (the paper)
    candidates: int = 1  # K, of which the filter keeps the best
    grain: bool = True  # add the noise and JPEG that E_deg reads in the reference; the paper: no
    soften: tuple[float, ...] = SOFTER  # undo what E_deg takes for sharpness; the paper: 1 1 1 1 1
    remainder: float = 1.1  # noise for what real LR has beside filtered HR, in detail; paper: 0
    average: int = 8  # use the mean code of up to this many references of the same folder; paper: 1


STARTS = ("reconstruct", "realesrgan", "light")
CANDIDATES = 4  # K where the filter is to have a choice


def load_generator(checkpoint: str, device: torch.device, grain: bool = False) -> DecoupledDDPM:
    """The trained model, ready to generate; "" looks in runs/diffusion, then in data/pretrained.

    UserError if it can't be used; with `grain` also if it has no head to read noise and JPEG.
    """
    path = common.find_checkpoint(checkpoint, "diffusion", "python diffusion.py")
    net = diffusion.load(common.load_checkpoint(path), str(path))
    headless = f"{path}: weights of --as-printed can't read noise and JPEG: give --no-grain."
    common.require(not (grain and net.extractors.as_printed), headless)
    net.eval().requires_grad_(False)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def precision(device: torch.device) -> torch.autocast:
    """bf16 on a GPU. On a CPU float32: sums in bf16 depend on the number of threads."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def code_of(net: DecoupledDDPM, lr_ref: Tensor) -> Tensor:
    """F_deg (1, D) of a reference (3, h, w) of any size, or of its code (D,) itself.

    Of a large photo only the middle is read, because its code is an average over the image. The
    middle begins at a corner of JPEG's blocks of 8 x 8.
    """
    device = next(net.parameters()).device
    if lr_ref.ndim == 1:
        return lr_ref[None].to(device)
    top, left = (max(0, n - 512) // 16 * 8 for n in lr_ref.shape[1:])
    middle = lr_ref[None, :, top : top + 512, left : left + 512].to(device)
    with precision(device):
        return net.extractors.e_deg(middle).float()


def add_grain(
    net: DecoupledDDPM, lr: Tensor, code: Tensor, draws: Sequence[torch.Generator]
) -> Tensor:
    """Give images (B, 3, h, w) the noise and the JPEG compression that E_deg reads in code (B, D).

    Not in the paper: Rec_lr's answer is an average over all noise, a short chain adds little noise,
    and a network hardly learns to round in blocks of 8 x 8. E_deg takes some compression for noise,
    so the noise that is missing is measured in the compressed image.
    """
    _, noise_std, quality = net.extractors.named(code)
    noisy, packed = noise_std.mean(1) > FAINT, quality < UNCOMPRESSED
    if lr.device.type == "cpu" and not (noisy | packed).any():  # a GPU would have to wait for this
        return lr

    def compress(x: Tensor) -> Tensor:
        return torch.where(packed[:, None, None, None], degrade.jpeg(x, quality), x)

    _, found, _ = net.extractors.named(net.extractors.e_deg(compress(lr)))
    missing = noisy[:, None] * (noise_std.square() - found.square()).clamp(min=0).sqrt()
    noise = coloured(diffusion.randn_rows(lr, draws), missing)
    return compress((lr + noise).clamp(0, 1))


def coloured(eps: Tensor, std: Tensor) -> Tensor:
    """White noise (B, 3, h, w) with the std (B, 3) in degrade.BANDS, interpolated between them."""
    h, w = eps.shape[2:]
    down, across = torch.fft.fftfreq(h), torch.fft.rfftfreq(w)
    radius = (down[:, None].square() + across.square()).sqrt()  # cycles per pixel
    low, middle, high = (degrade.RINGS[band].mean() for band in degrade.BANDS)
    first, second = ((radius - low) / (middle - low)), (radius - middle) / (high - middle)
    shares = torch.stack([first, second]).clamp(0, 1).to(eps.device, non_blocking=True)
    knots = std[:, :, None, None]  # (B, 3, 1, 1)
    amplitude = knots[:, 0] + shares[0] * (knots[:, 1] - knots[:, 0])
    amplitude = amplitude + shares[1] * (knots[:, 2] - knots[:, 1])  # (B, h, w/2 + 1)
    return torch.fft.irfft2(torch.fft.rfft2(eps) * amplitude[:, None], (h, w))


def add_remainder(lr: Tensor, size: float, draws: Sequence[torch.Generator]) -> Tensor:
    """Noise in place of all that tells real LR from a filtered HR image.

    Not in the paper. Networks that are trained on LR without it learn to invert the filter, which
    real LR does not allow. Measured on RealSR and DRealSR, its std above .15 cycles per pixel is
    1.1 times the root of the local std of brightness (5 x 5 pixels), both in levels, from flat
    surfaces to edges; its channels have a correlation of .7.
    """

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 5, 1, padding=2, count_include_pad=False)

    value = 255 * lr.mean(1, keepdim=True)
    std = size / 255 * mean((value - mean(value)).square()).pow(1 / 4)
    colour, gray = diffusion.randn_rows(lr, draws), diffusion.randn_rows(lr[:, :1], draws)
    return (lr + std * (math.sqrt(0.3) * colour + math.sqrt(0.7) * gray)).clamp(0, 1)


def errors(net: DecoupledDDPM, lr: Tensor, code: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
    """How far images (B, 3, h, w) are from their HR content and their reference's degradation.

    ||E_cont(up(lr)) - E_cont(hr)|| (root mean square), ||E_deg(lr) - E_deg(ref)||: (B,) each. A.6.
    """
    lr_content = net.extractors.content(extractors.resized(lr, *(4 * n for n in lr.shape[2:])))
    content_error = (lr_content - content).float().square().mean((1, 2, 3)).sqrt()
    return content_error, (net.extractors.e_deg(lr) - code).float().norm(dim=1)


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
    codes (D,); seeds: B numbers, from which image b draws. Returns candidates (B, K, 3, H/4, W/4)
    and "kept" (B,), the best of them; where K > 1, or if `scored`, also the "content" and the
    "degradation" errors (B, K). On a CPU no result depends on the other images, bit for bit.
    """
    assert len(lr_ref) == len(seeds) == len(hr), "one reference and one seed for each image"
    if hr.device.type == "cpu" and len(hr) > 1:
        rows = [slice(b, b + 1) for b in range(len(hr))]
        made = [generate(net, hr[b], lr_ref[b], sampler, seeds[b], scored) for b in rows]
        scores = {key: torch.cat([score[key] for _, score in made]) for key in made[0][1]}
        return torch.cat([lr for lr, _ in made]), scores
    with precision(hr.device):
        (B, _, H, W), K = hr.shape, sampler.candidates
        h, w = H // SCALE, W // SCALE
        # Pad to a multiple, because the U-Net halves the grid and tiles keep to blocks of 8 pixels.
        large = max(h, w) > extractors.TILE
        multiple = SCALE * max(2 ** (len(net.widths) - 1), 8 if large else 1)
        hr = F.pad(hr, (0, -W % multiple, 0, -H % multiple), mode="replicate")
        grid = (hr.shape[2] // SCALE, hr.shape[3] // SCALE)

        code = torch.cat([code_of(net, ref) for ref in lr_ref])  # F_deg (B, D)
        content = net.extractors.content(hr)  # F_cont (B, z, H/4, W/4)
        rec_lr = partial(net.extractors.reconstruct, code)
        answer = extractors.in_tiles(rec_lr, grid, hr, content).float()
        if sampler.soften != AS_READ:
            gain = torch.tensor([sampler.soften] * B).to(hr.device, non_blocking=True)
            answer = extractors.filtered(answer, extractors.radial_kernels(gain))
        answer = answer.clamp(0, 1)
        condition = partial(net.condition, code)
        c = extractors.in_tiles(condition, grid, content, diffusion.known(answer))
        x, t_start = answer, [sampler.t_start] * B
        if sampler.start != "reconstruct":  # few steps would not remove D's blur and noise
            draws = [common.generator(seed) for seed in seeds]
            thetas = [degrade.sample_degradation(1, sampler.start, SCALE, g) for g in draws]
            x = degrade.degrade(hr, degrade.Degradation.cat(thetas))
            t_start = [int(torch.randint(sampler.t_start + 1, (), generator=g)) for g in draws]

        def eps(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return extractors.in_tiles(lambda x_t, c: net(x_t, t, c), grid, x_t, c)

        x, c, code, content = (v.repeat_interleave(K, 0) for v in (x, c, code, content))
        t_start = [t for t in t_start for _ in range(K)]
        draws = [common.generator(seed, k) for seed in seeds for k in range(K)]
        lr = diffusion.sample(eps, x, c, t_start, sampler.num_steps, draws, sampler.eta)
        lr = lr[..., :h, :w]
        if sampler.remainder > 0:
            draws = [common.generator(seed, k, 2) for seed in seeds for k in range(K)]
            lr = add_remainder(lr, sampler.remainder, draws)
        if sampler.grain:
            draws = [common.generator(seed, k, 1) for seed in seeds for k in range(K)]
            lr = add_grain(net, lr, code, draws)
        candidates = lr.unflatten(0, (B, K))
        if K == 1 and not scored:
            return candidates, {"kept": torch.zeros(B, dtype=torch.long, device=hr.device)}
        content_error, degradation_error = errors(net, lr, code, content[..., :h, :w])
        scores = {"content": content_error.view(B, K), "degradation": degradation_error.view(B, K)}
        relative = [e / e.mean(1, keepdim=True).clamp(min=1e-12) for e in scores.values()]
        return candidates, scores | {"kept": (relative[0] + relative[1]).argmin(1)}  # the filter


def chosen(lr: Tensor, scores: dict[str, Tensor]) -> Tensor:
    """The candidates (B, 3, h, w) that the filter keeps, from the two results of generate()."""
    return lr[torch.arange(len(lr)), scores["kept"].to(lr.device)]


# ---- references ---------------------------------------------------------------------------------


class References:
    """Reference photos and their codes. A code is made when it is first needed."""

    def __init__(self, files: list[Path], names: list[str], net: DecoupledDDPM, average: int):
        self.files, self.net, self.average = files, net, average
        self.codes: dict[int, Tensor | None] = {}  # None: not usable
        self.lock = threading.Lock()
        self.hashes = np.array([zlib.crc32(os.fsencode(name)) for name in names], np.uint64)
        self.folders: dict[Path, list[int]] = {}  # a folder usually holds the photos of one camera
        for r, file in enumerate(files):
            self.folders.setdefault(file.parent, []).append(r)

    @torch.no_grad()
    def code(self, r: int) -> Tensor | None:
        """F_deg (D,) of reference r; None if it can't be used. The reason is printed once."""
        with self.lock:
            if r not in self.codes:
                self.codes[r] = None
                try:
                    lr_ref = common.load_image(self.files[r])
                    if min(lr_ref.shape[1:]) < 16:
                        raise ValueError(f"{self.files[r]}: a reference needs 16 x 16 pixels")
                    self.codes[r] = code_of(self.net, lr_ref)[0].cpu()
                except ValueError as error:
                    tqdm.write(f"skipped: {error}")
            return self.codes[r]

    def averaged(self, r: int) -> list[int]:
        """Reference r and the next ones in its folder, the first after the last."""
        folder = self.folders[self.files[r].parent]
        first = folder.index(r)
        return (folder[first:] + folder[:first])[: self.average]

    def mean_code(self, r: int) -> Tensor | None:
        """The mean code (D,) of those that can be used of averaged(r); None without r."""
        if self.code(r) is None:
            return None
        codes = [code for i in self.averaged(r) if (code := self.code(i)) is not None]
        return torch.stack(codes).mean(0)

    def draw(self, seed: int) -> int:
        """A usable reference for this seed; UserError if there is none.

        Rendezvous hashing: each reference gets a number made of the seed and its name, and the
        largest wins. So a new reference changes few of the draws.
        """
        mixed = (self.hashes ^ np.uint64(seed % 2**64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        for r in np.argsort(mixed ^ (mixed >> np.uint64(32)))[::-1].tolist():
            if self.code(r) is not None:
                return r
        raise common.UserError("no usable image found in --lr-ref; see the files named above.")


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Sampler):
    """Settings of generation; every field is a flag."""

    hr: tuple[str, ...] = ()  # HR photos: folders or files (default: data/hr, else data/sample/hr)
    lr_ref: tuple[str, ...] = ()  # real LR photos (default: data/lr, else data/sample/lr)
    out: str = "out/generated"  # folder of the pairs
    checkpoint: str = ""  # weights (default: runs/diffusion, else data/pretrained)
    pairing: str = "random"  # reference of each HR image: random, round-robin, or all
    max_error: tuple[float, ...] = (math.inf, math.inf)  # drop pairs: content, degradation error
    seed: int = 0  # an image draws from (seed, its path below --hr)
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {"start": "realesrgan", "t_start": 300, "num_steps": 300, "eta": 1.0,
              "candidates": CANDIDATES, "grain": False, "soften": AS_READ, "remainder": 0.0,
              "average": 1},
    # arXiv:2303.06994, with weights of diffusion.py --without content degradation.
    "syndiff": {"start": "light", "t_start": 250, "num_steps": 12, "grain": False, "candidates": 1,
                "soften": AS_READ, "remainder": 0.0, "average": 1},
}  # fmt: skip
RANGES = {"t_start": (0, 1000), "num_steps": (1, 1000), "candidates": (1, 1000), "eta": (0, 1),
          "soften": (0, 4), "remainder": (0, 64), "average": (1, 2**31),
          "max_error": (0, math.inf)}  # fmt: skip


@dataclass
class Job:
    """One pair to make. load() and make() add the fields with a default."""

    name: str
    file: Path
    seed: int
    reference: int | None = None  # None: References draws it
    hr: Tensor = torch.empty(0)
    lr: Tensor = torch.empty(0)
    code: Tensor = torch.empty(0)  # (D,) of the reference, or the mean of several
    row: dict = field(default_factory=dict)  # its line in pairs.jsonl


def check(cfg: Config) -> None:
    """UserError if a flag can't be right, whatever the files hold."""
    common.check_ranges(cfg, RANGES)
    choices = {"start": STARTS, "pairing": ("random", "round-robin", "all")}
    for key, names in choices.items():
        value = getattr(cfg, key)
        common.require(value in names, f"--{key} {value}: choose {', '.join(names)}.")
    common.require(len(cfg.max_error) == 2, "--max-error takes two: content, degradation.")
    five = "--soften takes five: at .1, .2, .3, .4 and .5 cycles per LR pixel."
    common.require(len(cfg.soften) == 5, five)
    own = "--pairing all takes the code of each reference alone: add --average 1."
    common.require(cfg.pairing != "all" or cfg.average == 1, own)


def plan(cfg: Config, files: Sequence[Path], references: Sequence[Path]) -> list[Job]:
    """All pairs of a run. The seed of a pair depends on its names alone."""
    names = common.photo_names(files, cfg.hr)
    seeds = [common.generator(cfg.seed, name).initial_seed() for name in names]
    jobs = list(map(Job, names, files, seeds))
    if cfg.pairing == "random":
        return jobs
    if cfg.pairing == "round-robin":
        return [replace(job, reference=i % len(references)) for i, job in enumerate(jobs)]
    return [
        Job(f"{job.name}--{name}", job.file, common.generator(job.seed, name).initial_seed(), r)
        for job in jobs
        for r, name in enumerate(common.photo_names(references, cfg.lr_ref))
    ]


def batches(jobs: Iterable[Job], pixels: int) -> Iterator[list[Job]]:
    """Group jobs of equal image size until they have so many HR pixels, or too many jobs wait."""
    waiting: dict[torch.Size, list[Job]] = {}
    for job in jobs:
        batch = waiting.setdefault(job.hr.shape, [])
        batch.append(job)
        if len(batch) * job.hr[0].numel() >= pixels or sum(map(len, waiting.values())) > 256:
            yield waiting.pop(job.hr.shape)
    yield from waiting.values()


def save_preview(path: Path, out: Path, rows: Sequence[dict]) -> None:
    """Write a picture of a few pairs: the middle of HR | LR reference | generated LR | bicubic."""
    pictures = []
    for row in rows:
        hr, lr_ref, lr = map(common.load_image, (out / row["hr"], row["lr_ref"], out / row["lr"]))
        bicubic = extractors.resized(hr[None], *lr.shape[1:])[0].clamp(0, 1)
        small = [common.centre(x, 96, 288) for x in (lr_ref, lr, bicubic)]
        pictures.append([common.centre(hr, 96 * SCALE, 288), *small])
    common.save_sheet(path, ("HR", "LR reference", "generated LR", "bicubic"), pictures)


class Maker:
    """Makes the pairs of a run: load() reads a photo, make() generates, save() writes."""

    def __init__(self, cfg: Config, rt: common.Runtime) -> None:
        check(cfg)
        self.cfg, self.rt, self.out = cfg, rt, Path(cfg.out)
        files = common.outside(common.find_photos(cfg.hr, "hr", "--hr"), self.out, "--hr")
        lr_ref = common.find_photos(cfg.lr_ref, "lr", "--lr-ref")
        weights = common.find_checkpoint(cfg.checkpoint, "diffusion", "python diffusion.py")
        net = self.net = load_generator(cfg.checkpoint, rt.device, cfg.grain)
        too_long = f"--t-start {cfg.t_start}: the weights know {net.t_max} steps."
        common.require(cfg.t_start <= net.t_max, too_long)
        if rt.is_main:
            print(f"weights {weights}; {len(files)} HR photos, {len(lr_ref)} references, "
                  f"a code is the mean of up to {cfg.average} of one folder")  # fmt: skip
        names = common.photo_names(lr_ref, cfg.lr_ref)
        self.references = References(lr_ref, names, net, cfg.average)
        self.jobs = plan(cfg, files, lr_ref)
        limits = [None if limit == math.inf else limit for limit in cfg.max_error]
        self.settings = {f.name: getattr(cfg, f.name) for f in fields(Sampler)}
        self.settings |= {"soften": [*cfg.soften], "pairing": cfg.pairing, "max_error": limits}
        self.settings |= {"seed": cfg.seed, "weights": common.fingerprint(weights)}
        names = [job.name for job in self.jobs]
        self.folder = PairFolder(self.out, names, "lr_ref", rt, self.settings)

    def load(self, job: Job) -> Job | None:
        """The job with its HR image, or with the row of an earlier run; None if unusable."""
        r = self.references.draw(job.seed) if job.reference is None else job.reference
        lr_ref, *others = (self.references.files[i] for i in self.references.averaged(r))
        facts = {"source": str(job.file), "lr_ref": str(lr_ref), "averaged": [*map(str, others)]}
        row = self.folder.row(job.name, **facts, **self.settings)
        if earlier := self.folder.earlier(row, [job.file, lr_ref, *others]):
            return replace(job, row=earlier)
        code = self.references.mean_code(r)
        if code is None:
            return None
        try:
            hr = common.crop_to_multiple(common.load_image(job.file), SCALE, job.file)
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            return None
        hr = common.to_uint8(hr).float() / 255  # as it is written, also of a 16-bit photo
        return replace(job, hr=hr, row=row, code=code)

    def make(self, jobs: list[Job]) -> list[Job]:
        """The jobs with the LR images (3, h, w) that the filter keeps."""
        hr = torch.stack([job.hr for job in jobs]).to(self.rt.device)
        codes, seeds = [job.code for job in jobs], [job.seed for job in jobs]
        scored = min(self.cfg.max_error) < math.inf
        lr, scores = generate(self.net, hr, codes, self.cfg, seeds, scored)
        kept, lr = scores["kept"].tolist(), lr.cpu()
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
                tqdm.write(f"skipped: {job.file}: the network's answer is not finite")
                continue
            if not job.row["dropped"]:
                self.folder.begin()
                common.save_image(self.out / job.row["hr"], job.hr)
                common.save_image(self.out / job.row["lr"], job.lr)
            rows.append(job.row)
        return rows

    def run(self) -> None:
        """Make this process's share of the missing pairs, while threads read and write files."""
        on_cpu, threads = self.rt.device.type == "cpu", torch.get_num_threads()
        jobs = self.jobs[self.rt.rank :: self.rt.world_size]

        def note(rows: list[dict]) -> None:
            self.folder.add(rows)
            progress.update(len(rows))

        def missing() -> Iterator[Job]:
            for job in common.in_parallel(self.load, jobs, 2 if on_cpu else 8):
                if job and job.hr.numel():
                    yield job
                elif job:
                    note([job.row])

        with tqdm(total=len(jobs), unit="pair", disable=not self.rt.is_main) as progress:
            together = batches(missing(), 1 if on_cpu else 32 * 512**2)
            try:
                made: Iterable[list[Job]] = map(self.make, together)
                if on_cpu:  # one image per core: then no result depends on the number of cores
                    torch.set_num_threads(1)
                    made = common.in_parallel(self.make, together, threads)
                for rows in common.in_parallel(self.save, made, 2 if on_cpu else 16):
                    note(rows)
            finally:
                torch.set_num_threads(threads)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Make the missing pairs, then the table, the lists and the preview."""
    maker = Maker(cfg, rt)
    maker.run()
    common.wait_for_all(rt)
    if not rt.is_main:
        return
    out, preview = maker.out, maker.out / "preview.png"
    rows = maker.folder.finish()
    pairs = [row for row in rows if not row["dropped"]]
    names = "".join(f"{Path(row['lr']).name}\n" for row in pairs)
    common.write_text(out / "meta_info.txt", names)  # for BasicSR, neosr and traiNNer-redux
    both = "".join(f"{row['hr']}, {row['lr']}\n" for row in pairs)
    common.write_text(out / "meta_info_realesrgan.txt", both)
    if pairs and not preview.is_file():
        save_preview(preview, out, pairs[:4])
    maker.folder.unlock()
    seen = f"; look at {preview}" if pairs else ""
    print(f"{len(pairs)} pairs in {out}, {len(rows) - len(pairs)} dropped, "
          f"{len(maker.jobs) - len(rows)} images skipped{seen}")  # fmt: skip


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
