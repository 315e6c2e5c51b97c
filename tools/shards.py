"""Pairs of generate.py as webdataset shards: tar files for sets that are too large for a folder.

In: a folder that generate.py or degrade.py wrote. Out: FOLDER/0000-000000.tar and so on. A shard
is written whole or not at all; the same command goes on after an interruption.

    python data/shards.py
    python data/shards.py --pairs out/generated --out out/shards --per-shard 1000
"""

import io
import itertools
import json
import math
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
from common.cli import launch
from common.files import replacing
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


def write_shard(shard: Path, source: Path, rows: Iterable[tuple[str, dict]]) -> None:
    """Write a tar file of samples KEY.hr.png, KEY.lr.png, KEY.json: whole or not at all.

    rows: name and row of each pair, whose images lie in the folder `source`. In the key all but
    letters, digits, _, - and ~ is percent-encoded, because webdataset ends a key at the first dot.
    """
    with (
        replacing(shard) as temporary,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, row in rows:
            key = quote(name, safe="", errors="surrogateescape").replace(".", "%2E")
            images = {f"{side}.png": (source / row[side]).read_bytes() for side in ("hr", "lr")}
            for suffix, content in (images | {"json": json.dumps(row).encode()}).items():
                member = tarfile.TarInfo(f"{key}.{suffix}")  # mode 644, owner and time 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py
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
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if not row.get("dropped")]
    named = {Path(row["lr"]).stem: row for row in rows}
    done = read_shards(out)
    other = [name for name in done if named.get(name) != done[name]]
    require(not other, f"{out} holds other pairs, {''.join(other[:1])}: give another --out.")
    missing = [(name, row) for name, row in named.items() if name not in done]
    number = max((int(shard.stem.split("-")[1]) + 1 for shard in out.glob("*-*.tar")), default=0)
    rest = iter(tqdm(missing, unit="pair"))
    for i in range(math.ceil(len(missing) / cfg.per_shard)):
        shard = out / f"0000-{number + i:06d}.tar"
        write_shard(shard, source, itertools.islice(rest, cfg.per_shard))
    for temporary in out.glob(".*.tmp"):  # of a killed run
        temporary.unlink()
    print(f"{len(named)} pairs in {out}, {len(done)} of them were there before")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)
