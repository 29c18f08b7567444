"""Malformed command lines, files and folders of all commands: one message, exit code 2, nothing begun, nothing left.

To add a command line, add a row (arguments, fragments of the message) to its command in `LINES`, or a file to `FILES`.
Each runs in this process, in an empty folder, and must be refused before a model is loaded. See also
tests/experiments/test_bad_input.py, test_evaluate_input.py and test_sweep_settings.py.
"""

from __future__ import annotations

import importlib
import itertools
import os
import resource
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ROOT

TINY = ROOT / "experiments" / "models" / "tiny"
BILLION = 10**12
#: A hundred thousand values in a few lines, by aliases of aliases.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{(f'*{a},' * 10)[:-1]}]\n" for a, b in itertools.pairwise("abcdef")
)
DEEP = "[" * 3000 + "]" * 3000
LONG = "a" * 300

#: Command → rows of (arguments, fragments of the message).
LINES: dict[str, list[tuple[str | list[str], ...]]] = {
    "run": [
        # Numbers.
        ("steps=-1", "steps: found -1"),
        ("steps=1.5", "steps: found 1.5 (float), expected int"),
        ("steps=", "steps: found None"),
        ("steps=1e3", "steps: found 1000.0"),
        ("steps=[1]", "steps: found [1]"),
        ("steps={a: 1}".replace(" ", ""), "steps: found"),
        ("steps=.nan", "steps: found nan"),
        ("steps=true", "steps: found True (bool)"),
        ("steps==3", "steps: found '=3'"),
        ("steps=10000000000", "steps: found 10000000000; it must be at most 1000000000"),
        ("steps=" + "9" * 5000, "steps", "cannot be read"),
        ("seed=-1", "seed: found -1"),
        ("seed=99999999999", "seed: found 99999999999; it must be at most 4294967295"),
        (f"prompts_per_step={BILLION * 10}", "prompts_per_step: found 10000000000000; it must be at most 1048576"),
        (f"group_size={BILLION}", "group_size: found 1000000000000; it must be at most 65536"),
        ("prompts_per_step=1000000 group_size=1000", "group_size: 1000 rollouts of prompts_per_step=1000000"),
        ("optimizer.lr=-1", "optimizer.lr: found -1"),
        ("optimizer.lr=.inf", "optimizer.lr: found inf; give a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr: found nan"),
        ("optimizer.lr=fast", "optimizer.lr: found 'fast'"),
        ("optimizer.beta2=1", "optimizer.beta2: found 1"),
        ("optimizer.epochs=0", "optimizer.epochs: found 0"),
        ("optimizer.epochs=1000000", "optimizer.epochs: found 1000000; it must be at most 10000"),
        (f"optimizer.micro_batch_tokens={BILLION}", "optimizer.micro_batch_tokens", "at most"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps: found -1"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay"),
        ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm"),
        ("optimizer.schedule=cosinus", "optimizer.schedule", "did you mean 'cosine'"),
        ("model.lora.rank=-1", "model.lora.rank: found -1"),
        ("model.lora.rank=1000000000", "model.lora.rank", "at most 65536"),
        ("model.lora.alpha=0", "model.lora.alpha"),
        ("model.lora.dropout=1", "model.lora.dropout"),
        ("model.lora.target_modules=q_proj", "model.lora.target_modules: found 'q_proj' (str), expected list"),
        ("model.lora=3", "model.lora"),
        ("model.dtype=float16", "model.dtype: 'float16' is not one of"),
        ("model.gradient_checkpointing=half", "model.gradient_checkpointing: 'half' is not one of"),
        ("rollout.temperature=0", "rollout.temperature: found 0"),
        ("rollout.temperature=1000", "rollout.temperature: found 1000.0; it must be at most 100"),
        ("rollout.max_prompt_tokens=0", "rollout.max_prompt_tokens: found 0"),
        (f"rollout.max_prompt_tokens={BILLION}", "rollout.max_prompt_tokens", "at most 10000000"),
        ("rollout.max_response_tokens=-5", "rollout.max_response_tokens: found -5"),
        ("rollout.memory_fraction=1.5", "rollout.memory_fraction"),
        ("rollout.max_sequences=-1", "rollout.max_sequences"),
        ("rollout.tensor_parallel=0", "rollout.tensor_parallel"),
        ("rollout.engine=transformers rollout.tensor_parallel=2", "rollout.tensor_parallel", "only vLLM"),
        ("eval.samples=0", "eval.samples: found 0"),
        ("eval.samples=1000000000", "eval.samples", "at most 65536"),
        ("eval.limit=-1", "eval.limit"),
        ("eval.limit=3", "eval.limit: works only with eval.suite"),
        ("eval.top_p=0", "eval.top_p"),
        ("eval.skip=a", "eval.skip: found 'a' (str), expected list"),
        ("eval.suite=papper", "suite: no suite 'papper'; did you mean 'paper'"),
        ("eval.every=-5", "eval.every: found -5"),
        ("checkpoint.every=-1", "checkpoint.every"),
        ("checkpoint.keep=-1", "checkpoint.keep"),
        ("log_rollouts=-1", "log_rollouts"),
        ("data_policy.overlong_prompts=maybe", "data_policy.overlong_prompts: 'maybe' is not one of"),
        ("data_policy.per_level=[1]", "data_policy.per_level: found [1]"),
        (["data_policy.per_level={1: -1}"], "data_policy.per_level: found -1 for '1'"),
        (["data_policy.per_level={nine: 3}"], "data_policy.per_level: 3 problems of 'nine' are asked for"),
        ("data_policy.demonstrated_prompts=-1", "data_policy.demonstrated_prompts"),
        ("stop.nonfinite_updates=0", "stop.nonfinite_updates"),
        ("stop.alarms=[entropie]", "stop.alarms: no alarm 'entropie'; did you mean 'entropy'"),
        ("stop.alarms=entropy", "stop.alarms: found 'entropy' (str), expected list"),
        ("alarms.truncated=2", "alarms.truncated: found 2"),
        ("alarms.steps=0", "alarms.steps: found 0"),
        ("alarms.sampler_drift=0", "alarms.sampler_drift"),
        ("alarms.trunkated=0.5", "alarms.trunkated: unknown key; did you mean 'alarms.truncated'"),
        ("diagnose.gradients_every=-1", "diagnose.gradients_every"),
        ("hardware.gpus=-1", "hardware.gpus"),
        ("hardware.memory=-1", "hardware.memory"),
        ("resume=yes", "resume: found 'yes'; give auto, never"),
        ("deepspeed.offload=disk", "deepspeed.offload: 'disk' is not one of"),
        ("deepspeed.config={fp16:{}}", "deepspeed.config"),
        ("deepspeed.config.zero_optimization=3", "deepspeed.config: zero_optimization: found 3"),
        ("gpus=0", "gpus: '0' is not a number of GPUs"),
        ("gpus=all", "gpus: 'all' is not a number of GPUs"),
        ("gpus=999", "gpus: 999, but this machine has"),
        # The form of arguments and keys.
        ([""], "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("--dry", "is not of the form key=value"),
        ("-h=1", "-h: unknown key"),
        (".=1", "unknown key"),
        ("..steps=1", "unknown key"),
        ("steps.=1", "unknown key"),
        ("steps.x=1", "steps.x: unknown key"),
        ("a" + ".a" * 5000 + "=1", "a key has at most 64 parts"),
        ("x" * 100_000, "is not of the form key=value"),
        ([os.fsdecode(b"output=\xff")], "is not text in UTF-8"),
        ("model.overrides.=1", "model.overrides"),
        ("model=", "model: empty; give a name, or leave it out for model=tiny"),
        ("model.path=", "model.path: empty"),
        ("algo=", "algo: empty"),
        ("data={}", "data: no data '{}'"),
        ("algo=grpo algo=hpt", "algo: given twice"),
        ("recipe=../suite/paper", "recipe: no recipe '../suite/paper'"),
        ("data=../suite/paper", "data: no data '../suite/paper'"),
        ("algo=../../etc/passwd", "algo: no algorithm '../../etc/passwd'"),
        ("algo=nowhere.yaml", "algo: there is no file nowhere.yaml"),
        # What YAML and OmegaConf make of a text.
        (f"data.levels={DEEP}", "data.levels", "nests more than 64 levels"),
        (f"steps={DEEP[:3000]}", "steps", "nests more than 64 levels"),
        (["model.overrides.rope_theta=" + BOMB], "model.overrides.rope_theta", "values, aliases expanded"),
        (["steps=!!python/object/apply:os.system [touch made]"], "steps", "cannot be read"),
        ("model.system=${nothing}", "nothing", "give it a value of its own"),
        ("model.system=${model.system}", "model.system"),
        ("model.system=${oc.decode:[}", "model.system"),
        ("data.seed=${data.seed}", "data.seed"),
        (
            [f"data.x{i + 1}=${{data.x{i}}}${{data.x{i}}}" for i in range(40)] + ["data.x0=xxxxxxxxxx"],
            "references expand",
        ),
        (
            [f"data.x{i + 1}=${{oc.select:data.x{i}}}${{oc.select:data.x{i},1}}" for i in range(40)]
            + ["data.x0=xxxxxxxxxx"],
            "references expand",
        ),
        (["data.k=x0", "data.x0=x", "data.x1=${data.${data.k}}"], "data.x1: found", "without another one inside"),
        (["data.x0=x", "data.x1=${oc.dict.values:data}"], "data.x1: found", "without another one inside"),
        ([f"data.y{i + 1}=${{data.y{i}}}" for i in range(100)] + ["data.y0=x"], "references follow each other"),
        # Prompts.
        ("model.template={prompt:>1000000000}", "model.template", "formats {prompt}"),
        ("model.template={prompt!r}", "model.template", "formats {prompt}"),
        ("model.template={prompt.x}", "model.template", "unknown field '{prompt.x}'"),
        ("model.template={", "model.template", "is no format string"),
        ("model.template={}", "model.template", "name it {prompt}"),
        ("model.template={prompt}{0}", "model.template", "unknown field"),
        ("model.template=" + "{prompt}" * 2000, "model.template", "braces"),
        (["model.template={prompt}" + "x" * 120_000], "model.template", "characters"),
        (["model.template_arguments={x: 1}"], "model.template_arguments.x: the chat template of"),
        ("model.template_arguments=3", "model.template_arguments: found 3"),
        # Models.
        ("model=/nowhere/at/all", "model.path", "there is no such folder"),
        ("model=a/b/c", "model.path", "there is no such folder"),
        ("model=nowhere.gguf", "model.path"),
        ("model.overrides=3", "model.overrides: found 3"),
        ("model.overrides.num_hidden_layers=1000000000", "num_hidden_layers is 1000000000"),
        ("model.overrides.num_hidden_layers=0", "num_hidden_layers is 0"),
        ("model.overrides.num_hidden_layers=many", "model.overrides.num_hidden_layers: found 'many'"),
        ("reference.path=/nowhere algo=grpo correction=kl_k3", "reference.path"),
        ("critic.path=/nowhere algo=ppo", "critic.path"),
        # Algorithms.
        ("algo.terms=3", "algo.terms: found 3"),
        ("algo.terms={}", "algo.terms: found {}"),
        ("algo.terms.rl=null", "algo.terms.rl: found None"),
        ("algo.terms.rl.gate=[]", "algo.terms.rl.gate: found ()"),
        ("algo.terms.rl.source=rollout", "algo.terms.rl.source: 'rollout' is not one of"),
        ("algo.terms.rl.source=null", "algo.terms.rl.source"),
        ("algo.terms.rl.coefficient=.inf", "coefficient"),
        ("algo.terms.rl.reduction.tokens=sometimes", "algo.terms.rl.reduction.tokens: 'sometimes' is not one of"),
        ("algo.terms.rl.reduction.length=0", "length: 0 must be at least 1"),
        (["algo.terms.rl.gate={_target_: os.system, command: touch made}"], "_target_", "belongs to os"),
        (["algo.terms.rl.gate={_target_: subprocess.Popen, args: touch made}"], "_target_", "belongs to subprocess"),
        (["algo.terms.rl.gate={_target_: upge.NoMask}"], "upge.NoMask is the class NoMask, expected a Gate"),
        (["algo.terms.rl.gate={_target_: upge.PassRateAbove, threshold: {_target_: os.getpid}}"], "belongs to os"),
        (["algo.regularizers.x={_target_: upge.KLPenalty, coefficient: 1}"], "algo.regularizers.x.reduction: missing"),
        (["algo.regularizers.a b={}"], "algo.regularizers", "cannot be part of a key"),
        ("correction=[tis", "correction: found '[tis'"),
        ("correction={a:1}", "correction"),
        ("correction=tis,tis", "correction: 'tis' is given twice"),
        ("correction.tis.cap=1", "correction.tis.cap: there is no correction"),
        ("correction=tis correction.tis.cap=-1 algo=grpo", "cap"),
        ("correction=tis algo=sft", "correction: 'tis' cannot be applied to sft"),
        ("algo=sft_then_grpo steps=1", "steps: 1 leaves none for"),
        # Data.
        ("data.train_size=1000000000", "data.train_size: found 1000000000; give a number of at most 1000000"),
        ("data.train_size=0", "data.train_size: found 0"),
        ("data.train_size=1.5", "data.train_size: found 1.5"),
        ("data.train_size=null", "data.train_size: found None"),
        ("data.evaluation_size=-3", "data.evaluation_size: found -3"),
        ("data.train_size=900000", "data.largest: numbers up to 49 make fewer than 112500 different train problems"),
        ("data.largest=1", "data.largest: found 1"),
        (f"data.largest={BILLION}", "data.largest"),
        ("data.levels=[]", "data.levels: expected one or more distinct levels"),
        (["data.levels=[1 numbers]"], "data.levels: '1 numbers' is no level"),
        (["data.levels=[3 numbers, 3 numbers]"], "data.levels"),
        ("data.levels=3", "data.levels"),
        ("data.seed=x", "data.seed: found 'x'"),
        ("data._target_=os.system", "data._target_: 'os.system' belongs to os"),
        ("data._target_=upge.NoMask", "data._target_: upge.NoMask is the class NoMask, expected a DataSet"),
        ("data._target_=3", "data._target_"),
        ("data=gsm8k data.path=/nowhere", "data.path"),
        ("data=table data.path=/nowhere.jsonl", "data.path"),
        ("data=table data.path=. ", "data.path"),
        ("data=table data.path=/dev/null", "data.path"),
        ("data=table data.columns=3", "data.columns"),
        (["data=table", "data.columns={question: q}", "data.path=x.jsonl"], "data.columns.question: unknown"),
        ("data=table data.evaluation_share=1 data.path=x.jsonl", "data.evaluation_share: found 1"),
        ("data=table data.train_size=1000000000000 data.path=x.jsonl", "data.train_size"),
        ("data=mixture data.sets={}", "data.sets: empty"),
        (["data=mixture", "data.sets={a: {_target_: os.getpid}}"], "data.sets.a._target_: 'os.getpid' belongs to os"),
        (["data=mixture", "data.weights={a: 1}"], "data.weights.a: no such set"),
        # The folder.
        ("output=a[b", "output: found 'a[b', whose character '['"),
        ("output=a*", "output: found 'a*'"),
        ("output=a?b", "output: found 'a?b'"),
        (["output=a\nb"], "output: found 'a\\nb'"),
        (f"output={LONG}", "output: a name in 'aaa", "more than 255 bytes"),
        ("output=" + "/".join(["aaaaaaaaa"] * 500), "output: the path 'aaaaaaaaa/", "too long"),
        ("output=~nobody-of-this-name/x", "output: found '~nobody-of-this-name/x'"),
        ("output=/dev/null/x", "output: /dev/null/x cannot be created"),
        ("output=/", "output: / exists and is not a run's folder"),
        # Verifiers.
        ("verify.verifier=os.system", "verify.verifier"),
        ("verify.verifier=nowhere.check", "verify.verifier", "no module 'nowhere'"),
        ("verify.verifier=", "verify.verifier"),
    ],
    "evaluate": [
        (f"model={TINY} suite=smoke limit={BILLION}", "limit: found 1000000000000; it must be at most"),
        (f"model={TINY} suite=smoke seed=-1", "seed: found -1"),
        (f"model={TINY} suite=smoke suite.temperature=1000", "suite.temperature: found 1000"),
        (f"model={TINY} suite=smoke suite.max_response_tokens={BILLION}", "suite.max_response_tokens"),
        (f"model={TINY} suite=smoke output=a[b", "output: found 'a[b'"),
        (f"model={TINY} suite=smoke output={LONG}", "output: a name in"),
        (f"model={TINY} suite=/dev/null", "suite: no suite '/dev/null'"),
        (f"model={TINY} suite=.", "suite: no suite '.'"),
        ("model=. suite=smoke", "model"),
        ("suite=smoke model=/nowhere/at/all", "there is no such folder"),
        (f"model={TINY} suite=smoke suite.benchmarks=3", "suite.benchmarks"),
        (f"model={TINY} suite=smoke steps=3", "steps: unknown key"),
    ],
    "compare": [
        ([], "folder"),
        ("nowhere", "nowhere"),
        (".", "."),
        ("/dev/null", "/dev/null"),
        (". output=", "output: empty"),
        (". output=a*", "output: found 'a*'"),
        (f". resamples={BILLION}", "resamples: found"),
        (". resamples=ten", "resamples: found 'ten'"),
        (". seed=-1", "seed: found '-1'"),
        (". solved=all", "solved: found 'all'"),
        (". name=a", "name: neither a key nor a folder"),
    ],
    "sweep": [
        ([], "sweep: missing"),
        ("sweep=gat", "did you mean 'gate'"),
        ("sweep=/dev/null", "sweep: no sweep '/dev/null'"),
        (f"grid.steps=[1] seeds=0..{BILLION}", "seeds: found"),
        ("grid.steps=[1] seeds=0..99999", "seeds: found"),
        (["grid.a=" + str([*range(200)]), "grid.b=" + str([*range(200)])], "40000 runs, more than 10000"),
        ("grid.steps=[1] jobs=100000", "jobs: found 100000"),
        ("grid.steps=[1] output=a?", "output: found 'a?'"),
        ("grid=3", "grid"),
        ("variants=[a]", "variants"),
        (f"grid.steps={DEEP}", "nests more than"),
    ],
    "diagnose": [
        ("prompts=0", "prompts: found 0"),
        (f"prompts={BILLION} prompts_per_step=1", "prompts: found 1000000000000"),
        ("prompts_per_step=5", "prompts_per_step: 5 does not divide"),
        ("group_size=1", "group_size: found 1"),
        ("algos=[nope]", "nope"),
        ("algos=3", "algos: found 3"),
        ("policies=3", "policies: found 3"),
        ("sketch=-1", "sketch: found -1"),
        ("exact=maybe", "exact: found 'maybe'"),
        ("run=nowhere", "run: nowhere has no config.yaml"),
        ("output=a*", "output: found 'a*'"),
        ("colour=blue", "colour"),
    ],
    "report": [
        ("nowhere", "nowhere: there is no such folder"),
        (".", "is not the folder of a run"),
        ("/dev/null", "no such"),
    ],
    "describe": [
        ("algo=nope", "algo: no algorithm 'nope'"),
        ("nothing=1", "give algo=NAME"),
        ("algo.terms.rl.coefficient=1", "also give algo=NAME"),
        ("algo=grpo correction=nope", "correction: no correction 'nope'"),
        ("algo=grpo algo.terms.x.source=all", "algo.terms.x.source"),
        (f"algo=grpo algo.terms.rl.coefficient={DEEP}", "nests more than"),
    ],
    "doctor": [
        ("checks=[nope]", "checks"),
        ("checks=[]", "checks"),
        ("prompts=0", "prompts: found 0"),
        (f"prompts={BILLION}", "prompts: found"),
        ("random=maybe", "random: found 'maybe'"),
        ("colour=blue", "colour: unknown key"),
        ("output=a*", "output: found 'a*'"),
        ("gpus=x", "gpus: 'x' is not a number"),
    ],
    "bench": [
        ("nope", "nope"),
        ("loss colour=blue", "colour=blue"),
        ("loss groups=many", "groups: found 'many'"),
        (f"loss group_size={BILLION}", "group_size: found 1000000000000; it must be at most 4096"),
        ("loss scale=.inf", "scale: found inf"),
        ("loss no_signal=1", "no_signal: found 1"),
        (f"loss groups={DEEP}", "nests more than"),
        (f"head tokens={BILLION}", "tokens: found 1000000000000"),
        ("head vocabularies=99999999999", "vocabularies: found '99999999999'"),
        ("head vocabularies=\u00b2", "vocabularies: found"),
        ("head threads=-1", "threads: found -1"),
        ("growth scale=.nan", "scale: found nan"),
        (f"growth vocabulary={BILLION}", "vocabulary: found 1000000000000"),
        ("growth groups=0", "groups: found 0"),
        (f"generation prompts={BILLION}", "prompts: found 1000000000000"),
        ("generation transformers=maybe", "transformers: found 'maybe'"),
        ("accuracy steps=0", "steps: found 0"),
        (f"accuracy seeds={BILLION}", "seeds: found 1000000000000"),
        ("step pairs=-1", "pairs: found -1"),
        (f"step real_tokens={BILLION}", "real_tokens: found 1000000000000"),
        ("verifier answers=-1", "answers: found -1"),
        (f"verifier pairs={BILLION}", "pairs: found 1000000000000"),
        ("verifier time_limit=0", "time_limit: found 0"),
        ("mfu micro_batches=99999999999", "micro_batches: found '99999999999'"),
        ("mfu products=1.5", "products: found 1.5"),
        ("startup rounds=1000000000", "rounds: found 1000000000"),
    ],
    "theory": [("--doc", "give --docs")],
    "scaling": [("--doc", "give --docs")],
    "table1": [("--nope", "--nope")],
    "check_answers": [
        ([], "no data file is named"),
        ("nowhere.jsonl", "no file 'nowhere.jsonl'"),
        ("folder=nowhere", "no folder"),
    ],
    "pretrain": [
        ("--steps 0", "--steps"),
        ("--output x --steps 0", "--steps: found 0"),
        ("--output x --noise 2", "--noise"),
    ],
}
ROWS = [(command, *row) for command, rows in LINES.items() for row in rows]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Starts in an empty folder, without the hub, with little memory, and without ever training or sampling."""

    def begun(*_: object) -> None:
        raise AssertionError("the input was not refused")

    for place in ("run.__main__.connect", "evaluate.__main__._sample", "sweep.__main__.execute.run"):
        monkeypatch.setattr(f"experiments.{place}", begun, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, hard))
    yield tmp_path / "here"
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    """Runs a command in this process; returns its message."""
    module = importlib.import_module(f"experiments.{command}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"experiments.{command}.__main__")
    capsys.readouterr()
    try:
        code = module.main(list(arguments))
    except SystemExit as left:  # argparse
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2, f"exit code {code}\n{out[-2000:]}\n{err[-2000:]}"
    assert err.count("error:") == 1 and "Traceback" not in out + err, err[-2000:]
    assert len(err) < 3000, f"a message of {len(err)} characters"
    return err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}"[:60].encode("ascii", "replace").decode())
def test_refused_with_one_message(row: tuple, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, given, *fragments = row
    arguments = shlex.split(given.replace("\\", "\\\\")) if isinstance(given, str) else [*given]
    if command == "run" and not any(one.startswith("output=") for one in arguments):
        arguments.append("output=new")
    message = refused(capsys, command, *arguments)
    for fragment in fragments:
        assert fragment in message, message
    assert not any(empty_folder.iterdir()), f"left behind: {[*empty_folder.iterdir()]}"
