"""Plumbing of all stages: command line, processes, image files, checkpoints, training runs.

It holds nothing of the method: a reader who skips this file misses no idea of the paper.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import inspect
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFile
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


class UserError(ValueError):
    """A mistake that the user can correct: printed as one sentence, with exit code 2."""


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


# ---- command line and processes ---------------------------------------------------------------


def process_rank() -> int:
    """Rank of this process, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


@functools.cache
def print_once(line: str) -> None:
    """Print a line in the first process, and only the first time."""
    if process_rank() == 0:
        print(line)


def parse_args(
    config: type[C], presets: dict[str, dict[str, Any]], doc: str, argv: Sequence[str] | None = None
) -> C:
    """Turn each field of a dataclass into a flag, and the comment behind it into its help text.

    A flag beats the preset, the preset beats the default. Tuples take one or more values.
    """
    source = "".join(inspect.getsource(c) for c in config.__mro__[:-1])
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        default: Any = field.default
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"type": type(default[0]) if default else str, "nargs": "+"}
        text = comments.get(field.name, "").replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **kind)
    flags = vars(parser.parse_args(argv))
    preset = flags.pop("preset", "")
    if preset and process_rank() == 0:
        print(f"preset {preset}")
    flags = {key: tuple(v) if isinstance(v, list) else v for key, v in flags.items()}
    return config(**presets.get(preset, {}) | flags)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs: its device, its rank and the number of processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def autocast(self, bf16: bool) -> torch.autocast:
        """Context of bf16, if wanted and if the device has instructions for it; else of float32."""
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16 and fast)


@contextlib.contextmanager
def runtime(device: str = "auto", seed: int = 0) -> Iterator[Runtime]:
    """Choose the device, seed the global generator, join the processes that torchrun started."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: this machine has no such device ({error}).") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1:
        # FlopCounterMode imports this module. Its default arguments would hold a group made before,
        # whose threads then outlive destroy_process_group: the process would abort at its end.
        importlib.import_module("torch.distributed.nn")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # one may work alone
    torch.manual_seed(seed)
    try:
        yield Runtime(chosen, process_rank(), world_size)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def launch(main: Callable[[Any, Runtime], object], config: type, presets: dict, doc: str) -> None:
    """Run a stage from the command line; a UserError becomes one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what it cannot print
            stream.reconfigure(errors="backslashreplace")
    try:
        cfg: Any = parse_args(config, presets, doc)
        require(0 <= cfg.seed < 2**63, f"--seed {cfg.seed}: must be in 0..2^63 - 1.")
        with runtime(cfg.device, cfg.seed) as rt:
            main(cfg, rt)
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # OSError: a full disk
        if process_rank() > 0:
            time.sleep(2)  # torchrun stops this process when the first has printed the same error
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def wait_for_all(rt: Runtime) -> None:
    """Wait until all processes have come to this line."""
    if rt.world_size > 1:
        try:
            dist.barrier()
        except RuntimeError:
            raise UserError("another process has stopped.") from None


def in_parallel(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Yield work(item) of all items, in order, from several threads; an error cancels the rest.

    Items are taken no further ahead than 2 for each thread.
    """
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                while waiting and (waiting[0].done() or len(waiting) > 2 * threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---- randomness -------------------------------------------------------------------------------


def generator(*numbers: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of these numbers and names, such as (seed, image index)."""
    state = np.random.SeedSequence(list(str(numbers).encode())).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


# ---- which files are photos -------------------------------------------------------------------


SYSTEM = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "thumbs.db"}
# Formats of Pillow that hold drawings, icons, films or measurements.
NO_PHOTOS = set("BUFR CUR EPS FITS FLI GRIB HDF5 ICNS ICO IM IPTC MPEG PDF WMF".split())


