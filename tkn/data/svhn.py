"""SVHN, the cropped street-view house numbers (Sec. 4.1): 32x32 RGB digits in MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tkn.data.base import DataSet, Split, check_source, describe_counts
from tkn.data.download import fetch
from tkn.data.preparation import Preparation

BASE_URL = "http://ufldl.stanford.edu/housenumbers"
#: file name -> md5, as torchvision.datasets.SVHN lists them
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
FULL_COUNTS = (73_257, 26_032)


def load_svhn(data_dir: Path, *, source: str = "auto") -> DataSet:
    """The 73,257 / 26,032 cropped digits (Sec. 4.1): uint8 [N, 3, 32, 32], labels 0-9 as int64 [N].

    Reads `data_dir/svhn/{train,test}_32x32.mat`, downloading what is missing. `source="full"` refuses files with
    fewer images; `"auto"` reads them and says so in `DataSet.source`. FileNotFoundError for a file that is neither
    there nor to be had; ValueError for an unknown `source` or a file in another format.
    """
    check_source(source)
    folder = data_dir / "svhn"
    for name, md5 in MD5.items():
        path = folder / name
        if not path.is_file():
            try:
                fetch([f"{BASE_URL}/{name}"], path, md5)
            except OSError as error:
                raise FileNotFoundError(f"{error}; put the file there by hand, or choose another data_dir") from error
    train, test = (_read(folder / name) for name in MD5)
    return DataSet(
        name="svhn",
        source=describe_counts(source, folder, (len(train), len(test)), FULL_COUNTS),
        task="classification",
        input_size=(3, 32, 32),
        num_outputs=10,
        train=train,
        test=test,
        classes=tuple(map(str, range(10))),
        preparation=Preparation(3, (32, 32)),
    )


def _read(path: Path) -> Split:
    """X uint8 [32, 32, 3, N] (H, W, C, N) and y [N, 1] in 1..10 of one file, as a Split."""
    from scipy.io import loadmat  # here, for it takes long to import

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"], content["y"]
    except Exception as error:  # what loadmat raises on a damaged file depends on the damage
        raise ValueError(f"{path} is not a readable SVHN file ({type(error).__name__}: {error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f"{path}: X is {images.dtype} {list(images.shape)}, expected uint8 [32, 32, 3, N]")
    if labels.dtype.kind not in "iuf" or labels.shape != (images.shape[3], 1):
        raise ValueError(f"{path}: y is {labels.dtype} {list(labels.shape)}, expected numbers {[images.shape[3], 1]}")
    if not np.isin(labels, range(1, 11)).all():
        raise ValueError(f"{path}: y runs from {labels.min()} to {labels.max()}, expected whole numbers in 1..10")
    return Split(
        (torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1))),),
        torch.from_numpy(labels[:, 0].astype(np.int64) % 10),  # digit 0 is stored as 10
    )
