"""Losses: each by hand, what theory says of them, penalties, the two steps' gradients, and losses of one's own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, make
from torch import Tensor, nn

import dcgan_utils as du
from dcgan_utils import Config

FAMILY = list(du.LOSSES)
REAL, FAKE = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.5, -3.0, 1.0])
FREE = {"conditional": False}
WAYS = ("projection", "matching", "concatenation", "auxiliary")


@pytest.fixture
def digits(mnist_small):
    return [part[:96] for part in mnist_small]


def loss_of(name: str, a: float = 1.0, b: float = 0.0, **fields) -> du.Loss:
    return du.make_loss(Config(loss=name, real_label_smooth=a, fake_label_smooth=b, **fields))


def logits(p: float) -> Tensor:
    return torch.full((4,), math.log(p / (1 - p)))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# ----------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize(
    ("name", "d", "g"),
    [
        ("bce", (softplus(-2) + softplus(0) + softplus(1) + softplus(0.5) + softplus(-3) + softplus(1)) / 3,
         (softplus(-0.5) + softplus(3) + softplus(-1)) / 3),
        ("least_squares", ((1 + 1 + 4) / 3 + (0.25 + 9 + 1) / 3) / 2, (0.25 + 16 + 0) / 3 / 2),
        ("hinge", (0 + 1 + 2) / 3 + (1.5 + 0 + 2) / 3, -(0.5 - 3 + 1) / 3),
        ("wasserstein", (0.5 - 3 + 1) / 3 - (2 + 0 - 1) / 3, -(0.5 - 3 + 1) / 3),
        ("relativistic", (softplus(0.5 - 2) + softplus(-3 - 0) + softplus(1 + 1)) / 3,
         (softplus(2 - 0.5) + softplus(0 + 3) + softplus(-1 - 1)) / 3),  # the first with the first, and so on
    ],
)  # fmt: skip
def test_each_loss_is_worth_what_it_is_by_hand(name, d, g):
    loss = loss_of(name)
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(d, rel=1e-6)
    assert loss.generator(FAKE, REAL).item() == pytest.approx(g, rel=1e-6)


def test_labels_and_gs_target_are_what_d_and_g_aim_at():
    loss, q = loss_of("bce", generator_target=0.8), FAKE.sigmoid()
    expected = -(0.8 * q.log() + 0.2 * (1 - q).log()).mean()
    assert loss.generator(FAKE, REAL).item() == pytest.approx(expected.item(), rel=1e-5)
    loss, (a, b, c) = loss_of("least_squares", 0.8, 0.3, generator_target=0.9), torch.tensor([[0.8], [0.3], [0.9]])
    assert loss.discriminator(a, b) == loss.generator(c, a) == 0


@pytest.mark.parametrize(
    ("name", "a", "b", "m", "balance_D", "balance_G", "floor"),
    [
        ("bce", 1.0, 0.0, 0.5, 1.3863, 0.6931, 0.0),
        ("bce", 0.9, 0.0, 0.45, 1.3763, 0.7985, 0.3251),
        ("bce", 0.85, 0.2, 0.525, 1.3838, 0.6444, 0.9231),
        ("relativistic", 0.85, 0.2, 0.5, math.log(2), math.log(2), 0.0),  # pairs, whatever the labels
    ],
)
def test_the_equilibrium_and_the_floor_of_ds_loss(name, a, b, m, balance_D, balance_G, floor):
    loss, at_m = loss_of(name, a, b), logits(m)
    assert loss.equilibrium == pytest.approx((m, balance_D, balance_G, floor), abs=6e-5)
    assert loss.discriminator(at_m, at_m).item() == pytest.approx(balance_D, abs=6e-5)
    assert loss.generator(at_m, at_m).item() == pytest.approx(balance_G, abs=6e-5)
    sure = [logits(min(max(p, 1e-7), 1 - 1e-7)) for p in loss.labels]
    assert loss.discriminator(*sure).item() == pytest.approx(floor, abs=6e-5)


@pytest.mark.parametrize("name", ["bce", "least_squares"])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.85, 0.2)])
def test_the_best_d_is_a_mean_of_the_labels_weighted_by_the_densities(name, a, b):
    """D* = (a·p_data + b·p_g) / (p_data + p_g): Goodfellow et al. 2014, prop. 1; Mao et al. 2017, eq. 5."""
    p_data, p_g = torch.tensor([6, 3, 1]), torch.tensor([1, 3, 6])
    best = (a * p_data + b * p_g) / (p_data + p_g)
    outputs = (best.logit() if name == "bce" else best).requires_grad_()
    loss_of(name, a, b).discriminator(outputs.repeat_interleave(p_data), outputs.repeat_interleave(p_g)).backward()
    assert torch.allclose(outputs.grad, torch.zeros(3), atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_gs_gradient_does_not_vanish_where_d_is_sure(name):
    """Goodfellow et al. 2014, §3: it is strongest there."""
    fake = torch.tensor([-50.0, 0.0], requires_grad=True)
    loss_of(name).generator(fake, torch.tensor([50.0, 0.0])).backward()
    assert fake.grad[0] < -0.45
    assert fake.grad[0] <= fake.grad[1]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 50), (torch.bfloat16, 50), (torch.float16, 60_000)])
def test_losses_are_finite_and_float32_at_far_logits(name, dtype, far):
    loss, x = loss_of(name, 0.9), torch.tensor([-far, far, 0.0], dtype=dtype, requires_grad=True)
    for value in (loss.discriminator(x, x.flip(0)), loss.generator(x, x.flip(0).detach())):
        assert (value.dtype, bool(value.isfinite())) == (torch.float32, True)
        assert torch.autograd.grad(value, x)[0].isfinite().all()
    assert all(value.isfinite() for value in loss.readings(x.float(), x.float().flip(0)).values())


@pytest.mark.parametrize("name", FAMILY)
def test_readings_are_means_over_images_or_over_pairs(name):
    loss, lead = loss_of(name), REAL - FAKE
    outputs = {"bce": (REAL.sigmoid(), FAKE.sigmoid()), "relativistic": (lead.sigmoid(), (-lead).sigmoid())}
    x, g = outputs.get(name, (REAL, FAKE))
    right = {"wasserstein": 2 / 3, "relativistic": 2 / 3}.get(name, 1 / 3)  # real leads in two pairs of three
    expected = {"D_x": x.mean(), "D_G_z": g.mean(), "D_gap": x.mean() - g.mean(), "D_std": torch.cat([x, g]).std()}
    for key, value in {**expected, "D_acc": torch.tensor(right)}.items():
        assert torch.allclose(loss.readings(REAL, FAKE)[key], value, atol=1e-6), key
    assert torch.allclose(loss.probability(REAL), REAL.sigmoid() if name == "bce" else REAL)


@pytest.mark.parametrize(("name", "a", "b"), [("bce", 0.9, 0.0), ("bce", 0.85, 0.2), ("least_squares", 0.85, 0.2)])
def test_d_accuracy_has_its_threshold_in_the_middle_of_the_labels(name, a, b):
    outputs = [(a + b) / 2 + 0.02, (a + b) / 2 - 0.02]
    above, below = (logits(p) if name == "bce" else torch.full((4,), p) for p in outputs)
    for real, fake, expected in ((above, below, 1.0), (below, above, 0.0), (above, above, 0.5), (below, below, 0.5)):
        assert loss_of(name, a, b).readings(real, fake)["D_acc"].item() == expected


# ----------------------------------------------------------------------------------------------- penalties
class Bowl(nn.Module):
    """Score x by ‖x‖² / 2, times 1 + label: the gradient's norm at x is (1 + label) ‖x‖."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return images.flatten(1).square().sum(dim=1) / 2 * (1 if labels is None else 1 + labels)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "wasserstein"])
