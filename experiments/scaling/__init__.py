"""Memory, time and traffic of a step by model size and number of GPUs."""
