"""Run the command line of a stage in a process that has imported torch, which takes seconds."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common import cli
from common.folder import RECORD

FORKSERVER = multiprocessing.get_context("forkserver")  # its processes have torch from the start
FORKSERVER.set_forkserver_preload(["generate"])


def run(
    script: str, *args: object, cwd: Path, as_main: bool = False
) -> subprocess.CompletedProcess:
    """`python script args` in this process; for `python -m a.b` the script is a.b.

    as_main: the file is executed anew, to its last line.
    """
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
            if as_main:
                runpy.run_path(str(stage.__file__), run_name="__main__")
                raise SystemExit
            main = stage.main if hasattr(stage, "main") else stage.train
            cli.launch(main, stage.Config, getattr(stage, "PRESETS", {}), "")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def alone(environment: dict[str, str], function: Callable, args: tuple) -> object:
    """The body of a process of `start`, `in_two` and `in_another`."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    cli.time = SimpleNamespace(sleep=lambda seconds: None)  # no torchrun is waited for
    return function(*args)


def start(script: str, *args: object, cwd: Path) -> multiprocessing.process.BaseProcess:
    """Start `python script args` in a process that can be killed."""
    command = partial(run, script, *args, cwd=cwd)
    process = FORKSERVER.Process(target=alone, args=({}, command, ()))
    process.start()
    return process


def in_two(function: Callable, *args: object) -> list:
    """What a function returns in two processes with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with ProcessPoolExecutor(2, FORKSERVER) as pool:
        runs = [
            pool.submit(alone, world | {"RANK": rank, "LOCAL_RANK": rank}, function, args)
            for rank in "01"
        ]
        return [future.result(timeout=120) for future in runs]


def in_another(function: Callable, *args: object) -> object:
    """What a function returns in another process, whose memory can be measured."""
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        return pool.submit(alone, {}, function, args).result(timeout=120)


PEAK = Path("/proc/self/status")


def peak() -> int:
    """The most memory that this process has taken, in bytes."""
    (line,) = (line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def run_two(script: str, *args: object, cwd: Path) -> list[subprocess.CompletedProcess]:
    """`torchrun --nproc_per_node=2 script args`."""
    return in_two(partial(run, script, *args, cwd=cwd))


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one sentence that names what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last


def rows_of(out: Path) -> list[dict]:
    """The rows of pairs.jsonl."""
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def times_of(folder: Path) -> dict[str, int]:
    """When all files below a folder were written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, but of the records of what was made there."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != RECORD]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
