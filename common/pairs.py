"""A folder of pairs that a command writes, and its table pairs.jsonl."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import require
from common.files import write_text
from common.folder import out_folder
from common.runtime import Runtime, print_once, wait_for_all

SIDES = ("hr", "lr")
OTHERS = ("pairs.jsonl", "preview.png", "meta_info.txt", "meta_info_realesrgan.txt")


def read_table(table: Path) -> list[dict]:
    """Rows of a table of pairs; UserError for a row whose files are not hr/NAME and lr/NAME.

    Lines that are not JSON are skipped: a killed run may leave half a line.
    """
    rows = []
    for number, line in enumerate(table.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if line.strip():
                print_once(f"{table}: skipped line {number}, which is not JSON")
            continue
        for side in SIDES:
            path = row.get(side) if isinstance(row, dict) else None
            name = Path(str(path)).name
            ours = path == f"{side}/{name}" and name != ".."
            where = f"{table}, line {number}: {side} is {path!r}"
            require(ours, f"{where}, but must be {side}/NAME.")
        rows.append(row)
    return rows


def content_of(file: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def without_time(facts: Any) -> Any:
    """PairFolder.facts() of one or several photos, without the times."""
    if isinstance(facts, list) and facts and isinstance(facts[0], list):
        return [without_time(one) for one in facts]
    return [*facts[:2], *facts[3:]] if isinstance(facts, list) else facts


class PairFolder:
    """A folder of pairs hr/NAME.png and lr/NAME.png, and a table of them, pairs.jsonl.

    A row is true or absent. `before` has the rows of earlier runs. start() takes the rows that they
    should be, and writes a table of those that are done, before any file of another is touched.
    add() the rows of pairs that were made, and in the end finish(). Until then each process writes
    a table of its own, pairs.RANK.jsonl, so that a killed run can go on.

    Fields of a row may say where photos are (`places`): these may change, because `photo` and
    `references` say what they are. UserError if another command writes to the folder, if rows have
    other fields or `settings`, or if there are images that this program has not made.
    """

    def __init__(
        self,
        out: Path,
        names: Sequence[str],
        field: str,
        places: Sequence[str],
        rt: Runtime,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.names, self.rt, self.wanted = out, names, rt, set(names)
        self.may_change = {*places, "photo", "references"}
        self.table, self.own_table = out / "pairs.jsonl", out / f"pairs.{rt.rank}.jsonl"
        self.folder = out_folder(out, rt)
        self.before = self.rows()
        self.kept: dict[str, dict] = {}  # of `before`, by start()
        for row in self.before.values():
            foreign = f"--out {out} holds pairs of another command: give another --out."
            require(field in row, foreign)
            different = [k for k, value in (settings or {}).items() if row.get(k) != value]
            other = f"{self.table} has pairs of other settings ({', '.join(different)})"
            require(not different, f"{other}: give another --out.")
        if self.before and not self.folder.ours:  # of a version without records
            ours = [out / row[side] for row in self.before.values() for side in SIDES]
            self.folder.claim([*ours, *(out / name for name in OTHERS)], adopt=True)
        self.folder.check([out / name for name in OTHERS])
        self.folder.check(out.glob("pairs.*.jsonl"))
        self.folder.check(self.images())
        self.folder.check(
            self.removed(file) for file in self.images() if file.stem not in self.wanted
        )
        # The checksums of photos that were read before, by what their files looked like.
        self.checksums = {
            (kind, *facts[:3]): facts[3]
            for row in self.before.values()
            for kind, photos in (("photo", [row.get("photo")]), ("lr", row.get("references", [])))
            for facts in photos
            if facts
        }
        wait_for_all(rt)  # no process writes before all have read

    def images(self) -> list[Path]:
        """All files of the folders hr and lr but temporary ones."""
        return sorted(f for side in SIDES for f in (self.out / side).glob("[!.]*"))

    def removed(self, file: Path) -> Path:
        """Where an image goes of whose pair no photo is left."""
        return self.out / "removed" / file.relative_to(self.out)

    def rows(self) -> dict[str, dict]:
        """Rows of the table, and of the tables of the processes, by name of the pair."""
        tables = [*self.out.glob("pairs.jsonl"), *sorted(self.out.glob("pairs.*.jsonl"))]
        return {Path(row["hr"]).stem: row for table in tables for row in read_table(table)}

    def facts(self, kind: str, key: str, file: Path) -> list:
        """What a photo is: its path below the folder given, size, time and checksum.

        The file is read only if it looks unlike before.
        """
        stat = file.stat()
        looks = (key, stat.st_size, stat.st_mtime_ns)
        if (kind, *looks) not in self.checksums:
            self.checksums[kind, *looks] = content_of(file)[1]
        return [*looks, self.checksums[kind, *looks]]

    def row(self, name: str, **facts: Any) -> dict[str, Any]:
        """A row of the table, as JSON gives it back."""
        return json.loads(json.dumps({"hr": f"hr/{name}.png", "lr": f"lr/{name}.png", **facts}))

    def reason(self, row: dict) -> str:
        """Why a pair of `before` has to be made again; "" if it is done."""
        found = self.before[Path(row["hr"]).stem]
        for key, what in (("photo", "the photo changed"), ("references", "a reference changed")):
            if without_time(found.get(key)) != without_time(row.get(key)):
                return what
        if any(found.get(key) != row[key] for key in row.keys() - self.may_change):
            return "other parameters"
        for side in () if found.get("dropped") else SIDES:
            if not (self.out / row[side]).is_file():
                return "a file is missing"
            if content_of(self.out / row[side]) != found.get("made", {}).get(side):
                return "a file is damaged"
        return ""

    def start(self, verdicts: Iterable[tuple[dict, str]]) -> None:
        """Write a table of the pairs that are done, and say why others are made again.

        verdicts: rows of pairs of `before`, each with its reason().
        """
        reasons: Counter[str] = Counter()
        for row, reason in verdicts:
            name = Path(row["hr"]).stem
            if reason:
                reasons[reason] += 1
            else:
                self.kept[name] = self.before[name] | row
        if self.rt.world_size > 1:
            self.write(self.own_table, self.kept)
            wait_for_all(self.rt)
        if self.rt.is_main:
            kept = self.kept
            if self.rt.world_size > 1:
                tables = [read_table(table) for table in self.out.glob("pairs.*.jsonl")]
                kept = {Path(row["hr"]).stem: row for table in tables for row in table}
            if self.before or any(self.out.glob("pairs.*.jsonl")):
                self.write(self.table, kept)
        if reasons:
            why = ", ".join(f"{n} ({reason})" for reason, n in reasons.most_common())
            print_once(f"pairs that are made again: {why}")
        wait_for_all(self.rt)

    def write(self, table: Path, rows: Mapping[str, dict]) -> None:
        """Write a table of these rows; that of all pairs replaces those of the processes."""
        ordered = [rows[name] for name in self.names if name in rows]
        text = "".join(json.dumps(row) + "\n" for row in ordered)
        changed = not table.is_file() or table.read_bytes() != text.encode()
        if changed and "preview.png" in self.folder.ours:  # it may show pairs that change
            (self.out / "preview.png").unlink(missing_ok=True)
        write_text(table, text)
        recorded = self.folder.recorded() if table == self.table else set()
        for own in self.out.glob("pairs.*.jsonl"):
            if self.folder.name_of(own) in recorded:  # not a copy that somebody made meanwhile
                own.unlink()

    def add(self, rows: Iterable[dict]) -> None:
        """Append the rows of pairs whose images are written."""
        lines = []
        for row in rows:
            whole = {} if row.get("dropped") else {s: content_of(self.out / row[s]) for s in SIDES}
            lines.append(json.dumps(row | {"made": whole}) + "\n")
        if lines:
            self.folder.claim([self.own_table])
            with open(self.own_table, "a", encoding="utf-8") as file:
                file.write("".join(lines))

    def finish(self) -> list[dict]:
        """Write the table and return its rows; move images of other pairs to the folder `removed`.

        UserError if there are no rows.
        """
        rows = {name: row for name, row in self.rows().items() if name in self.names}
        require(bool(rows), "none of the HR images could be used; see the files named above.")
        self.write(self.table, rows)
        kept = {name for name, row in rows.items() if not row.get("dropped")}
        others = [f for f in self.images() if f.stem not in kept]
        for file in others:
            self.folder.claim([self.removed(file)])
            self.removed(file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, self.removed(file))
        if others:
            count = len({file.stem for file in others})
            print(f"moved {count} pairs of earlier runs to {self.out / 'removed'}")
        self.folder.clean(self.out, *(self.out / side for side in SIDES))
        return [rows[name] for name in self.names if name in rows]

    def close(self) -> None:
        """Let other commands use the folder; to be called when all is written."""
        self.folder.tidy()
        self.folder.close()
