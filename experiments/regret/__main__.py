"""Measure which signal of a prompt is better to learn from, and the regret of gates.

    python -m experiments.regret [model=NAME] [data=NAME] [gates=[NAME,...]] [KEY=VALUE ...]

For each of many prompts it measures the gain in held-out accuracy and in held-out log-likelihood of demonstrations from
one step on the prompt's rollouts, on its demonstration, on both and on nothing. It reports what is best by pass rate,
and how much every gate loses against an oracle that knows the gains. policies=[PATH,...] or run=FOLDER measures several
policies.
It writes a folder with report.html, report.md, regret.json, groups.csv and the figures; docs/regret.md explains them.
With --docs it also writes the results into docs/regret.md.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.files import DOCS, command, git_commit, now, replace_block, versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 2 bad input)."""
    return cli.run_command(_regret, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What `--help` prints, or `--help all`."""
    from experiments.keys import shown
    from experiments.regret.settings import SHARED, RegretConfig, keys

    rows = [(name, f"{name}={shown(default)}", meaning) for name, default, meaning in keys()]
    own = [name for name, *_ in rows if everything or name in (*RegretConfig.__dataclass_fields__, *SHARED)]
    head = "Keys (model=, data= and recipe= are those of experiments.run, with their own keys):"
    return "\n".join([str(__doc__), head, *cli.common_rows(rows, own)])


def _regret(arguments: Sequence[str]) -> int:
    from rich.console import Console

    from experiments.diagnose.__main__ import output_folder, trained_with_faults
    from experiments.diagnose.sampling import ordered, policies, problems
    from experiments.grid import print_grid
    from experiments.regret import write
    from experiments.regret.analysis import analyses
    from experiments.regret.measuring import measure
    from experiments.regret.settings import choose

    arguments, flags = cli.flags(arguments, "--docs")
    chosen = choose(arguments)
    folder = output_folder(chosen.sample.config.output, dict(chosen.sample.names), "regrets")
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    measured = []
    with policies(chosen.sample) as several:
        several = ordered(several)
        prompts = problems(chosen.sample, several[0].model)
        notes = [*prompts.notes, *trained_with_faults(several)]
        for policy in several:
            say(f"policy {policy.label}: {policy.model.path}")
            result = measure(chosen, prompts, policy, say)
            made = analyses(result, chosen.config.lengths, chosen.config.mixtures)
            measured.append(write.Analyzed(result, tuple(made)))
    notes += ["gates that no algorithm of this repository has (SRPO, DYPO) are not measured"]
    for one in measured:
        say(f"\n{one.result.label}: {write.summary(one)}")
        for grid in write.grids(one):
            print_grid(grid, console)
            console.print()
    settings = write.diagnose.plain({"own": chosen.config, "sample": chosen.sample.config})
    metadata = {"command": command("experiments.regret", arguments), "made": now(), "versions": versions()}
    metadata |= {"git_commit": git_commit(), "seed": chosen.sample.run.seed, "settings": settings}
    written = write.files(measured, metadata, notes, folder)
    for path in written:
        say(f"wrote {path}")
    if flags["--docs"]:
        _update_docs(
            write.section(measured, metadata), [p for p in written if p.suffix == ".png" and p.stem.startswith("adam-")]
        )
    return cli.DONE


def _update_docs(section: str, drawn: Sequence[Path]) -> None:
    """Replace the generated part of docs/regret.md, and its figures."""
    page = DOCS / "regret.md"
    begin, end = "<!-- regret: begin -->\n", "<!-- regret: end -->"
    text = replace_block(page.read_text("utf-8"), page.name, begin, end, section, "where the results go")
    page.write_text(text, "utf-8")
    for path in drawn:
        shutil.copyfile(path, DOCS / "results" / f"regret-{path.name}")
    print(f"wrote {page}")


if __name__ == "__main__":
    sys.exit(main())
