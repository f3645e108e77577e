"""Health: what the panel calls green, yellow and red, by the recipe's README and by theory, and how it looks."""

import copy
import dataclasses
import html
import io
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FastCrossEntropy

import dcgan_utils as du
from dcgan_utils import Config

ROOT = Path(__file__).resolve().parent.parent
DCGAN, STABLE, FAST = (kind.resolve() for kind in (du.DCGAN, du.StableDCGAN, du.FastDCGAN))
SUMMED = [du.DCGAN, du.StableDCGAN, FastCrossEntropy]  # whose answers aim at labels, so that theory knows their sum
RECIPES = [*SUMMED, du.FastDCGAN]
MOVES = {"move_D": 0.01, "move_G": 0.02, "move_BN_D": 0.1, "move_BN_G": 0.2}
SAMPLES = {"diversity": 1.0, "spacing": 1.0}
JUDGED = {"confidence": 0.9, "class_gap": 0.05, "fid": 5.0, "precision": 0.7, "recall": 0.6, "near_copies": 0.01}
NEWER = {*du.METRICS[5:], *du.EPOCH_READINGS, *JUDGED} - {"diversity"}  # what the first kept runs lack
WELL = {"D_acc": 0.5, "D_std": 0.1, "grad_D": 1.0, "grad_G": 1.0, "leak": 0.0, "swing": 0.02} | MOVES | SAMPLES | JUDGED


def aims(config: Config) -> tuple[float, float]:
    """Return what D is to answer to real and to fake: the labels; of pairs 1 and 0, whatever the labels say."""
    return (1.0, 0.0) if config.loss == "relativistic" else (config.real_label_smooth, config.fake_label_smooth)


def history_of(config: Config, *epochs: dict, **last) -> du.History:
    """Return a history whose last epoch has the given readings; the others are those of the equilibrium, all well."""
    a, b = aims(config)
    m = (a + b) / 2
    still = {"loss_D": du.discriminator_loss_bounds(config)[1], "loss_G": -math.log(m), "D_x": m, "D_G_z": m}
    still |= {**WELL, "seconds": 9.0, "images_per_second": 99.0}
    history = du.History(config)
    for number, changes in enumerate([*epochs, last], start=1):
        for name, value in {**still, "epoch": number, **changes}.items():
            history.setdefault(name, []).append(value)
    return history


def diagnosis_of(kind: type[du.GAN], **last) -> du.Diagnosis:
    """Return the panel of a recipe in equilibrium but for the given readings."""
    return du.diagnose(history_of(kind.resolve(), **last), bands=kind.bands)


def panel(kind: type[du.GAN], **last) -> dict[str, du.Finding]:
    """Return the findings by name, and the worst status under 'worst'."""
    diagnosis = diagnosis_of(kind, **last)
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
        (FastCrossEntropy, {"D_x": 0.6, "D_G_z": 0.3, "loss_D": 1.2, "diversity": 0.9}),
        (du.FastDCGAN, {"D_x": 0.7, "D_G_z": 0.3, "loss_D": 0.5, "loss_G": 1.1, "D_acc": 0.75, "diversity": 0.9}),
    ],
)
def test_a_healthy_history_is_green(kind, readings):
    findings = panel(kind, **readings)
    assert findings.pop("worst") == "green"
    assert {finding.status for finding in findings.values()} == {"green"}
    assert {finding.remedy for finding in findings.values()} == {""}


def test_collapse_is_red_by_diversity_while_ds_readings_are_called_healthy():
    """The state in which the literal recipe begins: its README's bands see nothing."""
    diagnosis = diagnosis_of(du.DCGAN, D_x=0.83, D_G_z=0.23, loss_D=0.99, diversity=0.03)
    assert diagnosis.status == "red"
    findings = {finding.name: finding for finding in diagnosis.findings}
    assert findings["D(x) (README)"].status == "green"
    assert findings["D(G(z)) (README)"].status == "green"
    red = [finding.name for finding in diagnosis.findings if finding.status == "red"]
    assert red == ["sample diversity", "D too strong"]  # what collapsed is named before who is too strong
    assert diagnosis.cause == findings["sample diversity"]
    assert diagnosis.cause.value == "0.03"
    assert "collapse" in diagnosis.cause.message
    assert diagnosis.cause.remedy


def test_the_status_is_the_worst_finding():
    order = ["green", "yellow", "red"]
    for readings in ({}, {"diversity": 0.5}, {"diversity": 0.1}, {"D_x": 0.6}, {"D_acc": 0.9}):
        findings = panel(du.StableDCGAN, **readings)
        worst = findings.pop("worst")
        assert order.index(worst) == max(order.index(finding.status) for finding in findings.values())


