"""A kernel's arguments, checked against its declaration and packed once into one block of memory.

The driver takes an array of pointers, one to each value. Both live as long as the block does; a
value changed in place is what the next launch reads.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from runtime.ops.errors import BackendError

from .arena import Buffer
from .intrinsic import SCALARS, WIDTH, Entry

CODES = dict(zip(SCALARS, "BbHhIiQqf", strict=True))
_POINTER = _SLOT = 8  # bytes; every value has a slot of its own
WIDTHS = WIDTH | {f"{kind}*": _POINTER for kind in SCALARS}  # bytes of a parameter


class Arguments:
    """The block of one launch: `address` is what the driver takes, `buffers` what it points to."""

    def __init__(self, entry: Entry, name: str, values: tuple[Any, ...]) -> None:
        """`values` in the order of `entry.arguments`: a Buffer for each pointer, else a number.

        BackendError: their number, kind or range is not the kernel's.
        """
        self._name, self._kinds = name, entry.arguments
        self._index = {argument: i for i, (argument, _) in enumerate(entry.arguments)}
        if len(values) != len(self._kinds):
            listed = ", ".join(argument for argument, _ in self._kinds)
            raise BackendError(
                f"kernel {name} takes {len(self._kinds)} arguments ({listed}), not {len(values)}"
            )
        self._block = ctypes.create_string_buffer(_SLOT * len(values) or 1)
        base = ctypes.addressof(self._block)
        pointers = [base + _SLOT * i for i in range(len(values))]
        self._pointers = (ctypes.c_void_p * len(values))(*pointers)
        self.address = ctypes.addressof(self._pointers)
        self.buffers: dict[str, Buffer] = {}
        for i, value in enumerate(values):
            self._set(i, value)

    def set(self, **values: Any) -> None:
        """Change arguments by name, in place."""
        for name, value in values.items():
            if name not in self._index:
                raise BackendError(f"kernel {self._name} has no argument {name}: {self._kinds}")
            self._set(self._index[name], value)

    def _set(self, i: int, value: Any) -> None:
        name, kind = self._kinds[i]
        if kind.endswith("*"):
            self._set_pointer(i, name, kind, value)
            return
        if isinstance(value, Buffer):
            raise BackendError(f"kernel {self._name}: {name} is {kind}, not a buffer")
        try:
            struct.pack_into(CODES[kind], self._block, _SLOT * i, value)
        except (struct.error, TypeError, ValueError, OverflowError):
            raise BackendError(
                f"kernel {self._name}: {name} is {kind}, which {value!r} is not"
            ) from None

    def _set_pointer(self, i: int, name: str, kind: str, value: Any) -> None:
        if not isinstance(value, Buffer):
            raise BackendError(
                f"kernel {self._name}: {name} is {kind}: give it a buffer, not {value!r}"
            )
        width = WIDTHS[kind.removesuffix("*")]
        address = value.address  # refuses what was freed
        if address % width:
            raise BackendError(
                f"kernel {self._name}: {name} begins at {address:#x}, not a multiple of {width}"
            )
        struct.pack_into("Q", self._block, _SLOT * i, address)
        self.buffers[name] = value
