"""What are the pairs worth? SR networks trained on each method's data, tested on real LR.

In: real pairs, of which some give references and the others are tested; HR photos to make training
pairs from. Out: Tables 1, 3, 4, 5 and 7 (Sections 3.1 to 3.4). All else is equal: network, steps
and seeds of bench.sr. Pairs and networks of an earlier run are reused if no input changed.

    python benchmark.py --sr swinir-l fsrcnn --seeds 3 --pairs data/RealSR
    python benchmark.py --table 3 5 7 --t-starts 200 500 --num-steps 10 --pairs data/RealSR
"""

import contextlib
import json
import re
import resource
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import diffusion
import generate
from bench import sr
from bench.generated import MAKE_PRINTED, OTHER_WEIGHTS, left_out_text
from bench.inputs import AS_PRINTED, SOURCES, SYNDIFF, Config, Inputs, Measure
from bench.metrics import DECIMALS, perceptual_net
from bench.pairs import Pair, camera_of, evaluate, load_lr, table_text
from common import UserError, require
from common.checkpoint import find_checkpoint, fingerprint, load_checkpoint
from common.files import copy_file
from common.images import save_image
from common.runtime import wait_for_all

# ---- rows ---------------------------------------------------------------------------------------

LABELS = ("bicubic", "BSRGAN", "Real-ESRGAN", "SynDiff", "RealDGen", "real pairs (oracle)")
LABEL = dict(zip(SOURCES, LABELS, strict=True))
DRAWN_IN_TRAINING = ("bicubic", "bsrgan", "realesrgan")  # recipes of degrade.py
# Table 4: weights, and the command that makes them.
ABLATIONS = {
    label: (path, f"{MAKE_PRINTED} {flag}--out {path.parent}")
    for label, path, flag in (
        ("without E_deg", Path("runs/no_degradation/last.pt"), "--without degradation "),
        ("without E_cont", Path("runs/no_content/last.pt"), "--without content "),
        ("frozen extractors (A.5)", Path("runs/frozen/last.pt"), "--finetune-learning-rate 0 "),
        ("RealDGen", AS_PRINTED, ""),
    )
}
PAPER_T = (200, 300, 400, 500)  # Table 3
EVALUATIONS = 10  # at least so many from such a T, where not every step is evaluated
LEAST_STEPS = 1000  # a network that starts from nothing and has fewer shows nothing of its data


@dataclass(frozen=True)
class Row:
    """One line of a table: a network, and the data that it is trained on."""

    label: str
    network: str
    data: str  # of SOURCES
    settings: dict[str, Any] = field(default_factory=dict)  # of generate.py
    perceptual: bool = False
    without: str = ""  # name of a set whose references are left out


PAPER = generate.PRESETS["paper"]


def evaluations(t_start: int, cfg: Config) -> int:
    """Network evaluations from a T of the paper: of each step if --num-steps is the paper's."""
    return t_start if cfg.num_steps >= PAPER["num_steps"] else max(cfg.num_steps, EVALUATIONS)


def rows_of(table: str, cfg: Config, sets: Sequence[str]) -> list[Row]:
    """The rows of a table."""
    network = cfg.sr[-1]  # one is enough for an ablation
    if table == "1":
        return [
            Row(LABEL[data], name, data, {}, perceptual)
            for perceptual in ([False, True] if cfg.perceptual_weight > 0 else [False])
            for name in cfg.sr
            for data in cfg.data
        ]
    if table == "3":
        return [
            Row(f"T={t}", network, "realdgen", {"t_start": t, "num_steps": evaluations(t, cfg)})
            for t in cfg.t_starts or PAPER_T
        ]
    if table == "4":
        # All rows start at D(HR), and all weights are as printed: the output of Rec_lr, grain and
        # the filter would give an ablation what it must do without.
        T = PAPER["t_start"]
        plain = PAPER | {"candidates": 1, "num_steps": evaluations(T, cfg)}
        return [
            Row(label, network, "realdgen", plain | {"checkpoint": str(path)})
            for label, (path, _) in ABLATIONS.items()
        ]
    if table == "5":
        return [Row(LABEL[data], network, data) for data in cfg.data if data != "paired"] + [
            Row(f"RealDGen, no reference of {name}", network, "realdgen", without=name)
            for name in sets
            if len(sets) > 1
        ]
    K = max(cfg.candidates, generate.CANDIDATES)
    return [
        Row(label, network, "realdgen", {"candidates": candidates})
        for label, candidates in (("without filter", 1), ("with filter", K))
    ]


