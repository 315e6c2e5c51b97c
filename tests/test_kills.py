"""Commands that are killed at any moment, with changes in between: every row is true, nothing lost.

By default a few kills of each command; -m slow has twenty.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_checkpoint
from common.pairs import content_of
from degrade import Degradation, degrade
from tests.commands import files_of, run, start
from tests.drawn import photo, write
from tests.test_folder import WEIGHTS
from tests.test_scripts import TINY
from tests.tiny import CONFIG, built, save_net

COUNTS = [3, pytest.param(20, marks=pytest.mark.slow)]
SIDES = ("hr", "lr")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two folders of photos with the same names, references, and small weights."""
    for i in range(8):
        for number, name in enumerate(("hr", "other")):
            write(tmp_path / f"{name}/{i}.png", photo(i + 20 * number, 96))
    for i in range(2):
        write(tmp_path / f"lr/{i}.png", photo(40 + i, 64))
    save_net(tmp_path / "net.pt", built(), CONFIG)
    return tmp_path


def rows_in(out: Path) -> list[dict]:
    """The rows of all tables; the last line of a killed process may be torn."""
    rows = []
    for table in out.glob("pairs*.jsonl"):
        for line in table.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                assert table.name != "pairs.jsonl"
    return rows


def assert_true(out: Path, photos: dict[tuple, Path], lr_of) -> int:
    """Each row holds a whole pair whose HR is the row's photo and whose LR was made of it."""
    rows = rows_in(out)
    for row in rows:
        source = photos[tuple(row["photo"][1:2] + row["photo"][3:])]
        assert row["made"] == {side: content_of(out / row[side]) for side in SIDES}
        np.testing.assert_array_equal(pixels(out / row["hr"]), pixels(source))
        np.testing.assert_array_equal(pixels(out / row["lr"]), lr_of(row, source))
    return len(rows)


def kill_at_random(draw: np.random.Generator, script: str, args: tuple, cwd: Path) -> bool:
    """Run a command and kill it at a random moment; False if it had ended before."""
    process = start(script, *args, cwd=cwd)
    time.sleep(draw.uniform(0.05, 0.9))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def killed_and_true(folder: Path, count: int, script: str, changes: list[tuple], lr_of) -> None:
    """A command is killed `count` times, with one of the changes each; then it ends as undisturbed.

    Between the kills all rows are true, and a file of the user stays.
    """
    photos = {
        tuple(content_of(f)): f for name in ("hr", "other") for f in (folder / name).iterdir()
    }
    draw, out = np.random.default_rng(count), folder / "out"
    kills = seen = 0
    for _ in range(count):
        args = changes[int(draw.integers(len(changes)))]
        kills += kill_at_random(draw, script, (*args, "--out", "out"), folder)
        seen += assert_true(out, photos, lr_of) if out.is_dir() else 0
        if out.is_dir():
            (out / "mine.txt").write_text("mine")
    assert kills > 0
    for args in changes[:2]:
        assert run(script, *args, "--out", "out", cwd=folder).returncode == 0
        assert run(script, *args, "--out", "fresh", cwd=folder).returncode == 0
        assert assert_true(out, photos, lr_of) == 8
        found = files_of(out)
        assert found.pop("mine.txt", b"mine") == b"mine"
        assert found == files_of(folder / "fresh")
        shutil.rmtree(folder / "fresh")


@pytest.mark.parametrize("count", COUNTS)
def test_degrade_is_killed(folder, count):
    def lr_of(row: dict, source: Path) -> np.ndarray:
        hr = torch.from_numpy(pixels(source).copy()).permute(2, 0, 1)[None] / 255
        lr = degrade(hr, Degradation.from_json([json.dumps(row["theta"])]))[0]
        return (lr * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    changes = [("--hr", "hr"), ("--hr", "other", "--recipe", "bsrgan"), ("--hr", "other"),
               ("--hr", "hr", "--seed", 1)]  # fmt: skip
    killed_and_true(folder, count, "degrade.py", changes, lr_of)


@pytest.mark.parametrize("count", COUNTS)
def test_generate_is_killed(folder, count):
    flags = ("--lr-ref", "lr", "--checkpoint", "net.pt", "--t-start", 5, "--num-steps", 2)
    lr: dict[tuple, np.ndarray] = {}
    for name in ("hr", "other"):  # undisturbed
        assert (
            run("generate.py", "--hr", name, *flags, "--out", name + "-out", cwd=folder).returncode
            == 0
        )
        for row in rows_in(folder / (name + "-out")):
            lr[name, row["hr"]] = pixels(folder / (name + "-out") / row["lr"])
    changes = [("--hr", name, *flags) for name in ("hr", "other")]
    killed_and_true(
        folder, count, "generate.py", changes, lambda row, source: lr[source.parent.name, row["hr"]]
    )


@pytest.mark.parametrize("count", COUNTS)
def test_a_training_is_killed(folder, count):
    """A checkpoint is always whole, and in the end equals that of an undisturbed run."""
    shutil.copy(WEIGHTS, folder / "stage-1.safetensors")
    flags = "--steps 60 --save-every 2 --log-every 1 --no-compile --checkpoint stage-1.safetensors"
    args = (*TINY["diffusion.py"].split(), "--lr", "lr", "--hr", "hr", *flags.split(), "--out")
    draw, kills, out = np.random.default_rng(count), 0, folder / "out"
    for i in range(count):
        kills += kill_at_random(draw, "diffusion.py", (*args, "out"), folder)
        if (out / "last.pt").is_file():
            assert load_checkpoint(out / "last.pt")["step"] % 2 == 0
            (out / "mine.pt").write_text("mine")
        if i == 1 and (out / "before.pt").is_file():
            os.truncate(out / "last.pt", 1000)
    assert kills > 0
    for name in ("out", "fresh"):
        assert run("diffusion.py", *args, name, cwd=folder).returncode == 0
    ours, expected = (load_checkpoint(folder / name / "last.pt") for name in ("out", "fresh"))
    assert ours["step"] == 60 and not list(out.glob(".realdgen-*"))
    for kind in ("net", "ema"):
        assert all(torch.equal(value, expected[kind][k]) for k, value in ours[kind].items())
    assert not (out / "mine.pt").exists() or (out / "mine.pt").read_text() == "mine"
