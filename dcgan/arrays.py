"""Arrays, labels, pictures and data sets in memory, as one uint8 tensor of images and one tensor of labels."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

MEMORY_LIMIT = 4 * 2**30  # bytes of one set of images
PIXEL_LIMIT = 2**25  # of one picture, as decoded


class ImageData(NamedTuple("ImagePair", [("images", Tensor), ("labels", Tensor)])):
    """The pair (images, labels), with names; as text, one line that describes it.

    images: uint8 (N, H, W) or (N, C, H, W). labels: int64 (N,), 0 … K-1, or all -1 where there are none. classes: K
    names or None. name: what `load_images` reads again, "mnist" for MNIST's content, or None. origin: what is printed.
    """

    def __new__(
        cls, images: Tensor, labels: Tensor, classes: Any = None, name: str | None = None, origin: str = "data"
    ) -> ImageData:
        pair = super().__new__(cls, images, labels)
        pair.classes, pair.name, pair.origin = classes, name, origin
        return pair

    def __str__(self) -> str:
        n, *channels, height, width = self.images.shape
        color = {1: "gray", 3: "color"}.get(channels[0] if channels else 1, f"{channels} channels")
        classes, last = "no labels", len(self.classes or ()) - 1
        if self.classes:
            plain = (self.classes[0], self.classes[last]) == ("0", str(last))
            named = "" if plain else f" ({self.classes[0]} … {self.classes[last]} are labels 0 … {last})"
            classes = f"{last + 1} classes{named}"
        return f"{n:,} of {height}×{width}, {color}, {classes}, from {self.origin}"


def checked(data: ImageData) -> ImageData:
    """Return the data; raises ValueError unless there is one label for each image, warns where pixels are 0 and 1."""
    images, labels = data
    if len(images) != len(labels):
        raise ValueError(f"{data.origin}: {len(images):,} images but {len(labels):,} labels; each image needs its own")
    if not images.numel():
        raise ValueError(f"{data.origin}: images of shape {tuple(images.shape)}; needed are N > 0, H > 0 and W > 0")
    if images.max() <= 1:
        warnings.warn(f"{data.origin}: no pixel is above 1, of 255: multiply the images by 255", stacklevel=3)
    return data


def check_memory(size: int, origin: Any) -> None:
    """Raise ValueError where so many bytes are too many for one set of images."""
    if size > MEMORY_LIMIT:
        much, most = size / 2**30, MEMORY_LIMIT / 2**30
        raise ValueError(
            f"{origin} would take {much:,.1f} GiB, the limit is {most:,.1f}; pass a smaller size= or limit="
        )


def spread(n: int, limit: int | None) -> Tensor:
    """Return at most `limit` of the indices 0 … n-1, evenly spaced."""
    count = min(n, limit or n)
    return torch.arange(count) * n // max(count, 1)


def regular_file(path: str | Path) -> Path:
    """Return the path; raises FileNotFoundError, and ValueError for what is no file: reading a pipe may never end."""
    if not (path := Path(path)).is_file():
        error = ValueError if os.path.lexists(path) else FileNotFoundError
        raise error(f"{path} is no regular file")
    return path


def image_tensor(array: Any, origin: str = "data") -> Tensor:
    """Return a copy, uint8 (N, H, W) or (N, C, H, W), of whole numbers 0 … 255; raises ValueError for anything else.

    An array (N, H, W, C) of one or three channels is taken, too.
    """
    try:
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{origin}: images are no array of numbers ({error!r:.200})") from error
    if values.ndim == 4 and values.shape[3] in (1, 3) and values.shape[1] not in (1, 3):
        values = np.moveaxis(values, 3, 1)
    fits = values.ndim == 3 or (values.ndim == 4 and values.shape[1] <= 16)
    if not fits or values.dtype.kind not in "iub" or (values.size and not 0 <= values.min() <= values.max() <= 255):
        limits = f" {values.min()} … {values.max()}" if values.size and values.dtype.kind in "iuf" else ""
        hint = "; of floats 0 … 1: (images * 255).round().to(torch.uint8)" if values.dtype.kind == "f" else ""
        shapes = "(N, H, W) or (N, C, H, W) with C ≤ 16"
        raise ValueError(f"{origin}: images are {values.dtype} {values.shape}{limits}; needed: uint8 {shapes}{hint}")
    return torch.from_numpy(np.array(values, np.uint8, order="C"))


def number_labels(
    labels: Any, names: Sequence[str] = (), origin: str = "data"
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Return int64 labels 0 … K-1 of any whole numbers or texts, and the K names; all -1 and None where there are none.

    Whole numbers from 0 on that leave few out stay as they are, so that a part of the digits keeps its labels.
    names: of the labels 0, 1, … where the source has them. Raises ValueError for fractions, None and the like.
    """
    try:
        values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        values = np.asarray(values.tolist()) if values.dtype == object else values  # pandas' texts are objects
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{origin}: labels are no list of whole numbers or texts ({error!r:.200})") from error
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.dtype.kind == "f" and (abs(values) < 2**53).all() and (values % 1 == 0).all():
        values = values.astype(np.int64)
    kind, size = values.dtype.kind, len(np.atleast_1d(values))
    if values.ndim != 1 or kind not in "iubU" or (kind == "U" and (np.char.strip(values) == "").any()):
        some = f"of shape {values.shape[1:]}, if one-hot: labels.argmax(1)" if values.ndim > 1 else f"{values!s:.80}"
        raise ValueError(
            f"{origin}: {size:,} labels {' '.join(some.split())}; needed: a whole number or a text for each"
        )
    found, numbers = np.unique(values, return_inverse=True)
    if not len(found) or (kind == "i" and found[0] == found[-1] == -1):
        return torch.full(values.shape, -1), None
    known = dict(enumerate(names)) if kind in "iu" else {}
    if kind in "iu" and found[0] == 0 and found[-1] < max(10, 2 * len(found)):
        numbers, found = values, range(max(int(found[-1]) + 1, len(known)))
    return torch.from_numpy(numbers.astype(np.int64)), tuple(known.get(v, str(v)) for v in found)


