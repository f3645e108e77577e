"""Pictures and the latent space: figures that are returned and closed, GIFs, arcs, neighbours."""

import errno
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny import make

import dcgan_utils as du
from dcgan_utils import Config


@pytest.fixture(autouse=True)
def nothing_is_shown_and_nothing_stays_open(monkeypatch):
    """Hold every test here to it: no plt.show, and pyplot keeps no figure."""
    shown = []
    monkeypatch.setattr(plt, "show", lambda *arguments, **options: shown.append(1))
    monkeypatch.setattr(Figure, "show", lambda *arguments, **options: shown.append(1))
    assert plt.get_fignums() == []
    yield
    assert not shown
    assert plt.get_fignums() == []


def history(epochs: int = 3) -> du.History:
    """Return a history with a few epochs and batches, all values different."""
    record = du.History(Config(real_label_smooth=0.9, fake_label_smooth=0.0))
    for k, name in enumerate((*du.METRICS, *du.EPOCH_READINGS)):
        record[name] += [0.3 + 0.05 * k + 0.01 * epoch for epoch in range(epochs)]
    record["epoch"] += list(range(1, epochs + 1))
    for name in record.batches:
        record.batches[name] += [0.1 * batch for batch in range(2 * epochs)]
    return record


def pixels(figure: Figure) -> np.ndarray:
    """Return the grid that a figure's first axes show, as drawn."""
    return np.asarray(figure.axes[0].images[0].get_array())


# ----------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize(("n", "columns", "rows"), [(36, 6, 6), (10, 8, 2), (3, 3, 1), (9, 4, 3), (1, 1, 1)])
@pytest.mark.parametrize("side", [28, 64])
def test_a_grid_has_a_place_for_every_image(n, columns, rows, side):
    images = torch.linspace(-1, 1, n)[:, None, None, None].expand(n, 1, side, side)
    figure = du.plot_images(images, "some title", columns=columns)
    assert isinstance(figure, Figure)
    grid = pixels(figure)
    frame = 2 if n > 1 else 0  # torchvision leaves a single image without a frame
    step = side + frame
    assert grid.shape == (rows * step + frame, columns * step + frame, 3)
    for k in range(n):
        top, left = k // columns * step + frame, k % columns * step + frame
        expected = (images[k, 0, 0, 0].item() + 1) / 2
        assert np.allclose(grid[top : top + side, left : left + side], expected, atol=1e-5)
    assert figure.axes[0].get_title() == "some title"
    assert not figure.axes[0].axison


def test_grey_values_do_not_depend_on_the_batch():
    """-1 is black and 1 is white whatever else is in the grid."""
    figure = du.plot_images(torch.zeros(2, 1, 4, 4), columns=2)
    assert np.allclose(pixels(figure)[2:6, 2:6], 0.5)
    figure = du.plot_images(torch.full((2, 1, 4, 4), 3.0), columns=2)  # outside [-1, 1] is cut off
    assert np.allclose(pixels(figure)[2:6, 2:6], 1)


def test_a_grid_goes_into_the_axes_it_is_given():
    figure, axes = du._subplots(1, 2, figsize=(4, 2))
    assert du.plot_images(torch.zeros(4, 1, 4, 4), "left", ax=axes[0]) is figure
    assert len(figure.axes) == 2
    assert axes[0].get_title() == "left"
    assert not axes[1].images


def test_plotting_leaves_the_images_alone():
    images = torch.rand(4, 1, 5, 5) * 2 - 1
    before = images.clone()
    du.plot_images(images)
    assert torch.equal(images, before)


def test_real_beside_generated():
    real, fake = torch.full((32, 1, 28, 28), 1.0), torch.full((32, 1, 28, 28), -1.0)
    figure = du.plot_real_vs_fake(real, fake, "epoch 3")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("real", "generated")
    assert figure.get_suptitle() == "epoch 3"
    for axes, value in ((left, 1), (right, 0)):
        grid = np.asarray(axes.images[0].get_array())
        assert grid.shape == (4 * 30 + 2, 8 * 30 + 2, 3)
        assert np.allclose(grid[2:30, 2:30], value)
    assert left.get_position().x1 <= right.get_position().x0


