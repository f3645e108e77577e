"""Health: what the panel calls green, yellow and red for every loss, what it advises, and how it looks."""

import contextlib
import copy
import dataclasses
import gzip
import html
import io
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import TINY, FastCrossEntropy, make
from torch import nn

import dcgan_utils as du
from dcgan.health import sample_readings, usual_suspect
from dcgan_utils import Config

DCGAN, STABLE, FAST, CRITIC = (kind.resolve() for kind in (du.DCGAN, du.StableDCGAN, du.FastDCGAN, du.WGANGP))
SUMMED = [du.DCGAN, du.StableDCGAN, FastCrossEntropy]  # D's outputs aim at labels, so theory knows their sum
RECIPES = [*SUMMED, du.FastDCGAN]
WELL = {
    "D_acc": 0.5, "D_std": 0.1, "grad_D": 1.0, "grad_G": 1.0, "grad_G_after_D_step": 0.0, "D_gap": 0.0,
    "D_G_z_std": 0.02, "update_ratio_D": 0.01, "update_ratio_G": 0.02, "update_ratio_BN_D": 0.1,
    "update_ratio_BN_G": 0.2, "pixel_std_ratio": 1.0, "nn_distance_ratio": 1.0, "confidence": 0.9, "class_gap": 0.05,
    "frechet": 5.0, "precision": 0.7, "recall": 0.6, "near_copies": 0.01, "seconds": 9.0, "images_per_second": 99.0,
}  # fmt: skip
SCORES = {  # what a D without probabilities gives
    "D_x": 2.0, "D_G_z": -1.0, "D_gap": 3.0, "D_std": 2.0, "D_G_z_std": 4.0, "loss_D": -3.0, "loss_G": 9.0,
    "D_acc": 0.99, "gradient_norm": 1.0,
}  # fmt: skip
CLEAR = {"precision": 0.8, "confidence": 0.99}
OF_PROBABILITY = {"labels", "D's outputs", "D too strong", "D too weak", "oscillation"}
ORDER = [  # the most specific first; the last two are never red
    "a player stands still", "BatchNorm", "labels", "detach", "copies among samples", "sample diversity", "classes",
    "memorization", "D's outputs", "D too strong", "D too weak", "G's gradient", "oscillation", "stagnation",
    "undertrained",
]  # fmt: skip


def aims(config: Config) -> tuple[float, float]:  # where D compares pairs, 1 and 0
    return (1.0, 0.0) if config.loss == "relativistic" else (config.real_label_smooth, config.fake_label_smooth)


def equilibrium(config: Config) -> dict[str, float]:
    """Return what theory says of an epoch in which G makes the data's distribution, worked out by hand."""
    m, outputs = sum(aims(config)) / 2, 1 if config.loss == "relativistic" else 2  # one output for each pair
    loss_D = outputs * (-m * math.log(m) - (1 - m) * math.log(1 - m))
    return {"loss_D": loss_D, "loss_G": -math.log(m), "D_x": m, "D_G_z": m}


def history_of(config: Config, *epochs: dict, own_loss=None, **last) -> du.History:
    """Return a history whose last epoch has the given values; all others are those of a healthy equilibrium."""
    history = du.History(config, loss=du.make_loss(config, own_loss))
    healthy = SCORES if config.loss in ("hinge", "wasserstein", "least_squares") else equilibrium(config)
    for number, changes in enumerate([*epochs, last], start=1):
        for name, value in {**WELL, **healthy, "epoch": number, **changes}.items():
            history.setdefault(name, []).append(value)
    return history


def spelled_out(config: Config, values: dict) -> dict:
    """Return values with `separation`, `loss_D above` and `loss_G times` equilibrium as a history has them."""
    values, ends, (a, b) = dict(values), equilibrium(config), aims(config)
    if "separation" in values:
        half = values.pop("separation") * (a - b) / 2
        values |= {"D_x": (a + b) / 2 + half, "D_G_z": (a + b) / 2 - half}
    if "loss_D above" in values:
        values["loss_D"] = ends["loss_D"] + values.pop("loss_D above")
    if "loss_G times" in values:
        values["loss_G"] = ends["loss_G"] * values.pop("loss_G times")
    return values


def diagnosis_of(config: Config, bands=(), own_loss=None, **values) -> du.Diagnosis:
    return du.diagnose(history_of(config, own_loss=own_loss, **spelled_out(config, values)), bands=bands)


def panel(config: Config, bands=(), **values) -> dict[str, du.Finding]:
    return {finding.name: finding for finding in diagnosis_of(config, bands, **values).findings}


# ------------------------------------------------------------------------------------------ the whole diagnosis
@pytest.mark.parametrize(("kind", "values"), [
    (du.DCGAN, {"D_x": 0.75, "D_G_z": 0.3, "loss_D": 1.2, "pixel_std_ratio": 0.95, "D_acc": 0.7}),
    (du.StableDCGAN, {"D_x": 0.47, "D_G_z": 0.43, "loss_D": 1.3537, "loss_G": 0.8464, "D_acc": 0.555}),  # its README
    (du.FastDCGAN, {"D_x": 0.7, "D_G_z": 0.3, "loss_D": 0.5, "loss_G": 1.1, "D_acc": 0.75}),
    (du.WGANGP, {}),
])  # fmt: skip
def test_a_healthy_run_is_green_and_advises_nothing(kind, values):
    diagnosis = diagnosis_of(kind.resolve(), kind.bands, **values)
    assert (diagnosis.status, diagnosis.cause) == ("green", None)
    assert {(f.status, f.remedy, len(f.changes)) for f in diagnosis.findings} == {("green", "", 0)}


