"""Models and losses: every layer of the recipes, how it begins, what it computes, and what the losses are worth."""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FastCrossEntropy
from torch import nn

import dcgan_utils as du
from dcgan_utils import Config

RECIPES = (du.DCGAN, du.StableDCGAN, du.FastDCGAN)
NORMED = (du.DCGAN, du.StableDCGAN, FastCrossEntropy)  # the last with BatchNorm in D


def leaves(network: nn.Module) -> list[nn.Module]:
    """Return a network's layers in the order in which data pass them."""
    return [module for module in network.modules() if not list(module.children())]


def describe(module: nn.Module) -> tuple:
    """Return what a layer is, as a plain tuple that a test can spell out."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        assert (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
        kind = "convT" if isinstance(module, nn.ConvTranspose2d) else "conv"
        (k, k2), (s, s2), (p, p2) = module.kernel_size, module.stride, module.padding
        assert (k, s, p) == (k2, s2, p2)
        assert getattr(module, "output_padding", (0, 0)) == ((1, 1) if kind == "convT" and k == 5 else (0, 0))
        return kind, module.in_channels, module.out_channels, k, s, p, module.bias is not None
    if isinstance(module, nn.Linear):
        return "dense", module.in_features, module.out_features, module.bias is not None
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        assert module.affine
        assert module.track_running_stats
        return "BN", module.num_features, module.eps, module.momentum
    if isinstance(module, nn.LeakyReLU):
        return "leaky", module.negative_slope
    if isinstance(module, nn.Dropout):
        return "dropout", module.p
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.ZeroPad2d):
        return "pad", module.padding
    return (type(module).__name__,)


def layers(network: nn.Module) -> list[tuple]:
    return [describe(module) for module in leaves(network)]


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    """Return the networks of every recipe at full width."""
    torch.manual_seed(0)
    configs = {
        "dcgan": du.DCGAN.resolve(),
        "literal": du.DCGAN.resolve(start_at_background=False),
        "stable": du.StableDCGAN.resolve(),
        "fast": du.FastDCGAN.resolve(),
        "free": du.FastDCGAN.resolve(conditional=False),
        "normed": FastCrossEntropy.resolve(),
        "normed free": FastCrossEntropy.resolve(conditional=False),
        "colour": du.FastDCGAN.resolve(conditional=False, channels=3),
        "packed": du.FastDCGAN.resolve(conditional=False, channels=3, pack=2),
    }
    kinds = {"stable": du.StableDCGAN, "dcgan": du.DCGAN, "literal": du.DCGAN}
    kinds = {name: kinds.get(name, du.FastDCGAN) for name in configs}
    made = {}
    for name, config in configs.items():
        for letter, network in zip("GD", kinds[name].networks, strict=True):
            made[f"{name} {letter}"] = network(config)
    return made


def small(kind: type[du.GAN], **fields) -> du.GAN:
    """Return a recipe with networks narrow enough to run at any size."""
    return kind(**{"ngf": 4, "ndf": 4, "device": "cpu", "precision": "fp32", **fields})


# ----------------------------------------------------------------------------------------------- every layer
def dcgan_generator(bias: bool) -> list[tuple]:
    return [
        ("convT", 100, 512, 4, 1, 0, False), ("BN", 512, 1e-5, 0.1), ("ReLU",),
        ("convT", 512, 256, 4, 2, 1, False), ("BN", 256, 1e-5, 0.1), ("ReLU",),
        ("convT", 256, 128, 4, 2, 1, False), ("BN", 128, 1e-5, 0.1), ("ReLU",),
        ("convT", 128, 64, 4, 2, 1, False), ("BN", 64, 1e-5, 0.1), ("ReLU",),
        ("convT", 64, 1, 4, 2, 1, bias), ("Tanh",),
    ]  # fmt: skip


DCGAN_DISCRIMINATOR = [
    ("conv", 1, 64, 4, 2, 1, False), ("leaky", 0.2),
    ("conv", 64, 128, 4, 2, 1, False), ("BN", 128, 1e-5, 0.1), ("leaky", 0.2),
    ("conv", 128, 256, 4, 2, 1, False), ("BN", 256, 1e-5, 0.1), ("leaky", 0.2),
    ("conv", 256, 512, 4, 2, 1, False), ("BN", 512, 1e-5, 0.1), ("leaky", 0.2),
    ("conv", 512, 1, 4, 1, 0, False), ("Flatten",),
]  # fmt: skip
STABLE_GENERATOR = [
    ("dense", 100, 7 * 7 * 256, False), ("BN", 7 * 7 * 256, 1e-3, 0.01), ("leaky", 0.2),
    ("convT", 256, 128, 5, 2, 2, False), ("BN", 128, 1e-3, 0.01), ("leaky", 0.2),
    ("convT", 128, 64, 5, 2, 2, False), ("BN", 64, 1e-3, 0.01), ("leaky", 0.2),
    ("conv", 64, 1, 5, 1, 2, False), ("Tanh",),
]  # fmt: skip
STABLE_DISCRIMINATOR = [
    ("conv", 1, 64, 5, 2, 2, True), ("leaky", 0.2), ("dropout", 0.3),  # of mirrored maps
    ("conv", 64, 128, 5, 2, 2, True), ("leaky", 0.2), ("dropout", 0.3),
    ("dense", 7 * 7 * 128, 1, True),
]  # fmt: skip


def fast_generator(latent: int, channels: int = 1) -> list[tuple]:
    return [
        ("dense", latent, 7 * 7 * 128, False), ("BN", 128, 1e-5, 0.1), ("ReLU",),
        ("convT", 128, 32, 4, 2, 1, False), ("BN", 32, 1e-5, 0.1), ("ReLU",),
        ("conv", 32, 4 * channels, 3, 1, 1, True), ("PixelShuffle",), ("Tanh",),
    ]  # fmt: skip


def fast_discriminator(channels: int = 1, norm: bool = False) -> list[tuple]:
    return [
        ("conv", channels, 32, 4, 2, 1, False), ("leaky", 0.2),
        ("conv", 32, 64, 4, 2, 1, False), ("BN", 64, 1e-5, 0.1) if norm else ("Identity",), ("leaky", 0.2),
        ("conv", 64, 128, 3, 2, 1, False), ("BN", 128, 1e-5, 0.1) if norm else ("Identity",), ("leaky", 0.2),
        ("dense", 4 * 4 * 128, 1, True),
    ]  # fmt: skip


LAYERS = {
    "dcgan G": dcgan_generator(bias=True),
    "literal G": dcgan_generator(bias=False),
    "dcgan D": DCGAN_DISCRIMINATOR,
    "literal D": DCGAN_DISCRIMINATOR,
    "stable G": STABLE_GENERATOR,
    "stable D": STABLE_DISCRIMINATOR,
    "fast G": [("embedding", 10, 32), *fast_generator(64 + 32)],
    "fast D": [*fast_discriminator(), ("dense", 4 * 4 * 128, 10, True)],
    "free G": fast_generator(64),
    "free D": fast_discriminator(),
    "normed G": [("embedding", 10, 32), *fast_generator(64 + 32)],
    "normed D": [*fast_discriminator(norm=True), ("dense", 4 * 4 * 128, 10, True)],
    "normed free D": fast_discriminator(norm=True),
    "colour G": fast_generator(64, channels=3),
    "colour D": fast_discriminator(channels=3),
    "packed D": fast_discriminator(channels=6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(nets, name):
    assert layers(nets[name]) == LAYERS[name]


@pytest.mark.parametrize(
    ("name", "everything", "trainable"),
    [
        # 100·512·16 + 512·256·16 + 256·128·16 + 128·64·16 + 64·16 weights, BatchNorm 2·960 trained and 2·960 kept
        ("literal G", 3_572_736 + 4 * 960, 3_572_736 + 2 * 960),
        ("dcgan G", 3_572_737 + 4 * 960, 3_572_737 + 2 * 960),  # one bias more
        ("dcgan D", 2_761_728 + 4 * 896, 2_761_728 + 2 * 896),
        ("stable G", 2_330_944, 2_305_472),  # as its README prints them
        ("stable D", 212_865, 212_865),
        ("fast G", 669_444 + 2 * 160, 669_444),
        # 32·16 + 32·64·16 + 64·128·9 weights of convolutions, 2048 + 1 of the head, 10 · (2048 + 1) of the classes'
        ("fast D", 129_547, 129_547),
        ("free G", 669_444 - 320 - 32 * 6272 + 2 * 160, 669_444 - 320 - 32 * 6272),  # no embedding
        ("free D", 109_057, 109_057),  # no class heads
        ("normed D", 129_931 + 2 * 192, 129_931),  # BatchNorm 2·192 trained and 2·192 kept
        ("normed free D", 129_931 - 20_490 + 2 * 192, 129_931 - 20_490),
        ("colour G", 470_732 + 2 * 160, 470_732),  # 8 more maps at 14×14: 8 · (32·9 + 1) = 2,312 above free G
        ("colour D", 110_081, 110_081),  # two more channels for the first 32 maps: 2·32·16 = 1,024
        ("packed D", 111_617, 111_617),  # and three more: 3·32·16 = 1,536
    ],
)
def test_parameter_counts(nets, name, everything, trainable):
    assert du.count_parameters(nets[name]) == (everything, trainable)
    assert sum(p.numel() for p in nets[name].parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("kind", RECIPES)
def test_a_gan_is_made_of_its_recipes_networks(kind):
    gan = small(kind, dropout_D=0.25, dropout_G=0.5)
    assert isinstance(gan.generator, kind.networks[0])
    assert isinstance(gan.discriminator, kind.networks[1])
    blocks = {du.DCGAN: (4, 4), du.StableDCGAN: (2, 2), du.FastDCGAN: (1, 3)}[kind]
    assert layers(gan.generator).count(("dropout", 0.5)) == blocks[0]
    assert layers(gan.discriminator).count(("dropout", 0.25)) == blocks[1]


@pytest.mark.parametrize("kind", RECIPES)
def test_dropout_acts_in_training_and_rests_in_eval_mode(kind):
    gan = small(kind, image_size=16, dropout_D=0.5, dropout_G=0.5)
    labels = torch.zeros(8, dtype=torch.long)
    for network, x in ((gan.generator, torch.randn(8, gan.config.nz)), (gan.discriminator, torch.randn(8, 1, 16, 16))):
        network.train()
        assert not torch.equal(network(x, labels), network(x, labels))
        network.eval()
        assert torch.equal(network(x, labels), network(x, labels))


@pytest.mark.parametrize(
    ("size", "widths"),
    [(16, [128, 64]), (32, [256, 128, 64]), (64, [512, 256, 128, 64]), (128, [512, 512, 256, 128, 64])],
)
def test_dcgan_widths_grow_with_the_image_up_to_eight_times_the_base(size, widths):
    assert du.dcgan_widths(size, 64) == widths
    assert du.dcgan_widths(size, 3) == [w * 3 // 64 for w in widths]


# ----------------------------------------------------------------------------------------------- shapes
def feature_maps(network: nn.Module, x: torch.Tensor, *rest) -> list[tuple[int, ...]]:
    """Return the shape of every layer's output."""
    shapes, hooks = [], []
    for module in leaves(network):
        hooks.append(module.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape))))
    modes = [(module, module.training) for module in network.modules()]
    network.eval()(x, *rest)  # BatchNorm's statistics stay as they are
    for module, mode in modes:
        module.training = mode
    for hook in hooks:
        hook.remove()
    return shapes


