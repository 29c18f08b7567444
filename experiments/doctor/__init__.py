"""Checks this machine, its packages, the chosen model, the kernels, the gradients and the sampler."""
