"""Know how many decided pairs each shard of a stream has, so that a run that goes on in it does not
read again the files that it is through with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import write_json
from sdpo.config import TrainConfig
from sdpo.data.digest import describe_pairs, last_writes
from sdpo.data.source import PairSource

log = logging.getLogger(__name__)

ROWS_DIR = "stream_rows"


class ShardCounts:
    """Keep the number of decided pairs of the shards that were read to their end, in this run or
    before.

    They stand in --output_dir, a file a process, beside what they are counted of: those of other
    files, or of the same under flags that choose other pairs, are not taken.

    Args:
        rank: of the process, which names its file.
    """

    def __init__(self, source: PairSource, config: TrainConfig, rank: int) -> None:
        data, described, written = config.data, None, []
        with suppress(OSError):  # which the reading of that file will tell
            written = last_writes(source)
            described = describe_pairs(source)
        self.path = Path(config.run.output_dir) / ROWS_DIR / f"{rank}.json"
        self.of: dict[str, Any] | None = None  # where there is nothing to tell the files by
        self.known: dict[int, int] = {}
        if described:
            self.of = {
                "data": described,
                # Of large files the description has samples alone.
                "written": written,
                "shards": source.rows.num_shards,
                "columns": list(data.columns),
                "min_agreement": data.min_agreement,
                "dreamlike_pairs_only": data.dreamlike_pairs_only,
            }
            for path in sorted(self.path.parent.glob("*.json")):
                self.known |= _read(path, self.of)

    def total(self, shards: Iterable[int]) -> int | None:
        """Add up the pairs of shards; None where one of them is not counted yet."""
        counts = [self.known.get(shard) for shard in shards]
        return None if None in counts else sum(filter(None, counts))

    def note(self, shard: int, count: int) -> None:
        """Take what a shard was found to have, and write it down."""
        if self.known.get(shard) == count:
            return
        self.known[shard] = count
        if self.of is None:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, {"of": self.of, "pairs": self.known})
        except (UserError, OSError) as error:
            log.warning("a run that goes on from here reads its stream again: %s", error)
            self.of = None


def _read(path: Path, of: dict[str, Any]) -> dict[int, int]:
    """Read the counts that a file keeps; none of other data, or where it is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        counts = {int(shard): count for shard, count in kept["pairs"].items()}
        is_whole = all(type(count) is int and count >= 0 for count in counts.values())
        return counts if is_whole and kept["of"] == of else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
