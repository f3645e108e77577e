"""What is faster computes the same: convolutions, precisions, scaled gradients, and engines against plain PyTorch."""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tiny import RECIPES as KINDS
from tiny import TINY, make, same, weights
from torch import nn

import dcgan_utils as du
from dcgan import acceleration, convolutions
from dcgan.networks import same_conv, same_conv_transpose

BUG = pytest.mark.xfail(strict=True, reason="a known fault of the code")
LAST = torch.channels_last
ALL = frozenset(["convolve", "transpose", "weight"])
WAYS = [frozenset(), ALL, frozenset(["convolve", "weight"]), *(frozenset([one]) for one in sorted(ALL))]


def random(*shape, dtype=torch.float64):
    """Return normal random numbers, the same for the same shape."""
    return torch.randn(*shape, generator=du.make_generator(0), dtype=dtype)


@pytest.fixture
def digits(mnist_small):
    """Return 96 digits and their labels: six batches of 16."""
    return mnist_small[0][:96], mnist_small[1][:96]


def derivatives(network, *inputs):
    """Return value, gradients and gradients of gradients, as a penalty takes them, by an input and all weights."""
    x = inputs[0].detach().requires_grad_()
    out, weights = network(x, *inputs[1:]), list(network.parameters())
    first = torch.autograd.grad(out.square().sum(), [x, *weights], create_graph=True, allow_unused=True)
    length = sum(gradient.square().sum() for gradient in first if gradient is not None)
    return [out, *first, *torch.autograd.grad(length, [x, *weights], allow_unused=True)]


def assert_equal(mine, theirs, bound=1e-9):
    """Compare lists of tensors by their norms."""
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert (one - other).norm() <= bound * other.norm() + 1e-30


# ----------------------------------------------------------------------------------------------- convolutions
POINT, GRAY = (2, 3, 1, 1), (2, 1, 8, 8)
LAYERS = {
    "halve": (nn.Conv2d(3, 2, 4, 2, 1, bias=False), (2, 3, 8, 12)), "by 3": (nn.Conv2d(2, 3, 3, 2, 1), (2, 2, 8, 6)),
    "halve gray": (nn.Conv2d(1, 3, 4, 2, 1), (2, 1, 8, 8)), "an odd side": (nn.Conv2d(1, 3, 3, 2, 1), (2, 1, 7, 7)),
    "double": (nn.ConvTranspose2d(3, 2, 4, 2, 1, bias=False), (2, 3, 4, 6)),
    "double to gray": (nn.ConvTranspose2d(3, 1, 4, 2, 1), (2, 3, 4, 4)),
    "keep": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 6)), "keep gray": (nn.Conv2d(1, 3, 5, padding=2), (2, 1, 5, 6)),
    "keep to gray": (nn.Conv2d(3, 1, 5, padding=2), (2, 3, 5, 6)), "one pixel": (nn.Conv2d(3, 2, 1), (2, 3, 4, 4)),
    "to a point": (nn.Conv2d(3, 2, 4, bias=False), (2, 3, 4, 4)),
    "from a point": (nn.ConvTranspose2d(3, 2, 4, bias=False), POINT),
    "no point": (nn.Conv2d(3, 2, 3, bias=False), (2, 3, 5, 4)),
    "TensorFlow's": (nn.Sequential(*same_conv(2, 3)), (2, 2, 8, 6)),
    "TensorFlow's gray": (nn.Sequential(*same_conv(1, 3)), (2, 1, 8, 8)),
    "TensorFlow's transpose": (nn.Sequential(*same_conv_transpose(3, 2)), (2, 3, 4, 6)),
}  # fmt: skip
OTHERS = {  # layers that a user's network may have
    "dilation": (nn.Conv2d(1, 3, 3, padding=2, dilation=2), GRAY), "more": (nn.Conv2d(1, 3, 3, padding=2), GRAY),
    "less": (nn.Conv2d(1, 3, 5, padding="valid"), GRAY), "oblong": (nn.Conv2d(1, 3, (3, 5), padding=(1, 2)), GRAY),
    "reflection": (nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"), GRAY),
    "groups": (nn.Conv2d(4, 4, 3, 1, 1, groups=2), (2, 4, 8, 8)), "two strides": (nn.Conv2d(1, 3, 3, (1, 2), 1), GRAY),
    "7": (nn.Sequential(*same_conv(2, 3)), (2, 2, 7, 7)), "1-D": (nn.Sequential(*same_conv(1, 3), nn.Flatten()), GRAY),
    "no output padding": (nn.ConvTranspose2d(3, 1, 3, 2, 1), (2, 3, 4, 4)),
    "a dilated point": (nn.ConvTranspose2d(3, 2, 3, dilation=2, bias=False), POINT),
    "zeros around": (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 3, 4, 2)), GRAY),
    "spectral norm": (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 3, 3, 1, 1))).eval(), GRAY),
}  # fmt: skip


