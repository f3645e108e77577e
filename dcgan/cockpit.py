"""A live cockpit that plays, pauses and steers training in a notebook, and the functions that it draws with."""

from __future__ import annotations

import asyncio
import base64
import html
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .config import Config, configure, kaggle_run
from .health import ICONS, WORDS, Diagnosis, panel_html
from .history import Callback, History
from .losses import Loss
from .plots import COLORS, Picture, draw_theory, figure_png, output_curves

if TYPE_CHECKING:
    from .recipes import GAN

SNAPSHOT_IMAGES = 20  # fixed-noise samples in one snapshot: four rows of five
KEPT_SNAPSHOTS = 300  # when there are more, every second one goes
SCENARIOS: dict[str, Callable[[Config], dict[str, Any]]] = {  # changes to the Config that the cockpit began with
    "balanced": lambda c: {},
    "D too strong": lambda c: {"n_critic": 5, "lr_G": c.lr_G / 20},
    "D too weak": lambda c: {"lr_D": c.lr_D / 50, "g_steps": 5},
    "no detach": lambda c: {"detach": False},
    "collapse": lambda c: {"lr_G": min(1.0, 20 * c.lr_G), "g_steps": 3},
    "learning rates × 10": lambda c: {"lr_G": min(1.0, 10 * c.lr_G), "lr_D": min(1.0, 10 * c.lr_D)},
}
CONTROLS = {  # Config field: label
    "lr_D": "D learning rate", "lr_G": "G learning rate", "n_critic": "D steps (0 freezes)",
    "g_steps": "G steps (0 freezes)", "real_label_smooth": "label of real", "fake_label_smooth": "label of fake",
    "instance_noise": "noise on D's input", "detach": "detach fakes in D's step",
}  # fmt: skip
WHILE_PLAYING = {"lr_schedule": "constant", "log_every": 10}  # a box says what it does; charts want fine points


# ------------------------------------------------------------------------------------------ snapshots
@dataclass(frozen=True)
class Snapshot:
    """Hold what a GAN shows at one moment: fixed-noise images (n, C, S, S), D's output for each (n,), health."""

    step: int
    images: Tensor
    scores: Tensor
    loss: Loss  # in force then
    readings: dict[str, float]  # of the current epoch; empty before training, as is the health panel
    diagnosis: Diagnosis | None


def take_snapshot(gan: GAN, n: int = SNAPSHOT_IMAGES) -> Snapshot:
    """Return a snapshot of a GAN that does not train at the moment; the same n latent vectors at every call."""
    images, readings = gan.fixed_samples(n), gan.history.last()
    scores = gan.score(images, gan.class_labels(n, None))
    return Snapshot(gan.step, images, scores, gan.loss, readings, gan.diagnose() if readings else None)


def plot_snapshot(snapshot: Snapshot, history: History) -> Figure:
    """Draw a snapshot: the images, framed by D's output, beside losses, D's outputs and the pixel std ratio until then.

    Dashed and dotted lines: as in `plot_history`, for the labels that were in force.
    """
    figure, loss = Picture(figsize=(9.4, 3.9), dpi=92), snapshot.loss
    rows = [["images", "losses", "D's outputs"], ["images", "gauge", "gauge"]]
    edges = {"left": 0.005, "right": 0.99, "top": 0.93, "bottom": 0.07, "wspace": 0.15, "hspace": 0.55}
    axes = figure.subplot_mosaic(rows, width_ratios=(1.7, 1, 1), height_ratios=(8, 1), gridspec_kw=edges)
    draw_scored(snapshot.images, snapshot.scores, loss, axes["images"])
    draw_gauge(snapshot.readings, axes["gauge"])
    outputs = {
        name: curve for name, curve in output_curves(loss).items() if name in history.batches and name != "D_acc"
    }
    if loss.gives_probability:
        draw_theory(axes["losses"], axes["D's outputs"], loss)
    known = sum(step <= snapshot.step for step in history.batches["step"])
    for title, curves in (("losses", {"loss_D": ("D", "D"), "loss_G": ("G", "G")}), ("D's outputs", outputs)):
        for name, (label, color) in curves.items():
            points = (history.batches[each][:known] for each in ("step", name))
            axes[title].plot(*points, color=COLORS[color], label=label)
        axes[title].set_title(title, fontsize=8)
        axes[title].set_xlabel("iteration", fontsize=7)
        axes[title].set_xlim(0, max(10, snapshot.step))
        axes[title].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[title].tick_params(labelsize=7)
        axes[title].legend(fontsize=6)
    return figure


