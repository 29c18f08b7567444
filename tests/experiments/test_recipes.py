"""The paper's runs as files: they load, say what they follow, and their gradients are what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from experiments.config import compose, presets
from experiments.run.dry_run import balance, balances
from upge import Trajectories

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "experiments" / "configs" / "recipe"
MODELS = ("qwen2.5-math-7b", "qwen2.5-math-1.5b", "llama-3.1-8b")
METHODS = {name.replace("_", "-"): name for name in ("hpt", "sft", "grpo", "sft_then_grpo", "luffy", "srft")}
NAMES = [f"{method}-{model}" for method in METHODS for model in MODELS]
#: Of a demonstration's token of probability 0.5 under the shaping p/(p + 0.1).
SHAPED = 0.1 * 0.5 / (0.5 + 0.1) ** 2


def test_there_is_one_for_each_method_and_model():
    assert presets("recipe") == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_to_the_papers_settings(name):
    composed = compose([f"recipe={name}"])
    method, model = next((m, name.removeprefix(f"{m}-")) for m in METHODS if name.removeprefix(f"{m}-") in MODELS)
    run = composed.config
    assert composed.names["algo"] == METHODS[method] and composed.names["model"] == model
    assert composed.names["data"] == "openr1-math-46k" and run.prompts_per_step == 128
    assert (run.rollout.max_prompt_tokens, run.rollout.max_response_tokens) == (1024, 8192)
    assert run.rollout.temperature == 1.0 and run.optimizer.mini_batches == 2
    assert (run.hardware.gpus, run.hardware.memory) == (8, 79.0)
    rates = {"hpt": 5e-6, "grpo": 5e-6, "sft-then-grpo": 5e-6, "sft": 5e-5, "luffy": 1e-6, "srft": 1e-6}
    assert run.optimizer.lr == rates[method]
    assert run.steps == {"sft": 1055, "sft-then-grpo": 1555}.get(method, 500)
    assert run.group_size == (7 if method in ("luffy", "srft") else 8)
    assert composed.names["correction"] == (None if method == "sft" else "entropy")
    assert not any("KL" in type(part).__name__ for part in composed.algorithm.parts.values())
    assert run.optimizer.skip_grad_norm == (10.0 if method == "hpt" and "qwen" in model else 0.0)
    rope = {} if "llama" in model else {"rope_theta": 40000, "max_position_embeddings": 16384}
    assert run.model.overrides == rope


@pytest.mark.parametrize("name", NAMES)
def test_its_file_says_what_it_is_and_what_it_follows(name):
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    head = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert "2509.04419" in head and "never run" in head
    assert re.search(r"ratio|Rollouts : demonstration|As \S+-qwen2.5-math-7b", head)
    assert max(map(len, text.splitlines())) <= 120


def test_prompts_are_those_of_the_methods():
    """The data set's system message stays for LUFFY alone; LLaMA has no chat template."""
    for name in NAMES:
        composed = compose([f"recipe={name}"])
        model, luffy = composed.config.model, name.startswith("luffy") and "llama" not in name
        assert composed.tree["data"]["system"] == ("keep" if luffy else "drop")
        assert (model.opening, bool(model.system)) == (("<think>\n", True) if luffy else ("", False))
        if "llama" in name:
            assert model.template.endswith("Let's think step by step.") and "{prompt}" in model.template
            assert "\\boxed{}" in model.instruction
        else:
            assert model.template == "chat"


# The balance of rollouts and demonstration.

RATIOS = {
    # n·|A|·T/8192 over c
    "hpt-qwen2.5-math-7b": 8 * 0.5 * 4096 / 8192,
    "hpt-qwen2.5-math-1.5b": 8 * 0.5 * 4096 / 8192 / 0.3,
    "hpt-llama-3.1-8b": 8 * 0.5 * 4096 / 8192,
    # 7 rollouts and 1 demonstration, all of them with |A| = 1/2, this one times p·f′(p)
    "luffy-qwen2.5-math-7b": 7 / SHAPED,
    # 3·0.1·e^H + 4 and T/8192; 0.5·e^-H, and A·p·f′(p)·T/8192 beside it
    "srft-qwen2.5-math-7b": (3 * 0.1 * 2 + 4) * 0.5 / (0.5 / 2 + 0.5 * SHAPED * 0.5),
}


