"""Generators and discriminators in plain torch.nn layers, and how their weights are initialized.

A discriminator returns logits (N,), a generator images (N, C, S, S) in [-1, 1]; both take labels (N,) where the Config
is conditional. A network that changes while it trains says so by two attributes: `grows = True` and `grow(share)`.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config


# ------------------------------------------------------------------------------------------ class labels
class ClassConditional(nn.Module):
    """Let G and D see the label (N,) where the Config is conditional.

    G: an embedding of the class is concatenated to z. D, by `Config.conditioning`: concatenation: an embedding of the
    class is one more channel of the image (Mirza & Osindero 2014); projection: a linear head per class, of which the
    label's own is added to the logit (Miyato & Koyama 2018, §3); matching: the same, and D's loss also teaches that a
    real image with a wrong label is wrong (Reed et al. 2016, §4.1); auxiliary: the heads classify the image, and both
    players pay for the classes (Odena et al. 2017).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conditioning = config.conditioning if config.conditional else ""

    def add_class_embedding(self, config: Config) -> int:
        """Add G's embedding of the class, and return the length of its input."""
        self.embedding = nn.Embedding(config.num_classes, 32) if self.conditioning else None
        return config.nz + (32 if self.conditioning else 0)

    def latent(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Return G's input: z (N, nz), with the embedding of its class concatenated."""
        return z if self.embedding is None else torch.cat([z, self.embedding(labels)], dim=1)

    def add_class_heads(self, features: int, config: Config) -> None:
        """Add what lets D see the class, for `features` numbers under its last layer."""
        heads = self.conditioning in ("projection", "matching", "auxiliary")
        maps = self.conditioning == "concatenation"
        self.class_heads = nn.Linear(features, config.num_classes) if heads else None
        self.class_maps = nn.Embedding(config.num_classes, config.image_size**2) if maps else None

    def input_channels(self, config: Config) -> int:
        """Return the channels of D's first layer."""
        return config.channels + (self.conditioning == "concatenation")

    def with_class_map(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Return D's input: images (N, C, S, S), with the map of their class as one more channel."""
        if self.class_maps is None:
            return images
        return torch.cat([images, self.class_maps(labels).view_as(images[:, :1])], dim=1)

    def with_class(self, logits: Tensor, features: Tensor, labels: Tensor | None) -> Tensor:
        """Return logits (N,) for the label; with matching and auxiliary (N, 1 + K): the K class logits beside them."""
        if self.class_heads is None:
            return logits
        classes = self.class_heads(features)
        if self.conditioning != "auxiliary":
            logits = logits + classes.gather(1, labels[:, None]).squeeze(1)
        return logits if self.conditioning == "projection" else torch.cat([logits[:, None], classes], dim=1)


# ------------------------------------------------------------------------------------------ DCGAN, 64×64
def dcgan_widths(image_size: int, base: int) -> list[int]:
    """Return the channels of each hidden map from 4×4 up: (64, base 64) → [512, 256, 128, 64]; at most 8 × base."""
    doublings = int(math.log2(image_size)) - 2
    return [base * 2 ** min(k, 3) for k in reversed(range(doublings))]


def conv_block(conv: nn.Module, norm: nn.Module | None, activation: nn.Module, dropout: float = 0.0) -> list[nn.Module]:
    """Return the layers of a hidden block: convolution, BatchNorm unless None, activation, Dropout unless 0."""
    return [conv, *([norm] if norm else []), activation, *([nn.Dropout(dropout)] if dropout else [])]


def batch_norm(width: int, wanted: bool) -> nn.Module | None:
    """Return BatchNorm for feature maps, or None."""
    return nn.BatchNorm2d(width) if wanted else None


class DCGANGenerator(ClassConditional):
    """Map z (N, nz), and labels (N,) when conditional, to images (N, C, S, S), doubling from 4×4 (Radford et al. 2015).

    With the widths of the 64×64 recipe's README: 100 → 512 → 256 → 128 → 64 → 1.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        nz, widths = self.add_class_embedding(config), dcgan_widths(config.image_size, config.ngf)
        norm, dropout = partial(batch_norm, wanted=config.batch_norm_G), config.dropout_G
        first = nn.ConvTranspose2d(nz, widths[0], kernel_size=4, stride=1, padding=0, bias=False)  # 1×1 → 4×4
        layers = conv_block(first, norm(widths[0]), nn.ReLU(inplace=True), dropout)
        for wide, narrow in pairwise(widths):
            conv = nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1, bias=False)
            layers += conv_block(conv, norm(narrow), nn.ReLU(inplace=True), dropout)
        bias = config.init_output_bias  # see init_output_bias below
        last = nn.ConvTranspose2d(widths[-1], config.channels, kernel_size=4, stride=2, padding=1, bias=bias)
        self.layers = nn.Sequential(*layers, last, nn.Tanh())
        self.apply(init_dcgan)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, C, S, S), of the classes in labels (N,) when conditional."""
        return self.layers(self.latent(z, labels)[:, :, None, None])


class DCGANDiscriminator(ClassConditional):
    """Map images (N, C, S, S) to logits (N,), halving down to 4×4 (Radford et al. 2015); see `ClassConditional`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        widths = dcgan_widths(config.image_size, config.ndf)[::-1]  # 64×64: 64, 128, 256, 512
        self.add_class_heads(16 * widths[-1], config)
        first = nn.Conv2d(self.input_channels(config), widths[0], kernel_size=4, stride=2, padding=1, bias=False)
        layers = conv_block(first, None, nn.LeakyReLU(0.2), config.dropout_D)  # no BatchNorm here (ibid., §3)
        for narrow, wide in pairwise(widths):
            conv = nn.Conv2d(narrow, wide, kernel_size=4, stride=2, padding=1, bias=False)
            norm = batch_norm(wide, config.batch_norm_D)
            layers += conv_block(conv, norm, nn.LeakyReLU(0.2, inplace=norm is not None), config.dropout_D)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=0, bias=False)  # 4×4 → 1×1
        self.apply(init_dcgan)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,) for images (N, C, S, S), as `with_class` does when conditional."""
        features = self.layers(self.with_class_map(images, labels))
        return self.with_class(self.head(features).flatten(), features.flatten(1), labels)


# ------------------------------------------------------------------------------------------ StableDCGAN, 28×28
def same_conv(narrow: int, wide: int) -> list[nn.Module]:
    """Return TensorFlow's Conv2D(kernel 5, stride 2, "same"): it pads 1 pixel before and 2 after."""
    return [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(narrow, wide, kernel_size=5, stride=2, padding=1)]


def same_conv_transpose(wide: int, narrow: int) -> list[nn.Module]:
    """Return TensorFlow's Conv2DTranspose(kernel 5, stride 2, "same"): it crops 1 pixel before and 2 after."""
    conv = nn.ConvTranspose2d(wide, narrow, kernel_size=5, stride=2, padding=1, bias=False)
    return [conv, nn.ZeroPad2d((0, -1, 0, -1))]


def tensorflow_batch_norm(kind: type[nn.Module], width: int) -> nn.Module:
    """Return BatchNorm with TensorFlow's defaults; its momentum 0.99 keeps what PyTorch's 0.01 replaces."""
    return kind(width, eps=1e-3, momentum=0.01)


class StableGenerator(nn.Module):
    """Map z (N, nz) to images (N, 1, S, S) as the TensorFlow recipe does; S is a multiple of 4."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.side, w = config.image_size // 4, config.ngf  # 28×28 starts at 7×7
        norm = tensorflow_batch_norm if config.batch_norm_G else lambda kind, width: nn.Identity()
        units = self.side**2 * 4 * w  # 7·7·256
        self.dense = nn.Sequential(
            nn.Linear(config.nz, units, bias=False), norm(nn.BatchNorm1d, units), nn.LeakyReLU(0.2)
        )
        layers: list[nn.Module] = []
        for wide, narrow in ((4 * w, 2 * w), (2 * w, w)):  # → (N, 128, 14, 14) → (N, 64, 28, 28)
            layers += [*same_conv_transpose(wide, narrow), norm(nn.BatchNorm2d, narrow)]
            layers += [nn.LeakyReLU(0.2, inplace=config.batch_norm_G)]
            layers += [nn.Dropout(config.dropout_G)] if config.dropout_G else []
        last = nn.Conv2d(w, 1, kernel_size=5, padding=2, bias=config.init_output_bias)
        self.layers = nn.Sequential(*layers, last, nn.Tanh())
        self.apply(init_glorot)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, S, S); labels are ignored."""
        x = self.dense(z).unflatten(1, (self.side, self.side, -1))  # TensorFlow's order: height, width, channels
        return self.layers(x.permute(0, 3, 1, 2))


class StableDiscriminator(nn.Module):
    """Map images (N, 1, S, S) to logits (N,) as the TensorFlow recipe does: no BatchNorm, Dropout instead."""

    requires: ClassVar = {"channels": 1, "conditional": False}  # of its Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        w, dropout = config.ndf, config.dropout_D
        self.layers = nn.Sequential(
            *same_conv(1, w), nn.LeakyReLU(0.2), nn.Dropout(dropout),  # (N, 64, 14, 14)
            *same_conv(w, 2 * w), nn.LeakyReLU(0.2), nn.Dropout(dropout),  # (N, 128, 7, 7)
        )  # fmt: skip
        self.head = nn.Linear((config.image_size // 4) ** 2 * 2 * w, 1)
        self.apply(init_glorot)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,); labels are ignored."""
        features = self.layers(images).permute(0, 2, 3, 1)  # TensorFlow flattens height, width, channels
        return self.head(features.flatten(1)).squeeze(1)


# ------------------------------------------------------------------------------------------ FastDCGAN, 28×28
class FastGenerator(ClassConditional):
    """Map z (N, nz), and labels (N,) when conditional, to images (N, C, S, S); S is a multiple of 4."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.side, w = config.image_size // 4, config.ngf  # 28×28 starts at 7×7
        norm = partial(batch_norm, wanted=config.batch_norm_G)
        self.dense = nn.Linear(self.add_class_embedding(config), self.side**2 * 4 * w, bias=False)
        double = nn.ConvTranspose2d(4 * w, w, kernel_size=4, stride=2, padding=1, bias=False)  # (N, 32, 14, 14)
        self.layers = nn.Sequential(
            norm(4 * w) or nn.Identity(),
            nn.ReLU(),
            *conv_block(double, norm(w), nn.ReLU(inplace=True), config.dropout_G),
            # four maps at 14×14 cost what one at 28×28 would, and no 32 maps of that size are needed
            nn.Conv2d(w, 4 * config.channels, kernel_size=3, padding=1),
            nn.PixelShuffle(2),  # (N, C, 28, 28)
            nn.Tanh(),
        )
        self.apply(init_dcgan)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, C, S, S) of the classes in labels (N,)."""
        x = self.dense(self.latent(z, labels)).unflatten(1, (self.side, self.side, -1))
        return self.layers(x.permute(0, 3, 1, 2))


class FastDiscriminator(ClassConditional):
    """Map images (N, C, S, S) to logits (N,): 'real', plus 'this class' when conditional; see `ClassConditional`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        w, norm, dropout = config.ndf, partial(batch_norm, wanted=config.batch_norm_D), config.dropout_D
        halve = partial(nn.Conv2d, stride=2, padding=1, bias=False)
        act = partial(nn.LeakyReLU, 0.2, inplace=config.batch_norm_D)
        first = halve(self.input_channels(config), w, kernel_size=4)
        self.layers = nn.Sequential(
            *conv_block(first, None, nn.LeakyReLU(0.2), dropout),  # (N, 32, 14, 14)
            *conv_block(halve(w, 2 * w, kernel_size=4), norm(2 * w), act(), dropout),  # (N, 64, 7, 7)
            *conv_block(halve(2 * w, 4 * w, kernel_size=3), norm(4 * w), act(), dropout),  # (N, 128, 4, 4)
        )
        features = math.ceil(config.image_size / 8) ** 2 * 4 * w
        self.head = nn.Linear(features, 1)
        self.add_class_heads(features, config)
        self.apply(init_dcgan)
        if not config.batch_norm_D:  # N(0, 0.02) shrinks the activations, and no BatchNorm scales them back
            self.layers.apply(init_kaiming)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,) for images (N, C, S, S) of the classes in labels (N,)."""
        features = self.layers(self.with_class_map(images, labels)).permute(0, 2, 3, 1).flatten(1)  # NHWC: no copy
        return self.with_class(self.head(features).squeeze(1), features, labels)


# ------------------------------------------------------------------------------------------ ProgressiveGAN
class EqualizedConv2d(nn.Conv2d):
    """Convolve with weights ~ N(0, 1) scaled at run time: all layers learn at one pace (Karras et al. 2018, §4.1)."""

    def __init__(self, wide: int, narrow: int, kernel_size: int = 3, gain: float = math.sqrt(2)) -> None:
        super().__init__(wide, narrow, kernel_size=kernel_size, padding=kernel_size // 2)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.scale = gain / math.sqrt(wide * kernel_size**2)  # He's constant

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (N, C, H, W)."""
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """Scale the features of every pixel to mean square 1, so that magnitudes cannot escalate (ibid., §4.2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) over its root mean square along C."""
        return x * x.square().mean(dim=1, keepdim=True).add(1e-8).rsqrt()


class MinibatchStdDev(nn.Module):
    """Append one map with the batch's mean standard deviation, so that D sees a lack of variety (ibid., §3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) as (N, C + 1, H, W)."""
        std = x.float().var(dim=0, unbiased=False).add(1e-8).sqrt().mean()
        return torch.cat([x, std.to(x.dtype).expand_as(x[:, :1])], dim=1)


class Growing(nn.Module):
    """Hold how far a progressive network has grown, from 4×4 to full size (ibid., §2).

    `grown` is 0 at 4×4, 1 at 8×8 …; 1.25 is 8×8 with a quarter of 16×16 faded in. It is a buffer: checkpoints keep it.
    """

    grows = True

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
        """Return the largest size in use, counted in doublings of 4×4, and the share of it that is faded in."""
        grown = float(self.grown)
        stage = math.ceil(grown)
        return stage, grown - stage + 1


def growing_widths(doublings: int, base: int) -> list[int]:
    """Return channels at 4×4, 8×8 …: half of `base` at full size, `base` at half of it, double before."""
    return [2 * base] * (doublings - 1) + [base, max(1, base // 2)]


def fade(coarse: Tensor, fine: Tensor, share: float) -> Tensor:
    """Return the coarse images with a share of the fine ones, in float32: autocast may have made them of two kinds."""
    return coarse.float().lerp(fine.float(), share)


class ProgressiveGenerator(Growing):
    """Map z (N, nz) to images (N, 1, S, S), made at the size it has grown to and resized to S×S; S = 16, 32, 64, …"""

    def __init__(self, config: Config) -> None:
        super().__init__(config.image_size)
        widths, act = growing_widths(self.doublings, config.ngf), partial(nn.LeakyReLU, 0.2, inplace=True)
        self.first = nn.Sequential(
            PixelNorm(),
            EqualizedConv2d(config.nz, 16 * widths[0], kernel_size=1, gain=math.sqrt(2) / 4),  # gain: ibid., code
            nn.PixelShuffle(4),  # (N, w, 4, 4)
            act(),
            PixelNorm(),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), EqualizedConv2d(wide, narrow), act(), PixelNorm(),
                          EqualizedConv2d(narrow, narrow), act(), PixelNorm())
            for wide, narrow in pairwise(widths)
        )  # fmt: skip
        self.to_rgb = nn.ModuleList(EqualizedConv2d(width, 1, kernel_size=1, gain=1.0) for width in widths)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images (N, 1, S, S); labels are ignored."""
        stage, share = self.stage()
        x = before = self.first(z[:, :, None, None])
        for block in self.blocks[:stage]:
            before, x = x, block(x)
        image = self.to_rgb[stage](x)
        if share < 1:
            image = fade(F.interpolate(self.to_rgb[stage - 1](before), scale_factor=2), image, share)
        return F.interpolate(image.tanh(), scale_factor=2 ** (self.doublings - stage))


class ProgressiveDiscriminator(Growing):
    """Map images (N, 1, S, S), resized to the size it has grown to, to logits (N,): the generator's mirror image."""

    requires: ClassVar = {"channels": 1, "conditional": False}  # of its Config

    def __init__(self, config: Config) -> None:
        super().__init__(config.image_size)
        widths, act = growing_widths(self.doublings, config.ndf), partial(nn.LeakyReLU, 0.2, inplace=True)
        self.from_rgb = nn.ModuleList(
            nn.Sequential(EqualizedConv2d(1, width, kernel_size=1), act()) for width in widths
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(EqualizedConv2d(narrow, narrow), act(), EqualizedConv2d(narrow, wide), act(), nn.AvgPool2d(2))
            for wide, narrow in pairwise(widths)
        )
        w = widths[0]
        self.last = nn.Sequential(
            MinibatchStdDev(),
            EqualizedConv2d(w + 1, w),
            act(),
            nn.PixelUnshuffle(4),  # (N, 16 w, 1, 1)
            EqualizedConv2d(16 * w, 1, kernel_size=1, gain=1.0),
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (N,) for images (N, 1, S, S); labels are ignored."""
        stage, share = self.stage()
        images = F.avg_pool2d(images, 2 ** (self.doublings - stage))
        if share < 1:  # real and fake both soften while detail fades in
            coarse = F.avg_pool2d(images, 2)
            images = fade(F.interpolate(coarse, scale_factor=2), images, share)
        x = self.from_rgb[stage](images)
        for number in range(stage, 0, -1):
            x = self.blocks[number - 1](x)
            if number == stage and share < 1:
                x = fade(self.from_rgb[stage - 1](coarse), x, share)
        return self.last(x).flatten()


# ------------------------------------------------------------------------------------------ initialization
def init_dcgan(module: nn.Module) -> None:
    """Draw conv and linear weights from N(0, 0.02), BatchNorm's from N(1, 0.02), embeddings from N(0, 1); biases 0.

    Radford et al. 2015, §4, as the PyTorch recipe writes it. Use with `module.apply`.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)  # as large as z, to which it is concatenated
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
def init_output_bias(generator: nn.Module, images: Tensor) -> None:
    """Set G's output bias so that tanh(bias) is the median pixel of uint8 images (N, …), at most ±0.96.

    MNIST is black but for the strokes. Without this G first learns to darken the background, and the effect of z
    vanishes in it: all samples are alike for epochs. 0.96 keeps tanh out of its flat end. Does nothing without a bias.
    """
    median = (images.flatten()[::101].float().median() / 127.5 - 1).clamp(-0.96, 0.96)
    outputs = getattr(generator, "to_rgb", None)  # one for every size, where G grows
    convs = [m for m in generator.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in outputs or convs[-1:]:
        if layer.bias is not None:
            layer.bias.fill_(torch.atanh(median).item())


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters; `all` counts BatchNorm's running mean and variance, as TensorFlow does."""
    trainable = sum(p.numel() for p in module.parameters())
    statistics = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    return trainable + statistics, trainable
