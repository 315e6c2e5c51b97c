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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import generate  # noqa: E402

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
:root { color-scheme: light; }
body { max-width: 1220px; margin: 24px auto; padding: 0 16px; color: #222; background: #fff;
       font: 15px/1.45 system-ui, sans-serif; overflow-wrap: break-word; }
table { border-collapse: collapse; margin: 8px 0; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 12px 3px 0; text-align: left; }
td { font-variant-numeric: tabular-nums; }
svg { font-size: 12px; max-width: 100%; height: auto; }
.pairs { display: flex; flex-wrap: wrap; gap: 20px 28px; }
figure { margin: 0; width: 588px; max-width: 100%; }
figure div { display: flex; gap: 6px; align-items: start; }
img, .missing { flex: 1; min-width: 0; aspect-ratio: 1; image-rendering: pixelated; }
.missing { display: flex; align-items: center; justify-content: center; color: #666;
           background: #eee; }
figcaption { font-size: 13px; }
small { color: #666; }
</style></head><body>
<h1>$title</h1><p>$counts</p>
<h2>Settings</h2>$settings
<h2>Errors of the kept candidates</h2>$histograms
<h2>Domains of the references</h2>$domains
<h2>Best and worst pairs</h2>
<p>From left to right: HR, LR reference, generated LR; the middle of each. Pairs are ordered by the
sum of both errors, each divided by its mean over all pairs, if they were computed (several
candidates, or --max-error).</p>
$pairs
</body></html>
""")


def encode_png(x: Tensor) -> bytes:
    """The bytes of a PNG file with the image (3, H, W) in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(common.to_uint8(x).permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def html_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as an HTML table, the first row as its head; numbers to 4 digits, text escaped."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def svg_histogram(values: np.ndarray, label: str, bins: int = 40) -> str:
    """How often each value (N,) occurs, as a picture of bars from 0 to the largest value."""
    finite = values[np.isfinite(values)]
    top = float(finite.max(initial=0)) or 1.0
    counts, edges = np.histogram(finite, bins, (0, top))
    most = max(1, int(counts.max()))
    left, base, width, height = 52, 170, 400, 150  # of the axes, in pixels
    parts = []
    for i, n in enumerate(counts.tolist()):
        size = height * n / most
        parts.append(
            f'<rect x="{left + i * width / bins:.1f}" y="{base - size:.1f}" fill="#4878a8" '
            f'width="{width / bins - 1:.1f}" height="{size:.1f}">'
            f"<title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {n}</title></rect>"
        )
    for i in range(5):
        x, text = left + i * width / 4, f"{i * top / 4:.3g}"
        parts.append(f'<text x="{x}" y="{base + 16}" text-anchor="middle">{text}</text>')
    for y, text in ((base, "0"), (base - height, str(most))):
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
    x = left + width * mean(values) / top if finite.size else left
    parts.append(
        f'<path d="M{left} {base - height}V{base}H{left + width}" fill="none" stroke="#888"/>'
        f'<path d="M{x:.1f} {base}V{base - height}" stroke="#c03020" stroke-dasharray="4 3"/>'
        f'<text x="{x:.1f}" y="{base - height - 6}" text-anchor="middle" fill="#c03020">'
        f"mean {mean(values):.3g}</text>"
        f'<text x="{left + width / 2}" y="{base + 36}" text-anchor="middle">{label}</text>'
        f'<text transform="translate(12 {base - height / 2}) rotate(-90)" '
        'text-anchor="middle">pairs</text>'
    )
    return f'<svg viewBox="0 0 500 214" width="500" height="214">{"".join(parts)}</svg>'


def mean(values: np.ndarray) -> float:
    """The mean of the finite values; not a number if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def html_image(path: Path, size: int, title: str) -> str:
    """The middle size x size pixels of an image file inside the page, at most 192 on a side."""
    try:
        png = encode_png(common.centre(common.load_image(path), size, min(size, 192)))
    except ValueError:
        return f'<span class="missing" title="{html.escape(str(path))}">not readable</span>'
    text = base64.b64encode(png).decode()
    return f'<img alt="{title}" title="{title}" src="data:image/png;base64,{text}">'


def save_report(path: Path, out: Path, records: list[dict], settings: dict) -> None:
    """Write a page about the pairs in `out`, lines of pairs.jsonl: errors, domains, examples.

    One HTML file that needs no other; opens only the images it shows.
    """
    assert records, "a report needs a pair"
    names = [n for n in ("content", "degradation") if all(f"{n}_errors" in r for r in records)]
    lists = {name: [r[f"{name}_errors"] for r in records] for name in names}
    chosen = [r["kept"] for r in records]
    kept = {n: np.array([e[k] for e, k in zip(lists[n], chosen, strict=True)]) for n in names}
    drawn = {n: np.array([sum(e) / len(e) for e in lists[n]]) for n in names}

    members: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        members.setdefault(Path(record["lr_ref"]).parent.name or "(no folder)", []).append(i)
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    head: list[object] = [
        "domain",
        "pairs",
        *(f"{n}: {of}" for n in names for of in ("kept", "all candidates")),
    ]
    rows: list[list[object]] = [head]
    for domain, index in [*largest[:100], ("all", list(range(len(records))))]:
        errors = (mean(values[n][index]) for n in names for values in (kept, drawn))
        rows.append([domain, len(index), *errors])
    cut = f"<p>The largest 100 of {len(largest)}.</p>" if len(largest) > 100 else ""

    total = sum((kept[n] / max(mean(kept[n]), 1e-12) for n in names), np.zeros(len(records)))
    order = np.argsort(total, kind="stable").tolist()  # not a number counts as the worst
    best, worst = order[:6][: (len(order) + 1) // 2], order[::-1][:6][: len(order) // 2]

    def figure(i: int) -> str:
        record = records[i]
        images = (
            html_image(out / record["hr"], 96 * generate.SCALE, "HR"),
            html_image(Path(record["lr_ref"]), 96, "LR reference"),
            html_image(out / record["lr"], 96, "generated LR"),
        )
        text = ", ".join(f"{n} {kept[n][i]:.4g}" for n in names)
        name, source, lr_ref = (html.escape(record[key]) for key in ("lr", "source", "lr_ref"))
        caption = f"<b>{name}</b>: {text}<br><small>of {source}<br>like {lr_ref}</small>"
        return f"<figure><div>{''.join(images)}</div><figcaption>{caption}</figcaption></figure>\n"

    pairs = ""
    for title, shown in (("Best", best), ("Worst", worst)):
        if shown:
            pairs += f'<h3>{title}</h3><div class="pairs">{"".join(map(figure, shown))}</div>'
    references = len({r["lr_ref"] for r in records})
    candidates = sum(record["candidates"] for record in records)
    page = PAGE.substitute(
        title=html.escape(f"Pairs in {out}"),
        counts=f"Pairs: {len(records)}. Candidates: {candidates}. References: {references}. "
        f"Domains: {len(members)}.",
        settings=html_table([("setting", "value"), *((k, str(v)) for k, v in settings.items())]),
        histograms="".join(svg_histogram(kept[n], f"{n} error") for n in names),
        domains=html_table(rows) + cut,
        pairs=pairs,
    )
    with common.replacing(path) as temporary:  # a file name need not be valid Unicode
        temporary.write_text(page, encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py, which gets report.html
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: common.Runtime) -> None:
    """Write report.html beside pairs.jsonl."""
    out, settings = Path(cfg.pairs), {}
    table = out / "pairs.jsonl"
    common.require(table.is_file(), f"{table} is missing: make it with `python generate.py`.")
    lines = table.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    common.require(all("lr_ref" in r for r in records), f"{table}: not of generate.py.")
    records = [record for record in records if not record["dropped"]]
    common.require(bool(records), f"{table} has no pairs.")
    of_pair = ("hr", "lr", "source", "lr_ref", "kept", "dropped")
    settings = {k: v for k, v in records[0].items() if k not in of_pair and "errors" not in k}
    save_report(out / "report.html", out, records, settings)
    print(f"{len(records)} pairs: look at {out / 'report.html'}")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