@pytest.mark.parametrize("name", [*du.METRICS, "diversity"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", RECIPES)
def test_what_is_no_number_is_red_and_the_only_finding(kind, name, value):
    """With NaN among them the other readings mean nothing."""
    history = history_of(kind.resolve(), {}, **{name: value})
    assert history["epoch"] == [1, 2]
    diagnosis = du.diagnose(history, bands=kind.bands)
    assert diagnosis.status == "red"
    (finding,) = diagnosis.findings
    assert diagnosis.cause is finding
    assert finding.name == "losses are numbers"
    assert "diverged" in finding.message
    assert "checkpoint" in finding.message
    changed = dataclasses.replace(kind.resolve(), **finding.changes)
    assert changed.lr_G == kind.resolve().lr_G / 2
    assert changed.lr_D == kind.resolve().lr_D / 2


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("name", du.METRICS)
def test_nan_in_the_newest_batches_is_red_before_the_epoch_has_a_line(name, epochs):
    """A run that diverges within an epoch leaves no line for it; its last batches tell."""
    whole = history_of(FAST, *[{}] * (epochs - 1)) if epochs else du.History(FAST)
    for step in (1, 2):
        for key in whole.batches:
            whole.batches[key].append(0.5)
        whole.batches["step"][-1], whole.batches["epoch"][-1] = step, epochs + 0.1 * step
    assert whole.finite()
    whole.batches[name][-1] = math.nan
    assert not whole.finite()
    diagnosis = du.diagnose(whole)
    assert (diagnosis.status, diagnosis.cause.name) == ("red", "losses are numbers")
    if epochs:
        assert du.diagnose(whole.until(epochs)).status == "green"  # as it was before
    for key in whole.batches:
        whole.batches[key].append(0.5)  # loaded anew and trained on
    assert whole.finite()


def test_only_the_newest_epoch_counts():
    bad, good = {"diversity": 0.01}, {"D_x": 0.7, "D_G_z": 0.35}
    assert du.diagnose(history_of(DCGAN, bad, **good)).status == "green"
    assert du.diagnose(history_of(DCGAN, good, **bad)).status == "red"
    assert du.diagnose(history_of(DCGAN, bad, **good)).epoch == 2


@pytest.mark.parametrize("samples", [None, {}, {"diversity": 1.0, "spacing": 1.0}])
def test_an_empty_history_is_refused(samples):
    with pytest.raises(ValueError, match="empty"):
        du.diagnose(du.History(DCGAN), samples=samples)


def test_batches_without_an_epoch_are_no_crash():
    """Asked within the first epoch, as a callback may, it says in one line that there is nothing to read yet."""
    history = du.History(FAST)
    for name in history.batches:
        history.batches[name].append(0.5)
    with pytest.raises(ValueError, match=r"^[^\n]*train[^\n]*$"):
        du.diagnose(history)


def test_diagnose_is_pure(capsys):
    history = history_of(DCGAN, {"diversity": 0.5}, diversity=0.3, grad_G=None)
    for name in history.batches:
        history.batches[name].append(7.0)
    samples = {"spacing": 0.2}
    arguments = (dict(history), history.batches, history.config, samples, du.DCGAN_BANDS)
    before = copy.deepcopy(arguments)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    chance = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    first = du.diagnose(history, bands=du.DCGAN_BANDS, samples=samples)
    assert du.diagnose(history, bands=du.DCGAN_BANDS, samples=samples) == first
    again = du.History.from_json(json.loads(json.dumps(history.to_json())))
    assert du.diagnose(again, bands=du.DCGAN_BANDS, samples=samples) == first  # from disk as from memory
    assert arguments == before
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
        (du.DCGAN, "D_x", "D(x)", 0.69, "yellow", "too weak"),
        (du.DCGAN, "D_x", "D(x)", 0.49, "yellow", "too weak"),
        (du.DCGAN, "D_x", "D(x)", 0.95, "yellow", "too sure"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.1, "green", "README"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.07, "yellow", "D is too strong"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.001, "yellow", "D is too strong"),
        (du.DCGAN, "D_G_z", "D(G(z))", 0.9, "yellow", "fooled"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.4, "green", "README"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.555, "green", "README"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.7, "green", "README"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.35, "yellow", "G is too strong"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.29, "yellow", "G is too strong"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.75, "yellow", "D is too strong"),
        (du.StableDCGAN, "D_acc", "D accuracy", 0.99, "yellow", "D is too strong"),
        (du.StableDCGAN, "loss_D", "D loss", 1.35, "green", "README"),
        (du.StableDCGAN, "loss_D", "D loss", 0.5, "yellow", "D wins"),
        (du.StableDCGAN, "loss_D", "D loss", 3.0, "yellow", "D loses"),
        (du.StableDCGAN, "loss_G", "G loss", 0.85, "green", "README"),
        (du.StableDCGAN, "loss_G", "G loss", 4.0, "yellow", "D wins"),
        (du.StableDCGAN, "loss_G", "G loss", 0.2, "yellow", "D loses"),
    ],
)
def test_the_readmes_reading(kind, metric, name, value, status, words):
    """Outside its band a reading is worth a look; alone it makes nothing red."""
    finding = panel(kind, **{metric: value})[f"{name} (README)"]
    assert finding.status == status
    assert words in finding.message
    assert float(finding.value) == pytest.approx(value, abs=0.006)
    band = next(band for band in kind.bands if band.metric == metric)
    assert finding.band == f"{band.green[0]:g} – {band.green[1]:g}"
    assert not finding.quiet
    strong = any(word in words for word in ("D is too strong", "D wins", "too sure"))
    config = kind.resolve()
    if status == "green":
        assert (finding.remedy, finding.changes) == ("", {})
    else:
        changed = dataclasses.replace(config, **finding.changes)
        held_back = changed.lr_D / config.lr_D < changed.lr_G / config.lr_G or changed.noise_D > config.noise_D
        helped = changed.lr_D / config.lr_D > changed.lr_G / config.lr_G
        assert (held_back, helped) == (strong, not strong)


def test_bands_of_ones_own_stand_between_faults_and_theory():
    band = du.Band("images_per_second", "speed", (10, 50), "slow", "fast", True)
    findings = du.diagnose(history_of(FastCrossEntropy.resolve()), bands=[band]).findings
    names = [finding.name for finding in findings]
    assert names[len(du.FAULT_CHECKS) :] == [
        "speed (README)", "separation (theory)", "D(x) + D(G(z)) (theory)", "D loss (theory)",
    ]  # fmt: skip
    assert findings[len(du.FAULT_CHECKS)].message == "fast"
    of_pairs = [finding.name for finding in du.diagnose(history_of(FAST), bands=[band]).findings]
    assert of_pairs[len(du.FAULT_CHECKS) :] == ["separation (theory)", "D loss (theory)"]  # READMEs know labels


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
@pytest.mark.parametrize("kind", SUMMED)
def test_sum_rule(kind):
    config = kind.resolve()
    a, b = config.real_label_smooth, config.fake_label_smooth
    for gap in (0.0, 0.3, a - b):  # however well D separates, the sum stays
        x, z = (a + b + gap) / 2, (a + b - gap) / 2
        finding = panel(kind, D_x=x, D_G_z=z)["D(x) + D(G(z)) (theory)"]
        assert finding.status == "green"
        assert finding.remedy == ""
        assert f"{a + b:g}" in finding.band
        for off, status in ((0.09, "green"), (0.2, "yellow"), (-0.2, "yellow"), (0.4, "yellow"), (-0.4, "yellow")):
            finding = panel(kind, D_x=x + off, D_G_z=z)["D(x) + D(G(z)) (theory)"]
            assert finding.status == status
            assert float(finding.value) == pytest.approx(a + b + off, abs=0.006)
            assert bool(finding.remedy) == (status != "green")


