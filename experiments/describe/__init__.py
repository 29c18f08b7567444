"""The description of an algorithm, read from its file and its parts: paper, choices, needs, keys.

`python -m experiments.describe` prints it, and docs/algorithms.md is generated from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

import algorithms
from upge import Algorithm, Pipeline
from upge.errors import ConfigError

SLOTS = ("mask", "denominator", "advantage", "likelihood")
_REACH = {
    "token": "any cut: each token's factors are its own",
    "trajectory": "a response stays whole",
    "group": "the responses to one prompt stay together",
}


@dataclass(frozen=True)
class Words:
    """The parts of the comment at the top of a file.

    Attributes:
        what: what the algorithm is.
        textbook: the objective as its paper writes it; '' if it is given elsewhere.
        choices: choices that change the gradient, and differences between paper and code.
        papers: arXiv numbers, in the order in which they are named.
    """

    what: str
    textbook: str
    choices: str
    papers: tuple[str, ...]


def words(name: str, folder: Any = algorithms.FOLDER) -> Words:
    """Parse the header of an algorithm's file, or of a correction's with `folder` = algorithms.CORRECTIONS."""
    text = algorithms.header(algorithms.find(name, folder))
    # Paragraphs of the header after the description of the algorithm begin with these words.
    what, *rest = re.split(r"^(?=(?:Textbook|Choices)\b)", text, flags=re.MULTILINE)
    textbook, choices = (
        "\n".join(part.strip() for part in rest if part.startswith(head)) for head in ("Textbook", "Choices")
    )
    return Words(what.strip(), textbook, choices, tuple(dict.fromkeys(re.findall(r"\d{4}\.\d{5}", text))))


def correction_description(name: str) -> str:
    """The one-line description in a correction's file."""
    return str(OmegaConf.load(algorithms.find(name, algorithms.CORRECTIONS)).description)


def members(algorithm: Algorithm | Pipeline, path: str = "") -> Iterator[tuple[str, Algorithm]]:
    """(path, algorithm) of an algorithm, or of a pipeline's stages, and of the algorithms inside them."""
    if isinstance(algorithm, Pipeline):
        for name, stage in algorithm.stages.items():
            yield from members(stage.algorithm, f"stages.{name}.algorithm.")
        return
    yield path, algorithm
    if algorithm.interleaved_update is not None:
        yield from members(algorithm.interleaved_update.algorithm, f"{path}interleaved_update.algorithm.")
    if algorithm.validation is not None:
        yield from members(algorithm.validation, f"{path}validation.")


def needs(algorithm: Algorithm | Pipeline) -> dict[str, str]:
    """What the trainer must provide: need → in which form."""
    total = algorithm.needs
    rollouts = "one or more per prompt"
    if total.group_size > 1:
        rollouts = f"at least {total.group_size} per prompt (group_size), compared by {total.group_size_because}"
    provided = (
        (total.rollouts or total.group_size > 1, "rollouts", rollouts),
        (total.data_demonstrations, "demonstrations", "worked solutions in the data"),
        (total.preference_pairs, "preference pairs", "a chosen and a rejected response to a prompt in the data"),
        (total.critic, "critic", "a value per token, from a model of its own"),
        (total.reference, "reference policy", "log-probs of the policy as it was before training"),
        (total.teacher, "teacher", "log-probs of another model, or of the policy on another prompt (teacher.*)"),
        (total.distributions, "distributions", f"of the {' and the '.join(sorted(total.distributions))}, in the head"),
        ("sampler_logprobs" in total.columns, "sampler's log-probs", "as the inference engine reported them"),
        ("entropies" in total.columns, "entropies", "of the full vocabulary at each token"),
        (total.precomputed, "before the forward pass", f"{', '.join(sorted(total.precomputed))} of all trajectories"),
    )
    listed = {need: how for is_needed, need, how in provided if is_needed}
    reaches = {path or "all": _REACH[one.reach] for path, one in members(algorithm)}
    texts = set(reaches.values())
    by_member = "; ".join(f"{path.rstrip('.')}: {text}" for path, text in reaches.items())
    listed["micro-batch"] = texts.pop() if len(texts) == 1 else by_member
    for path, one in members(algorithm):
        listed |= _step_needs(path, one)
    return listed


