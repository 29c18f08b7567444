# %% [markdown]
# # One loss in three trainers
#
# upge is also a library: sampling, verification, model and optimizer can come from another trainer. This example takes
# one step of GRPO in a plain PyTorch loop, in a transformers `Trainer` and in TRL's `GRPOTrainer`, and compares the
# steps. The model is the small one of the repository.

# %%
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

import algorithms
import experiments
import upge

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
MODEL = Path(experiments.__file__).parent / "models" / "tiny"
PROBLEMS = {"37+25=?": "62", "18+6+20=?": "44"}
SIZE = 8  # rollouts per prompt
tokenizer = AutoTokenizer.from_pretrained(MODEL)
algorithm = algorithms.load("grpo")


def new_model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


def correct(completions, answer, **columns):
    """The reward of each response."""
    return [float(f"boxed{{{a}}}" in text) for a, text in zip(answer, completions, strict=True)]


# %% [markdown]
# ## A plain loop
#
# `plan` computes everything that depends on the whole batch: advantages, gates and divisors. `plan.estimate` then gives
# the loss of each micro-batch. The losses add up to that of the batch, whatever the split. `plain_step` takes any
# rollouts, so it is the reference for the two trainers.


# %%
def plain_step(prompts, prompt_mask, responses, response_mask, rewards):
    """The model after one step of plain gradient descent with learning rate 1 on rollouts in groups of SIZE."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    group = torch.arange(len(rewards)) // SIZE
    batch = upge.Trajectories(logprobs=None, response_mask=response_mask, rewards=rewards, group=group)
    plan = algorithm.plan(batch)
    ids = torch.cat([prompts, responses], dim=1)
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    for rows in plan.contributing.nonzero()[:, 0].split(4):
        logits = model(ids[rows], attention_mask=attention_mask[rows]).logits[:, -responses.shape[1] - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, responses[rows, :, None])[..., 0]
        plan.estimate(batch.select(rows, logprobs)).loss.backward()
    optimizer.step()
    return model


prompts = tokenizer([f"{p}\n" for p in PROBLEMS for _ in range(SIZE)], return_tensors="pt", padding=True)
width = prompts["input_ids"].shape[1]
responses = new_model().generate(**prompts, do_sample=True, max_new_tokens=48)[:, width:]
ends = responses == tokenizer.eos_token_id
response_mask = ends.cumsum(1) - ends.long() == 0  # up to the first end of sequence
texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
rewards = torch.tensor(correct(texts, [answer for answer in PROBLEMS.values() for _ in range(SIZE)]))
after_loop = plain_step(prompts["input_ids"], prompts["attention_mask"].bool(), responses, response_mask, rewards)
for problem, right in zip(PROBLEMS, rewards.view(-1, SIZE).sum(dim=1).tolist(), strict=True):
    print(f"{problem} {right:.0f} of {SIZE} rollouts are right")

# %% [markdown]
# ## A transformers Trainer
#
# The data set holds the same rollouts with their rewards. A `Trainer` collects the micro-batches of an update in
# `get_batch_samples`, which is where this subclass plans. `docs/library.md` has the version for several processes.


# %%
class UnifiedTrainer(Trainer):
    loss_is_scaled_for_ga = True  # the losses of micro-batches add up; do not divide them by their number

    def get_batch_samples(self, *args):
        micro_batches, items = super().get_batch_samples(*args)  # of one update
        labels = [row for m in micro_batches for row in m["labels"]]
        mask = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:] != -100
        columns = {name: torch.cat([m[name] for m in micro_batches]) for name in ("rewards", "group")}
        self.batch = upge.Trajectories(logprobs=None, response_mask=mask, **columns)
        self.plan = algorithm.plan(self.batch)
        rows = torch.arange(len(labels)).split([len(m["labels"]) for m in micro_batches])
        return [{**m, "rows": r} for m, r in zip(micro_batches, rows, strict=True)], items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        targets = inputs["input_ids"][:, 1:, None]
        logprobs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]
        loss = self.plan.estimate(self.batch.select(inputs["rows"], logprobs)).loss
        return (loss, outputs) if return_outputs else loss


examples = []
for row in range(len(rewards)):
    prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()].tolist()
    response = responses[row][response_mask[row]].tolist()
    examples.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response, "group": row // SIZE})
dataset = Dataset.from_list(examples).add_column("rewards", rewards.tolist())

FOLDER = "runs/examples/three_trainers"
# One step of plain gradient descent with learning rate 1, without clipping.
ONE_STEP = dict(max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, save_strategy="no", disable_tqdm=True)
ONE_STEP |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, report_to="none", use_cpu=True)
arguments = TrainingArguments(FOLDER, remove_unused_columns=False, **ONE_STEP)
trainer = UnifiedTrainer(new_model(), arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=dataset)
trainer.train()

# %% [markdown]
# ## A TRL GRPOTrainer
#
# TRL samples and computes rewards and log-probs; upge replaces its advantages and its loss. TRL's `loss_type`,
# `epsilon` and `scale_rewards` then have no effect.


# %%
class UnifiedGRPOTrainer(GRPOTrainer):
    def _calculate_rewards(self, *args):
        scores = super()._calculate_rewards(*args)  # [B, reward functions]
        self.rewards = scores.nansum(dim=1)
        return scores

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # of one update
        rows = torch.arange(len(self.rewards))
        known = {"response_mask": output["completion_mask"] == 1, "rewards": self.rewards, "group": rows // SIZE}
        self.batch = upge.Trajectories(logprobs=None, **known)
        self.plan = algorithm.plan(self.batch)
        self.rollouts = {name: output[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        return output | {"rows": rows}

    def _compute_loss(self, model, inputs):
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        width = inputs["completion_ids"].shape[1]
        logprobs, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width)
        return self.plan.estimate(self.batch.select(inputs["rows"], logprobs)).loss


dataset = Dataset.from_list([{"prompt": f"{problem}\n", "answer": answer} for problem, answer in PROBLEMS.items()])
arguments = GRPOConfig(FOLDER, num_generations=SIZE, max_completion_length=48, bf16=False, **ONE_STEP)
trl_trainer = UnifiedGRPOTrainer(str(MODEL), correct, arguments, dataset)
trl_trainer.train()

# %% [markdown]
# ## The same step
#
# The `Trainer` is compared with the loop on the rollouts of the loop, and TRL with `plain_step` on the rollouts that
# TRL sampled. The differences are rounding errors of float32.

# %%
taken = trl_trainer.rollouts
after_plain = plain_step(
    taken["prompt_ids"],
    taken["prompt_mask"].bool(),
    taken["completion_ids"],
    trl_trainer.batch.response_mask,
    trl_trainer.batch.rewards,
)


def step(model):
    """What the step has added to the weights, as one vector."""
    pairs = zip(model.parameters(), new_model().parameters(), strict=True)
    return torch.cat([(after - before).detach().flatten() for after, before in pairs])


differences = {}
for name, actual, expected in (
    ("transformers", trainer.model, after_loop),
    ("TRL", trl_trainer.model, after_plain),
):
    length = float(step(expected).norm())
    differences[name] = float((step(actual) - step(expected)).norm()) / length
    print(f"{name:12}  length of the step {length:.3f}, relative difference to the plain loop {differences[name]:.0e}")
