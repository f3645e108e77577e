"""The loss family and WGAN-GP: each loss at a case worked out by hand, penalties at critics of known slope."""

import dataclasses
import math

import pytest
import torch
from tiny import make, same, weights
from torch import nn

import dcgan_utils as du
from dcgan_utils import Config

FAMILY = list(du.LOSSES)
NO_PENALTY = {"gradient_penalty": 0.0}
REAL, FAKE = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.5, -3.0, 1.0])


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
        expected = REAL.sigmoid() if name == "bce" else REAL
        assert reading["D_x"].item() == pytest.approx(expected.mean().item(), abs=1e-6)
        assert reading["gap"].item() == pytest.approx((reading["D_x"] - reading["D_G_z"]).item(), abs=1e-6)
    assert du.read_discriminator(REAL, FAKE, Config(loss="hinge"))["D_acc"].item() == pytest.approx(1 / 3)
    squares = Config(loss="least_squares", real_label_smooth=1.0, fake_label_smooth=0.0)
    assert du.read_discriminator(REAL, FAKE, squares)["D_acc"].item() == pytest.approx((1 / 3 + 1 / 3) / 2)


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


def penalty_of(critic, loss, weight, real, fake):
    """Return the penalty of a critic that stands in for D."""
    config = Config(loss=loss, gradient_penalty=weight, batch_norm_D=False)
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
    gan = make(kind, loss=name, batch_norm_D=False, gradient_penalty={"bce": 0.0, "wasserstein": 10.0}.get(name, 1.0))
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


def test_a_relativistic_generator_asks_d_about_real_images_too(digits):
    """In G's step a batch of other real images gives another gradient; the other losses do not look."""
    for name, matters in (("relativistic", True), ("hinge", False)):
        moved = []
        for shift in (0, 16):
            gan = make(du.FastDCGAN, conditional=False, loss=name, lr_G=1e-3)
            gan._set_data(digits)
            gan.generator.train()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                fake = gan._fake(16, None)
            du.train_generator(gan, fake, None, du.normalise(gan.images[shift : shift + 16]))
            moved.append(weights(gan.generator))
        assert torch.equal(*moved) != matters


def test_a_loss_may_be_changed_while_training(digits):
    gan = make(du.FastDCGAN, batch_norm_D=False)
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
    for name in FAMILY:
        shown = {finding.name for finding in panel(name).findings}
        of_bce = {"D(x) (README)", "separation (theory)", "D(x) + D(G(z)) (theory)", "D loss (theory)", "D too strong"}
        of_bce |= {"D too weak", "labels", "D's answers", "oscillation"}
        assert of_bce <= shown if name == "bce" else not of_bce & shown
        assert ({"Wasserstein estimate", "critic's slope"} <= shown) == (name == "wasserstein")
        assert {"sample diversity", "copies among samples", "a player stands still", "detach"} <= shown


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
    gan = make(du.FastDCGAN, loss=name, log_every=1)
    gan.train(2, data=digits, callbacks=[])
    _, answers, _ = gan.plot_history().axes
    labels = [line.get_label() for line in answers.lines]
    assert ("Wasserstein estimate" in labels) == (name == "wasserstein")
    assert ("D(x)" in labels) == (name != "wasserstein")
    assert any("equilibrium" in str(label) for label in labels) == (name == "bce")
    look = du.take_look(gan)
    figure = du.plot_look(look, gan.history)
    assert du.figure_png(figure)[:4] == b"\x89PNG"
    assert any("equilibrium" in ax.get_title() for ax in figure.axes) == (name == "bce")


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
