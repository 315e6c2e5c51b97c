"""Stage 3: make LR/HR training pairs from HR photos and unrelated real LR photos. Section 2.3, A.6.

In: HR photos, real LR photos whose camera is to be imitated, the weights of stage 2. Out: a folder
of pairs (hr/NAME.png, lr/NAME.png), pairs.jsonl and preview.png. Each HR image draws a reference;
K candidates are denoised from a noised start image (Algorithm 2); the filter keeps the best.

    python generate.py
    python generate.py --hr data/hr --lr-ref data/lr --out out/pairs --candidates 4
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import diffusion
import extractors
from data.shards import TarShards

SCALE = 4  # HR size / LR size: the VQ-VAE's factor, and so the grid on which content and LR meet
STARTS = ("reconstruct", "degrade")
CANDIDATES = 4  # K where the filter is to have a choice
# What the head of the shipped weights reads in photos that are clean or hardly compressed: nearly
# all up to this noise (std) and down to this JPEG quality, so that neither can be told from none.
FAINT, UNCOMPRESSED = 3 / 255, 88
# What a pair depends on besides its photos: a run with other values needs another folder.
SETTINGS = ("start", "t_start", "auto_t", "num_steps", "eta", "solver", "candidates", "max_error",
            "pairing", "jitter", "seed", "keep", "format", "average", "recipe",
            "t_min", "grain", "bf16", "weights")  # fmt: skip

# ---- the method -------------------------------------------------------------------------------


def load_generator(
    checkpoint: str, device: torch.device, grain: bool = False
) -> diffusion.DecoupledDDPM:
    """The trained model, ready to generate; "" looks in runs/diffusion, then in data/pretrained.

    UserError if it can't be used; with `grain` also if E_deg's head was not trained.
    """
    path = common.find_checkpoint(checkpoint, "diffusion", "python diffusion.py")
    net = diffusion.load(common.load_checkpoint(path), str(path))
    common.require(
        not net.extractors.as_printed or not grain,
        f"{path}: as printed, nothing reads noise and JPEG: give --no-grain.",
    )
    net.eval().requires_grad_(False)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def start_image(hr: Tensor, answer: Tensor, start: str, seed: int, recipe: str) -> Tensor:
    """The LR image (1, 3, H/4, W/4) from which denoising starts.

    degrade: D(HR) with random parameters of a recipe; the paper's is realesrgan. Deviation,
    reconstruct: Rec_lr's answer to the reference's degradation, because random blur and noise do
    not go away again.
    """
    if start == "reconstruct":
        return answer
    theta = degrade.sample_degradation(1, recipe, generator=common.generator(seed))
    return degrade.degrade(hr, theta)


def grained(
    net: diffusion.DecoupledDDPM, lr: Tensor, code: Tensor, draws: Sequence[torch.Generator]
) -> Tensor:
    """Candidates (K, 3, h, w) with the noise they lack and the JPEG that E_deg sees in code (1, D).

    Not in the paper: Rec_lr's answer is an average over all noise, a short chain adds little, and a
    network hardly learns to round in blocks of 8 x 8. Compression looks like a little noise: what
    is lacking is what E_deg does not see in the candidate once compressed.
    """
    wanted, quality = net.extractors.named(code)
    is_noisy, is_jpeg = bool(wanted > FAINT), bool(quality < UNCOMPRESSED)

    def compressed(lr: Tensor) -> Tensor:
        return degrade.jpeg(lr, quality.expand(len(lr))) if is_jpeg else lr

    if not is_noisy:
        return compressed(lr)
    there, _ = net.extractors.named(net.extractors.e_deg(compressed(lr)))
    missing = (wanted.square() - there.square()).clamp(min=0).sqrt()
    noise = missing[:, None, None, None] * diffusion.randn_rows(lr, draws)
    return compressed((lr + noise).clamp(0, 1))


def errors(
    net: diffusion.DecoupledDDPM, lr: Tensor, code: Tensor, content: Tensor
) -> tuple[Tensor, Tensor]:
    """How far candidates (K, 3, h, w) are from the HR content and the reference's degradation.

    ||E_cont(up(lr)) - E_cont(hr)|| (root mean square), ||E_deg(lr) - E_deg(ref)||: (K,) each. A.6.
    """
    h, w = lr.shape[2:]
    content_error, degradation_error = [], []
    for x in lr.split(1):  # the content of an enlarged image is the largest thing in memory
        seen = net.extractors.content(extractors.resized(x, 4 * h, 4 * w))
        content_error.append((seen - content).float().square().mean().sqrt())
        degradation_error.append((net.extractors.e_deg(x) - code).float().norm())
    return torch.stack(content_error), torch.stack(degradation_error)


def code_of(net: diffusion.DecoupledDDPM, lr_ref: Tensor) -> Tensor:
    """F_deg (1, D) of a reference (3, h, w) of any size, or of its code (D,) itself.

    Of a large photo the middle is read, from a corner of JPEG's blocks on: its code is an average
    over the image anyway.
    """
    device = next(net.parameters()).device
    if lr_ref.ndim == 1:
        return lr_ref[None].to(device)
    top, left = (max(0, n - 512) // 16 * 8 for n in lr_ref.shape[1:])
    return net.extractors.e_deg(
        lr_ref[None, :, top : top + 512, left : left + 512].to(device)
    ).float()


@torch.no_grad()
def generate(
    net: diffusion.DecoupledDDPM,
    hr: Tensor,
    lr_ref: Sequence[Tensor],
    t_start: int | Sequence[int],
    num_steps: int,
    candidates: int,
    start: str = "reconstruct",
    eta: float = 0.0,
    seeds: Sequence[int] = (0,),
    bf16: bool = True,
    solver: str = "ddim",
    recipe: str = "realesrgan",
    grain: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LR images with the content of hr and the degradation of lr_ref. Algorithm 2, A.6.

    hr (B, 3, H, W) in [0, 1], sizes multiples of 4; lr_ref: B images (3, h, w) of any size, or
    codes (D,); seeds: B numbers, from which image b draws; with several t_start the candidates take
    turns (automatic T: the filter chooses). Returns candidates (B, K, 3, H/4, W/4) and scores:
    "content" and "degradation" errors (B, K), "kept" (B,) the best candidate. With t_start = 0 the
    start image itself is the only candidate.
    """
    assert len(lr_ref) == len(seeds) == len(hr), "one reference and one seed for each image"
    ts = [t_start] if isinstance(t_start, int) else list(t_start)
    ts = [ts[k % len(ts)] for k in range(candidates)] if max(ts) > 0 else [0]
    with common.Runtime(hr.device).autocast(bf16):
        # One image at a time, its candidates together: no result depends on the other images.
        made = [
            generate_one(
                net, image[None], ref, ts, num_steps, start, eta, seed, solver, recipe, grain
            )
            for image, ref, seed in zip(hr, lr_ref, seeds, strict=True)
        ]
    lr, content, degradation = (torch.stack(parts) for parts in zip(*made, strict=True))
    scores = {"content": content, "degradation": degradation}
    total = sum(e / e.mean(1, keepdim=True).clamp(min=1e-12) for e in scores.values())
    assert isinstance(total, Tensor)
    return lr, scores | {"kept": total.argmin(1)}