# ----------------------------------------------------------------------------------------------- history
def test_the_history_figure_draws_what_the_history_holds():
    record = history()
    figure = du.plot_history(record)
    assert isinstance(figure, Figure)
    losses, answers, diversity = figure.axes
    for axes, names in (
        (losses, ["loss_D", "loss_G"]),
        (answers, ["D_x", "D_G_z", "D_acc"]),
        (diversity, ["diversity"]),
    ):
        drawn = [list(line.get_ydata()) for line in axes.lines if list(line.get_xdata()) == record["epoch"]]
        assert drawn == [record[name] for name in names]
        assert axes.get_xlabel() == "epoch"
        assert axes.get_title()
    assert [record.batches["loss_D"], record.batches["loss_G"]] == [
        list(line.get_ydata()) for line in losses.lines if list(line.get_xdata()) == record.batches["epoch"]
    ]


def test_the_history_figure_shows_the_distance_where_a_judge_scored():
    record = history(4)
    assert len(du.plot_history(record).axes) == 3
    record["fid"] = [None, None, None, None]  # asked for, never had
    assert len(du.plot_history(record).axes) == 3
    record["fid"] = [90.0, None, 20.0, 11.0]  # one epoch was not judged
    figure = du.plot_history(record)
    distance = figure.axes[3]
    (line,) = distance.lines
    assert list(line.get_xdata()) == record["epoch"]
    drawn = line.get_ydata()
    assert math.isnan(drawn[1])
    assert [drawn[0], drawn[2], drawn[3]] == [90, 20, 11]
    assert distance.get_yscale() == "log"
    assert "Fréchet" in distance.get_title()
    assert distance.get_xlabel() == "epoch"


def test_the_history_figure_of_an_older_run_without_the_newer_readings():
    record = history().to_json()
    for part in ("epochs", "batches"):
        record[part] = {k: v for k, v in record[part].items() if k not in (*du.METRICS[5:], "spacing", "swing")}
    assert len(du.plot_history(du.History.from_json(record)).axes) == 3


def test_the_history_figure_draws_theorys_lines():
    losses, answers, diversity = du.plot_history(history()).axes

    def levels(axes):
        return sorted(line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1)

    assert levels(losses) == pytest.approx([0.3251, 0.7985, 1.3763], abs=1e-4)  # D's floor, G and D at equilibrium
    assert levels(answers) == pytest.approx([0.45])
    assert levels(diversity) == [1]
    shown = " ".join(text.get_text() for text in losses.get_legend().get_texts())
    assert "0.33" in shown
    assert "1.38" in shown
    assert "0.45" in " ".join(text.get_text() for text in answers.get_legend().get_texts())


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_history_figure_of_hardly_any_history(epochs):
    figure = du.plot_history(history(epochs))
    assert len(figure.axes) == 3
    figure.canvas.draw()


def test_the_history_figure_shows_a_diversity_above_its_usual_range():
    record = history()
    record["diversity"][1] = 2.5
    low, high = du.plot_history(record).axes[2].get_ylim()
    assert low == 0
    assert high >= 2.5


# ----------------------------------------------------------------------------------------------- animation
def frame(level: float) -> Figure:
    figure = du.plot_images(torch.full((4, 1, 8, 8), level), columns=2)
    figure.set_size_inches(1, 1)
    return figure


def read_gif(path) -> list[tuple[int, float]]:
    """Return duration in milliseconds and mean grey of every frame."""
    frames = []
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.info["loop"] == 0  # for ever
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append((gif.info["duration"], float(np.asarray(gif.convert("L"), dtype=float).mean())))
    return frames


def test_animation_of_figures(tmp_path):
    path = du.make_animation(
        [frame(level) for level in (-1.0, 0.5, -0.5, 1.0)], tmp_path / "new" / "a.gif", 0.25, hold=1.5
    )
    assert path == tmp_path / "new" / "a.gif"
    durations, greys = zip(*read_gif(path), strict=True)
    assert durations == (250, 250, 250, 1500)
    assert sorted(range(4), key=greys.__getitem__) == [0, 2, 1, 3]  # in the order given


def test_animation_of_a_folder_in_the_order_of_the_names(tmp_path):
    for number, level in ((10, 1.0), (1, -1.0), (2, 0.0)):
        du.save_picture(frame(level), tmp_path / f"epoch_{number:03d}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    path = du.make_animation(tmp_path, tmp_path / "a.gif")
    durations, greys = zip(*read_gif(path), strict=True)
    assert durations == (400, 400, 2000)
    assert greys[0] < greys[1] < greys[2]


@pytest.mark.parametrize("levels", [[0.0], [0.0, 0.0, 0.0], [-1.0, -1.0, 1.0]])
def test_animation_of_one_frame_or_of_equal_ones_lasts_as_long(tmp_path, levels):
    path = du.make_animation([frame(level) for level in levels], tmp_path / "a.gif", seconds=0.5, hold=2)
    with Image.open(path) as gif:
        shown = sum(gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames))
    assert shown == 500 * (len(levels) - 1) + 2000


