# %% [markdown]
# # Judge another framework's loss
#
# A loss of per-token log-probs has a gradient of the form Σ weight · ∇log π_θ, whatever code computes it. Autograd
# gives the weights: minus the derivative of the loss with respect to each log-prob. Divided by the weights of
# `algorithms.load("grpo")` on the same batch, they show which factor of the product differs:
#
# | the ratio of the weights | factor that differs |
# |---|---|
# | is the same on all tokens | none; the learning rate compensates for it |
# | follows the length of the response | w, the average |
# | follows the spread of the rewards in the group | Â |
# | is 1/(π_θ/π_old) of the token | 1/π_ref |
# | is not a number or 0 on some tokens: only one of the two moves them | 1_stable |

# %%
import torch

import algorithms
import upge

# %% [markdown]
# ## A batch that tells the factors apart
#
# The batch has responses of different lengths, groups with different rewards, and log-probs that have moved since the
# rollouts were sampled, some of them out of the clip range. Any batch of your framework with these properties works.

# %%
torch.manual_seed(0)
lengths = torch.tensor([3, 5, 8, 6, 4, 7, 8, 2])
mask = torch.arange(8) < lengths[:, None]
rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0]).double()
group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
old = -torch.rand(8, 8).double() - 0.5
new = (old + 0.2 * torch.randn(8, 8).double()).clamp(max=0)

# %% [markdown]
# ## Losses to judge
#
# GRPO as in its paper, and five versions of it that are found in practice. Replace them with the function of your
# framework: it takes log-probs with gradient and returns a scalar.


# %%
def advantages(divide=True):
    """The group-relative advantage of each token, [B, 1]."""
    groups = rewards.view(2, 4)
    centered = groups - groups.mean(dim=1, keepdim=True)
    scale = groups.std(dim=1, keepdim=True) + 1e-6 if divide else 1.0
    return (centered / scale).view(8, 1)


def clipped(logprobs, advantage):
    ratio = torch.exp(logprobs - old)
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def mean_of_means(objective):
    return ((objective * mask).sum(dim=1) / lengths).mean()


def paper(logprobs):
    return -mean_of_means(clipped(logprobs, advantages()))


def sum_over_group(logprobs):
    return 4 * paper(logprobs)


def mean_over_all_tokens(logprobs):
    return -clipped(logprobs, advantages())[mask].mean()


def no_standard_deviation(logprobs):
    return -mean_of_means(clipped(logprobs, advantages(divide=False)))


def no_ratio(logprobs):
    """log π_θ in place of the ratio, on the tokens that the clip lets through."""
    ratio, advantage = torch.exp(logprobs - old).detach(), advantages()
    stopped = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    return -mean_of_means(logprobs * advantage * ~stopped)


def clip_without_minimum(logprobs):
    """The ratio is clipped whatever the advantage: a bad token with a large ratio is never corrected."""
    return -mean_of_means(torch.exp(logprobs - old).clamp(0.8, 1.2) * advantages())


# %% [markdown]
# ## The verdict
#
# `weights` takes the derivative. `verdict` uses the tokens that both losses move, and names the explanation by which
# the ratio must be divided to become constant on them.


# %%
def weights(loss):
    """The number in front of ∇log π_θ of each token, [B, T]."""
    logprobs = new.clone().requires_grad_()
    return -torch.autograd.grad(loss(logprobs), logprobs)[0]


batch = upge.Trajectories(logprobs=new, response_mask=mask, rewards=rewards, group=group, behavior_logprobs=old)
ours = algorithms.load("grpo").estimate(batch).weights
spread = torch.stack([rewards[group == g].std() for g in (0, 1)])[group]
explanations = {
    "none, up to a constant": torch.ones_like(new),
    "w: follows the length": lengths[:, None] * torch.ones_like(new),
    "Â: follows the group's std": spread[:, None] * torch.ones_like(new),
    "1/π_ref: follows 1/ratio": torch.exp(old - new),
}


def verdict(theirs):
    """The factor that differs, and the constant that remains."""
    moved = (ours != 0) & mask
    by_one = int(((theirs != 0) & mask != moved).sum())
    if by_one:
        return f"1_stable: {by_one} tokens are moved by one loss only", None
    for text, explanation in explanations.items():
        constant = (theirs / ours / explanation)[moved]
        if float((constant / constant.mean() - 1).abs().max()) < 1e-5:  # GRPO adds 1e-6 to the standard deviation
            return text, float(constant.mean())
    return "more than one factor", None


def cell(theirs, ours):
    """The ratio of a token's weights; · if neither loss moves it, ! if only one of them does."""
    if theirs and ours:
        return f"{theirs / ours:5.2f}"
    return "    !" if theirs or ours else "    ·"


print("ratio of the weights of each token (· moved by neither loss, ! by one of the two)")
verdicts = {}
for loss in (paper, sum_over_group, mean_over_all_tokens, no_standard_deviation, no_ratio, clip_without_minimum):
    theirs = weights(loss)
    verdicts[loss.__name__], constant = verdict(theirs)
    print(f"\n{loss.__name__}: {verdicts[loss.__name__]}" + (f", times {constant:.3g}" if constant else ""))
    for row in (1, 3, 4, 7):
        cells = [cell(float(theirs[row, column]), float(ours[row, column])) for column in range(lengths[row])]
        print(f"  group {int(group[row])}, {int(lengths[row])} tokens:", *cells)

# %% [markdown]
# A difference need not be an error: `mean_over_all_tokens` is DAPO's average, and `no_standard_deviation` is half of
# Dr. GRPO. But if two frameworks call different losses GRPO, they train differently, and a comparison of their results
# compares these choices.
#
# `python -m experiments.referee loss=FILE.py:FUNCTION algo=grpo` judges a loss function in the same way. It also cuts
# the batch into micro-batches and ranks, and it replaces two factors at a time.