def generate_one(
    net: diffusion.DecoupledDDPM,
    hr: Tensor,
    lr_ref: Tensor,
    ts: list[int],
    num_steps: int,
    start: str,
    eta: float,
    seed: int,
    solver: str,
    recipe: str,
    grain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One candidate for each of ts: (K, 3, H/4, W/4), and both of their errors (K,)."""
    h, w = (side // SCALE for side in hr.shape[2:])
    # The U-Net halves the LR grid, tiles keep to JPEG's blocks of 8: pad to a multiple, cut.
    multiple = SCALE * max(2 ** (len(net.widths) - 1), 8 if max(h, w) > extractors.TILE else 1)
    hr = F.pad(hr, (0, -hr.shape[3] % multiple, 0, -hr.shape[2] % multiple), mode="replicate")
    grid = (hr.shape[2] // SCALE, hr.shape[3] // SCALE)
    code = code_of(net, lr_ref)
    content = net.extractors.content(hr)
    rec_lr = functools.partial(net.extractors.reconstruct, code)
    answer = extractors.in_tiles(rec_lr, grid, hr, content).float().clamp(0, 1)
    x = start_image(hr, answer, start, seed, recipe)
    c = extractors.in_tiles(
        functools.partial(net.condition, code), grid, content, diffusion.known(answer)
    )

    def eps_pred(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return extractors.in_tiles(lambda x_t, c: net(x_t, t, c), grid, x_t, c)

    made: dict[int, Tensor] = {}
    for t in sorted(set(ts)):
        ks = [k for k, own in enumerate(ts) if own == t]
        draws = [common.generator(seed, k) for k in ks]
        starts, conditions = (v.expand(len(ks), -1, -1, -1) for v in (x, c))
        lr = diffusion.sample(eps_pred, starts, conditions, t, num_steps, draws, eta, solver)
        made |= dict(zip(ks, lr, strict=True))
    lr = torch.stack([made[k] for k in range(len(ts))])[..., :h, :w]
    if grain:
        lr = grained(net, lr, code, [common.generator(seed, k, 1) for k in range(len(ts))])
    return lr, *errors(net, lr, code, content[..., :h, :w])


# ---- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of generation: the best measured (README); --preset paper has the paper's."""

    hr: tuple[str, ...] = ()  # HR photos: folders or files (default: data/hr, else data/sample/hr)
    lr_ref: tuple[str, ...] = ()  # real LR photos (default: data/lr, else data/sample/lr)
    out: str = "out/generated"  # folder of the pairs
    checkpoint: str = ""  # weights (default: runs/diffusion, else data/pretrained)
    start: str = "reconstruct"  # start image: reconstruct (Rec_lr) or degrade (random D, the paper)
    recipe: str = "realesrgan"  # of D, for --start degrade
    t_start: int = 2  # steps of noise on the start image, 0 is none; the paper: 300
    t_min: int = -1  # draw T of each image from here to t_start (SynDiff); -1: always t_start
    auto_t: bool = False  # candidates start from a quarter, half, once and twice t_start in turn
    num_steps: int = 1  # network evaluations
    grain: bool = True  # noise and JPEG as E_deg reads them in the reference; the paper: no
    eta: float = 0.0  # 0 is DDIM; 1 with as many evaluations as steps is DDPM (the paper)
    solver: str = "ddim"  # ddim or dpm (DPM-Solver++ of second order)
    candidates: int = 1  # K, of which the filter keeps the best
    max_error: tuple[float, ...] = (1e9, 1e9)  # largest content and degradation error of a pair
    keep: int = 0  # only so many pairs, those of the smallest errors; 0: all
    pairing: str = "random"  # reference of each HR image: random, round-robin, all, or a file
    codes: str = ""  # file for the references' codes: written, or read in place of --lr-ref
    format: str = "folder"  # or webdataset: tar files of pairs, for sets too large for a folder
    per_shard: int = 1000  # pairs in a tar file
    average: int = 1  # references of the same folder, at most, of which the mean code is taken
    jitter: float = 0.0  # mixes up to this share of another reference's code in, for diversity
    bf16: bool = True  # where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {
        "start": "degrade",
        "t_start": 300,
        "num_steps": 300,
        "eta": 1.0,
        "candidates": CANDIDATES,
        "grain": False,
    },
    # arXiv:2303.06994, with weights of diffusion.py --without content degradation.
    "syndiff": {
        "start": "degrade",
        "recipe": "light",
        "t_min": 0,
        "t_start": 250,
        "num_steps": 12,
        "grain": False,
        "candidates": 1,
    },
}


