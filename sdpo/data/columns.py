"""Find out in which columns a preference set holds images, caption and who is preferred.

Public sets name and mark them in a handful of ways; `_LAYOUTS` lists those known by name, and
--columns says it of any other. Whatever it was, rows then have label_0 as Pick-a-Pic has; where a
set gives votes or weights, it is image 0's share of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from sdpo.common.errors import UserError
from sdpo.config import SourceConfig
from sdpo.config.data import COLUMN_EXAMPLE
from sdpo.data.tables import LABEL, label_value

log = logging.getLogger(__name__)

CAPTIONS = ("prompt", "text")  # where there is no --caption_column
FIRST, VOTES, LIST = "first", "votes:", "list:"


@dataclass(frozen=True)
class Layout:
    """Name the columns of a set. `label` is as --columns takes it: a column, "first" (image 0 is
    preferred), "votes:a,b" or "list:COLUMN"; where both images are one column, it holds lists."""

    image_0: str
    image_1: str
    label: str
    caption: str = ""
    votes: str = ""  # of label "first": a list of votes for image 0 and 1, where there is one

    @property
    def label_columns(self) -> list[str]:
        """The columns that tell which image is preferred."""
        if self.label == FIRST:
            return [self.votes] if self.votes else []
        if self.label.startswith(VOTES):
            return self.label.removeprefix(VOTES).split(",")
        return [self.label.removeprefix(LIST)]

    @property
    def needed(self) -> list[str]:
        """All the columns, each once."""
        return list(dict.fromkeys([self.image_0, self.image_1, *self.label_columns, self.caption]))

    @property
    def has_lists(self) -> bool:
        """Whether a row holds its images in a list."""
        return self.image_0 == self.image_1

    def __str__(self) -> str:
        return (
            f"caption={self.caption} image_0={self.image_0} image_1={self.image_1} "
            f"label={self.label}"
        )


_LAYOUTS = (
    Layout("chosen", "rejected", FIRST),  # open-image-preferences binarized, TRL
    Layout("image1", "image2", "votes:votes_image1,votes_image2"),  # Rapidata
    Layout("image1", "image2", "votes:weighted_results_image1,weighted_results_image2"),
    Layout(
        "image1",
        "image2",
        "votes:weighted_results_image1_preference,weighted_results_image2_preference",
    ),
    Layout("path1", "path2", FIRST),  # HPDv3
    Layout("file_path", "file_path", "list:human_preference"),  # HPDv2, train
    Layout("image_path", "image_path", "list:rank"),  # HPDv2, test
    Layout("image", "lose_image", FIRST),  # DiffSynth
    Layout("img_path_win", "img_path_lose", FIRST),  # LongCat
)
_CHOICES = "choice_dist"  # HPDv3's votes for path1 and path2, partly null


def find_layout(names: Sequence[str], data: SourceConfig) -> Layout:
    """Choose the columns of a dataset by --columns, or else by their names.

    Raises:
        UserError: some are not there, or the names fit several layouts; lists the columns.
    """
    there = f"its columns are: {', '.join(names)}; name them with --columns, e.g. {COLUMN_EXAMPLE}"

    def pick(flag: str, *candidates: str) -> str:
        for candidate in candidates:
            if candidate in names:
                return candidate
        raise UserError(f"{flag}: the data has no column {' or '.join(candidates)}; {there}")

    given = dict(item.split("=", 1) for item in data.columns)
    where = "--columns" if given else data.location_flag
    layout = None if set(given) - {"caption"} else _known_by_name(names, where, there)
    captions: tuple[str, ...] = (given.get("caption", data.caption_column),)
    if layout and captions == ("caption",) and not given:
        captions += CAPTIONS
    if layout is None:
        label = given.get("label") or pick(where, LABEL)
        sides = [
            [given[name]] if (name := f"image_{i}") in given else [f"jpg_{i}", name] for i in (0, 1)
        ]
        layout = Layout(pick(where, *sides[0]), pick(where, *sides[1]), label)
        for column in layout.label_columns:
            pick(where, column)
    if layout.has_lists != layout.label.startswith(LIST):
        raise UserError(
            "--columns: label=list:COLUMN goes with one column of lists of images, given as "
            "image_0 and as image_1"
        )
    caption = pick("--columns" if "caption" in given else "--caption_column", *captions)
    votes = _CHOICES if layout.image_0 == "path1" and _CHOICES in names else ""
    if data.min_agreement is not None and not (layout.label.startswith(VOTES) or votes):
        raise UserError(f"--min_agreement: the data has no votes (label=votes:A,B); {there}")
    return replace(layout, caption=caption, votes=votes)


def _known_by_name(names: Sequence[str], where: str, there: str) -> Layout | None:
    plain = all({f"jpg_{i}", f"image_{i}"} & set(names) for i in (0, 1))
    if plain and LABEL in names:
        return None
    fits = [
        each for each in _LAYOUTS if {each.image_0, each.image_1, *each.label_columns} <= set(names)
    ]
    if len(fits) > 1:
        several = " or as ".join(f"{e.image_0}, {e.image_1} by {e.label}" for e in fits)
        raise UserError(f"{where}: the data can be read as {several}; {there}")
    return fits[0] if fits else None


def check_images(features: Any, layout: Layout) -> None:
    """Check that columns of images hold images or paths, as far as their types tell.

    Raises:
        UserError: they hold something else, e.g. the messages of a set for language models.
    """
    import datasets

    for name in dict.fromkeys([layout.image_0, layout.image_1]):
        feature = (features or {}).get(name)
        if layout.has_lists:
            # `datasets` below 4 wrote a list as [feature].
            member = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
            good = feature is None or member == datasets.Value("string") or _is_text(feature)
            what = "lists of paths"
        else:
            good = feature is None or isinstance(feature, datasets.Image | dict)
            good = good or _is_text(feature) or "binary" in str(getattr(feature, "dtype", ""))
            what = "images or paths to them"
        if not good:
            raise UserError(
                f"column {name} holds {feature}, it must hold {what}; name another with --columns, "
                f"e.g. {COLUMN_EXAMPLE}"
            )


def check_captions(features: Any, column: str) -> None:
    """Check that a column holds captions, as far as its type tells: text or lists of text. Whole
    numbers will do, since their digits are their text.

    Raises:
        UserError: it holds something else.
    """
    feature = (features or {}).get(column)
    member = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    kind = str(getattr(member, "dtype", ""))
    if feature is None or "string" in kind or "int" in kind or kind == "null":
        return
    what = kind or str(feature)
    why = ""
    if kind.startswith(("float", "double", "decimal")):
        why = " (whether it was 42 or 42.0 is not in the file any more: write the column as text)"
    raise UserError(
        f"--caption_column {column}: captions must be text or lists of text, found {what}{why}"
    )


def _is_text(feature: Any) -> bool:
    return "string" in str(getattr(feature, "dtype", ""))


def as_pairs(
    rows: Any, layout: Layout, data: SourceConfig, others: Sequence[str] = ()
) -> tuple[Any, Layout, int]:
    """Give rows, undecoded, their label_0, and lists of images as image_0 and image_1.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset` of the columns needed, and `others` to keep.

    Returns:
        The rows, how they are laid out now, and how many have no label_0 for --min_agreement alone
        (while streaming 0, since they are not known).

    Raises:
        UserError: a column of something else than its label says.
    """
    if layout.label == LABEL:
        return rows, layout, 0
    shares = f", the winner's share of the votes by {layout.votes}" if layout.votes else ""
    log.info("columns: %s%s", layout, shares)
    images = ["image_0", "image_1"] if layout.has_lists else []
    image_0, image_1 = images or (layout.image_0, layout.image_1)
    made = Layout(image_0, image_1, LABEL, layout.caption)

    def derive(row: dict[str, Any]) -> dict[str, Any]:
        label, places = judge(row, layout, data.min_agreement)
        if not images:
            return {LABEL: label}
        paths = _listed(row[layout.image_0] or [None, None], layout.image_0)
        return {LABEL: label, "image_0": paths[places[0]], "image_1": paths[places[1]]}

    if data.streaming:
        kept = {made.image_0, made.image_1, made.caption, *others}
        gone = [name for name in layout.needed if name not in kept]
        return rows.map(derive, remove_columns=gone), made, 0
    telling = list(dict.fromkeys([*layout.label_columns, *([layout.image_0] if images else [])]))
    columns: dict[str, list[Any]] = {name: [] for name in (LABEL, *images)}
    divided = 0
    for number, row in enumerate(rows.select_columns(telling) if telling else [{}] * len(rows)):
        try:
            derived = derive(row)
            if data.min_agreement is not None and derived[LABEL] is None:
                divided += judge(row, layout, None)[0] is not None
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        for name, value in derived.items():
            columns[name].append(value)
    kept_images = () if images else (layout.image_0, layout.image_1)
    rows = rows.select_columns(list(dict.fromkeys([*kept_images, layout.caption, *others])))
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows, made, divided


def judge(
    row: dict[str, Any], layout: Layout, min_agreement: float | None
) -> tuple[float | None, tuple[int, int]]:
    """Tell a row's label_0, image 0's share of the preference (None where it has none, or too
    little agreement), and which images of a list are image 0 and 1: of more than two the first and
    the last in rank.

    Raises:
        UserError: what the columns hold cannot be it.
    """
    if layout.label == FIRST:
        counts = row[layout.votes] if layout.votes else None
        if not counts:
            return 1.0, (0, 1)
        values = [_number(v, layout.votes) or 0.0 for v in _listed(counts, layout.votes)]
        if len(values) != 2:
            raise UserError(f"{layout.votes} has {len(values)} counts of votes, it must be 2")
        won, lost = values
        if min_agreement is not None and not _agree(won, lost, min_agreement):
            return None, (0, 1)
        # The order says which is preferred, whatever the counts.
        return (won / (won + lost) if won > lost >= 0 else 1.0), (0, 1)
    if layout.label.startswith(VOTES):
        a, b = (_number(row[name], name) for name in layout.label_columns)
        if a is None or b is None:
            return None, (0, 1)
        if min_agreement is None or a == b or _agree(max(a, b), min(a, b), min_agreement):
            return _share(a, b), (0, 1)
        return None, (0, 1)
    (name,) = layout.label_columns
    if not layout.label.startswith(LIST):
        return row[name], (0, 1)
    if row[name] is None or row[layout.image_0] is None:
        return None, (0, 1)
    images, values = _listed(row[layout.image_0], layout.image_0), _listed(row[name], name)
    if len(images) != len(values) or len(images) < 2:
        raise UserError(
            f"--columns: a row has {len(images)} images in {layout.image_0} and {len(values)} "
            f"values in {name}; it must be as many of both, at least two"
        )
    numbers = [_number(value, name) for value in values]
    if any(number is None for number in numbers):
        return None, (0, 1)
    # The first in rank is the best one; of any other number the largest.
    scores = [-(n or 0.0) if "rank" in name.lower() else (n or 0.0) for n in numbers]
    if len(scores) == 2:
        return _compare(*scores), (0, 1)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return (0.5, (0, 1)) if best == worst else (1.0, (best, worst))


def _compare(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def _share(a: float, b: float) -> float:
    """Give a's share of two counts of votes; of numbers that are no counts 1, 0 or 0.5."""
    return a / (a + b) if min(a, b) >= 0 and a != b else _compare(a, b)


def _agree(won: float, lost: float, least: float) -> bool:
    return won + lost > 0 and won / (won + lost) >= least


def _number(value: Any, name: str) -> float | None:
    try:
        return label_value(value)
    except (TypeError, ValueError):
        raise UserError(f"column {name} must hold numbers, found {value!r}") from None


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # CSV has lists as text
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"column {name} must hold lists, found {type(value).__name__}")
    return list(value)
