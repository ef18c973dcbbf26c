"""Products of few tokens with experts whose weights are f16 or bf16: each choice is a column."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    i32,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .halves import HALVES
from .matvec_half import ROWS, THREADS, WARPS, WORDS, column_of, row_of, row_sums


@constants(format=tuple(HALVES))
def build_expert_rows_half(format: str) -> Declared:
    """out[choice] = w x + bias; `units` of 8 values a row and a column, which is f32.

    `rows` rows of each expert, one expert after another; biases alike. `x`: columns, each of
    `every` choices; ids i32 [live], below 0 where an expert is elsewhere: then nothing is written.
    2^`shift` warps share rows. Grid (rows / (16 * 8 / 2^shift), choices).
    """
    sums = row_sums(format, 1)

    @entry(
        "weights:u32* x:f32* ids:i32* bias:f32* out:f32* live:u32* rows:u32 every:u32 "
        "row_pieces:u32 shift:u32 units:u32 has_bias:u32",
        threads=THREADS,
    )
    def expert_rows_half(
        weights, x, ids, bias, out, live, rows, every, row_pieces, shift, units, has_bias
    ):  # fmt: skip
        launch_next()
        choice, here = u32(block_y()), u32(ROWS * u32(u32(WARPS) >> shift))
        start = u32(block_x() * here)
        launch_wait()
        if choice >= load(live, 0):
            return
        expert = i32(load(ids, choice))
        if expert < 0:
            return
        own = u32(u32(expert) * rows)
        row = u32(u32(own + start) + ROWS * u32(u32(thread_x() >> 5) >> shift))
        column = u32(u32(choice // every) * u32(2 * units))
        found = sums(
            weights, weights, row, u32(own + rows), x, column, u32(1), row_pieces, units, shift
        )  # fmt: skip
        job = u32(thread_x())
        while job < 8 * here:
            word = u32(job & (WORDS - 1))
            r = u32(start + ROWS * (job // WORDS) + row_of(word))
            if r < rows and column_of(word) == 0:
                value = found[job]
                if has_bias:
                    value += load(bias, u32(own + r))
                store(out, u32(u32(choice * rows) + r), value)
            job = u32(job + THREADS)

    return expert_rows_half
