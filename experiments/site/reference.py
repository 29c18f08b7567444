"""The reference pages: every key with its default and range, and the public names of the API."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import upge
from experiments.cli import COMMANDS
from experiments.config import GROUPS, presets
from experiments.diagnose.settings import DiagnoseConfig
from experiments.doctor.settings import DoctorConfig
from experiments.evaluate.prepare import EvaluateConfig
from experiments.grid import markdown_table
from experiments.keys import data_keys
from experiments.site.page import Page, cell, escaped
from experiments.sweep.settings import SweepConfig
from upge.config import Range
from upge.train.config import RunConfig
from upge.train.folder import FREE_KEYS

#: Kind of part → (file below reference/api/, title, one sentence). A class belongs to the first kind that fits.
KINDS = (
    (upge.StabilizationMask, "masks", "Masks", "Which tokens may move now: a number in [0, 1] per token."),
    (upge.ReferenceDenominator, "denominators", "Denominators", "log π_ref per token."),
    (upge.AdvantageEstimator, "advantages", "Advantages", "Â per token."),
    (upge.LikelihoodGradient, "likelihoods", "Likelihood gradients", "log f′ per token; 0 is the plain gradient."),
    (upge.TokenReward, "token_rewards", "Token rewards", "The reward of each token, for advantages with returns."),
    (upge.Gate, "gates", "Gates", "The coefficient of a term, per prompt or per trajectory."),
    (upge.Reduction, "reductions", "Reductions", "w: how tokens, trajectories and prompts average."),
    (upge.Regularizer, "regularizers", "Regularizers", "Additive penalties and bonuses."),
    (upge.Support, "supports", "Supports", "Whose probabilities a term moves."),
)
REST = "algorithm"
#: Packages of the library → what of them is documented: a module and its names.
PACKAGES = {
    "corrections": ("Corrections", "Functions from algorithm to algorithm.", "upge.corrections"),
    "testing": ("Conformance checks", "Checks for parts and algorithms of your own.", "upge.testing"),
    "verify": ("Verifiers", "Rewards in worker processes.", "upge.verify"),
    "logprobs": ("Log-probs", "Log-probs and gradients without the matrix of logits.", "upge.logprobs"),
    "evaluation": ("Evaluation", "Suites, pass@k, intervals.", "upge.evaluation"),
    "data": ("Data", "Problems, data sets and prompts.", "upge.data"),
    "algorithms": ("Algorithm files", "Reading, overriding and composing algorithms/*.yaml.", "algorithms"),
}
_OTHERS = {
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "diagnose": DiagnoseConfig,
    "doctor": DoctorConfig,
}
_RUN = """\
# Keys of a run

Every key of `python -m experiments.run`, from the classes that check it. A key is given as `KEY=VALUE`. Defaults,
the model's preset, the data set's preset, the recipe and the command line follow in this order, and later ones win.
Ranges: `[` includes the bound and `(` excludes it. The keys of an algorithm, `algo.KEY`, are on
[its page](../algorithms.md), and those of a correction, `correction.NAME.KEY`,
[with the correction](../corrections.md).