def test_the_sum_of_a_pair_is_no_reading():
    """D(x) + D(G(z)) is 1 of every pair, however D answers: a line of the panel that says so would say nothing."""
    assert not any("D(x) + D(G(z))" in name for name in panel(du.FastDCGAN, D_x=0.9, D_G_z=0.1))
    for real, fake in ((3.0, -2.0), (-4.0, 1.0), (0.0, 0.0)):
        reading = du.read_discriminator(torch.full((4,), real), torch.full((4,), fake), FAST)
        assert (reading["D_x"] + reading["D_G_z"]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(
    ("share", "status", "words", "strong"),
    [
        (0.0, "green", "cannot tell", None),
        (0.5, "green", "cannot tell", None),
        (0.84, "green", "cannot tell", None),
        (0.93, "yellow", "tells nearly all apart", True),
        (1.0, "yellow", "tells nearly all apart", True),
        (-0.1, "yellow", "", False),
        (-0.5, "yellow", "", False),
    ],
)
def test_separation_is_the_gap_as_a_share_of_what_the_labels_allow(kind, share, status, words, strong):
    config = kind.resolve()
    a, b = aims(config)
    x, z = ((a + b) + share * (a - b)) / 2, ((a + b) - share * (a - b)) / 2
    findings = panel(kind, D_x=x, D_G_z=z)
    finding = findings["separation (theory)"]
    assert float(finding.value) == pytest.approx(share, abs=0.006)
    assert finding.status == status
    assert words in finding.message
    if strong is None:
        assert finding.remedy == ""
    else:
        other = findings["D too strong" if strong else "D too weak"]
        assert other.status != "green"
        assert finding.changes == other.changes  # two lines of one panel do not contradict each other


def test_what_the_readme_calls_healthy_is_called_a_d_that_separates_perfectly():
    findings = panel(du.DCGAN, D_x=0.85, D_G_z=0.2, loss_D=0.923, diversity=0.9)
    assert findings["D(x) (README)"].status == findings["D(G(z)) (README)"].status == "green"
    assert findings["separation (theory)"].status == "yellow"
    assert "D(x) → 0.85, D(G(z)) → 0.2" in findings["separation (theory)"].message
    assert findings["D(x) + D(G(z)) (theory)"].status == "green"
    assert findings["worst"] == findings["D too strong"].status == "red"


@pytest.mark.parametrize(
    ("kind", "floor", "balance", "edge", "middle", "g_loss"),
    [
        (du.DCGAN, "0.92", "1.38", "1.88", "0.525", "0.64"),  # -ln 0.525
        (du.StableDCGAN, "0.33", "1.38", "1.88", "0.45", "0.80"),
        (FastCrossEntropy, "0.33", "1.38", "1.88", "0.45", "0.80"),
        (du.FastDCGAN, "0.00", "0.69", "1.19", "0.5", "0.69"),  # of pairs: one answer each, ln 2 for both players
    ],
)
def test_the_loss_is_shown_between_its_floor_and_its_equilibrium(kind, floor, balance, edge, middle, g_loss):
    for loss, status in ((float(edge) - 0.68, "green"), (float(edge) - 0.01, "green"), (float(edge) + 0.02, "yellow")):
        finding = panel(kind, loss_D=loss)["D loss (theory)"]
        assert (finding.status, finding.value, finding.band) == (status, f"{loss:.2f}", f"{floor} – {edge}")
        assert f"{balance}: equilibrium" in finding.message
        assert f"answers {middle}, G loss {g_loss}" in finding.message
    assert panel(kind, loss_D=2.5)["D loss (theory)"].status == "yellow"


# ----------------------------------------------------------------------------------------------- faults, one by one
ORDER = [  # the most specific first
    "a player stands still", "BatchNorm", "labels", "detach", "copies among samples", "sample diversity", "classes",
    "memorisation", "D's answers", "D too strong", "D too weak", "G's gradient", "oscillation", "stagnation",
    "undertrained",
]  # fmt: skip
READABLE = {"precision": 0.8, "confidence": 0.99}
CASES = [  # finding, readings (see `spelt_out`), status, words of its message, what its remedy changes in every recipe
    ("a player stands still", {"move_D": 1e-4, "move_G": 2e-6}, "green", None, None),
    ("a player stands still", {"move_D": 0.0}, "red", "D's weights did not move", None),
    ("a player stands still", {"move_G": 0.0}, "red", "G's weights did not move", None),
    ("a player stands still", {"move_G": 5e-7}, "red", "G's weights did not move", None),
    ("a player stands still", {"move_D": 0.0, "move_G": 0.0}, "red", "did not move", None),
    ("a player stands still", {"move_D": None, "move_G": None}, "green", None, None),
    ("BatchNorm", {"move_BN_D": 1e-9, "move_BN_G": 1e-9}, "green", None, None),
    ("BatchNorm", {"move_BN_G": 0.0}, "red", "G trains in eval mode.*train()", set()),
    ("BatchNorm", {"move_BN_D": 0.0}, "red", "D trains in eval mode.*train()", set()),
    ("BatchNorm", {"move_BN_D": None}, "green", None, None),  # a D without BatchNorm
    ("BatchNorm", {"move_BN_D": None, "move_BN_G": 0.0}, "red", "G trains", set()),
    ("labels", {"D_acc": 0.35, "loss_D above": -0.04}, "green", None, None),  # D loses honestly
    ("labels", {"D_acc": 0.02, "loss_D above": 3.0}, "green", None, None),
    ("labels", {"D_acc": 0.9, "loss_D above": -0.3}, "green", None, None),
    ("labels", {"D_acc": 0.35, "loss_D above": -0.1}, "red", "swapped.*real is 1, fake 0", set()),
    ("labels", {"D_acc": 0.0, "loss_D above": -0.4, "share": -1}, "red", "swapped", set()),
    ("detach", {"leak": 0.0}, "green", None, None),
    ("detach", {"leak": 1e-9}, "red", "detach the fakes", set()),
    ("copies among samples", {"spacing": 0.51}, "green", None, None),
    ("copies among samples", {"spacing": 1.8}, "green", None, None),
    ("copies among samples", {"spacing": 0.45}, "yellow", "closer.*mode collapse", {"vary"}),
    ("copies among samples", {"spacing": 0.22, "epoch": 2}, "yellow", "closer.*mode collapse", {"vary"}),
    ("copies among samples", {"spacing": 0.18, "epoch": 2}, "red", "closer.*mode collapse", {"vary"}),
    ("copies among samples", {"spacing": 0.18, "epoch": 1}, "yellow", "closer.*mode collapse", {"vary"}),
    ("copies among samples", {"spacing": 0.0}, "red", "closer.*mode collapse", {"vary"}),
    ("sample diversity", {"diversity": 0.7}, "green", "as real digits do", None),
    ("sample diversity", {"diversity": 1.0}, "green", "as real digits do", None),
    ("sample diversity", {"diversity": 1.3}, "green", "as real digits do", None),
    ("sample diversity", {"diversity": 0.65}, "yellow", "less than real", {"vary"}),
    ("sample diversity", {"diversity": 0.25}, "yellow", "less than real", {"vary"}),
    ("sample diversity", {"diversity": 0.15, "epoch": 1}, "yellow", "less than real", {"vary"}),
    ("sample diversity", {"diversity": 0.15, "epoch": 2}, "red", "nearly all alike.*collapse", {"vary"}),
    ("sample diversity", {"diversity": 0.05, "epoch": 0.5}, "red", "nearly all alike.*collapse", {"vary"}),
    ("sample diversity", {"diversity": 0.0}, "red", "nearly all alike.*collapse", {"vary"}),
    ("sample diversity", {"diversity": 1.4}, "yellow", "noise", {"vary"}),
    ("sample diversity", {"diversity": 2.0}, "red", "noise", {"vary"}),
    ("classes", {"class_gap": 0.29, **READABLE}, "green", None, None),
    ("classes", {"class_gap": 0.45, **READABLE}, "yellow", "readable.*missing", {"vary"}),
    ("classes", {"class_gap": 0.9, **READABLE}, "red", "readable.*missing", {"vary"}),
    ("classes", {"class_gap": 0.9, "precision": None, "confidence": 0.99}, "red", "readable.*missing", {"vary"}),
    ("classes", {"class_gap": 0.9, "precision": None, "confidence": 0.9}, "yellow", "not digits yet", {"vary"}),
    ("classes", {"class_gap": 0.9, **READABLE, "diversity": 0.6}, "yellow", "not digits yet", {"vary"}),
    ("classes", {"class_gap": 0.9, "precision": 0.1}, "yellow", "not digits yet", {"vary"}),
    ("classes", {"class_gap": 0.9, "precision": 0.8, "confidence": 0.6}, "yellow", "not digits yet", {"vary"}),
    ("memorisation", {"near_copies": 0.05}, "green", None, None),
    ("memorisation", {"near_copies": 0.1}, "yellow", "closer to a training image", {"ngf", "dropout_D"}),
    ("memorisation", {"near_copies": 1.0}, "red", "closer to a training image", {"ngf", "dropout_D"}),
    ("D's answers", {"D_std": 0.04}, "green", None, None),
    ("D's answers", {"D_std": 0.02}, "yellow", "same answer", {"help D"}),
    ("D's answers", {"D_std": 0.0}, "red", "same answer", {"help D"}),
    ("D too strong", {"share": 0.87}, "green", None, None),
    ("D too strong", {"share": 0.5, "loss_G times": 3.2}, "yellow", "three times its equilibrium", {"hold D back"}),
    ("D too strong", {"share": 0.9}, "red", "D\\(G\\(z\\)\\).*floor", {"hold D back"}),
    ("D too strong", {"share": 1.0, "loss_G times": 9}, "red", "G learns nothing", {"hold D back"}),
    ("D too strong", {"share": 0.85, "loss_G times": 3.2}, "red", "G learns nothing", {"hold D back"}),
    ("D too strong", {"share": 0.5, "loss_G times": 3.2, "D_acc": 0.95}, "red", "so sure a D", {"hold D back"}),
    ("D too strong", {"share": 0.5, "loss_G times": 8.9}, "yellow", "three times its equilibrium", {"hold D back"}),
    ("D too strong", {"share": 0.5, "loss_G times": 9.1}, "red", "so sure a D", {"hold D back"}),
    ("D too weak", {"share": -0.04}, "green", None, None),
    ("D too weak", {"share": -0.1}, "yellow", "fakes for more real", {"help D"}),
    ("D too weak", {"share": -0.3}, "red", "fakes for more real", {"help D"}),
    ("D too weak", {"D_acc": 0.28}, "red", "fakes for more real", {"help D"}),
    ("G's gradient", {"grad_G": 0.06}, "green", None, None),
    ("G's gradient", {"grad_G": 1e9}, "green", None, None),
    ("G's gradient", {"grad_G": 0.03}, "yellow", "saturated", {"lr_G", "noise_D"}),
    ("G's gradient", {"grad_G": 0.0}, "red", "saturated", {"lr_G", "noise_D"}),
    ("oscillation", {"swing": 0.19}, "green", None, None),
    ("oscillation", {"swing": 0.22}, "yellow", "chase each other", {"lr_G", "lr_D"}),
    ("oscillation", {"swing": 0.4}, "red", "chase each other", {"lr_G", "lr_D"}),
    ("undertrained", {"precision": 0.31}, "green", None, None),
    ("undertrained", {"precision": 0.0}, "yellow", "train on", set()),
]
NO_CHANGES = {"BatchNorm", "labels", "detach", "undertrained"}  # faults of the code, and what only training mends


def spelt_out(config: Config, readings: dict) -> dict:
    """Return readings with D's answers for a `share` of what the labels allow, and losses beside their equilibrium."""
    readings = dict(readings)
    a, b = aims(config)
    if "share" in readings:
        half = readings.pop("share") * (a - b) / 2
        readings |= {"D_x": (a + b) / 2 + half, "D_G_z": (a + b) / 2 - half}
    if "loss_D above" in readings:
        readings["loss_D"] = du.discriminator_loss_bounds(config)[1] + readings.pop("loss_D above")
    if "loss_G times" in readings:
        readings["loss_G"] = readings.pop("loss_G times") * du.generator_loss_at_equilibrium(config)
    return readings


def finding_of(config: Config, name: str, readings: dict) -> tuple[du.Finding, du.Diagnosis]:
    """Return one finding, and the diagnosis that it stands in, of an equilibrium with such readings."""
    diagnosis = du.diagnose(history_of(config, **spelt_out(config, readings)))
    (finding,) = (finding for finding in diagnosis.findings if finding.name == name)
    return finding, diagnosis


def spelt_in_words(changes: dict) -> dict[str, float]:
    """Return what a remedy's text must say, as numbers: 6 digits of each value."""
    return {name: pytest.approx(float(value), rel=1e-5) for name, value in changes.items()}


def read_remedy(text: str) -> dict[str, float]:
    """Return fields and values of a remedy's text."""
    pairs = (part.split("=") for part in text.split(", ") if part)
    return {name: {"True": 1.0, "False": 0.0}.get(value) if value[0] in "TF" else float(value) for name, value in pairs}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(("name", "readings", "status", "words", "fields"), CASES)
def test_every_fault_by_its_readings(kind, name, readings, status, words, fields):
    config = kind.resolve()
    if kind is du.FastDCGAN and name == "D too strong" and "D_acc" in readings:
        status, words = "yellow", "three times its equilibrium"  # which of a pair is real is easier to tell
    finding, diagnosis = finding_of(config, name, readings)
    assert finding.status == status
    assert (finding in diagnosis.shown) == (status != "green" or name == "sample diversity")
    if status == "red":
        assert diagnosis.cause == finding  # and nothing more specific is taken for it
        assert diagnosis.status == "red"
    else:
        assert diagnosis.cause is None or diagnosis.cause.name != name
    if words:
        assert re.search(words, finding.message), finding.message
    if status == "green":
        assert (finding.changes, finding.remedy) == ({}, "")
    elif fields is not None:
        expected = {
            "vary": {"noise_D"} if config.start_at_background else {"start_at_background"},
            "hold D back": {"noise_D"} if kind is du.DCGAN else {"lr_D"},  # there lr_D is half of lr_G already
            "help D": {"lr_D"} if kind is du.DCGAN else {"lr_G"},
        }
        assert set(finding.changes) == set().union(*(expected.get(field, {field}) for field in fields))


def test_every_fault_has_cases_of_every_status_that_it_can_have():
    assert set(ORDER) == {case[0] for case in CASES} | {"stagnation"}  # which needs a longer history: below
    for name in {case[0] for case in CASES}:
        statuses = {case[2] for case in CASES if case[0] == name}
        assert statuses >= ({"green", "yellow"} if name == "undertrained" else {"green", "red"})


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("name", sorted({case[0] for case in CASES} - {"a player stands still", "BatchNorm"}))
def test_a_fault_gets_worse_in_order(kind, name):
    """From green to red no status comes back once it was left."""
    path = {
        "labels": ("loss_D above", 0.5, -0.5), "detach": ("leak", 0.0, 1.0), "copies among samples": ("spacing", 1, 0),
        "sample diversity": ("diversity", 1, 0), "classes": ("class_gap", 0, 0.9), "D's answers": ("D_std", 0.2, 0),
        "memorisation": ("near_copies", 0, 1), "D too strong": ("share", 0, 1), "D too weak": ("share", 0, -1),
        "G's gradient": ("grad_G", 1, 0), "oscillation": ("swing", 0, 0.5), "undertrained": ("precision", 1, 0),
    }  # fmt: skip
    reading, well, ill = path[name]
    fixed = {"D_acc": 0.35} if name == "labels" else {"loss_G times": 3.2} if name == "D too strong" else {}
    fixed |= READABLE if name == "classes" else {}
    statuses = []
    for step in np.linspace(0, 1, 201):
        readings = {**fixed, reading: float(well + (ill - well) * step)}
        statuses.append(list(du.ICONS).index(finding_of(kind.resolve(), name, readings)[0].status))
    assert statuses == sorted(statuses)
    assert statuses[0] == (1 if name == "D too strong" else 0)  # whose G loss is high all along
    assert statuses[-1] == (1 if name == "undertrained" else 2)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_most_specific_fault_is_named_first(kind):
    """With everything wrong at once, mending what is named brings up the next one in this order."""
    config = kind.resolve()
    ill = {
        "a player stands still": {"move_D": 0.0}, "BatchNorm": {"move_BN_G": 0.0}, "labels": {"loss_D above": -0.3},
        "detach": {"leak": 1.0}, "copies among samples": {"spacing": 0.0}, "sample diversity": {"diversity": 0.0},
        "classes": {"class_gap": 0.9, **READABLE}, "memorisation": {"near_copies": 1.0}, "D's answers": {"D_std": 0.0},
        "D too strong": {"share": 1.0}, "D too weak": {"D_acc": 0.2}, "G's gradient": {"grad_G": 0.0},
        "oscillation": {"swing": 0.5},
    }  # fmt: skip
    named = []
    while ill and len(named) < 20:
        readings = spelt_out(config, {key: value for part in ill.values() for key, value in part.items()})
        diagnosis = du.diagnose(history_of(config, **readings), bands=kind.bands)
        assert [finding.name for finding in diagnosis.findings[: len(ORDER)]] == ORDER
        named.append(diagnosis.cause.name)
        del ill[diagnosis.cause.name]
    assert named == ORDER[:-2]  # the last two are never red


def test_stagnation_is_worth_a_look_after_five_epochs_without_gain():
    config = dataclasses.replace(DCGAN, lr_schedule="constant")
    for fids, status in (
        ([9, 8, 7, 6, 5, 4], "green"),
        ([9, 5, 5, 5, 5, 5], "green"),  # four
        ([9, 5, 5, 6, 5, 7, 5], "yellow"),  # five
        ([9, 5, 5, 6, 5, 7, 4], "green"),  # and a gain at last
        ([5] * 90, "yellow"),
    ):
        history = history_of(config, *({"fid": float(fid)} for fid in fids[:-1]), fid=float(fids[-1]))
        diagnosis = du.diagnose(history)
        finding = next(f for f in diagnosis.findings if f.name == "stagnation")
        assert finding.status == status
        assert diagnosis.cause is None
        if status == "yellow":
            assert re.search("has not fallen for .* stop", finding.message)
            assert finding.changes == {"lr_schedule": "linear_tail"}
            assert finding.remedy == "lr_schedule=linear_tail"
    assert float(finding.value) == 89
    fading = next(f for f in du.diagnose(history, FAST).findings if f.name == "stagnation")
    assert (fading.status, fading.changes) == ("yellow", {})  # its learning rates fade already


# ----------------------------------------------------------------------------------------------- remedies
ODD = {  # configs in which a remedy could easily be out of range, idle or worse
    "as it is": {},
    "lr_G 0": {"lr_G": 0.0},
    "lr_D 0": {"lr_D": 0.0},
    "both 0": {"lr_G": 0.0, "lr_D": 0.0},
    "both 1": {"lr_G": 1.0, "lr_D": 1.0},
    "whole numbers": {"lr_G": 1, "lr_D": 1},
    "tiny": {"lr_G": 1e-12, "lr_D": 1e-12},
    "lr_D × 20": {"lr_D": 0.04},
    "lr_G × 20": {"lr_G": 0.04},
    "lr_D far below": {"lr_D": 1e-5},
    "D frozen": {"d_steps": 0},
    "G frozen": {"g_steps": 0},
    "both frozen": {"d_steps": 0, "g_steps": 0},
    "not detached": {"detach": False},
    "no BatchNorm": {"batch_norm_G": False, "batch_norm_D": False},
    "no BatchNorm in D": {"batch_norm_D": False},
    "hot": {"beta1": 0.9, "lr_G": 2e-3, "lr_D": 1e-3},
    "beta1 0.9": {"beta1": 0.9},
    "nz 1": {"nz": 1},
    "narrow": {"ngf": 1, "ndf": 1, "dropout_D": 0.0},
    "dropped": {"dropout_D": 0.95, "dropout_G": 0.95},
    "noisy": {"noise_D": 0.1, "start_at_background": True},
    "very noisy": {"noise_D": 10, "start_at_background": True},
    "hard labels": {"real_label_smooth": 1.0, "fake_label_smooth": 0.0},
    "labels 1 and 0.9": {"real_label_smooth": 1.0, "fake_label_smooth": 0.9},
    "target 0.9": {"generator_target": 0.9},
    "target 0": {"generator_target": 0.0},
    "sgd": {"optimizer": "sgd", "beta1": 0.0},
    "constant": {"lr_schedule": "constant"},
}
STRANGE = [readings for case in CASES for readings in [case[1]] if case[2] != "green"]


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("odd", ODD)
def test_every_remedy_can_be_applied_and_does_something(kind, odd):
    """`dataclasses.replace(config, **finding.changes)` is valid, changes the config, and freezes nobody."""
    config = dataclasses.replace(kind.resolve(), **ODD[odd])
    seen = set()
    for readings in [*STRANGE, {"loss_D": math.nan}]:
        history = history_of(config, **spelt_out(config, readings))
        before = copy.deepcopy(config)
        for finding in du.diagnose(history, bands=kind.bands).findings:
            changed = dataclasses.replace(config, **finding.changes)
            where = (odd, finding.name, finding.status, finding.changes)
            assert read_remedy(finding.remedy.replace("linear_tail", "0")) == (
                spelt_in_words({k: 0 if v == "linear_tail" else v for k, v in finding.changes.items()})
            ), where
            if finding.status == "green":
                assert finding.changes == {}, where
                continue
            seen.add(finding.name)
            if finding.name in NO_CHANGES:
                assert finding.changes in ({}, {"detach": True}), where
            elif finding.name != "a player stands still":  # which the config may not explain; two tests below have it
                assert finding.changes, where
                assert changed != config, where
            for player in "DG":  # who could move still can
                moves = [
                    bool(getattr(c, f"lr_{player}") and getattr(c, f"{player.lower()}_steps"))
                    for c in (config, changed)
                ]
                assert moves[1] or not moves[0], where
            assert changed.d_steps >= config.d_steps, where
            assert changed.g_steps >= config.g_steps, where
        assert config == before
    assert seen >= set(ORDER) - {"stagnation"}


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"d_steps": 0}, {"d_steps": 1}),
        ({"g_steps": 0}, {"g_steps": 1}),
        ({"detach": False}, {"detach": True}),
        ({"batch_norm_G": False, "batch_norm_D": False}, {"batch_norm_G": True, "batch_norm_D": True}),
        ({"nz": 1}, {"nz": 100}),
        ({"nz": 16}, {}),
        ({"beta1": 0.9}, {"beta1": 0.5}),
        ({"beta1": 0.9, "lr_G": 2e-3, "lr_D": 1e-3}, {"beta1": 0.5, "lr_G": 2e-4, "lr_D": 1e-4}),
        ({"lr_D": 2e-3, "lr_G": 2e-4}, {"lr_D": 1e-4}),
        ({"lr_G": 4e-3, "lr_D": 1e-4}, {"lr_G": 2e-4}),
        ({"d_steps": 0, "nz": 1, "beta1": 0.9}, {"d_steps": 1}),  # one thing at a time
    ],
)
def test_the_usual_suspect_is_the_setting_that_stands_out(fields, changes):
    config = dataclasses.replace(DCGAN, **fields)
    assert du.usual_suspect(config) == pytest.approx(changes)
    assert du.usual_suspect(dataclasses.replace(config, **changes)) != changes or not changes


