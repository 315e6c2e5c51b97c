"""Find photos among files and folders, give them names, write files whole or not at all."""

import contextlib
import functools
import importlib
import itertools
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageFile

from common import UserError, require
from common.folder import TEMPORARY, open_folder_of
from common.runtime import print_once

DATA = Path(__file__).parents[1] / "data"

# ---- which files are photos -------------------------------------------------------------------


SYSTEM = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "thumbs.db"}


# Formats of photos, scans and textures. No other is opened: Pillow would run Ghostscript on an EPS.
FORMATS = (
    "AVIF BMP DCX DDS DIB GIF HEIF JPEG JPEG2000 PCD PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP"
).split()


@functools.cache
def photo_formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow opens, HEIF included with pillow-heif."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def photo_suffixes() -> set[str]:
    """Suffixes of the photos that can be read."""
    formats = {*photo_formats(), "MPO"}  # JPEG opens MPO, too
    return {s for s, name in Image.registered_extensions().items() if name in formats}


def open_photo(path: str | Path) -> ImageFile.ImageFile:
    """Open an image file of one of FORMATS, whatever its suffix; its pixels are not read yet."""
    return Image.open(path, formats=photo_formats())


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
    return list({os.path.abspath(file): file for file in reversed(files)}.values())[::-1]


# The word that tells HR from LR in the name of a file or a folder, with the number of its scale.
KIND = re.compile(r"(?i)(?<![a-z])(hr|gt|lr|lq)(\d?)(?![a-z\d])")
NUMBERED = re.compile(r"(?i)^(|.*x)([2-8])$")  # a folder of one scale


def lr_alone(files: list[Path], given: Sequence[str], flag: str, scale: str = "4") -> list[Path]:
    """The LR images of this scale, where folders also hold HR images or other scales.

    A file is HR if its name, or that of a folder above it, has HR (or GT) where another one beside
    it has LR (or LQ). Only folders with both may be of another scale. Names of the folders given,
    and above them, do not count. It prints what is left out.
    """
    roots = {Path(path) for path in given}
    places = {}
    for file in files:
        inside = [*itertools.takewhile(lambda folder: folder not in roots, file.parents)]
        inside = inside if len(inside) < len(file.parents) else []  # else the file was given
        places[file] = {file.with_suffix(""), *inside}
    words: dict[Path, tuple[str, str]] = {}
    beside: dict[Path, set[tuple[str, str]]] = {}  # the words at a path with * for the word
    for part in set().union(*places.values()):
        if found := KIND.search(part.name):
            words[part] = found[1].lower(), found[2]
            key = part.with_name(KIND.sub("*", part.name))
            beside.setdefault(key, set()).add(words[part])

    def is_left_out(part: Path) -> bool:
        (word, number), others = words[part], beside[part.with_name(KIND.sub("*", part.name))]
        if word in ("hr", "gt"):
            return any(other in ("lr", "lq") for other, _ in others)
        return number != scale and (word, scale) in others

    out = set(filter(is_left_out, words))
    hr = {file for file, parts in places.items() if parts & out}
    mixed = set().union(*(places[file] for file in hr))
    other = {
        part for part in mixed
        if (found := NUMBERED.search(part.name)) and found[2] != scale
        and part.with_name(found[1] + scale) in mixed
    }  # fmt: skip
    kept = [file for file in files if file not in hr and not other & places[file]]
    if len(kept) < len(files):
        where, count = f"{flag} {' '.join(given)}", len(files) - len(kept)
        print_once(f"{where}: left out {count} images that are HR or of another scale than "
                   f"{scale}: LR images are beside them")  # fmt: skip
    return kept


