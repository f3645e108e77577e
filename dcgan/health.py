"""The health panel: rules that turn a training history into findings, and the sample statistics that they read."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .history import METRICS, History
from .losses import Loss, make_loss
from .sampling import FIXED_SAMPLES, Sampler

ICONS = {"green": "🟢", "yellow": "🟡", "red": "🔴"}
WORDS = {"green": "healthy", "yellow": "watch", "red": "act"}  # color is never the only sign
ANSI_COLORS = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}


@dataclass(frozen=True)
class Finding:
    """Hold one line of the panel; `remedy` and `changes` are empty where there is nothing to change."""

    name: str
    status: str  # green | yellow | red
    value: str
    band: str
    message: str
    remedy: str = ""  # the changes in words
    changes: dict[str, Any] = field(default_factory=dict, hash=False)  # for dataclasses.replace(config, **changes)
    quiet: bool = False  # True: shown only when it is not green


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Hold the worst status and every finding; a notebook shows it as HTML, a terminal as text."""

    status: str
    findings: tuple[Finding, ...]
    epoch: float

    @property
    def cause(self) -> Finding | None:
        """Return the first red finding, which is the most specific one; None if nothing is red."""
        return next((f for f in self.findings if f.status == "red"), None)

    @property
    def shown(self) -> list[Finding]:
        """Return what the panel shows: all findings but the quiet ones that are green."""
        return [f for f in self.findings if not f.quiet or f.status != "green"]

    def __repr__(self) -> str:
        return panel_text(self)

    def _repr_html_(self) -> str:
        return panel_html(self)


@dataclass(frozen=True)
class Band:
    """Hold what a recipe's README calls healthy for one value of the history; outside it is yellow, never red."""

    metric: str
    title: str
    green: tuple[float, float]
    low: str  # what it means below the green band
    high: str  # what it means above it
    high_is_strong: bool  # True: above the band D is too strong and below it too weak; False: the other way round


DCGAN_BANDS = (
    Band("D_x", "D(x)", (0.7, 0.9), "D is too weak to recognize real images", "D is too sure of real images", True),
    Band("D_G_z", "D(G(z))", (0.1, 0.6), "D is too strong: G learns nothing", "D takes fakes for real", False),
)
STABLE_BANDS = (
    Band("D_acc", "D accuracy", (0.4, 0.7), "G is too strong", "D is too strong", True),
    Band("loss_D", "D loss", (1.15, 1.5), "below 1.35: D is too strong", "above 1.35: D is too weak", False),
    Band("loss_G", "G loss", (0.6, 1.4), "below 0.85: D is too weak", "above 0.85: D is too strong", True),
)


def diagnose(
    history: History, config: Config | None = None, bands: Sequence[Band] = (), samples: Mapping | None = None
) -> Diagnosis:
    """Return the panel for the newest epoch: faults, the most specific first; then the README's bands and theory.

    config: None takes history.config. samples: values for samples made now (`sample_readings`,
    `gan.evaluate_fixed_samples`), which replace those of the newest epoch. The result depends on the arguments alone.
    Raises ValueError for an empty history.
    """
    if not history.last() and history.finite():
        raise ValueError("the history is empty: train before you diagnose")
    loss = history.loss if config in (None, history.config) else make_loss(config)
    config, now = config or history.config, newest_values(history, loss, samples or {})
    if not history.finite() or not all(math.isfinite(now.get(name, 0.0)) for name in (*METRICS, "pixel_std_ratio")):
        message, changes = "training has diverged; load the last checkpoint, or start again", remedies(config)["slower"]
        findings = [make_finding("losses are numbers", math.nan, "red", (-INF, INF), message, changes)]
    else:
        findings = [found for rule in FAULT_RULES if (found := rule.check(now, config, loss))]
        if loss.gives_probability and loss.uses_labels:  # the READMEs speak of smoothed labels
            findings += [check_band(band, now[band.metric], config, loss) for band in bands if band.metric in now]
        findings += theory_findings(now, loss)
    worst = max((f.status for f in findings), key=list(ICONS).index, default="green")
    return Diagnosis(worst, tuple(findings), now.get("epoch", 0.0))


def newest_values(history: History, loss: Loss, samples: Mapping[str, float]) -> dict[str, float]:
    """Return the newest epoch's values, and the separation: 0 where D tells nothing apart, 1 where it tells all."""
    now = history.last() | dict(samples) | {"epochs_without_gain": epochs_without_gain(history)}
    if loss.gives_probability and loss.labels and "D_x" in now:
        now["separation"] = (now["D_x"] - now["D_G_z"]) / (loss.labels[0] - loss.labels[1])
    if loss.estimates_distance:
        now.setdefault("gradient_norm", INF)  # it is measured only where a penalty limits it
    return now


