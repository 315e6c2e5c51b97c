"""Plumbing shared by the five stages: command line, processes, the training loop, files.

Nothing of the method is here; a reader who skips this file loses no idea of the paper.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, library, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


class UserError(ValueError):
    """Something the user can put right: printed as one sentence, exit code 2."""


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


# ---- command line and processes ---------------------------------------------------------------


def parse_args(
    config: type[C], presets: dict[str, dict[str, Any]], doc: str, argv: Sequence[str] | None = None
) -> C:
    """Turn each field of a dataclass into a flag, its trailing comment into the help text.

    A flag beats the preset, the preset the field's default. Tuples take one or several values.
    """
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if presets:
        small = "small" in presets and not torch.cuda.is_available()
        default = "small" if small else next(iter(presets))
        parser.add_argument("--preset", choices=list(presets), default=default)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        options: dict[str, Any] = {
            "default": None,
            "help": help_of.get(field.name, "").replace("%", "%%"),
        }
        sample: Any = field.default
        if isinstance(sample, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(sample, tuple):
            options |= {"type": type(sample[0]) if sample else str, "nargs": "+"}
        else:
            options["type"] = type(sample)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    preset = given.pop("preset", None)
    values = dict(presets.get(preset, {})) | {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
    }
    if preset and int(os.environ.get("RANK", 0)) == 0:
        print(f"preset {preset}")
    return config(**values)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs: its device and its place among the processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def autocast(self, bf16: bool) -> torch.autocast:
        """bf16 where asked for and where the device multiplies it in hardware, else float32."""
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16 and fast)


@contextlib.contextmanager
def runtime(device: str = "auto", seed: int = 0) -> Iterator[Runtime]:
    """Join torchrun's process group if there is one, choose the device, seed the modules."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: no such device here ({error}).") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1:
        # Imported later (FlopCounterMode does), its default arguments would keep the group and its
        # threads alive behind destroy_process_group, and the process would abort at its end.
        importlib.import_module("torch.distributed.nn")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # to wait for others
    torch.manual_seed(seed)
    try:
        yield Runtime(chosen, int(os.environ.get("RANK", 0)), world_size)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def launch(
    main: Callable[[Any, Runtime], object],
    config: type[Any],
    presets: dict[str, dict[str, Any]],
    doc: str,
) -> None:
    """Run a stage from the command line; a UserError becomes one sentence and exit code 2."""
    try:
        cfg = parse_args(config, presets, doc)
        with runtime(cfg.device, cfg.seed) as rt:
            main(cfg, rt)
    except (UserError, OSError) as error:  # for instance no room, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def wait_for_all(rt: Runtime) -> None:
    """Go on when all processes are here."""
    if rt.world_size > 1:
        dist.barrier()


