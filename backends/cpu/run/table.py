"""The instruction table that the threads of a team run: see kernels/executor.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.backends.cpu.abi import PLAN_BARRIER, PLAN_ROW_WORDS

Record = tuple[int, Sequence[int]]  # kernel address, arguments


class Table:
    """int64 [calls, PLAN_ROW_WORDS] with the arguments of all calls behind one another; fixed.

    A row is one call or several; all threads meet before the first of each row.
    """

    def __init__(self, rows: Sequence[Sequence[Record]]) -> None:
        calls = [call for row in rows for call in row]
        self.starts = np.cumsum([0, *map(len, rows)])  # of each row its first record, and the end
        self._arguments = np.zeros(max(1, sum(len(a) for _, a in calls)), np.int64)
        self._records = np.zeros((len(calls), PLAN_ROW_WORDS), np.int64)
        at = 0
        for record, (kernel, arguments) in zip(self._records, calls, strict=True):
            self._arguments[at : at + len(arguments)] = arguments
            record[:2] = kernel, self._arguments.ctypes.data + 8 * at
            at += len(arguments)
        self._records[self.starts[:-1], 2] = PLAN_BARRIER

    @staticmethod
    def single(kernel: int, arguments: Sequence[int]) -> Table:
        """One row of one call."""
        return Table([[(kernel, arguments)]])

    def records(self, row: int | None = None) -> tuple[int, int]:
        """Address and number of the records of one row, or of all."""
        first, last = (0, -1) if row is None else (row, row + 1)
        start, stop = int(self.starts[first]), int(self.starts[last])
        return self._records.ctypes.data + start * self._records.strides[0], stop - start

    def __len__(self) -> int:
        return len(self.starts) - 1
