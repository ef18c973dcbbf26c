"""A placement for people: text, JSON, and pictures."""
