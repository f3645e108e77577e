"""Random numbers that belong to a GAN: what it draws is its own, and the process's generators and settings stay."""

import math
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import make, same
from torch import nn

import dcgan_utils as du

X = torch.linspace(-1, 1, 4 * 8 * 6 * 6).view(4, 8, 6, 6)
DRAWS = {
    "rand": lambda: torch.rand(5), "randn": lambda: torch.randn((2, 3)), "randint": lambda: torch.randint(999, (5,)),
    "randperm": lambda: torch.randperm(99), "normal": lambda: torch.normal(torch.zeros(5), 1.0),
    "multinomial": lambda: torch.ones(999).multinomial(9), "exponential": lambda: torch.empty(5).exponential_(),
    "rand_like": lambda: torch.rand_like(X), "randn_like": lambda: torch.randn_like(X, dtype=torch.float64),
    "randint_like": lambda: torch.randint_like(X, 1, 999), "bernoulli_": lambda: torch.empty(99).bernoulli_(0.5),
    "Dropout": lambda: nn.Dropout()(X), "Dropout1d": lambda: nn.Dropout1d()(X[0]), "2d": lambda: nn.Dropout2d()(X),
    "3d": lambda: nn.Dropout3d()(X[None]), "inplace": lambda: F.dropout(X.clone(), inplace=True),
    "Linear": lambda: nn.Linear(4, 4).weight, "Conv2d": lambda: nn.Conv2d(4, 4, 3).bias,
    "trunc": lambda: nn.init.trunc_normal_(X[0]), "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "torch.dropout": lambda: torch.dropout(X, 0.5, True), "poisson": lambda: torch.poisson(X.exp()),
    "by keyword": lambda: torch.randn_like(input=X), "high by keyword": lambda: torch.randint_like(X, high=999),
    "module": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout2d(0.2), nn.Dropout())(X[torch.randperm(4)]),
}  # fmt: skip


def globals_now():
    """Return the states of the process's generators."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_the_generators(name):
    found, before = [], globals_now()
    for seed in (1, 1, 2):
        with du.draws_from(du.make_generator(seed)):
            found.append(DRAWS[name]().clone())
    assert globals_now() == before
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_call_with_a_generator_of_its_own_or_on_another_device_is_left_alone():
    mine, other = du.make_generator(1), du.make_generator(1)
    with du.draws_from(du.make_generator(2)):
        assert torch.equal(torch.rand(5, generator=mine), torch.rand(5, generator=other))
        assert nn.Dropout()(torch.rand(5, device="meta")).device.type == "meta"


def dropped(x, p, kind=F.dropout, **options):
    """Return what dropout makes of x with a generator of its own."""
    with du.draws_from(du.make_generator(0)):
        return kind(x, p, **options)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.95])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    out, n = dropped(torch.ones(2**20), p), 2**20
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    assert out[out != 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=2e-4)]
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))


def test_dropout_decides_for_every_entry_or_map_by_itself():
    """Four 16-bit numbers share a random word, and neighbors a row: none of them may go together."""
    maps = dropped(torch.ones(64, 64, 5, 5), 0.5, F.dropout2d)
    assert torch.equal(maps, maps[..., :1, :1].expand_as(maps))  # whole ones
    for out in (dropped(torch.ones(1024, 64), 0.5), maps[..., 0, 0]):
        out = (out == 0).double().flatten() - 0.5
        assert abs(out.mean()) < 2.5 / math.sqrt(len(out))
        assert all(abs((out[:-k] * out[k:]).mean()) < 1.25 / math.sqrt(len(out)) for k in (1, 2, 3, 4, 8, 64))


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 5, 7), (1, 1), (0, 3)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_shape_type_and_layout_and_passes_gradients(shape, memory, dtype):
    x = torch.linspace(1, 2, math.prod(shape)).view(shape).to(dtype)
    x = (x.contiguous(memory_format=memory) if len(shape) == 4 else x).requires_grad_()
    out = dropped(x, 0.5)
    assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), dtype)
    twice = torch.where(out == 0, 0.0, 2.0).to(dtype)
    assert torch.equal(out, twice * x) and torch.equal(torch.autograd.grad(out.sum(), x)[0], twice)  # noqa: PT018
    for kept, result in (({"p": 0.5, "training": False}, x), ({"p": 0.0}, x), ({"p": 1.0}, torch.zeros_like(x))):
        assert torch.equal(dropped(x, **kept), result)


def trained(kind, seed, digits, meet):
    """Return a GAN trained for six iterations; `meet` runs in the middle of each."""
    gan = make(kind, seed=seed)
    theirs = gan.loss.generator
    gan.loss.generator = lambda *logits: (meet(), theirs(*logits))[1]
    gan.train(1, data=digits, callbacks=[])
    return gan if len(gan.sample(3)) == len(gan.sample(3, seed=1)) else None


def drawn(meet):
    """Return what a cell draws, a part in each of six iterations."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    row = lambda: torch.cat([torch.rand(99), F.dropout(torch.ones(99)), torch.tensor(np.random.rand(9))])  # noqa: E731, NPY002
    return torch.cat([(meet(), row())[1] for _ in range(6)])


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_a_training_gan_a_second_one_and_a_cell_do_not_disturb_each_other(kind, mnist_small):
    digits, before = (mnist_small[0][:96], mnist_small[1][:96]), globals_now()
    acts = (lambda meet: trained(kind, 42, digits, meet), lambda meet: trained(kind, 7, digits, meet), drawn)
    alone = [act(lambda: None) for act in acts[:2]]
    assert globals_now() == before
    alone.append(drawn(lambda: None))
    found, meet = {}, threading.Barrier(3, timeout=60).wait
    others = [threading.Thread(target=lambda k=k: found.update({k: acts[k](meet)})) for k in (1, 2)]
    [other.start() for other in others]
    found[0] = acts[0](meet)
    [other.join() for other in others]
    assert [same(found[k], alone[k]) for k in (0, 1)] + [torch.equal(found[2], alone[2])] == [True] * 3


SETTINGS = """
import os, signal, sys, warnings, matplotlib, torch, dcgan_utils as du
def settings():
    handlers = [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())]
    small = float(torch.full((), 1e-40) * 1.0)
    return handlers, str(warnings.filters), matplotlib.get_backend(), dict(os.environ), small, torch.is_grad_enabled()
mine = matplotlib.use("svg"), warnings.filterwarnings("ignore", "mine"), signal.signal(signal.SIGINT, lambda *_: None)
before = settings()
gan = du.FastDCGAN(ngf=4, ndf=4, nz=8, batch_size=16, out_dir=sys.argv[1])
gan.train(1, data=(torch.full((32, 28, 28), 200, dtype=torch.uint8), torch.arange(32) % 10))
assert before == settings(), (before, settings())
"""


def test_a_training_leaves_the_settings_of_the_process(root, tmp_path):
    command = [sys.executable, "-c", SETTINGS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
