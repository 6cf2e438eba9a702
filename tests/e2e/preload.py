"""Imported once by the fork server: what a run imports, and nothing that starts threads."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import diffusers  # noqa: F401
import torch
import transformers  # noqa: F401
from diffusers import (  # noqa: F401
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler  # noqa: F401
from transformers import (  # noqa: F401
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import train  # noqa: F401

torch.set_num_threads(1)
