"""Stage 3: make LR/HR training pairs from HR photos and unrelated real LR photos. Section 2.3, A.6.

In: HR photos, real LR photos whose camera is to be imitated, the weights of stage 2. Out: a folder
of pairs (hr/NAME.png, lr/NAME.png), pairs.jsonl and preview.png. Each HR image draws a reference;
K candidates are denoised from a noised start image (Algorithm 2); the filter keeps the best.

    python generate.py
    python generate.py --hr data/hr --lr-ref data/lr --out out/pairs --candidates 4
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import diffusion
import extractors

SCALE = 4  # HR size / LR size: the VQ-VAE's factor, and so the grid on which content and LR meet
STARTS = ("reconstruct", "degrade")

# ---- the method -------------------------------------------------------------------------------


def load_generator(checkpoint: str, device: torch.device) -> diffusion.DecoupledDDPM:
    """The trained model, ready to generate; "" looks in runs/diffusion, then in data/pretrained."""
    path = common.find_checkpoint(checkpoint, "diffusion", "python diffusion.py")
    state = common.load_checkpoint(path)
    common.require(
        "extractors" in state["config"],
        f"{path}: not a checkpoint of diffusion.py (give that one).",
    )
    net = diffusion.build(state["config"], state["config"]["extractors"])
    net.load_state_dict(state["ema"])
    net.eval().requires_grad_(False)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def start_image(
    net: diffusion.DecoupledDDPM,
    hr: Tensor,
    code: Tensor,
    content: Tensor,
    start: str,
    seeds: Sequence[int],
) -> Tensor:
    """The LR image (B, 3, H/4, W/4) from which denoising starts.

    degrade: D(HR) with random parameters, as in the paper. Deviation, reconstruct: Rec_lr's answer
    to the reference's degradation, because random blur and noise do not go away again.
    """
    if start == "reconstruct":
        return net.extractors.reconstruct(code, hr, content).float().clamp(0, 1)
    draws = [common.generator(seed) for seed in seeds]
    theta = degrade.Degradation.cat([degrade.sample_degradation(1, generator=g) for g in draws])
    return degrade.degrade(hr, theta)


def errors(
    net: diffusion.DecoupledDDPM, lr: Tensor, code: Tensor, content: Tensor
) -> tuple[Tensor, Tensor]:
    """How far candidates (B, K, 3, h, w) are from the HR content and the reference's degradation.

    ||E_cont(up(lr)) - E_cont(hr)|| (root mean square), ||E_deg(lr) - E_deg(ref)||: (B, K). A.6.
    """
    B, K, _, h, w = lr.shape
    flat = lr.flatten(0, 1)
    # One image at a time: the content of K upsampled images is the largest thing in memory.
    contents = torch.cat(
        [net.extractors.content(extractors.resized(x[None], 4 * h, 4 * w)) for x in flat]
    )
    off = contents.view(B, K, *content.shape[1:]) - content[:, None]
    codes = net.extractors.e_deg(flat).view(B, K, -1)
    return off.float().square().mean((2, 3, 4)).sqrt(), (codes - code[:, None]).float().norm(dim=2)


@torch.no_grad()
def generate(
    net: diffusion.DecoupledDDPM,
    hr: Tensor,
    lr_ref: Sequence[Tensor],
    t_start: int,
    num_steps: int,
    candidates: int,
    start: str = "reconstruct",
    eta: float = 0.0,
    seeds: Sequence[int] = (0,),
    bf16: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LR images with the content of hr and the degradation of lr_ref. Algorithm 2, A.6.

    hr (B, 3, H, W) in [0, 1], sizes multiples of 4; lr_ref: B images (3, h, w) of any size; seeds:
    B numbers, from which image b draws. Returns candidates (B, K, 3, H/4, W/4) and scores:
    "content" and "degradation" errors (B, K), "kept" (B,) the best candidate. With t_start = 0 the
    start image itself is the only candidate.
    """
    B, _, H, W = hr.shape
    K = candidates if t_start > 0 else 1
    assert len(lr_ref) == len(seeds) == B, "one reference and one seed for each image"
    # The U-Net halves the LR grid: pad to its multiple, cut the result.
    multiple = SCALE * 2 ** (len(net.widths) - 1)
    padded = F.pad(hr, (0, -W % multiple, 0, -H % multiple), mode="replicate")
    with common.Runtime(hr.device).autocast(bf16):
        code = torch.cat([net.extractors.e_deg(ref[None].to(hr.device)) for ref in lr_ref]).float()
        content = net.extractors.content(padded)
        x = start_image(net, padded, code, content, start, seeds)
        c = net.condition(code, content)
        # K candidates of an image share all of this; they differ in their noise.
        draws = [common.generator(s, k, device=hr.device) for s in seeds for k in range(K)]
        x, c = (v.repeat_interleave(K, dim=0) for v in (x, c))
        x = diffusion.sample(net, x, c, t_start, num_steps, draws, eta)
        lr = x.view(B, K, *x.shape[1:])[..., : H // SCALE, : W // SCALE]
        content = content[..., : H // SCALE, : W // SCALE]
        content_error, degradation_error = errors(net, lr, code, content)
    total = sum(
        e / e.mean(1, keepdim=True).clamp(min=1e-12) for e in (content_error, degradation_error)
    )
    assert isinstance(total, Tensor)
    return lr, {"content": content_error, "degradation": degradation_error, "kept": total.argmin(1)}


# ---- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of generation: the best measured (README); --preset paper has the paper's."""

    hr: tuple[str, ...] = ()  # HR photos: folders or files (default: data/hr, else data/sample/hr)
    lr_ref: tuple[str, ...] = ()  # real LR photos (default: data/lr, else data/sample/lr)
    out: str = "out/generated"  # folder of the pairs
    checkpoint: str = ""  # weights (default: runs/diffusion, else data/pretrained)
    start: str = "reconstruct"  # start image: reconstruct (Rec_lr) or degrade (random D, the paper)
    t_start: int = 15  # steps of noise on the start image, 0 is none; the paper: 300
    num_steps: int = 5  # network evaluations
    eta: float = 0.0  # 0 is DDIM; 1 with as many evaluations as steps is DDPM (the paper)
    candidates: int = 4  # K, of which the filter keeps the best
    batch_size: int = 4  # HR images of one size at a time
    bf16: bool = True  # where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"


PRESETS: dict[str, dict] = {
    "fast": {},
    "paper": {"start": "degrade", "t_start": 300, "num_steps": 300, "eta": 1.0},
}


@dataclass
class Job:
    """One HR image that is to get its LR image."""

    index: int
    name: str
    file: Path
    hr: Tensor
    reference: Path
    lr_ref: Tensor


def load_reference(
    references: list[Path], seed: int, index: int, broken: set[Path]
) -> tuple[Path, Tensor]:
    """The reference that HR image `index` draws; an unreadable one is noted and drawn again."""
    for attempt in range(100):
        draw = torch.randint(2**40, (1,), generator=common.generator(seed, index, attempt))
        file = references[int(draw) % len(references)]
        if file not in broken:
            try:
                lr_ref = common.load_image(file)
                if min(lr_ref.shape[1:]) < 16:
                    raise ValueError(f"{file}: a reference needs at least 16 x 16 pixels")
                return file, lr_ref
            except ValueError as error:
                broken.add(file)
                tqdm.write(f"skipped: {error}")
    raise common.UserError("no usable image found in --lr-ref; see the files named above.")


def jobs(
    todo: Sequence[tuple[int, str, Path]], references: list[Path], cfg: Config, counts: dict
) -> Iterator:
    """Load HR images one by one with their references; count and name unreadable ones."""
    broken: set[Path] = set()
    for index, name, file in todo:
        try:
            hr = common.crop_to_multiple(common.load_image(file), SCALE, file)
        except ValueError as error:
            counts["skipped"] += 1
            tqdm.write(f"skipped: {error}")
            continue
        yield Job(index, name, file, hr, *load_reference(references, cfg.seed, index, broken))


def batched(items: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Runs of at most `size` images of the same shape."""
    batch: list[Job] = []
    for job in items:
        if batch and (len(batch) == size or job.hr.shape != batch[0].hr.shape):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


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


def read_records(path: Path, settings: dict) -> dict[str, dict]:
    """The finished pairs of an earlier run by name; UserError if it had other settings."""
    records: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line being written when the run was killed
            continue
        found = {key: record.get(key) for key in settings}
        different = [key for key in settings if found[key] != settings[key]]
        common.require(
            not different,
            f"{path}: pairs of other settings ({', '.join(different)}): give another --out.",
        )
        if all((path.parent / record[side]).is_file() for side in ("hr", "lr")):
            records[Path(record["lr"]).stem] = record
    return records


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


def main(cfg: Config, rt: common.Runtime) -> None:
    """Generate what is not there yet, one pair after the other."""
    for flag, value, low, high in (
        ("--t-start", cfg.t_start, 0, 1000),
        ("--num-steps", cfg.num_steps, 1, 1000),
        ("--candidates", cfg.candidates, 1, 1000),
        ("--batch-size", cfg.batch_size, 1, 10_000),
    ):
        common.require(low <= value <= high, f"{flag} {value}: must be in {low}..{high}.")
    common.require(0 <= cfg.eta <= 1, f"--eta {cfg.eta}: must be in 0..1.")
    common.require(cfg.start in STARTS, f"--start {cfg.start}: choose {' or '.join(STARTS)}.")
    files = common.find_photos(cfg.hr, "hr", "--hr")
    references = common.find_photos(cfg.lr_ref, "lr", "--lr-ref")
    out, table = Path(cfg.out), Path(cfg.out) / "pairs.jsonl"
    settings = {
        key: getattr(cfg, key)
        for key in ("start", "t_start", "num_steps", "eta", "candidates", "seed")
    }
    records = read_records(table, settings)
    names = unique_names(files)
    todo = [
        job for job in zip(range(len(files)), names, files, strict=True) if job[1] not in records
    ]
    for name, photo in zip(names, files, strict=True):
        source = records[name]["source"] if name in records else str(photo)
        common.require(
            source == str(photo),
            f"{table} holds a pair {name} made of {source}: give another --out.",
        )
    net = load_generator(cfg.checkpoint, rt.device)
    common.require(
        cfg.t_start <= net.t_max, f"--t-start {cfg.t_start}: the weights know {net.t_max} steps."
    )
    counts = {"skipped": 0}
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=len(files), initial=len(files) - len(todo), unit="pair", disable=not rt.is_main
    )
    with bar as progress:  # closed before an error is printed
        for batch in batched(jobs(todo, references, cfg, counts), cfg.batch_size):
            hr = torch.stack([job.hr for job in batch]).to(rt.device)
            seeds = [cfg.seed << 32 | job.index for job in batch]
            lr, scores = generate(
                net,
                hr,
                [job.lr_ref for job in batch],
                cfg.t_start,
                cfg.num_steps,
                cfg.candidates,
                cfg.start,
                cfg.eta,
                seeds,
                cfg.bf16,
            )
            scores = {key: value.cpu() for key, value in scores.items()}
            for b, job in enumerate(batch):
                kept = int(scores["kept"][b])
                row = {"hr": f"hr/{job.name}.png", "lr": f"lr/{job.name}.png"}
                common.save_image(out / row["hr"], job.hr)
                common.save_image(out / row["lr"], lr[b, kept])
                record = row | {"source": str(job.file), "lr_ref": str(job.reference), **settings}
                for key in ("content", "degradation"):  # the last digits vary with the batch
                    record[f"{key}_errors"] = [float(f"{e:.4g}") for e in scores[key][b].tolist()]
                records[job.name] = record | {"kept": kept}
                with open(
                    table, "a", encoding="utf-8"
                ) as file:  # survives a kill; sorted at the end
                    file.write(json.dumps(records[job.name]) + "\n")
            progress.update(len(batch))
    ordered = [records[name] for name in sorted(records)]
    text = "".join(json.dumps(record) + "\n" for record in ordered)
    if not table.is_file() or table.read_text(encoding="utf-8") != text:
        with common.replacing(table) as temporary:
            temporary.write_text(text, encoding="utf-8")
    common.require(bool(ordered), "none of the HR images could be used; see the files named above.")
    if todo or not (out / "preview.png").is_file():
        save_preview(out / "preview.png", out, list(islice(ordered, 4)))
    print(
        f"{len(ordered)} pairs in {out}, {counts['skipped']} images skipped; "
        f"look at {out / 'preview.png'}"
    )


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