def epochs_without_gain(history: History, least: float = 0.02) -> int:
    """Return how many epochs ago the Fréchet distance last fell by the share `least`, which is above its noise."""
    best, since = INF, 0
    for value in history.get("frechet", []):
        if value is not None:
            best, since = (value, 0) if value < best * (1 - least) else (best, since + 1)
    return since


def grade(value: float, green: tuple[float, float], yellow: tuple[float, float]) -> str:
    """Return "green" inside the first band, "yellow" inside the second, else "red" (NaN too)."""
    return "green" if green[0] <= value <= green[1] else "yellow" if yellow[0] <= value <= yellow[1] else "red"


def make_finding(
    name: str, value: float, status: str, green: tuple, message: str, changes: Mapping, quiet: bool = True
) -> Finding:
    """Return a finding whose remedy spells out its changes; a green one has none."""
    changes, (low, high) = {} if status == "green" else dict(changes), green
    remedy = ", ".join(f"{key}={new:g}" if isinstance(new, float) else f"{key}={new}" for key, new in changes.items())
    band = f"≤ {high:g}" if low == -INF else f"{low:g} – {high:g}" if high < INF else f"≥ {low:g}"
    band = "finite" if green == ANY else "> 0" if 0 < low < 1e-5 else band
    return Finding(name, status, f"{value:.2g}" if quiet else f"{value:.2f}", band, message, remedy, changes, quiet)


def usual_suspect(config: Config) -> dict[str, Any]:
    """Return changes for the first setting that is known to break training; empty if there is none."""
    rate = max(config.lr_G, config.lr_D)
    lower_rates = {"lr_G": config.lr_G / 10, "lr_D": config.lr_D / 10} if rate >= 1e-3 else {}
    idle = [name for name in ("lr_G", "lr_D") if getattr(config, name) < 1e-7]
    suspects = (
        (not config.n_critic, {"n_critic": 1}),
        (not config.g_steps, {"g_steps": 1}),
        (idle, dict.fromkeys(idle, max(rate, Config.lr_D))),
        (not config.detach, {"detach": True}),
        (not config.batch_norm_G, {"batch_norm_G": True, "batch_norm_D": not config.gradient_penalty}),  # both: refused
        (config.nz < 16, {"nz": 100}),
        (config.instance_noise > 0.5, {"instance_noise": 0.1}),
        (config.beta1 > 0.5, {"beta1": 0.5, **lower_rates}),
        (config.lr_D > 4 * config.lr_G, {"lr_D": config.lr_G / 2}),  # the 64×64 recipe's proportion
        (config.lr_G > 4 * config.lr_D, {"lr_G": 2 * config.lr_D}),
    )
    return next((changes for stands_out, changes in suspects if stands_out), {})


