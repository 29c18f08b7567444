"""Models: where they lie, GGUF files made into Hugging Face folders, configurations with overrides, weights by name."""

from upge.models.gguf import local_path

__all__ = ["local_path"]
