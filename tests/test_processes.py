"""Several processes, as torchrun starts them: none waits for one that has failed, each has a GPU of
its own, machines may share their disk or not.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common import UserError, photos, runtime
from common.files import replacing
from common.folder import close_all
from common.photos import Photos
from common.runtime import Runtime, choose_device, join_processes, noted_signals
from tests.commands import FORKSERVER, in_two
from tests.test_run import folder, toy_run  # noqa: F401 (a fixture)
from tests.tiny import CPU, REPO

SCRIPT = """
import dataclasses, os, pathlib, sys, torch
from common import UserError, run
from common.cli import launch

rank, failure = int(os.environ["RANK"]), os.environ["FAILURE"]
folder = pathlib.Path(os.environ["FOLDER"])
failing = int(os.environ["FAILING"]) == rank

def fail(*args, **kwargs):
    (folder / "failed").touch()
    raise OSError("No space left") if failure == "checkpoint" else UserError("a step has failed")

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    device: str = "cuda" if failure == "GPUs" else "cpu"

def main(cfg, rt):
    from tests import test_run
    if failing and failure == "checkpoint":
        run.save_state = fail
    if failing and failure == "photos":
        for photo in (folder / "photos").iterdir():
            photo.write_bytes(b"")
        (folder / "failed").touch()
    loss = test_run.at_call(6, fail) if failing and failure == "step" else test_run.toy_loss
    test_run.toy_run(folder, 500, loss=loss, rt=rt)

if failure == "GPUs":
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
    (folder / "failed").touch()
