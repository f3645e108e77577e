"""Try ideas for FastDCGAN, each at equal nominal seconds over several seeds, and keep one line for each trial.

    python tools/speed_trials.py --seconds 60 --seeds 0 1 --ideas L B      # goes on where an earlier start stopped
    python tools/speed_trials.py --table                                   # writes results/speed/table.md anew
    python tools/speed_trials.py --clock --seconds 60 --ideas L FastDCGAN  # real seconds, results/speed/clock.jsonl

A nominal second is what the rough recipe L needs for NOMINAL images. How much faster or slower than L an idea is gets
measured once, both in turns, and kept; an idea is then given the images that it would do in the time. So trials do
not depend on what else the machine does, and a seed gives the same trial again. Every trial is a line in
results/speed/trials.jsonl: idea, seed, images seen, scores of 10,000 samples by the judge. L and U are the two rough
recipes that FastDCGAN has to beat; their networks are written out here, so that they stay what they were when
FastDCGAN changes. B, F and N are stations on the way to *match 0.15*, which was FastDCGAN until the weight of matching
fell with the rates: *N, rates 3e-3, match 0.15* by another name, and what the nominal trials end with; everything
else is one of them with what the idea's name says.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import dcgan_utils as du  # noqa: E402
from tools.benchmark import machine  # noqa: E402

FOLDER = ROOT / "results" / "speed"
KEPT = FOLDER / "trials.jsonl"
RATES = FOLDER / "rates.json"
CLOCK = FOLDER / "clock.jsonl"  # runs by the clock: each line names its machine
NOMINAL = 600  # images a second of L: what one core without AMX gave
TURN = 16  # iterations in a turn of the timing: as many as hold one lazy penalty of any idea
SCORES = ("fid", "kid", "precision", "recall", "density", "coverage", "confidence", "digit_accuracy", "class_entropy")


@dataclass(frozen=True)
class Knobs:
    """Hold what an idea turns beside the fields of Config."""

    narrow: int = 64  # G's channels at 14×14
    wide: int = 128  # G's channels at 7×7
    last: str = "shuffle"  # G's last layer: shuffle (conv to 4 maps + PixelShuffle) | transposed (k4 s2)
    up: int = 4  # kernel of G's upsampling layer, 4 or 2
    extra: int = 0  # one more 3×3 convolution in G at that side, 7 or 14
    mapping: bool = False  # a hidden layer of 128 between z and G's first layer
    init: str = "dcgan"  # D's weights: N(0, 0.02), or he: kept variance from layer to layer
    unshuffle: bool = False  # D's first layer: PixelUnshuffle + 3×3 instead of k4 s2
    kernel: int = 4  # of D's second layer
    head_dropout: float = 0.0  # on D's features
    stddev: bool = False  # minibatch standard deviation among D's features (Karras et al. 2018)
    pack: int = 1  # PacGAN: images that D sees at once
    shift: int = 0  # all that D sees is moved by up to so many pixels (DiffAugment)
    loss: str = "smooth"  # smooth (Config's labels) | pairs (RpGAN) | hinge
    r1: float = 0.0  # weight of the zero-centred gradient penalty on real digits
    r2: float = 0.0  # the same on fakes
    lazy: int = 4  # the penalties are added every so many steps, so many times as strong
    tail_from: float = 0.5  # share of the time after which the rates fall
    tail: str = "linear"  # or cosine
    warm_up: int = 0  # batches over which the rates rise from 0
    grow_batch: float = 0.0  # share of the time after which the batch doubles
    free_share: float = 0.0  # share of each loss that judges without the label
    match: float = 0.0  # weight of D's loss on real digits that claim to be another one (Reed et al. 2016)
    match_fades: bool = False  # that weight falls as the rates do
    sample_scale: float = 1.0  # z is stretched so much when sampling
    styles: int = 1  # clusters within each class (of all digits, where there are no labels) that stand as labels


class TrialGenerator(nn.Module):
    """Map z and labels to images as L and U do, with the knobs' changes."""

    def __init__(self, config: du.Config, knobs: Knobs) -> None:
        super().__init__()
        k = knobs
        self.embedding = nn.Embedding(config.num_classes, 32) if config.conditional else None
        inputs = config.nz + (32 if config.conditional else 0)
        self.first = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU()) if k.mapping else nn.Identity()
        self.dense = nn.Linear(128 if k.mapping else inputs, 49 * k.wide, bias=False)
        act = partial(nn.ReLU, inplace=True)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(k.wide),
            act(),
            *(self.same(k.wide) if k.extra == 7 else ()),
            nn.ConvTranspose2d(k.wide, k.narrow, kernel_size=k.up, stride=2, padding=k.up // 2 - 1, bias=False),
            nn.BatchNorm2d(k.narrow),
            act(),
            *(self.same(k.narrow) if k.extra == 14 else ()),
            *(
                [nn.Conv2d(k.narrow, 4, kernel_size=3, padding=1), nn.PixelShuffle(2)]
                if k.last == "shuffle"
                else [du.Doubling(k.narrow, 1, bias=True)]
            ),
            nn.Tanh(),
        )
        self.apply(du.init_dcgan)
        if k.mapping:
            nn.init.kaiming_normal_(self.first[0].weight, nonlinearity="relu")

    @staticmethod
    def same(width: int) -> list[nn.Module]:
        """Return one more convolution that keeps the side."""
        conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, 28, 28)."""
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(labels)], dim=1)
        x = self.dense(self.first(z)).view(len(z), 7, 7, -1)
        return self.layers(x.permute(0, 3, 1, 2))


class TrialDiscriminator(nn.Module):
    """Map images to logits as L and U do, with the knobs' changes."""

    def __init__(self, config: du.Config, knobs: Knobs) -> None:
        super().__init__()
        self.knobs, w = knobs, config.ndf
        self.wrongs: list[Tensor] = []  # what D's step on real and on fake digits says of wrong labels
        norm = nn.BatchNorm2d if config.batch_norm_D else nn.Identity
        act, drop = partial(nn.LeakyReLU, 0.2), config.dropout_D
        first = [du.Halving(knobs.pack, w)]
        if knobs.unshuffle:
            first = [nn.PixelUnshuffle(2), nn.Conv2d(4 * knobs.pack, w, kernel_size=3, padding=1, bias=False)]
        second = nn.Conv2d(w, 2 * w, kernel_size=knobs.kernel, stride=2, padding=1, bias=False)
        last = nn.Conv2d(2 * w, 4 * w, kernel_size=3, stride=2, padding=1, bias=False)
        self.layers = nn.Sequential(
            *du.hidden(*first, act(), dropout=drop),
            *du.hidden(second, norm(2 * w), act(), dropout=drop),
            *du.hidden(last, norm(4 * w), act(), dropout=drop),
        )
        features = 16 * 4 * w
        self.dropout = nn.Dropout(knobs.head_dropout)
        self.head = nn.Linear(features + knobs.stddev, 1)
        self.class_heads = nn.Linear(features, config.num_classes) if config.conditional else None
        self.apply(du.init_dcgan)
        if knobs.init == "he":
            for module in self.layers.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, a=0.2)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,), or (N / pack,) where images are packed."""
        if (pack := self.knobs.pack) > 1:  # labels are only given unpacked: packed trials are label-free
            images = images.view(-1, pack, *images.shape[2:])
        features = self.dropout(self.layers(images).permute(0, 2, 3, 1).flatten(1))
        inputs = features
        if self.knobs.stddev:
            inputs = torch.cat([features, features.std(dim=0).mean().expand(len(features), 1)], dim=1)
        logits = self.head(inputs).squeeze(1)
        if self.class_heads is not None:
            shares = self.class_heads(features)
            share = shares.gather(1, labels[:, None]).squeeze(1)
            if self.knobs.match and self.training:
                wrong = (labels + torch.randint_like(labels, 1, shares.shape[1])) % shares.shape[1]
                self.wrongs = [
                    *self.wrongs[-1:],
                    F.softplus(shares.gather(1, wrong[:, None]).squeeze(1) - share).mean(),
                ]
            if self.knobs.free_share:
                share = share * (torch.rand_like(share) >= self.knobs.free_share)
            logits = logits + share
        return logits


class TrialLoss(du.NonSaturatingLoss):
    """Hold the loss that the knobs name; the generator's remembers D's last answers to real digits."""

    def __init__(self, config: du.Config, knobs: Knobs) -> None:
        super().__init__(config)
        self.kind = knobs.loss

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss."""
        self.last = real_logits.detach().float()
        if self.kind == "pairs":  # a digit against a fake of the same class (Jolicoeur-Martineau 2019; R3GAN 2024)
            return F.softplus(fake_logits - real_logits).mean()
        if self.kind == "hinge":
            return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        return super().discriminator(real_logits, fake_logits)

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Return G's loss."""
        if self.kind == "pairs":
            return F.softplus(self.last - fake_logits).mean()
        return -fake_logits.mean() if self.kind == "hinge" else super().generator(fake_logits)