def in_parallel(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """work(item) of all items, in order, several at a time; an error cancels what has not begun."""
    waiting: collections.deque[Future[B]] = collections.deque()
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
    """A generator that depends on all of the given numbers and names, as (seed, image index)."""
    state = np.random.SeedSequence(list(str(numbers).encode())).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def generator_on(device: torch.device, source: torch.Generator) -> torch.Generator:
    """A generator of this device: the given one, or one that it seeds."""
    if source.device.type == device.type:
        return source
    seed = torch.randint(2**62, (), generator=source, device=source.device)
    return torch.Generator(device).manual_seed(int(seed))


# ---- image files ------------------------------------------------------------------------------


def list_images(paths: Sequence[str], flag: str, packed: bool = False) -> list[Path]:
    """All image files among files and folders (searched in depth), sorted; UserError if none.

    With `packed`, files of data/pack.py may be named among them.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        require(path.exists(), f"{flag} {path}: no such file or folder.")
        if path.suffix == ".npy" and path.is_file():
            require(packed, f"{flag} {path}: packed crops are only to train on; name photos here.")
            files.append(path)
            continue
        inside = path.rglob("*") if path.is_dir() else [path]
        files += sorted(p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file())
    where = " ".join(map(str, paths))
    require(bool(files), f"{flag} {where}: no images there ({', '.join(sorted(SUFFIXES))}).")
    return list(dict.fromkeys(files))


def find_photos(given: Sequence[str], kind: str, flag: str, packed: bool = False) -> list[Path]:
    """The files the user named, else those of data/KIND, else of data/sample/KIND (saying so).

    With `packed`, data/KIND.npy comes before data/KIND (saying so).
    """
    if given:
        return list_images(given, flag, packed)
    here = Path(__file__).parent / "data"
    if packed and (here / f"{kind}.npy").is_file():
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"using the packed crops of data/{kind}.npy, not the photos of data/{kind}")
        return [here / f"{kind}.npy"]
    with contextlib.suppress(UserError):
        return list_images([str(here / kind)], flag)
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"data/{kind} has no images: using the few of data/sample/{kind} (see data/README.md)"
        )
    return list_images([str(here / "sample" / kind)], flag)


def outside(files: list[Path], out: Path, flag: str) -> list[Path]:
    """The files that do not lie in the folder of results; UserError if all do."""
    folder = out.resolve()
    kept = [f for f in files if folder not in f.resolve().parents] if out.is_dir() else files
    require(bool(kept), f"{flag}: all its images lie in --out {out}: give another --out.")
    return kept


def photo_names(files: Sequence[Path], given: Sequence[str]) -> list[str]:
    """A name for each photo, from its path below the folder given and nothing else.

    Folders and file are joined by underscores. Where two would be equal, but for their case, each
    gets eight digits that depend on its whole path.
    """
    data = Path(__file__).parent / "data"
    folders = {Path(path) for path in given} or {data / "hr", data / "sample" / "hr"}
    names = []
    for file in files:
        below = next((file.relative_to(p) for p in file.parents if p in folders), Path(file.name))
        names.append("_".join(below.with_suffix("").parts))
    count = collections.Counter(name.casefold() for name in names)
    return [
        name if count[name.casefold()] == 1 else f"{name}-{zlib.crc32(os.fsencode(file)):08x}"
        for name, file in zip(names, files, strict=True)
    ]


def load_image(path: str | Path) -> Tensor:
    """Read an image file as float32 RGB (3, H, W) in [0, 1], upright; ValueError if it can't be.

    Gray is repeated, its 16 bits keep their precision, alpha is laid over white, EXIF rotation
    applies.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):  # 16-bit gray; Pillow's convert() would clip it
                gray = np.asarray(image, np.float32)
                top = 65535 if image.mode.startswith("I") else max(1.0, float(gray.max()))
                pixels = np.repeat((gray / top)[..., None], 3, axis=2)
            else:
                if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    return torch.from_numpy(pixels.clip(0, 1)).permute(2, 0, 1).contiguous()


