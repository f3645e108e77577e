"""Figures that leave pyplot alone and show themselves in notebooks, curves of every loss, GIFs, files."""

import errno
import math
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image
from tiny import make

import dcgan_utils as du
from dcgan_utils import Config


@pytest.fixture(autouse=True)
def pyplot_stays_as_it_is():
    """Hold every test here to it: no figure in pyplot's list, the same backend, the same settings."""
    before = plt.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)
    yield
    assert (plt.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)) == before


def history(epochs: int = 3, loss="bce") -> du.History:
    """Return a history with a few epochs and batches, all values different; loss: as in Config, or a class."""
    named = isinstance(loss, str)
    config = Config(real_label_smooth=0.9, fake_label_smooth=0.0, loss=loss if named else "bce")
    record = du.History(config, loss=du.make_loss(config, None if named else loss))
    for k, name in enumerate((*du.METRICS, *du.EPOCH_READINGS, "epoch")):
        record[name] += [0.3 + 0.05 * k + 0.01 * epoch for epoch in range(epochs)]
    record["epoch"] = list(range(1, epochs + 1))
    for k, name in enumerate(record.batches):
        record.batches[name] += [0.1 * batch + k for batch in range(2 * epochs)]
    return record


def pixels(figure: Figure, axes: int = 0) -> np.ndarray:
    """Return the grid that a figure's axes show, as drawn."""
    return np.asarray(figure.axes[axes].images[0].get_array())


