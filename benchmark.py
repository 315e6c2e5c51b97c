"""The results: how close is generated LR to the LR that a real camera took? (Section 3.)

In: folders of aligned pairs which were never trained on (pairs.py).
Out: a table on the screen and in out/benchmark/table2.md; every single value in results.json.
RealDGen answers twice: with the pair's own LR as reference, as in the paper, and with another
photo of the same camera, as in use, where nobody has the LR image that is to be generated.

Tables 1, 3, 4, 5 and 7 ask what the pairs are worth: SR networks are trained on the data of each
method (sr.py), all else equal, and tested on real pairs that gave no reference.

Two tables more look inside, and need HR photos only: does generated LR follow its reference,
one factor at a time (factors), and does E_deg see what E_cont must not see (extractors). Figure 1
of the paper (figure1) needs no more than HR photos, either.
And three ask what it takes over from its reference (transfer, leakage, diversity: transfer.py).

    python benchmark.py --pairs data/RealSR data/DRealSR
    python benchmark.py --pairs data/RealSR --table 2 --candidates 1 --seed 1
    python benchmark.py --pairs data/RealSR --sr swinir-l fsrcnn --seeds 3
    python benchmark.py --table factors extractors --hr data/hr --lr data/lr
    python benchmark.py --table figure1 --hr data/hr --pairs data/RealSR
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
import degrade
import extractors
import generate
from bench import factors, sr, transfer
from bench.downstream import (
    DATA,
    DOWNSTREAM,
    SAMPLER,
    halves,
    markdown_downstream,
    stand_in,
    table_downstream,
)
from bench.figure1 import markdown_figure1, table_figure1
from bench.metrics import (  # noqa: F401  (all are names of benchmark, too)
    METRICS,
    SET_METRICS,
    available_metrics,
    clip_score,
    dists_distance,
    fid,
    kid,
    lpips_distance,
    perceptual_net,
    psnr,
    ssim,
)
from bench.pairs import (
    DECIMALS,
    Method,
    Pair,
    camera_of,
    evaluate,
    find_pairs,
    load_hr,
    load_lr,
    reduced,
    with_other_scenes,
)
from bench.sr import sr_network  # noqa: F401  (a name of benchmark, too)

# ---- the methods: hr (B, 3, H, W) in [0, 1] of some pairs -> lr (B, 3, h, w) --------------------


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
        bank = common.to_uint8(factors.reductions(load_hr(pair)))  # (21, 3, h, w)
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
    lr_ref = [codes[p.index] if codes else load_lr(p.reference, p.shrink) for p in batch]
    seeds = [cfg.seed << 32 | pair.index for pair in batch]
    return generate.chosen(*generate.generate(net, hr, lr_ref, cfg, seeds))


# ---- Table 2 ------------------------------------------------------------------------------------

# The paper's RealDGen on all crops of a benchmark.
PAPER_2 = {
    "RealSR": "PSNR 26.16, SSIM 0.794, LPIPS 0.223, DISTS 0.187, FID 107.24, CLIP-Score 0.824",
    "DRealSR": "PSNR 28.66, SSIM 0.836, LPIPS 0.150, DISTS 0.157, FID 30.01, CLIP-Score 0.858",
}


def table_2(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """All rows for the pairs of one folder: how close is generated LR to the real one? Table 2."""
    cameras = [camera_of(pair.name) for pair in own]
    other = with_other_scenes(own, cfg.seed)
    alone = dataclasses.replace(cfg, t_start=0, start="reconstruct", grain=False)
    rec_lr = functools.partial(realdgen, net=net, cfg=alone)
    diffusion = functools.partial(realdgen, net=net, cfg=cfg)
    codes = mean_codes(own, net)
    rows: list[tuple[str, Method, list[Pair]]] = [
        ("bicubic", bicubic, own),
        ("Real-ESRGAN", functools.partial(synthetic, recipe="realesrgan", seed=cfg.seed), own),
        ("BSRGAN", functools.partial(synthetic, recipe="bsrgan", seed=cfg.seed), own),
        ("RealDGen T=0, own LR", rec_lr, own),
        ("RealDGen T=0, other scene", rec_lr, other),
        ("RealDGen T=0, all other scenes", functools.partial(rec_lr, codes=codes), other),
        ("RealDGen, own LR", diffusion, own),
        ("RealDGen, other scene", diffusion, other),
        ("RealDGen, all other scenes", functools.partial(diffusion, codes=codes), other),
    ]
    if own[0].scale == generate.SCALE:
        one, each = (functools.partial(known, lr=lr) for lr in best_blurs(own))
        rows[3:3] = [("best blur of the set*", one, own), ("best blur of each pair*", each, own)]
    return {
        "cameras": dict(Counter(cameras)),
        "rows": [evaluate(*row, metrics, cfg.batch_size, device) for row in rows],
    }


@torch.no_grad()
def mean_codes(pairs: Sequence[Pair], net: Any) -> dict[int, Tensor]:
    """For each pair (by index) the mean F_deg (D,) of the other LR images of its camera."""
    codes = {p.index: generate.code_of(net, load_lr(p.lr, p.shrink))[0] for p in pairs}
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
    pairs = with_other_scenes(own, cfg.seed)
    pairs = pairs[:: max(1, len(pairs) // cfg.images)][: cfg.images]  # of all cameras
    metrics = [m for m in metrics if m in METRICS]  # too few for sets
    full = {"t_start": FULL, "num_steps": FULL, "eta": 1.0}  # the paper's chain
    rows: list[tuple[str, dict[str, Any]]] = [
        ("Rec_lr alone (T=0)", {"t_start": 0, "grain": False}),
        ("Rec_lr with grain (T=0)", {"t_start": 0}),
    ]
    for T in [t for t in cfg.t_starts if t > 0]:
        rows += [(f"T={T}, ddim, {n}", {"t_start": T, "num_steps": n}) for n in (1, 2, 5, 10)]
        rows += [(f"T={T}, ddpm, {T}", {"t_start": T, "eta": 1.0, "num_steps": T})]
    rows += [
        (
            f"the default, K={K}",
            {"t_start": cfg.t_start, "num_steps": cfg.num_steps, "candidates": K},
        )
        for K in (1, generate.CANDIDATES)
    ]
    rows += [(f"T={FULL}, ddpm, {FULL}, start {start}", full | {"start": start})
             for start in generate.STARTS[:2]]  # fmt: skip
    plain = dataclasses.replace(cfg, candidates=1, eta=0.0, start="reconstruct")
    results = []
    for name, changes in rows:
        method = functools.partial(realdgen, net=net, cfg=dataclasses.replace(plain, **changes))
        results.append(evaluate(name, method, pairs, metrics, cfg.batch_size, device))
    return {"rows": results}


FULL = 300  # steps of the paper's chain


def markdown_sampling(result: dict[str, Any]) -> str:
    """The table of settings of one folder of pairs."""
    name = Path(result["pairs"]).resolve().name
    lines = [f"## {name}: start, solver and number of network evaluations; K=1 unless said", ""]
    return "\n".join(lines + method_rows(result["rows"], METRICS)) + "\n"


def all_scenes(
    names: Iterable[str], sets: Iterable[tuple[list[Pair], int]]
) -> Iterator[tuple[str, str, str, Tensor, Tensor]]:
    """Set, camera, name, HR and LR of each pair, as transfer.py takes them."""
    for name, (pairs, _) in zip(names, sets, strict=True):
        for pair in pairs:
            lr = load_lr(pair.lr, pair.shrink)
            yield name, camera_of(pair.name), pair.name, load_hr(pair), lr


def method_rows(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> list[str]:
    """Lines of a table with a row for each method; a dash where a metric can't be had."""
    columns = list(columns)
    lines = [f"| method | {' | '.join(columns)} | n | images/s |"]
    lines += ["| --- |" + " ---: |" * (len(columns) + 2)]
    for row in rows:
        cells = [f"{row['mean'].get(m, math.nan):z.{DECIMALS.get(m, 3)}f}" for m in columns]
        text = " | ".join(cells).replace("nan", "-")
        rate = row["n"] / max(row["seconds"], 1e-9)
        speed = f"{rate:.3g}" if rate < 1000 else "-"  # made before
        lines += [f"| {row['method']} | {text} | {row['n']} | {speed} |"]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of one folder of pairs, and what one must know to read it."""
    name, n = Path(result["pairs"]).resolve().name, result["rows"][0]["n"]
    lines = [f"## {name}: generated LR against the real LR of {n} pairs", ""]
    lines += method_rows(result["rows"], [*METRICS, *SET_METRICS])
    cameras = ", ".join(f"{camera or 'unnamed'} {k}" for camera, k in result["cameras"].items())
    lines += [
        "",
        "bicubic is Pillow's, of the 8-bit HR image; T=0 is Rec_lr without diffusion and grain; n",
        "is the number of pairs. The LR reference is the pair's own LR, another scene of the same",
        f"camera ({cameras}), or the mean code of all of them.",
        "* A Gaussian chosen by looking at the real LR: what blur alone can do.",
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
        row = line.split("|")[1:-1] if line.startswith("|") else []
        cells = [re.sub(r"([%_&#])", r"\\\1", cell.strip()) for cell in row]
        cells = [re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", cell) for cell in cells]
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


# ---- Table 6: the filter -------------------------------------------------------------------------


def table_filter(
    own: list[Pair], net: Any, metrics: list[str], cfg: "Config", device: torch.device
) -> dict[str, Any]:
    """Generated LR with and without the filter, other scenes as references. Table 6."""
    pairs = with_other_scenes(own, cfg.seed)
    rows = []
    for K in (1, max(cfg.candidates, generate.CANDIDATES)):
        name = "without filter" if K == 1 else f"with filter, K={K}"
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
class Config(generate.Sampler):
    """Settings of the command; every field is a flag."""

    pairs: tuple[str, ...] = ()  # folders: HR/ and LR/ of the same names, or as published
    table: tuple[str, ...] = ()  # 1-7, sampling, factors, extractors, figure1, transfer, leakage...
    all: bool = False  # all tables
    sr: tuple[str, ...] = ()  # networks to train: swinir, swinir-l, rrdb, hat, fsrcnn
    data: tuple[str, ...] = tuple(DATA)  # what they are trained on
    sr_preset: str = ""  # of sr.py: paper, small, smoke (default: paper on a GPU, else smoke)
    sr_steps: int = 0  # of training, in place of the preset's
    sr_start_from: tuple[str, ...] = ()  # networks of sr.py to train on from, the same for all data
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
    blurs: tuple[float, ...] = (0.3, 0.7, 1.1)  # figure1: of the training sets, LR pixels
    noises: tuple[float, ...] = (0.0, 6.0, 12.0)  # figure1: of the training sets, levels of 255
    extractors: str = ""  # stage-1 weights (default: runs/extractors, else data/pretrained)
    checkpoint: str = ""  # generator (default: runs/diffusion, else data/pretrained)
    out: str = "out/benchmark"  # folder that gets results.json and a .md for each table
    batch_size: int = 8  # images at a time; no draw depends on it
    bf16: bool = True  # of the SR networks, where the device has it
    seed: int = 0  # image i draws from (seed, i)
    device: str = "auto"  # cpu, cuda or auto


DEFAULT_SR = ("swinir-l",)
PRESETS = {name: generate.PRESETS[name] for name in ("fast", "paper")}
TABLES = {
    **{str(number): f"table{number}.md" for number in range(1, 8)},
    "sampling": "sampling.md",
    "factors": "factors.md",
    "extractors": "extractors.md",
    "figure1": "figure1.md",
    **{name: f"{name}.md" for name in transfer.TABLES},
}


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
                make = "`python diffusion.py --without content degradation"
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
    networks = cfg.sr or DEFAULT_SR
    few = preset == "smoke" and not cfg.sr_steps and set(networks) - {"fsrcnn"}
    return dataclasses.replace(
        cfg,
        table=tables,
        pairs=pairs,
        data=data,
        sr=networks,
        sr_preset=preset,
        sr_steps=20 if few else cfg.sr_steps,  # a transformer's minute on a CPU
    )


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
        *(("--sr-start-from", path) for path in cfg.sr_start_from),
    ):
        common.require(not path or Path(path).is_file(), f"{flag} {path}: no such file.")
    for path in cfg.sr_start_from:
        kind, named = sr.read_network(path)["config"]["sr"], cfg.sr or DEFAULT_SR
        wrong = f"--sr-start-from {path}: a {kind}, which --sr does not name."
        common.require(kind in named, wrong)
    for table in cfg.table:
        common.require(table in TABLES, f"--table {table}: choose among {', '.join(TABLES)}.")
    if {"2", "6", "sampling", *transfer.TABLES} & set(tables_of(cfg)):
        example = "name folders of pairs, as in `python benchmark.py --pairs data/RealSR`"
        common.require(bool(cfg.pairs), f"--pairs is missing: {example}.")
    for flag, value, low in (
        ("--t-start", cfg.t_start, 0),
        ("--t-starts", min(cfg.t_starts), 0),
        ("--blurs", min(cfg.blurs), 0),
        ("--noises", min(cfg.noises), 0),
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
    sampler = {key: getattr(cfg, key) for key in SAMPLER}
    generate.check(generate.Config(**sampler))
    weight = cfg.perceptual_weight
    common.require(weight >= 0, f"--perceptual-weight {weight}: must be at least 0.")
    given = cfg.extractors
    common.require(not given or Path(given).is_file(), f"--extractors {given}: no such file.")


def check_weights(cfg: Config) -> None:
    """UserError for generators that the tables would ask for in vain, after hours perhaps."""
    used, cpu = set(cfg.table), torch.device("cpu")
    if not used - {"extractors"}:
        return
    ts = [cfg.t_start, *(cfg.t_starts if used & {"3", "factors", "sampling"} else ())]
    ts += [FULL] * bool(used & {"4", "sampling"})
    known = generate.load_generator(cfg.checkpoint, cpu, cfg.grain).t_max
    common.require(max(ts) <= known, f"T = {max(ts)}: the weights know {known} steps.")
    downstream = bool(used & set(DOWNSTREAM))
    for path in (
        cfg.syndiff if downstream and "syndiff" in cfg.data else "",
        *((cfg.without_degradation, cfg.without_content) if "4" in used else ()),
    ):
        if path:
            generate.load_generator(path, cpu)


def main(cfg: Config, rt: common.Runtime) -> None:
    """Check all that can be wrong, then measure, and write whenever a table has grown."""
    began = time.time()
    check(cfg)
    asked, cfg = cfg, resolved(cfg, rt)
    used = set(cfg.table)
    if not rt.is_main and not used & {*DOWNSTREAM, "figure1"}:  # minutes for one process
        return
    on_pairs = {
        "2": (table_2, markdown),
        "6": (table_filter, markdown_filter),
        "sampling": (table_sampling, markdown_sampling),
    }
    needed = used & {*on_pairs, *DOWNSTREAM, *transfer.TABLES, "figure1"}
    sets = {f: find_pairs(Path(f)) for f in cfg.pairs} if needed else {}
    names = [Path(folder).resolve().name for folder in sets]
    common.require(len(set(names)) == len(names), "--pairs: two folders have the same name.")
    if used & set(DOWNSTREAM):
        common.find_photos(cfg.hr, "hr", "--hr")
        common.list_images(cfg.lr_ref, "--lr-ref") if cfg.lr_ref else None
    split = {*DOWNSTREAM, *transfer.TABLES, "figure1"}
    for folder, (pairs, _) in sets.items() if used & split else ():
        common.require(bool(halves(pairs)[1]), f"--pairs {folder}: no camera has two pairs.")
        same = pairs[0].scale == generate.SCALE
        common.require(same, f"--pairs {folder}: its scale is not {generate.SCALE}.")
    if used & set(transfer.TABLES):
        scenes, few = transfer.gather(all_scenes(names, sets.values()), cfg.crop)
    if {"factors", "extractors", "figure1"} & set(cfg.table):
        files, side = common.find_photos(cfg.hr, "hr", "--hr"), generate.SCALE * cfg.crop
        hr = factors.load_photos(files, side, cfg.images, cfg.seed).to(rt.device)
    alone = "extractors" in used or ("figure1" in used and not sets)  # real LR without its HR
    real = common.find_photos(cfg.lr, "lr", "--lr") if alone else []
    if "extractors" in cfg.table:
        devices = factors.device_crops(real, cfg.crop, cfg.images, cfg.seed)
        nets = factors.load_extractors(cfg.extractors, rt.device)
    if used - {"extractors", *DOWNSTREAM}:
        net = generate.load_generator(cfg.checkpoint, rt.device, cfg.grain)
    check_weights(cfg)
    if cfg.perceptual_weight > 0 and "1" in used:
        perceptual_net("LPIPS", "vgg", rt.device)  # fails early where weights are missing
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

    by_name = {name: pairs for name, (pairs, _) in zip(names, sets.values(), strict=True)}
    for table in [table for table in DOWNSTREAM if table in used]:
        result = table_downstream(table, by_name, metrics, cfg, rt)
        results.setdefault("downstream", []).append(result)
        if rt.is_main:
            print("\n" + (text := markdown_downstream(result, cfg)))
            write(table, text)
    if "figure1" in used:
        methods: dict[str, Method] = {
            "bicubic": bicubic,
            "BSRGAN": functools.partial(synthetic, recipe="bsrgan", seed=cfg.seed),
            "Real-ESRGAN": functools.partial(synthetic, recipe="realesrgan", seed=cfg.seed),
            "RealDGen": functools.partial(realdgen, net=net, cfg=cfg),
        }
        own = dataclasses.replace(cfg, sr_steps=asked.sr_steps)
        code = functools.partial(generate.code_of, net)
        results["figure1"] = table_figure1(hr.cpu(), by_name, real, methods, code, own, rt)
        if rt.is_main:
            print("\n" + (text := markdown_figure1(results["figure1"])))
            write("figure1", text)
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
        given = (hr, net, cfg.t_starts, cfg.repeats, cfg, cfg.seed)
        results["factors"] = factors.table_factors(*given)
        print("\n" + (text := factors.markdown_factors(results["factors"])))
        write("factors", text)
    if "extractors" in cfg.table:
        found = factors.table_extractors(hr, devices, nets, cfg.batch_size, cfg.seed)
        results["extractors"] = found
        print("\n" + (text := factors.markdown_extractors(found)))
        write("extractors", text)
    for table in [table for table in transfer.TABLES if table in used]:
        settings = generate.Config(seed=cfg.seed, **{key: getattr(cfg, key) for key in SAMPLER})
        given = (scenes, few, net, settings, cfg.images, cfg.samples, rt.device)
        results[table], text = transfer.measure(table, *given)
        print("\n" + text)
        write(table, text)
    written = [TABLES[table] for table in TABLES if table in cfg.table]
    print(f"written: {', '.join(written)}, .tex of each and results.json in {cfg.out}")


if __name__ == "__main__":
    common.launch(main, Config, PRESETS, __doc__)
