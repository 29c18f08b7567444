"""Whole trainers side by side, each in a process of its own that stops after its steps and waits for a word.

`link` starts the children and joins them with the bench, `turns` is the child's side of the conversation, `job` what
all children share: prompts, rewards, evaluation. `ours` and `trl_grpo` are the children.
"""
