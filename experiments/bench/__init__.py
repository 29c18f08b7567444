"""Benchmarks of time and memory: `python -m experiments.bench [NAME] [key=value ...] [--docs]`.

A bench is a module here with a `SUMMARY` line, a frozen dataclass `Settings` of its keys, and `run(settings) -> str`,
which measures with `experiments.bench.measure` and returns Markdown. --docs writes it into docs/performance.md. A bench
with `WITH_PEERS = True` runs in .venv-peers if that exists (`make peers`).
"""

BENCHES = {
    "verifier": "experiments.bench.verifier",
    "head": "experiments.bench.head",
    "loss": "experiments.bench.loss",
    "step": "experiments.bench.step",
    "accuracy": "experiments.bench.accuracy",
    "growth": "experiments.bench.growth",
    "generation": "experiments.bench.generation",
    "startup": "experiments.bench.startup",
}
"""Name → module."""
