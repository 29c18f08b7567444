"""What a refactoring must not change: `python -m tests.goldens --record` stores it, `--check` compares with it.

Three parts, each a file in tests/goldens/:
- objects: the built object, the needs and the gradient on a seeded batch of every algorithm with every correction and
  with every override that the tests use, or that it is refused;
- runs: metrics.jsonl of short seeded runs, times left out, and the size of the update;
- tests: the collected tests.

Intended renames stand in renames.json, as pairs old → new, and are applied to what was recorded:
- classes: exact names; fields: exact names, or `Class.field` for one class;
- inputs (corrections, overrides, arguments of runs), values (strings in fields), metrics (keys), tests (ids), messages:
  regular expressions as for `re.sub`, in the order of the file.

Messages of errors and descriptions may be reworded: `--messages` prints the changes, none is a failure. A new test is
no difference, one that is gone is. Two runs of one commit on one machine are bit-identical, and `--exact` demands that.
Without it numbers are equal up to a tolerance, because machines differ in the last bits; if a machine samples other
tokens for that reason, record its own runs on the commit to compare with: `--record --only runs`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden_differences import ABSENT, TOLERANCE, Difference, Renames, compare, is_prose, report
from tests.golden_objects import ROOT, as_change, from_change, outcome

FOLDER = Path(__file__).parent / "goldens"
SECTIONS = ("objects", "tests", "runs")
#: Beyond every correction alone: the combinations that tests apply, each given to every algorithm.
COMBINATIONS = (
    *("tis,entropy", "overlong,kl_reward", "kl_reward,overlong", "icepop,overlong", "tis,tis", "tis,icepop", "tis,mis"),
    *("kl_k1,kl_k3", "tis,kl_k3", "tis,kl_k3,entropy", "icepop,dual_clip,overlong", "mis,kl_reward,dynamic_sampling"),
    *("overlong,tis", "overlong,dynamic_sampling"),
)

#: Settings of the runs that make what happens now and then happen within three steps.
SHORT = ("steps=3", "prompts_per_step=4", "data.evaluation_size=1", "rollout.max_response_tokens=48")
RUNS = {
    "hpt": ["algo=hpt"],
    "grpo": ["algo=grpo", "correction=[tis,kl_k3]", "optimizer.mini_batches=2", "rollout.temperature=0.7"],
    "ppo": ["algo=ppo", "optimizer.mini_batches=2"],
    "relift": ["algo=relift", "algo.interleaved_update.size=2"],
    "amft": ["algo=amft", "algo.terms.sft.gate.every=1"],
    "sft_then_grpo": ["algo=sft_then_grpo"],
}
#: Keys of metrics.jsonl that hold times.
TIMES = re.compile(r"time(/.*)?")


# What there is now.


def case_name(algorithm: str, corrections: list[str], overrides: list[str]) -> str:
    """An algorithm, its corrections and overrides as on the command line."""
    given = [f"correction=[{','.join(corrections)}]"] if corrections else []
    return " ".join([algorithm, *given, *overrides])


def all_inputs(overridden: list[list[Any]]) -> list[list[Any]]:
    """Every algorithm as it is, with every correction and combination, and the overrides of the tests."""
    import algorithms

    corrected = [[], *([name] for name in algorithms.corrections()), *(text.split(",") for text in COMBINATIONS)]
    return [[name, given, []] for name in algorithms.names() for given in corrected] + overridden


def runs(arguments: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Run → metrics key → values over the steps; and how large the change of the weights was."""
    words = [word for name, given in arguments.items() for word in ("--", name, *SHORT, *given)][1:]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.train_all", folder, *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return {name: run_metrics(Path(folder), name) for name in arguments}


def run_metrics(folder: Path, name: str) -> dict[str, Any]:
    """What a run recorded, without times."""
    file = folder / name / "metrics.jsonl"
    if not file.is_file():
        return {"failed": (folder / f"{name}.log").read_text()[-500:]}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    keys = sorted({key for line in lines for key in line if not TIMES.fullmatch(key)})
    metrics = {key: [line.get(key, ABSENT) for line in lines] for key in keys}
    return metrics | {"(update_norm)": [update_norm(folder / name / "final")]}


def update_norm(final: Path) -> float:
    """‖θ_final - θ_initial‖ in float64: unlike metrics, it also depends on the last update."""
    from safetensors.torch import load_file

    before, after = (load_file(path / "model.safetensors") for path in (ROOT / "experiments/models/tiny", final))
    return sum(float((after[key].double() - before[key].double()).square().sum()) for key in before) ** 0.5


def tests() -> dict[str, list[str]]:
    """Test → its parameters, without those that name a source file or a temporary folder."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"tests cannot be collected:\n{done.stdout[-2000:]}")
    results: dict[str, set[str]] = {}
    # A path in the repository is the same wherever that lies.
    for line in done.stdout.replace(f"{ROOT}/", "").splitlines():
        if "::" in line:
            name, bracket, parameters = line.partition("[")
            results.setdefault(name, set()).add(parameters.removesuffix("]") if bracket else "")
    source = re.compile(r"(upge|algorithms|experiments|tests)([./][\w./]+)?")
    return {
        name: sorted(p for p in parameters if p and not source.fullmatch(p) and tempfile.gettempdir() not in p)
        for name, parameters in results.items()
    }


def check_objects(renames: Renames, exact: bool, combinations: bool = True) -> list[Difference]:
    """Differences of the built objects, prose included; also without the cases of several corrections."""
    differences: list[Difference] = []
    for (algorithm, corrections, overrides), recorded in stored_objects():
        if len(corrections) > 1 and not overrides and not combinations:
            continue
        corrections, overrides = ([renames.sub("inputs", text) for text in texts] for texts in (corrections, overrides))
        case = case_name(algorithm, corrections, overrides)
        expected, now = renames.flat(recorded), outcome(algorithm, corrections, overrides)
        if ("refused" in expected) == ("refused" in now):
            differences += compare(case, expected, now, None if exact else TOLERANCE["objects"])
        else:
            sides = [f"{x['refused'][1:]}: {x['message']}" if "refused" in x else "built" for x in (expected, now)]
            differences.append((case, "refused", *sides))
    return differences


def check_runs(renames: Renames, exact: bool) -> list[Difference]:
    """Differences of the runs' metrics."""
    recorded = load("runs")
    arguments = {name: [renames.sub("inputs", a) for a in run["arguments"]] for name, run in recorded.items()}
    now, differences = runs(arguments), []
    for name, run in recorded.items():
        expected = {renames.sub("metrics", key): values for key, values in run["metrics"].items()}
        differences += compare(name, expected, now[name], (0.0, 0.0) if exact else TOLERANCE["runs"])
    return differences