def test_the_maps_inside_dcgan_at_64():
    gan = small(du.DCGAN)
    maps = feature_maps(gan.generator, torch.randn(2, 100))
    assert list(dict.fromkeys(maps)) == [(2, 32, 4, 4), (2, 16, 8, 8), (2, 8, 16, 16), (2, 4, 32, 32), (2, 1, 64, 64)]
    maps = feature_maps(gan.discriminator, torch.randn(2, 1, 64, 64))
    assert list(dict.fromkeys(maps)) == [
        (2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4), (2, 1, 1, 1), (2,),
    ]  # fmt: skip


def test_the_maps_inside_stable_dcgan_at_28(nets):
    maps = feature_maps(nets["stable G"], torch.randn(2, 100))
    assert list(dict.fromkeys(maps)) == [
        (2, 7 * 7 * 256), (2, 128, 14, 14), (2, 64, 28, 28), (2, 1, 28, 28),
    ]  # fmt: skip
    maps = feature_maps(nets["stable D"], torch.randn(2, 1, 28, 28))
    assert list(dict.fromkeys(maps)) == [(2, 64, 14, 14), (2, 128, 7, 7), (2, 1)]


def test_the_maps_inside_fast_dcgan_at_28(nets):
    labels = torch.tensor([3, 4])
    maps = feature_maps(nets["fast G"], torch.randn(2, 64), labels)
    assert list(dict.fromkeys(maps)) == [
        (2, 32), (2, 7 * 7 * 128), (2, 128, 7, 7), (2, 32, 14, 14), (2, 4, 14, 14), (2, 1, 28, 28),
    ]  # fmt: skip
    maps = feature_maps(nets["fast D"], torch.randn(2, 1, 28, 28), labels)
    assert list(dict.fromkeys(maps)) == [(2, 32, 14, 14), (2, 64, 7, 7), (2, 128, 4, 4), (2, 1), (2, 10)]


