"""The page's tables, in Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tkn.report.compare import half_width, plus_half
from tkn.report.pays.design import ARMS, RIVALS, SECONDARY, PaysSet
from tkn.report.pays.rows import Row, off_budget, percent
from tkn.report.pays.study import SetResults, Study
from tkn.report.pays.timings import BATCHES
from tkn.report.pays.verdicts import Comparison, Primary, compare, statistic
from tkn.report.runs.groups import Group
from tkn.report.tables.formats import markdown_rows, seed_links
from tkn.report.tables.sheets import Column, duration, millions, milliseconds

_VERDICTS = (
    *(Column("data: network", right=False), Column("metric", right=False), Column("dense"), Column("better rival")),
    *(Column("targeted"), Column("targeted - rival, 95 %"), Column("n"), Column("p"), Column("p, Holm")),
    *(Column("targeted is", right=False), Column("remarks", right=False)),
)
_DIFFERENCES = (
    *(Column("difference", right=False), Column("95 %"), Column("n"), Column("p, uncorrected")),
    Column("remarks", right=False),
)
_COMPUTED = (
    *(Column("network", right=False), Column("precision, device", right=False), Column("torch"), Column("epochs")),
    *(Column("training, wall time"), Column("commits", right=False)),
)


def verdict_table(study: Study) -> str:
    """A row for each set that was run, and below it in how many sets targeted networks are what."""
    lines = [_verdict_row(one, study.sets[one.data.name]) for one in study.verdicts if study.sets[one.data.name].groups]
    names: dict[str, list[str]] = {}
    for one in study.verdicts:
        names.setdefault(one.verdict, []).append(one.data.name)
    counts = "; ".join(f"{verdict}: {', '.join(names[verdict])}" for verdict in sorted(names))
    corrected = sum(one.adjusted is not None for one in study.verdicts)
    return f"{markdown_rows(_VERDICTS, lines)}\n{counts}. Holm's correction is for {_sets(corrected)}.\n"


def _sets(count: int) -> str:
    return f"{count} set{'' if count == 1 else 's'}"


def _verdict_row(one: Primary, found: SetResults) -> tuple[str, ...]:
    data, groups, comparison = one.data, found.groups, one.comparison
    means = {arm: _mean(groups[arm], data) if arm in groups else "not run" for arm in ARMS}
    rival = "not run" if one.rival is None else f"{one.rival}: {means[one.rival]}"
    return (
        *(data.title, data.unit, means["dense"], rival, means["targeted"]),
        *(("", "", "") if comparison is None else _figures(comparison)),
        "" if one.adjusted is None else _p(one.adjusted),
        *(f"**{one.verdict}**", "; ".join(_remarks(one, found))),
    )


def _remarks(one: Primary, found: SetResults) -> Iterator[str]:
    data, comparison = one.data, one.comparison
    if one.missing:
        yield f"missing: {', '.join(data.experiment(arm) for arm in one.missing)}"
    if comparison is not None:
        yield from comparison.obstacles
        if one.verdict == "undecided" and comparison.half is not None:
            if comparison.p is None:
                yield "the seeds do not differ: nothing to test with"
            else:
                yield f"not more than {abs(comparison.between) + comparison.half:.2f} apart"
    arms = ["targeted", *([] if one.rival is None else [one.rival])]
    yield from _off(found, arms)
    left = {arm: len(found.rows[arm].left_out) for arm in (*RIVALS, "targeted")}
    counts = [f"{count} of {arm}" for arm, count in left.items() if count]
    if counts:
        yield f"runs left out, named below: {', '.join(counts)}"


def _off(found: SetResults, arms: Sequence[str]) -> Iterator[str]:
    for arm in arms:
        group = found.groups.get(arm)
        if group is None or found.whole is None or arm == "dense":
            continue
        if said := off_budget(group, found.whole):
            yield f"{arm}: {said}"


def _mean(group: Group, data: PaysSet) -> str:
    value = statistic(group, data.metric)
    half = half_width(value)
    return f"{value.mean:.2f}" + ("" if half is None else f" ± {half:.2f}")


def _figures(comparison: Comparison) -> tuple[str, str, str]:
    """The difference with its interval, the seeds, and p."""
    text = plus_half(comparison.between, comparison.half)
    return text, "{}, {}".format(*comparison.n), "" if comparison.p is None else _p(comparison.p)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def set_tables(found: SetResults, page: Path) -> str:
    """The set's arms, the secondary comparisons, what was tried, and what stands in none of these."""
    if not found.groups and not found.tried and not any(row.left_out for row in found.rows.values()):
        return f"Not run: there are no folders {found.data.experiment('*')} of finished runs.\n"
    parts = [_arms_table(found, page)]
    differences = list(_secondary(found))
    if differences:
        parts.append(markdown_rows(_DIFFERENCES, differences))
    if found.tried:
        parts.append(_tried_table(found, page))
    lines = list(_lines(found, page))
    if lines:
        parts.append("\n".join(f"- {line}" for line in lines) + "\n")
    parts.append(_computed_table(found))
    return "\n".join(part for part in parts if part)