def legend(axes) -> dict[str, list[float]]:
    """Return what the lines of a picture are called, and their values."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


# ----------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize(("n", "columns", "side"), [(36, 6, 28), (10, 8, 28), (3, 3, 64), (9, 4, 28), (1, 1, 28)])
def test_a_grid_has_a_place_for_every_image(n, columns, side):
    images = torch.linspace(-1, 1, n)[:, None, None, None].expand(n, 1, side, side)
    figure = du.plot_images(images, "some title", columns=columns)
    frame = 2 if n > 1 else 0  # torchvision leaves a single image without a frame
    step, grid = side + frame, pixels(figure)
    assert grid.shape == (math.ceil(n / columns) * step + frame, columns * step + frame, 3)
    for k in range(n):
        top, left = k // columns * step + frame, k % columns * step + frame
        assert np.allclose(grid[top : top + side, left : left + side], (images[k, 0, 0, 0] + 1) / 2, atol=1e-5)
    assert figure.axes[0].get_title() == "some title"


@pytest.mark.parametrize(
    ("value", "channels", "shown"),
    [([0.0], 1, 0.5), ([3.0], 1, 1), ([-3.0], 1, 0), ([1.0, -1.0], 2, 0.5), ([1.0, 0.0, -1.0], 3, [1, 0.5, 0])],
)
def test_gray_values_depend_on_nothing_else_and_other_channels_are_averaged(value, channels, shown):
    images = torch.tensor(value).view(1, channels, 1, 1).expand(2, channels, 4, 4)
    before = images.clone()
    assert np.allclose(pixels(du.plot_images(images, columns=2))[2:6, 2:6], shown)
    assert torch.equal(images, before)


def test_real_beside_generated():
    figure = du.plot_real_vs_fake(torch.ones(32, 1, 28, 28), -torch.ones(32, 1, 28, 28), "epoch 3")
    left, right = figure.axes
    assert (left.get_title(), right.get_title(), figure.get_suptitle()) == ("real", "generated", "epoch 3")
    assert [pixels(figure, k)[2:30, 2:30].mean() for k in (0, 1)] == [1, 0]
    assert left.get_position().x1 <= right.get_position().x0


# ----------------------------------------------------------------------------------------------- history
PROBABILITIES, OUTPUTS = {"D(x)": "D_x", "D(G(z))": "D_G_z"}, {"D output, real": "D_x", "D output, fake": "D_G_z"}
CRITIC = {"Wasserstein estimate": "D_gap", "gradient norm": "gradient_norm"}
LOSSES = [  # Config.loss or a class: curves, levels of the lines in the losses, in D's outputs
    ("bce", PROBABILITIES, [0.3251, 0.7985, 1.3763], [0.45]),
    ("relativistic", PROBABILITIES, [0, math.log(2), math.log(2)], [0.5]),
    ("hinge", OUTPUTS, [], []),
    ("least_squares", OUTPUTS, [], []),
    (du.Loss, OUTPUTS, [], []),  # a loss of one's own that says nothing about itself
    ("wasserstein", CRITIC, [], [1]),
]


@pytest.mark.parametrize(("loss", "curves", "losses", "outputs"), LOSSES)
def test_the_history_figure_draws_what_the_loss_gives_meaning_to(loss, curves, losses, outputs):
    record = history(loss=loss)
    figure = du.plot_history(record)
    for axes, names, levels in (
        (figure.axes[0], {"D": "loss_D", "G": "loss_G"}, losses),
        (figure.axes[1], curves, outputs),
        (figure.axes[2], {"samples": "pixel_std_ratio"}, [1]),
    ):
        shown = legend(axes)
        assert {label: shown.get(label) for label in names} == {label: record[name] for label, name in names.items()}
        assert sorted(v[0] for v in shown.values() if len(set(v)) == 1) == pytest.approx(levels, abs=1e-4)
        batches = [list(line.get_ydata()) for line in axes.lines if list(line.get_xdata()) == record.batches["epoch"]]
        assert all(record.batches[name] in batches for name in names.values() if name in record.batches)
        assert (axes.get_xlabel(), bool(axes.get_title())) == ("epoch", True)


def test_the_history_figure_shows_the_frechet_distance_where_it_was_measured():
    record = history(4)
    record["frechet"] = [None] * 4  # asked for, never had
    assert len(du.plot_history(record).axes) == 3
    record["frechet"] = [90.0, None, 20.0, 11.0]
    record["pixel_std_ratio"][1] = 2.5
    _, _, ratio, axes = du.plot_history(record).axes
    assert ratio.get_ylim()[1] >= 2.5
    drawn = legend(axes)["samples"]
    assert math.isnan(drawn[1])
    assert [drawn[0], *drawn[2:]] == [90, 20, 11]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_the_history_figure_of_hardly_any_history_or_of_an_older_one(epochs):
    record = history(epochs).to_json()
    for part in ("epochs", "batches"):
        record[part] = {k: v for k, v in record[part].items() if k not in (*du.METRICS[5:], "pixel_std_ratio")}
    for each in (history(epochs), du.History.from_json(record)):
        du.figure_png(du.plot_history(each))


# ----------------------------------------------------------------------------------------------- animation
def frame(level: float) -> Figure:
    figure = du.plot_images(torch.full((4, 1, 8, 8), level), columns=2)
    figure.set_size_inches(1, 1)
    return figure


def read_gif(path) -> list[tuple[int, float]]:
    """Return duration in milliseconds and mean gray of every frame."""
    frames = []
    with Image.open(path) as gif:
        assert (gif.format, gif.info["loop"]) == ("GIF", 0)
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append((gif.info["duration"], float(np.asarray(gif.convert("L"), dtype=float).mean())))
    return frames


def test_animation_of_figures_in_their_order_and_of_a_folder_in_the_order_of_names(tmp_path):
    path = du.make_animation([frame(x) for x in (-1.0, 0.5, -0.5, 1.0)], tmp_path / "new" / "a.gif", 0.25, hold=1.5)
    durations, grays = zip(*read_gif(path), strict=True)
    assert (path, durations) == (tmp_path / "new" / "a.gif", (250, 250, 250, 1500))
    assert sorted(range(4), key=grays.__getitem__) == [0, 2, 1, 3]
    for number, level in ((10, 1.0), (1, -1.0), (2, 0.0)):
        du.save_picture(frame(level), tmp_path / f"epoch_{number:03d}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    durations, grays = zip(*read_gif(du.make_animation(tmp_path, tmp_path / "b.gif")), strict=True)
    assert durations == (400, 400, 2000)
    assert list(grays) == sorted(grays)
    assert du.gif_html(path).startswith('<img src="data:image/gif;base64,R0lGOD')


@pytest.mark.parametrize("levels", [[0.0], [0.0, 0.0, 0.0], [-1.0, -1.0, 1.0]])
def test_animation_of_one_frame_or_of_equal_ones_lasts_as_long(tmp_path, levels):
    path = du.make_animation([frame(level) for level in levels], tmp_path / "a.gif", seconds=0.5, hold=2)
    assert sum(duration for duration, _ in read_gif(path)) == 500 * (len(levels) - 1) + 2000


def test_animation_of_nothing(tmp_path):
    for frames in (tmp_path, tmp_path / "frames", []):
        with pytest.raises(FileNotFoundError, match="save_every"):
            du.make_animation(frames, tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- files and screens
def test_generate_images_returns_and_saves_a_grid(tmp_path):
    gan = make(out_dir=str(tmp_path))
    figure = gan.generate_images(epoch="FINAL", n=10)
    assert pixels(figure).shape == (3 * 30 + 2, 4 * 30 + 2, 3)
    assert np.allclose(pixels(figure)[2:30, 2:30, 0], (gan.fixed_samples(10)[0, 0].numpy() + 1) / 2, atol=1e-5)
    with Image.open(*tmp_path.rglob("*FINAL*.png")) as picture:
        assert picture.size == tuple(figure.canvas.get_width_height())


def test_a_folder_that_cannot_be_made_and_a_full_disk_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write into .*file.*out_dir"):
        du.save_picture(frame(0.0), tmp_path / "file" / "a.png")
    full = {"side_effect": OSError(errno.ENOSPC, "No space left on device")}
    monkeypatch.setattr(Figure, "savefig", mock.Mock(**full))
    with pytest.raises(OSError, match=r"cannot write .*a\.png.*No space left on device.*free some space"):
        du.save_picture(frame(0.0), tmp_path / "a.png")


@pytest.mark.parametrize("before", ["", "import matplotlib.pyplot as plt\n"])
def test_a_figure_shows_itself_in_a_fresh_kernel(root, before):
    """Nobody has imported pyplot there, which teaches notebooks to show figures; or somebody has."""
    code = f"""{before}import sys, torch, dcgan_utils as du
print([name for name in ("matplotlib.pyplot", "ipywidgets", "wandb", "tensorboard") if name in sys.modules])
du.plot_images(torch.zeros(4, 1, 8, 8))"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(root)}}).execute()
    printed, shown = notebook.cells[0].outputs  # the figure once
    assert printed.text == ("['matplotlib.pyplot']\n" if before else "[]\n")
    assert shown.data["image/png"].startswith("iVBOR")