def check_tests(renames: Renames, exact: bool) -> list[Difference]:
    """Tests that are gone."""
    now = {f"{name}[{p}]" if p else name for name, parameters in tests().items() for p in (*parameters, "")}
    recorded = [f"{name}[{p}]" if p else name for name, parameters in load("tests").items() for p in (*parameters, "")]
    renamed = [renames.sub("tests", name) for name in recorded]
    return [(name.partition("[")[0], name, "collected", "gone") for name in renamed if name not in now]


# Files.


def load(section: str) -> Any:
    """A file of tests/goldens/."""
    return json.loads((FOLDER / f"{section}.json").read_text())


def stored_objects() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Input and outcome of every case."""
    for algorithm, cases in load("objects").items():
        base: dict[str, Any] = {}
        for case in cases:
            recorded = case["object"] if "object" in case else from_change(base, case) if "change" in case else case
            base = base or recorded
            kept = {"refused", "message"} if recorded is case else recorded.keys()
            yield [algorithm, case["corrections"], case["overrides"]], {p: recorded[p] for p in recorded if p in kept}


def write(section: str, content: dict[str, Any]) -> None:
    """A JSON file whose innermost entries are a line each, so that a diff of two commits can be read."""

    def text(value: Any, depth: int, pad: str = "\n ") -> str:
        if isinstance(value, dict) and "object" in value:
            depth = 2  # an algorithm as it is: what the others are told by
        if depth == 0 or not value or not isinstance(value, (dict, list)):
            return json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            return "[" + pad + f",{pad}".join(text(item, depth - 1, f"{pad} ") for item in value) + pad[:-1] + "]"
        items = (f"{json.dumps(k, ensure_ascii=False)}: {text(v, depth - 1, f'{pad} ')}" for k, v in value.items())
        return "{" + pad + f",{pad}".join(items) + pad[:-1] + "}"

    (FOLDER / f"{section}.json").write_text(text(content, 3 if section == "runs" else 2) + "\n")


def record_objects() -> dict[str, list[dict[str, Any]]]:
    """Algorithm → its cases: the first as it is, the others as what they change in it.

    The overrides are those of the cases that are stored already; to add one, add its corrections and overrides there.
    """
    stored = load("objects").items()
    overridden = [[n, c["corrections"], c["overrides"]] for n, cases in stored for c in cases if c["overrides"]]
    content: dict[str, list[dict[str, Any]]] = {}
    for algorithm, corrections, overrides in sorted(all_inputs(overridden), key=lambda one: (one[0], bool(one[2]))):
        flat, cases = outcome(algorithm, corrections, overrides), content.setdefault(algorithm, [])
        entry = flat if "refused" in flat else as_change(cases[0]["object"], flat) if cases else {"object": flat}
        cases.append({"corrections": corrections, "overrides": overrides, **entry})
    return content


def record_runs() -> dict[str, Any]:
    """Run → its arguments and metrics.

    Raises:
        RuntimeError: a run failed.
    """
    results = runs(RUNS)
    failed = {name: metrics["failed"] for name, metrics in results.items() if "failed" in metrics}
    if failed:
        raise RuntimeError(f"runs failed: {failed}")
    return {name: {"arguments": RUNS[name], "metrics": results[name]} for name in sorted(RUNS)}


# The command line.

RECORDS = {"objects": record_objects, "tests": lambda: dict(sorted(tests().items())), "runs": record_runs}
CHECKS = {"objects": check_objects, "tests": check_tests, "runs": check_runs}


def main(arguments: list[str] | None = None) -> int:
    """0 = as recorded, 1 = differences."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="store what there is now")
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one part; may be repeated")
    parser.add_argument("--exact", action="store_true", help="compare numbers without a tolerance")
    parser.add_argument("--messages", action="store_true", help="print changed messages and descriptions")
    parser.add_argument("--all", action="store_true", help="print every difference")
    given = parser.parse_args(arguments)
    if given.record == given.check:
        parser.error("give either --record or --check")
    code, renames = 0, Renames(load("renames"))
    for section in given.only or SECTIONS:
        if given.record:
            write(section, RECORDS[section]())
            continue
        results = CHECKS[section](renames, given.exact)
        prose = [one for one in results if is_prose(one[1])] if section == "objects" else []
        failures = [one for one in results if one not in prose]
        code |= bool(failures)
        most = len(results) if given.all else 40
        if given.messages and prose:
            print(f"{section}: reworded, no failure:\n{report(prose, most)}")
        reworded = f", {len(prose)} texts reworded (--messages)" if prose else ""
        print(f"{section}: {len(failures)} differences{reworded}\n{report(failures, most)}".rstrip(), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
