"""common/cli.py: flags and presets, stored configurations, ranges; exit code 2."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common import UserError, cli
from common.cli import check_ranges, from_dict, launch, parse_args
from common.images import save_image
from common.runtime import Runtime
from tests.tiny import CPU


@dataclass(frozen=True)
class Flags:
    """A Config as the stages have."""

    steps: int = 100  # training steps, 50 % of them on crops
    learning_rate: float = 1e-4
    out: str = "runs/x"
    sizes: tuple[int, ...] = (1, 2)
    photos: tuple[str, ...] = ()
    bf16: bool = True
    skip: bool = False
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Training(Flags):
    """A Config of a stage that trains."""

    accumulate: int = 0


PRESETS = {"paper": {}, "small": {"steps": 7, "sizes": (5,), "bf16": False}}


def test_a_flag_beats_the_preset_and_the_preset_beats_the_default(capsys):
    parse = parse_args
    assert parse(Flags, PRESETS, "", []) == Flags()  # the first preset
    argv = ["--preset", "small", "--steps", "9", "--bf16", "--learning-rate", "0.5", "--skip"]
    assert parse(Flags, PRESETS, "", argv) == Flags(9, 0.5, sizes=(5,), skip=True)
    argv = ["--sizes", "3", "4", "5", "--photos", "a", "b", "--no-bf16"]
    assert parse(Flags, {}, "", argv) == Flags(sizes=(3, 4, 5), photos=("a", "b"), bf16=False)
    assert "preset small" in capsys.readouterr().out


def test_the_help_text_is_the_comment_of_the_field(capsys):
    with pytest.raises(SystemExit):
        parse_args(Flags, {}, "what it does", ["--help"])
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
    def main(cfg: Flags, rt: Runtime) -> None:
        save_image(Path(cfg.out) / "x.png", torch.zeros(3, 8, 8))

    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr(sys, "argv", ["stage.py", *argv.split()])
    with pytest.raises(SystemExit) as stopped:
        launch(main, Flags, PRESETS, "")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in message and argv.split()[-1] in message


@dataclass(frozen=True)
class Shape:
    """A Config of which a network is built."""

    width: int = 8
    rate: float = 0.5
    wide: bool = False
    name: str = "x"
    widths: tuple[int, ...] = (1, 2)


def test_a_stored_configuration_comes_back_if_its_fields_and_types_are_right():
    stored = {"width": 3, "rate": 1, "wide": True, "name": "y", "widths": [4]}
    assert from_dict(Shape, stored, "x.pt") == Shape(3, 1, True, "y", (4,))
    assert from_dict(Shape, {"width": 3}, "x.pt") == Shape(3)
    wrong = {"width": ("a", 2.5, None, True), "wide": (1,), "rate": ("a", [1]), "name": (3,),
             "widths": (3, ["a"], [1.5]), "height": (3,)}  # fmt: skip
    for stored in (None, [], *({key: value} for key in wrong for value in wrong[key])):
        with pytest.raises(UserError, match="x.pt: .*configuration"):
            from_dict(Shape, stored, "x.pt")


def test_a_number_out_of_its_range_names_the_flag_and_the_file():
    check_ranges(Shape(), {"width": (8, 8), "widths": (1, 2)})
    cfg, ranges = (
        Shape(rate=float("nan")),
        {"width 8": (1, 7), "widths 2": (1, 1), "rate nan": (1, 2)},
    )
    for flag, limits in ranges.items():
        with pytest.raises(UserError, match=f"^x.pt: --{flag}: must be in 1"):
            check_ranges(cfg, {flag.split()[0]: limits}, "x.pt: ")


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("a mistake"), 2, "error: a mistake"),
        (OSError("the disk is full"), 2, "error: the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "larger --accumulate N"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit("stopped at step 3"), 1, "stopped at step 3"),
        (SystemExit(2), 2, ""),
        (ZeroDivisionError("of ours"), 1, "ZeroDivisionError: of ours"),
    ],
)
def test_how_a_command_ends_is_the_same_in_one_process_and_in_several(
    monkeypatch, capsys, error, code, printed
):
    """One process raises, of several each ends at once, with the same code and sentence."""

    def main(cfg: Flags, rt: Runtime) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for processes in ("1", "2"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", lambda code: sys.exit(code))
            patch.setattr(signal, "signal", lambda sent, handler: None)
            patch.setattr(cli, "runtime", lambda *_: contextlib.nullcontext(CPU))
            patch.setenv("WORLD_SIZE", processes)
            with pytest.raises(BaseException) as ended:
                launch(main, Training, {}, "")
        text = capsys.readouterr().err
        if processes == "1" and code == 1:
            assert ended.value is error
        else:
            assert ended.value.code == code and printed in text
        assert processes == "1" or bool(text) == bool(printed)
