"""The tables of cross-validated rows: each over all its folds, and targeted against dense ones fold by fold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from tkn.app.files import csv_text
from tkn.data.base import is_own
from tkn.report.compare import half_width, trained_differently
from tkn.report.runs.folds import CrossValidated, FoldPair, fold_pairs
from tkn.report.runs.groups import Group, digits_of
from tkn.report.tables.sheets import ERROR_TITLES, Column, Sheet, millions

_OVERLAP = (
    "The folds' training sets overlap, so that these intervals are too narrow rather than too wide: no unbiased "
    "estimate of this variance exists (Bengio & Grandvalet 2004)."
)
_NOTE = (
    "Each sample is tested once: the error is the mean over the folds, weighted by their test images. 95 %: half of "
    "the interval of the mean over the folds, by Student's t over their values, each the mean over its seeds. A row "
    f"that lacks folds has no error over all. {_OVERLAP}"
)
_PAIRS_NOTE = (
    "Targeted minus dense, of one base network, data set and division, paired fold by fold; the mean difference with "
    f"half of its 95 % interval (paired t-test). {_OVERLAP}"
)


def seeds_said(group: Group) -> str:
    """A row's seeds as they are."""
    return ", ".join(map(str, group.seeds))


def fold_sheets(rows: Sequence[CrossValidated], seeds: Callable[[Group], str] = seeds_said) -> list[Sheet]:
    """The rows over all folds, and the pairs among them: tables for classification, and for regression.

    `seeds`: what a cell says of the seeds of a fold's runs.
    """
    sheets = []
    for names in (("error",), ("mse", "mae")):
        chosen = [row for row in rows if row.whole.errors == names]
        pairs = list(fold_pairs(chosen))
        if chosen:
            sheets.append(_rows_sheet(chosen, names, seeds))
        if pairs:
            sheets.append(_pairs_sheet(pairs, names))
    return sheets


def _title(begin: str, names: Sequence[str]) -> str:
    return f"{begin} (regression)" if len(names) > 1 else begin


def _rows_sheet(rows: Iterable[CrossValidated], names: Sequence[str], seeds: Callable[[Group], str]) -> Sheet:
    columns = [Column("row", right=False), Column("data", right=False, brief=False), Column("folds"), Column("seeds")]
    for name in names:
        columns.append(Column(f"{ERROR_TITLES[name]} over all folds"))
        columns.append(Column("95 %" if len(names) == 1 else f"{ERROR_TITLES[name]}, 95 %"))
        columns.append(Column(f"{ERROR_TITLES[name]}, lowest to highest fold", brief=len(names) == 1))
    columns += [Column("multiply-adds"), Column("times fewer")]
    columns += [Column("precision, device", right=False, brief=False), Column("remarks", right=False, brief=False)]
    cells = tuple(_row(row, names, seeds) for row in rows)
    return Sheet(_title("Cross-validation", names), _NOTE, tuple(columns), cells)


def _row(row: CrossValidated, names: Sequence[str], seeds: Callable[[Group], str]) -> tuple[str, ...]:
    cells = [row.label, _data(row), _folds(row.count, row.missing), _seeds(row, seeds)]
    for name in names:
        pooled, over_folds = row.pooled(name), row.over_folds(name)
        half = half_width(over_folds) if over_folds else None
        cells += [_number(pooled, name), "" if half is None else f"± {_number(half, name)}", _range(row, name)]
    macs = row.over_folds("macs_roi")
    cells.append(millions(macs.mean, macs.deviation) if macs else "")
    cells.append(f"{row.whole.common['macs_dense'] / macs.mean:.2f}" if macs else "")
    return (*cells, "; ".join(row.whole.devices), "; ".join(_remarks(row)))


def _data(row: CrossValidated) -> str:
    """The source of all folds; of one's own data the folder's name alone."""
    if not is_own(row.data):
        return f"{row.whole.common['data']}, {row.data}"
    path, *others = row.data.removeprefix("own: ").split(", ")
    return ", ".join([PurePath(path).name, *others])


def _folds(count: int, missing: Sequence[int]) -> str:
    if not missing:
        return str(count)
    return f"{count - len(missing)} of {count}, missing: {', '.join(map(str, missing))}"


def _seeds(row: CrossValidated, seeds: Callable[[Group], str]) -> str:
    """Those of all folds, or where they differ each fold's."""
    texts = {number: seeds(group) for number, group in row.folds.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"fold {number}: {text}" for number, text in texts.items())


def _number(value: float | None, name: str) -> str:
    return "" if value is None else f"{value:.{digits_of(name)}f}"


def _range(row: CrossValidated, name: str) -> str:
    """The lowest and the highest of the folds that were run."""
    values = row.values(name)
    ends = dict.fromkeys(choose(values, key=values.__getitem__) for choose in (min, max))
    return " to ".join(f"{_number(values[number], name)} (fold {number})" for number in ends)


def _remarks(row: CrossValidated) -> Iterator[str]:
    if row.whole.first.tests_best:
        yield f"the best epoch's model ({row.whole.common['best_chosen_on']})"
    if not row.missing and len(row.values("test_images")) < row.count:
        yield "no error over all folds: a summary.json has no test_images"
    yield from row.whole.remarks


def _pairs_sheet(pairs: Iterable[FoldPair], names: Sequence[str]) -> Sheet:
    columns = [Column("targeted", right=False), Column("dense", right=False), Column("folds")]
    for name in names:
        columns.append(Column(f"{ERROR_TITLES[name]}: difference by fold", brief=False))
        columns.append(Column(f"{ERROR_TITLES[name]}: mean difference, 95 %"))
    columns.append(Column("trained differently", right=False, brief=False))
    cells = tuple(_pair(pair, names) for pair in pairs)
    return Sheet(_title("Cross-validation: targeted against dense", names), _PAIRS_NOTE, tuple(columns), cells)


def _pair(pair: FoldPair, names: Sequence[str]) -> tuple[str, ...]:
    cells = [pair.targeted.label, pair.dense.label, _folds(pair.targeted.count, pair.missing)]
    for name in names:
        cells.append(", ".join(_signed(value, name) for value in pair.differences(name).values()))
        statistic = pair.statistic(name)
        half = half_width(statistic) if statistic else None
        cells.append("" if statistic is None else f"{_signed(statistic.mean, name)} ± {_number(half, name)}")
    runs = [row.folds[pair.common[0]].first for row in (pair.targeted, pair.dense)] if pair.common else []
    return (*cells, "; ".join(trained_differently(*runs)) if runs else "")


def _signed(value: float, name: str) -> str:
    return f"{value:+.{digits_of(name)}f}"


def folds_csv(rows: Iterable[CrossValidated]) -> str:
    """A row for every cross-validated row: settings, errors over all folds and of each, as plain numbers."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        common = row.whole.common
        line: dict[str, Any] = {"row": row.label, "model": common["model"], "data": common["data"]}
        line |= {"data_source": row.data, "folds": row.count, "missing": " ".join(map(str, row.missing))}
        line |= {"seeds": _seeds(row, seeds_said)}
        for name in ("error", "mse", "mae"):
            over_folds = row.over_folds(name)
            line |= {name: row.pooled(name), f"{name}_half": half_width(over_folds) if over_folds else None}
            line[f"{name}_folds"] = " ".join(f"{number}:{value:g}" for number, value in row.values(name).items())
        macs = row.over_folds("macs_roi")
        line |= {"macs_roi": macs and macs.mean, "macs_dense": common["macs_dense"]}
        line |= {"devices": "; ".join(row.whole.devices), "remarks": "; ".join(_remarks(row))}
        lines.append(line)
    return csv_text(lines)
