"""A plain trainer that repeats a run's updates from its logged rollouts, to check the weights that the run leaves.

Nothing here uses upge: a transformers model in float32, full logits, right-padded batches, autograd through the
objectives of the textbook modules, `torch.optim.AdamW` and `clip_grad_norm_`, all in one process. A step works as
docs/running.md says: the log-probs of the behavior policy, the values and the returns are those before the first update
of the step; every epoch passes over all mini-batches of consecutive prompts; an update whose gradient is exactly zero
is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests import textbook, textbook_mixed, textbook_onpolicy

#: One trajectory: its tokens, what the log says about it, and what the policy says about its tokens.
Row = dict


@dataclass(frozen=True)
class Stage:
    """Some steps with one objective; AdamW and the learning-rate schedule begin with it.

    Attributes:
        objective: a name in `objectives`.
        steps: how many steps it has.
        lr_factor: its learning rate as a multiple of the run's.
    """

    objective: str
    steps: int
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Settings of the run that is repeated, under the run's own names.

    Attributes:
        entropy: coefficient of an entropy bonus over the tokens of rollouts.
        interlude_size: failed prompts of one update of maximum likelihood on their demonstrations; 0 = no such updates.
        interlude_entropy: coefficient of an entropy bonus over the tokens of these demonstrations.
    """

    stages: tuple[Stage, ...]
    temperature: float = 0.7
    max_response_tokens: int = 48
    lr: float = 1e-3
    warmup_steps: int = 2
    weight_decay: float = 0.1
    max_grad_norm: float = 0.001
    mini_batches: int = 2
    epochs: int = 2
    critic_lr: float = 1e-3
    critic_warmup_steps: int = 1
    entropy: float = 0.0
    interlude_size: int = 0
    interlude_entropy: float = 0.0

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


@dataclass
class Batch:
    """The trajectories of one update, in the form that the textbook's objectives read."""

    rows: list[Row]

    @property
    def questions(self) -> list[list[Row]]:
        """The trajectories of each prompt."""
        return [[r for r in self.rows if r["group"] == g] for g in sorted({r["group"] for r in self.rows})]


# What the log says.


