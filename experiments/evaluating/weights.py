"""Which weights an evaluation measures: a folder such as RUN/best may hold others by the time it is continued."""

from __future__ import annotations

import hashlib
from pathlib import Path

#: Bytes at the beginning, in the middle and at the end of a file that tell it from others of its size.
PROBE = 1 << 22


def fingerprint(path: str) -> dict[str, str]:
    """What tells the weights of a model from others; reading all of them would take as long as loading.

    path: the model's folder: file → size and a hash of three parts of it, for every file of weights. Or a hub name:
        {"commit": ...} of the snapshot in the cache, asked without the network. Empty where nothing can be said.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        commit = _commit(path)
        return {"commit": commit} if commit else {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {file.name: _probe(file) for file in files}


def difference(new: dict[str, str], old: dict[str, str]) -> str:
    """The first thing in which two fingerprints differ, in words; empty where they agree or one says nothing."""
    if not new or not old:
        return ""
    for name in sorted({**old, **new}):
        if new.get(name) != old.get(name):
            return f"{name} is {new.get(name, 'not there')}, but was {old.get(name, 'not there')}"
    return ""


def _probe(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as stream:
        for start in (0, max(size - PROBE, 0) // 2, max(size - PROBE, 0)):
            stream.seek(start)
            digest.update(stream.read(PROBE))
    return f"{size} bytes, {digest.hexdigest()}"


def _commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    # A snapshot's folder is called after its commit.
    return Path(found).parent.name if isinstance(found, str) else None
