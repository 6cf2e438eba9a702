"""Tell models and data sets apart by what is in them, without loading a model or an image."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdpo.common.errors import UserError, first_line
from sdpo.common.files import file_sha256, hub_sha256
from sdpo.common.hub import look_for_hub
from sdpo.data.digest import images_on_disk
from sdpo.data.source import PairSource, arrow_column
from sdpo.models.base import BASE_FLAG, VAE_FLAG, Family, ModelSource

# What `from_pretrained` reads, in the order in which it looks for it.
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Taken where there are no others; an index may be called in two ways.
_FP16_WEIGHTS = (
    *(re.sub(r"\.(\w+)$", r".fp16.\1", name) for name in _WEIGHTS),
    *(name.replace(".index.", ".fp16.index.") for name in _WEIGHTS if ".index." in name),
)
_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)
# They change whenever a model is saved again, and say nothing about what it computes.
_BY_THE_WAY = {"transformers_version", "torch_dtype", "dtype", "architectures"}
HASHED_WHOLE = 2**30  # bytes of images
SAMPLED_ROWS = 64  # of larger data sets


@dataclass(frozen=True)
class _Folder:
    """Find the files of a model's folder, on this machine or on the hub (whose client downloads
    what is asked for)."""

    flag: str
    name: str
    subfolder: str = ""
    revision: str | None = None
    cache_dir: str | None = None

    def find(self, file: str) -> Path | None:
        """Find a file of that name; None where there is none."""
        local = Path(self.name)
        if local.is_dir():
            path = local / self.subfolder / file
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            look_for_hub()
            found = hf_hub_download(
                self.name,
                file,
                subfolder=self.subfolder or None,
                revision=self.revision,
                cache_dir=self.cache_dir,
            )
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise UserError(
                f"{self.flag}: cannot reach {self.name} ({first_line(error)})"
            ) from error
        return Path(found)

    def weights(self) -> list[Path]:
        """Find the files of weights that `from_pretrained` would read."""
        for name in (*_WEIGHTS, *_FP16_WEIGHTS):
            path = self.find(name)
            if path is not None and path.suffix == ".json":
                parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
                return [found for part in parts if (found := self.find(part))]
            if path is not None:
                return [path]
        raise UserError(
            f"{self.flag}: {self.name} has no weights in {self.subfolder or 'it'}; give a hub id "
            "or a local directory in diffusers layout"
        )

    def digest(self) -> str:
        """Hash config and weights."""
        config = self.find("config.json")
        about = _config_text(config) if config else ""
        return _joined([about, *map(_content_digest, self.weights())])

    def tokenizer_digest(self) -> str:
        """Hash a tokenizer's files."""
        paths = [(name, self.find(name)) for name in _TOKENIZER]
        return _joined([f"{name} {_content_digest(path)}" for name, path in paths if path])


def _joined(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _content_digest(path: Path) -> str:
    # Gigabytes of the hub need no reading.
    return hub_sha256(path) or file_sha256(path)


def _config_text(path: Path) -> str:
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _BY_THE_WAY}
    return json.dumps(kept, sort_keys=True)


def vae_digest(source: ModelSource) -> str:
    """Hash the VAE's config and weights, read from their files.

    Raises:
        UserError: they are not to be had.
    """
    if source.vae:
        return _Folder(VAE_FLAG, source.vae, cache_dir=source.cache_dir).digest()
    if source.weights:
        return _joined([file_sha256(Path(source.weights)), "vae"])
    return _base_folder(source, "vae").digest()


def text_digest(family: Family, source: ModelSource) -> str:
    """Hash the text encoders' configs and weights and the tokenizers' files.

    Raises:
        UserError: they are not to be had.
    """
    encoders = family.text_folders(source)
    tokenizers = [family.facts.text[folder].tokenizer for folder in encoders]
    if source.weights:
        digests = [file_sha256(Path(source.weights))]
    else:
        digests = [_base_folder(source, part).digest() for part in encoders]
    digests += [_base_folder(source, part).tokenizer_digest() for part in tokenizers]
    return _joined(digests)


def _base_folder(source: ModelSource, part: str) -> _Folder:
    return _Folder(BASE_FLAG, source.base, part, source.revision, source.cache_dir)


def dataset_digest(pairs: PairSource) -> str:
    """Hash the images of all rows of the dataset as it was given, whatever rows are trained on: the
    content of all up to `HASHED_WHOLE` bytes; beyond, the length of each, the time of change of
    those in files of their own, and the content of those of some rows. Labels and captions play no
    part."""
    given, base = pairs.given, pairs.base
    digest = hashlib.sha256(str(len(given)).encode())
    columns = (pairs.columns.image_0, pairs.columns.image_1)
    found = [images_on_disk(arrow_column(given, name), base) for name in columns]
    for sizes, _ in found:
        digest.update(sizes.tobytes())
    rows = len(given)
    if sum(int(sizes.clip(0).sum()) for sizes, _ in found) > HASHED_WHOLE:
        rows = min(rows, SAMPLED_ROWS)
        for _, times in found:
            digest.update(times.tobytes())
    for row in np.unique(np.linspace(0, len(given) - 1, rows).round().astype(int)):
        values = given[int(row)]
        for name in columns:
            digest.update(_image_content(values[name], base))
    return digest.hexdigest()


def _image_content(value: Any, base: Path | None) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        path = base / value if base else Path(value)
        value = path.read_bytes() if path.is_file() else None
    if isinstance(value, bytes | bytearray | memoryview):
        return hashlib.sha256(value).digest()
    return type(value).__name__.encode()
