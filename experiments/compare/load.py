"""Reads the folders of evaluations, and finds what makes two of them hard to compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from upge.errors import DataError, UserError
from upge.evaluation.samples import SampleFile
from upge.evaluation.scores import Outcomes, same_answer
from upge.train.faults import NONE

#: A larger share of responses cut off at the length limit is worth a note.
MANY_CUT = 0.1


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        name: the displayed name.
        outcomes: benchmark → its samples, in the order of scores.json.
        groups: benchmark → the group in whose average it counts.
        settings: benchmark → how its samples were drawn.
        fault: the fault on purpose with which the policy was trained; the name shows it.
    """

    name: str
    path: Path
    outcomes: Mapping[str, Outcomes]
    groups: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]]
    fault: str = NONE


@dataclass(frozen=True)
class Pairing:
    """The problems of one benchmark that two runs share.

    Attributes:
        first, second: positions of the shared problems in each run's `Outcomes`, in the same order.
        only_first, only_second: ids that only one run has.
        conflicting: ids that both have with different answers; these are different problems, so not compared.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    conflicting: tuple[str, ...]


def load(paths: Sequence[str], names: Sequence[str] = ()) -> list[Run]:
    """Read the evaluations in the folders `paths`; `names` are the displayed names, by default the folders' own.

    Raises:
        UserError: there are no folders, a folder or a name occurs twice, or there are not as many names as folders.
        DataError: a folder has no finished evaluation, or a file in it is invalid.
    """
    if not paths:
        raise UserError("give the folders of at least one evaluation, such as evals/first evals/second")
    folders = [Path(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{paths[index]}: this folder is given twice; give different evaluations")
    if names and len(names) != len(folders):
        raise UserError(f"names: found {len(names)} for {len(folders)} runs; give one per run, separated by commas")
    chosen = [name.strip() for name in names] or _folder_names(resolved)
    if len(set(chosen)) < len(chosen) or not all(chosen):
        raise UserError(f"names: found {', '.join(map(repr, chosen))}; give every run a name of its own")
    return [_read(folder, name) for folder, name in zip(folders, chosen, strict=True)]


def pairing(first: Outcomes, second: Outcomes) -> Pairing:
    """Pair the problems of `first` and `second` that have the same id and answer."""
    ours, theirs = ({id: place for place, id in enumerate(one.ids)} for one in (first, second))
    both = [id for id in ours if id in theirs]
    same = [id for id in both if first.answers[ours[id]] == second.answers[theirs[id]]]
    return Pairing(
        tuple(ours[id] for id in same),
        tuple(theirs[id] for id in same),
        tuple(id for id in ours if id not in theirs),
        tuple(id for id in theirs if id not in ours),
        tuple(sorted(set(both) - set(same))),
    )


def benchmarks(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Group → its benchmarks over all runs, in order of appearance."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        for name in run.outcomes:
            members = groups.setdefault(run.groups[name], [])
            if name not in members:
                members.append(name)
    return groups


def notes(runs: Sequence[Run]) -> list[str]:
    """Sentences on what differs between the evaluations besides the policies: settings, benchmarks, problems."""
    kinds = (_fault_notes, _settings_notes, _benchmark_notes, _problem_notes, _length_notes, _answer_notes)
    return [note for notes_of in kinds for note in notes_of(runs)]


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder that was output= of an evaluation")
    scores = folder / "scores.json"
    if not scores.is_file():
        raise DataError(f"{folder}: there is no scores.json in it; {_why(folder)}")
    try:
        content = json.loads(scores.read_bytes())
        entries = {
            str(key): (str(one["group"]), int(one["samples"]), dict(one["settings"]))
            for key, one in content["benchmarks"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        fix = "run the same evaluation again: it reuses the samples and writes the file again"
        raise DataError(f"{scores}: not the scores of an evaluation ({error!r}); {fix}") from error
    if not entries:
        raise DataError(f"{scores}: there is no benchmark in it; evaluate again with at least one")
    outcomes = {key: _outcomes(folder, key, n) for key, (_, n, _) in entries.items()}
    groups = {key: group for key, (group, _, _) in entries.items()}
    fault = str(content.get("fault", NONE))
    shown = name if fault == NONE or fault in name else f"{name}, fault={fault}"
    return Run(shown, folder, outcomes, groups, {key: settings for key, (_, _, settings) in entries.items()}, fault)


def _outcomes(folder: Path, benchmark: str, n: int) -> Outcomes:
    path = folder / "samples" / f"{benchmark}.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is missing, but scores.json has scores of {benchmark}; restore it or evaluate again")
    try:
        return Outcomes.of(benchmark, SampleFile(path).read(), n)
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _why(folder: Path) -> str:
    if (folder / "samples").is_dir():
        return "its evaluation is not finished: the same command with the same output continues it"
    if (folder / "metrics.jsonl").is_file():
        return (
            "this is the folder of a training run; evaluate its policy first: "
            f"python -m experiments.evaluate model={folder}/final output=FOLDER"
        )
    return "give the folder that was output= of an evaluation"


def _folder_names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths, in whole folder names, that are all different."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        endings = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(endings)) == len(endings):
            break
    return endings


def _fault_notes(runs: Sequence[Run]) -> list[str]:
    """Notes on policies that were trained with a fault on purpose."""
    return [f"{run.name} was trained with a fault on purpose ({run.fault})." for run in runs if run.fault != NONE]


def _settings_notes(runs: Sequence[Run]) -> list[str]:
    """Notes on settings that differ; benchmarks with the same difference share a sentence."""
    differing: dict[str, list[str]] = {}
    for name, having in _having(runs).items():
        table = {run.name: {"samples": run.outcomes[name].samples, **run.settings[name]} for run in having}
        for key in dict.fromkeys(key for row in table.values() for key in row):
            values = {run: row.get(key) for run, row in table.items()}
            if any(value != values[having[0].name] for value in values.values()):
                shown = ", ".join(f"{_value(value)} in {run}" for run, value in values.items())
                differing.setdefault(f"{key} is {shown}", []).append(name)
    return [f"Measured with different settings: {what} ({', '.join(names)})." for what, names in differing.items()]


def _having(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Benchmark → the runs that have it, in the order of `benchmarks`."""
    names = [name for members in benchmarks(runs).values() for name in members]
    return {name: [run for run in runs if name in run.outcomes] for name in names}


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    return shorten(repr(value), 60, placeholder="…") if isinstance(value, str) else str(value)


