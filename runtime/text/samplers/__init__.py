"""Samplers: what may be chosen, and how likely, one small function for each idea.

`candidates` is what they pass on; `filters` are pure functions of it; `penalties`, `dry` and
`mirostat` remember something from token to token; `chain` puts them in order.
"""