# ------------------------------------------------------------------------------------------------------------- pictures
def open_picture(picture: Any, size: int) -> Image.Image:
    """Return a picture by its path, encoded bytes, PIL image, uint8 (H, W) or (C, H, W), or floats 0 … 1 of these.

    A file may be decoded later, with at least twice `size` pixels a side. Raises what Pillow raises for damaged files.
    """
    if isinstance(picture, Tensor) and picture.is_floating_point() and 0 <= picture.min() <= picture.max() <= 1:
        picture = (picture * 255).round().to(torch.uint8)
    if isinstance(picture, (Tensor, np.ndarray)):
        return tvf.to_pil_image(image_tensor(picture[None], "with an axis before it")[0])
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, (str, Path, bytes)):
        raise ValueError(f"a {type(picture).__name__} is no image")
    opened = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else regular_file(picture))
    opened.info["whole"] = opened.size
    opened.draft("RGB", (2 * size, 2 * size))  # lets JPEG skip what resizing would average away
    return opened


def picture_pixels(picture: Image.Image, size: int, channels: int | None) -> np.ndarray:
    """Return a picture, uint8 (size, size) or (size, size, 3): upright, on white, center-cropped, resized."""
    if picture.width * picture.height > PIXEL_LIMIT:
        raise ValueError(f"{picture.width}×{picture.height} are more than {PIXEL_LIMIT:,} pixels")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    gray = channels == 1 or (channels is None and picture.mode in ("1", "L"))
    return np.asarray(ImageOps.fit(picture.convert("L" if gray else "RGB"), (size, size), Image.Resampling.BILINEAR))


