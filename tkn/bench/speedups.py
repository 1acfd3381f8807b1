"""How many times faster this project's engine is than the fastest peer, on the baseline and on the thinned network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tkn.bench.engines import TIMED_ENGINES


def speedups(timings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, batch and targeted network that this project's engine was timed on, and for each precision.

    `precision`: of this project's engine there. `against` holds, for each dense network ("baseline", "thinned") and
    precision ("float32", "any"), the fastest peer, its `seconds`, the `speedup` (its median over ours) and `low`,
    `high`: between near and far quartiles.
    """
    timed = [row for row in timings if "seconds" in row]
    rows = []
    mine = [row for row in timed if TIMED_ENGINES[row["engine"]].ours]
    for task, batch, network, precision in dict.fromkeys(map(_compared, mine)):
        here = [row for row in timed if (row["task"], row["batch"]) == (task, batch)]
        ours = _fastest(row for row in mine if _compared(row) == (task, batch, network, precision))
        assert ours is not None
        against = {}
        for rival in ("baseline", "thinned"):
            name = rival if rival == "baseline" else network.replace("targeted", "thinned")
            peers = [row for row in here if row["network"] == name]
            exact = _fastest(row for row in peers if row["precision"] == "float32")
            against[rival] = {
                kind: _comparison(ours, peer)
                for kind, peer in (("float32", exact), ("any", _fastest(peers)))
                if peer is not None
            }
        rows.append(
            {
                "task": task,
                "batch": batch,
                "network": network,
                "engine": ours["engine"],
                "precision": precision,
                "seconds": ours["seconds"]["median"],
                "macs": ours["macs"],
                "against": {rival: found for rival, found in against.items() if found},
            }
        )
    return rows


def _compared(row: Mapping[str, Any]) -> tuple[str, int, str, str]:
    return row["task"], row["batch"], row["network"], row["precision"]


def _fastest(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=lambda row: row["seconds"]["median"], default=None)


def _comparison(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    mine, theirs = ours["seconds"], peer["seconds"]
    return {
        "engine": peer["engine"],
        "seconds": theirs["median"],
        "speedup": round(theirs["median"] / mine["median"], 3),
        "low": round(theirs["q1"] / mine["q3"], 3),
        "high": round(theirs["q3"] / mine["q1"], 3),
        "fewer_macs": round(peer["macs"] / ours["macs"], 3),
    }
