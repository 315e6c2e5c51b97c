"""The results: how close is generated LR to the LR that a real camera took? (Section 3.2, Table 2.)

In: folders of aligned pairs which were never trained on: HR/ and LR/ with the same file names, or
RealSR, DRealSR or RealVSR as published (data/README.md).
Out: a table on the screen and in out/benchmark/table2.md; every single value in results.json.
RealDGen answers twice: with the pair's own LR as reference, as in the paper, and with another
photo of the same camera, as in use, where nobody has the LR image that is to be generated.

Two tables more look inside, and need HR photos only: does generated LR follow its reference,
one factor at a time (factors), and does E_deg see what E_cont must not see (extractors).

    python benchmark.py --pairs data/RealSR data/DRealSR
    python benchmark.py --pairs data/RealSR --table 2 --candidates 1 --seed 1
    python benchmark.py --table factors extractors --hr data/hr --lr data/lr
"""

import dataclasses
import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
import degrade
import extractors
import generate
import probes
from metrics import (  # noqa: F401  (all are names of benchmark, too)
    METRICS,
    SET_METRICS,
    available_metrics,
    clip_score,
    dists_distance,
    fid,
    kid,
    lpips_distance,
    psnr,
    ssim,
)

# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An HR image and the real LR image of the same scene."""

    index: int  # among all pairs of the folder, readable or not: random draws depend on it
    name: str  # below LR/, without suffix; of published sets what HR and LR share
    hr: Path
    lr: Path
    size: tuple[int, int]  # of LR, (h, w)
    scale: int  # HR size / LR size, rounded down
    shrink: int  # size of the LR file / LR size
    reference: Path  # file of the real LR whose degradation RealDGen is to imitate


def camera_of(name: str) -> str:
    """The camera in a name below LR/: its sub-folder, else the leading letters of the file name."""
    folder, slash, _ = name.partition("/")
    return folder if slash else re.split(r"[\W\d_]", name, maxsplit=1)[0]


# A layout: the HR and the LR files below the folder, without suffix, and the scales it comes in (0:
# to be seen from the sizes). {0} is the scale, what is in brackets makes the name of the pair.
LAYOUTS = (
    (r"HR/(.+)", r"LR/(.+)", (0,)),
    (r"[^/]+/Test/{0}/([^/]+)_HR", r"[^/]+/Test/{0}/([^/]+)_LR{0}", (4, 3, 2)),  # RealSR
    (r"Test_x{0}/test_HR/([^/]+)_x{0}", r"Test_x{0}/test_LR/([^/]+)_x1", (4, 3, 2)),  # DRealSR
    (r"GT_test/([^/]+)/([^/]+)", r"LQ_test/([^/]+)/([^/]+)", (4,)),  # RealVSR
)


def by_name(images: list[tuple[str, Path]], pattern: str) -> dict[str, Path]:
    """The images whose path without suffix is of this pattern, by the name in its brackets."""
    found: dict[str, Path] = {}
    for path, file in images:
        if match := re.fullmatch(pattern, path):
            name = "_".join(match.groups())
            common.require(name not in found, f"{file}: {found.get(name)} has the same name.")
            found[name] = file
    return found


def find_files(folder: Path) -> tuple[dict[str, Path], dict[str, Path], int]:
    """HR files and LR files by name, and the scale that the layout tells, else 0."""
    common.require(folder.is_dir(), f"--pairs {folder}: no such folder.")
    walk = os.walk(folder, followlinks=True)
    files = sorted(Path(root, name) for root, _, names in walk for name in names)
    files = [file for file in files if file.suffix.lower() in common.SUFFIXES]
    images = [(file.relative_to(folder).with_suffix("").as_posix(), file) for file in files]
    for *patterns, scales in LAYOUTS:
        for scale in scales:  # of several the largest
            hr, lr = (by_name(images, pattern.format(scale)) for pattern in patterns)
            if hr or lr:
                return hr, lr, scale
    known = "HR/ and LR/ with the same names, or RealSR, DRealSR or RealVSR as published"
    raise common.UserError(f"--pairs {folder}: no images as {known} (see data/README.md).")


