"""tools/shards.py: that webdataset reads what it writes, and that nothing is lost."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from common import UserError
from common.folder import RECORD
from common.images import load_image, save_image
from common.pairs import content_of, read_table
from tests.commands import assert_refused, files_of, run
from tools import shards

wds = pytest.importorskip("webdataset")

NAMES = ["a.b", "100%", "ünï code", "x" * 200, "\udcff"]


def write_table(folder: Path, rows: list[dict]) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(folder: Path, names: list[str]) -> list[dict]:
    """A folder as degrade.py leaves it; returns its rows."""
    for i, name in enumerate(names):
        for side, size in (("hr", 64), ("lr", 16)):
            image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(i))
            save_image(folder / side / f"{name}.png", image)
    rows = [{"hr": f"hr/{name}.png", "lr": f"lr/{name}.png", "blur": 1.5} for name in names]
    for row in rows:
        row["made"] = {side: content_of(folder / row[side]) for side in ("hr", "lr")}
    write_table(folder, rows)
    return rows


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A folder of five pairs, of which the last is dropped."""
    rows = write_pairs(tmp_path / "pairs", list("01234"))
    write_table(tmp_path / "pairs", [row | {"dropped": row["hr"] == "hr/4.png"} for row in rows])
    return tmp_path / "pairs"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != RECORD)


def packed(folder: Path) -> dict[str, dict]:
    """The rows in all shards."""
    found = [shards.read_shard(shard) for shard in sorted(folder.glob("*.tar"))]
    assert sum(map(len, found)) == len({name for rows in found for name in rows})
    return {name: row for rows in found for name, row in rows.items()}


def test_webdataset_reads_the_shards_which_hold_nothing_of_the_machine(tmp_path):
    rows, out = write_pairs(tmp_path / "pairs", NAMES), tmp_path / "100%d"
    done = run("tools.shards", "--pairs", tmp_path / "pairs", "--out", out, cwd=tmp_path)
    assert done.returncode == 0 and names(out) == ["0000-000000.tar"]
    assert packed(out) == dict(zip(NAMES, rows, strict=True))
    shard = out / "0000-000000.tar"
    samples = list(wds.WebDataset([str(shard)], shardshuffle=False).decode("torchrgb"))
    for sample, row in zip(samples, rows, strict=True):
        assert "." not in sample["__key__"] and "/" not in sample["__key__"]
        assert sample["json"] == row
        for side in ("hr", "lr"):
            image = load_image(tmp_path / "pairs" / row[side])
            torch.testing.assert_close(sample[f"{side}.png"], image)
    with tarfile.open(shard) as tar:
        assert tar.getnames()[:3] == ["a%2Eb.hr.png", "a%2Eb.json", "a%2Eb.lr.png"]
        facts = {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in tar}
    assert facts == {(0, 0, 0, 0o644, "", "")}


def test_the_same_pairs_give_the_same_bytes_also_when_started_as_a_file(pairs, tmp_path):
    argv = ["--pairs", pairs, "--per-shard", "2", "--out"]
    command = [sys.executable, shards.__file__, *argv, tmp_path / "file"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "4 pairs in " in done.stdout
    assert run("tools.shards", *argv, tmp_path / "module", cwd=tmp_path).returncode == 0
    assert files_of(tmp_path / "file") == files_of(tmp_path / "module")
    assert names(tmp_path / "file") == ["0000-000000.tar", "0000-000001.tar"]


def test_a_killed_process_leaves_whole_shards_and_the_same_command_goes_on(
    pairs, tmp_path, monkeypatch
):
    def killing(name: str, **flags) -> str:
        if name == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return quote(name, **flags)

    out = tmp_path / "shards"
    argv = ("tools.shards", "--pairs", pairs, "--out", out, "--per-shard", 2)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "quote", killing)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=run, args=argv, kwargs={"cwd": tmp_path})
        process.start()
        process.join(60)
    assert len(list(out.glob(".realdgen-*.tmp"))) == 1 and list(packed(out)) == ["0", "1"]
    (out / ".mine.tmp").touch()
    assert "2 of them were there" in run(*argv, cwd=tmp_path).stdout
    assert names(out) == [".mine.tmp", "0000-000000.tar", "0000-000001.tar"]
    assert list(packed(out)) == ["0", "1", "2", "3"]  # not the dropped pair
    before = files_of(out)
    assert "4 of them were there" in run(*argv, cwd=tmp_path).stdout
    assert files_of(out) == before


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_error_leaves_whole_shards_alone(pairs, tmp_path):
    (pairs / "lr" / "3.png").unlink()
    argv = ("--pairs", pairs, "--per-shard", 2, "--out", tmp_path / "shards")
    assert_refused(run("tools.shards", *argv, cwd=tmp_path), "3.png")
    assert names(tmp_path / "shards") == ["0000-000000.tar"]
    assert list(packed(tmp_path / "shards")) == ["0", "1"]


def test_a_damaged_shard_is_named(pairs, tmp_path):
    out = tmp_path / "shards"
    run("tools.shards", "--pairs", pairs, "--out", out, cwd=tmp_path)
    shard = out / "0000-000000.tar"
    for damage in (shard.read_bytes()[:4000], b"", os.urandom(4096)):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match="0000-000000.tar"):
            shards.read_shard(shard)