def draw_scored(images: Tensor, scores: Tensor, loss: Loss, ax: Axes, columns: int = 5) -> None:
    """Draw images (n, C, S, S) in [-1, 1], each in a frame colored by D's output for it, which stands below."""
    low, high, ends = scores.min().item(), scores.max().item() + 1e-6, ("lowest", "highest")
    if loss.labels is not None and loss.gives_probability and not loss.compares_pairs:
        (high, low), ends = loss.labels, ("label of fake", "label of real")
    side = images.shape[2]
    edge, gap, below = max(1, side // 14), side // 6, side // 3
    colors = LinearSegmentedColormap.from_list("score", [COLORS["G"], "#dddddd", COLORS["D"]])
    canvas = np.ones((math.ceil(len(images) / columns) * (side + below), columns * (side + gap), 3))
    images = images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)
    pixels = images.permute(0, 2, 3, 1).numpy()
    for k, (image, score) in enumerate(zip(pixels, scores.tolist(), strict=True)):
        top, left = k // columns * (side + below), k % columns * (side + gap)
        canvas[top : top + side, left : left + side] = colors((score - low) / (high - low))[:3]
        inner = slice(top + edge, top + side - edge), slice(left + edge, left + side - edge)
        canvas[inner] = (image[edge : side - edge, edge : side - edge] + 1) / 2  # the rim of a digit is black
        ax.text(left + side / 2, top + side + 0.45 * below, f"{score:.2f}", ha="center", va="center", fontsize=7)
    ax.imshow(canvas, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"D's output (orange: {ends[0]}, {low:.3g}; blue: {ends[1]}, {high:.3g})", fontsize=8)


def draw_gauge(readings: dict[str, float], ax: Axes) -> None:
    """Draw the pixel std ratio of the samples as a bar over its healthy band; of a critic, name its gradient's norm."""
    ratio = readings.get("pixel_std_ratio", math.nan)
    ax.axvspan(0.7, 1.3, color=COLORS["third"], alpha=0.25)
    ax.barh([0], [0 if math.isnan(ratio) else ratio], color=COLORS["theory"], height=0.5)
    ax.set(xlim=(0, 1.6), yticks=[], xticks=[0, 0.4, 0.7, 1, 1.3])
    value = "not known yet" if math.isnan(ratio) else f"{ratio:.2f}"
    norm = f"; D's gradient norm {readings['gradient_norm']:.2f}" if "gradient_norm" in readings else ""
    ax.set_title(f"pixel std, generated / real: {value} (0: all alike; green: healthy){norm}", fontsize=8)
    ax.tick_params(labelsize=7)


def run_text(
    kind: type[GAN], config: Config, images: int, changes: Sequence[tuple[int, dict[str, Any]]], steps: int
) -> str:
    """Return a run as one line, which `GAN.replay` repeats: recipe and fields | step and changes | … | last step.

    images: length of the data.
    """
    silent, usual = ("out_dir", "device", "tracker", "log_every"), vars(kind.defaults)  # silent: they move no weight
    own = {name: value for name, value in vars(config).items() if value != usual[name] and name not in silent}
    parts = [(kind.recipe, own | {"images": images}), *changes, (steps, {})]
    return " | ".join(" ".join([str(begin), *(f"{n}={v}" for n, v in fields.items())]) for begin, fields in parts)


# ------------------------------------------------------------------------------------------ threads
def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a method, and returns None once its object is gone: it does not keep it alive."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        bound = reference()
        return bound(*arguments) if bound is not None else None

    return call


def repeat_while_true(action: Callable[[], Any]) -> None:
    """Call an action again and again until it returns something false."""
    while action():
        pass


def in_kernel_thread(loop: asyncio.AbstractEventLoop | None, action: Callable[[], None]) -> None:
    """Run an action in the kernel's main thread, in which widgets live; without a kernel, here and now."""
    if loop is None or threading.current_thread() is threading.main_thread():
        action()
    else:
        with suppress(RuntimeError):  # the kernel has ended
            loop.call_soon_threadsafe(action)


COCKPITS: weakref.WeakKeyDictionary[GAN, weakref.ref[Cockpit]] = weakref.WeakKeyDictionary()  # a GAN's newest one


