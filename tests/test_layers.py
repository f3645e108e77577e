"""Layers of our own: convolutions by Winograd and by patches, dropout by 16-bit numbers, and memory that is kept."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import make
from torch import nn

import dcgan_utils as du

LAST = torch.channels_last
RELATIVE = 1e-5  # of float32, where sums run in another order


def random(*shape, seed=0, dtype=torch.float32):
    """Return normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def library(monkeypatch):
    """Note which of the library's convolutions are asked."""
    asked = []
    for place, name in ((nn.Conv2d, "forward"), (nn.ConvTranspose2d, "forward"), (du, "convolve"), (du, "transpose")):
        theirs = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *x, theirs=theirs, name=name: (asked.append(name), theirs(*x))[1])
    return asked


# ----------------------------------------------------------------------------------------------- windows and their sum
MATRICES = {
    "identity": du.identity(3),
    "one row": ((0.0, 2.0),),
    "pixels": du.MINIMAL[0],
    "taps": du.MINIMAL[1],
    "three of two, with halves": ((1, 0.5), (-1, 0), (0, 0.25)),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_windows_are_mixed_as_the_matrix_says(name, step, dim):
    matrix = torch.tensor(MATRICES[name], dtype=torch.float32)
    shape = [3, 4, 2]
    shape[dim] = 3 * step + matrix.shape[1]
    x = random(*shape)
    mixed = du.windows(x, MATRICES[name], dim, step)
    expected = torch.einsum("pr,...r->p...", matrix, x.unfold(dim, matrix.shape[1], step))
    assert mixed.shape == expected.shape
    assert mixed.shape[1 + dim] == 4  # windows
    assert torch.allclose(mixed, expected, atol=1e-6)
    back, other = du.window_sum(random(*mixed.shape, seed=1), MATRICES[name], dim, step), random(*shape, seed=2)
    assert back.shape == x.shape
    one = (du.windows(other, MATRICES[name], dim, step) * random(*mixed.shape, seed=1)).sum()
    assert one.item() == pytest.approx((other * back).sum().item(), rel=1e-4)  # each is the other's transpose


def test_what_no_window_reaches_is_nothing():
    """Memory that was another tensor's does not shine through."""
    mixed = torch.full((2, 1, 3), float("nan"))
    mixed[:, :, :2] = 1
    assert du.window_sum(mixed[:, :, :2], du.identity(2), 1, 1).tolist() == [[1, 2, 1]]
    total = du.window_sum(torch.ones(3, 1, 2), ((1, 0, 0), (0, 1, 0), (0, 0, 0)), 1, 2)
    assert total.tolist() == [[1, 1, 1, 1, 0]]


def test_the_minimal_filter_is_that_of_the_paper():
    """Two results of two taps by three products, for any pixels and taps (Lavin & Gray 2016, eq. 5, for two taps)."""
    pixels, taps, results = (torch.tensor(matrix) for matrix in du.MINIMAL)
    assert pixels.shape == (3, 3)
    d, g = random(3, dtype=torch.float64), random(2, seed=1, dtype=torch.float64)
    found = results.double().T @ ((pixels.double() @ d) * (taps.double() @ g))
    assert torch.allclose(found, d.unfold(0, 2, 1) @ g)


# ----------------------------------------------------------------------------------------------- the convolutions
def halving(x, weight, bias=None):
    """Return what the library makes of a convolution that halves the side."""
    return F.conv2d(x, weight, bias, stride=2, padding=(weight.shape[-1] - 1) // 2)


def doubling(x, weight, bias=None):
    """Return what the library makes of a transposed convolution that doubles the side."""
    before = (weight.shape[-1] - 1) // 2
    full = F.conv_transpose2d(x, weight, bias, stride=2)
    return full[:, :, before : before + 2 * x.shape[2], before : before + 2 * x.shape[3]]


LAYERS = {"halve": (du.Halving, halving), "double": (du.Doubling, doubling)}
MIXED = du.Ways("patches", "winograd", "patches")
SMALL = du.Ways("patches", "library", "patches")


def compare(layer, theirs, x):
    """Hold a layer against the library's: value, gradients, and the gradient of a gradient, as a penalty takes it."""
    found = []
    for function in (layer, lambda x: theirs(x, layer.weight, layer.bias)):
        out = function(x)
        slopes = torch.autograd.grad(out.square().sum(), (x, *layer.parameters()), create_graph=True)
        again = torch.autograd.grad(slopes[0].square().sum() + slopes[1].square().sum(), (x, layer.weight))
        found.append((out, *slopes, *again))
    for mine, other in zip(*found, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() < RELATIVE * other.norm()
    return found[0][0]


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (8, 8)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "first", "second", "k", "ways"),
    [
        ("halve", 13, 12, 4, du.WINOGRAD), ("double", 12, 13, 4, du.WINOGRAD), ("halve", 12, 20, 4, MIXED),
        ("double", 20, 12, 4, MIXED), ("halve", 12, 20, 4, SMALL), ("double", 20, 12, 4, SMALL),
        ("halve", 12, 20, 5, SMALL), ("double", 20, 12, 5, SMALL), ("halve", 1, 3, 4, du.PATCHES),
        ("halve", 1, 3, 5, du.PATCHES), ("double", 3, 1, 4, du.PATCHES), ("double", 3, 1, 5, du.PATCHES),
        ("double", 1, 1, 5, du.PATCHES),
    ],
)  # fmt: skip
def test_every_way_is_the_librarys_convolution(
    name, first, second, k, ways, bias, size, weights_last, library, monkeypatch
):
    make_layer, theirs = LAYERS[name]
    torch.manual_seed(0)
    layer = make_layer(first, second, kernel_size=k, bias=bias)
    if weights_last:
        layer = layer.to(memory_format=LAST)
    x = random(2, first, *size).contiguous(memory_format=LAST).requires_grad_()
    monkeypatch.setattr(du, "quickest_ways", lambda *_: ways)
    out = compare(layer, theirs, x)
    assert not library
    assert out.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("layer", [du.Halving, du.Doubling])
def test_patches_are_cut_once_for_two_passes(layer, monkeypatch):
    """There and back to the weights for a convolution, back to both for its transpose."""
    cuts, cut = [], du.patches
    monkeypatch.setattr(du, "patches", lambda *x: (cuts.append(x), cut(*x))[1])
    monkeypatch.setattr(du, "quickest_ways", lambda *_: SMALL)
    layer = layer(3, 2)
    with torch.no_grad():
        layer(random(2, 3, 4, 4))
    unasked = len(cuts)
    layer(random(2, 3, 4, 4).requires_grad_()).sum().backward()
    assert (unasked, len(cuts) - unasked) == (1 if isinstance(layer, du.Halving) else 0, 1)


@pytest.mark.parametrize("task", du.PASSES)
@pytest.mark.parametrize(("a", "b", "ways"), [(3, 2, du.WINOGRAD), (3, 2, SMALL), (3, 1, du.PATCHES)])
def test_the_three_passes_are_one_anothers_derivatives(task, a, b, ways, monkeypatch):
    last = partial(torch.Tensor.contiguous, memory_format=LAST)
    x, y, weight = (random(*shape, seed=i, dtype=torch.float64) for i, shape in
                    enumerate(((2, b, 4, 6), (2, a, 2, 3), (a, b, 4, 4))))  # fmt: skip
    pair = {"convolve": (x, weight), "transpose": (y, weight), "slope": (y, x)}[task]
    pair = [last(tensor).requires_grad_() for tensor in pair]
    assert torch.autograd.gradcheck(lambda *pair: du.Pass.apply(task, *pair, None, 4, 2, ways), pair)
    assert torch.autograd.gradgradcheck(lambda *pair: du.Pass.apply(task, *pair, None, 4, 2, ways), pair)
    asked = []
    for name, functions in du.PASSES.items():
        for way, function in functions.items():
            noted = lambda *x, name=name, function=function: (asked.append(name), function(*x))[1]  # noqa: E731
            monkeypatch.setitem(functions, way, noted)
    for frozen in (0, 1):  # and what nobody asks for is not made
        given = [tensor.detach().requires_grad_(i != frozen) for i, tensor in enumerate(pair)]
        made = du.Pass.apply(task, *given, None, 4, 2, ways)
        asked.clear()
        made.sum().backward()
        assert len(asked) == 1
        assert given[frozen].grad is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_grey_map_of_many_is_the_librarys_convolution(k, bias, mirrored, library):
    torch.manual_seed(0)
    layer = du.Greying(6, kernel_size=k, bias=bias, mirrored=mirrored)
    x = random(2, 6, 5, 8).contiguous(memory_format=LAST).requires_grad_()

    def theirs(x, weight, bias):
        return F.conv2d(x, weight.flip(2, 3) if mirrored else weight, bias, padding=k // 2)

    compare(layer, theirs, x)
    assert not library
    compare(layer, theirs, x.detach().contiguous().requires_grad_())
    assert set(library) == {"convolve"}


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_an_odd_number_of_results_is_made_whole(name, side, library, monkeypatch):
    """Winograd's come in pairs: 7×7 is the small side of the 28×28 recipes."""
    make_layer, theirs = LAYERS[name]
    torch.manual_seed(0)
    layer = make_layer(3, 2, kernel_size=4)
    shape = (2 * side, 2 * side + 4) if name == "halve" else (side, side + 2)
    x = random(2, 3, *shape).contiguous(memory_format=LAST).requires_grad_()
    monkeypatch.setattr(du, "quickest_ways", lambda *_: du.WINOGRAD)
    out = compare(layer, theirs, x)
    assert not library
    assert out.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("halve", (63, 256), "last"), ("halve", (256, 63), "last"), ("halve", (256, 256), "plain"),
        ("halve", (3, 256), "last"), ("double", (63, 256), "last"), ("double", (256, 63), "last"),
        ("double", (256, 256), "plain"), ("halve", (256, 256), "odd"), ("double", (60, 3), "bias"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("k", [4, 5])
def test_other_layers_take_the_librarys_path(name, shape, kind, k, library):
    make_layer, theirs = LAYERS[name]
    layer = make_layer(*shape, kernel_size=k, bias=kind == "bias")
    x = random(2, shape[0], *((5, 5) if kind == "odd" else (4, 4)))
    x = x if kind == "plain" else x.contiguous(memory_format=LAST)
    out = layer(x)
    out.sum().backward()
    assert library == ["convolve" if name == "halve" else "transpose"]
    assert torch.allclose(out, theirs(x, layer.weight, layer.bias), atol=1e-5)
    assert kind == "plain" or out.is_contiguous(memory_format=LAST)


def test_each_machine_takes_the_ways_that_are_quick_there(monkeypatch):
    def ways(a, b, k, side, dtype=torch.float32, device="cpu", large=True):
        shape = (2, b, 2 * side, 2 * side) if large else (2, a, side, side)
        x = torch.empty(shape, device=device, dtype=dtype).contiguous(memory_format=LAST)
        return du.quickest_ways(x, torch.empty(a, b, k, k, device=device))

    half = torch.bfloat16
    for amx in (False, True):
        monkeypatch.setattr(du, "has_amx", lambda amx=amx: amx)
        for large in (False, True):
            assert ways(256, 128, 4, 8, device="meta", large=large) == du.LIBRARY  # a GPU's are the library's
            assert ways(64, 1, 4, 32, device="meta", large=large) == du.LIBRARY
            assert ways(64, 1, 4, 32, half, large=large) == ways(64, 1, 5, 14, large=large) == du.PATCHES
            assert ways(256, 128, 4, 8, large=large) == ways(512, 256, 4, 4, large=large) == du.WINOGRAD  # float32
            assert ways(128, 64, 4, 16, large=large) == ways(256, 128, 5, 7, large=large) == du.LIBRARY
            assert ways(128, 64, 4, 16, half, large=large) == du.LIBRARY
            wide = du.Ways("patches", "winograd", "winograd")
            assert ways(512, 256, 4, 4, half, large=large) == (wide if amx else du.WINOGRAD)
            assert ways(256, 128, 4, 8, half, large=large) == (SMALL if amx else du.WINOGRAD)
            assert ways(256, 128, 5, 7, half, large=large) == (SMALL if amx else du.LIBRARY)
            assert ways(128, 64, 5, 7, half, large=large) == du.LIBRARY
            assert ways(128, 64, 5, 14, half, large=large) == du.LIBRARY
            assert ways(128, 32, 4, 7, half, large=large) == du.LIBRARY


def test_amx_is_what_the_cpu_says(monkeypatch):
    found = du.has_amx
    for said, amx in (({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda said=said: said, raising=False)
        found.cache_clear()
        assert found() is amx
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    found.cache_clear()
    assert found() is False  # a torch that cannot tell
    found.cache_clear()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize("width", [256, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_computes_them_in_half_precision(name, width, k, amx, library, monkeypatch):
    make_layer, theirs = LAYERS[name]
    torch.manual_seed(0)
    monkeypatch.setattr(du, "has_amx", lambda: amx)
    layer = make_layer(width, width, kernel_size=k)
    x = random(2, width, 8, 8).contiguous(memory_format=LAST)
    exact = theirs(x, layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = layer(x.bfloat16()), theirs(x, layer.weight)
        with torch.autocast("cpu", enabled=False):  # as the slope of D is measured
            whole = layer(x)
    assert mine.dtype == other.dtype == torch.bfloat16
    assert whole.dtype == torch.float32
    assert (whole - exact).norm() < RELATIVE * exact.norm()
    assert (mine.float() - exact).norm() < 0.012 * exact.norm()  # 8 bits, rounded before the products and after
    assert (mine.float() - exact).norm() < 3.5 * (other.float() - exact).norm()
    mine.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("stride", [1, 2])
def test_grey_images_are_added_up_in_full_precision(stride):
    """Of up to k² values, whose sum would lose bits in half precision: twice the library's error and more."""
    weight, x = random(64, 1, 5, 5).bfloat16(), random(2, 64, 8, 8, seed=1).bfloat16().contiguous(memory_format=LAST)
    theirs = doubling if stride == 2 else partial(F.conv_transpose2d, padding=2)
    exact = theirs(x.double(), weight.double())
    mine, other = du.transpose_by_patches(x, weight, 5, stride), theirs(x, weight)
    assert mine.dtype == torch.bfloat16
    assert (mine.double() - exact).norm() < 1.75 * (other.double() - exact).norm()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN])
def test_slopes_lie_in_memory_as_their_weights_do(kind, precision, amx, monkeypatch):
    """DistributedDataParallel warns of others, and copies them."""
    monkeypatch.setattr(du, "has_amx", lambda: amx)
    gan = kind(device="cpu", precision=precision)
    with gan.autocast():
        gan.discriminator(gan.generator(random(2, 100))).sum().backward()
    for network in (gan.generator, gan.discriminator):
        weights = [weight for weight in network.parameters() if weight.ndim == 4]
        assert [weight.grad.stride() for weight in weights] == [weight.stride() for weight in weights]


@pytest.mark.parametrize("ways", [du.WINOGRAD, MIXED, SMALL])
@pytest.mark.parametrize("name", LAYERS)
def test_no_images_give_no_images(name, ways, monkeypatch):
    layer = LAYERS[name][0](128, 130)
    monkeypatch.setattr(du, "quickest_ways", lambda *_: ways)
    x = torch.empty(0, 128, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert out.shape == (0, 130, *((2, 2) if name == "halve" else (8, 8)))
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("amx", [False, True])
def test_the_layers_of_the_public_recipes_go_the_quick_ways(amx, monkeypatch):
    """256 ↔ 512 and 128 ↔ 256 of the 64×64 networks their own; and all do what the library does."""
    chosen, choose = [], du.quickest_ways
    monkeypatch.setattr(du, "has_amx", lambda: amx)

    def noted(x, weight):
        chosen.append((tuple(weight.shape[:2]), choose(x, weight)))
        return chosen[-1][1]

    gan, found = du.DCGAN(device="cpu", precision="fp32"), []
    z, real = random(2, 100), random(2, 1, 64, 64, seed=1).contiguous(memory_format=LAST)
    for function in (noted, lambda x, weight: du.LIBRARY):
        monkeypatch.setattr(du, "quickest_ways", function)
        images = gan.generator.train()(z)
        found.append((images, gan.discriminator.train()(images), gan.discriminator(real)))
        slopes = du.slopes(gan.discriminator, real, None)
        found[-1] += (slopes, *torch.autograd.grad(slopes.sum(), gan.discriminator.layers[8].weight))
    assert gan.discriminator.layers[8].weight.shape == (512, 256, 4, 4)
    wide, middle, narrow = ((512, 256), du.WINOGRAD), ((256, 128), du.WINOGRAD), ((128, 64), du.LIBRARY)
    grey = ((64, 1), du.PATCHES)
    assert chosen == [wide, middle, narrow, grey, *[grey, narrow, middle, wide] * 3]  # G's; D's, three times
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() < 1e-3 * other.norm()
    monkeypatch.setattr(du, "quickest_ways", noted)
    taken = {}
    for kind in (du.DCGAN, du.StableDCGAN):
        chosen.clear()
        gan = kind(device="cpu", precision="bf16")
        with gan.autocast():
            gan.discriminator(gan.generator(z))
        taken[kind] = [ways for _, ways in chosen if ways not in (du.LIBRARY, du.PATCHES)]
    widest = du.Ways("patches", "winograd", "winograd")
    assert taken[du.DCGAN] == ([widest, SMALL, SMALL, widest] if amx else [du.WINOGRAD] * 4)
    assert taken[du.StableDCGAN] == ([SMALL] if amx else [])


@pytest.mark.parametrize("batch_norm_G", [True, False])
@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_no_activation_overwrites_a_view(kind, batch_norm_G):
    """Autograd then copies whole maps into another layout."""
    gan, seen = make(kind, batch_norm_G=batch_norm_G, ngf=32), []

    def note(node):
        """Walk through the graph that leads to a loss."""
        nodes, known = [node], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in known:
                known.add(node)
                seen.append(type(node).__name__)
                nodes += [parent for parent, _ in node.next_functions]

    z, labels = random(4, gan.config.nz), torch.arange(4)
    fake = gan.generator.train()(z, labels)
    note(gan.discriminator.train()(fake.contiguous(memory_format=LAST), labels).sum().grad_fn)
    assert "PassBackward" in seen
    assert not [name for name in seen if "CopySlices" in name or "AsStrided" in name]


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize(("kind", "theirs", "side"), [
    (du.FromPoint, F.conv_transpose2d, 1), (du.FromPoint, F.conv_transpose2d, 2),
    (du.ToPoint, F.conv2d, 4), (du.ToPoint, F.conv2d, 6),
])  # fmt: skip
def test_a_point_and_its_map_are_one_matrix_product(kind, theirs, side, weights_last, library):
    torch.manual_seed(0)
    layer = kind(6, 5, kernel_size=4, bias=False)
    layer = layer.to(memory_format=LAST) if weights_last else layer
    x = random(3, 6, side, side).contiguous(memory_format=LAST).requires_grad_()
    found = []
    for out in (layer(x), theirs(x, layer.weight)):
        slopes = torch.autograd.grad(out.square().sum(), (x, layer.weight), create_graph=True)
        found.append((out, *slopes, *torch.autograd.grad(slopes[0].square().sum(), layer.weight)))
    for mine, other in zip(*found, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() < RELATIVE * other.norm()
    assert bool(library) == (side in (2, 6))


# ----------------------------------------------------------------------------------------------- dropout
def kept_of(p):
    """Return how many of 65,536 draws keep a value."""
    return round((1 - p) * 65536)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.95])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    n = 2**20
    torch.manual_seed(0)
    out = du.FastDropout(p)(torch.ones(n))
    zeros = (out == 0).double().mean().item()
    assert zeros == pytest.approx(p, abs=1e-5 + 5 * math.sqrt(p * (1 - p) / n))
    (scale,) = out[out != 0].unique().tolist()
    assert scale == pytest.approx(65536 / kept_of(p), rel=1e-7)  # what is exactly kept on the average
    assert scale == pytest.approx(1 / (1 - p), rel=2e-4)
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))


def test_dropout_draws_every_value_on_its_own():
    """Two 16-bit numbers share a random word, and neighbours a row: none of them may go together."""
    torch.manual_seed(0)
    dropped = (du.FastDropout(0.5)(torch.ones(1024, 1024)) == 0).double() - 0.5
    for shift in (1, 2, 3, 1024):
        flat = dropped.flatten()
        together = (flat[:-shift] * flat[shift:]).mean().item() / 0.25
        assert abs(together) < 5 / 1024
    for sums in (dropped.sum(dim=0), dropped.sum(dim=1)):
        assert sums.std().item() == pytest.approx(0.5 * 32, rel=0.12)  # of 1024 coins each


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 5, 7), (1, 1), (2, 3, 4)])
def test_dropout_takes_every_shape(shape):
    x = random(*shape)
    torch.manual_seed(0)
    out = du.FastDropout(0.5)(x)
    assert out.shape == x.shape
    assert ((out == 0) | torch.isclose(out, 2 * x)).all()


def test_dropout_rests_in_eval_mode_and_at_zero():
    x = random(4, 3, 5, 5)
    state = torch.get_rng_state()
    assert torch.equal(du.FastDropout(0.7).eval()(x), x)
    assert torch.equal(du.FastDropout(0.0).train()(x), x)
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing
    assert isinstance(du.FastDropout(0.7), nn.Dropout)


@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_layout_and_type(memory, dtype):
    x = random(4, 6, 8, 8, dtype=torch.float64).to(dtype).contiguous(memory_format=memory)
    torch.manual_seed(0)
    out = du.FastDropout(0.3)(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory)
    assert out.stride() == x.stride()
    share = (out == 0).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / x.numel()))
    assert (out == 0).flatten(2).any(dim=2).all()  # in every map of every image
    kept = out != 0
    assert torch.allclose(out[kept], x[kept] * torch.tensor(65536 / kept_of(0.3), dtype=dtype))