@pytest.mark.parametrize("kind", RECIPES)
def test_no_recipe_is_a_suspect(kind):
    assert du.usual_suspect(kind.resolve()) == {}
    if kind is du.FastDCGAN:
        assert du.usual_suspect(kind.resolve(conditional=False)) == {}


@pytest.mark.parametrize("kind", RECIPES)
def test_mending_one_suspect_after_the_other_comes_to_an_end(kind):
    config = kind.resolve(
        d_steps=0,
        g_steps=0,
        detach=False,
        batch_norm_G=False,
        batch_norm_D=False,
        nz=1,
        beta1=0.99,
        lr_D=0.5,
        lr_G=0.01,
    )
    for _ in range(9):
        if not (changes := du.usual_suspect(config)):
            break
        config = dataclasses.replace(config, **changes)
    assert changes == {}
    assert config.lr_G > 0
    assert config.lr_D > 0
    assert (config.d_steps, config.g_steps, config.nz, config.beta1) == (1, 1, 100, 0.5)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_setting_that_stands_out_goes_before_the_general_remedy(kind):
    """What the config says of itself is likelier than a guess: too small a latent is named as such."""
    config = dataclasses.replace(kind.resolve(), nz=1)
    for name, readings in (
        ("copies among samples", {"spacing": 0.0}), ("sample diversity", {"diversity": 0.0}),
        ("classes", {"class_gap": 0.9, **READABLE}), ("D too strong", {"share": 1.0}),
        ("D too weak", {"share": -0.3}), ("G's gradient", {"grad_G": 0.0}), ("oscillation", {"swing": 0.5}),
        ("D's answers", {"D_std": 0.0}),
    ):  # fmt: skip
        assert finding_of(config, name, readings)[0].changes == {"nz": 100}
    leaking, _ = finding_of(dataclasses.replace(config, detach=False), "detach", {"leak": 1.0})
    assert leaking.changes == {"detach": True}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("copies among samples", {"spacing": 0.44, "epoch": 1}), ("sample diversity", {"diversity": 0.44, "epoch": 1}),
        ("D too weak", {"D_acc": 0.44}), ("D too weak", {"share": -0.06}),
        ("D too strong", {"share": 0.5, "loss_G times": 3.2, "D_acc": 0.91}),
    ],
)  # fmt: skip
def test_a_known_cause_convicts_sooner(kind, name, readings):
    config = kind.resolve()
    assert finding_of(config, name, readings)[0].status != "red"
    of_pairs = kind is du.FastDCGAN and name == "D too strong"  # whose D may tell nearly all pairs, known cause or not
    convicted = "yellow" if of_pairs else "red"
    assert finding_of(dataclasses.replace(config, nz=1), name, readings)[0].status == convicted


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("player", ["D", "G"])
@pytest.mark.parametrize("other", [{}, {"nz": 1}, {"beta1": 0.9}, {"batch_norm_G": False}])
def test_who_stands_still_gets_steps_and_a_learning_rate_back(kind, player, other):
    """Only these can set it going: whatever else stands out in the config waits for its turn."""
    config = dataclasses.replace(kind.resolve(), **other)
    rate, steps = f"lr_{player}", f"{player.lower()}_steps"
    for frozen, field in (({steps: 0}, steps), ({rate: 0.0}, rate)):
        ill = dataclasses.replace(config, **frozen)
        finding, diagnosis = finding_of(ill, "a player stands still", {f"move_{player}": 0.0})
        assert diagnosis.cause == finding
        assert set(finding.changes) == {field}
        mended = dataclasses.replace(ill, **finding.changes)
        assert getattr(mended, steps) >= 1
        assert getattr(mended, rate) >= min(config.lr_G, config.lr_D)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("player", ["D", "G"])
