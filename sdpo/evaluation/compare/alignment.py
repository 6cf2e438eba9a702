"""Which image of one model is compared with which of another.

By prompt: the k-th image of a prompt with the other side's k-th. What has no partner is left over
and reported. By index: the i-th row with the i-th, only where asked for.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sdpo.common.errors import UserError
from sdpo.evaluation.generate.manifest import Manifest

ALIGNMENTS = ("prompt", "index")


@dataclass(frozen=True)
class Alignment:
    """Pairs the rows of two manifests: pair i is (rows_a[i], rows_b[i]), in the order of A.

    `unmatched_*` are rows without a partner; `differing` are the pairs whose prompts differ, which
    only an alignment by index can have.
    """

    rows_a: list[int]
    rows_b: list[int]
    unmatched_a: list[int]
    unmatched_b: list[int]
    differing: list[int]

    def __len__(self) -> int:
        return len(self.rows_a)


def align(a: Manifest, b: Manifest, by: str) -> Alignment:
    """Pair the rows of two manifests, by "prompt" or by "index".

    Raises:
        UserError: no prompt in common, or, by index, manifests of different lengths.
    """
    return _by_index(a, b) if by == "index" else _by_prompt(a, b)


def _by_prompt(a: Manifest, b: Manifest) -> Alignment:
    waiting = defaultdict(list)
    for row, prompt in enumerate(b.prompts):
        waiting[prompt].append(row)
    rows_of_b = {prompt: iter(rows) for prompt, rows in waiting.items()}
    partners = [next(rows_of_b.get(prompt, iter(())), None) for prompt in a.prompts]
    pairs = [(row, partner) for row, partner in enumerate(partners) if partner is not None]
    if not pairs:
        raise UserError(
            f"{a.path} and {b.path} have no prompt in common, e.g. {a.prompts[0]!r} against "
            f"{b.prompts[0]!r}; --align index compares row by row all the same"
        )
    rows_a, rows_b = (list(rows) for rows in zip(*pairs, strict=True))
    taken = set(rows_b)
    return Alignment(
        rows_a,
        rows_b,
        unmatched_a=[row for row, partner in enumerate(partners) if partner is None],
        unmatched_b=[row for row in range(len(b)) if row not in taken],
        differing=[],
    )


def _by_index(a: Manifest, b: Manifest) -> Alignment:
    if len(a) != len(b):
        raise UserError(
            f"--align index needs manifests of equal length: {a.path} has {len(a)} images, "
            f"{b.path} has {len(b)}"
        )
    rows = list(range(len(a)))
    differing = [row for row in rows if a.prompts[row] != b.prompts[row]]
    return Alignment(rows, list(rows), [], [], differing)
