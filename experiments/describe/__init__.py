"""Describes the algorithms: lists them, shows single ones, and generates docs/algorithms.md."""
