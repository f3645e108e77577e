"""Networks: the public ones in NumPy, sizes, first weights, labels, growth; and that PyTorch's own tools take them."""

import io
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import RECIPES, FastCrossEntropy, make
from torch import Tensor, nn

import dcgan_utils as du

WAYS = ("projection", "matching", "concatenation", "auxiliary")
LABELED = (du.ConditionalDCGAN, du.FastDCGAN)
FREE = {"conditional": False}
CONVS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def layers(network: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """Return a network's layers of some kinds, in order."""
    return [module for module in network.modules() if isinstance(module, kinds)]


def players(gan: du.GAN) -> dict[str, nn.Module]:
    return {"G": gan.generator, "D": gan.discriminator}


def inputs(gan: du.GAN, player: str, n: int) -> tuple[Tensor, ...]:
    """Return n random inputs of G or D, with labels where it takes them."""
    config = gan.config
    x = torch.randn(n, config.nz) if player == "G" else torch.randn(n, config.channels, *[config.image_size] * 2)
    return (x, torch.arange(n) % config.num_classes) if config.conditional else (x,)


# ----------------------------------------------------------------------------------------------- in NumPy
def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the pixels before and after that TensorFlow's documentation of padding="SAME" gives."""
    total = max((kernel - stride) if side % stride == 0 else (kernel - side % stride), 0)
    return total // 2, total - total // 2


def arrays(layer: nn.Module, dims: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer's weight, and its bias along the channels."""
    bias = np.zeros(1) if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy(), bias.reshape(-1, *[1] * (dims - 2))


def convolve(x: np.ndarray, layer: nn.Conv2d, stride: int, padding: tuple[int, int]) -> np.ndarray:
    """Return the cross-correlation of x (N, C, H, W), one tap at a time."""
    w, bias = arrays(layer)
    x = np.pad(x, ((0, 0), (0, 0), padding, padding))
    reach = (x.shape[2] - w.shape[2]) // stride * stride + 1
    return bias + sum(
        np.einsum("nchw,oc->nohw", x[:, :, u : u + reach : stride, v : v + reach : stride], w[:, :, u, v])
        for u, v in np.ndindex(w.shape[2:])
    )


def spread(x: np.ndarray, layer: nn.ConvTranspose2d, stride: int, before: int, side: int) -> np.ndarray:
    """Return what each pixel of x adds to the output, cropped to side × side pixels from `before` on."""
    w, bias = arrays(layer)
    reach = stride * (x.shape[2] - 1) + 1
    out = np.zeros((len(x), w.shape[1], *[reach + w.shape[2] - 1] * 2))
    for u, v in np.ndindex(w.shape[2:]):
        out[:, :, u : u + reach : stride, v : v + reach : stride] += np.einsum("nchw,co->nohw", x, w[:, :, u, v])
    return out[:, :, before : before + side, before : before + side] + bias


def normalized(x: np.ndarray, norm: nn.Module, eps: float) -> np.ndarray:
    values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (t.detach().numpy().reshape(-1, *[1] * (x.ndim - 2)) for t in values)
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def dcgan_generator(network: nn.Module, z: np.ndarray) -> np.ndarray:
    first, *convs = layers(network, *CONVS)
    x = spread(z[:, :, None, None], first, stride=1, before=0, side=4)
    for norm, conv in zip(layers(network, *NORMS), convs, strict=True):
        x = spread(normalized(x, norm, 1e-5).clip(0), conv, stride=2, before=1, side=2 * x.shape[2])
    return np.tanh(x)


def dcgan_discriminator(network: nn.Module, x: np.ndarray) -> np.ndarray:
    first, *convs, last = layers(network, nn.Conv2d)
    x = leaky(convolve(x, first, 2, (1, 1)))  # no BatchNorm here
    for norm, conv in zip(layers(network, *NORMS), convs, strict=True):
        x = leaky(normalized(convolve(x, conv, 2, (1, 1)), norm, 1e-5))
    return convolve(x, last, 1, (0, 0)).reshape(-1)


def stable_generator(network: nn.Module, z: np.ndarray) -> np.ndarray:
    (first, *norms), (*doubling, last) = layers(network, *NORMS), layers(network, *CONVS)
    weight, _ = arrays(*layers(network, nn.Linear), dims=2)
    x = leaky(normalized(z @ weight.T, first, 1e-3)).reshape(len(z), 7, 7, -1).transpose(0, 3, 1, 2)  # Reshape
    for conv, norm in zip(doubling, norms, strict=True):
        before, _ = same_padding(2 * x.shape[2], 5, 2)  # it is the gradient of Conv2D on the larger side
        x = leaky(normalized(spread(x, conv, 2, before, 2 * x.shape[2]), norm, 1e-3))
    return np.tanh(convolve(x, last, 1, same_padding(28, 5, 1)))


def stable_discriminator(network: nn.Module, x: np.ndarray) -> np.ndarray:
    for conv in layers(network, nn.Conv2d):
        x = leaky(convolve(x, conv, 2, same_padding(x.shape[2], 5, 2)))
    weight, bias = arrays(*layers(network, nn.Linear), dims=2)
    return (x.transpose(0, 2, 3, 1).reshape(len(x), -1) @ weight.T + bias)[:, 0]  # Flatten: rows, columns, channels


@pytest.mark.parametrize(
    ("kind", "player", "by_hand"),
    [(du.DCGAN, "G", dcgan_generator), (du.DCGAN, "D", dcgan_discriminator),
     (du.StableDCGAN, "G", stable_generator), (du.StableDCGAN, "D", stable_discriminator)],
)  # fmt: skip
def test_a_public_recipes_network_is_its_paper_in_numpy(kind, player, by_hand):
    """With all weights and running averages drawn at random, in eval mode, in float64."""
    gan = make(kind, image_size=32 if kind is du.DCGAN else 28)
    network = players(gan)[player].double().eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 2) if name.endswith("var") else value.normal_(0, 0.3)
    x = inputs(gan, player, 3)[0].double()
    assert network(x).detach().numpy() == pytest.approx(by_hand(network, x.numpy()), abs=1e-9)


def test_batch_norm_keeps_what_tensorflow_keeps():
    """TensorFlow: moving = 0.99 · moving + 0.01 · batch, from 0 and 1 on; every BatchNorm of StableDCGAN does so."""
    generator, seen = make(du.StableDCGAN).generator, []
    for norm in layers(generator, *NORMS):
        norm.register_forward_hook(lambda norm, inputs, output: seen.append((norm, inputs[0].detach())))
    generator.train()(torch.randn(64, 8))
    assert len(seen) == 3
    for norm, x in seen:
        dims = (0, 2, 3)[: x.ndim - 1]
        assert torch.allclose(norm.running_mean, 0.01 * x.mean(dims), atol=1e-6)
        assert torch.allclose(norm.running_var, 0.99 + 0.01 * x.var(dims), atol=1e-6)


# ----------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(
    ("kind", "fields", "player", "everything", "trainable", "maps"),
    [
        # 100·512·16 + 512·256·16 + 256·128·16 + 128·64·16 + 64·16 weights, BatchNorm 2·960 trained and 2·960 kept
        (du.DCGAN, {"init_output_bias": False}, "G", 3_576_576, 3_574_656,
         [(512, 4), (256, 8), (128, 16), (64, 32), (1, 64)]),
        (du.DCGAN, {}, "G", 3_576_577, 3_574_657, [(512, 4), (256, 8), (128, 16), (64, 32), (1, 64)]),  # a bias
        (du.DCGAN, {}, "D", 2_765_312, 2_763_520, [(64, 32), (128, 16), (256, 8), (512, 4), (1, 1)]),
        (du.StableDCGAN, {}, "G", 2_330_944, 2_305_472, [(128, 14), (64, 28), (1, 28)]),  # as its README prints them
        (du.StableDCGAN, {}, "D", 212_865, 212_865, [(64, 14), (128, 7)]),
        (du.FastDCGAN, {}, "G", 669_764, 669_444, [(32, 14), (4, 14), (1, 28)]),
        (du.FastDCGAN, {}, "D", 129_547, 129_547, [(32, 14), (64, 7), (128, 4)]),
        (du.FastDCGAN, FREE, "D", 109_057, 109_057, [(32, 14), (64, 7), (128, 4)]),  # ten heads of 2,049 fewer
        (du.FastDCGAN, {**FREE, "channels": 3}, "D", 110_081, 110_081, [(32, 14), (64, 7), (128, 4)]),
        (du.DCGAN, {"image_size": 128}, "D", 6_961_664, 6_958_848, [(64, 64), (128, 32), (512, 8), (512, 4)]),
    ],
)  # fmt: skip
def test_parameters_and_maps_at_full_width(kind, fields, player, everything, trainable, maps):
    config, seen = kind.resolve(**fields), []
    with torch.device("meta"):
        network = kind.networks["GD".index(player)](config)
        for layer in layers(network, *CONVS, nn.ZeroPad2d, nn.PixelShuffle):
            layer.register_forward_hook(lambda layer, inputs, out: seen.append((out.shape[1], out.shape[2])))
        x = torch.randn(2, config.nz) if player == "G" else torch.randn(2, config.channels, *[config.image_size] * 2)
        network(x, torch.zeros(2, dtype=torch.long))
    assert du.count_parameters(network) == (everything, trainable)
    assert [shape for shape in dict.fromkeys(seen) if shape in maps] == maps


