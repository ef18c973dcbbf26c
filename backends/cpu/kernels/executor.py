"""The plan runner: every thread walks one table of kernels and meets the others at a barrier.

One entry serves all threads of a team: thread 0 publishes a plan, runs its part and returns when
all have finished; the others wait for plans until they are told to stop. A waiting thread spins
for a bounded time, then parks on a condition variable whose functions are called by address, so
no Python and no allocation lies between two plans. The barrier counts arrivals and never resets:
the goal of a barrier is where the count stood when the plan began, plus n_threads per barrier.
A plan that is aborted is walked to its end all the same, so that all threads meet at every
barrier, but no kernel is called any more.

Several teams are led as one: threads 0 are a team too, whose only kernel is `lead_teams`, by which
each runs the plan of its own team. In these plans `meet` is the barrier of all threads of all
teams. It counts in a block of its own, and lets everybody pass once the plans are aborted, for of
an aborted plan nobody else may come. Who arrives as number t is there for meeting t // members.
"""

from __future__ import annotations

from llvmlite import ir

from runtime.backends.cpu.abi import CONTROL as _WORDS
from runtime.backends.cpu.abi import PLAN_BARRIER, PLAN_ROW_WORDS
from runtime.backends.cpu.compile.isa import host_arch
from runtime.backends.cpu.run.control import ABORT, HOST, MEMBERS, OVER

from . import emit as e
from . import simd as s
from .rows import helper
from .target import chosen

_ARCH = chosen().arch or host_arch()
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}
_ROW_BYTES = 8 * PLAN_ROW_WORDS

_GENERATION, _ARRIVALS, _SLEEPERS = (8 * _WORDS[k] for k in ("generation", "arrivals", "sleepers"))
_TABLE, _N_ROWS, _BASE = (8 * _WORDS[k] for k in ("table", "n_rows", "base"))
_PROFILE, _STOP = (8 * _WORDS[k] for k in ("profile", "stop"))
_ABORT, _MEMBERS, _HOST, _OVER = 8 * ABORT, 8 * MEMBERS, 8 * HOST, 8 * OVER
_YIELD, _LOCK, _UNLOCK = (8 * _WORDS[k] for k in ("yield", "lock", "unlock"))
_WAIT, _BROADCAST, _CLOCK = (8 * _WORDS[k] for k in ("wait", "broadcast", "clock"))
_CLOCK_ID, _CLOCK_HIGH, _CLOCK_LOW = (
    8 * _WORDS[k] for k in ("clock_id", "clock_high", "clock_low")
)
_SPIN_NS, _SPINS = (8 * _WORDS[k] for k in ("spin_ns", "spins"))
_SLEEP, _SLEEP_FOR = (8 * _WORDS[k] for k in ("sleep", "sleep_for"))
_YIELDS = 256  # turns of a waiting thread between two naps
_MUTEX, _CONDITION, _THREADS = (8 * _WORDS[k] for k in ("mutex", "condition", "threads"))


@s.operation(s.void, s.i64, s.i64, s.i64, s.i64)
def call_kernel(b, address, arguments, thread, n_threads):
    """Call the kernel at an address: (its arguments' address, thread, threads)."""
    ty = ir.FunctionType(ir.VoidType(), [e.i64] * 3)
    b.call(e.pointer(b, address, ty), [arguments, thread, n_threads])


@s.operation(s.i64, s.i64, s.i64, s.i64, s.i64, s.i64)
def call(b, address, first, second, third, fourth):
    """A function of the operating system; C calling conventions ignore arguments in excess."""
    ty = ir.FunctionType(e.i64, [e.i64] * 4)
    return b.call(e.pointer(b, address, ty), [first, second, third, fourth])


@s.operation(s.i64, s.i64, s.i64)
def fetch_add(b, address, value):
    """Add to an int64 for all threads to see; its value before."""
    return b.atomic_rmw("add", e.pointer(b, address, e.i64), value, "seq_cst")


@s.operation(s.i64, s.i64)
def observe(b, address):
    """An int64 as other threads last wrote it; none of what follows is done before."""
    return b.load_atomic(e.pointer(b, address, e.i64), "seq_cst", 8)


@s.operation(s.void)
def pause(b):
    """Tell the processor that this is a spin loop."""
    if _ARCH in _PAUSE:
        name, values = _PAUSE[_ARCH]
        e.intrinsic_call(b, name, ir.VoidType(), [ir.Constant(e.i32, v) for v in values])


@helper
def clock(control, thread):
    """Nanoseconds of a clock that never goes back."""
    reading, kind = control + _THREADS + thread * 64, s.load_i64(control + _CLOCK_ID)
    if kind >= 0:
        call(s.load_i64(control + _CLOCK), kind, reading, 0, 0)
    else:
        call(s.load_i64(control + _CLOCK), reading, 0, 0, 0)
    high = s.load_i64(reading) * s.load_i64(control + _CLOCK_HIGH)
    return high + s.load_i64(reading + 8) * s.load_i64(control + _CLOCK_LOW)


@helper
def turn(control, left):
    """One turn of waiting, of which `left` may go by before the processor is given away.

    Yielded first for many turns: a nap is longer than most waits.
    """
    pause()
    left -= 1
    if left < 0:
        call(s.load_i64(control + _YIELD), 0, 0, 0, 0)
        if left % _YIELDS == 0:
            call(s.load_i64(control + _SLEEP), s.load_i64(control + _SLEEP_FOR), 0, 0, 0)
    return left


