"""Plans at work: memory, weights, the team of threads and its table."""
