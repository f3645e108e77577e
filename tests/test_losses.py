"""The loss family and WGAN-GP: each loss at a case worked out by hand, penalties at critics of known slope."""

import dataclasses
import math

import pytest
import torch
from tiny import BCE, make, same, weights
from torch import nn

import dcgan_utils as du
from dcgan_utils import Config

FAMILY = list(du.LOSSES)
NO_PENALTY = {"gradient_penalty": 0.0}
REAL, FAKE = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.5, -3.0, 1.0])
OF_PAIRS = (
    torch.tensor([1 / (1 + math.exp(-d)) for d in (1.5, 3, -2)]),
    torch.tensor([1 / (1 + math.exp(d)) for d in (1.5, 3, -2)]),
)


@pytest.fixture(scope="module")
def digits():
    images, labels = du.load_images("mnist", "test")
    return images[:96], labels[:96]


def loss_of(name, **fields):
    """Return a loss of the family with the labels 1 and 0 unless told otherwise."""
    config = Config(loss=name, **{"real_label_smooth": 1.0, "fake_label_smooth": 0.0, **fields})
    return du.LOSSES[name](config)


def softplus(x):
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
         (softplus(2 - 0.5) + softplus(0 + 3) + softplus(-1 - 1)) / 3),
    ],
)  # fmt: skip
def test_each_loss_is_worth_what_it_is_by_hand(name, d, g):
    loss = loss_of(name)
    rivals = [REAL] if name == "relativistic" else []
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(d, rel=1e-6)
    assert loss.generator(FAKE, *rivals).item() == pytest.approx(g, rel=1e-6)


def test_least_squares_aims_at_the_labels():
    loss = loss_of("least_squares", real_label_smooth=0.8, fake_label_smooth=0.3, generator_target=0.9)
    assert loss.discriminator(torch.full((4,), 0.8), torch.full((4,), 0.3)).item() == pytest.approx(0, abs=1e-12)
    assert loss.generator(torch.full((4,), 0.9)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.85, 0.2)])
def test_the_best_least_squares_d_is_the_one_of_cross_entropy(a, b):
    """Mao et al. 2017, eq. 5: D* = (a·p_data + b·p_g) / (p_data + p_g)."""
    p_data, p_g = torch.tensor([6.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 6.0])
    best = (a * p_data + b * p_g) / (p_data + p_g)
    answers = best.clone().requires_grad_()
    real = torch.cat([answers[k].repeat(int(p_data[k])) for k in range(3)])
    fake = torch.cat([answers[k].repeat(int(p_g[k])) for k in range(3)])
    loss_of("least_squares", real_label_smooth=a, fake_label_smooth=b).discriminator(real, fake).backward()
    assert torch.allclose(answers.grad, torch.zeros(3), atol=1e-6)


def test_hinge_forgets_what_lies_beyond_its_margin():
    real, fake = torch.tensor([1.5, 0.5], requires_grad=True), torch.tensor([-1.5, -0.5], requires_grad=True)
    loss_of("hinge").discriminator(real, fake).backward()
    assert real.grad.tolist() == [0, -0.5]
    assert fake.grad.tolist() == [0, 0.5]


@pytest.mark.parametrize("name", ["wasserstein", "relativistic"])
def test_only_differences_count_where_no_value_is_aimed_at(name):
    loss = loss_of(name)
    assert loss.discriminator(REAL + 7, FAKE + 7).item() == pytest.approx(
        loss.discriminator(REAL, FAKE).item(), rel=1e-5
    )
    reading = du.read_discriminator(REAL, FAKE, Config(loss=name))
    shifted = du.read_discriminator(REAL + 7, FAKE + 7, Config(loss=name))
    assert reading["D_acc"].item() == shifted["D_acc"].item() == pytest.approx(2 / 3)  # pairs in which real leads
    assert reading["gap"].item() == pytest.approx(shifted["gap"].item(), abs=1e-6)
    if name == "relativistic":  # a pair's probabilities do not know where both lie
        for reads in ("D_x", "D_G_z", "D_std"):
            assert reading[reads].item() == pytest.approx(shifted[reads].item(), abs=1e-6)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32(name, dtype):
    rivals = [REAL.to(dtype)] if name == "relativistic" else []
    loss = loss_of(name)
    assert loss.discriminator(REAL.to(dtype), FAKE.to(dtype)).dtype == torch.float32
    assert loss.generator(FAKE.to(dtype), *rivals).dtype == torch.float32


