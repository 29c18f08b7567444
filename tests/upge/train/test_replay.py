"""The buffer of earlier rollouts: what is kept, what is drawn, and the step that they join."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

import upge
from tests.upge.train.test_collect import FakeModel, Ranks, algorithm, collector, examples
from upge.errors import ConfigError
from upge.train.metrics import rollout_metrics
from upge.train.replay import ReplayBuffer
from upge.train.sample import Trajectory, assemble

ALONE = SimpleNamespace(rank=0, size=1, is_main=True, gather=lambda value: [value], together=nullcontext)


def buffer(group_size: int = 4, prompts: int = 4, **settings) -> ReplayBuffer:
    return ReplayBuffer(upge.Replay(**settings), group_size, prompts, 5, ALONE)


def rollout(example: int, reward: float, copy: int = 0, logprob: float = -1.0, group: int | None = None) -> Trajectory:
    return Trajectory(
        example=example,
        group=example if group is None else group,
        prompt_ids=(example,),
        response_ids=(example, copy),
        reward=reward,
        is_demonstration=False,
        sampler_logprobs=(logprob, logprob),
        status="ok",
        behavior_logprobs=(logprob, logprob - 1),
    )


def group(example: int, rewards: str, first: int = 0) -> list[Trajectory]:
    """The rollouts of a prompt; '0110' gives their rewards."""
    return [rollout(example, float(r), first + i, -1.0 - i) for i, r in enumerate(rewards)]


def after(one: ReplayBuffer, step: int, *groups: list[Trajectory]) -> ReplayBuffer:
    trajectories = [t for members in groups for t in members]
    one.add(trajectories, one.entering(trajectories), step)
    return one


def kept(one: ReplayBuffer) -> dict[int, list[int]]:
    """Example → the copies that are kept."""
    return {example: [t.response_ids[1] for t in has.rollouts] for example, has in one._prompts.items()}


# What is kept.


def test_successes_of_prompts_that_are_partly_solved():
    groups = group(0, "0000"), group(1, "0110"), group(2, "1111"), group(3, "1000")
    assert buffer().entering([t for members in groups for t in members]) == [5, 6, 12]
    one = after(buffer(), 0, *groups)
    assert kept(one) == {1: [1, 2], 3: [0]} and len(one) == 3
    after(one, 1, group(1, "0001", first=4), group(3, "1111", first=4))
    assert kept(one) == {1: [1, 2, 7]}, "a prompt that all rollouts have solved leaves"
    assert [t.sampled_step for t in one._prompts[1].rollouts] == [0, 0, 1]
    after(one, 2, group(1, "0000", first=8))
    assert kept(one) == {1: [1, 2, 7]} and one._prompts[1].successes == 1
    after(one, 3, group(1, "0100"))
    assert kept(one) == {1: [1, 2, 7]}, "the same response is kept once"


def test_replayed_rollouts_count_in_their_group_and_do_not_enter_again():
    one = after(buffer(), 0, group(1, "0100"))
    (old,) = one.draw(1, ())[1]
    fresh = group(1, "011", first=4)
    trajectories = [*fresh, replace(old, group=1)]
    assert one.entering(trajectories) == [1, 2]
    one.add(trajectories, [1, 2], 1)
    assert kept(one) == {1: [1, 5, 6]} and one._prompts[1].successes == 3
    assert one.metrics(trajectories, 1) == {
        "replay/size": 3, "replay/prompts": 1, "replay/share": 0.25, "replay/age": 1.0
    }  # fmt: skip


def test_a_group_without_a_new_success_updates_the_number_by_which_it_is_drawn():
    one = after(buffer(), 0, group(1, "0110"))
    (old,) = one.draw(1, ())[1]
    trajectories = [*group(1, "000", first=4), replace(old, group=1)]
    after(one, 1, trajectories)
    assert kept(one) == {1: [1, 2]} and one._prompts[1].successes == 1


def test_whole_groups():
    one = after(buffer(keep="all", rollouts=None), 0, group(0, "0000"), group(1, "0110"))
    assert kept(one) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]} and one.fresh_rollouts == 0
    after(one, 1, group(1, "1111", first=4))
    assert kept(one) == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}, "the newest group of a prompt"
    drawn = one.draw(2, ())
    assert sorted(drawn) == [0, 1] and all(len(members) == 4 for members in drawn.values())


def test_the_prompts_without_new_rollouts_leave_first():
    one = buffer(keep="all", rollouts=None, size=8)
    after(one, 0, group(0, "01"), group(1, "01"), group(2, "01"), group(3, "01"))
    after(one, 1, group(0, "10", first=2))
    after(one, 2, group(4, "01"))
    assert kept(one) == {2: [0, 1], 3: [0, 1], 0: [2, 3], 4: [0, 1]}


@pytest.mark.parametrize("settings", [{"keep": "none"}, {"size": 0}, {"share": 0.0}, {"share": 0.24}])
def test_nothing(settings):
    """The share of a step's four prompts is rounded down."""
    one = after(buffer(**settings), 0, group(1, "0110"))
    assert one.entering(group(1, "0110")) == [] and len(one) == 0 and one.draw(1, ()) == {}


def test_nothing_before_the_pass_rate_is_reached():
    one = after(buffer(start=0.5), 0, group(1, "0100"), group(2, "0000"))
    assert len(one) == 0
    after(one, 1, group(1, "0100"), group(2, "1110"))
    assert sorted(kept(one)) == [1, 2]
    after(one, 2, group(3, "0100"))
    assert sorted(kept(one)) == [1, 2, 3], "it has begun, whatever the pass rate is now"


# What is drawn.


