"""Every claim of the paper that runs can bear out, and whether the recorded ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from tkn.models import BASE
from tkn.report import figure5
from tkn.report.claims import recorded
from tkn.report.compare import Pair, best_pair, plus_half
from tkn.report.paper import PAPER
from tkn.report.runs.groups import Statistic, plus_minus
from tkn.report.tables.formats import markdown_rows
from tkn.report.tables.sheets import Column, millions

#: So many percentage points, or units of a mean squared error, more are still "the same error".
SAME = 0.1
#: Of the paper's factor of fewer multiply-adds so much must be reached.
REACHED = 0.9
#: So many times the parameters are nearly as many.
NEARLY = 1.01
_COLUMNS = (
    *(Column("where", right=False), Column("the paper's claim", right=False), Column("here", right=False)),
    Column("verdict", right=False),
)


@dataclass(frozen=True)
class Outcome:
    """What recorded runs say of a claim: in words, and "reproduced", "not reproduced", "undecided", "not tested"
    or "not run"."""

    here: str
    verdict: str


NOT_RUN = Outcome("", "not run")
Check = Callable[[Path], Outcome]


def verdicts_table(results: Path) -> str:
    """Markdown: a row for every claim."""
    rows = []
    for where, claim, check in CLAIMS:
        outcome = check(results)
        rows.append((where, claim, outcome.here, outcome.verdict))
    return markdown_rows(_COLUMNS, rows)


def _pair(one: str, other: str, results: Path) -> Pair | None:
    return best_pair(recorded(results / one), recorded(results / other))


def _error(one: str, other: str, results: Path, *, below: float) -> Outcome:
    """Whether the error of `one` is that of `other` and less than `below` more: 0 of a lower one."""
    pair = _pair(one, other, results)
    if pair is None:
        return NOT_RUN
    (name, *_) = pair.one.errors
    between, half = pair.difference(name)
    figures = " against ".join(_figure(group.statistic(name), name) for group in (pair.one, pair.other))
    text = f"{figures}: {plus_half(between, half)} (n = {pair.n})"
    if not pair.alike:
        return Outcome(f"{text}; computed differently: {pair.conditions}", "undecided")
    if half is None:
        return Outcome(text, "undecided")
    if between + half < below:
        return Outcome(text, "reproduced")
    return Outcome(text, "not reproduced" if between - half > below else "undecided")


def _figure(statistic: Statistic | None, name: str) -> str:
    assert statistic is not None
    return plus_minus(Statistic(statistic.n, statistic.mean, None), name) + " %" * (name == "error")


def _fewer(experiments: tuple[str, ...], results: Path, *, least: float | None = None) -> Outcome:
    """Whether the networks have so many times fewer multiply-adds than dense; None: nearly the paper's factor."""
    found = {name: groups for name in experiments if (groups := recorded(results / name))}
    if not found:
        return NOT_RUN
    factors = {name: max(groups, key=lambda group: len(group.runs)).times_fewer for name, groups in found.items()}
    wanted = least or REACHED * _paper_factor(experiments[0])
    count = sum(max(len(group.runs) for group in groups) for groups in found.values())
    text = f"{', '.join(f'{factor:.1f}' for factor in factors.values())} times fewer (n = {count})"
    if min(factors.values()) < wanted:
        return Outcome(text, "not reproduced")
    return Outcome(text, "reproduced" if len(found) == len(experiments) else "undecided")


def _paper_factor(experiment: str) -> float:
    row = PAPER[experiment]
    (dense,) = (other for other in PAPER.values() if (other.model, other.data) == (BASE[row.model], row.data))
    return dense.macs / row.macs


def _parameters(results: Path) -> Outcome:
    pair = _pair("table2_tdn10_cauchy", "table2_dn10", results)
    if pair is None:
        return NOT_RUN
    ours, theirs = pair.one.common["parameters"], pair.other.common["parameters"]
    return Outcome(
        f"TDN10 {ours:,} parameters, DN10 {theirs:,}",
        "reproduced" if theirs <= ours < NEARLY * theirs else "not reproduced",
    )


def _scaling_beta(results: Path) -> Outcome:
    """Figure 4: fewer multiply-adds by a larger beta than by a larger l2."""
    pair = _pair("figure4_e", "figure4_c", results)
    if pair is None:
        return NOT_RUN
    (more_beta, more_l2), (between, half) = (
        (pair.one.statistic("macs_roi"), pair.other.statistic("macs_roi")),
        (pair.difference("macs_roi")),
    )
    assert more_beta is not None
    assert more_l2 is not None
    text = f"{millions(more_beta.mean)} against {millions(more_l2.mean)} (n = {pair.n})"
    if half is None or not pair.alike or abs(between) <= half:
        return Outcome(text, "undecided")
    return Outcome(text, "reproduced" if between < 0 else "not reproduced")


