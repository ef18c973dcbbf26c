"""What the engine asks of a backend: memory for state, and programs made from graphs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from runtime.backends.plan.plan import Plan
from runtime.ops.errors import BackendError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor, stored_name

Progress = Callable[[int, int, str], None]  # done, total, what


def stored_tensor(files: Any, leaf: Tensor) -> Any:
    """The tensor of a file that a weight is, or is cut from.

    files: an open file, or several by name, the model's own under "". BackendError: no such file.
    """
    name = leaf.attrs.get("source", "")
    by_name = files if isinstance(files, Mapping) else {"": files}
    if name not in by_name:
        raise BackendError(
            f"weight {leaf.name!r} is of the file {name!r}, which the device was not given; "
            f"it has {', '.join(map(repr, by_name))}"
        )
    return by_name[name].tensors[stored_name(leaf)]


class Program(Protocol):
    """A graph made ready for one device.

    observable: whether the rows of its plan can be run one by one (`run_each`) and what they leave
    in memory looked at (`contents`), as VALIDATE does; see backends/cpu/run/program.py.
    """

    plan: Plan
    observable: bool

    def run(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> Sequence[np.ndarray]:
        """One step: int32 inputs by name (live part only), live counts; the graph's outputs.

        Results are views of the device's memory, valid until the next run.
        """
        ...

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """As `run`, with the nanoseconds of each row of the plan, int64 [rows]."""
        ...


class Planner(Protocol):
    """What a device would do with a graph, without the device."""

    def plan(self, graph: Graph) -> Plan:
        """The calls of a step and the memory they need; no calls where nodes are run one by one."""
        ...

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or of one slot, of a state leaf on this device."""
        ...

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """Of these numbers of tokens those whose programs use every kernel that any of them uses.

        graph: the model's step of one token.
        """
        ...


class Backend(Planner, Protocol):
    """A device, or a set of devices behaving as one.

    bits: what the numbers that it computes depend on beside graph, weights and code: devices that
    say the same go on from one another's states. "": states of it cannot be handed over exactly.
    """

    name: str
    threads: int
    bits: str

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Copy whole pages, or slots, of each leaf; no target is among the sources.

        State is zero until it is written, is kept from step to step, and takes room when it is
        first used. BackendError: there is none.
        """
        ...

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """Pages or slots in the plain form that all devices share: float32 [rows, ...].

        The last axes are the leaf's own. Of a cache the very numbers that attention reads; of one
        that keeps codes the bits themselves, uint8 [rows, PAGE, heads, bytes of a token], of which
        `KVFormat.plain` makes numbers.
        """
        ...

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """The inverse of `read_state`.

        Caches of all types take float32, and round it, and, where there are `bits`, what
        `KVFormat.to_rows` makes, uint8.
        """
        ...

    def abort(self) -> None:
        """End early the step that is under way in another thread; its results are worth nothing."""
        ...

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels of these graphs have yet to be compiled."""
        ...

    def program(self, graph: Graph) -> Program:
        """The program of a graph; equal graphs give the same program."""
        ...

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Make weights and kernels of these graphs ready, before the first token."""
        ...

    def close(self) -> None:
        """End threads and free memory; further calls are errors."""
        ...


class Joint(Protocol):
    """Devices of one kind that compute the graphs of a step together; their owner closes them."""

    def bind(self, plans: Sequence[Plan]) -> Program:
        """The program of a plan of each device; its `plan` is the first one's."""
        ...

    def missing(self, plans: Sequence[Sequence[Plan]]) -> int:
        """How many kernels of these plans, of each device some, have yet to be compiled."""
        ...

    def load(self, plans: Sequence[Sequence[Plan]], progress: Progress | None = None) -> None:
        """Kernels of these plans, of each device some; then their weights."""
        ...

    def abort(self) -> None:
        """See `Backend.abort`."""
        ...

    def close(self) -> None:
        """Give back what is neither a device's nor a program's."""
        ...