def find_pairs(folder: Path) -> tuple[list[Pair], int]:
    """The readable pairs of a folder, and the number of the others; UserError if they don't fit.

    Published LR images of the HR size (RealVSR, RealSR 1 and 2) are to be shrunk by the scale.
    """
    here = f"--pairs {folder}"
    hr_files, lr_files, published = find_files(folder)
    alone = sorted(hr_files.keys() ^ lr_files.keys())
    counts = f"{len(hr_files)} HR and {len(lr_files)} LR images"
    names = f"{len(alone)} names are of one kind only, such as {', '.join(alone[:2])}"
    common.require(not alone, f"{here}: {counts}; {names}.")
    pairs: list[Pair] = []
    for index, (name, file) in enumerate(sorted(lr_files.items())):
        try:
            H, W = common.load_image(hr_files[name]).shape[1:]
            h, w = common.load_image(file).shape[1:]
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        scale = pairs[0].scale if pairs else published or max(2, H // h)
        size = (H // scale, W // scale)
        full = pairs[0].shrink > 1 if pairs else published > 0 and (h, w) == (H, W)
        right = (H, W) if full else size
        wrong = f"{name} has {W} x {H} HR and {w} x {h} LR pixels, not {right[1]} x {right[0]}"
        common.require((h, w) == right, f"{here}: {wrong} as scale {scale} has it.")
        common.require(min(size) >= 32, f"{here}: the LR image {name} is under 32 x 32 pixels.")
        shrink = scale if full else 1
        pairs.append(Pair(index, name, hr_files[name], file, size, scale, shrink, file))
    common.require(bool(pairs), f"{here}: none of its pairs can be read.")
    return pairs, len(lr_files) - len(pairs)


def load_hr(pair: Pair) -> Tensor:
    """The HR image (3, H, W) in [0, 1], cut at the right and at the bottom to scale times LR."""
    h, w = (pair.scale * side for side in pair.size)
    return common.load_image(pair.hr)[:, :h, :w]


def load_lr(path: Path, shrink: int) -> Tensor:
    """A real LR image (3, h, w) in [0, 1]; bicubically reduced to 1/shrink if that is not 1."""
    image = common.load_image(path)
    h, w = (side // shrink for side in image.shape[1:])
    return image if shrink == 1 else reduced(image[None, :, : shrink * h, : shrink * w], h, w)[0]


def other_scenes(cameras: Sequence[str], seed: int) -> dict[int, int]:
    """For each image another one of the same camera, each used once; no entry where there is none.

    The images of a camera are put in a random order, and each is given its successor.
    """
    other = {}
    for number, camera in enumerate(sorted(set(cameras))):
        members = [i for i, c in enumerate(cameras) if c == camera]
        order = torch.randperm(len(members), generator=common.generator(seed, number)).tolist()
        for here, successor in zip(order, order[1:] + order[:1], strict=True):
            if here != successor:
                other[members[here]] = members[successor]
    return other


# ---- the methods: hr (B, 3, H, W) in [0, 1] of some pairs -> lr (B, 3, h, w) --------------------


def reduced(x: Tensor, h: int, w: int) -> Tensor:
    """Pillow's bicubic reduction (B, 3, h, w) of 8-bit images; x (B, 3, H, W) in [0, 1]."""
    images = [Image.fromarray(v) for v in common.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()]
    small = [np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(x.device) / 255


def bicubic(hr: Tensor, batch: Sequence[Pair]) -> Tensor:
    """The HR image, reduced."""
    return reduced(hr, *batch[0].size)


def synthetic(hr: Tensor, batch: Sequence[Pair], recipe: str, seed: int) -> Tensor:
    """A recipe of degrade.py, each image with parameters and noise from (seed, its index)."""
    draws = [common.generator(seed, pair.index) for pair in batch]
    scale = batch[0].scale
    theta = [degrade.sample_degradation(1, recipe, scale, generator=draw) for draw in draws]
    return degrade.degrade(hr, degrade.Degradation.cat(theta))


def realdgen(hr: Tensor, batch: Sequence[Pair], net: Any, cfg: "Config") -> Tensor:
    """The candidate that RealDGen keeps, with the degradation of each pair's reference."""
    if batch[0].scale != generate.SCALE:  # content and LR meet at this scale only
        hr = extractors.resized(hr, *(generate.SCALE * side for side in batch[0].size))
    lr, scores = generate.generate(
        net,
        hr,
        [load_lr(pair.reference, pair.shrink) for pair in batch],
        t_start=cfg.t_start,
        num_steps=cfg.num_steps,
        candidates=cfg.candidates,
        start=cfg.start,
        eta=cfg.eta,
        seeds=[cfg.seed << 32 | pair.index for pair in batch],
        bf16=cfg.bf16,
        solver=cfg.solver,
    )
    return lr[torch.arange(len(lr)), scores["kept"].cpu()]


# ---- Table 2 ------------------------------------------------------------------------------------

# The paper's RealDGen on all crops of a benchmark.
PAPER = {
    "RealSR": "PSNR 26.16, SSIM 0.794, LPIPS 0.223, DISTS 0.187, FID 107.24, CLIP-Score 0.824",
    "DRealSR": "PSNR 28.66, SSIM 0.836, LPIPS 0.150, DISTS 0.157, FID 30.01, CLIP-Score 0.858",
}
Method = Callable[[Tensor, list[Pair]], Tensor]


@torch.no_grad()
def evaluate(
    name: str,
    method: Method,
    pairs: list[Pair],
    metrics: list[str],
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """One row of a table: the LR that a method makes of each HR image, against the real LR.

    metrics: some of METRICS, of which every image has its value, and of SET_METRICS.
    """
    seconds, images = 0.0, {}
    each = [m for m in metrics if m in METRICS]
    all_made, all_real = [], []  # batches of 8 bits
    pending = sorted(pairs, key=lambda pair: pair.size)
    bar = tqdm(total=len(pairs), desc=name, unit="image")
    while pending:
        batch = [pair for pair in pending[:batch_size] if pair.size == pending[0].size]
        pending = pending[len(batch) :]
        hr = torch.stack([load_hr(pair) for pair in batch]).to(device)
        lr = torch.stack([load_lr(pair.lr, pair.shrink) for pair in batch]).to(device)
        began = time.perf_counter()
        made = common.to_uint8(method(hr, batch)).cpu()  # 8 bits, as in the files of real use
        seconds += time.perf_counter() - began
        all_made.append(made)
        all_real.append(common.to_uint8(lr).cpu())
        made = made.to(device) / 255
        values = torch.stack([METRICS[m](made, lr).double().cpu() for m in each], dim=1)
        values = values.clamp(max=100.0)  # equal images: 100 dB, so that there is a mean
        for pair, row in zip(batch, values.tolist(), strict=True):
            images[pair.name] = dict(zip(each, row, strict=True))
        bar.update(len(batch))
    bar.close()
    mean = {m: sum(row[m] for row in images.values()) / len(images) for m in each if images}
    for m in [m for m in metrics if m in SET_METRICS and len(pairs) > 1]:
        both = ((x.to(device) / 255 for x in batches) for batches in (all_made, all_real))
        mean[m] = SET_METRICS[m](*both)
    return {"method": name, "n": len(pairs), "seconds": seconds, "mean": mean, "images": images}


def table_2(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """All rows for the pairs of one folder: how close is generated LR to the real one? Table 2."""
    cameras = [camera_of(pair.name) for pair in own]
    successor = other_scenes(cameras, cfg.seed)
    other = [dataclasses.replace(own[i], reference=own[j].lr) for i, j in successor.items()]
    alone = dataclasses.replace(cfg, t_start=0, start="reconstruct")
    rec_lr = functools.partial(realdgen, net=net, cfg=alone)
    diffusion = functools.partial(realdgen, net=net, cfg=cfg)
    rows: list[tuple[str, Method, list[Pair]]] = [
        ("bicubic", bicubic, own),
        ("Real-ESRGAN", functools.partial(synthetic, recipe="realesrgan", seed=cfg.seed), own),
        ("BSRGAN", functools.partial(synthetic, recipe="bsrgan", seed=cfg.seed), own),
        ("RealDGen T=0, own LR", rec_lr, own),
        ("RealDGen T=0, other scene", rec_lr, other),
        ("RealDGen, own LR", diffusion, own),
        ("RealDGen, other scene", diffusion, other),
    ]
    return {
        "cameras": dict(Counter(cameras)),
        "rows": [evaluate(*row, metrics, cfg.batch_size, device) for row in rows],
    }


def table_sampling(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """What start image, solver, number of evaluations and candidates are worth, other scenes."""
    cameras = [camera_of(pair.name) for pair in own]
    pairs = [
        dataclasses.replace(own[i], reference=own[j].lr)
        for i, j in other_scenes(cameras, cfg.seed).items()
    ][: cfg.images]
    T, metrics = cfg.t_start, [m for m in metrics if m in METRICS]  # too few for sets
    rows: list[tuple[str, dict[str, Any]]] = [("Rec_lr alone", {"t_start": 0})]
    for solver in ("ddim", "dpm"):
        for n in (1, 2, 5, 10) if solver == "ddim" else (2, 5, 10):
            rows.append((f"{solver}, {n} evaluations", {"solver": solver, "num_steps": n}))
    rows += [
        (f"ddpm, all {T} steps", {"eta": 1.0, "num_steps": T}),
        ("ddim, 5 evaluations, start degrade", {"start": "degrade", "num_steps": 5}),
        (
            f"ddim, 5 evaluations, K={cfg.candidates}",
            {"candidates": cfg.candidates, "num_steps": 5},
        ),
    ]
    plain = dataclasses.replace(cfg, candidates=1, eta=0.0, solver="ddim", start="reconstruct")
    results = []
    for name, changes in rows:
        method = functools.partial(realdgen, net=net, cfg=dataclasses.replace(plain, **changes))
        results.append(evaluate(name, method, pairs, metrics, cfg.batch_size, device))
    return {"t_start": T, "rows": results}


def markdown_sampling(result: dict[str, Any]) -> str:
    """The table of settings of one folder of pairs."""
    name = Path(result["pairs"]).resolve().name
    lines = [f"## {name}: settings of the sampler from T={result['t_start']}, K=1 unless said", ""]
    return "\n".join(lines + method_rows(result["rows"], METRICS)) + "\n"


DECIMALS = {"PSNR RGB": 2, "PSNR Y": 2, "FID": 2, "KID": 4}  # of the others 3


def method_rows(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> list[str]:
    """Lines of a table with a row for each method; a dash where a metric can't be had."""
    columns = list(columns)
    lines = [f"| method | {' | '.join(columns)} | n | seconds |"]
    lines += ["| --- |" + " ---: |" * (len(columns) + 2)]
    for row in rows:
        cells = [f"{row['mean'].get(m, math.nan):z.{DECIMALS.get(m, 3)}f}" for m in columns]
        text = " | ".join(cells).replace("nan", "-")
        lines += [f"| {row['method']} | {text} | {row['n']} | {row['seconds']:.1f} |"]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of one folder of pairs, and what one must know to read it."""
    name, n = Path(result["pairs"]).resolve().name, result["rows"][0]["n"]
    lines = [f"## {name}: generated LR against the real LR of {n} pairs", ""]
    lines += method_rows(result["rows"], [*METRICS, *SET_METRICS])
    cameras = ", ".join(f"{camera or 'unnamed'} {k}" for camera, k in result["cameras"].items())
    lines += [
        "",
        "bicubic is Pillow's, of the 8-bit HR image; T=0 is Rec_lr without diffusion; n is",
    ]
    lines += [
        "the number of pairs, seconds the time to generate them. The LR reference is the pair's"
    ]
    lines += [f"own LR, or another scene of the same camera ({cameras})."]
    if "FID" in result["rows"][0]["mean"]:
        lines += ["FID is too large for so few images, by an amount that depends on n; KID is not."]
    lines += [f"Pairs without another scene, left out there: {n - result['rows'][-1]['n']}."]
    lines += [f"Pairs that can't be read, left out everywhere: {result['skipped']}."]
    if name in PAPER:
        lines += ["", f"RealDGen (paper), on the whole {name} benchmark: {PAPER[name]}."]
    return "\n".join(lines) + "\n"


def git_commit() -> str:
    """The commit of this code, marked -dirty where files differ; empty where git can't say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: tuple[str, ...] = ()  # folders: HR/ and LR/ of the same names, or as published
    table: tuple[str, ...] = ("2",)  # 2 (the paper's), sampling, factors, extractors
    hr: tuple[str, ...] = ()  # HR photos of the other tables (default: data/hr, else data/sample)
    lr: tuple[str, ...] = ()  # real LR photos in a sub-folder for each device (default: data/lr)
    images: int = 64  # HR photos and devices in use
    crop: int = 96  # side of the LR images of the other tables, pixels
    t_starts: tuple[int, ...] = (0, 15, 120)  # rows of the table factors
    repeats: int = 2  # noises for each of its contents
    extractors: str = ""  # stage-1 weights (default: runs/extractors, else data/pretrained)
    checkpoint: str = ""  # generator (default: runs/diffusion, else data/pretrained)
    out: str = "out/benchmark"  # folder that gets results.json and a .md for each table
    start: str = generate.Config.start  # start image: reconstruct (Rec_lr) or degrade
    t_start: int = generate.Config.t_start  # T, from which generation starts
    num_steps: int = generate.Config.num_steps  # network evaluations of the sampler
    eta: float = generate.Config.eta  # 0 is DDIM, 1 is DDPM
    solver: str = generate.Config.solver  # ddim or dpm
    candidates: int = generate.Config.candidates  # K, of which the best is kept
    batch_size: int = 8  # images at a time; no draw depends on it
    bf16: bool = generate.Config.bf16  # where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


PRESETS = {name: generate.PRESETS[name] for name in ("fast", "paper")}
TABLES = {
    "2": "table2.md",
    "sampling": "sampling.md",
    "factors": "factors.md",
    "extractors": "extractors.md",
}


def check(cfg: Config) -> None:
    """UserError for what is wrong with the flags alone."""
    for table in cfg.table:
        common.require(table in TABLES, f"--table {table}: choose among {', '.join(TABLES)}.")
    if {"2", "sampling"} & set(cfg.table):
        example = "name folders of pairs, as in `python benchmark.py --pairs data/RealSR`"
        common.require(bool(cfg.pairs), f"--pairs is missing: {example}.")
    for flag, value, low in (
        ("--t-start", cfg.t_start, 0),
        ("--t-starts", min(cfg.t_starts), 0),
        ("--num-steps", cfg.num_steps, 1),
        ("--candidates", cfg.candidates, 1),
        ("--batch-size", cfg.batch_size, 1),
        ("--images", cfg.images, 2),
        ("--crop", cfg.crop, 32),
        ("--repeats", cfg.repeats, 1),
        ("--seed", cfg.seed, 0),
    ):
        common.require(low <= value < 2**31, f"{flag} {value}: must be at least {low}.")
    common.require(cfg.crop % 8 == 0, f"--crop {cfg.crop}: must be a multiple of 8.")
    common.require(cfg.start in generate.STARTS, f"--start {cfg.start}: not a start image.")
    given = cfg.extractors
    common.require(not given or Path(given).is_file(), f"--extractors {given}: no such file.")


def main(cfg: Config, rt: common.Runtime) -> None:
    """Check all that can be wrong, then measure, and write whenever a table has grown."""
    if not rt.is_main:  # a matter of minutes for one process
        return
    began = time.time()
    check(cfg)
    on_pairs = {"2": (table_2, markdown), "sampling": (table_sampling, markdown_sampling)}
    used = set(cfg.table)
    sets = {f: find_pairs(Path(f)) for f in cfg.pairs} if used & on_pairs.keys() else {}
    if {"factors", "extractors"} & set(cfg.table):
        files, side = common.find_photos(cfg.hr, "hr", "--hr"), generate.SCALE * cfg.crop
        hr = probes.load_photos(files, side, cfg.images, cfg.seed).to(rt.device)
    if "extractors" in cfg.table:
        real = common.find_photos(cfg.lr, "lr", "--lr")
        devices = probes.device_crops(real, cfg.crop, cfg.images, cfg.seed)
        nets = probes.load_extractors(cfg.extractors, rt.device)
    if used - {"extractors"}:
        net = generate.load_generator(cfg.checkpoint, rt.device)
    metrics = available_metrics(rt.device) if sets else []
    print(cfg)
    gpu = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "config": dataclasses.asdict(cfg),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": gpu or f"{rt.device}, {torch.get_num_threads()} threads",
        "sets": [],  # of Table 2
    }

    def write(table: str, text: str) -> None:
        results["seconds"] = time.time() - began
        for name, content in (
            (TABLES[table], text),
            ("results.json", json.dumps(results, indent=1)),
        ):
            with common.replacing(Path(cfg.out) / name) as temporary:
                temporary.write_text(content, encoding="utf-8")

    for table, (measure, text_of) in on_pairs.items():
        found = results["sets"] if table == "2" else results.setdefault(table, [])
        tables = []
        for folder, (pairs, skipped) in sets.items() if table in used else ():
            result = measure(pairs, net, metrics, cfg, rt.device)
            found.append({"pairs": folder, "skipped": skipped} | result)
            tables.append(text_of(found[-1]))
            print("\n" + tables[-1])
            write(table, "\n".join(tables))
    if "factors" in cfg.table:
        sampler = (cfg.num_steps, cfg.start, cfg.eta, cfg.bf16)
        results["factors"] = probes.table_factors(
            hr, net, cfg.t_starts, cfg.repeats, *sampler, cfg.seed
        )
        print("\n" + (text := probes.markdown_factors(results["factors"])))
        write("factors", text)
    if "extractors" in cfg.table:
        found = probes.table_extractors(hr, devices, nets, cfg.batch_size, cfg.seed)
        results["extractors"] = found
        print("\n" + (text := probes.markdown_extractors(found)))
        write("extractors", text)
    names = [TABLES[table] for table in TABLES if table in cfg.table]
    print(f"written: {', '.join(names)} and results.json in {cfg.out}")


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