@functools.cache
def photo_suffixes() -> set[str]:
    """Suffixes of the photos that the installed Pillow reads, HEIC included with pillow-heif."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    suffixes = Image.registered_extensions()
    return {s for s, name in suffixes.items() if name in {*Image.OPEN, "MPO"} - NO_PHOTOS}


def photos_in(path: Path, left_out: Counter, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the photos of a file or folder, sub-folders included, sorted; count all other files.

    Links are followed, except to the folders `above` this path.
    """
    suffix = path.suffix.lower()
    if path.name.lower() in SYSTEM or (above and path.name.startswith(".")):
        left_out["hidden or system"] += 1
    elif path.is_dir() and path.resolve() in above:
        left_out["links in a circle"] += 1
    elif path.is_dir():
        for inside in sorted(path.iterdir()):
            yield from photos_in(inside, left_out, (*above, path.resolve()))
    elif suffix not in photo_suffixes():
        heif = " (pip install pillow-heif to read them)" if suffix in (".heic", ".heif") else ""
        left_out[(suffix or "without suffix") + heif] += 1
    elif not path.is_file():
        left_out["broken links"] += 1
    else:
        yield path


def list_images(paths: Sequence[str], flag: str, packed: bool = False) -> list[Path]:
    """All photos among files and folders, sorted, each once; UserError if there are none.

    It prints what is left out. `packed` allows files of data/pack.py, too.
    """
    files, left_out = [], Counter[str]()
    for path in map(Path, paths):
        require(path.exists(), f"{flag} {path}: no such file or folder.")
        if path.suffix == ".npy" and path.is_file():
            require(packed, f"{flag} {path}: packed crops are only to train on; give photos.")
            files.append(path)
        else:
            files += photos_in(path, left_out)
    where, reasons = f"{flag} {' '.join(map(str, paths))}", left_out.most_common(9)
    rest = f"left out {left_out.total()} files: {', '.join(f'{n} {why}' for why, n in reasons)}"
    require(bool(files), f"{where}: no images found{'; ' + rest if reasons else ''}.")
    if reasons:
        print_once(f"{where}: {rest}")
    return list(dict.fromkeys(files))


def find_photos(given: Sequence[str], kind: str, flag: str, packed: bool = False) -> list[Path]:
    """The photos that the user named, else those of data/KIND, else those of data/sample/KIND.

    With `packed`, data/KIND.npy comes before data/KIND. It prints which photos it takes.
    """
    if given:
        return list_images(given, flag, packed)
    data = Path(__file__).parent / "data"
    if packed and (data / f"{kind}.npy").is_file():
        print_once(f"using the packed crops of data/{kind}.npy, not the photos of data/{kind}")
        return [data / f"{kind}.npy"]
    try:
        return list_images([str(data / kind)], flag)
    except UserError as error:
        print_once(f"{error} Using the photos of data/sample/{kind} (see data/README.md).")
    return list_images([str(data / "sample" / kind)], flag)


def outside(files: list[Path], out: Path, flag: str) -> list[Path]:
    """The files that do not lie in the folder `out` of the results; UserError if all do."""
    folder = out.resolve()
    kept = [file for file in files if folder not in file.resolve().parents]
    require(bool(kept), f"{flag}: all its images lie in --out {out}: give another --out.")
    return kept


def photo_names(files: Sequence[Path], given: Sequence[str]) -> list[str]:
    """A name for each photo: its path below the given folder, joined by underscores.

    Underscores replace blanks and commas, too, which most lists of files cannot hold. Names that
    are equal, apart from upper and lower case, end in eight digits of the whole path.
    """
    data = Path(__file__).parent / "data"
    usual = {top / kind for top in (data, data / "sample") for kind in ("hr", "lr")}
    folders = {Path(path) for path in given} or usual
    names = []
    for file in files:
        below = next((file.relative_to(p) for p in file.parents if p in folders), Path(file.name))
        names.append(re.sub(r"[\s,]+", "_", "_".join(below.with_suffix("").parts)))
    count = Counter(name.casefold() for name in names)
    return [
        name if count[name.casefold()] == 1 else f"{name}-{zlib.crc32(os.fsencode(file)):08x}"
        for name, file in zip(names, files, strict=True)
    ]


