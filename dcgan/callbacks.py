"""What a run shows and writes while it trains: progress bar, reports, frames, trackers. None of it can end a run."""

from __future__ import annotations

import html
import importlib.util
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from torchvision.utils import make_grid
from tqdm import tqdm

from .config import kaggle_run, prepare_file
from .data import say
from .engine import or_warn
from .health import ICONS, panel_text
from .history import Callback
from .plots import in_notebook, is_terminal, is_watched, output_curves, plot_real_vs_fake, save_picture

if TYPE_CHECKING:
    from .recipes import GAN
    from .training import Trainer


def say_above_bar(text: str) -> None:
    """Print a line above any progress bar; a stream that cannot show it, is closed or is missing raises nothing."""
    with suppress(OSError), tqdm.external_write_mode(file=sys.stdout):
        say(text)


class ProgressBar(Callback):
    """Show a bar over the whole run, or its time limit, with the newest losses; nothing where nobody watches."""

    bar: tqdm | None = None

    def on_train_begin(self, gan: Trainer) -> None:
        """Open the bar, on stdout: notebooks show stderr in red."""
        left = (gan.last_epoch - gan.epoch) * len(gan.images) - gan.position
        scale = {"total": max(0, left), "unit": "img", "unit_scale": True}
        if gan.max_seconds is not None:
            scale = {"total": gan.max_seconds, "bar_format": "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"}
        self.bar = None
        with suppress(OSError):  # a terminal that has gone
            self.bar = tqdm(file=sys.stdout, leave=False, mininterval=0.5, **scale) if is_watched() else None

    def on_batch_end(self, gan: Trainer) -> None:
        """Move the bar by one batch, or to the time that has passed."""
        if self.bar is None:
            return
        log, timed = gan.history.batches, gan.max_seconds is not None
        if gan.batch % gan.config.log_every == 0 and log["step"]:
            losses = f"D {log['loss_D'][-1]:.3f} G {log['loss_G'][-1]:.3f}"
            self.bar.set_description(f"epoch {gan.epoch + 1}/{gan.last_epoch} {losses}", refresh=False)
        with suppress(OSError):
            self.bar.update(min(gan.elapsed, gan.max_seconds) - self.bar.n if timed else gan.images_per_iteration)

    def on_train_end(self, gan: Trainer) -> None:
        """Close the bar, and say why training ended early if it did."""
        with suppress(OSError, AttributeError):  # there is no bar where nobody watches
            self.bar.close()
        if gan.stop_reason:
            where = f"after {gan.epoch} epochs" + (f" and {gan.batch} batches" if gan.position else "")
            say_above_bar(f"stopped {where}: {gan.stop_reason}; nothing is lost, train() continues from there")


class EpochReport(Callback):
    """Show 32 real beside 32 generated images, the averages and the health panel after every epoch."""

    def on_epoch_end(self, gan: GAN) -> None:
        """Display inline in a notebook; print, and save the grid, elsewhere."""
        now, panel = gan.history.last(), gan.diagnose()
        outputs = [f"{label} {now[name]:.3f}" for name, (label, _) in output_curves(gan.loss).items() if name in now]
        say_above_bar(
            f"epoch {now['epoch']:.4g}/{gan.last_epoch}  loss_D {now['loss_D']:.4f}  loss_G {now['loss_G']:.4f}  "
            f"{'  '.join(outputs)}  {now['seconds']:.0f} s, {now['images_per_second']:.0f} images/s"
        )
        figure = plot_real_vs_fake(gan.real_samples(), gan.fixed_samples(), f"epoch {now['epoch']:.4g}")
        if in_notebook():
            from IPython.display import display

            with tqdm.external_write_mode(file=sys.stdout):  # the bar leaves no copy of itself above the figure
                display(figure, panel)
            return
        say_above_bar(panel_text(panel, color=is_terminal()))
        with or_warn("the real-vs-fake grid"):
            say_above_bar(f"  grid: {save_picture(figure, gan.folder / 'real_vs_fake.png')}")


