"""The results of `spikerl bench` as text of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from spikerl.commands.bench.timing import Ratios
from spikerl.runs.display import Screen


def show(answer: dict[str, Any]) -> None:
    console = Screen(markup=False, emoji=False, highlight=False)
    machine, measurements = answer["machine"], answer["measurements"]
    commit = (machine["commit"] or "unknown")[:10]
    console.print(f"{machine['cpu']}, {machine['cores']} cores; commit {commit}")
    if measurements:
        console.print()
        console.print(measurement_table(measurements))
    for what, why in answer["left_out"].items():
        console.print(f"not measured: {what}: {why}")
    if roofline := answer["roofline"]:
        console.print()
        for line in roofline_lines(roofline):
            console.print(line)
    if answer["ratios"]:
        console.print("\nratios of medians")
        console.print(ratio_table(answer["ratios"]))


def measurement_table(measurements: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("batch x\nworkers", "median\nms", "least\nms", "per\nsecond"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in measurements:
        precision = m["precision"] if m["precision"] != "fp32" else ""
        workers = f" x {m['world_size']}" if m["world_size"] > 1 else ""
        table.add_row(
            " ".join(word for word in (m["what"], m["kernel"], precision) if word),
            f"{m['batch']}{workers}",
            milliseconds(m["median_ms"]),
            milliseconds(m["min_ms"]),
            f"{m['per_second']:,.0f}" if m["per_second"] >= 10 else "",
        )
    return table


def ratio_table(ratios: Ratios) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    for name, r in ratios.items():
        table.add_row(f"{r['ratio']:.3f}", name)
    return table


def milliseconds(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def roofline_lines(roofline: dict[str, Any]) -> list[str]:
    """The rates that were measured, and the least time of dense updates at the highest rate."""
    rates = roofline["product_gflops"]
    libraries = ", ".join(f"{library} {rate:.0f}" for library, rate in rates.items())
    lines = [
        f"dense float32 products, GFLOP/s: {libraries}",
        f"copies in memory, GB/s: {roofline['copy_gb_s']:.3g}",
    ]
    for batch, gflop in roofline["update_gflop"].items():
        least_ms = gflop / max(rates.values()) * 1e3
        lines.append(
            f"an update of dense products, batch {batch}: {gflop:.3g} GFLOP,"
            f" at least {least_ms:.3g} ms"
        )
    return lines