"""
_GROUPS = {
    "algo": "an algorithm (algorithms/NAME.yaml) or a YAML file of your own",
    "correction": "a correction, or several as [NAME,NAME]",
    "model": "a model (experiments/configs/model)",
    "data": "a data set (experiments/configs/data)",
    "recipe": "all settings of one of the paper's runs (experiments/configs/recipe)",
}


def pages() -> dict[str, Page]:
    """Path on the site → page."""
    made = {"reference/configuration.md": Page("Keys of a run", _run())}
    made["reference/commands.md"] = Page("Keys of other commands", _commands())
    return made | dict(_api())


# Keys.


def _run() -> str:
    rows = [[f"`{name}`", f"`{GROUPS[name]}`" if GROUPS[name] else "", what] for name, what in _GROUPS.items()]
    names = [markdown_table(["key", "default", "selects"], rows), ""]
    for group in ("model", "data", "recipe"):
        names += [f"`{group}=` takes {', '.join(f'`{name}`' for name in presets(group))}.", ""]
    free = ", ".join(f"`{one}`" for one in FREE_KEYS)
    parts = [_RUN, "## Names\n", *names, *_tables(RunConfig, "The whole run")]
    parts += ["## Keys that may change when a run continues\n", f"{free}, and every key below one of them.", ""]
    for name in presets("data"):
        found = data_keys(name)
        rows = [[f"`data.{key}`", cell(shown(value)), escaped(meaning)] for key, value, meaning in found]
        parts += [f"## Keys of data={name}\n", markdown_table(["key", "default", "meaning"], rows), ""]
    return "\n".join(parts)


def _tables(cls: type, title: str, path: str = "") -> Iterator[str]:
    """A heading, a sentence and a table for a settings class and for each class inside of it."""
    hints, instance = get_type_hints(cls), cls()
    inner = [field for field in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[field.name])]
    rows = [
        [f"`{path}{one.name}`", cell(shown(getattr(instance, one.name))), allowed(one, hints[one.name]),
         escaped(one.metadata["meaning"])]
        for one in dataclasses.fields(cls) if one not in inner and (path or one.name not in GROUPS)
    ]  # fmt: skip
    yield f"## {title}\n"
    yield f"{escaped((cls.__doc__ or '').partition(chr(10))[0])}\n"
    yield f"{markdown_table(['key', 'default', 'values', 'meaning'], rows)}\n"
    for one in inner:
        yield from _tables(hints[one.name], f"{path}{one.name}", f"{path}{one.name}.")


def shown(value: Any) -> str:
    """A value as typed on the command line."""
    if value is None or isinstance(value, (bool, dict, list)):
        return json.dumps(value)
    return str(value) or '""'


def allowed(field: dataclasses.Field, hint: Any) -> str:
    """The values that a key takes: the choices, or the type and the range."""
    if get_origin(hint) is Literal:
        return ", ".join(cell(str(value)) for value in get_args(hint))
    if hint is bool:
        return "<code>true</code>, <code>false</code>"
    kinds = {int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}
    bounds = interval(field.metadata.get("range", Range()), hint is int)
    return f"{kinds.get(hint, escaped(str(hint)))} {bounds}".strip()


def interval(bounds: Range, whole: bool) -> str:
    """The range of a number as an interval; '' if it is unbounded. Integers have inclusive bounds."""
    low, left = (bounds.minimum, "[") if bounds.above is None else (bounds.above, "(")
    if whole and left == "(" and low is not None:
        low, left = low + 1, "["
    high, right = (bounds.maximum, "]") if bounds.below is None else (bounds.below, ")")
    if high is None and bounds.limit is not None:
        high, right = bounds.limit, "]"
    if low is None and high is None:
        return ""
    left, right = (left if low is not None else "("), (right if high is not None else ")")
    return f"{left}{_bound(low, '-∞')}, {_bound(high, '∞')}{right}"


def _bound(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:,}" if float(value).is_integer() else f"{value:g}"


def _commands() -> str:
    rows = [[f"`upge {name}`", escaped(meaning)] for name, meaning in COMMANDS.items()]
    same = "`upge NAME` and `python -m experiments.NAME` are the same command; the first works from any folder. "
    parts = ["# Keys of other commands\n", f"{same}`--help` prints the keys.\n"]
    parts += [markdown_table(["command", "what it does"], rows), ""]
    for name, cls in _OTHERS.items():
        parts += [part.replace("\n## ", "\n### ") for part in _tables(cls, name)]
    return "\n".join(parts)


# The API.


def _api() -> Iterator[tuple[str, Page]]:
    """A page for each kind of part, one for the rest of the public names, and one for each documented package."""
    left = [name for name in dict.fromkeys(upge.__all__) if isinstance(getattr(upge, name), type)]
    rows = []
    for kind, file, title, sentence in KINDS:
        own = [name for name in left if issubclass(getattr(upge, name), kind)]
        left = [name for name in left if name not in own]
        own.sort(key=lambda name: (getattr(upge, name) is not kind, name))
        yield f"reference/api/{file}.md", Page(title, _parts(title, sentence, own))
        rows.append([f"[{title}]({file}.md)", sentence, ", ".join(f"`{name}`" for name in own)])
    title, sentence = "Batches, algorithms, estimates", "What holds the parts together."
    yield f"reference/api/{REST}.md", Page(title, _parts(title, sentence, sorted(left), members=True))
    rows.append([f"[{title}]({REST}.md)", sentence, ", ".join(f"`{name}`" for name in sorted(left))])
    for file, (title, sentence, module) in PACKAGES.items():
        yield f"reference/api/{file}.md", Page(title, f"# {title}\n\n{sentence}\n\n{_module(module)}")
        rows.append([f"[{title}]({file}.md)", sentence, f"`{module}`"])
    text = "# API\n\nThe public names of `upge` and `algorithms`, from their docstrings.\n\n"
    yield "reference/api/index.md", Page("Overview", text + markdown_table(["page", "what", "names"], rows) + "\n")


def _parts(title: str, sentence: str, names: list[str], members: bool = False) -> str:
    blocks = [_block(getattr(upge, name), members) for name in names]
    return "\n".join([f"# {title}", "", sentence, "", *blocks])


def _block(cls: type, members: bool) -> str:
    lines = [f"::: {cls.__module__}.{cls.__name__}"]
    return "\n".join([*lines, "" if members else "    options:\n      members: false\n"])


def _module(module: str) -> str:
    """What a module exports."""
    import importlib

    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        n for n, v in vars(loaded).items() if not n.startswith("_") and callable(v)
    ]
    found = [getattr(loaded, name) for name in names]
    documented = [
        one for one in found if callable(one) and getattr(one, "__module__", "").startswith(("upge", "algorithms"))
    ]
    return "\n".join(f"::: {one.__module__}.{one.__qualname__}\n" for one in documented)
