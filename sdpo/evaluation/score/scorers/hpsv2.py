"""HPSv2 (Wu et al. 2023): cosine of image and text in a CLIP ViT-H/14 that was fine-tuned on human
choices of HPD v2, without the logit scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdpo.common.errors import UserError, first_line
from sdpo.evaluation.score.base import BaseScorer, check_size, cosine, frozen
from sdpo.evaluation.score.views import clip_pixels, whole_view
from sdpo.evaluation.score.weights import Part, Weights, load_exactly, read_tensors

if TYPE_CHECKING:
    from open_clip import CLIP

ARCHITECTURE = "ViT-H-14"
CONFIG_FILE = "open_clip_config.json"
TOKENS = 77


class Scorer(BaseScorer):
    """Larger is better; published models lie around 0.28."""

    label = "HPSv2"
    parts = {  # noqa: RUF012
        "model": Part(hub="xswu/HPSv2", file="HPS_v2_compressed.pt"),
    }

    @staticmethod
    def view(image: Image.Image) -> Tensor:
        """View the whole image, int16 (3, 224, 224)."""
        return whole_view(image)

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Load the weights; an open_clip_config.json beside a user's own tells which CLIP's.

        Raises:
            UserError: they are not to be had, or are not what they should be.
        """
        from open_clip import get_model_config

        path = weights.file("model")
        beside = path.with_name(CONFIG_FILE)
        given = "model" in weights.overrides and beside.is_file()
        config = _read_config(beside, weights.flag()) if given else get_model_config(ARCHITECTURE)
        held = read_tensors(path, weights.flag())
        where = f"{weights.flag()}={path}"
        state = self.state_of(held, where)
        self.model = frozen(build_clip(config, state, where), device)
        self.tokens_length = config["text_cfg"].get("context_length", TOKENS)
        self.device = device

    @staticmethod
    def state_of(held: Any, where: str) -> dict[str, Tensor]:
        """Find CLIP's weights in what the file holds.

        Raises:
            UserError: they are not where HPSv2's are.
        """
        if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict):
            raise UserError(f"{where} is not HPSv2's: no state_dict in it")
        return held["state_dict"]

    def tokens(self, prompts: list[str]) -> Tensor:
        """Tokenize B prompts to ids (B, 77); longer ones are cut."""
        from open_clip import tokenize

        return tokenize(prompts, self.tokens_length)

    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        seen = self.model.encode_image(clip_pixels(views))
        read = self.model.encode_text(self.tokens(prompts).to(self.device))
        return cosine(seen, read)


def build_clip(config: dict[str, Any], state: dict[str, Tensor], where: str) -> CLIP:
    """Build open_clip's CLIP from its configuration and its weights.

    Raises:
        UserError: the weights do not fit, or it is not a CLIP for images of 224 px; begins with
            `where`.
    """
    from open_clip import CLIP

    check_size(config.get("vision_cfg", {}).get("image_size"), where)
    try:
        # On meta no random weights are drawn; all of them come from the file.
        with torch.device("meta"):
            model = CLIP(**config)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{where}: {CONFIG_FILE} describes no CLIP: {first_line(error)}") from None
    load_exactly(model, state, where)
    if model.attn_mask is not None:
        # A constant that is not among the weights: tokens attend to themselves and those before.
        model.attn_mask = torch.full(model.attn_mask.shape, float("-inf")).triu(1)
    return model


def _read_config(path: Path, flag: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        config["vision_cfg"].keys()
        foreign = [name for name in config["text_cfg"] if name.startswith("hf_")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{flag}: {path} is not open_clip's: it needs a model_cfg with vision_cfg and text_cfg"
        ) from None
    if foreign:
        raise UserError(f"{flag}: {path} has {foreign[0]}; only CLIP's own text encoder is known")
    return config