def test_a_learning_rate_that_is_as_good_as_zero_is_raised(kind, player):
    """And the other player's is not lowered to it."""
    config = kind.resolve()
    ill = dataclasses.replace(config, **{f"lr_{player}": 1e-12})
    finding, _ = finding_of(ill, "a player stands still", {f"move_{player}": 0.0})
    mended = dataclasses.replace(ill, **finding.changes)
    assert min(mended.lr_G, mended.lr_D) >= min(config.lr_G, config.lr_D)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("player", ["D", "G"])
@pytest.mark.parametrize("other", [{}, {"nz": 1}, {"beta1": 0.9}])
def test_who_stands_still_for_no_reason_in_the_config_gets_no_idle_remedy(kind, player, other):
    """Steps and learning rate are above 0: then the code does not move the weights, and no other field will."""
    config = dataclasses.replace(kind.resolve(), **other)
    finding, _ = finding_of(config, "a player stands still", {f"move_{player}": 0.0})
    assert set(finding.changes) <= {f"lr_{player}"}
    assert dataclasses.replace(config, **finding.changes) != config or not finding.changes


# ----------------------------------------------------------------------------------------------- samples, old histories
@pytest.mark.parametrize("kind", RECIPES)
def test_readings_of_samples_made_now_go_before_the_historys(kind):
    well, ill = history_of(kind.resolve()), history_of(kind.resolve(), spacing=0.0, diversity=0.1, near_copies=0.9)
    assert du.diagnose(well, samples={"diversity": 0.05}).cause.name == "sample diversity"
    assert du.diagnose(well, samples={"spacing": 0.05}).cause.name == "copies among samples"
    assert du.diagnose(well, samples={"near_copies": 0.9}).cause.name == "memorisation"
    assert du.diagnose(well, samples={"class_gap": 0.9, **READABLE}).cause.name == "classes"
    assert du.diagnose(ill).cause.name == "copies among samples"
    assert du.diagnose(ill, samples={"spacing": 1.0, "diversity": 0.05}).cause.name == "sample diversity"
    assert du.diagnose(ill, samples={"spacing": 1.0, "diversity": 1.0}).cause.name == "memorisation"
    healed = du.diagnose(ill, samples=SAMPLES | JUDGED)
    assert healed == du.diagnose(well)
    assert healed.cause is None
    assert (ill["spacing"], ill["diversity"]) == ([0.0], [0.1])
    assert du.diagnose(well, samples={"diversity": math.nan}).status == "red"


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("missing", [*sorted(NEWER), "every newer one"])
def test_a_reading_that_was_not_taken_makes_nothing_red(kind, missing):
    names = NEWER if missing == "every newer one" else [missing]
    without = diagnosis_of(kind, **dict.fromkeys(names))
    assert [finding.status for finding in without.findings] == [f.status for f in diagnosis_of(kind).findings]


