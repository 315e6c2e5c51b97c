"""The results: how close is generated LR to the LR that a real camera took? (Section 3.)

In: folders of aligned pairs which were never trained on: HR/ and LR/ with the same file names, or
RealSR, DRealSR or RealVSR as published (data/README.md).
Out: a table on the screen and in out/benchmark/table2.md; every single value in results.json.
RealDGen answers twice: with the pair's own LR as reference, as in the paper, and with another
photo of the same camera, as in use, where nobody has the LR image that is to be generated.

Tables 1, 3, 4, 5 and 7 ask what the pairs are worth: SR networks are trained on the data of each
method (sr.py), all else equal, and tested on real pairs that gave no reference.

Two tables more look inside, and need HR photos only: does generated LR follow its reference,
one factor at a time (factors), and does E_deg see what E_cont must not see (extractors).
And three ask what it takes over from its reference (transfer, leakage, diversity: transfer.py).

    python benchmark.py --pairs data/RealSR data/DRealSR
    python benchmark.py --pairs data/RealSR --table 2 --candidates 1 --seed 1
    python benchmark.py --pairs data/RealSR --sr swinir-l fsrcnn --seeds 3
    python benchmark.py --table factors extractors --hr data/hr --lr data/lr
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
import sr
import transfer
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


def best_blurs(pairs: Sequence[Pair]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """LR (3, h, w) by index of the pair, of the Gaussian nearest to the real LR: for all, for each.

    They are chosen by looking at the answer, so no method can be asked to reach them: this is what
    blur alone can do.
    """
    banks, values = {}, {}
    for pair in pairs:
        bank = common.to_uint8(probes.reductions(load_hr(pair)))  # (21, 3, h, w)
        lr = load_lr(pair.lr, pair.shrink).expand(len(bank), -1, -1, -1)
        banks[pair.index], values[pair.index] = bank, psnr(bank / 255, lr).clamp(max=100)
    best = int(torch.stack([*values.values()]).mean(0).argmax())
    of_all = {index: bank[best] / 255 for index, bank in banks.items()}
    return of_all, {i: bank[values[i].argmax()] / 255 for i, bank in banks.items()}


def known(hr: Tensor, batch: Sequence[Pair], lr: dict[int, Tensor]) -> Tensor:
    """Images that have been made before."""
    return torch.stack([lr[pair.index] for pair in batch]).to(hr.device)


def realdgen(
    hr: Tensor,
    batch: Sequence[Pair],
    net: Any,
    cfg: "Config",
    codes: dict[int, Tensor] | None = None,
) -> Tensor:
    """The candidate that RealDGen keeps, with the degradation of each pair's reference.

    codes: F_deg (D,) by index of the pair, in place of its reference.
    """
    if batch[0].scale != generate.SCALE:  # content and LR meet at this scale only
        hr = extractors.resized(hr, *(generate.SCALE * side for side in batch[0].size))
    lr, scores = generate.generate(
        net,
        hr,
        [codes[p.index] if codes else load_lr(p.reference, p.shrink) for p in batch],
        t_start=cfg.t_start,
        num_steps=cfg.num_steps,
        candidates=cfg.candidates,
        start=cfg.start,
        eta=cfg.eta,
        seeds=[cfg.seed << 32 | pair.index for pair in batch],
        bf16=cfg.bf16,
        solver=cfg.solver,
        recipe=cfg.recipe,
        grain=cfg.grain,
    )
    return lr[torch.arange(len(lr)), scores["kept"].cpu()]


# ---- Table 2 ------------------------------------------------------------------------------------

# The paper's RealDGen on all crops of a benchmark.
PAPER_2 = {
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
    upwards: bool = False,
) -> dict[str, Any]:
    """One row of a table: the LR that a method makes of each HR image, against the real LR.

    Or `upwards`, the HR that it makes of each real LR image, against the HR image.
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
        given, wanted = (lr, hr) if upwards else (hr, lr)
        began = time.perf_counter()
        made = common.to_uint8(method(given, batch)).cpu()  # 8 bits, as in the files of real use
        seconds += time.perf_counter() - began
        all_made.append(made)
        all_real.append(common.to_uint8(wanted).cpu())
        made = made.to(device) / 255
        values = torch.stack([METRICS[m](made, wanted).double().cpu() for m in each], dim=1)
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
    mean = functools.partial(rec_lr, codes=mean_codes(own, net, cfg.bf16))
    rows: list[tuple[str, Method, list[Pair]]] = [
        ("bicubic", bicubic, own),
        ("Real-ESRGAN", functools.partial(synthetic, recipe="realesrgan", seed=cfg.seed), own),
        ("BSRGAN", functools.partial(synthetic, recipe="bsrgan", seed=cfg.seed), own),
        ("RealDGen T=0, own LR", rec_lr, own),
        ("RealDGen T=0, other scene", rec_lr, other),
        ("RealDGen T=0, all other scenes", mean, other),
        ("RealDGen, own LR", diffusion, own),
        ("RealDGen, other scene", diffusion, other),
    ]
    if own[0].scale == generate.SCALE:
        one, each = (functools.partial(known, lr=lr) for lr in best_blurs(own))
        rows[3:3] = [("best blur of the set*", one, own), ("best blur of each pair*", each, own)]
    return {
        "cameras": dict(Counter(cameras)),
        "rows": [evaluate(*row, metrics, cfg.batch_size, device) for row in rows],
    }


