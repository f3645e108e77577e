"""One small class a loss: what D and G minimize, what D's output means, and what theory says of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config


class Equilibrium(NamedTuple):
    """What theory says where G makes the data's distribution: D's output m and both losses; and D's lowest loss."""

    output: float
    loss_D: float
    loss_G: float
    loss_D_floor: float  # of a D that separates perfectly


def entropy(p: float) -> float:
    """Return the binary entropy H(p) in nats."""
    return 0.0 if p in (0, 1) else -p * math.log(p) - (1 - p) * math.log(1 - p)


class Loss:
    """Hold what D and G minimize and what D's output means; the base of every loss.

    A loss of one's own overrides `discriminator` and `generator`, and the attributes where they apply.
    """

    compares_pairs = False  # True: only differences real - fake of D's outputs mean something
    gives_probability = False  # True: D_x and D_G_z are probabilities
    estimates_distance = False  # True: D is a critic, D_gap estimates a distance, and its gradient's norm should be 1
    uses_labels = False  # True: real_label_smooth and fake_label_smooth act
    labels: tuple[float, float] | None = None  # what D's outputs are pulled to: real, fake
    equilibrium: Equilibrium | None = None
    threshold: float | None = None  # logit above which D means "real"; None: real has to lead its fake

    def __init__(self, config: Config) -> None:
        pass

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return D's loss for logits (N,) of real and of generated images."""
        raise NotImplementedError

    def generator(self, fake_logits: Tensor, real_logits: Tensor) -> Tensor:
        """Return G's loss; `real_logits` matter to losses that compare pairs only."""
        raise NotImplementedError

    def probability(self, logits: Tensor) -> Tensor:
        """Return D(x) of single images: a probability where the loss gives one, else the logit itself."""
        return logits.sigmoid() if self.gives_probability and not self.compares_pairs else logits

    def readings(self, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
        """Return mean D(x), mean D(G(z)), their gap, D's accuracy and the standard deviation of all its outputs.

        Where the loss compares pairs, D(x) is the probability that D gives to the real one of a pair.
        """
        pairs = torch.stack([real_logits, fake_logits])
        outputs = (pairs - pairs.flip(0)).sigmoid() if self.compares_pairs else self.probability(pairs)
        right = [real_logits > fake_logits] * 2
        if self.threshold is not None:
            right = [real_logits > self.threshold, fake_logits < self.threshold]
        accuracy = torch.stack(right).float().mean()
        D_x, D_G_z = outputs[0].mean(), outputs[1].mean()
        return {"D_x": D_x, "D_G_z": D_G_z, "D_acc": accuracy, "D_std": outputs.std(), "D_gap": D_x - D_G_z}

    def penalty(self, discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        """Return (R1 + R2) / 2: the mean squared norm of D's gradient at real and at fake images.

        Mescheder et al. 2018, eq. 9; Huang et al. 2024, §2.2. Real and fake go through D apart, as in its step.
        """
        norms = [gradient_norms(discriminator, images, labels) for images in (real, fake)]
        return torch.cat(norms).square().mean()


class NonSaturatingLoss(Loss):
    """Cross-entropy with smoothed labels; G maximizes log D(G(z)) (Goodfellow et al. 2014, §3).

    Real is 1 and fake is 0; `real_label_smooth` and `fake_label_smooth` move D's targets to a and b. Salimans et al.
    2016, §3.4, smooth only the real one: b > 0 keeps a peak of the optimal D at images that the data do not contain.
    """

    gives_probability, uses_labels = True, True

    def __init__(self, config: Config) -> None:
        a, b, target = config.real_label_smooth, config.fake_label_smooth, config.generator_target
        m = (a + b) / 2
        self.labels, self.target = (a, b), target
        self.threshold = math.log(m / (1 - m)) if 0 < m < 1 else 0.0  # the equilibrium, not 0.5
        loss_G = -target * math.log(m) - ((1 - target) * math.log(1 - m) if target < 1 else 0.0)
        self.equilibrium = Equilibrium(m, 2 * entropy(m), loss_G, entropy(a) + entropy(b))

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the mean cross-entropy of real logits to a, plus that of fake logits to b."""
        return cross_entropy(real_logits, self.labels[0]) + cross_entropy(fake_logits, self.labels[1])

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of fake logits to `generator_target`."""
        return cross_entropy(fake_logits, self.target)


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Return BCEWithLogitsLoss of logits (N,) to one target, in float32: sigmoid and log apart give NaN."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, target, dtype=torch.float32))


class LeastSquaresLoss(Loss):
    """Pull logits to the labels by squared error (Mao et al. 2017, eq. 2).

    With labels a and b the optimal D is that of cross-entropy (ibid., eq. 5); far logits still have a gradient.
    """

    uses_labels = True

    def __init__(self, config: Config) -> None:
        self.labels, self.target = (config.real_label_smooth, config.fake_label_smooth), config.generator_target
        self.threshold = sum(self.labels) / 2

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return ½ E(D(x) - a)² + ½ E(D(G(z)) - b)²."""
        real, fake = real_logits.float() - self.labels[0], fake_logits.float() - self.labels[1]
        return (real.square().mean() + fake.square().mean()) / 2

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Return ½ E(D(G(z)) - c)², c being `generator_target`."""
        return (fake_logits.float() - self.target).square().mean() / 2


class HingeLoss(Loss):
    """Teach D only inside its margin of ±1; G's loss is a critic's (Lim & Ye 2017; Miyato et al. 2018, eq. 16)."""

    threshold = 0.0

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))."""
        return (1 - real_logits.float()).relu().mean() + (1 + fake_logits.float()).relu().mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Return -E D(G(z))."""
        return -fake_logits.float().mean()


