"""Hints for keys that do not exist: the names of TRL and verl, a key with the same last part, or the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from upge.errors import nearest

_CLIP, _ADVANTAGE = "algo.terms.rl.estimator.mask", "algo.terms.rl.estimator.advantage"
_PROMPTS = "prompts per step over all ranks; optimizer.micro_batch_tokens bounds the memory"
_EPOCHS = "a number of steps; an epoch is the number of problems / prompts_per_step"
_TOKENS = "tokens per forward pass on one rank; it does not change the gradient"
_FILES = "with data=table, or data=verl for verl's files"
_LENGTH = "also the limit of demonstrations; rollout.max_prompt_tokens is that of prompts"
_GAE = "of algo=ppo"
_KL = "together with correction=kl_k3; upge describe lists the other KL corrections"
_ALGORITHM = "the algorithm decides it; upge describe lists all"

#: Name in TRL's, transformers' or verl's configuration → key here with a remark, which may be empty. A name without a
#: dot also stands for keys that end in it.
NAMES: dict[str, tuple[str, str]] = {
    # TRL and transformers.
    **dict.fromkeys(("lr", "learning_rate"), ("optimizer.lr", "")),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("optimizer.schedule", "constant, linear or cosine")),
    **dict.fromkeys(("warmup_ratio", "warmup"), ("optimizer.warmup_steps", "a number of steps")),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("optimizer.beta1", "and optimizer.beta2")),
    "max_steps": ("steps", ""),
    "num_train_epochs": ("steps", _EPOCHS),
    "num_iterations": ("optimizer.epochs", "passes over a step's batch"),
    "steps_per_generation": ("optimizer.mini_batches", "updates per pass over a step's prompts"),
    "num_generations": ("group_size", "rollouts per prompt"),
    "num_generations_eval": ("eval.samples", ""),
    **dict.fromkeys(
        ("per_device_train_batch_size", "generation_batch_size", "train_batch_size", "batch_size"),
        ("prompts_per_step", _PROMPTS),
    ),
    **dict.fromkeys(("max_completion_length", "max_new_tokens"), ("rollout.max_response_tokens", "")),
    **dict.fromkeys(("max_length", "max_seq_length"), ("rollout.max_response_tokens", _LENGTH)),
    "max_prompt_length": ("rollout.max_prompt_tokens", ""),
    "temperature": ("rollout.temperature", ""),
    "beta": ("correction.kl_k3.coefficient", f"{_KL}; DPO's is algo.terms.pairs.estimator.advantage.beta"),
    "epsilon": (f"{_CLIP}.low", f"and {_CLIP}.high: the ratio stays in [1 - low, 1 + high]"),
    "epsilon_high": (f"{_CLIP}.high", ""),
    "delta": ("correction.dual_clip.dual", "together with correction=dual_clip"),
    "loss_type": ("algo", "algo=grpo, dapo, dr_grpo, cispo, ...; upge describe lists all"),
    "importance_sampling_level": ("algo", "algo=gspo has the ratio of whole responses"),
    "scale_rewards": (f"{_ADVANTAGE}.normalize_std", "true or false"),
    "mask_truncated_completions": ("correction", "correction=overlong_filter"),
    "vllm_importance_sampling_correction": ("correction", "correction=tis"),
    "vllm_importance_sampling_cap": ("correction.tis.cap", "together with correction=tis"),
    **dict.fromkeys(
        ("reward_funcs", "reward_weights"), ("verify.verifier", "a weighted sum such as 'math + 0.2*my.style'")
    ),
    **dict.fromkeys(("model_name_or_path", "model_name"), ("model", "a name, a folder or a hub name")),
    **dict.fromkeys(("torch_dtype", "bf16", "fp16"), ("model.dtype", "float32 or bfloat16")),
    "dataset_name": ("data.hub", "with data=table"),
    "train_dataset": ("data", "a name; data=table reads a file or a data set of the hub"),
    "dataset_config": ("data.subset", "with data=table"),
    **dict.fromkeys(("lora_r", "lora_rank", "use_peft"), ("model.lora.rank", "")),
    "lora_alpha": ("model.lora.alpha", ""),
    "lora_dropout": ("model.lora.dropout", ""),
    "lora_target_modules": ("model.lora.target_modules", ""),
    "teacher_model_name_or_path": ("teacher.path", ""),
    "use_vllm": ("rollout.engine", "vllm, transformers or auto"),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "gpu_memory_utilization"), ("rollout.memory_fraction", "")),
    **dict.fromkeys(
        ("vllm_tensor_parallel_size", "tensor_parallel_size", "tensor_model_parallel_size"),
        ("rollout.tensor_parallel", ""),
    ),
    "report_to": ("log_to", "a list such as [console,wandb]"),
    "project": ("log_project", ""),
    **dict.fromkeys(("output_dir", "run_name"), ("output", "the folder's name is the run's name")),
    **dict.fromkeys(("eval_steps", "eval_strategy"), ("eval.every", "")),
    **dict.fromkeys(("save_steps", "save_strategy"), ("checkpoint.every", "")),
    "save_total_limit": ("checkpoint.keep", ""),
    "resume_from_checkpoint": ("resume", "auto continues the run in `output`"),
    "log_completions": ("log_rollouts", ""),
    # verl.
    "data.train_files": ("data.path", _FILES),
    "data.val_files": ("data.evaluation_path", _FILES),
    "max_response_length": ("rollout.max_response_tokens", ""),
    "rollout.n": ("group_size", "rollouts per prompt"),
    "rollout.name": ("rollout.engine", ""),
    "val_kwargs.n": ("eval.samples", ""),
    "val_kwargs.temperature": ("eval.temperature", ""),
    "lr_warmup_steps": ("optimizer.warmup_steps", ""),
    "grad_clip": ("optimizer.max_grad_norm", ""),
    "ppo_mini_batch_size": ("optimizer.mini_batches", "a number of updates: prompts_per_step / ppo_mini_batch_size"),
    "ppo_epochs": ("optimizer.epochs", ""),
    **dict.fromkeys(
        ("ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu", "ppo_max_token_len_per_gpu"),
        ("optimizer.micro_batch_tokens", _TOKENS),
    ),
    **dict.fromkeys(("clip_ratio", "clip_ratio_low"), (f"{_CLIP}.low", f"and {_CLIP}.high")),
    "clip_ratio_high": (f"{_CLIP}.high", ""),
    "clip_ratio_c": ("correction.dual_clip.dual", "together with correction=dual_clip"),
    "entropy_coeff": ("correction.entropy.coefficient", "together with correction=entropy"),
    "use_kl_loss": ("correction", "correction=kl_k3, or another KL correction"),
    "kl_loss_coef": ("correction.kl_k3.coefficient", _KL),
    "kl_loss_type": ("correction", "kl_k1, kl_k2, kl_k3 or kl_full"),
    "use_kl_in_reward": ("correction", "correction=kl_reward"),
    "kl_coef": ("correction.kl_reward.coefficient", "together with correction=kl_reward"),
    "loss_agg_mode": ("algo.terms.rl.reduction", "{_target_: upge.TokenMean} or another reduction"),
    "adv_estimator": ("algo", _ALGORITHM),
    "norm_adv_by_std_in_grpo": (f"{_ADVANTAGE}.normalize_std", ""),
    "algorithm.gamma": (f"{_ADVANTAGE}.advantage.discount", _GAE),
    "algorithm.lam": (f"{_ADVANTAGE}.advantage.lam", _GAE),
    "actor_rollout_ref.model.path": ("model.path", ""),
    "critic.model.path": ("critic.path", ""),
    "critic.optim.lr": ("critic.lr", ""),
    "enable_gradient_checkpointing": ("model.gradient_checkpointing", ""),
    "total_training_steps": ("steps", ""),
    "total_epochs": ("steps", _EPOCHS),
    **dict.fromkeys(("experiment_name", "default_local_dir"), ("output", "")),
    "trainer.logger": ("log_to", ""),
    "project_name": ("log_project", ""),
    "save_freq": ("checkpoint.every", ""),
    **dict.fromkeys(("test_freq", "val_before_train"), ("eval.every", "0 evaluates before and after training")),
    "resume_mode": ("resume", ""),
    "custom_reward_function.path": ("verify.verifier", "the path of a callable"),
}

#: Names for which there is no key by design → what there is in their place.
ABSENT: dict[str, str] = {
    "gradient_accumulation_steps": "a step trains on prompts_per_step prompts on any number of GPUs, and "
    "optimizer.micro_batch_tokens decides how many tokens a forward pass takes",
    "per_device_eval_batch_size": "it would not change a result; the sampler chooses its batch",
    "logging_steps": "every step is recorded in metrics.jsonl",
    "optim": "the optimizer is AdamW; see the keys of optimizer",
    "adam_epsilon": "AdamW's epsilon is torch's default",
    "top_k": "training rollouts are drawn from the whole distribution, so that their log-probs are the policy's",
    "top_p": "training rollouts are drawn from the whole distribution, so that their log-probs are the policy's; "
    "eval.top_p is that of evaluation",
    "min_p": "training rollouts are drawn from the whole distribution, so that their log-probs are the policy's",
    "repetition_penalty": "training rollouts are drawn from the policy's own distribution",
    "attn_implementation": "the attention kernel follows from the device; run.json records it",
    "sync_ref_model": "the reference policy never changes during a run",
    "use_liger_kernel": "upge has an output head of its own, which never forms the matrix of all logits",
    "n_gpus_per_node": "gpus=N starts a process for each of N GPUs",
    "nnodes": "start torchrun on each machine, as the first lines of --help show",
    "packing": "sequences are always packed without padding",
    "remove_padding": "sequences are always packed without padding",
    "use_remove_padding": "sequences are always packed without padding",
    "push_to_hub": "a run uploads nothing; upge push RUN uploads its final/",
    "hub_model_id": "a run uploads nothing; upge push RUN repo=OWNER/NAME uploads its final/",
}
#: Least similarity of two last parts, from 0 to 1, for a hint.
_SIMILAR = 0.7


def unknown(key: str, known: Collection[str]) -> str:
    """A hint for a key that does not exist.

    The last part of the key counts more than the rest, because users remember names and forget sections.

    Args:
        key: as given, with all its parts.
        known: the keys that exist, for an algorithm also those of its parts.
    """
    name = key.lstrip("-").replace("-", "_").lower()
    if key != name and name in known:
        return f"write {name}=VALUE"
    return _foreign(name, known) or _by_last_part(name, known) or nearest(key, known)


def flag(argument: str, known: Collection[str]) -> str:
    """What is wrong with `--key VALUE`, `--key=VALUE` or `--key`."""
    name = argument.lstrip("-").partition("=")[0].replace("-", "_")
    hint = f"write {name}=VALUE" if name in known else _foreign(name, known) or "see --help for the keys and flags"
    return f"{argument[:200]!r} is not of the form key=value; {hint}"


def _foreign(name: str, known: Collection[str]) -> str:
    """The hint for a name of TRL or verl; empty if it is none, or its key does not exist here."""
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))
    found = next((suffix for suffix in suffixes if suffix in NAMES or suffix in ABSENT), None)
    if found is None:
        return ""
    if found in ABSENT:
        return f"there is no such key by design: {ABSENT[found]}"
    target, remark = NAMES[found]
    # critic.learning_rate is critic.lr, although learning_rate alone is optimizer.lr.
    sibling = f"{'.'.join(parts[:-1])}.{target.rpartition('.')[2]}"
    if sibling in known:
        return f"did you mean '{sibling}'?"
    if target.startswith("correction.") or target in known:
        return f"did you mean '{target}'?" + (f" ({remark})" if remark else "")
    is_algorithms = target.startswith("algo.") and any(one.startswith("algo.") for one in known)
    return f"in other algorithms this is {target}; the chosen one has no such setting" if is_algorithms else ""


def _by_last_part(name: str, known: Collection[str]) -> str:
    """The keys whose last part is that of `name`, else those with the most similar one; empty if none is similar."""
    last = name.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for one in known:
        by_last.setdefault(one.rpartition(".")[2], []).append(one)
    close = [last] if last in by_last else difflib.get_close_matches(last, by_last, n=1, cutoff=_SIMILAR)
    if not close:
        return ""
    if "." not in name and close[0] in known:
        return f"did you mean '{close[0]}'?"
    keys = sorted(by_last[close[0]], key=lambda one: (-difflib.SequenceMatcher(None, name, one).ratio(), one))
    return f"did you mean {' or '.join(repr(one) for one in keys[:3])}?"