launch(main, Config, {}, "")
"""


def torchrun(folder: Path, failure: str, rank: int = 0, processes: int = 2) -> str:  # noqa: F811
    """Run SCRIPT, in which a process fails; what our processes print as errors, without torchrun.

    It has to end in 20 seconds.
    """
    (folder / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "FAILURE": failure, "FAILING": str(rank), "FOLDER": str(folder),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, folder / "script.py"], env=os.environ | environment,
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    ended = time.time()
    assert done.returncode == 1, done.stderr
    if (folder / "failed").exists():
        assert ended - (folder / "failed").stat().st_mtime < 20, done.stderr
    return re.split(r"^[WE]\d{4} .*torch/distributed/", done.stderr, flags=re.M)[0].strip()


@pytest.mark.parametrize(
    ("failure", "rank", "sentence"),
    [
        ("step", 1, "error: a step has failed"),
        pytest.param(
            "checkpoint",
            0,
            "error: .*last.pt could not be written|error: No space left",
            marks=pytest.mark.slow,
        ),
        pytest.param("photos", 0, "error: no photo can be read of 3", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_ends_all(folder, failure, rank, sentence):  # noqa: F811
    """Its sentence is the last."""
    printed = torchrun(folder, failure, rank)
    assert re.match(sentence, printed.splitlines()[-1]), printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed


def error_on_its_own_disk(folder: Path) -> str:  # noqa: F811
    """The error of a process that is the only one on its machine."""
    own = folder / f"node{os.environ['RANK']}"
    os.environ["LOCAL_RANK"] = "0"
    with runtime.runtime("cpu") as rt, pytest.raises(UserError) as error:
        toy_run(own, 8, rt=rt)
    return str(error.value)


def test_machines_that_do_not_share_the_run_are_one_sentence(folder):  # noqa: F811
    """Only the first has a checkpoint."""
    for node in ("node0", "node1"):
        shutil.copytree(folder / "photos", folder / node / "photos")
    toy_run(folder / "node0", 4)
    close_all()
    for error in in_two(error_on_its_own_disk, folder):
        assert "not go on from the same step and weights: copy" in error


def test_more_processes_than_gpus_are_one_sentence(folder):  # noqa: F811
    printed = torchrun(folder, "GPUs", processes=3)
    assert printed == "error: 3 processes, but 2 GPUs: start one for each GPU (--nproc_per_node)."


# ---- devices ------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which every GPU that is asked for is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("seen", "processes", "number", "device"),
    [(8, 8, 3, 3), (4, 2, 1, 1), (1, 1, 0, 0), (1, 8, 3, 0), (2, 3, 0, None), (2, 1, 2, None)],
)
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one_it_sees(
    gpus, seen, processes, number, device
):
    gpus.setattr(torch.cuda, "device_count", lambda: seen)
    gpus.setenv("LOCAL_RANK", str(number))
    gpus.setenv("LOCAL_WORLD_SIZE", str(processes))
    for given in ("cuda", "auto"):
        if device is None:
            with pytest.raises(UserError, match="3 processes, but 2 GPUs"):
                choose_device(given)
        else:
            assert choose_device(given) == torch.device("cuda", device)


@pytest.mark.parametrize("other", ["0", "1"])
def test_two_processes_with_the_same_gpu_are_refused(monkeypatch, other):
    """Each sees one GPU: SLURM gives each its own, torchrun alone gives all the same."""
    store, joined = dist.HashStore(), []
    here = runtime.socket.gethostname()
    store.set("gpu 1", f"{here} gpu-{other}")
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu-0")
    )
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: joined.append(name))
    monkeypatch.setattr(dist, "all_reduce", joined.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: device)
    if other == "1":
        join_processes(torch.device("cuda:0"), 0, 2)
        assert joined == ["cpu:gloo,cuda:nccl", torch.device("cuda:0")]
    else:
        with pytest.raises(UserError, match="2 processes, but 1 GPU: start one for each GPU"):
            join_processes(torch.device("cuda:0"), 0, 2)
        assert not joined


@pytest.mark.parametrize("given", ["mps", "auto"])
def test_on_a_mac_the_cpu_is_used_and_it_is_said_once(monkeypatch, capsys, given):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    runtime.print_once.cache_clear()
    for _ in range(2):
        assert choose_device(given) == torch.device("cpu")
    assert capsys.readouterr().out.count("using the CPU") == 1


# ---- signals ------------------------------------------------------------------------------------


def wait_for_a_gpu(seconds_of_progress: float) -> None:
    """A run that has stopped to make progress, as if another process were gone; 3 s for tests."""
    runtime.PATIENCE = 0.5
    began = time.monotonic()
    progress = lambda: min(time.monotonic() - began, seconds_of_progress)  # noqa: E731
    noted: list[int] = []
    with noted_signals(noted, Runtime(torch.device("cuda:0"), world_size=2), progress):
        os.kill(os.getpid(), signal.SIGTERM)
        lock = threading.Lock()
        lock.acquire()
        lock.acquire(timeout=3)
    assert noted == [signal.SIGTERM]
    os._exit(7)


@pytest.mark.parametrize(("seconds_of_progress", "code"), [(0, 1), (60, 7)])
def test_a_process_that_waits_in_vain_ends_after_a_signal(seconds_of_progress, code):
    process = FORKSERVER.Process(target=wait_for_a_gpu, args=(seconds_of_progress,))
    process.start()
    process.join(60)
    assert process.exitcode == code


# ---- a disk that machines share -----------------------------------------------------------------


@pytest.fixture
def others(folder: Path) -> Iterator[set[Path]]:  # noqa: F811
    """Files of another machine that decodes the same photos, which are elsewhere there."""
    decoded = folder / "decoded"
    decoded.mkdir()
    names = (".realdgen-1-2.tmp", "realdgen-00000007.pixels", "realdgen-00000007.npy")
    files = {decoded / name for name in names}
    for file in files:
        file.touch()
    yield files


def test_the_decoded_photos_of_another_machine_stay(folder, others, monkeypatch):  # noqa: F811
    """Its temporary files stay until all have decoded."""
    files, decoded = sorted((folder / "photos").iterdir()), folder / "decoded"
    photos.decode(files, decoded / "realdgen-00000001.pixels", photos.read_photo)
    assert others <= set(decoded.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(photos, "of_all", lambda key, rt: [key, 7])
        Photos(files, decoded, CPU)
    left = {file for file in others if file.suffix != ".tmp"}
    assert len(set(decoded.iterdir())) == 4 and left <= set(decoded.iterdir())
    Photos(files, decoded, CPU)
    assert len(set(decoded.iterdir())) == 2


def test_two_machines_write_to_different_temporary_files(tmp_path):
    """Two processes there may have the same number, as two writers here have."""
    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(replacing(tmp_path / "x.pixels")) for _ in range(2)]
        assert names[0] != names[1]
