"""The stages as a user runs them: from an empty folder, on the sample photos, in order."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from common.checkpoint import load_checkpoint
from tests.commands import assert_refused, files_of, run, run_two
from tests.tiny import REPO

TINY = {
    "extractors.py": "--batch-size 4 --num-samples 1 --crop 64 --vq-crop 32 --vq-channels 8 "
    "--vq-multipliers 1 2 2 --vq-blocks 1 --vq-codes 16 --deg-channels 8 --deg-blocks 1 "
    "--deg-dim 16 --mod-channels 8",
    "diffusion.py": "--batch-size 4 --crop 16 --widths 8 16 --blocks 1 --attention 1 "
    "--mod-channels 8 --cond-channels 4",
    "generate.py": "--t-start 10 --num-steps 2 --candidates 2",
}
STEPS = {"extractors.py": (2, 2, 3), "diffusion.py": (3,)}  # one more than the runs below have


def tiny(script: str, *args: object) -> list[object]:
    return [script, *TINY[script].split(), *args]


def step_of(path: Path) -> int:
    return load_checkpoint(path)["step"]


@pytest.fixture(scope="module", autouse=True)
def sample_photos_alone(tmp_path_factory):
    """As in a fresh clone: photos of the user in data/ do not matter."""
    data = tmp_path_factory.mktemp("data")
    (data / "sample").symlink_to(REPO / "data/sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.files.DATA", data)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the first two stages ran for two steps, and their runs."""
    cwd = tmp_path_factory.mktemp("trained")
    scripts = ("extractors.py", "diffusion.py")
    return cwd, [run(*tiny(script, "--steps", 2), cwd=cwd, as_main=True) for script in scripts]


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(trained[0], tmp_path / "copy")


def test_all_stages_run_from_an_empty_folder(trained):
    cwd, runs = trained
    for stage, done in zip(("extractors", "diffusion"), runs, strict=True):
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert "preset small" in done.stdout
        lines = (cwd / "runs" / stage / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == step_of(cwd / "runs" / stage / "last.pt") == 2
    files = {name for name in files_of(cwd) if "/photos/" not in name}  # the decoded photos
    phases = [f"extractors/{phase}" for phase in ("vqvae", "content", "last")]
    phases.append("diffusion/last")
    expected = {f"runs/{phase}.{kind}" for phase in phases for kind in ("pt", "png")}
    assert files == expected | {"runs/extractors/log.jsonl", "runs/diffusion/log.jsonl"}

    photo = REPO / "data" / "sample" / "hr" / "chelsea.jpg"
    command = [sys.executable, *tiny("generate.py", "--hr", photo, "--out", "pairs")]
    command[1] = REPO / "generate.py"  # in a process of its own
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    width, height = (side // 4 * 4 for side in Image.open(photo).size)
    assert Image.open(cwd / "pairs" / "hr" / "chelsea.png").size == (width, height)
    assert Image.open(cwd / "pairs" / "lr" / "chelsea.png").size == (width // 4, height // 4)
    assert (cwd / "pairs" / "preview.png").is_file()
    assert len((cwd / "pairs" / "pairs.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("script", STEPS)
def test_the_same_command_with_more_steps_resumes(copied, script):
    path = Path("runs") / Path(script).stem / "last.pt"
    done = run(*tiny(script, "--steps", *STEPS[script]), cwd=copied)
    assert done.returncode == 0, done.stderr
    assert f"resuming {path} at step 2" in done.stdout
    assert f"{path}: from now on --steps" in done.stdout
    assert step_of(copied / path) == 3
    again = run(*tiny(script, "--steps", *STEPS[script]), cwd=copied)
    assert again.returncode == 0 and "resuming" not in again.stdout
    assert f"{path} is finished" in again.stdout


@pytest.mark.parametrize("script", STEPS)
def test_two_processes_train_and_resume(copied, script):
    first, second = run_two(*tiny(script, "--steps", *STEPS[script]), cwd=copied)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    path = Path("runs") / Path(script).stem / "last.pt"
    assert "preset small" in first.stdout and f"resuming {path} at step 2" in first.stdout
    assert second.stdout == ""  # one process prints
    assert step_of(copied / path) == 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("extractors.py --steps 2 --seed 5", "--out"),
        ("extractors.py --steps 2 --recipes bsrgan", "--out"),
        ("extractors.py --steps 2 --as-printed", "--out"),
        ("extractors.py --steps 2 --margin 1", "--out"),
        (f"extractors.py --steps 2 --hr {REPO}/data/sample/hr", "--out"),
        ("extractors.py --steps 2 --start-from runs/extractors/last.pt", "--out"),
        ("extractors.py --steps 3 2 2", "delete it to train that phase again"),
        ("extractors.py --steps 2 3 2", "delete it to train that phase again"),
        ("diffusion.py --steps 5 --widths 8 24", "--out"),
    ],
)
def test_a_flag_that_a_trained_phase_would_ignore_is_refused(trained, command, words):
    before = files_of(trained[0])
    script, *flags = command.split()
    assert_refused(run(*tiny(script, *flags), cwd=trained[0]), words)
    assert files_of(trained[0]) == before


def test_a_crop_that_no_photo_has_names_the_largest_that_works(trained, tmp_path):
    for script in ("extractors.py", "diffusion.py"):
        crop, flags = "2048", ("--steps", 0, "--out", tmp_path / script)
        for _ in range(2 if script == "extractors.py" else 1):  # HR photos, and real LR photos
            done = run(*tiny(script, "--crop", crop, *flags), cwd=trained[0])
            assert_refused(done, f"--crop {crop}: ")
            crop = re.search(r"--crop (\d+) is the largest", done.stderr)[1]
        assert run(*tiny(script, "--crop", crop, *flags), cwd=trained[0]).returncode == 0


def test_missing_stage_1_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("common.checkpoint.DATA", tmp_path)  # no data/pretrained there
    assert_refused(run("diffusion.py", cwd=tmp_path), "python extractors.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "extractors.py --hr nowhere",
        "extractors.py --crop 50",
        "extractors.py --recipes foo",
        "extractors.py --num-samples 9",
        "extractors.py --accumulate 3",
        "extractors.py --seed 99999999999999999999",
        "diffusion.py --lr nowhere",
        "diffusion.py --accumulate 3",
        "diffusion.py --batch-size 5",
        "diffusion.py --recipes foo",
        "diffusion.py --without foo",
        "diffusion.py --save-every 0",
        "diffusion.py --crop 31",
    ],
)
def test_wrong_flags_are_refused_before_any_work(trained, tmp_path, command):
    script, flag, value = command.split()
    done = run(*tiny(script, flag, value, "--out", tmp_path / "out"), cwd=trained[0])
    assert_refused(done, f"{flag} {value}")
    assert not (tmp_path / "out").exists()