@dataclass
class Job:
    """One pair that is to be made."""

    index: int  # what it draws from, with the seed
    name: str
    file: Path
    reference: int | None = None  # number of the reference, where the pairing says it
    hr: Tensor = field(default_factory=lambda: torch.empty(0))


class References:
    """Reference photos and their codes, made when first drawn; or the codes of an earlier run."""

    def __init__(self, cfg: Config, net: diffusion.DecoupledDDPM) -> None:
        self.net, self.bf16 = net, cfg.bf16
        self.codes: dict[int, Tensor | None] = {}  # None: unreadable
        if not (cfg.codes and Path(cfg.codes).is_file()):
            self.files = common.find_photos(cfg.lr_ref, "lr", "--lr-ref")
            return
        try:
            with safe_open(cfg.codes, "pt") as stored:
                names = json.loads((stored.metadata() or {})["references"])
                self.files, codes = [Path(name) for name in names], stored.get_tensor("codes")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise common.UserError(f"--codes {cfg.codes}: no stored codes ({error}).") from None
        self.codes = dict(enumerate(codes))

    @functools.cached_property
    def folders(self) -> dict[Path, list[int]]:
        """The references of each folder: one camera's, as a rule."""
        folders: dict[Path, list[int]] = {}
        for r, file in enumerate(self.files):
            folders.setdefault(file.parent, []).append(r)
        return folders

    @torch.no_grad()
    def code(self, r: int) -> Tensor | None:
        """F_deg (D,) of reference r; None if it can't be used, which is said once."""
        if r not in self.codes:
            self.codes[r], device = None, next(self.net.parameters()).device
            try:
                lr_ref = common.load_image(self.files[r])
                if min(lr_ref.shape[1:]) < 16:
                    raise ValueError(f"{self.files[r]}: a reference needs at least 16 x 16 pixels")
                with common.Runtime(device).autocast(self.bf16):
                    self.codes[r] = code_of(self.net, lr_ref)[0].cpu()
            except ValueError as error:
                tqdm.write(f"skipped: {error}")
        return self.codes[r]

    def mean_code(self, r: int, average: int) -> Tensor | None:
        """The mean code (D,) of reference r and of those that follow it in its folder."""
        same = self.folders[self.files[r].parent]
        at = same.index(r)
        those = [same[(at + k) % len(same)] for k in range(min(average, len(same)))]
        codes = [code for i in those if (code := self.code(i)) is not None]
        return torch.stack(codes).mean(0) if self.code(r) is not None else None

    def draw(self, *numbers: int) -> int:
        """A usable reference, from these numbers; UserError if there seems to be none."""
        for attempt in range(100):
            draw = torch.randint(2**40, (1,), generator=common.generator(*numbers, attempt))
            r = int(draw) % len(self.files)
            if self.code(r) is not None:
                return r
        raise common.UserError("no usable image found in --lr-ref; see the files named above.")

    def save(self, path: Path) -> None:
        """Write the codes of all usable references."""
        used = [r for r in range(len(self.files)) if self.code(r) is not None]
        facts = {"references": json.dumps([str(self.files[r]) for r in used])}
        codes = [code for r in used if (code := self.code(r)) is not None]
        common.require(bool(used), "no usable image found in --lr-ref; see the files named above.")
        with common.replacing(path) as temporary:
            save_file({"codes": torch.stack(codes)}, temporary, facts)


