"""Health: what the panel calls green, yellow and red, by the recipe's README and by theory, and how it looks."""

import copy
import dataclasses
import html
import io
import math
import random
import re

import numpy as np
import pytest
import torch

import dcgan_utils as du
from dcgan_utils import Config

DCGAN, STABLE, FAST = (kind.resolve() for kind in (du.DCGAN, du.StableDCGAN, du.FastDCGAN))
RECIPES = [du.DCGAN, du.StableDCGAN, du.FastDCGAN]


def history_of(config: Config, *epochs: dict, **last) -> du.History:
    """Return a history whose last epoch has the given readings; the others are those of the equilibrium."""
    a, b = config.real_label_smooth, config.fake_label_smooth
    m = (a + b) / 2
    still = {"loss_D": du.discriminator_loss_bounds(config)[1], "loss_G": -math.log(m), "D_x": m, "D_G_z": m}
    still |= {"D_acc": 0.5, "diversity": 1.0, "seconds": 9.0, "images_per_second": 99.0}
    history = du.History(config)
    for number, changes in enumerate([*epochs, last], start=1):
        for name, value in {**still, "epoch": number, **changes}.items():
            history[name].append(value)
    return history


def panel(kind: type[du.GAN], **last) -> dict[str, du.Finding]:
    """Return the findings by name, and the worst status under 'worst'."""
    diagnosis = du.diagnose(history_of(kind.resolve(), **last), bands=kind.bands)
    return {finding.name: finding for finding in diagnosis.findings} | {"worst": diagnosis.status}


# ----------------------------------------------------------------------------------------------- the whole diagnosis
@pytest.mark.parametrize("kind", RECIPES)
def test_the_equilibrium_is_never_red(kind):
    assert panel(kind)["worst"] in ("green", "yellow")


@pytest.mark.parametrize(
    ("kind", "readings"),
    [
        (du.DCGAN, {"D_x": 0.75, "D_G_z": 0.3, "loss_D": 1.2, "diversity": 0.95, "D_acc": 0.7}),
        # the figures that StableDCGAN's README reports
        (du.StableDCGAN, {"D_x": 0.47, "D_G_z": 0.43, "loss_D": 1.3537, "loss_G": 0.8464, "D_acc": 0.555}),
        (du.FastDCGAN, {"D_x": 0.6, "D_G_z": 0.3, "loss_D": 1.2, "diversity": 0.9}),
    ],
)
def test_a_healthy_history_is_green(kind, readings):
    findings = panel(kind, **readings)
    assert findings.pop("worst") == "green"
    assert {finding.status for finding in findings.values()} == {"green"}
    assert {finding.remedy for finding in findings.values()} == {""}


def test_collapse_is_red_by_diversity_while_ds_readings_are_called_healthy():
    """The state in which the literal recipe begins: its README's bands see nothing."""
    findings = panel(du.DCGAN, D_x=0.83, D_G_z=0.23, loss_D=0.99, diversity=0.03)
    assert findings.pop("worst") == "red"
    assert findings["D(x) (README)"].status == "green"
    assert findings["D(G(z)) (README)"].status == "green"
    red = [finding for finding in findings.values() if finding.status == "red"]
    assert [finding.name for finding in red] == ["sample diversity"]
    assert red[0].value == "0.03"
    assert "collapse" in red[0].message
    assert red[0].remedy


def test_the_status_is_the_worst_finding():
    order = ["green", "yellow", "red"]
    for readings in ({}, {"diversity": 0.5}, {"diversity": 0.1}, {"D_x": 0.6}, {"D_acc": 0.9}):
        findings = panel(du.StableDCGAN, **readings)
        worst = findings.pop("worst")
        assert order.index(worst) == max(order.index(finding.status) for finding in findings.values())


