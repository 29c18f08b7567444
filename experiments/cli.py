"""The command line: `upge NAME ...`, the same commands as `python -m experiments.NAME ...`.

This module holds what all commands share: the list of commands, help, the reading of arguments, and how errors and
signals become exit codes. `upge` works from any folder. It puts the current folder last on the import path, so a user's
own parts are found there, but a user's `experiments/` or `algorithms/` never hides those of the package.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from experiments import leave_at_once, packages
from experiments.output import prepare_output

#: Exit codes that all commands share. FAILED is also that of a proof that fails. Others: 4 for a sweep in which some
#: runs failed, 128 + signal.
DONE, FAILED, BAD_INPUT, NOT_FINITE = 0, 1, 2, 3
#: Name of a command → what it does.
COMMANDS = {
    "run": "train a model with an algorithm on a data set",
    "evaluate": "measure a model on the benchmarks of a suite",
    "compare": "compare evaluations: accuracy, pass@k, exclusive solves, intervals",
    "sweep": "train and evaluate many runs, and report them together",
    "diagnose": "measure bias and variance of the algorithms' gradients on a policy",
    "regret": "measure which signal of a prompt is better to learn from, and the regret of gates",
    "watch": "print a run's metrics as they come, and serve its report on this machine",
    "report": "write report.html into the folders of runs, and a page with the curves of several",
    "explain": "show a key's value in a run, where it comes from, its range and what it does",
    "push": "upload the model of a finished run to the Hugging Face hub, with a model card",
    "describe": "list the algorithms and corrections, or show one",
    "doctor": "check this machine: driver, memory, kernels, gradients, sampler",
    "completion": "print the script that completes commands, keys and values in bash or zsh",
    "faults": "switch faults on, one by one, and record which checks notice each",
    "referee": "compare the gradients of other frameworks' losses with those of the algorithms",
    "bench": "measure speed and memory, side by side with other libraries",
    "theory": "print the tables of docs/theory.md, computed exactly",
    "scaling": "print the tables of docs/scaling.md: memory, time and traffic of a step by model size and GPUs",
    "table1": "print Table 1 of the paper, derived from the objectives",
    "site": "build the documentation's site, or draw its pictures",
    "pretrain": "train the model `tiny` from scratch",
    "check_answers": "check that the verifier accepts the ground truths of data files as responses",
}
#: The folder that holds the packages `experiments`, `algorithms` and `upge`.
ROOT = Path(__file__).parents[1]


class Stopped(BaseException):
    """The signal `number` asks the command to end. Complete results are saved before the command exits."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number)
        self.number = number
        self.message = message or f"stopped by signal {number}"


