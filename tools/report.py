"""A page about the pairs of generate.py: settings, errors, domains, the best and the worst pairs.

In: a folder that generate.py wrote. Out: report.html in it, one file that needs no other.

    python -m tools.report
    python -m tools.report --pairs out/generated
"""

import base64
import html
import io
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import require
from common.cli import launch
from common.files import write_text
from common.folder import out_folder
from common.pairs import read_table
from common.runtime import Runtime
from generate import save_preview

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Pairs</title>
<style>body { max-width: 960px; margin: auto; font-family: sans-serif } img { max-width: 100% }
td { border-top: 1px solid #ddd; padding-right: 12px; overflow-wrap: anywhere }</style>"""
OF_PAIR = ("hr", "lr", "source", "lr_ref", "averaged", "kept", "dropped")  # other fields: settings


def html_rows(rows: Iterable[Iterable[object]]) -> str:
    """Rows as an HTML table."""
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def html_image(png: bytes, title: str) -> str:
    """A PNG file inside the page."""
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def html_pair(out: Path, row: dict, errors: list[str]) -> str:
    """The picture of a pair as in preview.png, and what it was made of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pair.png"
        try:
            save_preview(path, out, [row])
            image = html_image(path.read_bytes(), "pair")
        except ValueError as error:
            image = html.escape(str(error))
    facts = ", ".join([row["lr"], *errors, f"of {row['source']}", f"like {row['lr_ref']}"])
    return f"<p>{image}<br>{html.escape(facts)}</p>"


def finite(errors: np.ndarray) -> np.ndarray:
    """The errors that are numbers."""
    return errors[np.isfinite(errors)]


def histograms(errors: dict[str, np.ndarray]) -> str:
    """How often each error (N,) of each kind occurs, as one picture."""
    from matplotlib.figure import Figure

    figure, png = Figure(figsize=(9, 2.5), layout="constrained"), io.BytesIO()
    for i, (kind, values) in enumerate(errors.items(), 1):
        axes = figure.add_subplot(1, len(errors), i)
        axes.hist(finite(values), 40)
        axes.set(xlabel=f"{kind} error", ylabel="pairs")
    figure.savefig(png, format="png")
    return html_image(png.getvalue(), "histograms")


def save_report(out: Path, rows: list[dict]) -> None:
    """Write report.html about pairs in the folder `out`; rows are those of its table."""
    kinds = [k for k in ("content", "degradation") if all(f"{k}_errors" in row for row in rows)]
    errors = {k: np.array([row[f"{k}_errors"][row["kept"]] for row in rows]) for k in kinds}
    domains: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        domains.setdefault(Path(row["lr_ref"]).parent.name, []).append(i)
    table = [["domain of the reference", "pairs", *(f"{k} error" for k in kinds)]]
    for name, index in [*sorted(domains.items()), ("all", [*range(len(rows))])]:
        means = [f"{finite(errors[k][index]).mean():.4g}" for k in kinds]
        table.append([name, str(len(index)), *means])

    total = sum((e / (finite(e).mean() + 1e-12) for e in errors.values()), np.zeros(len(rows)))
    order = np.argsort(total, kind="stable").tolist()  # not a number counts as the worst
    texts = [[f"{k} error {errors[k][i]:.4g}" for k in kinds] for i in range(len(rows))]
    half = (len(rows) + 1) // 2
    best, worst = (
        "".join(html_pair(out, rows[i], texts[i]) for i in shown[:6])
        for shown in (order[:half], order[half:][::-1])
    )
    settings = {k: v for k, v in rows[0].items() if k not in OF_PAIR and "errors" not in k}
    page = [HEAD, f"<h1>{len(rows)} pairs in {html.escape(str(out))}</h1>"]
    page += ["<h2>Settings</h2>", html_rows(settings.items())]
    page += ["<h2>Errors</h2>", histograms(errors) if kinds else "none computed", html_rows(table)]
    page += ["<h2>Best pairs</h2>Both errors count, each divided by its mean.", best]
    page += ["<h2>Worst pairs</h2>", worst]
    text = "\n".join(page).encode(errors="replace")  # a file name need not be valid Unicode
    write_text(out / "report.html", text.decode())


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py, which gets report.html
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: Runtime) -> None:
    """Write report.html beside pairs.jsonl."""
    out, table = Path(cfg.pairs), Path(cfg.pairs) / "pairs.jsonl"
    require(table.is_file(), f"{table} is missing: make it with `python generate.py`.")
    rows = read_table(table)
    require(all(row.keys() >= set(OF_PAIR) for row in rows), f"{table}: not of generate.py.")
    rows = [row for row in rows if not row["dropped"]]
    require(bool(rows), f"{table} has no pairs.")
    out_folder(out, rt, "--pairs").check([out / "report.html"])
    save_report(out, rows)
    print(f"{len(rows)} pairs: look at {out / 'report.html'}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
