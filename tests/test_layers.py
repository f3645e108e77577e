"""Layers of our own: convolutions as one product of patches, dropout by 16-bit numbers, and memory that is kept."""

import math
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
    """Note which of the library's convolutions are asked, and which slopes of weights are products of patches."""
    asked = []
    for place, name in ((nn.Conv2d, "forward"), (nn.ConvTranspose2d, "forward"), (du, "halve"), (du, "double")):
        theirs = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *x, theirs=theirs, name=name: (asked.append(name), theirs(*x))[1])
    slope = du.weight_slope
    monkeypatch.setattr(du, "weight_slope", lambda *x: (asked.append("slope"), slope(*x))[1])
    return asked


# ----------------------------------------------------------------------------------------------- patches and their sum
@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize(("height", "width", "channels"), [(4, 4, 1), (2, 2, 3), (8, 6, 5)])
def test_patches_are_what_a_convolution_sees(height, width, channels, k):
    x = random(3, height, width, channels)
    patches = du.Patches.apply(x, k)
    assert patches.shape == (3, height // 2, width // 2, k, k, channels)
    padded = F.pad(x.permute(0, 3, 1, 2), (1, k - 3, 1, k - 3))
    theirs = F.unfold(padded, kernel_size=k, stride=2)  # (N, C · k², L)
    theirs = theirs.view(3, channels, k, k, height // 2, width // 2).permute(0, 4, 5, 2, 3, 1)
    assert torch.equal(patches, theirs)
    assert patches.is_contiguous()


@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize(("height", "width", "channels"), [(4, 4, 1), (2, 2, 3), (8, 6, 5)])
def test_the_sum_of_patches_is_what_they_overlap_in(height, width, channels, k):
    patches = random(3, height // 2, width // 2, k, k, channels)
    total = du.PatchSum.apply(patches)
    assert total.shape == (3, height, width, channels)
    columns = patches.permute(0, 5, 3, 4, 1, 2).reshape(3, channels * k**2, -1)
    theirs = F.fold(columns, (height + k - 2, width + k - 2), kernel_size=k, stride=2)
    theirs = theirs[:, :, 1 : 1 + height, 1 : 1 + width].permute(0, 2, 3, 1)
    assert torch.allclose(total, theirs, atol=1e-5)
    x = random(3, height, width, channels, seed=1)  # each is the other's transpose
    one, other = (du.Patches.apply(x, k) * patches).sum(), (x * total).sum()
    assert one.item() == pytest.approx(other.item(), rel=1e-4)


@pytest.mark.parametrize("k", [4, 5])
def test_patches_have_their_first_and_second_derivatives(k):
    x = random(1, 2, 4, 2, dtype=torch.float64).requires_grad_()
    patches = random(1, 1, 2, k, k, 2, dtype=torch.float64).requires_grad_()
    for function, values in ((du.Patches.apply, (x, k)), (du.PatchSum.apply, (patches,))):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def test_the_sum_is_rounded_once():
    patches = random(4, 3, 3, 4, 4, 2).bfloat16()
    total = du.PatchSum.apply(patches)
    assert total.dtype == torch.bfloat16
    assert torch.equal(total, du.PatchSum.apply(patches.float()).bfloat16())
    assert du.PatchSum.apply(patches.double()).dtype == torch.float64


# ----------------------------------------------------------------------------------------------- the convolutions
def halving(x, weight, bias=None):
    """Return what the library makes of a convolution that halves the side."""
    after = weight.shape[-1] - 3
    return F.conv2d(F.pad(x, (1, after, 1, after)), weight, bias, stride=2)


def doubling(x, weight, bias=None):
    """Return what the library makes of a transposed convolution that doubles the side."""
    full = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return full[:, :, : 2 * x.shape[2], : 2 * x.shape[3]]


LAYERS = {"halve": (du.Halving, halving), "double": (du.Doubling, doubling)}
OTHER = {"halve": "double", "double": "halve"}


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (8, 8)])
@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize(
    ("name", "first", "second", "way"),
    [
        ("halve", 256, 256, "product"), ("halve", 288, 256, "product"), ("halve", 256, 320, "product"),
        ("halve", 1, 3, "product"), ("double", 256, 256, "product"), ("double", 288, 256, "product"),
        ("double", 256, 320, "product"), ("double", 3, 1, "product"),
        ("halve", 100, 100, "slope"), ("halve", 120, 300, "slope"), ("double", 100, 130, "slope"),
        ("double", 256, 120, "slope"),
    ],
)  # fmt: skip
def test_wide_and_grey_layers_are_the_librarys_convolution(name, first, second, way, k, size, weights_last, library):
    """Value, both gradients, and the gradient of a gradient, as a penalty on D's slope takes it."""
    make_layer, theirs = LAYERS[name]
    torch.manual_seed(0)
    layer = make_layer(first, second, kernel_size=k, bias=name == "halve")
    if weights_last:
        layer = layer.to(memory_format=LAST)
    x = random(2, first, *size).contiguous(memory_format=LAST).requires_grad_()
    found = []
    for function in (layer, lambda x: theirs(x, layer.weight, layer.bias)):
        out = function(x)
        slopes = torch.autograd.grad(out.square().sum(), (x, *layer.parameters()), create_graph=True)
        again = torch.autograd.grad(slopes[0].square().sum(), layer.weight)
        found.append((out, *slopes, *again))
    for mine, other in zip(*found, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() < RELATIVE * other.norm()
    assert library[:3] == ([] if way == "product" else [name, OTHER[name], "slope"])  # value, slopes of x, of weights
    assert found[0][0].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("halve", (63, 256), "last"), ("halve", (256, 63), "last"), ("halve", (256, 256), "plain"),
        ("halve", (3, 256), "last"), ("double", (63, 256), "last"), ("double", (256, 63), "last"),
        ("double", (256, 256), "plain"), ("double", (256, 256), "bias"), ("halve", (256, 256), "odd"),
        ("double", (128, 128), "bias"), ("halve", (128, 128), "odd"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("k", [4, 5])
def test_other_layers_take_the_librarys_path(name, shape, kind, k, library):
    make_layer, theirs = LAYERS[name]
    if kind == "odd" and k == 5:
        pytest.skip("what TensorFlow pads there depends on the side")
    layer = make_layer(*shape, kernel_size=k, bias=kind == "bias")
    x = random(2, shape[0], *((5, 5) if kind == "odd" else (4, 4)))
    x = x if kind == "plain" else x.contiguous(memory_format=LAST)
    out = layer(x)
    out.sum().backward()
    assert library == [name]
    assert torch.allclose(out, theirs(x, layer.weight, layer.bias), atol=1e-6)
    assert k == 4 or kind == "plain" or out.is_contiguous(memory_format=LAST)


def test_a_gpus_layers_are_the_librarys():
    ways = []
    for device in ("meta", "cpu"):
        for width in (256, 128, 1, 64):
            x, weight = torch.empty(2, width, 4, 4, device=device), torch.empty(256, width, 4, 4, device=device)
            ways.append(du.quickest_way(x.contiguous(memory_format=LAST), weight))
    assert ways == ["library"] * 4 + ["product", "slope", "product", "library"]


@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize("width", [256, 100, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_computes_them_in_half_precision(name, width, k, library):
    make_layer, theirs = LAYERS[name]
    torch.manual_seed(0)
    layer = make_layer(width, width, kernel_size=k)
    x = random(2, width, 8, 8).contiguous(memory_format=LAST)
    exact = theirs(x, layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = layer(x), theirs(x, layer.weight)
        with torch.autocast("cpu", enabled=False):  # as the slope of D is measured
            whole = layer(x)
    assert library == ([] if width == 256 else [name, name])
    assert mine.dtype == other.dtype == torch.bfloat16
    assert whole.dtype == torch.float32
    assert (whole - exact).norm() < RELATIVE * exact.norm()
    assert (mine.float() - other.float()).norm() < 0.005 * exact.norm()  # two roundings to 8 bits
    assert (mine.float() - exact).norm() < 1.5 * (other.float() - exact).norm()
    mine.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


def test_the_deep_layers_of_the_64x64_recipe_go_by_patches(monkeypatch):
    """512 ↔ 256 at 4×4 ↔ 8×8, once in G and once in D, of 256 ↔ 128 the slope; and both networks say what they did."""
    chosen, choose = [], du.quickest_way

    def noted(x, weight):
        chosen.append((tuple(weight.shape[:2]), choose(x, weight)))
        return chosen[-1][1]

    gan, found = du.DCGAN(device="cpu", precision="fp32"), []
    z, real = random(2, 100), random(2, 1, 64, 64, seed=1).contiguous(memory_format=LAST)
    for function in (noted, lambda x, weight: "library"):
        monkeypatch.setattr(du, "quickest_way", function)
        images = gan.generator.train()(z)
        found.append((images, gan.discriminator.train()(images), gan.discriminator(real)))
        slopes = du.slopes(gan.discriminator, real, None)
        found[-1] += (slopes, *torch.autograd.grad(slopes.sum(), gan.discriminator.layers[8].weight))
    taken = [(shape, way) for shape, way in chosen if way != "library"]
    assert gan.discriminator.layers[8].weight.shape == (512, 256, 4, 4)
    wide, middle, grey = ((512, 256), "product"), ((256, 128), "slope"), ((64, 1), "product")
    assert taken == [wide, middle, grey, *[grey, middle, wide] * 3]  # G's, whose last has a bias; D's, three times
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() < 1e-3 * other.norm()


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
