"""common/run.py: a toy training; resuming, damaged checkpoints, signals, processes, memory."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import extractors
from common import UserError
from common.images import save_image
from common.photos import Crops, Photos
from common.run import (
    Run,
    TrainingConfig,
    check_micro_batches,
    compile_networks,
    more_micro_batches,
)
from common.runtime import Runtime, runtime
from tests.commands import FORKSERVER, in_two
from tests.test_photos import drawn_pixels
from tests.tiny import CPU, REPO, uniform


def toy_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


@dataclass(frozen=True)
class Toy(TrainingConfig):
    """The settings of a small training."""

    bf16: bool = False
    learning_rate: float = 3e-3
    ema_decay: float = 0.9
    batch_size: int = 4
    save_every: int = 4
    log_every: int = 1


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with three drawn photos."""
    for seed in range(3):
        pixels = torch.from_numpy(drawn_pixels(40 + seed, 50, seed=7 * seed))
        save_image(tmp_path / f"photos/{seed}.png", pixels.permute(2, 0, 1) / 255)
    return tmp_path


def toy_loss(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Denoising: it uses the batch and the draws."""
    noise = torch.randn(x.shape, generator=generator)
    return {"loss": (net(x + 0.1 * noise) - x).square().mean(), "noise": noise.mean()}


def toy_run(
    folder: Path,
    steps: int,
    net: nn.Module | None = None,
    loss=toy_loss,
    name: str = "last.pt",
    trained: slice = slice(None),
    preview=dict,
    began: str = "",
    rt: Runtime = CPU,
    **settings,
) -> nn.Module:
    """A training of the toy on the photos of a folder, as the stages write it."""
    cfg, net = Toy(**settings), net or toy_net()
    groups = [{"params": list(net[trained].parameters()), "lr": cfg.learning_rate}]
    photos = Photos(sorted((folder / "photos").iterdir()), folder / "decoded", rt)
    crops = Crops(photos, 16, cfg.batch_size, cfg.seed)
    run = Run(cfg, rt, net, groups, folder / name, steps, preview=preview, began=began)
    for x, draw in run.batches(crops):
        run.update(loss, net, x, draw)
    return net


def at_call(number: int, action):
    """toy_loss, with an action on its result at one of its calls."""
    calls = []

    def loss(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        calls.append(1)
        losses = toy_loss(net, x, generator)
        return {**losses, "loss": action(losses["loss"])} if len(calls) == number else losses

    return loss


def same(a, b) -> bool:
    """Equality of nested dicts and lists of tensors and numbers, bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder, capsys):
    whole = toy_run(folder, 10, name="whole.pt")
    toy_run(folder, 6, name="divided.pt")
    assert read(folder / "divided.pt")["step"] == 6
    divided = toy_run(folder, 10, name="divided.pt")
    assert same(whole.state_dict(), divided.state_dict())
    checkpoints = [read(folder / f"{name}.pt") for name in ("whole", "divided")]
    assert set(checkpoints[0]) == {"step", "steps", "net", "ema", "opt", "config", "digest",
                                   "micro_batches"}  # fmt: skip
    assert same(*checkpoints)
    # A finished run does nothing more and says so, and another seed is another run.
    capsys.readouterr()
    toy_run(folder, 10, name="divided.pt")
    assert "divided.pt is finished" in capsys.readouterr().out
    other = toy_run(folder, 10, name="other.pt", seed=1)
    assert not same(other.state_dict(), divided.state_dict())


