"""Open preference pairs and choose the rows to train on, without decoding an image.

Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption, model_0, model_1), or image_0 and image_1 in
place of jpg_0 and jpg_1. label_0 is 1 where image 0 is preferred, 0 where image 1 is, 0.5 in a tie,
or between them image 0's share of the preference. Other columns become these, see columns.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError, first_line
from sdpo.common.files import disk_is_full, full_disk
from sdpo.common.randomness import generator
from sdpo.config import SourceConfig
from sdpo.data.columns import as_pairs, check_captions, check_images, find_layout
from sdpo.data.hub import open_hub
from sdpo.data.local import LocalFiles, find_local_files
from sdpo.data.parquet import open_parquet
from sdpo.data.tables import LABEL, open_folders, open_text
from sdpo.data.tars import open_tars

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

log = logging.getLogger(__name__)

MODELS = ("model_0", "model_1")
# Beside a row's own columns, where its source has shapes.
SHAPE, SIZES = "shape of the pair", "sizes of the images"
DREAMLIKE = "dream"


@dataclass(frozen=True)
class Columns:
    """Name the columns in which a dataset holds the parts of a pair."""

    image_0: str
    image_1: str
    caption: str


@dataclass(frozen=True)
class ImageShapes:
    """Hold what n pairs are cropped to, (n, 2), and the sizes of image 0 and image 1, (n, 2, 2), 0
    where they cannot be read: widths and heights in pixels, int64."""

    shapes: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class PairSource:
    """Hold decided pairs, undecoded, of the dataset `given` (while streaming, all its rows)."""

    rows: Any  # a `datasets.Dataset`; while streaming an `IterableDataset`
    columns: Columns
    base: Path | None  # of relative paths to images
    origin: Any = None  # row numbers in `given`, (n,) int64; None while streaming
    labels: np.ndarray | None = None  # (n,), in place of the rows' label_0
    given: Any = None  # None while streaming
    shapes: ImageShapes | None = None  # of the rows; None where all are cropped to one square

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """Give one pair, undecoded."""
        row: dict[str, Any] = self.rows[index]
        if self.labels is not None:
            row = {**row, LABEL: float(self.labels[index])}
        if self.shapes is not None:
            shape, sizes = self.shapes.shapes[index].tolist(), self.shapes.sizes[index].tolist()
            row = {**row, SHAPE: tuple(shape), SIZES: sizes}
        return row

    def shape_of(self, number: int) -> tuple[int, int] | None:
        """Give width and height that a row, by its number in `given`, is cropped to."""
        if self.shapes is None:
            return None
        width, height = self.shapes.shapes[self.origin.searchsorted(number)].tolist()
        return width, height


def open_pairs(data: SourceConfig, seed: int) -> PairSource:
    """Open the pairs that a run's settings name; `seed` chooses those of --max_train_samples.

    Raises:
        UserError: not to be found, columns missing, no decided pair left.
    """
    rows, base = _load(data)
    layout = find_layout(_column_names(rows, data), data)
    models = MODELS if data.dreamlike_pairs_only else ()
    rows = rows.select_columns(list(dict.fromkeys([*layout.needed, *models])))
    check_images(rows.features, layout)
    check_captions(rows.features, layout.caption)
    rows, layout, divided = as_pairs(_without_decoding(rows), layout, data, models)
    columns = Columns(layout.image_0, layout.image_1, layout.caption)
    if data.image_root:
        base = Path(data.image_root)
    if data.streaming:
        return PairSource(rows, columns, base)
    chosen, origin = _choose_rows(rows, data, seed, divided)
    _check_captions(rows, origin, columns.caption)
    return PairSource(chosen, columns, base, origin, given=rows)


def _load(data: SourceConfig) -> tuple[Any, Path | None]:
    flag, name = data.location_flag, data.location
    local = Path(name).expanduser()
    is_local = local.is_dir()
    try:
        if is_local:
            found = find_local_files(local, data.split, flag)
            return _open_local(found, data), found.base
        return _streamed(open_hub(name, data), data), None
    except UserError:
        raise
    except ValueError as error:
        if not is_local and "split" in str(error).lower():
            raise UserError(f"--split: {name} has no split {data.split!r}: {error}") from None
        raise UserError(f"{flag}: cannot read {name}: {first_line(error)}") from error
    # Hub and file errors come in many classes; all of them mean that the pairs are not there.
    except Exception as error:
        cause = error.__cause__ or error  # "An error occurred while generating" says nothing
        if disk_is_full(cause):
            import datasets

            cache = Path(data.cache_dir or datasets.config.HF_DATASETS_CACHE)
            raise UserError(f"--cache_dir: {full_disk(cache, cause)}") from error
        raise UserError(
            f"{flag}: cannot open {name} ({type(cause).__name__}: {first_line(cause)}); give a "
            "dataset that this machine can reach, or a local directory with --train_data_dir"
        ) from error


def _open_local(found: LocalFiles, data: SourceConfig) -> Any:
    import datasets

    if found.kind == "parquet":
        return open_parquet(found.files, data.cache_dir, data.streaming)
    if found.kind == "tars":
        return open_tars(found.files, data.cache_dir, data.streaming)
    if found.kind == "saved":
        rows = datasets.load_from_disk(str(found.base))
    elif found.kind == "folders":
        rows = open_folders(found.base, data.cache_dir)
    else:
        rows = open_text(found.files, found.base, data.cache_dir)
    return _streamed(rows, data)


def _streamed(rows: Any, data: SourceConfig) -> Any:
    """Give rows that are all here as a stream where --streaming asks for one."""
    import datasets

    if not data.streaming or not isinstance(rows, datasets.Dataset):
        return rows
    if LABEL in rows.column_names and not data.columns:
        _checked_labels(arrow_column(rows, LABEL))  # before models are loaded
    return rows.to_iterable_dataset()


def _column_names(rows: Any, data: SourceConfig) -> list[str]:
    names = list(rows.column_names or next(iter(rows), {}).keys())
    if not names:
        raise UserError(f"{data.location_flag}: {data.location} holds no rows")
    for model in MODELS if data.dreamlike_pairs_only else ():
        if model not in names:
            raise UserError(
                f"--dreamlike_pairs_only: the data has no column {model}; its columns are: "
                f"{', '.join(names)}"
            )
    return names


def _without_decoding(rows: Any) -> Any:
    import datasets

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _choose_rows(
    rows: datasets.Dataset, data: SourceConfig, seed: int, divided: int
) -> tuple[Any, Any]:
    """Drop ties and what else the flags exclude, in Arrow; images are not touched.

    Args:
        divided: how many rows have no label because of --min_agreement.

    Returns:
        The rows left, and their numbers in `rows`, (n,) int64, ascending.

    Raises:
        UserError: none is left; says why.
    """
    import numpy as np
    import pyarrow.compute as pc

    labels, missing = _checked_labels(arrow_column(rows, LABEL))
    ties = labels == 0.5
    keep = ~(ties | missing)
    dropped = f"{ties.sum()} ties dropped, {missing.sum() - divided} without a label dropped"
    if data.min_agreement is not None:
        dropped += f", {divided} below --min_agreement {data.min_agreement:g} dropped"
    counted = f"{len(labels)} rows: {keep.sum()} decided pairs, {dropped}"
    log.info("%s", counted)
    if data.dreamlike_pairs_only:
        for model in MODELS:
            from_dreamlike = pc.match_substring(arrow_column(rows, model), DREAMLIKE)
            keep &= pc.fill_null(from_dreamlike, False).to_numpy()
        log.info("--dreamlike_pairs_only keeps %d of them", keep.sum())
    origin = np.flatnonzero(keep)
    if not len(origin):
        excluded = " and --dreamlike_pairs_only" if data.dreamlike_pairs_only else ""
        raise UserError(f"no pair is left to train on after this{excluded}: {counted}")
    if data.max_train_samples is not None and data.max_train_samples < len(origin):
        import torch

        order = torch.randperm(len(origin), generator=generator(seed, "max_train_samples"))
        origin = np.sort(origin[order[: data.max_train_samples].numpy()])
        log.info("--max_train_samples keeps %d of them", len(origin))
    return (rows if len(origin) == len(rows) else rows.select(origin)), origin


def _check_captions(rows: datasets.Dataset, chosen: np.ndarray, name: str) -> None:
    """Say how many of the chosen rows have no caption and train as with the empty one.

    Raises:
        UserError: none has one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = arrow_column(rows, name)
    empty = column.is_null()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        empty = pc.fill_null(pc.equal(pc.binary_length(column), 0), True)
    missing = int(empty.to_numpy()[chosen].sum())
    if missing == len(chosen):
        raise UserError(f"--caption_column: column {name} is empty in all {missing} pairs")
    if missing:
        log.warning(
            "%d of %d pairs have nothing in column %s: they train as without a caption",
            *(missing, len(chosen), name),
        )


