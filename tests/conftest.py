"""Fixtures of all tests: tiny random models, tiny pairs, flags with small defaults.

Nothing here needs a network or an accelerator; every path is a temporary one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# Before anything imports torch, datasets or the hub client; subprocesses inherit it all.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="sdpo-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")
os.environ["HF_HUB_CACHE"] = str(Path(_CACHE.name) / "hub")
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of tests marked `gpu`: SDPO_TEST_DEVICE, else this machine's accelerator; without
    either they are skipped."""
    if asked := os.environ.get("SDPO_TEST_DEVICE"):
        return torch.device(asked)
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator here; SDPO_TEST_DEVICE=cpu runs this on the CPU")
    return torch.accelerator.current_accelerator()


def _saved(tmp_path_factory, family: str) -> Path:
    from sdpo.tinyworld.architecture import build_pipeline, save_pipeline

    path = tmp_path_factory.mktemp("models") / family
    save_pipeline(build_pipeline(family, "micro"), path)
    return path


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory) -> Path:
    """A saved SD1.5 pipeline with micro random weights."""
    return _saved(tmp_path_factory, "sd15")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """A saved SDXL pipeline with micro random weights."""
    return _saved(tmp_path_factory, "sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    """A saved SD3 pipeline, without T5, with micro random weights."""
    return _saved(tmp_path_factory, "sd3")


@pytest.fixture(scope="session")
def tiny_v(tiny_sdxl, tmp_path_factory) -> Path:
    """A copy of the SDXL pipeline that says that it predicts v, with zero terminal SNR."""
    path = tmp_path_factory.mktemp("models") / "v"
    shutil.copytree(tiny_sdxl, path)
    file = path / "scheduler/scheduler_config.json"
    changes = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory) -> Path:
    """64 train pairs in two parquet files, 16 heldout pairs in one, some of them ties."""
    from sdpo.tinyworld.pairs import write_pairs

    path = tmp_path_factory.mktemp("pairs")
    write_pairs(path, 64, 16, seed=0, shards=2, tie_share=0.1)
    return path


@pytest.fixture(scope="session")
def double_unet():
    """A micro SD1.5 UNet in float64, its weights shaken so that no layer is at zero."""
    from sdpo.tinyworld.architecture import build_pipeline

    torch.manual_seed(0)
    unet = build_pipeline("sd15", "micro").unet.double().eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet


@pytest.fixture(scope="session")
def pairs(double_unet):
    """Three pairs at timesteps far apart, float64; a pair shares timestep, noise and caption."""
    from sdpo.models.forward import NoisedPairs

    g = torch.Generator().manual_seed(1)
    size = (3, double_unet.config.in_channels, 16, 16)
    noise = torch.randn(size, generator=g, dtype=torch.float64)
    images = torch.randn((2, *size), generator=g, dtype=torch.float64)
    hidden = torch.randn(
        (3, 5, double_unet.config.cross_attention_dim), generator=g, dtype=torch.float64
    )
    return NoisedPairs(
        noisy=torch.cat([noise + 0.5 * images[0], noise + 0.5 * images[1]]),
        timesteps=torch.tensor([30, 400, 900]).repeat(2),
        target=noise.repeat(2, 1, 1, 1),
        conditions={"hidden": hidden.repeat(2, 1, 1)},
    )


@pytest.fixture
def diffusers_finds_files(monkeypatch):
    """Lets `load_lora_weights` look for its file: diffusers 0.35 does not do so on this machine
    either while the hub is off."""
    from diffusers.loaders import lora_base

    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)


@pytest.fixture
def make_config(tiny_sd15, tiny_sdxl, pairs_dir, tmp_path):
    """`make_config(flag=value, ...)`: a checked `TrainConfig` with tiny defaults.

    None and False leave a flag out, True gives a switch, a list gives several values.
    """
    from e2e.harness import as_argv

    from sdpo.config import parse_train
    from sdpo.training.places import check_places

    def make(**overrides):
        flags = {
            "pretrained_model_name_or_path": tiny_sdxl if overrides.get("sdxl") else tiny_sd15,
            "train_data_dir": None if overrides.get("dataset_name") else pairs_dir,
            "output_dir": tmp_path / "run",
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": None if overrides.get("num_train_epochs") else 2,
            "lr_warmup_steps": 0,
            "report_to": "none",
            **overrides,
        }
        return check_places(parse_train(as_argv(flags)))

    return make
