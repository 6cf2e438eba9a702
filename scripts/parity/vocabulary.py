"""A WordPiece vocabulary with BERT's own size and special tokens, its words made up here.

BERT's is not shipped: what is compared is how text is cut up, and any vocabulary shows that.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path

SIZE = 30522
_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
_WORDS = (
    "a an the of in on at with and or to by for from over under into near two three four many "
    "photo painting portrait drawing render sketch picture image anime style art concept detailed "
    "highly digital oil watercolor cinematic light lighting dark soft sharp focus background white "
    "black gray red green blue yellow purple cyan brown golden circle square triangle above below "
    "left right top bottom center man woman girl boy child cat dog horse bird fish dragon robot "
    "astronaut castle city street house mountain river lake forest tree flower garden sky cloud "
    "moon sun star night day winter summer snow rain fire water ocean ship car train bridge riding "
    "sitting standing walking flying holding wearing hat dress armor sword book coffee cup table "
    "chair window door don t s it is are was very beautiful trending studio artstation unreal "
    "engine cafe naive resume uber"
)
_PIECES = "s ed ing er est ly y es ion al ic ous ful ness less ment able en th tion ity"
_LETTERS = string.ascii_lowercase + string.digits
_OTHER = "éèüößñçøåæ°£€¥§…–—‘’“”•αβγδεπσωабвгдежий的一人大中国日本山水火ひらがなカタのアひはᄀᄂ가"


def vocabulary() -> list[str]:
    """List SIZE different tokens; the place of a token is its id."""
    singles = [*string.punctuation, *_LETTERS, *_OTHER]
    tokens = dict.fromkeys(_WORDS.split() + singles)
    tokens |= dict.fromkeys("##" + piece for piece in [*_PIECES.split(), *_LETTERS, *_OTHER])
    # Syllables fill it up: most invented words then are cut into a few pieces.
    for letters in itertools.product("bcdfghjklmnprstvwz", "aeiou", "bcdfghjklmnprstvwz"):
        tokens |= dict.fromkeys(("".join(letters), "##" + "".join(letters)))
    for three in itertools.product(string.ascii_lowercase, repeat=3):
        tokens |= dict.fromkeys(("".join(three), "##" + "".join(three)))
    ordinary = iter(tokens)
    found = []
    for number in range(SIZE):
        if number in _SPECIAL:
            found.append(_SPECIAL[number])
        elif number < 100:
            found.append(f"[unused{number}]")
        else:
            found.append(next(ordinary))
    return found


def write_vocabulary(directory: Path) -> Path:
    """Write a directory that `BertTokenizer.from_pretrained` takes."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "\n".join(vocabulary()) + "\n"
    (directory / "vocab.txt").write_text(text, encoding="utf-8", newline="\n")
    return directory
