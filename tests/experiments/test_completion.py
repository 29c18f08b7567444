"""Shell completion: the words, their list, that no torch is loaded, and real shells in a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli
from experiments.completion import keys
from experiments.completion.__main__ import main
from experiments.completion.words import FLAGS, KEYS, candidates
from experiments.config import presets

ROOT = Path(__file__).parents[2]
MASK = "algo.terms.rl.estimator.mask"


def test_the_list_of_keys_is_the_generated_one() -> None:
    assert KEYS.read_text("utf-8") == keys.text(), "run python -m experiments.completion --update"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("upge ru", {"run"}),
        ("upge --v", {"--version"}),
        ("upge run algo=gr", {"algo=grpo"}),
        ("upge run correction=[tis,kl_k", {"correction=[tis,kl_k1", "correction=[tis,kl_k2", "correction=[tis,kl_k3"}),
        ("upge run 'correction=[icepop", {"correction=[icepop"}),
        ("upge run rollout.eng", {"rollout.engine="}),
        ("upge run rollout.engine=", {"rollout.engine=auto", "rollout.engine=vllm", "rollout.engine=transformers"}),
        ("upge run eval.keep_best=t", {"eval.keep_best=true"}),
        ("upge run stop.alarms=[trunc", {"stop.alarms=[truncated"}),
        ("upge run optimizer.b", {"optimizer.beta1=", "optimizer.beta2="}),
        ("upge run algo=grpo algo.terms.rl.estimator.ma", {f"{MASK}.low=", f"{MASK}.high=", f"{MASK}.dual="}),
        ("upge run algo=grpo algo.terms.rl.estimator.advantage.unb", {"algo.terms.rl.estimator.advantage.unbiased="}),
        ("upge run correction=tis correction.tis.c", {"correction.tis.cap="}),
        ("upge run data=gsm8k data.tr", {"data.train_size="}),
        ("upge run --d", {"--dry-run"}),
        ("upge explain optimizer.l", {"optimizer.lr"}),
        ("upge evaluate suite=smo", {"suite=smoke"}),
        ("upge bench he", {"head"}),
        ("upge bench head voc", {"vocabularies="}),
        ("upge doctor che", {"checks=", "checkpoint."}),
        ("upge faults faults=[mean", {"faults=[mean_of_means"}),
        ("upge regret gat", {"gates="}),
        ("upge referee frame", {"frameworks="}),
        ("upge theory --", {"--docs", "--help"}),
        ("upge run fault=stale", {"fault=stale_weights"}),
        ("upge run log_to=[console,tens", {"log_to=[console,tensorboard"}),
        ("upge run steps=", set()),
        ("upge nothing x", set()),
    ],
)
def test_the_words(line: str, expected: set[str]) -> None:
    assert set(candidates(line)) == expected


def test_the_settings_of_a_file_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("terms: {rl: {gate: {_target_: my_gates.Mine, floor: 0.1}}}", "utf-8")
    assert candidates(f"upge run algo={file} algo.terms.rl.gate.") == ["algo.terms.rl.gate.floor="]


def test_without_a_candidate_nothing_is_printed(capsys, monkeypatch) -> None:
    """A shell would take an empty line for a candidate, and not complete names of files."""
    monkeypatch.setattr(sys, "argv", ["upge", "__complete", "upge watch run"])
    assert cli.main() == 0 and capsys.readouterr().out == ""


def test_every_command_name_and_key_is_a_word() -> None:
    assert {*cli.COMMANDS} <= set(candidates("upge "))
    for group in ("algo", "model", "data", "recipe", "correction"):
        assert set(candidates(f"upge run {group}=")) == {f"{group}={name}" for name in presets(group)}
    top = candidates("upge run ")
    assert {"algo=", "model=", "model.", "steps=", "optimizer.", "data."} <= set(top) and len(top) < 40
    assert {*FLAGS} <= {*cli.COMMANDS}


def test_a_completion_loads_no_large_package() -> None:
    code = "import sys; from experiments.completion.words import candidates as c; c('upge run algo=grpo algo.terms.')\n"
    code += "sys.exit(', '.join({'torch', 'numpy', 'omegaconf', 'upge', 'algorithms'} & {*sys.modules}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_shell_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["fish"]) == 2 and "found fish; give bash or zsh" in capsys.readouterr().err
    assert main([]) == 2


class Terminal:
    """A shell in a terminal, in which `upge` prints its arguments in angle brackets, or completes."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        program += "if sys.argv[1:2] not in (['__complete'], ['completion']):\n"
        program += "    sys.exit(print('got', *(f'<{one}>' for one in sys.argv[1:])))\n"
        program += "from experiments.cli import main\nsys.exit(main())\n"
        (self.bin / "upge").write_text(program)
        (self.bin / "upge").chmod(0o755)
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "HOME": str(folder), "TERM": "dumb", "ZDOTDIR": str(folder)}
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        os.close(follower)

    def send(self, text: str, until: str, seconds: float = 60) -> str:
        """Types `text` and returns what is printed up to and including the pattern `until`."""
        os.write(self.leader, text.encode())
        seen, end = "", time.monotonic() + seconds
        while not re.search(until, seen):
            ready, _, _ = select.select([self.leader], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{until} did not appear: {seen!r}"
            seen += os.read(self.leader, 4096).decode(errors="replace")
        return seen

    def close(self) -> None:
        os.close(self.leader)
        self.process.kill()
        self.process.wait()


SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_real_shell_completes(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    terminal = Terminal(SHELLS[shell], tmp_path)
    try:
        terminal.send(f"source <(upge completion {shell}); echo re''ady\n", "ready")
        for typed, given in {
            "upge run algo=grp\t": "<run> <algo=grpo>",
            "upge run rollout.eng\ttransf\t": "<run> <rollout.engine=transformers>",
            "upge evaluate suite=smo\t": "<evaluate> <suite=smoke>",
            "upge run algo=grpo algo.terms.rl.red\tov\t": "<run> <algo=grpo> <algo.terms.rl.reduction.over=>",
        }.items():
            time.sleep(0.1)
            assert given in terminal.send(typed, r"\S$") + terminal.send("\n", r"got [^\r\n]*[\r\n]"), typed
    finally:
        terminal.close()
