"""KV cache pages and sequences."""