@pytest.mark.parametrize("kind", RECIPES)
def test_progress_as_theory_describes_it_gets_no_advice(kind):
    """From a D that separates well to the equilibrium D(x) falls toward m: no line asks for a stronger D."""
    config, ends = kind.resolve(), equilibrium(kind.resolve())
    for share in np.linspace(0.8, 0, 33).tolist():
        values = {"separation": share, "D_acc": 0.5 + share / 4, "loss_G": ends["loss_G"] + share}
        for name, finding in panel(config, kind.bands, loss_D=ends["loss_D"] - 0.2 * share, **values).items():
            assert finding.status != "red"
            assert finding.changes.get("lr_D", 0) < config.lr_D
            assert "lr_G" not in finding.changes
            assert not (finding.changes and name.startswith("D(x)"))
    assert not any(finding.changes for finding in panel(config, kind.bands).values())


def test_collapse_is_red_while_the_readmes_bands_are_green():
    """The faithful 64×64 recipe begins in this state, and its README's readings do not show it."""
    diagnosis = diagnosis_of(DCGAN, du.DCGAN_BANDS, D_x=0.83, D_G_z=0.23, loss_D=0.99, pixel_std_ratio=0.03)
    assert [f.status for f in diagnosis.findings if "README" in f.name] == ["green", "green"]
    assert [f.name for f in diagnosis.findings if f.status == "red"] == ["sample diversity", "D too strong"]
    assert (diagnosis.cause.name, diagnosis.cause.value) == ("sample diversity", "0.03")


@pytest.mark.parametrize("name", [*du.METRICS, "pixel_std_ratio"])
@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN, du.WGANGP])
def test_a_value_that_is_no_number_is_the_only_finding(kind, name):
    config = kind.resolve()
    for value in (math.nan, math.inf, -math.inf):
        diagnosis = diagnosis_of(config, kind.bands, **{name: value})
        (finding,) = diagnosis.findings
        assert (diagnosis.status, diagnosis.cause, finding.name) == ("red", finding, "losses are numbers")
        assert finding.changes == {"lr_G": config.lr_G / 2, "lr_D": config.lr_D / 2}


def test_nan_in_the_newest_batches_is_red_before_the_epoch_has_ended():
    for history, epochs in ((du.History(FAST), 0), (history_of(FAST, {}), 2)):
        for values in history.batches.values():
            values.append(epochs + 0.1)
        history.batches["loss_G"][-1] = math.nan
        assert du.diagnose(history).cause.name == "losses are numbers"
    assert du.diagnose(history.until(2)).status == "green"  # as it was before


def test_an_empty_history_is_refused_in_one_line():
    started = du.History(FAST, batches={"step": [5], "loss_D": [0.5]})  # as a callback may see it
    for history, samples in ((du.History(DCGAN), None), (du.History(DCGAN), {"pixel_std_ratio": 1.0}), (started, None)):
        with pytest.raises(ValueError, match=r"^[^\n]*train[^\n]*$"):
            du.diagnose(history, samples=samples)


def test_diagnose_depends_on_its_arguments_and_changes_none():
    history, samples = history_of(DCGAN, {}, pixel_std_ratio=0.3, grad_G=None), {"nn_distance_ratio": 0.2}
    before = copy.deepcopy((dict(history), history.batches, samples))
    first = du.diagnose(history, bands=du.DCGAN_BANDS, samples=samples)
    again = du.History.from_json(json.loads(json.dumps(history.to_json())))  # from disk as from memory
    assert du.diagnose(again, bands=du.DCGAN_BANDS, samples=samples) == first
    assert (dict(history), history.batches, samples) == before
    other = {f.name: f.status for f in du.diagnose(history, STABLE).findings}  # a given config goes first
    assert other["D(x) + D(G(z)) (theory)"] == "yellow"  # 1.05 is 0.85 + 0.2, and 0.15 above 0.9 + 0


@pytest.mark.parametrize("kind", RECIPES)
def test_a_value_that_was_not_measured_makes_nothing_worse(kind):
    whole, names = panel(kind.resolve(), kind.bands), WELL.keys() - {"D_acc"}
    for missing in (names, *({name} for name in names)):
        found = panel(kind.resolve(), kind.bands, **dict.fromkeys(missing))
        assert {name: f.status for name, f in found.items()} == {name: whole[name].status for name in found}
        assert {"D loss (theory)", "D too strong"} <= found.keys()


@pytest.mark.parametrize("kind", [*RECIPES, du.WGANGP])
def test_samples_made_now_go_before_the_historys(kind):
    well, ill = history_of(kind.resolve()), history_of(kind.resolve(), nn_distance_ratio=0.0, near_copies=0.9)
    for history, samples, cause in (
        (well, {"pixel_std_ratio": 0.05}, "sample diversity"), (well, {"class_gap": 0.9, **CLEAR}, "classes"),
        (well, {"pixel_std_ratio": math.nan}, "losses are numbers"), (ill, {}, "copies among samples"),
        (ill, {"nn_distance_ratio": 1.0}, "memorization"),
    ):  # fmt: skip
        assert du.diagnose(history, samples=samples).cause.name == cause
    assert du.diagnose(ill, samples={"nn_distance_ratio": 1.0, "near_copies": 0.01}) == du.diagnose(well)


