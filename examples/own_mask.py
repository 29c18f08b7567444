# %% [markdown]
# # A mask of your own, its bias and its variance
#
# A mask decides which tokens may move. It usually removes the tokens with extreme importance ratios, which lowers the
# variance of the gradient but adds bias, because the removed tokens are missing from the average. For a policy with few
# possible responses, both can be computed without sampling: `upge.theory` sums over every possible group of rollouts.

# %%
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

import algorithms
import upge
from upge.corrections import wrap
from upge.theory.enumerate import Setting, SoftmaxPolicy, expectation

# %% [markdown]
# ## The mask
#
# A part is a frozen dataclass. Its fields are its settings, and `reads` lists the columns that it uses. PPO's clip
# stops a token only if its advantage would push the ratio further out. This mask stops every token outside the band.


# %%
@dataclass(frozen=True)
class Band(upge.StabilizationMask):
    """1[1/bound ≤ π_θ/π_old ≤ bound], whatever the advantage."""

    bound: float = 1.5
    reads = frozenset({"logprobs", "behavior_logprobs"})

    def __call__(self, batch, advantages):
        ratio = batch.log_importance_ratio.exp()
        return ((ratio >= 1 / self.bound) & (ratio <= self.bound)).to(advantages.dtype)


# %% [markdown]
# `check_component` checks the rules that the trainer relies on: shapes, no gradient, independence of padding, order
# and micro-batches, finite values at extreme ratios. It raises an error with one sentence if a rule is broken.

# %%
upge.testing.check_component(Band())
print("Band follows the rules of a part.")

# %% [markdown]
# ## The setting
#
# The policy has 15 possible responses of one to three tokens. Rollouts come in groups of n = 3 from a behavior policy
# that is some updates old. The algorithm is `dr_grpo`; `wrap` replaces the part in one slot. On-policy and without a
# mask, its expected gradient is (n - 1)/n · 1/1024 · ∇E[R], because a rollout is part of its own baseline and the
# divisor is a constant length of 1024. `scale` is this known factor.

# %%
policy = SoftmaxPolicy.random(vocabulary=3, horizon=3, seed=0)
setting = Setting(policy, reward=lambda tokens: float(sum(tokens) % 3 == 0), behavior=policy.moved(0.3, seed=1))


def measure(mask):
    """The exact expectation and variance of the gradient of one group under a mask."""
    algorithm = wrap(algorithms.load("dr_grpo"), "mask", lambda _: mask)
    return expectation(algorithm, setting, group_size=3, scale=2 / 3 / 1024)


# %% [markdown]
# ## Bias and variance
#
# All numbers are relative to the length of ∇E[R]. `bias` is the distance of the expected gradient from ∇E[R], and
# `cosine` is the cosine between the two. `deviation` is the standard deviation of the gradient of one group. A batch of
# k groups has the same bias, and its deviation is smaller by √k; `error` is √(bias² + deviation²/k).

# %%
masks = {
    "NoMask": upge.NoMask(),
    "PPOClip": upge.PPOClip(low=0.2, high=0.2),
    "Band(1.5)": Band(1.5),
    "Band(1.2)": Band(1.2),
}
reports = {name: measure(mask) for name, mask in masks.items()}


def deviation(name):
    report = reports[name]
    return report.variance**0.5 / report.scale / float(report.exact.norm())


def error(name, groups):
    return (reports[name].relative_bias ** 2 + deviation(name) ** 2 / groups) ** 0.5


print("mask        bias  cosine  deviation  error of 10 groups  of 1000")
for name, report in reports.items():
    numbers = f"{report.relative_bias:.3f}  {report.cosine:6.3f}  {deviation(name):9.3f}"
    print(f"{name:9}  {numbers}  {error(name, 10):18.3f}  {error(name, 1000):7.3f}")

# %% [markdown]
# Even without a mask the gradient is biased, because a token's ratio leaves out the ratios of the other tokens of its
# response. Each mask lowers the variance and adds bias, so none of them is always best: a small batch gains from a
# mask, and a large one, which averages out the noise, loses.

# %%
sizes = [2**k for k in range(14)]
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name in reports:
    axes.plot(sizes, [error(name, groups) for groups in sizes], label=name)
axes.set(xscale="log", xlabel="groups in a batch", ylabel="error relative to ‖∇E[R]‖")
axes.legend()
FOLDER = Path("runs/examples")
FOLDER.mkdir(parents=True, exist_ok=True)
figure.savefig(FOLDER / "own_mask.png", dpi=120)
print(f"figure: {FOLDER / 'own_mask.png'}")

# %% [markdown]
# **What to try.** Save the class as `my_mask.py` and train with it: `python -m experiments.run algo=dr_grpo
# "algo.terms.rl.estimator.mask={_target_: my_mask.Band, bound: 1.5}"`. `docs/extend.md` has a class for every slot,
# and `python -m experiments.diagnose` measures bias and variance on a real model.