def test_as_many_as_asked_for_and_none_that_the_step_has_anyway():
    one = after(buffer(prompts=6), 0, *(group(i, "0110") for i in range(5)))
    assert len(one.draw(0, ())) == 3 and set(one.draw(0, (0, 1, 2))) == {3, 4}
    assert one.draw(0, ()) == one.draw(0, ()) and len({tuple(one.draw(step, ())) for step in range(20)}) > 5
    assert len(kept(one)) == 5, "drawing takes nothing away"


def test_the_likeliest_rollout_of_a_prompt():
    one = after(buffer(), 0, group(1, "0111"))
    (chosen,) = one.draw(0, ())[1]
    assert chosen.response_ids == (1, 1) and chosen.behavior_logprobs == (-2.0, -3.0) and chosen.is_replayed


def shares(prefer: str, steps: int = 4000) -> dict[int, float]:
    """Number of successes → how often a prompt with it is drawn; one prompt has one success, three have two."""
    one = after(buffer(prompts=2, prefer=prefer), 0, group(0, "0001"), *(group(i, "0110") for i in (1, 2, 3)))
    counts = Counter(one._prompts[next(iter(one.draw(step, ())))].successes for step in range(steps))
    return {k: count / steps for k, count in counts.items()}


def test_prompts_are_drawn_by_their_successes():
    """With weights e^(-(k - n/2)²/2): e^(-1/2) for one success of four, 1 for two."""
    expected = 1 / (1 + math.exp(-0.5))
    assert shares("half")[2] == pytest.approx(expected, abs=0.03)
    assert shares("any")[2] == pytest.approx(0.75, abs=0.03)


# In a step.


def replaying(**settings) -> upge.Algorithm:
    return replace(algorithm("rollouts"), replay=upge.Replay(**settings))


def full(**settings) -> ReplayBuffer:
    return after(buffer(2, **settings), 3, *(group(i, "01") for i in range(20, 26)))


def test_replayed_prompts_join_a_step():
    model, one = FakeModel(), full()
    actual, figures, verdicts, _ = collector(replaying(), examples(30), model).collect(7, replay=one)
    plain, *_ = collector(algorithm("rollouts"), examples(30), FakeModel()).collect(7)
    drawn = one.draw(7, {t.example for t in plain})
    assert len(drawn) == 2 and [len(prompts) for prompts in model.rounds] == [2, 2]
    of_groups = [[t for t in actual if t.group == g] for g in range(4)]
    assert [t.index for t in actual] == list(range(8)) and all(len({t.example for t in g}) == 1 for g in of_groups)
    for members in of_groups:
        replayed = [t for t in members if t.is_replayed]
        assert len(members) == 2 and len(replayed) == (members[0].example in drawn)
        assert all(t.sampled_step == 3 and t.reward == 1 for t in replayed)
    fresh = [t for t in actual if t.is_fresh and t.example not in drawn]
    assert {t.response_ids for t in fresh} <= {t.response_ids for t in plain}
    assert verdicts.count == 6 and set(figures) == {"time/rollout", "time/verify"}
    assert rollout_metrics(actual)["response_length"] == 3.0, "replayed responses have two tokens"


def test_whole_groups_are_not_sampled():
    model, one = FakeModel(), full(keep="all", rollouts=None)
    actual, *_ = collector(replaying(keep="all", rollouts=None), examples(30), model).collect(7, replay=one)
    assert [len(prompts) for prompts in model.rounds] == [2] and sum(t.is_replayed for t in actual) == 4
    batch = assemble(actual, 0)
    assert batch.is_replayed.tolist() == [t.is_replayed for t in actual]
    row = next(t.index for t in actual if t.is_replayed)
    assert batch.behavior_logprobs[row, :2].tolist() == list(actual[row].behavior_logprobs)


def test_an_empty_buffer_changes_nothing():
    with_it, without = (
        collector(replaying(), examples(30), FakeModel()).collect(7, replay=one)[0] for one in (buffer(2), None)
    )
    assert with_it == without


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_one_process(size):
    def work(world):
        return collector(replaying(), examples(30), FakeModel(), world).collect(7, replay=full())[0]

    expected = collector(replaying(), examples(30), FakeModel()).collect(7, replay=full())[0]
    assert Ranks(size).run(work) == [expected] * size


def test_saved_and_loaded(tmp_path):
    one = after(buffer(start=0.3), 0, group(0, "0000"), group(1, "0110"), group(3, "1110"))
    one.save(tmp_path, 1)
    other = buffer(start=0.3)
    other.load(tmp_path)
    assert other._prompts == one._prompts and list(other._prompts) == list(one._prompts)
    assert other.draw(5, ()) == one.draw(5, ()) and len(after(other, 1, group(7, "1000"))) == 6, "it has begun"


# Bad settings.


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"share": 1.0}, "replay.share", "fresh rollouts"),
        ({"share": -0.1}, "replay.share", "[0, 1)"),
        ({"size": -1}, "replay.size", "negative"),
        ({"start": 1.5}, "replay.start", "pass rate"),
        ({"rollouts": 0}, "replay.rollouts", "at least 1"),
        ({"rollouts": None}, "replay.rollouts", "keep: all"),
    ],
)
def test_a_bad_setting_is_named(settings, key, words):
    with pytest.raises(ConfigError, match=r".") as error:
        upge.Replay(**settings)
    assert error.value.key == key and words in str(error.value)


def test_what_replay_does_not_go_with():
    with pytest.raises(ConfigError, match="replay does not go with sampling"):
        replace(algorithm("rollouts", rounds=3), replay=upge.Replay())
    with pytest.raises(ConfigError, match="no term's source is rollouts"):
        replace(algorithm("demonstrations"), replay=upge.Replay())
    with pytest.raises(ConfigError, match="leave none to sample"):
        replaying(rollouts=2).check(group_size=2)
