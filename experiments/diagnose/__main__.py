"""Measure bias and variance of the algorithms' gradients on a real policy.

    python -m experiments.diagnose [model=NAME] [data=NAME] [algos=[NAME,...]|all] [KEY=VALUE ...]

For a policy and a data set it measures mean, bias against ∇E[R], noise, signal to noise and cosines of the gradients of
any algorithms: overall, by the prompt's pass rate and, with policies=[PATH,...] or run=FOLDER, over training. It writes
a folder with diagnosis.html, table.md, diagnosis.json and the figures; docs/diagnose.md explains them.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.files import command, free_folder, git_commit, now, output_path, versions
from upge.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 2 bad input)."""
    return cli.run_command(_diagnose, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What `--help` prints, or `--help all`."""
    from experiments.diagnose.settings import DiagnoseConfig, keys
    from experiments.keys import shown

    rows = [(name, f"{name}={shown(default)}", meaning) for name, default, meaning in keys()]
    own = [name for name, *_ in rows if everything or name in DiagnoseConfig.__dataclass_fields__]
    head = "Keys (model=, data= and recipe= are those of experiments.run, with their own keys):"
    return "\n".join([str(__doc__), head, *cli.common_rows(rows, own)])


def output_folder(output: str, names: dict[str, str], parent: str = "diagnoses") -> Path:
    """`output`, or the next free PARENT/MODEL-DATA.

    Raises:
        ConfigError: the folder is not empty.
    """
    if output:
        path = output_path(output)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"output: {path} exists; choose another, or remove it")
        return path
    stem = "-".join(Path(name).name.removesuffix(".yaml") for name in names.values())
    return free_folder(parent, stem)


def _diagnose(arguments: Sequence[str]) -> int:
    from rich.console import Console

    from experiments.diagnose import write
    from experiments.diagnose.conclusion import conclusion
    from experiments.diagnose.settings import choose
    from experiments.grid import print_grid

    chosen = choose(arguments)
    names = {"exact": "exact"} if chosen.config.exact else dict(chosen.names)
    folder = output_folder(chosen.config.output, names)
    console = Console(highlight=False)
    notes = [f"{name} is left out: {reason}" for name, reason in chosen.left_out.items()] + chosen.remarks
    results, more = _exactly(chosen) if chosen.config.exact else _sampled(chosen, console)
    notes += more
    if not chosen.config.behavior and any(map(_has_mask_of_ratios, chosen.algorithms.values())):
        notes.append("all rollouts are of the policy itself, so ratios are 1 and masks of ratios have no effect")
    if not chosen.config.exact:
        notes.append(
            "intervals of noise, power and alignment are too narrow where a few gradients are much longer than the "
            "others, and the bias comes out too small where the cosine is near 1 (docs/diagnose.md, Limits)"
        )
    for result in results:
        if all(math.isnan(one.overall.alignment.value) for one in result.measured):
            notes.append(
                f"{result.label}: ∇E[R] cannot be distinguished from 0 with this sample, so nothing can be compared "
                "with it; give more reference rollouts, or prompts that are sometimes solved"
            )
    for result in results:
        console.print(f"\n{result.label}: {write.summary(result)}", markup=False)
        for grid in write.grids(result):
            print_grid(grid, console)
            console.print()
    for note in notes:
        console.print(f"note: {note}", markup=False)
    for result in results:
        console.print(f"{result.label}: {conclusion(result)}", markup=False)
    metadata = {"command": command("experiments.diagnose", arguments), "made": now(), "names": names}
    metadata |= {"versions": versions(), "git_commit": git_commit(), "settings": write.plain(chosen.config)}
    for path in write.files(results, metadata, notes, folder):
        console.print(f"wrote {path}", soft_wrap=True, markup=False)
    return 0


def _has_mask_of_ratios(algorithm: Any) -> bool:
    """Whether a mask compares the policy with the one that sampled."""
    from upge.components import StabilizationMask

    masks = [part for part in algorithm.parts.values() if isinstance(part, StabilizationMask)]
    return any("behavior_logprobs" in mask.columns for mask in masks)


def _exactly(chosen: Any) -> tuple[list, list[str]]:
    from experiments.diagnose.measuring import exactly

    note = "the reference policy of this setting differs from the policy, and the response limit is 2 tokens"
    return [exactly(chosen.algorithms, chosen.config.group_size)], [note]


def _sampled(chosen: Any, console: Any) -> tuple[list, list[str]]:
    from experiments.diagnose.measuring import measure
    from experiments.diagnose.sampling import model_of, ordered, policies, problems
    from experiments.diagnose.settings import without_pairs
    from experiments.run.models import check_predicted_tokens
    from experiments.run.teacher import check_same_tokenizer
    from upge.data.prompting import load_tokenizer

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    config, run = chosen.config, chosen.run
    with policies(chosen) as measured_policies:
        measured_policies = ordered(measured_policies)
        chosen_problems = problems(chosen, measured_policies[0].model)
        notes = [*chosen_problems.notes, *trained_with_faults(measured_policies)]
        if not chosen_problems.has_pairs:
            chosen, lacking = without_pairs(chosen)
            why = "it learns from preference pairs, and the data have none"
            notes += [f"{name} is left out: {why}" for name in lacking]
        others = {"behavior": model_of(config.behavior, run.model)} if config.behavior else {}
        if any(algorithm.needs.reference for algorithm in chosen.algorithms.values()):
            if run.reference.path:
                others["reference"] = model_of(run.reference.path, run.model)
            elif len(measured_policies) > 1:
                others["reference"] = measured_policies[0].model
            own = f"the first policy, {measured_policies[0].label}" if others.get("reference") else "the policy itself"
            notes.append(f"the reference policy is {run.reference.path or own}")
        if any(algorithm.needs.teacher for algorithm in chosen.algorithms.values()):
            others["teacher"] = model_of(run.teacher.path, run.model)
            tokenizers = [load_tokenizer(path) for path in (measured_policies[0].model.path, others["teacher"].path)]
            check_same_tokenizer(*tokenizers, run.teacher.path)
            notes.append(f"the teacher is {run.teacher.path}")
        compared = set[str]().union(*(algorithm.needs.distributions for algorithm in chosen.algorithms.values()))
        for name, policy in itertools.product(sorted(compared & others.keys()), measured_policies):
            given = "policies" if name == "reference" and not run.reference.path else f"{name}.path"
            check_predicted_tokens(policy.model.path, others[name].path, given)
        results = []
        for policy in measured_policies:
            say(f"policy {policy.label}: {policy.model.path}")
            results.append(measure(chosen, chosen_problems, policy, others, say))
    return results, notes


def trained_with_faults(measured_policies: Sequence[Any]) -> list[str]:
    """A note on each policy that was trained with a fault on purpose."""
    from upge.train.faults import NONE, marked

    found = {policy.label: marked(policy.model.path) for policy in measured_policies}
    return [f"{label} was trained with a fault on purpose ({name})" for label, name in found.items() if name != NONE]


if __name__ == "__main__":
    sys.exit(main())
