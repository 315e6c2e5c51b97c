"""Weights: find and read checkpoints, check that they fit a network."""

import contextlib
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common import UserError, require
from common.files import DATA, replacing
from common.runtime import print_once

FACTS = ("config", "calibration")  # stored beside the weights


def digest_of(state: Any) -> int:
    """CRC-32 of all tensors and values in nested dicts and lists."""
    if isinstance(state, Tensor):
        raw = state.detach().cpu().contiguous().flatten().view(torch.uint8)
        return zlib.crc32(raw.numpy().data, zlib.crc32(f"{state.dtype}{[*state.shape]}".encode()))
    if isinstance(state, dict):
        state = [(str(key), state[key]) for key in sorted(state, key=str)]
    if isinstance(state, list | tuple):
        return zlib.crc32(str([digest_of(value) for value in state]).encode())
    return zlib.crc32(repr(state).encode())


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """files.replacing() for weights; a full disk is one sentence."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except (RuntimeError, SafetensorError, OSError) as error:  # torch has no type of its own
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} could not be written; is the disk full? ({reason})") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: a dict with "ema", the averaged weights, and "config". No code is run.

    "calibration" holds what was measured on these weights, empty if nothing was.

    The file may be ours (.pt, or .safetensors with a JSON config) or of another program: weights
    alone, or under params_ema, params (BasicSR) or state_dict (Lightning). Else UserError.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                half = {k: v.float() for k, v in weights.items() if v.dtype == torch.float16}
                texts = file.metadata() or {}
                facts = {key: json.loads(texts.get(key, "{}")) for key in FACTS}
                changed = "digest" in texts and int(texts["digest"]) != digest_of(weights)
                require(not changed, "its checksum is wrong")
                return {"ema": weights | half, **facts}
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and "digest" in state:
            require(state.pop("digest") == digest_of(state), "its checksum is wrong")
    except pickle.UnpicklingError:
        advice = "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        found = "it is damaged, or holds Python objects"
        raise UserError(f"{path}: {found}. If you trust it, store its weights: {advice}.") from None
    except Exception as error:  # damaged files raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no readable checkpoint ({reason}).") from None
    kind = type(state).__name__
    require(isinstance(state, dict), f"{path}: holds a {kind}, not weights by name.")
    names = ("ema", "params_ema", "params", "state_dict")
    weights = next((state[name] for name in names if name in state), state)
    empty: dict[str, Any] = {key: {} for key in FACTS}
    return empty | (state if "config" in state else {}) | {"ema": weights}


def save_weights(path: str | Path, weights: dict[str, Tensor], **facts: Any) -> None:
    """Write weights and facts about them, each as JSON, into a .safetensors file."""
    contiguous = {key: value.contiguous().cpu() for key, value in weights.items()}
    texts = {key: json.dumps(fact) for key, fact in facts.items()}
    with writing(path) as temporary:
        save_file(contiguous, temporary, texts | {"digest": str(digest_of(contiguous))})


def save_state(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint with a checksum; what was there before may be kept."""
    with writing(path) as temporary:
        torch.save(state | {"digest": digest_of(state)}, temporary)
        if keep and path.is_file():
            os.replace(path, keep)


def add_fact(path: Path, name: str, fact: Any) -> None:
    """Store a fact about the weights in their checkpoint; all else in it stays as it is."""
    state = load_checkpoint(path)  # checks it
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            texts = (file.metadata() or {}) | {name: json.dumps(fact)}
        with writing(path) as temporary:
            save_file(weights, temporary, texts | {"digest": str(digest_of(weights))})
    else:
        save_state(path, state | {name: fact})


def before(path: Path) -> Path:
    """The checkpoint that a training keeps beside its last one."""
    return path.with_name("before.pt" if path.name == "last.pt" else f"before-{path.name}")


def newest(path: Path) -> Path | None:
    """A checkpoint, or the one before it if it is damaged or missing; None without both."""
    if path.suffix != ".pt" or not before(path).is_file():
        return path if path.is_file() else None
    try:
        require(path.is_file(), f"{path} is missing.")
        load_checkpoint(path)
        return path
    except UserError as error:
        print_once(f"{error} Taking {before(path)}.")
        return before(path)


def find_checkpoint(given: str, stage: str, make: str) -> Path:
    """The file that the user named, else runs/STAGE/last.pt, else the shipped weights.

    In place of a checkpoint that is damaged or missing the one before it is found.
    """
    if given:
        found = newest(Path(given))
        require(found is not None, f"--checkpoint {given}: no such file.")
        return found or Path(given)
    shipped = DATA / "pretrained" / f"{stage}.safetensors"
    for path in (Path("runs") / stage / "last.pt", shipped):
        if found := newest(path):
            return found
    where = f"runs/{stage} or data/pretrained"
    raise UserError(f"no {stage} weights in {where}: make them with `{make}`.")


def fingerprint(source: str | Path | nn.Module) -> str:
    """CRC-32 of a file or of the weights of a network, as eight digits."""
    if not isinstance(source, nn.Module):
        return f"{zlib.crc32(Path(source).read_bytes()):08x}"
    total = 0
    for value in source.state_dict().values():
        total = zlib.crc32(value.cpu().contiguous().numpy().data, total)
    return f"{total:08x}"


def check_weights(weights: Any, net: nn.Module, name: str) -> None:
    """UserError unless weights fit the network, by name, shape and type, and are finite."""
    require(isinstance(weights, dict), f"{name}: holds no weights by name.")
    needed = {key: value.shape for key, value in net.state_dict().items()}
    given = {key: getattr(value, "shape", None) for key, value in weights.items()}
    require(given == needed, f"{name}: weights of another configuration, --preset or version.")
    for key, value in net.state_dict().items():
        alike = weights[key].is_floating_point() == value.is_floating_point()
        require(alike, f"{name}: {key} holds numbers of type {weights[key].dtype}.")
        require(bool(weights[key].isfinite().all()), f"{name}: {key} is not finite: do not use it.")


def put_weights(net: nn.Module, state: dict[str, Any], name: str) -> None:
    """Give a network, which may be on the device meta, the averaged weights of a checkpoint."""
    check_weights(state["ema"], net, name)
    weights = {
        key: state["ema"][key].to(value.dtype, copy=True, memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    net.load_state_dict(weights, assign=True)


def load_weights(net: nn.Module, path: str, flag: str) -> None:
    """Give a network the averaged weights in a file; UserError unless they fit."""
    require(Path(path).is_file(), f"{flag} {path}: no such file.")
    put_weights(net, load_checkpoint(path), f"{flag} {path}")


def count_parameters(net: nn.Module) -> str:
    """Number of parameters in millions, for people."""
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"
