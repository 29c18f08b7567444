"""The referee: planted faults are named, correct losses are equal, and the faults of other frameworks come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.referee import __main__ as referee
from experiments.referee import own, tables, write
from experiments.referee.factors import cause, compare, variants
from experiments.referee.protocol import (
    GENERATIONS,
    LAYOUTS,
    Case,
    Layout,
    Micro,
    each,
    make_batch,
    micro_batches,
    weights,
)
from experiments.referee.run import Result
from experiments.referee.settings import RefereeConfig, framework
from experiments.referee.worker import judge
from upge.errors import ConfigError

ROOT = Path(__file__).parents[2]
TOKEN_MEAN = ("terms.rl.reduction={_target_: upge.TokenMean}",)


def ratio(m: Micro, logprobs: Tensor | None = None) -> Tensor:
    """[b, T] the importance ratio."""
    return ((m.logprobs if logprobs is None else logprobs) - m.old_logprobs).exp()


def clipped(m: Micro, r: Tensor) -> Tensor:
    """[b, T] PPO's loss of each token."""
    a = m.advantages[:, None]
    return -torch.min(r * a, r.clamp(0.8, 1.2) * a)


def mean_of_responses(m: Micro, losses: Tensor) -> Tensor:
    """GRPO's reduction, for micro-batches of equal size."""
    return ((losses * m.mask).sum(1) / m.mask.sum(1)).mean() / m.layout.micro_batches


def mean_of_means(m: Micro, losses: Tensor) -> Tensor:
    """The mean over micro-batches of the mean of tokens."""
    return (losses * m.mask).sum() / m.mask.sum() / m.layout.micro_batches


def token_mean(m: Micro, losses: Tensor) -> Tensor:
    """The mean of all tokens of the update."""
    return (losses * m.mask).sum() / m.tokens * m.layout.ranks


def grpo(m: Micro) -> Tensor:
    """GRPO's loss."""
    return mean_of_responses(m, clipped(m, ratio(m)))


def heated(m: Micro) -> Tensor:
    """GRPO's loss with log-probs at temperature 0.7, where the policy sampled at 1."""
    return mean_of_responses(m, clipped(m, ratio(m, (m.logits / 0.7).log_softmax(-1)[..., 0])))


def verdicts(loss: Callable[[Micro], Tensor], case: Case) -> dict[str, dict[str, object]]:
    """The verdict of each layout."""
    return judge(each(loss), case, "test").layouts


@pytest.mark.parametrize(
    ("loss", "overrides"), [(grpo, ()), (lambda m: token_mean(m, clipped(m, ratio(m))), TOKEN_MEAN)]
)
def test_correct_losses_are_equal_in_every_layout(loss: Callable[[Micro], Tensor], overrides: tuple[str, ...]):
    for name, verdict in verdicts(loss, Case("ours", "grpo", overrides, layouts=LAYOUTS + GENERATIONS)).items():
        assert tables.cell(verdict) == "=", name
        assert verdict["factor"] == "", name