def _step_needs(path: str, one: Algorithm) -> dict[str, str]:
    """What an algorithm needs before and between its updates."""
    listed = {}
    if one.parts_per_update:
        listed[f"{path}before each update"] = f"a forward pass over its tokens, for {', '.join(one.parts_per_update)}"
    for variable, gate in one.stateful.items():
        signals = f", from {', '.join(sorted(gate.wants))}" if gate.wants else ""
        moved = f"moved by {type(gate).__name__}{signals}"
        listed[f"{path}state: {variable}"] = f"begins at {gate.initial():g}, {moved}; logged and kept in checkpoints"
    if one.guidance is not None:
        listed[f"{path}guidance"] = one.guidance.describe()
    if one.replay is not None:
        listed[f"{path}replay"] = f"{one.replay.describe()}; kept in checkpoints"
    if one.memory is not None:
        listed[f"{path}memory"] = f"of each prompt: {one.memory.describe()}; logged and kept in checkpoints"
    drawn = []
    if one.curriculum is not None:
        drawn.append(
            f"prompts are drawn in proportion to {one.curriculum.weight.describe()}, v being the memory's value"
        )
    if one.dynamic_sampling is not None:
        gate, rounds = one.dynamic_sampling.gate.formula().text, one.dynamic_sampling.rounds
        drawn.append(f"prompts are drawn until the batch is full of prompts with {gate}, at most {rounds} times")
    if drawn:
        listed[f"{path}sampling"] = "; ".join(drawn)
    if one.interleaved_update is not None:
        inner, gate = one.interleaved_update, one.interleaved_update.gate.formula().text
        moments = "optimizer moments of its own" if inner.own_optimizer else "the same optimizer moments"
        when = f"whenever {inner.size} prompts with {gate} have gathered"
        listed[f"{path}interleaved_update"] = f"an update by '{inner.algorithm.name}' {when}, with {moments}"
    if one.validation is not None:
        listed[f"{path}validation"] = f"held-out prompts, on which the loss of '{one.validation.name}' is tracked"
    return listed


def rows(name: str, corrections: Sequence[str] = ()) -> list[list[str]]:
    """The rows of the table: source, gate, four factors and average of each term, then the regularizers' formulas."""
    table_rows = []
    for path, one in members(algorithms.load(name, corrections=corrections)):
        where = ": ".join([*(p for p in path.split(".") if p not in ("", "stages", "algorithm")), ""])
        for term in one.terms.values():
            factors = [term.estimator.parts[slot].formula().text for slot in SLOTS]
            gate = term.gate.formula().text
            if term.coefficient != 1:
                gate = f"{term.coefficient:g}" + (f" · {gate}" if gate != "1" else "")
            source = ", ".join(filter(None, [where + term.source.replace("_", " "), term.support.title]))
            table_rows.append([source, gate, *factors, term.reduction.formula().text])
        for regularizer in one.regularizers.values():
            table_rows.append([f"{where}regularizer {regularizer.formula().text}", *[""] * (len(SLOTS) + 2)])
    return table_rows


def keys(name: str, corrections: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """(key, value, the key that it follows or '') of every setting of an algorithm and its corrections.

    Keys and values are written as on the command line.
    """
    tree = OmegaConf.to_container(algorithms.read(name, corrections), resolve=False)
    settings = []
    for where, value in algorithms.leaves(tree):
        above = () if where[0] == algorithms.CORRECTION else ("algo",)
        key, last = ".".join((*above, *map(str, where))), where[-1]
        if where[0] == "description" or last in ("description", "_target_", "source"):
            continue
        if last == "name" and where[-2] in ("algorithm", "validation"):
            settings.append((key.removesuffix(".name"), str(value), ""))
        else:
            settings.append((key, *_shown(where, value)))
    return settings


def key_lines(name: str, *corrections: str) -> list[str]:
    """The lines KEY=VALUE of `keys`, with a remark on a value that follows another key."""
    lines = []
    for key, value, followed in keys(name, corrections):
        shown = f"{key}={value}" if not value.startswith("${") else key
        lines.append(f"{shown}   # follows {followed}" if followed else shown)
    return lines


def _shown(where: tuple[Any, ...], value: Any) -> tuple[str, str]:
    """A value as typed on the command line, and the key that it follows if it is a reference."""
    if isinstance(value, str) and value.startswith("${oc.select:"):
        run_key, _, default = value.removeprefix("${oc.select:").removesuffix("}").partition(",")
        return default, run_key
    if target := algorithms.followed(where, value):
        return value, f"algo.{target}"
    text = "null" if value is None else str(value)
    return (text.lower() if isinstance(value, bool) else text), ""


def base_of(correction: str) -> str:
    """The algorithm on which a correction is shown: grpo, or the first that it applies to."""
    for name in ("grpo", *algorithms.names()):
        try:
            algorithms.load(name, corrections=[correction])
        except ConfigError:
            continue
        return name
    raise ConfigError(f"correction: '{correction}' applies to no algorithm of algorithms/")
