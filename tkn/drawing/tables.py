"""Tables of one run, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from tkn.data.base import is_own, is_whole
from tkn.macs import MacsReport


def layers_table(report: MacsReport, title: str) -> Table:
    """A row per layer that costs something: map size, parameters, multiply-adds dense and in the ROIs, mean ROI."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("layer")
    table.add_column("type")
    for heading in ("map", "parameters", "MACs dense", "MACs ROI", "mean ROI"):
        table.add_column(heading, justify="right")
    for row in report.layers:
        if row.kind.startswith("BatchNorm"):
            continue
        table.add_row(
            escape(row.name),
            escape(row.kind),
            "x".join(map(str, row.map_size)),
            f"{row.parameters:,}",
            f"{row.macs_dense:,}",
            f"{row.macs_roi:,}",
            "x".join(f"{side:.1f}" for side in row.mean_roi) if row.mean_roi else "",
        )
    table.add_section()
    norms = [row for row in report.layers if row.kind.startswith("BatchNorm")]
    if norms:
        count = sum(row.macs_dense for row in norms)
        parameters = sum(row.parameters for row in norms)
        table.add_row(f"{len(norms)} layers", "BatchNorm", "", f"{parameters:,}", f"{count:,}", f"{count:,}", "")
    table.add_row("all", "", "", f"{report.parameters:,}", f"{report.total_dense:,}", f"{report.total_roi:,}", "")
    return table


def results_table(summary: Mapping[str, Any]) -> Table:
    """What a run came to, from its summary."""
    title = f"{summary['model']} on {summary['data']}, seed {summary['seed']}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    for key, label, unit in (
        ("error", "test error", " %"),
        ("error_clipped", "test error, clipped to the ROIs", " %"),
        ("mse", "test mean squared error", ""),
        ("mae", "test mean absolute error", ""),
        ("mse_clipped", "test mean squared error, clipped", ""),
        ("mae_clipped", "test mean absolute error, clipped", ""),
    ):
        if key in summary:
            table.add_row(label, f"{summary[key]:.3f}{unit}")
    table.add_row("parameters", f"{summary['parameters']:,}")
    table.add_row("multiply-adds, dense", f"{summary['macs_dense']:,}")
    table.add_row("multiply-adds, in the ROIs", f"{summary['macs_roi']:,}")
    table.add_row("times fewer than the baseline", f"{summary['macs_dense'] / summary['macs_roi']:.2f}")
    table.add_row("epochs", str(summary["epochs"]))
    table.add_row("wall time", f"{summary['wall_seconds']:.1f} s")
    partial = not (is_whole(summary["data_source"]) or is_own(summary["data_source"]))
    table.add_row("data", escape(summary["data_source"]), style="bold red" if partial else None)
    return table
