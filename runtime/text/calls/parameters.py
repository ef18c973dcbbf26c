"""Parameters that are written as plain text: the JSON value that a text stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_PYTHON = {"True": "true", "False": "false", "None": "null"}


class Written(NamedTuple):
    """What a parameter may be; `text`: nothing but text."""

    text: bool
    may_be_text: bool

    def json(self, text: str) -> str:
        """JSON of the value that `text` stands for."""
        text = _PYTHON.get(text.strip(), text)
        try:
            value = json.loads(text)
            if not (isinstance(value, str) and self.may_be_text):
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            pass
        return json.dumps(text, ensure_ascii=False)


def written(schema: Mapping[str, Any], name: str) -> Written:
    """How the parameter `name` of a tool of this schema is written."""
    properties = schema.get("properties")
    own = properties.get(name) if isinstance(properties, Mapping) else None
    types = own.get("type") if isinstance(own, Mapping) else None
    names = [types] if isinstance(types, str) else list(types or ())
    if isinstance(own, Mapping) and not names and isinstance(own.get("enum"), list):
        names = ["string" if isinstance(v, str) else "other" for v in own["enum"]]
    only = bool(names) and all(kind == "string" for kind in names)
    return Written(only, not names or "string" in names)