OLD = sorted(ROOT.glob("results/*/history.json"))
LITERAL = ROOT / "results" / "dcgan_literal" / "history.json"  # collapsed at first


def kept_history(path: Path, bare: bool) -> du.History:
    """Return a kept run, with bare as it was written before the newer readings and settings existed."""
    record = json.loads(path.read_text())
    if bare:
        for part in ("epochs", "batches"):
            record[part] = {name: values for name, values in record[part].items() if name not in NEWER}
        for name in ("detach", "batch_norm_G", "batch_norm_D", "channels", "pack", "penalty_every"):
            if record["config"].get(name) == getattr(Config(), name):  # no older run could have another one
                record["config"].pop(name, None)
    return du.History.from_json(record)


def test_the_kept_runs_are_of_all_recipes():
    assert {path.parent.name for path in OLD} >= {"dcgan", "stable", "fast"}


@pytest.mark.parametrize("path", [path for path in OLD if path != LITERAL], ids=lambda path: path.parent.name)
@pytest.mark.parametrize("bare", [False, True])
def test_no_epoch_of_a_healthy_kept_run_is_red(path, bare):
    history = kept_history(path, bare)
    kind = du.RECIPES[path.parent.name.split("_")[0]]
    assert history["epoch"]
    assert all(len(values) == len(history["epoch"]) for values in history.values())
    for epochs in range(1, len(history["epoch"]) + 1):
        diagnosis = du.diagnose(history.until(epochs), bands=kind.bands)
        assert diagnosis.cause is None, (epochs, diagnosis.cause)
        assert diagnosis.epoch == history["epoch"][epochs - 1]
    assert diagnosis == du.diagnose(history, bands=kind.bands)
    assert du.panel_text(diagnosis, colour=False).count("\n") == len(diagnosis.shown)