@pytest.mark.parametrize(
    ("kind", "sizes", "fields"),
    [
        (du.DCGAN, (16, 32, 128), {}), (du.DCGAN, (32,), {"channels": 3}), (du.ConditionalDCGAN, (16, 32), {}),
        (du.StableDCGAN, (16, 28, 36, 40), {}), (du.FastDCGAN, (16, 28, 36, 40), {}), (du.ProgressiveGAN, (16, 64), {}),
        *((du.FastDCGAN, (28,), {"conditioning": way, "channels": c}) for way in WAYS for c in (1, 3)),
        (du.WGANGP, (20,), {"channels": 2}), (du.FastDCGAN, (28,), FREE), (du.FastDCGAN, (28,), {"num_classes": 3}),
    ],
)  # fmt: skip
def test_images_and_logits_of_every_recipe_and_size(kind, sizes, fields):
    for size in sizes:
        gan = make(kind, image_size=size, **fields)
        config, labels = gan.config, torch.arange(3)
        images = gan.generator(torch.randn(3, config.nz), labels)
        assert (images.shape, images.dtype) == ((3, config.channels, size, size), torch.float32)
        assert images.abs().max() <= 1
        outputs = gan.discriminator(images, labels)
        classes = config.num_classes if config.conditional and config.conditioning in ("matching", "auxiliary") else 0
        assert outputs.shape == ((3, 1 + classes) if classes else (3,))
        assert du.real_logit(outputs).unique().numel() == 3  # G looks at z and D at the images
        outputs.sum().backward()
        idle = [name for network in players(gan).values() for name, p in network.named_parameters() if p.grad is None]
        leaves = [m for network in players(gan).values() for m in network.modules() if not list(m.children())]
        textbook = all(type(m).__module__.startswith("torch.nn") for m in leaves)
        assert (textbook and not idle) or kind is du.ProgressiveGAN
        assert gan.discriminator.eval()(images[:1], labels[:1]).shape[0] == 1
        assert gan.sample(2, seed=0).shape == (2, config.channels, size, size)