@pytest.mark.parametrize("name", ["loss_D", "loss_G", "D_x", "D_G_z", "D_acc"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", RECIPES)
def test_what_is_no_number_is_red(kind, name, value):
    findings = panel(kind, **{name: value})
    assert findings["worst"] == "red"
    assert findings["losses"].status == "red"
    assert "diverged" in findings["losses"].message
    assert "checkpoint" in findings["losses"].remedy


def test_nan_diversity_is_red():
    assert panel(du.DCGAN, diversity=math.nan)["worst"] == "red"


def test_only_the_newest_epoch_counts():
    bad, good = {"diversity": 0.01}, {"D_x": 0.7, "D_G_z": 0.35}
    assert du.diagnose(history_of(DCGAN, bad, **good)).status == "green"
    assert du.diagnose(history_of(DCGAN, good, **bad)).status == "red"
    assert du.diagnose(history_of(DCGAN, bad, **good)).epoch == 2


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="empty"):
        du.diagnose(du.History(DCGAN))


def test_diagnose_is_pure(capsys):
    history = history_of(DCGAN, {"diversity": 0.5}, diversity=0.2)
    history.batches["step"].append(7)
    before = copy.deepcopy((dict(history), history.batches, history.config))
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    chance = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    first = du.diagnose(history, bands=du.DCGAN_BANDS)
    assert du.diagnose(history, bands=du.DCGAN_BANDS) == first
    assert (dict(history), history.batches, history.config) == before
    assert torch.equal(chance[0], torch.get_rng_state())
    assert chance[1:] == (str(np.random.get_state()), random.getstate())  # noqa: NPY002
    assert capsys.readouterr() == ("", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.status = "green"


def test_the_config_given_goes_before_the_historys():
    history = history_of(DCGAN)
    own = {f.name: f for f in du.diagnose(history).findings}
    other = {f.name: f for f in du.diagnose(history, STABLE).findings}
    assert own["D(x) + D(G(z)) (theory)"].status == "green"  # 1.05 is 0.85 + 0.2
    assert other["D(x) + D(G(z)) (theory)"].status == "yellow"  # and 0.15 above 0.9 + 0


# ----------------------------------------------------------------------------------------------- the README's bands
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (du.DCGAN, ["D(x) (README)", "D(G(z)) (README)"]),
        (du.StableDCGAN, ["D accuracy (README)", "D loss (README)", "G loss (README)"]),
    ],
)
def test_the_panel_shows_both_the_readmes_bands_and_theorys(kind, names):
    findings = panel(kind)
    theory = ["separation (theory)", "D(x) + D(G(z)) (theory)", "D loss (theory)"]
    assert all(name in findings for name in names + theory)
    assert sum("(README)" in name for name in findings) == len(names)
    own = kind(device="cpu", image_size=16, ngf=2, ndf=2)
    own.history = history_of(own.config)
    assert {finding.name for finding in own.diagnose().findings} == set(findings) - {"worst"}


@pytest.mark.parametrize(
    ("kind", "metric", "name", "value", "status", "words"),
    [
        (du.DCGAN, "D_x", "D(x)", 0.7, "green", "README"),
        (du.DCGAN, "D_x", "D(x)", 0.9, "green", "README"),
        (du.DCGAN, "D_x", "D(x)", 0.6, "yellow", "too weak"),
        (du.DCGAN, "D_x", "D(x)", 0.49, "red", "too weak"),
        (du.DCGAN, "D_x", "D(x)", 0.95, "yellow", "too sure"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.1, "green", "README"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.07, "yellow", "D is too strong"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.001, "red", "D is too strong"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.9, "red", "fooled"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.4, "green", "README"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.555, "green", "README"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.7, "green", "README"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.35, "yellow", "G is too strong"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.29, "red", "G is too strong"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.75, "yellow", "D is too strong"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.81, "red", "D is too strong"),
        (du.StableDCGAN, "loss_D", "D loss", 1.35, "green", "README"),
        (du.StableDCGAN, "loss_D", "D loss", 0.5, "red", "D wins"),
        (du.StableDCGAN, "loss_D", "D loss", 3.0, "red", "D loses"),
        (du.StableDCGAN, "loss_G", "G loss", 0.85, "green", "README"),
        (du.StableDCGAN, "loss_G", "G loss", 4.0, "red", "D wins"),
        (du.StableDCGAN, "loss_G", "G loss", 0.2, "red", "D loses"),
    ],
)
def test_the_readmes_reading(kind, metric, name, value, status, words):
    finding = panel(kind, **{metric: value})[f"{name} (README)"]
    assert finding.status == status
    assert words in finding.message
    assert float(finding.value) == pytest.approx(value, abs=0.006)
    band = next(band for band in kind.bands if band.metric == metric)
    assert finding.band == f"{band.green[0]:g} – {band.green[1]:g}"
    strong = {"D is too strong", "D wins", "too sure"}
    expected = "" if status == "green" else du.WEAKEN_D if words in strong else du.STRENGTHEN_D
    assert finding.remedy == expected


def test_the_remedies_are_config_fields_that_do_what_is_said():
    fields = {f.name for f in dataclasses.fields(Config)}
    named = set(re.findall(r"\b[a-zA-Z]+_[a-zA-Z]+\b", du.WEAKEN_D + " " + du.STRENGTHEN_D))
    assert {"lr_D", "noise_D", "dropout_D", "d_steps", "lr_G"} <= named <= fields
    for text in re.findall(r"\w+=[\d.]+", du.WEAKEN_D + " " + du.STRENGTHEN_D):
        name, value = text.split("=")
        du.configure(Config(), **{name: type(getattr(Config(), name))(value)})


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.29, "Generator too strong"), (0.555, "✅ Training balanced!"), (0.4, "✅ Training balanced!"),
        (0.7, "✅ Training balanced!"), (0.81, "Discriminator too strong"), (0.35, "out of balance"),
        (0.75, "out of balance"),
    ],
)  # fmt: skip
def test_the_verdict_on_ds_accuracy(accuracy, words):
    assert words in du.balance_line(accuracy)


