"""Benchmarks of time and memory: `python -m experiments.bench [NAME] [key=value ...] [--docs]`.

A bench is a module here with a `SUMMARY` line, a class `Settings` of its keys, and `run(settings) -> str`, which
measures with `experiments.bench.measure` and returns Markdown. --docs writes it into docs/performance.md. A bench with
`WITH_PEERS = True` runs in .venv-peers if that exists (`make peers`).
"""

BENCHES = ("verifier", "head", "loss", "step", "accuracy", "growth", "generation", "startup", "mfu", "support")
