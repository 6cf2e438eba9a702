"""What one flag says about another: defaults that depend on flags, and combinations refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdpo.common.errors import UserError
from sdpo.config.data import (
    CACHE_FLAG,
    COLUMN_EXAMPLE,
    DataConfig,
    SourceConfig,
    bucket_step,
)
from sdpo.config.families import FAMILIES, FamilyFacts
from sdpo.config.method import MethodConfig
from sdpo.config.model import REFERENCE_FLAG, ModelConfig
from sdpo.config.optim import OptimConfig
from sdpo.config.safeguard import SafeguardConfig
from sdpo.losses import needs_reference_output


class BaseKind(NamedTuple):
    """What of a base flags depend on."""

    family: str  # a name of `FAMILIES`
    predicts: str  # epsilon, v_prediction or flow
    resolution: int  # pixels, that it was trained at


def fill_in(values: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults that depend on other flags to a run's values by flag."""
    filled = dict(values)
    if values.get("max_train_steps") is None and values.get("num_train_epochs") is None:
        filled["max_train_steps"] = 2000
    if values.get("lora_rank") and values.get("lora_alpha") is None:
        filled["lora_alpha"] = float(values["lora_rank"])
    return filled


def check_resolution(resolution: int, facts: FamilyFacts) -> None:
    """Refuse a side that a family's denoiser cannot be given.

    Raises:
        UserError: saying what it must be a multiple of.
    """
    if resolution % facts.multiple:
        raise UserError(
            f"--resolution must be a multiple of {facts.multiple} with a base of {facts.label}, "
            f"got {resolution}"
        )


def defaults_of_base(values: Mapping[str, Any], base: BaseKind) -> dict[str, Any]:
    """Give the flags that a run's values leave to its base, and check those that depend on it.

    Raises:
        UserError: a flag has no meaning with this base, or a value does not fit it.
    """
    facts = FAMILIES[base.family]
    filled: dict[str, Any] = {}
    if values["resolution"] is None:
        filled["resolution"] = base.resolution
    else:
        check_resolution(values["resolution"], facts)
    if values["resize"] == "bucket":
        _check_buckets(values["resolution"] or base.resolution, facts)
    if values["winner_preserving_scope"] is None:
        # One scale for all pairs depends on the parametrisation where targets differ in a pair.
        filled["winner_preserving_scope"] = "batch" if base.predicts == "epsilon" else "pair"
    if values["lora_rank"] and not facts.lora_targets:
        raise UserError(
            f"--lora_rank: diffusers reads no LoRA of {facts.label}: leave it out, and all weights "
            "are trained"
        )
    if values["lora_rank"] and not values["lora_target_modules"]:
        filled["lora_target_modules"] = facts.lora_targets
    for name in ("time_sampling", "time_mean", "time_std", "time_shift"):
        if values[name] is not None and not facts.flow:
            raise UserError(
                f"--{name} is of rectified flow; {facts.label} is trained at the uniform times of "
                "its schedule"
            )
    return filled


def _check_buckets(resolution: int, facts: FamilyFacts) -> None:
    if (step := bucket_step(resolution)) % facts.multiple:
        raise UserError(
            f"--resize bucket: at --resolution {resolution} sides are multiples of {step}, but a "
            f"base of {facts.label} takes those of {facts.multiple}: give --resolution "
            f"{8 * facts.multiple} or more, or --resize crop"
        )


def check_rules(
    model: ModelConfig,
    data: DataConfig,
    method: MethodConfig,
    safeguard: SafeguardConfig,
    optim: OptimConfig,
) -> None:
    """Refuse flags that contradict each other or have no meaning together.

    Raises:
        UserError: naming the flags and what would be right.
    """
    _check_steps(data, optim)
    _check_method(method, safeguard)
    if optim.train_batch_size % safeguard.losers_one_in:
        raise UserError(
            f"--train_batch_size must be a multiple of --losers_one_in {safeguard.losers_one_in}, "
            f"got {optim.train_batch_size}"
        )
    check_source(data)
    _check_cache(data)
    _check_optimizer(optim)
    _check_weights(model, data)
    if model.cache_reference is not None:
        _check_reference_cache(data, method)


def _check_steps(data: DataConfig, optim: OptimConfig) -> None:
    if data.streaming and optim.num_train_epochs is not None:
        raise UserError("--streaming does not know an epoch's length: give --max_train_steps")
    if data.streaming and data.dataloader_num_workers > 1:
        raise UserError("--streaming reads one stream: --dataloader_num_workers must be 0 or 1")
    if data.streaming and data.resize == "bucket":
        raise UserError(
            "--resize bucket orders pairs by the shapes of all their images, which a stream does "
            "not know ahead: leave --streaming out, or give --resize crop"
        )