def test_r1_and_r2_are_the_mean_square_of_the_gradient_at_each_image_with_its_label(name):
    real, fake, labels = torch.randn(4, 1, 3, 3), 3 * torch.randn(4, 1, 3, 3), torch.tensor([0, 1, 2, 5])
    squares = [x.flatten(1).square().sum(dim=1) * (1 + labels) ** 2 for x in (real, fake)]
    assert loss_of(name).penalty(Bowl(), real, fake, labels).item() == pytest.approx(torch.cat(squares).mean().item())


def test_wgans_penalty_is_taken_at_one_random_point_between_each_real_and_its_fake():
    loss, real, fake = loss_of("wasserstein"), torch.full((1000, 1, 1, 1), 2.0), torch.full((1000, 1, 1, 1), 6.0)
    points = torch.tensor([loss.penalty(Bowl(), real[:1], fake[:1], None).item() for _ in range(300)]).sqrt() + 1
    assert (points.min(), points.max()) == (pytest.approx(2, abs=0.2), pytest.approx(6, abs=0.2))
    assert points.mean().item() == pytest.approx(4, abs=0.3)  # uniform from 2 to 6, and for every pair anew
    assert loss.penalty(Bowl(), real, fake, None).item() == pytest.approx((4 - 1) ** 2 + 16 / 12, abs=0.6)


