"""Images in and out of a GAN: its training data, samples of G, scores of D."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .data import as_images, normalize, resize_images
from .losses import Loss, real_logit

PREVIEW = 32  # images on each side of the real-vs-fake grid
FIXED_SAMPLES = 256  # samples of fixed latent vectors behind the readings; the grids show the first of them
Labels = int | str | Sequence[int] | Sequence[str] | Tensor


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode without gradients (BatchNorm uses its running averages), and back as it was."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


DATA_FIELDS = ("images", "labels", "classes", "source", "source_key", "data_name", "statistics_cache")


class Sampler:
    """Hold a GAN's training images, draw samples of G and scores of D; `Trainer` makes the networks."""

    config: Config
    device: torch.device
    generator: nn.Module
    discriminator: nn.Module
    average: nn.Module | None  # the moving average of the generator, which samples are drawn from
    loss: Loss
    engine: Any
    images: Tensor | None = None  # training images, uint8 (N, H, W) or (N, C, H, W), on the device
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None  # names of the classes
    source: Any = None  # what was given as data
    source_key: Any = None
    data_name: str | None = None  # the source by name, also of a checkpoint
    step: int
    statistics_cache: Any = None  # what evaluation keeps of the real images

    def latent(self, n: int, seed: int | None = None) -> Tensor:
        """Return n latent vectors z ~ N(0, I) (n, nz); the same seed gives the same ones, None new ones each time."""
        rng = torch.Generator()
        rng.seed() if seed is None else rng.manual_seed(seed)
        return torch.randn(n, self.config.nz, generator=rng)

    def generate(self, z: Tensor, digits: Labels | None = None) -> Tensor:
        """Return images float32 (n, C, H, W) in [-1, 1], on the CPU, that G (its average, if kept) makes of z (n, nz).

        digits: of a class-conditional recipe (None: all classes in turn). Eval mode, no gradients; raises ValueError.
        """
        labels = self.class_labels(len(z), digits)
        network = self.average if self.average is not None else self.generator
        parts = []
        with eval_mode(network), self.engine.autocast():
            for start in range(0, len(z), 500):
                part = slice(start, start + 500)
                images = network(z[part].to(self.device), None if labels is None else labels[part])
                parts.append(images.float().cpu().contiguous())
        return torch.cat(parts)

    def sample(self, n: int, seed: int | None = None, digits: Labels | None = None) -> Tensor:
        """Return n generated images float32 (n, C, H, W) in [-1, 1].

        digits: class-conditional recipes only: one class for all, or n of them, as numbers or by name; None takes all
        classes in turn. Raises ValueError for n < 1 and for classes that do not fit.
        """
        if n < 1:
            raise ValueError(f"n = {n}; sample at least one image")
        return self.generate(self.latent(n, seed), digits)

    def class_labels(self, n: int, digits: Labels | None) -> Tensor | None:
        """Return the labels (n,) to generate, None for a recipe without classes; raises ValueError."""
        count = self.config.num_classes
        if not self.config.conditional:
            if digits is not None:
                raise ValueError(f"this {type(self).__name__} has no classes: digits must be None (FastDCGAN has)")
            return None
        labels = torch.arange(n) % count if digits is None else torch.as_tensor(self._numbers(digits)).reshape(-1)
        labels = labels.expand(n) if len(labels) == 1 else labels
        if len(labels) != n or labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= count:
            raise ValueError(f"digits must be one or n = {n} whole numbers from 0 to {count - 1}, or names of classes")
        return labels.long().to(self.device)

    def _numbers(self, digits: Labels) -> Any:
        """Return classes as numbers; raises ValueError for a name that the data do not have."""
        names = [digits] if isinstance(digits, str) else digits
        if isinstance(names, Tensor) or not (isinstance(names, Sequence) and any(isinstance(n, str) for n in names)):
            return digits
        known = self.classes or tuple(str(k) for k in range(self.config.num_classes))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no class {unknown[0]!r}; the classes are {', '.join(known)}")
        return [known.index(name) for name in names]

    def score(self, images: Tensor, digits: Labels | None = None) -> Tensor:
        """Return D(x) for each of the images (n, C, H, W) in [-1, 1], as (n,): a probability where the loss gives one.

        digits: what the images show; class-conditional recipes need it. Raises ValueError.
        """
        if self.config.conditional and digits is None:
            raise ValueError("this recipe's D judges an image together with its class: pass digits")
        labels, parts = self.class_labels(len(images), digits), []
        with eval_mode(self.discriminator), self.engine.autocast():
            for start in range(0, len(images), 500):
                part = slice(start, start + 500)
                outputs = self.discriminator(images[part].to(self.device), None if labels is None else labels[part])
                parts.append(real_logit(outputs).float())
        return self.loss.probability(torch.cat(parts)).cpu()

    def fixed_samples(self, n: int = PREVIEW) -> Tensor:
        """Return the images (n, C, H, W) of the same n latent vectors at every call, to compare moments of training."""
        return self.generate(self.latent(max(n, FIXED_SAMPLES), self.config.seed)[:n])

    def real_samples(self, n: int = PREVIEW) -> Tensor:
        """Return n training images (n, C, H, W) in [-1, 1], the same at every call; raises ValueError without data."""
        return normalize(self.images[self.preview_indices(n)]).cpu()

    def preview_indices(self, n: int) -> Tensor:
        """Return the indices of n training images, the same at every call; raises ValueError without data."""
        if self.images is None:
            raise ValueError("there are no training images yet: call train() or set_data() first")
        rng = torch.Generator().manual_seed(self.config.seed)
        return torch.randperm(len(self.images), generator=rng)[:n].to(self.device)

    def hold_data(self, data: Any = None) -> bool:
        """Put training images on the device, resized, and return whether they are others than before.

        A second call with the same source does nothing. Raises ValueError for data that do not fit the Config.
        """
        if data is None:
            data = self.source if self.source is not None else self.data_name or "mnist"
            if self.step and self.source is None and not self.data_name:
                warnings.warn("the checkpoint does not name its data: training goes on with mnist", stacklevel=4)
        key, changed = source_key(data), False
        if key is None or key != self.source_key:
            found = as_images(data)
            self.check_data(found.images, found.labels)
            before, name = self.images, str(data) if isinstance(data, (str, Path)) else None
            images = resize_images(found.images, self.config.image_size).to(self.device)
            changed = before is not None and not torch.equal(before, images)
            changed = changed or (before is None and None not in (name, self.data_name) and name != self.data_name)
            self.images, self.labels = images, found.labels.to(self.device, torch.long)
            self.source, self.source_key, self.data_name, self.classes = data, key, name, found.classes
            self.statistics_cache = None
        self.check_number(len(self.images))
        return changed

    def check_data(self, images: Tensor, labels: Tensor) -> None:
        """Raise ValueError where data do not fit the Config."""
        config = self.config
        if (channels := images.shape[1] if images.ndim == 4 else 1) != config.channels:
            raise ValueError(
                f"the images have {channels} channels, Config.channels is {config.channels}; "
                f"make a {type(self).__name__}(channels={channels})"
            )
        self.check_number(len(images))
        if not config.conditional:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= config.num_classes:
            found = "none" if low < 0 else f"{low} … {high}"
            raise ValueError(
                f"{type(self).__name__} is class-conditional and needs labels 0 … {config.num_classes - 1}, the data "
                f"have {found}; pass (images, labels), num_classes={max(high + 1, 2)} or conditional=False"
            )

    def check_number(self, n: int) -> None:
        """Raise ValueError unless n images are enough for an iteration."""
        steps = max(1, self.config.n_critic)
        if self.config.batch_size * steps > n:
            raise ValueError(
                f"one iteration needs {self.config.batch_size * steps:,} images (batch_size × n_critic), the data hold "
                f"{n:,}; " + (f"lower batch_size to at most {n // steps}" if n >= 2 * steps else "get more")
            )


def source_key(data: Any) -> Any:
    """Return what tells whether data are the same as before: a name, or tensors that nobody wrote to; else None."""
    if isinstance(data, (str, Path)):
        return str(data)
    parts = data if isinstance(data, (tuple, list)) else (data,)
    if not all(isinstance(part, Tensor) for part in parts):
        return None
    return tuple((id(part), part._version) for part in parts)
