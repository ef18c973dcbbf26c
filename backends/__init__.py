"""Who executes a graph: reference, null and cpu."""
