"""Types for a size or a quality: each tensor's chosen by what its errors do to the predictions.

Three things are measured. On a text: what weights are multiplied with (an importance matrix); and
how far predictions move when a tensor alone, or the same one of some layers, is rounded coarsely.
And of each tensor and type the error of its products. As divergence grows with the squared error,
and that of several tensors adds up, a type costs

    divergence of the coarse type x squared error of the type / squared error of the coarse one

and bytes are spent where each saves most. (Additive: as in HIGGS, Malinovskii et al. 2024.)
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.backends.cpu.quantising import Quantiser, quantisable
from runtime.errors import OptionError
from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.gguf.writer import ALIGNMENT
from runtime.ops.dtypes import DTYPES, F16, DType, nbytes_for
from runtime.ops.errors import shown
from runtime.outputs import ending
from runtime.progress import Progress, reporter
from runtime.quantise import options
from runtime.quantise.choose import NONE, Choice, Wishes, choose
from runtime.quantise.collect import entries_of
from runtime.quantise.errors import errors
from runtime.quantise.job import Job, plan
from runtime.quantise.mixes import MIXES, Facts, layer_of
from runtime.quantise.observe import Observer
from runtime.quantise.options import Chosen, Option
from runtime.quantise.sensitivity import Swapped
from runtime.quantise.write import quantised_nbytes, write_quantised

KINDS = (
    "q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1",
    "q8_0",
)  # fmt: skip
"""Types that are tried by default: those that kernels multiply fast."""
PROBES = 256  # parts of a model that are rounded coarsely, one after the other
_COARSE = 3.0  # bits of a weight in the coarse type, or the next that there is
_CLOSE, _ROUNDS = 0.93, 4  # of a divergence: how near is near enough, and how often it is tried
_AMOUNT = re.compile(r"([\d.e+-]+)\s*(?:([KMGT])(i?)B?|(B)|(bpw))?", re.IGNORECASE)
_MOST_BITS = 32  # of a weight; larger numbers are bytes


@dataclass(frozen=True)
class Target:
    """One of: bytes of the file, bits of a weight on average, mean divergence in nats."""

    nbytes: float | None = None
    bits: float | None = None
    kld: float | None = None

    @staticmethod
    def of(text: str) -> Target:
        """Of "3.2GB", "600000", "4.5", "4.5bpw" or "kld=0.01"; OptionError for none of these."""
        name, _, value = text.strip().rpartition("=")
        found = _AMOUNT.fullmatch(value.strip())
        digits, power, binary, is_bytes, is_bits = found.groups() if found else [""] * 5
        try:
            number = float(digits)
        except ValueError:
            number = 0.0
        unit = power or is_bytes or is_bits
        if not unit and number > _MOST_BITS:
            is_bytes = number.is_integer()
            number *= bool(is_bytes or name)
        if name.lower() not in ("", "kld") or (name and unit) or not 0 < number < np.inf:
            raise OptionError(
                f"target {shown(text)} is none: give bits of a weight (4.5), the size of the file "
                "(3.2GB, or bytes) or a divergence (kld=0.01)"
            )
        if name:
            return Target(kld=number)
        if power or is_bytes:
            steps = " KMGT".index((power or " ").upper())
            return Target(nbytes=number * (1024 if binary else 1000) ** steps)
        return Target(bits=number)


@dataclass(frozen=True)
class Aimed:
    """A file to be written, and why so. chosen: of each tensor that was free its type, bytes and
    cost; options: all that it could have had; predicted: the divergence, as costs add up."""

    job: Job
    chosen: Chosen
    options: Mapping[str, Sequence[Option]]

    @property
    def predicted(self) -> float:
        """Mean divergence in nats."""
        return sum(option.cost for option in self.chosen.values())


def aim(
    src: str | os.PathLike[str], target: Target, windows: Sequence[Sequence[int]],
    wishes: Wishes = NONE, imatrix: str | os.PathLike[str] | None = None,
    allow_requantize: bool = False, kinds: Sequence[str] = (), threads: int | None = None,
    progress: bool | Progress | None = None, folder: str | os.PathLike[str] | None = None,
) -> Aimed:  # fmt: skip
    """Types for the tensors of `src` that `wishes` leave free; nothing is written.

    windows: tokens of one length of a text that the model is measured on. Without an imatrix one
    is collected there. kinds: types to choose from (KINDS). folder: where there is room for a file
    of a coarse type meanwhile. Other arguments as for `plan`.
    OptionError: nothing is small enough, or good enough.
    """
    if wishes.pure:
        raise OptionError("pure has no meaning with a target, which chooses each tensor's type")
    job = plan(src, "Q8_0", wishes, imatrix, allow_requantize)
    free = _free(job, wishes)
    found = _types(kinds)
    with (
        ending(),
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        reporter(progress) as report,
        Swapped(job.file, windows, threads, report) as model,
    ):
        if imatrix is None:
            job = replace(job, importance=_collected(model, windows, job.file))
        measured = _Measured(job, model, found, Path(scratch), report, threads)
        if target.kld is None:  # what is too small is said before the long wait
            measured.chosen(measured.untried(free), target)
        possible = measured.options(free)
        chosen = measured.chosen(possible, target)
    return Aimed(measured.job(chosen), chosen, possible)


def _free(job: Job, wishes: Wishes) -> list[Choice]:
    """Tensors whose types mixes decide: those that get different ones in different mixes."""
    tensors, facts = job.file.tensors, Facts.of(job.file.metadata)
    plain = choose(tensors, "F32", facts, wishes)
    return [a for a, b in zip(job.choices, plain, strict=True) if a.dtype is not b.dtype]


def _types(names: Sequence[str]) -> list[DType]:
    """Those of these names, or those that are tried by default."""
    known = quantisable()
    unknown = next((name for name in names if name.lower() not in known), None)
    if unknown is not None:
        there = ", ".join(sorted(map(str.upper, known)))
        raise OptionError(f"no rows can be quantised to {shown(unknown)}; the types are {there}")
    return [DTYPES[name.lower()] for name in names or KINDS if name.lower() in known]


def _collected(
    model: Swapped, windows: Sequence[Sequence[int]], file: GGUFFile
) -> dict[str, np.ndarray]:
    """Importance of columns, float32 [matrices, columns] by tensor."""
    with Observer(model.engine, output="output.weight" in file.tensors) as observer:
        for window in windows:
            observer.add([window])
        return {name: entry.mean_squares for name, entry in entries_of(observer).items()}


class _Measured:
    def __init__(
        self, job: Job, model: Swapped, kinds: Sequence[DType], folder: Path,
        report: Progress | None, threads: int | None,
    ) -> None:  # fmt: skip
        self._job, self._model, self._kinds, self._folder = job, model, kinds, folder
        self._report, self._threads, self._files = report, threads, 0

    def untried(self, free: Sequence[Choice]) -> dict[str, list[Option]]:
        """Types and bytes of each tensor."""
        return {
            c.name: [Option(kind, nbytes_for(kind, c.shape), 0.0) for kind in self._fitting(c)]
            for c in free
        }

    def options(self, free: Sequence[Choice]) -> dict[str, list[Option]]:
        """Types, bytes and cost of each tensor."""
        kinds = {c.name: self._fitting(c) for c in free}
        squares = self._errors(kinds)
        coarse = {name: _coarse(each) for name, each in kinds.items()}
        other = self._written([c._replace(dtype=coarse[c.name]) for c in free])
        parts, found = _parts([*kinds], PROBES), dict[str, list[Option]]()
        for n, names in enumerate(parts):
            error = sum(squares[name][coarse[name]] for name in names)
            divergence = max(0.0, self._model.divergence(other, names))
            self._say(n + 1, len(parts), "trying tensors")
            for name in names:
                shape = self._job.file.tensors[name].shape
                found[name] = [
                    Option(kind, nbytes_for(kind, shape), divergence * e / error if error else 0.0)
                    for kind, e in squares[name].items()
                ]
        return found

    def chosen(self, possible: Mapping[str, Sequence[Option]], target: Target) -> Chosen:
        """The best for a target; of a divergence, by one that is measured."""
        if target.kld is None:
            weights = self._job.weights
            fixed = sum(c.nbytes for c in self._job.choices if c.name not in possible)
            rest = fixed if target.nbytes is None else self._others(possible)
            most = target.nbytes or (target.bits or 0) * weights / 8
            found = options.choose(possible, most - rest)
            least = sum(o.nbytes for o in found.values())
            if rest + least > most:
                raise OptionError(
                    f"{self._job.file.path}: {most:,.0f} bytes are too few: {rest + least:,} "
                    f"({8 * (fixed + least) / weights:.2f} bits per weight) are the least with "
                    "these types"
                )
            return found
        aimed = target.kld
        best = None
        for _ in range(_ROUNDS):
            found = options.choose(possible, cost=aimed)
            other = self._written(self.job(found).choices)
            got = self._model.divergence(other, possible)
            if got <= target.kld and (best is None or _nbytes(found) < _nbytes(best)):
                best = found
            if _CLOSE * target.kld <= got <= target.kld:
                break
            aimed *= target.kld / max(got, 1e-3 * target.kld) * (1 + _CLOSE) / 2
        if best is None:
            raise OptionError(
                f"{self._job.file.path}: a divergence of {target.kld:g} is out of reach with these "
                f"types: the best has {got:.2g}"
            )
        return best

    def _others(self, possible: Mapping[str, Sequence[Option]]) -> int:
        """Bytes of a file that are not those of these tensors: of others, of the header, and at
        most of what fills up."""
        job = self._job
        total = quantised_nbytes(job.file, job.choices, job.metadata)
        free = [c for c in job.choices if c.name in possible]
        return (
            total
            - sum(c.nbytes + -c.nbytes % ALIGNMENT for c in free)
            + sum(max(-o.nbytes % ALIGNMENT for o in found) for found in possible.values())
        )

    def job(self, chosen: Chosen) -> Job:
        """The file with these types."""
        choices = [
            c._replace(dtype=chosen[c.name].dtype, wanted=None) if c.name in chosen else c
            for c in self._job.choices
        ]
        nbytes = Counter[str]()
        for option in chosen.values():
            nbytes[option.dtype.name] += option.nbytes
        most = nbytes.most_common(1)[0][0] if nbytes else ""
        number = next((m.file_type for m in MIXES.values() if m.base == most), None)
        metadata = {k: v for k, v in self._job.metadata.items() if k != "general.file_type"}
        metadata |= {} if number is None else {"general.file_type": number}
        return replace(self._job, choices=choices, metadata=metadata)

    def _fitting(self, choice: Choice) -> list[DType]:
        """Types whose blocks fit into its rows."""
        return [kind for kind in self._kinds if choice.shape[-1] % kind.block == 0] or [F16]

    def _errors(self, kinds: Mapping[str, list[DType]]) -> dict[str, dict[DType, float]]:
        file, importance, found = self._job.file, self._job.importance, {}
        with Quantiser(self._threads) as quantiser:
            quantiser.prepare([*self._kinds], self._report)
            for n, (name, each) in enumerate(kinds.items()):
                weights = importance.get(name)
                squares = errors(file.tensors[name], each, weights, quantiser)
                found[name] = dict(zip(each, squares, strict=True))
                self._say(n + 1, len(kinds), "trying types")
        return found

    def _written(self, choices: Sequence[Choice]) -> GGUFFile:
        """A file of these tensors, to try."""
        self._files += 1
        path = self._folder / f"{self._files}.gguf"
        write_quantised(self._job.file, path, choices, {}, self._job.importance, self._threads,
                        self._report)  # fmt: skip
        return open_gguf(path)

    def _say(self, done: int, total: int, what: str) -> None:
        if self._report is not None:
            self._report(done, total, what)


def _nbytes(chosen: Chosen) -> int:
    return sum(option.nbytes for option in chosen.values())


def bits(kind: DType) -> float:
    """Of a weight."""
    return 8 * kind.nbytes / kind.block


def _coarse(kinds: Sequence[DType]) -> DType:
    """One whose errors can be seen and are not all that is seen."""
    enough = [kind for kind in kinds if bits(kind) >= _COARSE]
    return min(enough, key=bits) if enough else max(kinds, key=bits)


def _parts(names: Sequence[str], most: int) -> list[list[str]]:
    """Tensors to try together: alone, or where there are many the same of neighbouring layers."""
    by_role = defaultdict[str, list[str]](list)
    for name in sorted(names, key=lambda name: (layer_of(name), name)):
        by_role[re.sub(r"^blk\.\d+\.", "", name)].append(name)
    longest = max(map(len, by_role.values()), default=1)
    together = next(
        (n for n in range(1, longest) if sum(-(-len(f) // n) for f in by_role.values()) <= most),
        longest,
    )
    return [
        found[at : at + together]
        for found in by_role.values()
        for at in range(0, len(found), together)
    ]
