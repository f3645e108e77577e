"""Images, files and data sets that the tests of the data make, and how they check a refusal."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

DASH, DOT = "{stem}-{kind}-idx{dims}-ubyte", "{stem}-{kind}.idx{dims}-ubyte"  # the two spellings on Kaggle
NESTED = DASH + "/" + DASH  # a folder named like the file that it holds
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def idx_bytes(array) -> bytes:
    """Return an array as an IDX file of unsigned bytes, after the format's own description."""
    array = np.asarray(array, dtype=np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, images, labels, split: str = "train", spelling: str = DASH, gz: bool = False) -> None:
    """Write images and labels as two IDX files; None leaves one out."""
    stem = {"train": "train", "test": "t10k"}[split]
    for kind, dims, array in (("images", 3, images), ("labels", 1, labels)):
        if array is not None:
            path = folder / (spelling.format(stem=stem, kind=kind, dims=dims) + (".gz" if gz else ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(idx_bytes(array)) if gz else idx_bytes(array))


def write_csv(path: Path, images, labels=None) -> Path:
    """Write images as a Kaggle CSV, the label first, or none; fast enough for tens of thousands."""
    cells = [str(i) for i in range(256)]
    rows = np.asarray(images, np.uint8).reshape(len(images), -1)
    lines = [
        ",".join(f"pixel{i}" for i in range(rows.shape[1])),
        *(",".join([cells[v] for v in r]) for r in rows.tolist()),
    ]
    if labels is not None:
        lines = [f"{label},{line}" for label, line in zip(["label", *labels], lines, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def picture(path: Path, size=(20, 20), mode: str = "L", seed: int = 0, **options) -> np.ndarray:
    """Write a smooth random picture, width × height, and return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(path, **options)
    return np.array(image)


def refused(function, *arguments, kind=ValueError, **options) -> str:
    """Return the message, one line, with which a function refuses its arguments."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def unreadable(path: Path, content: bytes | None) -> None:
    """Replace a file by other content, or by a pipe."""
    path.unlink(missing_ok=True)
    os.mkfifo(path) if content is None else path.write_bytes(content)


class Items(Dataset):
    """A map-style data set of what a list holds."""

    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]
