"""Measures bias and variance of the algorithms' gradients: sampling, measurements, figures and files."""
