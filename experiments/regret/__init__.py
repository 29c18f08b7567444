"""Measure which signal of a prompt is better to learn from, and the regret of gates."""
