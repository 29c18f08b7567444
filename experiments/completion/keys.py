"""Writes keys.json: every key of the commands with its values, from the settings classes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def keys() -> dict[str, dict[str, Any]]:
    """Command → key → values that can be listed; `bench` and `data` have a mapping for each name."""
    from experiments.bench.__main__ import BENCHES, _bench
    from experiments.compare.__main__ import KEYS
    from experiments.config import presets
    from experiments.diagnose.settings import DiagnoseConfig
    from experiments.doctor.settings import DoctorConfig
    from experiments.doctor.settings import keys as doctor_keys
    from experiments.evaluate.prepare import EvaluateConfig
    from experiments.keys import data_keys
    from experiments.push.__main__ import PushConfig
    from experiments.referee import settings as referee
    from experiments.regret.settings import RegretConfig
    from experiments.regret.settings import keys as regret_keys
    from experiments.run.faults import FAULTS
    from experiments.sweep.settings import SweepConfig
    from experiments.watch.__main__ import WatchConfig
    from upge.config import settings
    from upge.evaluation.suite import BenchmarkConfig

    run = {**run_values(), **_names(("recipe", "correction", "model", "gpus"))}
    evaluate = {one.name: [*one.values] for one in settings(EvaluateConfig)}
    evaluate |= {f"suite.benchmarks.NAME.{one.name}": [*one.values] for one in settings(BenchmarkConfig)}
    doctor, regret = ({name: run.get(name, []) for name, *_ in rows} for rows in (doctor_keys(), regret_keys()))
    return {
        "run": run,
        "evaluate": {"model": [], "suite": [], **evaluate},
        "sweep": {"sweep": [], **_of(SweepConfig)},
        "diagnose": _of(DiagnoseConfig),
        "push": _of(PushConfig),
        "watch": _of(WatchConfig),
        "doctor": {**doctor, **_of(DoctorConfig), "gpus": []},
        "regret": {**regret, **_of(RegretConfig)},
        "referee": _names(referee.KEYS),
        "faults": {"faults": [*FAULTS], "output": []},
        "compare": {name: ["most", "first", "any"] if name == "solved" else [] for name in KEYS},
        "describe": {"algo": [], "correction": []},
        "bench": {name: _of(_bench(name).Settings) for name in sorted(BENCHES)},
        "data": {name: _names(row[0] for row in data_keys(name)) for name in presets("data")},
    }


def run_values() -> dict[str, list[str]]:
    """Key of a run → its values as typed, or its list's items; empty where they cannot be listed."""
    from experiments.run.faults import FAULTS
    from upge.config import settings
    from upge.train.alarms import ALARMS
    from upge.train.config import LOG_TO, RunConfig
    from upge.train.faults import NONE

    values = {one.name: [*one.values] for one in settings(RunConfig)}
    named = {"fault": [NONE, *FAULTS], "log_to": [*LOG_TO], "stop.alarms": sorted(ALARMS), "resume": ["auto", "never"]}
    return values | named


def _of(cls: type) -> dict[str, list[str]]:
    from upge.config import settings

    return {one.name: [*one.values] for one in settings(cls)}


def _names(rows: Iterable[str]) -> dict[str, list[str]]:
    return {name: [] for name in rows}


def text() -> str:
    """The content of keys.json."""
    return json.dumps(keys(), indent=1, ensure_ascii=False) + "\n"
