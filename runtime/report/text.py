"""A placement as text: the answer first, then devices, then layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from runtime.backends.meta.expression import Device
from runtime.backends.meta.idle import idle
from runtime.backends.meta.planner import ON_CPU
from runtime.backends.meta.stages import Stage, text
from runtime.cli.facts import model_name, type_name
from runtime.cli.output import bar, table
from runtime.planning import CHECKS, Placement, Speed
from runtime.report.layers import Layers, Part, Row, layers_of
from runtime.units import in_units

_BAR = 16  # characters
_SHOWN = 3  # ways in which layers alike are split
_SHARED, _MIRRORED = " (some on several)", "mirrored"
_NOTES = {
    _SHARED: "some on several: what parts on several devices need, such as a K head of many Q "
    "heads, is on each of them",
    _MIRRORED: "mirrored: embeddings lie once in memory for all CPU devices, and are counted with "
    "the first of them",
}
_MOST_NUMBER = 8  # from here on a device's number was meant as its memory


def amount(nbytes: float) -> str:
    """Bytes in powers of 1000, as memory of devices is sold: "16.53 GB"."""
    return in_units(nbytes, 1000, ("B", "KB", "MB", "GB"), (0, 1, 1, 2))


def answer(placement: Placement, speed: Speed | None, options: Sequence[str]) -> str:
    """One line: whether it fits, with what; or what would. options: see `would_fit`."""
    kinds = "/".join(dict.fromkeys(placement.kv_types))
    if placement.unknown and placement.fits:
        first = placement.unknown[0]
        return (
            f"not known, as the memory of {first} is not: write {_with_memory(first)}; "
            f"{placement.context:,} tokens of context, KV cache in {kinds}, take "
            f"{amount(placement.usage(first).nbytes)} of it"
        )
    if placement.fits:
        fast = f", {_about(placement, speed)} tokens/s" if speed else ""
        return f"yes: {placement.context:,} tokens of context fit, KV cache in {kinds}{fast}"
    what = f"{placement.asked:,} tokens of context do" if placement.asked else "the model does"
    would = f"there is room for {', or '.join(options)}" if options else "no type is small enough"
    return f"no: {what} not fit, KV cache in {kinds} ({_short_of(placement)}); {would}"


def without_part(placement: Placement) -> list[str]:
    """A line for each stage of which some devices have no part, and why."""
    name = str(placement.model.file.get("general.architecture"))
    return [text for plan in placement.plans if plan.layout and (text := idle(plan.layout, name))]


def _with_memory(device: Device) -> str:
    """How its memory may have been meant: nobody has a device of number 24."""
    meant = device.number is not None and device.number >= _MOST_NUMBER
    return f"{device.kind}:{device.number}GB" if meant else f"{device}:24GB"


def expression(stages: Sequence[Stage]) -> str:
    """Stages as an expression, with shares in thousandths at most."""
    return text(
        [
            replace(stage, share=_rounded(stage.share), shares=tuple(map(_rounded, stage.shares)))
            for stage in stages
        ]
    )


def _rounded(share: Fraction) -> Fraction:
    return share if share.denominator < 1000 else Fraction(max(1, round(1000 * share)), 1000)


def heading(placement: Placement) -> str:
    """The model and its devices."""
    file = placement.model.file
    kind, nbytes = file.get("weights") or type_name(file), amount(file.tensors_nbytes)
    return f"{model_name(file)}, {kind}, {nbytes} of weights, on {expression(placement.stages)}"


def changes(given: Placement, chosen: Placement) -> str:
    """What `--fit` chose, as options."""
    found = [f"-c {chosen.context}"] if given.asked is None and chosen.fits else []
    if chosen.kv_types != given.kv_types:
        k, v = chosen.kv_types
        found.append(f"-ctk {k} -ctv {v}")
    if not chosen.fits:
        return "options: none that were left free make it fit"
    if len(given.needs) > 1:
        found.append(f'--devices "{expression(chosen.stages)}"')
    return f"options: {' '.join(found) or 'as given'}"


def speed_line(placement: Placement, speed: Speed | None, prompt: float | None) -> str:
    """What the speed is made of, or why it is not known; and of a prompt, where it is."""
    if not placement.context:
        return "speed: not known without a context"
    more = f"; prompts up to {rate(prompt)} tokens/s" if prompt else ""
    for device in placement.needs:
        if device.kind in CHECKS:
            return f"speed: not predicted: {device} {CHECKS[device.kind]}"
    if speed is None:
        unknown = next(str(d) for d in placement.needs if d.kind not in ON_CPU)
        return f"speed: not known; --bandwidth says how many GB/s {unknown} reads{more}"
    reading, exchanging = sum(speed.reading), sum(speed.exchanging)
    count = sum(len(plan.exchanges) for plan in placement.plans) + len(placement.hand_overs)
    exchanged = f", {1e3 * exchanging:.3g} ms for {count} exchanges" if count else ""
    return (
        f"speed: {_about(placement, speed)} tokens/s after {speed.context:,} tokens, each "
        f"{1e3 * reading:.3g} ms of reading{exchanged}{more}"
    )


def _about(placement: Placement, speed: Speed) -> str:
    here = all(device.kind in ON_CPU for device in placement.needs)
    return f"{'about' if here else 'up to'} {rate(speed.tokens_per_s)}"


def rate(tokens_per_s: float) -> str:
    """Tokens per second in as many digits as mean something."""
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"


def _short_of(placement: Placement) -> str:
    """Where room is missing most."""
    missing = []
    for devices, room in placement.rooms():
        nbytes = sum(placement.usage(device).nbytes for device in devices)
        missing.append((nbytes - room, f"{amount(nbytes)} of {amount(room)} on {devices[0]}"))
    return max(missing)[1] if missing else "memory is not known"


def devices_table(placement: Placement) -> str:
    """Bytes on each device, and the memory that it has or shares."""
    rooms = {device: (ds, room) for ds, room in placement.rooms() for device in ds}
    rows = [
        _device_row(placement, device, *rooms.get(device, ((), None))) for device in placement.needs
    ]
    header = ("device", "weights", "KV cache", "state", "activations", "other", "total", "of", "")
    return table(rows, header, right="weights,KV cache,state,activations,other,total,of")


def _device_row(
    placement: Placement, device: Device, sharing: Sequence[Device], room: float | None
) -> tuple[str, ...]:
    usage = placement.usage(device)
    shown = [amount(n) if n else "-" for n in usage.parts]
    drawn = bar(usage.nbytes / room, _BAR) if room else ""
    if room and (over := sum(placement.usage(d).nbytes for d in sharing) - room) > 0:
        drawn += f" {amount(over)} too much"
    of = amount(room) + " shared" * (len(sharing) > 1) if room else "?"
    return str(usage.device), *shown, amount(usage.nbytes), of, drawn


def layers_text(placement: Placement, every_op: bool = False) -> str:
    """A table for all layers that are alike."""
    found = [g for g in layers_of(placement) if every_op or any(r.reads for r in g.rows)]
    split = any(plan.layout for plan in placement.plans)
    columns = (0, 1, 2, 3, 4) if split else (0, 1, 2, 4)
    tables = [f"{_title(placement, group)}\n{_ops(group, every_op, columns)}" for group in found]
    here = any(p.layout and sum(d.kind in ON_CPU for d in p.devices) > 1 for p in placement.plans)
    noted = [
        text
        for what, text in _NOTES.items()
        if (what == _SHARED or here) and any(what in table for table in tables)
    ]
    return "\n\n".join([*tables, *noted])


def _title(placement: Placement, group: Layers) -> str:
    stage = placement.plans[group.stage]
    where = f" on {stage.stage}" if len(placement.plans) > 1 else ""
    kinds = Counter((row.exchange, row.nbytes) for row in group.rows if row.exchange)
    exchanged = [
        f"{count} {kind}{'s' * (count > 1)} of {amount(nbytes)}"
        for (kind, nbytes), count in kinds.items()
    ]
    each = f"; {', '.join(exchanged)} a token" if exchanged else ""
    return f"{group.title}{where}: {amount(group.weights)} of weights{each}"


def _ops(group: Layers, every_op: bool, columns: Sequence[int]) -> str:
    rows = [line for row in group.rows for line in _lines(row, every_op)]
    shown = [[line[n] for n in columns] for line in rows]
    header = ("op", "result", "reads", "split", "bytes")
    return table(shown, [header[n] for n in columns], right="bytes")


def _lines(row: Row, every_op: bool) -> Iterator[tuple[str, ...]]:
    if not (row.reads or row.exchange or every_op):
        return
    name = row.name or row.op
    split = _split(row.result) if row.result.axis else ""
    if not row.reads:
        yield row.op, name, "", split or "mirrored", ""
    for n, part in enumerate(row.reads):
        unit = "" if part.what == "weight" else f" a {part.what}"
        first = (row.op, name) if n == 0 else ("", "")
        why = f" ({part.why})" if part.why and every_op else ""
        yield *first, f"{part.name} {part.dtype}", _split(part) + why, _amounts(part) + unit
    if row.exchange:
        yield "", f"= {row.exchange}", "", f"over all devices: {amount(row.nbytes)}", ""


def _amounts(part: Part) -> str:
    least, most = amount(part.nbytes), amount(part.most)
    return least if least == most else f"{least} to {most}"


def _split(part: Part) -> str:
    if not part.sizes:
        return part.axis or _MIRRORED
    ways = [" + ".join(f"{n:,}" for n in sizes) for sizes in (part.sizes, *part.others)]
    more = " and so on" * (len(ways) > _SHOWN) + _SHARED * part.shared
    return f"{part.axis} {' or '.join(ways[:_SHOWN])}{more}"
