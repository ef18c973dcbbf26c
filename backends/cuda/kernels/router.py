"""The router: logits of the experts to the chosen ones and their weights; a warp a token.

The warp holds the keys of all logits in registers and finds rank after rank; the lane of that
number keeps the rank, and all weights are computed at once. Choice by logit, as on the CPU:
different logits can have equal scores in float32.

`router_linear` has the product in front: four warps a row of the weights, which they send for
before the launch in front has ended. The last block of a token that is done chooses for it.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    ahead,
    block_x,
    block_y,
    constant4,
    divide,
    entry,
    f32,
    fma,
    grid_x,
    i32,
    launch_next,
    launch_wait,
    load,
    load4,
    registers,
    shared,
    shuffle_index,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .elementwise import exp, sigmoid
from .softmax import exp_sum
from .sums import last_block, warp_sum
from .topk import NOTHING, NOWHERE, best_of_warp, key_of

SCORINGS = ("softmax", "sigmoid", "softmax_topk")
PER_LANE = (4, 16, 32)  # logits that a lane can hold
MOST_RANKS = 32
ROWS = 2  # experts of a block of `router_linear`
_WARPS_OF_ROW = 4
_THREADS_OF_ROW = 32 * _WARPS_OF_ROW
_WARPS = ROWS * _WARPS_OF_ROW
_DEPTH = 4  # pieces of 16 bytes that a thread has on their way
_LOWEST = f32(-float("inf"))


def _ranks(per: int) -> Callable:
    """(logits, base, n, k, lane) -> the index of rank `lane` among n logits, of lanes below k."""
    mine = registers("i32", per)

    def ranks(logits, base, n, k, lane):
        keys, chosen, rank = mine(), u32(0), u32(0)
        for j in range(per):
            i = u32(32 * j + lane)
            keys[j] = i32(NOTHING)
            if i < n:
                keys[j] = key_of(load(logits, u32(base + i)))
        while rank < k:
            best, at = i32(NOTHING), u32(NOWHERE)
            for j in range(per):
                if keys[j] > best:
                    best, at = keys[j], u32(32 * j + lane)
            best, at = best_of_warp(best, at)
            for j in range(per):
                if at == u32(32 * j + lane):
                    keys[j] = i32(NOTHING)
            if lane == rank:
                chosen = at
            rank = u32(rank + 1)
        return chosen

    return ranks


def _share(logits, base, n, k, x, lane, scoring):
    """The score of a rank from its logit x: softmax of all, sigmoid, or softmax of the chosen."""
    peak = shuffle_index(x, u32(0))
    value = f32(0)
    if scoring == 1:
        value = sigmoid(x)
    else:
        if lane < k:
            value = exp(x - peak)
        whole = warp_sum(value)
        if scoring == 0:
            whole = exp_sum(logits, base, n, peak, lane)
        value = divide(value, whole)
    if lane >= k:
        value = f32(0)
    return value


def _choice(per: int) -> Callable:
    """The choice for one row by one warp; all lanes must come."""
    ranks = _ranks(per)

    def choose(
        logits, base, ids, weights, numbers, own, row, n, k, scoring, normalize, scale, renumbers
    ):
        lane = u32(thread_x() & 31)
        index = ranks(logits, base, n, k, lane)
        x = _LOWEST
        if lane < k:
            x = load(logits, u32(base + index))
        value = _share(logits, base, n, k, x, lane, scoring)
        whole = warp_sum(value)
        if normalize:
            value = divide(value, whole)
        if lane < k:
            at = u32(row * k + lane)
            store(ids, at, i32(index))
            store(weights, at, value * scale)
            if renumbers:
                store(own, at, load(numbers, index))

    return choose


_CHOICE = (
    "ids:i32* weights:f32* numbers:i32* own:i32* n:u32 k:u32 scoring:u32 normalize:u32 scale:f32 "
    "renumbers:u32"
)


@constants(per=PER_LANE)
def build_router(per: int) -> Declared:
    """ids i32 and weights f32 [rows, k] of the best of n <= 32 `per` logits, best first.

    Grid = rows. scoring: its place in SCORINGS. normalize: whether weights are made to sum to 1.
    Then they are times `scale`. renumbers: own[row, j] = numbers[ids[row, j]]. k <= 32, k <= n.
    """
    choose = _choice(per)

    @entry("logits:f32* logits_stride:u32 " + _CHOICE, threads=32)
    def router(
        logits, logits_stride, ids, weights, numbers, own, n, k, scoring, normalize, scale,
        renumbers,
    ):  # fmt: skip
        launch_next()
        row = block_x()
        launch_wait()
        choose(
            logits, u32(row * logits_stride), ids, weights, numbers, own, row, n, k, scoring,
            normalize, scale, renumbers,
        )  # fmt: skip

    return router


def _fetch(w, held, at, i, pieces):
    """A thread's next pieces of a row of weights that begins at piece `at`."""
    for d in range(_DEPTH):
        piece = u32(min(u32(i + d * _THREADS_OF_ROW), u32(pieces - 1)))
        v = constant4(w, u32(at + piece))
        held[4 * d], held[4 * d + 1], held[4 * d + 2], held[4 * d + 3] = v[0], v[1], v[2], v[3]


