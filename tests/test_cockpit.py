"""The cockpit driven without a browser, and the functions that it draws with."""

import asyncio
import gc
import math
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from tiny import BCE, make, same, weights

import dcgan.cockpit
import dcgan_utils as du


@pytest.fixture
def cockpit(mnist_small):
    """Return a cockpit of a tiny GAN, and leave no thread behind."""
    cockpit = du.Cockpit(make(), mnist_small)
    yield cockpit
    cockpit.pause(wait=True)


def until(condition, seconds=60):
    """Wait for a condition that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def run(cockpit, batches, alone=""):
    cockpit.play(batches, alone)
    cockpit.wait()
    assert cockpit.error is None


# ---------------------------------------------------------------------------------------------------- play and step
def test_play_trains_until_pause_and_leaves_no_thread(cockpit):
    before = set(threading.enumerate())
    cockpit.play()
    until(lambda: cockpit.gan.step >= 5)
    assert (cockpit.playing, cockpit.buttons["Play"].disabled, cockpit.buttons["Pause"].disabled) == (True, True, False)
    cockpit.play()  # starts no second thread
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon  # it does not outlive the program
    assert "pause first" in cockpit.status.value
    cockpit.pause(wait=True)
    assert not thread.is_alive()
    assert (cockpit.buttons["Play"].disabled, cockpit.buttons["Pause"].disabled) == (False, True)
    assert "paused" in cockpit.status.value


def test_a_paused_gan_goes_on_bit_for_bit_and_keeps_its_own_schedule(cockpit, mnist_small):
    before = cockpit.gan.config
    for batches in (3, 1, 7):
        run(cockpit, batches)
    assert cockpit.gan.config == before
    assert cockpit.gan.history.batches["step"][-1] == 11
    other = make(lr_schedule="constant")
    while other.step < 11:
        other.train(1, data=mnist_small, callbacks=[du.StopAt(11)])
    assert (cockpit.gan.step, cockpit.gan.position) == (other.step, other.position)
    assert same(cockpit.gan, other)
    cockpit.buttons["Reset"].click()
    assert same(cockpit.gan, make())
    assert (cockpit.gan.step, len(cockpit.snapshots), len(cockpit.gan.history["epoch"])) == (0, 1, 0)
    run(cockpit, 2)  # the data are still there


@pytest.mark.parametrize(
    ("alone", "moves", "rests"), [("D", "discriminator", "generator"), ("G", "generator", "discriminator")]
)
def test_a_step_of_one_player_leaves_the_other_one_alone(cockpit, alone, moves, rests):
    run(cockpit, 3)
    config = cockpit.gan.config
    before = {name: weights(getattr(cockpit.gan, name)) for name in (moves, rests, "average")}
    run(cockpit, 1, alone)
    assert torch.equal(weights(getattr(cockpit.gan, rests)), before[rests])
    assert not torch.equal(weights(getattr(cockpit.gan, moves)), before[moves])
    assert torch.equal(weights(cockpit.gan.average), before["average"]) == (alone == "D")
    assert (cockpit.gan.config, cockpit.gan.step) == (config, 4)


@pytest.mark.parametrize(("amount", "steps"), [(1, 1), (10, 10), (0, 512 // 16)])
@pytest.mark.parametrize("button", ["Step both", "Step D"])
def test_a_step_is_as_long_as_chosen(cockpit, button, amount, steps):
    cockpit.amount.value = amount
    cockpit.buttons[button].click()
    cockpit.wait()
    assert cockpit.gan.step == steps


def test_a_slow_pace_is_slow_and_pause_does_not_wait_for_it(cockpit):
    cockpit.pace.options = [*cockpit.pace.options, ("a batch a minute", 60.0)]
    cockpit.pace.value = 60.0
    start = time.monotonic()
    cockpit.play()
    until(lambda: cockpit.gan.step == 1)
    cockpit.pause(wait=True)
    assert cockpit.gan.step == 1
    assert time.monotonic() - start < 50


# ---------------------------------------------------------------------------------------------------- who may train
def test_one_gan_is_trained_by_one_thread_and_the_newest_cockpit_takes_over(cockpit, mnist_small):
    cockpit.play()
    until(lambda: cockpit.gan.step >= 1)
    newer = du.Cockpit(cockpit.gan, mnist_small)  # as when its cell is run again
    assert not cockpit.playing
    newer.play()
    until(lambda: newer.gan.step >= newer.snapshots[0][0].step + 1)
    cockpit.play(2)  # and back
    assert not newer.playing
    cockpit.wait()
    assert (cockpit.error, newer.error) == (None, None)


def test_a_gan_that_trains_elsewhere_is_left_alone(cockpit, mnist_small):
    inside, go, holds, config = threading.Event(), threading.Event(), du.Callback(), cockpit.gan.config
    holds.on_batch_end = lambda gan: inside.set() or go.wait(60)
    options = {"data": mnist_small, "callbacks": [holds, du.StopAt(1)]}
    elsewhere = threading.Thread(target=cockpit.gan.train, args=(1,), kwargs=options, daemon=True)
    elsewhere.start()
    assert inside.wait(60)
    cockpit.gan.reconfigure = lambda **changes: go.set()  # it must not be called: that changes the other run
    cockpit.play(3, "D")
    cockpit.wait()
    assert isinstance(cockpit.error, RuntimeError)
    cockpit.reset()
    assert (cockpit.gan.step, cockpit.gan.config, go.is_set()) == (1, config, False)
    del cockpit.gan.reconfigure
    go.set()
    elsewhere.join()
    run(cockpit, 2)
    assert cockpit.gan.step == 3
    assert "Reset" in cockpit.text  # the line would not reproduce it


def test_a_cockpit_that_nobody_holds_stops_training(mnist_small):
    gan, threads = make(), threading.active_count()
    cockpit = du.Cockpit(gan, mnist_small)
    cockpit.play()
    until(lambda: gan.step >= 1)
    del cockpit
    gc.collect()
    until(lambda: threading.active_count() == threads)
    assert not gan.is_training
    assert gan.config == make().config


# ---------------------------------------------------------------------------------------------------- steering
def test_a_setting_acts_from_the_next_batch_on_while_it_plays(cockpit, mnist_small):
    cockpit.play()
    until(lambda: cockpit.gan.step >= 2)
    for rate in (0.01, 0.003):
        step = cockpit.gan.step
        cockpit.controls["lr_D"].value = rate
        until(lambda rate=rate: cockpit.gan.optimizer_D.param_groups[0]["lr"] == rate)
        until(lambda step=step: cockpit.gan.step > step + 2)
    cockpit.pause(wait=True)
    assert [part.split()[1:] for part in cockpit.text.split(" | ")[1:-1]] == [["lr_D=0.01"], ["lr_D=0.003"]]
    assert same(cockpit.gan, du.GAN.replay(cockpit.text, mnist_small))


@pytest.mark.parametrize("fields", [{"lr_D": 1.23456e-4, "lr_G": 0.00098765}, {"n_critic": 37, "instance_noise": 7.3}])
def test_making_and_showing_it_changes_no_value(fields, mnist_small):
    gan = make(**fields, batch_size=2)
    before = gan.config
    cockpit = du.Cockpit(gan, mnist_small)
    bundle = cockpit._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == cockpit.box.model_id
    assert bundle["image/png"].startswith("iVBOR")
    assert gan.config == before
    assert all(control.value == getattr(before, name) for name, control in cockpit.controls.items())


def test_a_value_that_cannot_be_goes_back_and_says_why(mnist_small):
    cockpit = du.Cockpit(make(**BCE), mnist_small)
    cockpit.controls["fake_label_smooth"].value = 0.95
    assert (cockpit.controls["fake_label_smooth"].value, cockpit.gan.config.fake_label_smooth) == (0, 0)
    assert "fake_label_smooth" in cockpit.status.value
    with pytest.raises(ValueError, match="n_critic"):
        cockpit.change(n_critic=-1)


@pytest.mark.parametrize("loss", list(du.LOSSES))
def test_only_losses_with_labels_show_boxes_for_them(loss, mnist_small):
    cockpit = du.Cockpit(make(**{**BCE, "loss": loss}), mnist_small)
    hidden = [name for name, control in cockpit.controls.items() if control.layout.display == "none"]
    assert hidden == ([] if loss in ("bce", "least_squares") else ["real_label_smooth", "fake_label_smooth"])


@pytest.mark.parametrize("name", du.SCENARIOS)
def test_a_scenario_sets_everything_at_once_and_balanced_takes_it_back(cockpit, name):
    before = cockpit.gan.config
    cockpit.chosen.value = name
    changed = {n for n, v in vars(cockpit.gan.config).items() if v != getattr(before, n)}
    assert changed == set(du.SCENARIOS[name](before))
    assert all(control.value == getattr(cockpit.gan.config, n) for n, control in cockpit.controls.items())
    run(cockpit, 2)
    cockpit.scenario("balanced")
    assert cockpit.gan.config == before
    for kind in (du.DCGAN, du.StableDCGAN, du.FastDCGAN):  # it is valid for every recipe
        du.configure(kind.defaults, **du.SCENARIOS[name](kind.defaults))


# ---------------------------------------------------------------------------------------------------- looking
def test_the_slider_looks_back_and_follows_again(cockpit):
    for _ in range(3):
        run(cockpit, 2)
    assert cockpit.scrub.max == len(cockpit.snapshots) - 1 == 3
    newest = cockpit.picture.value
    cockpit.scrub.value = 1
    assert cockpit.picture.value == cockpit.snapshots[1][1] != newest
    assert "looking back at iteration 2" in cockpit.status.value
    run(cockpit, 2)
    assert cockpit.scrub.value == 1  # it does not jump away
    cockpit.scrub.value = cockpit.scrub.max
    run(cockpit, 2)
    status = cockpit.snapshots[-1][0].diagnosis.status
    assert du.WORDS[status] in cockpit.status.value  # words beside colors
    assert du.WORDS[status] in cockpit.panel.value
    assert cockpit.scrub.value == cockpit.scrub.max == 5
    assert cockpit.picture.value == cockpit.snapshots[-1][1]


def test_snapshots_are_of_the_same_noise_do_not_move_the_gan_and_get_fewer_in_a_long_run(cockpit, monkeypatch):
    before, (first, _) = weights(cockpit.gan.discriminator), cockpit.snapshots[0]
    second = du.take_snapshot(cockpit.gan)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(weights(cockpit.gan.discriminator), before)
    monkeypatch.setattr(dcgan.cockpit, "KEPT_SNAPSHOTS", 4)
    for _ in range(8):
        run(cockpit, 1)
    assert len(cockpit.snapshots) <= 5
    assert (cockpit.snapshots[0][0].step, cockpit.snapshots[-1][0].step) == (0, 8)


def test_the_picture_shows_scores_in_color_and_in_words():
    loss = du.make_loss(du.Config(real_label_smooth=0.9, fake_label_smooth=0.0))
    snapshot = du.Snapshot(0, torch.full((3, 1, 28, 28), -1.0), torch.tensor([0.0, 0.45, 0.9]), loss, {}, None)
    images = du.plot_snapshot(snapshot, du.History(du.Config())).axes[0]
    canvas = np.asarray(images.images[0].get_array())
    for k, color in enumerate([du.COLORS["G"], "#dddddd", du.COLORS["D"]]):  # a tile is 28 wide, the gap 4
        assert canvas[0, k * 32] == pytest.approx(to_rgb(color), abs=0.01)
    assert [t.get_text() for t in images.texts] == ["0.00", "0.45", "0.90"]


CHARTS = [  # loss: what D's outputs are called, theory's lines in the losses and in D's outputs
    ("relativistic", ["D(x)", "D(G(z))"], [math.log(2), 0, math.log(2)], [0.5]),
    ("bce", ["D(x)", "D(G(z))"], [1.3763, 0.8255, 0.7985], [0.45]),
    ("hinge", ["D output, real", "D output, fake"], [], []),
    ("wasserstein", ["Wasserstein estimate"], [], []),
]


@pytest.mark.parametrize(("loss", "names", "losses", "outputs"), CHARTS)
def test_theorys_lines_stand_where_the_loss_has_them(loss, names, losses, outputs, mnist_small):
    cockpit = du.Cockpit(make(**BCE | {"loss": loss}), mnist_small)
    cockpit.change(real_label_smooth=0.8, fake_label_smooth=0.1)
    run(cockpit, 20)
    snapshot = cockpit.snapshots[-1][0]
    run(cockpit, 20)
    figure = du.plot_snapshot(snapshot, cockpit.gan.history)  # without what came later
    for title, levels in (("losses", losses), ("D's outputs", outputs)):
        (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
        theory = [line for line in axes.lines if line.get_linestyle() != "-"]
        assert [line.get_ydata()[0] for line in theory] == pytest.approx(levels, abs=1e-4)
        curves = {line.get_label(): max(line.get_xdata()) for line in axes.lines if line not in theory}
        assert curves == dict.fromkeys(["D", "G"] if title == "losses" else names, 20)


def test_an_error_in_training_stands_in_the_panel_and_play_works_again(mnist_small):
    fault = du.Callback()
    fault.on_batch_end = lambda gan: gan.step == 2 and int("the <dog> ate it")
    cockpit = du.Cockpit(make(), mnist_small, callbacks=[fault])
    cockpit.play(5)
    cockpit.wait()
    assert isinstance(cockpit.error, ValueError)
    assert "the &lt;dog&gt; ate it" in cockpit.panel.value
    assert all(words in cockpit.status.value for words in ("stopped by an error", "🔴"))
    assert not cockpit.buttons["Play"].disabled
    fault.on_batch_end = lambda gan: None
    run(cockpit, 2)
    assert "dog" not in cockpit.panel.value


def test_widgets_change_on_the_kernels_thread(mnist_small):
    """With a running event loop, as in a kernel, the training thread leaves all widgets to it."""
    seen = set()

    async def cell():
        cockpit = du.Cockpit(make(), mnist_small)
        cockpit.picture.observe(lambda event: seen.add(threading.current_thread()), "value")
        cockpit.play(5)
        while cockpit.playing or cockpit.buttons["Play"].disabled:
            await asyncio.sleep(0.01)

    asyncio.run(cell())
    assert seen == {threading.main_thread()}


def test_the_line_reproduces_the_run_bit_for_bit(mnist_small):
    cockpit = du.Cockpit(make(seed=7, out_dir="some where"), mnist_small)
    run(cockpit, 6)
    run(cockpit, 2, "D")
    cockpit.change(lr_G=0.005, instance_noise=0.1, n_critic=3)
    run(cockpit, 9)  # 512 images, 48 an iteration: crosses the end of an epoch with images left over
    cockpit.change(n_critic=1, detach=False)
    run(cockpit, 4)
    again = du.GAN.replay(cockpit.text, mnist_small)
    assert (type(again), again.step) == (du.FastDCGAN, 21)
    assert same(cockpit.gan, again)
    assert torch.equal(weights(cockpit.gan.average), weights(again.average))


def test_the_line_is_short_and_holds_what_differs():
    config = du.configure(du.DCGAN.defaults, seed=3, out_dir="some where", detach=False)
    text = du.run_text(du.DCGAN, config, 60_000, [(10, {"lr_D": 1e-05}), (20, {"detach": True})], 30)
    assert text == "dcgan seed=3 detach=False images=60000 | 10 lr_D=1e-05 | 20 detach=True | 30"


REFUSED = {  # a line: what is said of it
    "fats images=512 | 1": "did you mean 'fast'", "fast images=512 lr_X=1 | 1": "lr_X", "fast | 1": "0 images",
    "fast images=100000 | 1": "100,000 images, the data hold 512", "fast images=512 nonsense | 1": "FIELD=VALUE",
    "fast images=512 | soon": "iteration", "": "no recipe",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_a_line_that_cannot_be_is_refused(text, mnist_small):
    with pytest.raises(ValueError, match=REFUSED[text]):
        du.GAN.replay(text, mnist_small)


def test_sliders_draw_what_they_say():
    drawn = []
    picture = du.plot_images(torch.zeros(1, 1, 28, 28))
    box = du.explore(lambda digit, reach: drawn.append((digit, reach)) or picture, digit=(0, 9), reach=(1.0, 3.0, 0.5))
    *sliders, image = box.children
    assert [slider.description for slider in sliders] == ["digit", "reach"]
    assert bytes(image.value).startswith(b"\x89PNG")
    sliders[0].value = 7
    sliders[1].value = 2.5
    assert drawn[-1] == (7, 2.5)