def _check_method(method: MethodConfig, guard: SafeguardConfig) -> None:
    for name in ("time_mean", "time_std"):
        if method.time_sampling == "uniform" and getattr(method, name) is not None:
            raise UserError(f"--{name} has no meaning with --time_sampling uniform")
    if method.dspo_form and method.train_method != "dspo":
        raise UserError(f"--dspo_form has no meaning with --train_method {method.train_method}")
    fixed = guard.loser_scale_fixed is not None
    if fixed and guard.use_winner_preserving:
        raise UserError(
            "--loser_scale_fixed takes the place of the safeguard's scale: leave "
            "--use_winner_preserving out (--no-use_winner_preserving takes back a recipe's)"
        )
    if guard.winner_preserving_space == "parameter" and not guard.use_winner_preserving:
        raise UserError(
            "--winner_preserving_space parameter has no meaning without --use_winner_preserving"
        )
    if guard.losers_one_in > 1 and guard.over_parameters:
        raise UserError(
            "--losers_one_in saves what --winner_preserving_space parameter needs, the losers' "
            "backward pass: leave one of them out"
        )
    if method.train_method != "sft":
        return
    for given, name in (
        (guard.losers_one_in > 1, "losers_one_in"),
        (guard.use_winner_preserving, "use_winner_preserving"),
        (fixed, "loser_scale_fixed"),
    ):
        if given:
            raise UserError(f"--{name} has no meaning with --train_method sft: no losers")


def check_source(data: SourceConfig) -> None:
    """Refuse flags of the data that contradict each other.

    Raises:
        UserError: naming the flags and what would be right.
    """
    if data.dataset_name is None and data.train_data_dir is None:
        raise UserError("the data is missing: give --dataset_name or --train_data_dir")
    _check_columns(data.columns)
    if data.stream_shards == "own" and not data.streaming:
        raise UserError("--stream_shards own has no meaning without --streaming")
    if data.stream_shards == "own" and data.max_train_samples is not None:
        raise UserError("--stream_shards own does not go with --max_train_samples")
    if data.choice_model and data.streaming:
        raise UserError(
            "--choice_model labels a dataset ahead of training: it does not go with --streaming"
        )
    if data.choice_weights and not data.choice_model:
        raise UserError("--choice_weights has no meaning without --choice_model")


def _check_columns(columns: tuple[str, ...]) -> None:
    keys = ("caption", "image_0", "image_1", "label")
    seen = set()
    for item in columns:
        key, equals, value = item.partition("=")
        if key not in keys or not equals or not value or key in seen:
            raise UserError(
                f"--columns: {item!r} is none of {', '.join(f'{k}=COLUMN' for k in keys)}, each at "
                f"most once, e.g. {COLUMN_EXAMPLE}"
            )
        seen.add(key)
        if value.startswith("votes:") and len(list(filter(None, value[6:].split(",")))) != 2:
            raise UserError(f"--columns: {item!r} must name two columns: label=votes:A,B")


def _check_cache(data: DataConfig) -> None:
    if data.cache_dir_latents is None:
        if data.verify_cache:
            raise UserError(f"--verify_cache has no meaning without {CACHE_FLAG}")
        return
    if data.streaming:
        raise UserError(
            f"{CACHE_FLAG} keeps rows by their numbers, which a stream does not have: leave "
            "--streaming out"
        )
    if data.random_crop:
        raise UserError(
            f"{CACHE_FLAG} keeps one crop of each image, the centre: leave --random_crop out"
        )


def _check_optimizer(optim: OptimConfig) -> None:
    for given, name, what in (
        (optim.use_8bit_adam, "use_8bit_adam", "8-bit"),
        (optim.fused_optimizer, "fused_optimizer", "fused"),
    ):
        if given and optim.use_adafactor:
            raise UserError(
                f"--{name} is a {what} AdamW and --use_adafactor another optimizer: give one of "
                "them (--no-use_adafactor takes back a recipe's)"
            )
    if optim.use_8bit_adam and optim.fused_optimizer:
        raise UserError("--use_8bit_adam is always fused: leave --fused_optimizer out")


def _check_weights(model: ModelConfig, data: DataConfig) -> None:
    if model.offload_text_encoders and data.cache_dir_latents:
        raise UserError(
            f"--offload_text_encoders has no meaning with {CACHE_FLAG}: no text encoder is in "
            "memory while it trains"
        )
    if model.lora_rank and model.offload_reference:
        raise UserError(
            "--offload_reference has no meaning with --lora_rank: the reference is the trained "
            "UNet without its adapters and takes no memory of its own"
        )
    if model.lora_rank:
        return
    for name in (
        *("lora_alpha", "lora_init", "lora_target_modules", "lora_dropout", "use_dora"),
        "quantize_base",
    ):
        if getattr(model, name):
            raise UserError(f"--{name} has no meaning without --lora_rank: give that too")


def _check_reference_cache(data: DataConfig, method: MethodConfig) -> None:
    if needs_reference_output(method.train_method):
        raise UserError(
            f"{REFERENCE_FLAG} keeps the reference's errors, and the loss of --train_method "
            f"{method.train_method} takes its whole output: leave {REFERENCE_FLAG} out"
        )
    if data.streaming:
        raise UserError(
            f"{REFERENCE_FLAG} keeps errors by the places of pairs whose content is known ahead, "
            "which a stream's is not: leave --streaming out"
        )