def _checked_labels(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Read labels as numbers, (n,) float64, and which are missing, (n,) bool.

    Raises:
        UserError: one does not lie between 0 and 1; names its row.
    """
    import numpy as np

    numbers = _numeric_labels(column)
    labels, missing = numbers.to_numpy(), numbers.is_null().to_numpy()
    other = np.flatnonzero(~(((labels >= 0) & (labels <= 1)) | missing))
    if len(other):
        raise UserError(bad_label(int(other[0]), labels[other[0]]))
    return labels, missing


def _numeric_labels(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast labels to float64.

    Raises:
        UserError: one is no number; names its row.
    """
    import pyarrow as pa

    try:
        return column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        for row, value in enumerate(column.to_pylist()):
            read_label(row, value)
        raise UserError(f"column {LABEL} must hold numbers: {first_line(error)}") from None


def arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """Take one column as it lies in Arrow, without loading the others; views of text and bytes as
    text and bytes, since few functions of Arrow know them."""
    import pyarrow as pa

    column = rows.select_columns([name]).with_format("arrow")[:].column(0)
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    return column.cast(pa.large_binary()) if pa.types.is_binary_view(column.type) else column


def read_label(row: int | str, value: Any) -> float | None:
    """Read a row's label as a number; None where there is none.

    Raises:
        UserError: it is something else.
    """
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"row {row}: {LABEL} is {value!r}; {LABEL} must hold 0 (image 1 preferred), 0.5 (a "
            "tie) or 1 (image 0 preferred)"
        ) from None


def bad_label(row: int | str, label: float) -> str:
    """Say that a label does not lie between 0 and 1."""
    return (
        f"row {row}: {LABEL} is {label}; it must be 1 (image 0 preferred), 0 (image 1 preferred), "
        "0.5 (a tie) or between them image 0's share of the preference"
    )


def winner_of(label: float) -> tuple[int, float]:
    """Tell by the label of a decided pair which of its images is preferred, and the share of the
    preference that is for it, above 0.5 to 1."""
    return (0, label) if label > 0.5 else (1, 1 - label)
