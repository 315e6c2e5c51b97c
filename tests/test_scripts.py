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

import common

REPO = Path(__file__).resolve().parents[1]
TINY = {
    "extractors.py": "--batch-size 2 --num-samples 1 --crop 64 --vq-crop 32 --vq-channels 8 "
    "--vq-multipliers 1 2 2 --vq-blocks 1 --vq-codes 16 --deg-channels 8 --deg-blocks 1 "
    "--deg-dim 16 --mod-channels 8",
    "diffusion.py": "--batch-size 2 --crop 16 --widths 8 16 --blocks 1 --attention 1 "
    "--mod-channels 8 --cond-channels 4",
    "generate.py": "--t-start 10 --num-steps 2 --candidates 2",
}


PARTS = ("vqvae", "content", "last")


def run(
    script: str | Path, *args: object, cwd: Path, processes: int = 1
) -> subprocess.CompletedProcess:
    """Run a stage with the flags that make it tiny, and further ones."""
    launcher: list[object] = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}"]
    command = [*launcher, REPO / script, *TINY[Path(script).name].split(), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(a) for a in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def assert_well(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def step_of(path: Path) -> int:
    return common.load_checkpoint(path)["step"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the first two stages ran for two steps, and what they said."""
    cwd = tmp_path_factory.mktemp("trained")
    return cwd, [run(s, "--steps", 2, cwd=cwd) for s in ("extractors.py", "diffusion.py")]


def test_two_stages_train_from_an_empty_folder(trained):
    cwd, done = trained
    for stage, finished in zip(("extractors", "diffusion"), done, strict=True):
        assert_well(finished)
        assert "preset small" in finished.stdout
        lines = (cwd / "runs" / stage / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 2
    files = {str(p.relative_to(cwd)) for p in cwd.rglob("*") if p.is_file()}
    decoded = {file for file in files if "/photos/" in file}
    assert {Path(file).suffix for file in decoded} == {".pixels", ".npy"}
    assert files - decoded == {
        *(f"runs/extractors/{part}.{kind}" for part in PARTS for kind in ("pt", "png")),
        "runs/extractors/log.jsonl",
        "runs/diffusion/last.pt",
        "runs/diffusion/last.png",
        "runs/diffusion/log.jsonl",
    }
    assert step_of(cwd / "runs/extractors/last.pt") == step_of(cwd / "runs/diffusion/last.pt") == 2


def test_generate_makes_a_pair_of_a_sample_photo(trained):
    cwd = trained[0]
    photo = REPO / "data" / "sample" / "hr" / "chelsea.jpg"
    done = run("generate.py", "--hr", photo, "--out", "pairs", cwd=cwd)
    assert_well(done)
    with Image.open(photo) as source:
        width, height = (side // 4 * 4 for side in source.size)
    with Image.open(cwd / "pairs" / "hr" / "chelsea.png") as hr:
        assert hr.size == (width, height)
    with Image.open(cwd / "pairs" / "lr" / "chelsea.png") as lr:
        assert lr.size == (width // 4, height // 4)
    assert (cwd / "pairs" / "preview.png").is_file()
    assert len((cwd / "pairs" / "pairs.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("script", ["extractors.py", "diffusion.py"])
def test_the_same_command_with_more_steps_resumes(trained, tmp_path, script):
    cwd = shutil.copytree(trained[0], tmp_path / "copy")
    steps = ("--steps", 2, 2, 3) if script == "extractors.py" else ("--steps", 3)
    done = run(script, *steps, cwd=cwd)
    assert_well(done)
    path = Path("runs") / Path(script).stem / "last.pt"
    assert f"resuming {path} at step 2" in done.stdout
    assert f"{path}: from now on --steps" in done.stdout
    assert step_of(cwd / path) == 3
    again = run(script, *steps, cwd=cwd)
    assert_well(again)
    assert "resuming" not in again.stdout  # there is nothing left to do
    assert f"{path} is finished" in again.stdout


@pytest.mark.parametrize(
    "flags",
    ["--seed 5", "--recipes bsrgan", "--as-printed", "--margin 1", "--hr {hr}",
     "--start-from runs/extractors/last.pt"],
)  # fmt: skip
def test_a_flag_that_a_finished_run_would_ignore_is_refused(trained, flags):
    cwd = trained[0]
    before = {path: path.read_bytes() for path in (cwd / "runs/extractors").glob("*.*")}
    flags = flags.format(hr=REPO / "data/sample/hr")
    done = run("extractors.py", *flags.split(), "--steps", 2, cwd=cwd)
    assert done.returncode == 2 and "--out" in done.stderr and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_a_part_whose_beginning_would_change_is_refused(trained):
    cwd = trained[0]
    before = {path: path.read_bytes() for path in (cwd / "runs/extractors").glob("*.*")}
    for steps in ((3, 2, 2), (2, 3, 2)):
        done = run("extractors.py", "--steps", *steps, cwd=cwd)
        assert done.returncode == 2 and "delete it to train that part again" in done.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_another_configuration_needs_another_folder(trained):
    cwd = trained[0]
    before = (cwd / "runs/diffusion/last.pt").read_bytes()
    done = run("diffusion.py", "--steps", 5, "--widths", 8, 24, cwd=cwd)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "--out" in done.stderr
    assert (cwd / "runs/diffusion/last.pt").read_bytes() == before


def test_a_crop_that_no_photo_has_names_the_largest_that_works(trained, tmp_path):
    for script, sources in (("extractors.py", 1), ("diffusion.py", 2)):
        crop = 2048
        for _ in range(sources):  # real LR photos, then HR photos
            flags = ("--crop", crop, "--steps", 0, "--out", tmp_path / script)
            done = run(script, *flags, cwd=trained[0])
            assert done.returncode == 2 and "Traceback" not in done.stderr
            crop = re.search(rf"--crop {crop}: .*; --crop (\d+) is the largest", done.stderr)[1]
        assert_well(run(script, "--crop", crop, *flags[2:], cwd=trained[0]))


def test_missing_stage_1_names_the_command_that_makes_it(tmp_path):
    """Beside scripts without data/pretrained."""
    (tmp_path / "data").mkdir()
    for name in ("common.py", "degrade.py", "extractors.py", "diffusion.py", "data/pack.py"):
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / "here").mkdir()
    done = run(tmp_path / "diffusion.py", cwd=tmp_path / "here")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "python extractors.py" in done.stderr.strip().splitlines()[-1]
    assert list((tmp_path / "here").iterdir()) == []


def test_two_processes_train_and_resume(tmp_path):
    for script in ("extractors.py", "diffusion.py"):
        path = tmp_path / "runs" / Path(script).stem / "last.pt"
        done = run(script, "--steps", 1, cwd=tmp_path, processes=2)
        assert_well(done)
        assert step_of(path) == 1
        assert done.stdout.count("preset small") == 1  # one process speaks
        more = (1, 1, 2) if script == "extractors.py" else (2,)
        done = run(script, "--steps", *more, cwd=tmp_path, processes=2)
        assert_well(done)
        assert "resuming" in done.stdout
        assert step_of(path) == 2


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("extractors.py --hr nowhere", "nowhere"),
        ("extractors.py --crop 50", "--crop 50"),
        ("extractors.py --recipes foo", "foo"),
        ("extractors.py --num-samples 9", "--num-samples 9"),
        ("extractors.py --accumulate 3", "--accumulate 3"),
        ("extractors.py --seed 99999999999999999999", "--seed 99999999999999999999"),
        ("diffusion.py --lr nowhere", "nowhere"),
        ("diffusion.py --accumulate 3", "--accumulate 3"),
        ("diffusion.py --without foo", "--without foo"),
        ("diffusion.py --save-every 0", "--save-every 0"),
        ("diffusion.py --crop 31", "--crop 31"),
        ("generate.py --t-start 501", "--t-start 501"),
        ("generate.py --eta 2", "--eta 2"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(trained, tmp_path, command, word):
    script, *flags = command.split()
    done = run(script, *flags, "--out", tmp_path / "out", cwd=trained[0])
    assert done.returncode == 2 and word in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
