"""Names of a CLIP text encoder's weights that every version of transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

PREFIX = "text_model."


def name_for_all_versions(pipeline: Path) -> None:
    """Put back the prefix `text_model.` where transformers 5 left it out of a saved pipeline.

    Published checkpoints have it. Version 5 reads both; version 4 finds no weight without it and
    goes on with random ones.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in sorted(pipeline.glob("text_encoder*/*.safetensors")):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        if not config.get("model_type", "").startswith("clip"):
            continue
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
        if any(name.startswith(PREFIX) for name in names):
            continue
        state = load_file(path)
        bare = {n for n in names if n.startswith(("embeddings.", "encoder.", "final_layer_norm."))}
        renamed = {PREFIX + name if name in bare else name: state[name] for name in names}
        save_file(renamed, path, metadata=metadata)
