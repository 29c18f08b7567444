"""The trainer's pure parts: order of prompts, chunks, learning rate, the run's folder, the step's figures."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from omegaconf import OmegaConf

import algorithms
from tests.models import trajectories
from upge.config import defaults, from_tree, meanings
from upge.errors import ConfigError
from upge.train.config import OptimizerConfig, RunConfig
from upge.train.files import read_lines
from upge.train.folder import RunFolder
from upge.train.lr_schedule import learning_rate
from upge.train.metrics import rollout_metrics
from upge.train.prompt_order import prompt_indices, stream_seed
from upge.train.sample import Trajectory, assemble
from upge.train.step_batch import StepBatch, update_rows


def test_prompts_are_a_stream_of_permutations():
    """Every epoch holds each prompt once, wherever the steps cut it; another seed, another order."""
    drawn = [i for step in range(9) for i in prompt_indices(step, 4, 12, seed=3)]
    assert [sorted(drawn[e * 12 : e * 12 + 12]) for e in range(3)] == [list(range(12))] * 3
    assert drawn[:12] != drawn[12:24]
    assert drawn[:12] != [i for step in range(3) for i in prompt_indices(step, 4, 12, seed=4)]
    assert prompt_indices(1, 5, 3, seed=0) == ([i for s in range(10) for i in prompt_indices(s, 1, 3, seed=0)][5:10])


def test_seeds_of_streams_differ_and_are_fixed():
    """The value is part of every recorded run: it must never change."""
    assert stream_seed(0, "rollout", 3, 1) == 1364067900
    assert len({stream_seed(0, "rollout", s, g) for s in range(50) for g in range(50)}) == 2500


def test_groups_stay_whole_when_a_step_is_cut():
    batch = trajectories(groups=5)
    chunks = [[batch[i] for i in rows] for rows in update_rows(batch, 2)]
    assert [sorted({t.group for t in chunk}) for chunk in chunks] == [[0, 1, 2], [3, 4]]
    assert sum(chunks, []) == batch


def test_advantages_do_not_depend_on_the_number_of_updates():
    """A critic that says ½ everywhere, four prompts, the second altogether right, the first altogether wrong: whitened
    over the step, whatever the updates; the divisor is each update's own number of tokens."""
    members = [t for t in trajectories(groups=4) if not t.is_demonstration]
    batch = StepBatch(assemble(members, 0), members)
    halves = torch.full(batch.columns.response_mask.shape, 0.5)
    batch = batch._replace(columns=dataclasses.replace(batch.columns, values=halves))
    node = algorithms.read("amft")
    algorithm = algorithms.compose(node, "amft")
    whole = algorithm.plan(batch.columns).terms["rl"].estimator.advantage.values
    assert whole[batch.columns.response_mask].mean().abs() < 1e-12
    for updates in (1, 2, 4):
        cuts = update_rows(members, updates)
        plans = algorithm.plans(batch.columns, cuts)
        assert len(plans) == updates
        for rows, plan in zip(cuts, plans, strict=True):
            assert torch.equal(plan.terms["rl"].estimator.advantage.values, whole[rows])
            tokens = batch.columns.response_mask[rows].sum()
            assert float(plan.terms["rl"].weights.sum()) == pytest.approx(1.0)
            assert plan.terms["rl"].weights.max() == pytest.approx(1 / float(tokens))


