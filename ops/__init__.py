"""What a graph is made of: tensors, dtypes, ops and the walker. Imports numpy only."""