# ----------------------------------------------------------------------------------------------- theory
@pytest.mark.parametrize("kind", RECIPES)
def test_sum_rule(kind):
    config = kind.resolve()
    a, b = config.real_label_smooth, config.fake_label_smooth
    for gap in (0.0, 0.3, a - b):  # however well D separates, the sum stays
        x, z = (a + b + gap) / 2, (a + b - gap) / 2
        finding = panel(kind, D_x=x, D_G_z=z)["D(x) + D(G(z)) (theory)"]
        assert finding.status == "green"
        assert finding.remedy == ""
        assert f"{a + b:g}" in finding.band
        for off, status in ((0.09, "green"), (0.2, "yellow"), (-0.2, "yellow"), (0.4, "red"), (-0.4, "red")):
            finding = panel(kind, D_x=x + off, D_G_z=z)["D(x) + D(G(z)) (theory)"]
            assert finding.status == status
            assert float(finding.value) == pytest.approx(a + b + off, abs=0.006)
            assert bool(finding.remedy) == (status != "green")


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(
    ("share", "status", "words"),
    [
        (0.0, "green", "cannot tell"),
        (0.5, "green", "cannot tell"),
        (0.84, "green", "cannot tell"),
        (0.93, "yellow", "tells nearly all apart"),
        (1.0, "red", "tells nearly all apart"),
        (-0.1, "yellow", "fakes for more real"),
        (-0.5, "red", "fakes for more real"),
    ],
)
def test_separation_is_the_gap_as_a_share_of_what_the_labels_allow(kind, share, status, words):
    config = kind.resolve()
    a, b = config.real_label_smooth, config.fake_label_smooth
    x, z = ((a + b) + share * (a - b)) / 2, ((a + b) - share * (a - b)) / 2
    finding = panel(kind, D_x=x, D_G_z=z)["separation (theory)"]
    assert float(finding.value) == pytest.approx(share, abs=0.006)
    assert finding.status == status
    assert words in finding.message
    assert bool(finding.remedy) == (status != "green")


def test_what_the_readme_calls_healthy_is_called_a_d_that_separates_perfectly():
    findings = panel(du.DCGAN, D_x=0.85, D_G_z=0.2, loss_D=0.923, diversity=0.9)
    assert findings["D(x) (README)"].status == findings["D(G(z)) (README)"].status == "green"
    assert findings["separation (theory)"].status == "red"
    assert "D(x) → 0.85, D(G(z)) → 0.2" in findings["separation (theory)"].message
    assert findings["D(x) + D(G(z)) (theory)"].status == "green"


@pytest.mark.parametrize(
    ("kind", "floor", "edge", "middle", "g_loss"),
    [
        (du.DCGAN, "0.92", "1.88", "0.525", "0.64"),  # -ln 0.525
        (du.StableDCGAN, "0.33", "1.88", "0.45", "0.80"),
        (du.FastDCGAN, "0.33", "1.88", "0.45", "0.80"),
    ],
)
def test_the_loss_is_shown_between_its_floor_and_its_equilibrium(kind, floor, edge, middle, g_loss):
    finding = panel(kind, loss_D=1.2)["D loss (theory)"]
    assert (finding.status, finding.value, finding.band) == ("green", "1.20", f"{floor} – {edge}")
    assert "1.38: equilibrium" in finding.message
    assert f"answers {middle}, G loss {g_loss}" in finding.message
    assert panel(kind, loss_D=float("nan"))["D loss (theory)"].status == "yellow"
    assert panel(kind, loss_D=2.5)["D loss (theory)"].status == "yellow"


# ----------------------------------------------------------------------------------------------- diversity
@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        (0.0, "red", "alike"),
        (0.39, "red", "alike"),
        (0.5, "yellow", "less than real"),
        (0.7, "green", "as real digits do"),
        (1.0, "green", "as real digits do"),
        (1.4, "yellow", "noise"),
        (2.0, "red", "noise"),
    ],
)
@pytest.mark.parametrize("kind", RECIPES)
def test_diversity_bands(kind, value, status, words):
    finding = panel(kind, diversity=value)["sample diversity"]
    assert finding.status == status
    assert words in finding.message
    assert finding.value == f"{value:.2f}"
    assert bool(finding.remedy) == (status != "green")


