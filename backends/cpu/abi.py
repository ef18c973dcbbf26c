"""Numbers that are compiled into kernels and that their callers rely on.

They stand apart, because a change of one of these makes every kernel that imports this file a new
one.
"""

from __future__ import annotations

SHARE_UNIT = 32  # elements: what is divided alike between threads is divided in whole units

MAX_HEAD_DIM = 1024  # of a head that is normed, rotated and stored by one kernel
ATTENTION_ROWS = 8  # query rows of a register block of attention
ATTENTION_TOKENS = 32  # tokens of a tile of attention at most: they share the reading of a page
MAX_TAPS = 64  # of a short convolution
CONV_BLOCK = 128  # channels that a short convolution takes together, where heads do not say
DELTA_COLUMNS = 64  # columns of a recurrent state that a thread takes together at most
DELTA_VECTORS = 384  # bytes of its scratch before the copy of these columns; see kernels/delta.py
ATTENTION_BLOCKS = 4  # register blocks that attention takes through the pages together

# A plan is a table of rows of int64: kernel address, address of its arguments, flags.
PLAN_ROW_WORDS = 3
PLAN_BARRIER = 1  # flag: all threads finish the rows before this one before any starts it

# Words of the executor's control block: what different threads write lies in different lines.
CONTROL = {
    "self": 0,  # its own address: the one argument of `executor`
    **{"generation": 8, "arrivals": 16, "sleepers": 32},
    **{"table": 24, "n_rows": 25, "base": 26, "profile": 27, "stop": 28},
    **{"yield": 40, "lock": 41, "unlock": 42, "wait": 43, "broadcast": 44, "clock": 45},
    **{"clock_id": 48, "clock_high": 49, "clock_low": 50, "spin_ns": 51, "spins": 52},
    **{"sleep": 53, "sleep_for": 54, "seconds": 55, "nanoseconds": 56},
    **{"mutex": 64, "condition": 80, "threads": 96},  # then 8 words for each thread
}
