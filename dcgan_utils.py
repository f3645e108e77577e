"""Train DCGANs on MNIST, watch their health, repair them and look at what they made.

    from dcgan_utils import FastDCGAN

    gan = FastDCGAN()
    gan.train(max_seconds=40)                 # a real-vs-fake grid and a health panel after every epoch
    gan.generate_images()                     # a figure, also saved under outputs/
    gan.save("outputs/my_gan")                # safetensors + JSON; FastDCGAN.load("outputs/my_gan") goes on

Measured: after its six epochs `FastDCGAN` has a Fréchet distance of 0.21, real digits 0.09, and 99.6 % of its samples
are read as the digit asked for (one seed, bf16: `python tools/full_run.py --recipe fast --name fast --slice 60`).

`DCGAN` is the 64×64 PyTorch recipe, `StableDCGAN` the 28×28 TensorFlow one rebuilt in PyTorch, `FastDCGAN` ours.
`ConditionalDCGAN` is the first of them with digits to choose, `WGANGP` has a critic in the place of D.
The sections stand in the order in which the data walks through them, and a section calls only sections above it:
Config, data, models, losses and steps, training, health, evaluation, pictures, interaction, saving, recipes, command
line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import csv
import ctypes
import dataclasses
import difflib
import functools
import gzip
import hashlib
import html
import importlib.util
import io
import json
import math
import numbers
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Self

import matplotlib.pyplot as plt
import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid
from tqdm import tqdm

__version__ = "0.1.0"

# === Constants ========================================================================================================
CHECKPOINT_FORMAT = 1  # raised when an older dcgan_utils could no longer read what this one writes
EMBEDDED_MNIST = Path(__file__).resolve().parent / "data" / "mnist"
KAGGLE_INPUT = Path(os.environ.get("DCGAN_KAGGLE_INPUT", "/kaggle/input"))  # the variable is for a stand-in of Kaggle
KAGGLE_MNIST = ("mnist-dataset", "mnist-in-csv", "digit-recognizer")  # hojjatk's, oddrationale's, the competition's
SEARCH_LIMIT = 20_000  # files and folders looked at below a folder: some attached sets hold a million
MNIST_SHA256 = {  # of the uncompressed IDX files; the gzip layer may differ from copy to copy
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
JUDGE_SHA256 = "c7b03e6dfb141b8d4444e1185fc49df1a21239f7fdb3ca090d2a9d0c9782bdcc"  # of data/judge.safetensors
JUDGE_FEATURES = 64
MIN_SAMPLES = 100  # more than the judge has features, so that a covariance can be told
METRICS = ("loss_D", "loss_G", "D_x", "D_G_z", "D_acc", "D_std", "grad_D", "grad_G", "leak", "gap")  # of every batch
EPOCH_READINGS = ("swing", "move_D", "move_G", "move_BN_D", "move_BN_G", "diversity", "spacing", "slope")  # every epoch
PREVIEW = 32  # images on each side of the real-vs-fake grid
DIVERSITY_SAMPLES = 256  # fixed-noise samples behind the diversity reading; the grids show the first of them


# === Config: every number of a recipe, in one frozen place ============================================================
@dataclass(frozen=True)
class Config:
    """Hold every number of a recipe; the defaults are those of the 64×64 `DCGAN`.

    A variant is `dataclasses.replace(config, lr_D=5e-5)`. Raises ValueError that names field, value and allowed range.
    """

    # data and shapes
    image_size: int = 64  # side in pixels; DCGAN doubles from 4×4, so it makes 16, 32, 64, …
    channels: int = 1  # of an image; stacked MNIST has 3, a digit in each
    nz: int = 100  # length of the latent z ~ N(0, I) (Radford et al. 2015)
    ngf: int = 64  # the generator's narrowest hidden layer; deeper layers double it
    ndf: int = 64  # the same for the discriminator
    conditional: bool = False  # True: G and D see the label, and one chooses the digit
    num_classes: int = 10  # classes of a conditional recipe
    conditioning: str = "projection"  # how D sees the label: projection | matching | concatenation | auxiliary
    matching_weight: float = 0.5  # of D's loss on wrong labels where it is matching (Reed et al. 2016, algorithm 1)
    matching_fades: bool = False  # True: that weight falls as the schedule has the learning rates fall
    # the run
    batch_size: int = 128  # both public recipes
    num_epochs: int = 30  # the recipe's README: sharp from epoch 16 on
    seed: int = 42  # weights, order of the data and noise all follow from it
    # optimisation
    optimizer: str = "adam"  # adam | rmsprop | sgd
    lr_G: float = 0.0002  # Radford et al. 2015
    lr_D: float = 0.0001  # half of G's, so that D does not run away
    lr_schedule: str = "constant"  # constant | linear_tail (flat for the first half, then down towards 0)
    beta1: float = 0.5  # Adam's 0.9 oscillates here (Radford et al. 2015, §4)
    beta2: float = 0.999  # Adam's default
    adam_eps: float = 1e-8  # PyTorch's default; TensorFlow's is 1e-7
    pack: int = 1  # images that D judges together: it then sees that they are alike (PacGAN, Lin et al. 2018)
    detach: bool = True  # False: D's step moves G too, towards what D detects; only to see what goes wrong
    d_steps: int = 1  # D updates per iteration; 0 freezes D
    g_steps: int = 1  # G updates per iteration; 0 freezes G
    # the loss and what it aims at; the labels are those of bce and least_squares
    loss: str = "bce"  # bce (non-saturating) | least_squares | hinge | wasserstein | relativistic
    gradient_penalty: float = 0.0  # λ on D's slope: towards 1 for wasserstein (10 there), towards 0 for the others
    penalty_every: int = 1  # iterations from one penalty to the next, which counts so many times (Karras et al. 2020)
    real_label_smooth: float = 0.85  # a: D's target for real images
    fake_label_smooth: float = 0.2  # b: D's target for generated images
    generator_target: float = 1.0  # what G wants D to say of its images (non-saturating loss)
    start_at_background: bool = True  # G's output bias starts at the data's median grey; False is the literal recipe
    batch_norm_G: bool = True  # False: G without BatchNorm; the 64×64 networks then hardly start
    batch_norm_D: bool = True  # False: D without BatchNorm
    growth: float = 0.75  # share of the run in which `ProgressiveGAN` grows; 0: at full size from the start
    # remedies, off unless a recipe names them
    dropout_D: float = 0.0  # share of D's hidden activations dropped: weakens D
    dropout_G: float = 0.0  # the same in G: more varied samples
    noise_D: float = 0.0  # standard deviation of Gaussian noise on all that D sees, images being in [-1, 1]
    noise_D_batches: int = 0  # the noise fades linearly to 0 over so many batches; 0 keeps it for good
    ema: float = 0.0  # decay of a running average of G that does the sampling; 0 is off
    # the machine
    device: str = "auto"  # auto: cuda where there is one, else cpu
    precision: str = "auto"  # auto: what the device does well; or fp32 | bf16 | fp16
    compile: bool = False  # True: torch.compile, a minute or so at the start, for runs that are long
    cuda_graphs: bool = True  # on a GPU, replay whole iterations; False for a loss of yours that looks at values
    # the record
    log_every: int = 100  # batches between two entries of history.batches and two looks for NaN
    save_every: int = 1  # epochs between two saved grids, the frames of the animation
    out_dir: str = "outputs"  # where pictures and checkpoints go
    tracker: str = ""  # wandb | tensorboard: where every epoch is also written; empty for nowhere

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value, whole = getattr(self, name), name in _INTEGERS
            if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
                raise ValueError(f"Config.{name} = {value!r} must be a {'whole ' * whole}number")
            if not low <= value <= high:
                raise ValueError(f"Config.{name} = {value!r} is outside its range {low} … {high}")
            # also NumPy's; and Adam refuses a whole number as beta, and a tensor of one cuts later rates off
            object.__setattr__(self, name, int(value) if whole else float(value))
        for name in ("device", "out_dir"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Config.{name} = {getattr(self, name)!r} must be text")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Config.{name} = {getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}"
                )
        if not self.fake_label_smooth < self.real_label_smooth:
            raise ValueError(
                f"Config.fake_label_smooth = {self.fake_label_smooth} must be below "
                f"real_label_smooth = {self.real_label_smooth}; real is 1, fake is 0"
            )
        if self.batch_size % self.pack or (self.pack > 1 and self.conditional):
            raise ValueError(
                f"Config.pack = {self.pack} needs a batch_size that it divides, not {self.batch_size}, and "
                "conditional=False: images that are judged together have no one label"
            )
        if self.gradient_penalty and self.batch_norm_D:
            raise ValueError(
                f"Config.gradient_penalty = {self.gradient_penalty:g} holds D's slope at each image by itself, which "
                "BatchNorm makes depend on the whole batch; set batch_norm_D=False"
            )


_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (16, 1024), "channels": (1, 16), "nz": (1, 4096), "ngf": (1, 1024), "ndf": (1, 1024),
    "num_classes": (2, 1000), "matching_weight": (0, 100), "pack": (1, 64),
    "batch_size": (2, 65536), "num_epochs": (0, 100_000), "seed": (0, 2**31 - 1),
    "lr_G": (0, 1), "lr_D": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.99999), "adam_eps": (1e-12, 1e-2),
    "d_steps": (0, 100), "g_steps": (0, 100), "gradient_penalty": (0, 10_000), "penalty_every": (1, 1000),
    "growth": (0, 1),
    "real_label_smooth": (0, 1), "fake_label_smooth": (0, 1), "generator_target": (0, 1),
    "dropout_D": (0, 0.95), "dropout_G": (0, 0.95), "noise_D": (0, 10), "noise_D_batches": (0, 10**9),
    "ema": (0, 0.99999), "log_every": (1, 10**9), "save_every": (0, 10**9),
}  # fmt: skip
_CHOICES: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adam", "rmsprop", "sgd"),
    "lr_schedule": ("constant", "linear_tail"),
    "loss": ("bce", "least_squares", "hinge", "wasserstein", "relativistic"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "tracker": ("", "wandb", "tensorboard"),
    "conditioning": ("projection", "matching", "concatenation", "auxiliary"),
    **{field.name: (True, False) for field in dataclasses.fields(Config) if field.type == "bool"},
}
MACHINE = ("device", "precision", "compile", "cuda_graphs", "out_dir")  # what `load` may change
_INTEGERS = [f.name for f in dataclasses.fields(Config) if f.type == "int"]


def configure(config: Config, **overrides: Any) -> Config:
    """Return `config` with some fields replaced.

    Raises ValueError for an unknown field, naming the nearest one, and for a value out of range.
    """
    known = [f.name for f in dataclasses.fields(Config)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"Config has no field {name!r}{nearest_name(name, known)}")
    return dataclasses.replace(config, **overrides)


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Return '; did you mean …?' for the known name closest to `name`, or a list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.9) or [k for k in known if k.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def parse_fields(pairs: Sequence[str]) -> dict[str, Any]:
    """Return Config fields from FIELD=VALUE texts; a value that is not JSON is taken as a word."""
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not FIELD=VALUE")
        try:
            fields[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


# === Data: IDX, CSV and torchvision's sets become one uint8 tensor ====================================================
_IDX_NAME = re.compile(r"^(train|t10k)[-.](images|labels)[-.]idx[13][-.]ubyte(\.gz)?$")
_CSV_NAME = re.compile(r"^(?:.*[_-])?(train|test)\.csv$")


def load_images(source: str | Path = "mnist", split: str = "train") -> tuple[Tensor, Tensor]:
    """Load images and labels, and say in one printed line where they came from.

    source: "mnist" (Kaggle's input mounts, then the embedded files, then a download), "fashion-mnist" or "kmnist"
    (torchvision), or a folder with IDX (plain or .gz, nested or not) or Kaggle CSV files. split: "train" | "test".
    Returns images uint8 (N, H, W) and labels int64 (N,); all labels are -1 where the source has none.
    Raises FileNotFoundError that lists what was looked for, and ValueError for a file that is not what it should be.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}; it is 'train' or 'test'")
    name = str(source).lower()
    if name == "mnist":
        images, labels, where = _find_mnist(split)
    elif name in ("fashion-mnist", "kmnist"):
        images, labels, where = *_from_torchvision(name, split), "torchvision"
    else:
        images, labels, where = *_from_folder(Path(source), split), str(source)
    _check_pair(images, labels, where)
    n, height, width = images.shape
    print(f"{split} images: {n:,} of {height}×{width} from {where}")
    return images, labels


def _find_mnist(split: str) -> tuple[Tensor, Tensor, str]:
    """Return MNIST from Kaggle's mounts, the embedded files or torchvision's download, whichever comes first."""
    stem = "train" if split == "train" else "t10k"
    sums = {kind: MNIST_SHA256[f"{stem}-{kind}"] for kind in ("images", "labels")}
    for place in _kaggle_places():
        try:
            return *_from_folder(place, split, sums), "Kaggle's input mounts"
        except (FileNotFoundError, ValueError) as error:  # what else is attached there is not MNIST
            attached = f"; attached now: {error}" if KAGGLE_INPUT.is_dir() else ""
    with suppress(FileNotFoundError):
        return *_from_folder(EMBEDDED_MNIST, split, sums), "the embedded files in data/mnist"
    try:
        return *_from_torchvision("mnist", split), "torchvision's download"
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{attached}") from error


def _kaggle_places() -> list[Path]:
    """Return where Kaggle mounts the known MNIST sets, then all its inputs: to search other sets can take long."""
    patterns = [p for slug in KAGGLE_MNIST for p in (f"datasets/*/{slug}", f"competitions/{slug}", slug)]
    return [*(place for p in patterns for place in sorted(KAGGLE_INPUT.glob(p))), KAGGLE_INPUT]


def _from_torchvision(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Return one of torchvision's 28×28 sets, downloading it into data/download on first use."""
    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]
    try:
        root = EMBEDDED_MNIST.parent if os.access(EMBEDDED_MNIST.parent, os.W_OK) else Path("data")  # Kaggle: read-only
        data = kind(root / "download", train=split == "train", download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name} is not on this machine and could not be downloaded ({reason}); "
            "turn the internet on, attach it (Kaggle: Add Input → hojjatk/mnist-dataset), or pass a folder of IDX files"
        ) from error
    return data.data, data.targets.long()


def _from_folder(folder: Path, split: str, sums: dict[str, str] | None = None) -> tuple[Tensor, Tensor]:
    """Return the split found in a folder of IDX or CSV files, at most six levels deep.

    sums: SHA-256 that IDX files must have; then one candidate after the other is tried until one is MNIST.
    """
    if not folder.is_dir():
        known = ["mnist", "fashion-mnist", "kmnist"]
        raise FileNotFoundError(
            f"data = {str(folder)!r} is no folder and none of {', '.join(known)}{nearest_name(str(folder), known)}"
        )
    stem, sums = "train" if split == "train" else "t10k", sums or {}
    walk = islice(_walk(folder, depth=6), SEARCH_LIMIT)
    files = sorted((p for p in walk if p.is_file()), key=lambda p: (len(p.parts), str(p)))
    pairs = _idx_pairs(files, stem)
    readers = [partial(_read_pair, pair, sums) for pair in pairs if len(pair) == 2]
    tables = [p for p in files if (m := _CSV_NAME.match(p.name)) and m[1] == split]
    readers += [
        partial(read_csv, p) for p in tables if not (sums and re.search("fashion|kmnist|emnist|sign", str(p), re.I))
    ]
    for read in readers:
        try:
            return read()
        except ValueError:
            if not sums or read is readers[-1]:  # a folder that was named is taken at its word
                raise
    found = {kind for pair in pairs for kind in pair}
    missing = [f"{stem}-{kind}-idx{d}-ubyte[.gz]" for kind, d in (("images", 3), ("labels", 1)) if kind not in found]
    seen = ", ".join(str(p.relative_to(folder)) for p in files[:8]) or "nothing"
    raise FileNotFoundError(
        f"no {split} images in {folder}: looked up to six folders deep for "
        f"{' and '.join(missing) or 'both in one place'} (or with a dot before 'idx') and for *{split}.csv; "
        f"it holds {seen}{' …' if len(files) > 8 else ''}"
    )


def _idx_pairs(files: Sequence[Path], stem: str) -> list[dict[str, Path]]:
    """Return, for each place, its "images" and "labels" file; Kaggle wraps a file in a folder of the same name."""
    places: dict[Path, dict[str, Path]] = {}
    for path in files:
        if (m := _IDX_NAME.match(path.name)) and m[1] == stem:
            place = path.parent.parent if _IDX_NAME.match(path.parent.name) else path.parent
            places.setdefault(place, {}).setdefault(m[2], path)
    return list(places.values())


def _read_pair(pair: dict[str, Path], sums: dict[str, str]) -> tuple[Tensor, Tensor]:
    images = read_idx(pair["images"], sums.get("images"), dims=3)
    return images, read_idx(pair["labels"], sums.get("labels"), dims=1).long()


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Yield what lies in a folder, level by level down to `depth`, so that a wrong folder cannot take for ever."""
    level = [folder]
    for _ in range(depth):
        below = []
        for place in level:
            with suppress(PermissionError):
                paths = sorted(place.iterdir())
                yield from paths
                below += [path for path in paths if path.is_dir() and not path.name.startswith(".")]
        level = below


def read_idx(path: str | Path, sha256: str | None = None, dims: int | None = None) -> Tensor:
    """Read an IDX file (plain or gzip) into a uint8 tensor of the shape that its header names.

    sha256: of the uncompressed content, checked when given. dims: 3 for images, 1 for labels, checked when given.
    Raises ValueError for an empty, truncated, mislabelled or foreign file and for a wrong checksum.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        what = "is empty" if not raw else "is not an IDX file of unsigned bytes (its first bytes are not 00 00 08)"
        raise ValueError(f"{path} {what}; fetch it again")
    if dims is not None and raw[3] != dims:
        kinds = {1: "labels", 3: "images"}
        found = kinds.get(raw[3], f"{raw[3]}-dimensional data")
        raise ValueError(f"{path} holds {found} where {kinds[dims]} belong; are two files swapped?")
    if len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is truncated within its header; fetch it again")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    body = raw[4 + 4 * raw[3] :]
    if len(body) != math.prod(shape):
        raise ValueError(f"{path} is truncated or padded: {len(body):,} bytes where {shape} needs {math.prod(shape):,}")
    if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file it should be (its SHA-256 differs); restore it from the repository")
    return torch.from_numpy(np.frombuffer(body, dtype=np.uint8).reshape(shape).copy())


