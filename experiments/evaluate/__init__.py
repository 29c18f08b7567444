"""Evaluate: the settings, the checks before sampling, the folder, and the printed tables."""
