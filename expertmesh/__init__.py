"""Mixture-of-Experts for PyTorch: one layer, the same numbers on every mesh."""
