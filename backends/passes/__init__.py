"""From graph to graph, for every device: activations packed, ops fused."""