class BatchLines(Callback):
    """Print the 28×28 recipe's README's line per `log_every` batches, where somebody waits for it, and epoch blocks."""

    def on_batch_end(self, gan: Trainer) -> None:
        log = gan.history.batches
        if gan.position and gan.batch % gan.config.log_every == 0 and log["step"] and kaggle_run() != "Batch":
            say_above_bar(
                f"Epoch {gan.epoch + 1}/{gan.last_epoch} | Batch {gan.batch} | D_loss: {log['loss_D'][-1]:.4f} | "
                f"D_acc: {log['D_acc'][-1]:.2%} | G_loss: {log['loss_G'][-1]:.4f}"
            )

    def on_epoch_end(self, gan: Trainer) -> None:
        now = gan.history.last()
        say_above_bar(
            f"{'=' * 60}\nEpoch {now['epoch']:.4g}/{gan.last_epoch} summary ({now['seconds']:.0f} s)\n"
            f"  D loss: {now['loss_D']:.4f}   D accuracy: {now['D_acc']:.2%}\n  G loss: {now['loss_G']:.4f}\n"
            f"  {balance_line(now['D_acc'])}\n{'=' * 60}"
        )


def balance_line(accuracy: float) -> str:
    """Return the README's verdict on D's accuracy: below 30 % G is too strong, above 80 % D is, 40–70 % is balanced."""
    if not 0.3 <= accuracy <= 0.8:
        return f"⚠️ {'Generator' if accuracy < 0.3 else 'Discriminator'} too strong!"
    return "✅ Training balanced!" if 0.4 <= accuracy <= 0.7 else "🟡 Slightly out of balance"


class StopAt(Callback):
    """End the run after so many iterations in all."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_batch_end(self, gan: Trainer) -> None:
        if gan.step >= self.step:
            gan.stop(f"iteration {self.step}")


class SaveGrids(Callback):
    """Save the grid that `generate_images` draws every `save_every` epochs: the frames of the animation."""

    def on_epoch_end(self, gan: GAN) -> None:
        every = gan.config.save_every
        if every and not gan.position and gan.epoch % every == 0:
            with or_warn(f"the grid of epoch {gan.epoch}"):
                gan.generate_images(gan.epoch)


def run_mark(gan: Trainer) -> str:
    """Return what tells runs apart: how long each epoch has taken, to the last digit."""
    return "".join(f"{seconds!r}\n" for seconds in gan.history["seconds"])


def frames_folder(gan: Trainer) -> Path:
    """Return the folder of this run's frames: gan.folder / "frames", or frames-2, … where that holds another run's.

    A run that continues from a checkpoint older than the newest frame is another run.
    """
    for name in itertools.chain(["frames"], map("frames-{}".format, itertools.count(2))):
        mark = gan.folder / name / ".run"
        own = mark.is_file() and run_mark(gan).startswith(mark.read_text(errors="replace"))
        if own or not any(mark.parent.glob("*.png")):
            break
    return mark.parent


def save_frame(gan: Trainer, figure: Figure, epoch: int) -> Path:
    """Save a figure as the run's frame of an epoch, and return its path; raises OSError that says what to do."""
    path = save_picture(figure, frames_folder(gan) / f"epoch_{epoch:03d}.png")
    (path.parent / ".run").write_text(run_mark(gan))
    return path


# ------------------------------------------------------------------------------------------ trackers
TrackerLog = tuple[Callable[[int, dict[str, float], np.ndarray, str], None], Callable[[], None]]  # write, close


