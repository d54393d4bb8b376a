"""A text to learn small tokenizers from, and the files of a small tokenizer in GPT-2's form."""

import json
import random
from pathlib import Path

_RANDOM = random.Random(0)
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]
_WORDS = ["the", "cat", *("".join(_RANDOM.choices(_SYLLABLES, k=3)) for _ in range(98))]

# 300 lines of eight words: enough for several hundred pieces.
TEXT = "".join(" ".join(_RANDOM.choices(_WORDS, k=8)) + "\n" for _ in range(300))


def write_gpt2(folder: Path) -> None:
    """Writes vocab.json and merges.txt: 256 bytes, ``th``, ``the``, `` c`` and the end of text."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "c")]
    words = [*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