def main() -> int:
    """The program `upge`; returns the exit code of the command."""
    prepare_output()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return DONE
    if name == "--version":
        print(f"upge {_version()}")
        return DONE
    if name == "__complete":
        # The shell's completion calls this at each press of Tab. `words` imports this module, as the commands do.
        words = importlib.import_module("experiments.completion.words")
        for word in words.candidates(arguments[0] if arguments else ""):
            print(word)
        return DONE
    if name not in COMMANDS:
        from upge.errors import nearest

        print(f"error: there is no command '{name}'; {nearest(name, COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    # A command reads the program's arguments as if it had been started by itself.
    sys.argv[1:] = arguments
    packages.explain_missing()
    command = importlib.import_module(f"experiments.{name}")
    if hasattr(command, "__path__"):
        command = importlib.import_module(f"experiments.{name}.__main__")
    return command.main()


def usage() -> str:
    """What `upge --help` prints: a line for each command."""
    lines = ["Usage: upge COMMAND [ARGUMENT ...]", "       upge COMMAND --help", "       upge --version", ""]
    return "\n".join([*lines, "Commands:", *(help_row(name, meaning, 14) for name, meaning in COMMANDS.items())])


def run_command(
    command: Callable[[list[str]], int], arguments: Sequence[str] | None, help_text: Callable[[bool], str] | None = None
) -> int:
    """Run a command and turn user errors and signals into a message on standard error and an exit code.

    Args:
        arguments: the command's arguments; None = those of the program.
        help_text: returns what `--help` prints, or `--help all` if its argument is True; None if the command handles
            `--help` itself.

    Returns:
        The command's exit code, 1 for an engine that failed, 2 for a user error, 3 for numbers that are not finite, or
        128 + signal.
    """
    prepare_output()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    add_user_folder()
    quiet()
    if help_text is not None and {"-h", "--help"} & {*arguments}:
        print(help_text("all" in arguments))
        return DONE
    from upge.errors import EngineError, NonFiniteError, UserError
    from upge.train.launcher import end_with_launcher

    end_with_launcher()
    try:
        if signal.getsignal(signal.SIGINT) is leave_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _check_text(arguments)
        return command(arguments)
    except UserError as error:
        return _refused(error)
    except NonFiniteError as error:
        return _refused(error, NOT_FINITE)
    except EngineError as error:
        return _refused(error, FAILED)
    except ImportError as error:
        message = packages.explanation(error)
        if message is None:
            raise
        return _refused(message)
    except OSError as error:
        from upge.train.files import disk_reason, is_full

        if is_full(error):
            name = error.filename or "a file"
            return _refused(f"{name} cannot be written: {disk_reason(error)}; make room and start again")
        if error.filename is None:
            raise
        return _refused(f"{os.fsdecode(error.filename)}: {error.strerror}")
    except KeyboardInterrupt:
        return _stopped(Stopped(signal.SIGINT))
    except Stopped as stopped:
        return _stopped(stopped)


def _refused(error: Exception | str, code: int = BAD_INPUT) -> int:
    """Print an error of a command that has not begun; return the exit code.

    Every rank announces the error, so that the launcher's summary has it even if only one rank has failed.
    """
    from upge.train.distributed import local_rank
    from upge.train.launcher import announce
    from upge.train.stopping import Ending
    from upge.trees import first_line

    print_error(error)
    announce(Ending(code, first_line(error) if isinstance(error, Exception) else error), prints=local_rank() == 0)
    return code


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse an argument that cannot be printed or written to a file.

    Raises:
        ConfigError: its bytes are not UTF-8.
    """
    from upge.errors import ConfigError

    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{argument[:200]!r} is not text in UTF-8; write it in UTF-8") from None


def quiet() -> None:
    """Silence the libraries' informational messages; warnings that concern the user still show.

    The progress bars of the hub, which a download of 15 GB needs, are shown by the first rank in a terminal.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector while libraries are imported and engines start.

    Nearly all objects made there stay alive, and the collector would traverse the million objects of torch,
    transformers, DeepSpeed and vLLM again and again, also because the engines call it themselves. Existing objects are
    frozen for good; garbage made in the block is collected at its end.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()


def add_user_folder() -> None:
    """Put the current folder last on the import path, after the folder of this package.

    Under `python -m` the current folder is already the first entry. It is missing when `upge`, torchrun or deepspeed
    start the program. The entry for this package matters for an editable install, which Python consults only after the
    path.
    """
    for folder in (str(ROOT), os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)


def launcher(ranks: int) -> list[str]:
    """The start of a command line `python -m MODULE ...` with this number of ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    # Seconds to finish an update and to save after a signal. torchrun's default is 30.
    torchrun += ["--shutdown-timeout", "600"]
    return [sys.executable, *(torchrun if ranks > 1 else [])]


def child_environment() -> dict[str, str]:
    """Environment variables with which `python -m experiments.NAME` finds this package in any current folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    is_installed = ROOT.name in ("site-packages", "dist-packages")
    path = entries if is_installed or str(ROOT) in entries else [str(ROOT), *entries]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}


def print_error(error: Exception | str, rank: int | None = None) -> None:
    """Print a user error on standard error.

    `rank` None = all ranks of a machine raise the same error, so only the first of them prints it. Machines may differ
    in packages and files.
    """
    from upge.train.distributed import local_rank

    if rank is not None:
        print_alone(f"error on rank {rank}: {error}")
    elif local_rank() == 0:
        print_alone(f"error: {error}")


def print_alone(text: str) -> None:
    """Print a line on standard error, below the progress bars that are still open."""
    bars = sys.modules.get("tqdm.std")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars else ():
        bar.close()
    print(text, file=sys.stderr)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block on SIGINT, SIGTERM or SIGHUP; a second signal ends the process at once."""
    from upge.train.stopping import stop_signals

    numbers = stop_signals()

    def stop(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_DFL)
        raise Stopped(number)

    with signals_handled(numbers, stop):
        yield


@contextlib.contextmanager
def signals_handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals with `handler` in the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def flags(arguments: Sequence[str], *names: str) -> tuple[list[str], dict[str, bool]]:
    """Separate flags such as `--dry-run` from the other arguments; each of `names` maps to whether it was given."""
    return [a for a in arguments if a not in names], {name: name in arguments for name in names}


def common_rows(rows: Sequence[tuple[str, str, str]], names: Sequence[str]) -> list[str]:
    """The lines of `--help` for the keys that most users need, in the order of `names`, and how to see the others.

    Args:
        rows: (key, key=default, meaning) of every key.
    """
    known = {name: help_row(left, meaning) for name, left, meaning in rows}
    more = f"  {len(rows) - len(names)} more keys: --help all"
    return [*(known[name] for name in names), *([more] if len(rows) > len(names) else [])]


def help_row(left: str, right: str, width: int = 36) -> str:
    """Two columns of at most 118 characters; a left side longer than `width` moves the right one to the next line."""
    indent = " " * (width + 3)
    if len(left) > width:
        above = textwrap.wrap(left, 116, initial_indent="  ", subsequent_indent="    ")
        return "\n".join([*above, *textwrap.wrap(right, 118, initial_indent=indent, subsequent_indent=indent)])
    return textwrap.fill(f"{left:<{width}} {right}", 118, initial_indent="  ", subsequent_indent=indent)


def _version() -> str:
    """The version in the source, which is that of an installed package too; `import upge` would load torch."""
    text = (ROOT / "upge" / "__init__.py").read_text("utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def _stopped(stopped: Stopped) -> int:
    print_alone(stopped.message)
    return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(main())
