"""Judge the loss functions of other frameworks: `python -m experiments.referee [KEY=VALUE ...]`.

It reads the losses of TRL, verl, ms-swift and OpenRLHF from their wheels, feeds all of them the same batch, and
compares the gradient with that of this project's algorithm of the same name. With `loss=FILE:FUNCTION` it judges a loss
of your own. `--docs` updates docs/referee.md and docs/results/referee.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.referee import own
from experiments.referee.settings import KEYS, RefereeConfig
from upge.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit code: 2 on bad input, 1 if a version could not be judged."""
    return cli.run_command(_referee, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What `--help` prints."""
    keys = [cli.help_row(f"{name}={default}", meaning) for name, (default, meaning) in KEYS.items()]
    return "\n".join([str(__doc__), "Keys:", *keys, "", str(own.__doc__)])


def _referee(arguments: list[str]) -> int:
    rest, given = cli.flags(arguments, "--docs")
    config = RefereeConfig.read(rest)
    if config.loss:
        if given["--docs"]:
            raise ConfigError("the page has no place for a loss of your own; leave it out", "--docs")
        return _own_loss(config)
    from experiments.referee import write
    from experiments.referee.run import Result, results

    found: list[Result] = []
    for result in results(config):
        print(f"{result.framework} {result.version}: {result.error or 'judged'}", file=sys.stderr, flush=True)
        found.append(result)
    if given["--docs"]:
        write.PAGE.write_text(write.updated(write.PAGE.read_text("utf-8"), found), "utf-8")
        write.write_page(write.WEB_PAGE, found)
    else:
        print(write.text(found))
    if config.output:
        write.write_page(Path(config.output), found)
    return cli.FAILED if any(result.error for result in found) else cli.DONE


def _own_loss(config: RefereeConfig) -> int:
    """Judge `loss`; print a line per layout."""
    from dataclasses import asdict

    from experiments.grid import markdown_table
    from experiments.referee.protocol import Case
    from experiments.referee.tables import cell
    from experiments.referee.worker import judge

    function = own.load(config.loss)
    row = asdict(judge(own.update(function), Case(config.loss, config.algo, config.overrides), config.loss))
    lines = [[name, cell(v), v["factor"] or "nothing", v["pattern"]] for name, v in row["layouts"].items()]
    print(f"{config.loss} compared with {row['algorithm']}\n")
    print(markdown_table(["update", "gradient", "what differs", "weights of the tokens"], lines))
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
