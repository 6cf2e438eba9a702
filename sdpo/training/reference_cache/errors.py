"""Answer a run's questions about its reference from the errors that are kept, and keep others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sdpo.training.reference_cache.records import Records, Spot

if TYPE_CHECKING:
    from sdpo.common.randomness import Key


class CachedErrors:
    """Give the reference's errors of a run's pairs: read where they are kept, else computed and,
    at `write`, kept. `complete`: all that the run will ask for are there. `alone`: whether a
    process may pass over a computation that others make."""

    def __init__(self, records: Records, complete: bool, alone: bool = True) -> None:
        self.records, self.complete, self._alone = records, complete, alone
        self._computed: list[tuple[list[Spot], Tensor]] = []

    def of(self, keys: Sequence[Key], compute: Callable[[], Tensor]) -> Tensor:
        """Give the errors, (2B,), winners first, of the B pairs of `keys`; `compute` makes them."""
        spots = [(epoch, position) for _, epoch, position in keys]
        if self.complete or self._alone:
            found = self._look_up(spots)
            if found is not None:
                return torch.from_numpy(found.T.reshape(-1).copy())
        errors = compute()
        self._computed.append((spots, errors))
        return errors

    def _look_up(self, spots: list[Spot]) -> np.ndarray | None:
        found = self.records.at(spots)
        if found is None:
            # Another run that is a little ahead may have appended them.
            self.records.refresh()
            found = self.records.at(spots)
        return found

    def write(self) -> None:
        """Append what was computed since the last call; reads it from the device."""
        if not self._computed:
            return
        spots = [spot for some, _ in self._computed for spot in some]
        pairs = [errors.reshape(2, -1).T for _, errors in self._computed]
        self._computed = []
        self.records.add(spots, torch.cat(pairs).float().cpu().numpy())
