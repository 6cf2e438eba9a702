"""Check a base by its configuration files, before weights or data are read, by pure functions.

What no family serves is refused here, so that nothing is trained under a schedule, a prediction
type or a normalisation that its base has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from sdpo.common.errors import UserError
from sdpo.config.families import FAMILIES, FamilyFacts

BASE_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--pretrained_vae_model_name_or_path"

Config = Mapping[str, Any]
# A path in a base's directory to what the JSON file holds; None where it is not to be had.
Reader = Callable[[str], Config | None]

SCHEDULER_FILE = "scheduler/scheduler_config.json"
# diffusers' samplers of a discrete schedule of betas, which is what is trained on.
DISCRETE = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
        *("DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete"),
        *("HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete"),
        *("PNDM", "SASolver", "TCD", "UniPCMultistep"),
    )
)
PREDICTIONS = ("epsilon", "v_prediction")
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
# By a VAE's class: the setting that counts its latents' channels, and diffusers' default of it.
_LATENTS = {
    "AutoencoderKL": ("latent_channels", 4),
    "AutoencoderKLQwenImage": ("z_dim", 16),
    "AutoencoderDC": ("latent_channels", 32),
    "AutoencoderKLFlux2": ("latent_channels", 32),
}
# What of a UNet must fit VAE and text encoders, with diffusers' defaults.
_FITTING = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}


def check_base(
    read: Reader, family: str, base: str, vae: Config | None = None, vae_where: str = ""
) -> None:
    """Check everything that training, evaluation and export need of a base.

    Args:
        read: gives the base's files.
        family: a name of `FAMILIES`.
        base: names it, for messages.
        vae: configuration of another VAE than the base's own; {} where it is not known yet.
        vae_where: names that, for messages.

    Raises:
        UserError: naming flag, file and value, and what would be right.
    """
    where, facts = f"{BASE_FLAG}: {base}", FAMILIES[family]

    def need(file: str) -> Config:
        if (config := read(file)) is None:
            raise UserError(
                f"{where} has no {file}, or it cannot be reached; a base needs all of a pipeline"
            )
        return config

    index = read("model_index.json") or {}
    denoiser = need(f"{facts.part}/config.json")
    if facts.part == "unet":
        check_unet(denoiser, f"{where}/unet/config.json")
    else:
        check_pipeline(index, facts, f"{where}/model_index.json")
        check_transformer(denoiser, facts, f"{where}/{facts.part}/config.json")
    (check_flow if facts.flow else check_schedule)(need(SCHEDULER_FILE), where)
    if vae is None:
        vae, vae_where = need("vae/config.json"), f"{where}/vae/config.json"
    if vae:
        check_vae(vae, denoiser, facts, vae_where)
    text = {part: need(f"{part}/config.json") for part in text_parts(family, index)}
    if facts.part == "unet":
        check_text(text, denoiser, where)


def text_parts(family: str, index: Config) -> list[str]:
    """Name the folders of a base's text encoders, without the optional ones that it has not.

    Args:
        index: its model_index.json, {} where there is none.
    """
    return [
        folder
        for folder, part in FAMILIES[family].text.items()
        if not part.optional or (index.get(folder) or [None])[0] is not None
    ]


def check_pipeline(index: Config, facts: FamilyFacts, where: str) -> None:
    """Refuse a pipeline of another task than text to image, or one that tells its model more; the
    model's class may be the same.

    Raises:
        UserError: beginning with `where`.
    """
    kind = index.get("_class_name", facts.pipeline)
    if kind not in (facts.pipeline, *facts.aliases):
        raise UserError(
            f"{where} is of a {kind}, which is of another task than text to image or of another "
            f"kind of model; a base of {facts.pipeline} is needed"
        )


def check_transformer(config: Config, facts: FamilyFacts, where: str) -> None:
    """Refuse a transformer that must be told more than its family tells.

    Raises:
        UserError: beginning with `where`.
    """
    for name in facts.untold:
        if config.get(name):
            raise UserError(
                f"{where}: {name} is {config[name]!r}, so the model must be told more than time "
                f"and caption, which {facts.label} is not; it must be false"
            )


def check_unet(config: Config, where: str) -> None:
    """Refuse a UNet of another class, or one that must be told more than its family tells.

    Raises:
        UserError: beginning with `where`.
    """
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise UserError(f"{where} is of a {kind}; a UNet2DConditionModel is needed")
    for name in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
        if config.get(name) is not None:
            raise UserError(
                f"{where}: {name} is {config[name]!r}, so the model must be told more than time "
                "and caption (a class, a noise level or a guidance); it must be null"
            )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise UserError(
            f"{where}: encoder_hid_dim_type {config['encoder_hid_dim_type']!r} takes images beside "
            "the caption; it must be null"
        )
    ins, outs = config.get("in_channels", 4), config.get("out_channels", 4)
    if ins != outs:
        raise UserError(
            f"{where}: {ins} in_channels and {outs} out_channels; both must be the VAE's (an "
            "inpainting or editing model takes more: give the text-to-image model)"
        )


def check_start(config: Config, base: Config, facts: FamilyFacts, where: str) -> None:
    """Refuse a denoiser to start from that does not fit the base's other parts.

    Raises:
        UserError: beginning with `where`.
    """
    if facts.part != "unet":
        check_transformer(config, facts, where)
        return
    check_unet(config, where)
    for name, default in _FITTING.items():
        found, wanted = config.get(name, default), base.get(name, default)
        if _plain(found) != _plain(wanted):
            raise UserError(f"{where}: {name} is {found}, but {wanted} in the base's UNet")


def check_vae(config: Config, denoiser: Config, facts: FamilyFacts, where: str) -> None:
    """Refuse a VAE of another class, of other latents than the denoiser takes, or that scales them
    in a way that the family does not.

    Raises:
        UserError: beginning with `where`.
    """
    kind = config.get("_class_name", facts.vae_model)
    if kind != facts.vae_model:
        raise UserError(f"{where} is of a {kind}; an {facts.vae_model} is needed")
    name, default = _LATENTS[kind]
    patch = 4 if facts.packed else 1
    channels = config.get(name, default)
    if channels != (taken := denoiser.get("in_channels", patch * default) // patch):
        raise UserError(
            f"{where}: {channels} {name}, but the {facts.kind} takes {taken}; give the VAE that it "
            "was trained with"
        )
    if kind not in ("AutoencoderKL", "AutoencoderDC"):
        return
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise UserError(
                f"{where}: {name} normalises every channel of the latents on its own (as "
                "Playground v2.5's VAE does), which is not supported; give a base with a "
                "scaling_factor alone"
            )
    if (colours := config.get("in_channels", 3)) != 3 or config.get("out_channels", 3) != 3:
        raise UserError(f"{where}: takes images of {colours} channels; 3 are needed")
    scale = config.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not scale > 0:
        raise UserError(f"{where}: scaling_factor is {scale!r}; it must be a number above 0")
    shift = config.get("shift_factor")
    if facts.flow and kind == "AutoencoderKL" and not isinstance(shift, int | float):
        raise UserError(
            f"{where}: shift_factor is {shift!r}; {facts.label}'s pipeline needs a number (0: none)"
        )


def check_schedule(config: Config, where: str) -> None:
    """Refuse a scheduler of which no discrete schedule of a UNet can be made.

    Raises:
        UserError: beginning with `where`, which names the base.
    """
    base, where = where, f"{where}/{SCHEDULER_FILE}"
    kind = config.get("_class_name")
    if kind not in DISCRETE:
        name = kind or "a scheduler without _class_name"
        raise UserError(
            f"{where}: {name} has no discrete schedule of betas that training knows (EDM, flow "
            "matching and the like are others); give a base with a DDPM schedule, e.g. of an "
            "EulerDiscreteScheduler or DDIMScheduler"
        )
    if kind == "DPMSolverSDEScheduler" and find_spec("torchsde") is None:
        raise UserError(f"{where}: {kind} needs the package torchsde: pip install torchsde")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(
            f"{base} predicts {prediction}; the losses are defined for UNets that predict noise "
            "(epsilon) or velocity (v_prediction)"
        )
    if config.get("use_flow_sigmas") or config.get("timestep_type", "discrete") != "discrete":
        name = "use_flow_sigmas" if config.get("use_flow_sigmas") else "timestep_type"
        raise UserError(
            f"{where}: {name} is {config[name]!r}, so times are not those of a DDPM schedule; give "
            "a base that was trained with one"
        )
    _check_betas(config, where)


def check_flow(config: Config, where: str) -> None:
    """Refuse a scheduler that is not one of rectified flow, or without the numbers of its shift.

    Raises:
        UserError: beginning with `where`, which names the base.
    """
    where = f"{where}/{SCHEDULER_FILE}"
    kind = config.get("_class_name")
    solver = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    if not (solver or str(kind).startswith("FlowMatch")):
        raise UserError(
            f"{where}: {kind or 'a scheduler without _class_name'} has no rectified flow; give a "
            "base with the one that it was trained with, e.g. a FlowMatchEulerDiscreteScheduler"
        )
    if config.get("invert_sigmas"):
        raise UserError(f"{where}: invert_sigmas turns the path around, which is not supported")
    names = ["flow_shift"] if solver else ["shift"]
    if config.get("use_dynamic_shifting"):
        names = ["base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"]
    for name in names:
        value = config.get(name, 1.0 if len(names) == 1 else None)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{where}: {name} is {value!r}; it must be a number above 0")
    if len(names) > 1 and config["base_image_seq_len"] == config["max_image_seq_len"]:
        raise UserError(f"{where}: base_image_seq_len and max_image_seq_len must differ")


def _check_betas(config: Config, where: str) -> None:
    count, own = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{where}: num_train_timesteps is {count!r}; it must be at least 1")
    if own is not None:
        number = isinstance(own, list) and all(isinstance(b, int | float) for b in own)
        if not number or len(own) != count or not all(0 < b <= 1 for b in own):
            raise UserError(
                f"{where}: trained_betas must be null or num_train_timesteps ({count}) numbers "
                "above 0 and at most 1"
            )
        return
    start, end = config.get("beta_start"), config.get("beta_end")
    for name, value in (("beta_start", start), ("beta_end", end)):
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise UserError(f"{where}: {name} is {value!r}; it must be a number between 0 and 1")
    if config.get("beta_schedule") not in _SCHEDULES:
        raise UserError(
            f"{where}: beta_schedule is {config.get('beta_schedule')!r}; known are "
            f"{', '.join(_SCHEDULES)}"
        )


def check_text(encoders: Mapping[str, Config], unet: Config, where: str) -> None:
    """Refuse text encoders of another kind than CLIP's, or of other widths than the UNet takes.

    Args:
        encoders: folder to configuration, in the order in which their outputs are joined.

    Raises:
        UserError: beginning with `where`.
    """
    widths, pooled = [], 0
    for part, config in encoders.items():
        kind = config.get("model_type", "clip_text_model")
        if kind not in ("clip_text_model", "clip"):
            raise UserError(f"{where}/{part}/config.json is of a {kind}; CLIP's is needed")
        text = config.get("text_config") or config if kind == "clip" else config
        widths.append(text.get("hidden_size", 512))
        pooled = config.get("projection_dim", 512)
    wanted = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    if any(width != sum(widths) for width in _flat(wanted)):
        what = " + ".join(f"{part} {width}" for part, width in zip(encoders, widths, strict=True))
        raise UserError(
            f"{where}/unet/config.json: cross_attention_dim {wanted}, but the hidden_size of the "
            f"text encoders is {what}"
        )
    if unet.get("addition_embed_type") == "text_time":
        told, each = unet.get("projection_class_embeddings_input_dim"), "addition_time_embed_dim"
        if told != pooled + 6 * (unet.get(each) or 0):
            raise UserError(
                f"{where}/unet/config.json: projection_class_embeddings_input_dim {told} is not "
                f"text_encoder_2's projection_dim {pooled} + 6 times {each} {unet.get(each)}; "
                "models that are told other than six sizes (SDXL's refiner) are not supported"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flat(value: Any) -> list[Any]:
    return (
        [v for part in value for v in _flat(part)] if isinstance(value, list | tuple) else [value]
    )