# ------------------------------------------------------------------------------------------ the cockpit
class Cockpit:
    """Play, pause, step and steer a GAN's training in a notebook, and look back at its snapshots.

    data: as for `train`. callbacks: further ones. It trains in a thread, one stretch at a time: a snapshot, a change or
    Pause ends the stretch after a batch, so that the GAN is whole whenever it stands still. A newer cockpit of the same
    GAN takes over; one that no variable and no output of a cell holds stops. Learning rates follow no schedule while it
    plays. An error ends playing and stands in the panel (`.error`). `.snapshots` holds snapshots and their pictures,
    `.text` the run as one line that `GAN.replay` repeats.
    """

    def __init__(self, gan: GAN, data: Any = "mnist", callbacks: Sequence[Callback] = ()) -> None:
        steering = Callback()
        steering.on_batch_end = weakly(self._end_stretch)
        self.gan, self.callbacks = gan, [steering, *callbacks]
        self._thread: threading.Thread | None = None
        self._pausing, self._solo, self._loop = threading.Event(), {}, None
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()  # the kernel's
        self._take_over()
        gan.set_data(data)
        self.base, self.settings = gan.config, {name: getattr(gan.config, name) for name in CONTROLS}
        self._state = "ready: press Play or Step"
        self._begin()
        self._build()
        self._add_snapshot()

    def _take_over(self) -> None:
        """Become the one cockpit that trains this GAN: pause an older one."""
        older = COCKPITS.get(self.gan, lambda: None)()
        if older is not None and older is not self:
            older.pause(wait=True)
        COCKPITS[self.gan] = weakref.ref(self)

    def _begin(self) -> None:
        self.snapshots: list[tuple[Snapshot, bytes]] = []
        self.error: Exception | None = None
        self._start, self._changes = configure(self.gan.config, **WHILE_PLAYING), []
        self._in_force, self._trained_to, self._repeatable = self.settings, self.gan.step, self.gan.step == 0

    # -------------------------------------------------------------------------------------- what a user does
    @property
    def playing(self) -> bool:
        """Return whether it trains at the moment."""
        return self._thread is not None and self._thread.is_alive()

    def play(self, batches: float = math.inf, alone: str = "") -> None:
        """Train on, for so many batches or until `pause`; alone: "D" or "G", whose weights alone may move."""
        if self.playing:
            return self._say("it is playing: pause first")
        self._take_over()
        self._solo = {"": {}, "D": {"g_steps": 0}, "G": {"n_critic": 0}}[alone]
        self.error, self._last, self._due = None, self.gan.step + batches, time.perf_counter() + 1
        self._pausing.clear()
        self._say("playing …")
        self._lock(True)
        self._thread = threading.Thread(target=repeat_while_true, args=(weakly(self._train_stretch),), daemon=True)
        self._thread.start()

    def pause(self, wait: bool = False) -> None:
        """Stop after the current batch; wait: return only then."""
        self._pausing.set()
        if self.playing:
            self._say("pausing after this batch …")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when it no longer trains."""
        if self._thread is not None:
            self._thread.join()

    def reset(self) -> None:
        """Begin anew: fresh networks from the same seed, the settings as they stand."""
        self.pause(wait=True)
        if self.gan.is_training:
            return self._say("this GAN is training elsewhere: stop that first")
        self.gan.restart()
        self._begin()
        self._add_snapshot()

    def change(self, **settings: Any) -> None:
        """Change settings from the next batch on; raises ValueError for a value out of range."""
        self._want(settings)
        for name, value in settings.items():
            self.controls[name].value = value

    def _want(self, settings: dict[str, Any]) -> None:
        configure(self.gan.config, **(self.settings | settings))  # raises ValueError
        self.settings = self.settings | settings
        if not self.playing:
            self.gan.reconfigure(**self.settings)

    def scenario(self, name: str) -> None:
        """Set everything as a named scenario has it."""
        self.change(**{field: getattr(self.base, field) for field in CONTROLS} | SCENARIOS[name](self.base))

    @property
    def text(self) -> str:
        """Return the run as one line."""
        if not self._repeatable:
            return "the GAN has trained outside this cockpit: after Reset, a line that repeats the run will stand here"
        return run_text(type(self.gan), self._start, len(self.gan.images), self._changes, self._trained_to)

    # -------------------------------------------------------------------------------------- the thread
    def _train_stretch(self) -> bool:
        """Train until something is due, and return whether to go on; an error ends playing and goes to the panel."""
        try:
            if self.gan.is_training:
                raise RuntimeError("this GAN is training elsewhere: stop that, or wait for it")
            self._train_with(self.settings | self._solo)
            self._add_snapshot()
        except Exception as error:
            self.error = error
        if self.error is None and not self._pausing.is_set() and self.gan.step < self._last:
            return True
        in_kernel_thread(self._loop, self._rest)
        return False

    def _train_with(self, settings: dict[str, Any]) -> None:
        """Train one stretch, note which settings are new, and put back afterward what the user did not set."""
        gan, new = self.gan, {name: value for name, value in settings.items() if value != self._in_force[name]}
        self._changes += [(gan.step, new)] if new else []
        self._in_force, self._repeatable = settings, self._repeatable and gan.step == self._trained_to
        before = {name: getattr(gan.config, name) for name in WHILE_PLAYING}
        gan.reconfigure(**settings, **WHILE_PLAYING)
        try:
            gan.train(1, callbacks=self.callbacks)
        finally:
            self._trained_to = gan.step
            gan.reconfigure(**self.settings, **before)

    def _end_stretch(self, gan: GAN) -> None:
        """Keep the pace, and stop after this batch if something is due."""
        self._pausing.wait(self.pace.value)
        stopped = self._pausing.is_set() or gan.step >= self._last or time.perf_counter() >= self._due
        if stopped or self.settings | self._solo != self._in_force:
            gan.stop("a snapshot")

    def _add_snapshot(self) -> None:
        """Take a snapshot, draw it and show it; snapshots take at most a fifth of the time."""
        start = time.perf_counter()
        snapshot = take_snapshot(self.gan)
        kept = self.snapshots[::2] if len(self.snapshots) >= KEPT_SNAPSHOTS else self.snapshots
        self.snapshots = [*kept, (snapshot, figure_png(plot_snapshot(snapshot, self.gan.history)))]
        in_kernel_thread(self._loop, self._show_newest)
        now = time.perf_counter()
        self._due = now + max(1.0, 4 * (now - start))

    # -------------------------------------------------------------------------------------- what a user sees
    def _build(self) -> None:
        """Make the widgets; each is named, and the tab key reaches all of them in this order."""
        import ipywidgets as w

        wide, row = w.Layout(width="99%"), w.Layout(flex_flow="row wrap")
        self.status, self.picture, self.panel = w.HTML(), w.Image(format="png", layout=wide), w.HTML(layout=wide)
        self.picture.layout.max_width = "870px"
        self.amount = w.Dropdown(options=[("1 batch", 1), ("10 batches", 10), ("1 epoch", 0)], description="a step is")
        icons = {"Play": "play", "Pause": "pause", "Step D": "step-forward", "Step G": "step-forward"}
        icons |= {"Step both": "fast-forward", "Reset": "refresh"}
        self.buttons = {}
        for name, icon in icons.items():
            self.buttons[name] = w.Button(description=name, icon=icon, layout=w.Layout(width="auto"))
            self.buttons[name].on_click(weakly(self._press))
        paces = [("full speed", 0.0), ("5 batches/s", 0.2), ("1 batch/s", 1.0)]
        self.pace = w.Dropdown(options=paces, description="speed")
        self.chosen = w.Dropdown(options=list(SCENARIOS), description="scenario")
        self.chosen.observe(weakly(self._choose), "value")
        self.controls = {name: self._control(w, name) for name in CONTROLS}
        self.scrub = w.IntSlider(min=0, max=0, description="look back", readout=False, layout=wide)
        self.scrub.observe(weakly(self._show), "value")
        self.line = w.Text(description="this run", disabled=True, layout=wide)
        buttons = w.HBox([*self.buttons.values(), self.amount], layout=row)
        choices, controls = w.HBox([self.pace, self.chosen], layout=row), w.HBox([*self.controls.values()], layout=row)
        self.box = w.VBox([buttons, choices, self.status, self.picture, self.scrub, controls, self.panel, self.line])
        self._lock(False)

    def _control(self, w: Any, name: str) -> Any:
        """Return the labeled box that steers one Config field: no slider, which would round the value to its steps."""
        field, style = Config.__dataclass_fields__[name], {"description_width": "150px"}
        options = {"value": self.settings[name], "description": CONTROLS[name], "style": style}
        if isinstance(field.default, bool):
            control = w.Checkbox(indent=False, **options)
        else:
            whole, (low, high) = isinstance(field.default, int), field.metadata["range"]
            kind, step = (w.BoundedIntText, 1) if whole else (w.BoundedFloatText, 1e-5 if "lr" in name else 0.05)
            control = kind(min=low, max=high, step=step, layout=w.Layout(width="270px"), **options)
        if "label_smooth" in name and not self.gan.loss.uses_labels:
            control.layout.display = "none"
        control.observe(weakly(self._steer), "value")
        return control

    def _steer(self, event: Any) -> None:
        """Take over a value that the user entered; where it cannot be, put the old one back and say why."""
        name = next(name for name, control in self.controls.items() if control is event.owner)
        if event.new != self.settings[name]:
            try:
                self._want({name: event.new})
            except ValueError as error:
                event.owner.value = self.settings[name]
                self._say(f"⚠️ {error}")

    def _choose(self, event: Any) -> None:
        self.scenario(event.new)

    def _press(self, button: Any) -> None:
        """Do what a button says; a step is so many batches, 0 for an epoch."""
        name, step = button.description, self.amount.value or len(self.gan.images) // self.gan.images_per_iteration
        if name in ("Play", "Pause", "Reset"):
            {"Play": self.play, "Pause": self.pause, "Reset": self.reset}[name]()
        else:
            self.play(step, alone=name[-1] if name in ("Step D", "Step G") else "")

    def _lock(self, playing: bool) -> None:
        for name, button in self.buttons.items():
            button.disabled = playing != (name == "Pause")

    def _rest(self) -> None:
        """Say that it stands still, and why."""
        self._lock(False)
        self._say("paused" if self.error is None else "stopped by an error")

    def _say(self, text: str) -> None:
        self._state = text
        self._show()

    def _show_newest(self) -> None:
        """Move the slider on, unless the user is looking back."""
        following = self.scrub.value >= self.scrub.max
        self.scrub.max = len(self.snapshots) - 1
        if following:
            self.scrub.value = self.scrub.max
        self._show()

    def _show(self, event: Any = None) -> None:
        """Show what it does, the snapshot that the slider points at, its health, and the run as one line."""
        gan, snapshots = self.gan, self.snapshots  # the training thread puts a new list there
        snapshot, self.picture.value = snapshots[min(self.scrub.value, len(snapshots) - 1)]
        panel, health = "press Play or Step: there are no readings yet", "yellow"
        if snapshot.diagnosis:
            panel, health = panel_html(snapshot.diagnosis), snapshot.diagnosis.status
        if self.error is not None:
            error, health = html.escape(f"{type(self.error).__name__}: {self.error}"), "red"
            panel = f"🔴 <b>Training has stopped:</b> {error}"
        where = f"epoch {gan.epoch + gan.position / len(gan.images):.2f} · iteration {gan.step}"
        where += f" · looking back at iteration {snapshot.step}" if snapshot is not snapshots[-1][0] else ""
        where += f" · {gan.history.last().get('images_per_second', 0):.0f} images/s"
        self.status.value = f"<b>{html.escape(self._state)}</b> · {where} · {ICONS[health]} {WORDS[health]}"
        color = {"green": COLORS["third"], "yellow": "#E69F00", "red": COLORS["G"]}[health]
        self.panel.value = f"<div style='border-left:8px solid {color};padding-left:8px'>{panel}</div>"
        self.line.value = self.text

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Return the widgets, and the newest picture for pages that show none."""
        bundle = {"image/png": base64.b64encode(self.snapshots[-1][1]).decode(), "text/plain": repr(self)}
        if kaggle_run() != "Batch":  # its saved page prefers a widget, which has no kernel there
            view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
            bundle["application/vnd.jupyter.widget-view+json"] = view
        return bundle

    def __repr__(self) -> str:
        return f"Cockpit({type(self.gan).__name__}, iteration {self.gan.step})"


def explore(draw: Callable[..., Figure], **ranges: Any) -> Any:
    """Return a slider for each argument of `draw`, over the picture that it draws.

    ranges: (low, high) or (low, high, step). There is no Output widget, which saved pages do not show.
    """
    import ipywidgets as w

    sliders = {name: w.interactive.widget_from_abbrev(limits) for name, limits in ranges.items()}
    picture = w.Image(format="png", layout=w.Layout(align_self="flex-start"))

    def show(event: Any = None) -> None:
        """Draw what the sliders say."""
        picture.value = figure_png(draw(**{name: slider.value for name, slider in sliders.items()}))

    for name, slider in sliders.items():
        slider.description = name
        slider.observe(show, "value")
    show()
    return w.VBox([*sliders.values(), picture])
