"""The cockpit driven without a browser, and the pure functions under it."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from tiny import BCE, make, same, weights

import dcgan_utils as du


@pytest.fixture
def cockpit(mnist_small):
    """Return a cockpit of a tiny GAN, and leave no thread behind."""
    cockpit = du.Cockpit(make(), mnist_small)
    yield cockpit
    cockpit.pause(wait=True)
    assert not cockpit.playing


@pytest.fixture
def labelled(mnist_small):
    """Return a cockpit of a tiny GAN with cross-entropy, whose D has labels to aim at."""
    return du.Cockpit(make(**BCE), mnist_small)


def until(condition, seconds=20):
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
    threads = threading.active_count()
    cockpit.play()
    until(lambda: cockpit.gan.step >= 5)
    assert cockpit.playing
    assert cockpit.buttons["Play"].disabled
    assert not cockpit.buttons["Pause"].disabled
    cockpit.pause(wait=True)
    step = cockpit.gan.step
    time.sleep(0.1)
    assert cockpit.gan.step == step
    assert threading.active_count() == threads
    assert cockpit.buttons["Pause"].disabled
    assert not cockpit.buttons["Play"].disabled
    assert "paused" in cockpit.status.value


def test_its_thread_does_not_outlive_the_program(cockpit):
    cockpit.play()
    assert cockpit._thread.daemon


def test_a_paused_gan_goes_on_bit_for_bit(cockpit, mnist_small):
    for batches in (3, 1, 7):
        run(cockpit, batches)
    other = make(lr_schedule="constant")
    while other.step < 11:
        other.train(1, data=mnist_small, callbacks=[du.StopAt(11)])
    assert (cockpit.gan.step, cockpit.gan.position) == (other.step, other.position)
    assert same(cockpit.gan, other)


@pytest.mark.parametrize(
    ("alone", "moves", "rests"), [("D", "discriminator", "generator"), ("G", "generator", "discriminator")]
)
def test_a_step_of_one_player_leaves_the_other_one_alone(cockpit, alone, moves, rests):
    run(cockpit, 3)

    def vector(name):
        return torch.cat([p.detach().flatten() for p in getattr(cockpit.gan, name).parameters()])

    before = {name: vector(name) for name in (moves, rests)}
    average = weights(cockpit.gan.average)
    run(cockpit, 1, alone)
    assert torch.equal(vector(rests), before[rests])
    assert not torch.equal(vector(moves), before[moves])
    assert torch.equal(weights(cockpit.gan.average), average) == (alone == "D")
    assert (cockpit.gan.config.d_steps, cockpit.gan.config.g_steps) == (1, 1)
    assert cockpit.gan.step == 4


def test_playing_twice_starts_no_second_thread(cockpit):
    cockpit.play()
    first = cockpit._thread
    cockpit.play()
    assert cockpit._thread is first
    assert "pause first" in cockpit.status.value


def test_reset_begins_anew_from_the_same_seed(cockpit):
    fresh = make()
    run(cockpit, 5)
    cockpit.reset()
    assert same(cockpit.gan, fresh)
    assert (cockpit.gan.step, len(cockpit.looks), len(cockpit.gan.history["epoch"])) == (0, 1, 0)
    run(cockpit, 2)  # the data are still there
    assert cockpit.gan.step == 2


def test_a_step_is_as_long_as_chosen(cockpit):
    assert cockpit._batches() == 1
    cockpit.amount.value = 10
    cockpit.buttons["Step both"].click()
    cockpit.wait()
    assert cockpit.gan.step == 10
    cockpit.amount.value = 0
    assert cockpit._batches() == 512 // 16


def test_a_slow_pace_is_slow_and_pause_does_not_wait_for_it(cockpit):
    cockpit.pace.value = 1.0
    assert cockpit._pace == 1
    cockpit._pace = 60.0
    start = time.monotonic()
    cockpit.play()
    until(lambda: cockpit.gan.step == 1)
    cockpit.pause(wait=True)
    assert cockpit.gan.step == 1
    assert time.monotonic() - start < 30


# ---------------------------------------------------------------------------------------------------- steering
def test_a_slider_acts_from_the_next_batch_on_while_it_plays(cockpit):
    cockpit.play()
    until(lambda: cockpit.gan.step >= 2)
    cockpit.controls["lr_D"].value = 0.01
    until(lambda: cockpit.gan.config.lr_D == 0.01)
    until(lambda: cockpit.gan.optimizer_D.param_groups[0]["lr"] == 0.01)
    cockpit.pause(wait=True)
    assert cockpit._changes[0][1] == {"lr_D": 0.01}


def test_a_slider_rounds_to_three_digits(cockpit):
    cockpit.controls["lr_G"].value = 10**-2.15
    assert cockpit.gan.config.lr_G == 0.00708


def test_a_value_that_cannot_be_goes_back_and_says_why(labelled):
    cockpit = labelled
    cockpit.controls["fake_label_smooth"].value = 0.95
    assert cockpit.controls["fake_label_smooth"].value == 0
    assert cockpit.gan.config.fake_label_smooth == 0
    assert "fake_label_smooth" in cockpit.status.value
    with pytest.raises(ValueError, match="d_steps"):
        cockpit.change(d_steps=-1)


@pytest.mark.parametrize("loss", list(du.LOSSES))
def test_only_losses_with_labels_show_sliders_for_them(loss, mnist_small):
    cockpit = du.Cockpit(make(**{**BCE, "loss": loss}), mnist_small)
    hidden = {name for name, control in cockpit.controls.items() if control.layout.display == "none"}
    labels = {"real_label_smooth", "fake_label_smooth"}
    assert hidden == (set() if loss in ("bce", "least_squares") else labels)


@pytest.mark.parametrize("name", du.SCENARIOS)
def test_a_scenario_sets_everything_at_once_and_balanced_takes_it_back(cockpit, name):
    before = cockpit.gan.config
    cockpit.chosen.value = name
    changed = {n for n, v in vars(cockpit.gan.config).items() if v != getattr(before, n)}
    assert changed == set(du.SCENARIOS[name](before))
    assert all(cockpit.controls[n].value == getattr(cockpit.gan.config, n) for n in du._CONTROLS)
    run(cockpit, 2)
    cockpit.scenario("balanced")
    assert cockpit.gan.config == before


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_scenarios_are_valid_for_every_recipe_and_reach_of_the_sliders(kind):
    for name, changes in du.SCENARIOS.items():
        config = du.configure(kind.defaults, **changes(kind.defaults))
        for field in ("lr_D", "lr_G"):
            limits = du._CONTROLS[field][2]
            assert limits["min"] <= math.log10(getattr(config, field)) <= limits["max"], name


# ---------------------------------------------------------------------------------------------------- looking
def test_the_time_slider_scrubs_back_and_follows_again(cockpit):
    for _ in range(3):
        run(cockpit, 2)
    assert cockpit.scrub.max == len(cockpit.looks) - 1 == 3
    newest = cockpit.picture.value
    cockpit.scrub.value = 1
    assert cockpit.picture.value == cockpit.looks[1][1] != newest
    assert "looking back at iteration 2" in cockpit.status.value
    run(cockpit, 2)
    assert cockpit.scrub.value == 1  # it does not jump away
    cockpit.scrub.value = cockpit.scrub.max
    run(cockpit, 2)
    assert cockpit.scrub.value == cockpit.scrub.max == 5
    assert cockpit.picture.value == cockpit.looks[-1][1]


def test_looks_are_of_the_same_noise_and_do_not_move_the_gan(cockpit):
    before = weights(cockpit.gan.discriminator)
    first, second = du.take_look(cockpit.gan), du.take_look(cockpit.gan)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.images, cockpit.gan.fixed_samples(20))
    assert torch.equal(weights(cockpit.gan.discriminator), before)
    assert first.diagnosis is None


def test_a_long_run_keeps_fewer_looks(cockpit, monkeypatch):
    monkeypatch.setattr(du, "KEPT_LOOKS", 4)
    for _ in range(8):
        run(cockpit, 1)
    assert len(cockpit.looks) <= 5
    assert cockpit.looks[0][0].step == 0
    assert cockpit.looks[-1][0].step == 8


def test_the_picture_shows_scores_in_colour_and_in_words():
    ends = du.Config(real_label_smooth=0.9, fake_label_smooth=0.0)
    figure = du.Figure()
    du.plot_scored(torch.full((3, 1, 28, 28), -1.0), torch.tensor([0.0, 0.45, 0.9]), ends, figure.subplots())
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    ends = [du.COLOURS["G"], "#dddddd", du.COLOURS["D"]]
    for k, colour in enumerate(ends):  # a tile is 28 wide, the gap 4
        assert canvas[0, k * 32] == pytest.approx(to_rgb(colour), abs=0.01)
    assert [t.get_text() for t in figure.axes[0].texts] == ["0.00", "0.45", "0.90"]


def dotted(cockpit):
    """Return where the newest look draws its dotted lines: into the losses, and into D's answers."""
    figure = du.plot_look(cockpit.looks[-1][0], cockpit.gan.history)
    charts = [next(ax for ax in figure.axes if word in ax.get_title()) for word in ("losses", "answers")]
    return [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in charts]


