"""Tokenizers: of no more tokens than their text encoder takes, and CLIP's as it was published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.common.errors import UserError


def fit_tokenizer(tokenizer: Any, config: Any, where: str) -> None:
    """Limit a tokenizer, in place, to as many tokens as its text encoder takes.

    Args:
        config: of the text encoder.

    Raises:
        UserError: it has no vocabulary, or a larger one than the encoder; begins with `where`.
    """
    count = len(tokenizer)
    # Where it finds no vocabulary the library makes one of the special tokens, without a word.
    if count <= len(tokenizer.all_special_tokens):
        raise UserError(f"{where}: its tokenizer has no vocabulary (vocab.json and merges.txt)")
    config = config.get_text_config()
    if count > config.vocab_size:
        raise UserError(
            f"{where}: its tokenizer has {count} tokens, but its text encoder {config.vocab_size}"
        )
    # Files without model_max_length mean a number beyond any tensor.
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokenizer.model_max_length > most:
        tokenizer.model_max_length = most


def tokenize(tokenizer: Any, captions: list[str], device: torch.device) -> Tensor:
    """Tokenize captions, cleaned as CLIP's slow tokenizer does, to padded, truncated ids,
    (B, model_max_length)."""
    ids: Tensor = tokenizer(
        for_tokenizer(tokenizer, captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids.to(device)
