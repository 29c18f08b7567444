"""The batch that every part of an algorithm reads.

Legend of shapes, used in all docstrings and annotations:

    B  trajectories                          b  selected trajectories
    T  tokens of the longest response        n  selected tokens
    G  trajectories of one group             N  packed tokens
    Q  questions (groups)                    D  hidden size
    V  vocabulary size                       *shape  [B, T] or [N]
"""

# Columns that may be None here are never None in a part's view, which raises instead: see `upge.views.TokenView`.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.errors import ConfigError, nearest
from upge.views import (
    NAMED_REWARDS,
    PASS_THRESHOLD,
    TOKEN_COLUMNS,
    TRAJECTORY_COLUMNS,
    Distributions,
    PackedTokens,
    TrajectoryView,
    hide,
)

#: The tokens of a batch that a term or a regularizer learns from; see `Trajectories.source_tokens`.
Source = Literal["rollouts", "demonstrations", "preference_pairs", "all"]
#: Columns that every batch has.
_REQUIRED = ("response_mask", "rewards", "group")
#: The kind of values in each column that does not hold floating-point numbers.
_KINDS: dict[str, str] = dict.fromkeys(
    ("response_mask", "is_demonstration_token", "is_demonstration", "is_guided", "is_replayed", "finished"),
    "bool",
)
_KINDS |= dict.fromkeys(("group", "preference", "index", "row"), "integer")
_KINDS |= dict.fromkeys(("prompt_attempts", "prompt_successes", "prompt_age"), "integer")
#: The largest log-prob that is taken for a rounding error of 0.
_ROUNDING = 2e-3


