"""Which pairs are trained on, and how their images and captions are prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdpo.common.flags import NOT_NEGATIVE, SHARE, at_least, at_most, flag, multiple_of

CACHE_FLAG = "--cache_dir_latents"
COLUMN_EXAMPLE = "caption=prompt image_0=A image_1=B label=first"
# Copies on the hub with the same columns, tried where the original is not to be had.
MIRRORS = {"yuvalkirstain/pickapic_v2": ("liuhuohuo2/pick-a-pic-v2",)}
CACHE_DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class SourceConfig:
    """The rows of a data set, and who labels them."""

    dataset_name: str | None = flag(
        None,
        "preference pairs on the hub, e.g. yuvalkirstain/pickapic_v2, or a local directory; of "
        "this and --train_data_dir the last one given counts",
        metavar="ID_OR_DIR",
        replaces="train_data_dir",
        expand=True,
    )
    dataset_config_name: str | None = flag(None, "configuration of the dataset on the hub")
    train_data_dir: str | None = flag(
        None,
        "local pairs: parquet files in Pick-a-Pic's columns, or metadata.jsonl/metadata.csv with "
        "caption, image_0, image_1, label_0",
        metavar="DIR",
        replaces="dataset_name",
        expand=True,
    )
    caption_column: str = flag("caption", "the captions' column, text or lists of texts")
    columns: tuple[str, ...] = flag(
        (),
        "which columns hold what: caption, image_0, image_1, and label, which is first (image 0 is "
        "preferred), a COLUMN of 1, 0 and 0.5, votes:A,B or list:COLUMN",
        metavar="KEY=COLUMN",
        shown="found by their names",
    )
    image_root: str | None = flag(
        None,
        "what relative paths to images are relative to",
        metavar="DIR",
        expand=True,
        shown="where the table lies",
    )
    min_agreement: float | None = flag(
        None,
        "drop pairs of which a smaller share of the votes is for the preferred image",
        metavar="F",
        check=SHARE,
    )
    split: str = flag("train", "the part of the dataset")
    max_train_samples: int | None = flag(
        None, "use only N pairs, chosen by the seed", metavar="N", check=at_least(1)
    )
    dreamlike_pairs_only: bool = flag(
        False, "only pairs whose two images both come from a dreamlike model"
    )
    streaming: bool = flag(False, "read while training, download nothing ahead")
    stream_shards: Literal["all", "own"] = flag(
        "all",
        "with --streaming: all: every process reads all files and decodes its part, so that pairs "
        "do not depend on the number of processes; own: only its share of the files",
        choices=("all", "own"),
    )
    cache_dir: str | None = flag(
        None, "where downloaded models and datasets are kept", metavar="DIR", expand=True
    )
    choice_model: str | None = flag(
        None,
        "label the pairs by this scorer instead of by people (done once, kept beside the dataset)",
        metavar="SCORER",
    )
    choice_weights: tuple[str, ...] = flag(
        (),
        "weights of --choice_model from this machine, as eval/score.py's --weights",
        metavar="NAME=PATH",
    )

    @property
    def location(self) -> str:
        """The id or directory of the data."""
        return self.train_data_dir or self.dataset_name or ""

    @property
    def location_flag(self) -> str:
        """The flag that names it."""
        return "--train_data_dir" if self.train_data_dir else "--dataset_name"


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The rows, how they become pixels and captions, and the cache of their encodings."""

    max_bad_fraction: float = flag(
        0.01,
        "stop once more than this share of pairs cannot be decoded",
        metavar="F",
        check=SHARE,
    )
    resolution: int = flag(
        None,  # sdpo.config.rules.defaults_of_base
        "side of the square images, in pixels; with --resize bucket a square of about their area",
        metavar="PX",
        check=(at_least(1), at_most(16384), multiple_of(8)),
        shown="the base's own: 512 of SD1.5, 1024 of SDXL",
    )
    resize: Literal["crop", "bucket"] = flag(
        "crop",
        "crop: every image to a square; bucket: to the rectangle of about that area whose shape is "
        "nearest to its pair's, a batch of one shape",
        choices=("crop", "bucket"),
    )
    random_crop: bool = flag(False, "crop at random instead of at the centre")
    no_hflip: bool = flag(False, "no random horizontal flip")
    proportion_empty_prompts: float = flag(
        0.2, 'probability that a caption is replaced by ""', metavar="P", check=SHARE
    )
    dataloader_num_workers: int = flag(
        0, "processes that decode images ahead", metavar="N", check=(NOT_NEGATIVE, at_most(1024))
    )
    cache_dir_latents: str | None = flag(
        None,
        "train from encoded images and captions kept in DIR, without VAE and text encoders in "
        "memory; what is missing there is encoded first (or ahead: scripts/data/cache_latents.sh)",
        metavar="DIR",
        expand=True,
    )
    cache_dtype: Literal["bf16", "fp16", "fp32"] = flag(
        "bf16", "of the kept numbers; bf16 rounds by at most 2^-8 of each", choices=CACHE_DTYPES
    )
    cache_batch_size: int = flag(
        8, "pairs encoded at a time while the cache is built", metavar="PAIRS", check=at_least(1)
    )
    verify_cache: bool = flag(
        False,
        "compare every file of the cache with its checksum before training (their sizes are always "
        "compared)",
    )


def bucket_step(resolution: int) -> int:
    """Give what the sides of --resize bucket are multiples of: the largest of 64, 32, 16 and 8 that
    is at most an eighth of the resolution (8 where none is): 64 at 512 and 1024 px, 8 at 64 px."""
    return next((step for step in (64, 32, 16) if 8 * step <= resolution), 8)
