"""The referee on other frameworks: their wheels, their missing packages, and the faults that they are known for.

Tests that need a wheel are skipped where it is not in the cache: no test uses the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from experiments.referee import tables, wheels
from experiments.referee.protocol import make_batch
from experiments.referee.run import judged
from experiments.referee.settings import FRAMEWORKS, framework

ROOT = Path(__file__).parents[2]


def test_every_framework_has_cases_of_known_algorithms():
    for name in FRAMEWORKS:
        adapter = framework(name)
        assert len(adapter.VERSIONS) >= 2 and adapter.SUPPLIED
        for case in adapter.cases():
            assert make_batch(case.load()).logprobs.dtype == torch.float64


def test_claims_are_about_cases_and_layouts_that_are_judged():
    for claim in tables.CLAIMS:
        case = next(c for c in framework(claim.framework).cases() if c.name == claim.case)
        assert {*claim.layouts} <= {str(layout) for layout in case.layouts}


def test_wheels_are_unpacked_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UPGE_CACHE", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as packed:
        packed.writestr("thing/__init__.py", "x = 1")
    monkeypatch.setattr(wheels, "_download", lambda distribution, version, into: tmp_path / "a.whl")
    assert not wheels.is_cached("thing", "1.0")
    assert (wheels.fetch("thing", "1.0") / "thing" / "__init__.py").read_text() == "x = 1"
    assert wheels.is_cached("thing", "1.0")
    wheels.forget("thing", "1.0")
    found = judged("trl", "0.0.1", download=False)
    assert "trl 0.0.1 not in" in found.error and "download=true" in found.error


def test_stubs_replace_what_is_missing_and_nothing_else(tmp_path: Path):
    (tmp_path / "frame").mkdir()
    (tmp_path / "frame" / "__init__.py").write_text(
        "import not_there.inner as n\n"
        "from not_there.other import Base, decorate\n"
        "from math import no_such_name, pi\n"
        "class Own(Base):\n    @decorate\n    def one(self): return 1\n"
        "    @decorate(3)\n    def two(self): return 2\n"
        "value: Base | None = None\n"
        "try:\n    import torch_npu\n    npu = True\nexcept ImportError:\n    npu = False\n"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from experiments.referee.stubs import install\n"
        "made = install(['frame']); import frame, json; own = frame.Own()\n"
        "print(json.dumps([own.one(), own.two(), frame.pi, frame.npu, bool(frame.n), sorted(set(made))]))\n"
        "try:\n    import also_not_there\nexcept ImportError:\n    print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    first, second = done.stdout.splitlines()
    assert json.loads(first) == [
        1, 2, pytest.approx(3.141592653589793), False, False,
        ["math.no_such_name", "not_there.inner", "not_there.other"],
    ]  # fmt: skip
    assert second == "refused"


def rows_of(name: str, version: str) -> dict[str, dict[str, dict[str, object]]]:
    """Case → layout → verdict of a version; skips the test if it is not in the cache."""
    found = judged(name, version, download=False)
    if "download=true" in found.error:
        pytest.skip(found.error)
    assert not found.error, found.error
    return {row["case"]: row["layouts"] for row in found.data["rows"] if not row["error"]}


@pytest.mark.slow
def test_the_installed_trl_is_judged():
    rows = rows_of("trl", "installed")
    assert {"grpo", "dapo", "dr_grpo", "sft: nll", "sft: dft", "sapo", "vespo", "luspo, sequence level"} <= {*rows}
    for name, layouts in rows.items():
        for layout in ("whole", "5 columns of padding"):
            assert tables.cell(layouts[layout]) == "=", (name, layout)
    assert tables.cell(rows["dapo"]["4 micro-batches"]) == "="
    assert rows["bnpo"]["4 micro-batches"]["factor"] == "reduction: mean of the micro-batches' means of tokens"


#: (framework, version with the fault, version without, loss, layout, what the referee says of the fault).
FAULTS = [
    ("trl", "1.8.0", "1.9.2", "dapo", "2 micro-batches, sampled for 4",
     "scale: (micro-batches of an update/of a sampling)"),
    ("ms_swift", "4.5.3", "4.6.0", "dapo", "4 micro-batches", "scale: 1/micro-batches"),
    ("openrlhf", "0.10.0", "0.11.2", "sft", "4 micro-batches", "reduction: mean of the micro-batches' means of tokens"),
    ("verl", "0.5.0", "0.9.1", "vanilla, token-mean", "4 micro-batches",
     "reduction: mean of the micro-batches' means of tokens"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "before", "after", "loss", "layout", "said"), FAULTS)
def test_known_faults_come_out_and_vanish(name: str, before: str, after: str, loss: str, layout: str, said: str):
    assert rows_of(name, before)[loss][layout]["factor"] == said
    assert rows_of(name, after)[loss][layout]["factor"] == ""


@pytest.mark.slow
def test_deepspeed_dropped_micro_batches():
    runs = {}
    for version in ("0.18.9", "0.19.0"):
        found = judged("deepspeed", version, download=False)
        if "download=true" in found.error:
            pytest.skip(found.error)
        runs[version] = {name: run["shares"] for name, run in found.data["runs"].items()}
    assert all(share == 1 for shares in runs["0.19.0"].values() for share in shares)
    assert runs["0.18.9"]["4 micro-batches, gradient_accumulation_steps=4"] == [1, 0, 0, 1]
    assert runs["0.18.9"]["2 backward passes, gradient_accumulation_steps=1"] == [0, 1]
    # Two micro-batches were never dropped: the first is stored, and the last adds it.
    assert runs["0.18.9"]["2 micro-batches, gradient_accumulation_steps=2"] == [1, 1]
