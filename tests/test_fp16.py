"""fp16 with gradient scaling, as on a T4: a step whose gradients overflowed is skipped and leaves nothing behind.

A CPU trains in fp32 here, but with a real gradient scaler that is switched on: scaling, the look for infinities, the
skipped step and the falling scale are PyTorch's own. Not covered: convolutions in fp16, which need a GPU.
"""

import math

import pytest
import torch
from tiny import RECIPES, make, weights

import dcgan_utils as du

NETWORKS = {"D": ("discriminator", "optimizer_D"), "G": ("generator", "optimizer_G")}


@pytest.fixture
def data(mnist_small):
    """Return 64 digits: four batches."""
    return mnist_small[0][:64], mnist_small[1][:64]


def scaled(kind, **overrides):
    """Return a GAN whose scalers work as they do on a GPU in fp16."""
    gan = make(kind, log_every=1, **overrides)
    gan.scaler_D, gan.scaler_G = (torch.amp.GradScaler("cpu", init_scale=2.0**16) for _ in "DG")
    return gan


def overflow(network, times: int) -> None:
    """Make one weight's gradient infinite in the next backward passes that reach it."""
    left = [times]

    def hook(gradient):
        left[0] -= 1
        return gradient * math.inf if left[0] >= 0 else gradient

    next(iter(network.parameters())).register_hook(hook)


def one_iteration(gan, data) -> None:
    """Train for one iteration."""

    class Once(du.Callback):
        def on_batch_end(self, gan):
            gan.stop("enough")

    gan.train(data=data, callbacks=[Once()])


def parameters(network) -> torch.Tensor:
    """Return all trained weights as one vector, without the BatchNorm statistics that every forward pass moves."""
    return torch.cat([p.detach().clone().flatten() for p in network.parameters()])


def memory(optimizer) -> list[torch.Tensor]:
    """Return copies of an optimiser's moments and step counts."""
    return [value.clone() for values in optimizer.state.values() for value in values.values()]


@pytest.mark.parametrize("kind", RECIPES)
def test_scaling_changes_no_update(kind, data):
    plain, gan = make(kind, log_every=1), scaled(kind)
    for one in (plain, gan):
        one.train(1, data=data, callbacks=[])
    assert torch.equal(weights(gan.generator), weights(plain.generator))  # a power of two scales without rounding
    assert torch.equal(weights(gan.discriminator), weights(plain.discriminator))
    assert gan.scaler_D.get_scale() == gan.scaler_G.get_scale() == 2.0**16


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("broken", NETWORKS)
def test_a_skipped_step_leaves_its_network_and_lets_the_other_move(kind, broken, data):
    gan, plain = scaled(kind), make(kind, log_every=1)
    for one in (gan, plain):
        one_iteration(one, data)  # both optimisers have a memory now
    other = "G" if broken == "D" else "D"
    before = {k: (parameters(getattr(gan, net)), memory(getattr(gan, opt))) for k, (net, opt) in NETWORKS.items()}
    overflow(getattr(gan, NETWORKS[broken][0]), times=1)
    one_iteration(gan, data)
    after = {k: (parameters(getattr(gan, net)), memory(getattr(gan, opt))) for k, (net, opt) in NETWORKS.items()}
    assert torch.equal(after[broken][0], before[broken][0])
    assert all(torch.equal(a, b) for a, b in zip(after[broken][1], before[broken][1], strict=True))
    assert not torch.equal(after[other][0], before[other][0])
    assert (gan.scaler_D.get_scale(), gan.scaler_G.get_scale()) == {
        "D": (2.0**15, 2.0**16),
        "G": (2.0**16, 2.0**15),
    }[broken]
    one_iteration(plain, data)
    if broken == "G":  # D's turn came before and does not know of it
        assert torch.equal(parameters(gan.discriminator), parameters(plain.discriminator))


@pytest.mark.parametrize("broken", NETWORKS)
def test_training_goes_on_after_several_skipped_steps(broken, data):
    gan = scaled(du.FastDCGAN, ema=0.9)
    start = parameters(getattr(gan, NETWORKS[broken][0]))
    overflow(getattr(gan, NETWORKS[broken][0]), times=3)
    history = gan.train(2, data=data, callbacks=[])
    scaler = gan.scaler_D if broken == "D" else gan.scaler_G
    assert scaler.get_scale() == 2.0**13
    assert not torch.equal(parameters(getattr(gan, NETWORKS[broken][0])), start)
    assert gan.step == 8
    assert all(math.isfinite(v) for name in du.METRICS for v in (*history[name], *history.batches[name]))
    steps = [int(s["step"]) for s in getattr(gan, NETWORKS[broken][1]).state.values()]
    assert set(steps) == {8 - 3}  # Adam's bias correction does not count what was skipped
    assert weights(gan.average).isfinite().all()


def test_an_overflow_where_d_reaches_into_g_is_no_divergence(data):
    gan = scaled(du.FastDCGAN, detach=False)
    overflow(gan.generator, times=2)
    history = gan.train(2, data=data, callbacks=[])
    assert gan.step == 8
    assert history.batches["leak"][0] == 0
    assert history.batches["leak"][-1] > 0
    assert all(math.isfinite(v) for name in du.METRICS for v in history.batches[name])


def test_d_keeps_no_gradient_of_gs_step_that_a_later_unscaling_could_meet(data):
    gan = scaled(du.DCGAN)
    one_iteration(gan, data)
    assert all(p.grad is None for p in gan.discriminator.parameters())  # cleared after its own step
    with gan._own_rng():
        du.train_generator(gan, gan._fake(16, None), None)
    assert all(p.grad is None for p in gan.discriminator.parameters())
