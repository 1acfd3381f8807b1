"""Tables and the plot of a benchmark, from the content of bench.json."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from tkn.bench.engines import TIMED_ENGINES
from tkn.drawing.figures import COLOURS

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
#: A network's kind by its points' filling: told apart without colours too.
_FILL = {"baseline": "full", "thinned": "none", "targeted": "full"}


def timings_table(result: Mapping[str, Any]) -> Table:
    """A row per network and engine: the median milliseconds of each task, and half of what lies between quartiles.

    The fastest engine of each network and task is bold.
    """
    title = f"{result['case']}: milliseconds (half the quartiles' distance), {_where(result)}"
    table = Table(title=title, title_justify="left")
    for heading in ("network", "MACs"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    table.add_column("engine")
    tasks = list(dict.fromkeys((row["task"], row["batch"]) for row in result["timings"]))
    for task, batch in tasks:
        table.add_column(f"{task}\nbatch {batch}", justify="right")
    cells = {(row["network"], row["engine"], row["task"], row["batch"]): row for row in result["timings"]}
    for network in result["networks"]:
        engines = dict.fromkeys(row["engine"] for row in result["timings"] if row["network"] == network["name"])
        for position, engine in enumerate(engines):
            first = (network["name"], f"{network['macs'] / 1e6:.2f}M") if position == 0 else ("", "")
            values = [_cell(cells, network["name"], engine, task, batch) for task, batch in tasks]
            table.add_row(*first, engine, *values)
        table.add_section()
    return table


def _cell(cells: Mapping[tuple[str, str, str, int], Any], network: str, engine: str, task: str, batch: int) -> str:
    row = cells.get((network, engine, task, batch))
    if row is None:
        return ""
    if "seconds" not in row:
        return "[yellow]failed[/]" if "not installed" not in row["failure"] else "[yellow]not installed[/]"
    seconds = row["seconds"]
    spread = (seconds["q3"] - seconds["q1"]) / 2 / seconds["median"]
    text = f"{_digits(seconds['median'] * 1e3)} ±{spread:.0%}"
    rivals = [other for key, other in cells.items() if (key[0], *key[2:]) == (network, task, batch)]
    fastest = min(other["seconds"]["median"] for other in rivals if "seconds" in other)
    return f"[bold]{text}[/]" if seconds["median"] == fastest else text


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def speedups_table(result: Mapping[str, Any]) -> Table:
    """How many times faster this project's engine is than the fastest peer of each precision, on each dense network."""
    table = Table(title="times faster than the fastest peer (between near and far quartiles)", title_justify="left")
    table.add_column("task")
    table.add_column("network")
    table.add_column("fewer MACs", justify="right")
    columns = [(rival, precision) for rival in ("baseline", "thinned") for precision in ("float32", "any")]
    for rival, precision in columns:
        table.add_column(f"on the {rival},\n{precision}{' precision' if precision == 'any' else ''}")
    for row in result["speedups"]:
        found = [row["against"].get(rival, {}).get(precision) for rival, precision in columns]
        fewer = row["against"].get("baseline", {}).get("any", {}).get("fewer_macs")
        table.add_row(
            f"{row['task']} {row['batch']}",
            f"{row['network']}, {row['engine']}\n{row['precision']}",
            f"{fewer:.2f}" if fewer else "",
            *(
                f"{peer['speedup']:.2f} ({peer['low']:.2f}-{peer['high']:.2f})\n{peer['engine']}" if peer else ""
                for peer in found
            ),
        )
    return table


def memory_table(result: Mapping[str, Any]) -> Table:
    """Resident memory in MiB of inference, each engine in a process of its own."""
    table = Table(title=f"memory at batch {result['memory'][0]['batch']}, MiB", title_justify="left")
    for heading in ("network", "engine"):
        table.add_column(heading)
    for heading in ("before", "peak", "increase"):
        table.add_column(heading, justify="right")
    for row in result["memory"]:
        values = (
            ("failed", "", "") if "failure" in row else [str(row[f"{k}_mib"]) for k in ("before", "peak", "increase")]
        )
        table.add_row(row["network"], row["engine"], *values)
    return table


def _where(result: Mapping[str, Any]) -> str:
    """What computed, in numbers of which type."""
    if result["device"]["name"] != "cpu":
        return f"{result['device']['name']}, {result['dtype']}"
    return f"{result['machine']['cpu']}, threads: {result['threads']}"


def _style(engine: str) -> dict[str, str]:
    """The same colour and marker in every plot; this project's engine in black."""
    position = list(TIMED_ENGINES).index(engine)
    colour = "black" if TIMED_ENGINES[engine].ours else COLOURS[position % len(COLOURS)]
    return {"color": colour, "marker": _MARKERS[position % len(_MARKERS)]}


def cost_figure(result: Mapping[str, Any]) -> Figure:
    """Time per image against multiply-adds, a panel a task.

    The dashed line is the ideal: the fastest float32 engine's time on the baseline, in proportion to multiply-adds.
    """
    tasks = list(dict.fromkeys((row["task"], row["batch"]) for row in result["timings"]))
    columns = min(3, len(tasks))
    rows = ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.6 * columns + 2.4, 3.2 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for above, axis in zip(axes[len(tasks) - columns :], axes[len(tasks) :], strict=False):
        axis.set_visible(False)
        above.tick_params(labelbottom=True)
    kinds = {network["name"]: network["kind"] for network in result["networks"]}
    engines = list(dict.fromkeys(row["engine"] for row in result["timings"] if "seconds" in row))
    styles = {engine: _style(engine) for engine in engines}
    for axis, (task, batch) in zip(axes, tasks, strict=False):
        timed = [r for r in result["timings"] if (r["task"], r["batch"]) == (task, batch) and "seconds" in r]
        for row in timed:
            middle, low, high = (row["seconds"][key] / batch * 1e6 for key in ("median", "q1", "q3"))
            axis.errorbar(
                row["macs"] / 1e6,
                middle,
                [[middle - low], [high - middle]],
                fillstyle=_FILL[kinds[row["network"]]],
                markersize=8 if TIMED_ENGINES[row["engine"]].ours else 6,
                linewidth=1,
                **styles[row["engine"]],
            )
        dense = [r for r in timed if kinds[r["network"]] == "baseline" and r["precision"] == "float32"]
        if dense:
            best = min(dense, key=lambda row: row["seconds"]["median"])
            costs = [min(row["macs"] for row in result["networks"]), best["macs"]]
            rate = best["seconds"]["median"] / batch * 1e6 / best["macs"]
            axis.plot([macs / 1e6 for macs in costs], [macs * rate for macs in costs], "--", color="0.4", linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_locator(LogLocator(subs=(1, 2, 5)))
            direction.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
            direction.set_minor_formatter(NullFormatter())
        axis.set_title(f"{task}, batch {batch}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, which="both")
        axis.set_xlabel("multiply-adds per image (millions)")
        axis.set_ylabel("microseconds per image")
    for axis in list(axes)[len(tasks) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], linestyle="", label=engine, **style) for engine, style in styles.items()]  # type: ignore[arg-type]
    handles.append(Line2D([], [], linestyle="", marker="o", color="0.4", fillstyle="none", label="hollow: thinned"))
    handles.append(
        Line2D([], [], linestyle="--", color="0.4", linewidth=1, label="ideal: the fastest float32\nin proportion")
    )
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{result['case']} on {_where(result)}", fontsize=11)
    return figure