@pytest.mark.parametrize("make", ["empty folder", "no folder", "empty list"])
def test_animation_of_nothing(tmp_path, make):
    folder = tmp_path / "frames"
    if make == "empty folder":
        folder.mkdir()
    frames = [] if make == "empty list" else folder
    with pytest.raises(FileNotFoundError, match="no " if make == "empty list" else "frames.*save_every"):
        du.make_animation(frames, tmp_path / "a.gif")
    assert not (tmp_path / "a.gif").exists()


# ----------------------------------------------------------------------------------------------- saved pictures
@pytest.fixture
def gan(tmp_path):
    return du.FastDCGAN(ngf=2, ndf=2, device="cpu", out_dir=str(tmp_path / "out"))


@pytest.mark.parametrize("n", [36, 10])
def test_generate_images_returns_and_saves_a_grid(gan, tmp_path, n):
    figure = gan.generate_images(epoch="FINAL", n=n)
    side = math.ceil(math.sqrt(n))
    rows = math.ceil(n / side)
    grid = pixels(figure)
    assert grid.shape == (rows * 30 + 2, side * 30 + 2, 3)
    expected = (gan.fixed_samples(n)[0, 0].numpy() + 1) / 2
    assert np.allclose(grid[2:30, 2:30, 0], expected, atol=1e-5)
    assert "FINAL" in figure.axes[0].get_title()
    assert "FastDCGAN" in figure.axes[0].get_title()
    (saved,) = (tmp_path / "out").rglob("*FINAL*.png")
    with Image.open(saved) as picture:
        assert picture.size == tuple(figure.canvas.get_width_height())
        assert np.asarray(picture.convert("L")).std() > 1  # something is drawn


def test_saved_epochs_become_an_animation(gan, tmp_path):
    for epoch in (1, 2, 10):
        torch.nn.init.constant_(gan.average.layers[-3].bias, 0.1 * epoch)
        gan.generate_images(epoch)
    names = [path.name for path in sorted((tmp_path / "out").rglob("epoch_*.png"))]
    assert names == ["epoch_001.png", "epoch_002.png", "epoch_010.png"]
    folder = next((tmp_path / "out").rglob("epoch_001.png")).parent
    frames = read_gif(du.make_animation(folder, tmp_path / "a.gif"))
    assert len(frames) == 3
    assert frames[0][1] < frames[1][1] < frames[2][1]


def test_plot_history_of_a_gan_takes_its_own_or_another_history(gan):
    assert len(gan.plot_history().axes) == 3
    other = history()
    drawn = [list(line.get_ydata()) for line in gan.plot_history(other).axes[0].lines]
    assert other["loss_D"] in drawn


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "b" / "a.png"):
        with pytest.raises(OSError, match="cannot write into") as caught:
            du.prepare_file(path)
        assert str(path.parent) in str(caught.value)
        assert "out_dir" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.png.*No space left on device.*free some space"):
        du.save_picture(frame(0.0), tmp_path / "a.png")


# ----------------------------------------------------------------------------------------------- the latent space
def test_slerp_walks_the_arc_at_an_even_pace():
    rng = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 100, generator=rng, dtype=torch.float64)
    end = end / end.norm() * start.norm()
    path = du.slerp(start, end, 9)
    assert path.shape == (9, 100)
    assert torch.allclose(path[0], start, atol=1e-6)
    assert torch.allclose(path[-1], end, atol=1e-6)
    assert torch.allclose(path.norm(dim=1), start.norm().expand(9), rtol=1e-5)  # it stays on the sphere
    cosines = (path[:-1] * path[1:]).sum(dim=1) / start.norm() ** 2
    whole = torch.arccos(start @ end / start.norm() ** 2)
    assert torch.allclose(torch.arccos(cosines), (whole / 8).expand(8), atol=1e-4)
    straight = start + torch.linspace(0, 1, 9)[:, None] * (end - start)
    assert straight.norm(dim=1).min() < 0.9 * start.norm()  # which a straight line does not


def test_slerp_of_a_quarter_circle():
    path = du.slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 3)
    assert torch.allclose(path, torch.tensor([[2, 0], [math.sqrt(2), math.sqrt(2)], [0, 2]]), atol=1e-6)


