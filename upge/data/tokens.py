"""Tokenizes texts, with a cache on disk for large amounts."""

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

#: The code that makes the tokens and writes the files; its contents are part of every key.
CODE = tuple(Path(__file__).with_name(name) for name in ("tokens.py", "prompting.py"))
#: Smallest number of characters that is cached: about half a second of work.
LEAST = 1_000_000
#: Texts per call of the tokenizer, whose output takes many times the memory of the token ids alone.
CHUNK = 256

Make = Callable[[Sequence[str]], Sequence[Sequence[int]]]
Tokenizer = Any  # a tokenizer of transformers, whose class and special tokens are known only at run time


def tokens_of(texts: Sequence[str], make: Make, tokenizer: Tokenizer, settings: tuple[object, ...]) -> list[array[int]]:
    """The token ids of each text in four bytes per token; as tuples, tens of thousands of them would take gigabytes.

    They are read from the cache only for equal texts, tokenizer and settings, so they always equal those of `make`.

    Args:
        texts: to tokenize.
        make: tokenizes some of the texts with `tokenizer`, each independently of the others.
        tokenizer: of `make`.
        settings: everything else that the result depends on; its `repr` is part of the key.
    """
    key = _key(texts, tokenizer, settings) if sum(map(len, texts)) >= LEAST else None
    if key is None:
        return _made(texts, make)
    with entry("tokens", key) as cached:
        contents = cached.read()
        if contents is not None:
            return _unpacked(contents, len(texts))
        rows = _made(texts, make)
        cached.write(memoryview(row) for row in (array("i", map(len, rows)), *rows))
    return rows


def _made(texts: Sequence[str], make: Make) -> list[array[int]]:
    chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    return [array("i", ids) for chunk in chunks for ids in make(chunk)]


def _unpacked(contents: memoryview, count: int) -> list[array[int]]:
    """The rows in a cache entry, which holds their `count` lengths and then the rows."""
    size = array("i").itemsize
    rows: list[array[int]] = []
    for begin, end in pairwise(accumulate(contents[: count * size].cast("i"), initial=count)):
        row: array[int] = array("i")
        row.frombytes(contents[begin * size : end * size])
        rows.append(row)
    return rows


def _key(texts: Sequence[str], tokenizer: Tokenizer, settings: tuple[object, ...]) -> str | None:
    """A hash of everything that determines the result; None for a tokenizer whose state is not fully accessible.

    It covers the loaded tokenizer instead of its files: vocabulary, merges and all rules. Whether the text of a special
    token is read as that token (`split_special_tokens`) is not among these and is added.
    """
    backend, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer)
    if backend is None or not kind.__module__.startswith("transformers."):
        return None
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    split = getattr(tokenizer, "split_special_tokens", False)
    about = (sys.byteorder, array("i").itemsize, versions, kind.__qualname__, split, settings)
    digest = hashlib.blake2b(repr(about).encode(), digest_size=20)
    # The code that makes the tokens is part of the key.
    for contents in (*(path.read_bytes() for path in CODE), backend.to_str().encode()):
        digest.update(hashlib.blake2b(contents).digest())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