def crop_to_multiple(image: Tensor, scale: int, path: str | Path) -> Tensor:
    """Cut an image (3, H, W) to a multiple of scale; ValueError if it is too small."""
    H, W = (side // scale * scale for side in image.shape[1:])
    if min(H, W) < 8 * scale:
        raise ValueError(
            f"{path}: {image.shape[2]} x {image.shape[1]} pixels are too few at scale {scale}"
        )
    return image[:, :H, :W]


def to_uint8(x: Tensor) -> Tensor:
    """Round an image in [0, 1] to 8 bits."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def save_image(path: str | Path, x: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG: whole or not at all."""
    image = Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def copy_file(source: str | Path, target: str | Path) -> None:
    """Give a file a second name: a hard link, or a copy where the file system has none."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


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
    pixels = torch.frombuffer(bytearray(head.tobytes()), dtype=torch.uint8).float() / 255
    save_image(path, torch.cat([pixels.view(18, -1, 3).permute(2, 0, 1), body], dim=1))


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file to write; rename it to path when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class PairFolder:
    """A folder of pairs hr/NAME.png, lr/NAME.png and their table pairs.jsonl, made bit by bit.

    The table says what is in the folder at any time. Pairs of earlier runs stay until finish();
    those that are no longer asked for are removed then. UserError if files of others are there:
    pairs whose rows have no `field`, or images that are neither in the table nor among `names`.
    """

    def __init__(self, out: Path, names: Sequence[str], field: str) -> None:
        self.out, self.table = out, out / "pairs.jsonl"
        self.before: dict[str, str] = {}  # lines by name
        lines = self.table.read_text(encoding="utf-8").splitlines() if self.table.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # a killed run may leave half a line
                continue
            ours = field in row and row["lr"] == "lr" + row["hr"][2:]
            require(ours, f"--out {out} holds pairs of another command: give another --out.")
            self.before[Path(row["lr"]).stem] = line
        known = {*names, *self.before}
        for file in sorted(f for side in ("hr", "lr") for f in (out / side).glob("[!.]*")):
            stray = f"{file} is of no pair in {self.table}: move it or give another --out."
            require(file.stem in known, stray)
        self.done = set(self.before.values())

    def row(self, name: str, **facts: Any) -> dict[str, Any]:
        """A row of the table."""
        return {"hr": f"hr/{name}.png", "lr": f"lr/{name}.png", **facts}

    def has(self, rows: list[dict], later_than: Path) -> bool:
        """Whether an earlier run made just these pairs, after the photo was last changed."""
        files = [self.out / row[side] for row in rows for side in ("hr", "lr")]
        changed = later_than.stat().st_mtime
        return self.done.issuperset(map(json.dumps, rows)) and all(
            file.is_file() and file.stat().st_mtime >= changed for file in files
        )

    def add(self, rows: list[dict]) -> None:
        """Note pairs that are there now, so that a killed run goes on."""
        lines = [json.dumps(row) for row in rows]
        if not self.done.issuperset(lines):
            with open(self.table, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))

    def finish(self, rows: list[dict]) -> bool:
        """Leave these pairs and no others, in this order; whether anything changed."""
        others = self.before.keys() - {Path(row["lr"]).stem for row in rows}
        for name in others:
            for side in ("hr", "lr"):
                (self.out / side / f"{name}.png").unlink(missing_ok=True)
        if others:
            print(f"removed {len(others)} pairs of an earlier run that this one does not make")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        same = self.table.read_text(encoding="utf-8") == text
        if not same:
            with replacing(self.table) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return not same or not (self.out / "preview.png").is_file()


@functools.cache  # once in each process; a data set holds no map, which pickling would copy
def open_pack(path: Path) -> np.ndarray:
    """Crops (N, 3, side, side) written by data/pack.py, uint8, left on disk; UserError if not."""
    try:
        crops = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: no readable .npy file ({error}).") from None
    found = f"{crops.dtype} of shape {crops.shape}"
    right = crops.dtype == np.uint8 and crops.ndim == 4 and crops.shape[1] == 3 and len(crops) > 0
    require(right, f"{path}: {found}, not uint8 (N, 3, side, side): make it with data/pack.py.")
    return crops


class PhotoCrops(Dataset[Tensor]):
    """Random crops (3, size, size): item i depends on (seed, stream, i) alone.

    Photos that can't be read or are smaller than the crop are left out and counted. Of files of
    data/pack.py, each row counts as a photo.
    """

    grid = 8  # crops begin at its multiples, so that the blocks of a photo's JPEG begin at the edge

    def __init__(
        self, files: list[Path], size: int, batch_size: int, seed: int, rt: Runtime, stream: int = 0
    ) -> None:
        self.size, self.batch_size, self.key = size, batch_size, (seed, stream)
        self.cache: dict[int, Tensor] = {}
        self.left = 2**28  # bytes of photos that may stay in memory, in each loading process
        self.files: list[Path] = []
        self.bad: set[int] = set()
        self.packs = [file for file in files if file.suffix == ".npy"]
        for pack in self.packs:
            side = min(open_pack(pack).shape[2:])
            small = f"{pack}: crops of {side} pixels, too small to train on {size}"
            require(side >= size, f"{small}: pack them again with --size {size} or more.")
        self.count = sum(len(open_pack(pack)) for pack in self.packs)
        bad: list[Path] = []
        photos = [file for file in files if file.suffix != ".npy"]
        for file in photos:
            try:
                with Image.open(file) as image:
                    (self.files if min(image.size) >= size else bad).append(file)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                bad.append(file)
        if bad and rt.is_main:
            print(f"skipped {len(bad)} of {len(photos)} photos: unreadable or under {size} pixels "
                  f"(the first: {bad[0]})")  # fmt: skip
        need = f"no photo of at least {size} x {size} pixels among {len(files)} files"
        self.count += len(self.files)
        require(self.count > 0, f"{need} ({files[0]}, ...).")

    def read(self, file: Path) -> Tensor:
        """A photo as uint8 (3, H, W)."""
        return to_uint8(load_image(file))

    def photo(self, index: int) -> Tensor:
        """Photo as uint8 (3, H, W); kept in memory as long as there is room, unless packed."""
        for crops in map(open_pack, self.packs):
            if index < len(crops):
                return torch.from_numpy(np.array(crops[index]))
            index -= len(crops)
        if index not in self.cache:
            pixels = self.read(self.files[index])
            if pixels.numel() > self.left:
                return pixels
            self.cache[index], self.left = pixels, self.left - pixels.numel()
        return self.cache[index]

    def turned(self, crop: Tensor, draw: int) -> Tensor:
        """A crop, flipped where the draw is odd."""
        return crop.flip(2) if draw % 2 else crop

    def __getitem__(self, i: int) -> Tensor:
        """Crop i, turned at random."""
        for attempt in range(20):
            gen = generator(*self.key, i, attempt)
            index, top, left, draw = torch.randint(2**30, (4,), generator=gen).tolist()
            index %= self.count
            if index in self.bad:
                continue
            try:
                photo = self.photo(index)
            except ValueError as error:
                self.bad.add(index)
                print(f"skipped: {error}")
                continue
            top, left = (
                place % (n - self.size + 1) // self.grid * self.grid
                for place, n in zip((top, left), photo.shape[1:], strict=True)
            )
            crop = photo[:, top : top + self.size, left : left + self.size]
            return self.turned(crop, draw).float() / 255
        raise UserError("20 photos in a row could not be read; look at the files named above.")

    def batches(self, numbers: Iterable[int], device: torch.device) -> Iterator[Tensor]:
        """The batches (B, 3, size, size) of these numbers, on the device."""
        B = self.batch_size
        loader = DataLoader(
            self,
            B,
            sampler=[n * B + b for n in numbers for b in range(B)],
            num_workers=0 if device.type == "cpu" else min(8, os.cpu_count() or 1),
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            batch = batch.to(device, non_blocking=True)  # as it is pinned, not rearranged
            yield batch.contiguous(memory_format=torch.channels_last)


# ---- weights ----------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write state dicts and plain values: whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint (.pt of ours, or .safetensors with a JSON config); nothing is unpickled."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
                return {
                    "ema": weights,
                    "config": json.loads((file.metadata() or {}).get("config", "{}")),
                }
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise UserError(f"{path}: no readable checkpoint ({reason}).") from None
    except Exception as error:  # torch raises pickle errors of several kinds for a damaged file
        raise UserError(f"{path}: no readable checkpoint ({type(error).__name__}).") from None


def find_checkpoint(given: str, stage: str, make: str) -> Path:
    """The file the user named, else runs/STAGE/last.pt, else data/pretrained/STAGE.safetensors."""
    if given:
        require(Path(given).is_file(), f"--checkpoint {given}: no such file.")
        return Path(given)
    shipped = Path(__file__).parent / "data" / "pretrained" / f"{stage}.safetensors"
    for path in (Path("runs") / stage / "last.pt", shipped):
        if path.is_file():
            return path
    raise UserError(
        f"no {stage} weights in runs/{stage} or data/pretrained: make them with `{make}`."
    )


def fingerprint(path: str | Path) -> str:
    """Eight digits that differ between files, whatever they are called."""
    return f"{zlib.crc32(Path(path).read_bytes()):08x}"


def put_weights(net: nn.Module, state: dict[str, Any], name: str) -> None:
    """Give a network the averaged weights of what a checkpoint holds; UserError if they misfit."""
    weights = state.get("ema", {})
    given, needed = ({k: v.shape for k, v in w.items()} for w in (weights, net.state_dict()))
    require(given == needed, f"{name}: weights of another configuration, --preset or version.")
    net.load_state_dict(weights)


def load_weights(net: nn.Module, path: str, flag: str) -> None:
    """Give a network the averaged weights in a file; UserError if there are none that fit."""
    require(Path(path).is_file(), f"{flag} {path}: no such file.")
    put_weights(net, load_checkpoint(path), f"{flag} {path}")


def count_parameters(net: nn.Module) -> str:
    """Number of parameters in millions, for people."""
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters"


def from_dict(config: type[C], values: dict[str, Any]) -> C:
    """A dataclass from a stored dict: lists become tuples, unknown fields are dropped."""
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return config(**tuples)


# ---- networks that judge images ----------------------------------------------------------------

WEIGHTS = {  # by network: the features that LPIPS, DISTS, FID and the CLIP-Score look at
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "clip": "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/"
    "open_clip_model.safetensors",
}


@functools.cache  # which also keeps the declarations alive
def import_torchvision() -> library.Library | None:
    """Import torchvision, even where its compiled operators do not load; nothing here calls them.

    The PyPI wheel of torchvision is a CUDA build: beside a CPU-only torch its operators are missing
    and the import fails. It is enough to declare them first, with any schema.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    both_ways = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    declared = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms", "qroi_align", *both_ways, *(f"_{n}_backward" for n in both_ways)):
        declared.define(f"{name}() -> ()")
    importlib.import_module("torchvision")
    return declared


def weights_file(net: str) -> Path:
    """Where the weights of a network have to be."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS[net]).name


def missing_weights(net: str) -> str:
    """What to do about the weights of a network; empty where they are in place."""
    file = weights_file(net)
    missing = f"put {WEIGHTS[net]} into {file.parent} (or set TORCH_HOME)"
    return "" if file.is_file() else missing


@functools.cache
def perceptual_net(metric: str, net: str, device: torch.device) -> nn.Module:
    """The network of a metric ("LPIPS" or "DISTS"), frozen; UserError instead of a download."""
    missing = missing_weights(net)
    require(not missing, f"{metric} needs weights: {missing}.")
    import_torchvision()
    import DISTS_pytorch
    import lpips

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both packages spell torchvision's options the old way
            if metric == "LPIPS":
                model = lpips.LPIPS(net=net, version="0.1", verbose=False)
            else:
                model = DISTS_pytorch.DISTS(load_weights=False)
    except Exception as error:  # torch raises errors of several kinds for a damaged file
        name = type(error).__name__
        raise UserError(f"{weights_file(net)}: no readable weights ({name}).") from None
    if metric == "DISTS":  # its own loader looks for them outside of the package
        file = Path(DISTS_pytorch.__file__).with_name("weights.pt")
        own = torch.load(file, map_location="cpu", weights_only=True)
        model.alpha.data, model.beta.data = own["alpha"].data, own["beta"].data
    return model.to(device).eval().requires_grad_(False)


# ---- training loop ----------------------------------------------------------------------------


def broadcast(x: Tensor) -> None:
    """Give every process the first one's values."""
    if dist.is_initialized():
        dist.broadcast(x, 0)


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average the gradients over all processes, in one message.

    Used instead of DistributedDataParallel, so that a loss may call any method of its network.
    """
    if world_size > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        parts = (flat / world_size).split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)]
        )


def any_process(flag: bool, rt: Runtime) -> bool:
    """True in every process if it is in one."""
    if rt.world_size == 1:
        return flag
    flags = torch.tensor([float(flag)], device=rt.device)
    dist.all_reduce(flags)
    return bool(flags)


def count_flops(compute: Callable[..., dict[str, Tensor]], *batches: Tensor, number: int) -> int:
    """Floating-point operations of a loss and its gradient: matrix products and convolutions."""
    eager = torch.compiler.set_stance("force_eager")  # what is compiled can't be counted
    with eager, FlopCounterMode(display=False) as counter:
        compute(*batches, number=number)["loss"].backward()
    return counter.get_total_flops()


def open_log(path: Path, tensorboard: bool) -> Callable[[int, dict[str, float]], None]:
    """A function that appends a step's numbers to log.jsonl beside path, and to TensorBoard."""
    writer: Any = None
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs `pip install tensorboard`.") from None
        writer = SummaryWriter(str(path.parent / "tensorboard" / path.stem))

    def log(step: int, numbers: dict[str, float]) -> None:
        with open(path.with_name("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": path.stem, "step": step, **numbers}) + "\n")
        for name, value in numbers.items() if writer else ():
            writer.add_scalar(name, value, step)

    return log


