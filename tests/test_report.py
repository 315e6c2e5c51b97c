"""data/report.py and data/shards.py: what they make of a finished run, and that nothing is lost."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import tarfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch

import generate
from common import UserError
from common.photos import load_image, save_image
from data import report
from data import shards as tars
from tests.commands import assert_refused, run

KINDS = ("content", "degradation")


def make_records(out: Path, count: int) -> list[dict]:
    """Rows of pairs.jsonl, and their images."""
    records = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        lr_ref = out / f"ref/camera{i % 2}/{i}.png"
        for path, *size in ((f"hr/{i}.png", 64, 96), (f"lr/{i}.png", 16, 24), (lr_ref, 40, 40)):
            save_image(out / path, torch.rand(3, *size, generator=g))
        errors = torch.rand(2, 3, generator=g).tolist()
        record = {"hr": f"hr/{i}.png", "lr": f"lr/{i}.png", "source": f"photos/{i}.jpg"}
        record |= {"lr_ref": str(lr_ref), "dropped": False, "kept": i % 3, "candidates": 3}
        records.append(record | {f"{k}_errors": e for k, e in zip(KINDS, errors, strict=True)})
    return records


def page_of(out: Path, records: list[dict], settings: dict | None = None) -> str:
    report.save_report(out / "report.html", out, records, settings or {})
    return (out / "report.html").read_text(encoding="utf-8")


def shown_pairs(text: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


# ---- report -----------------------------------------------------------------------------------


def test_report_needs_no_other_file_and_orders_pairs_by_their_errors_over_the_mean(tmp_path):
    records = make_records(tmp_path, 13)
    text = page_of(tmp_path, records)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 2 + 12 * 3  # histograms, and 12 pairs of 3 images
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    errors = np.array([[r[f"{k}_errors"][r["kept"]] for k in KINDS] for r in records])
    order = np.argsort((errors / errors.mean(0)).sum(1)).tolist()
    assert shown_pairs(text) == [f"lr/{i}.png" for i in order[:6] + order[:-7:-1]]


def test_report_averages_the_folders_of_the_references(tmp_path):
    records = make_records(tmp_path, 5)
    mine, values = [r for r in records if "/camera1/" in r["lr_ref"]], []
    for kind in KINDS:
        values.append(np.mean([r[f"{kind}_errors"][r["kept"]] for r in mine]))
        values.append(np.mean([r[f"{kind}_errors"] for r in mine]))
    cells = "".join(f"<td>{v:.4g}</td>" for v in values)
    assert f"<td>camera1</td><td>2</td>{cells}" in page_of(tmp_path, records)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("missing", [KINDS[:1], KINDS])
def test_report_works_without_errors(tmp_path, missing, count):
    """A run of one candidate computes none: pairs, settings and domains are shown."""
    records = make_records(tmp_path, count)
    for record in records:
        for name in missing:
            del record[f"{name}_errors"]
    text = page_of(tmp_path, records, {"t_start": 15})
    assert text.count('<img alt="') == 2 - len(missing) + count * 3 and "nan" not in text
    assert len(set(shown_pairs(text))) == count  # none is shown twice
    assert f"<td>all</td><td>{count}</td>" in text and "<td>t_start</td><td>15</td>" in text
    assert not any(f"{name} error" in text or f"{name}: kept" in text for name in missing)


def test_report_survives_missing_files_and_errors_that_are_no_numbers(tmp_path):
    records = make_records(tmp_path, 4)
    Path(records[0]["lr_ref"]).unlink()
    (tmp_path / "hr/1.png").write_bytes(b"no image")
    records[2]["content_errors"] = [math.nan] * 3
    records[3]["degradation_errors"] = [math.inf] * 3
    text = page_of(tmp_path, records)
    assert text.count('class="missing"') == 2
    assert set(shown_pairs(text)[2:]) == {"lr/2.png", "lr/3.png"}
    for record in records:
        record |= {"content_errors": [math.nan], "degradation_errors": [0.0], "kept": 0}
    page_of(tmp_path, records)


def test_report_escapes_names(tmp_path):
    evil = "<script>alert('1')</script>\"&\udcff.png"
    records = [dict.fromkeys(("lr", "hr", "source", "lr_ref"), evil) | {"candidates": 1}]
    text = page_of(tmp_path, records, {evil: evil})
    assert "<script" not in text and "<b>&lt;script&gt;" in text


# ---- shards -----------------------------------------------------------------------------------

NAMES = ["a.b", "sub/photo", "100%", "ünï code", "x" * 200, "\udcff"]


@pytest.fixture
def source(tmp_path) -> tuple[Path, dict[str, dict]]:
    """A folder of images, and rows of pairs by name, whose names need not be those of files."""
    records = make_records(tmp_path / "pairs", len(NAMES))
    return tmp_path / "pairs", dict(zip(NAMES, records, strict=True))


def test_webdataset_reads_the_shards_which_hold_nothing_of_the_machine(source, tmp_path):
    wds = pytest.importorskip("webdataset")
    (folder, rows), shard = source, tmp_path / "x" / "0000-000000.tar"
    tars.write_shard(shard, folder, rows.items())
    assert tars.read_shards(tmp_path / "x") == rows
    samples = list(wds.WebDataset([str(shard)], shardshuffle=False).decode("torchrgb"))
    for sample, row in zip(samples, rows.values(), strict=True):
        assert "." not in sample["__key__"] and "/" not in sample["__key__"]
        assert sample["json"] == row
        for side in ("hr", "lr"):
            torch.testing.assert_close(sample[f"{side}.png"], load_image(folder / row[side]))
    with tarfile.open(shard) as tar:
        assert tar.getnames()[:3] == ["a%2Eb.hr.png", "a%2Eb.lr.png", "a%2Eb.json"]
        facts = {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in tar}
    assert facts == {(0, 0, 0, 0o644, "", "")}


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder as generate.py leaves it, with one dropped pair."""
    out = tmp_path / "pairs"
    records = make_records(out, 5)
    for i, record in enumerate(records):
        record |= {field.name: 0 for field in dataclasses.fields(generate.Sampler)}
        record |= {"dropped": i == 4}
    write_table(out, records)
    return out


