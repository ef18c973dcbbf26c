"""The largest magnitude in memory. Parallel over pieces of 16 elements."""

from __future__ import annotations

from . import lanes as l
from . import simd as s
from .rows import helper, share


@helper
def _more(largest, value):
    bits = l.bits_of(value) & s.splat_int(0x7FFFFFFF)
    return s.select_ints(bits > largest, bits, largest)


def build_magnitude():
    """out[thread]: bits of the largest |x| of the thread's float32 of n, as 16 int32, a lane each.

    As integers infinity is more than any number, and NaN is more than infinity.
    """

    def magnitude(x, out, n, thread, n_threads):
        first, last = share(n // 16, thread, n_threads)
        largest = s.splat_int(0)
        for i in range(first, last):
            largest = _more(largest, s.load(x + 64 * i))
        if thread == 0 and n % 16 != 0:
            largest = _more(largest, s.load_part(x + 4 * (n - n % 16), n % 16, s.f32(0)))
        l.store_ints(out + 64 * thread, largest)

    return magnitude
