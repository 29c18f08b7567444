# %% [markdown]
# # Why HPT switched on each prompt
#
# For each prompt, HPT computes the pass rate P of the model's own rollouts. If P is above a threshold γ, the model
# learns from the rollouts (`rl`), otherwise from a demonstration (`sft`). This example makes a short run and then
# answers three questions from its files: which source did each prompt learn from, was there anything to learn, and how
# does the gradient of a step divide between the two terms?

# %%
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

# %% [markdown]
# ## The run
#
# Four steps of eight prompts with eight rollouts each. `log_rollouts=1` keeps the responses of every step, and
# `diagnose.gradients_every=1` measures the gradient of each term. The run takes about 15 seconds.

# %%
RUN = Path("runs/examples/why_hpt_switched")
STEPS = 4
SETTINGS = [
    "algo=hpt",
    "model=tiny",
    f"steps={STEPS}",
    "prompts_per_step=8",
    "group_size=8",
    "rollout.engine=transformers",
    "log_rollouts=1",
    "diagnose.gradients_every=1",
    "eval.every=-1",
    "checkpoint.every=0",
    f"output={RUN}",
]
shutil.rmtree(RUN, ignore_errors=True)
subprocess.run([sys.executable, "-m", "experiments.run", *SETTINGS], check=True, stdout=subprocess.DEVNULL)


def lines(path):
    """The lines of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# %% [markdown]
# ## Each prompt
#
# `rollouts/step_*.jsonl` has the responses with their rewards, from which the pass rate and the gate follow.
# `prompts.jsonl` has what the run itself recorded: the source that the gate chose, and the source that contributes to
# the gradient. The two differ if the gate chose the rollouts and all of them got the same reward: then every advantage
# is 0, and the prompt learned from `nothing`.

# %%
THRESHOLD = 0.0  # γ, the default of algo=hpt
prompts = []
for step in range(1, STEPS + 1):
    groups = {}
    for rollout in lines(RUN / "rollouts" / f"step_{step:06}.jsonl"):
        if not rollout["is_demonstration"]:
            groups.setdefault(rollout["prompt"], []).append(rollout)
    for prompt, rollouts in groups.items():
        pass_rate = sum(rollout["reward"] > 0.5 for rollout in rollouts) / len(rollouts)
        gate = "rollouts" if pass_rate > THRESHOLD else "demonstrations"
        prompts.append({"step": step, "prompt": prompt, "pass_rate": pass_rate, "gate": gate, "rollouts": rollouts})
recorded = lines(RUN / "prompts.jsonl")

print(f"step  {'prompt':20} {'level':9}      P  {'gate':14}  learned from")
for prompt, line in zip(prompts, recorded, strict=True):
    if prompt["step"] in (1, STEPS):
        shown = f"{prompt['step']:4}  {prompt['prompt']:20} {line['level']:9}  {prompt['pass_rate']:5.3f}"
        print(f"{shown}  {prompt['gate']:14}  {line['learned']}")
agree = sum(prompt["gate"] == line["gate"] for prompt, line in zip(prompts, recorded, strict=True))
print(f"the gate computed from the rollouts is the recorded one for {agree} of {len(recorded)} prompts")

# %% [markdown]
# ## A failing prompt
#
# This cell prints what the model wrote, and the demonstration that it learned from instead. `tokens/step_*.jsonl` has
# the trajectories with the largest token weights of each term; for the term `sft` they are demonstrations.

# %%
demonstration = next(line for line in lines(RUN / "tokens" / "step_000001.jsonl") if line["term"] == "sft")
(failed,) = (p for p in prompts if p["step"] == 1 and p["prompt"] == demonstration["prompt"])
print(f"{failed['prompt']} the answer is {demonstration['answer']}")
for rollout in failed["rollouts"][:4]:
    print("  rollout       ", rollout["response"].replace("\n", "  "))
print("  demonstration ", "".join(demonstration["tokens"]).replace("\n", "  "))

# %% [markdown]
# ## The step as a whole
#
# From `metrics.jsonl`: the share of prompts of each term (`TERM/coefficient` is the mean of its gate), the tokens
# that it learns from, the norm of its gradient alone, and the cosine between the two gradients. A run records norms
# and cosine every `diagnose.gradients_every` steps.

# %%
metrics = lines(RUN / "metrics.jsonl")
print("step  pass rate  prompts rl/sft  tokens rl/sft  gradient norm rl/sft  cosine")
for line in metrics:
    row = f"{line['step']:4}  {line['pass_rate']:9.3f}"
    row += f"  {line['rl/coefficient']:7.3f}/{line['sft/coefficient']:.3f}"
    row += f"  {line['rl/tokens']:9.0f}/{line['sft/tokens']:<3.0f}"
    row += f"  {line['rl/grad_norm']:14.3f}/{line['sft/grad_norm']:.3f}  {line['cosine/rl_sft']:6.3f}"
    print(row)

# %% [markdown]
# The gradient of the demonstrations of a few prompts is at least ten times as long as that of all rollouts, although
# the demonstrations have fewer tokens. Every token of a demonstration has a relative weight of 1. The advantages of a
# group add up to 0, and `algo=hpt` divides the sum over a rollout's tokens by the response limit of 64 tokens. So the
# gate's choice for these few prompts determines most of the step.

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
levels = sorted({line["level"] for line in recorded}, key=lambda level: level.split()[::-1])  # "4 mixed": kind first
bottom = [0] * len(levels)
for source, color in (("rollouts", "tab:blue"), ("demonstrations", "tab:orange"), ("nothing", "lightgray")):
    counts = [sum(line["level"] == level and line["learned"] == source for line in recorded) for level in levels]
    axes.bar(levels, counts, bottom=bottom, color=color, label=source)
    bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
axes.set(ylabel="prompts", title="What the prompts of each level learned from")
axes.tick_params(axis="x", rotation=30)
figure.legend(loc="outside right upper")
figure.savefig(RUN / "switches.png", dpi=120)
print(f"figure: {RUN / 'switches.png'}; the whole report: {RUN / 'report.html'}")

# %% [markdown]
# **What to try.** With `algo.terms.sft.gate.threshold=0.25` more prompts learn from demonstrations, and
# `data_policy.demonstrated_prompts=60` leaves most prompts without one, so that some learn nothing.
