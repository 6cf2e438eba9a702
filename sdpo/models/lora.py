"""Low-rank adapters: W x becomes W x + (alpha / rank) B A x with B zero at the start, and A and B
alone are trained (Hu et al., LoRA, ICLR 2022).

With --use_dora the sum V = W + (alpha / rank) B A is rescaled row by row to a trained length m, to
m V / |V| (Liu et al., DoRA, ICML 2024); m starts as |W|.

The reference is the same UNet with its adapters off, so that a run holds one UNet; with --lora_init
with the adapters as they started.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError
from sdpo.common.precision import hold_frozen_products
from sdpo.common.randomness import Key, generator
from sdpo.models.loading import read_state_dict
from sdpo.models.lora_file import Layer, added, facts_of, read_lora
from sdpo.models.quantized import QuantizedLinear, quantize_linear_layers

if TYPE_CHECKING:
    from sdpo.config import ModelConfig

# diffusers' own name, which `load_lora_weights` looks for in a directory.
LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"
_START = "start"  # what --lora_init holds, kept for the reference
# Fields that diffusers 0.35 looks for in a file's metadata, whatever their value.
_ALWAYS_NAMED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def add_adapters(
    unet: Any, config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Freeze `unet`, hold it in `dtype`, give it float32 adapters and move it, all in place.

    The adapters' first values are a function of --seed alone. A UNet that comes on the CPU never
    takes more memory on the device than it does in `dtype`.

    Raises:
        UserError: a name of --lora_target_modules is that of no linear layer or convolution, or
            the file of --lora_init is of other layers, rank or alpha.
    """
    from peft import LoraConfig

    rank, targets = config.lora_rank, config.lora_target_modules
    alpha: Any = config.lora_alpha
    assert rank and alpha and targets
    _check_targets(unet, targets, config.use_dora)
    unet.requires_grad_(False)
    start = _read_start(unet, config)
    lora = LoraConfig(
        r=rank,
        rank_pattern={n: layer.rank for n, layer in start.items() if layer.rank != rank},
        alpha_pattern={
            n: _number(layer.alpha) for n, layer in start.items() if layer.alpha != alpha
        },
        lora_alpha=_number(alpha),
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        use_dora=config.use_dora,
    )
    unet.add_adapter(lora, adapter_name=_ADAPTER)
    rng = generator(seed, "lora")
    for layer in adapter_layers(unet):
        down = layer.lora_A[_ADAPTER].weight
        # Kaiming's uniform bound at slope sqrt(5), peft's choice, is 1 / sqrt(inputs of a row).
        bound = 1 / math.sqrt(down[0].numel())
        with torch.no_grad():
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=rng))
    if config.quantize_base:
        quantize_linear_layers(unet, config.quantize_base, dtype, device)
    hold_frozen_products(unet, dtype)
    if start:
        _start_from(unet, start, lora)
    unet.to(device)
    for layer in adapter_layers(unet):
        if config.use_dora and not start:
            _start_at_own_length(layer)
        else:
            # Autocast casts what needs it. peft would widen each input to the adapter's float32
            # first, and the copy that goes back to half precision is kept for the backward pass.
            layer.cast_input_dtype_enabled = dtype == torch.float32


