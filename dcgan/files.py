"""Files of images: IDX, CSV, npz and Parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import re
import warnings
import zipfile
import zlib
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .arrays import ImageData, check_memory, image_tensor, number_labels, read_pictures, regular_file, spread

LABEL_COLUMNS, INDEX_COLUMNS = ("label", "labels", "class", "target"), ("", "unnamed: 0", "index", "id")
NUMBER = re.compile(r"\s*-?\d+(\.\d*)?\s*")


def read_idx(path: str | Path, sha256: str | None = None, dims: int | None = None) -> Tensor:
    """Read an IDX file (plain or gzip) into a uint8 tensor of the shape that its header names.

    sha256: of the uncompressed content, checked when given. dims: 3 for images, 1 for labels, checked when given.
    Raises ValueError for an empty, truncated, mislabeled or foreign file and for a wrong checksum.
    """
    path, body = regular_file(path), bytearray()
    with path.open("rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        try:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                what = "is not an IDX file of unsigned bytes (its first bytes are not 00 00 08)" if head else "is empty"
                raise ValueError(f"{path} {what}; fetch it again")
            if dims is not None and head[3] != dims:
                found = {1: "labels", 3: "images"}.get(head[3], f"{head[3]}-dimensional data")
                raise ValueError(f"{path} holds {found}, {dims} dimensions are needed; are two files swapped?")
            sizes = file.read(4 * head[3])
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * head[3], 4)]
            check_memory(need := math.prod(shape), path)
            while part := file.read(min(2**24, need + 1 - len(body))):  # a byte more than needed ends a sound gzip
                body += part
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error!r:.200}); fetch it again") from error
    if len(sizes) < 4 * head[3] or len(body) != need:
        raise ValueError(f"{path} is truncated or padded: {len(body):,} bytes where {shape} needs {need:,}")
    content = torch.frombuffer(body or bytearray(1), dtype=torch.uint8)[:need].reshape(shape)
    if sha256 and idx_digest(content) != sha256:
        raise ValueError(f"{path} is not the file it should be (its SHA-256 differs); restore it from the repository")
    return content


def idx_digest(content: Tensor) -> str:
    """Return the SHA-256 of a uint8 tensor as an IDX file holds it."""
    sizes = b"".join(n.to_bytes(4, "big") for n in content.shape)
    digest = hashlib.sha256(bytes([0, 0, 8, content.ndim]) + sizes)
    digest.update(content.contiguous().numpy())
    return digest.hexdigest()


def read_csv(path: str | Path) -> ImageData:
    """Read a table of square images: a column for each pixel and, where there are, of labels and of row numbers.

    The label's column is named label, class or target; without a header it is the first or the last. Returns images
    uint8 (N, H, H) and labels int64 (N,), see `ImageData`. Raises ValueError.
    """
    path = regular_file(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark of their own
            header, n, label, index = table_columns(list(islice(csv.reader(file), 1000)))
        pixel = np.array([i not in (label, index) for i in range(n)], bool)
        side = math.isqrt(pixel.sum())
        if side < 4 or side * side != pixel.sum():
            raise ValueError(f"{pixel.sum()} pixel columns, not a square number such as 784 (and 'label')")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no rows: said below
            warnings.simplefilter("error", DeprecationWarning)  # numpy 2.0 would read 1.5 as 1
            table = np.loadtxt(
                path, [(f"{i}", "u1" if p else "U100") for i, p in enumerate(pixel)], comments=None, delimiter=",",
                quotechar='"', skiprows=int(header), ndmin=1, encoding="utf-8-sig",
            )  # fmt: skip
    except (ValueError, DeprecationWarning, csv.Error) as error:
        what = "a cell that is not a whole number 0 … 255: " if "convert" in str(error) else ""
        what = "text that is not UTF-8, save it so: " if isinstance(error, UnicodeDecodeError) else what
        raise ValueError(f"{path} has {what}{error}") from error
    if not len(table):
        raise ValueError(f"{path} has a header and no rows")
    images = table.view(np.uint8).reshape(len(table), -1)[:, np.repeat(pixel, np.where(pixel, 1, 400))]
    labels = np.full(len(table), -1) if label is None else np.char.strip(table[str(label)])
    for kind in (np.int64, np.float64):
        with suppress(ValueError, OverflowError):
            labels = labels.astype(kind) if labels.dtype.kind == "U" else labels
    images = torch.from_numpy(images).reshape(-1, side, side)
    return ImageData(images, *number_labels(labels, origin=str(path)), None, str(path))


def table_columns(rows: list[list[str]]) -> tuple[bool, int, int | None, int | None]:
    """Return, by a table's first rows, whether it has a header, its number of columns, the label's and the index's."""
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    n, rows = len(names), [row for row in rows if len(row) == len(names)]
    texts = [sum(not NUMBER.fullmatch(cell) for cell in row) for row in rows[:2]] + [0, 0]
    if texts[0] > texts[1] or set(names) & set(LABEL_COLUMNS) or names == [str(i) for i in range(n)]:
        label, index = (next((i for i in range(n) if names[i] in a), None) for a in (LABEL_COLUMNS, INDEX_COLUMNS))
        return True, n, label, index
    extra = n - math.isqrt(n) ** 2
    counted = len(rows) > 99 and all(row[0].strip() in (str(i), str(i + 1)) for i, row in enumerate(rows))
    index = 0 if extra == 2 or (extra == 1 and counted) else None

    def rank(i: int) -> tuple[bool, float]:
        """Return how little a column looks like labels: these vary, and stay below pixels."""
        cells = {row[i] for row in rows}
        return len(cells) == 1, len(cells) > 1 and max(float(c) if NUMBER.fullmatch(c) else -1 for c in cells)

    one = extra - (index is not None) == 1
    return False, n, min((extra - 1, n - 1), key=rank) if one else None, index