class WassersteinLoss(Loss):
    """Let D be a critic: E D(x) - E D(G(z)) estimates the Wasserstein-1 distance while its gradient's norm is ≤ 1.

    Arjovsky et al. 2017, eq. 2. The gradient penalty bounds the norm; the loss itself does not.
    """

    estimates_distance = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return minus the estimate."""
        return fake_logits.float().mean() - real_logits.float().mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Return -E D(G(z)), the part of the estimate that G can change."""
        return -fake_logits.float().mean()

    def penalty(self, discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        """Return E(‖∇D‖ - 1)² at one random point between each real and fake image (Gulrajani et al. 2017, §4)."""
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        return (gradient_norms(discriminator, real.lerp(fake, share), labels) - 1).square().mean()


class RelativisticLoss(Loss):
    """Let D compare each real image with a generated one (Jolicoeur-Martineau 2019); R3GAN adds R1 + R2."""

    compares_pairs, gives_probability, labels = True, True, (1.0, 0.0)
    equilibrium = Equilibrium(0.5, math.log(2), math.log(2), 0.0)

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return E softplus(D(G(z)) - D(x)) over pairs of real and fake."""
        return F.softplus(fake_logits.float() - real_logits.float()).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor) -> Tensor:
        """Return D's loss with real and fake exchanged."""
        return F.softplus(real_logits.float() - fake_logits.float()).mean()


LOSSES: dict[str, Callable[[Config], Loss]] = {
    "bce": NonSaturatingLoss, "least_squares": LeastSquaresLoss, "hinge": HingeLoss, "wasserstein": WassersteinLoss,
    "relativistic": RelativisticLoss,
}  # fmt: skip


class DuckLoss(Loss):
    """Give a user's object with `discriminator` and `generator` the attributes of `Loss` that it lacks."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.both = len(inspect.signature(inner.generator).parameters) > 1
        self.__dict__.update({name: getattr(inner, name) for name in dir(inner) if not name.startswith("_")})
        self.discriminator, self.generator = inner.discriminator, self.generator_of_both

    def generator_of_both(self, fake_logits: Tensor, real_logits: Tensor) -> Tensor:
        """Return the user's loss of G, which may take the fake logits alone."""
        return self.inner.generator(fake_logits, real_logits) if self.both else self.inner.generator(fake_logits)


def make_loss(config: Config, kind: Any = None) -> Loss:
    """Return the loss that the Config names, or one of one's own: a class, a function of config, or an object.

    Raises ValueError for what has no `discriminator` and `generator`.
    """
    made = kind = kind or LOSSES[config.loss]
    if callable(kind):
        needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        made = kind(config) if any(p.kind is not p.KEYWORD_ONLY for p in needed) else kind()
    if not all(callable(getattr(made, name, None)) for name in ("discriminator", "generator")):
        raise ValueError(f"losses = {kind!r:.60} makes no loss; it needs the methods discriminator and generator")
    both = len(inspect.signature(made.generator).parameters) > 1
    return made if isinstance(made, Loss) and both else DuckLoss(made)


# ------------------------------------------------------------------------------------------ parts of both players' loss
def gradient_norms(discriminator: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """Return the norm of D's gradient at each image (N, C, H, W), as (N,) in float32, with its graph."""
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):  # the square of a small gradient is lost in half precision
        logits = real_logit(discriminator(images, labels))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def real_logit(outputs: Tensor) -> Tensor:
    """Return the logits (N,) for 'real' among D's outputs (N,) or (N, 1 + K)."""
    return outputs[:, 0] if outputs.ndim == 2 else outputs


def class_loss(outputs: Tensor, labels: Tensor | None, config: Config, real: bool, matching_weight: float) -> Tensor:
    """Return what D's class logits cost, 0 where it has none: outputs (N,) or (N, 1 + K), labels (N,).

    auxiliary: cross-entropy of the class, for both players (Odena et al. 2017). matching, and only for `real` images
    in D's step: a wrong label, drawn at random, should score below the right one (Reed et al. 2016, algorithm 1).
    """
    if outputs.ndim == 1:
        return outputs.new_zeros(())
    classes = outputs[:, 1:].float()
    if config.conditioning == "auxiliary":
        return F.cross_entropy(classes, labels)
    if not real:
        return outputs.new_zeros(())
    wrong = (labels + torch.randint_like(labels, 1, classes.shape[1])) % classes.shape[1]
    lead = classes.gather(1, labels[:, None]) - classes.gather(1, wrong[:, None])
    return matching_weight * F.softplus(-lead).mean()
