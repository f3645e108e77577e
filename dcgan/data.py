"""Where images come from: a name, a folder, a file or an array becomes one uint8 tensor and its labels."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from .arrays import ImageData, checked, image_tensor, number_labels, read_dataset, read_pictures, spread
from .config import nearest_name
from .files import idx_digest, read_archive, read_csv, read_idx, read_pair, read_parquet


def project_file(name: str) -> Path:
    """Return a file of the project: beside this file where the package is joined to one, else above the package."""
    here = Path(__file__).resolve().parent
    default = (here.parent if __package__ else here) / name
    return next((folder / name for folder in (here, here.parent) if (folder / name).exists()), default)


EMBEDDED_MNIST = project_file("data/mnist")
KAGGLE_INPUT = Path(os.environ.get("DCGAN_KAGGLE_INPUT", "/kaggle/input"))  # the variable is for a stand-in of Kaggle
KAGGLE_MNIST = ("mnist-dataset", "mnist-in-csv", "digit-recognizer")  # hojjatk's, oddrationale's, the competition's
MNIST_SHA256 = {  # of the uncompressed IDX files; the gzip layer may differ from copy to copy
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# The competition shuffles all of MNIST into two tables; here are their numbers of images, sums and sums of squares of
# pixels: of train by the published mean 33.408911169825075 and deviation 78.677739760763, of test what then remains.
DIGIT_RECOGNIZER = {
    "train": (42_000, 1_100_088_627, 240_583_231_991),
    "test": (28_000, 732_133_118, 160_102_954_312),
}
TORCHVISION_SETS = {  # the class in torchvision.datasets and its options; emnist is its 26 letters
    "mnist": ("MNIST", {}), "fashion-mnist": ("FashionMNIST", {}), "kmnist": ("KMNIST", {}), "qmnist": ("QMNIST", {}),
    "emnist": ("EMNIST", {"split": "letters"}), "usps": ("USPS", {}), "svhn": ("SVHN", {}), "cifar10": ("CIFAR10", {}),
}  # fmt: skip
IDX_STEMS = {"train": "train", "test": "t10k"}
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "t10k", "val", "valid", "validation")}
PICTURE_NAME = re.compile(r"\.(png|jpe?g|webp|bmp)$", re.IGNORECASE)
IDX_NAME = re.compile(r"^(train|t10k)[-.](images|labels)[-.]idx[13][-.]ubyte(\.gz)?$")
TABLE_NAME = re.compile(r"^(?:.*[_-])?(train|test)(?:-0+-of-0*1)?\.(csv|npz|npy|parquet)$")
SEARCH_LIMIT = 20_000  # files looked at below each of Kaggle's mounts: some attached sets hold a million


def load_images(
    source: str | Path = "mnist",
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> ImageData:
    """Read images and labels, and print one line: number, size, channels, classes, file.

    source: "mnist" (Kaggle's mounts, the embedded files or a download), another of TORCHVISION_SETS, a folder of IDX or
    CSV files, a folder of pictures (flat, or one folder per class), or a .csv, .npz, .npy or .parquet file.
    split: "train" | "test". size: side in pixels. channels: 1 | 3. limit: that many images, evenly spaced.
    Returns (images, labels), see `ImageData`. Raises FileNotFoundError for a missing file, ValueError for a bad one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}; it is 'train' or 'test'")
    allowed = {"size": range(1, 4097), "channels": (1, 3), "limit": range(1, 10**9)}
    options = {"size": size, "channels": channels, "limit": limit}
    for name, value in options.items():
        known = value is None or (isinstance(value, Integral) and value in allowed[name])
        if not known or isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}; needed: limit=1 …, size=1 … 4096, channels=1 or 3, or None")
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise ValueError(f"source = {source!r}; needed: a name such as 'mnist', or the path of a folder or file")
    if (name := str(source).lower()) in TORCHVISION_SETS:
        found = find_mnist(split) if name == "mnist" else read_torchvision(name, split)
    else:
        found = read_path(Path(os.path.expanduser(source)), split, options)
        name = "mnist" if is_mnist(found, split) else os.path.abspath(os.path.expanduser(source))
    found.name, keep = name, spread(len(found.images), limit)
    if len(keep) < len(checked(found).images):
        found = ImageData(found.images[keep], found.labels[keep], found.classes, name, found.origin)
    found = fitted(found, size, channels)
    say(f"{split} images: {found}")
    return found


