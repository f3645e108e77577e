"""How good samples are: a digit classifier, distances between its features, and what real images score themselves."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoints import CheckpointError, check_replaceable
from .data import load_images, normalize, project_file, resize_images
from .distances import frechet_distance, kernel_distance, manifold_metrics, nearest_distance
from .engine import or_warn
from .health import epochs_without_gain
from .history import Callback
from .randomness import draws_from, make_generator

if TYPE_CHECKING:
    from .recipes import GAN

CLASSIFIER_SHA256 = "c7b03e6dfb141b8d4444e1185fc49df1a21239f7fdb3ca090d2a9d0c9782bdcc"  # of classifier.safetensors
CLASSIFIER_FEATURES = 64
MIN_SAMPLES = 100  # more than there are features, so that a covariance can be estimated


class DigitClassifier(nn.Module):
    """Classify gray digits: images (N, 1, 28, 28) in [-1, 1] to logits (N, 10).

    All scores use its features, as FID uses Inception's. It was trained on MNIST (tools/train_classifier.py).
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # (N, 64, 7, 7)
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Flatten(),  # (N, 64 · 3 · 3)
            nn.Linear(64 * 3 * 3, CLASSIFIER_FEATURES, bias=False), nn.BatchNorm1d(CLASSIFIER_FEATURES),
            nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(CLASSIFIER_FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the activations below the last layer (N, 64) for images (N, 1, 28, 28)."""
        return self.layers(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit for each digit (N, 10)."""
        return self.head(self.features(images))


@functools.cache
def load_classifier() -> tuple[DigitClassifier, float]:
    """Return the trained classifier and its accuracy on MNIST's test digits; raises FileNotFoundError or ValueError."""
    places = [project_file(f"{folder}classifier.safetensors") for folder in ("data/", "")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the classifier's weights are missing; they belong to {places[0]}")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != CLASSIFIER_SHA256:
        hashes = f"{found[:12]}…, not {CLASSIFIER_SHA256[:12]}…"
        raise ValueError(f"{path} is another classifier or damaged (SHA-256 {hashes}); restore it from the repository")
    with draws_from(make_generator(0)), safe_open(path, "pt") as file:  # the global generator is left alone
        classifier, accuracy = DigitClassifier(), float(file.metadata()["accuracy"])
    weights = {name: value.float() for name, value in load_file(path).items()}
    classifier.load_state_dict(weights, strict=False)  # BatchNorm's counters are not stored
    return classifier.eval().to(memory_format=torch.channels_last), accuracy


class Classified(NamedTuple):
    """Hold the classifier's outputs for a set of images: features (N, 64) and class probabilities (N, 10)."""

    features: Tensor
    probabilities: Tensor

    @property
    def digits(self) -> Tensor:
        """Return the most probable digit of each image (N,)."""
        return self.probabilities.argmax(dim=1)

    @property
    def shares(self) -> Tensor:
        """Return the share of images classified as each digit (10,); the sum is 1."""
        return torch.bincount(self.digits, minlength=10) / len(self.digits)


def classify(images: Tensor, size: int | None = None) -> Classified:
    """Return the classifier's outputs for uint8 images (N, H, W) or samples float (N, 1, H, W) in [-1, 1].

    Samples are first rounded to 256 gray levels, as a saved picture is. size: a side in pixels that images are resized
    to on their way to 28×28, so that real digits lose as much as generated ones. Raises ValueError for other images.
    """
    if images.is_floating_point():
        check_samples(images)
        images = to_uint8(images)
    if images.ndim == 4 and images.shape[1] != 1:
        raise ValueError(f"images have {images.shape[1]} channels; the classifier takes gray ones (N, H, W)")
    classifier, _ = load_classifier()
    with torch.no_grad():
        parts = (resize_images(part.cpu(), size or part.shape[-1]) for part in images.split(500))
        features = torch.cat([classifier.features(normalize(resize_images(part, 28))) for part in parts])
        return Classified(features, classifier.head(features).softmax(dim=1))


def to_uint8(samples: Tensor) -> Tensor:
    """Return samples float (n, 1, H, W) in [-1, 1] as uint8 images (n, H, W), the inverse of `normalize`."""
    return samples[:, 0].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def check_samples(samples: Tensor, needed: int = 1) -> None:
    """Raise ValueError unless samples are at least `needed` finite images (n, 1, H, H) in [-1, 1]."""
    if samples.ndim != 4 or samples.shape[1] != 1 or samples.shape[2] != samples.shape[3]:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; the classifier takes gray ones (n, 1, H, H)")
    if len(samples) < needed:
        raise ValueError(f"there are {len(samples)} samples; these scores need at least {needed}")
    if not samples.isfinite().all():
        raise ValueError("samples contain NaN or infinite values: training has diverged; load an older checkpoint")
    low, high = samples.min().item(), samples.max().item()
    if low < -1.01 or high > 1.01:
        raise ValueError(f"samples range from {low:.3g} to {high:.3g}; they must be in [-1, 1] (uint8 / 127.5 - 1)")


class RealStatistics:
    """Hold what samples are compared with, and what real images score themselves: the real-vs-real baseline.

    train, test: uint8 images (N, H, W); size: the samples' side in pixels; seen: all images that the GAN was trained
    on, if more than `train`; labels: theirs (N,). Distances are measured to `test`. Raises ValueError for few images.
    """

    def __init__(
        self, train: Tensor, test: Tensor, size: int, seen: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        if min(len(train), len(test)) < MIN_SAMPLES:
            raise ValueError(f"{len(train)} and {len(test)} real images; scores need at least {MIN_SAMPLES} of each")
        self.size, self.train, self.test = size, classify(train, size), classify(test, size)
        known = self.train if seen is None else classify(seen, size)
        self.seen = known.features
        self.class_accuracy = None if labels is None else (known.digits == labels.cpu()).float().mean().item()
        new = nearest_distance(self.test.features, self.train.features)
        one, other = new[torch.randperm(len(new), generator=make_generator(0))].chunk(2)
        self.copy_distance = one.quantile(0.01).item()  # set by one half of the test images, measured on the other
        self.new_near_copies = (other <= self.copy_distance).float().mean().item()
        self.baselines: dict[int, dict[str, float]] = {}

    def baseline(self, n: int) -> dict[str, float]:
        """Return the scores of at most n training images against the test images; near-copies: of test images."""
        if n not in self.baselines:
            picked = torch.randperm(len(self.train.features), generator=make_generator(0))[:n]
            self.baselines[n] = compare_features(Classified(*(values[picked] for values in self.train)), self.test)
        return self.baselines[n] | {"near_copies": self.new_near_copies}

    def near_copies(self, features: Tensor) -> float:
        """Return the share of samples (n, 64) nearer to a training image than 99 % of new real images are.

        This finds exact and slightly noisy copies; a copy that is shifted or blurred counts as new.
        """
        return (nearest_distance(features, self.seen) <= self.copy_distance).float().mean().item()


SCORE_TITLES = {  # in the order of the table; the arrow points to what is better
    "frechet": "Fréchet distance ↓", "kid": "kernel distance (KID) ↓", "kid_se": "  its standard error",
    "precision": "precision ↑", "recall": "recall ↑", "density": "density ↑", "coverage": "coverage ↑",
    "confidence": "classifier's confidence ↑", "class_entropy": "class entropy (≤ 2.303) ↑",
    "near_copies": "near-copies of training", "class_accuracy": "class accuracy ↑", "inception_fid": "Inception FID ↓",
}  # fmt: skip


class Scores(dict):
    """Hold the scores of samples beside those of real images (`…_baseline`); prints as a table."""

    def __str__(self) -> str:
        head = f"{self['n']:,} samples; classifier {self['classifier_accuracy']:.2%} right on real digits, SHA-256 "
        lines = [head + f"{self['classifier_sha256'][:12]}", f"{'':28}{'samples':>10}{'real images':>13}"]
        for name in filter(self.__contains__, SCORE_TITLES):
            values = [format(self[key], ".4f") for key in (name, f"{name}_baseline") if key in self]
            lines.append(f"{SCORE_TITLES[name]:28}{values[0]:>10}{''.join(values[1:]):>13}".rstrip())
        return "\n".join(lines)

    __repr__ = __str__


def score_samples(samples: Tensor, statistics: RealStatistics, labels: Tensor | None = None) -> Scores:
    """Return all scores of samples (n, 1, H, H) in [-1, 1] beside those of real images; raises ValueError.

    labels: the digits that a conditional generator was asked for (n,); ignored where the real ones name no digits.
    """
    check_samples(samples, needed=MIN_SAMPLES)
    if samples.shape[2] != statistics.size:
        raise ValueError(f"samples are {samples.shape[2]} pixels wide, the real statistics are for {statistics.size}")
    fake, baseline = classify(samples), statistics.baseline(len(samples))
    scores = Scores(n=len(samples), classifier_accuracy=load_classifier()[1], classifier_sha256=CLASSIFIER_SHA256)
    scores |= compare_features(fake, statistics.test) | {"near_copies": statistics.near_copies(fake.features)}
    if labels is not None and (statistics.class_accuracy is None or statistics.class_accuracy > 0.5):
        scores["class_accuracy"] = (fake.digits == labels.cpu()).float().mean().item()
        baseline["class_accuracy"] = statistics.class_accuracy
    scores["class_histogram"] = fake.shares.tolist()
    return Scores(scores | {f"{name}_baseline": value for name, value in baseline.items() if value is not None})


def compare_features(fake: Classified, real: Classified) -> dict[str, float]:
    """Return the distances, manifold metrics, mean confidence and class entropy (nats) of `fake` against `real`."""
    kid, kid_se = kernel_distance(fake.features, real.features)
    scores = {"frechet": frechet_distance(fake.features, real.features), "kid": kid, "kid_se": kid_se}
    scores |= manifold_metrics(fake.features, real.features)
    scores["confidence"] = fake.probabilities.max(dim=1).values.mean().item()
    return scores | {"class_entropy": torch.special.entr(fake.shares).sum().item()}


def inception_distance(samples: Tensor, real: Tensor) -> float:
    """Return the usual FID, on Inception's features, of samples (n, 1, H, H) in [-1, 1] and uint8 images (m, H, W).

    Raises ImportError without torchmetrics and torch-fidelity, OSError where the weights cannot be downloaded.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=2048)
    for images, is_real in ((to_uint8(samples), False), (resize_images(real, samples.shape[2]), True)):
        for part in images.cpu().split(100):
            metric.update(part[:, None].expand(-1, 3, -1, -1), real=is_real)
    return metric.compute().item()


def once_per_data(compute: Callable[[GAN], Any]) -> Callable[[GAN], Any]:
    """Let compute(gan) run once for the same data; gan.statistics_cache keeps the result until the data change."""

    @functools.wraps(compute)
    def cached(gan: GAN) -> Any:
        gan.statistics_cache = gan.statistics_cache or {}
        if compute.__name__ not in gan.statistics_cache:
            gan.statistics_cache[compute.__name__] = compute(gan)
        return gan.statistics_cache[compute.__name__]

    return cached


@once_per_data
def training_data(gan: GAN) -> tuple[Tensor, Tensor]:
    """Return images and labels that `gan` is trained on, by name if not in memory (untrained: MNIST); or ValueError."""
    if gan.config.channels != 1:
        raise ValueError(f"Config.channels = {gan.config.channels}; these scores are for gray images, channels=1")
    if gan.images is not None:
        return gan.images, gan.labels
    if gan.data_name is None and gan.step:
        raise ValueError("the checkpoint does not name its training data: pass them first by gan.set_data(...)")
    return load_images(gan.data_name or "mnist")


def real_images(gan: GAN) -> tuple[Tensor, Tensor]:
    """Return training and test images, uint8 (N, H, W); of data without a test split, two random halves."""
    train, name = training_data(gan)[0], gan.data_name or ("mnist" if gan.images is None else None)
    try:
        if name is not None:
            return train, load_images(name, "test")[0]
    except FileNotFoundError:
        if not Path(name).exists():  # else a folder or file of training images alone
            raise
    one, other = torch.randperm(len(train), generator=make_generator(0)).to(train.device).chunk(2)
    return train[one], train[other]


@once_per_data
def real_statistics(gan: GAN) -> RealStatistics:
    """Return what samples of `gan` are compared with; takes seconds."""
    (train, test), (seen, labels) = real_images(gan), training_data(gan)
    return RealStatistics(train, test, gan.config.image_size, seen if len(seen) > len(train) else None, labels)


@once_per_data
def expected_shares(gan: GAN) -> tuple[Tensor, Tensor]:
    """Return the shares of digits that samples should have (10,), and the labels that the training data hold."""
    images, labels = training_data(gan)
    order = torch.randperm(len(images), generator=make_generator(gan.config.seed)).to(images.device)
    groups, present = [order[:1000]], labels.unique()
    if gan.config.conditional:  # samples are asked for all classes equally often
        groups = [order[labels[order] == label][: max(1, 1000 // len(present))] for label in present]
    shares = [classify(images[group], gan.config.image_size).shares for group in groups]
    return torch.stack(shares).mean(dim=0), present.cpu()


def fixed_sample_scores(gan: GAN, n: int, distances: bool = True) -> dict[str, float]:
    """Return confidence, class_gap and, by distances, frechet, precision, recall and near_copies of fixed samples.

    class_gap: total variation distance between the shares of the digits among n samples and among real images, 0.9
    where all samples show one of ten digits. Samples of classes that the training data do not hold are left out.
    """
    (shares, present), labels = expected_shares(gan), gan.class_labels(n, None)
    fake = classify(gan.fixed_samples(n))
    digits = fake.digits if labels is None else fake.digits[torch.isin(labels.cpu(), present)]
    gap = torch.bincount(digits, minlength=10) / len(digits) - shares
    scores = {"confidence": fake.probabilities.max(dim=1).values.mean().item(), "class_gap": gap.abs().sum().item() / 2}
    if distances:
        statistics = real_statistics(gan)
        real = statistics.test.features
        scores["frechet"] = frechet_distance(fake.features, real)
        manifold = manifold_metrics(fake.features, real[:: max(1, len(real) // (4 * n))])
        scores |= {name: manifold[name] for name in ("precision", "recall")}
        scores["near_copies"] = statistics.near_copies(fake.features)
    return scores


class EvaluateEachEpoch(Callback):
    """Score the same n fixed-noise samples after every epoch; the history gets what `fixed_sample_scores` returns.

    best: a folder for the checkpoint with the lowest Fréchet distance. patience: stop after so many epochs without
    gain (`epochs_without_gain`). Distances of n samples compare only with each other.
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
        """Fail before the first batch for unusable data, weights or folders; warn where files are missing."""
        if self.best is not None:
            check_replaceable(Path(self.best))
        with or_warn("the evaluation"):
            load_classifier()
            expected_shares(gan)
            if self.distances:
                real_statistics(gan)

    def on_epoch_end(self, gan: GAN) -> None:
        """Score the samples, also after an epoch that was cut short."""
        with or_warn("the evaluation"):
            for name, value in gan.evaluate_fixed_samples(self.n, self.distances).items():
                gan.history.record(name, value)
        known = [value for value in gan.history.get("frechet", []) if value is not None]
        if self.best is not None and known and gan.history.last().get("frechet") == min(known):
            with or_warn("the best generator so far", CheckpointError):
                gan.save(self.best)
        if self.patience is not None and epochs_without_gain(gan.history) >= self.patience:
            gan.stop(f"the Fréchet distance has not fallen for {self.patience} epochs")
