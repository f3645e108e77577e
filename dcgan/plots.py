"""Figures, PNG files and GIFs; a figure is returned and never shown, and pyplot stays as the user has it."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .config import kaggle_run, prepare_file, profile
from .history import History
from .losses import Loss

COLORS = {"D": "#0072B2", "G": "#D55E00", "theory": "#555555", "third": "#009E73"}  # distinct for color-blind readers


class Picture(Figure):
    """Show a matplotlib figure in notebooks, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        return figure_png(self)


def row_of_axes(columns: int, figsize: tuple[float, float]) -> tuple[Picture, list[Axes]]:
    """Return a figure with axes side by side; pyplot does not know it, so none piles up in memory."""
    figure = Picture(figsize=figsize, dpi=80, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plot_images(images: Tensor, title: str = "", columns: int = 8, ax: Axes | None = None) -> Figure:
    """Draw images (n, C, H, W) in [-1, 1] as one grid and return the figure.

    ax: draw there. Images of 1 or 3 channels are gray or color; of others the mean of the channels is drawn.
    """
    if ax is None:
        _, (ax,) = row_of_axes(1, (columns * 0.62, 0.62 * math.ceil(len(images) / columns) + 0.35))
    images = images if images.shape[1] in (1, 3) else images.mean(dim=1, keepdim=True)
    grid = make_grid(images, nrow=columns, padding=2, normalize=True, value_range=(-1, 1), pad_value=0.35)
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=10)
    return ax.figure


def plot_real_vs_fake(real: Tensor, fake: Tensor, title: str = "") -> Figure:
    """Draw real images beside generated ones, both (n, C, H, W) in [-1, 1]."""
    figure, axes = row_of_axes(2, (9.6, 2.9))
    plot_images(real, "real", ax=axes[0])
    plot_images(fake, "generated", ax=axes[1])
    figure.suptitle(title, fontsize=11)
    return figure


# ------------------------------------------------------------------------------------------ curves
def output_curves(loss: Loss) -> dict[str, tuple[str, str]]:
    """Return which values of a history show D's outputs under a loss: name -> (label, key of COLORS)."""
    if loss.estimates_distance:
        return {"D_gap": ("Wasserstein estimate", "D"), "gradient_norm": ("gradient norm", "G")}
    real, fake = ("D(x)", "D(G(z))") if loss.gives_probability else ("D output, real", "D output, fake")
    return {"D_x": (real, "D"), "D_G_z": (fake, "G"), "D_acc": ("D accuracy", "third")}


def plot_history(history: History) -> Figure:
    """Draw losses, D's outputs, the pixel std ratio and, where it was measured, the Fréchet distance over the epochs.

    Dashed and dotted lines: what theory says for this loss and its labels, where it gives probabilities.
    """
    measured = any(value is not None for value in history.get("frechet", []))
    figure, axes = row_of_axes(3 + measured, (12 + 3 * measured, 3.4))
    draw_curves(axes[0], history, {"loss_D": ("D", "D"), "loss_G": ("G", "G")})
    axes[0].set_title("losses")
    draw_curves(axes[1], history, output_curves(history.loss))
    axes[1].set_title("D's outputs")
    draw_theory(axes[0], axes[1], history.loss)
    draw_curves(axes[2], history, {"pixel_std_ratio": ("samples", "third")})
    axes[2].axhline(1, color=COLORS["theory"], ls="--", lw=1, label="real images")
    ratios = [value for value in history["pixel_std_ratio"] if value is not None and math.isfinite(value)]
    axes[2].set(title="pixel std, generated / real", ylim=(0, max([1.3, *ratios])))
    if measured:
        draw_curves(axes[3], history, {"frechet": ("samples", "third")})
        axes[3].set(title="Fréchet distance (lower is better)", yscale="log")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.legend(fontsize=7)
    return figure