@pytest.mark.parametrize("name", RATIOS)
def test_the_printed_ratio_is_the_one_worked_out_by_hand(name):
    composed = compose([f"recipe={name}"])
    (actual,) = balances(composed.algorithm, composed.config.group_size, 4096).values()
    assert actual.ratio == pytest.approx(RATIOS[name], rel=1e-5)
    assert f"= {RATIOS[name]:.4g}\n" in str(actual)


def test_the_header_and_the_page_give_the_same_ratio():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for name, ratio in RATIOS.items():
        shown = f"{ratio:.4g}" if ratio < 8 else f"{ratio:.3g}"
        assert f"{shown} here" in (RECIPES / f"{name}.yaml").read_text("utf-8").replace("\n# ", " ")
        names = name if name.startswith("hpt") else name.replace("qwen2.5-math-7b", "MODEL")
        assert f"| `{names}` | {shown} |" in page, (name, shown)


def test_the_pages_table_is_what_the_files_say():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", page, re.MULTILINE)
    seen = set()
    for pattern, row in rows:
        _, lr, steps, clip, skip, *_ = (cell.strip() for cell in row.split("|"))
        for name in {pattern.replace("MODEL", model) for model in MODELS}:
            run = compose([f"recipe={name}"]).config
            actual = (run.optimizer.lr, run.steps, run.optimizer.max_grad_norm, run.optimizer.skip_grad_norm)
            assert actual == (float(lr), int(steps), float(clip), 0.0 if "never" in skip else float(skip)), name
            seen.add(name)
    assert seen == set(NAMES)


def test_the_pages_commands_compose():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    commands = [line.split("experiments.run ")[1] for line in page.splitlines() if "experiments.run " in line]
    for command in commands:
        compose([a for a in shlex.split(command.split("#")[0]) if a != "--dry-run"])
    assert len(commands) == 4


def test_the_papers_own_equations_would_weigh_rollouts_a_thousandfold():
    """Eq. 10 to 12 as objects: 1/n and Σ_t for rollouts, a mean for the demonstration; 2048, and 3831 with the std."""
    plain = [
        "terms.rl.reduction={_target_: upge.QuestionMean, tokens: sum, over: batch}",
        "terms.rl.coefficient=1",
    ]
    overrides = [f"algo.{text}" for text in plain]
    algorithm = compose(["recipe=hpt-qwen2.5-math-7b", *overrides]).algorithm
    assert balance(algorithm, 8, 4096).ratio == pytest.approx(0.5 * 4096)
    scaled = compose(["recipe=hpt-qwen2.5-math-7b", *overrides, "algo.terms.rl.estimator.advantage.normalize_std=true"])
    deviation = torch.tensor([1.0] * 4 + [0.0] * 4).std().item()
    assert balance(scaled.algorithm, 8, 4096).ratio == pytest.approx(0.5 / deviation * 4096, rel=1e-4)
    assert round(0.5 / deviation * 4096) == 3831


def test_srft_by_its_paper():
    """1/N and 1/|τ| on both sides, the demonstration's reinforcement unshaped and over the std."""
    algorithm = compose(["algo=srft", "group_size=7"]).algorithm
    deviation = torch.tensor([1.0] * 4 + [0.0] * 4).std().item()
    expected = (3 * 0.1 * 2 + 4) / 7 / (0.25 + 0.5 / deviation * 0.5)
    assert balance(algorithm, 7, 4096).ratio == pytest.approx(expected, rel=1e-4)
    assert f"{expected:.3g}" == "0.916"


def test_without_one_of_the_two_there_is_no_ratio():
    for name in ("sft-qwen2.5-math-7b", "grpo-qwen2.5-math-7b", "sft-then-grpo-qwen2.5-math-7b"):
        composed = compose([f"recipe={name}"])
        for actual in balances(composed.algorithm, 8, 64).values():
            assert actual.ratio is None and "alone" in str(actual)


# The scale: an update's gradient times prompts over ranks is that of the released code.