# ---- training pairs -----------------------------------------------------------------------------


def write_references(train: dict[str, list[Pair]], out: Path) -> None:
    """Write the pairs that are not tested: references/SET/CAMERA/, paired/{hr,lr}/.

    They are hard links; LR of the size of HR is reduced.
    """
    for name, pairs in train.items():
        for pair in pairs:
            stem = pair.name.replace("/", "_")
            targets = {
                out / "paired/hr" / f"{name}_{stem}": pair.hr,
                out / "paired/lr" / f"{name}_{stem}": pair.lr,
                out / "references" / name / (camera_of(pair.name) or "camera") / stem: pair.lr,
            }
            for target, file in targets.items():
                reduced = pair.full and file == pair.lr
                path = target.with_name(target.name + (".png" if reduced else file.suffix))
                if reduced and not path.is_file():
                    save_image(path, load_lr(file, full=True))
                elif not path.is_file():
                    copy_file(file, path)


def folder_of(inputs: Inputs) -> Path:
    """The folder of training pairs and networks; its name depends on all that they depend on.

    Of photos and weights the content counts, not the path.
    """
    cfg = inputs.cfg
    weights = (cfg.checkpoint or find_checkpoint("", "diffusion", ""), SYNDIFF,
               *(path for path, _ in ABLATIONS.values()), *cfg.sr_start_from)  # fmt: skip
    facts = asdict(inputs.sampler)
    facts["sets"] = {
        name: [(pair.name, fingerprint(pair.hr), fingerprint(pair.lr)) for pair in pairs]
        for name, pairs in inputs.train.items()
    }
    facts["hr"] = [fingerprint(file) for file in inputs.hr_files]
    facts["weights"] = [fingerprint(path) for path in weights if Path(path).is_file()]
    facts |= {key: getattr(cfg, key) for key in ("seed", "sr_preset", "perceptual_weight")}
    return Path(cfg.out) / "sets" / key_of(facts)


def folder_with_references(inputs: Inputs) -> Path:
    """The same folder, once write_references() has filled it."""
    folder = folder_of(inputs)
    if inputs.rt.is_main:
        write_references(inputs.train, folder)
    wait_for_all(inputs.rt)
    return folder


def key_of(facts: dict[str, Any]) -> str:
    """The name of a folder whose content depends on these facts."""
    return f"{zlib.crc32(json.dumps(facts).encode()):08x}"


def make_pairs(folder: Path, inputs: Inputs, **settings: Any) -> None:
    """Generate pairs of the HR photos by the flags, and by settings of generate.py beside them."""
    cfg = inputs.cfg
    of_flags = asdict(inputs.sampler) | {"checkpoint": cfg.checkpoint, "hr": cfg.hr}
    of_flags |= {"seed": cfg.seed, "device": cfg.device, "out": str(folder)}
    generate.main(generate.Config(**of_flags | settings), inputs.rt)
    wait_for_all(inputs.rt)


def training_source(row: Row, out: Path, inputs: Inputs) -> dict[str, Any]:
    """Flags of bench.sr for a row's training pairs, which are generated if they are missing."""
    if row.data in DRAWN_IN_TRAINING:
        return {"recipe": row.data, "hr": tuple(map(str, inputs.hr_files))}
    if row.data == "paired":
        return {"pairs": str(out / "paired")}
    settings = row.settings
    if row.data == "syndiff":
        settings = generate.PRESETS["syndiff"] | {"checkpoint": str(SYNDIFF)}
    words = [row.data, *(f"{key}-{value}" for key, value in row.settings.items())]
    name = "_".join([*words, *filter(None, [row.without])])
    folder = out / "pairs" / re.sub(r"[^\w.-]", "-", name)
    lr_ref = tuple(str(out / "references" / s) for s in inputs.sets if s != row.without)
    make_pairs(folder, inputs, lr_ref=lr_ref, **settings)
    return {"pairs": str(folder)}


# ---- training and test --------------------------------------------------------------------------

