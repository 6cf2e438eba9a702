"""Label pairs by a scorer instead of by people, from scores that are kept on disk.

As in the public code, ties of the people stay dropped, and where a scorer does not tell the two
images of a pair apart the people's label stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdpo.common.errors import UserError
from sdpo.common.files import written_beside
from sdpo.data.source import LABEL, PairSource, arrow_column

_COLUMNS = ("row", "score_0", "score_1")


class ChoiceScores:
    """Keep scores of pairs by row of the dataset: `scores` (rows, 2) float64, NaN where not scored.

    One Parquet file with the columns row, score_0 and score_1; an undecodable pair has no scores
    and is in the file all the same, so that it is not tried again.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        self.scores = np.full((rows, 2), np.nan)
        self.seen = np.zeros(rows, dtype=bool)
        if not path.is_file():
            return
        try:
            table = pq.read_table(path, columns=list(_COLUMNS))
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it to score the pairs again"
            ) from None
        found = table["row"].to_numpy()
        self.seen[found] = True
        for side, name in enumerate(_COLUMNS[1:]):
            self.scores[found, side] = table[name].to_numpy(zero_copy_only=False)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Choose those of `rows` that were not looked at."""
        return rows[~self.seen[rows]]

    def put(self, rows: Sequence[int], scores: np.ndarray) -> None:
        """Enter scores (n, 2) of n rows."""
        chosen = np.asarray(rows, dtype=np.int64)
        self.scores[chosen] = scores
        self.seen[chosen] = True

    def save(self) -> None:
        """Write the file whole."""
        rows = np.flatnonzero(self.seen)
        sides = [pa.array(v, mask=np.isnan(v)) for v in self.scores[rows].T]
        table = pa.table(dict(zip(_COLUMNS, [pa.array(rows), *sides], strict=True)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(self.path) as beside:
            pq.write_table(table, beside)


@dataclass(frozen=True)
class Agreement:
    """Count pairs by whether a scorer chooses as the people did."""

    agree: int
    differ: int
    equal: int  # equal scores: the people's label stays
    undecodable: int

    def __str__(self) -> str:
        decided = self.agree + self.differ
        share = f"{100 * self.agree / decided:.1f} %" if decided else "none"
        return (
            f"agrees with the human labels in {share} of {decided} pairs; {self.equal} with equal "
            f"scores keep their label, {self.undecodable} cannot be decoded"
        )


def with_choices(source: PairSource, found: ChoiceScores) -> tuple[PairSource, Agreement]:
    """Label the pairs 1 where image 0 has the larger score, 0 where image 1 has; how often the
    people's labels agree."""
    human = arrow_column(source.rows, LABEL).to_numpy().astype(np.float64)
    scores = found.scores[source.origin]
    difference = scores[:, 0] - scores[:, 1]
    decided = np.isfinite(difference) & (difference != 0)
    labels = np.where(decided, difference > 0, human).astype(np.float64)
    same = (labels > 0.5) == (human > 0.5)
    agreement = Agreement(
        agree=int((decided & same).sum()),
        differ=int((decided & ~same).sum()),
        equal=int((difference == 0).sum()),
        undecodable=int(np.isnan(difference).sum()),
    )
    return replace(source, labels=labels), agreement