def test_d_is_reported_as_it_answers():
    for name in FAMILY:
        reading = du.read_discriminator(REAL, FAKE, Config(loss=name))
        expected = {"bce": (REAL.sigmoid(), FAKE.sigmoid()), "relativistic": OF_PAIRS}.get(name, (REAL, FAKE))
        assert reading["D_x"].item() == pytest.approx(expected[0].mean().item(), abs=1e-6)
        assert reading["D_G_z"].item() == pytest.approx(expected[1].mean().item(), abs=1e-6)
        assert reading["D_std"].item() == pytest.approx(torch.cat(expected).std().item(), abs=1e-6)
        assert reading["gap"].item() == pytest.approx((reading["D_x"] - reading["D_G_z"]).item(), abs=1e-6)
    assert du.read_discriminator(REAL, FAKE, Config(loss="hinge"))["D_acc"].item() == pytest.approx(1 / 3)
    squares = Config(loss="least_squares", real_label_smooth=1.0, fake_label_smooth=0.0)
    assert du.read_discriminator(REAL, FAKE, squares)["D_acc"].item() == pytest.approx((1 / 3 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("real", "fake", "D_x", "D_acc", "D_std"),
    [
        (0.0, 0.0, 0.5, 0.0, 0.0),  # nothing leads: D knows no better than a coin
        (math.log(3), 0.0, 0.75, 1.0, 0.25),
        (7.0, 7.0 + math.log(4), 0.2, 0.0, 0.3),
        (-40.0, 40.0, 0.0, 0.0, 0.5),
    ],
)
def test_pairs_are_read_as_probabilities(real, fake, D_x, D_acc, D_std):
    """Of sixteen pairs alike: sigmoid of the difference, for the fake one what is left of 1."""
    config = Config(loss="relativistic", real_label_smooth=0.7, fake_label_smooth=0.3)  # labels do not matter
    reading = du.read_discriminator(torch.full((16,), real), torch.full((16,), fake), config)
    assert reading["D_x"].item() == pytest.approx(D_x, abs=1e-6)
    assert reading["D_G_z"].item() == pytest.approx(1 - D_x, abs=1e-6)
    assert reading["gap"].item() == pytest.approx(2 * D_x - 1, abs=1e-6)
    assert reading["D_acc"].item() == D_acc
    assert reading["D_std"].item() == pytest.approx(D_std * math.sqrt(32 / 31), abs=1e-6)


def test_a_probability_of_pairs_is_the_mean_over_pairs():
    reading = du.read_discriminator(REAL, FAKE, Config(loss="relativistic"))
    by_hand = sum(1 / (1 + math.exp(-d)) for d in (1.5, 3.0, -2.0)) / 3
    assert reading["D_x"].item() == pytest.approx(by_hand, abs=1e-6)
    assert reading["D_G_z"].item() == pytest.approx(1 - by_hand, abs=1e-6)
    assert abs(by_hand - 1 / (1 + math.exp(-2.5 / 3))) > 0.01  # and not the probability of the mean


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.85, 0.2)])
def test_targets_are_the_labels_and_of_pairs_one_and_zero(name, a, b):
    config = Config(loss=name, real_label_smooth=a, fake_label_smooth=b)
    assert du.targets(config) == ((1.0, 0.0) if name == "relativistic" else (a, b))


@pytest.mark.parametrize(("a", "b", "wish"), [(1.0, 0.0, 1.0), (0.85, 0.2, 0.9)])
def test_the_equilibrium_of_pairs_is_ln_2_whatever_the_labels(a, b, wish):
    config = Config(loss="relativistic", real_label_smooth=a, fake_label_smooth=b, generator_target=wish)
    assert du.discriminator_loss_bounds(config) == pytest.approx((0.0, math.log(2)))
    assert du.generator_loss_at_equilibrium(config) == pytest.approx(math.log(2))
    loss, same_to_all = du.RelativisticLoss(config), torch.full((8,), 3.0)
    assert loss.discriminator(same_to_all, same_to_all).item() == pytest.approx(math.log(2))
    assert loss.generator(same_to_all, same_to_all).item() == pytest.approx(math.log(2))
    assert loss.discriminator(same_to_all + 50, same_to_all).item() == pytest.approx(0, abs=1e-12)