def _tuned_by_l2(results: Path) -> Outcome:
    """Figure 5: a stronger penalty leaves fewer multiply-adds, for every beta."""
    found = figure5.lines(results)
    macs = {
        beta: [statistic.mean for group in groups if (statistic := group.statistic("macs_roi"))]
        for beta, groups in found.items()
        if len(groups) > 1
    }
    if not macs:
        return NOT_RUN
    text = "; ".join(f"β = {beta}: {' > '.join(map(millions, values))}" for beta, values in macs.items())
    falling = all(before > after for values in macs.values() for before, after in pairwise(values))
    return Outcome(text, "reproduced" if falling else "not reproduced")


def _larger_beta(results: Path) -> Outcome:
    return Outcome(*figure5.verdict(figure5.lines(results)))


def _not_tested(_results: Path, *, why: str) -> Outcome:
    return Outcome(why, "not tested")


_TKN6 = ("table2_tkn6_cauchy", "table2_tkn6_gaussian", "table3_tkn6_cauchy_beta2", "table3_tkn6_cauchy_beta4")
#: (where the paper claims it, what, how it is checked).
CLAIMS: tuple[tuple[str, str, Check], ...] = (
    (
        "abstract",
        "around an order of magnitude less computation: TKN6, at least 7 times",
        partial(_fewer, _TKN6, least=7),
    ),
    ("abstract", "the network's size stays nearly the same", _parameters),
    (
        "Sec. 4.4, Table 2",
        "TKN6 matches CNN6 on MNIST",
        partial(_error, "table2_tkn6_cauchy", "table2_cnn6", below=SAME),
    ),
    ("", "with 13 times fewer multiply-adds", partial(_fewer, ("table2_tkn6_cauchy",))),
    ("", "TDN10 makes 21 % fewer errors than DN10", partial(_error, "table2_tdn10_cauchy", "table2_dn10", below=0)),
    ("", "with 1.8 times fewer multiply-adds", partial(_fewer, ("table2_tdn10_cauchy",))),
    (
        "Sec. 4.4",
        "the Gaussian window is far more difficult to tune",
        partial(_not_tested, why="both took the same settings; nothing was tuned"),
    ),
    (
        "Sec. 4.4, Table 3",
        "TKN6 makes fewer errors than CNN6 on tlMNIST",
        partial(_error, "table3_tkn6_cauchy_beta2", "table3_cnn6", below=0),
    ),
    ("", "TDN10 makes 24 % fewer errors than DN10", partial(_error, "table3_tdn10_cauchy", "table3_dn10", below=0)),
    (
        "",
        "TDN10's error on tlMNIST is that on MNIST: no effect of distractors",
        partial(_error, "table3_tdn10_cauchy", "table2_tdn10_cauchy", below=SAME),
    ),
    (
        "Sec. 4.4, Table 4",
        "TDN40 matches DN40 on SVHN",
        partial(_error, "table4_tdn40_cauchy", "table4_dn40", below=SAME),
    ),
    ("Sec. 4.4, Table 5", "TSTN matches STN on GTSRB", partial(_error, "table5_tstn_cauchy", "table5_stn", below=SAME)),
    ("", "with nearly 3 times fewer multiply-adds", partial(_fewer, ("table5_tstn_cauchy",))),
    (
        "Sec. 4.4, Table 6",
        "TDN40 matches DN40 on faces",
        partial(_error, "table6_tdn40_cauchy", "table6_dn40", below=SAME),
    ),
    ("", "with 2 times fewer multiply-adds", partial(_fewer, ("table6_tdn40_cauchy",))),
    (
        "Sec. 5",
        "DN10's error on tlMNIST is that on MNIST: attention without windows",
        partial(_error, "table3_dn10", "table2_dn10", below=SAME),
    ),
    (
        "Fig. 4",
        "(d), l2 = 1e-4 and β = 2, makes fewer errors than (c), 2e-4 and 1, at a similar cost",
        partial(_error, "table3_tdn10_cauchy", "figure4_c", below=0),
    ),
    ("", "(e), a larger β, has fewer multiply-adds than (c), a larger l2", _scaling_beta),
    ("Sec. 5, Fig. 5", "l2 tunes the trade of speed and accuracy", _tuned_by_l2),
    ("", "larger β give better trades", _larger_beta),
)