def test_sample_diversity_of_known_distributions():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(512, 1, 8, 8, generator=rng)
    other = torch.randn(512, 1, 8, 8, generator=rng)
    assert du.sample_diversity(real, real) == pytest.approx(1, abs=1e-6)
    assert du.sample_diversity(other, real) == pytest.approx(1, abs=0.02)
    assert du.sample_diversity(0.5 * other, real) == pytest.approx(0.5, abs=0.01)
    assert du.sample_diversity(other + 9, real) == pytest.approx(1, abs=0.02)  # where they lie does not matter
    assert du.sample_diversity(real[:1].expand(512, -1, -1, -1), real) == pytest.approx(0, abs=1e-3)
    assert du.sample_diversity(0.03 * other, real) == pytest.approx(0.03, abs=0.001)
    two_images = real[:2].repeat(256, 1, 1, 1)  # variance |x - y|² / 4 about their mean, times 512/511
    expected = ((real[0] - real[1]).square().sum() / 4 * 512 / 511 / real.var(dim=0).sum()).sqrt()
    assert du.sample_diversity(two_images, real) == pytest.approx(expected.item(), abs=1e-4)


def test_sample_diversity_is_the_ratio_of_distances_between_pairs():
    rng = torch.Generator().manual_seed(1)
    fake, real = torch.rand(40, 1, 6, 6, generator=rng), torch.randn(40, 1, 6, 6, generator=rng)

    def spread(x):
        return torch.cdist(x.flatten(1), x.flatten(1)).square().sum().sqrt()

    assert du.sample_diversity(fake, real) == pytest.approx((spread(fake) / spread(real)).item(), abs=1e-5)


def test_sample_diversity_of_real_digits_and_of_blank_data(mnist_small):
    real = du.normalise(mnist_small[0])
    assert du.sample_diversity(real[:256], real[256:]) == pytest.approx(1, abs=0.05)
    assert du.sample_diversity(torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)) == 0


# ----------------------------------------------------------------------------------------------- how the panel looks
RED = du.diagnose(history_of(DCGAN, diversity=0.03, D_x=0.6), bands=du.DCGAN_BANDS)  # all three colours at once


def test_the_text_panel_shows_every_finding_whole():
    text = du.panel_text(RED, colour=False)
    head, *lines = text.splitlines()
    assert {finding.status for finding in RED.findings} == {"green", "yellow", "red"}
    assert "🔴" in head
    assert "act" in head
    assert "epoch 1" in head
    assert len(lines) == len(RED.findings)
    for line, finding in zip(lines, RED.findings, strict=True):
        assert du.ICONS[finding.status] in line
        for part in (finding.name, finding.value, finding.band, finding.message, finding.remedy):
            assert part in line


def test_the_text_panel_has_a_word_beside_every_colour():
    """🟢, 🟡 and 🔴 differ by colour alone; not every reader sees it."""
    for line, finding in zip(du.panel_text(RED, colour=False).splitlines()[1:], RED.findings, strict=True):
        assert re.search(rf"\b{du.WORDS[finding.status]}\b", line.replace(finding.message, "")), line


def test_ansi_colours_only_when_asked_or_on_a_terminal(monkeypatch):
    plain, coloured = du.panel_text(RED, colour=False), du.panel_text(RED, colour=True)
    assert "\033" not in plain
    assert re.sub(r"\033\[\d+m", "", coloured) == plain
    codes = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
    for line, finding in zip(coloured.splitlines()[1:], RED.findings, strict=True):
        assert line.startswith(codes[finding.status])
        assert line.endswith("\033[0m")
    for terminal, expected in ((False, plain), (True, coloured)):
        out = io.StringIO()
        out.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr("sys.stdout", out)
        assert du.panel_text(RED) == expected
        assert str(RED) == expected


def test_the_html_panel_has_colour_word_and_every_text():
    page = du.panel_html(RED)
    assert RED._repr_html_() == page
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert len(rows) == 1 + len(RED.findings)
    for row, finding in zip(rows[1:], RED.findings, strict=True):
        cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        assert cells == [
            f"{du.ICONS[finding.status]} {du.WORDS[finding.status]}",
            finding.name, finding.value, finding.band, finding.message, finding.remedy,
        ]  # fmt: skip
    assert "🔴" in page.split("<table>")[0]
    assert "act" in page.split("<table>")[0]


def test_the_html_panel_escapes_what_it_shows():
    evil = '<img src=x onerror="alert(1)"> & more'
    finding = du.Finding(evil, "red", evil, evil, evil, evil)
    page = du.panel_html(du.Diagnosis("red", (finding,), 1.0))
    assert "<img" not in page
    assert page.count(html.escape(evil)) == 5


def test_icons_and_words_are_three_different_ones():
    assert list(du.ICONS.values()) == ["🟢", "🟡", "🔴"]
    assert len(set(du.WORDS.values())) == 3
    assert set(du.ICONS) == set(du.WORDS)
