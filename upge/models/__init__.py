"""Models: paths, conversion of GGUF files, configurations with overrides, and weights by name."""

from upge.models.gguf import local_path

__all__ = ["local_path"]
