"""tools/speed.py: the table it prints, and what it refuses."""

import sys

import pytest
import torch

import degrade
import diffusion
import extractors
from common.cli import launch
from common.runtime import Runtime
from tools import speed


def measure(monkeypatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, argv)])
    launch(speed.main, speed.Config, {}, speed.__doc__)


def test_the_table_has_a_row_for_each_recipe_and_the_ratio_of_each_rate(monkeypatch, capsys):
    measure(monkeypatch, "--works", "D", "--batch-size", 8, "--runs", 1, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    jpeg = next(float(line.split()[2]) for line in lines if line.startswith("Pillow's JPEG:"))
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| D ")]
    names = {row[0] for row in rows}
    assert {f"D {recipe}" for recipe in degrade.RECIPES} <= names and "D JPEG" in names
    for _, rate, milliseconds, ratio in rows:
        rounding = 0.01 + 0.06 / float(milliseconds) + 0.06 / float(rate)  # one decimal
        assert float(rate) * float(milliseconds) == pytest.approx(8000, rel=rounding)
        assert float(ratio) == pytest.approx(float(rate) / jpeg, rel=0.05, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "as-printed"])
def test_training_steps_and_generation_are_timed(monkeypatch, capsys, preset):
    """With our deviations, and as the paper prints it."""
    for stage in (extractors, diffusion):
        monkeypatch.setitem(stage.PRESETS, "small", stage.PRESETS[preset])
    measure(monkeypatch, "--works", "stage", "generate", "--batch-size", 8, "--runs", 1)
    text = capsys.readouterr().out
    rows = ["stage 1 VQ-VAE", "stage 1 E_cont", "stage 1 E_deg", "stage 2", "generate, default"]
    assert all(f"| {name} |" in text for name in rows)


@pytest.mark.parametrize(
    "argv", [["--works", "F"], ["--size", "huge"], ["--batch-size", 4], ["--runs", 0]]
)
def test_a_wrong_flag_is_one_sentence(monkeypatch, capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        measure(monkeypatch, *argv)
    assert stopped.value.code == 2 and f"error: {argv[0]} {argv[1]}" in capsys.readouterr().err


def test_what_gets_gradients_is_what_the_stages_train(monkeypatch, tmp_path):
    """The names of the parameters in the groups that the stages give to Run."""
    groups_of: list[set[str]] = []

    class Groups:
        """Takes the place of Run."""

        def __init__(self, cfg, rt, net, groups, *_, **__) -> None:
            kept = {id(p) for group in groups for p in group["params"]}
            groups_of.append({name for name, p in net.named_parameters() if id(p) in kept})

        def batches(self, *crops, least=1):
            return iter(())

    rt = Runtime(torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    for stage, crops in ((extractors, {"vq_crop": 32, "crop": 32}), (diffusion, {"crop": 16})):
        small = stage.PRESETS["small"] | crops | {"batch_size": 8}
        monkeypatch.setattr(stage, "Run", Groups)
        monkeypatch.setitem(stage.PRESETS, "small", small)
        stage.train(stage.Config(**small), rt)
    steps, real = [], speed.step

    def spy(net, *args):
        steps.append((net, real(net, *args)))
        return steps[-1][1]

    monkeypatch.setattr(speed, "step", spy)
    names = speed.training(speed.Config(batch_size=8), rt)
    for expected, name, (net, work) in zip(groups_of, names, steps, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda self: None)
            patch.setattr(torch.optim.AdamW, "zero_grad", lambda self, set_to_none: None)
            work()
        gradients = {name for name, p in net.named_parameters() if p.grad is not None}
        assert gradients == expected, name
        net.zero_grad()