class OwnHinge:  # nothing but the two methods
    def __init__(self, config):
        pass

    def discriminator(self, real_logits, fake_logits):
        return (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()

    def generator(self, fake_logits):
        return -fake_logits.mean()


class OwnRelativistic(du.RelativisticLoss):
    def discriminator(self, real_logits, fake_logits):
        return (1 + fake_logits - real_logits).relu().square().mean() / 2


def variant(kind: type, **attributes) -> type:
    return type(kind.__name__, (kind,), attributes)


OwnCrossEntropy, OwnCritic = variant(du.NonSaturatingLoss), variant(du.WassersteinLoss)
OWN = [variant(du.DCGAN, losses=own) for own in (OwnHinge, OwnRelativistic)]
CHANCES = {"D_x": 0.52, "D_G_z": 0.5, "loss_D": 0.69, "loss_G": 0.7, "D_std": 0.1, "D_G_z_std": 0.02, "D_acc": 0.5}


@pytest.mark.parametrize(("name", "own", "values", "theory"), [
    ("bce", None, {}, {"separation", "D(x) + D(G(z))", "D loss"}),
    ("relativistic", None, {}, {"separation", "D loss"}),  # a pair's sum is 1 whatever happens
    *((name, None, SCORES, set()) for name in ("least_squares", "hinge", "wasserstein")),
    *((name, OwnHinge, SCORES, set()) for name in ("bce", "relativistic")),  # the object decides, not the Config
    ("hinge", OwnRelativistic, CHANCES, {"separation", "D loss"}),
    ("hinge", OwnCrossEntropy, CHANCES, {"separation", "D(x) + D(G(z))", "D loss"}),
    ("bce", OwnCritic, SCORES, set()),
])  # fmt: skip
def test_the_loss_object_decides_which_rules_the_panel_has(name, own, values, theory):
    critic = own is OwnCritic or name == "wasserstein"
    config = dataclasses.replace(CRITIC if critic else Config(), loss=name)
    history = history_of(config, own_loss=own, **values)
    for diagnosis in (du.diagnose(history, bands=du.DCGAN_BANDS), du.diagnose(history, config, du.DCGAN_BANDS)):
        found = {finding.name for finding in diagnosis.findings}
        assert OF_PROBABILITY & found == (OF_PROBABILITY if theory else set())
        assert {n.removesuffix(" (theory)") for n in found if n.endswith("(theory)")} == theory
        assert ({"D(x) (README)", "D(G(z)) (README)"} & found != set()) == ("D(x) + D(G(z))" in theory)
        assert ({"Wasserstein estimate", "critic's gradient norm"} <= found) == critic
        assert {"sample diversity", "copies among samples", "a player stands still", "detach"} <= found
        assert diagnosis.cause is None
        assert not any(finding.changes for finding in diagnosis.findings)


@pytest.mark.parametrize(("values", "fields", "cause", "changes"), [
    ({"D_gap": -0.5}, {}, "Wasserstein estimate", {"lr_G": 1e-4}),
    ({"D_gap": -0.5}, {"n_critic": 1}, "Wasserstein estimate", {"n_critic": 5}),
    ({"gradient_norm": 9.0}, {}, "critic's gradient norm", {"lr_D": 1e-4}),
    ({"gradient_norm": 0.01}, {}, "critic's gradient norm", {"lr_D": 1e-4}),
    ({"gradient_norm": None}, {"gradient_penalty": 0.0}, "critic's gradient norm",
     {"gradient_penalty": 10.0, "batch_norm_D": False}),
    ({"gradient_norm": 2.5}, {}, None, None),
])  # fmt: skip
def test_a_critic_has_faults_of_its_own(values, fields, cause, changes):
    for own in (None, OwnCritic):
        found = diagnosis_of(dataclasses.replace(CRITIC, **fields), own_loss=own, **values).cause
        assert (found and found.name, found and found.changes) == (cause, changes)


@pytest.mark.parametrize(("kind", "metric", "values"), [
    (du.DCGAN, "D_x", {0.7: "", 0.9: "", 0.69: "wait", 0.5: "wait", 0.3: "help D", 0.95: "hold D back"}),
    (du.DCGAN, "D_G_z", {0.1: "", 0.525: "", 0.001: "hold D back", 0.9: "help D"}),
    (du.StableDCGAN, "D_acc", {0.4: "", 0.7: "", 0.35: "help D", 0.05: "help D", 0.99: "hold D back"}),
    (du.StableDCGAN, "loss_D", {1.35: "", 0.5: "hold D back", 30.0: "help D"}),
    (du.StableDCGAN, "loss_G", {0.85: "", 40.0: "hold D back", 0.2: "help D"}),
])  # fmt: skip
def test_a_readmes_band_is_never_red_and_advises_the_right_way(kind, metric, values):
    """Between the band and the equilibrium, 0.525, D(x) is on its way: yellow, and nothing to change."""
    config, band = kind.resolve(), next(band for band in kind.bands if band.metric == metric)
    for value, advice in values.items():
        finding = panel(config, kind.bands, **{metric: value})[f"{band.title} (README)"]
        assert (finding.status, finding.quiet) == ("yellow" if advice else "green", False)
        assert float(finding.value) == pytest.approx(value, abs=0.006)
        changed = dataclasses.replace(config, **finding.changes)
        share = (changed.lr_D / changed.lr_G) / (config.lr_D / config.lr_G)
        assert (share > 1) == (advice == "help D")
        assert (share < 1 or changed.instance_noise > 0) == (advice == "hold D back")


def test_a_band_of_ones_own_stands_between_faults_and_theory():
    band = du.Band("speed", "speed", (10, 50), "slow", "fast", True)
    for speed, status in ((99.0, "yellow"), (20.0, "green"), (math.nan, "yellow")):
        found = panel(Config(), [band], speed=speed)
        assert found["speed (README)"].status == status
        assert [name for name in found if name not in ORDER][:2] == ["speed (README)", "separation (theory)"]
    assert "speed (README)" not in panel(Config(), [band])  # not measured


@pytest.mark.parametrize("kind", RECIPES)
def test_theory_lines_compare_and_never_advise(kind):
    config, (a, b), ends = kind.resolve(), aims(kind.resolve()), equilibrium(kind.resolve())
    cases = [("separation", {"separation": x}, x, -0.05 <= x <= 0.85) for x in (0, 0.84, 0.86, 1, -0.1, -1)]
    cases += [("D loss", {"loss_D above": x}, ends["loss_D"] + x, x < 0.5) for x in (0, -0.5, 0.49, 0.51, 99)]
    for gap in (0.0, 0.3, a - b) if kind in SUMMED else ():  # the sum stays, however well D separates
        for off in (0.0, 0.09, 0.2, -0.2, 0.4):
            values = {"D_x": (a + b + gap) / 2 + off, "D_G_z": (a + b - gap) / 2}
            cases.append(("D(x) + D(G(z))", values, a + b + off, abs(off) < 0.1))
    for name, values, shown, green in cases:
        finding = panel(config, **values)[f"{name} (theory)"]
        assert (finding.status, finding.changes, finding.remedy) == ("green" if green else "yellow", {}, "")
        assert float(finding.value) == pytest.approx(shown, abs=0.006)
    said = re.findall(r"\d+\.\d+", panel(config)["D loss (theory)"].message)
    assert {f"{ends['loss_D']:.2f}", f"{ends['loss_G']:.2f}", f"{ends['D_x']:g}"} <= set(said)


# ------------------------------------------------------------------------------------------ faults, one by one
CASES = {  # finding: what its remedy changes, then values (see `spelled_out`) that are green, yellow and red
    "a player stands still": (None, [{"update_ratio_D": 1e-4, "update_ratio_G": 2e-6}], [],
                              [{"update_ratio_D": 0.0}, {"update_ratio_G": 5e-7}]),
    "BatchNorm": (set(), [{"update_ratio_BN_D": 1e-9, "update_ratio_BN_G": 1e-9}], [],
                  [{"update_ratio_BN_D": 0.0}, {"update_ratio_BN_D": None, "update_ratio_BN_G": 0.0}]),
    "labels": (set(), [{"D_acc": 0.35, "loss_D above": -0.04}, {"D_acc": 0.9, "loss_D above": -0.3}], [],
               [{"D_acc": 0.35, "loss_D above": -0.1}, {"D_acc": 0.0, "loss_D above": -0.4, "separation": -1}]),
    "detach": (set(), [{"grad_G_after_D_step": 0.0}], [], [{"grad_G_after_D_step": 1e-9}]),
    "copies among samples": ({"vary"}, [{"nn_distance_ratio": x} for x in (0.51, 1.8)],
                             [{"nn_distance_ratio": x, "epoch": k} for x, k in ((0.45, 2), (0.22, 2), (0.18, 1))],
                             [{"nn_distance_ratio": x} for x in (0.18, 0.0)]),
    "sample diversity": ({"vary"}, [{"pixel_std_ratio": x} for x in (0.7, 1.3)],
                         [{"pixel_std_ratio": x, "epoch": k} for x, k in ((0.65, 2), (1.4, 2), (0.15, 1))],
                         [{"pixel_std_ratio": x, "epoch": k} for x, k in ((0.05, 1), (0.15, 2), (2.0, 2))]),
    "classes": ({"vary"}, [{"class_gap": 0.29, **CLEAR}],
                [{"class_gap": 0.45, **CLEAR}, {"class_gap": 0.9, **CLEAR, "pixel_std_ratio": 0.6},
                 {"class_gap": 0.9, **CLEAR, "precision": 0.1}, {"class_gap": 0.9, **CLEAR, "confidence": 0.6}],
                [{"class_gap": 0.9, "precision": None, "confidence": 0.99}, {"class_gap": 0.9, **CLEAR}]),
    "memorization": ({"ngf", "dropout_D"}, [{"near_copies": 0.05}], [{"near_copies": 0.1}], [{"near_copies": 1.0}]),
    "D's outputs": ({"lr_G"}, [{"D_std": 0.04}], [{"D_std": 0.02}], [{"D_std": 0.0}]),  # m for all: no stronger D
    "D too strong": ({"hold D back"}, [{"separation": 0.87}],
                     [{"separation": 0.5, "loss_G times": 3.2}, {"separation": 0.5, "loss_G times": 8.9}],
                     [{"separation": 0.85, "loss_G times": 3.2}, {"separation": 0.5, "loss_G times": 9.1},
                      {"separation": 0.5, "loss_G times": 3.2, "D_acc": 0.95}, {"separation": 0.9}]),
    "D too weak": ({"help D"}, [{"separation": -0.04}], [{"separation": -0.1}],
                   [{"separation": -0.3}, {"D_acc": 0.28}]),
    "G's gradient": ({"lr_G", "instance_noise"}, [{"grad_G": 0.06}], [{"grad_G": 0.03}], [{"grad_G": 0.0}]),
    "oscillation": ({"lr_G", "lr_D"}, [{"D_G_z_std": 0.19}], [{"D_G_z_std": 0.22}], [{"D_G_z_std": 0.4}]),
    "undertrained": (set(), [{"precision": 0.31}], [{"precision": 0.0}], []),
}  # fmt: skip
ILL = [values for _, _, yellow, red in CASES.values() for values in yellow + red]


@pytest.mark.parametrize(("kind", "own"), [*((kind, None) for kind in RECIPES), (du.FastDCGAN, OwnRelativistic)])
@pytest.mark.parametrize("name", CASES)
def test_every_fault_by_its_values(kind, own, name):
    config, (fields, *cases) = kind.resolve(), CASES[name]
    expected = {
        "vary": {"instance_noise"} if config.init_output_bias else {"init_output_bias"},
        "hold D back": {"instance_noise"} if kind is du.DCGAN else {"lr_D"},  # its lr_D is half of lr_G already
        "help D": {"lr_D"} if kind is du.DCGAN else {"lr_G"},
    }
    statuses = ["green", "yellow", "red"]
    for status, values in ((status, values) for status, part in zip(statuses, cases, strict=True) for values in part):
        diagnosis = diagnosis_of(config, own_loss=own, **{"epoch": 2, **values})
        finding = next(finding for finding in diagnosis.findings if finding.name == name)
        if kind is du.FastDCGAN and name == "D too strong" and "D_acc" in values:
            status = "yellow"  # which of a pair is real is easier to tell
        assert (finding.status, bool(finding.message)) == (status, finding in diagnosis.shown), values
        assert (finding in diagnosis.shown) == (status != "green" or name == "sample diversity")
        assert (diagnosis.cause == finding) == (status == "red"), values  # and nothing more specific is taken for it
        assert diagnosis.status == max((f.status for f in diagnosis.findings), key=statuses.index)
        if status == "green":
            assert (finding.changes, finding.remedy) == ({}, "")
        elif fields is not None:
            assert finding.changes.keys() == set().union(*(expected.get(field, {field}) for field in fields))


@pytest.mark.parametrize("kind", RECIPES)
def test_the_most_specific_fault_is_named_first(kind):
    """With everything wrong at once, each repair of what is named brings up the next one in this order."""
    named, ill = [], {name: case[3][-1] for name, case in CASES.items() if case[3]} | {"labels": {"loss_D above": -0.3}}
    while ill and len(named) < 20:
        found = panel(kind.resolve(), **{key: value for part in ill.values() for key, value in part.items()})
        assert [name for name in found if not name.endswith("(theory)")] == ORDER
        named.append(next(name for name, finding in found.items() if finding.status == "red"))
        del ill[named[-1]]
    assert named == ORDER[:-2]


@pytest.mark.parametrize(("distances", "status"), [
    ([9, 8, 7, 6, 5, 4], "green"), ([9, 5, 5, 5, 5, 5], "green"), ([9, 5, 5, 6, 5, 7, 5], "yellow"),
    ([9, 5, 5, 6, 5, 7, 4], "green"), ([9, 5, None, 5, 5, 5, None], "green"), ([5] * 90, "yellow"),
])  # fmt: skip
def test_five_epochs_without_a_gain_are_worth_a_look(distances, status):
    history = history_of(DCGAN, *({"frechet": d} for d in distances[:-1]), frechet=distances[-1])
    for config, changes in ((DCGAN, {"lr_schedule": "constant_then_linear"}), (FAST, {})):  # FAST's rates fall already
        finding = next(f for f in du.diagnose(history, config).findings if f.name == "stagnation")
        assert (finding.status, finding.changes) == (status, changes if status == "yellow" else {})
        assert du.epochs_without_gain(history) == float(finding.value)


ODD = [  # configs in which a remedy could easily be out of range, idle or worse
    {}, {"lr_G": 0}, {"lr_D": 0.0}, {"lr_G": 0.0, "lr_D": 0.0}, {"lr_G": 1, "lr_D": 1}, {"lr_D": 1e-9}, {"lr_D": 0.04},
    {"lr_G": 0.04}, {"lr_D": 1e-5}, {"n_critic": 0}, {"g_steps": 0}, {"n_critic": 0, "g_steps": 0}, {"detach": False},
    {"batch_norm_G": False, "batch_norm_D": False}, {"batch_norm_D": False}, {"beta1": 0.9, "lr_G": 2e-3, "lr_D": 1e-3},
    {"beta1": 0.9}, {"nz": 1}, {"ngf": 1, "ndf": 1, "dropout_D": 0.0}, {"dropout_D": 0.95}, {"instance_noise": 10.0},
    {"instance_noise": 0.1, "init_output_bias": True}, {"real_label_smooth": 1.0, "fake_label_smooth": 0.9},
    {"generator_target": 0.0}, {"lr_schedule": "constant"},
]  # fmt: skip
MAY_CHANGE_NOTHING = {"BatchNorm", "labels", "detach", "undertrained", "a player stands still"}


@pytest.mark.parametrize("kind", [*RECIPES, du.WGANGP])
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_every_remedy_can_be_applied_and_does_something(kind, odd):
    """`dataclasses.replace(config, **finding.changes)` is valid, changes the config, and freezes no network."""
    config = dataclasses.replace(kind.resolve(), **odd)
    for values in [*ILL, {"D_gap": -1.0}, {"loss_D": math.nan}, {"gradient_norm": 50.0}]:
        for finding in diagnosis_of(config, kind.bands, **values).findings:
            changed = dataclasses.replace(config, **finding.changes) if finding.changes else config
            said = dict(part.split("=") for part in finding.remedy.split(", ") if part)
            assert said == {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in finding.changes.items()}
            reference = finding.name.endswith(("(theory)", "(README)"))
            if finding.status != "green" and finding.name not in MAY_CHANGE_NOTHING and not reference:
                assert changed != config, finding
            for player, steps in (("D", "n_critic"), ("G", "g_steps")):  # what could move still can
                moves = [getattr(c, f"lr_{player}") * getattr(c, steps) > 0 for c in (config, changed)]
                assert moves[1] or not moves[0], finding
                assert all(getattr(changed, name) >= getattr(config, name) for name in (steps, "dropout_D"))


@pytest.mark.parametrize(("fields", "changes"), [
    ({}, {}), ({"n_critic": 0}, {"n_critic": 1}), ({"g_steps": 0}, {"g_steps": 1}), ({"lr_D": 0.0}, {"lr_D": 2e-4}),
    ({"detach": False}, {"detach": True}), ({"nz": 1}, {"nz": 100}), ({"nz": 16}, {}),
    ({"batch_norm_G": False, "batch_norm_D": False}, {"batch_norm_G": True, "batch_norm_D": True}),
    ({"batch_norm_G": False, "batch_norm_D": False, "gradient_penalty": 1.0},
     {"batch_norm_G": True, "batch_norm_D": False}),  # a penalty and BatchNorm in D are refused
    ({"instance_noise": 2.0}, {"instance_noise": 0.1}), ({"beta1": 0.9}, {"beta1": 0.5}),
    ({"beta1": 0.9, "lr_G": 2e-3, "lr_D": 1e-3}, {"beta1": 0.5, "lr_G": 2e-4, "lr_D": 1e-4}),
    ({"lr_D": 2e-3, "lr_G": 2e-4}, {"lr_D": 1e-4}), ({"lr_G": 4e-3, "lr_D": 1e-4}, {"lr_G": 2e-4}),
    ({"n_critic": 0, "nz": 1, "beta1": 0.9}, {"n_critic": 1}),  # one thing at a time
])  # fmt: skip
def test_the_usual_suspect_is_the_setting_that_stands_out(fields, changes):
    config = dataclasses.replace(DCGAN, **fields)
    assert usual_suspect(config) == pytest.approx(changes)
    for _ in range(9):  # one repair after the other comes to an end
        config = dataclasses.replace(config, **usual_suspect(config))
    assert usual_suspect(config) == {}
    assert not any(usual_suspect(kind.resolve()) for kind in du.RECIPES.values())


@pytest.mark.parametrize("kind", RECIPES)
def test_a_known_fault_of_the_config_is_red_sooner_and_named(kind):
    for name, values in (
        ("copies among samples", {"nn_distance_ratio": 0.44, "epoch": 1}), ("D too weak", {"D_acc": 0.44}),
        ("sample diversity", {"pixel_std_ratio": 0.44, "epoch": 1}), ("D too weak", {"separation": -0.06}),
        ("D too strong", {"separation": 0.5, "loss_G times": 3.2, "D_acc": 0.91}),
    ):  # fmt: skip
        sound, suspect = (panel(kind.resolve(**fields), **values)[name] for fields in ({}, {"nz": 1}))
        pairs = kind is du.FastDCGAN and name == "D too strong"  # whose D may tell nearly all pairs apart
        assert (suspect.status, suspect.changes) == ("yellow" if pairs else "red", {"nz": 100})
        assert sound.status != "red"


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(("player", "steps"), [("D", "n_critic"), ("G", "g_steps")])
@pytest.mark.parametrize("other", [{}, {"nz": 1}, {"batch_norm_G": False}])
def test_a_network_that_stands_still_gets_steps_or_a_learning_rate_back(kind, player, steps, other):
    config = dataclasses.replace(kind.resolve(), **other)
    for frozen in ({steps: 0}, {f"lr_{player}": 0.0}, {f"lr_{player}": 1e-12}, {}):  # {}: nothing in it is to blame
        ill = dataclasses.replace(config, **frozen)
        found = diagnosis_of(ill, **{f"update_ratio_{player}": 0.0}).cause
        assert (found.name, found.message[0], found.changes.keys()) == ("a player stands still", player, frozen.keys())
        mended = dataclasses.replace(ill, **found.changes)
        assert getattr(mended, steps) >= 1
        assert min(mended.lr_G, mended.lr_D) >= min(config.lr_G, config.lr_D)


def test_no_epoch_of_a_healthy_kept_run_is_red_and_a_collapsed_one_is(root):
    """Whole runs at full width; `dcgan_literal` is the 64×64 recipe without its output bias, collapsed at first."""
    red = {}
    for path in sorted(root.glob("results/*/history.json")):
        history, kind = du.History.from_json(json.loads(path.read_text())), path.parent.name.split("_")[0]
        panels = [du.diagnose(history.until(k + 1), bands=du.RECIPES[kind].bands) for k in range(len(history["epoch"]))]
        red[path.parent.name] = [k for k, p in enumerate(panels, start=1) if p.cause]
    assert red.keys() >= {"dcgan", "stable", "fast"}
    assert {name: epochs for name, epochs in red.items() if epochs} == {"dcgan_literal": [1, 2, 3]}


COLLAPSE = {"sample diversity", "copies among samples", "classes"}
FAST_D, FAST_G = {"D too strong", "oscillation"} | COLLAPSE, {"D too weak", "D too strong"} | COLLAPSE
NAMED = {  # fault of a kept run: the findings that name it rightly
    "lr_D × 20": FAST_D, "lr_D × 100": FAST_D, "beta1 0.9, lr × 10": FAST_D, "lr_G × 20": FAST_G, "lr_G × 100": FAST_G,
    "no BatchNorm": {"G's gradient"} | COLLAPSE, "D frozen": {"a player stands still"},
    "G frozen": {"a player stands still"}, "labels swapped": {"labels"}, "no detach": {"detach"},
    "tiny latent": {"copies among samples"}, "one image": COLLAPSE, "one class": {"classes"},
    "copies of the data": {"memorization"}, "NaN in G": {"losses are numbers"}, "G left in eval mode": {"BatchNorm"},
}  # fmt: skip
HARMLESS = ["lr_D × 20 dcgan", "lr_D × 20 stable", "lr_G × 20 dcgan", "no BatchNorm stable", "no BatchNorm fast"]


@pytest.mark.parametrize("which", ["tuning", "judged"])
def test_kept_runs_with_a_known_fault_are_named_and_healthy_ones_left_alone(which, root):
    """The bars: 95 % of the faults named after one epoch, at most 1 % of healthy epochs red."""
    counts = Counter()
    for record in json.loads(gzip.decompress((root / f"results/health/{which}.json.gz").read_bytes())):
        history, fault, kind = du.History.from_json(record["history"]), record["fault"], du.RECIPES[record["recipe"]]
        panels = [du.diagnose(history.until(k + 1), bands=kind.bands) for k in range(len(history["epoch"]))]
        if fault is None:
            counts.update(["healthy", "red"][panel.cause is not None] for panel in panels)
        elif f"{fault} {kind.recipe}" not in HARMLESS:
            cause = (du.diagnose(history) if fault == "NaN in G" else panels[0]).cause
            counts.update(["named" if cause is not None and cause.name in NAMED[fault] else "missed"])
    assert counts["named"] >= 0.95 * (counts["named"] + counts["missed"]) > 70
    assert counts["red"] <= 0.01 * counts["healthy"] > 0.5


# ------------------------------------------------------------------------------------------ short trainings
class OneImage(nn.Module):  # a generator that makes one image whatever z is
    def __init__(self, config):
        super().__init__()
        self.image = nn.Parameter(torch.linspace(-1, 1, config.image_size).repeat(config.image_size, 1))

    def forward(self, z, labels=None):
        return self.image.expand(len(z), 1, -1, -1)


def swapped(loss: type) -> type:
    return variant(loss, discriminator=lambda self, real, fake: loss.discriminator(self, fake, real))


class LeftInEval(du.Callback):  # as after sampling without `train()`
    def on_train_begin(self, gan):
        gan.generator.eval()
        for module in gan.generator.modules():
            module.train = lambda mode=True, module=module: module


class NaNInG(du.Callback):  # in the second epoch
    def on_batch_end(self, gan):
        if gan.epoch == 1 and gan.batch == 5:
            next(gan.generator.parameters()).data.fill_(math.nan)


@pytest.fixture
def trained(mnist_small):
    """Return a function that trains a narrow GAN on 512 digits, 32 iterations an epoch, and gives it back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(kind, epochs=1, callbacks=(), **fields):
        gan = kind(**{**TINY[next(k for k in kind.__mro__ if k in TINY)], "nz": 16, "device": "cpu", **fields})
        with contextlib.suppress(du.DivergenceError):
            gan.train(epochs, data=mnist_small, callbacks=callbacks)
        return gan

    yield train
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "fields", "callbacks", "cause", "changes"), [
    (du.StableDCGAN, {"n_critic": 0}, [], "a player stands still", {"n_critic": 1}),
    (du.DCGAN, {"g_steps": 0}, [], "a player stands still", {"g_steps": 1}),
    (du.StableDCGAN, {"detach": False}, [], "detach", {"detach": True}),
    (du.DCGAN, {}, [LeftInEval()], "BatchNorm", {}),
    (du.FastDCGAN, {}, [LeftInEval()], "BatchNorm", {}),
    (variant(du.StableDCGAN, losses=swapped(du.NonSaturatingLoss)), {"lr_D": 1e-3}, [], "labels", {}),
    (variant(du.FastDCGAN, losses=swapped(du.RelativisticLoss)), {}, [], "labels", {}),
    (variant(du.StableDCGAN, networks=(OneImage, du.StableDiscriminator)), {}, [], "copies among samples", None),
    (du.StableDCGAN, {}, [NaNInG()], "losses are numbers", None),
])  # fmt: skip
def test_a_fault_put_into_a_training_is_named(kind, fields, callbacks, cause, changes, trained):
    gan = trained(kind, 2, callbacks, **fields)
    found, first = gan.diagnose().cause, du.diagnose(gan.history.until(1), bands=gan.bands).cause
    assert found.name == cause
    assert changes is None or found.changes == changes
    assert ((first and first.name) == cause) == (cause != "losses are numbers")  # NaN comes in the second epoch
    assert cause != "BatchNorm" or found.message.startswith("G ")


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN, du.WGANGP, *OWN])
def test_a_sound_training_has_no_fault_of_its_code_whatever_its_loss(kind, trained):
    gan = trained(kind, n_critic=1)
    found = {finding.name: finding.status for finding in gan.diagnose().findings}
    assert {found.get(name, "green") for name in ORDER[:4]} == {"green"}
    assert (found.keys() >= OF_PROBABILITY) == (kind is not du.WGANGP and kind.losses is not OwnHinge)
    assert any("README" in name for name in found) == (kind in (du.DCGAN, du.StableDCGAN))
    gan.reconfigure(lr_D=1e-5)
    assert [finding.name for finding in gan.diagnose().findings] == list(found)  # the loss is still one's own


@pytest.mark.parametrize(("script", "expected", "status"), [
    (lambda step: 0.1 + 0.025 * step, 0.025 / math.sqrt(2), "green"),  # a smooth rise from 0.1 to 0.9
    (lambda step: 0.2 + 0.6 * (step % 2), 0.6 / math.sqrt(2), "red"),
], ids=["ramp", "oscillation"])  # fmt: skip
def test_oscillation_is_what_changes_from_batch_to_batch_and_no_trend(script, expected, status, trained):
    class Scripted(du.StableDCGAN):
        def train_step(self, batches):
            row = super().train_step(batches)
            row[du.METRICS.index("D_G_z")] = script(self.step)
            return row

    gan = trained(Scripted, log_every=5)
    assert gan.history["D_G_z_std"][0] == pytest.approx(expected, abs=1e-6)
    assert {f.name: f.status for f in gan.diagnose().findings}["oscillation"] == status


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_statistics_of_known_samples(mnist_small):
    real, other, zeros = noise(512, 0), noise(512, 1), torch.zeros(33, 1, 8, 8)
    for samples, expected, error in (
        (real, 1, 1e-6), (0.5 * other, 0.5, 0.01), (other + 9, 1, 0.02), (real[:1].expand(512, -1, -1, -1), 0, 1e-3),
    ):  # fmt: skip
        assert du.pixel_std_ratio(samples, real) == pytest.approx(expected, abs=error)
    real, other, medians = real[:33], other[:33].exp(), []
    for images in (other, real):
        x = images.double().flatten(1).numpy()
        medians.append(np.median([np.linalg.norm(np.delete(x, i, 0) - x[i], axis=1).min() for i in range(33)]))
    assert du.nn_distance_ratio(other, real) == pytest.approx(medians[0] / medians[1], rel=1e-4)
    assert du.nn_distance_ratio(3 * real + 7, real) == pytest.approx(3, rel=1e-4)
    assert du.nn_distance_ratio(real.repeat(2, 1, 1, 1), noise(66, 4)) == pytest.approx(0, abs=1e-3)  # twins
    plane = noise(500, 4)[..., :2, :1], noise(50, 5)[..., :2, :1]  # 500 points are nearer to each other than 50
    assert du.nn_distance_ratio(*plane) == pytest.approx(1, abs=0.4)
    assert (du.pixel_std_ratio(zeros, zeros), du.nn_distance_ratio(real, zeros) > 1e6) == (0, True)  # blank data
    digits, steps = du.normalize(mnist_small[0][:256]), torch.linspace(0, 1, 32)[:, None, None, None]
    curve = torch.cat([torch.lerp(digits[k], digits[k + 1], steps) for k in range(8)])
    assert du.pixel_std_ratio(curve, digits) > 0.5 > 0.29 > du.nn_distance_ratio(curve, digits)  # pixels see variety


def test_sample_readings_see_one_image_a_class_in_a_conditional_generator(trained, mnist_small):
    images, labels = mnist_small
    with pytest.raises(ValueError, match="train"):
        sample_readings(make())
    gan = trained(du.FastDCGAN)
    readings = sample_readings(gan)
    assert readings == pytest.approx({name: gan.history[name][-1] for name in readings}, rel=1e-5)
    of_class = [du.normalize(images[labels == k]) for k in range(10)]
    gan.fixed_samples = lambda n: torch.stack([of_class[i % 10][0] for i in range(n)])
    collapsed = sample_readings(gan)
    assert collapsed == pytest.approx({"pixel_std_ratio": 0, "nn_distance_ratio": 0}, abs=0.01)
    assert du.diagnose(gan.history, samples=collapsed).cause.name == "copies among samples"
    gan.fixed_samples = lambda n: torch.stack([of_class[i % 10][i // 10] for i in range(n)])
    assert sample_readings(gan) == pytest.approx({"pixel_std_ratio": 1, "nn_distance_ratio": 1}, abs=0.06)


RED = diagnosis_of(DCGAN, du.DCGAN_BANDS, pixel_std_ratio=0.03, D_G_z_std=0.22, D_G_z=0.45)


def test_both_panels_show_every_finding_with_a_word_beside_its_color():
    assert {f.status for f in RED.shown} == {"green", "yellow", "red"}
    (head, *lines), rows = du.panel_text(RED, color=False).splitlines(), re.findall("<tr>(.*?)</tr>", RED._repr_html_())
    assert all(part in head for part in ("🔴", "act", "epoch 1"))
    for line, row, f in zip(lines, rows[1:], RED.shown, strict=True):
        parts = [f"{du.ICONS[f.status]} {du.WORDS[f.status]}", f.name, f.value, f.band, f.message, f.remedy]
        assert all(part in line for part in parts)
        assert [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] == parts
    assert panel(DCGAN, du.DCGAN_BANDS, D_x=0.7234)["D(x) (README)"].value == "0.72"


def test_ansi_colors_only_when_asked_for_or_on_a_terminal(monkeypatch):
    plain, colored = du.panel_text(RED, color=False), du.panel_text(RED, color=True)
    assert re.sub(r"\033\[\d+m", "", colored) == plain != colored
    terminal, file = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for out, expected in ((file, plain), (terminal, colored), (None, plain)):
        monkeypatch.setattr("sys.stdout", out)
        assert du.panel_text(RED) == str(RED) == expected


def test_the_html_panel_escapes_what_it_shows():
    evil = '<img src=x onerror="alert(1)"> & more'
    page = du.panel_html(du.Diagnosis("red", (du.Finding(evil, "red", evil, evil, evil, evil),), 1.0))
    assert "<img" not in page
    assert page.count(html.escape(evil)) == 5
