"""`Config.compile`: the networks through torch.compile, with the same results, the same files and clear refusals."""

import shutil

import pytest
import torch
from tiny import make, weights

import dcgan_utils as du


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compile anew: what another process left half written would break it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("kind", [du.FastDCGAN, du.StableDCGAN], ids=lambda kind: kind.recipe)
def test_compiled_networks_train_to_the_same_weights(kind, mnist_small, tmp_path):
    """Three iterations, FastDCGAN's second one with its penalty, which needs D's graph as it is; then on from a file.

    Dropout draws its own numbers when compiled, so it is off.
    """
    data, trained = tuple(part[:24] for part in mnist_small), {}
    penalty = {"penalty_every": 2} if kind is du.FastDCGAN else {}
    for compiled in (False, True):
        gan = make(kind, batch_size=8, compile=compiled, dropout_D=0.0, dropout_G=0.0, **penalty)
        gan.train(1, data=data, callbacks=[])
        trained[compiled] = torch.cat([weights(gan.generator), weights(gan.discriminator)])
    assert torch.allclose(trained[True], trained[False], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(
        trained[True], torch.cat([weights(make(kind).generator), weights(make(kind).discriminator)])
    )

    again = kind.load(gan.save(tmp_path / "kept"))
    assert torch.equal(again.sample(4, seed=0), gan.sample(4, seed=0))
    assert torch.equal(weights(again.discriminator), weights(gan.discriminator))


def test_only_the_steps_call_what_was_compiled(mnist_small, monkeypatch):
    """Samples come in any number, and every new number would be compiled anew."""
    asked = []

    def compiled(network, **options):
        asked.append(options)
        return lambda *inputs: calls.append(network) or network(*inputs)

    calls = []
    monkeypatch.setattr(torch, "compile", compiled)
    gan = make(du.FastDCGAN, batch_size=8, compile=True)
    assert asked == [{"dynamic": False}] * 2
    gan.train(1, data=tuple(part[:8] for part in mnist_small), callbacks=[])
    # D on real and fake digits and once more for G, G once; readings and penalty after them ask the networks
    assert calls.count(gan.discriminator) == 3
    assert calls.count(gan.generator) == 1
    gan.sample(5)
    assert len(calls) == 4


def test_what_cannot_be_compiled_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="ProgressiveGAN changes while it trains: compile must be False"):
        make(du.ProgressiveGAN, compile=True)
    with pytest.raises(ValueError, match="compile is built in; make a new FastDCGAN"):
        make(du.FastDCGAN).reconfigure(compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    gan = make(du.FastDCGAN, compile=True)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        gan.train(1)
    assert gan.sample(2).shape == (2, 1, 28, 28)  # needs none
    assert not du.FastDCGAN.load(gan.save(tmp_path / "kept"), compile=False).config.compile
