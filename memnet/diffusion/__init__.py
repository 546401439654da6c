"""Diffusion tensors and their super-resolution."""
