"""Kernels that read weights: layouts, packing, matmul tiles, and rows of the file's blocks."""
