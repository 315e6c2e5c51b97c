"""Every command that the README or a docstring shows: its flags exist; the README's run."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import scenes, write, write_pairs
from PIL import Image
from torch.utils.data import DataLoader

import benchmark
from common.cli import parse_args
from common.images import save_image
from common.runtime import Runtime
from tests import commands
from tests.test_scripts import TINY
from tests.tiny import REPO

SOURCES = [REPO / "README.md", REPO / "data/README.md", *sorted(REPO.glob("*.py"))]
SOURCES += [*sorted(REPO.glob("bench/*.py")), *sorted(REPO.glob("tools/*.py"))]
LAUNCHER = r"^(?: *|.*[.:] `|`)(?:python|torchrun --nproc_per_node=\d+) "
COMMAND = re.compile(LAUNCHER + r"((?:-m )?[\w./]+)(.*?)(?:  #.*|`.*)?$", re.M)


def commands_of(path: Path) -> list[tuple[str, str]]:
    """Module and flags of each command in a file."""
    found = COMMAND.findall(path.read_text(encoding="utf-8"))
    return [(name.removeprefix("-m ").removesuffix(".py").replace("/", "."), flags.strip())
            for name, flags in found]  # fmt: skip


EVERY = [(path.relative_to(REPO), *command) for path in SOURCES for command in commands_of(path)]


def test_the_readme_has_all_stages_on_one_page():
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    shown = {name for path, name, _ in EVERY if path == Path("README.md")}
    assert {"extractors", "diffusion", "generate", "benchmark", "bench.sr"} <= shown
    for path in (REPO / "data/README.md", *REPO.glob("docs/*.md")):
        prose = [line for line in path.read_text(encoding="utf-8").splitlines()
                 if not re.match(r"\||python |!\[", line.strip())]  # fmt: skip
        assert max(map(len, prose)) <= 120, path


@pytest.mark.parametrize("path, name, flags", EVERY, ids=str)
def test_every_flag_that_is_shown_exists(path, name, flags):
    module = importlib.import_module(name)
    cfg = parse_args(module.Config, getattr(module, "PRESETS", {}), "", shlex.split(flags))
    if name == "benchmark":  # and acts on a table that is named
        table = benchmark.resolved(cfg, Runtime(torch.device("cpu"))).table
        benchmark.check_flags(cfg, table)


TRAINING = "--batch-size 4 --no-compile"
SMALL = {
    "extractors": f"{TINY['extractors.py']} --no-compile --steps 1 --out runs/{{number}}",
    "diffusion": f"{TRAINING} --steps 1 --crop 16 --out runs/{{number}}",
    "generate": "--num-steps 2",
    "benchmark": "--sr-steps 1",
    "bench.metrics": "",
    "bench.sr": f"{TRAINING} --steps 1 --crop 16",
    "tools.calibrate": "--crop 32 --checkpoint runs/calibrated.safetensors",
    "tools.report": "--pairs out/pairs",
    "tools.shards": "--pairs out/pairs",
}


def test_the_commands_of_the_readme_run(tmp_path):
    """In a folder with small photos, in order, with few steps and small crops."""
    for number, x in enumerate(scenes(4, 128)):
        save_image(tmp_path / f"data/hr/{number}.png", x)
        save_image(tmp_path / f"data/lr/mine/{number}.png", x[:, ::2, ::2])
    for name in ("RealSR", "DRealSR"):
        write_pairs(tmp_path / "data" / name, [f"Canon_{i}" for i in range(4)])
    (tmp_path / "data/pretrained").symlink_to(REPO / "data/pretrained")
    shutil.copytree(REPO / "data/sample", tmp_path / "data/sample")
    (tmp_path / "runs").mkdir()
    shipped = REPO / "data/pretrained/extractors.safetensors"
    shutil.copy(shipped, tmp_path / "runs/calibrated.safetensors")
    for number, (name, flags) in enumerate(commands_of(REPO / "README.md")):
        small = SMALL[name].format(number=number).split()
        if name == "diffusion" and "paper" in flags:
            small += TINY["diffusion.py"].split()
        if "--sr swinir" in flags and name == "benchmark":
            small += ["--data", "realdgen"]  # of the six, each of which takes seconds
        if name == "benchmark" and "control" not in flags:
            small += ["--hr", "data/hr"]
        if name == "generate":
            small += ["--hr", "data/hr", "--lr-ref", "data/lr"]
        done = commands.run(name, *shlex.split(flags), *small, cwd=tmp_path)
        assert done.returncode == 0, f"{name} {flags}: {done.stderr[-500:]}"
    assert len(list(tmp_path.glob("runs/sr/swinir-l-pairs/*.png"))) == 4
    assert (tmp_path / "out/benchmark/enlarged.png").is_file()


TEXT = (REPO / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


def pasted(word: str) -> dict:
    """The names that the snippet with this word leaves behind."""
    (snippet,) = (text for text in SNIPPETS if word in text)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_snippet_on_tensors_runs_as_pasted(tmp_path, monkeypatch):
    """On a smaller photo of the same name."""
    (tmp_path / "data/sample/hr").mkdir(parents=True)
    (tmp_path / "data/sample/lr").symlink_to(REPO / "data/sample/lr")
    with Image.open(REPO / "data/sample/hr/coffee.jpg") as file:
        file.crop((100, 80, 232, 208)).save(tmp_path / "data/sample/hr/coffee.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names = pasted("generate.generate")
    with Image.open("data/sample/hr/coffee.jpg") as file:
        pixels = np.asarray(file, float) / 255
    H, W = pixels.shape[0] // 4 * 4, pixels.shape[1] // 4 * 4
    mean = pixels[:H, :W].reshape(H // 4, 4, W // 4, 4, 3).mean((1, 3))  # of each LR pixel
    for name in ("lr", "synthetic_lr"):
        made = names[name].numpy()
        assert made.shape == (1, 3, H // 4, W // 4) and 0 <= made.min() and made.max() <= 1
        assert np.abs(made[0].transpose(1, 2, 0) - mean).mean() < 0.1


def test_the_data_set_of_the_readme_gives_crops_of_the_same_place(tmp_path):
    """Red and green of HR and LR are the row and the column of an LR pixel."""
    y, x = np.mgrid[:60, :70].astype(np.uint8)
    for name in ("a.png", "more/b.png"):
        lr = np.stack([y, x, np.full_like(x, len(name))], axis=2)
        write(tmp_path / "lr" / name, lr)
        write(tmp_path / "hr" / name, lr.repeat(4, 0).repeat(4, 1))
    pairs = pasted("class Pairs")["Pairs"](tmp_path)
    assert len(pairs) == 2
    places = set()
    for _ in range(20):
        for lr, hr in DataLoader(pairs, batch_size=2):
            assert lr.shape == (2, 3, 48, 48) and hr.shape == (2, 3, 192, 192)
            assert np.array_equal(np.kron(lr, np.ones((1, 1, 4, 4), np.float32)), hr)
            assert [round(255 * float(image[2, 0, 0])) for image in lr] == [5, 10]
            places |= {tuple(np.rint(255 * image[:2, 0, 0].numpy())) for image in lr}
    assert len(places) > 20 and max(places) <= (12, 22)


def test_every_name_in_the_map_from_paper_to_code_exists():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| paper | here |") :].split("\n\n")[0]
    names = re.findall(r"`([a-z]\w*)((?:\.\w+)+)`", table)
    assert len(names) > 10
    for module, path in names:
        thing = importlib.import_module(module)
        for attribute in path[1:].split("."):
            assert hasattr(thing, attribute), f"{module}{path}"
            thing = getattr(thing, attribute)