def test_dropout_follows_torchs_seed():
    x, drop = torch.ones(64, 64), du.FastDropout(0.5)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert torch.equal(drop(x), second)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert not torch.equal(drop(x), first)


def test_the_gradient_passes_where_the_value_does():
    x = random(64, 8).requires_grad_()
    torch.manual_seed(0)
    out = du.FastDropout(0.5)(x)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(slope, torch.where(out == 0, 0.0, 2.0))
    assert torch.autograd.gradcheck(
        lambda x: (torch.manual_seed(0), du.FastDropout(0.3)(x))[1], random(3, 4, dtype=torch.float64).requires_grad_()
    )


def test_elsewhere_than_on_a_cpu_dropout_is_torchs(monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: asked.append(x.device.type) or x)
    du.FastDropout(0.5)(torch.empty(3, device="meta"))
    du.FastDropout(0.5)(torch.empty(3))
    assert asked == ["meta"]


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_the_recipes_drop_by_it(kind):
    gan = make(kind, dropout_D=0.3, dropout_G=0.0)
    drops = [module for module in gan.discriminator.modules() if isinstance(module, nn.Dropout)]
    assert len(drops) >= 2
    assert {type(drop) for drop in drops} == {du.FastDropout}
    assert {drop.p for drop in drops} == {0.3}