# ---- reading and writing files ----------------------------------------------------------------


Image.MAX_IMAGE_PIXELS = MAX_PIXELS = 2**29  # some photos are larger than Pillow's limit
# Axes to flip of an image (3, H, W), by its EXIF orientation; in 5 to 8, W and H are swapped, too.
FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image; 1, upright, if EXIF is missing or damaged."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises errors of many types
        return 1


def pixels_of(file: ImageFile.ImageFile) -> Tensor:
    """Pixels (3, H, W) in [0, 1] of an opened image; ValueError if their range is not known."""
    if file.width * file.height > MAX_PIXELS:
        raise ValueError(f"{file.width} x {file.height} pixels are more than {MAX_PIXELS}")
    mode, tile, tags = file.mode, str(file.tile[:1]), getattr(file, "tag_v2", {})  # tags of TIFF
    bits, signed, planar = tags.get(258, (8,)), 2 in tags.get(339, ()), tags.get(284) == 2
    deep = mode.startswith("I")  # gray of 16 bits, which Pillow's convert() would clip
    if (
        (mode == "F" or mode == "I" and file.format not in ("PNG", "PPM"))  # of 32 bits
        or (signed or deep and tags.get(262) == 0)  # white is 0
        or (planar and "raw" in tile and bits[0] > 8)  # Pillow reads them as 8 bits
    ):
        raise ValueError("numbers of a rare kind: convert it to RGB of 8 or 16 bits")
    file.load()
    image: Image.Image = file
    if deep:
        x = torch.from_numpy(np.asarray(image).astype(np.float32)).div_(65535).expand(3, -1, -1)
    else:
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    turn = orientation(file)
    if turn in FLIPS:
        x = (x.mT if turn > 4 else x).flip(FLIPS[turn])
    x = x.contiguous()
    if x.dtype == torch.uint8:
        x = x.float().div_(255)  # in place: photos may be large
    if re.search(r"(I|LA|RGBA?);1[26]", tile) and x.max() < 1 / 16:
        raise ValueError("numbers of 16 bits that use only 12 of them: scale them up")
    return x


def load_image(path: str | Path) -> Tensor:
    """Read an image file as float32 RGB (3, H, W) in [0, 1]; ValueError if that is impossible.

    Gray is repeated and keeps its 16 bits, alpha is laid over white, EXIF rotation is applied.
    """
    try:
        with Image.open(path) as file:
            return pixels_of(file)
    except Exception as error:  # Pillow raises errors of many types for a damaged file
        raise ValueError(f"{path}: not a readable image ({error})") from None


