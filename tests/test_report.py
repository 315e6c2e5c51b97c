"""tools/report.py: what the page shows of a finished run."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
from common.images import save_image
from tests.commands import assert_refused, run
from tools import report

KINDS = ("content", "degradation")


def make_rows(out: Path, count: int) -> list[dict]:
    """Rows of pairs.jsonl, and their images."""
    rows = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        lr_ref = out / f"ref/camera{i % 2}/{i}.png"
        for path, *size in ((f"hr/{i}.png", 64, 96), (f"lr/{i}.png", 16, 24), (lr_ref, 40, 40)):
            save_image(out / path, torch.rand(3, *size, generator=g))
        errors = torch.rand(2, 3, generator=g).tolist()
        row = {"hr": f"hr/{i}.png", "lr": f"lr/{i}.png", "source": f"photos/{i}.jpg"}
        row |= {"lr_ref": str(lr_ref), "averaged": [], "dropped": False, "kept": i % 3}
        rows.append(row | {f"{k}_errors": e for k, e in zip(KINDS, errors, strict=True)})
    return rows


def page_of(out: Path, rows: list[dict]) -> str:
    report.save_report(out, rows)
    return (out / "report.html").read_text(encoding="utf-8")


def shown_pairs(text: str) -> list[str]:
    """The LR images of the pairs, in the order of the page."""
    return re.findall(r"<br>(lr/\d+.png)", text)


def test_the_page_needs_no_other_file_and_orders_pairs_by_their_errors_over_the_mean(tmp_path):
    rows = make_rows(tmp_path, 13)
    text = page_of(tmp_path, rows)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 1 + 12  # the histograms, and a picture of each pair
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    errors = np.array([[row[f"{k}_errors"][row["kept"]] for k in KINDS] for row in rows])
    order = np.argsort((errors / errors.mean(0)).sum(1)).tolist()
    assert shown_pairs(text) == [f"lr/{i}.png" for i in order[:6] + order[:-7:-1]]


def test_errors_of_kept_candidates_are_averaged_for_each_folder_of_references(tmp_path):
    rows = make_rows(tmp_path, 5)
    kept = [[row[f"{k}_errors"][row["kept"]] for k in KINDS] for row in (rows[1], rows[3])]
    cells = "".join(f"<td>{mean:.4g}</td>" for mean in np.mean(kept, axis=0))
    assert f"<td>camera1</td><td>2</td>{cells}" in page_of(tmp_path, rows)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("missing", [KINDS[:1], KINDS])
def test_the_page_works_without_errors(tmp_path, missing, count):
    """A run of one candidate computes none: pairs, settings and domains are shown."""
    rows = make_rows(tmp_path, count)
    for row in rows:
        for kind in missing:
            del row[f"{kind}_errors"]
    text = page_of(tmp_path, [row | {"t_start": 15} for row in rows])
    assert text.count("<img") == (len(missing) < 2) + count
    assert "nan" not in re.sub(r'src="[^"]*"', "", text)
    assert len(shown_pairs(text)) == len(set(shown_pairs(text))) == count
    assert f"<td>all</td><td>{count}</td>" in text and "<td>t_start</td><td>15</td>" in text
    assert not any(f"{kind} error" in text for kind in missing)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_the_page_survives_missing_files_and_errors_that_are_no_numbers(tmp_path):
    rows = make_rows(tmp_path, 4)
    Path(rows[0]["lr_ref"]).unlink()
    (tmp_path / "hr/1.png").write_bytes(b"no image")
    rows[2]["content_errors"] = [math.nan] * 3
    rows[3]["degradation_errors"] = [math.inf] * 3
    text = page_of(tmp_path, rows)
    assert text.count("not a readable image") == 2 and text.count("<img") == 1 + 2
    assert set(shown_pairs(text)[2:]) == {"lr/2.png", "lr/3.png"}
    for row in rows:
        row |= {"content_errors": [math.nan], "degradation_errors": [0.0], "kept": 0}
    page_of(tmp_path, rows)


def test_all_text_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>\"&\udcff.png"
    rows = [dict.fromkeys(("lr", "hr", "source", evil), evil) | {"lr_ref": f"{evil}/{evil}"}]
    text = page_of(tmp_path, rows)
    assert "<script" not in text and text.count("&lt;script&gt;") > 4


# ---- the command ------------------------------------------------------------------------------


def write_table(out: Path, rows: list[dict]) -> None:
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_has_the_settings_and_the_pairs_that_were_not_dropped(tmp_path):
    rows = make_rows(tmp_path, 5)
    for i, row in enumerate(rows):
        row |= {field.name: 0 for field in dataclasses.fields(generate.Sampler)}
        row |= {"dropped": i == 4}
    write_table(tmp_path, rows)
    assert run("tools.report", "--pairs", tmp_path, cwd=tmp_path).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert "lr/3.png" in page and "lr/4.png" not in page
    settings = page[page.index("<h2>Settings</h2>") : page.index("<h2>Errors")]
    names = set(re.findall(r"<td>(\w+)</td><td>", settings))
    assert names == {field.name for field in dataclasses.fields(generate.Sampler)}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"hr": "hr/0.png", "lr": "lr/0.png", "blur": 1}], "not of generate.py"),
        ([{"hr": "/etc/0.png", "lr": "lr/0.png"}], "line 1: hr is '/etc/0.png'"),
        ([], "has no pairs"),
        (None, "python generate.py"),
    ],
)
def test_a_folder_without_pairs_of_generate_is_one_sentence(rows, words, tmp_path):
    if rows is not None:
        write_table(tmp_path, rows)
    assert_refused(run("tools.report", "--pairs", tmp_path, cwd=tmp_path), words, "pairs.jsonl")
    assert not (tmp_path / "report.html").exists()