@pytest.mark.parametrize(
    ("kind", "size"),
    [(du.DCGAN, size) for size in (16, 32, 64, 128)]
    + [(kind, size) for kind in (du.StableDCGAN, du.FastDCGAN) for size in (28, 32, 16, 40, 36)],
)
def test_images_and_logits_at_every_size(kind, size):
    gan = small(kind, image_size=size, ngf=2, ndf=2)
    labels = torch.arange(3)
    images = gan.generator(torch.randn(3, gan.config.nz), labels)
    assert images.shape == (3, 1, size, size)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.var(dim=0).sum() > 0  # it looks at z
    answers = gan.discriminator(images, labels)
    assert answers.shape == ((3, 11) if kind is du.FastDCGAN else (3,))  # the classes' own logits stand beside it
    logits = du.real_logit(answers)
    assert logits.shape == (3,)
    assert logits.unique().numel() == 3  # it looks at the images
    assert gan.sample(2, seed=0).shape == (2, 1, size, size)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_batch_of_one_image_gives_one_logit(kind):
    gan = small(kind, image_size=16)
    gan.discriminator.eval()
    answers = gan.discriminator(torch.randn(1, 1, 16, 16), torch.tensor([0]))
    assert answers.shape == ((1, 11) if kind is du.FastDCGAN else (1,))
    assert du.real_logit(answers).shape == (1,)


