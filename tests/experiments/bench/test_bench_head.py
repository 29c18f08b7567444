"""The bench of the output head: its check finds a wrong gradient, its memory is the kernel's, its tables render."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import head, heads, measure, peers
from experiments.bench.measure import interleaved
from upge.errors import ConfigError

ROOT = Path(__file__).parents[3]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SMALL = head.Settings(tokens=24, width=16, vocabularies="60", dtypes="float32", memory_tokens=0)
MIB = 2**20


def test_the_reference_is_the_gradient() -> None:
    problem = heads.Problem.made(12, 7, 5, "float64")
    logprobs = (problem.hidden @ problem.weight.t()).log_softmax(-1)
    chosen = logprobs.gather(1, problem.targets[:, None])[:, 0]
    (chosen * problem.coefficients).sum().backward()
    expected = heads.reference(problem)
    assert (
        head.checked(
            [(expected.hidden, problem.hidden.grad), (expected.weight, problem.weight.grad)], 1e-12, "the reference"
        )
        < 1e-12
    )
    torch.testing.assert_close(expected.logprobs, chosen.detach())
    torch.testing.assert_close(expected.entropies, -(logprobs.exp() * logprobs).sum(-1).detach())


def test_every_head_that_is_here_solves_the_problem() -> None:
    for dtype, tolerances in head.TOLERANCES.items():
        problem = heads.Problem.made(24, 60, 16, dtype)
        errors = head.compare(problem, heads.heads(), *tolerances)
        assert set(errors) >= {heads.NAIVE, *heads.OURS} and problem.weight.grad is None


@pytest.mark.parametrize("dtype", head.TOLERANCES)
def test_a_wrong_head_is_found(dtype: str) -> None:
    problem = heads.Problem.made(24, 60, 16, dtype)

    def off(change):
        def wrong(given: heads.Problem) -> heads.Result:
            return change(given, heads.naive(given))

        return wrong

    def one_entry(given: heads.Problem, result: heads.Result) -> heads.Result:
        given.weight.grad[3, 2] += 0.05 * given.weight.grad.abs().max()
        return result

    def missing(given: heads.Problem, result: heads.Result) -> heads.Result:
        given.hidden.grad = None
        return result

    def not_finite(given: heads.Problem, result: heads.Result) -> heads.Result:
        given.hidden.grad[0, 0] = float("nan")
        return result

    def entropies(given: heads.Problem, result: heads.Result) -> heads.Result:
        return result._replace(entropies=result.entropies + 0.3)

    for change, message in {
        one_entry: "gradient off by",
        missing: "gradient is missing",
        not_finite: "gradient off by nan",
        entropies: "entropies are off by 3",
    }.items():
        with pytest.raises(AssertionError, match=f"wrong: .*{message}"):
            head.compare(problem, {"wrong": off(change)}, *head.TOLERANCES[dtype])


def test_a_difference_is_relative_to_the_largest_entry() -> None:
    expected = torch.zeros(10_000, 2).index_put((torch.tensor([9_999]), torch.tensor([0])), torch.tensor(4.0))
    actual = expected.clone()
    actual[5000, 1] = 0.5
    assert head.difference(actual, expected) == 0.125
    assert head.difference(torch.full((3,), 0.5), torch.zeros(3)) == 0.5


def takes(mebibytes: int) -> int:
    """What is measured of a call that holds so much at most, all of it freed at its end."""

    def call() -> None:
        first = torch.ones(mebibytes * MIB // 8)
        del first
        second = [torch.ones(mebibytes * MIB // 8) for _ in range(2)]
        del second

    return measure.peak(call)


def killed() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_is_what_was_held_at_most() -> None:
    actual, signal = measure.in_fresh_process(takes, 256)
    assert signal is None
    assert 256 * MIB * 0.97 < actual < 256 * MIB * 1.03 + 4 * MIB
    assert measure.in_fresh_process(killed) == (None, None)


def test_tables_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "present", lambda name: False)
    monkeypatch.setattr(peers, "summary", lambda: "Without peers.")
    taken = {"float32": 1000 * MIB, "bfloat16": 0}
    monkeypatch.setattr(
        head, "in_fresh_process",
        lambda f, settings, v, dtype, device, name: (None if dtype == "bfloat16" else taken[dtype] // len(name), None),
    )  # fmt: skip
    made = head.run(head.Settings(tokens=24, width=16, vocabularies="50,60", dtypes="float32,bfloat16"))
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    each = 2 + len(heads.OURS)
    assert len(rows) == 2 + 4 * each + 2 * (each - 1) and len({row.count("|") for row in rows}) == 2
    assert "| 60 | bfloat16 | full logits |" in made and "| bfloat16 | full logits | killed |" in made
    assert "Without peers." in made
    assert made.count("goal at most 1.15 times the floor") == 4 and made.count("goal at most 1/20") == 1


def test_a_goal_is_missed_where_a_peer_is_ahead() -> None:
    now = [0.0]

    def thing(cost: float):
        def run(number: int) -> None:
            now[0] += cost

        return run

    things = {heads.FLOOR: thing(1.0), heads.ONE_PASS: thing(1.1), "TRL": thing(1.05), "verl": thing(2.0)}
    timing = interleaved(things, clock=lambda: now[0], cpu_clock=lambda: now[0])
    told = head._goals(timing, 60, "float32")
    assert "1.15 times the floor: 1.10, reached" in told and "ahead of every peer: **missed** (behind TRL)" in told


def test_settings_that_cannot_be_used() -> None:
    for key, value in {"vocabularies": "a,3", "dtypes": "float16", "tokens": 0, "device": "tpu"}.items():
        with pytest.raises(ConfigError, match=key):
            head.run(head.Settings(**{key: value}))


@pytest.mark.skipif(not PEERS.exists(), reason="make peers has not been called")
def test_peers_solve_the_problem() -> None:
    program = (
        "from experiments.bench import head, heads\n"
        "problem = heads.Problem.made(24, 60, 16, 'float32')\n"
        "wanted = {n: heads.HEADS[n] for n in ('Liger', 'verl')}\n"
        "print(head.compare(problem, wanted, 1e-5, 1e-3))\n"
    )
    done = subprocess.run([PEERS, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Liger" in done.stdout, done.stderr


def test_a_program_goes_on_in_the_environment_of_the_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(peers.os, "execv", lambda *arguments: calls.append(arguments))
    peers.enter(tmp_path)
    assert not calls, "there is none"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.bench", "head"])
    peers.enter(tmp_path)
    assert calls == [(python, [str(python), "-m", "experiments.bench", "head"])]
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    peers.enter(tmp_path)
    assert len(calls) == 1, "it runs there already"