def test_assembled_columns():
    """Padding, kinds and sampler log-probs of a rollout and a demonstration."""
    made = assemble(
        [
            Trajectory(0, 0, (5, 6), (7, 8, 9), 1.0, False, (-1.0, -2.0, -3.0)),
            Trajectory(0, 0, (5, 6), (7,), 1.0, True),
            Trajectory(0, 0, (5, 6), (), 0.0, True, preference=-1),
        ],
        step=4,
    )
    assert made.response_mask.tolist() == [[True, True, True], [True, False, False], [False] * 3]
    assert made.sampler_logprobs.tolist() == [[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert made.is_demonstration.tolist() == [False, True, True] and made.preference.tolist() == [0, 0, -1]
    assert made.rewards.dtype == torch.float64 and made.step == 4 and made.logprobs is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(schedule, expected):
    """Two steps of warm-up, six in all."""
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule=schedule)
    actual = [learning_rate(config, step, 6) for step in range(6)]
    assert all(f == pytest.approx(e, abs=1e-6) for f, e in zip(actual, expected, strict=True)), actual


def test_rollout_figures_by_hand():
    """Demonstrations do not enter; a prompt counts as solved with one success."""
    made = [
        Trajectory(0, 0, (1,), (2, 3), 1.0, False, (-0.5, -1.5), True, "ok"),
        Trajectory(0, 0, (1,), (2, 3, 4, 5), 0.0, False, (-1.0, -1.0, -1.0, -1.0), False, "timeout"),
        Trajectory(1, 1, (1,), (2, 3), 0.0, False, (-3.0, -3.0), True, "ok"),
        Trajectory(1, 1, (1,), (2,), 1.0, True),
    ]
    actual = rollout_metrics(made)
    assert actual["reward/mean"] == pytest.approx(1 / 3) and actual["prompts_solved"] == 0.5
    assert actual["entropy"] == pytest.approx(12 / 8) and actual["response_length"] == pytest.approx(8 / 3)
    assert actual["response_cut_share"] == pytest.approx(1 / 3)
    assert rollout_metrics(made[-1:]) == {}


def test_every_setting_has_a_meaning_and_round_trips():
    assert all(meaning for _, _, meaning in meanings(RunConfig))
    assert from_tree(RunConfig, defaults(RunConfig)) == RunConfig()
    with pytest.raises(ConfigError, match="optimizer.lr"):
        from_tree(RunConfig, {"optimizer": {"lr": "fast"}})


def folder_with_run(tmp_path, steps: int = 6) -> tuple[RunFolder, dict]:
    folder = RunFolder(tmp_path / "run")
    tree = {"steps": steps, "seed": 1, "algo": {"x": [1, 2]}}
    metadata = {"command": "c", "started": "now", "from_step": 0}
    folder.start(tree, metadata, continues=False)
    return folder, tree


def test_rewind_drops_what_will_be_recorded_again(tmp_path):
    """Also half a line, half a checkpoint, and rollouts of later steps."""
    folder, _ = folder_with_run(tmp_path)
    for step in range(1, 5):
        folder.append("metrics.jsonl", {"step": step, "loss": float("nan")})
        folder.append("prompts.jsonl", *({"step": step, "prompt": prompt} for prompt in (7, 3)))
        for kind in ("rollouts", "tokens"):
            folder.write_rows(kind, step, [{"prompt": "p"}])
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    (folder.checkpoints / "step_000004.partial").mkdir()
    assert [line["step"] for line in read_lines(folder.path / "metrics.jsonl")] == [1, 2, 3, 4]
    folder.rewind(2)
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    prompts = [(line["step"], line["prompt"]) for line in read_lines(folder.path / "prompts.jsonl")]
    assert prompts == [(1, 7), (1, 3), (2, 7), (2, 3)]
    for kind in ("rollouts", "tokens"):
        assert sorted(p.name for p in (folder.path / kind).iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]
    assert folder.checkpoint_steps() == [] and not list(folder.checkpoints.iterdir())


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path):
    folder, _ = folder_with_run(tmp_path)
    for step in (2, 4, 6):
        (folder.checkpoints / f"{folder.tag(step)}.partial").mkdir()
        assert step not in folder.checkpoint_steps()
        folder.settle(step, keep=2)
    assert folder.checkpoint_steps() == [4, 6]


@pytest.mark.parametrize(
    ("keep", "during", "after"),
    [(0, [2, 4, 6], [2, 4, 6, 8]), (1, [6], [8]), (2, [6], [6, 8]), (3, [4, 6], [4, 6, 8]), (9, [2, 4, 6], None)],
)
def test_the_newest_checkpoint_stays_until_a_new_one_is_complete(tmp_path, keep, during, after):
    """With keep=2 there are never more than two at one time, as with keep=1."""
    folder, _ = folder_with_run(tmp_path)
    for step in (2, 4, 6):
        (folder.checkpoints / folder.tag(step)).mkdir()
    folder.make_room(8, 0, keep)
    assert folder.checkpoint_steps() == during
    (folder.checkpoints / f"{folder.tag(8)}.partial").mkdir()
    folder.settle(8, keep)
    assert folder.checkpoint_steps() == (after or [*during, 8])


def test_by_default_there_is_an_earlier_checkpoint_if_the_newest_is_damaged():
    assert RunConfig().checkpoint.keep == 2


@pytest.mark.parametrize(
    "name", ["step_000003 (copy)", "step_3", "step_\u00b2", "step_", "step_00000\u0663", "step_0000003"]
)
def test_a_name_that_a_run_does_not_give_is_left_alone(tmp_path, name):
    folder, _ = folder_with_run(tmp_path)
    (folder.checkpoints / name).mkdir()
    (folder.path / "rollouts" / f"{name}.jsonl").write_text("")
    assert folder.checkpoint_steps() == []
    folder.rewind(0)
    assert (folder.checkpoints / name).is_dir() and (folder.path / "rollouts" / f"{name}.jsonl").is_file()


