"""Captions get the ids of the slow CLIPTokenizer of transformers 4, by which the published prompts
were tokenised; it is written a second time here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import ftfy
import open_clip
import pytest
import regex
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from scripts.parity.small_scorers import write_clip_tokenizer
from sdpo.common.captions import cleaned, for_tokenizer, mended
from sdpo.data.latents.store import caption_digest
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.text import tokenize

PUBLISHED = Path(__file__).resolve().parents[3] / "shared/prompts"
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
GECKO = (
    "Portrait of a gecko wearing a train conductor’s hat and holding a flag that has a yin-yang "
)
GECKO += "symbol on it. "
# The beginnings of the 17 published prompts that a tokenizer without ftfy reads otherwise.
OTHERWISE = [
    *("architect，zaha，realistic", "beautiful summer landscape, an ultrafine detailed painting"),
    *("A cartoon bird holding a sign saying; “what’s good?”", "A woman’s wrist with a thin"),
    *(
        "A realistic photograph:0.8 of Malcolm Turnbull:0.9",
        "a store front that has the word ‘open",
    ),
    *("a corgi’s head depicted as an explosion of a nebula", "a corgi’s head"),
    *(GECKO + "Charcoal.", GECKO + "Child's crayon drawing.", GECKO + "Chinese ink."),
    *(GECKO + "Comic.", GECKO + "Marble statue.", GECKO + "Oil on canvas.", GECKO + "Photograph."),
    *(GECKO + "Watercolor.", GECKO + "Woodcut."),
]
# sha256 of the ids of all 5319, as JSON.
RECORDED = "18b08d452580981a2eb542b395d9983f5e50244f0ea357e4eec87b6ef5d24047"


class SlowTokenizer:
    """The slow tokenizer over a vocabulary and merges in CLIP's files."""

    def __init__(self, directory):
        self.ids = json.loads((directory / "vocab.json").read_text())
        lines = (directory / "merges.txt").read_text().splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        bytes_ = sorted(ByteLevel.alphabet(), key=ord)
        # GPT-2's table: printable bytes are themselves, the others follow from 256 on.
        own = [c for c in bytes_ if ord(c) < 256]
        rest = iter(c for c in bytes_ if ord(c) >= 256)
        self.symbols = [chr(b) if chr(b) in own else next(rest) for b in range(256)]

    def __call__(self, text):
        text = regex.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()
        pieces = [p for word in WORDS.findall(text) for p in self.merged(word)]
        return [self.ids[p] for p in ("<|startoftext|>", *pieces, "<|endoftext|>")]

    def merged(self, word):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [word]
        pieces = [self.symbols[b] for b in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, float("inf")))
            if best not in self.ranks:
                break
            i = pairs.index(best)
            pieces[i : i + 2] = ["".join(best)]
        return pieces


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """CLIP's own vocabulary."""
    path = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return CLIPTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def slow(directory):
    return SlowTokenizer(directory)


def ids(tokenizer, captions):
    return tokenizer(for_tokenizer(tokenizer, captions)).input_ids


KINDS = [
    *(
        "a red circle",
        "",
        "  A  RED\tCircle\n",
        "don't",
        "“it’s”",
        "ﬁne ligature",
        "ＦＵＬＬ　ｗｉｄｔｈ",
    ),
    *("cats &amp; dogs", "&lt;b&gt; AT&amp;T", "<b>&amp;</b>", "voilÃ  le cafÃ©", "ÎŸÎ”ÎŸÎ£"),
    *(
        "ΟΔΟΣ",
        "İstanbul",
        "e\u0301te\u0301",
        "한글 漢字 かな",
        "🎨 art\u200d🎨",
        "a\x00b\x1bc",
        "½ ² ٣",
    ),
    *(
        "a\u2028b\x85c\r\nd",
        "\ud83d",
        "no\xa0break",
        "\ufeffmark",
        "l'été '80s",
        "don’t ’ll",
        "x…y—z",
    ),
    *("[31mred[0m", "\u0645\u064e", "soft\u00adhyphen", "!!!'s", "<|EndOfText|> x"),
]


@pytest.mark.parametrize("caption", KINDS)
def test_ids_are_the_slow_tokenizers(caption, tokenizer, slow):
    assert ids(tokenizer, [caption]) == [slow(caption)]