@torch.no_grad()
def mean_codes(pairs: Sequence[Pair], net: Any, bf16: bool) -> dict[int, Tensor]:
    """For each pair (by index) the mean F_deg (D,) of the other LR images of its camera."""
    device, codes = next(net.parameters()).device, {}
    with common.Runtime(device).autocast(bf16):
        for pair in pairs:
            codes[pair.index] = generate.code_of(net, load_lr(pair.lr, pair.shrink))[0]
    others = {
        pair.index: [
            codes[p.index]
            for p in pairs
            if p is not pair and camera_of(p.name) == camera_of(pair.name)
        ]
        for pair in pairs
    }
    return {index: torch.stack(found).mean(0) for index, found in others.items() if found}


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


def all_scenes(
    names: Iterable[str], sets: Iterable[tuple[list[Pair], int]]
) -> Iterator[tuple[str, str, str, Tensor, Tensor]]:
    """Set, camera, name, HR and LR of each pair, as transfer.py takes them."""
    for name, (pairs, _) in zip(names, sets, strict=True):
        for pair in pairs:
            lr = load_lr(pair.lr, pair.shrink)
            yield name, camera_of(pair.name), pair.name, load_hr(pair), lr


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
    lines += [f"own LR, another scene of the same camera ({cameras}), or the mean code"]
    lines += [
        "of all of them. * A Gaussian chosen by looking at the real LR: what blur alone can do."
    ]
    if "FID" in result["rows"][0]["mean"]:
        lines += ["FID is too large for so few images, by an amount that depends on n; KID is not."]
    lines += [f"Pairs without another scene, left out there: {n - result['rows'][-1]['n']}."]
    lines += [f"Pairs that can't be read, left out everywhere: {result['skipped']}."]
    if name in PAPER_2:
        lines += ["", f"RealDGen (paper), on the whole {name} benchmark: {PAPER_2[name]}."]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """The Markdown tables in a text as LaTeX."""
    lines = []
    for line, after in itertools.pairwise([*text.splitlines(), ""]):
        cells = [re.sub(r"([%_&#])", r"\\\1", cell.strip()) for cell in line.split("|")[1:-1]]
        if set(line) <= set("| -:"):
            continue
        if cells and set(after) <= set("| -:") and "---" in after:
            lines += [rf"\begin{{tabular}}{{l{'r' * (len(cells) - 1)}}}"]
        if cells:
            lines += [" & ".join(cells).replace("±", r"$\pm$") + r" \\"]
            lines += [] if after.startswith("|") else [r"\end{tabular}", ""]
    return "\n".join(lines) + "\n"