def _benchmark_notes(runs: Sequence[Run]) -> list[str]:
    sentences = []
    for group, members in benchmarks(runs).items():
        for name in members:
            without = ", ".join(run.name for run in runs if name not in run.outcomes)
            average = f", which therefore has no average {group}" if len(members) > 1 else ""
            sentences += [f"{name} was not evaluated in {without}{average}."] if without else []
    for name, having in _having(runs).items():
        groups = {run.groups[name] for run in having}
        if len(groups) > 1:
            sentences.append(f"{name} belongs to {' and '.join(sorted(groups))}, depending on the run.")
    return sentences


def _problem_notes(runs: Sequence[Run]) -> list[str]:
    sentences = []
    for name, (first, *others) in _having(runs).items():
        for other in others:
            pairs = pairing(first.outcomes[name], other.outcomes[name])
            sides = ((pairs.only_first, first), (pairs.only_second, other))
            parts = [f"{len(ids)} only in {run.name}" for ids, run in sides if ids]
            if pairs.conflicting:
                parts.append(f"{len(pairs.conflicting)} with another answer (such as '{pairs.conflicting[0]}')")
            if parts:
                sentences.append(
                    f"{name}: {first.name} and {other.name} have {len(pairs.first)} problems in common, "
                    f"{', '.join(parts)}; differences and exclusive solves are over the common ones."
                )
    return sentences


def _answer_notes(runs: Sequence[Run]) -> list[str]:
    """Notes on benchmarks in which most responses give the same answer."""
    evaluated = ((run.name, name, outcomes) for run in runs for name, outcomes in run.outcomes.items())
    sentences = ((run, name, same_answer(one.commonest, len(one.ids))) for run, name, one in evaluated)
    return [f"{run}, {name}: {sentence}" for run, name, sentence in sentences if sentence]


def _length_notes(runs: Sequence[Run]) -> list[str]:
    """Notes on responses that were cut off or not verified, which count as wrong whatever the policy can do."""
    sentences = []
    for run in runs:
        for name, outcomes in run.outcomes.items():
            cut = 1 - outcomes.finished.double().mean().item()
            if cut > MANY_CUT:
                share = f"{100 * cut:.1f} %"
                sentences.append(f"{run.name}, {name}: {share} of the responses were cut at the length limit.")
            failed = outcomes.timeouts + outcomes.errors
            if failed:
                sentences.append(f"{run.name}, {name}: {failed} answers without a verdict count as wrong.")
    return sentences
