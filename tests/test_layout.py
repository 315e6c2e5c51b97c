"""The arrows of the project: who may import whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGES = ["degrade", "extractors", "diffusion", "generate", "sr", "benchmark"]
# Each imports those to its left only.
ORDER = [
    "common",
    *STAGES[:4],
    "metrics",
    "pairs",
    "sr",
    "factors",
    "transfer",
    "downstream",
    "figure1",
    "benchmark",
]
# Each is imported inside the one function that needs it.
HEAVY = ["torchvision", "lpips", "DISTS_pytorch", "pytorch_fid", "spandrel", "open_clip", "skimage"]


def tree(name: str) -> ast.Module:
    return ast.parse((REPO / f"{name}.py").read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    """Last part of the name of the called function."""
    return ast.unparse(node.func).split(".")[-1]


def imported(name: str) -> set[str]:
    """Top-level names of all modules a file imports, also inside its functions."""
    modules = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py line {node.lineno}: a relative import"
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            module = node.args[0]
            assert isinstance(module, ast.Constant), f"{name}.py line {node.lineno}: hidden import"
            modules.add(str(module.value).split(".")[0])
    return modules


def test_these_files_and_no_other_hold_the_project():
    assert {p.stem for p in REPO.glob("*.py")} == set(ORDER)
    assert {p.stem for p in REPO.glob("bench/*.py")} == {"speed"}


@pytest.mark.parametrize("name", ["data/pack", "data/shards"])
def test_a_file_of_data_imports_common_alone_as_all_files_may_import_it(name):
    assert imported(name) & {*ORDER, "bench", "data"} <= {"common"}


def test_no_stage_imports_a_room_of_the_benchmark():
    for name in ORDER[: ORDER.index("benchmark")]:
        assert "bench" not in imported(name)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_files_to_its_left_only(name):
    assert imported(name) & set(ORDER) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize(
    "path", sorted([*REPO.glob("*.py"), *REPO.glob("tests/*.py")]), ids=lambda p: p.name
)
def test_no_file_imports_random(path):
    name = path.relative_to(REPO).with_suffix("").as_posix()
    assert "random" not in imported(name)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_ends_with_a_short_main_block(name):
    last = tree(name).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert last.end_lineno is not None and last.end_lineno - last.lineno < 6


@pytest.mark.parametrize("name", ORDER)
def test_importing_does_nothing(name, tmp_path):
    check = (
        f"import sys, torch; seed = torch.initial_seed(); import {name}; "
        "assert torch.initial_seed() == seed, 'seeded'; "
        "assert not torch.cuda.is_initialized(), 'asked for a device'; "
        f"early = set({HEAVY}) & set(sys.modules); assert not early, early"
    )
    run = subprocess.run(
        [sys.executable, "-c", check],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