def git_commit() -> str:
    """The commit of this code, marked -dirty where files differ; empty where git can't say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---- downstream: SR networks trained on what each method makes (Tables 1, 3, 4, 5 and 7) --------

# Label in the tables and, where it is one, the recipe of degrade.py.
DATA = {
    "bicubic": ("bicubic", "bicubic"),
    "bsrgan": ("BSRGAN", "bsrgan"),
    "realesrgan": ("Real-ESRGAN", "realesrgan"),
    "syndiff": ("SynDiff", ""),
    "realdgen": ("RealDGen", ""),
    "paired": ("real pairs (oracle)", ""),
}
SR_COLUMNS = ("PSNR Y", "SSIM Y", "LPIPS", "DISTS", "FID")
# Table 1 of the paper, all crops: RealSR PSNR, SSIM, DRealSR PSNR, SSIM of networks trained with
# L1; RealSR LPIPS, FID, DRealSR LPIPS, FID of those trained with a perceptual loss.
PAPER_1 = """
swinir realesrgan 24.395 .7760 26.944 .8308 .3037 69.965 .3219 39.175
swinir bsrgan 25.852 .7808 27.985 .8308 .2945 79.833 .3023 38.541
swinir syndiff 25.589 .7687 28.301 .8309 .3835 103.179 .3801 54.588
swinir realdgen 26.094 .7822 28.721 .8341 .2536 69.736 .2660 38.257
rrdb realesrgan 24.579 .7614 27.131 .8193 .3480 82.056 .3551 39.310
rrdb bsrgan 25.406 .7685 27.523 .8017 .3041 77.412 .3127 36.528
rrdb syndiff 25.488 .7691 28.078 .8257 .4004 98.798 .4017 56.573
rrdb realdgen 26.238 .7747 28.727 .8340 .2972 76.973 .3077 36.259
hat realesrgan 24.893 .7726 27.339 .8215 .3066 79.209 .3219 41.862
hat bsrgan 25.997 .7816 28.135 .8273 .2852 80.192 .2835 41.723
hat syndiff 25.790 .7584 28.506 .8286 .3332 93.763 .3465 50.808
hat realdgen 26.140 .7832 28.802 .8345 .2457 67.573 .2587 41.319
swinir-l realesrgan 24.367 .7723 27.018 .8244 .3108 79.491 .3234 42.986
swinir-l bsrgan 25.651 .7800 27.813 .8301 .3013 84.195 .2978 43.246
swinir-l syndiff 25.281 .7516 28.170 .8244 .3793 98.646 .3748 52.464
swinir-l realdgen 26.025 .7810 28.869 .8328 .2795 75.779 .2862 42.542
"""


def paper_value(network: str, data: str, perceptual: bool, name: str, metric: str) -> str:
    """What the paper's Table 1 has in this place, in brackets; empty where it has nothing."""
    columns = ("LPIPS", "FID") if perceptual else ("PSNR Y", "SSIM Y")
    for line in PAPER_1.split("\n"):
        if line.startswith(f"{network} {data} ") and metric in columns:
            place = 4 * perceptual + 2 * (name == "DRealSR") + columns.index(metric)
            if name in ("RealSR", "DRealSR"):
                return f" [{line.split()[2 + place]}]"
    return ""


@dataclass(frozen=True)
class Row:
    """A network, and the data it is trained on: one line of a table."""

    label: str
    network: str
    data: str  # a key of DATA
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of generate.py
    perceptual: bool = False
    without: str = ""  # name of a set whose references are left out