def test_the_literal_recipe_is_red_for_as_long_as_it_is_collapsed():
    """At full width, where its samples are far from real digits and its D reads as healthy."""
    history = kept_history(LITERAL, bare=False)
    causes = [du.diagnose(history.until(k), bands=du.DCGAN.bands).cause for k in range(1, 31)]
    red = [k for k, cause in enumerate(causes, start=1) if cause]
    assert red == [1, 2, 3]
    assert {causes[k - 1].name for k in red} <= {"sample diversity", "copies among samples"}
    assert min(history["fid"][:3]) > 50


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.parent.name)
def test_a_bare_history_shows_what_it_can(path):
    """The readings that were not taken are neither red nor shown; those that were taken still can be."""
    history = kept_history(path, bare=True)
    assert all(history[name][-1] is None for name in ("spacing", "leak", "move_D", "D_std"))
    shown = {finding.name for finding in du.diagnose(history).shown}
    assert shown <= {"sample diversity", "separation (theory)", "D(x) + D(G(z)) (theory)", "D loss (theory)", "labels",
                     "D too strong", "D too weak"}  # fmt: skip
    history["diversity"][-1] = 0.01
    assert du.diagnose(history).cause.name == "sample diversity"


# ----------------------------------------------------------------------------------------------- diversity and spacing
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


