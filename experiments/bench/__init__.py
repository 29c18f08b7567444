"""What things cost, measured side by side: `python -m experiments.bench [NAME] [key=value ...] [--docs]`.

A bench is a module here with a `SUMMARY` line, a frozen dataclass `Settings` of its keys, and `run(settings) -> str`,
which measures with `experiments.bench.measure` and returns Markdown. --docs puts that into docs/performance.md.
"""

BENCHES = {"verifier": "experiments.bench.verifier"}
"""Name → module."""
