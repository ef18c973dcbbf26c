"""Words of the executor's control block that are no business of other kernels."""

from __future__ import annotations

from runtime.backends.cpu.abi import CONTROL

# Not 0: what is left of the plan is not wanted, and no kernel of it is begun any more. A word of
# the line that only the leader's side writes, and every thread has read anyhow.
ABORT = CONTROL["stop"] + 1
# Of the block that several teams meet at: how many threads they have together.
MEMBERS = CONTROL["stop"] + 2
# And where devices of other processes take part, the address of a function that the last of these
# threads calls with the number of the meeting, and how many meetings are over.
HOST = CONTROL["stop"] + 3
OVER = CONTROL["sleepers"] + 1