@helper
def await_arrivals(control, goal):
    """Spin until `goal` arrivals were counted; give the processor away when that takes long.

    Two threads that share a processor by yielding to each other can stay so for long, with
    another one idle: systems leave a busy thread where it is. One that wakes up from a nap is put
    on an idle processor.
    """
    left = s.load_i64(control + _SPINS)
    while observe(control + _ARRIVALS) < goal:
        left = turn(control, left)


@helper
def run_plan(control, thread, n_threads):
    """Walk the table that the leader published; thread 0 returns when all have."""
    table, n = s.load_i64(control + _TABLE), s.load_i64(control + _N_ROWS)
    goal, profile = s.load_i64(control + _BASE), s.load_i64(control + _PROFILE)
    for i in range(n):
        row = table + i * _ROW_BYTES
        if n_threads > 1 and i > 0 and s.load_i64(row + 16) & PLAN_BARRIER != 0:
            goal += n_threads
            fetch_add(control + _ARRIVALS, 1)
            await_arrivals(control, goal)
        if profile != 0 and thread == 0:
            s.store_i64(profile + i * 8, clock(control, thread))
        if observe(control + _ABORT) == 0:
            call_kernel(s.load_i64(row), s.load_i64(row + 8), thread, n_threads)
    fetch_add(control + _ARRIVALS, 1)
    if thread == 0:
        await_arrivals(control, goal + n_threads)
        if profile != 0:
            s.store_i64(profile + n * 8, clock(control, thread))


@helper
def park(control, seen):
    """Sleep until the generation is another; counted, so that the leader knows whom to wake."""
    mutex = control + _MUTEX
    call(s.load_i64(control + _LOCK), mutex, 0, 0, 0)
    fetch_add(control + _SLEEPERS, 1)
    while observe(control + _GENERATION) == seen:
        call(s.load_i64(control + _WAIT), control + _CONDITION, mutex, -1, 0)
    fetch_add(control + _SLEEPERS, -1)
    call(s.load_i64(control + _UNLOCK), mutex, 0, 0, 0)


@helper
def await_plan(control, thread, seen):
    """The generation after `seen`."""
    deadline = clock(control, thread) + s.load_i64(control + _SPIN_NS)
    spins = 0
    while observe(control + _GENERATION) == seen:
        pause()
        spins += 1
        if spins & 63 == 0 and clock(control, thread) > deadline:
            park(control, seen)
    return observe(control + _GENERATION)


@helper
def lead(control):
    """Publish a plan: the barrier counts from here, and who waits is woken."""
    s.store_i64(control + _BASE, observe(control + _ARRIVALS))
    s.store_i64(control + _ABORT, 0)
    fetch_add(control + _GENERATION, 1)
    if observe(control + _SLEEPERS) > 0:
        call(s.load_i64(control + _LOCK), control + _MUTEX, 0, 0, 0)
        call(s.load_i64(control + _BROADCAST), control + _CONDITION, 0, 0, 0)
        call(s.load_i64(control + _UNLOCK), control + _MUTEX, 0, 0, 0)


@helper
def follow(control, thread, n_threads):
    """Run every plan that is published, until told to stop."""
    seen = 0
    while True:
        seen = await_plan(control, thread, seen)
        if s.load_i64(control + _STOP) != 0:
            break
        run_plan(control, thread, n_threads)


def build_executor():
    """What every thread of a team calls: the leader for each plan, the others once."""

    def executor(control, thread, n_threads):
        if thread == 0:
            lead(control)
            if s.load_i64(control + _STOP) == 0:
                run_plan(control, thread, n_threads)
        else:
            follow(control, thread, n_threads)

    return executor


def build_lead_teams():
    """Thread i leads team i through the plan of its job."""

    def lead_teams(jobs, thread, n_threads):
        """jobs: of each team control block, table, rows, threads, times of rows."""
        job = jobs + thread * 40
        control = s.load_i64(job)
        s.store_i64(control + _TABLE, s.load_i64(job + 8))
        s.store_i64(control + _N_ROWS, s.load_i64(job + 16))
        s.store_i64(control + _PROFILE, s.load_i64(job + 32))
        lead(control)
        run_plan(control, 0, s.load_i64(job + 24))

    return lead_teams


@helper
def meet_all(meeting):
    """Wait for all threads of all teams, and for other processes where there are any."""
    members, host = s.load_i64(meeting + _MEMBERS), s.load_i64(meeting + _HOST)
    before = fetch_add(meeting + _ARRIVALS, 1)
    number = before // members + 1
    counter, goal = meeting + _ARRIVALS, number * members
    if host != 0:
        if before + 1 == goal and observe(meeting + _ABORT) == 0:
            call(host, number, 0, 0, 0)
            fetch_add(meeting + _OVER, 1)
        counter, goal = meeting + _OVER, number
    left = s.load_i64(meeting + _SPINS)
    while observe(counter) < goal and observe(meeting + _ABORT) == 0:
        left = turn(meeting, left)


def build_meet():
    """The barrier of all threads of all teams."""

    def meet(x, meeting, thread, n_threads):
        """x: what was written before, for others to read."""
        meet_all(meeting)

    return meet