MEMORY = {"cuda": "most that torch had allocated", "cpu": "peak RSS of the whole process"}


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """What a block costs: seconds, and the peak of memory in bytes. The dict is filled at its end.

    On a GPU the memory is what torch had allocated. On a CPU it is the resident memory of the whole
    process: its peak since the block began on Linux, which can forget an earlier one, and its peak
    since the process began on other systems.
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


def steps_of(network: str, cfg: Config) -> int:
    """Training steps of a network: the flag, else the preset's; fewer for transformers in smoke."""
    if cfg.sr_preset == "smoke" and network != "fsrcnn":
        return cfg.sr_steps or 20  # they take a transformer about a minute
    return cfg.sr_steps or sr.PRESETS[cfg.sr_preset].get("steps", sr.Config.steps)


def starts_of(cfg: Config) -> dict[str, str]:
    """The files of --sr-start-from, by the network in each."""
    return {sr.read_network(path)["config"]["sr"]: path for path in cfg.sr_start_from}


def meaningless(network: str, cfg: Config) -> str:
    """A sentence about a network that is trained too little; else empty."""
    steps = steps_of(network, cfg)
    if steps >= LEAST_STEPS or network in starts_of(cfg):
        return ""
    return (f"With {steps} steps the figures of {network} mean nothing. On a CPU give --sr fsrcnn "
            "--sr-steps 2000, on a GPU --sr-preset paper.\n")  # fmt: skip


