"""Experts as products of block-sparse matrices (MegaBlocks, arXiv 2211.15841)."""
