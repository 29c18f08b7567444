"""Which checks notice which fault: `python -m experiments.faults [faults=all|NAME,...] [output=FOLDER] [--docs]`.

For each fault of experiments/run/faults.py, and once without a fault, this starts experiments.doctor on the stack with
the fault, and a short run with it. The doctor's checks and the run's alarms see numbers only, not the fault's name.
Prints a table and writes faults.json; --docs also writes it into docs/faults.md. Takes about a minute for each fault on
one core. The exit code is 1 if a fault is not noticed, or if something is noticed without one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import cli, files
from experiments.grid import markdown_table
from upge.errors import ConfigError, nearest

PAGE = files.DOCS / "faults.md"
BEGIN, END = "<!-- faults: begin (python -m experiments.faults --docs) -->", "<!-- faults: end -->"
#: The algorithms that are tried in this order until the fault changes something in one.
ALGORITHMS = (["algo=hpt"], ["algo=grpo"], ["algo=grpo", "correction=kl_k3"])
#: A run that takes seconds and whose updates have several micro-batches.
RUN = (
    *("model=tiny", "data=arithmetic", "data.train_size=64", "data.evaluation_size=16", "eval.every=-1", "steps=8"),
    *("prompts_per_step=4", "group_size=8", "optimizer.lr=1e-3", "optimizer.micro_batch_tokens=128"),
    *("checkpoint.every=0", "log_rollouts=0", "rollout.engine=transformers"),
    "diagnose.split_every=8",
)
#: A check-up that takes seconds; with all algorithms it takes twenty more.
DOCTOR = (
    *("model=tiny", "checks=gradients,sampler", "rollout.engine=transformers"),
    "algorithms=sft,grpo,hpt,grpo+kl_k3",
)
NONE = "none"


@dataclass(frozen=True)
class Noticed:
    """What noticed a fault.

    Attributes:
        doctor: the rows of the check-up that are problems.
        alarms: of the run.
        refusal: the message with which the run was refused; empty if it was not.
        seconds: of the check-up and of the run, with the start of Python.
    """

    fault: str
    doctor: tuple[str, ...]
    alarms: tuple[str, ...]
    refusal: str
    seconds: tuple[float, float]

    @property
    def by_any(self) -> bool:
        """Whether anything noticed it."""
        return bool(self.doctor or self.alarms or self.refusal)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 just the faults were noticed, 1 otherwise, 2 bad input)."""
    return cli.run_command(_faults, arguments, lambda everything: str(__doc__))


