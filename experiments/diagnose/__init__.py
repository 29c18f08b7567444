"""Bias and variance of the algorithms' gradients: what is sampled, measured, drawn and written."""
