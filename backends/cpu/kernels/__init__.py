"""Numba source of the CPU kernels; imported only where they are compiled."""