def test_the_dashed_lines_stand_at_the_equilibrium_of_the_labels(labelled):
    labelled.change(real_label_smooth=0.8, fake_label_smooth=0.1)
    run(labelled, 3)
    losses, answers = dotted(labelled)
    assert answers == pytest.approx([0.45, 0.45])
    config = labelled.gan.config
    assert losses == pytest.approx([du.discriminator_loss_bounds(config)[1], du.generator_loss_at_equilibrium(config)])
    assert losses == pytest.approx([2 * (-0.45 * math.log(0.45) - 0.55 * math.log(0.55)), -math.log(0.45)])


def test_the_dashed_lines_of_pairs_stand_at_ln_2_and_at_one_half(cockpit):
    run(cockpit, 3)
    losses, answers = dotted(cockpit)
    assert losses == pytest.approx([math.log(2)] * 2)
    assert answers == pytest.approx([0.5] * 2)


def test_an_older_look_is_drawn_without_what_came_later(cockpit):
    run(cockpit, 20)
    look = cockpit.looks[-1][0]
    run(cockpit, 20)
    figure = du.plot_look(look, cockpit.gan.history)
    assert max(max(line.get_xdata()) for line in figure.axes[1].lines[::2]) == 20


def test_the_panel_has_words_beside_colours(cockpit):
    run(cockpit, 3)
    status = cockpit.looks[-1][0].diagnosis.status
    assert du.WORDS[status] in cockpit.status.value
    assert du.WORDS[status] in cockpit.panel.value
    for control in cockpit.controls.values():
        assert len(control.description) > 5


