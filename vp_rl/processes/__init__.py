"""Sampling processes: the Gaussian transition of one step, family by family."""
