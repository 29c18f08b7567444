"""The keys of runs and data sets as help texts, completion and `upge explain` show them."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from experiments.config import CONFIGS, presets


def shown(value: object) -> str:
    """A value as typed on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return f"[{','.join(map(shown, value))}]"
    return str(value) or '""'


def first_comment(path: Path) -> str:
    """What a preset is: the first line of its file, without the mark of the comment."""
    first = path.read_text("utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def data_keys(name: str) -> list[tuple[str, object, str]]:
    """(key, default, meaning) of a data set; the meaning is the comment after a key, or on the line before it."""
    path = CONFIGS / "data" / f"{name}.yaml"
    node = OmegaConf.to_container(OmegaConf.load(path))["data"]
    comments, before = {}, ""
    for line in path.read_text("utf-8").splitlines()[1:]:
        code, _, comment = line.partition("#")
        key = code.strip().partition(":")[0]
        if key in node:
            comments[key] = comment.strip() or before
        before = comment.strip() if not code.strip() else ""
    return [(key, value, comments.get(key, "")) for key, value in node.items() if key != "_target_"]


def data_meaning(name: str, key: str) -> str:
    """What a key of a data set does, from its own file or from that of another data set of the same class."""
    own = _class(name)
    for one in (name, *(other for other in presets("data") if _class(other) == own)):
        meaning = next((meaning for known, _, meaning in data_keys(one) if known == key and meaning), "")
        if meaning:
            return meaning
    return ""


def _class(name: str) -> str:
    return str(OmegaConf.load(CONFIGS / "data" / f"{name}.yaml").data["_target_"])
