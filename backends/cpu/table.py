"""The instruction table that the threads of a team run: see kernels/executor.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.backends.cpu.signatures import PLAN_BARRIER, PLAN_ROW_WORDS


class Table:
    """int64 [rows, PLAN_ROW_WORDS] with the arguments of all rows behind one another; fixed."""

    def __init__(self, rows: Sequence[tuple[int, Sequence[int]]], meet: Sequence[bool]) -> None:
        """`rows`: kernel address and arguments; `meet[i]`: all threads meet before row i."""
        self._arguments = np.zeros(max(1, sum(len(a) for _, a in rows)), np.int64)
        self._rows = np.zeros((len(rows), PLAN_ROW_WORDS), np.int64)
        at = 0
        for row, (kernel, arguments), meets in zip(self._rows, rows, meet, strict=True):
            self._arguments[at : at + len(arguments)] = arguments
            row[:3] = kernel, self._arguments.ctypes.data + 8 * at, PLAN_BARRIER * meets
            at += len(arguments)

    @staticmethod
    def single(kernel: int, arguments: Sequence[int]) -> Table:
        """One row."""
        return Table([(kernel, arguments)], [False])

    def address(self, row: int = 0) -> int:
        """Address of a row; from there the table can be run in part."""
        return self._rows.ctypes.data + row * self._rows.strides[0]

    def __len__(self) -> int:
        return len(self._rows)
