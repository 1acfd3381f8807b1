"""What the comparison's differences come to."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_pays import ERRORS, write_pays_run, write_set
from scipy.stats import ttest_ind

from tkn.report.pays.design import SETS
from tkn.report.pays.rows import read_row
from tkn.report.pays.study import Study, read_study
from tkn.report.pays.verdicts import Primary, compare, holm


def _study(results: Path) -> Study:
    return read_study(results, results / "no_timings")


def _verdict(results: Path, name: str) -> Primary:
    return next(one for one in _study(results).verdicts if one.data.name == name)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((), ()),
        ((0.04,), (0.04,)),
        # 4 x 0.01, 3 x 0.013 but no less than the one before, 2 x 0.03, 1 x 0.5.
        ((0.5, 0.01, 0.03, 0.013), (0.5, 0.04, 0.06, 0.04)),
        ((0.6, 0.7), (1.0, 1.0)),
    ],
)
def test_holm(values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert holm(values) == pytest.approx(list(expected))


def test_welch(tmp_path: Path) -> None:
    errors = {"targeted": (1.0, 2.0, 3.0), "thin": (2.0, 4.0)}
    write_set(tmp_path, "casting", errors=errors)
    one, other = (read_row(tmp_path, f"pays_casting_{arm}").group for arm in errors)
    assert one is not None
    assert other is not None
    found = compare(one, other, "error")
    expected = ttest_ind(*errors.values(), equal_var=False)
    assert (found.between, found.n, found.obstacles) == (-1.0, (3, 2), ())
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert found.half == pytest.approx((high - low) / 2)


def test_verdicts(tmp_path: Path) -> None:
    write_set(tmp_path, "casting")
    write_set(tmp_path, "meter", errors={**ERRORS, "targeted": (0.90, 0.92, 0.91)})
    write_set(tmp_path, "faces", errors={**ERRORS, "targeted": (0.5, 0.7, 0.6)})
    write_set(tmp_path, "gtsrb", errors={**ERRORS, "targeted": (0.5,)})
    write_set(tmp_path, "mnist_dn10", errors={arm: ERRORS[arm] for arm in ("dense", "thin", "targeted")})
    found = {one.data.name: one for one in _study(tmp_path).verdicts}
    verdicts = {name: one.verdict for name, one in found.items() if name in ("casting", "meter", "faces", "gtsrb")}
    expected = {"casting": "ahead", "meter": "behind", "faces": "undecided", "gtsrb": "too few seeds"}
    assert verdicts == expected
    assert {one.rival for name, one in found.items() if name in expected} == {"pruned"}
    # Without one of the two rivals it is not the comparison that was fixed.
    assert (found["mnist_dn10"].verdict, found["mnist_dn10"].missing) == ("not run", ("pruned",))
    assert (found["tlmnist_cnn6"].verdict, found["tlmnist_cnn6"].rival) == ("not run", None)
    decided = [name for name, one in found.items() if one.adjusted is not None]
    assert decided == ["casting", "meter", "faces"]
    values = [one.comparison.p for one in found.values() if one.adjusted is not None and one.comparison is not None]
    assert [found[name].adjusted for name in decided] == holm([value for value in values if value is not None])


def test_the_rival_is_the_one_of_the_lower_mean(tmp_path: Path) -> None:
    write_set(tmp_path, "casting", errors={**ERRORS, "thin": (0.3, 0.31), "pruned": (0.2, 0.5)})
    found = _verdict(tmp_path, "casting")
    assert (found.rival, found.verdict) == ("thin", "behind")


def test_seeds_that_all_come_to_the_same(tmp_path: Path) -> None:
    write_set(tmp_path, "casting", errors={**ERRORS, "targeted": (0.1, 0.1), "pruned": (0.2, 0.2)})
    write_set(tmp_path, "meter", errors={**ERRORS, "targeted": (0.2, 0.2), "pruned": (0.2, 0.2)})
    assert (_verdict(tmp_path, "casting").verdict, _verdict(tmp_path, "casting").adjusted) == ("undecided", None)
    assert (_verdict(tmp_path, "meter").verdict, _verdict(tmp_path, "meter").adjusted) == ("undecided", 1.0)


@pytest.mark.parametrize(
    ("overrides", "changes", "obstacle"),
    [
        (("trainer.precision=32-true",), {"precision": "32-true"}, "precision bf16-mixed and 32-true"),
        ((), {"device": "NVIDIA H200"}, "device x86_64 cpu and NVIDIA H200"),
        ((), {"versions": {"torch": "2.11.0"}}, "torch 2.14.1 and 2.11.0"),
        ((), {"epochs": 10}, "epochs 20 and 10"),
        (("recipe.optimizer.lr=0.05",), {}, "recipe.optimizer.lr 0.1 and 0.05"),
        ((), {"data_source": "partial: data.limit=9 of full"}, "pays_casting_pruned had partial: data.limit=9 of full"),
    ],
)
def test_networks_that_do_not_compare_have_no_verdict(
    tmp_path: Path, overrides: tuple[str, ...], changes: dict[str, object], obstacle: str
) -> None:
    write_set(tmp_path, "casting", errors={arm: ERRORS[arm] for arm in ("dense", "thin", "targeted")})
    for seed, error in enumerate(ERRORS["pruned"]):
        write_pays_run(tmp_path, "casting_pruned", seed, error, *overrides, **changes)
    found = _verdict(tmp_path, "casting")
    assert found.comparison is not None
    assert (found.verdict, found.adjusted, found.comparison.obstacles) == ("no verdict", None, (obstacle,))


def test_threads_and_the_rate_of_rois_are_no_difference(tmp_path: Path) -> None:
    write_set(tmp_path, "casting", errors={arm: ERRORS[arm] for arm in ("dense", "thin", "pruned")})
    for seed, error in enumerate(ERRORS["targeted"]):
        device = f"x86_64 cpu, {seed + 1} threads"
        write_pays_run(tmp_path, "casting_targeted", seed, error, "recipe.attention_lr_factor=3", device=device)
    found = _verdict(tmp_path, "casting")
    assert (found.verdict, found.comparison is not None and found.comparison.n) == ("ahead", (3, 3))


def test_a_metric_that_runs_lack(tmp_path: Path) -> None:
    write_pays_run(tmp_path, "casting_targeted", 0, 1.0)
    group = read_row(tmp_path, "pays_casting_targeted").group
    assert group is not None
    with pytest.raises(ValueError, match=r"seed0/summary\.json has no mae"):
        compare(group, group, SETS["faces"].metric)