# ----------------------------------------------------------------------------------------------- memory
def libc(monkeypatch, mallopt):
    """Let the C library have such a mallopt, or none."""
    monkeypatch.setattr(du.sys, "platform", "linux")
    library = SimpleNamespace(mallopt=mallopt) if mallopt else SimpleNamespace()
    monkeypatch.setattr(du.ctypes, "CDLL", lambda name: library)


def test_memory_is_kept_here_or_it_says_that_it_is_not():
    assert du.keep_memory() in (True, False)
    assert isinstance(du.keep_memory(), bool)
    assert du.keep_memory() == du.keep_memory()  # twice does no harm


@pytest.mark.parametrize("platform", ["darwin", "win32", "emscripten"])
def test_elsewhere_memory_is_left_alone(platform, monkeypatch):
    monkeypatch.setattr(du.sys, "platform", platform)
    monkeypatch.setattr(du.ctypes, "CDLL", lambda name: pytest.fail("no library is looked for"))
    assert du.keep_memory() is False


def test_memory_is_kept_by_three_settings_of_malloc(monkeypatch):
    settings = {}
    libc(monkeypatch, lambda name, value: settings.update({name: value}) or 1)
    assert du.keep_memory() is True
    # <malloc.h>: M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3, M_MMAP_MAX -4
    assert settings == {-1: 2**31 - 1, -3: 2**31 - 1, -4: 0}


def test_a_setting_that_is_refused_is_told(monkeypatch):
    libc(monkeypatch, lambda name, value: 0 if name == -3 else 1)
    assert du.keep_memory() is False


def test_a_c_library_without_malloc_settings_is_left_alone(monkeypatch):
    libc(monkeypatch, None)  # musl
    assert du.keep_memory() is False


def test_only_the_command_line_keeps_memory_unasked(monkeypatch, tmp_path, mnist_small, capsys):
    calls = []
    monkeypatch.setattr(du, "keep_memory", lambda: calls.append("asked"))
    make().train(1, data=mnist_small, callbacks=[])
    assert not calls
    command = ["sample", "--checkpoint", str(tmp_path / "nowhere"), "--out", str(tmp_path / "s.npz")]
    assert du.main(command) != 0
    assert calls == ["asked"]
