"""Quantised model files: which type each tensor gets, importance matrices, and the writing."""