def _batch(questions: int, rollouts: int, tokens: int = 6) -> Trajectories:
    """Every question with its rollouts and a demonstration, of chance lengths, probabilities, entropies and rewards."""
    generator = torch.Generator().manual_seed(3)
    size = rollouts + 1
    count = questions * size
    places = torch.arange(count)
    lengths = torch.randint(1, tokens + 1, (count,), generator=generator)
    rewards = torch.randint(0, 2, (count,), generator=generator).double()
    rewards[: size - 1] = 0.0  # a question that nothing solves
    demonstration = places % size == size - 1
    rewards[demonstration] = 1.0
    return Trajectories(
        logprobs=-2 * torch.rand(count, tokens, generator=generator, dtype=torch.float64) - 0.1,
        response_mask=lengths[:, None] > torch.arange(tokens),
        rewards=rewards,
        group=places // size,
        is_demonstration=demonstration,
        entropies=torch.rand(count, tokens, generator=generator, dtype=torch.float64),
    )


def _code(batch: Trajectories, method: str, coefficient: float, ranks: int, gate: int = 0) -> torch.Tensor:
    """The weights of the code's loss per optimizer step where no two demonstrations share a micro-batch: a sum over the
    rows of a rank over 8192, a mean over a demonstration's tokens, and an average over the ranks."""
    mask, p = batch.response_mask.double(), batch.logprobs.exp()
    mean = mask / batch.lengths[:, None]
    shaped = 0.1 * p / (p + 0.1) ** 2
    entropy = (batch.entropies * mask).sum(1) / batch.lengths
    weights = torch.zeros_like(p)
    for row in range(len(batch)):
        group = batch.group == batch.group[row]
        rollouts = group & ~batch.is_demonstration
        is_demonstration = bool(batch.is_demonstration[row])
        reward = batch.rewards[row]
        if method == "hpt":
            learns = int(batch.rewards[rollouts].sum()) > gate
            if is_demonstration:
                weights[row] = 0.0 if learns else coefficient * mean[row]
            elif learns:
                weights[row] = (reward - batch.rewards[rollouts].mean()) * mask[row] / 8192
            continue
        advantage = reward - batch.rewards[group].mean()
        if is_demonstration:
            weights[row] = advantage * shaped[row] * mask[row] / 8192
            if method == "srft":
                weights[row] += 0.5 * torch.exp(-entropy[row]) * mean[row]
        elif method == "luffy":
            weights[row] = advantage * mask[row] / 8192
        else:
            weights[row] = (0.1 * torch.exp(entropy[row]) if reward == 1 else -1.0) * mask[row] / 8192
    return weights / ranks


CODE = {
    "hpt-qwen2.5-math-7b": ("hpt", 1.0, 0),
    "hpt-qwen2.5-math-1.5b": ("hpt", 0.3, 0),
    "hpt-llama-3.1-8b": ("hpt", 1.0, 2),
    "luffy-qwen2.5-math-7b": ("luffy", 0.0, 0),
    "srft-qwen2.5-math-7b": ("srft", 0.0, 0),
}


@pytest.mark.parametrize("name", CODE)
def test_the_codes_gradient_is_prompts_over_ranks_times_ours(name):
    method, coefficient, gate = CODE[name]
    composed = compose([f"recipe={name}"])
    questions, ranks = 6, 2
    batch = _batch(questions, composed.config.group_size)
    ours = composed.algorithm.estimate(batch).weights
    assert torch.allclose(ours * questions / ranks, _code(batch, method, coefficient, ranks, gate), rtol=1e-9, atol=0)


def test_clip_limit_and_entropy_are_translated_by_that_factor():
    for name in CODE:
        composed = compose([f"recipe={name}"])
        run, bonus = composed.config, composed.algorithm.regularizers["entropy"]
        factor = run.prompts_per_step / run.optimizer.mini_batches / run.hardware.gpus
        assert factor == 8 and run.optimizer.max_grad_norm * factor == 1.0
        if "hpt-qwen" in name:
            assert run.optimizer.skip_grad_norm * factor == 80.0
        # In the code, a rank's 64 rows of 4096 tokens fill 8 micro-batches, each of which adds the bonus once.
        micro_batches = factor * 8 * 4096 / 32768
        assert bonus.source == "all" and bonus.coefficient * factor == pytest.approx(0.001 * micro_batches)