def draw_theory(losses: Axes, outputs: Axes, loss: Loss) -> None:
    """Draw what theory says of the losses and of D's outputs, for losses where it says something."""
    if loss.estimates_distance:
        outputs.axhline(1, color=COLORS["G"], ls="--", lw=1, label="gradient norm that the penalty aims at")
    if not loss.gives_probability or loss.equilibrium is None:
        return
    m, loss_D, loss_G, floor = loss.equilibrium
    losses.axhline(loss_D, color=COLORS["theory"], ls="--", lw=1, label=f"D at equilibrium {loss_D:.2f}")
    losses.axhline(floor, color=COLORS["theory"], ls=":", lw=1, label=f"D separates perfectly {floor:.2f}")
    losses.axhline(loss_G, color=COLORS["G"], ls="--", lw=1, label=f"G at equilibrium {loss_G:.2f}")
    outputs.axhline(m, color=COLORS["theory"], ls="--", lw=1, label=f"equilibrium {m:g}")
    outputs.set_ylim(0, 1)


def draw_curves(ax: Axes, history: History, curves: Mapping[str, tuple[str, str]]) -> None:
    """Draw values of a history, name -> (label, key of COLORS): dots for epochs, a pale line for batches."""
    for name, (label, color) in curves.items():
        values = np.array(history[name], dtype=float)  # None becomes NaN, which is not drawn
        ax.plot(history["epoch"], values, "o-", color=COLORS[color], label=label, ms=3)
        if name in history.batches:
            batches = np.array(history.batches[name], dtype=float)
            ax.plot(history.batches["epoch"], batches, color=COLORS[color], alpha=0.35, lw=1)


# ------------------------------------------------------------------------------------------ files and screens
def figure_png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_picture(figure: Figure, path: str | Path) -> Path:
    """Save a figure as PNG and return its path; raises OSError that says what to do."""
    path = prepare_file(path)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); free some space or choose another out_dir") from error
    return path


def make_animation(
    frames: str | Path | Sequence[Any], path: str | Path, seconds: float = 0.4, hold: float = 2.0
) -> Path:
    """Write a looping GIF and return its path.

    frames: a folder of PNG files in the order of their names, or a list of such files or Figures. seconds: per frame;
    hold: of the last one. Raises FileNotFoundError when there is no frame.
    """
    where: Any = "the list"
    if isinstance(frames, (str, Path)):
        where, frames = frames, sorted(Path(frames).glob("*.png"))
    pictures = [read_frame(frame) for frame in frames]
    if not pictures:
        raise FileNotFoundError(f"no PNG files or figures in {where}; train with save_every=1 first")
    path = prepare_file(path)
    durations = [int(1000 * seconds)] * (len(pictures) - 1) + [int(1000 * hold)]
    small = [p.quantize(32, dither=Image.Dither.NONE) for p in pictures]  # dithering would double the size
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    return path


def read_frame(frame: Figure | str | Path) -> Image.Image:
    """Return the pixels of a PNG file or of a Figure."""
    with Image.open(io.BytesIO(figure_png(frame)) if isinstance(frame, Figure) else frame) as picture:
        return picture.convert("RGB")


def gif_html(path: str | Path) -> str:
    """Return a GIF file as an HTML image, for pages whose nbconvert leaves out image/gif, as Kaggle's 6.4.5 does."""
    return f'<img src="data:image/gif;base64,{base64.b64encode(Path(path).read_bytes()).decode()}">'


def in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this, so that HTML and figures can be displayed."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


def is_terminal() -> bool:
    """Return whether what is printed goes to a terminal."""
    with suppress(ValueError, AttributeError):  # a closed stream, none at all
        return sys.stdout.isatty()
    return False


def is_watched() -> bool:
    """Return whether a person sees the output as it appears: in a terminal, or in a notebook that a person runs.

    nbclient, nbval, nbconvert and papermill run cells without the input box that a person's front end offers.
    """
    if profile() == "smoke" or kaggle_run() == "Batch":
        return False
    if in_notebook():
        return getattr(sys.modules["IPython"].get_ipython().kernel, "_allow_stdin", True)
    return is_terminal()
