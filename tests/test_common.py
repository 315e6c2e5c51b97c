"""common.py: the command line, seeds, weights and configurations, and the run of a toy training."""

import contextlib
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import common
from data.pack import Crops, Photos
from tests.fake_cuda import fake_cuda
from tests.test_photos import drawn_pixels

REPO = Path(__file__).resolve().parents[1]
CPU = common.Runtime(torch.device("cpu"))


# ---- command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """A Config as the stages have."""

    steps: int = 100  # training steps, 50 % of them on crops
    learning_rate: float = 1e-4  # of AdamW
    out: str = "runs/x"  # folder
    sizes: tuple[int, ...] = (1, 2)  # several numbers
    photos: tuple[str, ...] = ()  # files
    bf16: bool = True  # precision
    skip: bool = False
    seed: int = 0  # of all draws
    device: str = "cpu"  # cpu or cuda


PRESETS = {"paper": {}, "small": {"steps": 7, "sizes": (5,), "bf16": False}}


def test_a_flag_beats_the_preset_and_the_preset_beats_the_default(capsys):
    parse = common.parse_args
    assert parse(Flags, PRESETS, "", []) == Flags()  # the first preset
    assert parse(Flags, {}, "", []) == Flags()
    small = parse(Flags, PRESETS, "", ["--preset", "small"])
    assert small == replace(Flags(), steps=7, sizes=(5,), bf16=False)
    argv = ["--preset", "small", "--steps", "9", "--bf16", "--learning-rate", "0.5", "--skip"]
    assert parse(Flags, PRESETS, "", argv) == Flags(9, 0.5, sizes=(5,), skip=True)
    argv = ["--sizes", "3", "4", "5", "--photos", "a", "b", "--no-bf16"]
    assert parse(Flags, {}, "", argv) == Flags(sizes=(3, 4, 5), photos=("a", "b"), bf16=False)
    assert "preset small" in capsys.readouterr().out