def test_pairs_that_were_made_again_are_packed_again_and_the_others_stay(pairs, tmp_path):
    out = tmp_path / "shards"
    argv = ("tools.shards", "--pairs", pairs, "--out", out, "--per-shard", 2)
    assert run(*argv, cwd=tmp_path).returncode == 0
    before = files_of(out)
    rows = read_table(pairs / "pairs.jsonl")
    moved = [row | {"source": "elsewhere"} for row in rows]  # the same files
    write_table(pairs, moved)
    assert run(*argv, cwd=tmp_path).returncode == 0 and files_of(out) == before
    save_image(pairs / "lr/0.png", torch.zeros(3, 16, 16))
    assert_refused(run(*argv[:4], tmp_path / "x", cwd=tmp_path), "files of 0 are not those")
    rows[0]["made"]["lr"] = content_of(pairs / "lr/0.png")
    write_table(pairs, rows)
    assert run(*argv, cwd=tmp_path).returncode == 0
    assert packed(out) == {row["hr"][3:-4]: row for row in rows[:4]}
    assert files_of(out)["0000-000001.tar"] == before["0000-000001.tar"]


def test_a_shard_of_somebody_else_is_refused_and_stays(pairs, tmp_path):
    out = tmp_path / "shards"
    write_pairs(tmp_path / "other", ["a"])
    run("tools.shards", "--pairs", tmp_path / "other", "--out", out, cwd=tmp_path)
    (out / RECORD).unlink()
    before = files_of(out)
    done = run("tools.shards", "--pairs", pairs, "--out", out, cwd=tmp_path)
    assert_refused(done, "0000-000000.tar is there, but not made by this program")
    assert files_of(out) == before


def test_a_tar_file_of_another_name_stays(pairs, tmp_path):
    with tarfile.open(tmp_path / "my-photos.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    before = (tmp_path / "my-photos.tar").read_bytes()
    assert run("tools.shards", "--pairs", pairs, "--out", tmp_path, cwd=tmp_path).returncode == 0
    assert (tmp_path / "my-photos.tar").read_bytes() == before
    assert (tmp_path / "0000-000000.tar").is_file()


def test_without_webdataset_a_sentence_says_how_to_get_it(pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    done = run("tools.shards", "--pairs", pairs, "--out", tmp_path / "x", cwd=tmp_path)
    assert_refused(done, "pip install webdataset")


# ---- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret.png", "hr/../../secret.png", "hr/..", "hr/sub/0.png", "lr/0.png",
     "hr//0.png", "./hr/0.png", "hr/", "", None, 5, ["hr/0.png"]],
)  # fmt: skip
def test_no_file_is_read_but_hr_name_and_lr_name(path, pairs, tmp_path):
    (tmp_path / "secret.png").write_text("secret")
    write_table(pairs, [{"hr": "hr/0.png", "lr": "lr/0.png"}, {"hr": path, "lr": "lr/1.png"}])
    done = run("tools.shards", "--pairs", pairs, "--out", tmp_path / "x", cwd=tmp_path)
    assert_refused(done, f"pairs.jsonl, line 2: hr is {path!r}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("line", [b"5", b"[]", b"null"])
def test_a_line_that_is_no_row_is_named_by_its_number(line, pairs):
    table = pairs / "pairs.jsonl"
    table.write_bytes(b"\n" + line + b"\n" + table.read_bytes())
    with pytest.raises(UserError, match="pairs.jsonl, line 2"):
        read_table(table)


@pytest.mark.parametrize("line", [b"not json", b"{", b"\xff", b"[" * 10**5])
def test_a_line_that_is_not_json_is_skipped_and_named(line, pairs, capsys):
    table = pairs / "pairs.jsonl"
    rows = read_table(table)
    table.write_bytes(b"\n" + line + b"\n" + table.read_bytes())
    assert read_table(table) == rows
    assert f"{table}: skipped line 2, which is not JSON" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["\0", "\ud800"])
def test_a_name_that_no_file_can_have_is_one_sentence(name, pairs, tmp_path):
    write_table(pairs, [{"hr": f"hr/{name}.png", "lr": f"lr/{name}.png"}])
    done = run("tools.shards", "--pairs", pairs, "--out", tmp_path / "x", cwd=tmp_path)
    assert_refused(done, "no file can have the name")


def test_half_a_line_of_a_killed_run_is_skipped(pairs):
    table = pairs / "pairs.jsonl"
    rows = read_table(table)
    content = table.read_bytes()
    table.write_bytes(content[:-20])
    assert read_table(table) == rows[:-1]
    table.write_bytes(b"\n" + content.rstrip())  # the line is whole
    assert read_table(table) == rows


@pytest.mark.parametrize(
    ("flags", "words"), [((), "python generate.py"), (("--per-shard", 0), "--per-shard 0: must be")]
)
def test_a_mistake_is_one_sentence(flags, words, tmp_path):
    assert_refused(run("tools.shards", "--pairs", tmp_path, *flags, cwd=tmp_path), words)