def remedies(c: Config) -> dict[str, dict[str, Any]]:
    """Return the changes behind each remedy that a rule names; a setting that stands out goes first."""
    suspect, slow_G, penalty = usual_suspect(c), {"lr_G": c.lr_G / 2}, {"gradient_penalty": 10.0, "batch_norm_D": False}
    noise = {"instance_noise": 2 * c.instance_noise if 0 < c.instance_noise <= 0.25 else 0.1}  # Arjovsky & Bottou 2017
    general = {
        "more variety": noise if c.init_output_bias else {"init_output_bias": True},
        "weaker D": noise if c.lr_D <= c.lr_G / 2 else {"lr_D": c.lr_D / 2},
        "stronger D": {"lr_D": c.lr_G} if c.lr_D < c.lr_G else slow_G,
        "slower G": slow_G,
        "slower": slow_G | {"lr_D": c.lr_D / 2},
        "more gradient": slow_G | noise,
    }
    known = {name: suspect or changes for name, changes in general.items()}
    for network, steps in (("D", "n_critic"), ("G", "g_steps")):
        rate = {f"lr_{network}": max(c.lr_G, c.lr_D, Config.lr_D)} if getattr(c, f"lr_{network}") < 1e-7 else {}
        known[f"move {network}"] = ({} if getattr(c, steps) else {steps: 1}) | rate
    return known | {
        "": {},
        "detach": {} if c.detach else {"detach": True},
        "smaller G": {"ngf": max(1, c.ngf // 2), "dropout_D": max(0.3, c.dropout_D)},
        "falling rates": {"lr_schedule": "constant_then_linear"} if c.lr_schedule == "constant" else {},
        "more D steps": {"n_critic": 5} if c.n_critic < 5 else known["stronger D"],
        "penalty": penalty if c.gradient_penalty < 10 else known["weaker D"],
    }


@dataclass(frozen=True)
class HealthRule:
    """Hold one rule of the panel: what it reads, where that is green or yellow, what it means, what to change."""

    name: str
    reads: str  # names in the history; the smallest value counts
    green: tuple[float, float]
    yellow: tuple[float, float]
    message: str  # {network} is the last letter of the name that counts, {NAME} a value of the history
    remedy: str = ""  # a key of `remedies`
    needs: str = ""  # attributes of the loss without which the rule means nothing
    fine: str = ""  # the message where it is green; without one the rule is quiet
    status: Callable[[Mapping[str, float], Config, Loss], str] | None = None  # in place of the two bands

    def check(self, now: Mapping[str, float], config: Config, loss: Loss) -> Finding | None:
        """Return a finding; None where nothing in `reads` was measured, or the loss lacks an attribute in `needs`."""
        measured = [name for name in self.reads.split() if name in now]
        if not measured or not all(getattr(loss, name) for name in self.needs.split()):
            return None
        counts = min(measured, key=now.__getitem__)
        status = self.status(now, config, loss) if self.status else grade(now[counts], self.green, self.yellow)
        words = {**now, "network": counts[-1]}
        message = self.fine if status == "green" else self.message.format_map(words)
        changes = remedies(config)[self.remedy.format_map(words)]
        return make_finding(self.name, now[counts], status, self.green, message, changes, quiet=not self.fine)


def least_variety(now: Mapping[str, float], config: Config) -> float:
    """Return the share of real images' variety below which samples are red; low in an epoch 1 without known faults."""
    return 0.45 if usual_suspect(config) else 0.1 if now.get("epoch", 2) <= 1 else 0.2


def labels_status(now: Mapping[str, float], config: Config, loss: Loss) -> str:
    """Return "red" where D's loss is low while most of its outputs are on the wrong side."""
    return "red" if now["D_acc"] < 0.4 and now["loss_D"] < loss.equilibrium.loss_D - 0.05 else "green"


def classes_status(now: Mapping[str, float], config: Config, loss: Loss) -> str:
    """Return "red" for missing classes only where samples are varied and clear."""
    clear = now.get("precision", 1.0) > 0.75 and now.get("confidence", 0.0) > 0.97
    red = now["class_gap"] > 0.5 and clear and now.get("pixel_std_ratio", 1.0) > 0.7
    return "red" if red else "green" if now["class_gap"] < 0.3 else "yellow"


def strong_D_status(now: Mapping[str, float], config: Config, loss: Loss) -> str:
    """Return "red" where D separates nearly all images, or is sure while G's loss is far above its equilibrium."""
    a, b = loss.labels
    times, lowest = now["loss_G"] / loss.equilibrium.loss_G, (now["D_G_z"] - b) / (a - b) < 0.1
    sure = not loss.compares_pairs and now["D_acc"] > (0.9 if usual_suspect(config) else 0.93)  # pairs are easier
    red = now["separation"] > 0.88 or times > 9 or (times > 3 and (lowest or sure))
    return "red" if red else "yellow" if times > 3 else "green"


def weak_D_status(now: Mapping[str, float], config: Config, loss: Loss) -> str:
    """Return "red" where D takes fakes for real more than the reverse; sooner where the Config has a known fault."""
    least_accuracy, least = (0.45, -0.05) if usual_suspect(config) else (0.3, -0.15)
    return "red" if now["D_acc"] < least_accuracy else grade(now["separation"], (-0.05, INF), (least, INF))


INF = math.inf
ANY, ABOVE_0 = (-INF, INF), (1e-12, INF)
FAULT_RULES = (  # the most specific first: the first red one is the cause
    HealthRule("a player stands still", "update_ratio_D update_ratio_G", (1e-6, INF), (1e-6, INF),
               "{network}'s weights did not move in this epoch: only the other network learns", "move {network}"),
    HealthRule("BatchNorm", "update_ratio_BN_D update_ratio_BN_G", ABOVE_0, ABOVE_0,
               "{network} trains in eval mode: its BatchNorm averages do not move; call .train() after sampling"),
    HealthRule("labels", "D_acc", (0.4, 1), ANY, "D's loss is low while its outputs are wrong: the loss "
               "swaps real and fake; real is 1, fake 0", needs="gives_probability equilibrium", status=labels_status),
    HealthRule("detach", "grad_G_after_D_step", (-INF, 0), (-INF, 0),
               "D's step leaves a gradient in G: detach the fakes there", "detach"),
    HealthRule("copies among samples", "nn_distance_ratio", (0.5, INF), ANY, "samples are closer to each other than "
               "real images are: z hardly matters (mode collapse)", "more variety",
               status=lambda now, c, loss: grade(now["nn_distance_ratio"], (0.5, INF), (least_variety(now, c), INF))),
    HealthRule("sample diversity", "pixel_std_ratio", (0.7, 1.3), ANY, "samples differ {pixel_std_ratio:.2f} times as "
               "much as real images: less is collapse or an early epoch, more is noise", "more variety",
               "", "samples differ as much as real images",
               lambda now, c, loss: grade(now["pixel_std_ratio"], (0.7, 1.3), (least_variety(now, c), 1.6))),
    HealthRule("classes", "class_gap", (0, 0.3), ANY, "a few classes dominate: classes are missing (mode collapse), or "
               "samples are not clear yet", "more variety", status=classes_status),
    HealthRule("memorization", "near_copies", (0, 0.05), (0, 0.2), "too many samples are closer to a training image "
               "than 99 % of new real images are: G copies", "smaller G"),
    HealthRule("D's outputs", "D_std", (0.03, 1), (0.01, 1), "D gives every image the same output: it has collapsed, "
               "or nothing is left to tell apart", "slower G", "gives_probability"),
    HealthRule("D too strong", "separation", (-INF, 0.88), ANY, "D separates real from fake and G's loss is "
               "{loss_G:.1f}: G learns little", "weaker D", "labels equilibrium", status=strong_D_status),
    HealthRule("D too weak", "separation", (-0.05, INF), ANY, "D takes fakes for real more than real images: it gives "
               "G noise", "stronger D", "labels", status=weak_D_status),
    HealthRule("G's gradient", "grad_G", (0.05, INF), (0.005, INF),
               "hardly any gradient reaches G: it has saturated, or D is flat", "more gradient"),
    HealthRule("oscillation", "D_G_z_std", (0, 0.2), (0, 0.25),
               "D(G(z)) jumps from batch to batch: D and G overreact to each other", "slower", "gives_probability"),
    HealthRule("stagnation", "epochs_without_gain", (0, 4), ANY, "the Fréchet distance has not fallen for "
               "{epochs_without_gain} epochs: stop, or let the learning rates fall", "falling rates"),
    HealthRule("undertrained", "precision", (0.3, INF), ANY, "hardly any sample is near the real images: train longer"),
    HealthRule("Wasserstein estimate", "D_gap", ABOVE_0, ABOVE_0, "the critic scores samples as high as real images: "
               "it lags behind G, and its gradient misleads", "more D steps", "estimates_distance",
               "it should fall slowly while the samples improve"),
    HealthRule("critic's gradient norm", "gradient_norm", (0.5, 2), (0.1, 3), "the norm is not near 1: the estimate is "
               "no distance, and G's gradient has no scale", "penalty", "estimates_distance",
               "the norm is near 1, so the estimate is a distance"),
)  # fmt: skip


def check_band(band: Band, value: float, config: Config, loss: Loss) -> Finding:
    """Return how a value compares with a band; on its way to equilibrium it asks for no change."""
    (low, high), m = band.green, loss.equilibrium.output if loss.equilibrium else math.nan
    status = "green" if low <= value <= high else "yellow"
    message = "inside the README's band" if status == "green" else band.low if value < low else band.high
    changes = remedies(config)["weaker D" if (value > high) == band.high_is_strong else "stronger D"]
    if band.metric in ("D_x", "D_G_z") and (m - 0.05 <= value < low or high < value <= m + 0.05):
        message, changes = f"between the README's band and the equilibrium, {m:.2f}", {}
    return make_finding(f"{band.title} (README)", value, status, band.green, message, changes, quiet=False)


def theory_findings(now: Mapping[str, float], loss: Loss) -> list[Finding]:
    """Return how the newest epoch compares with D* = (a·p_data + b·p_g) / (p_data + p_g) (Goodfellow et al. 2014)."""
    lines = []
    if "separation" in now:
        message = "0: D cannot tell real from fake; 1: it always can, so look at the samples"
        lines.append(("separation", now["separation"], (-0.05, 0.85), message))
        if loss.uses_labels:
            total, message = sum(loss.labels), "a + b where D keeps up with G"
            lines.append(("D(x) + D(G(z))", now["D_x"] + now["D_G_z"], (total - 0.1, total + 0.1), message))
    if loss.gives_probability and loss.equilibrium:
        m, loss_D, loss_G, lowest = loss.equilibrium
        message = f"{lowest:.2f}: D separates all; {loss_D:.2f}: equilibrium, D's outputs {m:g}, G loss {loss_G:.2f}"
        lines.append(("D loss", now["loss_D"], (-INF, loss_D + 0.5), message))
    return [make_finding(f"{n} (theory)", v, grade(v, ok, ANY), ok, text, {}, False) for n, v, ok, text in lines]


def panel_text(diagnosis: Diagnosis, color: bool | None = None) -> str:
    """Return the panel as lines of text; color: ANSI colors, None uses them where the output is a terminal."""
    color = getattr(sys.stdout, "isatty", bool)() if color is None else color
    lines = [f"{ICONS[diagnosis.status]} health after epoch {diagnosis.epoch:.4g}: {WORDS[diagnosis.status]}"]
    for f in diagnosis.shown:
        line = f"  {ICONS[f.status]} {WORDS[f.status]:8} {f.name:24} {f.value:8} [{f.band}] {f.message}"
        line += f" → {f.remedy}" if f.remedy else ""
        lines.append(f"{ANSI_COLORS[f.status]}{line}\033[0m" if color else line)
    return "\n".join(lines)


def panel_html(diagnosis: Diagnosis) -> str:
    """Return the panel as an HTML table that shows in JupyterLab, on GitHub and on Kaggle."""
    head = f"{ICONS[diagnosis.status]} <b>Health after epoch {diagnosis.epoch:.4g}: {WORDS[diagnosis.status]}</b>"
    rows = [("th", ("", "reading", "value", "healthy", "meaning", "remedy"))]
    for f in diagnosis.shown:
        rows.append(("td", (f"{ICONS[f.status]} {WORDS[f.status]}", f.name, f.value, f.band, f.message, f.remedy)))
    cells = [[f"<{tag} style='text-align:left'>{html.escape(t)}</{tag}>" for t in texts] for tag, texts in rows]
    return f"{head}<table>{''.join('<tr>' + ''.join(row) + '</tr>' for row in cells)}</table>"


# ------------------------------------------------------------------------------------------ statistics of samples
def pixel_std_ratio(samples: Tensor, real: Tensor) -> float:
    """Return the root-mean-square distance between two samples, divided by that between two real images.

    samples, real: (n, C, H, W). 0: all samples are alike (collapse). A class that is left out hardly shows.
    """
    spread_fake, spread_real = samples.var(dim=0).sum(), real.var(dim=0).sum()  # E‖x - y‖² = 2 Σ var
    return float((spread_fake / spread_real.clamp(min=1e-12)).sqrt())


def nn_distance_ratio(samples: Tensor, real: Tensor) -> float:
    """Return the median distance from a sample to its nearest other sample, divided by the same for real images.

    samples, real: (n, C, H, W), cut to the same n. Near 0: samples are copies of each other, or lie on a curve.
    """
    n = min(len(samples), len(real))
    pairwise = [torch.cdist(x, x).fill_diagonal_(INF) for x in (samples[:n].flatten(1), real[:n].flatten(1))]
    fake_gap, real_gap = (distances.min(dim=1).values.median() for distances in pairwise)
    return float(fake_gap / real_gap.clamp(min=1e-12))


def sample_readings(gan: Sampler) -> dict[str, float]:
    """Return `pixel_std_ratio` and `nn_distance_ratio` of the fixed-noise samples beside as many training images.

    For a conditional recipe the former is the mean over the classes, since one image a class looks varied as a whole.
    Raises ValueError where there are no training images yet.
    """
    n = FIXED_SAMPLES
    fake, real = gan.fixed_samples(n), gan.real_samples(n)
    groups = [(fake, real)]
    if gan.config.conditional:
        wanted, shown = gan.class_labels(n, None).cpu(), gan.labels[gan.preview_indices(n)].cpu()
        pairs = [(fake[wanted == k], real[shown == k]) for k in range(gan.config.num_classes)]
        groups = [pair for pair in pairs if min(map(len, pair)) > 1] or groups
    variety = sum(pixel_std_ratio(*pair) for pair in groups) / len(groups)
    return {"pixel_std_ratio": variety, "nn_distance_ratio": nn_distance_ratio(fake, real)}