@pytest.mark.parametrize(("cooldown", "steps_worth"), [(0.0, 10.0), (0.5, 8.0), (1.0, 5.5)])
def test_the_learning_rate_falls_to_0_over_the_cooldown(folder, cooldown, steps_worth):
    # Adam moves a weight with a constant gradient by the learning rate: 10 steps show their sum.
    # With a cooldown of half of them: six whole ones, then .8, .6, .4 and .2.
    def slope(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": sum(p.sum() for p in net.parameters()) / 1000}

    toy_run(folder, 10, loss=slope, cooldown=cooldown, learning_rate=1e-2)
    moved = toy_net()[0].weight - read(folder / "last.pt")["net"]["0.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * steps_worth), rtol=1e-3, atol=0)


def test_the_loss_falls_and_the_result_is_the_average_of_the_weights(folder):
    """Only parameters of the groups move: those of the last layer."""
    preview = lambda: {"seen": torch.tensor(7.0)}  # noqa: E731
    net = toy_run(folder, 60, trained=slice(2, 3), preview=preview, save_every=50)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 61))
    assert [row["step"] for row in log if "seen" in row] == [50, 60]
    losses = [row["loss"] for row in log]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    state = read(folder / "last.pt")
    assert same(dict(net.state_dict()), dict(state["ema"]))
    assert not same(state["ema"]["2.weight"], state["net"]["2.weight"])
    assert same(state["net"]["0.weight"], toy_net()[0].weight)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run_and_the_good_checkpoint_stays(folder, of):
    # The loss is finite and its gradient is not: the square root at zero.
    worse = {"loss": lambda x: x * float("nan"), "gradient": lambda x: x + (x - x).sqrt()}
    with pytest.raises(UserError, match="nan"):
        toy_run(folder, 20, loss=at_call(6, worse[of]), log_every=100)
    state = read(folder / "last.pt")
    assert state["step"] == 4
    assert all(value.isfinite().all() for kind in ("net", "ema") for value in state[kind].values())


