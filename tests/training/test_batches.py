"""Batches and the held-out images."""

from __future__ import annotations

import pytest
import torch

from tkn.data.base import DataSet, Split
from tkn.training.batches import Batches, TensorDataModule


def _split(count: int) -> Split:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    return Split((images,), torch.arange(count))


@pytest.fixture
def data() -> DataSet:
    return DataSet("digits", "full", "classification", (1, 4, 4), 100, _split(100), _split(30))


def _to_input(batch: tuple[torch.Tensor, ...], augment: bool) -> torch.Tensor:
    return batch[0].float() + (0.5 if augment else 0)


def test_batches_in_order_cover_the_split() -> None:
    batches = Batches(_split(10), 4, _to_input)
    assert [targets.tolist() for _, targets in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3
    for x, targets in batches:
        assert torch.equal(x[:, 0, 0, 0], targets.float())


def test_shuffled_batches_follow_seed_and_epoch() -> None:
    epoch = 0
    batches = Batches(_split(50), 16, _to_input, seed=3, epoch=lambda: epoch)

    def order() -> list[int]:
        return [target for _, targets in batches for target in targets.tolist()]

    first = order()
    assert sorted(first) == list(range(50))
    assert first == order()
    epoch = 1
    assert sorted(order()) == list(range(50))
    assert order() != first
    x, targets = next(iter(batches))
    assert torch.equal(x[:, 0, 0, 0], targets + 0.5)  # training batches are augmented


def test_a_last_training_batch_of_one_image_is_left_out() -> None:
    sizes = [len(targets) for _, targets in Batches(_split(9), 4, _to_input, seed=0)]
    assert sizes == [4, 4]
    assert len(Batches(_split(9), 4, _to_input, seed=0)) == 2
    assert [len(targets) for _, targets in Batches(_split(9), 4, _to_input)] == [4, 4, 1]
    assert [len(targets) for _, targets in Batches(_split(3), 1, _to_input, seed=0)] == [1, 1, 1]


def test_validation_holds_out_the_last_images(data: DataSet) -> None:
    module = TensorDataModule(data, 8, limit=50, validation=20)
    assert module.train_split.targets.tolist() == list(range(30))
    assert module.eval_split.targets.tolist() == list(range(30, 50))
    assert module.eval_name == "valid"


def test_without_validation_the_test_set_is_evaluated(data: DataSet) -> None:
    module = TensorDataModule(data, 8)
    assert len(module.train_split) == 100
    assert module.eval_split is data.test
    assert module.eval_name == "test"


@pytest.mark.parametrize("limit", [0, -1, 101])
def test_impossible_limits(data: DataSet, limit: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.limit={limit} must be 1 to 100"):
        TensorDataModule(data, 8, limit=limit)


@pytest.mark.parametrize("validation", [-1, 50])
def test_impossible_validation(data: DataSet, validation: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.validation={validation} must be 0 to 49"):
        TensorDataModule(data, 8, limit=50, validation=validation)


def test_batches_continue_within_an_epoch() -> None:
    def noisy(batch: tuple[torch.Tensor, ...], _augment: bool) -> torch.Tensor:
        return batch[0].float() + torch.rand(len(batch[0]), 1, 1, 1)

    batches = Batches(_split(50), 16, noisy, seed=3)
    iterator = iter(batches)
    next(iterator)
    next(iterator)
    state = batches.state_dict()
    rest = list(iterator)
    again = Batches(_split(50), 16, noisy, seed=3)
    again.load_state_dict(state)
    for (x, targets), (x_again, targets_again) in zip(rest, list(again), strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(targets, targets_again)
    assert len(list(again)) == 4  # only the first epoch began later


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [48, 50, 53])
def test_processes_share_every_training_batch_and_the_evaluation(count: int, world: int) -> None:
    whole = [set(targets.tolist()) for _, targets in Batches(_split(count), 16, _to_input, seed=3)]
    parts = [list(Batches(_split(count), 16, _to_input, seed=3, rank=rank, world=world)) for rank in range(world)]
    assert {len(part) for part in parts} == {count // 16 + (count % 16 >= 2 * world)}
    for step, together in enumerate(zip(*parts, strict=True)):
        shares = [targets.tolist() for _, targets in together]
        assert sorted(target for share in shares for target in share) == sorted(whole[step])
        assert min(map(len, shares)) >= 2
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    evaluated = [
        target
        for rank in range(world)
        for _, targets in Batches(_split(count), 16, _to_input, rank=rank, world=world)
        for target in targets.tolist()
    ]
    assert evaluated == list(range(count))


def test_processes_draw_different_random_numbers() -> None:
    draws = []
    for rank in range(2):
        iterator = iter(Batches(_split(50), 16, _to_input, seed=3, rank=rank, world=2))
        for _ in range(2):
            next(iterator)
            draws.append(torch.rand(1).item())
    assert len(set(draws)) == 4