@pytest.mark.parametrize(
    ("kind", "works", "sizes"),
    [(kind, [16, 32, 64, 128, 256, 512, 1024], (17, 20, 24, 28, 48, 63, 65, 1000))
     for kind in (du.DCGAN, du.ConditionalDCGAN, du.ProgressiveGAN)]
    + [(kind, range(16, 1025, 4), (17, 27, 30, 63, 1022)) for kind in (du.StableDCGAN, du.FastDCGAN, du.WGANGP)],
)  # fmt: skip
def test_other_sizes_are_refused_with_the_nearest_that_work(kind, works, sizes):
    for size in sizes:
        with pytest.raises(ValueError, match=rf"image_size = {size}: {kind.__name__} [^\n]*$") as caught:
            make(kind, image_size=size)
        named = {int(n) for n in re.findall(r"(?<![\d×])\d{2,}", str(caught.value).split(":", 1)[1])}
        assert named == {max(n for n in works if n < size), min(n for n in works if n > size)}
    for size in works:
        kind.check_image_size(size)


@pytest.mark.parametrize("kind", [du.StableDCGAN, du.ProgressiveGAN])
def test_a_recipe_of_gray_images_without_labels_refuses_others(kind):
    for name, value in (("channels", 3), ("conditional", True)):
        with pytest.raises(ValueError, match=f"{kind.__name__} needs {name}="):
            make(kind, **{name: value})


