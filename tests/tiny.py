"""Small GANs and comparisons that several test files use."""

import dataclasses

import torch

import dcgan_utils as du

TINY = {
    du.DCGAN: {"image_size": 16, "ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.StableDCGAN: {"ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.FastDCGAN: {"ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.ProgressiveGAN: {"image_size": 16, "ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.ConditionalDCGAN: {"image_size": 16, "ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8},
    du.WGANGP: {"ngf": 4, "ndf": 4, "batch_size": 16, "nz": 8, "n_critic": 1},
}
RECIPES = list(TINY)
BCE = {  # FastDCGAN with cross-entropy, smoothed labels and BatchNorm in D
    "loss": "bce", "gradient_penalty": 0.0, "penalty_interval": 1, "batch_norm_D": True, "conditioning": "projection",
    "beta1": 0.5, "lr_G": 2e-3, "lr_D": 2e-3, "real_label_smooth": 0.9, "fake_label_smooth": 0.0,
}  # fmt: skip


class FastCrossEntropy(du.FastDCGAN):
    """FastDCGAN with the loss, labels and norms of the public recipes."""

    defaults = dataclasses.replace(du.FastDCGAN.defaults, **BCE)


TINY[FastCrossEntropy] = TINY[du.FastDCGAN]  # not one of RECIPES


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