# ---------------------------------------------------------------------------------------------------- trouble
def test_an_error_in_training_stands_in_the_panel_and_play_works_again(mnist_small):
    class Breaks(du.Callback):
        broken = True

        def on_batch_end(self, gan):
            if self.broken and gan.step == 2:
                raise RuntimeError("the <dog> ate it")

    fault = Breaks()
    cockpit = du.Cockpit(make(), mnist_small, callbacks=[fault])
    cockpit.play(5)
    cockpit.wait()
    assert isinstance(cockpit.error, RuntimeError)
    assert "the &lt;dog&gt; ate it" in cockpit.panel.value
    assert "stopped by an error" in cockpit.status.value
    assert "🔴" in cockpit.status.value
    assert not cockpit.buttons["Play"].disabled
    fault.broken = False
    run(cockpit, 2)
    assert "dog" not in cockpit.panel.value


def test_divergence_is_told(cockpit):
    run(cockpit, 1)
    with torch.no_grad():
        next(cockpit.gan.discriminator.parameters()).fill_(math.nan)
    cockpit.play(3)
    cockpit.wait()
    assert isinstance(cockpit.error, du.DivergenceError)
    assert "DivergenceError" in cockpit.panel.value


def test_widgets_change_on_the_kernels_thread(mnist_small):
    """With a running event loop, as in a kernel, the training thread leaves all widgets to it."""
    import asyncio

    seen = set()

    async def cell():
        cockpit = du.Cockpit(make(), mnist_small)
        cockpit.picture.observe(lambda event: seen.add(threading.current_thread()), "value")
        cockpit.play(5)
        while cockpit.playing or cockpit.buttons["Play"].disabled:
            await asyncio.sleep(0.01)

    asyncio.run(cell())
    assert seen == {threading.main_thread()}


