"""Stage 3: make LR/HR training pairs from HR photos and unrelated real LR photos. Section 2.3, A.6.

In: HR photos, real LR photos whose camera is to be imitated, the weights of stage 2. Out: a folder
of pairs (hr/NAME.png, lr/NAME.png), pairs.jsonl and preview.png. Each HR image draws a reference;
K candidates are denoised from a noised start image (Algorithm 2); the filter keeps the best.

    python generate.py
    python generate.py --hr data/hr --lr-ref data/lr --out out/pairs --candidates 4
"""

import functools
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
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

SCALE = 4  # HR size / LR size: the VQ-VAE's factor, and so the grid on which content and LR meet
# What the head of the shipped weights reads in photos that are clean or hardly compressed: nearly
# all up to this noise (std) and down to this JPEG quality, so that neither can be told from none.
FAINT, UNCOMPRESSED = 3 / 255, 88

# ---- the method -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How LR is made. The defaults are the best measured; the preset paper has the paper's."""

    start: str = "reconstruct"  # start image: reconstruct (Rec_lr), or D: realesrgan (paper), light
    t_start: int = 2  # T, steps of noise on it; behind D each image draws its own from 0..T
    num_steps: int = 1  # network evaluations
    eta: float = 0.0  # 0 is DDIM; 1 with as many evaluations as steps is DDPM (the paper)
    candidates: int = 1  # K, of which the filter keeps the best
    grain: bool = True  # noise and JPEG as E_deg reads them in the reference; the paper: no
    average: int = 1  # references of the same folder, at most, of which the mean code is taken


STARTS = ("reconstruct", "realesrgan", "light")
CANDIDATES = 4  # K where the filter is to have a choice


