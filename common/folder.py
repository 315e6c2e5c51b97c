"""The folder that a command writes to: it has one writer, and replaces only files of our own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from common import UserError, require
from common.runtime import Runtime

RECORD = ".realdgen"  # in each folder that a command writes to: which of its files are ours
HEADER = b"Files of this folder that RealDGen made and may replace:\n"
TEMPORARY = ".realdgen-"  # how the names of temporary files begin
OPEN: dict[Path, OutFolder] = {}  # of this process, by resolved path


class OutFolder:
    """A folder for results, locked for one command until this process closes it or ends.

    Its record lists the files that were made there, by their path below the folder. A file that is
    there but not in the record is somebody else's: check() and claim() refuse it, and
    files.replacing() claims every file in an open folder. UserError also if another command writes
    to the folder. Nothing is written before the first claim.
    """

    def __init__(self, path: str | Path, rt: Runtime, flag: str = "--out") -> None:
        self.path, self.root, self.rt, self.flag = Path(path), Path(path).resolve(), rt, flag
        self.mutex = threading.RLock()
        self.record = self.root / RECORD
        self.file: IO[bytes] | None = None
        self.ours: set[str] = set()
        above = next(p for p in (self.root, *self.root.parents) if os.path.lexists(p))
        require(above.is_dir(), f"{flag} {path}: {above} is no folder.")
        if os.path.lexists(self.record):
            self.ours = self.recorded()
            self.open()
            self.ours |= self.recorded()  # by a command that ended in between

    def recorded(self) -> set[str]:
        """The names in the record; UserError if it is not of this program."""
        wrong = f"{self.record} is not of this program: move it or give another {self.flag}."
        require(self.record.is_file() and not self.record.is_symlink(), wrong)
        header, *names = self.record.read_bytes().splitlines(keepends=True) or [b""]
        require(header == HEADER, wrong)
        return {os.fsdecode(name.rstrip(b"\n")) for name in names}

    def open(self) -> None:
        """Make the folder and its record, and lock it, where the system has locks."""
        if self.file is not None:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        new = self.root / f"{TEMPORARY}{os.getpid()}-record.tmp"
        new.write_bytes(HEADER)
        try:
            os.link(new, self.record)  # with its header from the beginning
        except OSError:  # it is there, or the file system has no links
            if not self.record.exists():
                os.replace(new, self.record)
        new.unlink(missing_ok=True)
        self.file = open(self.record, "ab", buffering=0)  # noqa: SIM115
        if self.rt.is_main and not locked(self.file):
            self.file.close()
            self.file = None
            OPEN.pop(self.root, None)
            busy = "another command is writing there: wait for it, or give another folder."
            raise UserError(f"{self.flag} {self.path}: {busy}")

    def name_of(self, path: Path) -> str:
        """The path below this folder of a file in it; UserError if a link leads elsewhere."""
        try:
            return (path.parent.resolve() / path.name).relative_to(self.root).as_posix()
        except ValueError:
            away = f"{path.parent} is a link to another folder: remove it or give another"
            raise UserError(f"{away} {self.flag}.") from None

    def check(self, paths: Iterable[Path]) -> None:
        """UserError for a file that is there and not ours."""
        for path in paths:
            theirs = f"{path} is there, but not made by this program: move it or give another"
            known = self.name_of(path) in self.ours or not os.path.lexists(path)
            require(known, f"{theirs} {self.flag}.")

    def claim(self, paths: Iterable[Path], adopt: bool = False) -> None:
        """Write these files into the record, before they are written; UserError as in check().

        `adopt` takes over files that are there, of a version without records.
        """
        with self.mutex:
            new = [path for path in paths if self.name_of(path) not in self.ours]
            if new:
                self.check([] if adopt else new)
                names = [self.name_of(path) for path in new]
                self.open()
                assert self.file is not None
                self.file.write(b"".join(os.fsencode(name) + b"\n" for name in names))
                self.ours.update(names)

    def clean(self, *folders: Path) -> None:
        """Remove what killed commands have left of their temporary files in these folders."""
        for temporary in (file for folder in folders for file in folder.glob(f"{TEMPORARY}*.tmp")):
            temporary.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Take the files that are gone out of the record, and sort it."""
        if self.file is None or not self.rt.is_main:
            return
        self.ours = {name for name in self.recorded() if os.path.lexists(self.root / name)}
        record = HEADER + b"".join(os.fsencode(name) + b"\n" for name in sorted(self.ours))
        if self.record.read_bytes() == record:
            return
        temporary = self.root / f"{TEMPORARY}{os.getpid()}-record.tmp"
        file = open(temporary, "wb", buffering=0)  # noqa: SIM115
        file.write(record)
        locked(file)  # before it gets its name
        os.replace(temporary, self.record)
        self.file.close()
        self.file = file

    def close(self) -> None:
        """Let other commands use the folder; one in which nothing was made keeps no record."""
        OPEN.pop(self.root, None)
        if self.file is None:
            return
        with contextlib.suppress(OSError, UserError):  # a full disk, a folder that is gone
            if self.rt.world_size == 1:  # else another process may be writing
                self.tidy()
                if not self.ours:
                    self.record.unlink()
        self.file.close()
        self.file = None


def locked(file: IO[bytes]) -> bool:
    """Lock a file for this process; False if another process has done so."""
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
    return True


def out_folder(path: str | Path, rt: Runtime, flag: str = "--out") -> OutFolder:
    """The folder for results; the same object where this process has it open."""
    root = Path(path).resolve()
    if root not in OPEN:
        OPEN[root] = OutFolder(path, rt, flag)
    return OPEN[root]


def open_folder_of(path: Path) -> OutFolder | None:
    """The innermost open folder for results that a file lies in."""
    for file in (path.absolute(), path.parent.resolve() / path.name):
        for folder in file.parents:
            if folder in OPEN:
                return OPEN[folder]
    return None


def close_all() -> None:
    """Close the folders that this process has open."""
    for folder in list(OPEN.values()):
        folder.close()
