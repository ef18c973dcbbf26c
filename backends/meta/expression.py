"""Device expressions, as users write them: `cpu`, `tensor(cpu:0,cpu:1)`, `layers(3*a,b)`.

`tensor(a,b)`: each device has a part of every tensor; `layers(a,b)`: each has some of the layers.
`3*a` is a share, 1 without it. What an expression comes to is said in stages.py.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

from runtime.ops.errors import OptionError, shown

MOST_DEPTH = 16

_GROUPS = ("tensor", "layers")
_KINDS = ("cpu", "numa", "cuda", "mpi", "null", "reference")
_COUNTED = ("numa", "mpi", "null")  # a number says how many, not which
_UNITS = {
    f"{letter}{i}B": base**power
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))
    for i, base in (("i", 1024), ("", 1000))
} | {"B": 1}
_SHARE = re.compile(r"\d{1,300}(\.\d{0,300})?|\.\d{1,300}", re.ASCII)
_DEVICE = re.compile(
    r"(?P<kind>[a-z_]+)(:(?P<number>\d{1,4})(/(?P<of>\d{1,4}))?)?"
    r"(:(?P<size>\d{1,18}(\.\d{1,9})?)(?P<unit>[kmgt]?i?b))?",
    re.ASCII | re.IGNORECASE,
)
_TOKEN = re.compile(r"[(),*]|[^\s(),*]+")


@dataclass(frozen=True)
class Device:
    """One device. number: which of its kind; None where it is the only one or any will do.

    of: it is one of so many parts of the machine. nbytes: its memory, for planning. copy: which
    of several virtual devices on one GPU, that are written alike.
    """

    kind: str
    number: int | None = None
    of: int | None = None
    nbytes: int | None = None
    copy: int = 0

    def __str__(self) -> str:
        part = "" if self.of is None else f"/{self.of}"
        number = "" if self.number is None else f":{self.number}{part}"
        return f"{self.kind}{number}" + ("" if self.nbytes is None else f":{_size(self.nbytes)}")


@dataclass(frozen=True)
class Several:
    """`count` devices of a kind side by side; None: as many as the machine has."""

    kind: str
    count: int | None = None

    def __str__(self) -> str:
        return self.kind if self.count is None else f"{self.kind}:{self.count}"


@dataclass(frozen=True)
class Group:
    """Devices and groups with their shares. kind: "tensor", "layers", or "" for a bare list."""

    kind: str
    members: tuple[tuple[Fraction, Node], ...]

    def __str__(self) -> str:
        inner = ",".join(times(share, node) for share, node in self.members)
        return f"{self.kind}({inner})" if self.kind else inner


Node = Device | Several | Group


def parse(expression: str) -> Node:
    """The tree of an expression; its `str` is an expression again, of the same tree.

    OptionError, naming `devices`, for what is none.
    """
    return _Parser(expression).whole()


def times(share: Fraction, node: object) -> str:
    """`node` with its share, as in "3*cpu:0"."""
    if share == 1:
        return str(node)
    whole, rest = divmod(share, 1)
    decimals = f"{int(rest * 10**300):0300d}".rstrip("0")
    return f"{whole}{'.' if decimals else ''}{decimals}*{node}"


def share(value: object) -> Fraction:
    """A number of 0 and more, or the text of one. ValueError for anything else."""
    if isinstance(value, str) and _SHARE.fullmatch(value):
        return Fraction(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        plain = int(value) if isinstance(value, Integral) else float(value)
        if 0 <= plain < math.inf:
            return Fraction(repr(plain))
    raise ValueError(f"a share is a number of 0 and more, such as 3 or 0.5, not {shown(value)}")


class _Parser:
    """By recursive descent; each method takes what it is named after."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._rest = _TOKEN.findall(expression)[::-1]

    def whole(self) -> Node:
        if not self._rest:
            raise self._wrong("it is empty; give a device, such as cpu")
        members = self._list(0)
        if self._rest:
            left = self._rest[-1]
            what = f"a comma is missing before {left!r}"
            raise self._wrong("nothing opens what the last ) closes" if left == ")" else what)
        (first, node), *others = members
        return node if first == 1 and not others else Group("", members)

    def _list(self, depth: int) -> tuple[tuple[Fraction, Node], ...]:
        found = [self._member(depth)]
        while self._rest and self._rest[-1] == ",":
            self._rest.pop()
            found.append(self._member(depth))
        return tuple(found)

    def _member(self, depth: int) -> tuple[Fraction, Node]:
        word = self._word()
        if not self._rest or self._rest[-1] != "*":
            return Fraction(1), self._node(word, depth)
        self._rest.pop()
        try:
            found = share(word)
        except ValueError as error:
            raise self._wrong(str(error)) from None
        return found, self._node(self._word(), depth)

    def _node(self, word: str, depth: int) -> Node:
        if not self._rest or self._rest[-1] != "(":
            return self._device(word)
        if word.lower() not in _GROUPS:
            raise self._wrong(f"{word!r} is no group of devices: those are tensor and layers")
        if depth == MOST_DEPTH:
            raise self._wrong(f"groups lie more than {MOST_DEPTH} deep")
        self._rest.pop()
        members = self._list(depth + 1)
        if not self._rest or self._rest.pop() != ")":
            raise self._wrong(f"there is no ) where {word}( ends")
        return Group(word.lower(), members)

    def _word(self) -> str:
        if not self._rest or self._rest[-1] in "(),*":
            before = f"before {self._rest[-1]!r}" if self._rest else "at the end"
            raise self._wrong(f"a device is missing {before}")
        return self._rest.pop()

    def _device(self, word: str) -> Device | Several:
        if word.lower() in _GROUPS:
            raise self._wrong(f"{word} needs devices, such as {word}(cpu:0,cpu:1)")
        match = _DEVICE.fullmatch(word)
        kind = match["kind"].lower() if match else ""
        if match is None or kind not in _KINDS:
            raise self._unknown(word)
        number, of = (None if match[n] is None else int(match[n]) for n in ("number", "of"))
        nbytes = None if match["size"] is None else _nbytes(match["size"], match["unit"])
        if nbytes == 0 or (of is not None and (number is None or number >= of)):
            raise self._unknown(word)
        if kind == "reference" and word.lower() != kind:
            raise self._wrong("reference takes no number and no size")
        if kind not in _COUNTED or of is not None:
            return Device(kind, number, of, nbytes)
        if number == 0 or nbytes is not None:
            raise self._wrong(f"{kind}:N is N devices, 1 and more, and takes no size")
        return Device(kind) if word.lower() == "null" else Several(kind, number)

    def _unknown(self, word: str) -> OptionError:
        name, colon, rest = word.lower().partition(":")
        if name == "cuda" and rest.startswith("sm_"):
            return self._wrong(
                f"{shown(word)} is what kernels are compiled for, and no GPU: it is for 'runtime "
                "warmup', alone or in a list of such targets; a GPU is cuda:0"
            )
        if name in _KINDS and colon:
            return self._wrong(f"{shown(word)}: after {name}: comes a number below 10000 or a size")
        near = difflib.get_close_matches(name, _KINDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return self._wrong(
            f"{shown(word)} is no device{hint}; there are cpu, cpu:0, numa, numa:2, reference "
            "(numpy, slow and exact), null (plans only), mpi, cuda, and for plans cuda:24GB"
        )

    def _wrong(self, what: str) -> OptionError:
        return OptionError(f"devices={shown(self._expression)}: {what}")


def _nbytes(size: str, unit: str) -> int:
    factor = next(n for name, n in _UNITS.items() if name.lower() == unit.lower())
    return int(Fraction(size) * factor)


def _size(nbytes: int) -> str:
    unit = max((n for n in _UNITS if nbytes % _UNITS[n] == 0), key=lambda n: _UNITS[n])
    return f"{nbytes // _UNITS[unit]}{unit}"