def fit(
    rt: Runtime,
    net: nn.Module,
    loss: Callable[..., dict[str, Tensor]],
    data: Sequence[PhotoCrops],
    groups: list[dict[str, Any]],
    path: Path,
    cfg: Any,
    steps: int,
    config: dict[str, Any],
    compiled: Sequence[nn.Module] = (),
    preview: Callable[[], dict[str, float]] | None = None,
    refresh: Callable[..., None] | None = None,
) -> nn.Module:
    """Minimise loss(net, *batches, generator=...)["loss"]; return the net with averaged weights.

    Resumes from `path` if it exists and leaves the result there: a dict with step, net, ema, opt,
    config. A step averages the gradients of cfg.accumulate batches in each process; batch and draws
    depend on (seed, step, number of the batch) alone, so that 1 process with 2 batches does what 2
    processes with 1 do. `groups` are AdamW parameter groups; parameters outside of them are frozen.
    The learning rate falls to 0 over the last cfg.cooldown (a share) of the steps.
    preview() may draw a picture and returns numbers to log. Every ten steps refresh(*batches,
    generator) may change weights by other means than gradients, in the first process for all.
    """
    require(0 <= cfg.cooldown <= 1, f"--cooldown {cfg.cooldown}: a share of the steps, in 0..1.")
    for name in ("save_every", "log_every", "accumulate"):
        flag, value = name.replace("_", "-"), getattr(cfg, name)
        require(value >= 1, f"--{flag} {value}: must be at least 1.")
    for group in groups:
        require(group["lr"] >= 0, f"a learning rate of {group['lr']}: must be at least 0.")
    net.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [p for group in groups for p in group["params"]]
    require(bool(trained) or steps == 0, "all learning rates are 0: there is nothing to train.")
    net.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    rates = [group["lr"] for group in groups]
    opt = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    ema = {key: value.detach().clone() for key, value in net.state_dict().items()}
    start = 0
    if path.is_file():
        state = load_checkpoint(path)
        same = {k: v.shape for k, v in state["net"].items()} == {
            k: v.shape for k, v in net.state_dict().items()
        }
        tuned = [len(group["params"]) for group in state["opt"]["param_groups"]]
        same &= tuned == [len(group["params"]) for group in opt.param_groups]
        wrong = f"{path} belongs to another configuration: give another --out or delete it."
        require(same, wrong)
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        ema = {key: value.to(rt.device) for key, value in state["ema"].items()}
        start = state["step"]
        if rt.is_main and start < steps:
            print(f"resuming {path} at step {start}")

    def save(step: int) -> None:
        if rt.is_main:
            state = {"step": step, "net": net.state_dict(), "ema": ema, "opt": opt.state_dict()}
            save_checkpoint(path, state | {"config": config})

    def compute(*batches: Tensor, number: int) -> dict[str, Tensor]:
        with rt.autocast(cfg.bf16):
            return loss(net, *batches, generator=generator(cfg.seed, number, device=rt.device))

    path.parent.mkdir(parents=True, exist_ok=True)
    log = open_log(path, cfg.tensorboard)
    stop: list[bool] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    per_step = rt.world_size * cfg.accumulate  # batches of all processes
    mine = [
        step * per_step + i
        for step in range(start, steps)
        for i in range(rt.rank, per_step, rt.world_size)
    ]
    try:
        began, began_step, net_state = time.time(), start, net.state_dict()
        averaged = [(ema[k], v) for k, v in net_state.items() if v.is_floating_point()]
        streams = zip(mine, *(d.batches(mine, rt.device) for d in data), strict=True)
        images_per_batch = sum(d.batch_size for d in data)
        flops = 0
        for step in range(start, steps):
            left = (steps - step) / max(1, cfg.cooldown * steps)
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * min(1, left)
            opt.zero_grad(set_to_none=True)
            for part in range(cfg.accumulate):
                number, *batches = next(streams)
                if refresh and part == 0 and step % 10 == 0:
                    refresh(*batches, generator(cfg.seed, -1 - step, device=rt.device))
                if step == start and part == 0:
                    flops = count_flops(compute, *batches, number=number) if rt.is_main else 0
                    opt.zero_grad(set_to_none=True)
                    for module in compiled if cfg.compile else ():
                        module.compile()
                values = compute(*batches, number=number)
                (values["loss"] / cfg.accumulate).backward()
            average_gradients(trained, rt.world_size)
            norm = torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            opt.step()
            # A warm-up of the average, so that a short run does not ship its initialisation.
            decay = min(cfg.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([a for a, _ in averaged], [v for _, v in averaged], 1 - decay)
            done = step + 1
            together = rt.world_size == 1 or done % 10 == 0  # all processes stop at the same step
            stopping = together and any_process(bool(stop), rt)
            saving = done % cfg.save_every == 0 or done == steps or stopping
            if rt.is_main and (saving or done % cfg.log_every == 0):
                shown = {key: value.item() for key, value in values.items()}
                images = (done - began_step) * images_per_batch * per_step
                rate = images / (time.time() - began)
                if saving and preview:
                    shown |= preview()
                text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
                speed = f"{rate:.1f} images/s, {rate * flops / images_per_batch / 1e12:.3g} TFLOP/s"
                name = f"{path.parent.name}/{path.stem}"
                print(f"{name} {done}/{steps}  {text}  {speed}", flush=True)
                log(done, shown)
                if not math.isfinite(shown["loss"]) or not norm.isfinite():
                    found = f"the loss is {shown['loss']}, its gradient {norm.item()}"
                    before = f"{path} is" if path.is_file() else "no checkpoint is there"
                    raise UserError(f"{found} at step {done}; {before} from before.")
            if saving:
                save(done)
            if stopping:
                raise SystemExit(f"stopped at step {done}; the same command goes on from there")
    finally:
        signal.signal(signal.SIGTERM, previous)
    net.load_state_dict(ema)
    return net.eval().requires_grad_(False)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration without the paths of the machine that trained, which are its own."""
    paths = {"hr", "lr", "out", "checkpoint", "start_from", "vqvae"}
    kept = {key: value for key, value in config.items() if key not in paths}
    return {k: without_paths(v) if isinstance(v, dict) else v for k, v in kept.items()}


if __name__ == "__main__":  # python common.py IN.pt OUT.safetensors: the averaged weights, to ship
    source, target = load_checkpoint(sys.argv[1]), sys.argv[2]
    half = {key: value.half().contiguous() for key, value in source["ema"].items()}
    facts = {"config": json.dumps(without_paths(source["config"])), "step": str(source["step"])}
    with replacing(target) as written:
        save_file(half, written, facts)