def halves(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Every other pair of each camera: those that give references, and those that are tested."""
    found: tuple[list[Pair], list[Pair]] = ([], [])
    count: Counter[str] = Counter()
    for pair in pairs:
        camera = camera_of(pair.name)
        found[count[camera] % 2].append(pair)
        count[camera] += 1
    return found


def downstream_rows(table: str, names: list[str], cfg: "Config") -> list[Row]:
    """The rows of a table; names are those of the sets of pairs."""
    light = cfg.sr[-1] if table != "1" else ""  # one network is enough for an ablation
    if table == "1":
        kinds = [False, True] if cfg.perceptual_weight > 0 else [False]
        return [
            Row(DATA[data][0], network, data, {}, perceptual)
            for perceptual in kinds
            for network in cfg.sr
            for data in cfg.data
        ]
    if table == "3":
        ts = [Row(f"T={t}", light, "realdgen", {"t_start": t}) for t in cfg.t_starts]
        return [*ts, Row("T chosen by the filter", light, "realdgen", {"auto_t": True})]
    if table == "4":
        ablations = (("E_deg", cfg.without_degradation), ("E_cont", cfg.without_content))
        rows = [
            Row(f"without {name}", light, "realdgen", {"checkpoint": path})
            for name, path in ablations
            if path
        ]
        return [*rows, Row("RealDGen", light, "realdgen")]
    if table == "5":
        kept = [Row(DATA[data][0], light, data) for data in cfg.data if data != "paired"]
        apart = [
            Row(f"RealDGen, no reference of {name}", light, "realdgen", without=name)
            for name in names
            if len(names) > 1
        ]
        return kept + apart
    return [  # Table 7
        Row("without filter", light, "realdgen", {"candidates": 1}),
        Row("with filter", light, "realdgen"),
    ]


def write_references(sets: dict[str, list[Pair]], out: Path) -> None:
    """The pairs that are not tested, as files: references/SET/CAMERA/, paired/ for the oracle."""
    for name, pairs in sets.items():
        for pair in halves(pairs)[0]:
            file = f"{pair.name.replace('/', '_')}.png"
            lr = load_lr(pair.lr, pair.shrink)
            targets = {
                out / "references" / name / (camera_of(pair.name) or "camera") / file: lr,
                out / "paired" / "hr" / f"{name}_{file}": load_hr(pair),
                out / "paired" / "lr" / f"{name}_{file}": lr,
            }
            for path, image in targets.items():
                if not path.is_file():
                    common.save_image(path, image)


def training_source(row: Row, names: list[str], cfg: "Config", rt: common.Runtime) -> dict:
    """Flags of sr.py for a row's training pairs, which are generated if they are not there yet."""
    out, recipe = Path(cfg.out), DATA[row.data][1]
    if recipe:
        return {"recipe": recipe, "hr": tuple(map(str, common.find_photos(cfg.hr, "hr", "--hr")))}
    if row.data == "paired":
        return {"pairs": str(out / "paired")}
    fields = ("checkpoint", "start", "t_start", "num_steps", "eta", "solver", "candidates", "bf16",
              "grain")  # fmt: skip
    settings = {key: getattr(cfg, key) for key in fields} | row.settings
    if row.data == "syndiff":
        settings |= generate.PRESETS["syndiff"] | {"checkpoint": cfg.syndiff}
    folder = "_".join([row.data, *map(str, row.settings.values()), *filter(None, [row.without])])
    target = out / "pairs" / re.sub(r"[^\w.-]", "-", folder)
    references = cfg.lr_ref or [
        str(out / "references" / name) for name in names if name != row.without
    ]
    generate.main(
        generate.Config(
            hr=cfg.hr,
            lr_ref=tuple(references),
            out=str(target),
            seed=cfg.seed,
            device=cfg.device,
            **settings,
        ),
        rt,
    )
    return {"pairs": str(target)}


def train_and_test(
    row: Row,
    tests: dict[str, list[Pair]],
    metrics: list[str],
    cfg: "Config",
    rt: common.Runtime,
) -> dict[str, Any]:
    """A row's values on each set, one for each seed; what it cost."""
    began = time.time()
    source = training_source(row, [*tests], cfg, rt)
    result: dict[str, Any] = {"seconds of data": time.time() - began, "seconds": [], "sets": {}}
    steps = {"steps": cfg.sr_steps} if cfg.sr_steps else {}
    preset = sr.PRESETS[cfg.sr_preset] | {"save_every": 500} | steps
    weight = cfg.perceptual_weight if row.perceptual else 0.0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        kind = ["perceptual"] if row.perceptual else []
        data = Path(source.get("pairs", row.data)).name
        known = "-".join([row.network, data, *kind, str(seed)])
        settings = preset | {"sr": row.network, "perceptual_weight": weight, "seed": seed}
        settings |= {"out": f"{cfg.out}/sr", "name": known, "device": cfg.device} | source
        began = time.time()
        net = sr.load_network(sr.train(sr.Config(**settings), rt)).to(rt.device)
        result["seconds"].append(time.time() - began)
        result["parameters"] = sum(p.numel() for p in net.parameters())
        method = functools.partial(super_resolved, net=net, bf16=cfg.bf16)
        for name, pairs in tests.items() if rt.is_main else ():
            given = (f"{row.network}, {row.label}", method, pairs, metrics, 1, rt.device, True)
            result["sets"].setdefault(name, []).append(evaluate(*given))
    return result


def super_resolved(lr: Tensor, batch: Sequence[Pair], net: Any, bf16: bool) -> Tensor:
    """HR of real LR; Pillow's bicubic enlargement if there is no network."""
    if net is None:
        return reduced(lr, *(batch[0].scale * side for side in batch[0].size))
    with common.Runtime(lr.device).autocast(bf16):
        return sr.super_resolve(net, lr)


def table_downstream(
    table: str,
    sets: dict[str, list[Pair]],
    metrics: list[str],
    cfg: "Config",
    rt: common.Runtime,
) -> dict[str, Any]:
    """All rows of Table 1, 3, 4, 5 or 7, and bicubic enlargement, which needs no network."""
    if rt.is_main:
        write_references(sets, Path(cfg.out))
    common.wait_for_all(rt)
    tests = {name: halves(pairs)[1] for name, pairs in sets.items()}
    rows = []
    if rt.is_main:
        method = functools.partial(super_resolved, net=None, bf16=False)
        plain = {
            name: [evaluate("bicubic", method, pairs, metrics, 1, rt.device, True)]
            for name, pairs in tests.items()
        }
        rows = [{"network": "none", "label": "bicubic enlargement", "data": "", "sets": plain}]
    for row in downstream_rows(table, [*sets], cfg):
        rows.append(dataclasses.asdict(row) | train_and_test(row, tests, metrics, cfg, rt))
    return {"table": table, "rows": rows, "tested": {name: len(p) for name, p in tests.items()}}


def markdown_downstream(result: dict[str, Any], cfg: "Config") -> str:
    """A table of SR networks: mean over the seeds, +- their standard deviation, [the paper]."""
    names, table = [*result["tested"]], result["table"]
    columns = [(name, metric) for name in names for metric in SR_COLUMNS]
    lines = [f"## Table {table}: networks trained on each data, on real LR", ""]
    heads = " | ".join(f"{name} {metric}" for name, metric in columns)
    lines += [f"| network | trained on | {heads} | data s | training s |"]
    lines += ["| --- | --- |" + " ---: |" * (len(columns) + 2)]
    for row in result["rows"]:
        cells = []
        for name, metric in columns:
            values = [run["mean"].get(metric, math.nan) for run in row["sets"][name]]
            text = f"{np.mean(values):z.{DECIMALS.get(metric, 3)}f}"
            text += f" ± {np.std(values):.{DECIMALS.get(metric, 3)}f}" if len(values) > 1 else ""
            text = text if "nan" not in text else "-"
            known = (row["network"], row["data"], row.get("perceptual", False), name, metric)
            cells.append(text + (paper_value(*known) if table == "1" else ""))
        label = row["label"] + (", perceptual" if row.get("perceptual") else "")
        times = [row.get("seconds of data", 0.0), float(np.mean(row.get("seconds", [0.0])))]
        cells += [f"{seconds:.0f}" for seconds in times]
        lines += [f"| {row['network']} | {label} | {' | '.join(cells)} |"]
    tested = ", ".join(f"{name} {n}" for name, n in result["tested"].items())
    sizes = {r["network"]: f"{r['parameters'] / 1e6:.2f} M" for r in result["rows"][1:]}
    lines += [
        "",
        f"Preset {cfg.sr_preset}, {cfg.sr_steps or 'its'} steps, {cfg.seeds} seeds.",
        f"Tested on every other pair of each camera ({tested}); the LR of the others were",
        "RealDGen's references, and the oracle was trained on them. In brackets: the paper, on",
        "all pairs. Parameters: " + ", ".join(f"{k} {v}" for k, v in sizes.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def table_filter(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """Generated LR with and without the filter, other scenes as references. Table 6."""
    successor = other_scenes([camera_of(pair.name) for pair in own], cfg.seed)
    pairs = [dataclasses.replace(own[i], reference=own[j].lr) for i, j in successor.items()]
    rows = []
    for name, K in (("without filter", 1), (f"with filter, K={cfg.candidates}", cfg.candidates)):
        method = functools.partial(realdgen, net=net, cfg=dataclasses.replace(cfg, candidates=K))
        rows.append(evaluate(name, method, pairs, metrics, cfg.batch_size, device))
    return {"rows": rows}


def markdown_filter(result: dict[str, Any]) -> str:
    """Table 6 of one folder of pairs."""
    name = Path(result["pairs"]).resolve().name
    lines = [f"## {name}: Table 6, generated LR against the real LR", ""]
    return "\n".join([*lines, *method_rows(result["rows"], [*METRICS, *SET_METRICS])]) + "\n"


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: tuple[str, ...] = ()  # folders: HR/ and LR/ of the same names, or as published
    table: tuple[
        str, ...
    ] = ()  # 1 to 7, sampling, factors, extractors, transfer, leakage, diversity (default: 1 or 2)
    all: bool = False  # all tables
    sr: tuple[str, ...] = ()  # networks to train: swinir, swinir-l, rrdb, hat, fsrcnn
    data: tuple[str, ...] = tuple(DATA)  # what they are trained on
    sr_preset: str = ""  # of sr.py: paper, small, smoke (default: paper on a GPU, else smoke)
    sr_steps: int = 0  # of training, in place of the preset's
    seeds: int = 1  # trainings of each network, from --seed on
    perceptual_weight: float = 0.0  # above 0: Table 1 also with networks trained with this LPIPS
    lr_ref: tuple[str, ...] = ()  # RealDGen's references (default: half of the LR of --pairs)
    syndiff: str = ""  # unconditional generator (default: runs/syndiff/last.pt)
    without_degradation: str = ""  # Table 4: generator of diffusion.py --without degradation
    without_content: str = ""  # Table 4: generator of diffusion.py --without content
    hr: tuple[str, ...] = ()  # HR photos of the other tables (default: data/hr, else data/sample)
    lr: tuple[str, ...] = ()  # real LR photos in a sub-folder for each device (default: data/lr)
    images: int = 64  # HR photos and devices in use
    crop: int = 96  # side of the LR images of the other tables, pixels
    t_starts: tuple[int, ...] = (0, 15, 120)  # rows of the table factors
    repeats: int = 2  # noises for each of its contents
    samples: int = 8  # of a content in the tables leakage and diversity
    extractors: str = ""  # stage-1 weights (default: runs/extractors, else data/pretrained)
    checkpoint: str = ""  # generator (default: runs/diffusion, else data/pretrained)
    out: str = "out/benchmark"  # folder that gets results.json and a .md for each table
    start: str = generate.Config.start  # start image: reconstruct (Rec_lr) or degrade
    recipe: str = generate.Config.recipe  # of D, for --start degrade
    t_start: int = generate.Config.t_start  # T, from which generation starts
    num_steps: int = generate.Config.num_steps  # network evaluations of the sampler
    grain: bool = generate.Config.grain  # noise and JPEG as E_deg reads them in the reference
    eta: float = generate.Config.eta  # 0 is DDIM, 1 is DDPM
    solver: str = generate.Config.solver  # ddim or dpm
    candidates: int = generate.Config.candidates  # K, of which the best is kept
    batch_size: int = 8  # images at a time; no draw depends on it
    bf16: bool = generate.Config.bf16  # where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


PRESETS = {name: generate.PRESETS[name] for name in ("fast", "paper")}
TABLES = {
    **{str(number): f"table{number}.md" for number in range(1, 8)},
    "sampling": "sampling.md",
    "factors": "factors.md",
    "extractors": "extractors.md",
    **{name: f"{name}.md" for name in transfer.TABLES},
}


DOWNSTREAM = ("1", "3", "4", "5", "7")  # tables of trained networks


def tables_of(cfg: Config) -> tuple[str, ...]:
    """The tables that are asked for: without a word of them 1 where networks are named, else 2."""
    return tuple(TABLES) if cfg.all else cfg.table or (("1",) if cfg.sr else ("2",))


def resolved(cfg: Config, rt: common.Runtime) -> Config:
    """The settings with the defaults that depend on others and on what is there."""
    tables = tables_of(cfg)
    pairs, data = cfg.pairs, cfg.data
    if set(tables) & set(DOWNSTREAM):
        syndiff = cfg.syndiff or "runs/syndiff/last.pt"
        if "syndiff" in data and not Path(syndiff).is_file():
            common.require(not cfg.syndiff, f"--syndiff {syndiff}: no such file.")
            data = tuple(name for name in data if name != "syndiff")
            if rt.is_main:
                make = "`python diffusion.py --without content degradation --content-from lr"
                print(f"no SynDiff: train its generator by {make} --out runs/syndiff`")
        here = Path(__file__).parent / "data"
        pairs = pairs or tuple(
            str(here / name) for name in ("RealSR", "DRealSR") if (here / name).is_dir()
        )
        if not pairs:
            pairs = (stand_in(Path(cfg.out) / "sample", rt),)
        cfg = dataclasses.replace(cfg, syndiff=syndiff)
    default = "paper" if rt.device.type == "cuda" else "smoke"
    preset = cfg.sr_preset or default
    few = preset == "smoke" and not cfg.sr_steps and set(cfg.sr) - {"fsrcnn"}
    return dataclasses.replace(
        cfg,
        table=tables,
        pairs=pairs,
        data=data,
        sr=cfg.sr or ("swinir-l",),
        sr_preset=preset,
        sr_steps=20 if few else cfg.sr_steps,  # a transformer's minute on a CPU
    )


def stand_in(folder: Path, rt: common.Runtime) -> str:
    """Pairs for a first look where there are none: sample photos, and what D makes of them."""
    if rt.is_main:
        print(
            "no --pairs, no data/RealSR, no data/DRealSR: testing on sample photos degraded by D."
        )
        print("That shows that all works, and nothing else: a real run needs real pairs, and hours")
        print("on a GPU (--sr-preset paper).")
        for i, file in enumerate(
            common.list_images([str(Path(__file__).parent / "data/sample/hr")], "")
        ):
            hr = common.crop_to_multiple(common.load_image(file), generate.SCALE, file)
            theta = degrade.sample_degradation(1, "camera", generator=common.generator(i))
            common.save_image(folder / "HR" / f"sample_{i}.png", hr)
            common.save_image(
                folder / "LR" / f"sample_{i}.png", degrade.degrade(hr[None], theta)[0]
            )
    common.wait_for_all(rt)
    return str(folder)


def check(cfg: Config) -> None:
    """UserError for what is wrong with the flags alone."""
    for flag, names, known in (
        ("--sr", cfg.sr, sr.NETWORKS),
        ("--data", cfg.data, tuple(DATA)),
        ("--sr-preset", (cfg.sr_preset,) if cfg.sr_preset else (), tuple(sr.PRESETS)),
    ):
        for name in names:
            common.require(name in known, f"{flag} {name}: choose among {', '.join(known)}.")
    for flag, path in (
        ("--without-degradation", cfg.without_degradation),
        ("--without-content", cfg.without_content),
    ):
        common.require(not path or Path(path).is_file(), f"{flag} {path}: no such file.")
    for table in cfg.table:
        common.require(table in TABLES, f"--table {table}: choose among {', '.join(TABLES)}.")
    if {"2", "6", "sampling", *transfer.TABLES} & set(tables_of(cfg)):
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
        ("--samples", cfg.samples, 2),
        ("--seeds", cfg.seeds, 1),
        ("--sr-steps", cfg.sr_steps, 0),
        ("--seed", cfg.seed, 0),
    ):
        common.require(low <= value < 2**31, f"{flag} {value}: must be at least {low}.")
    common.require(cfg.crop % 8 == 0, f"--crop {cfg.crop}: must be a multiple of 8.")
    common.require(cfg.start in generate.STARTS, f"--start {cfg.start}: not a start image.")
    given = cfg.extractors
    common.require(not given or Path(given).is_file(), f"--extractors {given}: no such file.")


def main(cfg: Config, rt: common.Runtime) -> None:
    """Check all that can be wrong, then measure, and write whenever a table has grown."""
    began = time.time()
    check(cfg)
    cfg = resolved(cfg, rt)
    used = set(cfg.table)
    if not rt.is_main and not used & set(DOWNSTREAM):  # a matter of minutes for one process
        return
    on_pairs = {
        "2": (table_2, markdown),
        "6": (table_filter, markdown_filter),
        "sampling": (table_sampling, markdown_sampling),
    }
    needed = used & {*on_pairs, *DOWNSTREAM, *transfer.TABLES}
    sets = {f: find_pairs(Path(f)) for f in cfg.pairs} if needed else {}
    names = [Path(folder).resolve().name for folder in sets]
    common.require(len(set(names)) == len(names), "--pairs: two folders have the same name.")
    if used & set(DOWNSTREAM):
        common.find_photos(cfg.hr, "hr", "--hr")
        common.list_images(cfg.lr_ref, "--lr-ref") if cfg.lr_ref else None
    for folder, (pairs, _) in sets.items() if used & {*DOWNSTREAM, *transfer.TABLES} else ():
        common.require(bool(halves(pairs)[1]), f"--pairs {folder}: no camera has two pairs.")
        same = pairs[0].scale == generate.SCALE
        common.require(same, f"--pairs {folder}: its scale is not {generate.SCALE}.")
    if used & set(transfer.TABLES):
        scenes, few = transfer.gather(all_scenes(names, sets.values()), cfg.crop)
    if {"factors", "extractors"} & set(cfg.table):
        files, side = common.find_photos(cfg.hr, "hr", "--hr"), generate.SCALE * cfg.crop
        hr = probes.load_photos(files, side, cfg.images, cfg.seed).to(rt.device)
    if "extractors" in cfg.table:
        real = common.find_photos(cfg.lr, "lr", "--lr")
        devices = probes.device_crops(real, cfg.crop, cfg.images, cfg.seed)
        nets = probes.load_extractors(cfg.extractors, rt.device)
    if used - {"extractors", *DOWNSTREAM}:
        net = generate.load_generator(cfg.checkpoint, rt.device, cfg.grain)
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
            (TABLES[table].replace(".md", ".tex"), latex(text)),
            ("results.json", json.dumps(results, indent=1)),
        ):
            with common.replacing(Path(cfg.out) / name) as temporary:
                temporary.write_text(content, encoding="utf-8")

    for table in [table for table in DOWNSTREAM if table in used]:
        by_name = {name: pairs for name, (pairs, _) in zip(names, sets.values(), strict=True)}
        result = table_downstream(table, by_name, metrics, cfg, rt)
        results.setdefault("downstream", []).append(result)
        if rt.is_main:
            print("\n" + (text := markdown_downstream(result, cfg)))
            write(table, text)
    if not rt.is_main:
        return
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
        sampler = (cfg.num_steps, cfg.start, cfg.eta, cfg.bf16, cfg.grain)
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
    kept = ("start", "recipe", "t_start", "num_steps", "eta", "solver", "candidates", "bf16")
    for table in [table for table in transfer.TABLES if table in used]:
        settings = generate.Config(seed=cfg.seed, **{key: getattr(cfg, key) for key in kept})
        given = (scenes, few, net, settings, cfg.images, cfg.samples, rt.device)
        results[table], text = transfer.measure(table, *given)
        print("\n" + text)
        write(table, text)
    written = [TABLES[table] for table in TABLES if table in cfg.table]
    print(f"written: {', '.join(written)}, .tex of each and results.json in {cfg.out}")


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