def crop_to_multiple(image: Tensor, scale: int, path: str | Path) -> Tensor:
    """Cut an image (3, H, W) to a multiple of the scale; ValueError if it is too small."""
    H, W = (side // scale * scale for side in image.shape[1:])
    if min(H, W) < 8 * scale:
        size = f"{image.shape[2]} x {image.shape[1]} pixels"
        raise ValueError(f"{path}: {size} are too few at scale {scale}")
    return image[:, :H, :W]


def to_uint8(x: Tensor) -> Tensor:
    """Round an image in [0, 1] to 8 bits."""
    return x.clamp(0, 1).mul_(255).round_().to(torch.uint8)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file to write to; rename it to `path` if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # as umask says; safetensors hides its files from other users
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_image(path: str | Path, x: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG: whole or not at all."""
    image = Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", compress_level=1)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; a file with the same text is not touched."""
    data = text.encode(errors="surrogateescape")  # file names need not be valid Unicode
    if not path.is_file() or path.read_bytes() != data:
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def centre(image: Tensor, size: int, side: int) -> Tensor:
    """The middle size x size pixels of an image, padded with white, as side x side pixels."""
    top, left = (max(0, n - size) // 2 for n in image.shape[1:])
    crop = image[:, top : top + size, left : left + size]
    crop = F.pad(crop, (0, size - crop.shape[2], 0, size - crop.shape[1]), value=1.0)[None]
    if side >= size:
        return F.interpolate(crop, (side, side), mode="nearest")[0]
    return F.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)


def save_sheet(path: str | Path, titles: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> None:
    """Write rows of pictures (3, side, side) under a line of titles."""
    lines = [torch.cat([F.pad(x, (2, 2, 2, 2), value=1.0) for x in row], dim=2) for row in rows]
    body = torch.cat(lines, dim=1).cpu()
    head = Image.new("RGB", (body.shape[2], 18), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(head).text((6 + i * body.shape[2] // len(titles), 3), title, fill="black")
    pixels = torch.from_numpy(np.array(head)).permute(2, 0, 1) / 255
    save_image(path, torch.cat([pixels, body], dim=1))


# ---- weights and configurations ---------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: a dict with "ema", the averaged weights, and "config". No code is run.

    The file may be ours (.pt, or .safetensors with a JSON config) or of another program: weights
    alone, or under params_ema, params (BasicSR) or state_dict (Lightning). Else UserError.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                half = {k: v.float() for k, v in weights.items() if v.dtype == torch.float16}
                config = json.loads((file.metadata() or {}).get("config", "{}"))
                return {"ema": weights | half, "config": config}
        state = torch.load(path, map_location="cpu", weights_only=True)
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
    return {"config": {}} | (state if "config" in state else {}) | {"ema": weights}


def find_checkpoint(given: str, stage: str, make: str) -> Path:
    """The file that the user named, else runs/STAGE/last.pt, else the shipped weights."""
    if given:
        require(Path(given).is_file(), f"--checkpoint {given}: no such file.")
        return Path(given)
    shipped = Path(__file__).parent / "data" / "pretrained" / f"{stage}.safetensors"
    for path in (Path("runs") / stage / "last.pt", shipped):
        if path.is_file():
            return path
    where = f"runs/{stage} or data/pretrained"
    raise UserError(f"no {stage} weights in {where}: make them with `{make}`.")


def fingerprint(source: str | Path | nn.Module) -> str:
    """Eight digits that tell files, or networks of the same structure, from each other."""
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


def check_parts(cfg: Any, least: int = 1, sources: int = 1) -> None:
    """UserError unless --accumulate divides the batch of each source into parts of >= `least`.

    A batch has equally many images of each of the sources.
    """
    batch, parts = cfg.batch_size // sources, cfg.accumulate or 1
    fits = batch % parts == 0 and batch // parts >= least
    size = f"--batch-size {cfg.batch_size}" + f" of {sources} kinds" * (sources > 1)
    require(fits, f"--accumulate {parts}: {size} has not so many equal parts of {least} or more.")


def from_dict(config: type[C], values: Any, name: str) -> C:
    """A dataclass from a dict stored in the file `name`; UserError for another field or type."""
    fields = {f.name: f.default for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    require(isinstance(values, dict), f"{name}: its configuration is no dict.")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for key, value in values.items():
        wrong = f"{name}: {key} = {value!r} in its configuration: of another version, or damaged."
        require(key in fields, wrong)
        default: Any = fields[key]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        require(type(value) in kinds, wrong)
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            require(all(type(v) is kind for v in value), wrong)
    return config(**values)


def check_ranges(cfg: Any, ranges: Mapping[str, tuple[float, float]], name: str = "") -> None:
    """UserError for a number out of its range; it names the flag and the file `name`."""
    for key, (low, high) in ranges.items():
        value = getattr(cfg, key)
        for number in value if isinstance(value, tuple) else (value,):
            flag = f"{name}--{key.replace('_', '-')} {number}"
            require(low <= number <= high, f"{flag}: must be in {low:g}..{high:g}.")


# ---- the run of a training ----------------------------------------------------------------------

# Flags that all trainings have, and their ranges.
TRAINING_RANGES = {"accumulate": (0, 2**16), "log_every": (1, 2**31), "save_every": (1, 2**31),
                   "cooldown": (0, 1), "ema_decay": (0, 1)}  # fmt: skip
# Flags that may change when a run is resumed. The weights that it started from may not change, but
# their files may move: the fact `began` tells them apart.
MAY_CHANGE = ("out", "checkpoint", "start_from", "vqvae", "steps", "batch_size", "accumulate",
              "log_every", "save_every", "cooldown", "compile", "bf16", "device")  # fmt: skip


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average the gradients over all processes, in one message.

    DistributedDataParallel would forbid a loss to call other methods of its network than forward.
    """
    if world_size > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat / world_size, gradients))


def largest(value: float, rt: Runtime) -> float:
    """The largest value of all processes."""
    if rt.world_size > 1:
        values = torch.tensor([float(value)], device=rt.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()
    return value


def parts_that_fit(batch: int, least: int, cost: float, room: float) -> int:
    """The smallest number of equal parts of a batch so that one part takes at most `room` bytes.

    A part has at least `least` images, which take `cost` bytes. If none fits, the largest number.
    """
    possible = [n for n in range(1, batch // least + 1) if batch % n == 0]
    return next((n for n in possible if cost * batch / n / least <= room), possible[-1])


def compile_networks(networks: Sequence[nn.Module], rt: Runtime) -> None:
    """Apply torch.compile; where it does not work, print a sentence and go on without it."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=rt.device))
    except Exception as error:  # of many types; most often a C++ compiler is missing
        if rt.is_main:
            print(f"torch.compile does not work here ({type(error).__name__}): training without it")
        return
    for net in networks:
        net.compile()


class Run:
    """A training of a network: everything but the loss.

        run = Run(cfg, rt, net, groups, path, steps)
        for *images, draw in run.batches(crops):
            with rt.autocast(cfg.bf16):
                losses = ...        # a dict of tensors: "loss" is minimised, all are logged
            run.update(losses)

    `groups` are the parameter groups of AdamW; all other parameters are frozen. In the end `net`
    has the averaged weights. The checkpoint `path` is a dict of step, steps, net, ema, opt, config;
    a run resumes from it if the configuration, with the `facts` of what it starts from, is equal.
    Batches and draws depend on (seed, step, part) alone, so 1 process with 2 parts computes what 2
    processes do. preview() may draw a picture; the numbers that it returns are logged.
    """

    def __init__(
        self,
        cfg: Any,
        rt: Runtime,
        net: nn.Module,
        groups: list[dict[str, Any]],
        path: Path,
        steps: int,
        preview: Callable[[], dict[str, Tensor]] = dict,
        **facts: Any,
    ) -> None:
        self.cfg, self.rt, self.net, self.path, self.steps = cfg, rt, net, path, steps
        self.preview, self.config = preview, dataclasses.asdict(cfg) | facts
        self.step, self.part, self.parts = 0, 0, 1  # step -1: a trial, see there
        self.clock, self.logged = 0.0, 0  # time and step of the last line of the log
        self.trained = [p for group in groups for p in group["params"]]
        learns = any(group["lr"] > 0 for group in groups) or steps == 0
        require(learns, "all learning rates are 0: there is nothing to train.")
        net.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.requires_grad_(False)
        for p in self.trained:
            p.requires_grad_(True)
        self.learning_rates = [group["lr"] for group in groups]
        self.opt = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.ema = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.before = path.with_name(
            "before.pt" if path.name == "last.pt" else f"before-{path.name}"
        )
        if path.is_file() or self.before.is_file():
            self.resume(self.read())

    def read(self) -> dict[str, Any]:
        """The last checkpoint, or the one before if the last is damaged or missing."""
        try:
            require(self.path.is_file(), f"{self.path} is missing.")
            return load_checkpoint(self.path)
        except UserError as error:
            if not self.before.is_file():
                raise
            if self.rt.is_main:
                print(f"{error} Going on from {self.before}.")
                if self.path.is_file():
                    os.replace(self.path, self.path.with_suffix(".damaged"))
            return load_checkpoint(self.before)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; UserError unless it is of a run with the same configuration."""
        path = self.path
        advice = f"give another --{'name' if 'name' in self.config else 'out'} or delete it"
        wrong = f"{path} is no checkpoint of this training: {advice}."
        require({"step", "net", "ema", "opt"} <= state.keys(), wrong)
        step, stored = state["step"], state["config"]
        require(isinstance(stored, dict) and type(step) is int and step >= 0, wrong)
        changed = {k: v for k, v in self.config.items() if stored.get(k, "missing") != v}
        for key, value in changed.items():
            require(key != "began", f"{path} began from other weights: {advice}.")
            flag, old = f"--{key.replace('_', '-')}", stored.get(key, "missing")
            require(key in MAY_CHANGE, f"{flag} is {value}, in {path} {old}: {advice}.")
        for key, value in changed.items() if self.rt.is_main else ():
            flag = f"--{key.replace('_', '-')}"
            print(f"{path}: from now on {flag} {value} ({stored.get(key)} before)")
        for weights in (state["net"], state["ema"]):
            check_weights(weights, self.net, str(path))
        try:
            self.opt.load_state_dict(state["opt"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(wrong) from None
        self.net.load_state_dict(state["net"])
        self.ema = {key: value.to(self.rt.device) for key, value in state["ema"].items()}
        self.step = step
        if self.rt.is_main and self.step < self.steps:
            print(f"resuming {path} at step {self.step}")
        elif self.rt.is_main and self.steps > 0:
            print(f"{path} is finished: it has {self.step} steps; more --steps go on from there")

    def batches(self, *crops: Any, least: int = 1) -> Iterator[tuple[Any, ...]]:
        """Yield a batch of each of the crops, and a generator, until the last step is done.

        A batch is divided as --accumulate says, or else as the memory of a GPU requires; each part
        has at least `least` images.
        """
        cfg, rt = self.cfg, self.rt
        if self.step < self.steps and rt.device.type == "cuda" and not cfg.accumulate:
            yield from self.trial(crops, least)
        else:
            self.parts = cfg.accumulate or 1
        per_step, start = rt.world_size * self.parts, self.step

        def numbers() -> Iterator[int]:  # of the parts of this process
            for step in range(start, self.steps):
                yield from range(step * per_step + rt.rank, (step + 1) * per_step, rt.world_size)

        streams = [c.batches(numbers(), c.batch_size // self.parts, rt.device) for c in crops]
        self.images = sum(c.batch_size for c in crops) * rt.world_size
        pairs = [(self.ema[key], value) for key, value in self.net.state_dict().items()]
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.stop: list[bool] = []  # SIGTERM adds an item
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop.append(True))
        try:
            for number, *images in zip(numbers(), *streams, strict=True):
                yield *images, generator(cfg.seed, number, device=rt.device)
        finally:
            signal.signal(signal.SIGTERM, before)
        self.net.load_state_dict(self.ema)
        self.net.eval().requires_grad_(False)

    def trial(self, crops: Sequence[Any], least: int) -> Iterator[tuple[Any, ...]]:
        """Yield a batch of `least` images to measure its memory, and choose the number of parts.

        update() makes no step of it.
        """
        device, batch = self.rt.device, crops[0].batch_size  # the same for all crops
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        step, self.step = self.step, -1
        torch.compiler.set_stance("force_eager")
        draw = generator(self.cfg.seed, -1, device=device)
        yield *(next(c.batches([0], least, device)) for c in crops), draw
        torch.compiler.set_stance("default")
        self.step = step
        cost = torch.cuda.max_memory_allocated(device) - allocated
        adam = 8 * sum(p.numel() for p in self.trained)
        torch.cuda.empty_cache()
        room = 0.9 * torch.cuda.mem_get_info(device)[0] - adam
        self.parts = int(largest(parts_that_fit(batch, least, cost, room), self.rt))
        if self.rt.is_main and self.parts > 1:
            print(f"memory is short: a batch goes through the networks in {self.parts} parts")

    def update(self, losses: dict[str, Tensor]) -> None:
        """Backward pass; after the last part of a batch the step, its log and its checkpoint."""
        cfg, rt = self.cfg, self.rt
        (losses["loss"] / self.parts).backward()
        if self.step < 0:
            return self.opt.zero_grad(set_to_none=True)
        self.part = (self.part + 1) % self.parts
        if self.part > 0:
            return
        average_gradients(self.trained, rt.world_size)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        left = (self.steps - self.step) / max(1, cfg.cooldown * self.steps)
        for group, rate in zip(self.opt.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * min(1, left)  # falls to 0 over the last cfg.cooldown of the steps
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        # The average warms up, so that a short run does not end near its initialisation.
        decay = min(cfg.ema_decay, (1 + self.step) / (10 + self.step))
        averages, weights = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.step += 1
        together = rt.world_size == 1 or self.step % 10 == 0  # all processes stop at the same step
        stopping = together and largest(bool(self.stop), rt) > 0
        saving = self.step % cfg.save_every == 0 or self.step == self.steps or stopping
        if rt.is_main and (saving or self.step % cfg.log_every == 0):
            self.report(losses, norm, saving)
        if rt.is_main and saving:
            self.save()
        if not self.clock:  # the first step does not count as speed: networks are compiled in it
            self.clock, self.logged = time.time(), self.step
        if stopping:
            raise SystemExit(f"stopped at step {self.step}; the same command goes on from there")

    def report(self, losses: dict[str, Tensor], norm: Tensor, saving: bool) -> None:
        """Print the numbers of a step and append them to log.jsonl; UserError if not finite."""
        shown = {key: value.item() for key, value in losses.items()}
        finite = math.isfinite(shown["loss"]) and math.isfinite(norm.item())
        kept = f"{self.path} is of an earlier step" if self.path.is_file() else "nothing is saved"
        found = f"the loss is {shown['loss']}, its gradient {norm.item()} at step {self.step}"
        require(finite, f"{found}; {kept}.")
        speed = {}
        if self.clock:
            images = (self.step - self.logged) * self.images
            speed["images/s"] = images / (time.time() - self.clock)
        if self.rt.device.type == "cuda":
            speed["GiB"] = torch.cuda.max_memory_allocated(self.rt.device) / 2**30
        preview = self.preview() if saving else {}
        shown |= {key: value.item() for key, value in preview.items()} | speed
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        name = f"{self.path.parent.name}/{self.path.stem}"
        print(f"{name} {self.step}/{self.steps}  {text}", flush=True)
        with open(self.path.with_name("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": self.path.stem, "step": self.step, **shown}) + "\n")
        self.clock, self.logged = time.time(), self.step

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, and keep the one before."""
        state = {"step": self.step, "steps": self.steps, "net": self.net.state_dict(),
                 "ema": self.ema, "opt": self.opt.state_dict(), "config": self.config}  # fmt: skip
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
            if self.path.is_file():
                os.replace(self.path, self.before)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration without the paths of the machine that trained."""
    paths = {"hr", "lr", "out", "checkpoint", "start_from", "vqvae"}
    kept = {key: value for key, value in config.items() if key not in paths}
    return {k: without_paths(v) if isinstance(v, dict) else v for k, v in kept.items()}


if __name__ == "__main__":  # python common.py IN.pt OUT.safetensors: averaged weights, to ship
    source, target = load_checkpoint(sys.argv[1]), sys.argv[2]
    half = {key: value.half().contiguous() for key, value in source["ema"].items()}
    facts = {"config": json.dumps(without_paths(source["config"])), "step": str(source["step"])}
    with replacing(target) as written:
        save_file(half, written, facts)
