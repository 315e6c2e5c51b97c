"""Find photos among files and folders, give them names, write files whole or not at all."""

import contextlib
import functools
import importlib
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from common import UserError, require
from common.runtime import print_once

DATA = Path(__file__).parents[1] / "data"

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

    It prints what is left out. `packed` allows files of tools/pack.py, too.
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
    if packed and (DATA / f"{kind}.npy").is_file():
        print_once(f"using the packed crops of data/{kind}.npy, not the photos of data/{kind}")
        return [DATA / f"{kind}.npy"]
    try:
        return list_images([str(DATA / kind)], flag)
    except UserError as error:
        print_once(f"{error} Using the photos of data/sample/{kind} (see data/README.md).")
    return list_images([str(DATA / "sample" / kind)], flag)


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
    usual = {top / kind for top in (DATA, DATA / "sample") for kind in ("hr", "lr")}
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


# ---- writing ----------------------------------------------------------------------------------


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


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; a file with the same text is not touched."""
    data = text.encode(errors="surrogateescape")  # file names need not be valid Unicode
    if not path.is_file() or path.read_bytes() != data:
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Give a file a second name: a hard link, or a copy if the file system has no links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
