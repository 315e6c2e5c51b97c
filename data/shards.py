"""Pairs of generate.py as webdataset shards: tar files for sets that are too large for a folder.

In: a folder that generate.py wrote. Out: FOLDER/0000-000000.tar and so on, each there whole or not
at all; the same command goes on after an interruption.

    python data/shards.py
    python data/shards.py --pairs out/generated --out out/shards --per-shard 1000
"""

import contextlib
import io
import json
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402


class TarShards:
    """Pairs as webdataset shards FOLDER/RANK-NUMBER.tar, each there whole or not at all.

    A sample is KEY.hr.png, KEY.lr.png and KEY.json; the key is the name with all but letters,
    digits, _, - and ~ percent-encoded, as webdataset ends a key at the first dot.
    """

    def __init__(self, folder: Path, rank: int = 0, per_shard: int = 1000) -> None:
        self.folder, self.rank, self.per_shard = folder, rank, per_shard
        mine = [int(shard.stem.split("-")[1]) for shard in folder.glob(f"{rank:04d}-*.tar")]
        self.number = max(mine, default=-1) + 1
        self.tar: tarfile.TarFile | None = None  # the shard being written
        self.count = 0

    def done(self) -> dict[str, dict]:
        """The records in the finished shards of all processes, by name."""
        records: dict[str, dict] = {}
        for shard in sorted(self.folder.glob("*.tar")):
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        if member.name.endswith(".json") and (file := tar.extractfile(member)):
                            name = unquote(member.name[: -len(".json")], errors="surrogateescape")
                            records[name] = json.load(file)
            except (tarfile.TarError, ValueError) as error:
                raise common.UserError(f"{shard}: damaged ({error}): delete it.") from None
        return records

    def add(self, name: str, hr: bytes, lr: bytes, record: dict) -> None:
        """Append a pair of PNG files; an error drops the unfinished shard."""
        data = {"hr.png": hr, "lr.png": lr, "json": json.dumps(record).encode()}
        key = quote(name, safe="", errors="surrogateescape").replace(".", "%2E")
        try:
            if self.tar is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.tar = tarfile.open(self.path(".tmp"), "w", format=tarfile.PAX_FORMAT)
            for suffix, content in data.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")  # mode 644, owner and time 0
                member.size = len(content)
                self.tar.addfile(member, io.BytesIO(content))
        except BaseException:  # half a sample must not be published by close()
            self.drop()
            raise
        self.count += 1
        if self.count == self.per_shard:
            self.close()

    def path(self, suffix: str = "") -> Path:
        """The shard being written; its temporary file is overwritten by a restart."""
        return self.folder / f"{self.rank:04d}-{self.number:06d}.tar{suffix}"

    def close(self) -> None:
        """Publish the shard being written, if there is one; add() begins the next one."""
        if self.tar is not None:
            try:
                self.tar.close()
                os.replace(self.path(".tmp"), self.path())
            except BaseException:
                self.drop()
                raise
            self.tar, self.count, self.number = None, 0, self.number + 1

    def drop(self) -> None:
        """Forget the shard being written."""
        if self.tar is not None:
            with contextlib.suppress(OSError):
                self.tar.close()
            self.path(".tmp").unlink(missing_ok=True)
        self.tar, self.count = None, 0


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    pairs: str = "out/generated"  # folder of generate.py
    out: str = "out/shards"  # folder of the shards
    per_shard: int = 1000  # pairs in a shard
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: common.Runtime) -> None:
    """Write what no finished shard holds yet."""
    common.require(cfg.per_shard > 0, f"--per-shard {cfg.per_shard}: must be positive.")
    source = Path(cfg.pairs)
    table = source / "pairs.jsonl"
    common.require(table.is_file(), f"{table} is missing: make it with `python generate.py`.")
    lines = table.read_text(encoding="utf-8").splitlines()
    of_all = [json.loads(line) for line in lines]
    records = {Path(r["lr"]).stem: r for r in of_all if not r.get("dropped")}
    shards = TarShards(Path(cfg.out), per_shard=cfg.per_shard)
    done = shards.done()
    other = [name for name in done if records.get(name) != done[name]]
    common.require(not other, f"{cfg.out} holds other pairs, {other[:1]}: give another --out.")
    with contextlib.closing(shards):
        for name in tqdm([name for name in records if name not in done], unit="pair"):
            hr, lr = ((source / records[name][side]).read_bytes() for side in ("hr", "lr"))
            shards.add(name, hr, lr, records[name])
    print(f"{len(records)} pairs in {cfg.out}, {len(done)} of them were there")


if __name__ == "__main__":
    common.launch(main, Config, {}, __doc__)