def test_every_prompt_of_the_suites_has_the_slow_tokenizers_ids(tokenizer, slow):
    names = ("papv2", "hpsv2", "partiprompts")
    if not all((PUBLISHED / f"{name}.json").is_file() for name in names):
        pytest.skip("the published suites are not here")
    prompts = [
        row["prompt"]
        for name in names
        for row in json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    ]
    assert len(prompts) == 5319
    found, plain = ids(tokenizer, prompts), tokenizer(prompts).input_ids
    assert found == [slow(prompt) for prompt in prompts]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == RECORDED
    for ids_, theirs in zip(found, open_clip.tokenize(prompts).tolist(), strict=True):
        assert theirs[: min(len(ids_), 77) - 1] == ids_[: min(len(ids_), 77) - 1]
    changed = [p for p, a, b in zip(prompts, found, plain, strict=True) if a != b]
    if getattr(tokenizer, "fix_text", None) is None:
        assert len(changed) == len(OTHERWISE) == 17
        assert all(any(p.startswith(begin) for p in changed) for begin in OTHERWISE)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("architect，zaha，realistic", "architect,zaha,realistic"),
        ("a corgi’s head", "a corgi's head"),
        ("A sign saying; “what’s good?”", 'a sign saying; "what\'s good?"'),
        ("the word ‘openai’", "the word 'openai'"),
    ],
)
def test_curly_quotes_and_full_width_commas(prompt, read, tokenizer):
    assert cleaned(prompt) == read
    assert ids(tokenizer, [prompt]) == tokenizer([read]).input_ids


def test_plain_captions_are_read_as_they_were(tokenizer):
    plain = ["A Red circle, at the center", "3 dogs' dinner!!", "", "x" * 300, "50% <3 #1 & more"]
    assert ids(tokenizer, plain) == tokenizer(plain).input_ids
    assert [mended(caption) for caption in plain] == plain


def test_added_tokens_are_left_as_they_are(directory):
    tokenizer = CLIPTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<My-Token>"])
    added = tokenizer.convert_tokens_to_ids("<My-Token>")
    (found,) = ids(tokenizer, ["A “red” <My-Token>circle"])
    assert added in found
    (without,) = ids(tokenizer, ['a "red" circle'])
    assert [i for i in found if i != added] == without


def test_a_tokenizer_that_cleans_is_given_the_captions():
    own = SimpleNamespace(fix_text=ftfy.fix_text)
    assert for_tokenizer(own, ["“A”"]) == ["“A”"]


def test_training_scoring_and_sampling_clean(tiny_sd15):
    family, source = get_family("sd15"), ModelSource(str(tiny_sd15))
    frozen = family.load_frozen(source)
    curly, straight = "A “red” circle，left", 'a "red" circle,left'
    rows = tokenize(frozen.tokenizers[0], [curly, straight], torch.device("cpu"))
    assert torch.equal(rows[0], rows[1])
    want = SlowTokenizer(tiny_sd15 / "tokenizer")(curly)
    assert rows[0].tolist() == want + want[-1:] * (24 - len(want))

    from sdpo.evaluation.generate.protocols import Diffusers, Sampling
    from sdpo.training.samples import sample

    unet = family.load_unet(source)
    pipeline = family.pipeline(unet, frozen, source)
    one, other = (sample(family, pipeline, [p], 0, 32, steps=2)[0] for p in (curly, straight))
    assert one.tobytes() == other.tobytes()
    sampling = Sampling(2, 7.5, 0, 32, torch.float32)
    protocol = Diffusers(family, unet, frozen, source, sampling, torch.device("cpu"))
    one, other = (protocol([p], [0])[0] for p in (curly, straight))
    assert one.tobytes() == other.tobytes()


def test_a_cache_files_a_mended_caption_apart_from_what_it_was():
    def before(caption):
        return hashlib.blake2b(caption.encode(), digest_size=16).hexdigest()

    for caption in ("", "A Red circle", "Ünïcode"):
        assert caption_digest(caption) == before(caption)
    assert caption_digest("“A”") == before('"A"')


def test_ftfy_is_imported_when_a_caption_comes():
    code = "import sys, sdpo.common.captions; sys.exit('ftfy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