# ----------------------------------------------------------------------------------------------- first weights
def assert_normal(values: Tensor, mean: float, std: float) -> None:
    """Hold mean, standard deviation and tails of N(mean, std) within five standard errors."""
    values = values.detach().double().flatten()
    n = len(values)
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(n)
    assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * n)
    beyond = ((values - mean).abs() > 2 * std).double().mean()
    assert abs(beyond - 0.0455) < 5 * math.sqrt(0.0455 / n)  # a uniform distribution has nothing there


@pytest.mark.parametrize("player", ["G", "D"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [(kind, {}) for kind in (*RECIPES, FastCrossEntropy)] + [(du.ConditionalDCGAN, {"conditioning": "concatenation"})],
)
def test_how_weights_begin(kind, fields, player):
    """DCGAN's: N(0, 0.02); He's where no BatchNorm scales; Glorot's in TensorFlow; N(0, 1) where layers scale."""
    network = players(make(kind, ngf=16, ndf=16, nz=64, **fields))[player]
    for layer in layers(network, *CONVS, nn.Linear):
        weight, taps = layer.weight, layer.weight[0, 0].numel()
        assert layer.bias is None or not layer.bias.any()
        if kind is du.StableDCGAN:  # Keras: uniform within √(6 / (fan_in + fan_out))
            bound = math.sqrt(6 / (taps * sum(weight.shape[:2])))
            assert bound * (1 - 25 / weight.numel()) < weight.abs().max() <= bound * (1 + 1e-6)
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=3 / math.sqrt(weight.numel()))
        elif player == "D" and kind in (du.FastDCGAN, du.WGANGP) and isinstance(layer, nn.Conv2d):
            assert_normal(weight, 0, math.sqrt(2 / (1.04 * weight.shape[1] * taps)))  # He et al. 2015, eq. 14
        else:
            assert_normal(weight, 0, 1 if kind is du.ProgressiveGAN else 0.02)
    if norms := layers(network, *NORMS):
        assert not torch.cat([norm.bias for norm in norms]).any()
        scales = torch.cat([norm.weight for norm in norms])
        assert (scales == 1).all() if kind is du.StableDCGAN else not assert_normal(scales, 1, 0.02)
    for embedding in layers(network, nn.Embedding):
        assert_normal(embedding.weight, 0, 1)


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN, du.ProgressiveGAN])
@pytest.mark.parametrize(("gray", "start"), [(100, 100 / 127.5 - 1), (200, 200 / 127.5 - 1), (0, -0.96), (255, 0.96)])
def test_the_output_starts_at_the_datas_most_usual_gray(kind, gray, start):
    """At the median, not at the mean; and within ±0.96: where tanh is flat nothing could be learned."""
    images = torch.full((64, 16, 16), gray, dtype=torch.uint8)
    images[torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) > 0.7] = 7
    gan = make(kind, image_size=16, init_output_bias=True, lr_G=0.0, ema_decay=0.0)
    gan.train(1, data=(images, torch.zeros(64)), callbacks=[])
    outputs = getattr(gan.generator, "to_rgb", layers(gan.generator, *CONVS)[-1:])
    assert len(outputs) == (3 if kind is du.ProgressiveGAN else 1)  # one for every size that it grows to
    for layer in outputs:
        assert layer.bias.tanh().detach().numpy() == pytest.approx(start, abs=1e-3)


