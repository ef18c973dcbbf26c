"""Calls of tools: what a model writes, read piece by piece into content, reasoning and calls."""