def test_slerp_keeps_ends_of_different_length():
    start, end = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    path = du.slerp(start, end, 5)
    assert torch.allclose(path[[0, -1]], torch.stack([start, end]), atol=1e-6)
    norms = path.norm(dim=1)
    assert (norms[1:] > norms[:-1]).all()


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, -0.5, 1 + 1e-6])
def test_slerp_of_parallel_vectors_is_the_line(factor):
    start = torch.randn(64, generator=torch.Generator().manual_seed(2))
    path = du.slerp(start, factor * start, 5)
    expected = start * torch.linspace(1, factor, 5)[:, None]
    assert path.isfinite().all()
    assert torch.allclose(path, expected, atol=1e-4)


def test_slerp_of_nearly_parallel_vectors_is_finite():
    start = torch.randn(64, generator=torch.Generator().manual_seed(3))
    for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        path = du.slerp(start, start + size * torch.randn(64, generator=torch.Generator().manual_seed(4)), 5)
        assert path.isfinite().all()
        assert torch.allclose(path.norm(dim=1), start.norm().expand(5), rtol=0.02)


# ----------------------------------------------------------------------------------------------- nearest neighbours
def brute_force(samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return all root-mean-square pixel distances (n, N) in float64, one difference at a time."""
    train = images.double() / 127.5 - 1
    return torch.stack([(train - sample[0].double()).square().mean(dim=(1, 2)).sqrt() for sample in samples])


@pytest.fixture(scope="module")
def many(mnist_test):
    """Return more images than are compared at once."""
    images = mnist_test[0]
    assert len(images) > 8192
    return images


PLANTED = [0, 1, 77, 8190, 8191, 8192, 8193, 9999, 5000, 3]


def test_planted_copies_are_found(many):
    index, distance = du.nearest_neighbours(du.normalise(many[PLANTED]), many)
    assert index.tolist() == PLANTED
    assert distance.shape == (len(PLANTED),)
    assert distance.tolist() == pytest.approx([0] * len(PLANTED), abs=1e-6)


def test_planted_copies_are_found_among_many_samples(many):
    """More than 25 samples make torch.cdist take a faster, coarser way."""
    picked = list(range(0, 10_000, 250))
    index, distance = du.nearest_neighbours(du.normalise(many[picked]), many)
    assert index.tolist() == picked
    assert distance.tolist() == pytest.approx([0] * len(picked), abs=1e-6)


def test_neighbours_are_those_of_a_brute_force_search(many):
    rng = torch.Generator().manual_seed(0)
    noisy = du.normalise(many[PLANTED[2:5]])
    noisy = noisy + 0.3 * torch.randn(noisy.shape, generator=rng)
    blends = du.normalise(many[:3]) * 0.55 + du.normalise(many[100:103]) * 0.45  # halfway, rounding would decide
    samples = torch.cat([noisy, blends])
    expected = brute_force(samples, many).min(dim=1)
    index, distance = du.nearest_neighbours(samples, many)
    assert torch.equal(index, expected.indices)
    assert distance.tolist() == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_distances_are_root_mean_square_pixels():
    black, white = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 255, dtype=torch.uint8)
    index, distance = du.nearest_neighbours(torch.zeros(1, 1, 4, 4), torch.cat([black, white, white]))
    assert distance.item() == pytest.approx(1)  # grey is as far from black as from white
    index, distance = du.nearest_neighbours(torch.full((1, 1, 4, 4), -1.0), torch.cat([white, black]))
    assert (index.item(), distance.item()) == (1, pytest.approx(0, abs=1e-6))
    _, distance = du.nearest_neighbours(torch.full((1, 1, 4, 4), -1.0), white)
    assert distance.item() == pytest.approx(2)


def test_images_of_two_channels_are_drawn_grey():
    figure = du.plot_images(torch.stack([torch.ones(4, 8, 8), -torch.ones(4, 8, 8)], dim=1), columns=4)
    (picture,) = figure.axes[0].get_images()
    assert np.allclose(picture.get_array()[3, 3], 0.5)


def test_frames_of_another_run_do_not_get_into_an_animation(mnist_small, tmp_path):
    data = mnist_small[0][:32], mnist_small[1][:32]
    for epochs in (3, 1):
        gan = make(out_dir=str(tmp_path), save_every=1, seed=epochs)
        gan.train(epochs, data=data, callbacks=[du.SaveGrids()])
    assert [frame.name for frame in (gan.folder / "frames").glob("*.png")] == ["epoch_001.png"]
