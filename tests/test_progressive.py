"""ProgressiveGAN: its layers in closed form, how it grows and fades, and that it goes through the same contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import make, same

import dcgan_utils as du

SIDES = (4, 8, 16, 32)


def networks(**fields):
    """Return a small generator and discriminator for 32×32."""
    torch.manual_seed(0)
    config = du.ProgressiveGAN.resolve(ngf=4, ndf=4, nz=8, **fields)
    return [network(config) for network in du.ProgressiveGAN.networks]


# ----------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize(("kernel_size", "gain"), [(3, math.sqrt(2)), (1, 1.0)])
def test_equalised_convolution_scales_weights_of_one_size(kernel_size, gain):
    torch.manual_seed(0)
    layer = du.EqualisedConv2d(32, 64, kernel_size=kernel_size, gain=gain)
    assert layer.weight.std().item() == pytest.approx(1, abs=0.06)
    assert layer.bias.abs().max() == 0
    x = torch.randn(8, 32, 9, 9)
    scaled = F.conv2d(x, layer.weight * gain / math.sqrt(32 * kernel_size**2), padding=kernel_size // 2)
    assert torch.allclose(layer(x), scaled, atol=1e-5)
    assert layer(x)[:, :, 2:-2, 2:-2].std().item() == pytest.approx(gain, rel=0.05)  # He's: variance gain²


def test_pixel_norm_brings_every_pixel_to_mean_square_one():
    x = torch.tensor([[3.0, 4.0], [0.5, 0.0]])[:, :, None, None]
    out = du.PixelNorm()(x).flatten(1)
    assert torch.allclose(out[0], torch.tensor([3.0, 4.0]) / math.sqrt(12.5), atol=1e-5)
    assert torch.allclose(out.square().mean(dim=1), torch.ones(2), atol=1e-4)


def test_minibatch_deviation_says_how_much_the_batch_varies():
    alike = torch.full((6, 2, 4, 4), 0.7)
    spread = torch.cat([torch.full((3, 2, 4, 4), -2.0), torch.full((3, 2, 4, 4), 2.0)])
    for batch, said in ((alike, 1e-4), (spread, 2.0)):
        out = du.MinibatchDeviation()(batch)
        assert out.shape == (6, 3, 4, 4)
        assert torch.equal(out[:, :2], batch)
        assert torch.allclose(out[:, 2], torch.full((6, 4, 4), said), rtol=1e-3)


# ----------------------------------------------------------------------------------------------- growth
@pytest.mark.parametrize("stage", range(4))
def test_an_image_has_the_detail_of_the_size_it_has_grown_to(stage):
    generator, discriminator = networks()
    generator.grown.fill_(stage)
    discriminator.grown.fill_(stage)
    images = generator(torch.randn(5, 8))
    assert images.shape == (5, 1, 32, 32)
    assert images.abs().max() <= 1
    block = 32 // SIDES[stage]
    coarse = F.avg_pool2d(images, block)
    assert torch.allclose(F.interpolate(coarse, scale_factor=block), images, atol=1e-6)
    if stage < 3:
        assert torch.allclose(images[:, :, ::block, ::block], coarse, atol=1e-6)
    if stage:  # and not merely that of the size before
        assert (F.interpolate(F.avg_pool2d(images, 2 * block), scale_factor=2 * block) - images).abs().max() > 1e-3
    fine = images + 0.1 * torch.randn_like(images)
    fine += F.interpolate(F.avg_pool2d(images - fine, block), scale_factor=block)  # the same when seen at this size
    assert torch.allclose(discriminator(images), discriminator(fine), atol=1e-4)
    assert discriminator(images).shape == (5,)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_new_size_fades_in_without_a_jump(stage):
    generator, discriminator = networks()
    z = torch.randn(5, 8)

    def at(grown):
        generator.grown.fill_(grown)
        discriminator.grown.fill_(grown)
        images = generator(z)
        return images, discriminator(images)

    (before, said), (just, said_just) = at(stage), at(stage + 1e-4)
    half, whole = at(stage + 0.5)[0], at(stage + 1)[0]
    assert torch.allclose(before, just, atol=1e-2)
    assert torch.allclose(said, said_just, atol=1e-2)
    assert torch.allclose(half.atanh(), (before.atanh() + whole.atanh()) / 2, atol=1e-3)


def test_sizes_share_the_time_alike_and_fade_in_for_half_of_it():
    generator, _ = networks()
    seen = []
    for step in range(1001):
        generator.grow(step / 1000)
        seen.append(float(generator.grown))
    assert seen == sorted(seen)
    assert (seen[0], seen[250], seen[500], seen[750], seen[1000]) == (0, 0, 1, 2, 3)
    assert seen[312] == pytest.approx(0.5, abs=0.01)
    assert seen[376] == seen[499] == 1
    assert seen[876] == 3
    generator.grow(7.0)
    assert float(generator.grown) == 3


def test_only_what_has_grown_learns():
    generator, discriminator = networks()
    for network in (generator, discriminator):
        network.grown.fill_(1)
    discriminator(generator(torch.randn(4, 8))).sum().backward()
    idle = {name for network in (generator, discriminator) for name, p in network.named_parameters() if p.grad is None}
    assert {name.split(".")[0] + name.split(".")[1] for name in idle} == {
        "blocks1", "blocks2", "to_grey0", "to_grey2", "to_grey3", "from_grey0", "from_grey2", "from_grey3",
    }  # fmt: skip


class Watch(du.Callback):
    """Take note of how far both networks have grown at every batch."""

    def __init__(self):
        self.grown = []

    def on_batch_end(self, gan):
        assert float(gan.generator.grown) == float(gan.discriminator.grown)
        self.grown.append(float(gan.generator.grown))


@pytest.mark.parametrize(("growth", "ends"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_training_grows_the_networks_for_the_share_that_the_config_says(growth, ends, mnist_small):
    watch = Watch()
    gan = make(du.ProgressiveGAN, growth=growth, num_epochs=6)
    assert gan.sample(2).shape == (2, 1, 16, 16)
    gan.train(data=mnist_small[0][:160], callbacks=[watch])
    full = [step / 60 for step, grown in enumerate(watch.grown) if grown == 2]
    assert len(watch.grown) == 60
    assert watch.grown == sorted(watch.grown)
    assert full[0] == pytest.approx(ends * 5 / 6, abs=0.02)  # the last of three sizes is in when half its time is over
    if growth:
        assert watch.grown[0] == 0


def test_a_run_that_stops_while_a_size_fades_in_goes_on_where_it_was(mnist_small, tmp_path):
    data = mnist_small[0][:160]
    whole = make(du.ProgressiveGAN, num_epochs=6, ema=0.9)
    whole.train(data=data, callbacks=[])
    part = make(du.ProgressiveGAN, num_epochs=6, ema=0.9)

    class Stops(du.Callback):
        def on_batch_end(self, gan):
            if gan.step == 22:
                gan.stop("test")

    part.train(data=data, callbacks=[Stops()])
    assert 0 < float(part.generator.grown) < 1
    part.save(tmp_path / "half")
    again = du.ProgressiveGAN.load(tmp_path / "half")
    assert torch.equal(again.sample(3, seed=1), part.sample(3, seed=1))
    again.train(data=data, callbacks=[])
    assert same(again, whole)


def test_every_size_starts_at_the_datas_background(mnist_small):
    gan = make(du.ProgressiveGAN)
    gan.train(1, data=mnist_small[0][:16], callbacks=[])
    biases = [layer.bias.tanh().item() for layer in gan.generator.to_grey]
    assert biases == pytest.approx([-0.96] * 3, abs=0.01)


@pytest.mark.parametrize("size", [28, 24, 48])
def test_a_size_that_does_not_double_from_four_is_refused(size):
    with pytest.raises(ValueError, match=rf"image_size = {size}.*16 or 32|image_size = {size}.*32 or 64"):
        du.ProgressiveGAN(image_size=size)


def test_growth_has_a_range():
    with pytest.raises(ValueError, match=r"growth = 1\.5.*0 … 1"):
        du.ProgressiveGAN(growth=1.5)


def test_sizes_fade_in_half_precision_too(mnist_small):
    """On a GPU autocast makes the one size bf16 and the other float32; they are mixed in float32."""
    coarse, fine = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), torch.ones(1, 1, 2, 2)
    assert torch.equal(du.fade(coarse, fine, 0.25), torch.full((1, 1, 2, 2), 0.25))
    gan = make(du.ProgressiveGAN, precision="bf16", growth=1.0)
    history = gan.train(1, data=mnist_small[0][:256], callbacks=[])
    assert all(math.isfinite(history[name][0]) for name in ("loss_D", "loss_G", "diversity"))


def test_a_run_that_is_made_longer_does_not_shrink(mnist_small):
    data, watch = mnist_small[0][:64], Watch()
    gan = make(du.ProgressiveGAN, num_epochs=3)
    gan.train(data=data, callbacks=[])
    assert float(gan.generator.grown) == 2
    gan.train(4, data=data, callbacks=[watch])
    assert set(watch.grown) == {2.0}
