"""Pairs as webdataset shards: tar files, for sets that are too large for a folder.

In: a folder that generate.py or degrade.py wrote. Out: FOLDER/0000-000000.tar and so on. A shard
is written whole or not at all; the same command resumes. Shards with pairs that were made again
since then, as their checksums tell, are replaced.

    python -m tools.shards
    python -m tools.shards --pairs out/generated --out out/shards --per-shard 1000
"""

import itertools
import json
import math
import re
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import UserError, require
from common.cli import check_ranges, launch
from common.files import replacing
from common.folder import out_folder
from common.pairs import SIDES, content_of, read_table
from common.runtime import Runtime


def read_shard(shard: Path) -> dict[str, dict]:
    """The rows in a shard, by name of the pair; UserError for a damaged one."""
    rows: dict[str, dict] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    name = unquote(member.name[: -len(".json")], errors="surrogateescape")
                    rows[name] = json.load(file)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{shard}: damaged ({error}): delete it.") from None
    return rows


def shard_sample(folder: Path, name: str, row: dict) -> dict:
    """A pair as webdataset writes it: KEY.hr.png, KEY.json, KEY.lr.png.

    In the key all but letters, digits, _, - and ~ is percent-encoded, because webdataset ends a key
    at the first dot.
    """
    try:
        key = quote(name, safe="", errors="surrogateescape").replace(".", "%2E")
        whole = {side: content_of(folder / row[side]) for side in SIDES} == row.get("made")
    except ValueError:  # a zero byte, or half a character
        raise UserError(f"{folder}: no file can have the name {name!r} of its table.") from None
    changed = f"{folder}: the files of {name} are not those of its table: make the pairs again."
    require(whole, changed)
    images = {f"{side}.png": (folder / row[side]).read_bytes() for side in SIDES}
    return {"__key__": key, "json": row, **images}


def write_shard(shard: Path, samples: Iterable[dict]) -> None:
    """Write samples into a tar file, whole or not at all; the same samples give the same bytes."""
    try:
        from webdataset import TarWriter
    except ImportError:
        raise UserError("webdataset writes the shards: pip install webdataset.") from None
    with (
        replacing(shard) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, user="", group="", mode=0o644, mtime=0) as writer,
    ):
        for sample in samples:
            writer.write(sample)


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py or degrade.py
    out: str = "out/shards"  # folder of the shards
    per_shard: int = 1000  # pairs in a shard
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


RANGES = {"per_shard": (1, 10**9)}


def main(cfg: Config, rt: Runtime) -> None:
    """Write the pairs that no shard holds yet."""
    check_ranges(cfg, RANGES)
    source, out = Path(cfg.pairs), Path(cfg.out)
    table = source / "pairs.jsonl"
    require(table.is_file(), f"{table} is missing: make it with `python generate.py`.")
    rows = {Path(row["lr"]).stem: row for row in read_table(table) if not row.get("dropped")}
    folder = out_folder(out, rt)
    done: dict[str, dict] = {}
    for shard in sorted(out.glob("*.tar")):
        packed = read_shard(shard)
        same = all(name in rows and rows[name].get("made") == row.get("made") and name not in done
                   for name, row in packed.items())  # fmt: skip
        if same:
            done |= packed
        else:  # pairs were made again, or removed
            folder.check([shard])
            shard.unlink()
            print(f"{shard} holds other pairs: its pairs are packed again")
    missing = [name for name in rows if name not in done]
    numbers = [re.fullmatch(r"0000-(\d{6,})\.tar", file.name) for file in out.glob("*.tar")]
    start = max((int(number[1]) + 1 for number in numbers if number), default=0)
    with tqdm(missing, unit="pair", disable=not missing) as names:
        samples = (shard_sample(source, name, rows[name]) for name in names)
        for number in range(start, start + math.ceil(len(missing) / cfg.per_shard)):
            shard = out / f"0000-{number:06d}.tar"
            write_shard(shard, itertools.islice(samples, cfg.per_shard))
    folder.clean(out)
    print(f"{len(rows)} pairs in {out}, {len(done)} of them were there before")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