@pytest.mark.parametrize(("kind", "norms"), [(du.DCGAN, (2, 1)), (du.StableDCGAN, (3, 0)), (FastCrossEntropy, (2, 2))])
def test_batch_norm_can_be_left_out_of_either_network(kind, norms):
    for with_G, with_D in ((True, True), (False, True), (True, False)):
        gan = make(kind, batch_norm_G=with_G, batch_norm_D=with_D)
        counts = tuple(len(layers(network, *NORMS)) for network in players(gan).values())
        assert counts == (norms[0] * with_G, norms[1] * with_D)
        gan.generate(*inputs(gan, "G", 2))


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_dropout_acts_in_training_and_rests_in_eval_mode(kind):
    gan = make(kind, dropout_D=0.5, dropout_G=0.5)
    for player, network in players(gan).items():
        x = inputs(gan, player, 8)
        assert not torch.equal(network.train()(*x), network(*x))
        assert torch.equal(network.eval()(*x), network(*x))


# ----------------------------------------------------------------------------------------------- labels
def outputs_for_all_labels(kind: type[du.GAN], way: str) -> tuple[nn.Module, Tensor]:
    """Return a D in eval mode and its outputs (K, N, …) for six images, always the same, with all ten labels."""
    gan = make(kind, conditioning=way)
    torch.manual_seed(0)
    x, _ = inputs(gan, "D", 6)
    D = gan.discriminator.eval()
    return D, torch.stack([D(x, torch.full((6,), k)) for k in range(10)])


@pytest.mark.parametrize("kind", LABELED)
def test_projection_and_matching_add_the_logit_of_the_label(kind):
    """From one seed both have the same weights; matching also returns what it adds, which no label changes."""
    (_, matching), (_, projection) = (outputs_for_all_labels(kind, way) for way in ("matching", "projection"))
    assert (matching.shape, projection.shape) == ((10, 6, 11), (10, 6))
    assert torch.equal(matching[:, :, 0], projection)
    assert torch.equal(matching[:, :, 1:], matching[:1, :, 1:].expand(10, -1, -1))
    added = torch.stack([matching[k, :, 1 + k] for k in range(10)])
    assert torch.allclose(projection - added, (projection - added)[:1].expand(10, -1), atol=1e-5)
    assert added.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("kind", LABELED)
def test_concatenation_shows_d_the_label_as_one_more_channel(kind):
    D, outputs = outputs_for_all_labels(kind, "concatenation")
    assert outputs.std(dim=0).min() > 1e-6
    with torch.no_grad():
        layers(D, nn.Conv2d)[0].weight[:, 1] = 0  # blind to that channel
    x, labels = inputs(make(kind), "D", 10)
    assert torch.equal(D(x, labels), D(x, labels.flip(0)))


@pytest.mark.parametrize("kind", LABELED)
@pytest.mark.parametrize("way", WAYS)
def test_every_image_goes_with_its_own_label(kind, way):
    gan, order = make(kind, conditioning=way), torch.randperm(10)
    for player, network in players(gan).items():
        x, labels = inputs(gan, player, 10)
        whole = network.eval()(x, labels)
        assert torch.allclose(network(x[order], labels[order]), whole[order], atol=1e-5)
        assert ((network(x, labels.flip(0)) - whole).abs().max() > 1e-6) == (player == "G" or way != "auxiliary")


