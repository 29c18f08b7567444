"""A checkpoint of one number of ranks is continued by another."""

from __future__ import annotations

import pytest
import torch

from tests.models import save_odd_model
from tests.reshard_ranks import ENGINES, LATE, OTHER, State
from tests.upge.train.test_update import launch
from upge.train.resharding import Layout, reshard, reshard_states

#: Checkpoints: the ranks that write each, and the checkpoint that they continue.
RUNS = {"one": (1, "new"), "two": (2, "one"), "one again": (1, "two"), "four": (4, "two")}
CONTINUED = [name for name, (_, source) in RUNS.items() if source != "new"]
SOURCES = [source for _, source in RUNS.values()]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[tuple[str, str], State]]:
    """The results of tests/reshard_ranks.py for every checkpoint. No number of ranks divides the model evenly."""
    folder = tmp_path_factory.mktemp("resharding")
    save_odd_model(folder / "model", tied=True, layers=1)
    for name, (ranks, source) in RUNS.items():
        launch("reshard_ranks", ranks, folder / "model", folder, source, name, int(name in SOURCES))
    return {name: {k: State(*v) for k, v in torch.load(folder / f"{name}.pt").items()} for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CONTINUED)
def test_everything_is_taken_over_exactly(results, name, engine):
    """Weights, master weights, all sets of moments with their step counts, the one in use, and the number of steps."""
    saved, loaded = results[RUNS[name][1]]["saved", engine], results[name]["loaded", engine]
    assert loaded.position == saved.position and loaded.in_use == saved.in_use == LATE
    for before, now in ((saved.masters, loaded.masters), (saved.weights, loaded.weights)):
        assert before.keys() == now.keys()
        for parameter, tensor in before.items():
            assert torch.equal(now[parameter], tensor), parameter
    steps = {key: state and state[0] for key, state in loaded.sets.items()}
    assert steps == {"main": 2, OTHER: 1, LATE: None if name == "two" else 1}
    for key, state in saved.sets.items():
        if state is None:
            continue
        assert state[0] == steps[key] and loaded.sets[key][1].keys() == state[1].keys()
        for parameter, pair in state[1].items():
            assert all(map(torch.equal, loaded.sets[key][1][parameter], pair)), (key, parameter)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CONTINUED)
def test_the_next_update_is_that_of_the_undisturbed_run(results, name, engine):
    """To the rounding of sums in another order."""
    source = results[RUNS[name][1]]
    before, undisturbed = source["saved", engine].masters, source["last", engine].masters
    continued = results[name]["saved" if name in SOURCES else "last", engine].masters
    for parameter, tensor in undisturbed.items():
        step = float((tensor - before[parameter]).norm())
        difference = float((continued[parameter] - tensor).norm())
        assert difference <= (1e-3 if engine.startswith("bfloat16") else 1e-5) * step, (parameter, difference / step)


LAYOUTS = [Layout([{"a": 7, "b": 1}, {"c": 12}], 1), Layout([{"a": 7}, {"b": 1, "c": 12}], 3)]


def flat(layout: Layout, values: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """By rank and sub-group; padding is -1."""
    parts = []
    for rank in range(layout.ranks):
        groups = []
        for group in layout.sub_groups:
            padded = {n: torch.full((layout.part(size) * layout.ranks,), -1.0) for n, size in group.items()}
            for name, size in group.items():
                padded[name][:size] = values[name]
            groups.append(torch.cat([p.view(layout.ranks, -1)[rank] for p in padded.values()]))
        parts.append(groups)
    return parts


VALUES = {"a": torch.arange(7.0), "b": torch.tensor([10.0]), "c": torch.arange(20.0, 32.0)}


@pytest.mark.parametrize("before", [*LAYOUTS, Layout([{"c": 12, "b": 1, "a": 7}], 5)])
def test_parts_of_three_ranks(before):
    """Parameters of 7, 1 and 12 elements: three ranks hold 3 + 3 + 1, 1 + 0 + 0 and 4 + 4 + 4 of them."""
    saved = flat(before, VALUES)
    parts = [[tensor.tolist() for tensor in reshard(saved, before, LAYOUTS[1], rank)] for rank in range(3)]
    assert parts == [
        [[0, 1, 2], [10, 20, 21, 22, 23]],
        [[3, 4, 5], [0, 24, 25, 26, 27]],
        [[6, 0, 0], [0, 28, 29, 30, 31]],
    ]


def test_states_keep_their_step_count():
    one, three = LAYOUTS
    groups = flat(one, VALUES)[0]
    states = [{"step": torch.tensor(4.0), "exp_avg": tensor, "exp_avg_sq": tensor**2} for tensor in groups]
    resharded = reshard_states([states], one, three, rank=2)
    assert [state["step"].item() for state in resharded] == [4, 4]
    assert resharded[0]["exp_avg"].tolist() == [6, 0, 0] and resharded[0]["exp_avg_sq"].tolist() == [36, 0, 0]
    assert reshard_states([[{}, {}]], one, three, rank=0) == [{}, {}]
    with pytest.raises(ValueError, match=r"different steps: \[0.0, 4.0\]"):
        reshard_states([[states[0], {}]], one, three, rank=0)


def test_a_parameter_that_the_checkpoint_lacks():
    with pytest.raises(KeyError, match="d"):
        reshard(flat(LAYOUTS[0], VALUES), LAYOUTS[0], Layout([{"d": 2}], 1), rank=0)