def read_step(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The trajectories of a file of rollouts/, with the tokens of prompt and response.

    The tokenizer must give the response's text its own tokens back; the number of tokens in the log confirms it.
    """
    rows = []
    for line in map(json.loads, path.read_text().splitlines()):
        response = tokenizer.encode(line["response"]) + [tokenizer.eos_token_id] * line["finished"]
        assert len(response) == line["tokens"], line
        rows.append(
            {
                "prompt": line["prompt"],
                "prompt_ids": prompt_ids(line["prompt"], tokenizer),
                "response_ids": response,
                "reward": line["reward"],
                "group": line["group"],
                "demo": line["is_demonstration"],
                "preference": (1 if line["reward"] > 0 else -1) if line["is_demonstration"] else 0,
            }
        )
    return rows


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the prompt in the chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer.encode(text)


def worked_solution(prompt: str) -> str:
    r"""The demonstration of a problem such as `12-5+3=?`: `12-5=7`, `7+3=10` and `\boxed{10}` on lines of their own."""
    terms = prompt.removesuffix("=?").replace("-", " -").replace("+", " +").split()
    total, lines = int(terms[0]), []
    for term in terms[1:]:
        lines.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    return "\n".join([*lines, rf"\boxed{{{total}}}"])


# Objectives.


def hpt(s: Batch) -> Tensor:
    """Rollouts where one of them is right, else demonstrations, as in `textbook.hpt` with a divisor of the run."""
    losses = []
    for question in s.questions:
        own, experts = textbook_mixed.split(question)
        if textbook_mixed.pass_rate(question) > 0:
            losses.append(textbook_mixed.reinforce_question(own))
        elif experts:
            losses.append(textbook_mixed.imitate(experts))
    return textbook_mixed.average(losses, s)


def ppo(s: Batch) -> Tensor:
    """The clipped objective with the advantages of the step, which are whitened over all its tokens."""
    return textbook_onpolicy.clipped_token_mean(s.rows, [r["advantages"] for r in s.rows])


def value_loss(s: Batch, clip: float = 0.2) -> Tensor:
    """½ max((V - G)², (clip(V, V_old ± 0.2) - G)²), averaged over all tokens."""
    total, count = 0.0, 0
    for r in s.rows:
        near = r["values"] + (r["new_values"] - r["values"]).clamp(-clip, clip)
        errors = torch.maximum((r["new_values"] - r["returns"]) ** 2, (near - r["returns"]) ** 2)
        total, count = total + 0.5 * errors.sum(), count + len(errors)
    return total / count


def objectives(limit: int) -> dict[str, Callable[[Batch], Tensor]]:
    """Name → objective to be minimized, for runs with this limit on the tokens of a response."""
    return {
        "sft": textbook.sft,
        "grpo": textbook.grpo,
        "hpt": hpt,
        "luffy": textbook_mixed.luffy,
        "srft": textbook_mixed.srft,
        "ppo": ppo,
        "dpo": textbook_onpolicy.dpo,
        "dapo": partial(textbook_onpolicy.dapo, limit=limit),
        "relift": textbook_mixed.relift,
    }


def entropy_bonus(rows: Sequence[Row], coefficient: float) -> Tensor | float:
    """-coefficient × the mean entropy over all tokens of the rows; 0 without a row."""
    if not rows or not coefficient:
        return 0.0
    return -coefficient * sum(r["entropy"].sum() for r in rows) / sum(len(r["entropy"]) for r in rows)


# Models.


class Critic(nn.Module):
    """The trunk of a causal LM with a linear head that begins at zero."""

    def __init__(self, start: Path) -> None:
        super().__init__()
        self.trunk = load(start).model
        self.head = nn.Linear(self.trunk.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        """For each trajectory the value before each of its response tokens."""
        ids, mask = padded(rows)
        values = self.head(self.trunk(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]
        return [values[i, predictors(row)] for i, row in enumerate(rows)]


def load(start: Path) -> nn.Module:
    """The causal LM in float32, in training mode."""
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager").train()


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] of prompts and responses with padding behind them, and which of them are real."""
    sequences = [torch.tensor([*row["prompt_ids"], *row["response_ids"]]) for row in rows]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def predictors(row: Row) -> slice:
    """The positions whose output predicts the response tokens."""
    first = len(row["prompt_ids"]) - 1
    return slice(first, first + len(row["response_ids"]))


def policy_of(model: nn.Module, rows: Sequence[Row], temperature: float) -> list[tuple[Tensor, Tensor]]:
    """(log-probs, entropies) of each trajectory's response tokens under softmax(logits / temperature)."""
    ids, mask = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits / temperature
    results = []
    for i, row in enumerate(rows):
        full = logits[i, predictors(row)].log_softmax(dim=-1)
        logp = full.gather(-1, torch.tensor(row["response_ids"])[:, None])[:, 0]
        results.append((logp, -(full.exp() * full).sum(dim=-1)))
    return results


# Training.


@dataclass
class Optimizers:
    """AdamW of the policy, of its updates between the steps, and of the critic; a stage begins with fresh ones."""

    policy: torch.optim.Optimizer
    interleaved_update: torch.optim.Optimizer
    critic: torch.optim.Optimizer | None


@dataclass
class PlainTrainer:
    """Repeats a run.

    Attributes:
        start: folder of the model that the run started from.
        settings: those of the run.
        norms: gradient norm before clipping of each update of the policy.
    """

    start: Path
    settings: Settings
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = {stage.objective for stage in self.settings.stages}
        self.tokenizer = AutoTokenizer.from_pretrained(self.start)
        self.objectives = objectives(self.settings.max_response_tokens)
        self.model = load(self.start)
        self.reference = load(self.start) if names & {"ppo", "dpo"} else None
        self.critic = Critic(self.start) if "ppo" in names else None
        self.remembered: list[str] = []

    def train(self, rollouts: Path) -> dict[str, Tensor]:
        """The weights after all steps of the run that logged every step in the folder `rollouts`."""
        number = 0
        with mock.patch.object(textbook_mixed, "LENGTH", self.settings.max_response_tokens):
            for stage in self.settings.stages:
                optimizers, self.remembered = self._optimizers(), []
                for place in range(stage.steps):
                    number += 1
                    rows = read_step(rollouts / f"step_{number:06d}.jsonl", self.tokenizer)
                    self._step(stage, place, rows, optimizers)
        return self.model.state_dict()

    def _optimizers(self) -> Optimizers:
        def adamw(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), weight_decay=self.settings.weight_decay)

        return Optimizers(adamw(self.model), adamw(self.model), adamw(self.critic) if self.critic else None)

    def _step(self, stage: Stage, place: int, rows: list[Row], optimizers: Optimizers) -> None:
        waiting = self.settings.critic_warmup_steps if self.critic else 0
        lr = stage.lr_factor * self.learning_rate(self.settings.lr, place - waiting, stage.steps - waiting)
        critic_lr = self.learning_rate(self.settings.critic_lr, place, stage.steps)
        self._fill(rows)
        for _ in range(self.settings.epochs):
            for batch in self._mini_batches(rows):
                if place >= waiting:
                    self._update(batch, self.objectives[stage.objective], optimizers.policy, lr)
                if self.critic:
                    self._update_critic(batch, optimizers.critic, critic_lr)
        if self.settings.interlude_size:
            self._interleaved_update(rows, optimizers.interleaved_update, lr)

    def learning_rate(self, peak: float, place: int, steps: int) -> float:
        """Linear warm-up, then a straight line from the peak to zero, which the step after the last would have."""
        warmup = self.settings.warmup_steps
        return peak * ((place + 1) / warmup if place < warmup else (steps - place) / (steps - warmup))

    @torch.no_grad()
    def _fill(self, rows: list[Row]) -> None:
        """Gives each trajectory what stays as it is during the step."""
        own = policy_of(self.model, rows, self.settings.temperature)
        other = policy_of(self.reference, rows, self.settings.temperature) if self.reference else own
        for row, (behavior, _), (reference, _) in zip(rows, own, other, strict=True):
            row |= {"behavior": behavior, "reference": reference}
        if self.critic:
            for row, values in zip(rows, self.critic(rows), strict=True):
                row["values"] = values
            advantages = [textbook_onpolicy.critics_advantages(row) for row in rows]
            for row, raw, white in zip(rows, advantages, textbook_onpolicy.whitened(advantages), strict=True):
                row |= {"advantages": white, "returns": torch.tensor(raw) + row["values"]}

    def _mini_batches(self, rows: list[Row]) -> list[Batch]:
        prompts = sorted({row["group"] for row in rows})
        size = -(-len(prompts) // self.settings.mini_batches)
        cuts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [Batch([row for row in rows if row["group"] in cut]) for cut in cuts]

    def _update(
        self, batch: Batch, objective: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer, lr: float
    ) -> None:
        self._read(batch)
        loss = objective(batch) + entropy_bonus([r for r in batch.rows if not r["demo"]], self.settings.entropy)
        self._apply(loss, self.model, optimizer, lr)

    def _read(self, batch: Batch) -> None:
        """Gives each trajectory what the present policy says, with gradient."""
        results = policy_of(self.model, batch.rows, self.settings.temperature)
        for row, (logp, entropy) in zip(batch.rows, results, strict=True):
            row |= {"logp": logp, "entropy": entropy}

    def _update_critic(self, batch: Batch, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for row, values in zip(batch.rows, self.critic(batch.rows), strict=True):
            row["new_values"] = values
        self._apply(value_loss(batch), self.critic, optimizer, lr)

    def _interleaved_update(self, rows: list[Row], optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Remembers the prompts that every rollout failed, and imitates their demonstrations once there are enough."""
        for question in Batch(rows).questions:
            if textbook_mixed.pass_rate(question) == 0:
                self.remembered.append(question[0]["prompt"])
        size = self.settings.interlude_size
        while len(self.remembered) >= size:
            chosen, self.remembered = self.remembered[:size], self.remembered[size:]
            batch = Batch([self._demonstration(group, prompt) for group, prompt in enumerate(chosen)])
            self._read(batch)
            loss = textbook.sft(batch) + entropy_bonus(batch.rows, self.settings.interlude_entropy)
            self._apply(loss, self.model, optimizer, lr)

    def _demonstration(self, group: int, prompt: str) -> Row:
        response = [*self.tokenizer.encode(worked_solution(prompt)), self.tokenizer.eos_token_id]
        ids = {"prompt_ids": prompt_ids(prompt, self.tokenizer), "response_ids": response}
        return {**ids, "reward": 1.0, "group": group, "demo": True, "preference": 0}

    def _apply(self, loss: Tensor | float, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """One update, unless nothing is to be learned."""
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        optimizer.zero_grad()
        loss.backward()
        if any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None):
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm)
            if model is self.model:
                self.norms.append(float(norm))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()


def distance(run: dict[str, Tensor], plain: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """‖θ_run - θ_plain‖ / ‖θ_run - θ_start‖ over all weights."""

    def norm(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(torch.stack([(a[name].double() - b[name].double()).norm() for name in run]).norm())

    return norm(run, plain) / norm(run, start)
