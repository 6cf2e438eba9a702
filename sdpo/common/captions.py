"""Captions as CLIP's own tokenizer reads them, whatever version of transformers is installed.

The slow `CLIPTokenizer` of transformers 4, by which the published prompts were tokenised, mends a
text with ftfy (curly quotes, full-width characters, HTML entities, broken encodings) before it
takes it apart. The one of transformers 5 does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=2**16)
def mended(caption: str) -> str:
    """Mend a caption by ftfy; plain text stays as it is."""
    import ftfy

    return ftfy.fix_text(caption)


def cleaned(caption: str) -> str:
    """Clean a caption as the slow CLIPTokenizer does: ftfy, single spaces, lower case."""
    return " ".join(mended(caption).split()).lower()


def for_tokenizer(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Clean captions for a CLIP tokenizer, so that it gives the slow tokenizer's ids. Tokens that
    were added to its vocabulary are left as they are, and so is all where the tokenizer cleans."""
    if getattr(tokenizer, "fix_text", None) is not None:
        return list(captions)
    added = re.compile("(" + "|".join(map(re.escape, tokenizer.get_added_vocab())) + ")")
    return [
        # Odd pieces are added tokens.
        " ".join(
            piece if i % 2 else cleaned(piece) for i, piece in enumerate(added.split(caption))
        ).strip()
        for caption in captions
    ]
