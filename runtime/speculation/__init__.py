"""Drafts of the tokens that an answer may go on with, verified in one step: no bit changes."""