@pytest.mark.parametrize("kind", RECIPES)
def test_discriminators_return_logits_of_either_sign_and_any_size(kind):
    """A sigmoid inside would hold them in (0, 1)."""
    gan = small(kind, image_size=16)
    with torch.no_grad():
        for p in gan.discriminator.parameters():
            if p.ndim > 1:
                p.mul_(30)
    logits = du.real_logit(gan.discriminator(torch.randn(64, 1, 16, 16), torch.zeros(64, dtype=torch.long)))
    assert logits.min() < 0 < 1 < logits.max()


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (du.DCGAN, [17, 20, 24, 28, 48, 63, 65, 100, 1000]),
        (du.StableDCGAN, [17, 27, 29, 30, 63, 1022]),
        (du.FastDCGAN, [17, 27, 29, 30, 63, 1022]),
    ],
)
def test_other_sizes_are_refused_with_those_that_work(kind, sizes):
    for size in sizes:
        with pytest.raises(ValueError, match=f"image_size = {size}") as caught:
            small(kind, image_size=size)
        message = str(caught.value)
        assert "\n" not in message
        assert kind.__name__ in message
        named = [int(n) for n in re.findall(r"(?<![\d×])\d{2,}", message.split(":", 1)[1])]
        assert min(named) < size < max(named)
        for n in named:
            kind.check_image_size(n)
            assert Config(image_size=n).image_size == n
        works = [n for n in range(16, 1025) if accepts(kind, n)]
        assert max(n for n in works if n < size) in named  # the nearest below
        assert min(n for n in works if n > size) in named  # and above


def accepts(kind: type[du.GAN], size: int) -> bool:
    try:
        kind.check_image_size(size)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("size", [8, 12, 2048])
def test_sizes_out_of_config_are_refused(kind, size):
    with pytest.raises(ValueError, match=f"image_size = {size}.*16"):
        small(kind, image_size=size)


# ----------------------------------------------------------------------------------------------- how weights begin
def assert_normal(values: torch.Tensor, mean: float, std: float) -> None:
    """Hold mean, standard deviation and tails of N(mean, std) within five standard errors."""
    values = values.detach().double().flatten()
    n = len(values)
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(n)
    assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * n)
    beyond = ((values - mean).abs() > 2 * std).double().mean()
    assert abs(beyond - 0.0455) < 5 * math.sqrt(0.0455 / n)  # a uniform distribution has nothing there


@pytest.mark.parametrize(
    "name", ["dcgan G", "literal G", "dcgan D", "fast G", "normed D", "free G", "normed free D", "colour G"]
)
def test_dcgan_initialisation_was_applied(nets, name):
    norms, count = [], 0
    for module in leaves(nets[name]):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            assert_normal(module.weight, 0.0, 0.02)
            assert module.bias is None or not module.bias.any()
            count += 1
        elif isinstance(module, nn.BatchNorm2d):
            norms.append(module.weight)
            assert not module.bias.any()
            assert not module.running_mean.any()
            assert (module.running_var == 1).all()
        elif isinstance(module, nn.Embedding):
            assert_normal(module.weight, 0.0, 1.0)
    assert count == sum(layer[0] in ("conv", "convT", "dense") for layer in LAYERS[name])
    assert_normal(torch.cat(norms), 1.0, 0.02)


