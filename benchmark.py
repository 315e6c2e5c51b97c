"""The results: Tables 1 to 7 and Figure 1 of Section 3 and the appendix, and tables of our own.

In: folders of aligned pairs, which were never trained on; HR photos. Out: OUT/results.json with
every single value, and a Markdown file for each table. Each table is a function of bench/: it
checks its inputs, and returns the function that measures. Two things are missing: the user study
(Section 3.5) needs people, and the pairs of SmartPhone were not published.

    python benchmark.py
    python benchmark.py --pairs data/RealSR data/DRealSR
    python benchmark.py --sr swinir-l fsrcnn --seeds 3 --pairs data/RealSR
    python benchmark.py --table control mtf --sr-steps 2000 --pairs data/RealSR data/DRealSR
    python benchmark.py --table factors extractors --hr data/hr --lr data/lr
    python benchmark.py --preset paper --table 2 --pairs data/RealSR data/DRealSR
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.control import table_control
from bench.downstream import table_downstream
from bench.factors import table_factors
from bench.figure1 import table_figure1
from bench.generated import table_generated
from bench.inputs import PRESETS, Config, Inputs, Measure, check_flags, resolved
from bench.leakage import table_leakage
from bench.mtf import table_mtf
from bench.pictures import table_pictures
from bench.remainder import table_remainder
from bench.separation import table_extractors
from common import require
from common.cli import launch
from common.files import write_text
from common.folder import out_folder
from common.runtime import Runtime

Table = Callable[[str, Inputs], Measure]
# The tables with their measuring functions: first those that train networks, with all processes.
TRAINED: dict[str, Table] = {
    **dict.fromkeys(("1", "3", "4", "5", "7"), table_downstream),
    "control": table_control,
    "figure1": table_figure1,
    "pictures": table_pictures,
}
TABLES = TRAINED | {
    **dict.fromkeys(("2", "6"), table_generated),
    "mtf": table_mtf,
    **dict.fromkeys(("remainder", "leak"), table_remainder),
    "factors": table_factors,
    "extractors": table_extractors,
    "leakage": table_leakage,
}


def git_commit() -> str:
    """The commit of this code, marked -dirty where files differ; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def stem_of(table: str) -> str:
    """Name of a table's file, without suffix."""
    return f"table{table}" if table.isdigit() else table


def main(cfg: Config, rt: Runtime) -> None:
    """Check all inputs, then measure, and write whenever a table is done."""
    for name in cfg.table:
        require(name in TABLES, f"--table {name}: choose among {', '.join(TABLES)}.")
    given, cfg = cfg, resolved(cfg, rt)
    check_flags(given, cfg.table)
    names = [name for name in (TABLES if rt.is_main else TRAINED) if name in cfg.table]
    inputs = Inputs(cfg, rt)
    work = {name: TABLES[name](name, inputs) for name in names}  # checks
    folder, files = out_folder(cfg.out, rt), [f"{stem_of(name)}.md" for name in names]
    files += ["results.json", "figure1.png", "mtf.png", "pictures.png", "enlarged.png"]
    folder.check(folder.path / file for file in files)
    if rt.is_main:
        print(cfg)
    gpu = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "config": asdict(cfg),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": gpu or f"{rt.device}, {torch.get_num_threads()} threads",
        "tables": {},
    }
    for name, measure in work.items():
        began = time.time()
        values, text = measure()
        if not rt.is_main:
            continue
        print(f"\n{text}")
        results["tables"][name] = {"seconds": time.time() - began, "values": values}
        write_text(Path(cfg.out) / f"{stem_of(name)}.md", text)
        write_text(Path(cfg.out) / "results.json", json.dumps(results, indent=1))
    if rt.is_main:
        print(f"written: .md of {', '.join(names)}, and results.json in {cfg.out}")


if __name__ == "__main__":
    launch(main, Config, PRESETS, __doc__)
