"""Every command that the README or a docstring shows: its flags exist; the README's run."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from drawn import scenes, write_pairs

from common.cli import parse_args
from common.images import save_image
from tests import commands

REPO = Path(__file__).resolve().parents[1]
SOURCES = [REPO / "README.md", REPO / "data/README.md", *sorted(REPO.glob("*.py"))]
SOURCES += [*sorted(REPO.glob("bench/*.py")), *sorted(REPO.glob("tools/*.py"))]
LAUNCHER = r"^ *(?:python|torchrun --nproc_per_node=\d+) "
COMMAND = re.compile(LAUNCHER + r"((?:-m )?[\w./]+)(.*?)(?:  #.*)?$", re.M)


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
    for path in (REPO / "data/README.md", REPO / "docs/results.md"):
        prose = [line for line in path.read_text(encoding="utf-8").splitlines()
                 if not re.match(r"\||python |!\[", line.strip())]  # fmt: skip
        assert max(map(len, prose)) <= 120, path


@pytest.mark.parametrize("path, name, flags", EVERY, ids=str)
def test_every_flag_that_is_shown_exists(path, name, flags):
    module = importlib.import_module(name)
    parse_args(module.Config, getattr(module, "PRESETS", {}), "", shlex.split(flags))


TRAINING = "--batch-size 4 --no-compile"
SMALL = {
    "extractors": f"{TRAINING} --steps 1 --num-samples 1 --crop 64 --vq-crop 32 --vq-channels 8 "
    "--vq-multipliers 1 2 2 --vq-blocks 1 --vq-codes 16 --deg-channels 8 --deg-blocks 1 "
    "--deg-dim 16 --mod-channels 8 --out runs/{number}",
    "diffusion": f"{TRAINING} --steps 1 --crop 16 --out runs/{{number}}",
    "generate": "--num-steps 2",
    "benchmark": "--sr-steps 1 --t-starts 2",
    "bench.sr": f"{TRAINING} --steps 1 --crop 16",
    "tools.calibrate": "--crop 32 --checkpoint runs/calibrated.safetensors",
    "tools.report": "--pairs out/pairs",
    "tools.shards": "--pairs out/pairs",
}
PAPER = "--widths 8 16 --blocks 1 --attention 1 --mod-channels 8 --cond-channels 4"


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
    shipped = REPO / "data/pretrained/diffusion.safetensors"
    shutil.copy(shipped, tmp_path / "runs/calibrated.safetensors")
    for number, (name, flags) in enumerate(commands_of(REPO / "README.md")):
        small = SMALL[name].format(number=number).split()
        if name == "diffusion" and "paper" in flags:
            small += PAPER.split()
        if name == "generate":
            small += ["--hr", "data/hr", "--lr-ref", "data/lr"]
        done = commands.run(name, *shlex.split(flags), *small, cwd=tmp_path)
        assert done.returncode == 0, f"{name} {flags}: {done.stderr[-500:]}"
    assert len(list(tmp_path.glob("runs/sr/swinir-l-pairs/*.png"))) == 4


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
