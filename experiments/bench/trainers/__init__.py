"""Whole trainers side by side, each in a process of its own that stops after its steps and waits for a word.

`link` joins parent and child, `turns` is the child's side of the conversation, `job` what all children share: prompts,
rewards, evaluation. `ours` and `trl_grpo` are the children.
"""