def read_pairing(path: str, files: Sequence[Path], references: Sequence[Path]) -> dict[Path, int]:
    """--pairing FILE: lines of an HR and an LR file name with a tab between; paths or bare names.

    The number of the reference of each HR file. UserError for a name that there is not, or twice.
    """
    common.require(
        Path(path).is_file(),
        f"--pairing {path}: choose random, round-robin, all, or a file that says the pairs.",
    )

    def numbers(among: Sequence[Path]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, file in enumerate(among):
            for name in {str(file), file.name}:
                found.setdefault(name, []).append(i)
        return found

    known, pairs = (numbers(files), numbers(references)), {}
    for line in filter(None, Path(path).read_text(encoding="utf-8").splitlines()):
        names = line.split("\t")
        common.require(len(names) == 2, f"--pairing {path}: two names and a tab, not {line!r}.")
        found = [where.get(name, []) for where, name in zip(known, names, strict=True)]
        for name, those in zip(names, found, strict=True):
            common.require(
                len(those) == 1, f"--pairing {path}: {len(those)} photos are called {name}."
            )
        pairs[files[found[0][0]]] = found[1][0]
    missing = [str(file) for file in files if file not in pairs]
    common.require(not missing, f"--pairing {path} says nothing of {', '.join(missing[:3])}.")
    return pairs


def plan(files: Sequence[Path], lr_ref: Sequence[Path], pairing: str) -> list[Job]:
    """All pairs of a run; names are file stems, where two are equal with a number."""
    references = len(lr_ref)
    names = unique_names(files)
    jobs = [Job(i, n, f) for i, (n, f) in enumerate(zip(names, files, strict=True))]
    if pairing == "round-robin":
        jobs = [replace(job, reference=job.index % references) for job in jobs]
    elif pairing == "all":
        jobs = [
            Job(job.index * references + r, f"{job.name}_r{r:04d}", job.file, r)
            for job in jobs
            for r in range(references)
        ]
    elif pairing != "random":
        pairs = read_pairing(pairing, files, lr_ref)
        jobs = [replace(job, reference=pairs[job.file]) for job in jobs]
    return jobs


def unique_names(files: Sequence[Path]) -> list[str]:
    """File stems; where two are equal, the later ones get a number."""
    names: dict[str, None] = {}  # an ordered set
    for file in files:
        name, number = file.stem, 1
        while name in names:
            number += 1
            name = f"{file.stem}_{number}"
        names[name] = None
    return list(names)


def read_records(out: Path, settings: dict) -> dict[str, dict]:
    """The finished pairs of earlier runs by name; UserError if they had other settings."""
    records: dict[str, dict] = {}
    packed = TarShards(out).done()
    for path in sorted(out.glob("pairs*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line being written when the run was killed
                continue
            different = [key for key in settings if record.get(key) != settings[key]]
            common.require(
                not different,
                f"{path}: pairs of other settings ({', '.join(different)}): give another --out.",
            )
            name, files = Path(record["lr"]).stem, [out / record[side] for side in ("hr", "lr")]
            if record["dropped"] or name in packed or all(file.is_file() for file in files):
                records[name] = record
    return records


def pack(out: Path, shards: TarShards, records: Sequence[dict]) -> None:
    """Move pairs from the folder into a tar file, which is there before they are gone."""
    if not (out / "preview.png").is_file() and shards.rank == 0:
        save_preview(out / "preview.png", out, records[:4])
    for record in records:
        hr, lr = ((out / record[side]).read_bytes() for side in ("hr", "lr"))
        shards.add(Path(record["lr"]).stem, hr, lr, record)
    shards.close()
    for record in records:
        remove(out, record)


def remove(out: Path, record: dict) -> None:
    """Delete the files of a pair, if they are there."""
    for side in ("hr", "lr"):
        (out / record[side]).unlink(missing_ok=True)


def save_preview(path: Path, out: Path, records: Sequence[dict]) -> None:
    """Write a picture of a few pairs: the middle of HR | LR reference | generated LR | bicubic."""
    rows = []
    for record in records:
        if Path(record["lr_ref"]).is_file():
            files = (out / record["hr"], record["lr_ref"], out / record["lr"])
            hr, lr_ref, lr = (common.load_image(file) for file in files)
            bicubic = extractors.resized(hr[None], *lr.shape[1:])[0].clamp(0, 1)
            small = [common.centre(x, 96, 288) for x in (lr_ref, lr, bicubic)]
            rows.append([common.centre(hr, 96 * SCALE, 288), *small])
    if rows:
        common.save_sheet(path, ("HR", "LR reference", "generated LR", "bicubic"), rows)


def finish(out: Path, settings: dict) -> None:
    """Join the tables of all processes, in the order of names; write what else describes a run."""
    records = [record for _, record in sorted(read_records(out, settings).items())]
    kept = [record for record in records if not record["dropped"]]
    if 0 < settings["keep"] < len(kept):
        kept = keep_best(kept, settings["keep"])
    table = out / "pairs.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    changed = not table.is_file() or table.read_text(encoding="utf-8") != text
    folder = settings["format"] == "folder"
    files = {table: text} | ({out / "meta_info.txt": meta_info(kept)} if folder else {})
    for path, lines in files.items():
        if changed or not path.is_file():
            with common.replacing(path) as temporary:
                temporary.write_text(lines, encoding="utf-8")
    for part in out.glob("pairs.*.jsonl"):
        part.unlink()
    for record in [record for record in records if record["dropped"]]:
        remove(out, record)
    if folder and kept:
        if changed or not (out / "preview.png").is_file():
            save_preview(out / "preview.png", out, kept[:4])
        if changed or not (out / "report.html").is_file():
            from data import report  # which imports this file

            report.save_report(out / "report.html", out, kept, settings)


def keep_best(records: Sequence[dict], number: int) -> list[dict]:
    """The `number` best pairs by the filter's sum of errors; the others are marked as dropped."""
    names = ("content_errors", "degradation_errors")
    errors = torch.tensor([[record[n][record["kept"]] for n in names] for record in records])
    total = (errors / errors.mean(0).clamp(min=1e-12)).sum(1)
    for i in total.argsort(stable=True)[number:].tolist():
        records[i]["dropped"] = True
    return [record for record in records if not record["dropped"]]


def meta_info(records: Sequence[dict]) -> str:
    """BasicSR's list of a paired data set: HR file and LR file on each line."""
    return "".join(f"{record['hr']}, {record['lr']}\n" for record in records)


def make_pair(
    net: diffusion.DecoupledDDPM,
    job: Job,
    references: References,
    cfg: Config,
    ts: list[int],
    settings: dict,
) -> tuple[Job, Tensor, dict]:
    """The LR image (3, h, w) that the filter keeps for a job, and its line of pairs.jsonl."""
    first = references.draw(cfg.seed, job.index) if job.reference is None else job.reference
    code = references.mean_code(first, cfg.average)
    assert code is not None, "load() has checked it"
    if cfg.jitter > 0:
        drawn = references.draw(cfg.seed, job.index, 1)
        other = references.mean_code(drawn, cfg.average)
        share = torch.rand((), generator=common.generator(cfg.seed, job.index, 2))
        code = torch.lerp(code, other, cfg.jitter * share) if other is not None else code
    if cfg.t_min >= 0:
        draw = common.generator(cfg.seed, job.index, 3)
        ts = [int(torch.randint(cfg.t_min, cfg.t_start + 1, (), generator=draw))]
    seed, device = cfg.seed << 32 | job.index, next(net.parameters()).device
    hr = job.hr[None].to(device)
    lr, scores = generate(
        net, hr, [code], ts, cfg.num_steps, cfg.candidates, cfg.start, cfg.eta, [seed], cfg.bf16,
        cfg.solver, cfg.recipe, cfg.grain,
    )  # fmt: skip
    kept = int(scores["kept"][0])
    record = {
        "hr": f"hr/{job.name}.png",
        "lr": f"lr/{job.name}.png",
        "source": str(job.file),
        "lr_ref": str(references.files[first]),
        "domain": references.files[first].parent.name,
        **settings,
    }
    dropped = False
    for key, most in zip(("content", "degradation"), cfg.max_error, strict=True):
        values = [float(f"{e:.4g}") for e in scores[key][0].tolist()]
        record[f"{key}_errors"] = values
        dropped |= values[kept] > most
    record |= {"t": ts[kept % len(ts)], "kept": kept, "dropped": dropped}
    return job, lr[0, kept].cpu(), record


def settings_of(cfg: Config) -> dict:
    """SETTINGS as they are stored with a pair."""
    values = {key: getattr(cfg, key) for key in SETTINGS if key != "weights"}
    path = common.find_checkpoint(cfg.checkpoint, "diffusion", "python diffusion.py")
    return values | {"max_error": list(cfg.max_error), "weights": common.fingerprint(path)}


def check(cfg: Config) -> None:
    """UserError for what is wrong with the flags alone."""
    for flag, value, low, high in (
        ("--t-start", cfg.t_start, 0, 1000),
        ("--num-steps", cfg.num_steps, 1, 1000),
        ("--candidates", cfg.candidates, 1, 1000),
        ("--eta", cfg.eta, 0, 1),
        ("--t-min", cfg.t_min, -1, cfg.t_start),
        ("--average", cfg.average, 1, 2**40),
        ("--jitter", cfg.jitter, 0, 1),
        ("--keep", cfg.keep, 0, 2**40),
        ("--per-shard", cfg.per_shard, 1, 2**40),
    ):
        common.require(low <= value <= high, f"{flag} {value}: must be in {low}..{high}.")
    for flag, given, choices in (
        ("--start", cfg.start, STARTS),
        ("--recipe", cfg.recipe, degrade.RECIPES),
        ("--solver", cfg.solver, ("ddim", "dpm")),
        ("--format", cfg.format, ("folder", "webdataset")),
    ):
        common.require(given in choices, f"{flag} {given}: choose {', '.join(choices)}.")
    common.require(
        cfg.solver == "ddim" or cfg.eta == 0, f"--eta {cfg.eta}: --solver dpm draws no noise."
    )
    common.require(
        cfg.candidates > 1 or not cfg.auto_t or cfg.t_start == 0,
        f"--auto-t: the filter chooses among candidates, give --candidates {CANDIDATES}.",
    )
    common.require(cfg.t_min < 0 or not cfg.auto_t, "--t-min and --auto-t exclude each other.")
    common.require(
        len(cfg.max_error) == 2, "--max-error takes two numbers: content and degradation."
    )
    common.require(
        cfg.keep == 0 or cfg.format == "folder", "--keep needs all pairs: --format folder, then "
        "data/shards.py."
    )  # fmt: skip


def main(cfg: Config, rt: common.Runtime) -> None:
    """Generate what is not there yet; every process takes its share."""
    check(cfg)
    files, out = common.find_photos(cfg.hr, "hr", "--hr"), Path(cfg.out)
    settings = settings_of(cfg)
    records = read_records(out, settings)
    common.wait_for_all(rt)  # so that none sees what another one writes from now on
    net = load_generator(cfg.checkpoint, rt.device, cfg.grain)
    t = cfg.t_start
    ts = [max(1, round(t * f)) for f in (0.25, 0.5, 1, 2)] if cfg.auto_t and t > 0 else [t]
    reach = f"--t-start {t}" + (f", doubled by --auto-t to {max(ts)}" if max(ts) > t else "")
    common.require(max(ts) <= net.t_max, f"{reach}: the weights know {net.t_max} steps.")
    references = References(cfg, net)
    if cfg.codes:  # every run and process counts the references as the file does
        if rt.is_main and not Path(cfg.codes).is_file():
            references.save(Path(cfg.codes))
        common.wait_for_all(rt)
        references = References(cfg, net)
    jobs = plan(files, references.files, cfg.pairing)
    known = {str(file) for file in references.files}
    for job in [job for job in jobs if job.name in records]:
        source, lr_ref = (records[job.name][key] for key in ("source", "lr_ref"))
        held = f"{out} holds a pair {job.name} made of {source} and {lr_ref}: give another --out."
        common.require(source == str(job.file) and lr_ref in known, held)
    mine = [job for job in jobs if job.name not in records][rt.rank :: rt.world_size]

    def load(job: Job) -> Job | None:
        try:
            photo = common.crop_to_multiple(common.load_image(job.file), SCALE, job.file)
        except ValueError as error:
            tqdm.write(f"skipped: {error}")
            return None
        return replace(job, hr=photo)

    def made() -> Iterator[tuple[Job, Tensor, dict] | None]:
        # Files are read and written beside this: one image after the other on the device.
        for job in common.in_parallel(load, mine, 2):
            usable = job and (job.reference is None or references.code(job.reference) is not None)
            yield make_pair(net, job, references, cfg, ts, settings) if job and usable else None

    def save(result: tuple[Job, Tensor, dict] | None) -> dict | None:
        if result is None:
            return None
        job, lr, record = result
        if not record["dropped"]:
            common.save_image(out / record["hr"], job.hr)
            common.save_image(out / record["lr"], lr)
        return record

    shards = TarShards(out, rt.rank, cfg.per_shard)
    # Pairs outside of tar files; what an earlier run left there is the first process's.
    loose = [r for r in records.values() if (out / r["lr"]).is_file()] if rt.is_main else []
    packed = shards.done() if loose and cfg.format == "webdataset" else {}
    for left in [r for r in loose if Path(r["lr"]).stem in packed]:  # packed when it was killed
        remove(out, left)
        loose.remove(left)
    with tqdm(total=len(mine), unit="pair", disable=not rt.is_main) as progress:
        for record in common.in_parallel(save, made(), 2):
            progress.update()
            if record is None:
                continue
            out.mkdir(parents=True, exist_ok=True)
            with open(out / f"pairs.{rt.rank}.jsonl", "a", encoding="utf-8") as table:
                # Survives a kill, and begins a line whatever a kill has cut; joined at the end.
                table.write("\n" + json.dumps(record) + "\n")
            loose += [] if record["dropped"] else [record]
            if cfg.format == "webdataset" and len(loose) >= cfg.per_shard:
                pack(out, shards, loose)
                loose.clear()
    if cfg.format == "webdataset":
        pack(out, shards, loose)
    common.wait_for_all(rt)
    if rt.is_main:
        records = read_records(out, settings)
        common.require(
            bool(records), "none of the HR images could be used; see the files named above."
        )
        finish(out, settings)
        records = read_records(out, settings)
        dropped = sum(record["dropped"] for record in records.values())
        skipped = sum(job.name not in records for job in jobs)
        print(f"{len(records) - dropped} pairs in {out}, {dropped} dropped, "
              f"{skipped} images skipped; look at {out / 'preview.png'}")  # fmt: skip


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
