"""common/folder.py: what is written over was ours, and a folder has one writer."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from common import UserError
from common.files import write_text
from common.folder import HEADER, RECORD, close_all, out_folder
from common.pairs import PairFolder
from tests.commands import assert_refused, run, start
from tests.drawn import few_draws_of_theta, photo, write, write_pairs
from tests.test_scripts import TINY
from tests.tiny import CPU, REPO


@pytest.fixture(autouse=True)
def closed():
    """No folder stays open for the next test."""
    yield
    close_all()


def test_only_files_that_were_made_there_are_replaced(tmp_path):
    out = tmp_path / "out"
    folder = out_folder(out, CPU)
    assert not out.exists()  # nothing is written before something is made
    write_text(out / "a" / "x.txt", "one")
    write_text(out / "a" / "x.txt", "two")
    (out / "a" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="mine.txt is there, but not made by this program"):
        write_text(out / "a" / "mine.txt", "two")
    assert (out / "a" / "mine.txt").read_text() == "mine"
    folder.close()
    assert (out / RECORD).read_bytes() == HEADER + b"a/x.txt\n"
    write_text(out_folder(out, CPU).path / "a" / "x.txt", "three")  # another command
    with pytest.raises(UserError, match="mine.txt"):
        out_folder(out, CPU).check([out / "a" / "mine.txt"])
    write_text(tmp_path / "elsewhere.txt", "no folder of results is open there")


def test_a_file_that_is_gone_is_ours_no_more(tmp_path):
    folder = out_folder(tmp_path / "out", CPU)
    write_text(tmp_path / "out/x.txt", "one")
    (tmp_path / "out/x.txt").unlink()
    folder.close()
    assert not (tmp_path / "out" / RECORD).exists()  # nothing is left to remember
    (tmp_path / "out/x.txt").write_text("mine")
    with pytest.raises(UserError, match="x.txt"):
        write_text(out_folder(tmp_path / "out", CPU).path / "x.txt", "two")


def test_a_copy_of_the_table_made_during_a_run_stays(tmp_path):
    out = tmp_path / "out"
    pairs = PairFolder(out, ["x"], "field", (), CPU)
    for side in ("hr", "lr"):
        write_text(out / side / "x.png", side)
    pairs.add([{"hr": "hr/x.png", "lr": "lr/x.png", "field": 1}])
    shutil.copy(out / "pairs.0.jsonl", out / "pairs.copy.jsonl")
    assert len(pairs.finish()) == 1
    pairs.close()
    assert (out / "pairs.jsonl").read_bytes() == (out / "pairs.copy.jsonl").read_bytes()
    assert not (out / "pairs.0.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"my notes\n", HEADER[:20], None])
def test_a_record_of_somebody_else_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(HEADER)
    if content is None:
        (tmp_path / RECORD).symlink_to(tmp_path / "other")
    else:
        (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(UserError, match="is not of this program"):
        out_folder(tmp_path, CPU)
    assert (tmp_path / "other").read_bytes() == HEADER


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/hr").symlink_to(tmp_path / "photos")
    folder = out_folder(tmp_path / "out", CPU)
    with pytest.raises(UserError, match="hr is a link to another folder"):
        folder.check([tmp_path / "out/hr/a.png"])
    with pytest.raises(UserError, match="hr is a link to another folder"):
        write_text(tmp_path / "out/hr/a.png", "x")
    assert not list((tmp_path / "photos").iterdir())
    (tmp_path / "same").symlink_to(tmp_path / "out")  # the folder itself may be one
    assert out_folder(tmp_path / "same", CPU) is folder


# ---- every command -----------------------------------------------------------------------------

WEIGHTS = REPO / "data/pretrained/extractors.safetensors"
EXTRACTORS = f"extractors.py {TINY['extractors.py']} --hr hr --lr lr --steps 1 --save-every 1"
DIFFUSION = f"diffusion.py {TINY['diffusion.py']} --lr lr --hr hr --steps 1 --no-compile"
SR = "bench.sr --preset smoke --steps 1 --crop 16 --batch-size 1 --hr hr"
COMMANDS = {
    "degrade": "degrade.py --hr hr --out OUT",
    "generate": "generate.py --hr hr --lr-ref lr --out OUT",
    "extractors": f"{EXTRACTORS} --no-compile --out OUT",
    "diffusion": f"{DIFFUSION} --checkpoint {WEIGHTS} --out OUT",
    "sr": f"{SR} --out OUT",
    "upscale": "bench.sr --sr fsrcnn --upscale lr --start-from net.safetensors --out OUT",
    "benchmark": "benchmark.py --table mtf --pairs pairs --images 2 --num-steps 1 --out OUT",
    "pack": "tools.pack --photos hr --size 32 --out OUT/hr.npy",
    "shards": "tools.shards --pairs made --out OUT",
    "report": "tools.report --pairs OUT",
    "export": "tools.export --checkpoint trained/last.pt --out OUT/x.safetensors",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with what the commands need."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(3):
        write(folder / f"hr/{i}.png", photo(i, 128))
        write(folder / f"lr/{i}.png", photo(i + 5, 96))
    write_pairs(folder / "pairs", [f"Canon_{i}" for i in range(4)])
    for command in (
        f"{SR} --out sr", "generate.py --hr hr --lr-ref lr --out made",
        COMMANDS["diffusion"].replace("OUT", "trained"),
    ):  # fmt: skip
        script, *flags = command.split()
        assert run(script, *flags, cwd=folder).returncode == 0
    shutil.copy(folder / "sr/fsrcnn-realesrgan.safetensors", folder / "net.safetensors")
    return folder


def written(folder: Path) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(file.relative_to(folder).as_posix() for file in files)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_touches_a_file_that_it_has_not_made(inputs, tmp_path, name, monkeypatch):
    """A file of the user at each name that the command writes, and then at all of them."""
    few_draws_of_theta(monkeypatch)
    script, *flags = COMMANDS[name].split()

    def command(out: Path):
        if name == "report":  # it writes into the folder of pairs
            shutil.copytree(inputs / "made", out, dirs_exist_ok=True)
        return run(script, *(flag.replace("OUT", str(out)) for flag in flags), cwd=inputs)

    assert command(tmp_path / "clean").returncode == 0
    names = written(tmp_path / "clean")
    names = ["report.html"] if name == "report" else names
    assert names
    for i, chosen in enumerate([[one] for one in names if "/" not in one] + [names]):
        out = tmp_path / str(i)
        for file in chosen:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_text("mine")
        assert_refused(command(out), str(out))
        assert all((out / file).read_text() == "mine" for file in chosen)
        assert name == "report" or set(written(out)) <= {*chosen, RECORD}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "report"])
def test_an_empty_out_is_refused(inputs, name):
    script, *flags = COMMANDS[name].split()
    at = next(i for i, flag in enumerate(flags) if "OUT" in flag)
    before = written(inputs)
    done = run(script, *flags[:at], "", *flags[at + 1 :], cwd=inputs)
    assert_refused(done, "--out is empty")
    assert written(inputs) == before


@pytest.mark.parametrize("name", ["extractors", "sr", "degrade"])
def test_a_folder_has_one_writer(inputs, tmp_path, name):
    script, *flags = COMMANDS[name].split()
    flags = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
    process = start(script, *flags, "--seed", "1", cwd=inputs)
    deadline, record = time.monotonic() + 60, tmp_path / "out" / RECORD
    while time.monotonic() < deadline and not (
        record.exists() and record.stat().st_size > len(HEADER)
    ):
        time.sleep(0.002)  # until it names a file: then the folder is locked
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.2)  # until all its threads have stopped
    try:
        before = written(tmp_path / "out")
        done = run(script, *flags, cwd=inputs)
        assert_refused(done, "another command is writing there")
        assert written(tmp_path / "out") == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
