"""What a configuration names is checked before it is imported or called, and nothing else can run or be reached."""

from __future__ import annotations

import ast
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import algorithms
import upge
from tests import forked
from tests.running import ROOT, SMALL, environment
from upge.data import DataSet
from upge.errors import ConfigError
from upge.gates import Gate
from upge.instantiate import build

MASK = "terms.rl.estimator.mask"


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(*overrides: str, algorithm: str = "grpo") -> str:
    with pytest.raises(ConfigError) as caught:
        algorithms.load(algorithm, overrides)
    return str(caught.value)


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "builtins.eval", "shutil.rmtree", "torch.nn.Linear"])
def test_nothing_of_python_or_of_an_installed_package_is_called(target: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    message = refused(f"{MASK}={{_target_: {target}, command: 'touch {made}'}}")
    assert f"algo.{MASK}._target_: '{target}' belongs to {target.partition('.')[0]}" in message
    assert "a file of your own" in message and not made.exists()


def test_no_foreign_module_is_imported() -> None:
    """Importing it would already run its code: `antigravity` opens a browser."""
    assert "belongs to antigravity" in refused(f"{MASK}={{_target_: antigravity.Mask}}")
    assert "antigravity" not in sys.modules


def test_a_foreign_function_in_a_file_of_upge_is_not_called() -> None:
    assert "'upge.cache.contextmanager' belongs to contextlib" in refused(
        f"{MASK}={{_target_: upge.cache.contextmanager}}"
    )


def test_a_class_of_another_kind_is_not_made(own_file: Path) -> None:
    text = "from pathlib import Path\nclass Loud:\n    def __init__(self, path=''): Path(path).touch()\n"
    (own_file / "loud_part.py").write_text(text)
    made = own_file / "made"
    message = refused(f"{MASK}={{_target_: loud_part.Loud, path: {made}}}")
    assert message == f"algo.{MASK}._target_: loud_part.Loud is the class Loud, expected a StabilizationMask"
    inner = f"{{_target_: upge.AllOf, masks: [{{_target_: loud_part.Loud, path: {made}}}]}}"
    assert f"algo.{MASK}.masks.0._target_" in refused(f"{MASK}={inner}")
    assert f"algo.{MASK}.high._target_" in refused(f"{MASK}.high={{_target_: loud_part.Loud, path: {made}}}")
    assert not made.exists()


def test_a_function_is_judged_by_its_return_annotation(own_file: Path) -> None:
    text = """
    import upge
    def wide(high: float = 0.5) -> upge.PPOClip:
        return upge.PPOClip(high=high)
    def silent():
        raise AssertionError("called")
    def other() -> upge.Gate:
        raise AssertionError("called")
    """
    (own_file / "own_functions.py").write_text(textwrap.dedent(text))
    algorithm = algorithms.load("grpo", [f"{MASK}={{_target_: own_functions.wide, high: 0.3}}"])
    assert algorithm.terms["rl"].estimator.mask == upge.PPOClip(high=0.3)
    assert "return annotation (-> CLASS)" in refused(f"{MASK}={{_target_: own_functions.silent}}")
    assert "returns Gate, expected a StabilizationMask" in refused(f"{MASK}={{_target_: own_functions.other}}")


def test_a_function_of_upge_is_not_called_where_a_users_part_says_nothing(own_file: Path) -> None:
    """`isolation.kill` would kill a process."""
    text = "import upge\ndef wide(high=0.5) -> upge.PPOClip: return upge.PPOClip(high=high)\n"
    (own_file / "loose_function.py").write_text(text)
    inner = "{_target_: upge.verify.isolation.kill, pid: 1}"
    message = refused(f"{MASK}={{_target_: loose_function.wide, high: {inner}}}")
    assert f"algo.{MASK}.high._target_: upge.verify.isolation.kill is a function of upge" in message


def test_a_data_set_needs_load(own_file: Path) -> None:
    (own_file / "own_data.py").write_text("class Empty:\n    pass\nclass Good:\n    def load(self): return 1\n")
    with pytest.raises(ConfigError, match=r"data._target_: own_data.Empty is the class Empty, expected a DataSet"):
        build({"_target_": "own_data.Empty"}, "data", DataSet)
    assert build({"_target_": "own_data.Good"}, "data", DataSet).load() == 1
    mixture = {"_target_": "upge.data.Mixture", "sets": {"a": {"_target_": "own_data.Empty"}}}
    with pytest.raises(ConfigError, match=r"data.sets.a._target_: own_data.Empty is the class Empty"):
        build(mixture, "data", DataSet)


def test_a_file_that_leaves_is_a_broken_file(own_file: Path) -> None:
    (own_file / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match="importing leaving failed: SystemExit"):
        build({"_target_": "leaving.Part"}, "gate", Gate)


#: Calls of libraries that may run code which comes with a model.
LOADERS = {"from_pretrained", "from_config", "LLM", "EngineArgs"}


def test_no_call_trusts_code_that_comes_with_a_model() -> None:
    """Said in every call: without it transformers asks on the terminal, and an environment variable could answer."""
    trusting = []
    for file in [*ROOT.glob("upge/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        source = file.read_text("utf-8")
        for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
            name, owner = getattr(call.func, "attr", ""), getattr(getattr(call.func, "value", None), "id", "")
            given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            if name in LOADERS and owner != "GenerationConfig" and given.get("trust_remote_code") is not False:
                trusting.append((file.relative_to(ROOT).as_posix(), name))
    # The first gets its options as a dictionary, in which this is one; the second is a tokenizer of this repository.
    assert trusting == [("upge/rollout/vllm_engine.py", "LLM"), ("experiments/bench/peers.py", "from_pretrained")]
    assert "trust_remote_code=False" in (ROOT / "upge/rollout/vllm_engine.py").read_text()


LISTENING = """
import os, sys
import tests.faults.test_targets as this
import upge.train.trainer as trainer
step = trainer.Trainer._step
def watched(self):
    result = step(self)
    print("listens on", *sorted(this.listening()), flush=True)
    return result
trainer.Trainer._step = watched
from experiments.run.__main__ import main
sys.exit(main())
"""


def listening() -> set[str]:
    """The local addresses, in hexadecimal, on which this process and its children listen."""
    inodes = set()
    for process in _family(os.getpid()):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            try:
                name = os.readlink(descriptor)
            except OSError:  # closed in the meantime
                continue
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def _family(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in _family(int(child)))]


#: 127.0.0.1, ::1 and ::ffff:127.0.0.1 as the kernel writes them.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="needs /proc")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_single_process_listens_on_the_loopback_interface_only(engine: str, own_file: Path) -> None:
    (own_file / "listening_run.py").write_text(LISTENING)
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(own_file)])
    arguments = [*SMALL, "steps=1", "eval.every=-1", f"rollout.engine={engine}", f"output={own_file / 'run'}"]
    done = forked.run("listening_run", *arguments, environment=variables, vllm=engine == "vllm")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("listens on"))
    assert set(line.split()[2:]) <= LOOPBACK
