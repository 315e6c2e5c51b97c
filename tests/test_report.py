"""data/report.py and data/shards.py: what they say of a finished run, and that nothing is lost."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import common
import generate
from data import report
from data import shards as tars

REPO = Path(__file__).resolve().parents[1]

SETTINGS = {"start": "reconstruct", "t_start": 15, "candidates": 3}


def make_records(out: Path, count: int) -> list[dict]:
    records = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        common.save_image(out / f"hr/{i}.png", torch.rand(3, 64, 96, generator=g))
        common.save_image(out / f"lr/{i}.png", torch.rand(3, 16, 24, generator=g))
        lr_ref = out / f"ref/camera{i % 2}/{i}.png"
        common.save_image(lr_ref, torch.rand(3, 40, 40, generator=g))
        errors = torch.rand(2, 3, generator=g).tolist()
        record = {"hr": f"hr/{i}.png", "lr": f"lr/{i}.png", "source": f"photos/{i}.jpg"}
        record |= {"lr_ref": str(lr_ref), "dropped": False}
        record |= {"content_errors": errors[0], "degradation_errors": errors[1], "kept": i % 3}
        records.append(record | SETTINGS)
    return records


def read_page(path: Path) -> str:
    """The text of a page; fails where tags are not closed in order."""
    text = path.read_text(encoding="utf-8")
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                opened.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Checker().feed(text)
    assert not opened
    return text


def shown_pairs(text: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


# ---- report -----------------------------------------------------------------------------------


def test_report_needs_no_other_file(tmp_path):
    records = make_records(tmp_path, 13)
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
    text = read_page(tmp_path / "report.html")
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 36  # 12 pairs of 3 images
    sizes = set()
    for source in sources:
        start, data = source.split(",")
        assert start == "data:image/png;base64"
        sizes.add(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == {(192, 192), (96, 96)}
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_report_orders_pairs_by_their_errors_over_the_mean(tmp_path):
    records = make_records(tmp_path, 13)
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
    errors = np.array([[r[k][r["kept"]] for k in ("content_errors", "degradation_errors")]
                       for r in records])  # fmt: skip
    order = np.argsort((errors / errors.mean(0)).sum(1)).tolist()
    expected = [f"lr/{i}.png" for i in order[:6] + order[:-7:-1]]
    assert shown_pairs(read_page(tmp_path / "report.html")) == expected


def test_report_averages_the_folders_of_the_references(tmp_path):
    records = make_records(tmp_path, 5)
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
    text = read_page(tmp_path / "report.html")
    mine = [r for r in records if "/camera1/" in r["lr_ref"]]
    kept = [np.mean([r[f"{k}_errors"][r["kept"]] for r in mine])
            for k in ("content", "degradation")]  # fmt: skip
    drawn = [np.mean([r[f"{k}_errors"] for r in mine]) for k in ("content", "degradation")]
    values = (kept[0], drawn[0], kept[1], drawn[1])
    cells = "".join(f"<td>{v:.4g}</td>" for v in values)
    assert f"<td>camera1</td><td>2</td>{cells}" in text


@pytest.mark.parametrize("missing", [["content"], ["content", "degradation"]])
def test_report_works_without_errors(tmp_path, missing):
    """Which a run of one candidate does not compute: pairs, settings and domains are shown."""
    records = make_records(tmp_path, 5)
    for record in records:
        for name in missing:
            del record[f"{name}_errors"]
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
    text = read_page(tmp_path / "report.html")
    assert len(shown_pairs(text)) == len(set(shown_pairs(text))) == 5
    assert text.count("<svg") == 2 - len(missing) and "nan" not in text
    assert "<td>camera1</td><td>2</td>" in text and "<td>t_start</td><td>15</td>" in text
    for name in missing:
        assert f"{name}: kept" not in text and f"{name} error" not in text


def test_report_of_one_pair_and_of_few(tmp_path):
    for count, shown in ((1, 1), (2, 2), (5, 5), (11, 11)):
        records = make_records(tmp_path, count)
        report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
        pairs = shown_pairs(read_page(tmp_path / "report.html"))
        assert len(pairs) == len(set(pairs)) == shown


def test_report_survives_missing_files_and_errors_that_are_no_numbers(tmp_path):
    records = make_records(tmp_path, 4)
    Path(records[0]["lr_ref"]).unlink()
    (tmp_path / "hr/1.png").write_bytes(b"no image")
    records[2]["content_errors"] = [math.nan] * 3
    records[3]["degradation_errors"] = [math.inf] * 3
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
    text = read_page(tmp_path / "report.html")
    assert text.count('class="missing"') == 2
    assert set(shown_pairs(text)[2:]) == {"lr/2.png", "lr/3.png"}
    for record in records:
        record["content_errors"] = [math.nan]
        record["degradation_errors"], record["kept"] = [0.0], 0
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)


def test_report_escapes_names(tmp_path):
    records = make_records(tmp_path, 2)
    evil = "<script>alert('1')</script>\"&\udcff.png"
    for key in ("lr", "hr", "source", "lr_ref"):
        records[0][key] = evil
    report.save_report(tmp_path / "report.html", tmp_path / "<b>", records, {evil: evil})
    text = read_page(tmp_path / "report.html")
    assert "<script" not in text and "<b>&lt;script&gt;" in text


def test_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    records = make_records(tmp_path, 2)
    page = tmp_path / "report.html"
    page.write_text("before")

    def full(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        report.save_report(page, tmp_path, records, SETTINGS)
    assert page.read_text() == "before"


def test_report_of_many_pairs_takes_seconds(tmp_path):
    few = make_records(tmp_path, 50)
    records = [few[i % 50] | {"lr_ref": f"d{i % 997}/x.png"} for i in range(100_000)]
    began = time.process_time()
    report.save_report(tmp_path / "report.html", tmp_path, records, SETTINGS)
    print(f"{time.process_time() - began:.1f} s")
    assert time.process_time() - began < 20
    assert (tmp_path / "report.html").stat().st_size < 4e6


# ---- shards -----------------------------------------------------------------------------------

NAMES = ["a.b", "sub/photo", "100%", "ünï code", "x" * 200, "\udcff"]


def images(i: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(i)
    return [torch.rand(3, 32, 40, generator=g), torch.rand(3, 8, 10, generator=g)]


def pair(i: int) -> list[bytes]:
    return [report.encode_png(image) for image in images(i)]


def write(folder: Path, names: list[str], per_shard: int = 4, rank: int = 0) -> None:
    shards = tars.TarShards(folder, rank, per_shard)
    for i, name in enumerate(names):
        shards.add(name, *pair(i), {"source": name, "number": i})
    shards.close()


def test_shards_return_what_was_written(tmp_path):
    write(tmp_path, NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000-000000.tar", "0000-000001.tar"]
    done = tars.TarShards(tmp_path).done()
    assert done == {name: {"source": name, "number": i} for i, name in enumerate(NAMES)}


def test_webdataset_reads_the_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    write(tmp_path, NAMES)
    files = sorted(map(str, tmp_path.glob("*.tar")))
    samples = list(wds.WebDataset(files, shardshuffle=False).decode("torchrgb"))
    assert len(samples) == len(NAMES)
    for i, (sample, name) in enumerate(zip(samples, NAMES, strict=True)):
        assert "." not in sample["__key__"] and "/" not in sample["__key__"]
        assert sample["json"] == {"source": name, "number": i}
        hr, lr = images(i)
        torch.testing.assert_close(sample["hr.png"], common.to_uint8(hr).float() / 255)
        torch.testing.assert_close(sample["lr.png"], common.to_uint8(lr).float() / 255)


def test_shards_are_the_same_bytes_each_time(tmp_path):
    digests = []
    for run in ("first", "second"):
        write(tmp_path / run, NAMES)
        files = sorted((tmp_path / run).glob("*.tar"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        time.sleep(1.1)
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "first/0000-000000.tar") as tar:
        facts = {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in tar}
    assert facts == {(0, 0, 0, 0o644, "", "")}


def test_shards_of_ranks_do_not_meet(tmp_path):
    write(tmp_path, ["a", "b", "c"], per_shard=2, rank=0)
    write(tmp_path, ["d", "e", "f"], per_shard=2, rank=10)
    write(tmp_path, ["g"], per_shard=2, rank=10)
    names = [p.name for p in sorted(tmp_path.iterdir())]
    expected = (("00", 0), ("00", 1), ("10", 0), ("10", 1), ("10", 2))
    assert names == [f"00{rank}-00000{number}.tar" for rank, number in expected]
    assert set(tars.TarShards(tmp_path, 3).done()) == set("abcdefg")


def test_a_killed_process_leaves_whole_shards_and_a_restart_goes_on(tmp_path):
    code = (
        "import sys, time; sys.path[:0] = sys.argv[1:3]; from pathlib import Path\n"
        "import test_report as t; from data import shards as tars\n"
        "shards = tars.TarShards(Path(sys.argv[3]), 0, 4)\n"
        "for i in range(10): shards.add(f'n{i}', *t.pair(i), {'number': i})\n"
        "shards.tar.fileobj.flush(); print('ready', flush=True); time.sleep(60)\n"
    )
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, str(REPO), here, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    shards = tars.TarShards(tmp_path, 0, 4)
    done = shards.done()
    assert list(done) == [f"n{i}" for i in range(8)]
    for i in range(8, 10):
        shards.add(f"n{i}", *pair(i), {"number": i})
    shards.close()
    names = [p.name for p in sorted(tmp_path.iterdir())]
    assert names == [f"0000-00000{n}.tar" for n in range(3)]
    assert shards.done() == {f"n{i}": {"number": i} for i in range(10)}


@pytest.mark.parametrize("room", [9_500, 16_000])  # fails when closing; when adding
def test_a_full_disk_leaves_the_finished_shards(tmp_path, room):
    write(tmp_path, ["a"])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    shards = tars.TarShards(tmp_path, 0, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError):
            for i in range(1 if room == 9_500 else 4):
                shards.add(f"n{i}", *pair(i), {})
            shards.close()
        shards.close()  # as `finally` does: nothing to publish
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    shards.add("b", *pair(1), {})  # when there is room again
    shards.close()
    assert set(shards.done()) == {"a", "b"}


def test_a_record_that_is_no_json_spoils_no_shard(tmp_path):
    shards = tars.TarShards(tmp_path)
    shards.add("a", *pair(0), {})
    with pytest.raises(TypeError):
        shards.add("b", *pair(1), {"x": object()})
    shards.close()
    assert shards.done() == {"a": {}}


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, ["a", "b"])
    shard = tmp_path / "0000-000000.tar"
    for damage in (shard.read_bytes()[:4000], b"", os.urandom(4096)):
        shard.write_bytes(damage)
        with pytest.raises(common.UserError, match="0000-000000.tar"):
            tars.TarShards(tmp_path).done()


def test_the_json_of_a_shard_is_readable_by_hand(tmp_path):
    write(tmp_path, ["a.b"])
    with tarfile.open(tmp_path / "0000-000000.tar") as tar:
        assert tar.getnames() == ["a%2Eb.hr.png", "a%2Eb.lr.png", "a%2Eb.json"]
        file = tar.extractfile("a%2Eb.json")
        assert file is not None and json.load(file)["source"] == "a.b"


# ---- the commands -------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder as generate.py leaves it, with one dropped pair."""
    out = tmp_path / "pairs"
    records = make_records(out, 5)
    for i, record in enumerate(records):
        record |= {field.name: 0 for field in dataclasses.fields(generate.Sampler)}
        record |= {"dropped": i == 4}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (out / "pairs.jsonl").write_text(text)
    return out


