"""Made-up evaluations: folders as experiments.evaluate writes them, with policies whose abilities are known."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from upge.evaluation.samples import Sample, SampleFile
from upge.evaluation.scores import Outcomes, suite_scores

SETTINGS = {"temperature": 0.6, "top_p": 0.95, "max_response_tokens": 8192}


def sample(benchmark: str, id: str, number: int, correct: bool, level: str | None = None, **fields) -> Sample:
    """One line of a samples file; `fields` replace others."""
    known = {
        **{"benchmark": benchmark, "id": id, "level": level, "sample": number, "prompt": f"Q{id}", "answer": f"A{id}"},
        **{"response": "…", "extracted": f"{id}:{number}", "reward": float(correct), "correct": correct},
        **{"status": "ok", "detail": "", "tokens": 100 + number, "finished": True},
    }
    return Sample(**{**known, **fields})


def drawn(
    benchmark: str,
    problems: int,
    n: int,
    ability: float,
    levels: Sequence[str | None] = (None,),
    seed: int = 0,
) -> list[Sample]:
    """Samples of a policy: harder problems are the same ones for every ability, and hardness grows with the level."""
    results = []
    for index in range(problems):
        place = index * len(levels) // problems
        hardness = random.Random(f"{benchmark} {index}").random() + place / len(levels)
        rate = min(1.0, max(0.0, ability + 0.5 - hardness)) ** 2
        dice = random.Random(f"{benchmark} {index} {seed}")
        for number in range(n):
            correct = dice.random() < rate
            tokens = dice.randint(200, 2000)
            results.append(sample(benchmark, str(index), number, correct, levels[place], tokens=tokens))
    return results


def write_run(
    folder: Path,
    samples: Mapping[str, Sequence[Sample]],
    groups: Mapping[str, str] | None = None,
    settings: Mapping | None = None,
) -> Path:
    """The folder of an evaluation with these samples, benchmark by benchmark; `settings` replace the usual ones."""
    for name, rows in samples.items():
        with SampleFile(folder / "samples" / f"{name}.jsonl") as file:
            file.append(rows)
    suite = [Outcomes.of(name, rows) for name, rows in samples.items()]
    groups = {name: (groups or {}).get(name, "math") for name in samples}
    same = {name: {**SETTINGS, **(settings or {})} for name in samples}
    (folder / "scores.json").write_text(json.dumps(suite_scores(suite, groups, same)))
    return folder


def run_with(folder: Path, solved: dict[str, list[bool]], benchmark: str = "b", **fields) -> Path:
    """A run of one benchmark: id → which of its samples are correct."""
    rows = [sample(benchmark, id, n, right, **fields) for id, row in solved.items() for n, right in enumerate(row)]
    return write_run(folder, {benchmark: rows})