def _faults(arguments: list[str]) -> int:
    arguments, flags = cli.flags(arguments, "--docs")
    names, folder = _settings(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in names:
        made.append(noticed(name, folder))
        print(f"{name}: {_by(made[-1].doctor)} · {_by(made[-1].alarms)} · {made[-1].refusal or '–'}", flush=True)
    about = {"made": files.now(), "machine": files.machine(), "versions": files.versions()}
    record = {**about, "git_commit": files.git_commit(), "noticed": [asdict(one) for one in made]}
    (folder / "faults.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"\n{table(made)}\n\nwrote {folder / 'faults.json'}")
    if flags["--docs"]:
        text = f"\n{kinds()}\n\n{table(made)}\n\n{_provenance(record)}\n"
        page = files.replace_block(PAGE.read_text("utf-8"), PAGE.name, BEGIN, END, text, "where the table goes")
        PAGE.write_text(page, "utf-8")
    return cli.DONE if all(one.by_any == (one.fault != NONE) for one in made) else cli.FAILED


def _settings(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """The faults to switch on, 'none' first, and the folder."""
    from experiments.run.faults import FAULTS
    from upge.config import split

    given = {"faults": "all", "output": "", **dict(map(split, arguments))}
    if unknown := [name for name in given if name not in ("faults", "output")]:
        raise ConfigError(f"{unknown[0]}: unknown key; {nearest(unknown[0], ['faults', 'output'])}")
    chosen = (
        [NONE, *FAULTS]
        if given["faults"] == "all"
        else [part.strip() for part in given["faults"].strip("[]").split(",")]
    )
    for name in chosen:
        if name not in (NONE, *FAULTS):
            raise ConfigError(f"no fault {name!r}; {nearest(name, [NONE, *FAULTS])}", "faults")
    folder = files.output_path(given["output"]) if given["output"] else files.free_folder("faults", "table")
    return chosen, folder.absolute()


def noticed(fault: str, folder: Path) -> Noticed:
    """Run the check-up and a short run with a fault, in `folder`, and read what they noticed.

    Raises:
        RuntimeError: one of them ended with an unexpected exit code.
    """
    checked, ran = folder / f"doctor-{fault}", folder / f"run-{fault}"
    first, _, code = _started("experiments.doctor", *DOCTOR, f"fault={fault}", f"output={checked}")
    if code not in (cli.DONE, cli.FAILED) or not (checked / "doctor.json").is_file():
        raise RuntimeError(f"the check-up with fault={fault} ended with exit code {code}")
    rows = json.loads((checked / "doctor.json").read_text("utf-8"))["rows"]
    second, error, code = _started("experiments.run", *algorithm(fault), *RUN, f"fault={fault}", f"output={ran}")
    if code not in (cli.DONE, cli.BAD_INPUT):
        raise RuntimeError(f"the run with fault={fault} ended with exit code {code}: {error[-500:]}")
    file = ran / "alarms.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    problems = tuple(row["name"] for row in rows if row["verdict"] == "problem")
    alarms = tuple(json.loads(line)["alarm"] for line in lines)
    refusal = error.strip().splitlines()[-1] if code == cli.BAD_INPUT else ""
    return Noticed(fault, problems, alarms, refusal, (round(first, 1), round(second, 1)))


def algorithm(fault: str) -> list[str]:
    """The arguments that choose an algorithm in which the fault changes something."""
    import algorithms
    from experiments.run.faults import check

    for arguments in ALGORITHMS:
        named = dict(argument.split("=") for argument in arguments)
        corrections = [named["correction"]] if "correction" in named else []
        try:
            check(fault, algorithms.load(named["algo"], corrections=corrections))
        except ConfigError:
            continue
        return arguments
    raise ValueError(f"no algorithm of ALGORITHMS has what fault={fault} changes")


def _started(module: str, *arguments: str) -> tuple[float, str, int]:
    """Run a command in a process of its own: its seconds, its standard error, its exit code."""
    began = time.perf_counter()
    environment = {**os.environ, "TQDM_MININTERVAL": "60"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cli.ROOT, check=False)
    return time.perf_counter() - began, done.stderr, done.returncode


def table(made: Sequence[Noticed]) -> str:
    """The table of docs/faults.md."""
    header = ("`fault=`", "doctor", "alarms of a run of 8 steps", "seconds: doctor, run")
    rows = []
    for one in made:
        alarms = _by(one.alarms) if not one.refusal else f"refused: {one.refusal}"
        rows.append((f"`{one.fault}`", _by(one.doctor), alarms, "{:.0f}, {:.0f}".format(*one.seconds)))
    return markdown_table(header, rows)


def kinds() -> str:
    """The table of all faults."""
    from experiments.run.faults import FAULTS, origin, summary

    header = ("`fault=`", "what it changes", "where it was seen")
    return markdown_table(header, [(f"`{name}`", summary(name), origin(name)) for name in FAULTS])


def _by(names: Sequence[str]) -> str:
    return ", ".join(names) or "–"


def _provenance(record: Mapping[str, Any]) -> str:
    torch, commit = record["versions"].get("torch"), (record["git_commit"] or "unknown")[:9]
    return f"Made on {record['made'][:10]}: {record['machine']}; torch {torch}, commit {commit}."


if __name__ == "__main__":
    sys.exit(main())