class PictureReader:
    """Read pictures, by a function of their number, in threads; what cannot be read is noted in `broken`."""

    def __init__(self, picture: Callable[[int], Any]) -> None:
        self.picture = picture
        self.broken: dict[int, str] = {}

    def pixels(self, i: int, size: int, channels: int | None) -> tuple[tuple[int, int], np.ndarray] | None:
        """Return the width and height of picture i, and its pixels as `picture_pixels` does, or None."""
        item = None
        try:
            opened = open_picture(item := self.picture(i), size)
            return opened.info.get("whole", opened.size), picture_pixels(opened, size, channels)
        except Exception as error:  # Pillow's decoders, and a user's own data set, raise whatever they like
            name = str(item) if isinstance(item, Path) else f"number {i}"
            self.broken[i] = f"{name} ({error!r:.200})".replace(f" '{name}'", "")
            return None

    def report(self, n: int, origin: str) -> None:
        """Raise ValueError where more than 1 % of n pictures are broken, warn where fewer are."""
        some = "; ".join(list(self.broken.values())[:5]) + (" …" if len(self.broken) > 5 else "")
        if 100 * len(self.broken) > n:
            raise ValueError(f"{origin}: {len(self.broken):,} of {n:,} pictures cannot be read, over 1 %: {some}")
        if self.broken:
            warnings.warn(f"{origin}: left out {len(self.broken):,} pictures that cannot be read: {some}", stacklevel=3)


def read_pictures(
    picture: Callable[[int], Any], n: int, size: int | None, channels: int | None, origin: str, workers: int = 4
) -> tuple[Tensor, list[int], str]:
    """Return the pictures 0 … n-1 that can be read, their numbers, and `origin` with what was done to them.

    size None: the median of the short sides, channels None: 3 if one is in color, both judged by at most 256 of them.
    Raises ValueError where more than 1 % cannot be read.
    """
    reader, pool = PictureReader(picture), ThreadPoolExecutor(workers)

    def store(i: int) -> None:
        if found := reader.pixels(i, size, channels):
            images[i] = found[1] if channels == 1 else np.moveaxis(found[1], 2, 0)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files
            some = [s for s in pool.map(lambda i: reader.pixels(i, 64, channels), spread(n, 256).tolist()) if s]
            size = size or int(np.median([min(shape) for shape, _ in some] or [1]))
            channels = channels or (3 if any(p.ndim == 3 and np.ptp(p, axis=2).max() > 3 for _, p in some) else 1)
            check_memory(n * channels * size**2, origin)
            images = np.zeros((n, 3, size, size) if channels == 3 else (n, size, size), np.uint8)
            quiet = n < 2000 or sys.stderr is None
            for _ in tqdm(pool.map(store, range(n)), "reading pictures", n, disable=quiet):
                pass
    finally:
        pool.shutdown(cancel_futures=True)
    reader.report(n, origin)
    kept = [i for i in range(n) if i not in reader.broken]
    same = {shape for shape, _ in some} == {(size, size)}
    origin = origin if same else f"{origin}, center-cropped and resized to {size}×{size}"
    return torch.from_numpy(images[kept] if reader.broken else images), kept, origin


def read_dataset(data: Any, size: int | None, channels: int | None) -> ImageData:
    """Return the items (image, label), or images alone, of a map-style Dataset; images as for `open_picture`."""
    labels: list[Any] = [-1] * len(data)

    def image(i: int) -> Any:
        item = data[i]
        pair = item if isinstance(item, (tuple, list)) and len(item) > 1 else (item, -1)
        labels[i] = pair[1].item() if isinstance(pair[1], Tensor) and pair[1].numel() == 1 else pair[1]
        return pair[0]

    images, kept, origin = read_pictures(image, len(labels), size, channels, type(data).__name__, workers=1)
    names = getattr(data, "classes", ())
    return ImageData(images, *number_labels([labels[i] for i in kept], names, origin), None, origin)