def points(*rows) -> torch.Tensor:
    """Return images of two pixels at these places of the plane."""
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 1, 1, 2)


def test_sample_spacing_of_known_points():
    line = points(*[(k, 0) for k in range(6)])  # each has a neighbour at distance 1
    assert du.sample_spacing(line, line) == pytest.approx(1)
    assert du.sample_spacing(3 * line + 7, line) == pytest.approx(
        3
    )  # where they lie does not matter, how far apart does
    uneven = points((0, 0), (3, 4), (100, 0), (100, 2), (200, 0), (200, 7))  # 5, 5, 2, 2, 7, 7
    assert du.sample_spacing(uneven, line) in (pytest.approx(5), pytest.approx(2), pytest.approx(6))  # a median
    twins = points(*[(k // 2, 0) for k in range(6)])
    assert du.sample_spacing(twins, line) == pytest.approx(0, abs=1e-3)
    assert du.sample_spacing(line, torch.zeros(6, 1, 1, 2)) > 1e6  # blank data: no division by nothing
    assert math.isnan(du.sample_spacing(line * math.nan, line))


def test_sample_spacing_agrees_with_a_loop():
    rng = torch.Generator().manual_seed(2)
    fake, real = torch.rand(33, 1, 5, 5, generator=rng), torch.randn(33, 1, 5, 5, generator=rng)

    def median_of_nearest(images):
        flat = images.double().flatten(1).numpy()
        nearest = [min(np.linalg.norm(x - y) for j, y in enumerate(flat) if j != i) for i, x in enumerate(flat)]
        return np.median(nearest)  # 33 points: the middle one, in every definition

    assert du.sample_spacing(fake, real) == pytest.approx(median_of_nearest(fake) / median_of_nearest(real), rel=1e-4)


def test_spacing_sees_the_curve_that_diversity_takes_for_variety(mnist_small):
    """Samples on a curve through real digits are as spread as these, and stand shoulder to shoulder."""
    real = du.normalise(mnist_small[0])[:256]
    corners = real[:9]
    curve = torch.cat(
        [torch.lerp(corners[k], corners[k + 1], torch.linspace(0, 1, 32)[:, None, None, None]) for k in range(8)]
    )
    assert len(curve) == 256
    assert du.sample_diversity(curve, real) > 0.5
    assert du.sample_spacing(curve, real) < 0.29  # which is what the panel calls red
    other = du.normalise(mnist_small[0])[256:]
    assert du.sample_spacing(other, real) == pytest.approx(1, abs=0.1)  # other real digits


# ----------------------------------------------------------------------------------------------- how the panel looks
RED = diagnosis_of(du.DCGAN, diversity=0.03, swing=0.22, D_G_z=0.45)  # all three colours at once, loud and quiet


def test_the_text_panel_shows_every_finding_whole():
    text = du.panel_text(RED, colour=False)
    head, *lines = text.splitlines()
    assert {finding.status for finding in RED.shown} == {"green", "yellow", "red"}
    assert {finding.quiet for finding in RED.shown} == {True, False}
    assert "🔴" in head
    assert "act" in head
    assert "epoch 1" in head
    assert len(lines) == len(RED.shown) < len(RED.findings)
    for line, finding in zip(lines, RED.shown, strict=True):
        assert du.ICONS[finding.status] in line
        for part in (finding.name, finding.value, finding.band, finding.message, finding.remedy):
            assert part in line


@pytest.mark.parametrize("kind", RECIPES)
def test_quiet_findings_are_hidden_while_they_are_green(kind):
    calm, loud = diagnosis_of(kind), diagnosis_of(kind, leak=1e-5)
    theory = {"separation (theory)", "D loss (theory)"} | ({"D(x) + D(G(z)) (theory)"} if kind in SUMMED else set())
    always = {"sample diversity", *theory}
    always |= {f"{band.title} (README)" for band in kind.bands}
    assert {finding.name for finding in calm.shown} == always
    assert {finding.name for finding in loud.shown} == always | {"detach"}
    assert len(calm.findings) == len(du.FAULT_CHECKS) + len(kind.bands) + len(theory)
    for show in (du.panel_text, du.panel_html):
        assert "detach" in show(loud)
        assert "detach" not in show(calm)
        assert "BatchNorm" not in show(loud)


def test_the_cause_is_the_first_red_finding_and_none_where_nothing_is_red():
    assert diagnosis_of(du.FastDCGAN).cause is None
    assert diagnosis_of(du.FastDCGAN, swing=0.22).status == "yellow"
    assert diagnosis_of(du.FastDCGAN, swing=0.22).cause is None
    assert diagnosis_of(du.FastDCGAN, swing=0.3).cause.name == "oscillation"
    assert diagnosis_of(du.FastDCGAN, swing=0.3, leak=1.0).cause.name == "detach"


def test_the_text_panel_has_a_word_beside_every_colour():
    """🟢, 🟡 and 🔴 differ by colour alone; not every reader sees it."""
    for line, finding in zip(du.panel_text(RED, colour=False).splitlines()[1:], RED.shown, strict=True):
        assert re.search(rf"\b{du.WORDS[finding.status]}\b", line.replace(finding.message, "")), line


def test_ansi_colours_only_when_asked_or_on_a_terminal(monkeypatch):
    plain, coloured = du.panel_text(RED, colour=False), du.panel_text(RED, colour=True)
    assert "\033" not in plain
    assert re.sub(r"\033\[\d+m", "", coloured) == plain
    codes = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
    for line, finding in zip(coloured.splitlines()[1:], RED.shown, strict=True):
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
    assert len(rows) == 1 + len(RED.shown)
    for row, finding in zip(rows[1:], RED.shown, strict=True):
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
    band = du.Band("D_x", evil, (0.7, 0.9), evil, evil, True)  # a band of one's own goes the same way
    page = du.panel_html(du.diagnose(history_of(DCGAN), bands=[band]))
    assert "<img" not in page
    assert page.count(html.escape(evil)) == 2  # its name and what it means


def test_icons_and_words_are_three_different_ones():
    assert list(du.ICONS.values()) == ["🟢", "🟡", "🔴"]
    assert len(set(du.WORDS.values())) == 3
    assert set(du.ICONS) == set(du.WORDS)
