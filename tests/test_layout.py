"""The arrows of the project: who may import whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGES = ["degrade", "extractors", "diffusion", "generate", "benchmark"]
# Each imports those to its left only, so there is no circle.
ORDER = ["common", "data.pack", "data.folder", "data.shards", *STAGES[:4], "data.report",
         "bench.speed",
         *(f"bench.{room}" for room in ("metrics", "pairs", "sr", "inputs", "factors", "generated",
                                        "downstream", "control", "transfer", "figure1")),
         "benchmark"]  # fmt: skip
# Each is imported inside the one function that needs it.
HEAVY = ["torchvision", "lpips", "DISTS_pytorch", "pytorch_fid", "spandrel", "open_clip", "skimage",
         "matplotlib"]  # fmt: skip


def tree(name: str) -> ast.Module:
    return ast.parse((REPO / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    """Last part of the name of the called function."""
    return ast.unparse(node.func).split(".")[-1]


def imported(name: str) -> set[str]:
    """Names of all modules a file imports, also inside its functions; bench.x and data.x whole."""
    modules = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: a relative import"
            below = node.module in ("bench", "data")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= set(names) if below else {node.module or ""}
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            module = node.args[0]
            assert isinstance(module, ast.Constant), f"{name} line {node.lineno}: hidden import"
            modules.add(str(module.value))
    return modules


def test_these_files_and_no_other_hold_the_project():
    found = [*REPO.glob("*.py"), *REPO.glob("bench/*.py"), *REPO.glob("data/*.py")]
    names = {".".join(path.relative_to(REPO).with_suffix("").parts) for path in found}
    assert names == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_files_to_its_left_only(name):
    assert imported(name) & set(ORDER) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", [*STAGES, "bench.sr", "bench.speed"])
def test_a_stage_ends_with_a_short_main_block(name):
    last = tree(name).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert last.end_lineno is not None and last.end_lineno - last.lineno < 6


def test_importing_does_nothing(tmp_path):
    check = (
        "import importlib, sys, torch; seed = torch.initial_seed()\n"
        f"for name in {ORDER}:\n"
        "    importlib.import_module(name)\n"
        "    assert torch.initial_seed() == seed, f'{name} seeded'\n"
        "    assert not torch.cuda.is_initialized(), f'{name} asked for a device'\n"
        f"    assert not set({HEAVY}) & set(sys.modules), name"
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