def as_images(data: Any, size: int | None = None, channels: int | None = None) -> ImageData:
    """Return what `train(data=…)` takes as square images and labels that share no memory with the caller's.

    data: a source of `load_images`, a tensor or array (N, H, W) or (N, C, H, W) of any integer type with values
    0 … 255, a pair (images, labels), or a map-style Dataset of (image, label). size, channels: as for `load_images`.
    Raises ValueError, and FileNotFoundError for a path.
    """
    if isinstance(data, (str, os.PathLike)):
        found = load_images(data, size=size, channels=channels)
    elif isinstance(data, ImageData):
        found = ImageData(data[0].clone(), data[1].clone(), data.classes, data.name, data.origin)
    elif isinstance(data, (Tensor, np.ndarray)):
        images = image_tensor(data)
        found = checked(ImageData(images, torch.full((len(images),), -1)))
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        found = checked(ImageData(image_tensor(data[0]), *number_labels(data[1])))
        if found.classes and found.classes[0] != "0":
            say(f"data: {found}")
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (tuple, list, dict, bytes)):
        found = checked(read_dataset(data, size, channels))
        say(f"data: {found}")
    else:
        needed = "a name or path, images, (images, labels), or a Dataset of them"
        raise ValueError(f"data is a {type(data).__name__}; needed: {needed}")
    if (shape := found.images.shape[-2:])[0] != shape[1]:
        raise ValueError(f"{found.origin}: images of {shape[0]}×{shape[1]} are not square; crop or pad them first")
    return fitted(found, size, channels)


def fitted(data: ImageData, size: int | None, channels: int | None) -> ImageData:
    """Return the data resized to `size` and turned into 1 or 3 channels, where given; raises ValueError."""
    images, origin, (height, width) = data.images, data.origin, data.images.shape[-2:]
    found = images.shape[1] if images.ndim == 4 else 1
    if channels == 1 and found == 3:
        images = tvf.rgb_to_grayscale(images)[:, 0]
    elif channels == 3 and found == 1:
        images = images.reshape(-1, 1, height, width).repeat(1, 3, 1, 1)
    elif channels and channels != found:
        raise ValueError(f"{origin}: images have {found} channels; channels = {channels} is made of 1 or 3")
    if size and (height, width) != (size, size):
        images, origin = resize_images(images, size), f"{origin}, resized from {height}×{width}"
    return ImageData(images, data.labels, data.classes, data.name, origin)


def say(text: str) -> None:
    """Print a line, also where the output is closed or lacks some of the characters."""
    with suppress(OSError, ValueError, LookupError):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding))