def launch(monkeypatch, module, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    common.launch(module.main, module.Config, {}, module.__doc__)


def test_commands_take_the_pairs_that_were_not_dropped(finished, tmp_path, monkeypatch, capsys):
    launch(monkeypatch, report, "--pairs", finished)
    page = read_page(finished / "report.html")
    assert "lr/3.png" in page and "lr/4.png" not in page
    table = page[page.index("<h2>Settings</h2>") : page.index("<h2>Errors")]
    assert {f.name for f in dataclasses.fields(generate.Sampler)} <= set(
        re.findall(r"<td>(\w+)</td>", table)
    )
    assert not re.search("<td>(hr|lr|lr_ref|source|kept|content_errors)</td>", table)
    argv = ("--pairs", finished, "--out", tmp_path / "shards", "--per-shard", 3)
    launch(monkeypatch, tars, *argv)
    launch(monkeypatch, tars, *argv)
    assert "4 of them were there" in capsys.readouterr().out
    assert sorted(tars.TarShards(tmp_path / "shards").done()) == ["0", "1", "2", "3"]


def test_shards_of_pairs_that_were_made_anew_need_another_folder(
    finished, tmp_path, monkeypatch, capsys
):
    argv = ("--pairs", finished, "--out", tmp_path / "shards")
    launch(monkeypatch, tars, *argv)
    table = finished / "pairs.jsonl"
    records = [json.loads(line) | {"seed": 1} for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, tars, *argv)
    assert stopped.value.code == 2 and "holds other pairs" in capsys.readouterr().err


def test_pairs_of_degrade_have_shards_and_no_report(finished, tmp_path, monkeypatch, capsys):
    rows = [{"hr": f"hr/{i}.png", "lr": f"lr/{i}.png", "blur": 1} for i in range(3)]
    (finished / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch(monkeypatch, tars, "--pairs", finished, "--out", tmp_path / "shards")
    assert len(tars.TarShards(tmp_path / "shards").done()) == 3
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, report, "--pairs", finished)
    assert stopped.value.code == 2 and "not of generate.py" in capsys.readouterr().err


@pytest.mark.parametrize("module", [report, tars])
def test_a_folder_without_pairs_is_one_sentence(module, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, module, "--pairs", tmp_path)
    assert stopped.value.code == 2 and "python generate.py" in capsys.readouterr().err
