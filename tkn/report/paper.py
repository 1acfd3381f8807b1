"""The paper's figures: Tables 2 to 6, a row for each of this project's experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tkn.kinds import other_than_plain


@dataclass(frozen=True)
class PaperRow:
    """A row of a table: its settings, and what the paper reports of it.

    parameters: as printed; macs: millions of multiply-adds for one image; errors: "error" in percent, or "mse" and
    "mae"; attention, l2 and beta: None of a dense network.
    """

    table: int
    model: str
    data: str
    epochs: int
    parameters: str
    macs: float
    errors: Mapping[str, float]
    attention: str | None = None
    l2: float | None = None
    beta: float | None = None

    def __str__(self) -> str:
        names = {"error": "error {:.2f} %", "mse": "MSE {:.2f}", "mae": "MAE {:.2f}"}
        errors = ", ".join(names[name].format(value) for name, value in self.errors.items())
        return f"The paper, Table {self.table}: {errors}, {self.macs:g}M multiply-adds, {self.parameters} parameters."


def _error(value: float) -> dict[str, float]:
    return {"error": value}


#: By the name of the experiment (conf/experiment). The networks of other authors are left out.
PAPER: dict[str, PaperRow] = {
    "table2_cnn6": PaperRow(2, "cnn6", "mnist", 20, "4.59M", 368, _error(0.42)),
    "table2_tkn6_gaussian": PaperRow(2, "tkn6", "mnist", 20, "4.59M", 52.9, _error(0.48), "gaussian", 1e-4, 2),
    "table2_tkn6_cauchy": PaperRow(2, "tkn6", "mnist", 20, "4.59M", 28.6, _error(0.43), "cauchy", 1e-4, 4),
    "table2_dn10": PaperRow(2, "dn10", "mnist", 20, "44.7K", 11.3, _error(0.48)),
    "table2_tdn10_gaussian": PaperRow(2, "tdn10", "mnist", 20, "45.0K", 6.93, _error(0.42), "gaussian", 1e-4, 2),
    "table2_tdn10_cauchy": PaperRow(2, "tdn10", "mnist", 20, "45.0K", 6.26, _error(0.38), "cauchy", 1e-4, 4),
    "table3_cnn6": PaperRow(3, "cnn6", "tlmnist", 20, "10.76M", 1470, _error(0.83)),
    "table3_tkn6_gaussian": PaperRow(3, "tkn6", "tlmnist", 20, "10.76M", 145, _error(0.48), "gaussian", 1e-4, 2),
    "table3_tkn6_cauchy_beta2": PaperRow(3, "tkn6", "tlmnist", 20, "10.76M", 125, _error(0.48), "cauchy", 1e-4, 2),
    "table3_tkn6_cauchy_beta4": PaperRow(3, "tkn6", "tlmnist", 20, "10.76M", 68.3, _error(0.53), "cauchy", 1e-4, 4),
    "table3_dn10": PaperRow(3, "dn10", "tlmnist", 20, "44.7K", 45.2, _error(0.50)),
    "table3_tdn10_gaussian": PaperRow(3, "tdn10", "tlmnist", 20, "45.0K", 29.7, _error(0.41), "gaussian", 1e-4, 2),
    "table3_tdn10_cauchy": PaperRow(3, "tdn10", "tlmnist", 20, "45.0K", 25.6, _error(0.38), "cauchy", 1e-4, 2),
    "table4_dn40": PaperRow(4, "dn40", "svhn", 40, "0.83M", 357, _error(3.17)),
    "table4_tdn40_cauchy": PaperRow(4, "tdn40", "svhn", 40, "0.83M", 205, _error(3.11), "cauchy", 1e-4, 2),
    "table5_stn": PaperRow(5, "stn", "gtsrb", 100, "1.18M", 145, _error(1.52)),
    "table5_tstn_cauchy": PaperRow(5, "tstn", "gtsrb", 100, "1.18M", 55.7, _error(1.53), "cauchy", 1e-3, 2),
    "table6_dn40": PaperRow(6, "dn40", "pain", 100, "0.83M", 802, {"mse": 1.67, "mae": 0.51}),
    "table6_tdn40_cauchy": PaperRow(
        6, "tdn40", "pain", 100, "0.83M", 391, {"mse": 1.67, "mae": 0.50}, "cauchy", 1e-4, 4
    ),
}


def paper_experiment(summary: Mapping[str, Any]) -> str | None:
    """The experiment whose settings (network, data, epochs, attention, penalty) are those of a run's summary."""
    attention, penalty = summary.get("attention") or {}, summary.get("penalty") or {}
    settings = (attention.get("name"), penalty.get("l2"), penalty.get("beta"))
    if other_than_plain(attention):
        return None
    for name, row in PAPER.items():
        same_network = (row.model, row.data, row.epochs) == (summary["model"], summary["data"], summary["epochs"])
        if same_network and (row.attention, row.l2, row.beta) == settings:
            return name
    return None
