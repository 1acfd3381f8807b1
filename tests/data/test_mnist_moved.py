"""MNIST's digits at random places: whole, the same everywhere, among pieces of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tkn.data import load_data
from tkn.data.mnist import load_mnist
from tkn.data.mnist_moved import load_mnist_moved


def test_the_whole_digit_is_somewhere(tmp_path: Path) -> None:
    mnist = load_mnist(tmp_path, source="embedded")
    alone = load_mnist_moved(tmp_path, source="embedded", distractors=0)
    among = load_mnist_moved(tmp_path, source="embedded")
    assert (among.name, among.input_size, among.source) == ("mnist_moved", (1, 56, 56), mnist.source)
    assert (among.train.inputs[0] >= alone.train.inputs[0]).all()
    assert not torch.equal(among.train.inputs[0], alone.train.inputs[0])
    for digits, moved in ((mnist.train, alone.train), (mnist.test, alone.test)):
        (small,), (large,) = digits.inputs, moved.inputs
        assert large.shape == (len(small), 1, 56, 56)
        assert large.dtype == torch.uint8
        assert torch.equal(moved.targets, digits.targets)
        assert torch.equal(large.flatten(1).long().sum(1), small.flatten(1).long().sum(1))
        # Every side of the image has digits near it.
        places = large.flatten(0, 1).amax(dim=2).argmax(dim=1)
        assert places.min() < 8
        assert places.max() > 28
    first = alone.test.inputs[0][0, 0]
    rows, columns = (first.amax(dim=axis).nonzero()[[0, -1], 0].tolist() for axis in (1, 0))
    digit = mnist.test.inputs[0][0, 0]
    own_rows, own_columns = (digit.amax(dim=axis).nonzero()[[0, -1], 0].tolist() for axis in (1, 0))
    box = first[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
    assert torch.equal(box, digit[own_rows[0] : own_rows[1] + 1, own_columns[0] : own_columns[1] + 1])


def test_it_is_the_same_everywhere(tmp_path: Path) -> None:
    images = load_data("mnist_moved", tmp_path, source="embedded").test.inputs[0]
    assert images.long().sum() == 72_403_997
    assert torch.equal(images, load_mnist_moved(tmp_path, source="embedded").test.inputs[0])
    assert not torch.equal(images, load_mnist_moved(tmp_path, source="embedded", distractor_seed=1).test.inputs[0])


@pytest.mark.parametrize("key", ["distractors", "distractor_seed"])
def test_it_refuses_what_cannot_be(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}=-1 must not be negative"):
        load_mnist_moved(tmp_path, source="embedded", **{key: -1})