# ------------------------------------------------------------------------------------------------------ where MNIST is
def find_mnist(split: str) -> ImageData:
    """Return MNIST from Kaggle's mounts, the embedded files or torchvision's download, whichever comes first."""
    patterns = [p for slug in KAGGLE_MNIST for p in (f"datasets/*/{slug}", f"competitions/{slug}", slug)]
    known = [place for p in patterns for place in sorted(KAGGLE_INPUT.glob(p))]  # to search all can take long
    attached, tried = "", set()
    for place in [*known, KAGGLE_INPUT]:
        for path, read in readers(walk(place, SEARCH_LIMIT), split):
            if path in tried or path.suffix in (".npz", ".npy", ".parquet"):  # MNIST is attached as IDX or CSV
                continue
            tried.add(path)
            try:
                if is_mnist(data := read(), split):
                    return ImageData(*data, data.classes, "mnist", f"Kaggle's {path}")
                attached = f"; attached is {path}, which is not MNIST"
            except (OSError, ValueError) as error:  # whatever else is attached must not stop the search
                attached = f"; attached is what cannot be read: {error}"
    for path, read in readers(walk(EMBEDDED_MNIST), split):
        if is_mnist(data := read(), split):
            return ImageData(*data, data.classes, "mnist", f"the embedded {'/'.join(path.parts[-3:])}")
        raise ValueError(f"{path}, or its labels, is not MNIST's (its SHA-256 differs); restore it from the repository")
    try:
        return read_torchvision("mnist", split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{attached}") from error


def is_mnist(data: ImageData, split: str) -> bool:
    """Return whether the content is MNIST's by its checksums, or the digits of the competition's table in any order."""
    images, labels = data
    number, *sums = DIGIT_RECOGNIZER[split]
    if images.shape[1:] != (28, 28) or len(labels) != len(images):
        return False
    if len(images) != number:
        parts = {"images": images, "labels": labels.to(torch.uint8)}
        return all(idx_digest(part) == MNIST_SHA256[f"{IDX_STEMS[split]}-{kind}"] for kind, part in parts.items())
    counts = sum(part.flatten().bincount(minlength=256) for part in images.split(4096))
    if [int((counts * torch.arange(256) ** k).sum()) for k in (1, 2)] == sums:
        return True
    with suppress(OSError, ValueError):  # some other choice of that many digits, where MNIST is at hand
        files = [read_idx(path, dims=3) for path in sorted(EMBEDDED_MNIST.glob("*-images*"))]
        known = {image.tobytes() for file in files for image in file.numpy()}
        return all(image.tobytes() in known for image in images.numpy())
    return False


def read_torchvision(name: str, split: str) -> ImageData:
    """Return one of TORCHVISION_SETS, downloaded into data/download on first use."""
    from torchvision import datasets

    kind, options = TORCHVISION_SETS[name]
    part = {"split": split} if name == "svhn" else {"train": split == "train"}
    folder = EMBEDDED_MNIST.parent if os.access(EMBEDDED_MNIST.parent, os.W_OK) else Path("data")  # Kaggle: read-only
    try:
        data = getattr(datasets, kind)(folder / "download", download=True, **part, **options)
    except (RuntimeError, OSError, ImportError) as error:  # SVHN needs scipy
        raise FileNotFoundError(
            f"{name} is not on this machine and could not be downloaded ({error!r:.200}); turn the internet on, "
            "or pass a folder of its files (MNIST on Kaggle: Add Input → hojjatk/mnist-dataset)"
        ) from error
    images, labels = image_tensor(data.data, name), np.asarray(data.labels if name == "svhn" else data.targets)
    images = images.transpose(1, 2).contiguous() if name == "emnist" else images  # its files hold columns first
    names = [c.split(" - ")[0] for c in getattr(data, "classes", ())]  # "0 - zero"
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST: the class, then the writer
    return ImageData(images, *number_labels(labels, names, name), name, f"torchvision's {name}")


# ------------------------------------------------------------------------------------------------- folders and files
def walk(folder: Path, limit: int = 2_000_000) -> list[Path]:
    """Return the files in a folder, in order, down to six folders deep; hidden ones are left out."""
    files: list[Path] = []
    for name, folders, names in os.walk(folder, followlinks=True):
        place = Path(name)
        deep = len(place.parts) - len(folder.parts) >= 6
        below = [] if deep else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        folders[:] = [f for f in below if not place.resolve().is_relative_to((place / f).resolve())]  # a link upwards
        files += [place / name for name in sorted(names) if not name.startswith(".")]
        if len(files) >= limit:
            break
    return files[:limit]


def readers(files: Sequence[Path], split: str) -> Iterator[tuple[Path, Callable[[], ImageData]]]:
    """Yield what reads each pair of IDX files and each table of a split, with a file's name; the shallow ones first."""
    pairs: dict[Path, dict[str, Path]] = {}
    for path in sorted(files, key=lambda p: len(p.parts)):
        if (m := IDX_NAME.match(path.name)) and m[1] == IDX_STEMS[split]:
            place = path.parent.parent if IDX_NAME.match(path.parent.name) else path.parent  # Kaggle wraps files
            pairs.setdefault(place, {}).setdefault(m[2], path)
    yield from ((pair["images"], partial(read_pair, pair)) for pair in pairs.values() if len(pair) == 2)
    tables = [path for path in files if (m := TABLE_NAME.match(path.name)) and m[1] == split]
    yield from ((path, partial(read_file, path, split, {})) for path in sorted(tables, key=lambda p: len(p.parts)))


def read_file(path: Path, split: str, options: dict[str, int | None]) -> ImageData:
    """Return what a table or archive holds, by its ending; raises ValueError."""
    ending = path.suffix.lower()
    if ending == ".csv":
        return read_csv(path)
    if ending in (".npz", ".npy"):
        return read_archive(path, split)
    if ending == ".parquet":
        return read_parquet(path, options.get("size"), options.get("channels"), options.get("limit"))
    raise ValueError(f"{path} does not end in .csv, .npz, .npy or .parquet; of IDX files and pictures, pass the folder")


def read_path(path: Path, split: str, options: dict[str, int | None]) -> ImageData:
    """Return what a file or a folder holds of a split; raises FileNotFoundError that lists what was looked for."""
    if path.is_file():
        if split == "test" and path.suffix != ".npz" and not any(n in path.name.lower() for n in SPLIT_NAMES["test"]):
            raise FileNotFoundError(f"{path} is one file and no test split; pass a folder that has both")
        return read_file(path, split, options)
    if not path.is_dir():
        if os.path.lexists(path):
            raise ValueError(f"{path} is neither a file nor a folder, but a pipe, a device or a broken link")
        known = nearest_name(str(path), [*TORCHVISION_SETS])
        raise FileNotFoundError(f"source = {str(path)!r} is no file, no folder and no known name{known}")
    files = walk(path)
    for _, read in readers(files, split):
        return read()
    if pictures := [file for file in files if PICTURE_NAME.search(file.name)]:
        return read_folder(path, pictures, split, options)
    seen = ", ".join(str(p.relative_to(path)) for p in files[:8]) or "nothing"
    raise FileNotFoundError(
        f"no {split} images in {path}: looked up to six folders deep for {IDX_STEMS[split]}-images-idx3-ubyte[.gz] "
        f"with {IDX_STEMS[split]}-labels-idx1-ubyte[.gz], for *{split}.csv, .npz and .parquet, and for PNG, JPEG, WebP "
        f"and BMP files; it holds {seen}{' …' if len(files) > 8 else ''}"
    )


def read_folder(folder: Path, pictures: list[Path], split: str, options: dict[str, int | None]) -> ImageData:
    """Return the pictures of a split: of its folder train or test, else all for train; each folder in it is a class."""
    homes = {home: home.relative_to(folder).parts for home in {p.parent for p in pictures}}
    tops = {parts[0].lower() if parts else "" for parts in homes.values()}
    divided = tops <= {*SPLIT_NAMES["train"], *SPLIT_NAMES["test"]}
    top = next((name for name in SPLIT_NAMES[split] if name in tops), None) if divided else None
    if (divided and not top) or (split == "test" and not divided):
        raise FileNotFoundError(
            f"no {split} images in {folder}: it has no folder {split}, only {', '.join(sorted(tops)[:8])}"
        )
    kinds = {home: (parts[divided:] or ("",))[0] for home, parts in homes.items()}
    classes = sorted(set(kinds.values()), key=lambda c: (0, int(c), c) if c.isdecimal() else (1, 0, c))
    if "" in classes and len(classes) > 1:
        raise ValueError(
            f"{folder} holds pictures beside folders of pictures ({', '.join(classes[1:4])}); keep one kind"
        )
    pictures = [p for p in pictures if not divided or homes[p.parent][0].lower() == top]
    pictures = [pictures[i] for i in spread(len(pictures), options.get("limit")).tolist()]
    size, channels = options.get("size"), options.get("channels")
    images, kept, origin = read_pictures(pictures.__getitem__, len(pictures), size, channels, str(folder))
    if classes == [""]:
        return ImageData(images, torch.full((len(images),), -1), None, None, origin)
    labels = torch.tensor([classes.index(kinds[pictures[i].parent]) for i in kept])
    return ImageData(images, labels, tuple(classes), None, origin)


# ------------------------------------------------------------------------------------------------------- size and range
def resize_images(images: Tensor, size: int) -> Tensor:
    """Resize square uint8 images (N, S, S) or (N, C, S, S) to `size`, as torchvision's Resize(antialias=True) does."""
    height, width = images.shape[-2:]
    if height != width or not height:
        raise ValueError(f"images of {height}×{width} are not square; crop or pad them first")
    if height == size:
        return images
    parts = [tvf.resize(part if part.ndim == 4 else part[:, None], [size, size]) for part in images.split(4096)]
    return torch.cat(parts).view(*images.shape[:-2], size, size)


def normalize(images: Tensor) -> Tensor:
    """Map uint8 (N, H, W) or (N, C, H, W) to float32 (N, C, H, W) in [-1, 1], the range of the generator's tanh."""
    return (images if images.ndim == 4 else images.unsqueeze(1)).float().div_(127.5).sub_(1)