@pytest.mark.parametrize("kind", RECIPES)
def test_without_labels_nothing_is_added_and_labels_are_ignored(kind):
    gan = make(kind, **FREE)
    for player, network in players(gan).items():
        (x,) = inputs(gan, player, 3)
        assert not layers(network, nn.Embedding)
        assert torch.equal(network.eval()(x, torch.arange(3)), network(x))


@pytest.mark.parametrize("way", WAYS)
def test_d_learns_to_use_the_label(way):
    """Trained on two flat grays that only the label tells apart, G draws the one that is asked for."""
    images = torch.cat([torch.full((128, 16, 16), 40), torch.full((128, 16, 16), 215)]).to(torch.uint8)
    settings = {"num_classes": 2, "lr_schedule": "constant", "ema_decay": 0.0, "batch_size": 32, "image_size": 16}
    gan = make(ngf=8, ndf=8, conditioning=way, **settings)
    gan.train(6, data=(images, torch.arange(256) // 128), callbacks=[])
    dark, light = (gan.sample(32, seed=0, digits=k).mean().item() for k in (0, 1))
    assert light - dark > 0.8  # the data: 1.37


# ----------------------------------------------------------------------------------------------- PyTorch's own tools
EVERY_NETWORK = pytest.mark.parametrize(("kind", "player"), [(kind, player) for kind in RECIPES for player in "GD"])


def case(kind: type[du.GAN], player: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a network in eval mode, inputs to take it in with, and more of them."""
    gan = make(kind)
    network = players(gan)[player].eval()
    if kind is du.ProgressiveGAN:
        network.grow(0.6)  # 8×8, half faded in
    return network, inputs(gan, player, 4), inputs(gan, player, 7)


@EVERY_NETWORK
@pytest.mark.filterwarnings("ignore")
def test_a_trace_gives_the_same_for_any_number_of_images(kind, player):
    network, few, more = case(kind, player)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, few), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    for x in (few, more):
        assert torch.allclose(loaded(*x), network(*x), atol=1e-6)


@pytest.mark.parametrize("player", ["G", "D"])
@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind is not du.ProgressiveGAN])
def test_an_exported_program_gives_the_same_for_any_number_of_images(kind, player):
    """But for ProgressiveGAN: it reads from a buffer how far it has grown."""
    network, few, more = case(kind, player)
    batch = {0: torch.export.Dim("n", min=2)}
    exported = torch.export.export(network, few, dynamic_shapes=(batch,) * len(few)).module()
    for x in (few, more):
        assert torch.allclose(exported(*x), network(*x), atol=1e-6)


@EVERY_NETWORK
def test_functional_gradients_are_those_of_autograd(kind, player):
    network, x, _ = case(kind, player)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    gradients = torch.func.grad(lambda w: torch.func.functional_call(network, w, x).square().sum())(weights)
    network(*x).square().sum().backward()
    for name, p in network.named_parameters():
        assert torch.allclose(gradients[name], torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- ProgressiveGAN
def test_the_layers_of_progressive_gans_in_closed_form():
    for kernel_size, gain in ((3, math.sqrt(2)), (1, 1.0)):
        layer, x = du.EqualizedConv2d(32, 64, kernel_size=kernel_size, gain=gain), torch.randn(8, 32, 9, 9)
        scaled = layer.weight * gain / math.sqrt(32 * kernel_size**2)  # He's constant
        assert torch.allclose(layer(x), F.conv2d(x, scaled, padding=kernel_size // 2), atol=1e-5)
    out = du.PixelNorm()(torch.tensor([[3.0, 4.0], [0.5, 0.0]])[:, :, None, None]).flatten(1)
    assert out.tolist() == [pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5], abs=1e-4), pytest.approx([2**0.5, 0])]
    alike = torch.full((6, 2, 4, 4), 0.7)
    for batch, std in ((alike, 1e-4), (torch.cat([alike - 2, alike + 2]), 2.0)):
        out = du.MinibatchStdDev()(batch)
        assert torch.equal(out[:, :2], batch)
        assert torch.allclose(out[:, 2:], torch.full((len(batch), 1, 4, 4), std), rtol=1e-3)


def growing(grown: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Return a small generator and discriminator for 32×32, grown so far."""
    gan = make(du.ProgressiveGAN, image_size=32)
    for network in players(gan).values():
        network.grown.fill_(grown)
    return gan.generator, gan.discriminator


@pytest.mark.parametrize("stage", range(4))
def test_an_image_has_the_detail_of_the_size_it_has_grown_to(stage):
    generator, discriminator = growing(stage)
    images, block = generator(torch.randn(5, 8)), 8 >> stage

    def at(images: Tensor, block: int) -> Tensor:
        return F.interpolate(F.avg_pool2d(images, block), scale_factor=block)

    assert torch.allclose(at(images, block), images, atol=1e-6)
    assert not stage or (at(images, 2 * block) - images).abs().max() > 1e-3  # and not that of the size before
    noise = 0.1 * torch.randn_like(images)
    assert torch.allclose(discriminator(images + noise - at(noise, block)), discriminator(images), atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_new_size_fades_in_without_a_jump(stage):
    z, images, scores = torch.randn(5, 8), {}, {}
    for share in (0, 1e-4, 0.5, 1):
        generator, discriminator = growing(stage + share)  # each time the same weights
        images[share] = generator(z)
        scores[share] = discriminator(images[share])
    assert all(torch.allclose(of[0], of[1e-4], atol=1e-2) for of in (images, scores))
    assert torch.allclose(images[0.5].atanh(), (images[0].atanh() + images[1].atanh()) / 2, atol=1e-3)
    (_, discriminator), seen = growing(stage + 0.5), []  # D sees the new detail fade in, in real images too
    discriminator.from_rgb[stage + 1].register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0]))
    discriminator(images[1])
    fine = F.avg_pool2d(images[1], 4 >> stage)
    assert torch.allclose(seen[0], (fine + F.interpolate(F.avg_pool2d(fine, 2), scale_factor=2)) / 2, atol=1e-6)


def test_sizes_share_the_time_alike_and_fade_in_for_half_of_it():
    (generator, _), seen = growing(), []
    for step in range(1001):
        generator.grow(step / 1000)
        seen.append(float(generator.grown))
    assert [seen[n] for n in (0, 250, 376, 499, 500, 750, 876, 1000)] == [0, 0, 1, 1, 1, 2, 3, 3]
    assert seen[312] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("growth", [1.0, 0.5, 0.0])
def test_training_grows_all_networks_for_the_share_that_the_config_says(growth, mnist_small):
    settings = {"num_epochs": 2, "ema_decay": 0.9, "precision": "bf16" if growth == 1 else "fp32"}
    gan, grown = make(du.ProgressiveGAN, growth=growth, **settings), []
    watch = du.Callback()
    watch.on_batch_end = lambda gan: grown.append([float(n.grown) for n in (*players(gan).values(), gan.average)])
    gan.train(data=mnist_small[0][:480], callbacks=[watch])
    full = grown.index([2, 2, 2]) / 60
    assert all(len(set(each)) == 1 for each in grown)
    assert full == pytest.approx(growth * 5 / 6, abs=0.02)  # the last of three sizes is in after half its time
    assert not growth or grown[0] == [0, 0, 0]
    gan.train(1, data=mnist_small[0][:32], callbacks=[watch])  # a run that is made longer does not shrink
    assert grown[60:] == [[2, 2, 2]] * 2