@pytest.mark.parametrize("name", ["fast D", "free D", "colour D", "packed D"])
def test_a_fast_d_without_batch_norm_begins_by_kaiming(nets, name):
    """He et al. 2015, eq. 14: variance 2 / ((1 + 0.2²) · fan in); the heads stay N(0, 0.02)."""
    convolutions = [module for module in leaves(nets[name]) if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 3
    for module in convolutions:
        fan_in = module.in_channels * module.kernel_size[0] ** 2
        assert_normal(module.weight, 0.0, math.sqrt(2 / (1.04 * fan_in)))
    for module in leaves(nets[name]):
        if isinstance(module, nn.Linear):
            assert_normal(module.weight, 0.0, 0.02)
            assert not module.bias.any()


def test_kaiming_keeps_what_passes_from_layer_to_layer(nets):
    """The mean square of the maps stays near 1; drawn from N(0, 0.02) a D without BatchNorm would lose it."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 28, 28)
    with torch.no_grad():
        for conv in (layer for layer in nets["fast D"].layers if isinstance(layer, nn.Conv2d)):
            maps = F.conv2d(x, conv.weight, stride=2)  # no padding: no zeros dilute the mean
            x = F.leaky_relu(maps, 0.2)
            assert 0.75 < x.square().mean() < 1.33
        shrunk = du.FastDiscriminator(FastCrossEntropy.resolve()).layers
        maps = torch.randn(64, 1, 28, 28)
        for conv in (layer for layer in shrunk if isinstance(layer, nn.Conv2d)):
            maps = F.leaky_relu(conv(maps), 0.2)
    assert maps.square().mean() < 0.01


@pytest.mark.parametrize("name", ["stable G", "stable D"])
def test_glorot_initialisation_was_applied(nets, name):
    for module in leaves(nets[name]):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            taps = module.weight[0, 0].numel() if module.weight.ndim == 4 else 1
            bound = math.sqrt(6 / (taps * sum(module.weight.shape[:2])))  # Keras: √(6 / (fan_in + fan_out))
            w = module.weight.detach().abs()
            assert bound * (1 - 25 / w.numel()) < w.max() <= bound * (1 + 1e-6)
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(module.weight.mean()) < 5 * bound / math.sqrt(3 * w.numel())
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (module.weight == 1).all()
            assert not module.bias.any()


@pytest.mark.parametrize("kind", [*RECIPES, FastCrossEntropy])
def test_initialisation_reaches_the_gan(kind):
    """The networks inside a GAN, in their channels_last layout, hold the recipe's values, not PyTorch's."""
    gan = kind(device="cpu", image_size=16, ngf=32, ndf=32)
    for network in (gan.generator, gan.discriminator):
        for module in leaves(network):
            weight = getattr(module, "weight", None)
            if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            taps = weight[0, 0].numel() if weight.ndim == 4 else 1
            std = math.sqrt(2 / (taps * sum(weight.shape[:2]))) if kind is du.StableDCGAN else 0.02
            if kind is du.FastDCGAN and network is gan.discriminator and isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / (1.04 * taps * weight.shape[1]))  # Kaiming's, where BatchNorm is missing
            assert weight.std().item() == pytest.approx(std, rel=0.15)


# ----------------------------------------------------------------------------------------------- the start at black
def output_bias(network: nn.Module) -> torch.Tensor:
    return [m for m in leaves(network) if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))][-1].bias


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(
    ("share", "grey", "start"),
    [
        (0.7, 100, 100 / 127.5 - 1),  # most pixels are of this grey: samples begin there, not at the mean
        (0.7, 200, 200 / 127.5 - 1),
        (1.0, 0, -0.96),  # all black, and all white: where tanh is flat, nothing could be learnt any more
        (1.0, 255, 0.96),
    ],
)
def test_the_output_starts_at_the_datas_most_usual_grey(kind, share, grey, start):
    gan = small(kind, image_size=16, start_at_background=True, ema=0.0)
    rng = torch.Generator().manual_seed(0)
    images = torch.full((200, 16, 16), grey, dtype=torch.uint8)
    images[torch.rand(images.shape, generator=rng) > share] = 0
    du.start_at_background(gan.generator, images)
    bias = output_bias(gan.generator)
    assert torch.tanh(bias).detach().numpy() == pytest.approx(start, abs=1e-4)
    assert bias.requires_grad


@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN])
def test_digits_start_black(kind, mnist_small):
    gan = small(kind, image_size=32, start_at_background=True, ema=0.0)
    du.start_at_background(gan.generator, du.resize_images(mnist_small[0], 32))
    assert torch.tanh(output_bias(gan.generator)).detach().numpy() == pytest.approx(-0.96, abs=1e-4)
    assert gan.sample(64, seed=0).mean().item() == pytest.approx(-0.96, abs=0.02)


@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN])
def test_the_literal_recipe_starts_grey(kind):
    gan = small(kind, image_size=32, start_at_background=False)
    assert gan.sample(64, seed=0).mean().item() == pytest.approx(0, abs=0.05)


# ----------------------------------------------------------------------------------------------- TensorFlow's "same"
def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the pixels before and after that TensorFlow's documentation of padding="SAME" gives."""
    total = max((kernel - stride) if side % stride == 0 else (kernel - side % stride), 0)
    return total // 2, total - total // 2


def same_conv(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int) -> np.ndarray:
    """Return Conv2D(padding="same") of x (N, C, H, W) by w (O, C, k, k), one product at a time."""
    n, channels, height, width = x.shape
    out = np.zeros((n, len(w), math.ceil(height / stride), math.ceil(width / stride))) + b[None, :, None, None]
    top, left = (same_padding(side, w.shape[2], stride)[0] for side in (height, width))
    for i, j in np.ndindex(out.shape[2:]):
        for u, v in np.ndindex(w.shape[2:]):
            row, column = i * stride + u - top, j * stride + v - left
            if 0 <= row < height and 0 <= column < width:
                for o, c in np.ndindex(len(w), channels):
                    out[:, o, i, j] += x[:, c, row, column] * w[o, c, u, v]
    return out


def on_mirrored_maps(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a layer that works on mirrored maps makes of x."""
    layer.mirrored = True
    return layer(x.flip(2, 3)).flip(2, 3)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("side", [4, 6, 7, 28])
def test_same_conv2d_against_a_loop(side, mirrored):
    rng = torch.Generator().manual_seed(side)
    layer = du.SameConv2d(2, 3).double()
    x = torch.randn(2, 2, side, side, generator=rng, dtype=torch.float64)
    out = on_mirrored_maps(layer, x) if mirrored else layer(x)
    assert out.shape == (2, 3, math.ceil(side / 2), math.ceil(side / 2))
    expected = same_conv(x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy(), stride=2)
    assert out.detach().numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("side", [4, 7, 8])
def test_same_conv_transpose2d_is_the_gradient_of_same_conv2d(side, mirrored):
    """TensorFlow defines Conv2DTranspose so; the padding here follows TensorFlow's rule, not the module's."""
    layer = du.SameConvTranspose2d(3, 2).double()
    y = torch.randn(2, 3, side, side, dtype=torch.float64)
    x = torch.randn(2, 2, 2 * side, 2 * side, dtype=torch.float64, requires_grad=True)
    before, after = same_padding(2 * side, kernel=5, stride=2)
    assert (before, after) == (1, 2)
    forward = F.conv2d(F.pad(x, (before, after, before, after)), layer.weight, stride=2)
    assert forward.shape == y.shape
    (expected,) = torch.autograd.grad(forward, x, y)
    assert torch.allclose(on_mirrored_maps(layer, y) if mirrored else layer(y), expected, atol=1e-12)


def test_stable_networks_work_on_mirrored_maps_and_give_upright_ones(nets):
    """Layer by layer as TensorFlow has them, on upright maps, they make the same image and the same answer."""
    generator, discriminator = (copy.deepcopy(nets[f"stable {letter}"]).eval() for letter in "GD")
    z = torch.randn(2, 100)
    image = generator(z)
    answer = discriminator(image)
    for layer in [*generator.modules(), *discriminator.modules()]:
        if hasattr(layer, "mirrored"):
            assert layer.mirrored
            layer.mirrored = False
    x = generator.dense(z).view(2, 7, 7, 256).permute(0, 3, 1, 2)
    assert torch.allclose(generator.layers(x), image, atol=1e-6)
    features = discriminator.layers(image).permute(0, 2, 3, 1).flatten(1)
    assert torch.allclose(discriminator.head(features).squeeze(1), answer, atol=1e-5)


def test_stable_generators_last_layer_is_same_conv2d_too(nets):
    conv = leaves(nets["stable G"])[-2]
    x = torch.randn(1, 64, 6, 6, dtype=torch.float64)
    weight = conv.weight.detach().double()
    expected = same_conv(x.numpy(), weight.numpy(), np.zeros(1), stride=1)
    out = F.conv2d(x, weight, stride=conv.stride, padding=conv.padding)
    assert out.numpy() == pytest.approx(expected, abs=1e-9)


def test_batch_norm_keeps_what_tensorflow_keeps():
    """TensorFlow: moving = 0.99 · moving + 0.01 · batch, and (x - mean) / √(variance + 1e-3)."""
    norm = du.tensorflow_batch_norm(nn.BatchNorm2d, 2)
    x = torch.randn(8, 2, 3, 3) * 0.05 + 4
    out = norm(x)
    mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
    assert torch.allclose(norm.running_mean, 0.01 * mean, atol=1e-6)
    assert torch.allclose(norm.running_var, torch.full((2,), 0.99), atol=1e-3)
    expected = (x - mean[None, :, None, None]) / (variance + 1e-3).sqrt()[None, :, None, None]
    assert torch.allclose(out, expected, atol=1e-4)


def captured(module: nn.Module, run, what: str) -> torch.Tensor:
    """Return a layer's input or output while `run` runs."""
    kept = []
    hook = module.register_forward_hook(lambda m, inputs, out: kept.append(inputs[0] if what == "input" else out))
    run()
    hook.remove()
    return kept[0].detach().clone()


@pytest.mark.parametrize("kind", [du.StableDCGAN, du.FastDCGAN])
def test_the_generators_dense_output_is_read_height_width_channels(kind):
    """TensorFlow's Reshape((7, 7, C)): value k belongs to row k // 7C, column k // C mod 7, channel k mod C."""
    gan = small(kind, ngf=3)
    z, labels = torch.randn(2, gan.config.nz), torch.tensor([1, 2])
    dense = captured(gan.generator.dense, lambda: gan.generator(z, labels), "output").flatten(1)
    maps = captured(gan.generator.layers[0], lambda: gan.generator(z, labels), "input")
    maps = maps.flip(2, 3) if kind is du.StableDCGAN else maps  # whose convolutions work on mirrored maps
    channels = maps.shape[1]
    assert maps.shape == (2, channels, 7, 7)
    for k in range(dense.shape[1]):
        row, column, channel = k // (7 * channels), k // channels % 7, k % channels
        assert torch.equal(maps[:, channel, row, column], dense[:, k])


@pytest.mark.parametrize(("kind", "size", "side"), [(du.StableDCGAN, 28, 7), (du.FastDCGAN, 28, 4)])
def test_the_discriminators_head_reads_height_width_channels(kind, size, side):
    gan = small(kind, image_size=size)
    gan.discriminator.eval()
    x, labels = torch.randn(2, 1, size, size), torch.tensor([1, 2])
    maps = captured(gan.discriminator.layers, lambda: gan.discriminator(x, labels), "output")
    maps = maps.flip(2, 3) if kind is du.StableDCGAN else maps
    features = captured(gan.discriminator.head, lambda: gan.discriminator(x, labels), "input")
    assert maps.shape[2:] == (side, side)
    assert np.array_equal(features.numpy(), maps.numpy().transpose(0, 2, 3, 1).reshape(2, -1))


# ----------------------------------------------------------------------------------------------- labels
def test_the_conditional_logit_is_real_plus_real_and_this_digit():
    gan = small(du.FastDCGAN)
    d = gan.discriminator.eval()
    with torch.no_grad():
        d.head.bias.fill_(0.3)
        d.class_heads.bias.copy_(torch.arange(10.0))
    x, labels = torch.randn(5, 1, 28, 28), torch.tensor([0, 3, 3, 9, 7])
    features = captured(d.head, lambda: d(x, labels), "input")
    answers = d(x, labels)
    assert answers.shape == (5, 11)
    for n, label in enumerate(labels):
        real = features[n] @ d.head.weight[0] + d.head.bias[0]
        digits = features[n] @ d.class_heads.weight.T + d.class_heads.bias
        assert du.real_logit(answers)[n].item() == pytest.approx((real + digits[label]).item(), abs=1e-5)
        assert answers[n, 1:].tolist() == pytest.approx(digits.tolist(), abs=1e-5)


def test_the_label_changes_image_and_logit_and_its_absence_nothing():
    gan = small(du.FastDCGAN)
    z = torch.randn(1, 64).expand(10, -1)
    gan.generator.eval()
    images = gan.generator(z, torch.arange(10))
    assert (torch.cdist(images.flatten(1), images.flatten(1)) + torch.eye(10) > 1e-4).all()  # ten different images
    assert torch.allclose(gan.generator(z, torch.full((10,), 4)), images[4].expand(10, -1, -1, -1), atol=1e-6)
    free = small(du.FastDCGAN, conditional=False)
    free.generator.eval()
    assert torch.equal(free.generator(z, torch.arange(10)), free.generator(z, None))
    assert free.generator.embedding is None
    assert free.discriminator.class_heads is None


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN])
def test_the_public_recipes_ignore_labels(kind):
    gan = small(kind, image_size=16)
    gan.generator.eval()
    gan.discriminator.eval()
    z, x = torch.randn(3, 100), torch.randn(3, 1, 16, 16)
    assert torch.equal(gan.generator(z, torch.tensor([1, 2, 3])), gan.generator(z))
    assert torch.equal(gan.discriminator(x, torch.tensor([1, 2, 3])), gan.discriminator(x))


