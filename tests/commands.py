"""Run the command line of a stage in a process that has imported torch, which takes seconds."""

import contextlib
import importlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.cli import launch
from common.folder import RECORD

FORKSERVER = multiprocessing.get_context("forkserver")  # its processes have torch from the start
FORKSERVER.set_forkserver_preload(["generate"])


def run(script: str, *args: object, cwd: Path) -> subprocess.CompletedProcess:
    """`python script args` in this process; for `python -m a.b` the script is a.b."""
    stage = importlib.import_module(script.removesuffix(".py"))
    out, err, code = io.StringIO(), io.StringIO(), 0

    def end(code: int) -> None:  # in place of os._exit, which would end this process
        if dist.is_initialized():
            dist.destroy_process_group()
        raise SystemExit(code)

    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.setattr(os, "_exit", end)
        try:
            main = stage.main if hasattr(stage, "main") else stage.train
            launch(main, stage.Config, getattr(stage, "PRESETS", {}), "")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def run_alone(
    environment: dict[str, str], script: str, args: tuple, cwd: Path
) -> subprocess.CompletedProcess:
    """The body of a process of `start` and `run_two`."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    return run(script, *args, cwd=cwd)


def start(script: str, *args: object, cwd: Path) -> multiprocessing.process.BaseProcess:
    """Start `python script args` in a process that can be killed."""
    process = FORKSERVER.Process(target=run_alone, args=({}, script, args, cwd))
    process.start()
    return process


def run_two(script: str, *args: object, cwd: Path) -> list[subprocess.CompletedProcess]:
    """Two processes with the environment that `torchrun --nproc_per_node=2 script args` sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with ProcessPoolExecutor(2, FORKSERVER) as pool:
        runs = [
            pool.submit(run_alone, world | {"RANK": rank, "LOCAL_RANK": rank}, script, args, cwd)
            for rank in "01"
        ]
        return [future.result(timeout=120) for future in runs]


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one sentence that names what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, but of the records of what was made there."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != RECORD]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