def read_csv(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read a Kaggle CSV: a header, an optional `label` column, then one column for each pixel of a square image.

    Returns images uint8 (N, H, H) and labels int64 (N,), -1 where there is no label column. Raises ValueError.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark of their own
        header = next(csv.reader(file), [])
    label = header.index("label") if "label" in header else None
    pixels = len(header) - (label is not None)
    side = math.isqrt(pixels)
    if pixels == 0 or side * side != pixels:
        raise ValueError(f"{path} has {pixels} pixel columns, not a square number such as 784 (and 'label')")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no rows: said below
            warnings.simplefilter("error", DeprecationWarning)  # numpy 2.0 would read 1.5 as 1
            table = torch.from_numpy(np.loadtxt(path, np.int64, delimiter=",", quotechar='"', skiprows=1, ndmin=2))
    except (ValueError, DeprecationWarning) as error:
        what = "a row as long as no other" if "columns changed" in str(error) else "a cell that is not a whole number"
        raise ValueError(f"{path} has {what} ({error})") from error
    if table.numel() == 0:
        raise ValueError(f"{path} has a header and no rows")
    if table.shape[1] != len(header):
        raise ValueError(f"{path} names {len(header)} columns, its rows have {table.shape[1]}")
    labels = torch.full((len(table),), -1) if label is None else table[:, label].clone()
    if label is not None:
        table = torch.cat([table[:, :label], table[:, label + 1 :]], dim=1)
    if table.min() < 0 or table.max() > 255:
        raise ValueError(f"{path} has pixels outside 0 … 255")
    return table.to(torch.uint8).reshape(-1, side, side), labels


def _check_pair(images: Tensor, labels: Tensor, where: str) -> None:
    """Raise ValueError unless images are uint8 (N, H, W), or (N, C, H, W), with one label each."""
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or not len(images):
        raise ValueError(f"{where}: images are {images.dtype} {tuple(images.shape)}; needed are uint8 (N, H, W), N > 0")
    if labels.ndim != 1 or len(labels) != len(images):
        shape = f" of shape {tuple(labels.shape[1:])}" if labels.ndim > 1 else ""
        raise ValueError(f"{where}: {len(images):,} images but {len(labels):,} labels{shape}; each image needs its own")


def stacked_mnist(n: int = 128_000, split: str = "train", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images uint8 (n, 3, 28, 28) of three random digits each, and their modes int64 (n,), 0 … 999.

    The digits of mode 427 are 4 in the first channel, 2 in the second, 7 in the third. All 1000 modes are about as
    frequent, so one can count those that a generator leaves out (Metz et al. 2017, §3.3.1; PacGAN takes 128,000).
    """
    digits, labels = load_images("mnist", split)
    picked = torch.randint(len(digits), (n, 3), generator=torch.Generator().manual_seed(seed))
    return digits[picked], (labels[picked] * torch.tensor([100, 10, 1])).sum(dim=1)


def resize_images(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images (N, H, W) or (N, C, H, W) to `size` once, as torchvision's Resize(antialias=True) does."""
    if images.shape[-2:] == (size, size):
        return images
    parts = [tvf.resize(part if part.ndim == 4 else part[:, None], [size, size]) for part in images.split(4096)]
    return torch.cat(parts).view(*images.shape[:-2], size, size)


def normalise(images: Tensor) -> Tensor:
    """Map uint8 (N, H, W) or (N, C, H, W) to float32 (N, C, H, W) in [-1, 1], the range of the generator's tanh."""
    return (images if images.ndim == 4 else images.unsqueeze(1)).float().div_(127.5).sub_(1)


# === Models: two small networks a recipe; a discriminator returns logits, a generator images in [-1, 1] ===============
class ClassConditional(nn.Module):
    """Let G and D see the label (N,) where the Config is conditional, and D several images where it packs them.

    G: a learned vector of the class stands beside z. D (`Config.conditioning`), all with one more linear layer:
    concatenation: a learned map of the class is a second channel of the image (Mirza & Osindero 2014); projection: a
    linear head for each class, of which the label's own is added to the logit (Miyato & Koyama 2018, §3); matching:
    the same, and D also learns that a real image with a wrong label is wrong (Reed et al. 2016, §4.1); auxiliary: the
    same heads name the class, and both players pay for what they get wrong (Odena et al. 2017).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.way = config.conditioning if config.conditional else ""
        self.pack = config.pack
        self.channels = config.pack * config.channels + (self.way == "concatenation")  # what D's first layer takes

    def embed(self, config: Config) -> int:
        """Add G's class vectors, and return how long its input now is."""
        self.embedding = nn.Embedding(config.num_classes, 32) if self.way else None
        return config.nz + (32 if self.way else 0)

    def latent(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Return G's input: z (N, nz), with the vector of its class beside it."""
        return z if self.embedding is None else torch.cat([z, self.embedding(labels)], dim=1)

    def add_class(self, features: int, config: Config) -> None:
        """Add what lets D see the class, given how many features it has of an image."""
        maps, heads = self.way == "concatenation", self.way in ("projection", "matching", "auxiliary")
        self.class_heads = nn.Linear(features, config.num_classes) if heads else None
        self.class_maps = nn.Embedding(config.num_classes, config.image_size**2) if maps else None

    def seen(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Return what D's first layer sees of images (N, C, S, S) that claim to show labels (N,)."""
        if self.pack > 1:  # those that stand next to each other in the batch become one image's channels
            images = images.reshape(-1, self.pack * images.shape[1], *images.shape[2:])
        if self.class_maps is None:
            return images
        return torch.cat([images, self.class_maps(labels).view_as(images[:, :1])], dim=1)

    def verdict(self, logits: Tensor, features: Tensor, labels: Tensor | None) -> Tensor:
        """Return logits (N,) that know the label; auxiliary and matching: (N, 1 + K), the K classes' own beside it."""
        if self.class_heads is None:
            return logits
        classes = self.class_heads(features)
        if self.way != "auxiliary":
            logits = logits + classes.gather(1, labels[:, None]).squeeze(1)
        return logits if self.way == "projection" else torch.cat([logits[:, None], classes], dim=1)


class DCGANGenerator(ClassConditional):
    """Map z (N, nz), and labels (N,) when conditional, to images (N, 1, S, S), doubling from 4×4 (Radford et al. 2015).

    The 64×64 recipe's, whose README gives the widths.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        nz = self.embed(config)
        widths = dcgan_widths(config.image_size, config.ngf)  # 64×64: 512, 256, 128, 64
        norm = nn.BatchNorm2d if config.batch_norm_G else nn.Identity
        first = FromPoint(nz, widths[0], kernel_size=4, bias=False)  # 1×1 → 4×4
        layers = hidden(first, norm(widths[0]), nn.ReLU(), dropout=config.dropout_G)
        for wide, narrow in pairwise(widths):
            layers += hidden(Doubling(wide, narrow), norm(narrow), nn.ReLU(), dropout=config.dropout_G)
        last = Doubling(widths[-1], config.channels, bias=config.start_at_background)  # see start_at_background below
        layers += [last, nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(init_dcgan)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, S, S), of the digits in labels (N,) when conditional."""
        return self.layers(self.latent(z, labels)[:, :, None, None])


class DCGANDiscriminator(ClassConditional):
    """Map images (N, 1, S, S) to logits (N,), halving down to 4×4 (Radford et al. 2015); see `ClassConditional`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        widths = dcgan_widths(config.image_size, config.ndf)[::-1]  # 64×64: 64, 128, 256, 512
        norm = nn.BatchNorm2d if config.batch_norm_D else nn.Identity
        # no BatchNorm on the images themselves (Radford et al. 2015, §3)
        self.add_class(16 * widths[-1], config)
        act, drop = partial(nn.LeakyReLU, 0.2), config.dropout_D
        layers = hidden(Halving(self.channels, widths[0]), act(), dropout=drop)
        for narrow, wide in pairwise(widths):
            layers += hidden(Halving(narrow, wide), norm(wide), act(), dropout=drop)
        layers += [ToPoint(widths[-1], 1, kernel_size=4, bias=False), nn.Flatten(0)]  # → (N,)
        self.layers = nn.Sequential(*layers)
        self.apply(init_dcgan)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,) for images (N, 1, S, S), as `verdict` does when conditional."""
        features = self.layers[:-2](self.seen(images, labels))
        return self.verdict(self.layers[-2:](features), features.flatten(1), labels)


class StableGenerator(nn.Module):
    """Map z (N, nz) to images (N, 1, S, S) as the TensorFlow recipe does; S is a multiple of 4."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.side = config.image_size // 4  # 28×28 starts at 7×7
        w = config.ngf
        norm = tensorflow_batch_norm if config.batch_norm_G else nn.Identity
        self.dense = nn.Sequential(
            nn.Linear(config.nz, self.side**2 * 4 * w, bias=False),  # (N, 7·7·256)
            norm(nn.BatchNorm1d, self.side**2 * 4 * w),
            nn.LeakyReLU(0.2),
        )
        act, double = partial(nn.LeakyReLU, 0.2), partial(SameConvTranspose2d, mirrored=True)
        self.layers = nn.Sequential(
            *hidden(double(4 * w, 2 * w), norm(nn.BatchNorm2d, 2 * w), act(), dropout=config.dropout_G),
            *hidden(double(2 * w, w), norm(nn.BatchNorm2d, w), act(), dropout=config.dropout_G),
            Greying(w, kernel_size=5, bias=config.start_at_background, mirrored=True),  # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.apply(init_glorot)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, S, S); labels are ignored."""
        x = self.dense(z).view(len(z), self.side, self.side, -1)  # TensorFlow's order: height, width, channels
        return mirror(self.layers(mirror(x.permute(0, 3, 1, 2))))


class StableDiscriminator(nn.Module):
    """Map images (N, 1, S, S) to logits (N,) as the TensorFlow recipe does: no BatchNorm, Dropout instead."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        w = config.ndf
        self.layers = nn.Sequential(
            SameConv2d(1, w, mirrored=True),  # (N, 64, 14, 14)
            nn.LeakyReLU(0.2),
            FastDropout(config.dropout_D),
            SameConv2d(w, 2 * w, mirrored=True),  # (N, 128, 7, 7)
            nn.LeakyReLU(0.2),
            FastDropout(config.dropout_D),
        )
        self.head = nn.Linear((config.image_size // 4) ** 2 * 2 * w, 1)
        self.apply(init_glorot)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,); labels are ignored."""
        features = mirror(self.layers(mirror(images)))
        features = features.permute(0, 2, 3, 1)  # TensorFlow flattens height, width, channels
        return self.head(features.flatten(1)).squeeze(1)


class FastGenerator(ClassConditional):
    """Map z (N, nz), and labels (N,) when conditional, to images (N, 1, S, S); S is a multiple of 4."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.side = config.image_size // 4  # 28×28 starts at 7×7
        w = config.ngf
        norm = nn.BatchNorm2d if config.batch_norm_G else nn.Identity
        self.dense = nn.Linear(self.embed(config), self.side**2 * 4 * w, bias=False)
        self.layers = nn.Sequential(
            norm(4 * w),
            nn.ReLU(),  # (N, 128, 7, 7)
            # the dearest layer of both networks: 32 maps here in place of 64 are a quarter more images a second
            *hidden(Doubling(4 * w, w), norm(w), nn.ReLU(), dropout=config.dropout_G),  # (N, 32, 14, 14)
            # four maps at 14×14 cost what one at 28×28 would, and no 32 maps of that size are needed
            nn.Conv2d(w, 4 * config.channels, kernel_size=3, padding=1),
            nn.PixelShuffle(2),  # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.apply(init_dcgan)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, S, S) of the digits in labels (N,)."""
        x = self.dense(self.latent(z, labels)).view(len(z), self.side, self.side, -1)
        return self.layers(x.permute(0, 3, 1, 2))


class FastDiscriminator(ClassConditional):
    """Map images (N, 1, S, S) to logits (N,): 'real', plus 'this digit' when conditional; see `ClassConditional`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        w = config.ndf
        norm = nn.BatchNorm2d if config.batch_norm_D else nn.Identity
        act, drop = partial(nn.LeakyReLU, 0.2), config.dropout_D
        last = nn.Conv2d(2 * w, 4 * w, kernel_size=3, stride=2, padding=1, bias=False)
        features = math.ceil(config.image_size / 8) ** 2 * 4 * w
        self.layers = nn.Sequential(
            *hidden(Halving(self.channels, w), act(), dropout=drop),  # (N, 32, 14, 14)
            *hidden(Halving(w, 2 * w), norm(2 * w), act(), dropout=drop),  # (N, 64, 7, 7)
            *hidden(last, norm(4 * w), act(), dropout=drop),  # (N, 128, 4, 4)
        )
        self.head = nn.Linear(features, 1)
        self.add_class(features, config)
        self.apply(init_dcgan)
        if not config.batch_norm_D:  # N(0, 0.02) shrinks what passes, and BatchNorm is not there to mend it
            self.layers.apply(init_kaiming)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,) for images (N, 1, S, S) that claim to show labels (N,)."""
        features = self.layers(self.seen(images, labels)).permute(0, 2, 3, 1).flatten(1)  # NHWC: no copy is made
        return self.verdict(self.head(features).squeeze(1), features, labels)


class EqualisedConv2d(nn.Conv2d):
    """Convolve with weights ~ N(0, 1) that are scaled while running: every layer then learns at the same pace.

    Adam's steps have one size whatever a weight's own; He's constant in the forward pass makes that size fit every
    layer (Karras et al. 2018, §4.1).
    """

    def __init__(self, wide: int, narrow: int, kernel_size: int = 3, gain: float = math.sqrt(2)) -> None:
        super().__init__(wide, narrow, kernel_size=kernel_size, padding=kernel_size // 2)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.scale = gain / math.sqrt(wide * kernel_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (N, C, H, W)."""
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """Bring the features of every pixel to mean square 1, so that G cannot outbid D by magnitude (ibid., §4.2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) over its root mean square along C."""
        return x * x.square().mean(dim=1, keepdim=True).add(1e-8).rsqrt()


class MinibatchDeviation(nn.Module):
    """Append one map that says how much the batch varies, so that D sees a lack of variety (ibid., §3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) as (N, C + 1, H, W)."""
        spread = x.float().var(dim=0, unbiased=False).add(1e-8).sqrt().mean()
        return torch.cat([x, spread.to(x.dtype).expand(len(x), 1, *x.shape[2:])], dim=1)


class Growing(nn.Module):
    """Hold what both progressive networks share: how far they have grown, from 4×4 to full size (ibid., §2).

    `grown` is 0 at 4×4, 1 at 8×8 …; 1.25 is 8×8 with a quarter of 16×16 faded in. It is a buffer: checkpoints keep it.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.doublings = int(math.log2(image_size)) - 2
        self.register_buffer("grown", torch.zeros(()))

    def grow(self, share: float) -> None:
        """Take the size for a share 0 … 1 of the growth; each size is faded in for half its time, then trained.

        Nothing shrinks: a run that is made longer waits at its size until the share has come there again.
        """
        turn, within = divmod(min(share, 1.0) * (self.doublings + 1), 1)
        self.grown.fill_(min(self.doublings, max(float(self.grown), turn - 1 + min(1.0, 2 * within))))

    def stage(self) -> tuple[int, float]:
        """Return the largest size at work, counted in doublings of 4×4, and how much of it is faded in."""
        grown = float(self.grown)
        stage = math.ceil(grown)
        return stage, grown - stage + 1  # the share of the newest size, 1 when it has come in wholly


def growing_widths(doublings: int, base: int) -> list[int]:
    """Return channels at 4×4, 8×8 …: half of `base` at full size, `base` at half of it, double before."""
    return [2 * base] * (doublings - 1) + [base, max(1, base // 2)]


class ProgressiveGenerator(Growing):
    """Map z (N, nz) to images (N, 1, S, S), made at the size it has grown to and shown at S×S; S = 16, 32, 64, …"""

    def __init__(self, config: Config) -> None:
        super().__init__(config.image_size)
        widths = growing_widths(self.doublings, config.ngf)
        act = partial(nn.LeakyReLU, 0.2, inplace=True)
        self.first = nn.Sequential(
            PixelNorm(),
            EqualisedConv2d(config.nz, 16 * widths[0], kernel_size=1, gain=math.sqrt(2) / 4),  # gain: ibid., code
            nn.PixelShuffle(4),  # (N, w, 4, 4)
            act(),
            PixelNorm(),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), EqualisedConv2d(wide, narrow), act(), PixelNorm(),
                          EqualisedConv2d(narrow, narrow), act(), PixelNorm())
            for wide, narrow in pairwise(widths)
        )  # fmt: skip
        self.to_grey = nn.ModuleList(EqualisedConv2d(width, 1, kernel_size=1, gain=1.0) for width in widths)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, S, S)."""
        stage, share = self.stage()
        x = before = self.first(z[:, :, None, None])
        for block in self.blocks[:stage]:
            before, x = x, block(x)
        image = self.to_grey[stage](x)
        if share < 1:
            image = fade(F.interpolate(self.to_grey[stage - 1](before), scale_factor=2), image, share)
        return F.interpolate(image.tanh(), scale_factor=2 ** (self.doublings - stage))


def fade(coarse: Tensor, fine: Tensor, share: float) -> Tensor:
    """Return the coarse images with a share of the fine ones, in float32: autocast may have made them of two kinds."""
    return coarse.float().lerp(fine.float(), share)


class ProgressiveDiscriminator(Growing):
    """Map images (N, 1, S, S), brought to the size it has grown to, to logits (N,): the generator's mirror."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.image_size)
        widths = growing_widths(self.doublings, config.ndf)
        act = partial(nn.LeakyReLU, 0.2, inplace=True)
        self.from_grey = nn.ModuleList(
            nn.Sequential(EqualisedConv2d(1, width, kernel_size=1), act()) for width in widths
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(EqualisedConv2d(narrow, narrow), act(), EqualisedConv2d(narrow, wide), act(),
                          nn.AvgPool2d(2))
            for wide, narrow in pairwise(widths)
        )  # fmt: skip
        w = widths[0]
        self.last = nn.Sequential(
            MinibatchDeviation(),
            EqualisedConv2d(w + 1, w),
            act(),
            nn.PixelUnshuffle(4),  # (N, 16 w, 1, 1)
            EqualisedConv2d(16 * w, 1, kernel_size=1, gain=1.0),
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,) for images (N, 1, S, S)."""
        stage, share = self.stage()
        images = F.avg_pool2d(images, 2 ** (self.doublings - stage))
        if share < 1:  # real and fake both soften while detail fades in
            coarse = F.avg_pool2d(images, 2)
            images = fade(F.interpolate(coarse, scale_factor=2), images, share)
        x = self.from_grey[stage](images)
        for number in range(stage, 0, -1):
            x = self.blocks[number - 1](x)
            if number == stage and share < 1:
                x = fade(self.from_grey[stage - 1](coarse), x, share)
        return self.last(x).flatten()


Matrix = Sequence[Sequence[float]]


class Ways(NamedTuple):
    """How each pass through a convolution is made: "library", "patches" or "winograd", see PASSES."""

    convolve: str
    transpose: str
    slope: str


class Pass(torch.autograd.Function):
    """Take one pass through a convolution with weights (A, B, k, k) between y (N, A, H, W) and x (N, B, sH, sW).

    convolve: x and weights to y, as PyTorch's Conv2d with stride s and padding (k - 1) // 2. transpose: y and weights
    to x. slope: y and x to the derivative by the weights. Each is linear in both inputs, and they are one another's
    derivatives: so every pass, there and back, goes the way that is quickest for it, and can be derived again.
    """

    @staticmethod
    def forward(
        ctx: Any, task: str, first: Tensor, second: Tensor, cut: Tensor | None, k: int, stride: int, ways: Ways
    ) -> Tensor:
        """Return what the task makes of its two inputs; cut: the patches of x, where they are at hand."""
        ctx.task, ctx.how = task, (k, stride, ways)
        if task == "convolve" and cut is None and ctx.needs_input_grad[2]:
            cut = shared_patches(first, *ctx.how)
        ctx.save_for_backward(first, second, cut)
        return PASSES[task][getattr(ways, task)](first, second, k, stride, *([] if cut is None else [cut]))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives by both inputs."""
        first, second, cut = ctx.saved_tensors
        slope = slope.contiguous(memory_format=torch.channels_last)
        needs = ctx.needs_input_grad[1:3]
        if ctx.task == "transpose" and all(needs):
            cut = shared_patches(slope, *ctx.how)
        asked = {
            "convolve": (("transpose", slope, second, None), ("slope", slope, first, cut)),
            "transpose": (("convolve", slope, second, cut), ("slope", first, slope, cut)),
            "slope": (("convolve", second, slope, cut), ("transpose", first, slope, None)),
        }[ctx.task]
        found = [Pass.apply(*what, *ctx.how) if need else None for what, need in zip(asked, needs, strict=True)]
        return None, *found, None, None, None, None


@torch.no_grad()  # what is derived are x and y, however often
def shared_patches(x: Tensor, k: int, stride: int, ways: Ways) -> Tensor | None:
    """Return the patches of x where two passes take them, else None."""
    return patches(x, k, stride) if ways.convolve == ways.slope == "patches" else None


def convolve(x: Tensor, weight: Tensor, k: int, stride: int, bias: Tensor | None = None) -> Tensor:
    """Return the library's convolution."""
    return F.conv2d(x, weight, bias, stride, padding=(k - 1) // 2)


def transpose(y: Tensor, weight: Tensor, k: int, stride: int, bias: Tensor | None = None) -> Tensor:
    """Return the library's transposed convolution."""
    padding = (k - 1) // 2
    return F.conv_transpose2d(y, weight, bias, stride, padding, output_padding=stride + 2 * padding - k)


def weight_slope(y: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
    """Return the library's derivative by the weights."""
    return torch.nn.grad.conv2d_weight(x, (y.shape[1], x.shape[1], k, k), y, stride, padding=(k - 1) // 2)


def surround(x: Tensor, k: int, stride: int) -> Tensor:
    """Return x (N, H, W, …) with the zeros around it that a convolution sees."""
    before = (k - 1) // 2
    after = k - stride - before
    return F.pad(x, (0, 0) * (x.ndim - 3) + (before, after, before, after))


def patches(x: Tensor, k: int, stride: int) -> Tensor:
    """Return the k×k patches of maps (N, B, sH, sW) as a matrix (N·H·W, k²·B)."""
    if x.shape[1] > 1:
        cut = surround(x.permute(0, 2, 3, 1), k, stride).unfold(1, k, stride).unfold(2, k, stride)
        return cut.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
    columns = windows(surround(x[:, 0], k, stride), identity(k), 2, stride)
    return windows(columns, identity(k), 2, stride).flatten(2).flatten(0, 1).T  # a tap's pixels stand together


def as_rows(y: Tensor) -> Tensor:
    """Return maps (N, A, H, W) as a matrix (N·H·W, A)."""
    return y.permute(0, 2, 3, 1).flatten(0, 2)


def convolve_by_patches(x: Tensor, weight: Tensor, k: int, stride: int, cut: Tensor | None = None) -> Tensor:
    """Return the convolution as one product of patches and weights."""
    pixels = (patches(x, k, stride) if cut is None else cut) @ weight.permute(0, 2, 3, 1).flatten(1).T
    height, width = (side // stride for side in x.shape[2:])
    return pixels.view(len(x), height, width, len(weight)).permute(0, 3, 1, 2)


def transpose_by_patches(y: Tensor, weight: Tensor, k: int, stride: int) -> Tensor:
    """Return grey images (N, 1, sH, sW), each pixel the sum of what up to k² patches say."""
    n, _, height, width = y.shape
    said = weight.flatten(1).T @ as_rows(y).T  # (k², N·H·W)
    exact = torch.promote_types(said.dtype, torch.float32)
    columns = window_sum(said.to(exact).view(k, k, n, height, width), identity(k), 2, stride)
    image, before = window_sum(columns, identity(k), 2, stride).to(said.dtype), (k - 1) // 2
    return image[:, None, before : before + stride * height, before : before + stride * width].contiguous()


def slope_by_patches(y: Tensor, x: Tensor, k: int, stride: int, cut: Tensor | None = None) -> Tensor:
    """Return the derivative by the weights as one product of maps and patches."""
    cut, maps = patches(x, k, stride) if cut is None else cut, as_rows(y).T
    if x.shape[1] > 1:  # products of a matrix that lies the other way take twice as long; grey patches do so themselves
        maps = maps.contiguous()
    return (maps @ cut).unflatten(1, (k, k, -1)).permute(0, 3, 1, 2)


def windows(x: Tensor, matrix: Matrix, dim: int, step: int) -> Tensor:
    """Mix the entries of every window that slides along a dimension: mixed[p] = Σ_r matrix[p][r] · window[r].

    Return (P, …, n, …) for x (…, L, …): P mixtures of each of n windows, which begin `step` apart.
    """
    parts = x.unfold(dim, len(matrix[0]), step).unbind(-1)
    mixed = x.new_empty(len(matrix), *parts[0].shape)
    for place, weights in zip(mixed, matrix, strict=True):
        write_sum(place, weights, parts)
    return mixed


def window_sum(mixed: Tensor, matrix: Matrix, dim: int, step: int) -> Tensor:
    """Give every mixture back to the entries of its window, and add up where windows overlap: `windows` transposed.

    Return (…, L, …) for mixtures (P, …, n, …).
    """
    shape, n, size = list(mixed.shape[1:]), mixed.shape[dim + 1], len(matrix[0])
    shape[dim] = (n - 1) * step + size
    total = mixed.new_empty(shape)
    total.narrow(dim, n * step, size - step).zero_()  # none but the last windows reach there
    places = total.unfold(dim, size, step).unbind(-1)
    for r, (place, weights) in enumerate(zip(places, zip(*matrix, strict=True), strict=True)):
        write_sum(place, weights, mixed.unbind(), add=r >= step)
    return total


def write_sum(place: Tensor, weights: Sequence[float], parts: Sequence[Tensor], add: bool = False) -> None:
    """Write the weighted sum of parts into `place`, or add it to what is there, in as few passes as torch allows."""
    terms = [(weight, part) for weight, part in zip(weights, parts, strict=True) if weight]
    if not add:
        terms.sort(key=lambda term: term[0] != 1)
        match terms:
            case [(1, part), (weight, other), *terms]:
                torch.add(part, other, alpha=weight, out=place)
            case [(weight, part), *terms]:
                torch.mul(part, weight, out=place) if weight != 1 else place.copy_(part)
            case _:
                place.zero_()
    for weight, part in terms:
        place.add_(part, alpha=weight)


# Two neighbouring results of two taps by three products in place of four (Winograd 1980; Lavin & Gray 2016): what is
# mixed of pixels, of taps and of results. A stride of 2 makes kernel 4 one of 2×2 on blocks of 2×2 pixels.
MINIMAL: tuple[Matrix, Matrix, Matrix] = (
    ((1, -1, 0), (0, 1, 0), (0, -1, 1)),
    ((1, 0), (1, 1), (0, 1)),
    ((1, 0), (1, 1), (0, 1)),
)


def spread(x: Tensor, matrix: Matrix, unit: int = 1) -> Tensor:
    """Return the mixtures (P, P, J, K, N, u, u, C) of x (N, H, W, C) in windows of u×u blocks, two blocks apart."""
    blocks = x.unflatten(1, (-1, unit)).unflatten(3, (-1, unit)).permute(1, 3, 0, 2, 4, 5)  # (H/u, W/u, N, u, u, C)
    return windows(windows(blocks, matrix, 1, 2), matrix, 1, 2)  # images and maps in a row: sums run along them


def gather(mixed: Tensor, matrix: Matrix) -> Tensor:
    """Undo the cutting of `spread`: every mixture goes back to its window in (N, H, W, C), and overlaps add up."""
    columns = window_sum(mixed, matrix, 1, 2).permute(0, 3, 1, 4, 2, 5, 6)  # (P, N, H/u, u, K, u, C)
    return window_sum(columns, matrix, 3, 2).flatten(3, 4).flatten(1, 2)


def as_matrices(mixed: Tensor) -> Tensor:
    """Return mixtures (P, P, J, K, N, u, u, C) as P² matrices (J·K·N, u²·C)."""
    return mixed.flatten(5).flatten(2, 4).flatten(0, 1)


def mixed_pixels(x: Tensor) -> Tensor:
    """Return what Winograd's products take of maps (N, B, 2H, 2W): (P, P, J, K, N, 2, 2, B), J = ⌈H/2⌉."""
    below, right = (1 + side % 4 for side in x.shape[2:])  # results come in pairs
    return spread(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, right, 1, below)), MINIMAL[0], unit=2)


def mixed_results(y: Tensor) -> Tensor:
    """Return what they take of maps (N, A, H, W), or give the derivatives of: (P, P, J, K, N, 1, 1, A)."""
    below, right = (side % 2 for side in y.shape[2:])
    y = y.permute(0, 2, 3, 1)
    return spread(F.pad(y, (0, 0, 0, right, 0, below)) if right or below else y, MINIMAL[2])


def mixed_taps(weight: Tensor) -> Tensor:
    """Return what they take of weights (A, B, 4, 4): P² matrices (A, 4B)."""
    return as_matrices(spread(weight.permute(0, 2, 3, 1), MINIMAL[1], unit=2))


def convolve_by_winograd(x: Tensor, weight: Tensor, k: int, stride: int) -> Tensor:
    """Return the convolution of kernel 4 and stride 2 by 9 products in place of 16, see MINIMAL."""
    (height, width), seen = (side // 2 for side in x.shape[2:]), mixed_pixels(x)
    products = as_matrices(seen) @ mixed_taps(weight).mT
    image = gather(products.view(*seen.shape[:5], 1, 1, len(weight)), MINIMAL[2])
    return image[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def transpose_by_winograd(y: Tensor, weight: Tensor, k: int, stride: int) -> Tensor:
    """Return the transposed convolution of kernel 4 and stride 2 likewise."""
    (height, width), seen = y.shape[2:], mixed_results(y)
    products = as_matrices(seen) @ mixed_taps(weight)
    image = gather(products.view(*seen.shape[:5], 2, 2, weight.shape[1]), MINIMAL[0])
    return image[:, 1 : 1 + 2 * height, 1 : 1 + 2 * width].contiguous().permute(0, 3, 1, 2)


def slope_by_winograd(y: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
    """Return the derivative by the weights of kernel 4 and stride 2 likewise."""
    products = as_matrices(mixed_results(y)).mT @ as_matrices(mixed_pixels(x))
    return gather(products.view(3, 3, 1, 1, y.shape[1], 2, 2, x.shape[1]), MINIMAL[1]).permute(0, 3, 1, 2)


PASSES: dict[str, dict[str, Callable[[Tensor, Tensor, int, int], Tensor]]] = {
    "convolve": {"library": convolve, "patches": convolve_by_patches, "winograd": convolve_by_winograd},
    "transpose": {"library": transpose, "patches": transpose_by_patches, "winograd": transpose_by_winograd},
    "slope": {"library": weight_slope, "patches": slope_by_patches, "winograd": slope_by_winograd},
}
LIBRARY, PATCHES, WINOGRAD = Ways(*["library"] * 3), Ways(*["patches"] * 3), Ways(*["winograd"] * 3)


def quickest_ways(x: Tensor, weight: Tensor) -> Ways:
    """Return how each pass through a convolution with weights (A, B, k, k), x its input of A or B maps, is quickest.

    Patches where the image is grey; Winograd's fewer products where kernel 4 joins many channels. With AMX products
    cost little, and what is moved counts: there small maps take patches where the library is slow. Else, on other
    devices and with other memory formats: the library. Meant for batches of 32 and more: `python tools/benchmark.py
    --layers` times every way.
    """
    narrow, k = min(weight.shape[:2]), weight.shape[2]
    last = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type != "cpu" or not last or torch.compiler.is_compiling():
        return LIBRARY
    if weight.shape[1] == 1:
        return PATCHES
    if precision_of(x) != torch.bfloat16 or not has_amx():
        return WINOGRAD if k == 4 and narrow >= 125 else LIBRARY
    side = min(x.shape[2:]) // (1 if x.shape[1] == weight.shape[0] else 2)  # of the smaller maps
    if side > 8 or narrow < 125:
        return LIBRARY
    return Ways("patches", *(["winograd"] * 2 if k == 4 and narrow >= 250 else ["library", "patches"]))


@functools.cache
def has_amx() -> bool:
    """Return whether this CPU has units for whole products of bf16 matrices."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def precision_of(x: Tensor) -> torch.dtype:
    """Return the type in which a convolution of x is computed: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def identity(size: int) -> Matrix:
    """Return the identity matrix: a window's mixtures are its entries."""
    return torch.eye(size).tolist()


class Doubling(nn.ConvTranspose2d):
    """Double the side: a transposed convolution of stride 2, kernel 4 (Radford et al. 2015) or 5."""

    def __init__(self, wide: int, narrow: int, kernel_size: int = 4, bias: bool = False) -> None:
        how = {"stride": 2, "padding": (kernel_size - 1) // 2, "output_padding": kernel_size % 2, "bias": bias}
        super().__init__(wide, narrow, kernel_size, **how)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, narrow, 2H, 2W) for x (N, wide, H, W)."""
        return passed("transpose", x, self.kernel(), self.bias, 2)

    def kernel(self) -> Tensor:
        """Return the weights as they meet the maps."""
        return self.weight


class Halving(nn.Conv2d):
    """Halve the side: a convolution of stride 2, kernel 4 (Radford et al. 2015) or 5."""

    def __init__(self, narrow: int, wide: int, kernel_size: int = 4, bias: bool = False) -> None:
        super().__init__(narrow, wide, kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, wide, H/2, W/2) for x (N, narrow, H, W)."""
        return passed("convolve", x, self.kernel(), self.bias, 2)

    kernel = Doubling.kernel


class Greying(nn.Conv2d):
    """Make one grey map of many by a convolution that keeps the side; mirrored: the maps are so, see SameConv2d."""

    def __init__(self, wide: int, kernel_size: int, bias: bool = False, mirrored: bool = False) -> None:
        super().__init__(wide, 1, kernel_size, padding=kernel_size // 2, bias=bias)
        self.mirrored = mirrored

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1, H, W) for x (N, wide, H, W)."""
        taps = (self.weight if self.mirrored else mirror(self.weight)).transpose(0, 1)  # of what it is the transpose of
        if quickest_ways(x, taps) == LIBRARY:
            return convolve(x, mirror(self.weight) if self.mirrored else self.weight, self.kernel_size[0], 1, self.bias)
        return passed("transpose", x, taps, self.bias, 1)


def passed(task: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Return what a layer makes of x: a pass in the quickest way, in the precision that autocast asks for."""
    ways, k, odd = quickest_ways(x, weight), weight.shape[2], x.shape[2] % stride or x.shape[3] % stride
    if ways == LIBRARY or (odd and task == "convolve"):
        return (convolve if task == "convolve" else transpose)(x, weight, k, stride, bias)
    dtype = precision_of(x)
    maps = Pass.apply(task, x.to(dtype), weight.to(dtype), None, k, stride, ways)
    return maps if bias is None else maps + bias.to(dtype)[:, None, None]


def mirror(x: Tensor) -> Tensor:
    """Return maps or kernels upside down and left to right."""
    return x.flip(2, 3)


class FromPoint(nn.ConvTranspose2d):
    """Open a point to a map of the kernel's side: a transposed convolution, as the matrix product that it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, wide, k, k) for x (N, narrow, 1, 1), channels last; for larger x what the library makes of it."""
        if x.shape[2:] != (1, 1):
            return super().forward(x)
        pixels = x.flatten(1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
        return pixels.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)


class ToPoint(nn.Conv2d):
    """Close a map of the kernel's side to a point, likewise; libraries are slow, and some wrong in bf16, at 1×1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, narrow, 1, 1) for x (N, wide, k, k); for larger x what the library makes of it."""
        if x.shape[2:] != self.kernel_size:
            return super().forward(x)
        pixels, weight = (tensor.permute(0, 2, 3, 1).flatten(1) for tensor in (x, self.weight))
        return (pixels @ weight.T)[:, :, None, None]


def hidden(*layers: nn.Module, dropout: float) -> list[nn.Module]:
    """Return the layers of one hidden block, with Dropout at its end where the Config asks for it."""
    for before, layer in pairwise(layers):
        if isinstance(before, nn.BatchNorm2d):  # its result is read by nobody else, and is no view
            layer.inplace = True
    return [*layers, FastDropout(dropout)] if dropout else [*layers]


class FastDropout(nn.Dropout):
    """Drop activations by NumPy's 16-bit random numbers on a CPU: torch's own draw takes several times as long."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the share p set to 0, to a 65,536th, and the rest scaled up so that the mean stays."""
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        kept = min(max(1, round((1 - self.p) * 65536)), 65535)
        rng = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))  # torch's seed decides
        words = rng.integers(-(2**63), 2**63 - 1, math.ceil(x.numel() / 4), np.int64, endpoint=True)
        draw = torch.from_numpy(words).view(torch.int16)[: x.numel()]
        mask = draw.lt_(kept - 32768).to(x.dtype).mul_(65536 / kept)  # in place: a result of bool would be slower
        if x.is_contiguous(memory_format=torch.channels_last) and x.ndim == 4:
            mask = mask.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
        return x * mask.view_as(x)


def dcgan_widths(image_size: int, base: int) -> list[int]:
    """Return the channels of each hidden map from 4×4 up: (64, base 64) → [512, 256, 128, 64]; at most 8 × base."""
    doublings = int(math.log2(image_size)) - 2
    return [base * 2 ** min(k, 3) for k in reversed(range(doublings))]


class SameConvTranspose2d(Doubling):
    """Double the side as TensorFlow's Conv2DTranspose(k5, s2, "same") does: it crops 1 pixel before and 2 after.

    PyTorch crops 2 and 1, which is the same on mirrored maps with a mirrored kernel; another way would be a copy of
    all maps. mirrored: x is so already, and the result stays so.
    """

    def __init__(self, wide: int, narrow: int, mirrored: bool = False) -> None:
        super().__init__(wide, narrow, kernel_size=5)
        self.mirrored = mirrored

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, narrow, 2H, 2W) for x (N, wide, H, W)."""
        return super().forward(x) if self.mirrored else mirror(super().forward(mirror(x)))

    def kernel(self) -> Tensor:
        """Return the kernel for mirrored maps, already in autocast's precision: so half as much is turned around."""
        return mirror(self.weight.to(precision_of(self.weight)))


class SameConv2d(Halving):
    """Halve the side as TensorFlow's Conv2D(k5, s2, "same") does: it pads 1 pixel before and 2 after; see above."""

    def __init__(self, narrow: int, wide: int, mirrored: bool = False) -> None:
        super().__init__(narrow, wide, kernel_size=5, bias=True)
        self.mirrored = mirrored

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, wide, H/2, W/2) for x (N, narrow, H, W)."""
        return super().forward(x) if self.mirrored else mirror(super().forward(mirror(x)))

    kernel = SameConvTranspose2d.kernel


def tensorflow_batch_norm(kind: type[nn.Module], features: int) -> nn.Module:
    """Return BatchNorm with TensorFlow's defaults; its momentum 0.99 keeps what PyTorch's 0.01 replaces."""
    return kind(features, eps=1e-3, momentum=0.01)


def init_dcgan(module: nn.Module) -> None:
    """Draw conv and linear weights from N(0, 0.02), BatchNorm's from N(1, 0.02), embeddings from N(0, 1); biases 0.

    Radford et al. 2015, §4, as the PyTorch recipe writes it. Use with `module.apply`.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)  # as large as z, beside which it stands
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def init_kaiming(module: nn.Module) -> None:
    """Draw conv weights so that LeakyReLU(0.2) keeps the variance from layer to layer (He et al. 2015, eq. 14)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.2)


def init_glorot(module: nn.Module) -> None:
    """Draw conv and dense weights from Glorot's uniform distribution, biases 0: TensorFlow's default."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def start_at_background(generator: nn.Module, images: Tensor) -> None:
    """Set the generator's output bias so that tanh(bias) is the median grey of uint8 images (N, H, W), at most ±0.96.

    MNIST is black but for the strokes. Without this G spends all it has on darkening the background, and what z says
    drowns in it: every sample is the same for epochs (shown in notebook 03). 0.96 keeps tanh out of its flat end.
    """
    median = (images.flatten()[::101].float().median() / 127.5 - 1).clamp(-0.96, 0.96)
    outputs = getattr(generator, "to_grey", None)  # one for every size, where G grows
    for layer in outputs or [m for m in generator.layers if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))][-1:]:
        layer.bias.fill_(torch.atanh(median).item())


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters; `all` counts BatchNorm's running mean and variance, as TensorFlow does."""
    trainable = sum(p.numel() for p in module.parameters())
    statistics = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    return trainable + statistics, trainable


# === Losses and steps: the two short functions that are the GAN =======================================================
class NonSaturatingLoss:
    """Hold the non-saturating GAN loss with smoothed labels (Goodfellow et al. 2014, §3).

    Real is 1 and fake is 0; `real_label_smooth` and `fake_label_smooth` move D's targets to a and b. Salimans et al.
    2016, §3.4, smooth only the real one: b > 0 keeps a peak of the best D at images that no data support.
    """

    def __init__(self, config: Config) -> None:
        self.real, self.fake, self.wish = config.real_label_smooth, config.fake_label_smooth, config.generator_target

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss, the sum over both kinds of images of the mean cross-entropy to a and to b."""
        return cross_entropy(real_logits, self.real) + cross_entropy(fake_logits, self.fake)

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Return G's loss: it wants D to call its images real."""
        return cross_entropy(fake_logits, self.wish)


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Return BCEWithLogitsLoss of logits (N,) to one target, in float32: sigmoid and log apart give NaN."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, target, dtype=torch.float32))


class LeastSquaresLoss(NonSaturatingLoss):
    """Pull logits themselves to the labels by squared error: a sample far on the right side still has a slope.

    Mao et al. 2017, eq. 2; with labels a and b the best D is the same D* as with cross-entropy (eq. 5).
    """

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss ½ E(D(x) - a)² + ½ E(D(G(z)) - b)²."""
        real, fake = real_logits.float() - self.real, fake_logits.float() - self.fake
        return (real.square().mean() + fake.square().mean()) / 2

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Return G's loss ½ E(D(G(z)) - c)², c being `generator_target`."""
        return (fake_logits.float() - self.wish).square().mean() / 2


class WassersteinLoss:
    """Let D be a critic: E D(x) - E D(G(z)) estimates the Wasserstein-1 distance while D's slope is at most 1.

    Arjovsky et al. 2017, eq. 2. What holds the slope is `gradient_penalty`; the loss itself bounds nothing.
    """

    def __init__(self, config: Config) -> None:
        pass  # no labels: only differences of D's answers count

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss, minus the estimate."""
        return fake_logits.float().mean() - real_logits.float().mean()

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Return G's loss -E D(G(z)), the part of the estimate that G can change."""
        return -fake_logits.float().mean()


class HingeLoss(WassersteinLoss):
    """Teach D only what lies within its margin of ±1; G's loss is the critic's (Lim & Ye 2017; Miyato et al. 2018)."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))."""
        return (1 - real_logits.float()).relu().mean() + (1 + fake_logits.float()).relu().mean()


class RelativisticLoss(WassersteinLoss):
    """Ask D of pairs which one is real (Jolicoeur-Martineau 2019); with R1 + R2 as `gradient_penalty` it is R3GAN's."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss E softplus(D(G(z)) - D(x)) over pairs of real and fake."""
        return F.softplus(fake_logits.float() - real_logits.float()).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor) -> Tensor:
        """Return G's loss: D's with the pair exchanged."""
        return self.discriminator(fake_logits, real_logits)


LOSSES: dict[str, Callable[[Config], Any]] = {
    "bce": NonSaturatingLoss, "least_squares": LeastSquaresLoss, "hinge": HingeLoss, "wasserstein": WassersteinLoss,
    "relativistic": RelativisticLoss,
}  # fmt: skip


def gradient_penalty(gan: Trainer, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
    """Return λ times the penalty on D's slopes.

    wasserstein: (slope - 1)² at one random point between each real and fake image (Gulrajani et al. 2017, §4). Other
    losses: (R1 + R2) / 2, the mean square of the slopes at real and at fake images (Mescheder et al. 2018; Huang et
    al. 2024), so that λ is their γ. With `penalty_every` k it is taken at every k-th iteration, k times as strong.
    """
    if gan.config.loss == "wasserstein":
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        penalty = (slopes(gan.discriminator, real.lerp(fake, share), labels) - 1).square()
    else:
        labels = None if labels is None else labels.repeat(2)
        penalty = slopes(gan.discriminator, torch.cat([real, fake]), labels).square()
    return gan.config.gradient_penalty * gan.config.penalty_every * penalty.mean()


def slopes(discriminator: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """Return the length of D's gradient at each image (n, C, H, W), or pack of them, in float32, with its graph."""
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):  # the square of a small slope is lost in half precision
        answers = real_logit(discriminator(images, labels))
        (gradient,) = torch.autograd.grad(answers.sum(), images, create_graph=True)
    return gradient.reshape(len(answers), -1).norm(dim=1)


def ask(
    gan: Trainer, network: nn.Module, images: Tensor, labels: Tensor | None, real: bool = False
) -> tuple[Tensor, Tensor | float]:
    """Return D's logits (N,) of images as it gets to see them, and what its reading of their classes costs.

    auxiliary: the cross-entropy of the class. matching, and only of `real` images: that a wrong label, drawn at random,
    should stand below the right one, times `matching_weight` (Reed et al. 2016, algorithm 1), which may fade.
    """
    answers, way = network(gan.noisy(images), labels), gan.config.conditioning
    cost: Tensor | float = 0.0
    if answers.ndim == 2 and way == "auxiliary":
        cost = F.cross_entropy(answers[:, 1:].float(), labels)
    elif answers.ndim == 2 and real:
        classes = answers[:, 1:].float()
        wrong = (labels + torch.randint_like(labels, 1, classes.shape[1])) % classes.shape[1]
        lead = classes.gather(1, labels[:, None]) - classes.gather(1, wrong[:, None])
        left = gan.rate_left if gan.config.matching_fades else 1.0
        cost = gan.config.matching_weight * left * F.softplus(-lead).mean()
    return real_logit(answers), cost


def real_logit(answers: Tensor) -> Tensor:
    """Return the logits (N,) for 'real' among D's answers (N,) or (N, 1 + K)."""
    return answers[:, 0] if answers.ndim == 2 else answers


def train_discriminator(gan: Trainer, real: Tensor, fake: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Take one D step on real and fake (N, 1, S, S); return its METRICS, and its answers to the real images (N,)."""
    with gan.autocast():
        real_logits, real_cost = ask(gan, gan.players["D"], real, labels, real=True)
        # detach: this step must not reach into G, whose turn comes next
        fake_logits, fake_cost = ask(gan, gan.players["D"], fake.detach() if gan.config.detach else fake, labels)
        loss = gan.loss.discriminator(real_logits, fake_logits)
    penalty = gradient_penalty(gan, real, fake, labels) if gan._penalty_is_due() else 0.0
    gradient = gan.update("D", loss + real_cost + fake_cost + penalty)
    answers = read_discriminator(real_logits.detach().float(), fake_logits.detach().float(), gan.config)
    leak = gan.finite(gradient_length(gan.generator))
    measured = {"loss_D": loss.detach(), **answers, "grad_D": gradient, "leak": leak}
    return measured | {"real_logits": real_logits.detach()}


def train_generator(
    gan: Trainer, fake: Tensor, labels: Tensor | None, real_logits: Tensor | None = None
) -> dict[str, Tensor]:
    """Take one G step on fake (N, 1, S, S), which still knows how G made it; return its METRICS.

    real_logits: D's answers to real images in its own step, with which a relativistic loss compares; they are one step
    old, and asking anew would cost time for the same samples. The other losses do not look at them.
    """
    rivals = [real_logits] if gan.config.loss == "relativistic" else []
    with gan.autocast(), frozen(gan.discriminator):  # D passes gradients on to G and keeps none for itself
        # D(fake) again: D has just changed, and the graph of its own step ended at detach
        fake_logits, cost = ask(gan, gan.players["frozen D"], fake, labels)
        loss = gan.loss.generator(fake_logits, *rivals)
    gradient = gan.update("G", loss + cost)
    return {"loss_G": loss.detach(), "grad_G": gradient}


def read_discriminator(real_logits: Tensor, fake_logits: Tensor, config: Config) -> dict[str, Tensor]:
    """Return mean D(x), mean D(G(z)), their gap, D's accuracy and the standard deviation of all its answers.

    relativistic: D answers for pairs, so D(x) is the probability that it gives to the real one of a pair, D(G(z)) that
    of the fake one. The accuracy's threshold is the middle of what the loss aims at, for bce the equilibrium
    m = (a + b) / 2 and not 0.5; of pairs, and with wasserstein, it is the share in which the real one leads.
    """
    pairs = torch.stack([real_logits, fake_logits])
    answers = (pairs - pairs.flip(0)).sigmoid() if config.loss == "relativistic" else answer(pairs, config)
    m = sum(targets(config)) / 2
    edge = {"bce": math.log(m / (1 - m)) if 0 < m < 1 else 0.0, "least_squares": m, "hinge": 0.0}.get(config.loss)
    right = (real_logits > fake_logits,) * 2 if edge is None else (real_logits > edge, fake_logits < edge)
    accuracy = (right[0].float().mean() + right[1].float().mean()) / 2
    D_x, D_G_z = answers[0].mean(), answers[1].mean()
    return {"D_x": D_x, "D_G_z": D_G_z, "D_acc": accuracy, "D_std": answers.std(), "gap": D_x - D_G_z}


def targets(config: Config) -> tuple[float, float]:
    """Return what D's loss pulls its answers to, for real and for fake images: the labels a and b; of pairs 1 and 0."""
    return (1.0, 0.0) if config.loss == "relativistic" else (config.real_label_smooth, config.fake_label_smooth)


def answer(logits: Tensor, config: Config) -> Tensor:
    """Return what D says of single images: a probability with cross-entropy, with the other losses the logit itself."""
    return logits.sigmoid() if config.loss == "bce" else logits


def gradient_length(network: nn.Module) -> Tensor:
    """Return the length of the gradient that lies in a network, 0 where there is none."""
    weights = list(network.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=weights[0].device)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep a network's weights out of the graph for a while: gradients pass through, none is kept."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


# === Training: one loop for every recipe; callbacks show, save and stop ===============================================
class DivergenceError(RuntimeError):
    """Say that a loss became NaN or infinite; the history up to then is kept."""


class History(dict):
    """Map each name to a list with one value per epoch; `.batches` does so per `log_every` batches.

    An epoch that was cut short stands last with a fractional `epoch` and is replaced when training goes on.
    """

    def __init__(self, config: Config, epochs: dict | None = None, batches: dict | None = None) -> None:
        super().__init__({name: [] for name in (*METRICS, *EPOCH_READINGS, "epoch", "seconds", "images_per_second")})
        self.update({name: list(values) for name, values in (epochs or {}).items()})
        self.batches: dict[str, list[float]] = {name: [] for name in ("step", "epoch", *METRICS)}
        self.batches.update({name: list(values) for name, values in (batches or {}).items()})
        self.diverged = ""  # where a loss, or G itself, ceased to be a number
        for lines in (self, self.batches):  # an older record lacks some readings
            for values in lines.values():
                values[:0] = [None] * (len(lines["epoch"]) - len(values))
        self.config = config

    def to_json(self) -> dict[str, Any]:
        """Return config, epochs and batches as JSON-ready dictionaries."""
        epochs = {"epochs": dict(self), "batches": self.batches, "diverged": self.diverged}
        return {"config": dataclasses.asdict(self.config), **epochs}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Return the history that `to_json` wrote."""
        history = cls(configure(Config(), **record["config"]), record["epochs"], record["batches"])
        history.diverged = record.get("diverged", "")
        return history

    def record(self, name: str, value: float) -> None:
        """Write a value for the newest epoch under a name of one's own; epochs without one hold None.

        Raises ValueError before the first epoch has ended.
        """
        if not self["epoch"]:
            raise ValueError(f"{name}: no epoch has ended yet; record it in on_epoch_end")
        values = self.setdefault(name, [])
        values += [None] * (len(self["epoch"]) - len(values))
        values[-1] = float(value)

    def line(self, index: int = -1) -> dict[str, float]:
        """Return the values of one epoch, by default the newest; empty before the first one."""
        present = {name: values for name, values in self.items() if -len(values) <= index < len(values)}
        return {name: values[index] for name, values in present.items() if values[index] is not None}

    def until(self, epochs: int) -> Self:
        """Return what this history was when it had so many lines."""
        lines = {name: values[:epochs] for name, values in self.items()}
        known = sum(epoch <= lines["epoch"][-1] for epoch in self.batches["epoch"]) if epochs else 0
        return type(self)(self.config, lines, {name: values[:known] for name, values in self.batches.items()})

    def finite(self) -> bool:
        """Return whether training has not diverged and the newest measurements are numbers."""
        newest = [self.batches[name][-1] for name in METRICS if self.batches[name]]
        return not self.diverged and all(value is None or math.isfinite(value) for value in newest)

    def last(self) -> dict[str, float]:
        """Return the newest epoch's values, empty before the first one."""
        return self.line(-1)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.last().items() if name in METRICS)
        return f"History({len(self['epoch'])} epochs{'; last: ' + shown if shown else ''})"


class Callback:
    """Do something while a GAN trains; every method may be left out and receives the GAN.

    Look at `gan.epoch` (finished ones), `gan.batch`, `gan.step`, `gan.history`; call `gan.stop(reason)` to end the run.
    """

    def on_train_begin(self, gan: Trainer) -> None:
        """Run before the first batch."""

    def on_batch_end(self, gan: Trainer) -> None:
        """Run after every iteration."""

    def on_epoch_end(self, gan: Trainer) -> None:
        """Run after every epoch, a last one cut short included."""

    def on_train_end(self, gan: Trainer) -> None:
        """Run at the end, however training ended."""


class Trainer:
    """Hold two networks, their optimisers and all that training needs to go on; a recipe adds the networks.

    Raises ValueError for an unknown Config field, a value out of range, or images that the networks cannot make.
    """

    recipe = ""  # the name in checkpoints and on the command line
    defaults = Config()
    networks: tuple[Callable[[Config], nn.Module], Callable[[Config], nn.Module]]
    losses: Callable[[Config], Any] = staticmethod(lambda config: LOSSES[config.loss](config))

    def __init__(self, config: Config | None = None, **overrides: Any) -> None:
        self.config = self.resolve(config, **overrides)
        self.device = pick_device(self.config.device)
        self.precision = pick_precision(self.config.precision, self.device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._check_config()
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.default_generator.manual_seed(self.config.seed)
            self.generator = self._place(self.networks[0](self.config))
            self.discriminator = self._place(self.networks[1](self.config))
            if self.rank:  # each process draws its own noise
                torch.default_generator.manual_seed(self.config.seed + 1_000_003 * self.rank)
            self._rng = {"cpu": torch.get_rng_state()}
        quick_D, quick_G = self._compile(self.discriminator), self._compile(self.generator)
        # as the two steps call them; who samples calls the networks themselves, whose batches vary
        self.players = {"D": self._parallel(quick_D), "frozen D": quick_D, "G": self._parallel(quick_G)}
        self.average = copy.deepcopy(self.generator).requires_grad_(False) if self.config.ema else None
        self.optimizer_G = make_optimizer(self.generator, self.config, self.config.lr_G)
        self.optimizer_D = make_optimizer(self.discriminator, self.config, self.config.lr_D)
        scaling = self.precision == "fp16"  # gradients below fp16's range are lost without it; else it does nothing
        self.scaler_G = torch.amp.GradScaler(self.device.type, enabled=scaling)
        self.scaler_D = torch.amp.GradScaler(self.device.type, enabled=scaling)
        self.loss = self.losses(self.config)
        self.history = History(self.config)
        self.epoch, self.step, self.position = 0, 0, 0  # finished epochs, iterations, images seen of this epoch
        self.stop_reason: str | None = None
        self.last_checkpoint: Path | None = None
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self._source: Any = None
        self._running = False  # whether `train` is under way
        self.trained_on: str | None = None  # the source by name, also of a checkpoint
        self._length = 0  # images of the data that position counts in
        self._rows: list[Tensor] = []  # measurements on the device, fetched every log_every batches
        self._share: float | Tensor = live(0.0, self.device)  # of the new weights in the average
        self.rate_left: float | Tensor = live(1.0, self.device)  # share of the learning rates that the schedule leaves
        self._graphs: IterationGraphs | None = None
        self._sums = dict.fromkeys((*METRICS, "D_G_z²", "count", "images", "seconds"), 0.0)  # of the epoch under way

    @classmethod
    def resolve(cls, config: Config | None = None, **overrides: Any) -> Config:
        """Return the recipe's Config, or the given one, with overrides."""
        return configure(config or cls.defaults, **overrides)

    @classmethod
    def check_image_size(cls, size: int) -> None:
        """Raise ValueError, naming sizes that work, unless the recipe's networks can make this one."""
        if size % 4:
            raise ValueError(
                f"image_size = {size}: {cls.__name__} doubles twice, so it makes multiples of 4 from 16 on; "
                f"the nearest are {max(16, size // 4 * 4)} and {size // 4 * 4 + 4}"
            )

    def _check_config(self) -> None:
        """Raise ValueError where the Config does not fit the recipe's networks or the processes that share a batch."""
        pack, batch_size = self.config.pack, self.config.batch_size
        self.check_image_size(self.config.image_size)
        grey = self.networks[1] in (StableDiscriminator, ProgressiveDiscriminator)
        if grey and max(self.config.channels, pack) > 1:
            raise ValueError(f"{type(self).__name__} has grey images, judged one by one: channels and pack must be 1")
        if grey and self.config.conditional:
            raise ValueError(
                f"{type(self).__name__} has no classes; FastDCGAN and ConditionalDCGAN take conditional=True"
            )
        if batch_size % (self.world * pack):
            raise ValueError(
                f"batch_size = {batch_size} must be a multiple of the {self.world} processes"
                + f" times pack = {pack}" * (pack > 1)
            )

    def _place(self, network: nn.Module) -> nn.Module:
        """Return the network on the device, its convolutions in the layout that is fastest on CPU and GPU."""
        return network.to(self.device, memory_format=torch.channels_last)

    def _compile(self, network: nn.Module) -> nn.Module:
        """Return the network, compiled where the Config asks for it."""
        if not self.config.compile:
            return network
        if isinstance(network, Growing):
            raise ValueError(f"{type(self).__name__} changes while it trains: compile must be False")
        return torch.compile(network, dynamic=False)

    def _parallel(self, network: nn.Module) -> nn.Module:
        """Return the network, its gradients averaged over all processes where `torchrun` started several.

        BatchNorm's buffers stay apart within an epoch: D runs twice before its backward pass, which a broadcast into
        them would break.
        """
        if self.world == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        idle = isinstance(network, Growing)  # layers that have not grown yet get no gradient
        return DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=False, find_unused_parameters=idle
        )

    def reconfigure(self, **changes: Any) -> None:
        """Change Config fields from the next batch on; raises ValueError for those that shape the networks."""
        config = configure(self.config, **changes)
        fixed = [
            "image_size", "channels", "pack", "nz", "ngf", "ndf", "conditional", "conditioning", "num_classes",
            "batch_norm_G", "batch_norm_D", "optimizer", "start_at_background", "seed", "dropout_D", "dropout_G",
            "device", "precision", "compile",
        ]  # fmt: skip
        changed = [name for name in fixed if getattr(config, name) != getattr(self.config, name)]
        if changed or bool(config.ema) != bool(self.config.ema):
            raise ValueError(
                f"{', '.join(changed) or 'ema'} is built in; make a new {type(self).__name__} to change it"
            )
        before, self.config = self.config, config
        try:
            self._check_config()
            if self._running:  # else the next call may bring other data, and looks
                self._check_number(len(self.images))
        except ValueError:
            self.config = before
            raise
        self.history.config = config
        self.loss = self.losses(config)
        for optimizer in (self.optimizer_D, self.optimizer_G):
            for group in optimizer.param_groups:
                group.update({name: value for name, value in optimizer_settings(config).items() if name in group})

    def restart(self) -> None:
        """Begin anew with fresh networks and an empty history; Config and data stay."""
        data = {name: vars(self)[name] for name in ("images", "labels", "_source", "trained_on")}
        self.__init__(self.config)
        vars(self).update(data)

    # ------------------------------------------------------------------------------------------------ the loop
    def train(
        self,
        epochs: int | None = None,
        batch_size: int | None = None,
        *,
        data: str | Path | Tensor | tuple[Tensor, Tensor] | None = None,
        max_seconds: float | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> History:
        """Train on, from where the last call or checkpoint ended, and return the history.

        epochs: how many further ones (None: what config.num_epochs leaves). data: a source of `load_images`, uint8
        images (N, H, W), or (images, labels); None: what it was trained on before, at first "mnist". max_seconds: stop
        after the batch that reaches it; a schedule falls to its end within the limit, and begins again in the next
        call. callbacks: None for the recipe's own; [] for silence. Ctrl-C stops after the batch: all is kept, and the
        next call goes on there. Several processes stop together, at every `log_every` batches.
        Raises ValueError for data that do not fit, DivergenceError when a loss is no longer a number.
        """
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds = {max_seconds!r}; it must be above 0")
        compilers = ("g++", "clang++", "cl", os.environ.get("CXX", "g++"))
        if self.config.compile and self.device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise ValueError("compile = True needs a C++ compiler (g++, clang++ or cl); install one, or leave it False")
        before = self.config
        try:
            if batch_size is not None:
                self.reconfigure(batch_size=batch_size)
            self._set_data(data)
        except Exception:  # what cannot be is not kept
            if self.config is not before:
                self.reconfigure(batch_size=before.batch_size)
            raise
        torch.set_flush_denormal(True)  # subnormal numbers, common early on, are many times slower
        callbacks = self.default_callbacks() if callbacks is None else list(callbacks)
        callbacks = callbacks if self.rank == 0 else []  # one process shows and saves
        started = 1 if self.position else 0  # an epoch that was cut short is finished in any case
        left = max(self.config.num_epochs - self.epoch, started) if epochs is None else max(0, epochs)
        if epochs is None and not left and self.config.num_epochs:
            warnings.warn(
                f"num_epochs = {self.config.num_epochs} are done, so nothing was trained; train(n) adds n", stacklevel=2
            )
        self.last_epoch = self.epoch + left
        self._clock, self._max_seconds, self._elapsed, self.stop_reason = time.perf_counter(), max_seconds, 0.0, None
        with stop_on_interrupt(self), self._recording():
            self._tell(callbacks, "on_train_begin")
            try:
                self._running = True
                while self.epoch < self.last_epoch and not self.stop_reason:
                    self._train_epoch(callbacks)
            finally:
                self._running = False
                self._tell(callbacks, "on_train_end")
        return self.history

    def stop(self, reason: str) -> None:
        """Ask the loop to end after the batch under way; `reason` is kept in `gan.stop_reason`."""
        self.stop_reason = reason

    def default_callbacks(self) -> list[Callback]:
        """Return what `train` calls when it is given no callbacks."""
        return []

    def _train_epoch(self, callbacks: Sequence[Callback]) -> None:
        """Go through the data once, or through what an interrupted epoch has left."""
        self.generator.train()
        self.discriminator.train()
        if self.step == 0 and self.config.start_at_background:
            start_at_background(self.generator, self.images)
        self._drop_unfinished_line()
        step, before = self.step, self._positions()
        for batches in self._epoch_batches():
            start = time.perf_counter()
            self._follow_schedule()
            with self._own_rng():
                self._iterate(batches)
            self._sums["seconds"] += time.perf_counter() - start
            self._tell(callbacks, "on_batch_end")
            if self.world == 1 or self.batch % self.config.log_every == 0:
                self._agree()
                if self.stop_reason:
                    break
        start = time.perf_counter()
        self._fetch_rows()  # on a GPU this waits for what was launched
        self._sums["seconds"] += time.perf_counter() - start
        self._share_buffers()
        self._close_epoch(step, before)
        self._tell(callbacks, "on_epoch_end")
        self._agree()

    def _epoch_batches(self) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Yield, for each iteration, one batch for every D step, in an order that follows from seed and epoch.

        The last, smaller batch is dropped: its statistics would be noisier, and shapes that never change run faster.
        """
        order_rng = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.images), generator=order_rng).to(self.device)
        while self.position + self.config.batch_size * max(1, self.config.d_steps) <= len(order):
            batches, size = [], self.config.batch_size  # read anew: a callback may change it
            for _ in range(max(1, self.config.d_steps)):
                picked = order[self.position : self.position + size][self.rank :: self.world]
                real = normalise(self.images[picked]).contiguous(memory_format=torch.channels_last)
                batches.append((real, self.labels[picked] if self.config.conditional else None))
                self.position += size
            yield batches

    def _iterate(self, batches: list[tuple[Tensor, Tensor | None]]) -> None:
        """Take one iteration, on a GPU by replaying an earlier one, and note what was measured."""
        if self.average is not None:  # faster at first (Yazıcı et al. 2019)
            self._share = live(1 - min(self.config.ema, (1 + self.step) / (10 + self.step)), self._share)
        self._rows.append((self._graphs.play if self._graphs else self.play)(batches))
        self.step += 1
        self._sums["images"] += self.world * sum(len(real) for real, _ in batches)
        if self.batch % self.config.log_every == 0:
            self._fetch_rows()

    def play(self, batches: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Take D's steps, each on a batch of its own, then G's; return METRICS. A variant swaps models or loss.

        Nothing here waits for the device or decides by a value on it, so that a CUDA graph can hold it; networks that
        grow do, and are not recorded.
        """
        for real, labels in batches:
            fake = self._fake(len(real), labels)  # fakes carry the labels of the real batch
            measured = train_discriminator(self, real, fake, labels)
        for turn in range(max(1, self.config.g_steps)):
            if turn or not self.config.detach:  # the graph of the first fakes is used up
                fake = self._fake(len(real), labels)
            measured |= train_generator(self, fake, labels, measured["real_logits"])
        if self.average is not None and self.config.g_steps:
            self._update_average()
        return torch.stack([measured[name] for name in METRICS])

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Record and replay for as long as a call of `train` lasts: between two of them everything may change.

        On a GPU in a stream of its own, since what the default one has begun cannot go into a CUDA graph.
        """
        self._graphs = IterationGraphs(self) if self._can_record() else None
        try:
            with own_stream(self.device) if self._graphs else nullcontext():
                yield
        finally:
            self._graphs = None

    def _can_record(self) -> bool:
        """Return whether iterations can become CUDA graphs: one GPU, networks that stay, an optimiser made for it."""
        alone = self.device.type == "cuda" and self.world == 1
        return (
            alone
            and self.config.cuda_graphs
            and self.config.optimizer == "adam"
            and not isinstance(self.generator, Growing)
        )

    def constants(self) -> tuple[Any, ...]:
        """Return what Python decides of the iteration at hand: a CUDA graph stands for those with equal ones only."""
        modes = tuple(
            module.training for network in (self.generator, self.discriminator) for module in network.modules()
        )
        return self.config, id(self.loss), self._penalty_is_due(), self._noise(), modes

    def _penalty_is_due(self) -> bool:
        """Return whether D's slope is penalised in this iteration."""
        return self.config.gradient_penalty > 0 and self.step % self.config.penalty_every == 0

    def _fake(self, n: int, labels: Tensor | None) -> Tensor:
        """Return n generated images that still know how G made them."""
        with self.autocast():
            z = torch.randn(n, self.config.nz, device=self.device)
            return self.players["G"](z, labels).float()

    def update(self, player: str, loss: Tensor) -> Tensor:
        """Take one step of player "D" or "G" and return the length of its gradient; a frozen player keeps its weights.

        The scaler acts in fp16 only, where it skips a step that overflowed.
        """
        network, optimizer, scaler = {
            "D": (self.discriminator, self.optimizer_D, self.scaler_D),
            "G": (self.generator, self.optimizer_G, self.scaler_G),
        }[player]
        astray = player == "D" and not self.config.detach  # the mistake in full: G follows the gradient that reaches it
        optimizer.zero_grad(set_to_none=True)
        if astray:
            self.optimizer_G.zero_grad(set_to_none=True)
        if not (self.config.d_steps if player == "D" else self.config.g_steps):
            return torch.zeros((), device=self.device)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        length = gradient_length(network)
        scaler.step(optimizer)
        if astray:
            scaler.step(self.optimizer_G)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)  # so that what lies in G after D's step has leaked there
        return self.finite(length)

    def finite(self, length: Tensor) -> Tensor:
        """Return the length of a gradient, 0 for one that overflowed in fp16: such a step is skipped."""
        return length.nan_to_num(0, 0, 0) if self.scaler_D.is_enabled() else length

    def autocast(self) -> torch.autocast:
        """Return the context in which the networks compute in this device's precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        kept = self._graphs is None  # all threads share the cache, and what is cast while recording has no values
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=kept)

    def noisy(self, images: Tensor) -> Tensor:
        """Return what D sees: with Gaussian noise where the Config asks for it (Arjovsky & Bottou 2017, §3)."""
        std = self._noise()
        return images + std * torch.randn_like(images) if std else images

    def _noise(self) -> float:
        """Return the standard deviation of the noise on what D sees, which may fade."""
        fade = 1 - self.step / self.config.noise_D_batches if self.config.noise_D_batches else 1.0
        return self.config.noise_D * max(0.0, fade)

    def _follow_schedule(self) -> None:
        """Set learning rates, `rate_left` and the size of networks that grow, for the share of the run that is done.

        Of the run as long as it is known to be: when it is made longer, rates rise again.
        """
        begun = self.position - self.config.batch_size * max(1, self.config.d_steps)  # this iteration is still to come
        done = self.epoch + begun / len(self.images)
        share = done / max(self.config.num_epochs, self.last_epoch, 1)
        if self._max_seconds is not None:
            share = max(share, self._elapsed / self._max_seconds)
        factor = max(0.0, min(1.0, 2 * (1 - share))) if self.config.lr_schedule == "linear_tail" else 1.0
        self.rate_left = live(factor, self.rate_left)
        for optimizer, lr in ((self.optimizer_D, self.config.lr_D), (self.optimizer_G, self.config.lr_G)):
            for group in optimizer.param_groups:
                group["lr"] = live(lr * factor, group["lr"])
        for network in (self.generator, self.discriminator, self.average):
            if isinstance(network, Growing):
                network.grow(share / self.config.growth if self.config.growth else 1.0)

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged generator towards the present one."""
        for mine, new in zip(self.average.state_dict().values(), self.generator.state_dict().values(), strict=True):
            mine.lerp_(new, self._share) if mine.is_floating_point() else mine.copy_(new)

    # ------------------------------------------------------------------------------------------------ the record
    def _fetch_rows(self) -> None:
        """Bring the measurements since the last look from the device, check them and add them up."""
        if not self._rows:
            return
        rows = self._mean_over_processes(torch.stack(self._rows).double()).cpu()
        self._rows = []
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        means = rows.mean(dim=0).tolist()
        epoch = self.epoch + self.position / len(self.images)
        for name, value in zip(("step", "epoch", *METRICS), (self.step, epoch, *means), strict=True):
            self.history.batches[name].append(value)
        if len(bad):
            self._diverged(f"batch {self.batch - len(rows) + int(bad[0]) + 1}")
        for name, value in zip(METRICS, rows.sum(dim=0).tolist(), strict=True):
            self._sums[name] += value
        self._sums["D_G_z²"] += rows[:, METRICS.index("D_G_z")].square().sum().item()
        self._sums["count"] += len(rows)

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def _agree(self) -> None:
        """Let all processes go by the same clock and stop together; alone, a stop takes effect after every batch."""
        self._elapsed = time.perf_counter() - self._clock
        if self.world > 1:
            shared = torch.tensor([self._elapsed, float(self.stop_reason is not None)], device=self.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            self._elapsed = shared[0].item()
            if shared[1] and not self.stop_reason:
                self.stop("another process stopped")
        if self._max_seconds is not None and self._elapsed >= self._max_seconds and not self.stop_reason:
            self.stop(f"max_seconds = {self._max_seconds:g} reached")

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Average what BatchNorm has learnt in each process, so that all sample and save the same."""
        for network in (self.generator, self.discriminator, self.average) if self.world > 1 else ():
            for buffer in network.buffers() if network is not None else ():
                if buffer.is_floating_point():
                    self._mean_over_processes(buffer)

    def _diverged(self, where: str) -> None:
        """Raise the error that names the place and the last good checkpoint."""
        self.history.diverged = f"epoch {self.epoch + 1}, {where}"
        kept = (
            f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint was saved"
        )
        raise DivergenceError(
            f"a loss is not a number in {self.history.diverged}: training has stopped, the history is kept, "
            f"{kept}; load it or start anew with a lower lr_G and lr_D"
        )

    def _close_epoch(self, step: int, before: dict[str, Tensor]) -> None:
        """Write the epoch's line; one that was cut short keeps its sums and gets a fractional number."""
        sums, size = self._sums, self.config.batch_size * max(1, self.config.d_steps)
        line = {name: sums[name] / max(sums["count"], 1) for name in METRICS}
        line["swing"] = math.sqrt(max(0.0, sums["D_G_z²"] / max(sums["count"], 1) - line["D_G_z"] ** 2))
        if self.step > step:  # else nobody could move
            line |= {name: relative_change(before[name], now) for name, now in self._positions().items()}
        line |= self.sample_readings()
        if self.config.gradient_penalty:
            line["slope"] = self.slope()
        if not math.isfinite(line["diversity"]):  # the last update broke G before any loss could show it
            self._diverged("its last batch")
        line["seconds"] = sums["seconds"]
        line["images_per_second"] = sums["images"] / max(sums["seconds"], 1e-9)
        if self.position + size > len(self.images):
            self.epoch, self.position = self.epoch + 1, 0
            self._sums = dict.fromkeys(sums, 0.0)
        line["epoch"] = self.epoch + self.position / len(self.images)
        for name in self.history:
            self.history[name].append(line.get(name))

    def _positions(self) -> dict[str, Tensor]:
        """Return where each network stands: its weights, and the means that its BatchNorm layers have learnt."""
        where = {}
        for key, network in (("D", self.discriminator), ("G", self.generator)):
            where[f"move_{key}"] = torch.cat([p.detach().flatten() for p in network.parameters()])
            means = [value for name, value in network.named_buffers() if name.endswith("running_mean")]
            where |= {f"move_BN_{key}": torch.cat(means)} if means else {}
        return where

    def _drop_unfinished_line(self) -> None:
        """Remove the line of an epoch that was cut short; it is written anew when the epoch is whole."""
        if self.history["epoch"] and self.history["epoch"][-1] > self.epoch:
            for values in self.history.values():
                values.pop()

    @property
    def batch(self) -> int:
        """Count the iterations of the epoch under way."""
        return self.position // (self.config.batch_size * max(1, self.config.d_steps))

    def _tell(self, callbacks: Sequence[Callback], event: str) -> None:
        for callback in callbacks:
            getattr(callback, event, lambda gan: None)(self)

    # ------------------------------------------------------------------------------------------------ data and chance
    def _set_data(self, data: str | Path | Tensor | tuple[Tensor, Tensor] | None) -> None:
        """Put the data on the device, resized; a second call with the same source does nothing."""
        if data is None:
            data = self._source if self._source is not None else self.trained_on or "mnist"
            if self.step and data is not self._source and not self.trained_on:
                warnings.warn("the checkpoint does not name its data: training goes on with mnist", stacklevel=3)
        named, other = isinstance(data, (str, Path)), False
        if not (data is self._source or (named and isinstance(self._source, (str, Path)) and data == self._source)):
            images, labels = self._read_data(data)
            before, name = self.images, str(data) if named else None
            self.images = resize_images(images, self.config.image_size).to(self.device)
            self.labels = labels.to(self.device, torch.long)
            other = before is not None and not torch.equal(before, self.images)
            other = other or (before is None and None not in (name, self.trained_on) and name != self.trained_on)
            self._source, self.trained_on = data, name
        self._check_number(len(self.images))
        if self.position and (other or len(self.images) != self._length):  # the epoch under way cannot be finished
            self._drop_unfinished_line()
            self.position, self._sums, self._rows = 0, dict.fromkeys(self._sums, 0.0), []
        self._length = len(self.images)

    def _read_data(self, data: str | Path | Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of what `train` takes as data; raises ValueError where they do not fit."""
        if isinstance(data, (str, Path)):
            images, labels = load_images(data)
        elif hasattr(data, "ndim"):
            images, labels = torch.as_tensor(data), torch.full((len(data),), -1)
        elif isinstance(data, (tuple, list)) and len(data) == 2:
            images, labels = map(torch.as_tensor, data)
        else:
            raise ValueError(f"data is a {type(data).__name__}; needed: a source, images, or (images, labels)")
        _check_pair(images, labels, "data")
        if (channels := images.shape[1] if images.ndim == 4 else 1) != self.config.channels:
            raise ValueError(
                f"the images have {channels} channels (they come first: N, C, H, W), "
                f"Config.channels is {self.config.channels}"
            )
        self._check_labels(labels)
        self._check_number(len(images))
        return images, labels

    def _check_number(self, n: int) -> None:
        """Raise ValueError unless n images are enough for an iteration."""
        steps = max(1, self.config.d_steps)
        if self.config.batch_size * steps > n:
            raise ValueError(
                f"one iteration needs {self.config.batch_size * steps:,} images (batch_size × d_steps), the data hold "
                f"{n:,}; " + (f"lower batch_size to at most {n // steps}" if n >= 2 * steps else "get more")
            )

    def _check_labels(self, labels: Tensor) -> None:
        """Raise ValueError unless a class-conditional recipe has a label from 0 to num_classes - 1 for each image."""
        if not self.config.conditional:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.config.num_classes:
            raise ValueError(
                f"{type(self).__name__} is class-conditional and needs labels 0 … {self.config.num_classes - 1}, the "
                f"data have {'none' if low < 0 else f'{low} … {high}'}; pass (images, labels) or conditional=False"
            )

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Draw from the GAN's own random numbers, and leave the caller's as they were."""
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            torch.set_rng_state(self._rng["cpu"])
            if cuda and "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"], self.device)
            elif cuda:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(self.config.seed + self.step + 1_000_003 * self.rank)
            yield
            self._rng["cpu"] = torch.get_rng_state()
            if cuda:
                self._rng["cuda"] = torch.cuda.get_rng_state(self.device)

    # ------------------------------------------------------------------------------------------------ sampling
    def latent(self, n: int, seed: int | None = None) -> Tensor:
        """Return n latent vectors z ~ N(0, I) (n, nz); the same seed gives the same ones, None new ones each time."""
        rng = torch.Generator()
        rng.seed() if seed is None else rng.manual_seed(seed)
        return torch.randn(n, self.config.nz, generator=rng)

    def generate(self, z: Tensor, digits: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return images float32 (n, 1, H, W) in [-1, 1], on the CPU, that G (its average, if kept) makes of z (n, nz).

        digits: of a class-conditional recipe (None: 0 to 9 in turn). Eval mode, no gradients; raises ValueError.
        """
        labels = self._digits(len(z), digits)
        network = self.average if self.average is not None else self.generator
        with evaluating(network), self.autocast():
            parts = []
            for start in range(0, len(z), 500):
                part = slice(start, start + 500)
                images = network(z[part].to(self.device), None if labels is None else labels[part])
                parts.append(images.float().cpu().contiguous())
        return torch.cat(parts)

    def sample(self, n: int, seed: int | None = None, digits: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """Return n generated images float32 (n, 1, H, W) in [-1, 1].

        digits: class-conditional recipes only: one digit for all, or n of them; None makes all alike often.
        Raises ValueError for n < 1 and for digits that do not fit.
        """
        if n < 1:
            raise ValueError(f"n = {n}; sample at least one image")
        return self.generate(self.latent(n, seed), digits)

    def _digits(self, n: int, digits: int | Sequence[int] | Tensor | None) -> Tensor | None:
        """Return the labels (n,) to generate, None for a recipe without classes; raises ValueError."""
        classes = self.config.num_classes
        if not self.config.conditional:
            if digits is not None:
                raise ValueError(f"this {type(self).__name__} has no classes: digits must be None (FastDCGAN has)")
            return None
        labels = torch.arange(n) % classes if digits is None else torch.as_tensor(digits).reshape(-1)
        labels = labels.expand(n) if len(labels) == 1 else labels
        if len(labels) != n or labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(f"digits must be one or n = {n} whole numbers from 0 to {classes - 1}")
        return labels.long().to(self.device)

    def score(self, images: Tensor, digits: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """Return D(x), by default D's probability that each of the images (n, 1, H, W) in [-1, 1] is real, as (n,).

        A critic, or another loss without probabilities, gives its logits.

        digits: what the images show; class-conditional recipes need it. Raises ValueError.
        """
        if self.config.conditional and digits is None:
            raise ValueError("this recipe's D judges an image together with its digit: pass digits")
        pack = self.config.pack
        if len(images) % pack:
            raise ValueError(f"this D judges packs of {pack} images: pass a multiple of it, not {len(images)}")
        labels = self._digits(len(images), digits)
        parts = [None] * len(images) if labels is None else labels.split(500)
        with evaluating(self.discriminator), self.autocast():
            pairs = zip(images.split(500 // pack * pack), parts, strict=False)
            logits = [real_logit(self.discriminator(part.to(self.device), label)).float() for part, label in pairs]
        return answer(torch.cat(logits), self.config).repeat_interleave(pack).cpu()

    def fixed_samples(self, n: int = PREVIEW) -> Tensor:
        """Return the images (n, 1, H, W) of the same n latent vectors at every call, so that one sees digits travel."""
        return self.generate(self.latent(max(n, DIVERSITY_SAMPLES), self.config.seed)[:n])

    def real_samples(self, n: int = PREVIEW) -> Tensor:
        """Return n training images (n, 1, H, W) in [-1, 1], always the same; raises ValueError before training."""
        return normalise(self.images[self._preview(n)]).cpu()

    def _preview(self, n: int) -> Tensor:
        """Return the indices of n training images, the same at every call."""
        if self.images is None:
            raise ValueError("there are no training images yet: call train() first")
        rng = torch.Generator().manual_seed(self.config.seed)
        return torch.randperm(len(self.images), generator=rng)[:n].to(self.device)

    def sample_readings(self) -> dict[str, float]:
        """Return `sample_diversity` and `sample_spacing` of the fixed-noise samples.

        Of a conditional recipe diversity is the mean within the classes: across them, one image for each digit would
        already look varied.
        """
        n, classes = DIVERSITY_SAMPLES, self.config.num_classes
        fake, real = self.fixed_samples(n), self.real_samples(n)
        groups = [(fake, real)]
        if self.config.conditional:
            asked, shown = torch.arange(n) % classes, self.labels[self._preview(n)].cpu()
            pairs = [(fake[asked == k], real[shown == k]) for k in range(classes)]
            groups = [(mine, theirs) for mine, theirs in pairs if len(mine) > 1 and len(theirs) > 1] or groups
        diversity = sum(sample_diversity(*pair) for pair in groups) / len(groups)
        return {"diversity": diversity, "spacing": sample_spacing(fake, real)}

    def slope(self, n: int = 128) -> float:
        """Return the mean length of D's gradient halfway between n training images and fixed-noise samples."""
        real = self.real_samples(n)
        real = real[: len(real) // self.config.pack * self.config.pack]  # whole packs
        between = (real + self.fixed_samples(len(real))).div(2).to(self.device)
        labels = self._digits(len(real), None)
        with evaluating(self.discriminator), torch.enable_grad():
            return slopes(self.discriminator, between, labels).mean().item()


class IterationGraphs:
    """Replay a GAN's iterations as CUDA graphs: one launch in place of a thousand, for which small networks wait.

    A graph repeats its kernels with the numbers that Python gave them, so every `gan.constants()` has one of its own,
    recorded when they come for the fourth time: by then cuDNN has chosen its kernels, and Adam has its memory. What
    changes meanwhile lies in tensors (batch, learning rates and their share, share of the average) or in CUDA's random
    state.
    """

    def __init__(self, gan: Trainer) -> None:
        self.gan = gan
        self.forget()

    def __deepcopy__(self, memo: dict) -> None:
        """Leave a copied GAN without: graphs write into the tensors of the one that they were recorded from."""

    def forget(self) -> None:
        """Begin anew, as is due when the tensors that a graph writes into are replaced."""
        self.config, self.refused = self.gan.config, False
        self.seen: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()  # shared: no two of them run at a time

    def play(self, batches: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Take an iteration as `gan.play` does, and return its METRICS."""
        if self.gan.config is not self.config:  # what was recorded for the old one would only take memory
            self.forget()
        if not self.config.cuda_graphs:
            return self.gan.play(batches)
        key = (self.gan.constants(), tuple(real.shape for real, _ in batches))
        self.seen[key] += 1
        if self.seen[key] >= 4 and key not in self.graphs and not self.refused:
            self._record(key, batches)
        if key not in self.graphs:
            return self.gan.play(batches)
        graph, places, row = self.graphs[key]
        for place, batch in zip(places, batches, strict=True):
            for tensor, new in zip(place, batch, strict=True):
                if tensor is not None:
                    tensor.copy_(new)
        graph.replay()
        return row.clone()  # the next replay writes over it

    def _record(self, key: tuple, batches: list[tuple[Tensor, Tensor | None]]) -> None:
        """Record an iteration, which takes no step: the graph, its batches' places and METRICS; or go on without."""
        places = [tuple(None if tensor is None else tensor.clone() for tensor in batch) for batch in batches]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:  # thread_local: what other threads ask of the GPU meanwhile does not break it off
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                row = self.gan.play(places)
        except BaseException as error:
            self.refused = True
            self._clear_up()
            if not isinstance(error, RuntimeError):
                raise
            warnings.warn(
                f"training goes on without CUDA graphs, several times slower: {str(error).splitlines()[0]}. A loss or "
                "network that looks at values (.item(), if) cannot be recorded; cuda_graphs=False ends this warning",
                stacklevel=2,
            )
        else:
            self.graphs[key] = graph, places, row

    def _clear_up(self) -> None:
        """Undo what a recording that broke off leaves: gradients, scalers and random numbers that still wait for it.

        Earlier recordings go, too: they would draw from the random state that waits.
        """
        gan = self.gan
        self.graphs.clear()
        for optimizer in (gan.optimizer_D, gan.optimizer_G):
            optimizer.zero_grad(set_to_none=True)
        for name in ("scaler_D", "scaler_G"):
            scale = getattr(gan, name).state_dict()
            setattr(gan, name, torch.amp.GradScaler(gan.device.type, enabled=bool(scale)))
            if scale:
                getattr(gan, name).load_state_dict(scale)
        index = torch.cuda.current_device() if gan.device.index is None else gan.device.index
        fresh = torch.Generator(gan.device)
        fresh.set_state(gan._rng["cuda"])  # where this iteration began; the old one waits for the recording for good
        torch.cuda.default_generators[index].graphsafe_set_state(fresh)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU in a stream beside the default one, after what was begun there, which then waits in its turn."""
    if device.type != "cuda":
        yield
        return
    before, stream = torch.cuda.current_stream(device), _stream_of(device, threading.get_ident())
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


@functools.cache
def _stream_of(device: torch.device, thread: int) -> torch.cuda.Stream:
    """Return a GPU's second stream, one for each thread: each keeps memory of its own, and records by itself."""
    return torch.cuda.Stream(device)


def live(value: float, place: float | Tensor | torch.device) -> float | Tensor:
    """Return a number that changes between replays of a graph: on a GPU a tensor, `place` itself once there is one."""
    if isinstance(place, torch.device):
        return torch.tensor(value, device=place) if place.type == "cuda" else value
    return place.fill_(value) if isinstance(place, Tensor) else value


def sample_diversity(samples: Tensor, real: Tensor) -> float:
    """Return the root-mean-square distance between two random samples, divided by the same for real images.

    samples, real: (n, 1, H, W). 0: all samples alike (collapse); about 1: as varied as the data. Pixels only: it sees
    a generator that repeats one image, not one that leaves out a class.
    """
    spread_fake, spread_real = samples.var(dim=0).sum(), real.var(dim=0).sum()  # E‖x - y‖² = 2 Σ var
    return float((spread_fake / spread_real.clamp(min=1e-12)).sqrt())


def sample_spacing(samples: Tensor, real: Tensor) -> float:
    """Return the median distance from a sample to its nearest other sample, divided by the same for real images.

    samples, real: (n, 1, H, W), the same n, since more points stand closer. Near 0: samples come in copies or lie on
    a curve, as those of a generator with one latent dimension do, however far the curve reaches.
    """

    def median_gap(images: Tensor) -> Tensor:
        """Return the median distance to the nearest neighbour."""
        flat = images.flatten(1)
        return torch.cdist(flat, flat).fill_diagonal_(math.inf).min(dim=1).values.median()

    return float(median_gap(samples) / median_gap(real).clamp(min=1e-12))


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return how far a vector has moved, as a share of the longer of the two."""
    return float((after - before).norm() / torch.maximum(before.norm(), after.norm()).clamp(min=1e-12))


def make_optimizer(network: nn.Module, config: Config, lr: float) -> torch.optim.Optimizer:
    """Return the optimiser that the Config names, Adam in its fused form."""
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[config.optimizer]
    device = next(network.parameters()).device
    fused = {"fused": True, "capturable": device.type == "cuda"} if config.optimizer == "adam" else {}
    rate = live(lr, device) if config.optimizer == "adam" else lr
    return kind(network.parameters(), lr=rate, **optimizer_settings(config), **fused)


def optimizer_settings(config: Config) -> dict[str, Any]:
    """Return what the optimiser takes beside its learning rate; beta1 is SGD's momentum."""
    adam = {"betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    return {"adam": adam, "rmsprop": {}, "sgd": {"momentum": config.beta1}}[config.optimizer]


def pick_device(name: str) -> torch.device:
    """Return the torch device: for "auto" the GPU where there is one; raises ValueError for one that is not there."""
    if name == "auto":  # torchrun names a process's own GPU by LOCAL_RANK
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r} is not one that torch knows; use 'auto', 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but torch sees no GPU; use device='auto'")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": for "auto" what the device does well.

    CPU: bf16 needs AMX or AVX512-BF16, else it is slower than fp32. GPU: bf16 from compute capability 8 on; a T4 (7.5)
    only emulates it, so fp16. Raises ValueError for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision = 'fp16' needs a GPU; use 'auto', 'fp32' or 'bf16'")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode without gradients (BatchNorm uses what it learnt), and back as it was."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def or_warn(what: str) -> Iterator[None]:
    """Turn a failure to write into a warning: a full disk costs the file, never the training."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} was not saved: {error}", stacklevel=3)


@contextmanager
def stop_on_interrupt(gan: Trainer) -> Iterator[None]:
    """Turn the first Ctrl-C into a stop after the batch under way, so that D, G and the record agree.

    Outside the main thread, where Python delivers no signals, it does nothing: call `gan.stop` there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: Any) -> None:
        """Stop the GAN, and let the next Ctrl-C act as usual."""
        signal.signal(signal.SIGINT, before)
        gan.stop("interrupted")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# === Health: what the readings mean, by the recipe's README and by theory =============================================
ICONS = {"green": "🟢", "yellow": "🟡", "red": "🔴"}
WORDS = {"green": "healthy", "yellow": "watch", "red": "act"}  # colour is never the only sign
_ANSI = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}


@dataclass(frozen=True)
class Finding:
    """One line of the health panel; what to do about it is empty when there is nothing to do.

    `remedy` says it in words, `changes` for `dataclasses.replace(config, **finding.changes)`; a fault in the code has
    no changes. A `quiet` one is shown only when it is not green.
    """

    name: str
    status: str  # green | yellow | red
    value: str
    band: str
    message: str
    remedy: str = ""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    quiet: bool = False


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The health panel: the worst status and every finding; shows itself as HTML in a notebook, as text elsewhere."""

    status: str
    findings: tuple[Finding, ...]
    epoch: float

    @property
    def cause(self) -> Finding | None:
        """Return the first red finding, the most specific one: what to act on; None if nothing is red."""
        return next((f for f in self.findings if f.status == "red"), None)

    @property
    def shown(self) -> list[Finding]:
        """Return what the panel shows: all but the quiet findings that found nothing."""
        return [f for f in self.findings if not f.quiet or f.status != "green"]

    def __repr__(self) -> str:
        return panel_text(self)

    def _repr_html_(self) -> str:
        return panel_html(self)


@dataclass(frozen=True)
class Band:
    """What a recipe's README says of one reading: healthy inside `green`; readings alone never make it red."""

    metric: str
    title: str
    green: tuple[float, float]
    low: str  # what it means below the green band
    high: str  # what it means above it
    high_is_strong: bool  # above the band D is too strong and below it too weak, or the other way round


DCGAN_BANDS = (
    Band("D_x", "D(x)", (0.7, 0.9), "D is too weak to know real digits", "D is too sure of them", True),
    Band("D_G_z", "D(G(z))", (0.1, 0.6), "D is too strong: G learns nothing", "D is fooled", False),
)
STABLE_BANDS = (
    Band("D_acc", "D accuracy", (0.4, 0.7), "G is too strong", "D is too strong", True),
    Band("loss_D", "D loss", (1.15, 1.5), "below 1.35, where it settles: D wins", "above 1.35: D loses", False),
    Band("loss_G", "G loss", (0.6, 1.4), "below 0.85, where it settles: D loses", "above 0.85: D wins", True),
)


def diagnose(
    history: History,
    config: Config | None = None,
    bands: Sequence[Band] = (),
    samples: dict[str, float] | None = None,
) -> Diagnosis:
    """Read a history: faults first, the most specific one leading, then the recipe's bands, then what its labels imply.

    Pure: it depends on its arguments alone. config: None takes history.config. samples: readings of samples made now
    (`GAN.sample_readings`, `GAN.judge_samples`) in the place of those in the newest epoch. Raises ValueError for an
    empty history. How often it is right: tools/failure_runs.py. Theory: D* = (a·p_data + b·p_g) / (p_data + p_g)
    (Goodfellow et al. 2014, Prop. 1, with smoothed labels).
    """
    config, now = config or history.config, history.last() | (samples or {})
    if not history.last() and history.finite():
        raise ValueError("the history is empty: train before you diagnose")
    if not history.finite() or not all(math.isfinite(now.get(name, 0.0)) for name in (*METRICS, "diversity")):
        findings = [_diverged(history, config)]
    else:
        chances = config.loss in PROBABILITY_LOSSES
        findings = [check(now, history, config) for check in FAULT_CHECKS if chances or check not in PROBABILITY_CHECKS]
        findings += [_check_band(now, band, config) for band in bands if config.loss == "bce"]
        findings += [check(now, config) for check in THEORY_CHECKS.get(config.loss, ())]
    worst = max((f.status for f in findings), key=list(ICONS).index)
    return Diagnosis(worst, tuple(findings), now.get("epoch", 0.0))


def usual_suspect(config: Config) -> dict[str, Any]:
    """Return changes for the first setting that is known to break training; empty if none stands out."""
    rate = max(config.lr_G, config.lr_D)
    calm = {"lr_G": config.lr_G / 10, "lr_D": config.lr_D / 10} if rate >= 1e-3 else {}
    tiny_G, tiny_D = config.lr_G < 1e-7, config.lr_D < 1e-7
    suspects = (
        (not config.d_steps, {"d_steps": 1}),
        (not config.g_steps, {"g_steps": 1}),
        (
            tiny_G or tiny_D,
            {f"lr_{key}": max(rate, Config.lr_D) for key, tiny in (("G", tiny_G), ("D", tiny_D)) if tiny},
        ),
        (not config.detach, {"detach": True}),
        (not config.batch_norm_G, {"batch_norm_G": True, "batch_norm_D": not config.gradient_penalty}),  # both: refused
        (config.nz < 16, {"nz": 100}),
        (config.noise_D > 0.5, {"noise_D": 0.1}),
        (config.beta1 > 0.5, {"beta1": 0.5, **calm}),
        (config.lr_D > 4 * config.lr_G, {"lr_D": config.lr_G / 2}),  # the 64×64 recipe's proportion
        (config.lr_G > 4 * config.lr_D, {"lr_G": 2 * config.lr_D}),
    )
    return next((changes for stands_out, changes in suspects if stands_out), {})


def grade(value: float, green: tuple[float, float], yellow: tuple[float, float]) -> str:
    """Return "green" inside the first band, "yellow" inside the second, else "red" (NaN too)."""
    for status, (low, high) in (("green", green), ("yellow", yellow)):
        if low <= value <= high:
            return status
    return "red"


def _line(
    name: str, value: float, status: str, band: str, message: str, changes: dict[str, Any], quiet: bool = True
) -> Finding:
    """Return a finding; its remedy is the changes, spelt out; a quiet one that is green has nothing to say."""
    if status == "green":
        changes, message = {}, "" if quiet else message
    remedy = ", ".join(f"{key}={new:g}" if isinstance(new, float) else f"{key}={new}" for key, new in changes.items())
    return Finding(name, status, f"{value:.2g}" if quiet else f"{value:.2f}", band, message, remedy, changes, quiet)


def _diverged(history: History, config: Config) -> Finding:
    changes = usual_suspect(config) or {"lr_G": config.lr_G / 2, "lr_D": config.lr_D / 2}
    message = "training has diverged; load the last checkpoint, or start anew"
    return _line("losses are numbers", math.nan, "red", "finite", message, changes)


def _check_still(now: dict[str, float], history: History, config: Config) -> Finding:
    moves = {key: now.get(f"move_{key}", 1.0) for key in "DG"}
    player = min(moves, key=moves.get)
    status = "red" if moves[player] < 1e-6 else "green"
    message = f"{player}'s weights did not move in this epoch: only the other player learns"
    steps, rate = f"{player.lower()}_steps", f"lr_{player}"
    changes = {} if getattr(config, steps) else {steps: 1}
    if getattr(config, rate) < 1e-7:
        changes[rate] = max(config.lr_G, config.lr_D, Config.lr_D)
    return _line("a player stands still", moves[player], status, "moves > 0", message, changes)


def _check_batch_norm(now: dict[str, float], history: History, config: Config) -> Finding:
    moves = {key: now[f"move_BN_{key}"] for key in "DG" if f"move_BN_{key}" in now}
    player = min(moves, key=moves.get, default="G")
    status = "red" if moves and moves[player] == 0 else "green"
    message = f"{player} trains in eval mode: its BatchNorm has stopped learning; call .train() after sampling"
    return _line("BatchNorm", moves.get(player, 1.0), status, "its means move", message, {})


def _check_labels(now: dict[str, float], history: History, config: Config) -> Finding:
    wrong = now["D_acc"] < 0.4 and now["loss_D"] < discriminator_loss_bounds(config)[1] - 0.05
    message = "D's loss is low while its answers are wrong: real and fake are swapped in the loss; real is 1, fake 0"
    return _line("labels", now["D_acc"], "red" if wrong else "green", "accuracy and loss agree", message, {})


def _check_detach(now: dict[str, float], history: History, config: Config) -> Finding:
    status = "red" if now.get("leak", 0.0) > 0 else "green"
    message = "D's step leaves a gradient in G, which it should not touch: detach the fakes there"
    return _line("detach", now.get("leak", 0.0), status, "0", message, {"detach": True} if not config.detach else {})


def _check_copies(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now.get("spacing", 1.0)
    message = "samples stand closer to each other than real digits do: z hardly matters (mode collapse)"
    changes = usual_suspect(config) or _vary(config)
    status = grade(value, (0.5, 9), (least_variety(now, config), 9))
    return _line("copies among samples", value, status, "≥ 0.5 of real", message, changes)


def least_variety(now: dict[str, float], config: Config) -> float:
    """Return the share of real digits' variety below which samples convict.

    A known cause in the Config convicts sooner; the first epoch later, when a slow recipe has one shape for all.
    """
    return 0.45 if usual_suspect(config) else 0.1 if now.get("epoch", 2) <= 1 else 0.2


def _check_diversity(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now["diversity"]
    status = grade(value, (0.7, 1.3), (least_variety(now, config), 1.6))
    message = "samples differ from each other as real digits do"
    if value < 0.7:
        message = "samples vary less than real digits do: hardly trained yet, or collapsing"
        if status == "red":
            message = "samples are nearly all alike, whatever D says: mode collapse, or hardly trained"
    elif status != "green":
        message = "samples differ more than real digits do: still noise"
    changes = usual_suspect(config) or _vary(config)
    return _line("sample diversity", value, status, "0.7 – 1.3 of real", message, changes, quiet=False)


def _vary(config: Config) -> dict[str, Any]:
    """Return what brings variety back where no setting stands out."""
    return _noisier(config) if config.start_at_background else {"start_at_background": True}


def _noisier(config: Config) -> dict[str, Any]:
    """Return noise on D's input, or twice what is there (Arjovsky & Bottou 2017, §3)."""
    return {"noise_D": 2 * config.noise_D if 0 < config.noise_D <= 0.25 else 0.1}


def _check_classes(now: dict[str, float], history: History, config: Config) -> Finding:
    gap = now.get("class_gap", 0.0)
    varied = now["diversity"] > 0.7  # one shape for all, read as one digit, is the matter of the check above
    readable = varied and now.get("precision", 1.0) > 0.75 and now.get("confidence", 0.0) > 0.97
    status = "green" if gap < 0.3 else "red" if gap > 0.5 and readable else "yellow"
    message = "readable digits, but classes are missing (mode collapse)"
    if not readable:
        message = "most samples are read as a few digits: not digits yet, or classes are missing"
    return _line("classes", gap, status, "< 0.3 of another class", message, usual_suspect(config) or _vary(config))


def _check_memorisation(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now.get("near_copies", 0.0)
    message = "so many samples lie closer to a training image than 99 % of new real digits do: G copies"
    changes = {"ngf": max(1, config.ngf // 2), "dropout_D": max(0.3, config.dropout_D)}
    return _line("memorisation", value, grade(value, (0, 0.05), (0, 0.2)), "about 0.01", message, changes)


def _check_one_answer(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now.get("D_std", 1.0)
    message = "D gives every image the same answer: it has collapsed, or nothing is left to tell apart"
    return _line(
        "D's answers", value, grade(value, (0.03, 1), (0.01, 1)), "spread ≥ 0.03", message, _strengthen_D(config)
    )


def _check_too_strong(now: dict[str, float], history: History, config: Config) -> Finding:
    a, b = targets(config)
    separation, above = (now["D_x"] - now["D_G_z"]) / (a - b), (now["D_G_z"] - b) / (a - b)
    explodes = now["loss_G"] > 3 * generator_loss_at_equilibrium(config)
    wins = separation > 0.88 or now["loss_G"] > 9 * generator_loss_at_equilibrium(config)
    sure = config.loss == "bce" and now["D_acc"] > (0.9 if usual_suspect(config) else 0.93)  # pairs are easier to tell
    wins = wins or (explodes and (above < 0.1 or sure))
    status = "red" if wins else "yellow" if explodes else "green"
    message = f"D(G(z)) is at its floor {b:g} and G's loss is {now['loss_G']:.1f}: G learns nothing from so sure a D"
    if status == "yellow":
        message = f"G's loss {now['loss_G']:.1f} is over three times its equilibrium: D leads"
    return _line("D too strong", separation, status, "separation ≤ 0.88", message, _weaken_D(config))


def _check_too_weak(now: dict[str, float], history: History, config: Config) -> Finding:
    a, b = targets(config)
    gap = (now["D_x"] - now["D_G_z"]) / (a - b)
    least_accuracy, least_gap = (
        (0.45, -0.05) if usual_suspect(config) else (0.3, -0.15)
    )  # a known cause convicts sooner
    status = "red" if now["D_acc"] < least_accuracy else grade(gap, (-0.05, 9), (least_gap, 9))
    message = "D holds fakes for more real than real digits: what it tells G is noise"
    return _line("D too weak", gap, status, "separation ≥ -0.05", message, _strengthen_D(config))


def _weaken_D(config: Config) -> dict[str, Any]:
    """Return what holds D back."""
    return usual_suspect(config) or (_noisier(config) if config.lr_D <= config.lr_G / 2 else {"lr_D": config.lr_D / 2})


def _strengthen_D(config: Config) -> dict[str, Any]:
    """Return what helps D."""
    return usual_suspect(config) or ({"lr_D": config.lr_G} if config.lr_D < config.lr_G else {"lr_G": config.lr_G / 2})


def _check_gradient(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now.get("grad_G", 1.0)
    message = "hardly any gradient reaches G: it has saturated, or D is flat"
    changes = usual_suspect(config) or {"lr_G": config.lr_G / 2, **_noisier(config)}
    return _line("G's gradient", value, grade(value, (0.05, math.inf), (0.005, math.inf)), "≥ 0.05", message, changes)


def _check_oscillation(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now.get("swing", 0.0)
    message = "D(G(z)) swings widely from batch to batch: the two chase each other"
    changes = usual_suspect(config) or {"lr_G": config.lr_G / 2, "lr_D": config.lr_D / 2}
    return _line("oscillation", value, grade(value, (0, 0.2), (0, 0.25)), "≤ 0.2", message, changes)


def _check_stagnation(now: dict[str, float], history: History, config: Config) -> Finding:
    value = epochs_without_gain(history)
    message = f"the Fréchet distance has not fallen for {value} epochs: stop, or let the learning rates fade"
    changes = {"lr_schedule": "linear_tail"} if config.lr_schedule == "constant" else {}
    return _line("stagnation", value, "yellow" if value >= 5 else "green", "< 5 epochs", message, changes)


def _check_undertrained(now: dict[str, float], history: History, config: Config) -> Finding:
    value = now.get("precision", 1.0)
    message = "hardly any sample looks like a digit to the judge: train on"
    return _line("undertrained", value, "yellow" if value < 0.3 else "green", "precision ≥ 0.3", message, {})


FAULT_CHECKS = (  # the most specific first: the first red one is named as the cause
    _check_still, _check_batch_norm, _check_labels, _check_detach, _check_copies, _check_diversity, _check_classes,
    _check_memorisation, _check_one_answer, _check_too_strong, _check_too_weak, _check_gradient, _check_oscillation,
    _check_stagnation, _check_undertrained,
)  # fmt: skip


PROBABILITY_LOSSES = ("bce", "relativistic")  # D's answers are chances, of an image or of a pair
PROBABILITY_CHECKS = (_check_labels, _check_one_answer, _check_too_strong, _check_too_weak, _check_oscillation)


def epochs_without_gain(history: History, least: float = 0.02) -> int:
    """Return how many epochs ago the Fréchet distance last fell below its best by the share `least`; a stop rule.

    Smaller gains than 2 % lie within what the distance of the same 1,000 latent vectors wobbles by.
    """
    best, since = math.inf, 0
    for value in history.get("fid", []):
        if value is not None:
            best, since = (value, 0) if value < best * (1 - least) else (best, since + 1)
    return since


def _check_band(now: dict[str, float], band: Band, config: Config) -> Finding:
    value = now[band.metric]
    status = grade(value, band.green, (-math.inf, math.inf))
    above = value > band.green[1]
    meaning = "inside the README's band" if status == "green" else band.high if above else band.low
    changes = _weaken_D(config) if above == band.high_is_strong else _strengthen_D(config)
    reach = f"{band.green[0]:g} – {band.green[1]:g}"
    return _line(f"{band.title} (README)", value, status, reach, meaning, changes, quiet=False)


def _check_separation(now: dict[str, float], config: Config) -> Finding:
    a, b = targets(config)
    value = (now["D_x"] - now["D_G_z"]) / (a - b)
    status = grade(value, (-0.05, 0.85), (-9, 9))
    meaning = "0: D cannot tell real from fake; 1: D tells all apart"
    if value > 0.85:
        meaning = f"D tells nearly all apart (D(x) → {a:g}, D(G(z)) → {b:g}): look at the samples, not at D"
    if value < -0.05:
        meaning = "D holds fakes for more real than real digits"
    changes = _weaken_D(config) if value > 0 else _strengthen_D(config)
    return _line("separation (theory)", value, status, "0 – 0.85", meaning, changes, quiet=False)


def _check_sum_rule(now: dict[str, float], config: Config) -> Finding:
    target = sum(targets(config))
    value = now["D_x"] + now["D_G_z"]
    status = grade(abs(value - target), (0, 0.1), (0, 9))
    meaning = "D is in step with its labels" if status == "green" else "D's bias is not stationary: it lags behind G"
    band, changes = f"a + b = {target:g} ± 0.1", _strengthen_D(config)
    return _line("D(x) + D(G(z)) (theory)", value, status, band, meaning, changes, quiet=False)


def _check_equilibrium(now: dict[str, float], config: Config) -> Finding:
    floor, balance = discriminator_loss_bounds(config)
    m, edge = sum(targets(config)) / 2, balance + 0.5
    status = "green" if now["loss_D"] <= edge else "yellow"
    meaning = f"{floor:.2f}: D separates perfectly; {balance:.2f}: equilibrium, both of D's answers {m:g}, "
    meaning += f"G loss {generator_loss_at_equilibrium(config):.2f}"
    band, changes = f"{floor:.2f} – {edge:.2f}", _strengthen_D(config)
    return _line("D loss (theory)", now["loss_D"], status, band, meaning, changes, quiet=False)


def _check_critic(now: dict[str, float], config: Config) -> Finding:
    value = now["gap"]
    meaning = "the critic's estimate of the Wasserstein distance: it should fall slowly while the samples improve"
    if value <= 0:
        meaning = "the critic scores samples as high as real digits: it lags behind G, and its slope misleads"
    changes = {"d_steps": 5} if config.d_steps < 5 else _strengthen_D(config)
    return _line("Wasserstein estimate", value, "green" if value > 0 else "red", "> 0", meaning, changes, quiet=False)


def _check_slope(now: dict[str, float], config: Config) -> Finding:
    value = now.get("slope", math.inf)
    status = grade(value, (0.5, 2), (0.1, 3))  # where both pull, it is 1 + distance / 2λ
    meaning = "the penalty holds the critic's slope near 1, so its estimate is a distance"
    if status != "green":
        meaning = "the critic's slope is not near 1: its estimate is no distance, and G's gradient has no scale"
    changes = {"gradient_penalty": 10.0, "batch_norm_D": False} if config.gradient_penalty < 10 else _weaken_D(config)
    return _line("critic's slope", value, status, "0.5 – 2", meaning, changes, quiet=False)


THEORY_CHECKS = {  # what follows from the loss; the others' D aims at no value that is known beforehand
    "bce": (_check_separation, _check_sum_rule, _check_equilibrium),
    "relativistic": (_check_separation, _check_equilibrium),  # the sum is 1 whatever happens
    "wasserstein": (_check_critic, _check_slope),
}


def generator_loss_at_equilibrium(config: Config) -> float:
    """Return G's loss when D answers (a + b) / 2 to everything, in nats; 0.7985 for labels 0.9 and 0."""
    m, wish = sum(targets(config)) / 2, 1.0 if config.loss == "relativistic" else config.generator_target
    return -wish * math.log(m) - ((1 - wish) * math.log(1 - m) if wish < 1 else 0.0)


def discriminator_loss_bounds(config: Config) -> tuple[float, float]:
    """Return D's lowest possible loss, H(a) + H(b), and its loss at equilibrium, 2 H((a + b) / 2), in nats.

    A relativistic loss has one answer for each pair: 0 and H(1/2) = ln 2.
    """
    a, b = targets(config)

    def entropy(p: float) -> float:
        """Return H(p) in nats."""
        return 0.0 if p in (0, 1) else -p * math.log(p) - (1 - p) * math.log(1 - p)

    answers = 1 if config.loss == "relativistic" else 2
    return entropy(a) + entropy(b), answers * entropy((a + b) / 2)


def panel_text(diagnosis: Diagnosis, colour: bool | None = None) -> str:
    """Return the panel as lines of text; colour: ANSI colours, None uses them where the output is a terminal."""
    colour = sys.stdout.isatty() if colour is None else colour
    lines = [f"{ICONS[diagnosis.status]} health after epoch {diagnosis.epoch:.4g}: {WORDS[diagnosis.status]}"]
    for f in diagnosis.shown:
        line = f"  {ICONS[f.status]} {WORDS[f.status]:8} {f.name:24} {f.value:16} [{f.band}] {f.message}" + (
            f" → {f.remedy}" if f.remedy else ""
        )
        lines.append(f"{_ANSI[f.status]}{line}\033[0m" if colour else line)
    return "\n".join(lines)


def panel_html(diagnosis: Diagnosis) -> str:
    """Return the panel as an HTML table that reads in JupyterLab, on GitHub and on Kaggle."""
    head = f"{ICONS[diagnosis.status]} <b>Health after epoch {diagnosis.epoch:.4g}: {WORDS[diagnosis.status]}</b>"
    cells = ("", "reading", "value", "healthy", "meaning", "remedy")
    rows = ["<tr>" + "".join(f"<th style='text-align:left'>{c}</th>" for c in cells) + "</tr>"]
    for f in diagnosis.shown:
        texts = (f"{ICONS[f.status]} {WORDS[f.status]}", f.name, f.value, f.band, f.message, f.remedy)
        rows.append("<tr>" + "".join(f"<td style='text-align:left'>{html.escape(t)}</td>" for t in texts) + "</tr>")
    return f"{head}<table>{''.join(rows)}</table>"


# === Evaluation: a judge of digits, distances to real ones, and their floor ===========================================
class Judge(nn.Module):
    """Read digits: images (N, 1, 28, 28) in [-1, 1] become logits (N, 10); `features` are what distances use (N, 64).

    The measure of all scores here, as Inception is elsewhere: it has seen MNIST's 60,000 training digits
    (tools/train_judge.py) and never a generated one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_judge_block(1, 32, kernel_size=5, stride=2),  # (N, 32, 14, 14)
            *_judge_block(32, 64, kernel_size=3, stride=1),
            nn.MaxPool2d(2),  # (N, 64, 7, 7)
            *_judge_block(64, 64, kernel_size=3, stride=1),
            nn.MaxPool2d(2),  # (N, 64, 3, 3)
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, JUDGE_FEATURES, bias=False),
            nn.BatchNorm1d(JUDGE_FEATURES),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(JUDGE_FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return what lies under the last layer (N, 64) for images (N, 1, 28, 28)."""
        return self.layers(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit for each digit (N, 10)."""
        return self.head(self.features(images))


def _judge_block(narrow: int, wide: int, kernel_size: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(narrow, wide, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]


@dataclass(frozen=True)
class Reading:
    """What the judge says of a set of images: features (N, 64) and the probability of each digit (N, 10)."""

    features: Tensor
    probabilities: Tensor

    @property
    def digits(self) -> Tensor:
        """Return the digit that each image is read as (N,)."""
        return self.probabilities.argmax(dim=1)

    @property
    def shares(self) -> Tensor:
        """Return how often each digit is read (10,); they sum to 1."""
        return torch.bincount(self.digits, minlength=10) / len(self.digits)


@functools.cache
def load_judge() -> tuple[Judge, float]:
    """Return the judge and its accuracy on the test digits; raises FileNotFoundError, and ValueError for a wrong hash.

    Its weights lie in data/judge.safetensors or, on Kaggle, beside this file.
    """
    places = [EMBEDDED_MNIST.parent / "judge.safetensors", Path(__file__).resolve().parent / "judge.safetensors"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the judge's weights are not there: looked for {places[0]} and {places[1]}")
    raw = path.read_bytes()
    if (found := hashlib.sha256(raw).hexdigest()) != JUDGE_SHA256:
        raise ValueError(
            f"{path} is not the judge that scores are made with (SHA-256 {found[:12]}…, not {JUDGE_SHA256[:12]}…); "
            "restore it from the repository"
        )
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_tensors(raw).items()}, strict=False)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])  # safetensors: length, JSON header, tensors
    return judge.eval().to(memory_format=torch.channels_last), float(header["__metadata__"]["accuracy"])


def read_digits(images: Tensor, size: int | None = None) -> Reading:
    """Return the judge's reading of uint8 images (N, H, W), or of samples float (N, 1, H, W) in [-1, 1].

    Samples are rounded to 256 greys, as a saved picture is. size: the side that the images are first brought to, so
    that real digits make the same round trip as the generator's. Raises ValueError for samples that are no images.
    """
    if images.is_floating_point():
        check_samples(images)
        images = to_greys(images)
    elif images.ndim == 4 and images.shape[1] != 1:
        raise ValueError(f"images have shape {tuple(images.shape)}; the judge reads grey ones, uint8 (N, H, W)")
    images = resize_images(resize_images(images, size or images.shape[-1]), 28)
    judge, _ = load_judge()
    with torch.no_grad():
        features = torch.cat([judge.features(normalise(part)) for part in images.cpu().split(500)])
        return Reading(features, judge.head(features).softmax(dim=1))


def to_greys(samples: Tensor) -> Tensor:
    """Return samples float (n, 1, H, W) in [-1, 1] as uint8 images (n, H, W): what `normalise` undoes."""
    return samples[:, 0].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def check_samples(samples: Tensor, needed: int = 1) -> None:
    """Raise ValueError unless samples are at least `needed` finite images (n, 1, H, H) in [-1, 1]."""
    if samples.ndim != 4 or samples.shape[1] != 1 or samples.shape[2] != samples.shape[3]:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; needed is (n, 1, H, H)")
    if len(samples) < needed:
        raise ValueError(f"there are {len(samples)} samples; these scores need at least {needed}")
    if not samples.isfinite().all():
        raise ValueError("samples hold NaN or infinite values: training has diverged; load an older checkpoint")
    low, high = samples.min().item(), samples.max().item()
    if low < -1.01 or high > 1.01:
        raise ValueError(f"samples reach from {low:.3g} to {high:.3g}; images are in [-1, 1] (uint8 / 127.5 - 1)")


def enough_images(train: Tensor, test: Tensor) -> None:
    """Raise ValueError where there are too few real images for scores."""
    if min(len(train), len(test)) < MIN_SAMPLES:
        raise ValueError(f"{len(train)} and {len(test)} real images; scores need at least {MIN_SAMPLES} of each")


class Reference:
    """Hold what real images score, so that generated ones can stand beside it: the real-vs-real floor.

    train, test: uint8 images (N, H, W); size: the generator's side; seen: what it was trained on, if not `train`. All
    distances are measured to `test`. Takes seconds: make it once and keep it. Raises ValueError for too few images.
    """

    def __init__(self, train: Tensor, test: Tensor, size: int, seen: Tensor | None = None) -> None:
        enough_images(train, test)
        self.size = size
        self.test, self.train = read_digits(test, size), read_digits(train, size)
        self.seen = self.train.features if seen is None else read_digits(seen, size).features
        copies = nearest_distance(self.test.features, self.train.features)
        self._copy_distance = copies[::2].quantile(0.01).item()  # nearer than 99 % of one half of the test digits
        self._copies = (copies[1::2] <= self._copy_distance).float().mean().item()  # of the other half
        self.floor = functools.cache(self._floor)

    def _floor(self, n: int) -> dict[str, float]:
        """Return the scores of n training images; near-copies: of the test images."""
        pick = torch.randperm(len(self.train.features), generator=torch.Generator().manual_seed(0))[:n]
        peers = Reading(self.train.features[pick], self.train.probabilities[pick])
        return score_reading(peers, self.test) | {"near_copies": self._copies}

    def near_copies(self, features: Tensor) -> float:
        """Return the share of samples nearer to a training image than 99 % of new real digits are.

        It finds copies up to a little noise; a copy that is shifted or blurred looks new to it.
        """
        return (nearest_distance(features, self.seen) <= self._copy_distance).float().mean().item()


class Scores(dict):
    """Hold the scores of a set of samples beside those of real digits (`…_floor`); prints itself as a table."""

    def __str__(self) -> str:
        head = f"{self['n']:,} samples; judge {self['judge_accuracy']:.2%} right on real digits, SHA-256 "
        lines = [head + f"{self['judge_sha256'][:12]}", f"{'':28}{'samples':>10}{'real digits':>13}"]
        for name, (title, form) in SCORES.items():
            if self.get(name) is not None:
                floor = format(self[f"{name}_floor"], form) if f"{name}_floor" in self else ""
                lines.append(f"{title:28}{format(self[name], form):>10}{floor:>13}")
        return "\n".join(lines)

    __repr__ = __str__


SCORES = {  # what it is called, how it is printed
    "fid": ("Fréchet distance ↓", ".2f"),
    "kid": ("kernel distance (KID) ↓", ".4f"),
    "kid_se": ("  its standard error", ".4f"),
    "precision": ("precision ↑", ".3f"),
    "recall": ("recall ↑", ".3f"),
    "density": ("density ↑", ".3f"),
    "coverage": ("coverage ↑", ".3f"),
    "confidence": ("judge's confidence ↑", ".3f"),
    "class_entropy": ("class entropy (≤ 2.303) ↑", ".3f"),
    "near_copies": ("near-copies of training", ".3f"),
    "digit_accuracy": ("read as the digit asked for", ".3f"),
    "inception_fid": ("Inception FID ↓", ".2f"),
}


def score_samples(samples: Tensor, reference: Reference, digits: Tensor | None = None) -> Scores:
    """Return all scores of samples (n, 1, H, H) in [-1, 1] beside the reference's; raises ValueError.

    digits: what a class-conditional generator was asked for (n,). Fréchet distance: Heusel et al. 2017; kernel
    distance: Bińkowski et al. 2018; the others: `manifold_metrics`.
    """
    check_samples(samples, needed=MIN_SAMPLES)
    if samples.shape[2] != reference.size:
        raise ValueError(f"samples are {samples.shape[2]} pixels wide, the reference was read at {reference.size}")
    reading = read_digits(samples)
    scores = Scores(n=len(samples), judge_accuracy=load_judge()[1], judge_sha256=JUDGE_SHA256)
    scores |= score_reading(reading, reference.test)
    scores["near_copies"] = reference.near_copies(reading.features)
    if digits is not None:
        scores["digit_accuracy"] = (reading.digits == digits.cpu()).float().mean().item()
    scores["class_histogram"] = reading.shares.tolist()
    floor = reference.floor(min(len(samples), len(reference.train.features)))
    return Scores(scores | {f"{name}_floor": value for name, value in floor.items()})


def score_reading(fake: Reading, real: Reading) -> dict[str, float]:
    """Return distances, manifold metrics, confidence and class entropy (nats) of one reading against another."""
    kid, kid_se = kernel_distance(fake.features, real.features)
    return {
        "fid": frechet_distance(fake.features, real.features),
        "kid": kid,
        "kid_se": kid_se,
        **manifold_metrics(fake.features, real.features),
        "confidence": fake.probabilities.max(dim=1).values.mean().item(),
        "class_entropy": torch.special.entr(fake.shares).sum().item(),
    }


def frechet_distance(fake: Tensor, real: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes a second to import

    network = nn.Identity()  # torchmetrics expects one that makes features, and asks it how many
    network.num_features = fake.shape[1]
    return _torchmetric(FrechetInceptionDistance(feature=network), fake, real).item()


def kernel_distance(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """Return KID, the squared kernel mean discrepancy (Bińkowski et al. 2018), and its standard error.

    Ten subsets, each a tenth of the smaller set, so that they hardly overlap and their scatter tells the error.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(fake), len(real)) // 10
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # it draws its subsets by torch's own numbers
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features: they are few here
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=10, subset_size=size)
        torch.default_generator.manual_seed(0)
        mean, std = _torchmetric(metric, fake, real)
    return mean.item(), std.item() / 3  # √(10 - 1): torchmetrics divides by 10 for its std


def _torchmetric(metric: Any, fake: Tensor, real: Tensor) -> Any:
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def manifold_metrics(fake: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020, §3).

    fake (n, d), real (m, d): features. Each point's ball reaches to its k-th nearest neighbour of the same kind.
    Precision: share of fakes inside a real ball; recall: share of reals inside a fake ball; density: how many real
    balls hold a fake, divided by k; coverage: share of real balls that hold a fake. Raises ValueError for n or m ≤ k.
    """
    if min(len(fake), len(real)) <= k:
        raise ValueError(
            f"{len(fake)} and {len(real)} points; balls to the {k}-th neighbour need more than {k} of each"
        )
    radius_real, radius_fake = _ball_radius(real, k), _ball_radius(fake, k)
    inside, caught, covered = [], [], torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for part, radius in zip(fake.split(2000), radius_fake.split(2000), strict=True):
        distance = squared_distances(part, real)
        in_real = distance < radius_real
        inside.append(in_real.any(dim=1))
        caught.append(in_real.sum(dim=1))
        covered |= in_real.any(dim=0)
        recalled |= (distance < radius[:, None]).any(dim=0)
    return {
        "precision": torch.cat(inside).float().mean().item(),
        "recall": recalled.float().mean().item(),
        "density": torch.cat(caught).float().mean().item() / k,
        "coverage": covered.float().mean().item(),
    }


def _ball_radius(points: Tensor, k: int) -> Tensor:
    """Return each point's squared distance to its k-th nearest other point (n,)."""
    parts = [squared_distances(part, points).topk(k + 1, largest=False).values[:, k] for part in points.split(2000)]
    return torch.cat(parts)


def nearest_distance(points: Tensor, others: Tensor) -> Tensor:
    """Return each point's distance (n,) to the nearest of the others, points (n, d), others (m, d)."""
    nearest = [squared_distances(part, others).min(dim=1).values for part in points.split(1000)]
    return torch.cat(nearest).clamp(min=0).sqrt()


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Return all squared distances (n, m) as one matrix product: a third of cdist's time, and exact to about 1e-4."""
    length = others.square().sum(dim=1)
    return torch.addmm(length, points, others.T, alpha=-2).add_(points.square().sum(dim=1, keepdim=True))


def inception_distance(samples: Tensor, real: Tensor) -> float | None:
    """Return the usual FID, on Inception's features, of samples (n, 1, H, H) in [-1, 1] against uint8 images (m, H, W).

    Needs torch-fidelity and its weights, downloaded on first use; says so and returns None where they cannot be had.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(feature=2048)
    except (ModuleNotFoundError, OSError) as error:  # no package; no network
        reason = str(error).splitlines()[0]
        print(f"no Inception FID: {reason} (pip install torch-fidelity, and internet for its weights)")
        return None
    for images, is_real in ((to_greys(samples), False), (resize_images(real, samples.shape[2]), True)):
        for part in images.cpu().split(100):
            metric.update(part[:, None].expand(-1, 3, -1, -1), real=is_real)
    return metric.compute().item()


class JudgeSamples(Callback):
    """Read the same n fixed-noise samples after every epoch; keep the best generator; stop when epochs no longer pay.

    Writes what `GAN.judge_samples` returns into the history; for distances real digits are read first (seconds). best:
    a folder for the checkpoint of the lowest Fréchet distance so far. patience: stop after so many epochs without a
    better one (`epochs_without_gain`). Distances of few samples are larger than those of `evaluate`: compare them only
    with each other.
    """

    def __init__(
        self, n: int = 1000, distances: bool = True, best: str | Path | None = None, patience: int | None = None
    ) -> None:
        least = MIN_SAMPLES if distances else 1
        if n < least or (patience is not None and patience < 1):
            raise ValueError(f"n = {n}, patience = {patience}; n must be at least {least}, patience at least 1")
        if not distances and (best is not None or patience is not None):
            raise ValueError("best and patience go by the Fréchet distance; they need distances=True")
        self.n, self.distances, self.best, self.patience = n, distances, best, patience

    def on_train_begin(self, gan: GAN) -> None:
        """Fail before the first batch for a wrong judge, too few images or a folder in use; warn without a judge."""
        if self.best is not None:
            check_replaceable(Path(self.best))
        with or_warn("the judge's reading"):
            load_judge()
            if self.distances and (gan._reference is None or gan._reference[0] is not gan._source):
                enough_images(*gan._real_images())

    def on_epoch_end(self, gan: GAN) -> None:
        """Read them, also after an epoch that was cut short."""
        with or_warn("the judge's reading"):
            for name, value in gan.judge_samples(self.n, self.distances).items():
                gan.history.record(name, value)
        known = [value for value in gan.history.get("fid", []) if value is not None]
        if self.best is not None and known and gan.history.last().get("fid") == min(known):
            with or_warn("the best generator so far"):
                gan.save(self.best)
        if self.patience is not None and epochs_without_gain(gan.history) >= self.patience:
            gan.stop(f"the Fréchet distance has not fallen for {self.patience} epochs")


def mode_coverage(samples: Tensor) -> dict[str, float]:
    """Return how many of the 1000 modes of stacked MNIST samples (n, 3, H, H) in [-1, 1] show, and how evenly.

    modes: of 1000. kl: the Kullback-Leibler divergence from the modes' shares to equal ones, in nats; n stacks of real
    digits have about 500 / n too. The judge reads each channel as a digit. The usual n is 26,000 (Srivastava et al.
    2017, §5.1; Lin et al. 2018, §4.2). Raises ValueError for samples of another shape.
    """
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; needed is (n, 3, H, H)")
    digits = read_digits(samples.flatten(0, 1)[:, None]).digits.view(-1, 3)
    shares = torch.bincount((digits * torch.tensor([100, 10, 1])).sum(dim=1), minlength=1000) / len(samples)
    return {"modes": int((shares > 0).sum()), "kl": math.log(1000) - torch.special.entr(shares).sum().item()}


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return `steps` latent vectors (steps, nz) on the arc from start to end (nz,) (White 2016).

    A straight line would pass near the origin, where N(0, I) in many dimensions has no samples.
    """
    t = torch.linspace(0, 1, steps)[:, None]
    cosine = F.cosine_similarity(start, end, dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-3 or angle > math.pi - 1e-3:  # parallel: the arc is a line
        return start + t * (end - start)
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def nearest_neighbours(samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each sample (n, 1, H, W) the index (n,) of and the distance (n,) to its nearest training image.

    images: uint8 (N, H, W) of the same side. Distances are root-mean-square differences of pixels in [-1, 1].
    """
    best, index = torch.full((len(samples),), math.inf), torch.zeros(len(samples), dtype=torch.long)
    flat = samples.flatten(1).float()
    for start in range(0, len(images), 8192):
        part = normalise(images[start : start + 8192]).flatten(1).to(flat)
        distance, where = torch.cdist(flat, part).min(dim=1)
        closer = distance < best
        best[closer], index[closer] = distance[closer], where[closer] + start
    # once more without cdist, whose matrix product gives exact copies a small distance
    return index, (flat - normalise(images[index]).flatten(1).to(flat)).square().mean(dim=1).sqrt()


# === Pictures: figures are returned, never shown; the caller decides ==================================================
COLOURS = {"D": "#0072B2", "G": "#D55E00", "theory": "#555555", "third": "#009E73"}  # safe for colour-blind readers


def plot_images(images: Tensor, title: str = "", columns: int = 8, ax: plt.Axes | None = None) -> Figure:
    """Draw images (n, 1, H, W) in [-1, 1] as one grid and return the figure."""
    figsize = (columns * 0.62, 0.62 * math.ceil(len(images) / columns) + 0.35)
    fig, ax = _subplots(1, 1, figsize) if ax is None else (ax.figure, ax)
    images = images if images.shape[1] in (1, 3) else images.mean(dim=1, keepdim=True)  # others are no colours
    grid = make_grid(images, nrow=columns, padding=2, normalize=True, value_range=(-1, 1), pad_value=0.35)
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=10)
    return fig


def plot_real_vs_fake(real: Tensor, fake: Tensor, title: str = "") -> Figure:
    """Draw real images beside generated ones, both (n, 1, H, W) in [-1, 1]."""
    fig, axes = _subplots(1, 2, figsize=(9.6, 2.9))
    plot_images(real, "real", ax=axes[0])
    plot_images(fake, "generated", ax=axes[1])
    fig.suptitle(title, fontsize=11)
    return fig


def plot_history(history: History) -> Figure:
    """Draw losses, D's answers, sample diversity and, where a judge scored, the Fréchet distance over the epochs.

    Dashed and dotted lines: what theory says for this history's labels. Of a Wasserstein critic, whose answers mean
    nothing by themselves, the second picture shows the estimate and the slope.
    """
    config, scored = history.config, any(value is not None for value in history.get("fid", []))
    fig, axes = _subplots(1, 3 + scored, figsize=(12 + 3 * scored, 3.4))
    _plot_readings(axes[0], history, {"loss_D": ("D", "D"), "loss_G": ("G", "G")})
    axes[0].set_title("losses")
    answers = {"D_x": ("D(x)", "D"), "D_G_z": ("D(G(z))", "G"), "D_acc": ("D accuracy", "third")}
    if config.loss == "wasserstein":
        answers = {"gap": ("Wasserstein estimate", "D"), "slope": ("the critic's slope", "G")}
    _plot_readings(axes[1], history, answers)
    axes[1].set_title("what D answers")
    _plot_theory(axes, config)
    _plot_readings(axes[2], history, {"diversity": ("samples", "third")})
    axes[2].axhline(1, color=COLOURS["theory"], ls="--", lw=1, label="real digits")
    axes[2].set(title="sample diversity", ylim=(0, max(1.3, *history["diversity"]) if history["epoch"] else 1.3))
    if scored:
        _plot_readings(axes[3], history, {"fid": ("samples", "third")})
        axes[3].set(title="Fréchet distance (lower is better)", yscale="log")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.legend(fontsize=7)
    return fig


def _plot_theory(axes: Sequence[plt.Axes], config: Config) -> None:
    """Draw into the pictures of losses and of D's answers what theory says of them, for losses where it says so."""
    if config.loss == "wasserstein":
        axes[1].axhline(1, color=COLOURS["G"], ls="--", lw=1, label="slope that the penalty asks for: 1")
    if config.loss not in PROBABILITY_LOSSES:
        return
    floor, balance = discriminator_loss_bounds(config)
    g_balance, m = generator_loss_at_equilibrium(config), sum(targets(config)) / 2
    axes[0].axhline(balance, color=COLOURS["theory"], ls="--", lw=1, label=f"D at equilibrium {balance:.2f}")
    axes[0].axhline(floor, color=COLOURS["theory"], ls=":", lw=1, label=f"D separates perfectly {floor:.2f}")
    axes[0].axhline(g_balance, color=COLOURS["G"], ls="--", lw=1, label=f"G at equilibrium {g_balance:.2f}")
    axes[1].axhline(m, color=COLOURS["theory"], ls="--", lw=1, label=f"equilibrium {m:g}")
    axes[1].set_ylim(0, 1)


def _plot_readings(ax: plt.Axes, history: History, readings: dict[str, tuple[str, str]]) -> None:
    """Draw readings, each with its label and colour: dots for epochs, a pale line for batches where they are kept."""
    for name, (label, colour) in readings.items():
        values = np.array(history[name], dtype=float)  # None becomes NaN, which is not drawn
        ax.plot(history["epoch"], values, "o-", color=COLOURS[colour], label=label, ms=3)
        if name in history.batches:
            ax.plot(history.batches["epoch"], history.batches[name], color=COLOURS[colour], alpha=0.35, lw=1)


def make_animation(
    frames: str | Path | Sequence[Any], path: str | Path, seconds: float = 0.4, hold: float = 2.0
) -> Path:
    """Write a looping GIF and return its path.

    frames: a folder of PNG files in the order of their names, or a list of such files or Figures. seconds: per frame;
    hold: of the last one. Raises FileNotFoundError when there is no frame.
    """
    where = "the list"
    if isinstance(frames, (str, Path)):
        where, frames = frames, sorted(Path(frames).glob("*.png"))
    pictures = [_as_picture(frame) for frame in frames]
    if not pictures:
        raise FileNotFoundError(f"no PNG files or figures in {where}; train with save_every=1 first")
    path = prepare_file(path)
    durations = [int(1000 * seconds)] * (len(pictures) - 1) + [int(1000 * hold)]
    small = [p.quantize(32, dither=Image.Dither.NONE) for p in pictures]  # dithering would double the size
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    return path


def gif_html(path: str | Path) -> str:
    """Return a GIF file as an HTML image, for pages whose nbconvert leaves out image/gif, as Kaggle's 6.4.5 does."""
    return f'<img src="data:image/gif;base64,{base64.b64encode(Path(path).read_bytes()).decode()}">'


def _as_picture(frame: Figure | str | Path) -> Image.Image:
    """Return a PNG file's picture, or a Figure drawn off screen."""
    if not isinstance(frame, Figure):
        return Image.open(frame).convert("RGB")
    canvas = FigureCanvasAgg(frame)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _subplots(rows: int, columns: int, figsize: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure that pyplot has already let go of: a notebook shows it once, and none piles up in memory."""
    fig, axes = plt.subplots(rows, columns, figsize=figsize, dpi=80, layout="constrained")
    plt.close(fig)
    return fig, axes


def prepare_file(path: str | Path) -> Path:
    """Return the path with its folder made; raises OSError that says which folder cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write into {path.parent} ({error.strerror}); choose another with out_dir=…") from error
    return path


def scaled(smoke: Any, cpu: Any, gpu: Any) -> Any:
    """Return the value for this run's scale: DCGAN_PROFILE = smoke | cpu | gpu, by default what the machine has.

    Raises ValueError for another value of the variable.
    """
    values = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
    name = profile()
    if name not in values:
        raise ValueError(f"DCGAN_PROFILE = {name!r}; it is smoke, cpu or gpu")
    return values[name]


def profile() -> str:
    """Return the name of this run's scale, as `scaled` takes it."""
    return os.environ.get("DCGAN_PROFILE") or ("gpu" if torch.cuda.is_available() else "cpu")


def kaggle_run() -> str:
    """Return "Interactive" or "Batch" (Save & Run All) on Kaggle, "" elsewhere."""
    kind = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "")
    return kind if os.environ.get("KAGGLE_DATA_PROXY_URL") else ""  # at home some set one of them, never both


def keep_memory() -> bool:
    """Let this process keep freed memory for its next tensors, and return whether it could: Linux with glibc only.

    By default glibc hands large blocks back to the system at once and asks for them anew in every iteration, which
    takes up to a fifth of the time of small networks. It changes the whole process, so training itself never calls it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {-1: 2**31 - 1, -3: 2**31 - 1, -4: 0}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of <malloc.h>
    return sum(mallopt(name, value) for name, value in settings.items()) == len(settings)  # 1 for each that holds


def describe_machine() -> str:
    """Return one line: where this runs, on which device, in which precision, at which scale, and how to get a GPU."""
    where = f"Kaggle, {kaggle_run()} run" if kaggle_run() else "not on Kaggle"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    what = f"{len(gpus)} × {gpus[0]}" if gpus else "no GPU"
    what += ", of which one is used" if len(gpus) > 1 else ""
    line = f"{where}: {what}; {pick_precision('auto', pick_device('auto'))}, scale {profile()!r}"
    advice = "; training is shorter than on a GPU (Settings → Accelerator → GPU T4 x2)"
    return line + (advice if kaggle_run() and not gpus else "")


def in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this, where HTML and figures can be displayed."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules


class ProgressBar(Callback):
    """Show a bar over the whole run with images per second, time left and the newest losses."""

    def on_train_begin(self, gan: Trainer) -> None:
        """Open the bar; where nobody watches it live, it stays away and each epoch has its line anyway."""
        left = (gan.last_epoch - gan.epoch) * len(gan.images) - gan.position
        live = sys.stderr.isatty() or (in_notebook() and kaggle_run() != "Batch")
        self.bar = tqdm(total=max(0, left), unit="img", unit_scale=True, leave=False, mininterval=0.5, disable=not live)

    def on_batch_end(self, gan: Trainer) -> None:
        """Move the bar by one batch."""
        self.bar.update(gan.config.batch_size * max(1, gan.config.d_steps))
        log = gan.history.batches
        if gan.batch % gan.config.log_every == 0 and log["step"]:
            losses = f"D {log['loss_D'][-1]:.3f} G {log['loss_G'][-1]:.3f}"
            self.bar.set_description(f"epoch {gan.epoch + 1}/{gan.last_epoch} {losses}")

    def on_train_end(self, gan: Trainer) -> None:
        """Close the bar, and say why training ended early if it did."""
        self.bar.close()
        if gan.stop_reason:
            where = f"after {gan.epoch} epochs" + (f" and {gan.batch} batches" if gan.position else "")
            print(f"stopped {where}: {gan.stop_reason}; everything is kept, train() goes on from there")


class EpochReport(Callback):
    """Show 32 real beside 32 generated images, the averages and the health panel after every epoch."""

    def on_epoch_end(self, gan: GAN) -> None:
        """Display inline in a notebook; print, and save the grid, in a terminal."""
        now = gan.history.last()
        answers = f"D(x) {now['D_x']:.3f}  D(G(z)) {now['D_G_z']:.3f}  D accuracy {now['D_acc']:.1%}"
        if gan.config.loss == "wasserstein":
            answers = f"Wasserstein estimate {now['gap']:.3f}  slope {now.get('slope', math.nan):.2f}"
        print(
            f"epoch {now['epoch']:.4g}/{gan.last_epoch}  loss_D {now['loss_D']:.4f}  loss_G {now['loss_G']:.4f}  "
            f"{answers}  {now['seconds']:.0f} s, {now['images_per_second']:.0f} images/s"
        )
        figure = plot_real_vs_fake(gan.real_samples(), gan.fixed_samples(), f"epoch {now['epoch']:.4g}")
        if in_notebook():
            from IPython.display import display  # only a notebook has it for sure

            display(figure, gan.diagnose())
        else:
            print(gan.diagnose())
            with or_warn("the real-vs-fake grid"):
                print(f"  grid: {save_picture(figure, gan.folder / 'real_vs_fake.png')}")


class SaveGrids(Callback):
    """Save a grid of the fixed-noise samples every `save_every` epochs: the frames of the animation.

    Frames of epochs that are still to come are removed: they are those of an earlier run.
    """

    def on_epoch_end(self, gan: GAN) -> None:
        """Save the grid that `generate_images` draws."""
        every = gan.config.save_every
        if every and not gan.position and gan.epoch % every == 0:
            with or_warn(f"the grid of epoch {gan.epoch}"):
                gan.generate_images(gan.epoch)
                for frame in (gan.folder / "frames").glob("epoch_*.png"):
                    if frame.stem[6:].isdecimal() and int(frame.stem[6:]) > gan.epoch:
                        frame.unlink()


def save_picture(figure: Figure, path: str | Path) -> Path:
    """Save a figure as PNG and return its path; raises OSError that says what to do."""
    path = prepare_file(path)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); free some space or choose another out_dir") from error
    return path


class Tracker(Callback):
    """Write Config, every reading, health and samples of each epoch to "wandb" or "tensorboard"; `Config.tracker`.

    wandb goes online with a key (WANDB_API_KEY, an earlier login, or Kaggle's secret of that name), else offline into
    out_dir; TensorBoard's log lies in out_dir/recipe/tensorboard. Raises ImportError that says what to install.
    """

    def __init__(self, kind: str) -> None:
        if kind not in ("wandb", "tensorboard"):
            raise ValueError(f"tracker = {kind!r} is not one of wandb, tensorboard")
        if importlib.util.find_spec(kind) is None:
            raise ImportError(f"tracker = {kind!r} needs a package: pip install {kind}")
        self.kind = kind

    def on_train_begin(self, gan: GAN) -> None:
        """Open the log before the first batch."""
        self.write, self.close = {"wandb": _open_wandb, "tensorboard": _open_tensorboard}[self.kind](gan)

    def on_epoch_end(self, gan: GAN) -> None:
        """Write the epoch's line; `health` is 0 for green, 1 for yellow, 2 for red."""
        panel = gan.diagnose()
        line = gan.history.last() | {"health": list(ICONS).index(panel.status)}
        grid = make_grid(gan.fixed_samples(), normalize=True, value_range=(-1, 1)).permute(1, 2, 0).numpy()
        with or_warn("the tracker's log"):
            self.write(gan.step, line, (grid * 255).astype(np.uint8), panel_text(panel, colour=False))

    def on_train_end(self, gan: GAN) -> None:
        """Close the log."""
        self.close()


def _open_tensorboard(gan: GAN) -> tuple[Callable[..., None], Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(gan.folder / "tensorboard")
    writer.add_text("config", f"```\n{json.dumps(dataclasses.asdict(gan.config), indent=1)}\n```", gan.step)

    def write(step: int, line: dict[str, float], grid: np.ndarray, panel: str) -> None:
        """Write one epoch."""
        for name, value in line.items():
            writer.add_scalar(name, value, step)
        writer.add_image("samples", grid, step, dataformats="HWC")
        writer.add_text("panel", f"```\n{panel}\n```", step)
        writer.flush()

    return write, writer.close


def _open_wandb(gan: GAN) -> tuple[Callable[..., None], Callable[[], None]]:
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_has_key() else "offline")
    prepare_file(gan.folder / "x")
    config = {"recipe": gan.recipe, **dataclasses.asdict(gan.config)}
    run = wandb.init(project="dcgan", dir=str(gan.folder), config=config, mode=mode)

    def write(step: int, line: dict[str, float], grid: np.ndarray, panel: str) -> None:
        """Write one epoch."""
        pictures = {"samples": wandb.Image(grid), "panel": wandb.Html(f"<pre>{html.escape(panel)}</pre>")}
        run.log({**line, **pictures}, step=step)

    return write, run.finish


def _wandb_has_key() -> bool:
    """Return whether wandb will find a key without asking; Kaggle's secret is put where it looks."""
    if kaggle_run() and "WANDB_API_KEY" not in os.environ:
        with suppress(Exception):  # a fork has no secret, and what is raised then differs between releases
            from kaggle_secrets import UserSecretsClient

            os.environ["WANDB_API_KEY"] = UserSecretsClient().get_secret("WANDB_API_KEY")
    login = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()  # what `wandb login` leaves
    return bool(os.environ.get("WANDB_API_KEY")) or (login.is_file() and "api.wandb.ai" in login.read_text())


class BatchLines(Callback):
    """Print the lines and epoch blocks of the 28×28 recipe's README."""

    def on_batch_end(self, gan: Trainer) -> None:
        """Print one line per `log_every` batches of an epoch."""
        log = gan.history.batches
        if kaggle_run() == "Batch":  # a log that nobody watches: the epoch's lines do
            return
        if gan.position and gan.batch % gan.config.log_every == 0 and log["step"]:
            tqdm.write(
                f"Epoch {gan.epoch + 1}/{gan.last_epoch} | Batch {gan.batch} | D_loss: {log['loss_D'][-1]:.4f} | "
                f"D_acc: {log['D_acc'][-1]:.2%} | G_loss: {log['loss_G'][-1]:.4f}",
                file=sys.stdout,
            )

    def on_epoch_end(self, gan: Trainer) -> None:
        """Print the summary block of the epoch."""
        now = gan.history.last()
        print(
            f"{'=' * 60}\nEpoch {now['epoch']:.4g}/{gan.last_epoch} summary ({now['seconds']:.0f} s)\n"
            f"  D loss: {now['loss_D']:.4f}   D accuracy: {now['D_acc']:.2%}\n  G loss: {now['loss_G']:.4f}\n"
            f"  {balance_line(now['D_acc'])}\n{'=' * 60}"
        )


def balance_line(accuracy: float) -> str:
    """Return the README's verdict on D's accuracy: below 30 % G is too strong, above 80 % D is, 40–70 % is balanced."""
    if accuracy < 0.3:
        return "⚠️ Generator too strong!"
    if accuracy > 0.8:
        return "⚠️ Discriminator too strong!"
    return "✅ Training balanced!" if 0.4 <= accuracy <= 0.7 else "🟡 Slightly out of balance"


# === Interaction: a cockpit that plays, pauses and steers; a thin shell over functions that draw without it ===========
LOOK_IMAGES = 20  # fixed-noise samples in one look: four rows of five are large enough to judge
KEPT_LOOKS = 300  # when there are more, every second one goes
SCENARIOS: dict[str, Callable[[Config], dict[str, Any]]] = {  # changes to the Config that the cockpit began with
    "balanced": lambda c: {},
    "D too strong": lambda c: {"d_steps": 5, "lr_G": c.lr_G / 20},
    "D too weak": lambda c: {"lr_D": c.lr_D / 50, "g_steps": 5},
    "no detach": lambda c: {"detach": False},
    "collapse": lambda c: {"lr_G": min(1.0, 20 * c.lr_G), "g_steps": 3},
    "learning rates × 10": lambda c: {"lr_G": min(1.0, 10 * c.lr_G), "lr_D": min(1.0, 10 * c.lr_D)},
}
_CONTROLS: dict[str, tuple[str, str, dict[str, Any]]] = {  # Config field: ipywidgets class, label, range
    "lr_D": ("FloatLogSlider", "D learning rate", {"min": -6, "max": 0, "step": 0.05, "readout_format": ".1e"}),
    "lr_G": ("FloatLogSlider", "G learning rate", {"min": -6, "max": 0, "step": 0.05, "readout_format": ".1e"}),
    "d_steps": ("IntSlider", "D steps (0 freezes)", {"min": 0, "max": 5}),
    "g_steps": ("IntSlider", "G steps (0 freezes)", {"min": 0, "max": 5}),
    "real_label_smooth": ("FloatSlider", "label of real", {"min": 0, "max": 1, "step": 0.05}),
    "fake_label_smooth": ("FloatSlider", "label of fake", {"min": 0, "max": 1, "step": 0.05}),
    "noise_D": ("FloatSlider", "noise on D's input", {"min": 0, "max": 1, "step": 0.05}),
    "detach": ("Checkbox", "detach fakes in D's step", {}),
}


@dataclass(frozen=True)
class Look:
    """What one look at a GAN shows: fixed-noise images (n, 1, H, W), D's score of each (n,), readings, health."""

    step: int
    images: Tensor
    scores: Tensor
    config: Config
    readings: dict[str, float]  # of the epoch under way; empty before training, as is the health panel
    diagnosis: Diagnosis | None


def take_look(gan: GAN, n: int = LOOK_IMAGES) -> Look:
    """Return a look at the GAN as it is now, while it does not train; the same n latent vectors at every call."""
    n = max(n // gan.config.pack, 1) * gan.config.pack  # whole packs
    images = gan.fixed_samples(n)
    scores = gan.score(images, gan._digits(n, None))
    readings = gan.history.last()
    return Look(gan.step, images, scores, gan.config, readings, gan.diagnose() if readings else None)


def plot_look(look: Look, history: History) -> Figure:
    """Draw a look: the images, bordered by D's score, beside losses, D's answers and diversity up to then.

    Dotted lines: the equilibrium for the labels that were in force. No pyplot, so any thread may draw.
    """
    fig = Figure(figsize=(9.4, 3.9), dpi=92)
    grid = fig.add_gridspec(2, 2, width_ratios=(1, 1.25), height_ratios=(8, 1), hspace=0.5, wspace=0.02)
    grid.update(left=0.005, right=0.985, top=0.88, bottom=0.08)
    plot_scored(look.images, look.scores, look.config, fig.add_subplot(grid[:, 0]))
    charts = grid[0, 1].subgridspec(1, 2, wspace=0.28).subplots()
    known = sum(step <= look.step for step in history.batches["step"])
    balance, known_end = discriminator_loss_bounds(look.config)[1], look.config.loss in PROBABILITY_LOSSES
    m = sum(targets(look.config)) / 2
    lines = {"loss_D": balance, "loss_G": generator_loss_at_equilibrium(look.config), "D_x": m, "D_G_z": m}
    names = ("D", "G", "D(x), real", "D(G(z)), fake")
    for ax, (name, line), label in zip(charts.repeat(2), lines.items(), names, strict=True):
        colour, marker = (COLOURS["D"], "-") if name in ("loss_D", "D_x") else (COLOURS["G"], "--")
        series = history.batches["step"][:known], history.batches[name][:known]
        ax.plot(*series, marker, color=colour, lw=1.4, label=label)
        if known_end:  # the other losses have no equilibrium that is known beforehand
            ax.axhline(line, color=colour if ax is charts[0] else COLOURS["theory"], ls=":", lw=1.2)
    dotted = (f" (dotted: equilibrium {balance:.2f}, {lines['loss_G']:.2f})", f" (dotted: equilibrium {m:g})")
    charts[0].set(title="losses" + dotted[0] * known_end, ylim=(0, None) if known_end else None)
    charts[1].set(title="D's answers" + dotted[1] * known_end, ylim=(0, 1) if known_end else None)
    for ax in charts:
        ax.set_title(ax.get_title(), fontsize=8, pad=17)
        ax.tick_params(labelsize=7)
        ax.set_xlabel("iteration", fontsize=7, labelpad=1)
        ax.set_xlim(0, max(10, look.step))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=2, frameon=False)
    _plot_gauge(look.readings.get("diversity", math.nan), fig.add_subplot(grid[1, 1]))
    return fig


def plot_scored(images: Tensor, scores: Tensor, config: Config, ax: plt.Axes, columns: int = 5) -> None:
    """Draw images (n, 1, H, H) in [-1, 1], each in a frame coloured by D's score of it, which stands below."""
    a, b, side = config.real_label_smooth, config.fake_label_smooth, images.shape[2]
    low, high = "fake", "real"
    if config.loss != "bce":  # no answer is known beforehand that the colours could end at
        b, a = scores.min().item() - 1e-6, scores.max().item() + 1e-6
        low, high = "least real", "most"
    edge, gap, below = max(1, side // 14), side // 6, side // 3
    colours = LinearSegmentedColormap.from_list("score", [COLOURS["G"], "#dddddd", COLOURS["D"]])
    canvas = np.ones((math.ceil(len(images) / columns) * (side + below), columns * (side + gap), 3))
    for k, (image, score) in enumerate(zip(images[:, 0].numpy(), scores.tolist(), strict=True)):
        top, left = k // columns * (side + below), k % columns * (side + gap)
        canvas[top : top + side, left : left + side] = colours((score - b) / (a - b))[:3]
        inner = slice(top + edge, top + side - edge), slice(left + edge, left + side - edge)
        canvas[inner] = (image[edge : side - edge, edge : side - edge, None] + 1) / 2  # the rim of a digit is black
        ax.text(left + side / 2, top + side + 0.45 * below, f"{score:.2f}", ha="center", va="center", fontsize=7)
    ax.imshow(canvas, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"G's images; below: what D says (orange: {low}, {b:.3g}; blue: {high}, {a:.3g})", fontsize=8)


def _plot_gauge(diversity: float, ax: plt.Axes) -> None:
    """Draw the diversity of the samples as a bar over its healthy band."""
    ax.axvspan(0.7, 1.3, color=COLOURS["third"], alpha=0.25)
    ax.barh([0], [0 if math.isnan(diversity) else diversity], color=COLOURS["theory"], height=0.5)
    ax.set(xlim=(0, 1.6), yticks=[], xticks=[0, 0.4, 0.7, 1, 1.3])
    value = "not known yet" if math.isnan(diversity) else f"{diversity:.2f}"
    ax.set_title(
        f"diversity of the samples: {value} (0: all alike; 1: as real digits; green band: healthy)", fontsize=8
    )
    ax.tick_params(labelsize=7)


def figure_png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def run_text(
    kind: type[GAN], config: Config, images: int, changes: Sequence[tuple[int, dict[str, Any]]], steps: int
) -> str:
    """Return a run as one line, which `GAN.replay` repeats: recipe and fields | step and changes | … | last step.

    images: length of the data.
    """
    usual = vars(kind.defaults) | {"out_dir": config.out_dir, "device": config.device}

    def fields(values: dict[str, Any]) -> str:
        """Return name=value, as the command line's --set takes it."""
        return "".join(f" {name}={value}" for name, value in values.items())

    head = kind.recipe + fields({name: v for name, v in vars(config).items() if v != usual[name]} | {"images": images})
    return " | ".join([head, *(f"{step}{fields(change)}" for step, change in changes), str(steps)])


class StopAt(Callback):
    """End the run after so many iterations in all."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_batch_end(self, gan: Trainer) -> None:
        """Stop there."""
        if gan.step >= self.step:
            gan.stop(f"iteration {self.step}")


class Cockpit(Callback):
    """Play, pause, step and steer a GAN's training in a notebook, and look back at what it drew.

    data: as for `train`. callbacks: further ones. It trains on a thread of its own, one stretch at a time: a look, a
    change or Pause ends the stretch after a batch, so the GAN is whole whenever it stands still; do not use it while it
    plays. An error ends playing and stands in the panel (`.error`). `.looks` holds the looks, `.text` the run as one
    line that `GAN.replay` repeats, as long as nothing else drew from torch's generator meanwhile.
    """

    def __init__(self, gan: GAN, data: Any = "mnist", callbacks: Sequence[Callback] = ()) -> None:
        gan._set_data(data)
        gan.reconfigure(lr_schedule="constant", log_every=10)  # a slider says what it does; charts want fine points
        self.gan, self.callbacks, self.base = gan, [self, *callbacks], gan.config
        self.settings = {name: getattr(gan.config, name) for name in _CONTROLS}  # wanted from the next batch on
        self._solo: dict[str, int] = {}  # the player that stands still during a step of the other
        self._thread: threading.Thread | None = None
        self._pausing, self._pace, self._due, self._state = threading.Event(), 0.0, 0.0, "ready: press Play or Step"
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()  # the kernel's, on which widgets live
        self._begin()
        self._build()
        self._look()

    _loop: asyncio.AbstractEventLoop | None = None

    def _begin(self) -> None:
        self.looks: list[tuple[Look, bytes]] = []
        self.error: Exception | None = None
        self._start, self._changes = (self.gan.step, self.gan.config), []

    # ------------------------------------------------------------------------------------------------ what one does
    @property
    def playing(self) -> bool:
        """Return whether it trains at the moment."""
        return self._thread is not None and self._thread.is_alive()

    def play(self, batches: float = math.inf, alone: str = "") -> None:
        """Train on, for so many batches or until `pause`; alone: "D" or "G", whose weights alone may move."""
        if self.playing:
            return self._say("it is playing: pause first")
        self._solo = {"": {}, "D": {"g_steps": 0}, "G": {"d_steps": 0}}[alone]
        self.error = None
        self._pausing.clear()
        self._say("playing …")
        self._lock(True)
        self._thread = threading.Thread(target=self._train, args=(self.gan.step + batches,), daemon=True)
        self._thread.start()

    def pause(self, wait: bool = False) -> None:
        """Stop after the batch under way; wait: return only then."""
        self._pausing.set()
        if self.playing:
            self._say("pausing after this batch …")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when it no longer trains."""
        if self._thread is not None:
            self._thread.join()

    def reset(self) -> None:
        """Begin anew: fresh networks from the same seed, the settings as they stand."""
        self.pause(wait=True)
        self.gan.restart()
        self._begin()
        self._look()

    def change(self, **settings: Any) -> None:
        """Change settings from the next batch on; raises ValueError for a value out of range."""
        self._want(settings)
        for name, value in settings.items():
            self.controls[name].value = value

    def _want(self, settings: dict[str, Any]) -> None:
        configure(self.gan.config, **(self.settings | settings))  # raises ValueError
        self.settings = self.settings | settings
        if not self.playing:
            self._apply()

    def scenario(self, name: str) -> None:
        """Set everything as a named scenario has it."""
        self.change(**{field: getattr(self.base, field) for field in _CONTROLS} | SCENARIOS[name](self.base))

    @property
    def text(self) -> str:
        """Return the run as one line."""
        step, config = self._start
        if step:
            return "it began with a trained GAN: Reset, and a line that reproduces the run will stand here"
        return run_text(type(self.gan), config, len(self.gan.images), self._changes, self.gan.step)

    # ------------------------------------------------------------------------------------------------ the thread
    def _train(self, last: float) -> None:
        """Train in stretches until `last` iterations or a pause; an error goes to the panel."""
        try:
            self._due, self._last = time.perf_counter() + 1, last
            while self.gan.step < last and not self._pausing.is_set():
                self._apply()
                self.gan.train(1, data=self.gan._source, callbacks=self.callbacks)
                self._look()
        except Exception as error:
            self.error = error
        finally:
            self._solo = {}
            self._apply()
            self._post(self._rest)

    def on_batch_end(self, gan: Trainer) -> None:
        """End the stretch when there is something to do."""
        self._pausing.wait(self._pace)
        wanted = self.settings | self._solo
        changed = any(getattr(gan.config, name) != value for name, value in wanted.items())
        if changed or self._pausing.is_set() or gan.step >= self._last or time.perf_counter() >= self._due:
            gan.stop("a look")

    def _apply(self) -> None:
        """Bring the settings into force, between two batches, and note when."""
        wanted = self.settings | self._solo
        new = {name: value for name, value in wanted.items() if getattr(self.gan.config, name) != value}
        if new:
            self.gan.reconfigure(**new)
            self._changes.append((self.gan.step, new))

    def _look(self) -> None:
        """Take a look, draw it and show it; looks take at most a fifth of the time."""
        start = time.perf_counter()
        look = take_look(self.gan)
        kept = self.looks[::2] if len(self.looks) >= KEPT_LOOKS else self.looks
        self.looks = [*kept, (look, figure_png(plot_look(look, self.gan.history)))]
        self._post(self._show_newest)
        now = time.perf_counter()
        self._due = now + max(1.0, 4 * (now - start))

    def _post(self, action: Callable[[], None]) -> None:
        """Run it on the kernel's main thread, where widgets are at home; without a kernel, here and now."""
        if self._loop is None or threading.current_thread() is threading.main_thread():
            action()
        else:
            self._loop.call_soon_threadsafe(action)

    # ------------------------------------------------------------------------------------------------ what one sees
    def _build(self) -> None:
        """Make the widgets; each is named, and the tab key reaches all of them in this order."""
        import ipywidgets as w

        wide = w.Layout(width="99%")
        self.status, self.picture, self.panel = w.HTML(), w.Image(format="png", layout=wide), w.HTML(layout=wide)
        self.picture.layout.max_width = "870px"
        self.amount = w.Dropdown(options=[("1 batch", 1), ("10 batches", 10), ("1 epoch", 0)], description="a step is")
        actions = {
            ("Play", "play"): self.play,
            ("Pause", "pause"): self.pause,
            ("Step D", "step-forward"): lambda: self.play(self._batches(), alone="D"),
            ("Step G", "step-forward"): lambda: self.play(self._batches(), alone="G"),
            ("Step both", "fast-forward"): lambda: self.play(self._batches()),
            ("Reset", "refresh"): self.reset,
        }
        self.buttons = {}
        for (name, icon), action in actions.items():
            self.buttons[name] = w.Button(description=name, icon=icon, layout=w.Layout(width="auto"))
            self.buttons[name].on_click(lambda _, action=action: action())
        paces = [("full speed", 0.0), ("5 batches/s", 0.2), ("1 batch/s", 1.0)]
        self.pace = w.Dropdown(options=paces, description="speed")
        self.pace.observe(lambda event: setattr(self, "_pace", event.new), "value")
        self.chosen = w.Dropdown(options=list(SCENARIOS), description="scenario")
        self.chosen.observe(lambda event: self.scenario(event.new), "value")
        self.controls = {name: self._control(w, name, *_CONTROLS[name]) for name in _CONTROLS}
        for name in ("real_label_smooth", "fake_label_smooth"):
            if self.gan.config.loss not in ("bce", "least_squares"):
                self.controls[name].layout.display = "none"  # this loss has no labels
        self.scrub = w.IntSlider(min=0, max=0, description="look back", readout=False, layout=wide)
        self.scrub.observe(lambda event: self._show(), "value")
        self.line = w.Text(description="this run", disabled=True, layout=wide)
        row = w.Layout(flex_flow="row wrap")
        buttons = w.HBox([*self.buttons.values(), self.amount], layout=row)
        choices, controls = w.HBox([self.pace, self.chosen], layout=row), w.HBox([*self.controls.values()], layout=row)
        self.box = w.VBox([buttons, choices, self.status, self.picture, self.scrub, controls, self.panel, self.line])
        self._lock(False)

    def _control(self, w: Any, name: str, kind: str, label: str, limits: dict[str, Any]) -> Any:
        """Return the labelled widget that steers one Config field."""
        style, layout = {"description_width": "130px"}, w.Layout(width="48%")
        control = getattr(w, kind)(value=self.settings[name], description=label, style=style, layout=layout, **limits)
        if kind == "Checkbox":
            control.indent = False

        def steer(event: Any) -> None:
            """Take over a value that the user chose, to three digits; say why where it cannot be."""
            if event.new != self.settings[name]:
                value = float(f"{event.new:.3g}") if isinstance(event.new, float) else event.new
                try:
                    self._want({name: value})
                except ValueError as error:
                    control.value = self.settings[name]
                    self._say(f"⚠️ {error}")

        control.observe(steer, "value")
        return control

    def _batches(self) -> int:
        """Return how many batches a step takes."""
        config = self.gan.config
        return self.amount.value or len(self.gan.images) // (config.batch_size * max(1, config.d_steps))

    def _lock(self, playing: bool) -> None:
        for name, button in self.buttons.items():
            button.disabled = playing != (name == "Pause")

    def _rest(self) -> None:
        """Say that it stands still, and why."""
        self._lock(False)
        self._show()
        self._say("paused" if self.error is None else "stopped by an error")

    def _say(self, text: str) -> None:
        """Show what it does, and where training and time slider stand."""
        self._state = text
        gan, shown, newest = self.gan, self._shown()[0].step, self.looks[-1][0].step
        where = f"epoch {gan.epoch + gan.position / len(gan.images):.2f} · iteration {gan.step}"
        where += f" · looking back at iteration {shown}" if shown != newest else ""
        where += f" · {gan.history.last().get('images_per_second', 0):.0f} images/s"
        self.status.value = f"<b>{html.escape(text)}</b> · {where} · {ICONS[self._health()]} {WORDS[self._health()]}"

    def _health(self) -> str:
        """Return the status of the look that is shown: yellow before there are readings, red after an error."""
        diagnosis = self._shown()[0].diagnosis
        return "red" if self.error is not None else diagnosis.status if diagnosis else "yellow"

    def _shown(self) -> tuple[Look, bytes]:
        looks = self.looks  # the training thread puts a new list there
        return looks[min(self.scrub.value, len(looks) - 1)]

    def _show_newest(self) -> None:
        """Move the time slider on, unless the user is looking back."""
        following, newest = self.scrub.value >= self.scrub.max, len(self.looks) - 1
        self.scrub.max = newest
        if following and self.scrub.value != newest:
            self.scrub.value = newest  # which shows it
        else:
            self._show()

    def _show(self) -> None:
        """Show the look that the time slider points at, its health, and the run as one line."""
        look, self.picture.value = self._shown()
        health = panel_html(look.diagnosis) if look.diagnosis else "press Play or Step: there are no readings yet"
        if self.error is not None:
            health = f"🔴 <b>Training has stopped:</b> {html.escape(f'{type(self.error).__name__}: {self.error}')}"
        colour = {"green": COLOURS["third"], "yellow": "#E69F00", "red": COLOURS["G"]}
        edge = f"border-left:8px solid {colour[self._health()]};padding-left:8px"
        self.panel.value = f"<div style='{edge}'>{health}</div>"
        self.line.value = self.text
        self._say(self._state)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Return the widgets, and the newest picture for pages that show none."""
        still = {"image/png": base64.b64encode(self.looks[-1][1]).decode(), "text/plain": repr(self)}
        # Kaggle's saved page would show neither: it prefers the widget, which has no kernel there
        return still if kaggle_run() == "Batch" else {**self.box._repr_mimebundle_(**kwargs), **still}

    def __repr__(self) -> str:
        return f"Cockpit({type(self.gan).__name__}, iteration {self.gan.step})"


def explore(draw: Callable[..., Figure], **ranges: Any) -> Any:
    """Return a slider for each argument of `draw`, over the picture that it draws.

    ranges: (low, high) or (low, high, step) for each. Unlike ipywidgets' interact it needs no Output widget, which
    saved pages and some front ends do not show.
    """
    import ipywidgets as w

    sliders = {name: w.interactive.widget_from_abbrev(limits) for name, limits in ranges.items()}
    picture = w.Image(format="png", layout=w.Layout(align_self="flex-start"))

    def show(event: Any = None) -> None:
        """Draw what the sliders say."""
        picture.value = figure_png(draw(**{name: slider.value for name, slider in sliders.items()}))

    for name, slider in sliders.items():
        slider.description = name
        slider.observe(show, "value")
    show()
    return w.VBox([*sliders.values(), picture])


def principal_directions(gan: Trainer, k: int = 4) -> Tensor:
    """Return the k unit directions of z (k, nz) that change G's first layer most, the strongest first.

    The leading right singular vectors of its weights: SeFa (Shen & Zhou 2021), which needs no samples. Raises
    ValueError for a G that does not begin with a dense layer or a transposed convolution.
    """
    generator = gan.average if gan.average is not None else gan.generator
    first = next((m for m in generator.modules() if isinstance(m, (nn.Linear, nn.ConvTranspose2d))), None)
    if first is None:
        raise ValueError(f"{type(gan).__name__}'s generator has no first layer whose directions are known")
    weight = first.weight.detach().float().cpu()
    weight = weight.flatten(1).T if isinstance(first, nn.ConvTranspose2d) else weight
    return torch.linalg.svd(weight[:, : gan.config.nz], full_matrices=False).Vh[:k]


# === Saving: safetensors for tensors, JSON for the rest; loading never runs code from a file ==========================
class CheckpointError(ValueError):
    """Say why a checkpoint cannot be loaded and what to do."""


def save_checkpoint(gan: Trainer, path: str | Path) -> Path:
    """Write all that training needs to go on into the folder `path`, and return it.

    Tensors go to weights.safetensors, the rest to state.json, in a temporary folder that is then moved into place: a
    stop or a full disk in between leaves the older checkpoint whole. Raises OSError that says what to do, and
    CheckpointError where `path` holds other things.
    """
    path = Path(path)
    check_replaceable(path)
    record, tensors = _checkpoint_of(gan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            new, old = Path(folder) / "new", Path(folder) / "old"
            new.mkdir()
            save_file(tensors, new / "weights.safetensors")
            (new / "state.json").write_text(json.dumps(record))
            try:
                if path.exists():
                    path.rename(old)
                new.rename(path)
            except BaseException:  # Ctrl-C too: the older one goes back first
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"cannot save {path} ({error}); free some space or choose another folder: nothing was lost"
        ) from error
    gan.last_checkpoint = path
    return path


def check_replaceable(path: Path) -> None:
    """Raise CheckpointError where a checkpoint's place is taken by other things, which saving would replace."""
    if path.is_file() or (path.is_dir() and not _holds_only_a_checkpoint(path)):
        raise CheckpointError(f"{path} holds other things, which saving would replace; choose a folder of its own")


def _holds_only_a_checkpoint(folder: Path) -> bool:
    """Return whether nothing else is in a folder but what file managers leave there."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return names <= {"state.json", "weights.safetensors", "Thumbs.db", "desktop.ini"}


def _checkpoint_of(gan: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON record and the tensors that make up a checkpoint."""
    tensors, groups = {f"rng.{name}": state for name, state in gan._rng.items()}, {}
    for name in ("generator", "discriminator", "average"):
        network = getattr(gan, name)
        tensors |= (
            {f"{name}.{key}": value for key, value in network.state_dict().items()} if network is not None else {}
        )
    for name in ("optimizer_G", "optimizer_D"):
        state = getattr(gan, name).state_dict()
        groups[name] = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
        for index, values in state["state"].items():
            tensors |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    record = {
        "format": CHECKPOINT_FORMAT,
        "version": __version__,
        "torch": torch.__version__,
        "recipe": gan.recipe,
        "data": gan.trained_on,
        "config": dataclasses.asdict(gan.config),
        "progress": {"epoch": gan.epoch, "step": gan.step, "position": gan.position, "length": gan._length},
        "sums": gan._sums,
        "history": gan.history.to_json(),
        "param_groups": groups,
        "scalers": {"G": gan.scaler_G.state_dict(), "D": gan.scaler_D.state_dict()},
    }
    return record, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors of a checkpoint folder; raises FileNotFoundError or CheckpointError."""
    path = Path(path)
    for name in ("state.json", "weights.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint: it has no {name}; pass the folder that save() wrote")
    try:
        record = json.loads((path / "state.json").read_text())
        if record["format"] > CHECKPOINT_FORMAT:
            raise CheckpointError(
                f"{path} was written by dcgan_utils {record['version']}, this is {__version__}; update dcgan_utils.py"
            )
        return record, load_file(path / "weights.safetensors")
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); load an older checkpoint") from error


def restore(gan: Trainer, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put what a checkpoint holds into a GAN of the same Config; raises CheckpointError when they do not fit."""
    try:
        for name in ("generator", "discriminator", "average"):
            network = getattr(gan, name)
            if network is not None:
                network.load_state_dict(_part(tensors, name))
        for name in ("optimizer_G", "optimizer_D"):
            _restore_optimizer(getattr(gan, name), record["param_groups"][name], _part(tensors, name))
        for name, scaler in (("G", gan.scaler_G), ("D", gan.scaler_D)):
            if record["scalers"][name] and scaler.is_enabled():  # empty where fp16 was not in use
                scaler.load_state_dict(record["scalers"][name])
        gan.history = History.from_json(record["history"])
        gan.history.config = gan.config
        progress = record["progress"]
        gan.epoch, gan.step, gan.position = (progress[name] for name in ("epoch", "step", "position"))
        gan._length, gan.trained_on = progress["length"], record.get("data")
        gan._sums |= record["sums"]  # an older record lacks some readings
        gan._rng = {"cpu": tensors["rng.cpu"], **_part(tensors, "rng")}
        if gan._graphs:
            gan._graphs.forget()
        if gan.rank:  # only the first process's random numbers were saved
            gan._rng = {"cpu": torch.Generator().manual_seed(gan.step + 1_000_003 * gan.rank).get_state()}
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not fit its own config ({str(error).splitlines()[0]})") from error


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _restore_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict], tensors: dict[str, Tensor]) -> None:
    """Load an optimiser's state in its weights' memory layout, which the file loses and fused Adam needs."""
    state: dict[int, dict[str, Tensor]] = {}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".")
        weight = weights[int(index)]
        value = torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value
        state.setdefault(int(index), {})[key] = value
    if len({frozenset(values) for values in state.values()}) > 1:
        raise ValueError("an optimiser remembers more of one weight than of another")
    machine = ("lr", "fused", "capturable")  # as this device needs them; the rate is set anew in every iteration
    groups = [
        {**kept, **{name: mine[name] for name in machine if name in mine}}
        for kept, mine in zip(groups, optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def newest_checkpoint(folder: str | Path) -> Path:
    """Return the newest of the checkpoint `folder` itself and the epoch-… in it; raises FileNotFoundError."""
    found = _by_age(Path(folder))
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}: looked for state.json and epoch-*/state.json")
    return found[-1]


def _by_age(folder: Path) -> list[Path]:
    """Return a folder's checkpoints and itself if it is one, oldest first: names may be those of several runs."""
    states = [*folder.glob("state.json"), *folder.glob("epoch-*/state.json")]
    return [state.parent for state in sorted(states, key=lambda state: state.stat().st_mtime_ns)]


class SaveCheckpoints(Callback):
    """Save a checkpoint into folder/epoch-NNNN after every epoch and at the end; the two newest are kept."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_train_begin(self, gan: Trainer) -> None:
        """Fail before the first batch, not after the first epoch, where the folder cannot be written."""
        prepare_file(self.folder / "x")
        if not os.access(self.folder, os.W_OK):
            raise OSError(f"cannot write into {self.folder}; choose another folder")

    def on_epoch_end(self, gan: Trainer) -> None:
        """Save; a failure is a warning, since the older checkpoint is whole and training can go on."""
        with or_warn(f"the checkpoint of epoch {gan.epoch}"):
            try:
                save_checkpoint(gan, self.folder / f"epoch-{math.ceil(gan.history['epoch'][-1]):04d}")
            except CheckpointError as error:  # somebody put other things there meanwhile
                raise OSError(error) from error
        numbered = re.compile(r"epoch-\d+")  # what else lies there is not ours to remove
        mine = [path for path in _by_age(self.folder) if path != self.folder and numbered.fullmatch(path.name)]
        mine = [path for path in mine if _holds_only_a_checkpoint(path)]
        for old in mine[:-2]:
            shutil.rmtree(old, ignore_errors=True)


# === Recipes: what one imports ========================================================================================
class GAN(Trainer):
    """Add pictures, health and saving to the training loop; the recipes below add their networks and numbers."""

    bands: tuple[Band, ...] = ()  # the README's own reading of D's answers
    _reference: tuple[Any, Reference] | None = None
    _shares: tuple[Any, Tensor] | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of this recipe's pictures."""
        return Path(self.config.out_dir) / self.recipe

    def default_callbacks(self) -> list[Callback]:
        """Return progress bar, the judge's reading of the classes, epoch report and saved grids."""
        judge = [JudgeSamples(DIVERSITY_SAMPLES, distances=False)] if self.config.channels == 1 else []
        shown = [ProgressBar(), *judge, EpochReport(), SaveGrids()]
        return [*shown, Tracker(self.config.tracker)] if self.config.tracker else shown

    def diagnose(self) -> Diagnosis:
        """Return the health panel of the newest epoch, with the recipe's own bands."""
        return diagnose(self.history, self.config, self.bands)

    def evaluate(self, n: int = 10_000, seed: int = 0, inception: bool = False) -> Scores:
        """Return the scores of n new samples beside those of real digits; prints nothing, `print(scores)` a table.

        Compared are the 10,000 test images of what it was trained on (MNIST if not trained since it was loaded; of
        images without a test split, one half against the other). inception: add the usual FID where its weights can be
        had. Raises ValueError for n below MIN_SAMPLES.
        """
        if n < MIN_SAMPLES:
            raise ValueError(f"n = {n}; these scores need at least {MIN_SAMPLES} samples")
        samples = self.sample(n, seed=seed)
        scores = score_samples(samples, self.reference(), self._digits(n, None))
        if inception:
            scores["inception_fid"] = inception_distance(samples, self._real_images()[1])
        return scores

    def reference(self) -> Reference:
        """Return what real images score, read once for the data of this GAN."""
        if self._reference is None or self._reference[0] is not self._source:
            train, test = self._real_images()
            seen = self.images if self.images is not None and len(train) < len(self.images) else None
            self._reference = (self._source, Reference(train, test, self.config.image_size, seen))
        return self._reference[1]

    def _real_images(self) -> tuple[Tensor, Tensor]:
        """Return training and test images, uint8 (N, H, W); of images without a test split, two random halves."""
        if isinstance(self._source, (str, Path, NoneType)):
            source = self._source or "mnist"
            train = load_images(source)[0] if self.images is None else self.images
            try:
                return train, load_images(source, "test")[0]
            except FileNotFoundError:
                if self.images is None or not Path(source).is_dir():  # else a folder of training images alone
                    raise
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0)).to(self.device)
        return tuple(self.images[half] for half in order.chunk(2))

    def judge_samples(self, n: int, distances: bool = True) -> dict[str, float]:
        """Return the judge's view of n fixed-noise samples.

        That is confidence and class_gap, with distances also fid, precision, recall and near_copies.

        class_gap: the share of samples that would have to be of another class for the classes to be as frequent as
        among real images (total variation distance; 0.9 where all show one digit). A conditional recipe is asked for
        all its classes alike often; those of them that the data hold count, alike.
        """
        fake = read_digits(self.fixed_samples(n))
        if self._shares is None or self._shares[0] is not self._source:  # the real digits' shares, read once
            self._shares = (self._source, self._expected_shares())
        view = {"confidence": fake.probabilities.max(dim=1).values.mean().item()}
        view["class_gap"] = (self._learnable(fake).shares - self._shares[1]).abs().sum().item() / 2
        if distances:
            real = self.reference().test.features
            view["fid"] = frechet_distance(fake.features, real)
            manifold = manifold_metrics(fake.features, real[:: max(1, len(real) // (4 * n))])
            view |= {name: manifold[name] for name in ("precision", "recall")}
            view["near_copies"] = self.reference().near_copies(fake.features)
        return view

    def _expected_shares(self) -> Tensor:
        """Return how often samples should be read as each digit: as real ones are, of a conditional recipe by class."""
        if not self.config.conditional:
            return read_digits(self.real_samples(1000)).shares
        present = self.labels.unique()
        picked = [(self.labels == label).nonzero()[: max(1, 1000 // len(present)), 0] for label in present]
        read = [read_digits(normalise(self.images[which]).cpu()).shares for which in picked]
        return torch.stack(read).mean(dim=0)

    def _learnable(self, fake: Reading) -> Reading:
        """Return what was read of those samples whose class the data hold; no G can have learnt another."""
        if not self.config.conditional:
            return fake
        asked = self._digits(len(fake.features), None)
        held = torch.isin(asked, self.labels.unique()).cpu()
        return Reading(fake.features[held], fake.probabilities[held])

    def generate_images(self, epoch: int | str | None = None, n: int = 36) -> Figure:
        """Return a figure of n fixed-noise samples, also saved under out_dir as epoch_NNN.png or images_NAME.png."""
        title = f"epoch {epoch}" if epoch is not None else f"after {self.history.last().get('epoch', 0):.4g} epochs"
        figure = plot_images(self.fixed_samples(n), f"{type(self).__name__}, {title}", columns=math.ceil(math.sqrt(n)))
        number = f"{epoch:03d}" if isinstance(epoch, int) else None
        name = f"frames/epoch_{number}.png" if number else f"images_{epoch or 'now'}.png"
        save_picture(figure, self.folder / name)
        return figure

    def plot_history(self, history: History | None = None) -> Figure:
        """Return the figure of losses, D's answers and diversity over the epochs."""
        return plot_history(history or self.history)

    def save(self, path: str | Path) -> Path:
        """Save networks, optimisers, average, RNG, config and history into a folder; raises OSError."""
        return save_checkpoint(self, path)

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> GAN:
        """Return the GAN of a checkpoint, ready to sample or train on; `GAN.load` takes any recipe.

        overrides: Config fields that may change, such as device, compile or lr_D. Raises ValueError for others,
        FileNotFoundError, and CheckpointError for a damaged, newer or other recipe's checkpoint.
        """
        path = newest_checkpoint(path)
        record, tensors = read_checkpoint(path)
        recipe = str(record.get("recipe"))
        kind = RECIPES.get(recipe)
        if kind is None:
            raise CheckpointError(f"{path} is of recipe {recipe!r}{nearest_name(recipe, RECIPES)}")
        if not issubclass(kind, cls):
            raise CheckpointError(f"{path} is a {kind.__name__}, not a {cls.__name__}; use {kind.__name__}.load")
        machine = {name: overrides.pop(name) for name in MACHINE if name in overrides}
        try:
            gan = kind(configure(Config(), **{**record.get("config", {}), **machine}))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} has a config that does not fit: {error}") from error
        restore(gan, record, tensors)
        gan.reconfigure(**overrides)
        gan.last_checkpoint = path
        return gan

    @classmethod
    def replay(cls, text: str, data: Any = "mnist") -> GAN:
        """Return the GAN of a run that `run_text` wrote as one line, trained to its end on the same data.

        data: a source of `load_images` or (images, labels); as many as the line says are taken from its beginning.
        Raises ValueError for a line or data that do not fit.
        """
        (recipe, *fields), *acts = (part.split() or [""] for part in text.split("|"))
        if recipe not in RECIPES:
            raise ValueError(f"{text!r} names no recipe{nearest_name(recipe, list(RECIPES))}")
        if not all(step.isdecimal() for step, *_ in acts):
            raise ValueError(f"{text!r}: after each | stands an iteration, then FIELD=VALUE")
        fields = parse_fields(fields)
        n, kind = fields.pop("images", 0), RECIPES[recipe]
        images, labels = load_images(data) if isinstance(data, (str, Path)) else data
        if not 0 < n <= len(images):
            raise ValueError(f"the run was made with {n:,} images, the data hold {len(images):,}")
        gan, data = kind(configure(kind.defaults, **fields)), (images[:n], labels[:n])
        for step, *changes in acts:
            while gan.step < int(step):
                gan.train(1, data=data, callbacks=[StopAt(int(step))])
            gan.reconfigure(**parse_fields(changes))
        return gan


class DCGAN(GAN):
    """The 64×64 PyTorch recipe: BatchNorm in both networks, labels 0.85 and 0.2 (Radford et al. 2015)."""

    recipe = "dcgan"
    networks = (DCGANGenerator, DCGANDiscriminator)
    bands = DCGAN_BANDS

    @classmethod
    def check_image_size(cls, size: int) -> None:
        """Raise ValueError unless size is 16, 32, 64, …: the networks double from 4×4."""
        if size & (size - 1):
            below = 2 ** int(math.log2(size))
            raise ValueError(
                f"image_size = {size}: DCGAN doubles from 4×4, so it makes {below} or {2 * below}, as 16, 32, 64 …"
            )


class ConditionalDCGAN(DCGAN):
    """The 64×64 recipe made to draw the digit one asks for; `conditioning` chooses how D sees the label."""

    recipe = "conditional"
    defaults = Config(conditional=True)

    def generate_images(self, epoch: int | str | None = None, n: int = 100) -> Figure:
        """Return a figure of n fixed-noise samples, a column for each digit, saved as the other recipes save theirs."""
        return super().generate_images(epoch, n)


class StableDCGAN(GAN):
    """The 28×28 TensorFlow recipe rebuilt: 2,330,944 and 212,865 parameters, Dropout in D, labels 0.9 and 0."""

    recipe = "stable"
    networks = (StableGenerator, StableDiscriminator)
    bands = STABLE_BANDS
    defaults = Config(
        image_size=28,
        num_epochs=40,
        lr_G=1e-4,  # the README leaves it open
        lr_D=1e-4,
        adam_eps=1e-7,  # TensorFlow's default
        real_label_smooth=0.9,  # one-sided smoothing (Salimans et al. 2016)
        fake_label_smooth=0.0,
        dropout_D=0.3,
        start_at_background=False,  # no biases in G: the parameter count is the README's
        save_every=5,
    )

    def default_callbacks(self) -> list[Callback]:
        """Return what every recipe shows, after the lines and blocks of this recipe's README."""
        return [BatchLines(), *super().default_callbacks()]


class FastDCGAN(GAN):
    """Ours: digits in seconds, of the class one asks for; `conditional=False` for the label-free one.

    Each choice was tried at equal time (tools/speed_trials.py, results/speed); notebook 09 builds them up one by one,
    but for the last, a weight of matching that falls.
    """

    recipe = "fast"
    networks = (FastGenerator, FastDiscriminator)
    defaults = Config(
        image_size=28,
        nz=64,
        ngf=32,
        ndf=32,
        conditional=True,  # one chooses the digit, and labels speed learning up
        conditioning="matching",  # fewer than one misread sample in a hundred in place of three
        matching_weight=0.25,  # half of the usual: a little more variety early on, and 99 % still read as asked
        matching_fades=True,  # steady, it gains less recall the longer one trains (README, Speed)
        batch_size=64,  # twice the updates for the same images
        num_epochs=6,
        lr_G=3e-3,  # fifteen times DCGAN's: small networks bear it, and the schedule ends at 0
        lr_D=3e-3,
        lr_schedule="linear_tail",
        beta1=0.0,  # no momentum: better in every score, once a penalty holds D
        beta2=0.99,
        loss="relativistic",  # with the penalty: variety near that of real digits
        gradient_penalty=0.2,
        penalty_every=8,  # a penalty costs as much as D's whole step, and a lazy one does as well
        batch_norm_D=False,  # the penalty holds D in its place
        ema=0.99,  # averages out the last steps' wobble
    )


class WGANGP(GAN):
    """A Wasserstein GAN with gradient penalty (Gulrajani et al. 2017): D is a critic with five steps to one of G."""

    recipe = "wgan-gp"
    networks = (FastGenerator, FastDiscriminator)
    defaults = Config(
        image_size=28,
        ngf=32,
        ndf=32,
        num_epochs=20,
        loss="wasserstein",
        gradient_penalty=10.0,
        batch_norm_D=False,  # the penalty is on D's slope at one image, which BatchNorm ties to its whole batch
        d_steps=5,  # the estimate is one only while the critic is near its best
        lr_G=2e-4,
        lr_D=2e-4,
        beta1=0.0,  # a critic that the penalty moves about wants no momentum
        beta2=0.9,
    )


class ProgressiveGAN(GAN):
    """Grow from 4×4 to full size, each size faded in (Karras et al. 2018)."""

    recipe = "progressive"
    networks = (ProgressiveGenerator, ProgressiveDiscriminator)
    defaults = Config(
        image_size=32,
        num_epochs=10,
        lr_G=1e-3,  # ibid., appendix A
        lr_D=1e-3,
        beta1=0.0,
        beta2=0.99,
        real_label_smooth=0.9,
        fake_label_smooth=0.0,
        ema=0.99,
    )

    @classmethod
    def check_image_size(cls, size: int) -> None:
        """Raise ValueError unless size is 16, 32, 64, …: growth doubles from 4×4."""
        DCGAN.check_image_size(size)


RECIPES: dict[str, type[GAN]] = {
    kind.recipe: kind for kind in (DCGAN, StableDCGAN, FastDCGAN, ConditionalDCGAN, WGANGP, ProgressiveGAN)
}


# === Command line =====================================================================================================
def main(arguments: Sequence[str] | None = None) -> int:
    """Train a recipe or sample from a checkpoint; an error is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="dcgan_utils.py", description="Train DCGANs and sample from them.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a recipe, or go on")
    train.add_argument("--recipe", help=f"one of {', '.join(RECIPES)} (default: fast, or that of the resumed run)")
    train.add_argument("--epochs", type=int, help="in all, those of a resumed run included (default: the recipe's)")
    train.add_argument("--max-seconds", type=float, help="stop after so many seconds")
    train.add_argument("--data", help="mnist (default), fashion-mnist, kmnist, or a folder of IDX or CSV files")
    train.add_argument("--out", type=Path, default=Path("outputs"), help="folder of checkpoints and pictures")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="Config fields, such as lr_D=5e-5")
    sample = commands.add_parser("sample", help="write samples as a NumPy file")
    sample.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a folder of them")
    sample.add_argument("--n", type=int, default=64, help="how many (default: 64)")
    sample.add_argument("--seed", type=int, help="the same seed gives the same samples")
    sample.add_argument("--digits", type=int, nargs="+", help="conditional recipes: one digit, or one for each sample")
    sample.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal without emoji shows '?' rather than end the training
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        keep_memory()
        with process_group():
            return {"train": _train_command, "sample": _sample_command}[options.command](options)
    except (ValueError, OSError, ImportError, DivergenceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started (gloo on CPU, NCCL on GPUs); only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")  # device=cpu works, too
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


def _train_command(options: argparse.Namespace) -> int:
    """Train or resume, with a checkpoint after every epoch."""
    if options.recipe is not None and options.recipe not in RECIPES:
        raise ValueError(f"no recipe {options.recipe!r}{nearest_name(options.recipe, list(RECIPES))}")
    overrides = {"out_dir": str(options.out), **parse_fields(options.set)}
    if options.epochs is not None:
        overrides["num_epochs"] = options.epochs
    if options.resume:
        gan = RECIPES.get(options.recipe, GAN).load(options.out, **overrides)
    elif _by_age(options.out):
        raise ValueError(f"{options.out} already holds checkpoints; add --resume, or choose another --out")
    else:
        gan = RECIPES[options.recipe or "fast"](**overrides)
    print(
        f"{type(gan).__name__}: {gan.config.num_epochs} epochs on {gan.device}, {gan.precision}, seed {gan.config.seed}"
    )
    callbacks = [*gan.default_callbacks(), SaveCheckpoints(options.out)]  # it saves what the judge has read
    gan.train(data=options.data, max_seconds=options.max_seconds, callbacks=callbacks)
    if gan.history["epoch"] and gan.rank == 0:
        gan.generate_images("FINAL")
        print(f"checkpoint: {gan.last_checkpoint}   pictures: {gan.folder}")
    return 0


def _sample_command(options: argparse.Namespace) -> int:
    """Write images float32 (n, 1, H, W) in [-1, 1], and their digits where the recipe has classes."""
    gan = GAN.load(options.checkpoint, device="auto", precision="auto")
    images = gan.sample(options.n, seed=options.seed, digits=options.digits)
    arrays = {"images": images.numpy()}
    if gan.config.conditional:
        arrays["digits"] = gan._digits(options.n, options.digits).cpu().numpy()
    path = options.out if options.out.suffix == ".npz" else options.out.with_name(f"{options.out.name}.npz")
    np.savez_compressed(prepare_file(path), **arrays)
    print(f"{options.n} images of {images.shape[2]}×{images.shape[3]} in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
