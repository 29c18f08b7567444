# %% [markdown]
# # Distil a teacher on-policy
#
# On-policy distillation lets the student write the responses and the teacher judge every token of them. In upge this
# is a policy gradient whose advantage comes from the teacher instead of a verifier:
#
# | algorithm | tokens that move at each position | advantage |
# |---|---|---|
# | `opd` | the sampled one | log ν − log π_θ, with ν the teacher |
# | `gkd` | the whole vocabulary | that of the Jensen-Shannon divergence between ν and π_θ |
#
# This example makes a teacher, distils it into the small model with both algorithms, and looks at the tokens that the
# teacher objects to. It takes about a minute and a half on one CPU core.

# %%
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path("runs/examples/distill_a_teacher")
COMMON = [
    "model=tiny",
    "data.levels=[3 mixed,4 mixed]",
    "data.evaluation_size=96",
    "eval.samples=1",
    "rollout.engine=transformers",
    "checkpoint.every=0",
]


def lines(path):
    """The lines of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def train(name, settings):
    """Run `python -m experiments.run`; return the share of the evaluation problems solved before and after it."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    command = [sys.executable, "-m", "experiments.run", *COMMON, *settings.split(), f"output={FOLDER / name}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [line["all"]["greedy"] for line in lines(FOLDER / name / "evaluations.jsonl")]


# %% [markdown]
# ## The teacher
#
# The problems mix sums and differences, which the small model solves poorly. The teacher is the small model after
# supervised fine-tuning on worked solutions of other problems of this kind (another `data.seed`).

# %%
TEACHING = "algo=sft steps=60 prompts_per_step=48 data.train_size=4000 data.seed=100 eval.every=60"
before, teacher = train("teacher", f"{TEACHING} optimizer.lr=1e-3 optimizer.schedule=cosine")
print(f"solved of the evaluation problems: small model {before:.0%}, teacher {teacher:.0%}")

# %% [markdown]
# ## Two students
#
# Both start from the small model and use the same prompts. Rewards are recorded but do not affect the gradient.
# `distill/advantage_mean` in `metrics.jsonl` is minus a divergence to the teacher, per token in nats: for `opd` the
# reverse KL, estimated from the sampled tokens, for `gkd` the policy's part of the Jensen-Shannon divergence,
# KL(π_θ‖m)/2 with m the mean of ν and π_θ. The second is always smaller, so compare each only with its own start.

# %%
STEPS = 16
STUDENT = f"teacher.path={FOLDER / 'teacher' / 'final'} steps={STEPS} prompts_per_step=16 group_size=4"
divergences = {}
for algorithm in ("opd", "gkd"):
    before, after = train(algorithm, f"algo={algorithm} {STUDENT} optimizer.lr=1e-3 log_rollouts=1 eval.every={STEPS}")
    steps = [-line["distill/advantage_mean"] for line in lines(FOLDER / algorithm / "metrics.jsonl")]
    divergences[algorithm] = sum(steps[:4]) / 4, sum(steps[-4:]) / 4
    print(f"{algorithm}: solved {before:.0%}, then {after:.0%}; ", end="")
    print("divergence {:.4f} in the first four steps, {:.4f} in the last four".format(*divergences[algorithm]))

# %% [markdown]
# `gkd` usually learns faster: the whole vocabulary shows where the probability should go, while a sampled token only
# shows whether it was a good choice. One short run is not a comparison; `docs/results.md` has one with five seeds.
#
# ## What the teacher objects to
#
# `tokens/step_*.jsonl` has the rollouts with the largest token weights. For `opd` the weight of a token is the
# teacher's log-ratio: 0 where the two agree, and far below 0 where the student wrote what the teacher finds unlikely.

# %%
rollout = lines(FOLDER / "opd" / "tokens" / "step_000001.jsonl")[0]
tokens = [token.replace("\n", "⏎").replace("<eos>", "end") for token in rollout["tokens"]]
weights = rollout["relative"]
print(f"{rollout['prompt']} the answer is {rollout['answer']}, the student wrote")
print(" ".join(f"{token:>5}" for token in tokens[:18]))
print(" ".join(f"{weight:5.1f}" for weight in weights[:18]))

# %%
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar(range(len(tokens)), weights)
axes.set_xticks(range(len(tokens)), tokens)
axes.set(ylabel="log ν − log π_θ", title=f"{rollout['prompt']}  a rollout of the student, judged by the teacher")
figure.tight_layout()
figure.savefig(FOLDER / "objections.png", dpi=120)
print(f"figure: {FOLDER / 'objections.png'}")

# %% [markdown]
# **What to try.** `algo.terms.distill.estimator.advantage.beta=0.9` of `gkd` moves the divergence towards the reverse
# KL, and `"algo.terms.distill.support={_target_: upge.TopK, k: 8, of: teacher}"` uses only the teacher's eight
# likeliest tokens. See `docs/distillation.md`.