def _number(alpha: float) -> Any:
    """As an integer where it is one: that is how other programs write it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _check_targets(unet: nn.Module, names: Sequence[str], dora: bool) -> None:
    kinds = (nn.Linear, nn.Conv2d)
    found = {name: module for name, module in unet.named_modules() if isinstance(module, kinds)}
    for name in names:
        matches = [full for full in found if f".{full}".endswith(f".{name}")]
        if not matches:
            raise UserError(
                "--lora_target_modules: no linear layer or convolution of the UNet is called "
                f"{name}; give the end of a name, such as to_q or ff.net.2"
            )
        # peft takes a convolution's lengths in half precision, which is too coarse for them.
        wide = [full for full in matches if dora and isinstance(found[full], nn.Conv2d)]
        if wide:
            raise UserError(
                f"--use_dora adapts linear layers only, and {wide[0]} (--lora_target_modules "
                f"{name}) is a convolution; leave one of the two out"
            )


def _read_start(unet: nn.Module, config: ModelConfig) -> dict[str, Layer]:
    """Read --lora_init, checked against the flags of the adapters; {} without it."""
    if config.lora_init is None:
        return {}
    layers = read_lora(Path(config.lora_init), unet, "--lora_init")
    where, names = f"--lora_init {config.lora_init}", config.lora_target_modules or ()
    adapted = {
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(f".{name}".endswith(f".{target}") for target in names)
    }
    # The flags are those of the largest layer; others that differ keep their own.
    largest = max(layers, key=lambda name: layers[name].rank)
    rank, alpha = layers[largest].rank, layers[largest].alpha
    if rank != config.lora_rank:
        raise UserError(f"{where} has rank {rank} at {largest}: give --lora_rank {rank}")
    if alpha != config.lora_alpha:
        raise UserError(f"{where} has alpha {alpha:g} at {largest}: give --lora_alpha {alpha:g}")
    for layer in layers.values():
        if (layer.magnitude is not None) != config.use_dora:
            holds = "" if layer.magnitude is not None else "no "
            advice = "add" if layer.magnitude is not None else "leave out"
            raise UserError(f"{where} has {holds}lengths of DoRA: {advice} --use_dora")
    if adapted != layers.keys():
        odd = min(adapted ^ layers.keys())
        raise UserError(
            f"{where} adapts {len(layers)} layers and --lora_target_modules {len(adapted)} ({odd} "
            f"is not in both): give --lora_target_modules {' '.join(_targets(unet, layers))}"
        )
    return layers


def _targets(unet: nn.Module, layers: dict[str, Layer]) -> list[str]:
    """The shortest ends of names that tell `layers` from all others."""
    kinds = (nn.Linear, nn.Conv2d)
    others = [n for n, m in unet.named_modules() if isinstance(m, kinds) and n not in layers]
    ends = set()
    for name in layers:
        parts = name.split(".")
        starts = [i for i, part in enumerate(parts) if not part.isdigit()]
        every = [".".join(parts[i:]) for i in reversed(starts)]
        ends.add(next(e for e in every if not any(f".{o}".endswith(f".{e}") for o in others)))
    # An end that ends in another one is said already.
    return sorted(e for e in ends if not any(e.endswith(f".{o}") for o in ends))


@torch.no_grad()
def _start_from(unet: Any, start: dict[str, Layer], lora: Any) -> None:
    # The reference's own copy, float32 as the trained one, and never trained.
    with warnings.catch_warnings():
        # Two adapters are meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(copy.copy(lora), adapter_name=_START)
    unet.set_adapter(_ADAPTER)
    for name, layer in start.items():
        module = unet.get_submodule(name)
        for adapter in (_ADAPTER, _START):
            trained = adapter == _ADAPTER
            parts = [module.lora_A[adapter], module.lora_B[adapter]]
            values = [layer.down, layer.up]
            if layer.magnitude is not None:
                parts.append(module.lora_magnitude_vector[adapter])
                values.append(layer.magnitude)
            for part, value in zip(parts, values, strict=True):
                part.weight.copy_(value.reshape(part.weight.shape))
                part.weight.requires_grad_(trained)


@torch.no_grad()
def _start_at_own_length(layer: Any) -> None:
    # They were taken before the weights were rounded. By peft's own function, on the run's device,
    # so that the first forward pass divides equal numbers.
    dora = layer.lora_magnitude_vector[_ADAPTER]
    weight = layer.get_base_layer().weight.float()
    length = dora.get_weight_norm(weight, torch.zeros_like(weight), 1.0)
    dora.weight.copy_(length.reshape(dora.weight.shape))


def has_adapters(unet: nn.Module) -> bool:
    """Say whether `add_adapters` was called on it."""
    return bool(getattr(unet, "peft_config", None))


def adapter_layers(unet: nn.Module) -> list[Any]:
    """List the layers that adapters were put around."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


