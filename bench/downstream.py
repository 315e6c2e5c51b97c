"""What are the pairs worth? SR networks trained on each method's data, tested on real LR.

In: real pairs, half of which give references and half of which are tested; HR photos to make
training pairs from. Out: Tables 1, 3, 4, 5 and 7 (Sections 3.1 to 3.4), which benchmark.py prints.
All else is equal: network, steps and seeds of sr.py, and generate.py makes RealDGen's pairs.

    python benchmark.py --pairs data/RealSR --sr swinir-l fsrcnn --seeds 3
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
import degrade
import generate
from bench import sr
from bench.pairs import DECIMALS, Pair, camera_of, evaluate, load_hr, load_lr, reduced

Settings = Any  # benchmark.Config, which is to the right of this file

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
# Flags of generate.py that benchmark.py has, too.
SAMPLER = tuple(field.name for field in dataclasses.fields(generate.Sampler))
DOWNSTREAM = ("1", "3", "4", "5", "7")  # tables of trained networks
MEMORY = {"cuda": "most that torch had allocated", "cpu": "peak RSS of the whole process"}
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


def downstream_rows(table: str, names: list[str], cfg: Settings) -> list[Row]:
    """The rows of a table; names are those of the sets of pairs."""
    filtered = {"candidates": max(cfg.candidates, generate.CANDIDATES)}
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
        return [Row(f"T={t}", light, "realdgen", {"t_start": t}) for t in cfg.t_starts]
    if table == "4":
        # Rec_lr's answer and grain would bring in what an ablation is to do without.
        noised = {"t_start": max(cfg.t_start, 300), "num_steps": max(cfg.num_steps, 10)}
        plain = {"start": "realesrgan", "grain": False} | noised
        ablations = (("E_deg", cfg.without_degradation), ("E_cont", cfg.without_content))
        rows = [
            Row(f"without {name}", light, "realdgen", plain | {"checkpoint": path})
            for name, path in ablations
            if path
        ]
        return [*rows, Row("RealDGen", light, "realdgen", plain)]
    if table == "5":
        kept = [Row(DATA[data][0], light, data) for data in cfg.data if data != "paired"]
        apart = [
            Row(f"RealDGen, no reference of {name}", light, "realdgen", without=name)
            for name in names
            if len(names) > 1 and not cfg.lr_ref
        ]
        return kept + apart
    return [  # Table 7
        Row("without filter", light, "realdgen", {"candidates": 1}),
        Row("with filter", light, "realdgen", filtered),
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


def key_of(sets: dict[str, list[Pair]], cfg: Settings) -> str:
    """Eight digits for all that pairs and networks depend on, but for their own names.

    What an earlier run has made is taken up where they are the same, and nowhere else.
    """
    generator = common.find_checkpoint(cfg.checkpoint, "diffusion", "python diffusion.py")
    others = (cfg.syndiff, cfg.without_degradation, cfg.without_content, *cfg.sr_start_from)
    facts = {key: getattr(cfg, key) for key in (*SAMPLER, "lr_ref", "seed", "sr_preset", "sr_steps",
                                               "perceptual_weight")}  # fmt: skip
    facts["sets"] = {name: [pair.name for pair in pairs] for name, pairs in sets.items()}
    facts["hr"] = [str(file) for file in common.find_photos(cfg.hr, "hr", "--hr")]
    facts["weights"] = [common.fingerprint(f) for f in (generator, *others) if Path(f).is_file()]
    return f"{zlib.crc32(json.dumps(facts).encode()):08x}"


def training_source(row: Row, names: list[str], cfg: Settings, rt: common.Runtime) -> dict:
    """Flags of sr.py for a row's training pairs, which are generated if they are not there yet."""
    out, recipe = Path(cfg.out), DATA[row.data][1]
    if recipe:
        return {"recipe": recipe, "hr": tuple(map(str, common.find_photos(cfg.hr, "hr", "--hr")))}
    if row.data == "paired":
        return {"pairs": str(out / "paired")}
    settings = {key: getattr(cfg, key) for key in ("checkpoint", *SAMPLER)} | row.settings
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


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """What a block costs, once it has ended: seconds, and the peak of memory in bytes.

    On a GPU this is what torch had allocated; on a CPU the resident memory of the whole process,
    since the block began where the system can forget an earlier peak (Linux), else since its start.
    """
    cost: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    began = time.time()
    yield cost
    cost["seconds"] = time.time() - began
    if device.type == "cuda":
        cost["memory"] = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        cost["memory"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def training_data(row: Row, names: list[str], cfg: Settings, rt: common.Runtime) -> tuple:
    """Flags of sr.py for a row's training pairs, and what it cost to generate them, if any were."""
    with measured(rt.device) as cost:
        source = training_source(row, names, cfg, rt)
    folder = source.get("pairs", "")
    if not folder or row.data == "paired":  # a recipe is drawn while training
        return source, {}
    checkpoint = cfg.syndiff if row.data == "syndiff" else row.settings.get("checkpoint")
    net = generate.load_generator(checkpoint or cfg.checkpoint, torch.device("cpu"))
    count = {"parameters": parameters_of(net), "pairs": len(list(Path(folder, "lr").iterdir()))}
    return source, cost | count


def parameters_of(net: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(p.numel() for p in net.parameters())


def train_network(
    network: str,
    source: dict[str, Any],
    name: str,
    seed: int,
    cfg: Settings,
    rt: common.Runtime,
    perceptual_weight: float = 0.0,
) -> tuple[nn.Module, dict[str, float]]:
    """A network of sr.py, trained with the preset of the tables, and what that cost.

    source: flags of sr.py that name the training pairs; name: of the files in out/sr.
    """
    steps = {"steps": cfg.sr_steps} if cfg.sr_steps else {}
    settings = sr.PRESETS[cfg.sr_preset] | {"save_every": 500} | steps
    settings |= {"sr": network, "perceptual_weight": perceptual_weight, "seed": seed}
    settings |= {"out": f"{cfg.out}/sr", "name": name, "device": cfg.device} | source
    begun = {sr.read_network(path)["config"]["sr"]: path for path in cfg.sr_start_from}
    settings["start_from"] = begun.get(network, "")
    with measured(rt.device) as cost:
        net = sr.load_network(sr.train(sr.Config(**settings), rt)).to(rt.device)
    return net, cost | {"parameters": parameters_of(net)}


def train_and_test(
    row: Row,
    tests: dict[str, list[Pair]],
    metrics: list[str],
    cfg: Settings,
    rt: common.Runtime,
) -> dict[str, Any]:
    """A row's values on each set, one for each seed; what it cost."""
    source, generation = training_data(row, [*tests], cfg, rt)
    result: dict[str, Any] = {"generation": generation, "training": [], "sets": {}}
    weight = cfg.perceptual_weight if row.perceptual else 0.0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        kind = ["perceptual"] if row.perceptual else []
        data = Path(source.get("pairs", row.data)).name
        name = "-".join([row.network, data, *kind, str(seed)])
        net, cost = train_network(row.network, source, name, seed, cfg, rt, weight)
        result["training"].append(cost)
        method = functools.partial(super_resolved, net=net, bf16=cfg.bf16)
        for test, pairs in tests.items() if rt.is_main else ():
            given = (f"{row.network}, {row.label}", method, pairs, metrics, 1, rt.device, True)
            result["sets"].setdefault(test, []).append(evaluate(*given))
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
    cfg: Settings,
    rt: common.Runtime,
) -> dict[str, Any]:
    """All rows of Table 1, 3, 4, 5 or 7, and bicubic enlargement, which needs no network."""
    cfg = dataclasses.replace(cfg, out=str(Path(cfg.out) / "sets" / key_of(sets, cfg)))
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
    tested = {name: len(pairs) for name, pairs in tests.items()}
    return {"table": table, "rows": rows, "tested": tested, "memory": MEMORY[rt.device.type]}


def label_of(row: dict[str, Any]) -> str:
    """What a row is called: its data and, where it is not L1, its loss."""
    return row["label"] + (", perceptual" if row.get("perceptual") else "")


def cost_cells(costs: Sequence[dict[str, float]], keys: Sequence[str]) -> list[str]:
    """The mean of several costs as cells of a table; dashes where there are none."""
    units = {"parameters": (1e6, ".2f", " M"), "memory": (2**20, ".0f", " MiB")}
    cells = []
    for key in keys if costs else ():
        unit, digits, name = units.get(key, (1, ".0f", ""))
        cells.append(f"{np.mean([cost[key] for cost in costs]) / unit:{digits}}{name}")
    return cells or ["-"] * len(keys)


def cost_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a table of what each network, and the generation of its pairs, cost."""
    heads = ("parameters", "training s", "memory", "generator", "pairs", "generation s", "memory")
    lines = [f"| network | trained on | {' | '.join(heads)} |"]
    lines += ["| --- | --- |" + " ---: |" * len(heads)]
    for row in rows:
        made = [row["generation"]] if row["generation"] else []
        cells = cost_cells(row["training"], ("parameters", "seconds", "memory"))
        cells += cost_cells(made, ("parameters", "pairs", "seconds", "memory"))
        lines += [f"| {row['network']} | {label_of(row)} | {' | '.join(cells)} |"]
    return lines


def markdown_downstream(result: dict[str, Any], cfg: Settings) -> str:
    """A table of SR networks: mean over the seeds, +- their standard deviation, [the paper]."""
    names, table = [*result["tested"]], result["table"]
    columns = [(name, metric) for name in names for metric in SR_COLUMNS]
    lines = [f"## Table {table}: networks trained on each data, on real LR", ""]
    heads = " | ".join(f"{name} {metric}" for name, metric in columns)
    lines += [f"| network | trained on | {heads} |"]
    lines += ["| --- | --- |" + " ---: |" * len(columns)]
    for row in result["rows"]:
        cells = []
        for name, metric in columns:
            values = [run["mean"].get(metric, math.nan) for run in row["sets"][name]]
            text = f"{np.mean(values):z.{DECIMALS.get(metric, 3)}f}"
            text += f" ± {np.std(values):.{DECIMALS.get(metric, 3)}f}" if len(values) > 1 else ""
            text = text if "nan" not in text else "-"
            known = (row["network"], row["data"], row.get("perceptual", False), name, metric)
            cells.append(text + (paper_value(*known) if table == "1" else ""))
        lines += [f"| {row['network']} | {label_of(row)} | {' | '.join(cells)} |"]
    tested = ", ".join(f"{name} {n}" for name, n in result["tested"].items())
    lines += [
        "",
        f"Preset {cfg.sr_preset}, {cfg.sr_steps or 'its'} steps, {cfg.seeds} seeds.",
        *(f"Trained on from {path}." for path in cfg.sr_start_from),
        f"Tested on every other pair of each camera ({tested}); the oracle was trained on the",
        f"others, {'and --lr-ref' if cfg.lr_ref else 'whose LR'} were RealDGen's references. In",
        "brackets: the paper, on all pairs.",
        "",
        *cost_rows(result["rows"][1:]),
        "",
        f"Memory: {result['memory']}. Of several seeds the mean. A recipe of D is drawn",
        "while training. What an earlier run had made took no time in this one.",
    ]
    return "\n".join(lines) + "\n"


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
