"""Every number that a user can give has a range, which holds at both of its ends."""

import dataclasses
import importlib
import math
import typing

import pytest

import generate
from common import UserError
from common.cli import check_ranges
from tests.commands import assert_refused, run
from tests.test_layout import COMMANDS

MODULES = [name for name in COMMANDS if name != "benchmark"] + ["bench.inputs"]
EVERYWHERE = {"seed"}  # checked by cli.launch


def numbers(config: type) -> dict[str, type]:
    """The fields that hold numbers, with their type."""
    found = {}
    for name, hint in typing.get_type_hints(config).items():
        kind = (typing.get_args(hint) or (hint,))[0]
        is_field = name in {field.name for field in dataclasses.fields(config)}
        if kind in (int, float) and is_field and name not in EVERYWHERE:
            found[name] = kind
    return found


@pytest.mark.parametrize("name", MODULES)
def test_each_number_has_a_range_that_holds_at_its_ends(name):
    module = importlib.import_module(name)
    ranges = getattr(module, "RANGES", {})
    if name == "bench.inputs":  # the flags of the sampler are those of generate.py
        ranges = generate.RANGES | ranges
    kinds = numbers(module.Config)
    assert set(kinds) <= set(ranges), set(kinds) - set(ranges)
    for field, kind in kinds.items():
        default = {f.name: f.default for f in dataclasses.fields(module.Config)}[field]

        def given(value, default=default, field=field):
            one = (value,) * max(1, len(default)) if isinstance(default, tuple) else value
            return module.Config(**{field: one})

        low, high = ranges[field]
        for value in {low, high}:
            if math.isfinite(value):
                check_ranges(given(kind(value)), {field: (low, high)})
        step = 1 if kind is int else max(1e-6, 1e-9 * abs(high)) if math.isfinite(high) else 1.0
        for value in (low - step, high + step, math.nan if kind is float else low - 1):
            if value != math.inf:
                with pytest.raises(UserError, match=f"--{field.replace('_', '-')} "):
                    check_ranges(given(value), {field: (low, high)})


@pytest.mark.parametrize(
    "command",
    [
        "diffusion.py --widths 7 9 5", "diffusion.py --widths 1 1 1", "diffusion.py --widths 1000",
        "diffusion.py --widths 300 --attention 0 --blocks 1", "diffusion.py --attention 9",
        "diffusion.py --crop 1 --widths 8", "diffusion.py --cond-channels 1 --mod-channels 1",
        "extractors.py --vq-channels 1", "extractors.py --vq-multipliers 1 3",
        "extractors.py --deg-dim 1",
        "extractors.py --vq-multipliers 1", "extractors.py --vq-multipliers 1 2 2 2",
        "extractors.py --deg-channels 1 --mod-channels 1 --vq-codes 1 --vq-z 1",
    ],
)  # fmt: skip
def test_odd_networks_train_or_are_refused_in_one_sentence(command, tmp_path):
    from tests.test_scripts import tiny

    script, *flags = command.split()
    small = {"extractors.py": "--steps 1", "diffusion.py": "--steps 1 --learning-rate 1e-5"}[script]
    done = run(*tiny(script, *small.split(), "--no-compile", "--out", "out", *flags), cwd=tmp_path)
    if done.returncode != 0:
        assert_refused(done, "--")