def test_the_norms_of_gradients_are_float32_also_under_autocast():
    """The square of a small gradient is lost in half precision."""
    D, x = make(**FREE).discriminator, torch.randn(4, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        norms = du.gradient_norms(D, x, None)
    assert torch.equal(norms, du.gradient_norms(D, x, None))


def test_a_lazy_penalty_is_due_every_so_many_iterations_of_the_whole_run(digits):
    gan, due = make(penalty_interval=4), []
    watch = du.Callback()
    watch.on_batch_end = lambda gan: due.append(gan.penalty_is_due())  # of the next iteration
    gan.train(2, data=digits, callbacks=[watch])
    assert [n for n, is_due in enumerate(due, 1) if is_due] == [4, 8, 12]
    for changes, expected in (({"penalty_interval": 3}, True), ({"gradient_penalty": 0.0}, False)):
        gan.reconfigure(**changes)
        assert gan.penalty_is_due() == expected


# ----------------------------------------------------------------------------------------------- the two steps
def by_hand(name: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return D's and G's loss, with labels 0.9 and 0.1."""
    if name == "bce":
        a, b = (F.logsigmoid(x) * t + F.logsigmoid(-x) * (1 - t) for x, t in ((real, 0.9), (fake, 0.1)))
        return -a.mean() - b.mean(), -F.logsigmoid(fake).mean()
    if name == "wasserstein":
        return fake.mean() - real.mean(), -fake.mean()
    return -F.logsigmoid(real - fake).mean(), -F.logsigmoid(fake - real).mean()


def logit_and_cost(way: str, outputs: Tensor, labels: Tensor, wrong: bool = False) -> tuple[Tensor, Tensor | float]:
    """Return logits (N,), and what the logits of two classes cost: there is but one wrong label."""
    rows = torch.arange(len(outputs))
    if way == "auxiliary":
        return outputs[:, 0], -outputs[:, 1:].log_softmax(dim=1)[rows, labels].mean()
    if way == "matching":
        lead = outputs[rows, 1 + labels] - outputs[rows, 2 - labels]
        return outputs[:, 0], -0.3 * F.logsigmoid(lead).mean() if wrong else 0.0
    return outputs, 0.0


def penalty_by_hand(name: str, D: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
    norms = []
    for x in (real, fake):
        x = x.detach().requires_grad_()
        scores = D(x, labels)
        scores = scores[:, 0] if scores.ndim == 2 else scores
        norms.append(torch.autograd.grad(scores.sum(), x, create_graph=True)[0].flatten(1).norm(dim=1))
    return (norms[0] - 1).square().mean() if name == "wasserstein" else torch.cat(norms).square().mean()


def assert_same(gradients: list[Tensor | None], total: Tensor, network: nn.Module) -> None:
    expected = torch.autograd.grad(total, list(network.parameters()), materialize_grads=True)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(torch.zeros_like(theirs) if mine is None else mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bce", "relativistic", "wasserstein"])
@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in (du.FastDCGAN, du.ConditionalDCGAN) for way in (*WAYS, "")] + [(du.ProgressiveGAN, "")],
)
def test_the_gradients_of_both_steps_are_those_of_the_losses_written_out(name, kind, way, digits, monkeypatch):
    """Class costs of both kinds of images, penalties with their labels and apart, pairs: all that costs, no more."""
    labeled = {"conditional": True, "conditioning": way, "num_classes": 2, "matching_weight": 0.3} if way else FREE
    fields = {"gradient_penalty": 0.7, "penalty_interval": 3, "batch_norm_D": False, **labeled}
    gan = make(kind, loss=name, real_label_smooth=0.9, fake_label_smooth=0.1, **fields)
    real, z = du.normalize(du.resize_images(digits[0][:16], gan.config.image_size)), torch.randn(16, 8)
    labels = torch.arange(16) % 3 % 2 if way else None
    networks, kept = {"G": gan.generator, "D": gan.discriminator}, {}
    G, D = (copy.deepcopy(network) for network in networks.values())
    monkeypatch.setattr(  # nothing moves, and what it would move by is kept
        gan.engine, "step", lambda player, _: kept.update({player: [p.grad for p in networks[player].parameters()]})
    )
    if kind is du.ProgressiveGAN:  # its D compares the images of a batch
        [network.grow(1.0) for network in (*networks.values(), G, D)]
    fake = gan.generator(z, labels)
    fake = real + 0 * fake if name == "wasserstein" else fake  # so that any point between the two is that image
    measured = du.discriminator_step(gan, real, fake, labels)
    x, cost = logit_and_cost(way, D(real, labels), labels, wrong=True)
    g, more = logit_and_cost(way, D(fake.detach(), labels), labels)
    loss = by_hand(name, x, g)[0]
    total = loss + cost + more + 0.7 * 3 * penalty_by_hand(name, D, real, fake, labels)
    assert_same(kept["D"], total, D)
    assert measured["loss_D"].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)  # as its equilibrium counts
    gan.generator.load_state_dict(G.state_dict())
    rivals = torch.linspace(-2, 2, 16)  # D's outputs for the real images
    measured = du.generator_step(gan, gan.generator(z, labels), labels, rivals)
    g, cost = logit_and_cost(way, D(G(z, labels), labels), labels)
    loss = by_hand(name, rivals, g)[1]
    assert_same(kept["G"], loss + cost, G)
    assert measured["loss_G"].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("decay", "left"), [(True, 0.25), (False, 1.0)])
def test_the_wrong_label_is_each_of_the_others_as_often(decay, left):
    """Class logits that favor one class by 1000: a wrong label costs that much when it is that class."""
    gan, labels = make(matching_weight=0.5, matching_decay=decay), torch.full((9000,), 4)
    gan.lr_factor = 0.25  # what the schedule leaves of the learning rates, and of the weight where it decays
    for favored in (0, 5, 9, 4):
        outputs = torch.zeros(9000, 11)
        outputs[:, 1 + favored] = 1000.0
        _, cost = du.discriminate(gan, lambda images, labels, outputs=outputs: outputs, torch.zeros(9000), labels, True)
        level = math.log(2) * 8 / 9  # all other pairs are equal
        expected = 0.0 if favored == 4 else 0.5 * left * (1000 / 9 + level)  # the right label is never drawn
        assert cost.item() == pytest.approx(expected, abs=5 * 500 * left * math.sqrt(8 / 81 / 9000))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN])
def test_every_loss_trains_every_kind_of_recipe(name, kind, digits):
    penalty = {"bce": 0.0, "wasserstein": 10.0}.get(name, 1.0)
    history = make(kind, loss=name, batch_norm_D=False, gradient_penalty=penalty).train(1, data=digits, callbacks=[])
    assert min(history["update_ratio_D"][0], history["update_ratio_G"][0]) > 1e-4
    assert history["grad_G_after_D_step"] == [0]
    assert all(math.isfinite(history[metric][0]) for metric in du.METRICS)
    assert (history.line().get("gradient_norm") is None) == (name == "bce")


# ----------------------------------------------------------------------------------------------- losses of one's own
class OwnHinge:
    """A hinge that knows nothing of this package."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return (1 - real).relu().mean() + (1 + fake).relu().mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class OwnPairs:
    def __init__(self, config: Config) -> None: ...

    discriminator = staticmethod(lambda real, fake: F.softplus(fake - real).mean())
    generator = staticmethod(lambda fake, real: F.softplus(real - fake).mean())


class OwnRelativistic(du.RelativisticLoss):
    """It inherits what D's outputs mean; of the others nothing is known."""


HingeOfLoss = type("HingeOfLoss", (OwnHinge, du.Loss), {})


@pytest.mark.parametrize("kind", [OwnHinge, HingeOfLoss, OwnPairs, OwnRelativistic])
def test_a_loss_of_ones_own_trains_as_its_like_and_is_shown_for_what_it_is(kind, digits):
    gan = type("Mine", (du.FastDCGAN,), {"losses": kind})(**TINY[du.FastDCGAN])
    history = gan.train(2, data=digits, callbacks=[])
    like = make(loss="hinge" if issubclass(kind, OwnHinge) else "relativistic").train(2, data=digits, callbacks=[])
    for metric in ("loss_D", "loss_G", "grad_D", "grad_G"):
        assert history[metric] == pytest.approx(like[metric], rel=1e-4, abs=1e-6)
    images, labels = du.normalize(digits[0][:16]), digits[1][:16]
    with torch.no_grad():
        raw = du.real_logit(gan.discriminator.eval()(images, labels))
    assert torch.allclose(gan.score(images, labels), raw, atol=1e-5)
    gap, probable = gan.loss.readings(raw, raw + 5)["D_gap"].item(), kind is OwnRelativistic
    assert gap == pytest.approx(2 / (1 + math.exp(5)) - 1 if probable else -5, abs=1e-4)
    shown = [line.get_label() for ax in gan.plot_history().axes for line in ax.lines]
    assert ("D(x)" in shown) == any("equilibrium" in label for label in shown) == probable
    names = {finding.name for finding in gan.diagnose().findings}
    assert ({"D's outputs", "oscillation", "D loss (theory)"} <= names) == probable
    assert not any("README" in name or "D(x) + D(G(z))" in name for name in names)
    gan.restart()
    assert type(gan.train(1, data=digits, callbacks=[]).loss) is type(history.loss)
