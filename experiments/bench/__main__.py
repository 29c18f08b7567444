"""Runs a bench, or lists the benches: `python -m experiments.bench [NAME] [key=value ...] [--docs]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments import cli
from experiments.bench import BENCHES, peers
from experiments.bench.measure import Interrupted
from experiments.files import DOCS, replace_block
from upge.config import defaults, from_tree, meanings, parse
from upge.errors import ConfigError, nearest

PAGE = DOCS / "performance.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a bench's Markdown, or update it in the docs; return the exit code (2 bad input, 128 + signal)."""
    return cli.run_command(lambda given: _bench_command(given, is_program=arguments is None), arguments)


def _bench_command(arguments: list[str], is_program: bool) -> int:
    arguments, asked = cli.flags(arguments, "-h", "--help")
    if not arguments or any(asked.values()):
        print(listing(arguments[0] if arguments else ""))
        return cli.DONE
    name, *rest = arguments
    bench = _bench(name)
    if is_program and getattr(bench, "WITH_PEERS", False):
        peers.enter()
    rest, given = cli.flags(rest, "--docs")
    chosen = settings(bench, rest)
    try:
        with cli.stopped_by_signals():
            made = bench.run(chosen)
    except Interrupted as early:
        print(early.table)
        raise early.signal from None
    if given["--docs"]:
        begin = f"<!-- bench {name}: begin (python -m experiments.bench {name} --docs) -->"
        end = f"<!-- bench {name}: end -->"
        page = replace_block(PAGE.read_text("utf-8"), PAGE.name, begin, end, f"\n\n{made}\n\n", "where the tables go")
        PAGE.write_text(page, "utf-8")
    else:
        print(made)
    return cli.DONE


def listing(name: str = "") -> str:
    """Every bench with its summary; of the bench `name`, or with 'all' of every bench, also the keys.

    Raises:
        ConfigError: there is no such bench.
    """
    lines = ["Usage: python -m experiments.bench NAME [key=value ...] [--docs]\n"]
    if not name:
        lines += [cli.help_row(one, _bench(one).SUMMARY, 12) for one in BENCHES]
        return "\n".join([*lines, "\nNAME --help lists the keys of a bench, --help all those of every bench."])
    for one in BENCHES if name == "all" else (name,):
        bench = _bench(one)
        lines.append(f"\n{one}: {bench.SUMMARY}")
        lines += [cli.help_row(f"{key}={default}", meaning) for key, default, meaning in meanings(bench.Settings)]
    return "\n".join(lines)


def settings(bench: Any, arguments: Sequence[str]) -> Any:
    """The settings of a bench from key=value arguments.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of range.
    """
    default, tree = defaults(bench.Settings), {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in default:
            raise ConfigError(f"'{argument}': give key=value with one of the bench's keys; {nearest(key, default)}")
        tree[key] = value if isinstance(default[key], str) else parse(key, value)
    return from_tree(bench.Settings, tree)


def _bench(name: str) -> Any:
    if name not in BENCHES:
        raise ConfigError(f"there is no bench '{name}'; {nearest(name, BENCHES)}")
    return importlib.import_module(f"experiments.bench.{name}")


if __name__ == "__main__":
    sys.exit(main())