def _arms_table(found: SetResults, page: Path) -> str:
    columns = (
        *(Column("network", right=False), Column(f"{found.data.unit}, 95 %"), Column("n")),
        *(Column("multiply-adds"), Column("share")),
        *(Column(f"ms, {batch} image{'s' if batch > 1 else ''} (by)") for batch in BATCHES),
        Column("seeds"),
    )
    return markdown_rows(columns, [_arm_row(arm, name, found, page) for arm, name in ARMS.items()])


def _arm_row(arm: str, name: str, found: SetResults, page: Path) -> tuple[str, ...]:
    group = found.groups.get(arm)
    if group is None:
        return name, "not run", "", "", "", "", "", ""
    return (
        name,
        *_error_and_cost(group, found),
        *(_time(arm, found, batch) for batch in BATCHES),
        seed_links(group, page),
    )


def _error_and_cost(group: Group, found: SetResults) -> tuple[str, ...]:
    macs = group.statistic("macs_roi")
    assert macs is not None
    assert found.whole is not None
    return (
        *(_mean(group, found.data), str(len(group.runs))),
        *(millions(macs.mean, macs.deviation), percent(macs.mean / found.whole)),
    )


def _time(arm: str, found: SetResults, batch: int) -> str:
    group = found.groups[arm]
    timed = None if found.timings is None else found.timings.of(arm, group, batch)
    return "not timed" if timed is None else f"{milliseconds(timed.median)} ({timed.engine})"


def _secondary(found: SetResults) -> Iterator[tuple[str, ...]]:
    groups = found.groups
    for one, other in SECONDARY:
        if one in groups and other in groups:
            yield _difference(f"{one} - {other}", compare(groups[one], groups[other], found.data.metric))


def _difference(name: str, comparison: Comparison) -> tuple[str, ...]:
    return name, *_figures(comparison), "; ".join(comparison.obstacles)


def _tried_table(found: SetResults, page: Path) -> str:
    columns = (
        *(Column("tried", right=False), Column(f"{found.data.unit}, 95 %"), Column("n")),
        *(
            Column("multiply-adds"),
            Column("share"),
            Column("variant - targeted, 95 %"),
            Column("n"),
            Column("p, uncorrected"),
        ),
        *(Column("remarks", right=False), Column("seeds")),
    )
    rows = []
    for name, row in found.tried.items():
        if row.group is None:
            rows.append((name, "not run", *[""] * (len(columns) - 2)))
            continue
        less: tuple[str, ...] = ("", "", "", "")
        if "targeted" in found.groups:
            less = _difference("", compare(row.group, found.groups["targeted"], found.data.metric))[1:]
        rows.append((name, *_error_and_cost(row.group, found), *less, seed_links(row.group, page)))
    return markdown_rows(columns, rows)


def _lines(found: SetResults, page: Path) -> Iterator[str]:
    """What a reader should know of the set, a line each."""
    yield from _off(found, list(ARMS))
    for row in (*found.rows.values(), *found.tried.values()):
        if row.group is not None:
            remarks = dict.fromkeys(remark for run in row.group.runs for remark in run.remarks)
            # Whose data they are the page's prose says.
            yield from (f"{row.experiment}: {remark}" for remark in remarks if not remark.startswith("own data"))
        for text in row.left_out:
            yield f"left out: {text}"
    if found.timings is None:
        return
    link = f"[{found.timings.path.name}]({os.path.relpath(found.timings.path, page.parent)})"
    yield f"timed in float32: {found.timings.where}; {link}"
    for arm, group in found.groups.items():
        if arm in found.timings.runs and found.timings.of(arm, group, BATCHES[0]) is None:
            run, macs = found.timings.runs[arm]
            yield f"not timed: {arm}: the file has {run} with {macs:,} multiply-adds, which is none of the row's"


def _computed_table(found: SetResults) -> str:
    """On what each row was computed, folded away."""
    rows: list[Row] = [*found.rows.values(), *found.tried.values()]
    lines = [_computed(row.group) for row in rows if row.group is not None]
    if not lines:
        return ""
    return (
        "<details><summary>precision, devices, versions, times</summary>\n\n"
        f"{markdown_rows(_COMPUTED, lines)}\n</details>\n"
    )


def _computed(group: Group) -> tuple[str, ...]:
    seconds = group.statistic("wall_seconds")
    assert seconds is not None
    results = [run.result for run in group.runs]
    epochs = dict.fromkeys(str(result["epochs"]) for result in results)
    commits = dict.fromkeys(str(result.get("commit") or "unknown")[:7] for result in results)
    return (
        *(group.label, "; ".join(group.devices), str(group.computed_on["torch"]), ", ".join(epochs)),
        *(duration(seconds.mean), ", ".join(commits)),
    )
