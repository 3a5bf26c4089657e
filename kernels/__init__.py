"""Kernels of our own, for backends that generate code."""
