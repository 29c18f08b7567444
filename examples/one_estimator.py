# %% [markdown]
# # SFT and GRPO are one estimator
#
# The gradient of a post-training loss is one number per token times ∇log π_θ:
#
#     grad = Σ_trajectories Σ_tokens  w · 1_stable · (1/π_ref) · Â · ∇π_θ,    ∇π_θ = π_θ ∇log π_θ
#
# This example builds SFT and GRPO from the four factors, prints the factors of each token, and compares the result with
# autograd through the losses as written in the papers. The policy is a table of random logits in float64.

# %%
import torch

import upge

torch.manual_seed(0)
RESPONSES, TOKENS, VOCABULARY = 4, 3, 5
logits = torch.randn(RESPONSES, TOKENS, VOCABULARY, dtype=torch.float64, requires_grad=True)
responses = torch.randint(VOCABULARY, (RESPONSES, TOKENS))
response_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def log_likelihood():
    """log π_θ of each token, [B, T], with gradient."""
    return logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0]


# %% [markdown]
# ## Two lists of parts
#
# SFT divides by the current policy, so π_θ/π_ref is 1, and every token has the advantage 1. GRPO divides by the
# policy that sampled the rollouts, compares rewards within a group, and masks tokens whose ratio has left the clip
# range. The rest of the code is the same for both.

# %%
sft = upge.UnifiedGradient(
    mask=upge.NoMask(),
    denominator=upge.CurrentPolicy(),
    advantage=upge.ConstantAdvantage(),
)
grpo = upge.UnifiedGradient(
    mask=upge.PPOClip(low=0.2, high=0.2),
    denominator=upge.BehaviorPolicy(),
    advantage=upge.GroupRelative(),
)
gate = upge.ConstantGate()
algorithms = {
    "SFT": upge.Algorithm("SFT", {"sft": upge.Term("demonstrations", gate, sft, upge.TokenMean())}),
    "GRPO": upge.Algorithm("GRPO", {"rl": upge.Term("rollouts", gate, grpo, upge.QuestionMean(tokens="mean"))}),
}
for algorithm in algorithms.values():
    print(algorithm.formula(), "\n")

# %% [markdown]
# ## The losses of the papers
#
# Nothing here uses upge. The four responses answer one prompt; for SFT they are demonstrations, for GRPO rollouts of
# an older policy, of which the first two are right.

# %%
old_logprobs = (log_likelihood() + 0.3 * torch.randn(RESPONSES, TOKENS, dtype=torch.float64)).detach().clamp(max=0)
rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)


def sft_loss(logprobs):
    return -logprobs[response_mask].mean()


def grpo_loss(logprobs):
    advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None]
    ratio = torch.exp(logprobs - old_logprobs)
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    of_responses = (objective * response_mask).sum(dim=1) / response_mask.sum(dim=1)
    return -of_responses.mean()


# %% [markdown]
# ## Side by side
#
# `weight` is the product of the four columns before it. `textbook` is minus the derivative of the paper's loss with
# respect to log π_θ of the token. A masked token still has its ratio in `π_θ/π_ref`, but its weight is 0.


# %%
def gradient(loss):
    """The gradient of a loss with respect to the logits, [B, T, V]."""
    return torch.autograd.grad(loss, logits)[0]


for name, textbook in {"SFT": sft_loss, "GRPO": grpo_loss}.items():
    batch = upge.Trajectories(
        logprobs=log_likelihood(),
        response_mask=response_mask,
        rewards=rewards,
        group=torch.zeros(RESPONSES, dtype=torch.long),
        is_demonstration=torch.full((RESPONSES,), name == "SFT"),
        behavior_logprobs=None if name == "SFT" else old_logprobs,
    )
    estimate = algorithms[name].estimate(batch)
    (factors,) = estimate.terms.values()
    ratio = torch.exp(batch.logprobs.detach() - factors.log_denominator)
    logprobs = log_likelihood()
    derivative = torch.autograd.grad(-textbook(logprobs), logprobs)[0]
    columns = [factors.reduction, factors.mask, ratio, factors.advantages, estimate.weights, derivative]
    print(f"{name:9}      w  1_stable  π_θ/π_ref      Â    weight  textbook")
    for row, token in response_mask.nonzero().tolist():
        numbers = [float(column[row, token]) for column in columns]
        print("({}, {})    {:6.4f}  {:8.0f}  {:9.4f}  {:5.2f}  {:8.5f}  {:8.5f}".format(row, token, *numbers))
    difference = (gradient(estimate.loss) - gradient(textbook(log_likelihood()))).abs().max()
    print(f"largest difference of the gradients with respect to the logits: {difference:.1e}\n")

# %% [markdown]
# **What to try.** Give `sft` the advantage `upge.GroupRelative()`, or `grpo` the denominator `upge.UnitDenominator()`:
# any combination is an algorithm. `python -m experiments.describe` lists the factors of all shipped algorithms.
