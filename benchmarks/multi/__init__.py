"""The sections of ``benchmarks/multi_gpu.py``."""