@pytest.mark.parametrize("memory", [LAST, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("name", [*LAYERS, *(pytest.param(n, marks=BUG if n == "7" else ()) for n in OTHERS)])
def test_a_layer_computes_what_the_library_does(name, memory, monkeypatch):
    layer, shape = (LAYERS | OTHERS)[name]
    layer, x = layer.double().to(memory_format=memory), random(*shape).contiguous(memory_format=memory)
    expected = derivatives(layer, x)
    assert_equal(derivatives(du.accelerate(layer), x), expected)
    for ways in WAYS:
        monkeypatch.setattr(convolutions, "fastest_ways", lambda *_, ways=ways: ways)
        assert_equal(derivatives(du.accelerate(layer), x), expected)


@pytest.mark.parametrize("ways", [*WAYS[:3], None], ids=["library", "patches", "two", "chosen"])
@pytest.mark.parametrize("kind", [*KINDS, "concatenation"])
def test_every_network_computes_what_it_does_without(kind, ways, monkeypatch):
    fields = {"conditioning": kind} if kind == "concatenation" else {}
    gan = make(du.FastDCGAN if fields else kind, init_output_bias=True, dropout_D=0.0, **fields)
    bound = 1e-4 if kind is du.ProgressiveGAN else 1e-8  # some of it is float32 in any case
    if ways is not None:
        monkeypatch.setattr(convolutions, "fastest_ways", lambda *_: ways)
    side, labels = gan.config.image_size, torch.arange(3) if gan.config.conditional else None
    images = random(3, 1, side, side).contiguous(memory_format=LAST)
    for network, x in ((gan.generator, random(3, gan.config.nz)), (gan.discriminator, images)):
        network.double()
        getattr(network, "grow", id)(1.0)  # to full size
        fast = du.accelerate(network)
        assert_equal(derivatives(fast, x, labels), derivatives(network, x, labels), bound)
        assert [id(p) for p in fast.parameters()] == [id(p) for p in network.parameters()]


def test_accelerated_networks_share_weights_averages_and_modes():
    network, x = make(du.DCGAN).generator, random(8, 8, dtype=torch.float32)
    fast, before = du.accelerate(network), copy.deepcopy(network.state_dict())
    assert any(isinstance(module, convolutions.FastConv) for module in fast.modules())
    fast(x).sum().backward()
    torch.optim.SGD(fast.parameters(), 1e-4).step()
    assert not any(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    torch.testing.assert_close(fast(x), network(x))  # by the averages: those of eight samples differ
    assert not torch.allclose(fast(x), network.train()(x), atol=1e-3)


class Own(nn.Module):
    """Look at its mode and count its calls, as a network of one's own may."""

    def __init__(self):
        super().__init__()
        self.conv, self.modes = nn.Conv2d(1, 4, 3, padding=1), []

    def forward(self, x, labels=None):
        """Return logits, after Dropout that follows the mode of this module."""
        self.modes.append(self.training)
        return F.dropout(self.conv(x), 0.5, self.training).mean((1, 2, 3))


@pytest.mark.parametrize("what", ["modes", "hooks", "weights"])
def test_a_network_of_ones_own_trains_as_it_is(what, digits):
    gan, seen = make(du.StableDCGAN), []
    gan.discriminator = Own().eval()  # train() is for `train` to call
    before = weights(gan.discriminator)
    gan.discriminator.conv.register_forward_hook(lambda *_: seen.append(1))
    gan.train(1, data=digits[0], callbacks=[])
    moved = not torch.equal(weights(gan.discriminator), before)
    assert {"modes": gan.discriminator.modes == [True] * 18, "hooks": len(seen) == 18, "weights": moved}[what]


def test_each_machine_takes_the_ways_that_are_fast_there(monkeypatch):
    def ways(a, b, k, side, device="cpu"):
        shape = (2, b, 2 * side, 2 * side) if large else (2, a, side, side)
        x = torch.empty(shape, device=device, dtype=dtype).contiguous(memory_format=LAST)
        return convolutions.fastest_ways(x, torch.empty(a, b, k, k, device=device))

    library, some = frozenset(), frozenset(["convolve", "weight"])
    for amx, large, dtype in itertools.product((False, True), (False, True), (torch.float32, torch.bfloat16)):  # noqa: B007
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx}, raising=False)
        products = amx and dtype is torch.bfloat16
        assert ways(64, 1, 4, 32) == ways(64, 1, 5, 14) == ALL  # gray
        assert ways(64, 1, 4, 32, device="meta") == library  # a GPU's own is faster
        assert ways(512, 256, 4, 4) == (ALL if products else library)
        assert ways(256, 128, 4, 8) == ways(256, 128, 5, 7) == (some if products else library)
        assert ways(128, 64, 4, 16) == ways(128, 32, 4, 7) == library
    assert convolutions.fastest_ways(torch.empty(2, 1, 8, 8)[:, :, ::2], torch.empty(4, 1, 4, 4)) == library


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("layer", [
    nn.Conv2d(256, 256, 4, 2, 1), nn.ConvTranspose2d(256, 256, 4, 2, 1), nn.Conv2d(1, 64, 4, 2, 1),
    nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Conv2d(64, 1, 3, padding=1), nn.Sequential(*same_conv(128, 128)),
    nn.Conv2d(64, 1, 8, bias=False),
], ids=["halve", "double", "gray", "to gray", "keep", "TensorFlow's", "point"])  # fmt: skip
def test_bf16_is_close_to_float32(layer, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    layer = layer.float().to(memory_format=LAST)
    fast, wide = du.accelerate(layer), next(m for m in layer.modules() if not m._modules and hasattr(m, "weight"))
    x = random(2, wide.in_channels, 8, 8, dtype=torch.float32).contiguous(memory_format=LAST)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = fast(x), layer(x)
        with torch.autocast("cpu", enabled=False):  # as the penalty is computed
            exact = fast(x)
    assert (mine.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(exact, layer(x), atol=1e-4, rtol=1e-4)
    assert (mine.float() - exact).norm() < min(0.012 * exact.norm(), 3.5 * (other.float() - exact).norm())
    mine.float().square().sum().backward()
    assert wide.weight.grad.dtype == torch.float32
    assert wide.weight.grad.is_contiguous(memory_format=LAST)  # DistributedDataParallel copies other ones, and warns


# ----------------------------------------------------------------------------------------------- engines
def with_engine(engine, kind, **fields):
    """Return a recipe's GAN of few channels with another engine."""
    return type("Other", (kind,), {"engine_type": engine})(**{**TINY[kind], **fields})


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_engine_trains_to_the_same_weights(kind, digits):
    fast, plain = make(kind, dropout_D=0.0), with_engine(du.Engine, kind, dropout_D=0.0)
    start = [weights(network) for network in (plain.generator, plain.discriminator)]
    for gan in (plain, fast):
        gan.train(1, data=digits, callbacks=[])
    for name in du.METRICS:
        assert fast.history[name] == pytest.approx(plain.history[name], rel=2e-3, abs=1e-5), name
    for name, before in zip(("generator", "discriminator"), start, strict=True):
        mine, other = (weights(getattr(gan, name)) for gan in (fast, plain))
        assert (mine - other).norm() < 0.02 * (other - before).norm()


@pytest.mark.parametrize(("kind", "width"), [(du.DCGAN, 8), (du.DCGAN, 128), (du.StableDCGAN, 64), (du.FastDCGAN, 8)])
def test_bf16_trains_like_float32(kind, width, digits, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    histories = []
    for precision in ("fp32", "auto"):
        gan = make(kind, precision=precision, dropout_D=0.0, ngf=width, ndf=width, batch_size=32)
        histories.append(gan.train(1, data=digits, callbacks=[]))
    for name in ("loss_D", "loss_G", "D_x"):
        assert 0 < abs(histories[1][name][0] / histories[0][name][0] - 1) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_trains_on_as_the_first_one_does(kind, digits):
    gan = make(kind, ema_decay=0.9)
    gan.train(1, data=digits, callbacks=[du.StopAt(4)])
    twin = copy.deepcopy(gan)
    for one in (gan, twin):  # after one another: they share nothing
        one.train(2, data=digits, callbacks=[])
    assert same(gan, twin)
    assert torch.equal(gan.sample(3, seed=0), twin.sample(3, seed=0))
    assert gan.history.batches == twin.history.batches


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for features, precision in (
        ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_f": True, "avx2": True, "avx512_bf16": False}, "fp32"), ({}, "fp32"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert du.pick_precision("auto", cpu) == precision
        assert (du.pick_precision("fp32", cpu), du.pick_precision("bf16", cpu)) == ("fp32", "bf16")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert du.pick_precision("auto", cpu) == "fp32"  # a torch that cannot tell
    with pytest.raises(ValueError, match="precision = 'fp16' needs a GPU"):
        make(precision="fp16")
    for native, precision in ((False, "fp16"), (True, "bf16")):  # a T4 emulates bf16
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n | including_emulation
        )
        assert du.pick_precision("auto", cuda) == precision


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda", "cuda:7", "gpu", "tpu:0", ""])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"device = '{name}'.*'auto'") as caught:
        make(device=name)
    assert "\n" not in str(caught.value)
    assert make(device="auto").device == make(device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("size", [1, 10**6], ids=["one thread", "all threads"])
def test_small_numbers_are_flushed_in_training_only(size):
    def act():  # a new thread makes its own workers
        torch.set_num_threads(2)
        with acceleration.flushed_denormals():
            found.append((torch.full((size,), 1e-40) * 1.0).count_nonzero().item())
        found.append((torch.full((size,), 1e-40) * 1.0).count_nonzero().item())

    found, count = [], torch.get_num_threads()
    ThreadPoolExecutor(1).submit(act).result()
    torch.set_num_threads(count)
    assert found[0] < size  # in this thread at least
    assert found[1] == size


# ----------------------------------------------------------------------------------------------- fp16, on a stand-in
class Scaled(du.Accelerated):
    """Scale gradients as on a GPU in fp16, but compute in float32."""

    def __init__(self, config):
        super().__init__(config)
        self.precision = "fp16"
        self.scalers = {player: torch.amp.GradScaler("cpu", init_scale=2.0**16) for player in "GD"}

    autocast = du.Engine.autocast


def overflow(network, times):
    """Make one weight's gradient infinite in the next backward passes that reach it."""
    factors = iter([math.inf] * times)
    next(network.parameters()).register_hook(lambda gradient: gradient * next(factors, 1.0))


def all_of(network, optimizer):
    """Return weights and Adam's memory as one vector."""
    memory = [value for values in optimizer.state.values() for value in values.values()]
    return torch.cat([value.detach().double().flatten() for value in (*network.parameters(), *memory)])


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_changes_no_update(kind, digits):
    plain, gan = make(kind, log_every=1), with_engine(Scaled, kind, log_every=1)
    for one in (plain, gan):
        one.train(1, data=digits, callbacks=[])
    assert same(gan, plain)  # a power of two scales without rounding
    assert gan.history.batches == plain.history.batches
    assert {scaler.get_scale() for scaler in gan.engine.scalers.values()} == {2.0**16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("player", "DG")
def test_a_step_that_overflowed_is_skipped_and_the_other_player_moves(kind, player, digits):
    gan = with_engine(Scaled, kind, gradient_penalty=0.0)
    gan.train(1, data=digits, callbacks=[du.StopAt(1)])
    parts = {"D": (gan.discriminator, gan.optimizer_D), "G": (gan.generator, gan.optimizer_G)}
    mine, other = parts[player], parts["G" if player == "D" else "D"]
    before = [all_of(*part) for part in (mine, other)]
    overflow(mine[0], times=1)
    gan.train(1, data=digits, callbacks=[du.StopAt(2)])
    assert [torch.equal(all_of(*part), old) for part, old in zip((mine, other), before, strict=True)] == [True, False]
    assert [gan.engine.scalers[k].get_scale() for k in "DG"] == [2.0**15 if k == player else 2.0**16 for k in "DG"]
    gan.train(1, data=digits, callbacks=[])  # and on, without a word
    assert all(math.isfinite(value) for name in du.METRICS for value in gan.history.batches[name])


def test_an_overflow_where_d_reaches_into_g_is_no_divergence(digits):
    gan = with_engine(Scaled, du.FastDCGAN, detach=False, log_every=1)
    overflow(gan.generator, times=2)
    leaks = gan.train(1, data=digits, callbacks=[]).batches["grad_G_after_D_step"]
    assert (gan.step, leaks[0]) == (6, 0)
    assert leaks[-1] > 0