class Joinable(Backend, Protocol):
    """A device of which several can be joined.

    exact: whether they cut no sum unless told to. grain: elements that its kernels take together.
    """

    exact: bool
    grain: int

    @staticmethod
    def joined(devices: Sequence[Any]) -> Joint:
        """Devices of this kind. BackendError: they cannot work together."""
        ...


Step = tuple[Program, Mapping[str, np.ndarray], Mapping[str, int]]  # what a program is run with


@runtime_checkable
class Staged(Protocol):
    """What a backend has beside, whose steps go through `stages` that can each do another one."""

    stages: int

    def stream(self, steps: Iterable[Step]) -> Generator[Sequence[np.ndarray]]:
        """Run steps, of programs of this backend; the outputs of each.

        In order, as if each ended before the next; but steps are asked for some time before, and
        the outputs are the caller's. When it is closed no step is under way any more.
        """
        ...


@runtime_checkable
class Apart(Protocol):
    """What a backend has beside whose memory is not the host's."""

    def memory(self, graph: Graph) -> tuple[int, int]:
        """(free bytes, bytes that the weights of a model and its work take beside its cache).

        graph: of its largest step.
        """
        ...

    def bandwidth(self) -> float | None:
        """Bytes per second that its memory gives, read and written; None where it is not known."""
        ...

    def operations(self) -> float | None:
        """Of int8 products per second, a product and a sum being two; None where not known."""
        ...

    def idle(self) -> AbstractContextManager[list[float]]:
        """Steps to be watched: at the end, the seconds it had nothing to do before each but the
        first, NaN where time is not known."""
        ...


class Room(NamedTuple):
    """Of a memory: free bytes, what weights and work take beside the cache, and a page of that."""

    memory: str
    free: int
    taken: int
    page: int


@runtime_checkable
class Rooms(Protocol):
    """What a backend of several devices has. apart: whether any has a memory of its own."""

    apart: bool

    def rooms(self, graph: Graph, host: int | None) -> list[Room]:
        """What a model takes of each memory; graph: of its largest step, with its state.

        host: bytes that are free in the host's memory, if known.
        """
        ...


MOST_CANDIDATES = 64  # of a choice: top_k at most


class Choice(NamedTuple):
    """How a token is chosen of a row of logits: see runtime/text/sampling.py.

    Of its first `columns`; top_k (1 at least), top_p and min_p come before the temperature, which
    is 0 where the best is taken, the lowest id of equals. chance: from 0 to below 1, where in the
    running sum of the probabilities of those that are left, best first, the token lies.
    """

    columns: int
    temperature: float = 0.0
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    chance: float = 0.0


class Chosen(Protocol):
    """The tokens that a step chooses."""

    @property
    def held(self) -> Any:
        """As a step input; see `Choosing.begin`."""
        ...

    def __call__(self) -> np.ndarray:
        """Waits for the step: int32 [rows], the token of each, -1 where logits are not finite."""
        ...


@runtime_checkable
class Choosing(Protocol):
    """What a backend has beside that chooses tokens: a step need not wait for the host.

    chooses: whether it does. ahead: whether a step can be begun before the one before it has ended.
    """

    chooses: bool
    ahead: bool

    def begin(
        self, program: Program, inputs: Mapping[str, Any], live: Mapping[str, int]
    ) -> Sequence[Any]:
        """Begin a step and leave what it makes on the device; only where it is `ahead`.

        Each of its outputs in a form that another such device takes as a step input, of a step that
        is begun before the next one here.
        """
        ...

    def choose(
        self, program: Program, inputs: Mapping[str, Any], live: Mapping[str, int],
        choices: Sequence[Choice],
    ) -> Chosen:  # fmt: skip
        """Begin a step of as many tokens as rows of logits, in one order, and a choice for each.

        What is returned is to be called before the step after the next is begun. Inputs without
        "tokens", where it is `ahead`: the step evaluates those that the last one of this program
        chose.
        """
        ...
