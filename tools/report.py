"""A page about the pairs of generate.py: errors, domains, the best and the worst pairs.

In: a folder that generate.py wrote. Out: report.html in it, one file that needs no other.

    python data/report.py
    python data/report.py --pairs out/generated
"""

import base64
import html
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import ClassVar

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import generate
from common import require
from common.cli import launch
from common.files import replacing
from common.photos import centre, load_image, to_uint8
from common.runtime import Runtime

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { max-width: 1220px; margin: 24px auto; padding: 0 16px; color: #222; background: #fff;
       font: 15px/1.45 system-ui, sans-serif; overflow-wrap: break-word; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 12px 3px 0; text-align: left; }
.pairs { display: flex; flex-wrap: wrap; gap: 20px 28px; }
figure { margin: 0; width: 588px; max-width: 100%; font-size: 13px; }
figure div { display: flex; gap: 6px; }
figure img, .missing { flex: 1; min-width: 0; aspect-ratio: 1; image-rendering: pixelated; }
.missing { background: #eee; text-align: center; }
</style></head><body>
<h1>$title</h1><p>$counts</p>
<h2>Settings</h2>$settings
<h2>Errors of the kept candidates</h2>$histograms
<h2>Domains of the references</h2>$domains
<h2>Best and worst pairs</h2>
<p>From left to right: HR, LR reference, generated LR; the middle of each. Pairs are ordered by the
sum of both errors, each divided by its mean over all pairs. Errors are computed if there are
several candidates or --max-error is given.</p>
$pairs
</body></html>
""")


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as an HTML table, the first row as its head; numbers to 4 digits, text escaped."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def picture(png: io.BytesIO, title: str) -> str:
    """A PNG file inside the page."""
    text = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{title}" title="{title}" src="data:image/png;base64,{text}">'


def photo(path: Path, size: int, title: str) -> str:
    """The middle size x size pixels of an image file, at most 192 on a side, inside the page."""
    try:
        x = centre(load_image(path), size, min(size, 192))
    except ValueError:
        return f'<span class="missing" title="{html.escape(str(path))}">not readable</span>'
    png = io.BytesIO()
    Image.fromarray(to_uint8(x).permute(1, 2, 0).numpy()).save(png, format="PNG")
    return picture(png, title)


def mean(values: np.ndarray) -> float:
    """The mean of the finite values; not a number if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def histogram(values: np.ndarray, name: str) -> str:
    """How often each value (N,) occurs, and their mean, as a picture inside the page."""
    from matplotlib.figure import Figure

    figure, png = Figure(figsize=(5, 2.2), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    axes.hist(values[np.isfinite(values)], 40)
    axes.axvline(mean(values), color="tab:red", linestyle="--")
    axes.set(
        xlabel=f"{name} error", ylabel="pairs", xlim=(0, None), title=f"mean {mean(values):.3g}"
    )
    figure.savefig(png, format="png")
    return picture(png, f"{name} error")


def save_report(path: Path, out: Path, records: list[dict], settings: dict) -> None:
    """Write a page about pairs in the folder `out`; records are their lines of pairs.jsonl."""
    names = [n for n in ("content", "degradation") if all(f"{n}_errors" in r for r in records)]
    lists = {n: [r[f"{n}_errors"] for r in records] for n in names}  # of all candidates
    kept = {n: np.array([r[f"{n}_errors"][r["kept"]] for r in records]) for n in names}
    drawn = {n: np.array([sum(errors) / len(errors) for errors in lists[n]]) for n in names}

    domains: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        domains.setdefault(Path(record["lr_ref"]).parent.name or "(no folder)", []).append(i)
    by_size = sorted(domains.items(), key=lambda item: (-len(item[1]), item[0]))
    kinds = [f"{name}: {kind}" for name in names for kind in ("kept", "all candidates")]
    rows: list[list[object]] = [["domain", "pairs", *kinds]]
    for domain, index in [*by_size, ("all", list(range(len(records))))]:
        errors = (mean(values[name][index]) for name in names for values in (kept, drawn))
        rows.append([domain, len(index), *errors])

    total = sum((kept[n] / max(mean(kept[n]), 1e-12) for n in names), np.zeros(len(records)))
    order = np.argsort(total, kind="stable").tolist()  # not a number counts as the worst
    best, worst = order[:6][: (len(order) + 1) // 2], order[::-1][:6][: len(order) // 2]

    def figure(i: int) -> str:
        record = records[i]
        hr = photo(out / record["hr"], 96 * generate.SCALE, "HR")
        lr_ref = photo(Path(record["lr_ref"]), 96, "LR reference")
        lr = photo(out / record["lr"], 96, "generated LR")
        errors = ", ".join(f"{name} {kept[name][i]:.4g}" for name in names)
        name, source, reference = (html.escape(record[key]) for key in ("lr", "source", "lr_ref"))
        text = f"<b>{name}</b>: {errors}<br>of {source}<br>like {reference}"
        return f"<figure><div>{hr}{lr_ref}{lr}</div><figcaption>{text}</figcaption></figure>\n"

    pairs = ""
    for title, shown in (("Best", best), ("Worst", worst)):
        if shown:
            pairs += f'<h3>{title}</h3><div class="pairs">{"".join(map(figure, shown))}</div>'
    references, candidates = {r["lr_ref"] for r in records}, sum(r["candidates"] for r in records)
    page = PAGE.substitute(
        title=html.escape(f"Pairs in {out}"),
        counts=f"Pairs: {len(records)}. Candidates: {candidates}. References: {len(references)}. "
        f"Domains: {len(domains)}.",
        settings=table([("setting", "value"), *((key, str(v)) for key, v in settings.items())]),
        histograms="".join(histogram(kept[name], name) for name in names),
        domains=table(rows),
        pairs=pairs,
    )
    with replacing(path) as temporary:  # a file name need not be valid Unicode
        temporary.write_text(page, encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py, which gets report.html
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: Runtime) -> None:
    """Write report.html beside pairs.jsonl."""
    path = Path(cfg.pairs) / "pairs.jsonl"
    require(path.is_file(), f"{path} is missing: make it with `python generate.py`.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    require(all("lr_ref" in r for r in records), f"{path}: not of generate.py.")
    records = [record for record in records if not record["dropped"]]
    require(bool(records), f"{path} has no pairs.")
    of_pair = ("hr", "lr", "source", "lr_ref", "averaged", "kept", "dropped")
    settings = {k: v for k, v in records[0].items() if k not in of_pair and "errors" not in k}
    save_report(path.with_name("report.html"), path.parent, records, settings)
    print(f"{len(records)} pairs: look at {path.with_name('report.html')}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
