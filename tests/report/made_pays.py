"""Made-up rows of the comparison, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from made_runs import config_text, summary_of

WHOLE = 11_317_030
THIRD = WHOLE // 3
ERRORS = {
    "dense": (0.50, 0.52, 0.48),
    "thin": (0.70, 0.74, 0.72),
    "pruned": (0.62, 0.60, 0.64),
    "targeted": (0.52, 0.55, 0.53),
    "converted": (0.51, 0.56, 0.52),
    "centred": (0.81, 0.86, 0.80),
    "random": (0.91, 0.99, 0.93),
}
_CHANNELS = ("channels.checkpoint=results/pays_x_dense/seed0/last.ckpt", f"channels.macs={THIRD}")
_ARGUMENTS = {
    "dense": ("model=dn10", "data=mnist"),
    "thin": ("model=dn10", "data=mnist", "model.thin=0.3333"),
    "pruned": ("model=dn10", "data=mnist", *_CHANNELS),
    "targeted": ("model=tdn10", "data=mnist", "penalty=budget", "penalty.share=0.3333"),
}


@cache
def _config(arm: str, overrides: tuple[str, ...]) -> str:
    return config_text(*_ARGUMENTS.get(arm, _ARGUMENTS["targeted"]), "trainer.precision=bf16-mixed", *overrides)


def write_pays_run(results: Path, row: str, seed: int, error: float, *overrides: str, **changes: Any) -> Path:
    """A finished run in results/pays_<row>/seed<seed>; row: <set>_<arm>, or more words after it."""
    arm = next((word for word in row.split("_") if word in ERRORS), "targeted")
    dense = arm in ("dense", "thin", "pruned")
    macs = WHOLE if arm == "dense" else THIRD
    metric = {"mse": error**2, "mae": error} if row.startswith("faces") else {"error": error}
    summary = summary_of("dn10" if dense else "tdn10", **{"seed": seed, "macs_roi": macs, "precision": "bf16-mixed"})
    summary["experiment"] = f"pays_{row}"
    if dense:
        summary["macs_dense"] = macs + seed * (arm == "pruned")  # each has its own widths
        narrowed = {"by": arm, "wanted": THIRD, "macs": macs, "baseline_macs": WHOLE, "widths": {}}
        summary["narrowed"] = None if arm == "dense" else narrowed
    else:
        summary["penalty"] = {"share": 0.3333, "macs": None, "reach": 0.5, "asked": THIRD, "met": macs}
    if "mae" in metric:
        del summary["error"]
    folder = results / f"pays_{row}" / f"seed{seed}"
    folder.mkdir(parents=True)
    text = _config(arm, overrides).replace("\nseed: 0\n", f"\nseed: {seed}\n")
    (folder / "config.yaml").write_text(text.replace("pays_x_dense/seed0", f"pays_x_dense/seed{seed}"))
    (folder / "summary.json").write_text(json.dumps({**summary, **metric, **changes}))
    return folder


def write_set(results: Path, name: str, *, errors: dict[str, Sequence[float]] = ERRORS, **changes: Any) -> None:  # type: ignore[assignment]
    """Rows of a set: a run for each error of each arm."""
    for arm, values in errors.items():
        for seed, error in enumerate(values):
            write_pays_run(results, f"{name}_{arm}", seed, error, **changes)


def write_timings(folder: Path, name: str, arms: Sequence[str] = ("dense", "thin", "pruned", "targeted")) -> Path:
    """Of the runs of seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for batch in (1, 128):
        for place, arm in enumerate(arms):
            for engine, factor in (("torch", 3.0), ("openvino", 1.0), ("tkn-dense", 1.5)):
                timed = "tkn" if arm in ("targeted", "converted") and engine == "tkn-dense" else engine
                if arm in ("targeted", "converted") and engine == "openvino":
                    rows.append({"arm": arm, "engine": engine, "batch": batch, "failure": "ValueError: no"})
                    continue
                median = factor * (4 - 0.7 * place) * 1e-4 * batch**0.8
                seconds = {"n": 50, "median": median, "q1": 0.98 * median, "q3": 1.03 * median, "least": median / 2}
                rows.append({"arm": arm, "engine": timed, "batch": batch, "seconds": seconds})
    macs = {arm: WHOLE if arm == "dense" else THIRD for arm in arms}
    content = {
        **{"machine": {"cpu": "A CPU"}, "threads": 2, "busy_with_others": 0.03},
        "versions": {"torch": "2.14.1", "openvino": "2026.1"},
        "networks": [{"arm": arm, "run": f"pays_{name}_{arm}/seed0", "macs": macs[arm]} for arm in arms],
        "timings": rows,
    }
    path = folder / f"pays_{name}.json"
    path.write_text(json.dumps(content))
    return path