# ----------------------------------------------------------------------------------------------- penalties
class Plane(nn.Module):
    """A critic whose slope is the same everywhere: w · x + c."""

    def __init__(self, slope):
        super().__init__()
        direction = torch.linspace(1, 2, 64)
        self.weight = nn.Parameter(direction / direction.norm() * slope)

    def forward(self, images, labels=None):
        return images.flatten(1) @ self.weight + 5


class Bowl(nn.Module):
    """A critic whose slope at x is ‖x‖."""

    def forward(self, images, labels=None):
        return images.flatten(1).square().sum(dim=1) / 2


def penalty_of(critic, loss, weight, real, fake, every=1):
    """Return the penalty of a critic that stands in for D."""
    config = Config(loss=loss, gradient_penalty=weight, penalty_every=every, batch_norm_D=False)
    gan = type("Holder", (), {"config": config, "discriminator": critic})
    return du.gradient_penalty(gan, real, fake, None)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
def test_the_penalties_of_a_linear_critic_are_those_of_its_slope(slope):
    real, fake = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    critic = Plane(slope)
    assert du.slopes(critic, real, None).tolist() == pytest.approx([slope] * 6, abs=1e-5)
    one = penalty_of(critic, "wasserstein", 10.0, real, fake)
    assert one.item() == pytest.approx(10 * (slope - 1) ** 2, abs=1e-4)
    zero = penalty_of(critic, "relativistic", 0.5, real, fake)
    assert zero.item() == pytest.approx(0.5 * slope**2, abs=1e-4)
    one.backward()  # the critic feels it: d/ds of 10 (s - 1)²
    along = critic.weight.grad @ (torch.linspace(1, 2, 64) / torch.linspace(1, 2, 64).norm())
    assert along.item() == pytest.approx(20 * (slope - 1) if slope else 0, abs=1e-3)


def test_r1_and_r2_look_at_both_kinds_and_wasserstein_between_them():
    real, fake = torch.full((4, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1), 6.0)
    assert penalty_of(Bowl(), "relativistic", 1.0, real, fake).item() == pytest.approx((4 + 36) / 2)
    assert penalty_of(Bowl(), "hinge", 1.0, real, fake).item() == pytest.approx((4 + 36) / 2)
    seen = [penalty_of(Bowl(), "wasserstein", 1.0, real[:1], fake[:1]).item() for _ in range(200)]
    points = [1 + math.sqrt(value) for value in seen]  # the slope of the bowl is the point itself
    assert 2 <= min(points) < 2.5
    assert 5.5 < max(points) <= 6


@pytest.mark.parametrize("loss", ["wasserstein", "relativistic", "hinge"])
@pytest.mark.parametrize("every", [1, 2, 8])
def test_a_lazy_penalty_is_as_many_times_as_strong(loss, every):
    """So that the mean over all iterations stays what it was (Karras et al. 2020, appendix B)."""
    real, fake = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    expected = {"wasserstein": (3.0 - 1) ** 2}.get(loss, 3.0**2)
    lazy = penalty_of(Plane(3.0), loss, 0.7, real, fake, every)
    assert lazy.item() == pytest.approx(0.7 * every * expected, rel=1e-5)


def penalties_of(gan, monkeypatch):
    """Return a list in which every penalty leaves the iteration that it was taken at."""
    taken, take = [], du.gradient_penalty
    monkeypatch.setattr(du, "gradient_penalty", lambda gan, *x: (taken.append(gan.step), take(gan, *x))[1])
    return taken


@pytest.mark.parametrize("kind", [du.FastDCGAN, du.DCGAN])
@pytest.mark.parametrize(
    ("every", "d_steps", "expected"),
    [(1, 1, list(range(12))), (2, 1, [0, 2, 4, 6, 8, 10]), (5, 1, [0, 5, 10]), (8, 1, [0, 8]), (1000, 1, [0]),
     (2, 2, [0, 0, 2, 2, 4, 4])],
)  # fmt: skip
def test_a_lazy_penalty_is_taken_at_every_so_many_iterations(kind, every, d_steps, expected, digits, monkeypatch):
    """Counted over the whole run, not anew in every epoch of six batches; all of D's steps of an iteration take it."""
    fields = {"loss": "relativistic", "gradient_penalty": 0.2, "batch_norm_D": False}
    gan = make(kind, penalty_every=every, d_steps=d_steps, **fields)
    taken = penalties_of(gan, monkeypatch)
    gan.train(2, data=digits, callbacks=[])
    assert taken == expected