# ----------------------------------------------------------------------------------------------- losses
def loss_of(a: float, b: float) -> du.NonSaturatingLoss:
    return du.NonSaturatingLoss(Config(real_label_smooth=a, fake_label_smooth=b))


def logits(p: float, n: int = 4) -> torch.Tensor:
    return torch.full((n,), math.log(p / (1 - p)))


@pytest.mark.parametrize(
    ("a", "b", "balance_D", "balance_G", "floor"),
    [
        (1.0, 0.0, 2 * math.log(2), math.log(2), 0.0),
        (1.0, 0.0, 1.3863, 0.6931, 0.0),
        (0.9, 0.0, 1.3763, 0.7985, 0.3251),
        (0.85, 0.2, 1.3838, 0.6444, 0.9231),
    ],
)
def test_losses_in_closed_form(a, b, balance_D, balance_G, floor):
    loss, m = loss_of(a, b), (a + b) / 2
    assert loss.discriminator(logits(m), logits(m)).item() == pytest.approx(balance_D, abs=6e-5)
    assert loss.generator(logits(m)).item() == pytest.approx(balance_G, abs=6e-5)
    sure = [logits(min(max(p, 1e-6), 1 - 1e-6)) for p in (a, b)]
    assert loss.discriminator(*sure).item() == pytest.approx(floor, abs=6e-5)
    assert du.discriminator_loss_bounds(Config(real_label_smooth=a, fake_label_smooth=b)) == pytest.approx(
        (floor, balance_D), abs=6e-5
    )


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.9, 0.0), (0.85, 0.2)])
def test_where_real_and_fake_are_alike_d_does_best_at_the_middle(a, b):
    x = logits((a + b) / 2, n=1).requires_grad_()
    loss_of(a, b).discriminator(x, x).backward()
    assert x.grad.item() == pytest.approx(0, abs=1e-6)