class TrialGAN(du.FastDCGAN):
    """Train with the knobs' networks, loss and schedule."""

    knobs = Knobs()

    def __init__(self, knobs: Knobs, **overrides: Any) -> None:
        self.knobs = knobs
        self.networks = (partial(TrialGenerator, knobs=knobs), partial(TrialDiscriminator, knobs=knobs))
        self.losses = partial(TrialLoss, knobs=knobs)
        super().__init__(START, **overrides)

    def share(self) -> float:
        """Return the share of the time that is over."""
        return self._elapsed / self._max_seconds

    def tail_done(self) -> float:
        """Return the share of the tail, in which the rates fall, that is over."""
        return max(0.0, (self.share() - self.knobs.tail_from) / max(1e-9, 1 - self.knobs.tail_from))

    def _follow_schedule(self) -> None:
        """Set both rates by the knobs' schedule."""
        over = self.tail_done()
        factor = (1 + math.cos(math.pi * over)) / 2 if self.knobs.tail == "cosine" else 1 - over
        factor = max(0.0, factor) * min(1.0, (self.step + 1) / max(1, self.knobs.warm_up))
        self.rate_left = du.live(factor, self.rate_left)
        for optimizer, lr in ((self.optimizer_D, self.config.lr_D), (self.optimizer_G, self.config.lr_G)):
            for group in optimizer.param_groups:
                group["lr"] = du.live(lr * factor, group["lr"])

    def play(self, batches: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Keep the batch for the penalties."""
        self.batch_now = batches[-1]
        return super().play(batches)

    def constants(self) -> tuple[Any, ...]:
        """Say also whether the knobs' penalties are due, for the sake of CUDA graphs."""
        return *super().constants(), self.penalties_are_due()

    def penalties_are_due(self) -> bool:
        """Return whether this iteration takes the knobs' gradient penalties."""
        return (self.knobs.r1 > 0 or self.knobs.r2 > 0) and self.step % self.knobs.lazy == 0

    def _iterate(self, batches: list[tuple[Tensor, Tensor | None]]) -> None:
        """Double the batch when the time has come."""
        super()._iterate(batches)
        if self.knobs.grow_batch and self.share() > self.knobs.grow_batch and self.config.batch_size < 128:
            self.reconfigure(batch_size=2 * self.config.batch_size)

    def _fake(self, n: int, labels: Tensor | None) -> Tensor:
        """Keep the fakes for the penalties."""
        self.fake_now = super()._fake(n, labels)
        return self.fake_now

    def noisy(self, images: Tensor) -> Tensor:
        """Return what D sees, moved by a few pixels where the knobs ask for it."""
        if not (far := self.knobs.shift):
            return super().noisy(images)
        n, side = len(images), images.shape[-1]
        padded = F.pad(images, (far,) * 4, value=-1.0)[:, 0]
        here = images.device
        moves = torch.randint(2 * far + 1, (2, n, 1), device=here)
        rows, columns = moves + torch.arange(side, device=here)
        return padded[torch.arange(n, device=here)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]

    def update(self, player: str, loss: Tensor) -> Tensor:
        """Add the gradient penalties to D's loss every few steps."""
        if player == "D" and self.penalties_are_due():
            real, labels = self.batch_now
            for weight, images in ((self.knobs.r1, real), (self.knobs.r2, self.fake_now.detach())):
                loss = loss + (weight * self.knobs.lazy / 2 * self.penalty(images, labels) if weight else 0)
        if player == "D" and self.knobs.match:
            weight = self.knobs.match * (1 - self.tail_done() if self.knobs.match_fades else 1)
            loss = loss + weight * self.discriminator.wrongs[0]
        return super().update(player, loss)

    def penalty(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean squared length of D's gradient at the images (Mescheder et al. 2018)."""
        images = images.clone().requires_grad_(True)
        answers = self.discriminator(images, labels).sum()
        (slope,) = torch.autograd.grad(answers, images, create_graph=True)
        return slope.square().sum(dim=(1, 2, 3)).mean()

    def generate(self, z: Tensor, digits: Any = None) -> Tensor:
        """Stretch z before sampling."""
        return super().generate(z * self.knobs.sample_scale, digits)


START = du.Config(  # L; U has no labels and half the rates
    image_size=28, nz=64, ndf=32, conditional=True, num_epochs=10_000, lr_G=2e-3, lr_D=2e-3, lr_schedule="constant",
    beta2=0.99, real_label_smooth=0.9, fake_label_smooth=0.0, ema=0.99, out_dir=str(ROOT / "outputs" / "speed"),
    precision="fp32",  # wherever a trial runs
)  # fmt: skip


@dataclass(frozen=True)
class Idea:
    """Hold what is tried: why, the knobs, and Config fields beside START's."""

    why: str
    knobs: Knobs = Knobs()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: str = "L"  # what it is compared with
    verdict: str = ""  # kept, or why it was dropped
    timed_as: str = ""  # an idea that costs the same, so that both are timed alike
    own: bool = False  # the module's FastDCGAN in place of the networks above

    def but(self, why: str, **changes: Any) -> "Idea":
        """Return this idea with further changes, of knobs or of Config fields."""
        own = {name: value for name, value in changes.items() if name in ("base", "verdict", "timed_as")}
        knobs = {name: value for name, value in changes.items() if hasattr(self.knobs, name)}
        config = {name: value for name, value in changes.items() if name not in {**own, **knobs}}
        knobs = dataclasses.replace(self.knobs, **knobs)
        return dataclasses.replace(self, why=why, knobs=knobs, config={**self.config, **config}, **own)

    def make(self, seed: int) -> du.FastDCGAN:
        """Return the GAN."""
        if self.own:
            settings = {"out_dir": START.out_dir, "precision": START.precision} | self.config
            return du.FastDCGAN(seed=seed, **settings)
        config = dict(self.config)
        if self.knobs.styles > 1:  # clusters stand as labels, also where there are none
            classes = 10 if config.get("conditional", True) else 1
            config |= {"conditional": True, "num_classes": classes * self.knobs.styles}
        return TrialGAN(self.knobs, seed=seed, **config)

    def data(self) -> Any:
        """Return what to train on: MNIST, or its images with clusters as labels."""
        if self.own or self.knobs.styles == 1:
            return "mnist"
        return _clustered(self.knobs.styles, self.config.get("conditional", True))


@functools.cache
def _clustered(styles: int, labelled: bool) -> tuple[Tensor, Tensor]:
    """Return the training digits with labels that count styles within classes (within all digits if not labelled)."""
    images, labels = du.load_images("mnist")
    labels = labels if labelled else torch.zeros_like(labels)
    clusters = torch.empty_like(labels)
    points = F.avg_pool2d(images[:, None].float() / 255, 2).flatten(1)  # 14×14 is enough to tell styles
    for digit in labels.unique():
        mine = (labels == digit).nonzero()[:, 0]
        clusters[mine] = digit * styles + nearest_centres(points[mine], styles)
    return images, clusters


def nearest_centres(points: Tensor, k: int, rounds: int = 10) -> Tensor:
    """Return the cluster (n,) of each point (n, d) by k-means, started from k points of the data."""
    rng = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=rng)[:k]].clone()
    for _ in range(rounds):
        nearest = du.squared_distances(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return nearest


L = Idea("the rough conditional recipe")
U = Idea(
    "the rough label-free recipe",
    Knobs(last="transposed"),
    {"conditional": False, "lr_G": 1e-3, "lr_D": 1e-3},
    base="U",
)
B = L.but(
    "batch 64: twice the updates; half of G's channels at 14×14: 1.22 times the speed",
    batch_size=64,
    narrow=32,
    verdict="kept, until pairs came",
)
ON_B = dataclasses.replace(B, base="B", verdict="not tried")  # ideas on top of B
LIKE_B = dataclasses.replace(ON_B, timed_as="B")  # those that change numbers, not what is computed
# what a gradient penalty goes with: no BatchNorm in D, weights that keep the variance; all of them cost alike
PENALISED = {"init": "he", "batch_norm_D": False, "timed_as": "B, pairs, R1"}
PAIRS = {**PENALISED, "loss": "pairs"}
F_ = ON_B.but(
    "matching, and the penalty on fakes too, every eighth step", **PAIRS, r1=0.2, r2=0.2, lazy=8, match=0.5,
    verdict="kept, but for the momentum",
)  # fmt: skip
F_ = dataclasses.replace(F_, timed_as="")
ON_F = dataclasses.replace(F_, base="F", verdict="not tried")  # ideas on top of F
LIKE_F = dataclasses.replace(ON_F, timed_as="F")
ON_N = ON_F.but("", beta1=0.0, base="N, bf16")  # ideas on top of N, also run on a GPU


def on_n(why: str, timed_as: str = "F", **changes: Any) -> Idea:
    """Return an idea on top of N; `timed_as` had the same change with momentum, or costs the same."""
    return ON_N.but(why, timed_as=timed_as, **changes)


STEADY = {"matching_fades": False, "matching_weight": 0.15}  # what FastDCGAN was before its last change
FADES = STEADY | {"matching_fades": True}
AFTER_STEADY = Idea("", config=STEADY, own=True, base="match 0.15", timed_as="FastDCGAN")
# and what it was two changes ago
SLOWER = {"lr_G": 2e-3, "lr_D": 2e-3, "matching_fades": False, "matching_weight": 0.5}
FASTER = {"lr_G": 3e-3, "lr_D": 3e-3}
UB = U.but("B's batch and G", batch_size=64, narrow=32, verdict="not tried")
UB_PENALISED = {"init": "he", "batch_norm_D": False, "r1": 0.2, "lr_G": 2e-3, "lr_D": 2e-3}
IDEAS: dict[str, Idea] = {
    "L": L,
    "L, batch 64": L.but("twice the updates for the same images", batch_size=64, verdict="not tried"),
    "L, narrow 32": L.but("G's upsampling is 30 % of an iteration; half of it", narrow=32, verdict="not tried"),
    "B": B,
    "B, batch 32": ON_B.but("four times L's updates", batch_size=32, verdict="dropped: within B's spread"),
    "B, wide 64": ON_B.but("G's 7×7 halved too", wide=64, verdict="dropped: within B's spread"),
    "B, rates 3e-3": LIKE_B.but("faster still", lr_G=3e-3, lr_D=3e-3, verdict="dropped: within B's spread"),
    "B, styles 8": ON_B.but(
        "k-means clusters within each digit as labels, so that D asks for every style",
        styles=8,
        verdict="dropped: half the recall",
    ),
    "B, pairs, R1": ON_B.but(
        "RpGAN + lazy R1, kept variance and no BatchNorm in D, half the rates (R3GAN 2024)",
        init="he",
        batch_norm_D=False,
        loss="pairs",
        r1=1.0,
        lr_G=1e-3,
        lr_D=1e-3,
        verdict="dropped: distance; see the rates below",
    ),
    "B, pairs, R1, rates 2e-3": ON_B.but("the same at B's rates", **PAIRS, r1=1.0, verdict="dropped: distance"),
    "B, pairs, R1 0.2, rates 2e-3": ON_B.but(
        "a weaker penalty", **PAIRS, r1=0.2, verdict="best recall, but fewer read as asked; matching mends that"
    ),
    "B, pairs, R1 0.05, rates 2e-3": ON_B.but(
        "weaker still", **PAIRS, r1=0.05, verdict="dropped: as with 0.2, a little worse"
    ),
    "B, R1 0.2": ON_B.but(
        "B's own loss, lazy R1 in place of D's BatchNorm, kept variance",
        **PENALISED,
        r1=0.2,
        verdict="dropped: a tie with pairs, which go better with matching",
    ),
    "B, pairs, R1 0.2, match": ON_B.but(
        "D also learns that a real digit with a wrong label is wrong (Reed et al. 2016)",
        **PAIRS,
        r1=0.2,
        match=0.5,
        verdict="kept, but for the penalty on fakes: best distance, 99 % read as asked",
    ),
    "B, pairs, R1 0.2, EMA 0.995": ON_B.but("a longer average", **PAIRS, r1=0.2, ema=0.995, verdict="dropped: a tie"),
    "B, R1 0.2, match": ON_B.but(
        "both, with B's own loss", **PENALISED, r1=0.2, match=0.5, verdict="dropped: with pairs it is better in both"
    ),
    "B, R1 0.2, match 0.25": ON_B.but("half of it", **PENALISED, r1=0.2, match=0.25),
    "B, R1 0.5, match": ON_B.but("a stronger penalty", **PENALISED, r1=0.5, match=0.5),
    "B, R1 + R2 0.2, match": ON_B.but(
        "on fakes too, every eighth step", **PENALISED, r1=0.2, r2=0.2, lazy=8, match=0.5
    ),
    "F": F_,
    "F, lazy 16": ON_F.but("half as many penalties, twice as strong", lazy=16, verdict="dropped: within F's spread"),
    "F, no matching": LIKE_F.but(
        "what matching is worth", match=0.0, verdict="dropped: best recall, but distance and fewer read as asked"
    ),
    "F, cross-entropy": LIKE_F.but("what pairs are worth", loss="smooth"),
    "F, R1 alone": LIKE_F.but("what the penalty on fakes is worth", r2=0.0, lazy=4),
    "F, match 0.25": LIKE_F.but("half of it", match=0.25, verdict="dropped: within F's spread"),
    "F, match 0.1": LIKE_F.but("a fifth of it", match=0.1),
    "F, R1 + R2 0.5": LIKE_F.but("a stronger penalty", r1=0.5, r2=0.5, verdict="dropped: within F's spread"),
    "F, R1 + R2 0.1": LIKE_F.but("a weaker one", r1=0.1, r2=0.1),
    "F, D kernel 3": ON_F.but(
        "D's dearest layer costs nine sixteenths", kernel=3, verdict="dropped: within F's spread"
    ),
    "F, G kernel 2": ON_F.but("G's dearest layer costs a quarter; patches do not overlap", up=2),
    "F, batch 32": ON_F.but("twice the updates again", batch_size=32),
    "F, batch 128": ON_F.but("half the updates, better kernels", batch_size=128),
    "F, rates 3e-3": LIKE_F.but("faster still", lr_G=3e-3, lr_D=3e-3),
    "F, lr_D 1e-3": LIKE_F.but("a weaker D leaves more variety", lr_D=1e-3),
    "F, tail from 0.3": LIKE_F.but("a longer tail", tail_from=0.3),
    "F, tail from 0.7": LIKE_F.but("a shorter one", tail_from=0.7, verdict="dropped: within F's spread"),
    "F, cosine": LIKE_F.but("falls from the start", tail="cosine", tail_from=0.0),
    "F, beta1 0": LIKE_F.but("no momentum, as R3GAN", beta1=0.0, verdict="kept: N"),
    "F, beta1 0, rates 3e-3": LIKE_F.but("and faster", beta1=0.0, lr_G=3e-3, lr_D=3e-3),
    "F, beta1 0, no matching": LIKE_F.but("what matching is worth then", beta1=0.0, match=0.0),
    "F, beta2 0.9": LIKE_F.but("a shorter memory of the gradients' size", beta2=0.9),
    "F, EMA 0.98": LIKE_F.but("a shorter average", ema=0.98),
    "F, D kernel 3, lazy 16": ON_F.but("both thrifty ones together", kernel=3, lazy=16),
    "F, narrow D": ON_F.but("three quarters of D's maps", ndf=24, verdict="dropped: within F's spread"),
    "F, wide 64": ON_F.but("half of G's maps at 7×7", wide=64, verdict="dropped: within F's spread"),
    "F, z of 32": ON_F.but("fewer directions", nz=32),
    "F, z of 128": ON_F.but("more directions", nz=128),
    "F, mapping": ON_F.but("a hidden layer between z and G", mapping=True),
    "F, extra 7": ON_F.but("a 3×3 convolution at 7×7", extra=7),
    "F, shift 1": ON_F.but("D sees all moved by up to a pixel (DiffAugment 2020)", shift=1),
    "F, noise 0.1": ON_F.but("D's view smoothed (Arjovsky & Bottou 2017)", noise_D=0.1),
    "F, warm-up": LIKE_F.but("the first steps are the wildest", warm_up=50),
    "F, batch doubles": LIKE_F.but("quick at first, calm at the end", grow_batch=0.6),
    "N, lazy 16": on_n("half as many penalties, twice as strong", "F, lazy 16", lazy=16, verdict="a tie"),
    "N, no matching": on_n(
        "what matching is worth", match=0.0, verdict="dropped: fewer read as asked, worse distance; best recall"
    ),
    "N, match 0.25": on_n("half of it", match=0.25, verdict="a tie"),
    "N, match 1": on_n("twice as much", match=1.0, verdict="a tie"),
    "N, R1 + R2 0.5": on_n("a stronger penalty", r1=0.5, r2=0.5, verdict="a tie"),
    "N, R1 + R2 0.1": on_n("a weaker one", r1=0.1, r2=0.1, verdict="a tie"),
    "N, R1 alone": on_n("what the penalty on fakes is worth", r2=0.0, lazy=4, verdict="a tie"),
    "N, cross-entropy": on_n("what pairs are worth", loss="smooth", verdict="dropped: distance and recall"),
    "N, hinge": on_n("hinge loss in their place", loss="hinge", verdict="dropped: distance and recall"),
    "N, D kernel 3": on_n(
        "D's dearest layer costs nine sixteenths", "F, D kernel 3", kernel=3, verdict="a tie, and 8 % faster"
    ),
    "N, G kernel 2": on_n("G's dearest layer costs a quarter", "F, G kernel 2", up=2, verdict="a tie"),
    "N, narrow D": on_n("three quarters of D's maps", "F, narrow D", ndf=24, verdict="a tie, with more images"),
    "N, wide 64": on_n("half of G's maps at 7×7", "F, wide 64", wide=64, verdict="a tie, and 10 % faster"),
    "N, extra 7": on_n("a 3×3 convolution at 7×7", "F, extra 7", extra=7, verdict="dropped: distance"),
    "N, batch 32": on_n("twice the updates again", "F, batch 32", batch_size=32, verdict="a tie"),
    "N, batch 128": on_n("half the updates, better kernels", "F, batch 128", batch_size=128, verdict="dropped: recall"),
    "N, batch doubles": on_n("quick at first, calm at the end", grow_batch=0.6, verdict="a tie"),
    "N, rates 1e-3": on_n("slower", lr_G=1e-3, lr_D=1e-3, verdict="dropped: distance and recall"),
    "N, rates 3e-3": on_n("faster still", lr_G=3e-3, lr_D=3e-3, verdict="open: a little better at two seeds"),
    "N, lr_D 1e-3": on_n("a weaker D leaves more variety", lr_D=1e-3, verdict="dropped: recall"),
    "N, tail from 0.3": on_n("a longer tail", tail_from=0.3, verdict="a tie"),
    "N, tail from 0.7": on_n("a shorter one", tail_from=0.7, verdict="a tie"),
    "N, cosine": on_n("falls from the start", tail="cosine", tail_from=0.0, verdict="a tie"),
    "N, warm-up": on_n("the first steps are the wildest", warm_up=50, verdict="a tie"),
    "N, beta2 0.9": on_n("a shorter memory of the gradients' size", beta2=0.9, verdict="a tie"),
    "N, EMA 0.98": on_n("a shorter average", ema=0.98, verdict="a tie"),
    "N, EMA 0.995": on_n("a longer one", ema=0.995, verdict="a tie"),
    "N, z of 32": on_n("fewer directions", "F, z of 32", nz=32, verdict="dropped: recall, for precision"),
    "N, z of 128": on_n("more directions", "F, z of 128", nz=128, verdict="open: better recall at two seeds"),
    "N, mapping": on_n(
        "a hidden layer between z and G", "F, mapping", mapping=True, verdict="dropped: distance and recall"
    ),
    "N, shift 1": on_n(
        "D sees all moved by up to a pixel (DiffAugment 2020)",
        "F, shift 1",
        shift=1,
        verdict="dropped: distance and recall",
    ),
    "N, noise 0.1": on_n("D's view smoothed (Arjovsky & Bottou 2017)", "F, noise 0.1", noise_D=0.1, verdict="a tie"),
    "N, z × 1.1": on_n(
        "more variety at the price of precision",
        sample_scale=1.1,
        verdict="open: better distance and recall, less precision; z is then wider than in training",
    ),
    "N, rates 3e-3, z of 128": on_n("both open ones", nz=128, **FASTER, verdict="dropped: less matching does more"),
    "N, rates 3e-3, wide 64": on_n("and 10 % faster", wide=64, **FASTER, verdict="dropped: likewise"),
    "N, rates 3e-3, z of 128, wide 64": on_n("all three", nz=128, wide=64, **FASTER, verdict="dropped: likewise"),
    "N, z of 128, wide 64": on_n("two of them", nz=128, wide=64, verdict="dropped: distance"),
    "N, match 0.15": on_n("a third of it", match=0.15, verdict="open: more recall, a little less precision"),
    "N, match 0.1": on_n("a fifth of it", match=0.1, verdict="open: more recall, fewer read as asked"),
    "N, match fades": on_n("it falls as the rates do", match_fades=True, verdict="open: some recall"),
    "N, z of 128, match 0.1": on_n("with more directions", nz=128, match=0.1, verdict="dropped: fewer read as asked"),
    "N, rates 3e-3, match 0.15": on_n(
        "faster, and a third of it", match=0.15, **FASTER, verdict="kept: match 0.15; recall and distance"
    ),
    "N, rates 3e-3, match 0.1": on_n(
        "faster, and a fifth of it", match=0.1, **FASTER, verdict="dropped: fewer than 99 % read as asked"
    ),
    "N, rates 3e-3, z of 128, match 0.1": on_n(
        "and more directions", nz=128, match=0.1, **FASTER, verdict="dropped: a tie with z of 64"
    ),
    "N, rates 3e-3, z of 128, match 0.05": on_n(
        "a tenth of it", nz=128, match=0.05, **FASTER, verdict="dropped: best recall, fewer read as asked"
    ),
    "N, lr_D 4e-3": on_n("a stronger D asks for more variety", lr_D=4e-3, verdict="open: some recall"),
    "N, lr_D 6e-3": on_n("stronger still", lr_D=6e-3, verdict="dropped: distance and precision"),
    "N, lr_D 4e-3, match 0.25": on_n("with less matching", lr_D=4e-3, match=0.25, verdict="open: much like the kept"),
    "N, lr_D 4e-3, lr_G 3e-3, match 0.25": on_n(
        "and a faster G", lr_D=4e-3, lr_G=3e-3, match=0.25, verdict="dropped: distance and precision"
    ),
    "B, pairs, R1 0.2, match 0.25": ON_B.but("half of it", **PAIRS, r1=0.2, match=0.25, verdict="dropped: a tie"),
    "B, pairs, R1 0.4, match": ON_B.but("a stronger penalty", **PAIRS, r1=0.4, match=0.5),
    "B, match": LIKE_B.but(
        "D also learns that a real digit with a wrong label is wrong (Reed et al. 2016)",
        match=0.5,
        verdict="dropped: costs recall without the penalty",
    ),
    "B, no BatchNorm in D": ON_B.but(
        "D judges each image by itself; kept variance, a quarter of its rate",
        init="he",
        batch_norm_D=False,
        lr_D=5e-4,
        verdict="dropped: collapses",
    ),
    "B, real label 1": LIKE_B.but("no smoothing", real_label_smooth=1.0, verdict="dropped: within B's spread"),
    "B, head dropout": ON_B.but("a weaker D leaves more variety", head_dropout=0.3, verdict="dropped: no gain"),
    "B, EMA 0.995": LIKE_B.but("the same time averaged as 0.99 at batch 128", ema=0.995),
    "B, tail from 0.3": LIKE_B.but("a longer tail", tail_from=0.3),
    "B, cosine": LIKE_B.but("falls from the start", tail="cosine", tail_from=0.0),
    "B, warm-up": LIKE_B.but("the first steps are the wildest", warm_up=50),
    "B, beta1 0": LIKE_B.but("no momentum, as later GANs", beta1=0.0),
    "B, shift 1": ON_B.but("D sees all moved by up to a pixel (DiffAugment 2020)", shift=1),
    "B, free share 0.2": ON_B.but("a fifth of the answers leave the label out", free_share=0.2),
    "B, z of 32": ON_B.but("fewer directions", nz=32),
    "B, z of 128": ON_B.but("more directions", nz=128),
    "B, z × 1.1": LIKE_B.but("more variety at the price of precision", sample_scale=1.1),
    "B, z × 1.2": LIKE_B.but("the same", sample_scale=1.2, verdict="dropped: buys recall with distance"),
    "B, minibatch stddev": ON_B.but("D sees how varied a batch is (Karras et al. 2018)", stddev=True),
    "B, noise fading": ON_B.but(
        "D's view smoothed at first (Arjovsky & Bottou 2017)", noise_D=0.3, noise_D_batches=400
    ),
    "B, unshuffle": ON_B.but("D's first layer at 14×14 is cheaper", unshuffle=True),
    "B, transposed": ON_B.but("G's last layer is cheaper", last="transposed"),
    "B, hinge": ON_B.but("hinge loss", loss="hinge"),
    "B, extra 7": ON_B.but("a 3×3 convolution at 7×7", extra=7),
    "B, extra 14": ON_B.but("a 3×3 convolution at 14×14", extra=14),
    "B, mapping": ON_B.but("a hidden layer between z and G", mapping=True),
    "B, batch doubles": LIKE_B.but("quick at first, calm at the end", grow_batch=0.6),
    "U": U,
    "UB": UB.but("B's batch and G", verdict="kept: batch and G"),
    "UB, rates 2e-3": UB.but("B's rates too", lr_G=2e-3, lr_D=2e-3, timed_as="UB"),
    "UB, clusters 20": UB.but(
        "k-means clusters stand as labels",
        styles=20,
        lr_G=2e-3,
        lr_D=2e-3,
        verdict="open: twice UB's rates, and k-means before",
    ),
    "UB, R1 0.2": UB.but("as for the conditional one", **UB_PENALISED),
    "UB, pairs, R1 0.2": UB.but(
        "the same with pairs",
        **UB_PENALISED,
        loss="pairs",
        timed_as="UB, R1 0.2",
        verdict="kept, but for the penalty on fakes",
    ),
    "UB, pairs, R1 + R2 0.2": UB.but(
        "on fakes too, every eighth step",
        **UB_PENALISED,
        r2=0.2,
        lazy=8,
        loss="pairs",
        timed_as="UB, R1 0.2",
        verdict="kept: the label-free FastDCGAN, but for its last layer",
    ),
    "UB, pack 2": UB.but("D sees two images at once (PacGAN 2018)", pack=2),
    "N": Idea("the module's before rates 3e-3 and match 0.15", config=SLOWER, own=True, timed_as="FastDCGAN"),
    "N, on a GPU": Idea("the same in fp32 there", config=SLOWER, own=True, base="N", timed_as="FastDCGAN"),
    "N, bf16": Idea(
        "the same in bf16, on a GPU", config=SLOWER | {"precision": "bf16"}, own=True, base="N", timed_as="FastDCGAN"
    ),
    "N, fp16": Idea(
        "the same in fp16 with scaled gradients, on a GPU",
        config=SLOWER | {"precision": "fp16"},
        own=True,
        base="N",
        timed_as="FastDCGAN",
    ),
    "N, label-free": Idea(
        "the module's before rates 3e-3",
        config=SLOWER | {"conditional": False},
        own=True,
        base="U",
        timed_as="FastDCGAN, label-free",
    ),
    "match 0.15": Idea(
        "the module's before its weight of matching fell", config=STEADY, own=True, timed_as="FastDCGAN"
    ),
    "match 0.05": AFTER_STEADY.but("a third of that", matching_weight=0.05, verdict="dropped: fewer read as asked"),
    "match 0.15 fades": AFTER_STEADY.but(
        "it falls as the rates do", **FADES, verdict="dropped: in half a minute fewer read as asked"
    ),
    "match 0.5 fades": AFTER_STEADY.but("from the usual weight", **FADES | {"matching_weight": 0.5}, verdict="a tie"),
    "z of 128, match 0.15 fades": AFTER_STEADY.but("with more directions", nz=128, **FADES, verdict="a tie"),
    "FastDCGAN": Idea("the module's, as it is", own=True),
    "FastDCGAN, label-free": Idea("the module's, as it is", config={"conditional": False}, own=True, base="U"),
}


def trial(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train one GAN for so many nominal seconds and return what is kept of it."""
    torch.set_num_threads(1)
    rate = speed(name)
    gan, data = IDEAS[name].make(seed), IDEAS[name].data()
    started = time.process_time()
    clock = lambda: (gan.epoch * 60_000 + gan.position) / rate  # noqa: E731
    with mock.patch.object(du.time, "perf_counter", clock):
        gan.train(10_000, max_seconds=seconds, callbacks=[], data=data)
    used = {"cpu_seconds": round(time.process_time() - started, 1)} if gan.device.type == "cpu" else {"device": "cuda"}
    return {"idea": name, "seed": seed, "seconds": seconds, "images": images_seen(gan), **used} | score(gan)


def by_the_clock(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train for so many real seconds on two threads, in the precision that the CPU does well, and return the scores."""
    torch.set_num_threads(2)
    du.keep_memory()
    fields = {"device": "cpu", "precision": "auto"}
    idea = dataclasses.replace(IDEAS[name], config=IDEAS[name].config | fields)
    idea.make(seed).train(1, max_seconds=1e9, callbacks=[du.StopAt(10)], data=idea.data())  # oneDNN chooses kernels
    gan = idea.make(seed)
    gan.train(10_000, max_seconds=seconds, callbacks=[], data=idea.data())
    kept = {"idea": name, "seed": seed, "seconds": seconds, "numbers": gan.precision, "images": images_seen(gan)}
    return {"machine": machine()} | kept | score(gan)


def images_seen(gan: du.FastDCGAN) -> int:
    """Return how many images training has taken."""
    return gan.epoch * len(gan.images) + gan.position


def speed(name: str) -> float:
    """Return the idea's images a nominal second: L's NOMINAL times how much faster than L it is, side by side.

    Timed in turns with L, by the median of the turns' ratios, so that what else the machine does hardly counts; kept.
    """
    kept = json.loads(RATES.read_text()) if RATES.is_file() else {}
    if name == "L":
        return NOMINAL
    if IDEAS[name].timed_as:
        return speed(IDEAS[name].timed_as)
    if name not in kept:
        times: dict[str, list[float]] = {"L": [], name: []}
        gans = {key: IDEAS[key].make(0) for key in times}
        for key, gan in gans.items():
            gan.train(1, max_seconds=1e9, callbacks=[du.StopAt(2)], data=IDEAS[key].data())
        for _ in range(8):
            for key, gan in gans.items():
                before = dict(gan._sums)
                with mock.patch.object(du.time, "perf_counter", time.process_time):
                    gan.train(1, max_seconds=1e9, callbacks=[du.StopAt(gan.step + TURN)], data=gan._source)
                took, seen = (gan._sums[what] - before[what] for what in ("seconds", "images"))
                times[key].append(took / seen)
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        kept = (json.loads(RATES.read_text()) if RATES.is_file() else {}) | {name: round(ratio, 3)}
        RATES.write_text(json.dumps(kept, indent=1) + "\n")
    return NOMINAL * kept[name]


def score(gan: du.FastDCGAN, n: int = 10_000) -> dict[str, float]:
    """Return the judge's scores of n samples against the 10,000 test digits."""
    global _REAL
    if _REAL is None:
        _REAL = du.read_digits(du.load_images("mnist", "test")[0])
    digits = gan._digits(n, None)
    styles = gan.knobs.styles if isinstance(gan, TrialGAN) else 1
    asked = digits  # what the score is told
    if styles > 1:  # a style is drawn as often as the data have it
        classes = gan.config.num_classes // styles
        counts = gan.labels.bincount(minlength=gan.config.num_classes).view(classes, styles).float()
        asked = torch.arange(n) % classes
        drawn = torch.multinomial(counts[asked], 1, generator=torch.Generator().manual_seed(0))[:, 0]
        digits = asked * styles + drawn
        asked = asked if classes > 1 else None
    asked = None if asked is None else asked.cpu()
    fake = du.read_digits(gan.sample(n, seed=0, digits=digits))
    scores = du.score_reading(fake, _REAL)
    if asked is not None:
        scores["digit_accuracy"] = (fake.digits == asked).float().mean().item()
    return {name: round(scores[name], 4) for name in SCORES if name in scores}


_REAL = None


def kept_trials() -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Return the kept lines by nominal seconds and idea, in the order of IDEAS."""
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.is_file() else []
    order = sorted({(line["seconds"], list(IDEAS).index(line["idea"])) for line in lines})
    names = list(IDEAS)
    return {
        (seconds, names[k]): [line for line in lines if (line["seconds"], line["idea"]) == (seconds, names[k])]
        for seconds, k in order
    }


def spread(runs: list[dict[str, Any]], name: str, digits: int = 2) -> str:
    """Return mean ± standard deviation of one score, – where it was not taken."""
    values = [run[name] for run in runs if name in run]
    if not values:
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table() -> str:
    """Return one table for each training time: every idea beside the recipe it changes, on the same seeds."""
    parts, trials = [], kept_trials()
    for seconds in dict.fromkeys(key[0] for key in trials):
        parts += [f"## {seconds:g} nominal seconds ({seconds * NOMINAL:,.0f} images of L)", "", HEAD, "|---" * 10 + "|"]
        for (when, name), runs in trials.items():
            if when == seconds:
                parts.append(row(name, runs, trials.get((seconds, IDEAS[name].base), [])))
        parts.append("")
    return "\n".join([*PREFACE, *parts])


HEAD = "| idea | why | n | images | Fréchet ↓ | × base's | recall ↑ | precision ↑ | read as asked ↑ | verdict |"
PREFACE = [
    "# Ideas tried for FastDCGAN", "",
    "Made by `python tools/speed_trials.py --table` from trials.jsonl. A nominal second is what L needs for "
    f"{NOMINAL} images; a faster or slower idea gets more or fewer images, by its own speed measured in turns with L "
    "(rates.json), good to about ±5 %. Lines of trials.jsonl that name a `device` were trained on a GPU (33 of the "
    "ideas *N, …*, and all at 360 but match 0.15): a trial counts images, so the device changes rounding and random "
    "numbers only. The other ideas *N, …* saw as many images as N, whatever their speed. Lines at 68, "
    "118, 135 and 405 nominal seconds ran as 60, 120 and 360 by a speed that was timed too high; they stand at what "
    "they really were. Mean ± standard deviation over n seeds of 10,000 samples read by the judge; *× base's* "
    "compares the distance with the base's on the seeds that both have.", "",
]  # fmt: skip


def row(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Return an idea's line of the table."""
    seeds = {run["seed"] for run in runs} & {run["seed"] for run in base}
    ratio = "–"
    if seeds and name != IDEAS[name].base:
        mine, other = ([run["fid"] for run in group if run["seed"] in seeds] for group in (runs, base))
        ratio = f"{statistics.mean(mine) / statistics.mean(other):.2f} of {IDEAS[name].base}"
    scores = [spread(runs, "fid"), ratio, *(spread(runs, score, 3) for score in SHOWN)]
    images = f"{statistics.mean(run['images'] for run in runs):,.0f}"
    return "| " + " | ".join([name, IDEAS[name].why, str(len(runs)), images, *scores, IDEAS[name].verdict]) + " |"


SHOWN = ("recall", "precision", "digit_accuracy")


def main() -> None:
    """Run what is missing, seed by seed, so that a stop leaves every idea with about as many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ideas", nargs="+", choices=list(IDEAS), default=list(IDEAS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--clock", action="store_true")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.clock:
        for seed in options.seeds:
            for name in options.ideas:
                with CLOCK.open("a") as file:
                    file.write(json.dumps(line := by_the_clock(name, seed, options.seconds)) + "\n")
                print(line, flush=True)
        return
    done = {(name, line["seed"], seconds) for (seconds, name), runs in kept_trials().items() for line in runs}
    for seed in options.seeds if not options.table else []:
        for name in options.ideas:
            if (name, seed, options.seconds) not in done:
                with KEPT.open("a") as file:
                    file.write(json.dumps(line := trial(name, seed, options.seconds)) + "\n")
                print(line, flush=True)
    (FOLDER / "table.md").write_text(table())


if __name__ == "__main__":
    main()