def test_a_lazy_penalty_keeps_its_turn_over_a_checkpoint(digits, tmp_path, monkeypatch):
    gan = make(du.FastDCGAN, penalty_every=4)
    taken = penalties_of(gan, monkeypatch)
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "p")
    again = du.GAN.load(tmp_path / "p")
    again.train(1, data=digits, callbacks=[])
    assert taken == [0, 4, 8]
    again.reconfigure(penalty_every=3)  # and may be changed while training
    again.train(1, data=digits, callbacks=[])
    assert taken == [0, 4, 8, 12, 15]
    again.reconfigure(gradient_penalty=0.0)
    again.train(1, data=digits, callbacks=[])
    assert len(taken) == 5


def test_between_its_penalties_d_steps_as_without_one(digits):
    """The first iteration pays, the second does not: from one state, with and without, D moves alike there."""
    moved = {}
    for weight in (0.0, 0.2):
        for step in (0, 1):
            gan = make(du.FastDCGAN, gradient_penalty=weight, penalty_every=2, conditioning="projection")
            gan._set_data(digits)
            gan.step = step
            with torch.random.fork_rng():
                torch.manual_seed(0)
                fake = gan._fake(16, gan.labels[:16])
            du.train_discriminator(gan, du.normalise(gan.images[:16]), fake, gan.labels[:16])
            moved[weight, step] = weights(gan.discriminator)
    assert torch.equal(moved[0.0, 0], moved[0.0, 1])
    assert torch.equal(moved[0.2, 1], moved[0.0, 1])
    assert not torch.equal(moved[0.2, 0], moved[0.0, 0])


def test_without_a_penalty_no_random_number_is_drawn_for_it(digits):
    """The public recipes stay what they were, bit for bit."""
    torch.manual_seed(0)
    gan = make(du.StableDCGAN)
    gan._set_data(digits)
    fake = gan._fake(16, None)
    state = torch.get_rng_state()
    gan.discriminator.eval()  # Dropout draws too
    du.train_discriminator(gan, du.normalise(gan.images[:16]), fake, None)
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss": "wgan"}, r"Config\.loss = 'wgan' is not one of bce, least_squares, hinge, wasserstein, relativistic"),
        ({"gradient_penalty": -1.0}, r"Config\.gradient_penalty = -1\.0 is outside its range 0 … 10000"),
        ({"gradient_penalty": 10.0}, r"Config\.gradient_penalty = 10 .*BatchNorm.*batch_norm_D=False"),
    ],
)
def test_bad_settings_of_a_loss_are_refused_in_one_line(fields, says):
    with pytest.raises(ValueError, match=says) as error:
        du.DCGAN(**fields)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- in training
def test_wgan_gp_is_what_its_paper_says():
    gan = du.WGANGP()
    assert type(gan.loss) is du.WassersteinLoss
    assert (gan.config.gradient_penalty, gan.config.d_steps, gan.config.beta1, gan.config.beta2) == (10, 5, 0, 0.9)
    kinds = {type(module) for module in gan.discriminator.modules()}
    assert not kinds & {nn.BatchNorm1d, nn.BatchNorm2d}
    assert du.RECIPES["wgan-gp"] is du.WGANGP


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN])
def test_every_loss_trains_every_kind_of_recipe(name, kind, digits):
    """With labels and without, with the penalty that goes with it; both players move and nothing diverges."""
    penalty = {"gradient_penalty": {"bce": 0.0, "wasserstein": 10.0}.get(name, 1.0), "penalty_every": 1}
    gan = make(kind, loss=name, batch_norm_D=False, **penalty)
    history = gan.train(1, data=digits, callbacks=[])
    assert min(history["move_D"][0], history["move_G"][0]) > 1e-4
    assert history["leak"] == [0]
    assert all(parameter.grad is None for parameter in gan.generator.parameters())
    assert (history["slope"][0] is None) == (name == "bce")
    assert gan.diagnose().findings


