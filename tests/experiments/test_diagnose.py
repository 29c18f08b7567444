"""The command line of the diagnosis: its folder, its numbers, its figures, and what it refuses."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from experiments.config import MODELS, compose
from experiments.diagnose import __main__ as diagnose
from experiments.diagnose import measuring, sampling, settings, write
from experiments.diagnose.sampling import Policy, policies
from experiments.diagnose.write import ranged
from experiments.run.models import check_distributions
from tests.running import SMALL, run
from upge.errors import ConfigError, ModelError
from upge.measure import Estimated

#: A pool of seconds.
TINY = (
    "data.levels=[2 numbers,3 numbers,4 mixed]", "data.train_size=24", "prompts=6", "prompts_per_step=3",
    "group_size=3", "batches=6", "reference=8", "pass_samples=4", "sketch=256", "rollout.max_response_tokens=48",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("diagnosis") / "found"
    arguments = ["algos=[sft,grpo,gspo,hpt,ppo,dpo,grpo+kl_k3]", "held_out=4", *TINY, f"output={path}"]
    assert diagnose.main(arguments) == 0
    return path


@pytest.fixture(scope="module")
def results(folder) -> dict:
    return json.loads((folder / "diagnosis.json").read_text())


def test_every_number_is_recorded(results):
    (policy,) = results["policies"]
    names = [line["name"] for line in policy["measured"]]
    assert names == ["sft", "grpo", "gspo", "hpt", "hpt.rl", "hpt.sft", "dpo", "grpo+kl_k3", "grpo+kl_k3.rl"]
    assert policy["details"]["rounds"] == 3 and policy["details"]["batches"] == 6 and policy["details"]["sketch"] == 256
    for line in policy["measured"]:
        overall = line["overall"]
        assert overall["power"]["value"] > 0 and -1 <= overall["alignment"]["value"] <= 1
        assert line["held_out"] is not None and line["imitation"] is not None
    assert ["grpo", "gspo", "grpo+kl_k3"] == next(group for group in policy["same"] if "grpo" in group)[:3]
    assert set(policy["thresholds"]) == {"hpt"} and len(policy["thresholds"]["hpt"]) == 4
    assert policy["cosines"]["grpo, gspo"]["value"] in (None, pytest.approx(1.0))
    assert sum(len(one["prompts"]) for one in policy["bins"]) == 6
    assert results["settings"]["prompts"] == 6 and results["command"].startswith("python")
    assert any("ppo is left out" in note for note in results["notes"])
    assert any("the reference policy is the policy itself" in note for note in results["notes"])


def test_tables_figures_and_page_are_written(folder):
    assert {path.suffix for path in folder.glob("bias_variance.*")} == {".png", ".svg"}
    assert (folder / "cosines.png").stat().st_size > 10_000 and (folder / "signal_by_pass_rate.svg").is_file()
    text = (folder / "table.md").read_text()
    assert "| algorithm | cosine |" in text and "| hpt.sft | demonstrations |" in text
    page = (folder / "diagnosis.html").read_text()
    assert page.count("<svg") >= 3 and "http-equiv" not in page and "src=" not in page


def test_the_same_seed_gives_the_same_numbers(results, tmp_path):
    arguments = ["algos=[sft,grpo,gspo,hpt,ppo,dpo,grpo+kl_k3]", "held_out=4", *TINY, f"output={tmp_path / 'again'}"]
    assert diagnose.main(arguments) == 0
    again = json.loads((tmp_path / "again" / "diagnosis.json").read_text())
    for a, b in zip(results["policies"][0]["measured"], again["policies"][0]["measured"], strict=True):
        assert a["name"] == b["name"]
        for figure in ("power", "scale"):
            values = [one["overall"][figure]["value"] for one in (a, b)]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)


def test_the_exact_diagnosis(tmp_path, capsys):
    assert (
        diagnose.main(["exact=true", "algos=[rloo,sft,hpt,ppo]", "group_size=2", f"output={tmp_path / 'exact'}"]) == 0
    )
    shown = capsys.readouterr().out
    assert (
        "exact sums over all batches" in " ".join(shown.split())
        and (tmp_path / "exact" / "bias_variance.png").is_file()
    )
    whole = json.loads((tmp_path / "exact" / "diagnosis.json").read_text())["policies"][0]
    rloo = next(line for line in whole["measured"] if line["name"] == "rloo")["overall"]
    assert rloo["raw_bias"]["value"] == pytest.approx(0, abs=1e-7) and rloo["snr"]["low"] == rloo["snr"]["value"]
    assert "ppo" in {line["name"] for line in whole["measured"]}, "this setting has a critic"


@pytest.mark.slow
def test_a_run_s_checkpoints_are_policies(tmp_path):
    """Where it began, and each checkpoint: unpacked, they are what the run has exported."""
    output = tmp_path / "run"
    run(*SMALL, "algo=sft", "steps=2", "checkpoint.every=1", "checkpoint.keep=0", f"output={output}")
    chosen = settings.choose([f"run={output}", "algos=[sft,grpo]", *(t for t in TINY if "rollout" not in t)])
    assert chosen.run.rollout.max_response_tokens == 64, "as the run had it"
    with policies(chosen) as results:
        assert [one.label for one in results] == ["0", "1", "2"] and all(isinstance(one, Policy) for one in results)
        from safetensors.torch import load_file

        last, final = (load_file(f"{path}/model.safetensors") for path in (results[-1].model.path, output / "final"))
        first = load_file(f"{results[1].model.path}/model.safetensors")
    assert all(bool((last[name] == final[name]).all()) for name in final)
    assert any(bool((first[name] != final[name]).any()) for name in final)
    arguments = [
        f"policies=[start:tiny,end:{output / 'final'}]",
        "algos=[sft,hpt,gkd,eaft]",
        f"teacher.path={output / 'final'}",
        *TINY,
        f"output={tmp_path / 'two'}",
    ]
    assert diagnose.main(arguments) == 0
    assert (tmp_path / "two" / "over_training.png").is_file() and (tmp_path / "two" / "end" / "cosines.svg").is_file()
    whole = json.loads((tmp_path / "two" / "diagnosis.json").read_text())
    assert [one["label"] for one in whole["policies"]] == ["start", "end"]
    # The teacher is the policy at the end, where nothing is left to distil.
    powers = [
        {line["name"]: line["overall"]["power"]["value"] for line in one["measured"]} for one in whole["policies"]
    ]
    assert powers[0]["gkd"] > 0 and powers[1].get("gkd", 0.0) < 1e-6 * powers[0]["gkd"] and powers[1]["eaft"] > 0
    assert any("the teacher is" in note for note in whole["notes"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["algos=[nothing]"], "algos: no algorithm 'nothing'"),
        (["algos=[ppo]"], "nothing is left to measure: ppo: it needs a critic's values"),
        (["algos=[gkd]"], "gkd: it needs a teacher; give another model with teacher.path"),
        (["algos=[gkd]", "teacher.path=nowhere"], "'nowhere' is neither a model's folder"),
        (["algos=[sft_then_grpo]"], "has the stages demonstrate, reinforce"),
        (["algos=[]"], "give lists of names"),
        (["prompts=10", "prompts_per_step=4"], "4 does not divide prompts=10"),
        (["group_size=1"], "group_size: found 1; give at least 2"),
        (["sketch=-1"], "sketch: found -1"),
        (["prompts=many"], "prompts: "),
        (["promts=3"], "did you mean 'prompts'"),
        (["steps=3"], "steps: unknown key"),
        (["optimizer.lr=1"], "optimizer.lr: unknown key"),
        (["algos"], "not of the form key=value"),
        (["run=nowhere"], "no config.yaml"),
        (["policies=[nowhere/at/all]"], "neither a model's folder"),
        (["prompts=600", "prompts_per_step=6"], "prompts: 600, but the data set has"),
        (["held_out=9999", "prompts=16"], "held_out: 9999"),
        (["held_out=2", "data_policy.per_level={nothing: 2}"], "data_policy.per_level: 2 problems of 'nothing'"),
        (["exact=true", "algos=[grpo]", "group_size=9"], "group_size: 9 with exact=true"),
        (["exact=true", "batches=8", "rollout.temperature=2"], "batches: has no effect with exact=true"),
        (["policies=[a:tiny,b:tiny,A:tiny]"], "several would be called 'a'"),
        (["model=nowhere"], "model"),
    ],
)
def test_bad_input_is_refused(arguments, error, capsys, tmp_path):
    """With exit code 2, a message, and no folder."""
    assert diagnose.main([*arguments, f"output={tmp_path / 'out'}"]) == 2
    assert error in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(folder, capsys):
    assert diagnose.main(["exact=true", "algos=[grpo]", f"output={folder}"]) == 2
    assert "exists; choose another" in capsys.readouterr().err


def test_a_model_with_fewer_tokens_is_named(monkeypatch, capsys, tmp_path):
    """By its configuration where distributions are compared, else once it is asked for a token that it lacks."""
    tree = json.loads((MODELS / "tiny" / "config.json").read_text())
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    (smaller / "config.json").write_text(json.dumps(tree | {"vocab_size": tree["vocab_size"] - 1}))
    size = f"predicts {tree['vocab_size'] - 1} tokens and the policy {tree['vocab_size']}; give a model with at least"
    assert diagnose.main(["algos=[gift]", f"reference.path={smaller}", *TINY, f"output={tmp_path / 'out'}"]) == 2
    assert f"reference.path: '{smaller}' {size}" in capsys.readouterr().err
    composed = compose(["algo=gift", f"reference.path={smaller}"])
    with pytest.raises(ConfigError, match=size) as caught:
        check_distributions(composed.config, composed.algorithm.needs)
    assert caught.value.key == "reference.path"
    pool = SimpleNamespace(pairs=lambda: [((1,), (9,))])
    monkeypatch.setattr(measuring, "sample", lambda *_: SimpleNamespace(pool=pool))
    monkeypatch.setattr(measuring, "load_model", lambda model: None)
    monkeypatch.setattr(measuring, "ModelScores", lambda *_, **__: SimpleNamespace(vocabulary=5))
    chosen = settings.choose(["algos=[grpo+kl_k3]"])
    model = chosen.run.model
    with pytest.raises(ModelError, match="reference.path: this model knows 5 tokens and got token 9; give one with"):
        measuring.measure(chosen, SimpleNamespace(), Policy("policy", model), {"reference": model}, print)


def test_distributions_beyond_the_memory_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measuring.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert diagnose.main([*TINY, "algos=[eaft]", f"output={tmp_path / 'out'}"]) == 2
    assert "for the distributions at all tokens, more than 60% of" in capsys.readouterr().err


def test_gradients_beyond_the_memory_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measuring.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    assert diagnose.main([*TINY, "algos=[grpo]", "sketch=0", f"output={tmp_path / 'out'}"]) == 2
    assert "GiB of gradients" in capsys.readouterr().err


def test_every_part_of_the_reference_has_a_baseline():
    """Whatever number is asked for: as many in each part, two at least, and 8 parts where they suffice."""
    for asked in range(4, 70):
        size, count = sampling._parted(asked)
        (parts,) = sampling._parts([list(range(count))], size)
        assert {len(part) for part in parts} == {size} and asked <= count < asked + size and size >= 2
        assert 2 <= len(parts) <= sampling.PARTS and (asked % 8 or asked < 16 or len(parts) == 8)


def test_there_are_rounds_enough_for_errors():
    """The example of docs/diagnose.md for a large model asks for no more batches than a round or two has."""
    few = settings.DiagnoseConfig(algos=["sft"], prompts=8, prompts_per_step=4, batches=2)
    assert few.rounds == 3 and settings.DiagnoseConfig(algos=["sft"]).rounds == 8


def test_data_policy_is_that_of_a_run():
    """What it leaves out of training is not measured on either."""
    arguments = ["algos=[sft]", *TINY, "data_policy.per_level={3 numbers: 7}"]
    results = sampling.problems(chosen := settings.choose(arguments), chosen.run.model)
    assert {example.problem.level for example in results.examples} == {"3 numbers"}
    with pytest.raises(ConfigError, match="prompts: 6, but the data set has 5"):
        sampling.problems(settings.choose([*arguments, "data_policy.demonstrated_prompts=5"]), chosen.run.model)


def test_help_names_every_key(capsys):
    assert diagnose.main(["--help", "all"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}=" in text and meaning in " ".join(text.split()) for name, _, meaning in settings.keys())


def test_output_takes_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": "some/where", "data": "arithmetic"}
    assert str(diagnose.output_folder("", names)) == "diagnoses/where-arithmetic"
    (tmp_path / "diagnoses" / "where-arithmetic").mkdir(parents=True)
    assert str(diagnose.output_folder("", names)) == "diagnoses/where-arithmetic-2"


def test_numbers_in_print():
    assert ranged(Estimated(0.421, 0.31, 0.53)) == "0.42 (0.31..0.53)" and ranged(None) == "–"
    assert ranged(Estimated.exactly(0.5)) == "0.50" and ranged(Estimated(math.nan, 0, 0)) == "–"
    assert ranged(Estimated.exactly(math.inf)) == "∞" and ranged(Estimated(1.0, math.nan, math.nan)) == "1.00"
    assert write.plain({"a": math.nan, ("b", "c"): Estimated.exactly(1.0)}) == {
        "a": None, "b, c": {"value": 1.0, "low": 1.0, "high": 1.0}
    }  # fmt: skip
    with pytest.raises(ConfigError):
        settings.DiagnoseConfig(algos=[])