def test_each_half_of_ds_loss_is_a_mean_and_the_whole_their_sum():
    loss = loss_of(0.9, 0.1)
    real, fake = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([1.0, -1.0])
    p, q = real.sigmoid(), fake.sigmoid()
    expected = -(0.9 * p.log() + 0.1 * (1 - p).log()).mean() - (0.1 * q.log() + 0.9 * (1 - q).log()).mean()
    assert loss.discriminator(real, fake).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_generators_target_is_a_config_field():
    loss = du.NonSaturatingLoss(Config(generator_target=0.9))
    q = 0.3
    expected = -(0.9 * math.log(q) + 0.1 * math.log(1 - q))
    assert loss.generator(logits(q)).item() == pytest.approx(expected, abs=1e-6)
    assert Config().generator_target == 1.0


def test_the_generators_loss_does_not_saturate():
    """Its gradient is strongest where D is sure that the image is fake (Goodfellow et al. 2014, §3)."""
    x = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
    loss_of(1.0, 0.0).generator(x).backward()
    assert (3 * x.grad).tolist() == pytest.approx([-1, -0.5, 0], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_stay_finite_and_float32_at_extreme_logits(dtype):
    x = torch.tensor([-60_000.0, 60_000.0], dtype=dtype, requires_grad=True)
    loss = loss_of(0.9, 0.0)
    for value in (loss.discriminator(x, x), loss.generator(x)):
        assert value.dtype == torch.float32
        assert value.isfinite()
        (grad,) = torch.autograd.grad(value, x)
        assert grad.isfinite().all()


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.9, 0.0), (0.85, 0.2)])
def test_d_accuracy_has_its_threshold_in_the_middle_of_the_labels(a, b):
    config, m = Config(real_label_smooth=a, fake_label_smooth=b), (a + b) / 2
    above, below = m + 0.02, m - 0.02
    for real, fake, expected in ((above, below, 1.0), (below, above, 0.0), (above, above, 0.5), (below, below, 0.5)):
        reading = du.read_discriminator(logits(real), logits(fake), config)
        assert set(reading) == {"D_x", "D_G_z", "D_acc", "D_std", "gap"}
        assert reading["D_acc"].item() == expected
        assert reading["D_x"].item() == pytest.approx(real, abs=1e-6)
        assert reading["D_G_z"].item() == pytest.approx(fake, abs=1e-6)


