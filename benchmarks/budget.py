"""Which kernels should shrink? `penalty=budget` beside a control that shrinks all scales alike, at equal multiply-adds.

    python benchmarks/budget.py OUT 3 model=tdn10 data=mnist penalty.share=0.35 ...

trains both with the seeds 0, 1, 2, with the other arguments as those of tkn-run, and prints the test errors, their
means, and the 95 % interval of the mean of the differences (Student's t, seeds paired).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import t as student
from torch import Tensor

import tkn
from tkn.cli import compose
from tkn.training import module


class AllAlike(tkn.Budget):
    """The control: scales do not learn, and all of them shrink at one rate; loc learns until the budget is met."""

    def apply(self) -> None:
        self.count.set(self.count.loc(), self._scale)
        super().apply()

    def rates(self, _loc: Tensor, scale: Tensor) -> Tensor:
        return torch.ones_like(scale, dtype=torch.float64)


WAYS: dict[str, type[tkn.Budget]] = {"budget": tkn.Budget, "all alike": AllAlike}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("seeds", type=int)
    arguments, overrides = parser.parse_known_args()
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):
        for way, kind in WAYS.items():
            module.Budget = kind  # type: ignore[misc]
            config = compose("penalty=budget", f"seed={seed}", *overrides)
            metrics, _ = tkn.run(config, arguments.out / way.replace(" ", "_") / f"seed{seed}")
            errors[way].append(metrics["error"])
            met = metrics["penalty"]["met"] / metrics["penalty"]["asked"]
            print(f"{way}, seed {seed}: error {metrics['error']:.2f} %, {met:.2%} of the budget", flush=True)
    for way, values in errors.items():
        print(f"{way}: {mean(values):.2f} %, n = {len(values)}")
    differences = [one - other for one, other in zip(*errors.values(), strict=True)]
    half = student.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    print(f"{' - '.join(WAYS)}: {mean(differences):+.2f} +- {half:.2f}, n = {len(differences)}")


if __name__ == "__main__":
    main()
