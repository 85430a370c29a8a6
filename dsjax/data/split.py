"""Tokens of punctuation with line breaks, split into their two parts at random (DeepSeek-V3, section 4.1).

A vocabulary that merges them ("):\\n") has the model meet the end of a line by itself too rarely: a prompt that ends
there is cut where its training never was. Decoding stays what it was.
"""

import hashlib
import re

import numpy as np

from dsjax.data.documents import uniforms
from dsjax.data.tokenizer import Tokenizer, byte_letters

# Signs, with the one space before them; line breaks, with the indentation behind them where the vocabulary has that.
_MERGED = re.compile(r"( ?(?:[^\s\w]|_)+)([\r\n]+[ \t]*)")


def split_table(tokenizer: Tokenizer) -> np.ndarray:
    """[V, 2] int32: the two tokens that a token stands for, -1 where it is none of these or a part is no token."""
    vocabulary = tokenizer.text.get_vocab()
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    letter_of = {byte: letter for letter, byte in byte_of.items()}
    table = np.full((tokenizer.vocab_size, 2), -1, np.int32)
    for token, id in vocabulary.items():
        if not all(letter in byte_of for letter in token):
            continue
        text = bytes(byte_of[letter] for letter in token).decode("utf-8", "replace")
        found = _MERGED.fullmatch(text)
        if found is None:
            continue
        parts = [vocabulary.get("".join(letter_of[b] for b in part.encode())) for part in found.groups()]
        if None not in parts and tokenizer.decode([id], False) == text == tokenizer.decode(parts, False):
            table[id] = parts
    return table


def split_tokens(ids: np.ndarray, table: np.ndarray, rate: float, seed: int, key: str) -> np.ndarray:
    """The ids [n] int32 of a document with each token of the table in two, with probability `rate`.

    A pure function of its arguments; `key` names the document.
    """
    ids = np.asarray(ids, np.int32)
    places = np.flatnonzero(table[ids, 0] >= 0)
    if not rate or not len(places):
        return ids
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    places = places[uniforms(len(places), seed, number) < rate]
    counts = np.ones(len(ids), np.int64)
    counts[places] = 2
    out = np.repeat(ids, counts)
    at = places + np.arange(len(places))  # each earlier split moves what follows by one
    out[at], out[at + 1] = table[ids[places]].T
    return out
