"""Read and append records of the reference's errors, 20 bytes a pair.

Each process that writes has a file of its own, to which it only appends: any number of them share
a directory without waiting for each other, and a kill at any moment costs what was not written yet.
A file's name holds its key's digest and each record its checksum, so that what is foreign is
refused and what is torn or damaged is computed again.
"""

from __future__ import annotations

import logging
import secrets
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdpo.common.errors import UserError
from sdpo.config.model import REFERENCE_FLAG

log = logging.getLogger(__name__)

# Errors of winner and loser; the CRC-32 of what is before it.
RECORD = np.dtype([("epoch", "<i4"), ("position", "<i4"), ("errors", "<f4", (2,)), ("crc", "<u4")])
_COVERED = RECORD.itemsize - 4  # bytes
_UNKNOWN = np.float32("nan")

Spot = tuple[int, int]  # epoch and position


def refuse_foreign(directory: Path, digest: str) -> None:
    """Refuse a directory with files of another key than that of `digest`.

    Raises:
        UserError: naming one.
    """
    foreign = {*directory.glob("errors-*.bin")} - {*directory.glob(f"errors-{digest}-*.bin")}
    if foreign:
        raise UserError(
            f"{REFERENCE_FLAG}: {min(foreign)} was not made for what {directory} says that it "
            "holds; delete that file, or give another directory"
        )


class Records:
    """Hold what a directory has of one key, and add to it.

    Raises:
        UserError: it has files of another key.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self.directory = directory
        self._own = directory / f"errors-{digest}-{secrets.token_hex(8)}.bin"
        self._pattern = f"errors-{digest}-*.bin"
        self._taken: dict[Path, int] = {}  # records of each file
        self._epochs: dict[int, np.ndarray] = {}  # (positions, 2) float32, nan where not known
        self._writes = True
        refuse_foreign(directory, digest)
        self.refresh()

    def refresh(self) -> None:
        """Take in what others have appended since."""
        for path in sorted(self.directory.glob(self._pattern)):
            taken = self._taken.get(path, 0)
            try:
                if path != self._own and path.stat().st_size >= (taken + 1) * RECORD.itemsize:
                    self._take_in(path, taken)
            except OSError as error:
                self._taken[path] = sys.maxsize  # asked no more
                log.warning(
                    "%s cannot be read (%s): what is in it is computed again",
                    *(path, error.strerror),
                )

    def _take_in(self, path: Path, taken: int) -> None:
        found = np.fromfile(path, RECORD, offset=taken * RECORD.itemsize)
        self._taken[path] = taken + len(found)
        whole = found["crc"] == _crc(found)
        if not whole.all():
            log.warning(
                "%s is damaged: %d of %d errors in it are computed again",
                *(path, (~whole).sum(), len(found)),
            )
        for epoch in np.unique(found["epoch"][whole]).tolist():
            of_epoch = found[whole & (found["epoch"] == epoch)]
            positions = of_epoch["position"]
            self._room(epoch, int(positions.max()) + 1)[positions] = of_epoch["errors"]

    def _room(self, epoch: int, size: int) -> np.ndarray:
        """Give an epoch's errors, of at least `size` positions."""
        known = self._epochs.get(epoch, np.empty((0, 2), np.float32))
        if len(known) < size:
            more = np.full((max(size, 2 * len(known)) - len(known), 2), _UNKNOWN)
            known = self._epochs[epoch] = np.concatenate([known, more])
        return known

    def at(self, spots: Sequence[Spot]) -> np.ndarray | None:
        """Look up the errors of B pairs, (B, 2) float32; None where those of one are not known."""
        found = np.stack([self._at(*spot) for spot in spots])
        return None if np.isnan(found).any() else found

    def _at(self, epoch: int, position: int) -> np.ndarray:
        return self._room(epoch, position + 1)[position]

    def has(self, epoch: int, first: int, count: int) -> bool:
        """Say whether the errors of `count` positions from `first` on are known."""
        known = self._epochs.get(epoch)
        if known is None or len(known) < first + count:
            return False
        return not np.isnan(known[first : first + count]).any()

    def add(self, spots: Sequence[Spot], errors: np.ndarray) -> None:
        """Append the errors of pairs, (B, 2) float32, at once; those that are not finite are not
        kept. Where there is no room, or no permission, nothing more is written, and said once."""
        records = np.zeros(len(spots), RECORD)
        records["epoch"], records["position"] = np.array(spots, np.int64).T
        records["errors"] = errors
        records = records[np.isfinite(errors).all(1)]
        records["crc"] = _crc(records)
        if not len(records) or not self._writes:
            return
        try:
            with open(self._own, "ab") as file:
                file.write(records.tobytes())
        except OSError as error:
            self._writes = False
            log.warning(
                "%s: cannot write to %s (%s); what this run computes from here on is not kept",
                *(REFERENCE_FLAG, self.directory, error.strerror),
            )


def _crc(records: np.ndarray) -> np.ndarray:
    """Compute the checksums of n records, (n,) uint32."""
    content, size = records.tobytes(), RECORD.itemsize
    starts = range(0, len(content), size)
    found = (zlib.crc32(content[start : start + _COVERED]) for start in starts)
    return np.fromiter(found, np.uint32, len(records))
