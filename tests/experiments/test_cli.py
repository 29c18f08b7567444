"""The program `upge`: its commands, its exit codes, and that a user's own folders never hide the package's."""

from __future__ import annotations

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import upge as package
from experiments import cli
from upge.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
#: What an installer makes of `upge = experiments.cli:main`.
SCRIPT = "import sys\nfrom experiments.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
HOSTILE = "raise ImportError('the folder of the user was imported in place of the package')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with packages called like ours and a part of the user's own."""
    path = tmp_path_factory.mktemp("user")
    for name in ("experiments", "algorithms", "upge"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text(HOSTILE)
    (path / "my_parts.py").write_text(
        "from dataclasses import dataclass\n\nimport upge\n\n\n"
        "@dataclass(frozen=True)\nclass Doubled(upge.ConstantAdvantage):\n    value: float = 2.0\n"
    )
    return path


def upge(folder: Path, *arguments: str, code: int = 0) -> str:
    """What the program prints when it is started in a folder outside the repository."""
    script = folder.with_name(f"{folder.name}-bin") / "upge"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_command_is_listed_and_has_a_main(folder: Path) -> None:
    text = upge(folder, "--help")
    assert all(f"\n  {name} " in text for name in cli.COMMANDS) and max(map(len, text.splitlines())) <= 120
    assert upge(folder) == text
    for name in cli.COMMANDS:
        place = ROOT / "experiments" / name
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        functions = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert "main" in functions, file
    packages = {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py")}
    assert packages <= {*cli.COMMANDS}


COMMANDS_OF_KEYS = ("run", "evaluate", "diagnose", "regret", "sweep", "compare", "doctor")
HELP = {name: f"experiments.{name}.__main__" for name in COMMANDS_OF_KEYS}


@pytest.mark.parametrize("command", HELP)
def test_help_fits_the_screen_and_says_how_to_see_the_rest(command: str) -> None:
    help_text = importlib.import_module(HELP[command]).help_text
    short, whole = help_text(False), help_text(True)
    assert len(short.splitlines()) <= 60 and max(map(len, short.splitlines())) <= 120
    left = re.search(r"^  (\d+) more keys: --help all$", short, re.MULTILINE)
    keys = {match for match in re.findall(r"^  ([a-z][\w.]*)=", whole, re.MULTILINE)}
    assert {match for match in re.findall(r"^  ([a-z][\w.]*)=", short, re.MULTILINE)} <= keys
    assert bool(left) == (short != whole)


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("arguments", [["--help"], ["--help", "all"]], ids=" ".join)
def test_every_command_has_help(command: str, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    package = Path(cli.__file__).with_name(command)
    module = importlib.import_module(f"experiments.{command}" + (".__main__" if package.is_dir() else ""))
    try:
        code = module.main(arguments)
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 0 and len(capsys.readouterr().out) > 100


def test_help_of_a_bench_has_its_keys(capsys: pytest.CaptureFixture) -> None:
    from experiments.bench.__main__ import BENCHES, main

    printed = {}
    for arguments in ((), ("--help",), ("--help", "all"), ("head", "--help")):
        assert main([*arguments]) == 0
        printed[arguments] = capsys.readouterr().out
    assert printed[()] == printed[("--help",)] and all(f"  {name} " in printed[()] for name in BENCHES)
    assert len(printed[()].splitlines()) < 30 and "vocabularies=" not in printed[()]
    assert "  vocabularies=" in printed[("head", "--help")] and "no_signal=" not in printed[("head", "--help")]
    assert "no_signal=" in printed[("--help", "all")]


def test_the_version_is_that_of_the_package(folder: Path) -> None:
    version = f"upge {package.__version__}\n"
    assert upge(folder, "--version") == version
    command = [sys.executable, "-m", "experiments", "--version"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == version


def test_an_unknown_command_is_refused(folder: Path) -> None:
    assert upge(folder, "trian", code=2).startswith("error: there is no command 'trian'; ")


def test_the_packages_are_ours_and_the_parts_the_users(folder: Path) -> None:
    part = "algo.terms.sft.estimator.advantage={_target_: my_parts.Doubled}"
    assert "Doubled(value=2.0)" in upge(folder, "describe", "algo=sft", part)
    text = upge(folder, "run", "--dry-run", "algo=sft", "output=x", part)
    assert "_target_: my_parts.Doubled" in text and "formula:" in text and not (folder / "x").exists()


def test_a_sweeps_jobs_are_ours_in_a_users_folder(folder: Path) -> None:
    tiny = ["algo=sft", "model=tiny", "data=arithmetic", "steps=bad", "jobs=1"]
    upge(folder, "sweep", *tiny, "output=swept", code=2)
    environment = os.environ | cli.child_environment()
    command = [sys.executable, "-m", "experiments.describe", "algo=nothing"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no algorithm 'nothing'" in done.stderr, done.stderr


def test_mistakes_and_signals_become_exit_codes(capsys: pytest.CaptureFixture) -> None:
    def mistaken(arguments: list[str]) -> int:
        raise ConfigError("steps: found -1; it must not be negative")

    def interrupted(arguments: list[str]) -> int:
        with cli.stopped_by_signals():
            signal.raise_signal(signal.SIGTERM)
        return 0

    def at_the_terminal(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert cli.run_command(len, ["a", "b"]) == 2 and cli.run_command(len, []) == 0
    assert cli.run_command(mistaken, []) == 2
    assert capsys.readouterr().err == "error: steps: found -1; it must not be negative\n"
    assert cli.run_command(interrupted, []) == 143 and capsys.readouterr().err == "stopped by signal 15\n"
    assert cli.run_command(at_the_terminal, []) == 130 and "stopped by signal 2" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert cli.run_command(mistaken, ["--help", "all"], lambda everything: f"what it does: {everything}") == 0
    assert capsys.readouterr().out == "what it does: True\n"


def test_a_mistake_before_the_ranks_are_connected_is_told_once(monkeypatch, capsys) -> None:
    cli.print_error(ConfigError("x"), rank=3)
    assert capsys.readouterr().err == "error on rank 3: x\n"
    monkeypatch.setenv("RANK", "1")
    cli.print_error(ConfigError("x"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("terminal", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_downloads_are_shown_in_a_terminal(
    terminal: bool, rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "to be removed again")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    cli.quiet()
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ) == shown