def test_d_x_is_the_mean_of_probabilities_not_the_probability_of_the_mean():
    real = torch.tensor([-10.0, 0.0, 2.0])
    D_x = du.read_discriminator(real, real, Config())["D_x"].item()
    assert D_x == pytest.approx(real.sigmoid().mean().item(), abs=1e-6)
    assert abs(D_x - real.mean().sigmoid().item()) > 0.3


def test_the_spread_of_ds_answers_is_that_of_all_of_them():
    real, fake = torch.tensor([3.0, 1.0, -2.0]), torch.tensor([0.5, -4.0, -1.0])
    spread = du.read_discriminator(real, fake, Config())["D_std"].item()
    assert spread == pytest.approx(np.std([1 / (1 + math.exp(-x)) for x in (3, 1, -2, 0.5, -4, -1)], ddof=1), abs=1e-6)
    for one in (0.0, 3.0):  # whichever answer it is that a collapsed D gives
        same = torch.full((8,), one)
        assert du.read_discriminator(same, same, Config())["D_std"].item() == pytest.approx(0, abs=1e-7)
    sure = du.read_discriminator(torch.full((8,), 20.0), torch.full((8,), -20.0), Config())
    assert sure["D_std"].item() > 0.5  # one answer to real and one to fake are two


# ----------------------------------------------------------------------------------------------- the ways to break it
@pytest.mark.parametrize("kind", NORMED)
def test_batch_norm_can_be_left_out_of_either_network(kind):
    """And nothing but it: the other layers keep their kinds, their order and their sizes."""

    def without_norm(network):
        return [layer for layer in layers(network) if layer[0] not in ("BN", "Identity")]

    whole = small(kind)
    norms = [sum(layer[0] == "BN" for layer in layers(net)) for net in (whole.generator, whole.discriminator)]
    assert norms[0] >= 2
    assert norms[1] == {du.DCGAN: 3, du.StableDCGAN: 0, FastCrossEntropy: 2}[kind]
    for field, mine, other in (
        ("batch_norm_G", "generator", "discriminator"), ("batch_norm_D", "discriminator", "generator"),
    ):  # fmt: skip
        bare = small(kind, **{field: False})
        assert not any(layer[0] == "BN" for layer in layers(getattr(bare, mine)))
        assert not list(getattr(bare, mine).buffers())
        assert without_norm(getattr(bare, mine)) == without_norm(getattr(whole, mine))
        assert layers(getattr(bare, other)) == layers(getattr(whole, other))
        assert bare.sample(2, seed=1).shape == whole.sample(2, seed=1).shape
        with pytest.raises(ValueError, match=f"{field} is built in"):
            whole.reconfigure(**{field: False})


def test_the_length_of_a_gradient():
    network = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    assert du.gradient_length(network).item() == 0  # none there
    network[0].weight.grad = torch.tensor([[3.0, 0.0]])
    assert du.gradient_length(network).item() == pytest.approx(3)
    network[1].bias.grad = torch.tensor([-4.0])
    assert du.gradient_length(network).item() == pytest.approx(5)  # of all layers together
    network[0].bias.grad = torch.tensor([math.nan])
    assert math.isnan(du.gradient_length(network).item())


def test_relative_change_is_a_share_of_the_longer_vector():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    assert du.relative_change(a, b) == du.relative_change(b, a) == pytest.approx(0.5)
    assert du.relative_change(a, -a) == pytest.approx(2)
    assert du.relative_change(a, torch.zeros(2)) == du.relative_change(torch.zeros(2), a) == pytest.approx(1)
    assert du.relative_change(a, a) == du.relative_change(torch.zeros(2), torch.zeros(2)) == 0
    assert du.relative_change(a, a + torch.tensor([0.0, 1e-4])) == pytest.approx(2e-5, rel=0.01)  # small, not zero