def train_network(
    network: str, flags: dict[str, Any], name: str, seed: int, out: Path, inputs: Inputs
) -> tuple[nn.Module, dict[str, float]]:
    """A network of bench.sr, trained with the preset of the tables, and what the training cost.

    flags: of bench.sr, which name the training pairs; name: for the file names in out/sr.
    """
    cfg = inputs.cfg
    steps = steps_of(network, cfg)
    settings = sr.PRESETS[cfg.sr_preset] | {
        "sr": network, "steps": steps, "save_every": max(500, steps // 10), "seed": seed,
        "log_every": min(100, max(1, steps // 20)),
        "out": str(out / "sr"), "name": f"{network}-{name}-{seed}-{steps}", "device": cfg.device,
        "start_from": starts_of(cfg).get(network, ""),
    }  # fmt: skip
    with measured(inputs.device) as cost:
        file = sr.train(sr.Config(**settings | flags), inputs.rt)
    net = sr.load_network(file).to(inputs.device)
    return net, cost | {"parameters": sum(p.numel() for p in net.parameters())}


def tested(
    net: nn.Module | None, sets: dict[str, list[Pair]], metrics: Sequence[str], inputs: Inputs
) -> dict[str, Any]:
    """A network's distances to the HR of each set; empty on all processes but the first.

    Without a network LR is enlarged bicubically.
    """
    return {
        name: evaluate(sr.enlarging(net), pairs, metrics, inputs.device, upwards=True)
        for name, pairs in (sets if inputs.rt.is_main else {}).items()
    }


def train_and_test(
    network: str, flags: dict[str, Any], name: str, out: Path, inputs: Inputs, metrics: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """For each seed what tested() finds on the test pairs ("runs"), and the cost ("training")."""
    result: dict[str, list[dict[str, Any]]] = {"training": [], "runs": []}
    for seed in range(inputs.cfg.seed, inputs.cfg.seed + inputs.cfg.seeds):
        net, cost = train_network(network, flags, name, seed, out, inputs)
        result["training"].append(cost)
        result["runs"].append(tested(net, inputs.tests, metrics, inputs))
    return result


def values_of(row: Row, out: Path, inputs: Inputs) -> dict[str, Any]:
    """A row with its values on each set for each seed, and what generation and training cost."""
    with measured(inputs.device) as cost:
        flags = training_source(row, out, inputs)
    name = Path(flags.get("pairs", row.data)).name + "-perceptual" * row.perceptual
    flags |= {"perceptual_weight": inputs.cfg.perceptual_weight * row.perceptual}
    found = train_and_test(row.network, flags, name, out, inputs, inputs.metrics)
    generated = row.data in ("realdgen", "syndiff")
    return asdict(row) | {"generation": cost if generated else {}} | found


def check_training(inputs: Inputs, networks: Sequence[str], count: int, table: str) -> None:
    """Say what will be trained; UserError for a wrong flag. count: of trainings of each network."""
    cfg = inputs.cfg
    for path in cfg.sr_start_from:
        require(Path(path).is_file(), f"--sr-start-from {path}: no such file.")
    for network, path in starts_of(cfg).items():
        wrong = f"--sr-start-from {path}: a {network}, which --sr does not name."
        require(network in cfg.sr, wrong)
    if inputs.rt.is_main:
        steps = ", ".join(f"{name} {steps_of(name, cfg)} steps" for name in networks)
        print(f"{table}: trainings of each network: {count} ({steps}), unless an earlier run has "
              "done them. Each says after its first steps how long it takes.")  # fmt: skip
        print("".join(meaningless(name, cfg) for name in networks), end="")


def check_ablations() -> None:
    """UserError unless the weights of Table 4 are as printed and differ in nothing but that."""
    states = {path: load_checkpoint(path) for path, _ in ABLATIONS.values()}
    for path, state in states.items():
        net = diffusion.load(state, str(path))
        wrong = f"table 4: {path} is not as printed: train it with --preset as-printed."
        require(net.as_printed and net.extractors.as_printed, wrong)
    free = {*diffusion.Config.MAY_CHANGE, "without", "finetune_learning_rate"} - {"steps"}
    full = states[AS_PRINTED]["config"]
    for path, state in states.items():
        keys = sorted(k for k in full if k not in free and state["config"].get(k) != full[k])
        wrong = f"table 4: {path} and {AS_PRINTED} were trained with different {', '.join(keys)}."
        require(not keys, f"{wrong[:-1]}: train both alike.")


def table_downstream(table: str, inputs: Inputs) -> Measure:
    """Table 1, 3, 4, 5 or 7; its first row is bicubic enlargement, without a network."""
    cfg = inputs.cfg
    rows = rows_of(table, cfg, [*inputs.sets])
    networks = list(dict.fromkeys(row.network for row in rows))
    check_training(inputs, networks, cfg.seeds * len(rows) // len(networks), f"table {table}")
    if any(row.perceptual for row in rows):
        try:
            perceptual_net("LPIPS", "vgg", inputs.device)
        except UserError as error:
            raise UserError(f"{error} Or train with L1 alone: --perceptual-weight 0.") from None
    made_by = {SYNDIFF: OTHER_WEIGHTS["SynDiff"][1]} if "syndiff" in {r.data for r in rows} else {}
    if table == "4":
        made_by |= {AS_PRINTED: OTHER_WEIGHTS["RealDGen as printed"][1]}  # with stage 1
        made_by |= {path: make for path, make in ABLATIONS.values() if path != AS_PRINTED}
    for path, make in made_by.items():
        require(path.is_file(), f"table {table}: {path} is missing: make it by `{make}`.")
    if table == "4":
        check_ablations()
    inputs.check_steps(*(row.settings.get("t_start", 0) for row in rows))
    assert inputs.tests and inputs.hr_files is not None and inputs.metrics  # found and checked now

    def measure() -> tuple[dict[str, Any], str]:
        out = folder_with_references(inputs)
        bicubic = asdict(Row("bicubic enlargement", "none", ""))
        results = [bicubic | {"runs": [tested(None, inputs.tests, inputs.metrics, inputs)]}]
        results += [values_of(row, out, inputs) for row in rows]
        counts = {name: len(pairs) for name, pairs in inputs.tests.items()}
        result = {"table": table, "rows": results, "tested": counts}
        return result, text_of_downstream(result, inputs) if inputs.rt.is_main else ""

    return measure


# ---- the tables as text -------------------------------------------------------------------------

COLUMNS = ("PSNR Y", "SSIM Y", "LPIPS", "DISTS", "FID")
# The paper's values: of Table 1 trained with L1 and with a perceptual loss, and of Table 5.
PAPER_COLUMNS = {
    ("1", False): ("RealSR PSNR Y", "RealSR SSIM Y", "DRealSR PSNR Y", "DRealSR SSIM Y"),
    ("1", True): ("RealSR LPIPS", "RealSR FID", "DRealSR LPIPS", "DRealSR FID"),
    ("5", False): ("RealVSR PSNR Y", "RealVSR SSIM Y"),
}
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
PAPER_5 = """
swinir-l realesrgan 22.7402 .6939
swinir-l bsrgan 22.6564 .6779
swinir-l syndiff 22.4607 .6704
swinir-l realdgen 22.9616 .6994
"""


def paper_value(table: str, row: dict[str, Any], release: str, metric: str) -> str:
    """The paper's value for a cell of a table, in brackets; empty if it has none."""
    columns, key = PAPER_COLUMNS.get((table, row["perceptual"]), ()), f"{release} {metric}"
    if key not in columns or row["without"]:
        return ""
    place = 4 * row["perceptual"] + columns.index(key)
    for line in (PAPER_1 if table == "1" else PAPER_5).strip().splitlines():
        network, data, *values = line.split()
        if (network, data) == (row["network"], row["data"]):
            return f" [{values[place]}]"
    return ""


def spread_text(values: Sequence[float], metric: str) -> str:
    """Mean over the seeds ± standard deviation; a dash without values."""
    digits = DECIMALS.get(metric, 3)
    text = f"{np.mean(values):z.{digits}f}" if values else "-"
    return text + (f" ± {np.std(values):.{digits}f}" if len(values) > 1 else "")


UNITS = {"parameters": (1e6, 2, "M"), "seconds": (1, 0, "s"), "memory": (2**20, 0, "MiB")}


def cost_text(costs: Sequence[dict[str, float]], key: str) -> str:
    """A mean of costs as a cell of a table; a dash without costs."""
    size, digits, unit = UNITS[key]
    return f"{np.mean([cost[key] for cost in costs]) / size:.{digits}f} {unit}" if costs else "-"


def text_of_downstream(result: dict[str, Any], inputs: Inputs) -> str:
    """A table of SR networks, and one of what they cost; Table 1 also has the paper's values."""
    cfg, table, sets = inputs.cfg, result["table"], [*result["tested"]]
    columns = [(name, metric) for name in sets for metric in COLUMNS]
    lines, costs = [], []
    for row in result["rows"]:
        label = row["label"] + (", perceptual" if row["perceptual"] else "")
        mark, cells = "", []
        for name, metric in columns:
            means = [run[name]["mean"] for run in row["runs"]]
            cell = spread_text([mean[metric] for mean in means if metric in mean], metric)
            cells.append(cell + paper_value(table, row, inputs.tests[name][0].release, metric))
        if row["network"] != "none":
            generation = [row["generation"]] if row["generation"] else []
            texts = [cost_text(row["training"], key) for key in ("parameters", "seconds", "memory")]
            texts += [cost_text(generation, key) for key in ("seconds", "memory")]
            costs.append([row["network"], label, *texts])
            if meaningless(row["network"], cfg):
                mark = f" (only {steps_of(row['network'], cfg)} steps: means nothing)"
        lines.append([row["network"], label + mark, *cells])
    heads = ["network", "trained on", *(f"{name} {metric}" for name, metric in columns)]
    cost_heads = [*heads[:2], "parameters", "training", "memory", "generation", "memory"]
    networks = dict.fromkeys(row["network"] for row in result["rows"][1:])
    steps = ", ".join(f"{network} {steps_of(network, cfg)}" for network in networks)
    notes = "".join(f"Trained further from {path}.\n" for path in cfg.sr_start_from)
    notes += "".join(meaningless(network, cfg) for network in networks) + inputs.split_text()
    notes += "LR of the references trained the oracle, too.\n" if table == "1" else ""
    notes += "In brackets: the paper.\n" if any("[" in c for line in lines for c in line) else ""
    if table == "4":
        notes += f"All rows: weights as printed, from D(HR), T up to {PAPER['t_start']}, K = 1.\n"
        notes += "".join(f"{label}: `{make}`\n" for label, (_, make) in ABLATIONS.items())
    if table == "5":  # Deviation: see the text
        notes += "In the paper the tested LR images are the references, too.\n"
    if "syndiff" not in cfg.data and table in ("1", "5"):
        notes += left_out_text(["SynDiff"])
    return f"""## Table {table}: SR networks by their training data, tested on real LR

{table_text(heads, lines, words=2)}
Preset {cfg.sr_preset}; steps: {steps}; seeds: {cfg.seeds}.
{notes}
{table_text(cost_heads, costs, words=2)}
Costs are means over the seeds. Memory: {MEMORY[inputs.device.type]}.
Pairs and networks that are reused from an earlier run cost next to nothing here.
"""
