"""Grammars: answers that can be nothing but JSON of a schema, or text of a grammar or a regex."""
