"""Small GANs and comparisons that several test files use."""

import torch

import dcgan_utils as du

TINY = {
    du.DCGAN: {"image_size": 16, "ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.StableDCGAN: {"ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.FastDCGAN: {"ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.ProgressiveGAN: {"image_size": 16, "ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.ConditionalDCGAN: {"image_size": 16, "ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.WGANGP: {"ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8, "d_steps": 1},
}
RECIPES = list(TINY)


def make(kind=du.FastDCGAN, **overrides):
    """Return a GAN of four channels, which trains in milliseconds."""
    return kind(**{**TINY[kind], **overrides})


def weights(network):
    """Return all of a network's weights and statistics as one vector."""
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


def same(first, second):
    """Return whether two GANs are equal bit for bit."""
    return torch.equal(weights(first.generator), weights(second.generator)) and torch.equal(
        weights(first.discriminator), weights(second.discriminator)
    )
