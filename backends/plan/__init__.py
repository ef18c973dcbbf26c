"""From a graph to calls of kernels, for every device: plans, lowering, compiled code on disk."""
