"""Weights as words: the layouts that matrix kernels read."""