# ---- what a run goes on from


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed is 1, in .*last.pt 0: give another --out"),
        ({"learning_rate": 0.0}, "all learning rates are 0"),
        ({"began": "4567"}, "was trained from different weights"),
        ({"trained": slice(2, 3)}, "no checkpoint of this training"),
        ({"net": nn.Sequential(*toy_net(), nn.Conv2d(3, 3, 1))}, "another configuration"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_and_nothing_is_lost(folder, change, message):
    toy_run(folder, 2)
    before = (folder / "last.pt").read_bytes()
    for steps in (2, 4):  # the run is finished, or would go on
        with pytest.raises(UserError, match=message):
            toy_run(folder, steps, **change)
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize("change", [{"config": None}, {"config": 3}, {"step": None}, {"opt": []}])
def test_a_foreign_file_in_place_of_the_checkpoint_is_one_sentence(folder, change):
    toy_run(folder, 2)
    state = read(folder / "last.pt") | change
    del state["digest"]
    torch.save(state, folder / "last.pt")
    with pytest.raises(UserError, match="last.pt is no checkpoint of this training"):
        toy_run(folder, 4)


def test_steps_batch_and_logging_may_change_and_are_named(folder, capsys):
    toy_run(folder, 2)
    toy_run(folder, 3, batch_size=2, accumulate=2, save_every=1, log_every=5, cooldown=0.5)
    printed = capsys.readouterr().out
    for change in ("--batch-size 2 (4 before)", "--save-every 1 (4 before)", "--cooldown 0.5"):
        assert f"from now on {change}" in printed
    assert read(folder / "last.pt")["step"] == 3


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, capsys):
    whole = toy_run(folder, 9, name="whole.pt")
    toy_run(folder, 8)
    assert [read(folder / f"{name}.pt")["step"] for name in ("before", "last")] == [4, 8]
    data = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(data[: len(data) // 2])
    assert same(toy_run(folder, 9).state_dict(), whole.state_dict())
    printed = capsys.readouterr().out
    assert "last.pt: no readable checkpoint" in printed and "at step 4" in printed
    # A run that is killed between the two renames leaves only the one before.
    (folder / "last.pt").unlink()
    assert same(toy_run(folder, 9).state_dict(), whole.state_dict())
    for name in ("last.pt", "before.pt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="before.pt: no readable checkpoint"):
        toy_run(folder, 9)


# ---- signals, processes, memory


def stop_in_step_6(folder: Path, sent: signal.Signals) -> None:
    """A run of 9 steps that gets a signal in the sixth; one thread, as in conftest.py."""
    torch.set_num_threads(1)
    toy_run(folder, 9, loss=at_call(6, lambda loss: os.kill(os.getpid(), sent) or loss))


@pytest.mark.parametrize(
    ("sent", "step"),
    [(signal.SIGTERM, 6), (signal.SIGINT, 6), (signal.SIGHUP, 6), (signal.SIGKILL, 4)],
)
def test_a_stopped_run_loses_at_most_the_steps_since_the_last_checkpoint(folder, sent, step):
    # Not a fork of this process: torch's threads do not survive one.
    process = FORKSERVER.Process(target=stop_in_step_6, args=(folder, sent))
    process.start()
    process.join(60)
    assert process.exitcode != 0 and read(folder / "last.pt")["step"] == step
    assert same(toy_run(folder, 9).state_dict(), toy_run(folder, 9, name="x.pt").state_dict())


def test_a_signal_behind_the_last_step_is_not_lost(folder):
    """The run is whole, and the command ends before it does anything else."""
    net = toy_net()
    photos = Photos(sorted((folder / "photos").iterdir()), folder / "decoded", CPU)
    groups = [{"params": list(net.parameters()), "lr": 1e-3}]
    run = Run(Toy(), CPU, net, groups, folder / "last.pt", 2)
    with pytest.raises(SystemExit, match="stopped at step 2"):
        for x, draw in run.batches(Crops(photos, 16, 4, 0)):
            run.update(toy_loss, net, x, draw)
            if run.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert read(folder / "last.pt")["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


STOPPED = """
import pathlib, sys, time, torch
import test_run
from common.runtime import runtime

def slow(net, x, draw):
    time.sleep(0.3)
    return test_run.toy_loss(net, x, draw)

with runtime("cpu") as rt:
    test_run.toy_run(pathlib.Path(sys.argv[1]), 60, loss=slow, rt=rt, save_every=60)
"""


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_torchrun_is_stopped_and_the_step_is_saved(folder, sent):
    """The signal reaches torchrun, which passes it on; all processes stop at the same step."""
    (folder / "stopped.py").write_text(STOPPED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, folder / "stopped.py", folder]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not (folder / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)  # a busy machine may take minutes to start
    began = time.monotonic()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 20 and process.returncode != 0
    step = read(folder / "last.pt")["step"]
    assert f"stopped at step {step}; the same command goes on from there" in errors
    toy_run(folder, step + 1, save_every=60)  # whole, and of this run


def test_a_loss_that_stays_far_above_its_start_is_said(folder, capsys):
    def rising(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        losses = toy_loss(net, x, generator)
        rising.calls += 1
        return losses | {"loss": losses["loss"] * (1 if rising.calls == 1 else 1e5)}

    rising.calls = 0
    toy_run(folder, 120, loss=rising, log_every=40, save_every=200)
    printed = capsys.readouterr().out
    assert printed.count("the loss has been over 100 times that of the first step") == 1
    assert "for 119 steps" in printed
    toy_run(folder, 120, name="good.pt", log_every=40, save_every=200)
    assert "the loss has been" not in capsys.readouterr().out


def run_of_two(folder: Path) -> int:
    """A run of one of two processes; how many threads it has at its end."""
    tqdm.tqdm.monitor_interval = 0  # no thread for the progress bar
    with runtime("cpu") as rt:
        toy_run(folder, 6, name="two.pt", rt=rt)
        with FlopCounterMode(display=False):
            (torch.ones(2, 2) @ torch.ones(2, 2)).sum()
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1


def test_one_process_with_two_micro_batches_does_what_two_processes_do(folder):
    """The same batches and draws, so the same weights up to the order of a sum of two.

    One of them decodes the photos. No thread outlives the group: it would abort a process.
    """
    assert in_two(run_of_two, folder) == [1, 1]
    two = read(folder / "two.pt")
    one = toy_run(folder, 6, name="one.pt", batch_size=8, accumulate=2)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two["ema"][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("batch", "accumulate", "sources"), [(8, 4, 1), (8, 0, 2), (8, 2, 2)])
def test_a_batch_is_divided_into_equal_micro_batches_or_refused(batch, accumulate, sources):
    cfg = Toy(batch_size=batch, accumulate=accumulate)
    check_micro_batches(cfg, 2, sources)
    for wrong in ({"accumulate": 3}, {"accumulate": 8}, {"batch_size": 2 * sources - 1}):
        with pytest.raises(UserError, match="--batch-size .*: must give"):
            check_micro_batches(replace(cfg, **wrong), 2, sources)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4))
def test_a_batch_is_divided_into_at_least_twice_the_micro_batches(number, batch, least):
    allowed = [n for n in range(number + 1, batch + 1) if batch % n == 0 and batch // n >= least]
    if not allowed:
        with pytest.raises(UserError, match="the memory of the GPU is too small for"):
            more_micro_batches(number, batch, least)
    else:
        chosen = more_micro_batches(number, batch, least)
        assert chosen in allowed and (chosen >= 2 * number or chosen == max(allowed))
        assert not any(2 * number <= n < chosen for n in allowed)


def short_at(*numbers: int):
    """toy_loss that finds too little memory at these calls."""
    count = itertools.count(1)

    def loss(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if next(count) in numbers:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return toy_loss(net, x, generator)

    return loss


def test_out_of_memory_repeats_the_step_in_more_micro_batches(folder, capsys):
    """As with --accumulate 4 from there on, also when the run is resumed."""
    for steps, accumulate in ((3, 0), (6, 4), (8, 4)):
        toy_run(folder, steps, name="given.pt", accumulate=accumulate)
    toy_run(folder, 6, name="short.pt", loss=short_at(4, 6))  # call 6: the second of two parts
    assert capsys.readouterr().out.count("memory is short: a batch is divided") == 2
    toy_run(folder, 8, name="short.pt")
    given, short = (read(folder / f"{name}.pt") for name in ("given", "short"))
    assert all(same(given[key], short[key]) for key in ("step", "net", "ema", "opt"))


def test_memory_too_small_for_one_image_is_one_sentence(folder):
    toy_run(folder, 4)
    with pytest.raises(UserError, match="too small for 1 images of the batch at once"):
        toy_run(folder, 6, loss=short_at(*range(100)))
    assert read(folder / "last.pt")["step"] == 4


def run_of_two_in_short_memory(folder: Path) -> None:
    """In the second of two processes memory is too small for the third step."""
    with runtime("cpu") as rt:
        toy_run(folder, 5, name="two.pt", rt=rt, loss=short_at(3) if rt.rank else toy_loss)


def test_out_of_memory_in_one_process_divides_the_batch_of_all(folder):
    in_two(run_of_two_in_short_memory, folder)
    two = read(folder / "two.pt")
    assert two["micro_batches"] == 2
    for steps, accumulate in ((2, 2), (5, 4)):
        toy_run(folder, steps, name="one.pt", batch_size=8, accumulate=accumulate)
    for key, value in read(folder / "one.pt")["ema"].items():
        torch.testing.assert_close(two["ema"][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(folder):
    plain = toy_run(folder, 3, name="plain.pt")
    net = toy_net()
    compile_networks([net], CPU)
    toy_run(folder, 3, net, name="compiled.pt")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_network_takes_images_of_several_sizes():
    """For shapes in general torch 2.13 fails here: it can't compare products of their sides."""
    net = extractors.Attention(8)
    images = [uniform(4, 8, 16, 16), uniform(2, 8, 8, 8)]
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    plain = [net(x) for x in images]
    compile_networks([net], CPU)
    for x, expected in zip(images, plain, strict=True):
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no C++ compiler")

    net = toy_net()
    monkeypatch.setattr(torch, "compile", broken)
    compile_networks([net], CPU)
    assert "torch.compile does not work here" in capsys.readouterr().out
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8, 8)