# ---------------------------------------------------------------------------------------------------- one line
def test_the_line_reproduces_the_run_bit_for_bit(mnist_small):
    cockpit = du.Cockpit(make(seed=7), mnist_small)
    run(cockpit, 6)
    run(cockpit, 2, "D")
    cockpit.change(lr_G=0.005, noise_D=0.1, d_steps=3)
    run(cockpit, 9)  # 512 images, 48 an iteration: crosses the end of an epoch with images left over
    cockpit.change(d_steps=1, detach=False)
    run(cockpit, 4)
    again = du.GAN.replay(cockpit.text, mnist_small)
    assert type(again) is du.FastDCGAN
    assert again.step == 21
    assert same(cockpit.gan, again)
    assert torch.equal(weights(cockpit.gan.average), weights(again.average))


def test_a_change_while_it_plays_is_in_the_line(cockpit, mnist_small):
    cockpit.play()
    for lr in (0.001, 0.003):
        step = cockpit.gan.step
        until(lambda step=step: cockpit.gan.step > step + 2)
        cockpit.change(lr_D=lr)
    cockpit.pause(wait=True)
    assert cockpit.text.count("lr_D=") == 2
    assert same(cockpit.gan, du.GAN.replay(cockpit.text, mnist_small))


def test_the_line_is_short_and_holds_what_differs():
    config = du.configure(du.DCGAN.defaults, seed=3, out_dir="some where", detach=False)
    text = du.run_text(du.DCGAN, config, 60_000, [(10, {"lr_D": 1e-05}), (20, {"detach": True})], 30)
    assert text == "dcgan seed=3 detach=False images=60000 | 10 lr_D=1e-05 | 20 detach=True | 30"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fats images=512 | 1", "did you mean 'fast'"),
        ("fast images=512 lr_X=1 | 1", "lr_X"),
        ("fast images=100000 | 1", "100,000 images, the data hold 512"),
        ("fast | 1", "0 images"),
        ("fast images=512 nonsense | 1", "FIELD=VALUE"),
        ("fast images=512 | soon", "iteration"),
        ("", "no recipe"),
    ],
)
def test_a_line_that_cannot_be_is_refused(text, message, mnist_small):
    with pytest.raises(ValueError, match=message):
        du.GAN.replay(text, mnist_small)


def test_no_line_is_offered_for_a_gan_that_was_trained_before(mnist_small):
    gan = make()
    gan.train(1, data=mnist_small, callbacks=[])
    cockpit = du.Cockpit(gan, mnist_small)
    assert "Reset" in cockpit.text
    cockpit.reset()
    assert cockpit.text.startswith("fast ")


# ---------------------------------------------------------------------------------------------------- explorers
def test_principal_directions_are_of_z_alone_and_of_a_g_that_begins_with_z():
    assert du.principal_directions(make(du.ConditionalDCGAN), 3).shape == (3, 8)
    with pytest.raises(ValueError, match="no first layer"):
        du.principal_directions(make(du.ProgressiveGAN))


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_principal_directions_move_the_first_layer_most(kind):
    gan = make(kind)
    directions = du.principal_directions(gan, 3)
    assert torch.allclose(directions @ directions.T, torch.eye(3), atol=1e-5)
    first = {
        du.DCGAN: lambda z: gan.generator.layers[0](z[:, :, None, None]),
        du.StableDCGAN: lambda z: gan.generator.dense[0](z),
        du.FastDCGAN: lambda z: z @ gan.average.dense.weight[:, : gan.config.nz].T,
    }[kind]
    with torch.no_grad():
        reach = first(directions).flatten(1).norm(dim=1)
        others = first(torch.nn.functional.normalize(torch.randn(200, gan.config.nz), dim=1)).flatten(1).norm(dim=1)
    assert reach[0] >= reach[1] >= reach[2]
    assert (reach[0] >= others).all()


def test_sliders_draw_what_they_say():
    drawn = []

    def draw(digit, reach):
        drawn.append((digit, reach))
        return du.plot_images(torch.zeros(1, 1, 28, 28))

    box = du.explore(draw, digit=(0, 9), reach=(1.0, 3.0, 0.5))
    *sliders, picture = box.children
    assert [slider.description for slider in sliders] == ["digit", "reach"]
    assert bytes(picture.value).startswith(b"\x89PNG")
    sliders[0].value = 7
    sliders[1].value = 2.5
    assert drawn[-1] == (7, 2.5)
