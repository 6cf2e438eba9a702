"""Randomness as a function of (seed, epoch, position, stream), never of a generator's past.

Every random choice about a training pair is drawn from a generator made from where the pair stands
in the run. Resuming, the number of data workers and the number of processes therefore cannot change
what is trained on. Draws are made on the CPU, so that they do not depend on the device either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int, int, int]  # (seed, epoch, position)


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of `key`, e.g. (seed, epoch, position, "timestep")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(*key: int | str) -> float:
    """One number in [0, 1)."""
    return torch.rand((), generator=generator(*key), dtype=torch.float64).item()


def integer(high: int, *key: int | str) -> int:
    """One integer in [0, high)."""
    return int(torch.randint(high, (), generator=generator(*key)).item())


def normal(shape: Sequence[int], keys: Sequence[Key], stream: str) -> Tensor:
    """Standard normal float32, (len(keys), *shape): one independent draw per key."""
    return torch.stack([torch.randn(shape, generator=generator(*key, stream)) for key in keys])


def timesteps(count: int, keys: Sequence[Key]) -> Tensor:
    """Integer timesteps in [0, count), (len(keys),), one per key."""
    return torch.tensor([integer(count, *key, "timestep") for key in keys], dtype=torch.long)
