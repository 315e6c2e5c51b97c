"""A folder of pairs that a command writes, and its table pairs.jsonl."""

import contextlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from common import UserError, require
from common.files import write_text
from common.runtime import Runtime, wait_for_all


def read_table(table: Path) -> list[dict]:
    """Rows of a table of pairs; UserError for a row whose files are not hr/NAME and lr/NAME.

    A killed run may leave half a line at the end; it is skipped.
    """
    rows, lines = [], table.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{table}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            require(not line.strip() or number == len(lines), f"{where} is not JSON.")
            continue
        for side in ("hr", "lr"):
            path = row.get(side) if isinstance(row, dict) else None
            name = Path(str(path)).name
            ours = path == f"{side}/{name}" and name != ".."
            require(ours, f"{where}: {side} is {path!r}, but must be {side}/NAME.")
        rows.append(row)
    return rows


class PairFolder:
    """A folder of pairs hr/NAME.png and lr/NAME.png, and a table of them, pairs.jsonl.

    For each pair call row(), then earlier(), which finds a pair that is already made, or begin()
    before its images are written; then add(). In the end call finish() and unlock(). Until then
    each process writes a table of its own, so that a killed run can go on.

    UserError if another run writes to the folder, if rows lack `field` or have other `settings`,
    or if there are images without a row.
    """

    def __init__(
        self,
        out: Path,
        names: Sequence[str],
        field: str,
        rt: Runtime,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.names, self.rt = out, names, rt
        self.table, self.own_table = out / "pairs.jsonl", out / f"pairs.{rt.rank}.jsonl"
        self.lock_file: TextIO | None = None
        self.mutex = threading.Lock()
        if out.is_dir():
            self.lock()
        try:
            self.before = self.read("pairs*.jsonl")
            self.check(field, settings or {})
        except UserError:
            self.unlock()
            raise
        wait_for_all(rt)  # no process writes before all have read
        if rt.is_main and list(out.glob("pairs.*.jsonl")):  # of a killed run
            self.write(list(self.before.values()))
        wait_for_all(rt)

    def check(self, field: str, settings: Mapping[str, Any]) -> None:
        """UserError unless the folder holds pairs of this command and these settings alone."""
        for row in self.before.values():
            foreign = f"--out {self.out} holds pairs of another command: give another --out."
            require(field in row, foreign)
            different = [key for key, value in settings.items() if row.get(key) != value]
            other = f"{self.table} has pairs of other settings ({', '.join(different)})"
            require(not different, f"{other}: give another --out.")
        for file in self.images():
            stray = f"{file} is not listed in {self.table}: move it or give another --out."
            require(file.stem in self.before or file.stem in self.names, stray)

    def images(self) -> list[Path]:
        """All files of the folders hr and lr but temporary ones."""
        return sorted(f for side in ("hr", "lr") for f in (self.out / side).glob("[!.]*"))

    def lock(self) -> None:
        """Make the folder and lock it, if the system can; UserError if another run has done so."""
        self.out.mkdir(parents=True, exist_ok=True)
        with self.mutex, contextlib.suppress(ImportError):
            import fcntl

            if not self.rt.is_main or self.lock_file is not None:
                return
            file = open(self.out / ".lock", "w")  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                busy = "another run is writing there: wait for it, or give another --out."
                raise UserError(f"--out {self.out}: {busy}") from None
            except OSError:  # a file system without locks
                pass
            self.lock_file = file

    def unlock(self) -> None:
        """Let other runs use the folder."""
        if self.lock_file is not None:
            (self.out / ".lock").unlink(missing_ok=True)
            self.lock_file.close()
            self.lock_file = None

    def begin(self) -> None:
        """Prepare the folder; to be called before images are written."""
        self.lock()
        (self.out / "preview.png").unlink(missing_ok=True)  # it may show pairs that change now

    def read(self, tables: str) -> dict[str, dict]:
        """Rows of all tables of this pattern, by name of the pair."""
        rows = {}
        for table in sorted(self.out.glob(tables), key=lambda file: file != self.table):
            for line in table.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # a killed run may leave half a line
                    continue
                ours = isinstance(row, dict) and str(row.get("hr")).startswith("hr/")
                require(ours, f"{table} is of another program: give another --out.")
                rows[Path(row["hr"]).stem] = row
        return rows

    def write(self, rows: list[dict]) -> None:
        """Write the table of all pairs, and remove the tables of the processes."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not self.table.is_file() or self.table.read_bytes() != text.encode():
            (self.out / "preview.png").unlink(missing_ok=True)
            write_text(self.table, text)
        for table in self.out.glob("pairs.*.jsonl"):
            table.unlink()

    def row(self, name: str, **facts: Any) -> dict[str, Any]:
        """A row of the table."""
        return {"hr": f"hr/{name}.png", "lr": f"lr/{name}.png", **facts}

    def earlier(self, row: dict, made_of: Sequence[Path]) -> dict | None:
        """The equal row of an earlier run, if its images are newer than the files `made_of`."""
        found = self.before.get(Path(row["hr"]).stem)
        if found is None or found | json.loads(json.dumps(row)) != found:
            return None
        files = [] if found.get("dropped") else [self.out / row[side] for side in ("hr", "lr")]
        changed = max(file.stat().st_mtime for file in made_of)
        return found if all(f.is_file() and f.stat().st_mtime >= changed for f in files) else None

    def add(self, rows: list[dict]) -> None:
        """Append the rows of pairs whose images are written."""
        if rows:
            self.lock()
            with open(self.own_table, "a", encoding="utf-8") as file:
                file.write("".join("\n" + json.dumps(row) + "\n" for row in rows))

    def finish(self) -> list[dict]:
        """Write the table and return its rows; move images of other pairs to the folder `removed`.

        UserError if there are no rows.
        """
        made = self.read("pairs.*.jsonl")
        rows = [made[name] for name in self.names if name in made]
        require(bool(rows), "none of the HR images could be used; see the files named above.")
        kept = {Path(row["hr"]).stem for row in rows if not row.get("dropped")}
        others = [f for f in self.images() if f.suffix == ".png" and f.stem not in kept]
        for file in others:
            target = self.out / "removed" / file.relative_to(self.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        if others:
            count = len({file.stem for file in others})
            print(f"moved {count} pairs of earlier runs to {self.out / 'removed'}")
        for temporary in self.out.rglob(".*.tmp"):  # of a killed run
            temporary.unlink()
        self.write(rows)
        return rows