def load_generator(
    checkpoint: str, device: torch.device, grain: bool = False
) -> diffusion.DecoupledDDPM:
    """The trained model, ready to generate; "" looks in runs/diffusion, then in data/pretrained.

    UserError if it can't be used; with `grain` also if it has no head to read noise and JPEG.
    """
    path = common.find_checkpoint(checkpoint, "diffusion", "python diffusion.py")
    net = diffusion.load(common.load_checkpoint(path), str(path))
    common.require(
        not net.extractors.as_printed or not grain,
        f"{path}: as printed, nothing reads noise and JPEG: give --no-grain.",
    )
    net.eval().requires_grad_(False)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def precision(device: torch.device) -> torch.autocast:
    """bf16 on a GPU. On a CPU float32: sums in bf16 depend on the number of threads."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def code_of(net: diffusion.DecoupledDDPM, lr_ref: Tensor) -> Tensor:
    """F_deg (1, D) of a reference (3, h, w) of any size, or of its code (D,) itself.

    Of a large photo the middle is read, from a corner of JPEG's blocks on: its code is an average
    over the image anyway.
    """
    device = next(net.parameters()).device
    if lr_ref.ndim == 1:
        return lr_ref[None].to(device)
    top, left = (max(0, n - 512) // 16 * 8 for n in lr_ref.shape[1:])
    middle = lr_ref[None, :, top : top + 512, left : left + 512].to(device)
    with precision(device):
        return net.extractors.e_deg(middle).float()


def grained(
    net: diffusion.DecoupledDDPM, lr: Tensor, code: Tensor, draws: Sequence[torch.Generator]
) -> Tensor:
    """Images (B, 3, h, w) with the noise they lack and the JPEG that E_deg sees in code (B, D).

    Not in the paper: Rec_lr's answer is an average over all noise, a short chain adds little, and a
    network hardly learns to round in blocks of 8 x 8. Compression looks like a little noise: what
    is lacking is what E_deg does not see in the candidate once compressed.
    """
    wanted, quality = net.extractors.named(code)
    noisy, packed = ((x[:, None, None, None]) for x in (wanted > FAINT, quality < UNCOMPRESSED))
    on_cpu = lr.device.type == "cpu"  # where a look at the answer costs nothing and saves work

    def compressed(lr: Tensor) -> Tensor:
        if on_cpu and not packed.any():
            return lr
        return torch.where(packed, degrade.jpeg(lr, quality), lr)

    if on_cpu and not noisy.any():
        return compressed(lr)
    there, _ = net.extractors.named(net.extractors.e_deg(compressed(lr)))
    missing = (wanted.square() - there.square()).clamp(min=0).sqrt()[:, None, None, None]
    return compressed((lr + noisy * missing * diffusion.randn_rows(lr, draws)).clamp(0, 1))


def errors(
    net: diffusion.DecoupledDDPM, lr: Tensor, code: Tensor, content: Tensor
) -> tuple[Tensor, Tensor]:
    """How far images (B, 3, h, w) are from their HR content and their reference's degradation.

    ||E_cont(up(lr)) - E_cont(hr)|| (root mean square), ||E_deg(lr) - E_deg(ref)||: (B,) each. A.6.
    """
    seen = net.extractors.content(extractors.resized(lr, *(4 * side for side in lr.shape[2:])))
    content_error = (seen - content).float().square().mean((1, 2, 3)).sqrt()
    return content_error, (net.extractors.e_deg(lr) - code).float().norm(dim=1)


@torch.no_grad()
def generate(
    net: diffusion.DecoupledDDPM,
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
        alone = [
            generate(net, hr[b : b + 1], lr_ref[b : b + 1], sampler, seeds[b : b + 1], scored)
            for b in range(len(hr))
        ]
        scores = {k: torch.cat([score[k] for _, score in alone]) for k in alone[0][1]}
        return torch.cat([lr for lr, _ in alone]), scores
    with precision(hr.device):
        (B, _, H, W), K = hr.shape, sampler.candidates
        h, w = H // SCALE, W // SCALE
        # The U-Net halves the grid, tiles keep to blocks of 8 pixels: pad to a multiple, cut.
        large = max(h, w) > extractors.TILE
        multiple = SCALE * max(2 ** (len(net.widths) - 1), 8 if large else 1)
        hr = F.pad(hr, (0, -W % multiple, 0, -H % multiple), mode="replicate")
        grid = (hr.shape[2] // SCALE, hr.shape[3] // SCALE)

        def tiled(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            return extractors.in_tiles(function, grid, *inputs)

        code = torch.cat([code_of(net, ref) for ref in lr_ref])  # F_deg
        content = net.extractors.content(hr)  # F_cont
        rec_lr = functools.partial(net.extractors.reconstruct, code)
        answer = tiled(rec_lr, hr, content).float().clamp(0, 1)
        c = tiled(functools.partial(net.condition, code), content, diffusion.known(answer))
        x, t_start = answer, [sampler.t_start] * B
        if sampler.start != "reconstruct":  # D's blur and noise do not go away again
            draws = [common.generator(seed) for seed in seeds]
            thetas = [degrade.sample_degradation(1, sampler.start, SCALE, g) for g in draws]
            x = degrade.degrade(hr, degrade.Degradation.cat(thetas))
            ts = [torch.randint(sampler.t_start + 1, (), generator=g) for g in draws]
            t_start = [int(t) for t in ts]

        x, c, code, content = (v.repeat_interleave(K, 0) for v in (x, c, code, content))
        draws = [common.generator(seed, k) for seed in seeds for k in range(K)]
        lr = diffusion.sample(
            lambda x_t, t, c: tiled(lambda x_t, c: net(x_t, t, c), x_t, c),
            x, c, [t for t in t_start for _ in range(K)], sampler.num_steps, draws, sampler.eta,
        )[..., :h, :w]  # fmt: skip
        if sampler.grain:
            draws = [common.generator(seed, k, 1) for seed in seeds for k in range(K)]
            lr = grained(net, lr, code, draws)
        lr, kept = lr.unflatten(0, (B, K)), torch.zeros(B, dtype=torch.long, device=hr.device)
        if K == 1 and not scored:
            return lr, {"kept": kept}
        both = errors(net, lr.flatten(0, 1), code, content[..., :h, :w])
        scores = dict(zip(("content", "degradation"), (e.view(B, K) for e in both), strict=True))
        total = sum(e / e.mean(1, keepdim=True).clamp(min=1e-12) for e in scores.values())
        assert isinstance(total, Tensor)
        return lr, scores | {"kept": total.argmin(1)}  # the filter


def chosen(lr: Tensor, scores: dict[str, Tensor]) -> Tensor:
    """The candidates (B, 3, h, w) that the filter keeps, of what generate() returns."""
    return lr[torch.arange(len(lr)), scores["kept"].to(lr.device)]


# ---- references ---------------------------------------------------------------------------------


class References:
    """Reference photos and their codes, which are made when first drawn."""

    def __init__(
        self, files: list[Path], names: list[str], net: diffusion.DecoupledDDPM, average: int
    ) -> None:
        self.files, self.net, self.average = files, net, average
        self.codes: dict[int, Tensor | None] = {}  # None: unreadable
        self.lock = threading.Lock()
        self.hashes = np.array([zlib.crc32(os.fsencode(name)) for name in names], np.uint64)
        self.folders: dict[Path, list[int]] = {}  # one camera's photos, as a rule
        for r, file in enumerate(files):
            self.folders.setdefault(file.parent, []).append(r)

    @torch.no_grad()
    def code(self, r: int) -> Tensor | None:
        """F_deg (D,) of reference r; None if it can't be used, which is said once."""
        with self.lock:
            if r not in self.codes:
                self.codes[r] = None
                try:
                    lr_ref = common.load_image(self.files[r])
                    if min(lr_ref.shape[1:]) < 16:
                        small = "a reference needs at least 16 x 16 pixels"
                        raise ValueError(f"{self.files[r]}: {small}")
                    self.codes[r] = code_of(self.net, lr_ref)[0].cpu()
                except ValueError as error:
                    tqdm.write(f"skipped: {error}")
            return self.codes[r]

    def mean_code(self, r: int) -> Tensor | None:
        """The mean code (D,) of reference r and of those that follow it in its folder."""
        same = self.folders[self.files[r].parent]
        at = same.index(r)
        chosen = [same[(at + k) % len(same)] for k in range(min(self.average, len(same)))]
        codes = [code for i in chosen if (code := self.code(i)) is not None]
        return torch.stack(codes).mean(0) if self.code(r) is not None else None

    def draw(self, seed: int) -> int:
        """A usable reference for this seed; another photo among them changes few of the draws."""
        # Each reference gets a number of the seed and its own name; the largest wins.
        mixed = (self.hashes ^ np.uint64(seed % 2**64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        for r in np.argsort(mixed ^ (mixed >> np.uint64(32)))[::-1][:100].tolist():
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
    max_error: tuple[float, ...] = (math.inf, math.inf)  # of content, degradation: else no pair
    seed: int = 0  # an image draws from (seed, its path below --hr)
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {"start": "realesrgan", "t_start": 300, "num_steps": 300, "eta": 1.0,
              "candidates": CANDIDATES, "grain": False},
    # arXiv:2303.06994, with weights of diffusion.py --without content degradation.
    "syndiff": {"start": "light", "t_start": 250, "num_steps": 12, "grain": False,
                "candidates": 1},
}  # fmt: skip
RANGES = {"t_start": (0, 1000), "num_steps": (1, 1000), "candidates": (1, 1000), "eta": (0, 1),
          "average": (1, 2**31), "max_error": (0, math.inf)}  # fmt: skip


@dataclass
class Job:
    """One pair that is to be made."""

    name: str
    file: Path
    seed: int
    reference: int | None = None  # number of the reference, where the pairing says it
    hr: Tensor = torch.empty(0)
    lr: Tensor = torch.empty(0)
    code: Tensor = torch.empty(0)  # of the reference, or a mean
    row: dict = field(default_factory=dict)  # its line in pairs.jsonl


def check(cfg: Config) -> None:
    """UserError for what is wrong with the flags alone."""
    common.check_ranges(cfg, RANGES)
    for flag, given, choices in (
        ("--start", cfg.start, STARTS),
        ("--pairing", cfg.pairing, ("random", "round-robin", "all")),
    ):
        common.require(given in choices, f"{flag} {given}: choose {', '.join(choices)}.")
    two = "--max-error takes two numbers: content and degradation."
    common.require(len(cfg.max_error) == 2, two)


def plan(cfg: Config, files: Sequence[Path], references: Sequence[Path]) -> list[Job]:
    """All pairs of a run."""
    names = common.photo_names(files, cfg.hr)
    jobs = [
        Job(name, file, common.generator(cfg.seed, name).initial_seed())
        for name, file in zip(names, files, strict=True)
    ]
    if cfg.pairing == "round-robin":
        return [replace(job, reference=i % len(references)) for i, job in enumerate(jobs)]
    if cfg.pairing == "all":
        of = common.photo_names(references, cfg.lr_ref)
        return [
            Job(f"{job.name}--{name}", job.file, common.generator(job.seed, name).initial_seed(), r)
            for job in jobs
            for r, name in enumerate(of)
        ]
    return jobs


def batches(jobs: Iterable[Job | None], pixels: int) -> Iterator[list[Job]]:
    """Jobs of images of equal size, with as many HR pixels in all; at the end what is left."""
    waiting: dict[torch.Size, list[Job]] = {}
    for job in jobs:
        if job is not None:
            same = waiting.setdefault(job.hr.shape, [])
            same.append(job)
            if len(same) * job.hr[0].numel() >= pixels or sum(map(len, waiting.values())) > 256:
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
    """What a run makes pairs with: the network, the references, the folder."""

    def __init__(self, cfg: Config, rt: common.Runtime) -> None:
        check(cfg)
        self.cfg, self.out, self.device = cfg, Path(cfg.out), rt.device
        files = common.outside(common.find_photos(cfg.hr, "hr", "--hr"), self.out, "--hr")
        lr_ref = common.find_photos(cfg.lr_ref, "lr", "--lr-ref")
        weights = common.find_checkpoint(cfg.checkpoint, "diffusion", "python diffusion.py")
        self.net = load_generator(cfg.checkpoint, rt.device, cfg.grain)
        reach = f"--t-start {cfg.t_start}: the weights know {self.net.t_max} steps."
        common.require(cfg.t_start <= self.net.t_max, reach)
        if rt.is_main:
            print(f"weights {weights}; {len(files)} HR photos, {len(lr_ref)} references")
        names = common.photo_names(lr_ref, cfg.lr_ref)
        self.references = References(lr_ref, names, self.net, cfg.average)
        self.jobs = plan(cfg, files, lr_ref)
        self.settings = {f.name: getattr(cfg, f.name) for f in fields(Sampler)}
        most = [error if error < math.inf else None for error in cfg.max_error]
        self.settings |= {"pairing": cfg.pairing, "max_error": most, "seed": cfg.seed}
        self.settings["weights"] = common.fingerprint(weights)
        names = [job.name for job in self.jobs]
        self.folder = common.PairFolder(self.out, names, "lr_ref", rt, self.settings)

    def load(self, job: Job) -> Job | None:
        """The job with its HR image, or the row of an earlier run; None if it can't be made."""
        r = self.references.draw(job.seed) if job.reference is None else job.reference
        lr_ref = self.references.files[r]
        row = self.folder.row(job.name, source=str(job.file), lr_ref=str(lr_ref), **self.settings)
        if earlier := self.folder.earlier(row, [job.file, lr_ref]):
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
        hr = torch.stack([job.hr for job in jobs]).to(self.device)
        codes, seeds = [job.code for job in jobs], [job.seed for job in jobs]
        scored = min(self.cfg.max_error) < math.inf
        lr, scores = generate(self.net, hr, codes, self.cfg, seeds, scored)
        kept, lr = scores["kept"].tolist(), lr.cpu()
        made = []
        for b, job in enumerate(jobs):
            facts: dict = {"kept": kept[b], "dropped": False}
            for name, most in zip(("content", "degradation"), self.cfg.max_error, strict=True):
                if name in scores:
                    values = [float(f"{error:.4g}") for error in scores[name][b].tolist()]
                    facts[f"{name}_errors"] = values
                    facts["dropped"] |= values[kept[b]] > most
            made.append(replace(job, lr=lr[b, kept[b]], row=job.row | facts))
        return made

    def save(self, jobs: list[Job]) -> list[dict | None]:
        """Write the pairs; their rows, None for an image that is not finite."""
        for job in jobs:
            if not job.lr.isfinite().all():
                tqdm.write(f"skipped: {job.file}: the network's answer is not finite")
            elif not job.row["dropped"]:
                self.folder.begin()
                common.save_image(self.out / job.row["hr"], job.hr)
                common.save_image(self.out / job.row["lr"], job.lr)
        return [job.row if job.lr.isfinite().all() else None for job in jobs]

    def run(self, jobs: list[Job], rt: common.Runtime) -> None:
        """Make the pairs that are missing; files are read and written beside the networks."""
        on_cpu, threads = rt.device.type == "cpu", torch.get_num_threads()

        def to_make() -> Iterator[Job]:
            for job in common.in_parallel(self.load, jobs, 2 if on_cpu else 8):
                if job is not None and job.hr.numel():
                    yield job
                else:
                    self.folder.add([job.row] if job else [])
                    progress.update()

        with tqdm(total=len(jobs), unit="pair", disable=not rt.is_main) as progress:
            together = batches(to_make(), 1 if on_cpu else 32 * 512**2)
            try:
                made: Iterable[list[Job]] = map(self.make, together)
                if on_cpu:  # an image on each core, so that no result depends on their number
                    torch.set_num_threads(1)
                    made = common.in_parallel(self.make, together, threads)
                for rows in common.in_parallel(self.save, made, 2 if on_cpu else 16):
                    self.folder.add([row for row in rows if row])
                    progress.update(len(rows))
            finally:
                torch.set_num_threads(threads)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Generate what is not there yet; every process takes its share."""
    maker = Maker(cfg, rt)
    out, preview = maker.out, maker.out / "preview.png"
    maker.run(maker.jobs[rt.rank :: rt.world_size], rt)
    common.wait_for_all(rt)
    if not rt.is_main:
        return
    rows = maker.folder.finish()
    pairs = [row for row in rows if not row["dropped"]]
    lists = {  # BasicSR, neosr and traiNNer-redux read names; Real-ESRGAN's paired set both files
        "meta_info.txt": [Path(row["lr"]).name for row in pairs],
        "meta_info_realesrgan.txt": [f"{row['hr']}, {row['lr']}" for row in pairs],
    }
    for name, lines in lists.items():
        common.write_text(out / name, "".join(line + "\n" for line in lines))
    if pairs and not preview.is_file():
        save_preview(preview, out, pairs[:4])
    maker.folder.unlock()
    seen = f"; look at {preview}" if pairs else ""
    print(f"{len(pairs)} pairs in {out}, {len(rows) - len(pairs)} dropped, "
          f"{len(maker.jobs) - len(rows)} images skipped{seen}")  # fmt: skip


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