class Tracker(Callback):
    """Write Config, every reading, health and samples of each epoch to "wandb" or "tensorboard"; `Config.tracker`.

    wandb goes online with a key (WANDB_API_KEY, an earlier login, or Kaggle's secret of that name), else offline into
    out_dir; TensorBoard's log lies in out_dir/recipe/tensorboard. A log that fails costs a warning, never the training.
    Raises ImportError that says what to install.
    """

    def __init__(self, kind: str) -> None:
        if kind not in TRACKERS:
            raise ValueError(f"tracker = {kind!r} is not one of {', '.join(TRACKERS)}")
        spec = importlib.util.find_spec(kind)
        if spec is None or spec.origin is None:  # a mere folder of that name, as wandb leaves one, is no package
            raise ImportError(f"tracker = {kind!r} needs a package: pip install {kind}")
        self.kind, self.log = kind, None

    def on_train_begin(self, gan: GAN) -> None:
        self.log = or_untracked(f"{self.kind} could not be opened", TRACKERS[self.kind], gan)

    def on_epoch_end(self, gan: GAN) -> None:
        """Write the epoch's line; `health` is 0 for green, 1 for yellow, 2 for red."""
        if self.log:
            panel, grid = gan.diagnose(), make_grid(gan.fixed_samples(), normalize=True, value_range=(-1, 1))
            line = gan.history.last() | {"health": list(ICONS).index(panel.status)}
            values = gan.step, line, grid.mul(255).byte().permute(1, 2, 0).numpy(), panel_text(panel, color=False)
            or_untracked(f"{self.kind} did not take epoch {line['epoch']:.4g}", self.log[0], *values)

    def on_train_end(self, gan: GAN) -> None:
        if self.log:
            or_untracked(f"{self.kind} could not be closed", self.log[1])


def or_untracked(what: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an action of a tracker returns; whatever fails becomes a warning, and None."""
    try:
        return action(*arguments)
    except Exception as error:
        warnings.warn(f"{what} ({type(error).__name__}: {error}); training goes on", stacklevel=3)


def open_tensorboard(gan: GAN) -> TrackerLog:
    """Open a TensorBoard log."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(gan.folder / "tensorboard")
    writer.add_text("config", f"```\n{json.dumps(vars(gan.config), indent=1)}\n```", gan.step)

    def write(step: int, line: dict[str, float], grid: np.ndarray, panel: str) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, step)
        writer.add_image("samples", grid, step, dataformats="HWC")
        writer.add_text("panel", f"```\n{panel}\n```", step)
        writer.flush()

    return write, writer.close


def open_wandb(gan: GAN) -> TrackerLog:
    """Open a wandb run, offline where it cannot go online."""
    import wandb

    prepare_file(gan.folder / "wandb")
    secret, has_key = wandb_key()
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    options = {"project": "dcgan", "dir": str(gan.folder), "config": {"recipe": gan.recipe, **vars(gan.config)}}
    settings = wandb.Settings(api_key=secret, init_timeout=30)
    failed = f"wandb could not start {mode} and writes offline into {gan.folder}"
    run = or_untracked(failed, lambda: wandb.init(mode=mode, settings=settings, **options))
    run = run or wandb.init(mode="offline", **options)

    def write(step: int, line: dict[str, float], grid: np.ndarray, panel: str) -> None:
        pictures = {"samples": wandb.Image(grid), "panel": wandb.Html(f"<pre>{html.escape(panel)}</pre>")}
        run.log({**line, **pictures}, step=step)

    return write, run.finish


TRACKERS = {"wandb": open_wandb, "tensorboard": open_tensorboard}


def wandb_key() -> tuple[str | None, bool]:
    """Return Kaggle's secret, and whether wandb will have a key without asking: this, the environment's, a login's."""
    if os.environ.get("WANDB_API_KEY"):
        return None, True
    with suppress(Exception):  # a fork has no secret, and what is raised then differs between releases
        if kaggle_run():
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret("WANDB_API_KEY"), True
    with suppress(OSError, RuntimeError):  # a file that cannot be read; no home
        login = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return None, "api.wandb.ai" in login.read_text(errors="replace")
    return None, False
