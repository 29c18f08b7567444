"""Deliberate damage: nothing fails silently, and nothing is lost."""
