"""Whole trainers, each in a child process that runs the requested steps and then waits for the next command.

`link` starts the children and connects them with the bench, `control` is the child's side of the connection, and `job`
holds what all children share: prompts, rewards, evaluation. `ours` and `trl_grpo` are the children.
"""
