"""`runtime devices`: what this machine can run models on."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from runtime.cli.output import note, size, table
from runtime.cli.parsing import Command, option


@click.command(
    "devices",
    cls=Command,
    epilog="""\b
Examples:
  runtime devices
  runtime devices --bandwidth      also measure how fast memory is read
""",
)
@option("-b --bandwidth", "Measure memory bandwidth (1 GiB, seconds).", "Options", is_flag=True)
@option("-t --threads", "Threads for the measurement (default: one per core).", "Options",
        type=click.IntRange(1), metavar="N")  # fmt: skip
@option("--json as_json", "As JSON.", "Options", is_flag=True)
def command(bandwidth: bool, threads: int | None, as_json: bool) -> None:
    """Show the processor, the instruction sets kernels are compiled for, and memory."""
    found = _cpu()
    if bandwidth:
        from runtime.cli.bandwidth import measured

        note("measuring memory bandwidth ...")
        found["read_bandwidth"] = measured(threads or found["physical_cores"])
    if as_json:
        click.echo(json.dumps({"cpu": found, "cuda": None}, indent=1))
        return
    click.echo(table(_rows(found), ("device", "what", "value")))


def _cpu() -> dict[str, Any]:
    from runtime.backends.cpu.compile import isa
    from runtime.backends.cpu.run.cores import cpu_name, physical_cores
    from runtime.backends.environment import cache_dir
    from runtime.memory.budget import available_memory

    return {
        "name": cpu_name(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "isa_available": list(isa.available()),
        "isa_selected": isa.selected(),
        "memory_total": _total_memory(),
        "memory_available": available_memory(),
        "cache_dir": str(cache_dir()),
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    memory = [
        f"{size(n)} {word}"
        for word, n in (("in all", found["memory_total"]), ("free", found["memory_available"]))
        if n is not None
    ]
    others = [name for name in found["isa_available"] if name != found["isa_selected"]]
    rows = [
        ("cpu", "processor", found["name"]),
        ("", "cores", f"{found['physical_cores']} physical, {found['logical_cores']} logical"),
        ("", "instruction set", f"{found['isa_selected']} (also: {', '.join(others) or 'none'})"),
        ("", "memory", ", ".join(memory) or "not known"),
        ("", "kernel cache", found["cache_dir"]),
    ]
    if "read_bandwidth" in found:
        rows.append(("", "bandwidth", f"{found['read_bandwidth'] / 1e9:.1f} GB/s read"))
    rows.append(("cuda", "", "not in this version: models run on the CPU"))
    return rows


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