def find_photos(given: Sequence[str], kind: str, flag: str, packed: bool = False) -> list[Path]:
    """The photos that the user named, else those of data/KIND, else those of data/sample/KIND.

    With `packed`, data/KIND.npy comes before data/KIND. Of the kind lr it takes LR alone from
    folders that hold HR, too. It prints which photos it takes.
    """
    if given:
        files = list_images(given, flag, packed)
        return lr_alone(files, given, flag) if kind == "lr" else files
    if packed and (DATA / f"{kind}.npy").is_file():
        print_once(f"using the packed crops of data/{kind}.npy, not the photos of data/{kind}")
        return [DATA / f"{kind}.npy"]
    try:
        files = list_images([str(DATA / kind)], flag)
        return lr_alone(files, [str(DATA / kind)], flag) if kind == "lr" else files
    except UserError as error:
        print_once(f"{error} Using the photos of data/sample/{kind} (see data/README.md).")
    return list_images([str(DATA / "sample" / kind)], flag)


def outside(files: Sequence[Path], out: str | Path, flag: str) -> list[Path]:
    """The files that do not lie in the folder `out` of the results; UserError if all do."""
    folder = Path(out).resolve()
    kept = [file for file in files if folder not in file.resolve().parents]
    require(bool(kept), f"{flag}: all its images lie in --out {out}: give another --out.")
    if len(kept) < len(files):
        print_once(f"{flag}: left out {len(files) - len(kept)} images in --out {out}")
    return kept


def paths_below(files: Sequence[Path], given: Sequence[str]) -> list[tuple[int, Path]]:
    """For each photo the number of the first folder given that holds it, and its path below that.

    A photo that was given itself is below nothing: the path is its name.
    """
    usual = [str(top / kind) for top in (DATA, DATA / "sample") for kind in ("hr", "lr")]
    numbers: dict[Path, int] = {}
    for k, path in enumerate(given or usual):
        numbers.setdefault(Path(path), k)
    places = []
    for file in files:
        folders = [p for p in file.parents if p in numbers]
        if folders:
            folder = min(folders, key=numbers.__getitem__)
            places.append((numbers[folder], file.relative_to(folder)))
        else:
            places.append((numbers.get(file, 0), Path(file.name)))
    return places


def keys_of(files: Sequence[Path], given: Sequence[str]) -> list[str]:
    """The path of each photo below the folder given; of a later folder behind its number."""
    places = paths_below(files, given)
    first = min((k for k, _ in places), default=0)
    return [path.as_posix() if k == first else f"{k}/{path.as_posix()}" for k, path in places]


MOST_BYTES = 200  # of a name, so that no file system refuses it


def photo_names(files: Sequence[Path], given: Sequence[str]) -> list[str]:
    """A name for each photo: its path below the given folder, joined by underscores.

    Underscores replace blanks and commas, too, which most lists of files cannot hold. Names that
    are equal in a folder, apart from upper and lower case, and names that are too long end in eight
    digits of that path; so do names that an earlier folder has. So a name does not depend on how
    the folder was typed, nor on later folders.
    """
    places = paths_below(files, given)
    names = [re.sub(r"[\s,]+", "_", "_".join(p.with_suffix("").parts)) for _, p in places]
    count = Counter((k, name.casefold()) for (k, _), name in zip(places, names, strict=True))
    taken: dict[str, int] = {}  # the first folder that has a name
    for (k, _), name in sorted(zip(places, names, strict=True)):
        taken.setdefault(name.casefold(), k)

    def unique(k: int, path: Path, name: str) -> str:
        raw = os.fsencode(name)
        short = name if len(raw) <= MOST_BYTES else raw[:MOST_BYTES].decode(errors="ignore")
        if short == name and count[k, name.casefold()] == 1 and taken[name.casefold()] == k:
            return name
        key = path.as_posix() if taken[name.casefold()] == k else f"{k}/{path.as_posix()}"
        return f"{short}-{zlib.crc32(os.fsencode(key)):08x}"

    return [unique(*place, name) for place, name in zip(places, names, strict=True)]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image of ours."""
    with open_photo(path) as image:
        return image.size


# ---- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file to write to; rename it to `path` if the block ends without an error.

    UserError for a file in a folder for results (folder.OutFolder) that we have not made.
    """
    path = Path(path)
    if folder := open_folder_of(path):
        folder.claim([path])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two nodes may have the same number.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}.tmp")
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
