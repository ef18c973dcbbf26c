"""CUDA: kernels written in Python, compiled ahead of time, launched through the driver."""
