"""Random JSON schemas of the kind that can be enforced."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ("^[a-z]{2,5}$", "^(ab|cd)+$", "^[0-9]{3}-[A-Z]$", "^x?y*z$", "a", "^é+$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname")
NAMES = ("a", "b", "name", 'quo"te', "back\\slash", "é", "with space", "id", "n0")
VALUES = (1, -3, 2.5, "a", 'q"', "", None, True, False, [1, "b"], {"k": [None]}, "é\n")


def random_schema(seed: int) -> dict[str, Any]:
    """One schema."""
    return _Made(random.Random(seed)).whole()


class _Made:
    def __init__(self, chance: random.Random) -> None:
        self.chance, self.depth = chance, 0

    def whole(self) -> dict[str, Any]:
        schema = self.any()
        if self.chance.random() < 0.2:
            inner = self.object()
            schema = {
                "type": "object", "required": ["x"], "additionalProperties": False,
                "properties": {"x": {"$ref": "#/$defs/inner"}, "y": self.any()},
                "$defs": {"inner": inner},
            }  # fmt: skip
        notes = {"title": "t", "description": "d", "default": 3, "$comment": "c", "examples": []}
        for name in self.chance.sample(sorted(notes), self.chance.randrange(3)):
            schema[name] = notes[name]
        return schema

    def any(self) -> dict[str, Any]:
        self.depth += 1
        simple = [self.string, self.integer, self.number, self.constant, self.fixed]
        nested = [self.object, self.object, self.array, self.union, self.several, self.both]
        deep = self.depth > 3 or (self.depth > 1 and self.chance.random() < 0.5)
        made = self.chance.choice(simple if deep else [*simple, *nested, *nested])()
        self.depth -= 1
        return made

    def string(self) -> dict[str, Any]:
        kind = self.chance.randrange(4)
        found: dict[str, Any] = {"type": "string"}
        if kind == 0:
            found["pattern"] = self.chance.choice(PATTERNS)
        elif kind == 1:
            found["format"] = self.chance.choice(FORMATS)
        else:
            low = self.chance.randrange(4)
            found |= {"minLength": low, "maxLength": low + self.chance.randrange(12)}
        return found

    def integer(self) -> dict[str, Any]:
        low = self.chance.randrange(-200, 200)
        found: dict[str, Any] = {"type": "integer"}
        if self.chance.random() < 0.5:
            found["minimum"] = low
        if self.chance.random() < 0.5:
            found["exclusiveMaximum"] = low + 20 + self.chance.randrange(500)
        if self.chance.random() < 0.3:
            found["multipleOf"] = self.chance.choice((2, 3, 7))
        return found

    def number(self) -> dict[str, Any]:
        low = self.chance.randrange(-50, 50) / 4
        found: dict[str, Any] = {"type": "number"}
        if self.chance.random() < 0.5:
            found["exclusiveMinimum"] = low
        if self.chance.random() < 0.5:
            found["maximum"] = low + 1 + self.chance.randrange(100)
        return found

    def constant(self) -> dict[str, Any]:
        if self.chance.random() < 0.3:
            return {"const": self.chance.choice(VALUES)}
        return {"enum": self.chance.sample(VALUES, self.chance.randrange(1, 5))}

    def fixed(self) -> dict[str, Any]:
        return {"type": self.chance.choice(("boolean", "null", ["boolean", "null"]))}

    def array(self) -> dict[str, Any]:
        low = self.chance.randrange(3)
        found = {"type": "array", "minItems": low, "maxItems": low + self.chance.randrange(4)}
        if self.chance.random() < 0.3:
            first = [self.any() for _ in range(self.chance.randrange(1, 3))]
            return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}
        return {**found, "items": self.any()}

    def object(self) -> dict[str, Any]:
        names = self.chance.sample(NAMES, self.chance.randrange(5))
        required = [name for name in names if self.chance.random() < 0.7]
        more: Any = self.chance.choice((False, False, {"type": "integer", "minimum": 0}))
        found: dict[str, Any] = {
            "type": "object", "properties": {name: self.any() for name in names},
            "required": required, "additionalProperties": more,
        }  # fmt: skip
        if self.chance.random() < 0.15:
            found["patternProperties"] = {"^p_[a-c]$": self.any()}
        if self.chance.random() < 0.15 and required == names and more:
            found |= {"minProperties": len(names), "maxProperties": len(names) + 2}
        return found

    def union(self) -> dict[str, Any]:
        return {"anyOf": [self.any() for _ in range(self.chance.randrange(1, 4))]}

    def several(self) -> dict[str, Any]:
        some = self.chance.sample(("string", "integer", "boolean", "null"), 2)
        if self.chance.random() < 0.5:
            return {"type": some}
        return {"oneOf": [{"type": name} for name in some]}

    def both(self) -> dict[str, Any]:
        low = self.chance.randrange(100)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 50}]}