def _product(columns: int) -> Callable:
    """A row of the weights, of which `held` has the first pieces, times `columns` tokens."""
    acc = registers("f32", columns)

    def product(w, x, held, at, first, rows, pieces):
        sums = acc()
        for c in range(columns):
            sums[c] = f32(0)
        i = u32(thread_x() & (_THREADS_OF_ROW - 1))
        while i < pieces:
            for d in range(_DEPTH):
                piece = u32(i + d * _THREADS_OF_ROW)
                if piece < pieces:
                    for c in range(columns):
                        token = u32(min(u32(first + c), u32(rows - 1)))
                        y = load4(x, u32(token * pieces + piece))
                        low = fma(held[4 * d + 1], y[1], fma(held[4 * d], y[0], sums[c]))
                        sums[c] = fma(held[4 * d + 3], y[3], fma(held[4 * d + 2], y[2], low))
            i = u32(i + _DEPTH * _THREADS_OF_ROW)
            if i < pieces:
                _fetch(w, held, at, i, pieces)
        return sums

    return product


def _total(columns: int) -> Callable:
    """Sums over the threads of a row, in order of the warps: from the bias on, to the logits."""
    partial = shared("f32", _WARPS * columns)

    def total(sums, bias, logits, row, n, first, rows, has_bias):
        parts = partial()
        for c in range(columns):
            value = warp_sum(sums[c])
            if thread_x() & 31 == 0:
                parts[u32((thread_x() >> 5) * columns + c)] = value
        syncthreads()
        c = u32(thread_x() & (_THREADS_OF_ROW - 1))
        if c < columns and u32(first + c) < rows and row < n:
            warp = u32(u32(thread_x() >> 7) * _WARPS_OF_ROW)
            value = f32(0)
            if has_bias:
                value = load(bias, row)
            for each in range(_WARPS_OF_ROW):
                value += parts[u32(u32(warp + each) * columns + c)]
            store(logits, u32(u32(first + c) * n + row), value)

    return total


@constants(per=PER_LANE, columns=(1, 8))
def build_router_linear(per: int, columns: int) -> Declared:
    """logits f32 [rows, n] = x f32 [rows, 4 pieces] times w f32 [n, 4 pieces], plus bias; then as
    `router`.

    tickets: one for each `columns` rows. Grid (n / 2, rows / columns), both rounded up.
    """
    product, total, choose = _product(columns), _total(columns), _choice(per)
    last, room = last_block(), registers("f32", 4 * _DEPTH)

    @entry(
        "w:f32* x:f32* bias:f32* logits:f32* tickets:u32* rows:u32 pieces:u32 has_bias:u32 "
        + _CHOICE,
        threads=32 * _WARPS,
    )
    def router_linear(
        w, x, bias, logits, tickets, rows, pieces, has_bias, ids, weights, numbers, own, n, k,
        scoring, normalize, scale, renumbers,
    ):  # fmt: skip
        launch_next()
        row, first = u32(block_x() * ROWS + (thread_x() >> 7)), u32(block_y() * columns)
        at, held = u32(min(row, u32(n - 1)) * pieces), room()
        piece = u32(thread_x() & (_THREADS_OF_ROW - 1))
        while piece < pieces:
            ahead(w, u32(4 * u32(at + piece)))
            piece = u32(piece + _THREADS_OF_ROW)
        launch_wait()
        _fetch(w, held, at, u32(thread_x() & (_THREADS_OF_ROW - 1)), pieces)
        sums = product(w, x, held, at, first, rows, pieces)
        total(sums, bias, logits, row, n, first, rows, has_bias)
        if last(tickets, block_y(), grid_x()):
            token = u32(first + (thread_x() >> 5))
            if u32(thread_x() >> 5) < columns and token < rows:
                choose(
                    logits, u32(token * n), ids, weights, numbers, own, token, n, k, scoring,
                    normalize, scale, renumbers,
                )  # fmt: skip

    return router_linear
