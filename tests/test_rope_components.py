"""Which position turns which frequency in M-RoPE."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import ops
from runtime.ops.dtypes import F32
from runtime.ops.errors import OpError

SECTIONS = [((11, 11, 10, 0), 32), ((24, 20, 20), 64), ((4, 2, 2, 0), 8), ((11, 11, 10, 0), 8)]


@pytest.mark.parametrize("sections, half", SECTIONS)
def test_interleaved(sections: tuple[int, ...], half: int):
    """Height and width in every third place as long as their sections last, else the time."""
    wanted = np.zeros(half, int)
    wanted[1 : 3 * sections[1] : 3] = 1
    wanted[2 : 3 * sections[2] : 3] = 2
    found = ops.rope_components(sections, half, True)
    assert found.dtype == np.int32 and (found == wanted).all()
    if half == sum(sections):
        assert np.bincount(found).tolist() == list(sections[:3])


def test_in_turn():
    assert ops.rope_components((2, 3, 1, 0), 6, False).tolist() == [0, 0, 1, 1, 1, 2]
    assert ops.rope_components((1, 0, 1, 2), 9, False).tolist() == [0, 2, 3, 3, 0, 2, 3, 3, 0]
    assert ops.rope_components((1 << 40, 1), 3, False).tolist() == [0, 0, 0]


@pytest.mark.parametrize("sections", [(), (0, 0, 0, 0), (3, -1, 2), (1, 1, 1, 1, 1)])
def test_impossible_sections_are_refused(sections: tuple[int, ...]):
    with pytest.raises(OpError, match="sections"):
        ops.rope_components(sections, 8, True)


def test_positions_must_fit_the_components():
    frequencies = ops.constant("inv_freq", np.ones(8, np.float32))
    components = ops.constant("components", ops.rope_components((4, 2, 2), 8, True))
    four = ops.step_input("positions", (5, 4))
    assert ops.rope_angles(four, frequencies, components, magnitude=1.0).shape == (5, 8, 2)
    with pytest.raises(OpError, match="positions"):
        ops.rope_angles(four, frequencies, magnitude=1.0)
    with pytest.raises(OpError, match="positions"):
        ops.rope_angles(ops.step_input("p", (5,)), frequencies, components, magnitude=1.0)
    with pytest.raises(OpError, match="one component per frequency"):
        ops.rope_angles(four, ops.weight("w", (7,), F32), components, magnitude=1.0)
