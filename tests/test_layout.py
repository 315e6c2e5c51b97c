"""The rooms of the project: who may import whom, that importing does nothing, names used once."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGES = ["degrade", "extractors", "diffusion", "generate", "benchmark"]
# Each imports those to its left only, so there is no circle.
ORDER = [
    "common",
    *(f"common.{room}" for room in ("runtime", "folder", "cli", "files", "images", "photos",
                                    "tiles", "checkpoint", "run", "pairs")),
    "degrade", "additions", "extractors", "diffusion", "generate",
    *(f"bench.{room}" for room in ("metrics", "pairs", "sr", "inputs", "kernels", "factors",
                                   "generated", "separation", "mtf", "leakage", "downstream",
                                   "control", "figure1", "pictures", "remainder")),
    "benchmark",
    *(f"tools.{command}" for command in ("pack", "shards", "report", "export", "calibrate",
                                         "speed")),
]  # fmt: skip
COMMANDS = [
    *STAGES,
    "bench.sr",
    "bench.metrics",
    *(name for name in ORDER if name.startswith("tools.")),
]
# Each is imported inside the one function that needs it.
HEAVY = ["torchvision", "lpips", "DISTS_pytorch", "pytorch_fid", "spandrel", "open_clip", "skimage",
         "matplotlib", "webdataset"]  # fmt: skip
MAY_BE_INSIDE = {*HEAVY, "fcntl", "pillow_heif"}  # fcntl: not on Windows
# Names of functions and classes that stand in several files.
OFTEN = {
    "Config", "main",  # of every command
    "train", "load",  # of what is trained
}  # fmt: skip


def path_of(name: str) -> Path:
    file = REPO / f"{name.replace('.', '/')}.py"
    return file if file.is_file() else REPO / name / "__init__.py"


def tree(name: str) -> ast.Module:
    return ast.parse(path_of(name).read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    """Last part of the name of the called function."""
    return ast.unparse(node.func).split(".")[-1]


def imported_by(node: ast.AST, name: str) -> set[str]:
    """Names of the modules that a statement of the file `name` imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, f"{name} line {node.lineno}: a relative import"
        below = {f"{node.module}.{alias.name}" for alias in node.names}
        return below & set(ORDER) or {node.module}
    if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
        module = node.args[0]
        assert isinstance(module, ast.Constant), f"{name} line {node.lineno}: hidden import"
        return {str(module.value)}
    return set()


def imported(name: str) -> set[str]:
    """Names of all modules a file imports, also inside its functions."""
    return set().union(*(imported_by(node, name) for node in ast.walk(tree(name))))


def test_these_files_and_no_other_hold_the_project():
    folders = ("", "common/", "bench/", "tools/", "data/", "docs/")
    found = [path for folder in folders for path in REPO.glob(f"{folder}*.py")]
    names = {".".join(path.relative_to(REPO).with_suffix("").parts) for path in found}
    assert {name.removesuffix(".__init__") for name in names} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_files_to_its_left_only(name):
    assert imported(name) & set(ORDER) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_only_heavy_optional_packages_are_imported_inside_a_function(name):
    functions = [n for n in ast.walk(tree(name)) if isinstance(n, ast.FunctionDef)]
    inside = set().union(*(imported_by(n, name) for f in functions for n in ast.walk(f)))
    assert {module.split(".")[0] for module in inside} <= MAY_BE_INSIDE | {"torch"}


def test_common_names_no_stage_and_no_flag_of_a_stage():
    """Flags that all commands or all trainings have, and those of callers, are no flag of one."""
    for name in ORDER[: ORDER.index("degrade")]:
        strings = [
            node.value for node in ast.walk(tree(name))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]  # fmt: skip
        for word in ("degrade.py", "extractors.py", "diffusion.py", "generate.py", "--recipe",
                     "--t-start", "vqvae", "lr_ref", "--lr-ref"):  # fmt: skip
            assert not any(word in text for text in strings), f"{name}: {word}"


def test_a_function_name_stands_in_one_file():
    files = defaultdict(list)
    for name in ORDER:
        for node in tree(name).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                files[node.name].append(name)
    twice = {key: names for key, names in files.items() if len(names) > 1 and key not in OFTEN}
    assert not twice, twice


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_a_short_main_block(name):
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
