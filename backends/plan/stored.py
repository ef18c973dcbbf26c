"""The stored rows of a weight, whole or cut, from where they lie in a file into room for some."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.ops.cuts import cut_rows
from runtime.ops.tensor import Tensor


class StoredRows:
    """Rows of a weight as its file has them: of all axes but the last, in the order of the cut."""

    def __init__(self, w: Tensor, tensor: Any, raw: np.ndarray | None = None) -> None:
        """tensor: the whole weight, open for reading. raw: all its bytes, where they are known."""
        whole, parts = w.attrs.get("whole", w.shape), w.attrs.get("cut", ())
        self._tensor, self._raw, self._places = tensor, raw, cut_rows(whole, parts)
        self.nbytes = _nbytes(w, whole[-1])  # of a row that is not cut
        last = dict(parts).get(len(whole) - 1, ((0, int(whole[-1])),)) or ((0, 0),)
        self._columns = [slice(_nbytes(w, start), _nbytes(w, stop)) for start, stop in last]

    def read(self, first: int, count: int, room: np.ndarray) -> np.ndarray:
        """uint8 [count, bytes], the rows from `first` on, in `room` or in memory of their own.

        Rows may lie apart. Those taken one by one are read with what is between them, up to four
        times as much as they are.
        """
        if self._raw is not None:
            rows = self._raw.reshape(-1, self.nbytes)[first : first + count]
        elif self._places is None:
            rows = self._stretches([first], [count], room)
        else:
            rows = self._chosen(self._places[first : first + count], room)
        if len(self._columns) == 1:
            return rows[:, self._columns[0]]
        return np.concatenate([rows[:, columns] for columns in self._columns], 1)

    def _chosen(self, places: np.ndarray, room: np.ndarray) -> np.ndarray:
        steps = np.diff(places)
        starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        if len(starts) * 8 <= len(places) or np.ptp(places) >= 4 * len(places):
            return self._stretches(places[starts], np.diff(starts, append=len(places)), room)
        low, high = int(places.min()), int(places.max())
        rows = self._stretches([low], [high - low + 1], room)
        even = len(steps) and steps[0] > 0 and (steps == steps[0]).all()
        return rows[:: steps[0]] if even else rows[places - low]

    def _stretches(self, firsts: Any, counts: Any, room: np.ndarray) -> np.ndarray:
        total, at = int(sum(counts)) * self.nbytes, 0
        room = room[:total] if total <= room.nbytes else np.empty(total, np.uint8)
        for first, count in zip(firsts, counts, strict=True):
            nbytes = int(count) * self.nbytes
            self._tensor.read(int(first) * self.nbytes, room[at : at + nbytes])
            at += nbytes
        return room.reshape(-1, self.nbytes)


def _nbytes(w: Tensor, elements: int) -> int:
    return int(elements) // w.dtype.block * w.dtype.nbytes
