"""export.json's content as a table and lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tkn.report.tables.formats import markdown_rows
from tkn.report.tables.sheets import Column, Sheet, millions, milliseconds

_HEADINGS = {"error": "error (%)", "mse": "MSE", "mae": "MAE"}


def export_sheet(content: Mapping[str, Any]) -> Sheet:
    """A row for each network and engine that was timed."""
    names, batches = list(content["network"]["errors"]), [plan["batch"] for plan in content["plans"]]
    columns = [Column("network", right=False), Column("computed by", right=False)]
    columns += [Column(_HEADINGS[name]) for name in names]
    columns += [Column("multiply-adds"), *(Column(f"ms, batch {batch}") for batch in batches)]
    medians = {(row["network"], row["engine"], row["batch"]): row["seconds"]["median"] for row in content["timings"]}
    rows = []
    for network, engine in dict.fromkeys(key[:2] for key in medians):
        times = [medians.get((network, engine, batch)) for batch in batches]
        macs = content["macs_dense" if network == "dense" else "macs_roi"]
        errors = [_error(content, network, name) for name in names]
        cells = [network, engine, *errors, millions(macs)]
        rows.append((*cells, *("" if seconds is None else milliseconds(seconds) for seconds in times)))
    title = f"{content['model']} on {content['data']}: {content['parameters']:,} parameters"
    return Sheet(title, "", tuple(columns), tuple(rows))


def _error(content: Mapping[str, Any], network: str, name: str) -> str:
    """Of the trained network and of the plan; a dense network in a targeted one's place was not trained."""
    if network == "plan":
        return f"{content['plans'][0]['errors'][name]['value']:.3f}"
    trained = "targeted" if content["targeted"] else "dense"
    return f"{content['network']['errors'][name]['value']:.3f}" if network == trained else ""


def export_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """What the table's numbers are of."""
    images = content["images"]
    yield f"Checked on {images['count']:,} images{_of_whole(images)}: {images['source']}."
    for name, value in content["network"]["errors"].items():
        yield (
            f"{_HEADINGS[name]} of the network {value['value']:.3f}, {value['low']:.3f} to {value['high']:.3f} with "
            "95 % confidence for other images like these."
        )
    for plan in content["plans"]:
        others = (
            "" if plan["other_classes"] is None else f"; another class for {plan['other_classes'] or 'no'} image(s)"
        )
        yield (
            f"Plan for batches of {plan['batch']}: outputs differ from the network's by at most "
            f"{plan['largest_difference']:.2g}, {plan['difference']:.1e} of the largest{others}."
        )
    for batch, dense, seconds, gain in _gains(content):
        yield (
            f"Batch {batch}: the plan is {gain:.2f} times as fast as the dense network by {dense}, the fastest of "
            f"those timed ({milliseconds(seconds)} ms)."
        )
    load = content["other_load"]
    busy = "" if load is None else f"; other processes kept {load} CPUs busy"
    yield f"Timed on {content['machine']['cpu']}, threads: {content['threads']}, {content['dtype']}{busy}."
    yield from content["notes"]


def _of_whole(images: Mapping[str, Any]) -> str:
    return "" if images["whole"] in (None, images["count"]) else f", which lie evenly among {images['whole']:,}"


def _gains(content: Mapping[str, Any]) -> Iterator[tuple[int, str, float, float]]:
    """For each batch: the fastest dense engine, its seconds, and how many times as long as the plan it takes."""
    for plan in content["plans"]:
        here = {
            (row["network"], row["engine"]): row["seconds"]["median"]
            for row in content["timings"]
            if row["batch"] == plan["batch"]
        }
        dense = {engine: seconds for (network, engine), seconds in here.items() if network == "dense"}
        planned = next((seconds for (network, _), seconds in here.items() if network == "plan"), None)
        if dense and planned is not None:
            fastest = min(dense, key=dense.__getitem__)
            yield plan["batch"], fastest, dense[fastest], dense[fastest] / planned


def export_markdown(content: Mapping[str, Any]) -> str:
    """The same as a page."""
    sheet = export_sheet(content)
    lines = "\n".join(f"- {line}" for line in export_lines(content))
    return f"# {sheet.title}\n\n{markdown_rows(sheet.columns, sheet.rows)}\n{lines}\n"