class AdaptersOff:
    """A UNet as it is without its adapters, or with those of --lora_init, called like a UNet; it
    holds no weights of its own."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.layers = adapter_layers(unet)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the UNet's forward pass, in evaluation mode as any reference's."""
        training = self.unet.training
        self._switch(off=True)
        self.unet.eval()
        try:
            return self.unet(*args, **kwargs)
        finally:
            self._switch(off=False)
            self.unet.train(training)

    def _switch(self, off: bool) -> None:
        # peft's own switch also takes the adapters' requires_grad, which DDP and FSDP have read
        # once and for all, off and on again.
        for layer in self.layers:
            if _START in layer.lora_A:
                layer._active_adapter = [_START if off else _ADAPTER]
            else:
                layer._disable_adapters = off


def seed_dropout(keys: Sequence[Key]) -> None:
    """Make --lora_dropout a function of the micro-batch, so that a resumed run draws the same."""
    torch.manual_seed(generator(*keys[0], "dropout").initial_seed())


@torch.no_grad()
def merged_state(unet: nn.Module, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Compute a plain UNet's state dict, on the CPU, the adapters added into its weights.

    Args:
        unet: with adapters.
        base: the plain weights to compute them into, float32, where `unet` holds rounded ones; its
            adapted entries are replaced, and quantised ones by what they are in `unet`. Default:
            the UNet's own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if base is None:
        base = {
            name.replace(".base_layer.", "."): value.detach().cpu()
            for name, value in unet.state_dict().items()
            if ".lora_" not in name
        }
    for name, module in unet.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = module.weight_in(torch.float32).cpu()
            base[f"{name.removesuffix('.base_layer')}.weight"] = weight
    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            base[f"{name}.weight"] = _merged_weight(module, base[f"{name}.weight"])
    return base


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    down = layer.lora_A[_ADAPTER].weight.detach().cpu()
    up = layer.lora_B[_ADAPTER].weight.detach().cpu()
    dora = layer.lora_magnitude_vector
    length = dora[_ADAPTER].weight.detach().cpu() if _ADAPTER in dora else None
    return added(weight, down, up, layer.scaling[_ADAPTER], length)


def save_adapters(unet: Any, path: Path) -> None:
    """Write the adapters in diffusers' LoRA layout: `pipeline.load_lora_weights` takes the file, or
    its directory where it is called `LORA_FILE`."""
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    facts = facts_of(unet)
    state = get_peft_model_state_dict(unet, adapter_name=_ADAPTER)
    # What is as peft has it is left out: an older peft refuses fields that it does not know.
    plain, used = LoraConfig().to_dict(), unet.peft_config[_ADAPTER].to_dict()
    settings = {
        name: value for name, value in used.items() if name in _ALWAYS_NAMED or value != plain[name]
    }
    settings["target_modules"] = sorted(settings["target_modules"])
    layers = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    getattr(diffusers, facts.pipeline).save_lora_weights(
        path.parent,
        weight_name=path.name,
        **{f"{facts.part}_lora_layers": layers, f"{facts.part}_lora_adapter_metadata": settings},
    )


def load_adapters(unet: nn.Module, path: Path) -> None:
    """Read into the adapters of `unet`, in place, what `save_adapters` wrote.

    Raises:
        UserError: unreadable, or of other layers, ranks or kind.
    """
    from peft import get_peft_model_state_dict

    prefix = f"{facts_of(unet).part}."
    state = {name.removeprefix(prefix): value for name, value in read_state_dict(path).items()}
    own = get_peft_model_state_dict(unet, adapter_name=_ADAPTER)
    shapes = [{k: v.shape for k, v in tensors.items()} for tensors in (state, own)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{path} does not fit this run's adapters: are rank and targets the same?")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