def test_the_penalty_holds_the_slope_where_theory_says(digits):
    """Along a line of length d the critic gains s·d - λ (s - 1)², which is largest at s = 1 + d / 2λ."""
    slopes = {}
    for weight in (0.0, 10.0):
        gan = make(du.WGANGP, gradient_penalty=weight, lr_D=2e-3, g_steps=0, batch_size=32)
        gan.train(40, data=digits, callbacks=[])
        slopes[weight] = gan.slope()
    distance = gan.history["gap"][-1] / slopes[10.0]
    assert slopes[10.0] == pytest.approx(1 + distance / 20, rel=0.2)
    assert slopes[0.0] > 30


def test_a_relativistic_generator_compares_with_d_s_answers_to_real_images(digits):
    """In G's step other answers to the real images give another gradient; the other losses do not look."""
    for name, matters in (("relativistic", True), ("hinge", False)):
        moved = []
        for real_logits in (torch.zeros(16), torch.arange(16.0)):
            gan = make(du.FastDCGAN, conditional=False, loss=name, lr_G=1e-3)
            gan._set_data(digits)
            gan.generator.train()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                fake = gan._fake(16, None)
            du.train_generator(gan, fake, None, real_logits)
            moved.append(weights(gan.generator))
        assert torch.equal(*moved) != matters


def test_a_loss_may_be_changed_while_training(digits):
    gan = make(du.FastDCGAN, **{**BCE, "batch_norm_D": False})
    gan.train(1, data=digits, callbacks=[])
    gan.reconfigure(loss="wasserstein", gradient_penalty=10.0)
    gan.train(1, data=digits, callbacks=[])
    assert isinstance(gan.loss, du.WassersteinLoss)
    assert gan.history["slope"][0] is None
    assert gan.history["slope"][1] > 0


def test_save_and_load_keep_loss_and_penalty(digits, tmp_path):
    gan = make(du.WGANGP, d_steps=2)
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "w")
    again = du.GAN.load(tmp_path / "w")
    assert type(again) is du.WGANGP
    assert same(gan, again)
    assert again.config == gan.config
    assert again.history["slope"] == gan.history["slope"]
    gan.train(1, data=digits, callbacks=[])
    again.train(1, data=digits, callbacks=[])
    assert same(gan, again)


# ----------------------------------------------------------------------------------------------- what is shown
def panel(loss, **readings):
    """Return the panel of one healthy epoch but for what is given."""
    config = {"wasserstein": du.WGANGP.defaults}.get(loss, dataclasses.replace(Config(), loss=loss))
    history = du.History(config)
    line = {"loss_D": -3.0, "loss_G": 1.0, "D_x": 2.0, "D_G_z": -1.0, "D_acc": 1.0, "D_std": 2.0, "grad_D": 1.0}
    line |= {"grad_G": 1.0, "leak": 0.0, "gap": 3.0, "swing": 4.0, "diversity": 0.9, "spacing": 0.9, "slope": 1.0}
    line |= {"epoch": 1.0, "seconds": 1.0, "images_per_second": 1.0, **readings}
    for name in history:
        history[name].append(line.get(name))
    return du.diagnose(history, bands=du.DCGAN_BANDS)


def test_the_theory_of_cross_entropy_is_not_shown_for_other_losses():
    """Pairs have probabilities too, but neither a README nor a sum that could be wrong."""
    for name in FAMILY:
        shown = {finding.name for finding in panel(name).findings}
        of_labels = {"D(x) (README)", "D(G(z)) (README)", "D(x) + D(G(z)) (theory)"}
        of_chances = {"separation (theory)", "D loss (theory)", "D too strong"}
        of_chances |= {"D too weak", "labels", "D's answers", "oscillation"}
        assert of_labels <= shown if name == "bce" else not of_labels & shown
        assert of_chances <= shown if name in ("bce", "relativistic") else not of_chances & shown
        assert ({"Wasserstein estimate", "critic's slope"} <= shown) == (name == "wasserstein")
        assert {"sample diversity", "copies among samples", "a player stands still", "detach"} <= shown


PAIRS = {"loss_D": 0.55, "loss_G": 0.9, "D_x": 0.6, "D_G_z": 0.4, "D_acc": 0.7, "D_std": 0.2, "gap": 0.2, "swing": 0.05}


