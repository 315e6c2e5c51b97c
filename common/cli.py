"""The command line: a dataclass becomes flags, wrong ones one sentence."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from common import UserError, require
from common.folder import close_all
from common.runtime import (
    STOPPING,
    OtherStopped,
    Runtime,
    local_rank,
    process_count,
    process_rank,
    runtime,
)

C = TypeVar("C")


def own_fields_first(config: type) -> list[dataclasses.Field]:
    """The fields of a dataclass; those that it inherits come last."""
    own = config.__dict__.get("__annotations__", {})
    return sorted(dataclasses.fields(config), key=lambda field: field.name not in own)


def item_types(config: type) -> dict[str, type]:
    """The type of the items of each tuple among the fields of a dataclass."""
    hints = typing.get_type_hints(config)
    return {k: typing.get_args(v)[0] for k, v in hints.items() if typing.get_origin(v) is tuple}


def parse_args(
    config: type[C], presets: dict[str, dict[str, Any]], doc: str, argv: Sequence[str] | None = None
) -> C:
    """Turn each field of a dataclass into a flag, and the comment behind it into its help text.

    A flag beats the preset, the preset beats the default. Tuples take one or more values.
    """
    source = "".join(inspect.getsource(c) for c in reversed(config.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    for field in own_fields_first(config):
        default: Any = field.default
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"type": item_types(config)[field.name], "nargs": "+"}
        text = comments.get(field.name, "").replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **kind)
    flags = vars(parser.parse_args(argv))
    preset = flags.pop("preset", "")
    if preset and process_rank() == 0:
        print(f"preset {preset}")
    require(flags.get("out") != "", "--out is empty: name a folder or a file.")
    flags = {key: tuple(v) if isinstance(v, list) else v for key, v in flags.items()}
    return config(**presets.get(preset, {}) | flags)


def from_dict(config: type[C], values: Any, name: str) -> C:
    """A dataclass from a dict stored in the file `name`; UserError for another field or type."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    require(isinstance(values, dict), f"{name}: its configuration is no dict.")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for key, value in values.items():
        wrong = f"{name}: {key} = {value!r} in its configuration: of another version, or damaged."
        require(key in defaults, wrong)
        default: Any = defaults[key]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        require(type(value) in kinds, wrong)
        if isinstance(default, tuple):
            kind = item_types(config)[key]
            require(all(type(v) is kind for v in value), wrong)
    return config(**values)


def check_ranges(cfg: Any, ranges: Mapping[str, tuple[float, float]], name: str = "") -> None:
    """UserError for a number out of its range; it names the flag and the file `name`."""
    for key, (low, high) in ranges.items():
        value = getattr(cfg, key)
        for number in value if isinstance(value, tuple) else (value,):
            flag = f"{name}--{key.replace('_', '-')} {number}"
            require(low <= number <= high, f"{flag}: must be in {low:g}..{high:g}.")


MEMORY = (
    "Start the command again with a larger --accumulate N, which divides each batch into N "
    "micro-batches: it goes on from the last checkpoint."
)


def ending(error: BaseException, config: type) -> tuple[int, str]:
    """The exit code of a command that an error ends, and what it prints."""
    if isinstance(error, torch.OutOfMemoryError):
        return 2, f"error: {error} {MEMORY if hasattr(config, 'accumulate') else ''}".strip()
    if isinstance(error, UserError | OSError):  # OSError: a full disk
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, SystemExit):
        return (1, error.code) if isinstance(error.code, str) else (error.code or 0, "")
    return 1, "".join(traceback.format_exception(error)).strip()


def leave(error: BaseException, code: int, text: str) -> NoReturn:
    """End this one of several processes at once; torchrun then ends the others.

    They may be waiting for it, and so would everything that Python does at its end. Where all have
    the same error, the first prints it and the others are ended before.
    """
    for sent in STOPPING:
        signal.signal(sent, signal.SIG_DFL)
    if isinstance(error, OtherStopped):
        time.sleep(5)
    elif process_rank() > 0:
        time.sleep(2 + local_rank() / 4)
    if text:
        print(text, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by whoever was reading
            stream.flush()
    os._exit(code)


def launch(main: Callable[[Any, Runtime], object], config: type, presets: dict, doc: str) -> None:
    """Run a stage from the command line; a UserError becomes one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be unable to print a file name
            stream.reconfigure(errors="backslashreplace")
    try:
        cfg: Any = parse_args(config, presets, doc)
        require(0 <= cfg.seed < 2**63, f"--seed {cfg.seed}: must be in 0..2^63 - 1.")
        with runtime(cfg.device, cfg.seed) as rt:
            main(cfg, rt)
    except BaseException as error:
        code, text = ending(error, config)
        if process_count() > 1:
            leave(error, code, text)
        if code == 1 or isinstance(error, SystemExit):
            raise
        if text:
            print(text, file=sys.stderr)
        sys.exit(code)
    finally:
        close_all()
