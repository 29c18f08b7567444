"""Texts in tokens, remembered from one start to the next where making them takes long."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from upge.cache import entry

#: Part of every key, beside the versions: the code that makes the tokens and writes the files.
CODE = tuple(Path(__file__).with_name(name) for name in ("tokens.py", "prompting.py"))
#: Characters of text from which on it is remembered: about half a second's work.
LEAST = 1_000_000
#: Texts that are made tokens at once; what a tokenizer returns is many times as large as what is kept of it.
CHUNK = 256

Make = Callable[[Sequence[str]], Sequence[Sequence[int]]]


def tokens_of(texts: Sequence[str], make: Make, tokenizer: Any, settings: Any) -> list[array]:
    """The token ids of each text, four bytes a token: as tuples, long ones by the ten thousand would take gigabytes.

    Args:
        texts: what becomes tokens.
        make: does it, for some of the texts; each by itself.
        tokenizer: what `make` uses.
        settings: whatever else its result depends on, by its `repr`.

    A file is found again only by the same texts, tokenizer and settings, so what comes back is what `make` would give.
    """
    key = _key(texts, tokenizer, settings) if sum(map(len, texts)) >= LEAST else None
    if key is None:
        return _made(texts, make)
    with entry("tokens", key) as kept:
        found = kept.read()
        if found is not None:
            return _unpacked(found, len(texts))
        rows = _made(texts, make)
        kept.write([array("i", map(len, rows)), *rows])
    return rows


def _made(texts: Sequence[str], make: Make) -> list[array]:
    rows: list[array] = []
    for start in range(0, len(texts), CHUNK):
        rows += [array("i", ids) for ids in make(texts[start : start + CHUNK])]
    return rows


def _unpacked(contents: memoryview, count: int) -> list[array]:
    """The rows behind their `count` lengths."""
    size = array("i").itemsize
    rows = []
    for begin, end in pairwise(accumulate(contents[: count * size].cast("i"), initial=count)):
        row = array("i")
        row.frombytes(contents[begin * size : end * size])
        rows.append(row)
    return rows


def _key(texts: Sequence[str], tokenizer: Any, settings: Any) -> str | None:
    """A hash of everything that decides on the result; None for a tokenizer that does not show all that it is made of.

    Not the tokenizer's files but what was made of them is hashed: vocabulary, merges, and all the rules. Whether the
    text of a special token is that token is no part of these.
    """
    backend, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer)
    if backend is None or not kind.__module__.startswith("transformers."):
        return None
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    split = getattr(tokenizer, "split_special_tokens", False)
    about = (sys.byteorder, array("i").itemsize, versions, kind.__qualname__, split, settings)
    digest = hashlib.blake2b(repr(about).encode(), digest_size=20)
    for file in CODE:
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    digest.update(hashlib.blake2b(backend.to_str().encode()).digest())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
