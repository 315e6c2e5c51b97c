"""Pairs as webdataset shards: tar files, for sets that are too large for a folder.

In: a folder that generate.py or degrade.py wrote. Out: FOLDER/0000-000000.tar and so on. A shard
is written whole or not at all; the same command goes on after an interruption.

    python -m tools.shards
    python -m tools.shards --pairs out/generated --out out/shards --per-shard 1000
"""

import contextlib
import json
import math
import re
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import quote, unquote

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import UserError, require
from common.cli import launch
from common.files import replacing
from common.pairs import read_table
from common.runtime import Runtime


def read_shards(folder: Path) -> dict[str, dict]:
    """The rows in all shards of a folder, by name of the pair; UserError for a damaged shard."""
    rows: dict[str, dict] = {}
    for shard in sorted(folder.glob("*.tar")):
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
        images = {f"{side}.png": (folder / row[side]).read_bytes() for side in ("hr", "lr")}
    except ValueError:  # a zero byte, or half a character
        raise UserError(f"{folder}: no file can have the name {name!r} of its table.") from None
    return {"__key__": key, "json": row, **images}


def write_shards(out: Path, start: int, per_shard: int, samples: Iterable[dict]) -> None:
    """Write samples into shards from the number `start` on; the same samples give the same bytes.

    A shard has a temporary name until it is full, and is removed after an error.
    """
    try:
        from webdataset import ShardWriter
    except ImportError:
        raise UserError("webdataset writes the shards: pip install webdataset.") from None
    options = {"verbose": 0, "user": "", "group": "", "mode": 0o644, "mtime": 0}
    with contextlib.ExitStack() as shard:

        def opener(name: str) -> BinaryIO:
            temporary = shard.enter_context(replacing(out / name))
            file = shard.enter_context(open(temporary, "wb"))
            shard.callback(lambda: writer.tarstream.close())  # also after an error, before the file
            return file

        def post(name: str) -> None:
            shard.close()

        # Not in a `with`, which would complete the shard after an error.
        writer = ShardWriter(
            "0000-%06d.tar", per_shard, math.inf, post, start, opener=opener, **options
        )
        for sample in samples:
            writer.write(sample)
        writer.close()


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py or degrade.py
    out: str = "out/shards"  # folder of the shards
    per_shard: int = 1000  # pairs in a shard
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: Runtime) -> None:
    """Write the pairs that no shard holds yet."""
    require(cfg.per_shard > 0, f"--per-shard {cfg.per_shard}: must be positive.")
    source, out = Path(cfg.pairs), Path(cfg.out)
    table = source / "pairs.jsonl"
    require(table.is_file(), f"{table} is missing: make it with `python generate.py`.")
    rows = {Path(row["lr"]).stem: row for row in read_table(table) if not row.get("dropped")}
    done = read_shards(out)
    other = [name for name in done if rows.get(name) != done[name]]
    require(not other, f"{out} holds other pairs, {''.join(other[:1])}: give another --out.")
    missing = [name for name in rows if name not in done]
    numbers = [re.fullmatch(r"0000-(\d{6,})\.tar", file.name) for file in out.glob("*.tar")]
    start = max((int(number[1]) + 1 for number in numbers if number), default=0)
    if missing:
        with tqdm(missing, unit="pair") as names:
            samples = (shard_sample(source, name, rows[name]) for name in names)
            write_shards(out, start, cfg.per_shard, samples)
    for temporary in out.glob(".0000-*.tar.*.tmp"):  # of a killed run
        temporary.unlink()
    print(f"{len(rows)} pairs in {out}, {len(done)} of them were there before")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
