"""The settings of the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import algorithms
from upge.config import parse, split
from upge.errors import ConfigError, nearest

#: The frameworks that have an adapter, and DeepSpeed, whose real updates are run.
FRAMEWORKS = ("trl", "verl", "ms_swift", "openrlhf")
OFFLOAD = "deepspeed"
#: Versions of DeepSpeed that are judged by default: the last two with the fault, and the first without.
DEEPSPEED_VERSIONS = ("0.18.8", "0.18.9", "0.19.0")
INSTALLED = "installed"
KEYS = {
    "frameworks": (f"{','.join((*FRAMEWORKS, OFFLOAD))}", "what to judge, separated by commas"),
    "versions": ("", f"versions of the one framework; empty = those of the page; '{INSTALLED}' = the installed one"),
    "download": ("true", "false: only versions that are in the cache"),
    "saved": ("", "a folder in which the results of versions are saved, and from which they are read if they exist"),
    "loss": ("", "FILE:FUNCTION, a loss function of your own, judged in place of the frameworks'"),
    "algo": ("grpo", "the algorithm that `loss` is compared with; settings as algo.terms....=VALUE"),
    "output": ("", "an HTML file to write as well"),
}


@dataclass(frozen=True)
class RefereeConfig:
    """A checked command line.

    Attributes:
        frameworks: names of `FRAMEWORKS` and 'deepspeed'.
        versions: of the only framework; empty = the page's.
        download: whether versions that are not cached are downloaded.
        saved: a folder of results, or empty.
        loss: FILE:FUNCTION, or empty.
        algo: name of the algorithm that `loss` is compared with.
        overrides: changes of its file.
        output: an HTML file, or empty.
    """

    frameworks: tuple[str, ...] = (*FRAMEWORKS, OFFLOAD)
    versions: tuple[str, ...] = ()
    download: bool = True
    saved: str = ""
    loss: str = ""
    algo: str = "grpo"
    overrides: tuple[str, ...] = ()
    output: str = ""

    @classmethod
    def read(cls, arguments: Sequence[str]) -> RefereeConfig:
        """The settings of a command line.

        Raises:
            ConfigError: an unknown key, name or value, by its key.
        """
        values: dict[str, Any] = {}
        overrides: list[str] = []
        for name, text in map(split, arguments):
            if name.startswith("algo."):
                overrides.append(f"{name.removeprefix('algo.')}={text}")
            elif name in ("frameworks", "versions"):
                values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
            elif name == "download":
                values[name] = parse(name, text)
            elif name in KEYS:
                values[name] = text
            else:
                raise ConfigError(f"{name}: unknown key; {nearest(name, KEYS)}")
        unused = [name for name in ("frameworks", "versions", "saved", "output") if name in values]
        if values.get("loss") and unused:
            raise ConfigError("a loss of your own is judged in place of the frameworks'; leave it out", unused[0])
        return cls(**values, overrides=tuple(overrides)).checked()

    def checked(self) -> RefereeConfig:
        """The settings.

        Raises:
            ConfigError: one does not fit.
        """
        known = (*FRAMEWORKS, OFFLOAD)
        if not self.frameworks:
            raise ConfigError(f"found none; give some of {', '.join(known)}", "frameworks")
        for name in self.frameworks:
            if name not in known:
                raise ConfigError(f"found {name!r}; {nearest(name, known)}", "frameworks")
        if not isinstance(self.download, bool):
            raise ConfigError(f"found {self.download!r}; give true or false", "download")
        if self.versions and len(self.frameworks) != 1:
            raise ConfigError(
                f"found {','.join(self.versions)} for {len(self.frameworks)} frameworks; give one framework, as in "
                "frameworks=trl",
                "versions",
            )
        if self.algo not in algorithms.names():
            raise ConfigError(f"found {self.algo!r}; {nearest(self.algo, algorithms.names())}", "algo")
        if self.overrides and not self.loss:
            raise ConfigError(
                f"found {self.overrides[0]!r} without a loss of your own; give loss=FILE:FUNCTION", "algo"
            )
        return self

    def versions_of(self, name: str) -> tuple[str, ...]:
        """The versions of a framework that are judged."""
        if self.versions:
            return self.versions
        return DEEPSPEED_VERSIONS if name == OFFLOAD else tuple(framework(name).VERSIONS)


def framework(name: str) -> ModuleType:
    """The adapter of a framework."""
    return importlib.import_module(f"experiments.referee.frameworks.{name}")
