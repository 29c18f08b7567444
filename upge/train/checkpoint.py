"""The manifest of a checkpoint: the step, and the size and SHA-256 of each file.

It is written last, when all files are on the disk, and checked before a checkpoint is loaded. So no run continues from
a checkpoint with a file that is missing, has changed or belongs to another step. Ranks hash their files in parallel.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upge.errors import ConfigError, ModelError
from upge.train.distributed import World
from upge.train.files import disk_errors, read_json, sync, sync_folder, write_atomically
from upge.train.folder import FORMAT, RunFolder

MANIFEST = "manifest.json"


def seal(checkpoint: Path, step: int, world: World) -> None:
    """Sync the files of a checkpoint and write its manifest; all ranks call it when their files are written.

    Raises:
        StorageError: a file cannot be read back or the manifest cannot be written; all ranks raise it.
    """
    own: dict[str, dict[str, Any]] = {}
    with world.together(), disk_errors(checkpoint):
        for name in (name for name in _files(checkpoint) if _is_own(name, world)):
            own[name] = _entry(checkpoint / name, written=True)
    parts = world.gather_to_main(own)
    with world.together():
        if world.is_main:
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            content = {"format": FORMAT, "step": step, "ranks": world.size, "files": files}
            with disk_errors(checkpoint):
                for folder in {(checkpoint / name).parent for name in files}:
                    sync_folder(folder)
            write_atomically(checkpoint / MANIFEST, json.dumps(content, indent=1) + "\n")
            with disk_errors(checkpoint):
                sync_folder(checkpoint)


def check(folder: RunFolder, step: int, world: World) -> None:
    """Check the checkpoint of `step` against its manifest; all ranks call it, and each reads some of the files.

    Raises:
        ModelError: a file is missing, has changed or belongs to another step; the message names it and the newest
            earlier checkpoint that is whole. All ranks raise it.
    """
    wrong = problem(folder.checkpoints / folder.tag(step), step, world)
    if not wrong:
        return
    earlier = [one for one in reversed(folder.checkpoint_steps()) if one < step]
    whole = (one for one in world.broadcast(earlier) if not problem(folder.checkpoints / folder.tag(one), one, world))
    good = next(whole, None)
    fix = "no earlier checkpoint is whole; restore the file, or start in another folder"
    if good is not None:
        fix = f"{folder.tag(good)} is whole: resume={folder.tag(good)} continues from it"
    error = ModelError(f"{folder.checkpoints / folder.tag(step)}: {wrong}; {fix}")
    error.is_shared = True
    raise error


def problem(checkpoint: Path, step: int, world: World) -> str:
    """What is wrong with a checkpoint, or an empty text; the same on all ranks."""
    try:
        manifest = read_json(checkpoint / MANIFEST, "it is damaged")
        found = _misfit(checkpoint, step, manifest, world)
    except (ConfigError, OSError) as error:
        found = str(error)
    return next(filter(None, world.gather(found)), "")


def _misfit(checkpoint: Path, step: int, manifest: Mapping[str, Any], world: World) -> str:
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST} is missing, so the checkpoint is incomplete"
    if manifest.get("format") != FORMAT or manifest.get("step") != step:
        return f"{MANIFEST} is of step {manifest.get('step')} and format {manifest.get('format')}, not {step}, {FORMAT}"
    there = _files(checkpoint)
    for name in [*files, *there]:
        if name not in there or name not in files:
            return f"{name} is missing" if name in files else f"{name} is not in {MANIFEST}"
    for name, entry in ((name, entry) for name, entry in files.items() if _is_own(name, world)):
        if not isinstance(entry, dict) or (checkpoint / name).stat().st_size != entry.get("bytes"):
            return f"the size of {name} is not that in {MANIFEST}"
        if _entry(checkpoint / name) != entry:
            return f"{name} is not what was written in step {step} (its SHA-256 differs)"
    return ""


def _files(checkpoint: Path) -> list[str]:
    """The tensor files of a checkpoint, including those in its folders."""
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.pt"))


def _is_own(name: str, world: World) -> bool:
    """Whether this rank hashes a file. With as many ranks as when it was saved, that is the rank that wrote it."""
    rank = re.search(r"rank_(\d+)", name)
    return (int(rank[1]) if rank else 0) % world.size == world.rank


def _entry(path: Path, written: bool = False) -> dict[str, Any]:
    """The manifest's entry for a file; with `written` the file is synced first."""
    with path.open("rb") as file:
        if written:
            sync(file)
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