@dataclass(frozen=True, eq=False)
class Trajectories(TrajectoryView):
    """A batch of responses: rollouts and demonstrations.

    A rollout may begin with tokens of a demonstration, which the policy continued. It still counts as a rollout in
    statistics of groups, but its demonstration tokens belong to the source 'demonstrations'.

    Padding may hold any values, including NaN. The constructor sets entries outside `response_mask` to zero, so no part
    sees them.

    Attributes:
        logprobs: [B, T] log π_θ of each response token, with gradient; None before the forward pass.
        response_mask: [B, T] True on the tokens that count.
        rewards: [B] the verifier's reward; for a correct demonstration, the verifier's largest reward, usually 1.
        group: [B] integers, equal for responses to the same prompt.
        is_demonstration: [B] True for expert responses, False for the model's own rollouts; None = all rollouts.
        is_demonstration_token: [B, T] True for the tokens of expert responses and for the demonstration tokens that a
            rollout begins with; None = the tokens of expert responses only.
        is_guided: [B] True for rollouts that continue the beginning of a demonstration, which stands in the response or
            at the end of the prompt; None = rollouts with demonstration tokens in the response.
        is_replayed: [B] True for rollouts that an earlier step sampled; None = none.
        behavior_logprobs: [B, T] log π_θold of the policy that generated the data; None = strictly on-policy.
        sampler_logprobs: [B, T] log-probs reported by the inference engine.
        reference_logprobs: [B, T] log-probs of the reference policy, for KL and preference pairs.
        teacher_logprobs: [B, T] log-probs of the teacher.
        values: [B, T] the critic's value before each token.
        entropies: [B, T] entropy of the current policy at each token over the full vocabulary (nats).
        score_norms: [B, T] ‖∂ log π/∂z‖² = 1 - 2π + Σ_v π(v|t)² of the policy at the start of the step, z its logits.
        finished: [B] True if the response ended by itself, False if it was cut at a length limit.
        preference: [B] +1 chosen, -1 rejected, 0 neither.
        index: [B] a number that identifies each trajectory within its step, independent of order and split; None = 0 to
            B - 1.
        step: number of training steps before this batch, for schedules.
        row: [B] index of each trajectory in the batch that it was selected from.
        total_lengths: [B] the number of tokens that count towards a response limit, which may include demonstration
            tokens at the end of the prompt; None = the number of tokens in `response_mask`.
        state: variable name → current value, for each stateful gate.
        pass_threshold: a rollout counts as a success above this reward.
        prompt_value, prompt_attempts, prompt_successes, prompt_last_pass_rate, prompt_age: [B] the memory of the
            trajectory's prompt before this step: see `upge.prompt_memory.PromptColumns`.
        named_rewards: name → [B] the reward of each verifier whose weighted sum is `rewards`; empty = not known.
        reward_weights: name → its weight in the sum; a missing name has weight 1.
        succeeded: [B] True for successes; None = a reward above `pass_threshold` is a success.
        distributions: the next-token distributions, [B, T, V] log-probs each, for terms whose support is not the
            sampled token. In training, the output head computes them instead. Padding may hold any finite values.

    Raises:
        ValueError: a column is not a tensor, or has the wrong shape, type or values. The message names the column,
            what was found and what is expected.
    """

    logprobs: Float[Tensor, "B T"] | None
    response_mask: Bool[Tensor, "B T"]
    rewards: Float[Tensor, "B"]
    group: Int[Tensor, "B"]
    is_demonstration: Bool[Tensor, "B"] = None  # pyright: ignore[reportAssignmentType] - the constructor fills it
    behavior_logprobs: Float[Tensor, "B T"] | None = None
    sampler_logprobs: Float[Tensor, "B T"] | None = None
    reference_logprobs: Float[Tensor, "B T"] | None = None
    teacher_logprobs: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    entropies: Float[Tensor, "B T"] | None = None
    score_norms: Float[Tensor, "B T"] | None = None
    finished: Bool[Tensor, "B"] | None = None
    preference: Int[Tensor, "B"] | None = None
    index: Int[Tensor, "B"] | None = None
    step: int = 0
    row: Int[Tensor, "B"] | None = None
    state: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pass_threshold: float = PASS_THRESHOLD
    distributions: Distributions | None = None
    is_demonstration_token: Bool[Tensor, "B T"] = None  # pyright: ignore[reportAssignmentType] - as above
    is_guided: Bool[Tensor, "B"] = None  # pyright: ignore[reportAssignmentType] - as above
    is_replayed: Bool[Tensor, "B"] = None  # pyright: ignore[reportAssignmentType] - as above
    total_lengths: Int[Tensor, "B"] | None = None
    prompt_value: Float[Tensor, "B"] | None = None
    prompt_attempts: Int[Tensor, "B"] | None = None
    prompt_successes: Int[Tensor, "B"] | None = None
    prompt_last_pass_rate: Float[Tensor, "B"] | None = None
    prompt_age: Int[Tensor, "B"] | None = None
    named_rewards: Mapping[str, Float[Tensor, "B"]] = dataclasses.field(default_factory=dict)
    reward_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    succeeded: Bool[Tensor, "B"] | None = None

    def __post_init__(self) -> None:
        for name in TOKEN_COLUMNS + TRAJECTORY_COLUMNS:
            column = getattr(self, name)
            if not isinstance(column, Tensor) and not (column is None and name not in _REQUIRED):
                raise ValueError(f"{name}: expected a tensor, found a {type(column).__name__}; use torch.tensor(...)")
        mask = self.response_mask
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"response_mask: expected a bool tensor [B, T], found {mask.dtype} {list(mask.shape)}; "
                "make it with `lengths[:, None] > torch.arange(T)`"
            )
        for name in ("is_demonstration", "is_replayed"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.zeros_like(mask[:, :1].any(dim=1)))
        for name in TOKEN_COLUMNS + TRAJECTORY_COLUMNS:
            column = getattr(self, name)
            if column is None:
                continue
            expected = mask.shape if name in TOKEN_COLUMNS else mask.shape[:1]
            if column.shape != expected:
                raise ValueError(f"{name}: expected shape {list(expected)}, found {list(column.shape)}")
            kind = _KINDS.get(name, "float")
            if kind != ("float" if column.is_floating_point() else "bool" if column.dtype == torch.bool else "integer"):
                raise ValueError(f"{name}: expected a tensor of {kind}s, found {column.dtype}")
        of_demonstrations = self.is_demonstration[:, None].expand(mask.shape)
        given = self.is_demonstration_token
        tokens = of_demonstrations if given is None else given | of_demonstrations
        object.__setattr__(self, "is_demonstration_token", tokens)
        hide(self, mask)
        guided = self.is_demonstration_token.any(dim=1) & ~self.is_demonstration
        object.__setattr__(self, "is_guided", guided if self.is_guided is None else guided | self.is_guided)
        self._check_named_rewards()
        self._check_logprobs()
        if self.preference is not None and bool((self.preference.abs() > 1).any()):
            odd = int(self.preference[self.preference.abs() > 1][0])
            raise ValueError(f"preference: found {odd}; use +1 for chosen, -1 for rejected, 0 for neither")
        for name in ("index", "row"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.arange(len(mask), device=mask.device))

    def _check_named_rewards(self) -> None:
        """Refuse named rewards that are not one number per trajectory, and weights of others."""
        expected = list(self.response_mask.shape[:1])
        for name, column in self.named_rewards.items():
            if not isinstance(column, Tensor) or not column.is_floating_point() or list(column.shape) != expected:
                found = f"{column.dtype} {list(column.shape)}" if isinstance(column, Tensor) else type(column).__name__
                raise ValueError(f"named_rewards['{name}']: expected a tensor of floats {expected}, found {found}")
        for name in self.reward_weights:
            if name not in self.named_rewards:
                raise ValueError(f"reward_weights: found '{name}'; {nearest(name, self.named_rewards)}")
        if self.succeeded is not None and (
            self.succeeded.dtype != torch.bool or list(self.succeeded.shape) != expected
        ):
            found = f"{self.succeeded.dtype} {list(self.succeeded.shape)}"
            raise ValueError(f"succeeded: expected a tensor of bools {expected}, found {found}")

    def _check_logprobs(self) -> None:
        """Refuse log-probs above 0, such as probabilities or losses, with one transfer from the device."""
        columns = {name: getattr(self, name) for name in TOKEN_COLUMNS if name.endswith("logprobs")}
        given = {name: column.detach() for name, column in columns.items() if column is not None and column.numel()}
        if not given:
            return
        largest = torch.stack([column.max().double() for column in given.values()]).tolist()
        for name, value in zip(given, largest, strict=True):
            if value > _ROUNDING:
                raise ValueError(
                    f"{name}: found {value:g}, but the logarithm of a probability is never above 0; give log-probs, "
                    "neither probabilities nor losses"
                )

    def __len__(self) -> int:
        return len(self.response_mask)

    @property
    def is_whole(self) -> bool:
        """True if `row` numbers the trajectories from 0: the batch is not a selection from another one."""
        assert self.row is not None
        return torch.equal(self.row, torch.arange(len(self), device=self.row.device))

    def source_rows(self, source: Source) -> Bool[Tensor, "B"]:
        """[B] True for the trajectories that may have tokens of `source`.

        For 'demonstrations' these are the demonstrations and the rollouts that begin with demonstration tokens, but not
        the rejected responses of preference pairs.

        Raises:
            ConfigError: there is no such source, or it is 'preference_pairs' and the batch has no column `preference`.
        """
        if source not in get_args(Source):
            raise ConfigError(f"source: found {source!r}; {nearest(str(source), get_args(Source))}")
        if source == "all":
            return torch.ones_like(self.is_demonstration)
        if source == "preference_pairs":
            if self.preference is None:
                raise ConfigError("source: preference_pairs needs the column `preference`, which the batch lacks")
            return self.preference != 0
        if source == "rollouts":
            return ~self.is_demonstration
        shown = self.is_demonstration | self.is_demonstration_token.any(dim=1)
        return shown if self.preference is None else shown & (self.preference >= 0)

    def source_tokens(self, source: Source) -> Bool[Tensor, "B T"]:
        """[B, T] True for the tokens of `source`. Demonstration tokens in a rollout are not tokens of 'rollouts'.

        Raises:
            ConfigError: as for `source_rows`.
        """
        tokens = self.response_mask & self.source_rows(source)[:, None]
        if source == "rollouts":
            return tokens & ~self.is_demonstration_token
        return tokens & self.is_demonstration_token if source == "demonstrations" else tokens

    def tokens_seen(self, source: Source) -> Bool[Tensor, "B T"] | None:
        """[B, T] the tokens that the parts of a term with this source see; None if they see all of them.

        In a rollout that begins with demonstration tokens, they see only the tokens of the source. In every other
        trajectory, they see all tokens.
        """
        guided = (self.is_demonstration_token & ~self.is_demonstration[:, None]).any(dim=1, keepdim=True)
        if source not in ("rollouts", "demonstrations") or not bool(guided.any()):
            return None
        return self.response_mask & (self.source_tokens(source) | ~guided)

    def select(self, rows: Int[Tensor, "b"], logprobs: Tensor | None = None, **columns: Tensor | None) -> Trajectories:
        """A batch of the trajectories `rows`, cut after the last token that counts.

        `row` of the result refers to the batch that this batch was selected from.

        Args:
            logprobs: [b, at least the width of the result] the log-probs of the result, as a model gives them for a
                micro-batch. Without them the result has neither entropies nor distributions, because all three come
                from the same forward pass.
            columns: columns of the result that replace the selected ones, of any width like `logprobs`.
        """
        ends = self.response_mask[rows].any(dim=0).nonzero()
        width = slice(int(ends[-1]) + 1 if len(ends) else 1)
        given: dict[str, Any] = {"entropies": None, "distributions": None} if logprobs is None else {}
        given |= {"logprobs": logprobs, **columns}
        picked = {f.name: _at(f.name, getattr(self, f.name), rows, width) for f in fields(self) if f.name not in given}
        picked |= {name: _at(name, value, slice(None), width) for name, value in given.items()}
        return Trajectories(**picked)

    def with_rewards(self, rewards: Float[Tensor, "B"]) -> Trajectories:
        """The same trajectories with other rewards, which then also determine success. For parts that wrap another."""
        if rewards.shape != self.response_mask.shape[:1]:
            raise ValueError(
                f"rewards: expected shape {list(self.response_mask.shape[:1])}, found {list(rewards.shape)}"
            )
        # `replace` would read every column, which a part's view of the batch does not allow.
        other = copy.copy(self)
        object.__setattr__(other, "rewards", rewards)
        object.__setattr__(other, "succeeded", None)
        return other

    def pack(self) -> PackedTokens:
        """The tokens that count as one row [N] without padding, trajectory by trajectory."""
        return self.at(*self.response_mask.nonzero(as_tuple=True))

    def at(self, rows: Int[Tensor, "N"], columns: Int[Tensor, "N"]) -> PackedTokens:
        """The tokens at some positions, in order. A position is a trajectory's row and an index in its response."""
        assert self.row is not None
        picked: dict[str, Any] = {name: getattr(self, name) for name in TOKEN_COLUMNS}
        picked = {name: column if column is None else column[rows, columns] for name, column in picked.items()}
        return PackedTokens(**picked, step=self.step, state=self.state, row=self.row[rows], column=columns)


def _at(name: str, value: Any, rows: Tensor | slice, width: slice) -> Any:
    """A field of a batch at some rows, and at the columns `width` if it has one number per token."""
    if isinstance(value, Distributions):
        return value.at(rows, width)
    if name == NAMED_REWARDS:
        return {one: column[rows] for one, column in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value[rows, width] if name in TOKEN_COLUMNS and value.ndim == 2 else value[rows]
