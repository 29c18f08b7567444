"""The algorithms in print: lists, single algorithms, and docs/algorithms.md."""