#: Name → (the loss, overrides, what the referee says of the whole batch, and of four micro-batches).
PLANTED: dict[str, tuple[Callable[[Micro], Tensor], tuple[str, ...], str, str]] = {
    "dropped response mask": (
        lambda m: clipped(m, ratio(m)).mean() / m.layout.micro_batches,
        (),
        "mask: padding counts",
        "mask: padding counts",
    ),
    "mask dropped above, kept below": (
        lambda m: (clipped(m, ratio(m)).sum(1) / m.mask.sum(1)).mean() / m.layout.micro_batches,
        (),
        "mask: padding is summed, but not counted",
        "mask: padding is summed, but not counted",
    ),
    "no clip": (
        lambda m: mean_of_responses(m, -ratio(m) * m.advantages[:, None]),
        (),
        "mask: no clip",
        "mask: no clip",
    ),
    "mean of means": (
        lambda m: mean_of_means(m, clipped(m, ratio(m))),
        TOKEN_MEAN,
        "",
        "reduction: mean of the micro-batches' means of tokens",
    ),
    "divided by the group": (lambda m: grpo(m) / m.group_size, (), "scale: 1/group size", "scale: 1/group size"),
    "not divided by the micro-batches": (
        lambda m: grpo(m) * m.layout.micro_batches,
        (),
        "",
        "scale: micro-batches",
    ),
    "wrong ratio": (
        lambda m: mean_of_responses(m, -(m.old_logprobs - m.logprobs).exp() * m.advantages[:, None]),
        ("terms.rl.estimator.mask={_target_: upge.NoMask}",),
        "denominator: π_θ²/π_old (ratio upside down); scale: -1",
        "denominator: π_θ²/π_old (ratio upside down); scale: -1",
    ),
    "no ratio": (
        lambda m: mean_of_responses(m, -m.logprobs * m.advantages[:, None]),
        ("terms.rl.estimator.mask={_target_: upge.NoMask}",),
        "denominator: π_θ (no ratio)",
        "denominator: π_θ (no ratio)",
    ),
    "no baseline": (
        lambda m: mean_of_responses(m, -ratio(m) * m.rewards[:, None]),
        ("terms.rl.estimator.mask={_target_: upge.NoMask}",),
        "advantage: R",
        "advantage: R",
    ),
    "temperature": (heated, (), "likelihood: temperature 0.7", "likelihood: temperature 0.7"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_named(name: str):
    loss, overrides, whole, accumulated = PLANTED[name]
    found = verdicts(loss, Case(name, "grpo", overrides))
    assert found["whole"]["factor"] == whole
    assert found["4 micro-batches"]["factor"] == accumulated
    assert found["5 columns of padding"]["factor"] == whole


def test_patterns_say_what_the_ratio_is_constant_over():
    found = verdicts(lambda m: mean_of_means(m, clipped(m, ratio(m))), Case("x", "grpo", TOKEN_MEAN))
    assert found["whole"]["pattern"] == "ratio constant over all tokens"
    assert found["4 micro-batches"]["pattern"] == "ratio constant over each micro-batch"
    assert found["2 ranks"]["pattern"] == "ratio constant over each rank"
    dropped = verdicts(PLANTED["dropped response mask"][0], Case("x", "grpo"))["whole"]["pattern"]
    # Of 75 columns of padding, some belong to responses without an advantage or have a clipped ratio.
    assert dropped == "ratio constant over each response; 57 tokens of padding have a gradient"


def test_a_gradient_that_nothing_explains_is_said_to_be_so():
    odd = verdicts(lambda m: mean_of_responses(m, clipped(m, ratio(m)) * m.old_logprobs.sin()), Case("x", "grpo"))
    assert str(odd["whole"]["factor"]).startswith("not among the replacements; nearest ")
    missing = verdicts(lambda m: m.logprobs.sum() * float("nan"), Case("x", "grpo"))
    assert missing["whole"]["factor"] == "not finite" and tables.cell(missing["whole"]) == "not finite"


def test_padding_leaves_the_batch_unchanged():
    algorithm = Case("x", "grpo").load()
    plain, padded = make_batch(algorithm), make_batch(algorithm, padding=5)
    width = plain.logprobs.shape[1]
    assert torch.equal(plain.logprobs, padded.logprobs[:, :width])
    assert torch.equal(
        algorithm.estimate(plain.trajectories).weights,
        algorithm.estimate(padded.trajectories).weights[:, :width],
    )


def test_logits_of_two_tokens_have_the_log_probs_and_their_gradient():
    batch = make_batch(Case("x", "grpo").load())
    leaf = batch.logprobs.clone().requires_grad_()
    ((micro,),) = micro_batches(batch, Layout(), leaf)
    micro = dataclasses.replace(micro, logprobs=leaf)
    again = micro.logits.log_softmax(-1)[..., 0]
    assert torch.allclose(again, leaf, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(again.sum(), leaf)
    assert torch.allclose(gradient, torch.ones_like(gradient), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("layout", "expected"), [(Layout(2, generation=4), [2.0, 2.0]), (Layout(8, generation=2), None)]
)
def test_samplings_cover_other_updates_or_a_part_of_one(layout: Layout, expected: list[float] | None):
    from experiments.referee.protocol import micro_batches

    batch = make_batch(Case("x", "grpo").load())
    micros = micro_batches(batch, layout, batch.logprobs)[0]
    total = int(batch.trajectories.response_mask.sum())
    shares = [m.generation_tokens / total for m in micros]
    if expected:
        assert shares == expected
    else:
        assert sum(shares[::2]) == 1 and shares[::2] == shares[1::2]
        assert all(m.generation_tokens == sum(int(n.mask.sum()) for n in micros[i // 2 * 2 :][:2])
                   for i, m in enumerate(micros))  # fmt: skip


def test_causes_are_written_in_sizes():
    batch, layout = make_batch(Case("x", "grpo").load()), Layout(4)
    tokens = int(batch.trajectories.response_mask.sum())
    assert cause(0.25, batch, layout) == "1/micro-batches"
    assert cause(-1.0, batch, layout) == "-1"
    assert cause(24 / tokens, batch, layout) == "rollouts/tokens"
    assert cause(0.123456, batch, layout) == "0.1235"
    assert cause(0.5, batch, Layout(2, generation=4)) == "(micro-batches of an update/of a sampling)"


def test_a_temperature_has_its_own_jacobian():
    batch = make_batch(Case("x", "grpo").load())
    hot = next(v for v in variants(batch) if v.name == "likelihood: temperature 2")
    p, mask = batch.logprobs.exp(), batch.trajectories.response_mask
    q = p.sqrt() / (p.sqrt() + (1 - p).sqrt())
    assert torch.allclose(hot.batch.trajectories.logprobs[mask], q.log()[mask], rtol=0, atol=1e-12)
    # d log q/d log p with q = p^½/(p^½ + (1 - p)^½): ½·(1 - q)·(1 + p/(1 - p))
    assert torch.allclose(hot.jacobian, 0.5 * (1 - q) * (1 + p / (1 - p)), rtol=1e-10, atol=1e-12)


LOSS = """
def loss(logprobs, old_logprobs, advantages, mask, micro_batches, unused=3):
    ratio = (logprobs - old_logprobs).exp() * advantages[:, None]
    bound = (logprobs - old_logprobs).exp().clamp(0.8, 1.2) * advantages[:, None]
    return -(ratio.minimum(bound) * mask).sum() / mask.sum() / micro_batches


def asks(logprobs, entropy):
    return logprobs.sum()


def vector(logprobs):
    return logprobs


def fails(logprobs):
    return logprobs.nothing


def placed(logprobs, /):
    return logprobs.sum()


def flat(logprobs):
    return 0 * logprobs.sum()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with loss functions."""
    (tmp_path / "my_loss.py").write_text(LOSS)
    (tmp_path / "my_loss.py2.py").write_text("import nothing_here\n")
    return tmp_path / "my_loss.py"


def test_a_loss_of_ones_own_is_judged(file: Path, capsys: pytest.CaptureFixture[str]):
    assert referee.main([f"loss={file}:loss", "algo=grpo"]) == 0
    printed = capsys.readouterr().out
    assert "| whole | cos 0." in printed and "| reduction: mean of tokens |" in printed
    assert "| reduction: mean of the micro-batches' means of tokens |" in printed
    assert referee.main([f"loss={file}:loss", "algo.terms.rl.reduction={_target_: upge.TokenMean}"]) == 0
    assert "| whole | = | nothing |" in capsys.readouterr().out
    assert referee.main([f"loss={file}:flat"]) == 0
    assert "| whole | cos 0.0000, ×0 | no gradient | all are 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss=nothing.py:loss"], "loss: found 'nothing.py:loss', but there is no file"),
        (["loss=FILE"], "give FILE:FUNCTION"),
        (["loss=FILE:los"], "has no function 'los'; did you mean 'loss'"),
        (["loss=FILE:asks"], "has the argument 'entropy', which the referee does not give"),
        (["loss=FILE:vector"], "returned a tensor of shape (24, 7); return a scalar"),
        (["loss=FILE:fails"], "loss: the function failed: AttributeError"),
        (["loss=FILE:placed"], "takes 'logprobs' by position only"),
        (["loss=FILE2.py:loss"], "cannot be imported: ModuleNotFoundError: No module named 'nothing_here' (line 1)"),
        (["loss=FILE:loss", "frameworks=trl"], "frameworks: a loss of your own is judged in place"),
        (["loss=FILE:loss", "--docs"], "--docs: the page has no place"),
        (["frameworks="], "frameworks: found none; give some of trl"),
        (["loss=FILE:loss", "algo=grop"], "algo: found 'grop'; did you mean 'grpo'"),
        (["loss=FILE:loss", "algo=sft_then_grpo"], "several algorithms in a row"),
        (["frameworks=trll"], "frameworks: found 'trll'; did you mean 'trl'"),
        (["versions=1.0"], "versions: found 1.0 for 5 frameworks"),
        (["algo.terms.rl.reduction=1"], "give loss=FILE:FUNCTION"),
        (["download=maybe"], "download: found 'maybe'; give true or false"),
        (["los=1"], "los: unknown key"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]):
    assert referee.main([a.replace("FILE", str(file), 1) if "FILE" in a else a for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_key_and_argument(capsys: pytest.CaptureFixture[str]):
    assert referee.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in own.ARGUMENTS)


def test_pages_show_results_and_errors(tmp_path: Path):
    verdict = {"cosine": 1.0, "scale": 0.5, "factor": "scale: 1/micro-batches", "pattern": ""}
    rows = [
        {"case": "dapo", "algorithm": "dapo", "called": "f", "layouts": {"2 micro-batches": verdict}, "error": ""},
        {"case": "luspo", "algorithm": "luspo", "called": "f", "layouts": {}, "error": "no such loss"},
    ]
    found = [Result("trl", "1.0", {"rows": rows, "stubs": ["ray"]}), Result("verl", "0", error="gone")]
    found.append(Result("deepspeed", "0.1", {"runs": {"4 passes": {"shares": [1.0, 0.0]}}}))
    page = write.updated(write.PAGE.read_text("utf-8"), found)
    assert "| dapo | dapo | ×0.5 | scale: 1/micro-batches |" in page
    assert "Not compared: luspo: no such loss." in page and "Not judged: gone." in page
    assert "| 4 passes | 1, 0 |" in page and "TRL #6024" in page
    write.write_page(tmp_path / "page.html", found)
    web = (tmp_path / "page.html").read_text("utf-8")
    assert "<td class='differs'>×0.5</td>" in web and "Supplied" in web


def test_the_sum_over_ranks_and_micro_batches_is_the_update():
    """The weights of an update in any layout add up to those of the algorithm."""
    algorithm = Case("x", "dr_grpo").load()
    batch = make_batch(algorithm)

    def loss(m: Micro) -> Tensor:
        surrogate = clipped(m, ratio(m))
        return (surrogate * m.mask).sum() / (1024 * m.rollouts) * m.layout.ranks

    for layout in (Layout(), Layout(3), Layout(2, ranks=4)):
        verdict = compare(weights(each(loss), batch, layout), algorithm, batch, layout)
        assert verdict.factor == "", layout


def test_settings_have_the_versions_of_the_page():
    config = RefereeConfig.read(["frameworks=trl", "versions=1.8.0, 1.9.2"])
    assert config.versions_of("trl") == ("1.8.0", "1.9.2")
    assert RefereeConfig.read([]).versions_of("verl") == framework("verl").VERSIONS
    with pytest.raises(ConfigError, match="frameworks"):
        RefereeConfig.read(["frameworks=verl,nothing"])