def write_table(out: Path, rows: list[dict]) -> None:
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_killed_process_leaves_whole_shards_and_the_same_command_goes_on(
    finished, tmp_path, monkeypatch
):
    def killing(name: str, **flags) -> str:
        if name == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return quote(name, **flags)

    out = tmp_path / "shards"
    argv = ("data.shards", "--pairs", finished, "--out", out, "--per-shard", 3)
    with monkeypatch.context() as patch:
        patch.setattr(tars, "quote", killing)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=run, args=argv, kwargs={"cwd": tmp_path})
        process.start()
        process.join(60)
    assert len(list(out.glob(".*.tmp"))) == 1 and list(tars.read_shards(out)) == ["0", "1", "2"]
    assert "3 of them were there" in run(*argv, cwd=tmp_path).stdout
    assert sorted(p.name for p in out.iterdir()) == ["0000-000000.tar", "0000-000001.tar"]
    assert list(tars.read_shards(out)) == ["0", "1", "2", "3"]  # not the pair that was dropped


def test_a_damaged_shard_is_named(source, tmp_path):
    shard = tmp_path / "x" / "0000-000000.tar"
    tars.write_shard(shard, source[0], source[1].items())
    for damage in (shard.read_bytes()[:4000], b"", os.urandom(4096)):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match="0000-000000.tar"):
            tars.read_shards(tmp_path / "x")


# ---- the commands -----------------------------------------------------------------------------


def test_the_report_has_the_settings_and_the_pairs_that_were_not_dropped(finished, tmp_path):
    assert run("data.report", "--pairs", finished, cwd=tmp_path).returncode == 0
    page = (finished / "report.html").read_text()
    assert "lr/3.png" in page and "lr/4.png" not in page
    settings = page[page.index("<h2>Settings</h2>") : page.index("<h2>Errors")]
    names = set(re.findall(r"<td>(\w+)</td><td>", settings))
    assert names == {field.name for field in dataclasses.fields(generate.Sampler)}


def test_shards_of_pairs_that_were_made_anew_need_another_folder(finished, tmp_path):
    """Pairs of degrade.py have shards, too, but no report."""
    rows = [{"hr": f"hr/{i}.png", "lr": f"lr/{i}.png", "blur": 1} for i in range(3)]
    write_table(finished, rows)
    argv = ("--pairs", finished, "--out", tmp_path / "shards")
    assert run("data.shards", *argv, cwd=tmp_path).returncode == 0
    assert list(tars.read_shards(tmp_path / "shards").values()) == rows
    write_table(finished, [row | {"blur": 2} for row in rows])
    assert_refused(run("data.shards", *argv, cwd=tmp_path), "holds other pairs")
    assert_refused(run("data.report", "--pairs", finished, cwd=tmp_path), "not of generate.py")


@pytest.mark.parametrize("command", ["data.report", "data.shards"])
def test_a_folder_without_pairs_is_one_sentence(command, tmp_path):
    assert_refused(run(command, "--pairs", tmp_path, cwd=tmp_path), "python generate.py")