def test_finished_means_that_the_model_is_complete(tmp_path):
    """Half an export does not count; a continuation with more steps is unfinished again until its own end."""
    folder, tree = folder_with_run(tmp_path)
    folder.final_partial.mkdir()
    (folder.final_partial / "config.json").write_text("{}")
    assert not folder.is_finished and folder.open(tree, "auto")
    folder.rewind(6)
    assert not folder.final_partial.exists()
    folder.final_partial.mkdir()
    folder.finish(6)
    assert folder.is_finished and folder.final.is_dir()
    with pytest.raises(ConfigError, match="finished"):
        folder.open(tree, "auto")
    more = {**tree, "steps": 9}
    with pytest.raises(ConfigError, match="without a checkpoint"):
        folder.open(more, "auto")
    (folder.checkpoints / folder.tag(6)).mkdir(parents=True)
    assert folder.open(more, "auto")
    folder.start(more, {"command": "c", "started": "later", "from_step": 6}, continues=True)
    assert not folder.is_finished and folder.open(more, "auto")
    assert [start["started"] for start in folder.metadata["starts"]] == ["now", "later"]


def test_the_best_model_survives_interruptions(tmp_path):
    """Only a better evaluation replaces it; a kill between the renamings leaves the new one, half an export none."""
    folder, _ = folder_with_run(tmp_path)

    def line(step: int, mean: float) -> dict:
        return {"step": step, "samples": 4, "all": {"mean@4": mean, "greedy": 1 - mean}}

    def export(name: str) -> None:
        folder.best_partial.mkdir()
        (folder.best_partial / "weights").write_text(name)

    assert folder.best_metadata == {} and folder.is_best(line(0, 0.0))
    export("first")
    folder.settle_best(line(0, 0.25))
    assert folder.best_metadata == {"step": 0, "mean": 0.25, "samples": 4}
    assert not folder.is_best(line(5, 0.25)) and folder.is_best(line(5, 0.26))
    # The evaluation of a later step that a continuation has dropped counts no longer.
    assert folder.is_best({**line(0, 0.0), "step": -1})
    export("half")
    folder.rewind(5)
    assert not folder.best_partial.exists() and (folder.best / "weights").read_text() == "first"
    export("second")
    folder.settle_best(line(5, 0.5))
    folder.best.rename(folder.best_partial)
    folder.rewind(5)
    assert (folder.best / "weights").read_text() == "second" and folder.best_metadata["step"] == 5


def test_refused_folders(tmp_path):
    """A folder that cannot be made, one that another run has just taken."""
    folder, tree = folder_with_run(tmp_path)
    with pytest.raises(ConfigError, match="just begun"):
        folder.start(tree, folder.metadata, continues=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be created"):
        RunFolder(tmp_path / "file" / "run").open(tree, "auto")


def test_steps_may_change_only_where_nothing_depends_on_them(tmp_path):
    folder, tree = folder_with_run(tmp_path)
    for schedule, free in (("constant", True), ("cosine", False), ("linear", False)):
        before = {**tree, "optimizer": {"schedule": schedule}}
        folder.start(before, {"command": "c", "started": "x", "from_step": 0}, continues=True)
        if free:
            assert folder.open({**before, "steps": 9}, "auto") is True
        else:
            with pytest.raises(ConfigError, match="another steps"):
                folder.open({**before, "steps": 9}, "auto")
    folder.start(tree, {"command": "c", "started": "x", "from_step": 0}, continues=True)
    (folder.checkpoints / folder.tag(4)).mkdir()
    with pytest.raises(ConfigError, match="a checkpoint of step 4, beyond steps=3"):
        folder.open({**tree, "steps": 3}, "auto")


def test_a_continuation_must_have_the_same_settings(tmp_path):
    folder, tree = folder_with_run(tmp_path)
    assert folder.open(tree, "auto") is True
    assert folder.open({**tree, "steps": 9}, "auto") is True
    with pytest.raises(ConfigError, match="another seed"):
        folder.open({**tree, "seed": 2}, "auto")
    with pytest.raises(ConfigError, match="algo.x"):
        folder.open({**tree, "algo": {"x": [1, 3]}}, "auto")
    assert OmegaConf.load(folder.path / "config.yaml").seed == 1
    assert len(json.loads((folder.path / "run.json").read_text())["starts"]) == 1