def read_archive(path: Path, split: str) -> ImageData:
    """Return what an .npz or .npy file holds, of two splits the one; raises ValueError, or FileNotFoundError."""
    try:
        if path.suffix.lower() == ".npy":
            images, labels, names = np.load(regular_file(path), mmap_mode="r", allow_pickle=False), None, ["images"]
        else:
            with zipfile.ZipFile(regular_file(path)) as file:
                check_memory(sum(member.file_size for member in file.infolist()), path)
            with np.load(path, allow_pickle=False) as file:
                names = file.files
                images, labels = (None if key is None else file[key] for key in archive_keys(names, split, path.name))
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
        raise ValueError(f"{path} cannot be read ({error!r:.200})") from error
    if images is None:
        raise FileNotFoundError(f"{path} holds no {split} images, only {', '.join(names)[:200] or 'nothing'}")
    images = image_tensor(images, str(path))
    labels = np.full(len(images), -1) if labels is None else labels
    return ImageData(images, *number_labels(labels, (), str(path)), None, str(path))


def archive_keys(names: list[str], split: str, file_name: str) -> tuple[str | None, str | None]:
    """Return the names of a split's images and of its labels, None for what is not there."""
    keys = [name for name in names if split in name.lower()]
    if not keys and (split == "train" or "test" in file_name.lower()):
        keys = [name for name in names if not re.search("train|test|val", name, re.IGNORECASE)]
    labels = next((key for key in keys if re.search("label|target|class|^y|arr_1", key, re.IGNORECASE)), None)
    return next((key for key in keys if key != labels), None), labels


def read_parquet(path: Path, size: int | None, channels: int | None, limit: int | None) -> ImageData:
    """Return the pictures, encoded as files, in a table's column, and the labels in another; needs pandas."""
    try:
        import pandas

        frame = pandas.read_parquet(regular_file(path))
        cells = next((frame[c].tolist() for c in frame if isinstance(frame[c].iloc[0], (bytes, dict))), None)
        if cells is None:
            raise ValueError("no column of encoded pictures")
    except Exception as error:  # pandas or its engine is not there; or one of their many kinds
        raise ValueError(f"{path} cannot be read ({error!r:.200}); reading it takes pandas and pyarrow") from error
    column = next((frame[c].tolist() for c in frame if str(c).lower() in LABEL_COLUMNS), [-1] * len(cells))
    labels, classes = number_labels(column, (), str(path))
    chosen = spread(len(cells), limit)
    pictures = [cell["bytes"] if isinstance(cell, dict) else cell for cell in (cells[i] for i in chosen.tolist())]
    images, kept, origin = read_pictures(pictures.__getitem__, len(pictures), size, channels, str(path))
    return ImageData(images, labels[chosen][kept], classes, None, origin)


def read_pair(pair: dict[str, Path]) -> ImageData:
    """Return the images and labels of two IDX files."""
    images, labels = read_idx(pair["images"], dims=3), read_idx(pair["labels"], dims=1)
    return ImageData(images, *number_labels(labels, (), str(pair["labels"])), None, str(pair["images"]))
