"""The flags that name preference pairs, shared by train.py and the programs that prepare data."""

from __future__ import annotations

import argparse

from sdpo.common.cli import Replace
from sdpo.common.errors import UserError


def add_source_flags(group: argparse._ArgumentGroup) -> None:
    """Where the pairs are, which of them, and who labels them."""
    add = group.add_argument
    add(
        "--dataset_name",
        action=Replace,
        metavar="ID_OR_DIR",
        help="preference pairs on the hub, e.g. yuvalkirstain/pickapic_v2, or a local directory; "
        "of this and --train_data_dir the last one given counts",
    )
    add("--dataset_config_name", help="configuration of the dataset on the hub")
    add(
        "--train_data_dir",
        action=Replace,
        metavar="DIR",
        help="local pairs: parquet files in Pick-a-Pic's columns, or metadata.jsonl/metadata.csv "
        "with caption, image_0, image_1, label_0",
    )
    add("--caption_column", default="caption", help="default: caption (a string or a list)")
    add("--split", default="train", help="default: train")
    add("--max_train_samples", type=int, metavar="N", help="use only N pairs, chosen by the seed")
    add(
        "--dreamlike_pairs_only",
        action="store_true",
        help="only pairs whose two images both come from a dreamlike model",
    )
    add("--streaming", action="store_true", help="read while training, download nothing ahead")
    add(
        "--stream_shards",
        choices=("all", "own"),
        default="all",
        help="with --streaming: all (default): every process reads all files and decodes its part, "
        "so that pairs do not depend on the number of processes; own: only its share of the files",
    )
    add("--cache_dir", metavar="DIR", help="where downloaded models and datasets are kept")
    add_choice_flags(group)


def add_choice_flags(group: argparse._ArgumentGroup) -> None:
    """Labels by a scorer instead of by people."""
    from sdpo.evaluation.score.scorers import scorer_names

    group.add_argument(
        "--choice_model",
        choices=scorer_names(),
        help="label the pairs by this scorer instead of by people (done once, kept beside the "
        "dataset)",
    )
    group.add_argument(
        "--choice_weights",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="weights of --choice_model from this machine, as eval/score.py's --weights",
    )


def check_source_flags(args: argparse.Namespace) -> None:
    """Checks that need no data.

    Raises:
        UserError: naming the flag and what would be right.
    """
    if args.dataset_name is None and args.train_data_dir is None:
        raise UserError("the data is missing: give --dataset_name or --train_data_dir")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise UserError(f"--max_train_samples must be at least 1, got {args.max_train_samples}")
    if args.stream_shards == "own" and not args.streaming:
        raise UserError("--stream_shards own has no meaning without --streaming")
    if args.stream_shards == "own" and args.max_train_samples is not None:
        raise UserError("--stream_shards own does not go with --max_train_samples")
    if args.choice_model and args.streaming:
        raise UserError(
            "--choice_model labels a dataset ahead of training: it does not go with --streaming"
        )
    if args.choice_weights and not args.choice_model:
        raise UserError("--choice_weights has no meaning without --choice_model")
    choice_weights(args)


def choice_weights(args: argparse.Namespace) -> dict[str, str]:
    """--choice_weights by scorer and part.

    Raises:
        UserError: of another form, of another scorer than --choice_model, or not there.
    """
    from sdpo.evaluation.score.config import parse_weights

    weights = parse_weights(args.choice_weights, "--choice_weights")
    for name in weights:
        if name.partition(".")[0] != args.choice_model:
            raise UserError(f"--choice_weights: {name} is not a part of {args.choice_model}")
    return weights