@pytest.mark.parametrize(
    ("readings", "cause"),
    [
        ({}, None),
        ({"D_x": 0.97, "D_G_z": 0.03, "D_acc": 1.0}, "D too strong"),  # separation 0.94
        ({"loss_G": 9.1 * math.log(2)}, "D too strong"),
        ({"D_x": 0.4, "D_G_z": 0.6}, "D too weak"),
        ({"D_std": 0.0}, "D's answers"),
        ({"swing": 0.4}, "oscillation"),
        ({"D_acc": 0.1, "loss_D": 0.4}, "labels"),
    ],
)
def test_faults_of_pairs_are_told_by_their_probabilities(readings, cause):
    found = panel("relativistic", **{**PAIRS, **readings}).cause
    assert (found and found.name) == cause
    assert cause in (None, "labels") or dataclasses.replace(Config(loss="relativistic"), **found.changes)


@pytest.mark.parametrize(
    ("readings", "cause", "field"),
    [
        ({"gap": -0.5}, "Wasserstein estimate", "lr_G"),
        ({"slope": 9.0}, "critic's slope", None),
        ({"slope": 0.01}, "critic's slope", None),
        ({"spacing": 0.05}, "copies among samples", None),
        ({"move_D": 0.0}, "a player stands still", None),
    ],
)
def test_a_critic_has_faults_of_its_own(readings, cause, field):
    assert panel("wasserstein").status == "green"
    found = panel("wasserstein", **readings).cause
    assert found.name == cause
    assert field is None or field in found.changes
    assert dataclasses.replace(du.WGANGP.defaults, **found.changes)


def test_a_critic_without_batch_norm_in_g_is_not_told_to_take_it_in_d():
    config = dataclasses.replace(du.WGANGP.defaults, batch_norm_G=False)
    mended = dataclasses.replace(config, **du.usual_suspect(config))  # a penalty and BatchNorm in D are refused
    assert (mended.batch_norm_G, mended.batch_norm_D) == (True, False)


def test_what_the_remedies_of_a_critic_change_fits():
    """A critic without penalty is told to take one, and then may have no BatchNorm."""
    config = dataclasses.replace(du.WGANGP.defaults, gradient_penalty=0.0, batch_norm_D=True, d_steps=1)
    for finding in (du._check_slope({"slope": 50.0}, config), du._check_critic({"gap": -1.0}, config)):
        assert finding.status == "red"
        assert dataclasses.replace(config, **finding.changes) != config
    assert du._check_slope({}, config).status == "red"  # a slope that nothing holds was not measured


@pytest.mark.parametrize("name", FAMILY)
def test_pictures_of_every_loss_can_be_drawn(name, digits):
    gan = make(du.FastDCGAN, **{**BCE, "loss": name}, log_every=1)
    gan.train(2, data=digits, callbacks=[])
    _, answers, _ = gan.plot_history().axes
    labels = [line.get_label() for line in answers.lines]
    assert ("Wasserstein estimate" in labels) == (name == "wasserstein")
    assert ("D(x)" in labels) == (name != "wasserstein")
    assert any("equilibrium" in str(label) for label in labels) == (name in ("bce", "relativistic"))
    look = du.take_look(gan)
    figure = du.plot_look(look, gan.history)
    assert du.figure_png(figure)[:4] == b"\x89PNG"
    assert any("equilibrium" in ax.get_title() for ax in figure.axes) == (name in ("bce", "relativistic"))


def test_the_report_names_the_estimate(digits, capsys, tmp_path):
    gan = make(du.WGANGP, out_dir=str(tmp_path))
    gan.train(1, data=digits, callbacks=[du.EpochReport()])
    said = capsys.readouterr().out
    assert f"Wasserstein estimate {gan.history['gap'][0]:.3f}" in said
    assert f"slope {gan.history['slope'][0]:.2f}" in said
    assert "D accuracy" not in said
    assert "critic's slope" in said


def test_a_critic_scores_with_its_logits(digits):
    gan = make(du.WGANGP)
    images = du.normalise(digits[0])
    with torch.no_grad():
        logits = gan.discriminator.eval()(images)
    assert torch.allclose(gan.score(images), logits, atol=1e-5)