def test_the_help_text_is_the_comment_of_the_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        common.parse_args(Flags, {}, "what it does", ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "what it does" in text and "training steps, 50 % of them on crops" in text


@pytest.mark.parametrize(
    "argv",
    ["--stepz 3", "--step 3", "--steps x", "--preset huge", "stray",
     "--out FILE", "--device abacus", "--seed -1", f"--seed {2**63}"],
)  # fmt: skip
def test_a_mistake_ends_with_a_sentence_that_names_it_and_exit_code_2(
    argv, tmp_path, monkeypatch, capsys
):
    def main(cfg: Flags, rt: common.Runtime) -> None:
        common.save_image(Path(cfg.out) / "x.png", torch.zeros(3, 8, 8))

    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr(sys, "argv", ["stage.py", *argv.split()])
    with pytest.raises(SystemExit) as stopped:
        common.launch(main, Flags, PRESETS, "")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in message and argv.split()[-1] in message


# ---- randomness and files ---------------------------------------------------------------------


def test_generators_are_reproducible_and_independent():
    # A shorter key is no prefix of a longer one, a large number no pair of small ones.
    keys = [(0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32,), (2**62, 1), (1, 2**31)]
    draws = [torch.randn(4000, generator=common.generator(*key)) for key in keys]
    again = [torch.randn(4000, generator=common.generator(*key)) for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    correlation = np.corrcoef(torch.stack(draws)) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.08


def test_files_can_be_read_by_others_as_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        with common.replacing(tmp_path / "x.safetensors") as temporary:
            save_file({"a": torch.rand(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_sheet_of_pictures_that_are_on_a_gpu_is_written(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(common, "save_image", lambda path, x: written.append(x))
    with fake_cuda():
        picture = torch.zeros(3, 20, 20, device="cuda:0")
        common.save_sheet(tmp_path / "sheet.png", ("HR", "LR"), [[picture, picture]] * 2)
    assert written[0].device.type == "cpu" and written[0].shape == (3, 18 + 48, 48)


# ---- weights and configurations ---------------------------------------------------------------


def toy_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


@pytest.mark.parametrize("name", ["", "params", "params_ema", "state_dict", "ema"])
def test_weights_of_other_programs_are_found(tmp_path, name):
    net, given = toy_net(), {key: torch.rand_like(v) for key, v in toy_net().state_dict().items()}
    others = {"params": toy_net().state_dict()} if name == "params_ema" else {}
    torch.save({**others, name: given} if name else given, tmp_path / "x.pth")
    common.load_weights(net, str(tmp_path / "x.pth"), "--start-from")
    assert all(torch.equal(value, given[key]) for key, value in net.state_dict().items())


WRONG = {
    "list": [1], "number": 3, "tensor": torch.rand(2), "nothing": {}, "no dict": {"ema": [1]},
    "other names": {"ema": {"a": 3}},
    "other types": {key: value.to(torch.int8) for key, value in toy_net().state_dict().items()},
    "not finite": {key: value / 0 for key, value in toy_net().state_dict().items()},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, wrong):
    torch.save(WRONG[wrong], tmp_path / "x.pt")
    with pytest.raises(common.UserError, match="x.pt: ") as error:
        common.load_weights(toy_net(), str(tmp_path / "x.pt"), "--start-from")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, suffix):
    torch.save({"net": torch.rand(1000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / f"x{suffix}"
    for data in (b"", b"not a checkpoint", whole[: len(whole) // 2], bytes(1000)):
        path.write_bytes(data)
        with pytest.raises(common.UserError, match=path.name) as error:
            common.load_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(common.UserError, match="missing"):
        common.load_checkpoint(tmp_path / f"missing{suffix}")


class Trap:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self):
        return print, ("the trap was unpickled",)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_with_an_object_in_it_is_refused(tmp_path, capsys):
    torch.save({"net": Trap()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(common.UserError, match=f"{name}: .*store its weights: torch.save"):
            common.load_checkpoint(tmp_path / name)
    assert "trap" not in capsys.readouterr().out


def test_shipped_weights_keep_their_config_but_no_path_of_the_machine(tmp_path, monkeypatch):
    config = {"lr": [str(tmp_path)], "out": str(tmp_path), "widths": [8, 16], "learning_rate": 1e-4}
    state = {"step": 7, "ema": {"a": torch.rand(3)}, "config": config | {"extractors": config}}
    torch.save(state, tmp_path / "x.pt")
    files = [str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors")]
    monkeypatch.setattr(sys, "argv", ["common.py", *files])
    runpy.run_path(common.__file__, run_name="__main__")
    read = common.load_checkpoint(files[1])
    kept = {"widths": [8, 16], "learning_rate": 1e-4}
    assert read["config"] == kept | {"extractors": kept}
    assert torch.equal(read["ema"]["a"], state["ema"]["a"].half().float())


def test_a_fingerprint_tells_weights_from_others():
    a, b = toy_net(), toy_net()
    assert common.fingerprint(a) == common.fingerprint(b)
    with torch.no_grad():
        b[0].weight[0, 0, 0, 0] += 1e-6
    assert common.fingerprint(a) != common.fingerprint(b)


@dataclass(frozen=True)
class Shape:
    """A Config of which a network is built."""

    width: int = 8
    rate: float = 0.5
    wide: bool = False
    name: str = "x"
    widths: tuple[int, ...] = (1, 2)
    folders: tuple[str, ...] = ()


def test_a_stored_configuration_comes_back():
    stored = {"width": 3, "rate": 1, "wide": True, "name": "y", "widths": [4], "folders": ["z"]}
    expected = Shape(3, 1, True, "y", (4,), ("z",))
    assert common.from_dict(Shape, stored, "x.pt") == expected
    assert common.from_dict(Shape, {"width": 3}, "x.pt") == Shape(3)


@pytest.mark.parametrize(
    "stored",
    [None, 7, [], {"width": "a"}, {"width": 2.5}, {"width": None}, {"width": True}, {"wide": 1},
     {"rate": "a"}, {"rate": [1]}, {"widths": 3}, {"widths": ["a"]}, {"widths": [1.5]},
     {"widths": [1] * 17}, {"name": 3}, {"folders": [1]}, {"height": 3}],
    ids=str,
)  # fmt: skip
def test_a_stored_configuration_is_not_believed(stored):
    with pytest.raises(common.UserError, match="x.pt: .*configuration"):
        common.from_dict(Shape, stored, "x.pt")


def test_a_number_out_of_its_range_names_the_flag_and_the_file():
    common.check_ranges(Shape(), {"width": (8, 8), "widths": (1, 2)})
    for ranges, word in (({"width": (1, 7)}, "--width 8"), ({"widths": (1, 1)}, "--widths 2")):
        with pytest.raises(common.UserError, match=f"^x.pt: {word}: must be in 1"):
            common.check_ranges(Shape(), ranges, "x.pt: ")
    with pytest.raises(common.UserError, match="--rate nan"):
        common.check_ranges(Shape(rate=float("nan")), {"rate": (0, 1)})


# ---- the run of a training --------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """The fields that Run reads of a stage's Config."""

    seed: int = 0
    bf16: bool = False
    learning_rate: float = 3e-3
    cooldown: float = 0.0
    ema_decay: float = 0.9
    batch_size: int = 4
    accumulate: int = 0
    save_every: int = 4
    log_every: int = 1


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with three drawn photos."""
    for seed in range(3):
        pixels = torch.from_numpy(drawn_pixels(40 + seed, 50, seed=7 * seed))
        common.save_image(tmp_path / f"photos/{seed}.png", pixels.permute(2, 0, 1) / 255)
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
    rt: common.Runtime = CPU,
    **settings,
) -> nn.Module:
    """A training of the toy on the photos of a folder, as the stages write it."""
    cfg, net = Toy(**settings), net or toy_net()
    groups = [{"params": list(net[trained].parameters()), "lr": cfg.learning_rate}]
    photos = Photos(sorted((folder / "photos").iterdir()), folder / "decoded", rt)
    crops = Crops(photos, 16, cfg.batch_size, cfg.seed)
    run = common.Run(cfg, rt, net, groups, folder / name, steps, preview=preview, began=began)
    for x, draw in run.batches(crops):
        run.update(loss(net, x, draw))
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


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder, capsys):
    whole = toy_run(folder, 10, name="whole.pt")
    toy_run(folder, 6, name="parts.pt")
    assert read(folder / "parts.pt")["step"] == 6
    parts = toy_run(folder, 10, name="parts.pt")
    assert same(whole.state_dict(), parts.state_dict())
    checkpoints = [read(folder / f"{name}.pt") for name in ("whole", "parts")]
    assert set(checkpoints[0]) == {"step", "steps", "net", "ema", "opt", "config"}
    assert same(*checkpoints)
    # A finished run does nothing more and says so, and another seed is another run.
    capsys.readouterr()
    assert same(toy_run(folder, 10, name="parts.pt").state_dict(), parts.state_dict())
    assert "parts.pt is finished" in capsys.readouterr().out
    other = toy_run(folder, 10, name="other.pt", seed=1)
    assert not same(other.state_dict(), parts.state_dict())


@pytest.mark.parametrize(("cooldown", "steps_worth"), [(0.0, 10.0), (0.5, 8.0), (1.0, 5.5)])
def test_the_learning_rate_falls_to_0_over_the_cooldown(folder, cooldown, steps_worth):
    # Adam moves a weight with a constant gradient by the learning rate: 10 steps show their sum.
    # With a cooldown of half of them: six whole ones, then .8, .6, .4 and .2.
    path = folder / "last.pt"

    def slope(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": sum(p.sum() for p in net.parameters()) / 1000}

    def interrupted(*given) -> dict[str, Tensor]:
        if path.is_file():  # written after step 4
            raise InterruptedError
        return slope(*given)

    for loss in (interrupted, slope):
        with contextlib.suppress(InterruptedError):
            toy_run(folder, 10, loss=loss, cooldown=cooldown, learning_rate=1e-2)
    assert read(path)["step"] == 10
    moved = toy_net()[0].weight - read(path)["net"]["0.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * steps_worth), rtol=1e-3, atol=0)


def test_the_loss_falls_and_the_result_is_the_average_of_the_weights(folder):
    net = toy_run(folder, 60, preview=lambda: {"seen": torch.tensor(7.0)}, save_every=50)
    log = log_of(folder)
    assert [row["step"] for row in log] == list(range(1, 61))
    assert [row["step"] for row in log if "seen" in row] == [50, 60]
    losses = [row["loss"] for row in log]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    state = read(folder / "last.pt")
    assert same(dict(net.state_dict()), dict(state["ema"]))
    assert not same(dict(state["ema"]), dict(state["net"]))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_parameters_outside_of_the_groups_stay_as_they_are(folder):
    net, before = toy_net(), toy_net()
    toy_run(folder, 3, net, trained=slice(2, 3))
    assert same(dict(net[0].state_dict()), dict(before[0].state_dict()))
    assert not same(dict(net[2].state_dict()), dict(before[2].state_dict()))


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run_and_the_good_checkpoint_stays(folder, of, log_every):
    # The loss is finite and its gradient is not: the square root at zero.
    worse = {"loss": lambda x: x * float("nan"), "gradient": lambda x: x + (x - x).sqrt()}
    with pytest.raises(common.UserError, match="nan"):
        toy_run(folder, 20, loss=at_call(6, worse[of]), log_every=log_every)
    state = read(folder / "last.pt")
    assert state["step"] == 4
    assert all(value.isfinite().all() for part in ("net", "ema") for value in state[part].values())


def test_nothing_to_train_is_one_sentence(folder):
    with pytest.raises(common.UserError, match="all learning rates are 0"):
        toy_run(folder, 1, learning_rate=0.0)
    assert not (folder / "last.pt").exists()


# ---- what a run goes on from


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed is 1, in .*last.pt 0: give another --out"),
        ({"learning_rate": 1e-3}, "--learning-rate is .* in .*last.pt"),
        ({"began": "4567"}, "began from other weights"),
        ({"trained": slice(2, 3)}, "no checkpoint of this training"),
        ({"net": nn.Sequential(*toy_net(), nn.Conv2d(3, 3, 1))}, "another configuration"),
        ({"net": nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))}, "another configuration"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_and_nothing_is_lost(folder, change, message):
    toy_run(folder, 2)
    before = (folder / "last.pt").read_bytes()
    for steps in (2, 4):  # the run is finished, or would go on
        with pytest.raises(common.UserError, match=message):
            toy_run(folder, steps, **change)
    assert (folder / "last.pt").read_bytes() == before


def test_steps_batch_and_logging_may_change_and_are_named(folder, capsys):
    toy_run(folder, 2)
    toy_run(folder, 3, batch_size=2, accumulate=2, save_every=1, log_every=5, cooldown=0.5)
    printed = capsys.readouterr().out
    for change in ("--batch-size 2 (4 before)", "--save-every 1 (4 before)", "--cooldown 0.5"):
        assert f"from now on {change}" in printed
    assert read(folder / "last.pt")["step"] == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", -1), ("step", 2.5), ("step", "2"), ("step", 3), ("steps", None), ("opt", {}),
     ("opt", [1]), ("net", {}), ("ema", "weights"), ("config", 7),
     ("ema", {key: value / 0 for key, value in toy_net().state_dict().items()})],
)  # fmt: skip
def test_a_checkpoint_that_was_tampered_with_is_one_sentence(folder, key, value):
    toy_run(folder, 2)
    torch.save(read(folder / "last.pt") | {key: value}, folder / "last.pt")
    with pytest.raises(common.UserError, match="last.pt") as error:
        toy_run(folder, 4)
    assert "\n" not in str(error.value)


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
    with pytest.raises(common.UserError, match="before.pt: no readable checkpoint"):
        toy_run(folder, 9)


# ---- signals, processes, memory


def stop_self(sent: signal.Signals):
    """A loss that sends this process a signal in its 6th step."""
    return at_call(6, lambda loss: os.kill(os.getpid(), sent) or loss)


def test_sigterm_stops_a_run_behind_a_checkpoint_and_the_handler_is_put_back(folder):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="stopped at step 6"):
        toy_run(folder, 9, loss=stop_self(signal.SIGTERM))
    assert read(folder / "last.pt")["step"] == 6 and signal.getsignal(signal.SIGTERM) is before
    assert same(toy_run(folder, 9).state_dict(), toy_run(folder, 9, name="x.pt").state_dict())


def test_kill_9_loses_no_more_than_the_steps_since_the_last_checkpoint(folder):
    loss = stop_self(signal.SIGKILL)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=toy_run, args=(folder, 9), kwargs={"loss": loss})
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and read(folder / "last.pt")["step"] == 4
    assert same(toy_run(folder, 9).state_dict(), toy_run(folder, 9, name="x.pt").state_dict())


TWO = """
import os, sys, pathlib, torch, torch.utils.flop_counter, tqdm, common, test_common
tqdm.tqdm.monitor_interval = 0  # no thread for the progress bar
with common.runtime("cpu") as rt:
    test_common.toy_run(pathlib.Path(sys.argv[1]), 6, name="two.pt", rt=rt)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        (torch.ones(2, 2) @ torch.ones(2, 2)).sum()
status = pathlib.Path("/proc/self/status")
text = status.read_text() if status.is_file() else "Threads:\\t1"
threads = next(line.split()[1] for line in text.splitlines() if line.startswith("Threads"))
os.write(1, f"threads {threads}\\n".encode())  # whole, beside the other process
"""


def test_one_process_with_two_parts_does_what_two_processes_do(folder):
    """The same batches and draws, so the same weights up to the order of a sum of two.

    One of them decodes the photos. No thread outlives the group: it would abort a process.
    """
    (folder / "two.py").write_text(TWO)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, folder / "two.py", folder],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("threads 1\n") == 2, done.stdout
    two = read(folder / "two.pt")
    one = toy_run(folder, 6, name="one.pt", batch_size=8, accumulate=2)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two["ema"][key], value, rtol=1e-5, atol=1e-7)
    other = toy_run(folder, 6, name="other.pt")
    assert not torch.equal(other.state_dict()["0.weight"], one.state_dict()["0.weight"])


@pytest.mark.parametrize(("batch", "accumulate", "sources"), [(8, 4, 1), (8, 0, 2), (8, 2, 2)])
def test_a_batch_is_divided_into_equal_parts_or_refused(batch, accumulate, sources):
    cfg = Toy(batch_size=batch, accumulate=accumulate)
    common.check_parts(cfg, 2, sources)
    for wrong in ({"accumulate": 3}, {"accumulate": 8}, {"batch_size": 2 * sources - 1}):
        with pytest.raises(common.UserError, match="--accumulate"):
            common.check_parts(replace(cfg, **wrong), 2, sources)


@given(st.integers(1, 64), st.integers(1, 4), st.floats(0.1, 9), st.floats(0, 300))
def test_a_batch_goes_in_as_few_parts_as_fit_into_memory(batch, least, cost, room):
    least = min(least, batch)
    parts = common.parts_that_fit(batch, least, cost, room)
    needs = {n: cost * batch / n / least for n in range(1, batch + 1) if batch % n == 0}
    allowed = [n for n in needs if batch // n >= least]
    fitting = [n for n in allowed if needs[n] <= room]
    assert parts == (min(fitting) if fitting else max(allowed))


def test_a_trial_that_no_step_follows_chooses_the_parts(folder, monkeypatch):
    """As on a GPU with room for three images."""
    net = toy_net()
    memory_of_adam = 8 * sum(p.numel() for p in net.parameters())
    memory = {"max_memory_allocated": 100, "memory_allocated": 0, "empty_cache": None,
              "reset_peak_memory_stats": None,
              "mem_get_info": ((memory_of_adam + 301) / 0.9, 0)}  # fmt: skip
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    photos = Photos(sorted((folder / "photos").iterdir()), folder / "decoded", CPU)
    groups = [{"params": list(net.parameters()), "lr": 1e-3}]
    run = common.Run(Toy(batch_size=8), CPU, net, groups, folder / "last.pt", 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for x, draw in run.trial([Crops(photos, 16, 8, 0)], 1):
        assert run.step == -1
        run.update(toy_loss(net, x, draw))
    assert run.parts == 4 and run.step == 0 and same(before, dict(net.state_dict()))
    assert all(p.grad is None for p in net.parameters())


def test_the_speed_is_that_of_the_steps_since_the_last_line(folder, monkeypatch):
    """Neither the first step, in which networks are compiled, nor a picture counts."""
    now, seconds = [1.0], iter([50, 0.5, 0.5, 0.5, 1, 1, 1, 1])
    monkeypatch.setattr(common.time, "time", lambda: now[0])

    def pausing(net: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        now[0] += next(seconds)
        return toy_loss(net, x, generator)

    def picture() -> dict[str, Tensor]:
        now[0] += 50
        return {}

    toy_run(folder, 8, loss=pausing, preview=picture, log_every=2)
    speeds = {line["step"]: line["images/s"] for line in log_of(folder)}
    assert speeds == {2: 8, 4: 8, 6: 4, 8: 4}


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(folder):
    plain = toy_run(folder, 3, name="plain.pt")
    net = toy_net()
    common.compile_networks([net], CPU)
    toy_run(folder, 3, net, name="compiled.pt")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no C++ compiler")

    net = toy_net()
    monkeypatch.setattr(torch, "compile", broken)
    common.compile_networks([net], CPU)
    assert "torch.compile does not work here" in capsys.readouterr().out
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8, 8)


def test_a_step_of_a_run_mixes_no_devices(tmp_path, monkeypatch):
    """All but the backward pass, of which the wheel for CPUs is not capable on fake tensors."""

    class Drawn:
        batch_size = 4

        def batches(self, numbers, count: int, device: torch.device):
            for _ in numbers:
                yield torch.zeros(count, 3, 16, 16, device=device)

    def backward(loss: Tensor) -> None:
        assert loss.device.type == "cuda"
        for p in run.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 1

    seen = []
    monkeypatch.setattr(common, "generator", lambda *key, device: torch.Generator())
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", lambda net, *place, **options: net)  # it is there
    monkeypatch.setattr(common.Run, "report", lambda run, losses, norm, saving: seen.append(norm))
    monkeypatch.setattr(torch, "save", lambda state, path: seen.append(state))
    with fake_cuda(), torch.no_grad():
        rt = common.Runtime(torch.device("cuda:0"))
        with rt.device:
            net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3))
        groups = [{"params": list(net.parameters()), "lr": 1e-3}]
        cfg = Toy(accumulate=2, save_every=1)
        run = common.Run(cfg, rt, net, groups, tmp_path / "last.pt", 2)
        for x, _ in run.batches(Drawn()):
            run.update({"loss": net(x).mean()})
    assert run.step == 2 and len(seen) == 4
    state = seen[-1]
    tensors = [*state["net"].values(), *state["ema"].values(), seen[0]]
    assert {x.device.type for x in tensors} == {"cuda"}
