"""The training loop: what it records, that it can be repeated, stopped and steered, and what it refuses."""

import copy
import dataclasses
import json
import math
import os
import signal
from itertools import pairwise

import pytest
import torch
from tiny import RECIPES, make, same, weights

import dcgan_utils as du


@pytest.fixture(scope="module")
def digits():
    images, labels = du.load_images("mnist", "test")
    return images[:96], labels[:96]


def filled(epochs, config=None):
    """Return a history of so many epochs of three batches each, all values different."""
    history = du.History(config or du.Config())
    for epoch in range(epochs):
        for k, name in enumerate(history):
            history[name].append(epoch + k / 100)
        history["epoch"][-1] = epoch + 1
        for batch in range(3):
            for k, name in enumerate(history.batches):
                history.batches[name].append(epoch * 10 + batch + k / 100)
            history.batches["epoch"][-1] = epoch + (batch + 1) / 3
    return history


class StopAt(du.Callback):
    """Ask for a stop after so many iterations."""

    def __init__(self, step):
        self.at = step

    def on_batch_end(self, gan):
        if gan.step == self.at:
            gan.stop("test")


@pytest.mark.parametrize("kind", RECIPES)
def test_history_has_one_value_per_epoch(kind, digits):
    gan = make(kind, log_every=2)
    history = gan.train(2, data=digits, callbacks=[])
    names = {*du.METRICS, *du.EPOCH_READINGS, "epoch", "seconds", "images_per_second"}
    assert names == set(history)
    assert all(len(values) == 2 for values in history.values())
    assert set(history.batches) == {"step", "epoch", *du.METRICS}
    without = {  # no BatchNorm; no critic
        du.StableDCGAN: {"move_BN_D", "slope"},
        du.FastDCGAN: {"move_BN_D"},
        du.WGANGP: {"move_BN_D"},
        du.ProgressiveGAN: {"move_BN_D", "move_BN_G", "slope"},
    }.get(kind, {"slope"})
    for name in names:
        assert all(value is None if name in without else math.isfinite(value) for value in history[name]), name
    assert all(value > 0 for name in ("grad_D", "grad_G", "D_std", "move_D", "move_G") for value in history[name])
    assert history["leak"] == [0, 0]
    assert history["epoch"] == [1, 2]
    assert history.batches["step"] == [2, 4, 6, 8, 10, 12]  # 96 images are 6 batches of 16
    mean = sum(history.batches["loss_D"][:3]) / 3  # every entry covers two batches
    assert history["loss_D"][0] == pytest.approx(mean, rel=1e-6)
    assert kind is du.WGANGP or all(0 <= history[name][-1] <= 1 for name in ("D_x", "D_G_z"))  # a critic has no bounds
    assert 0 <= history["D_acc"][-1] <= 1
    assert history["gap"][-1] == pytest.approx(history["D_x"][-1] - history["D_G_z"][-1], abs=1e-5)
    gan.train(1, data=digits, callbacks=[])
    assert history["epoch"] == [1, 2, 3]


@pytest.mark.parametrize("kind", RECIPES)
def test_same_seed_gives_same_weights_bit_for_bit(kind, digits):
    first, second, other = make(kind), make(kind), make(kind, seed=7)
    for gan in (first, second, other):
        gan.train(1, data=digits, callbacks=[])
        torch.randn(5)  # the caller's random numbers must not matter
    assert same(first, second)
    assert not same(first, other)


def test_the_callers_random_numbers_are_left_alone(digits):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    gan = make(du.StableDCGAN)
    gan.train(1, data=digits, callbacks=[])
    gan.sample(3)
    gan.sample(3, seed=1)
    assert torch.equal(torch.randn(4), expected)


def test_a_callback_that_draws_random_numbers_changes_nothing(digits):
    class Draws(du.Callback):
        def on_batch_end(self, gan):
            torch.randn(100)

    first, second = make(du.StableDCGAN), make(du.StableDCGAN)
    first.train(1, data=digits, callbacks=[])
    second.train(1, data=digits, callbacks=[Draws()])
    assert same(first, second)


@pytest.mark.parametrize("kind", RECIPES)
def test_an_epoch_that_was_cut_short_goes_on_bit_for_bit(kind, digits, tmp_path):
    whole, cut = make(kind, noise_D=0.1, ema=0.9), make(kind, noise_D=0.1, ema=0.9)
    whole.train(2, data=digits, callbacks=[])
    cut.train(2, data=digits, callbacks=[StopAt(4)])
    assert (cut.epoch, cut.batch, cut.stop_reason) == (0, 4, "test")
    assert len(cut.history["epoch"]) == 1
    assert cut.history["epoch"][0] == pytest.approx(4 / 6)
    cut.save(tmp_path / "cut")
    resumed = kind.load(tmp_path / "cut")
    resumed.train(2, data=digits, callbacks=[])
    assert same(whole, resumed)
    assert torch.equal(weights(whole.average), weights(resumed.average))
    assert resumed.history["epoch"] == [1, 2]
    assert resumed.history["loss_G"] == whole.history["loss_G"]


def test_ctrl_c_stops_after_the_batch_and_keeps_everything(digits):
    class PressCtrlC(du.Callback):
        def on_batch_end(self, gan):
            if gan.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    gan = make()
    history = gan.train(5, data=digits, callbacks=[PressCtrlC()])
    assert gan.step in (3, 4)  # the signal may arrive one batch later
    assert gan.stop_reason == "interrupted"
    assert len(history["loss_D"]) == 1
    assert signal.getsignal(signal.SIGINT) is before
    gan.train(1, data=digits, callbacks=[])
    assert history["epoch"] == [1]


def test_max_seconds_stops_and_says_so(digits):
    gan = make()
    gan.train(10_000, data=digits, max_seconds=0.3, callbacks=[])
    assert "max_seconds" in gan.stop_reason
    assert 0 < gan.step < 10_000 * 6


def test_callbacks_are_told_in_order(digits):
    calls = []

    class Listens(du.Callback):
        def on_train_begin(self, gan):
            calls.append("begin")

        def on_batch_end(self, gan):
            calls.append("batch")

        def on_epoch_end(self, gan):
            calls.append("epoch")

        def on_train_end(self, gan):
            calls.append("end")

    make(batch_size=48).train(2, data=digits, callbacks=[Listens()])
    assert calls == ["begin", "batch", "batch", "epoch", "batch", "batch", "epoch", "end"]


@pytest.mark.parametrize(("frozen", "field"), [("discriminator", "d_steps"), ("generator", "g_steps")])
def test_zero_steps_freeze_a_player(frozen, field, digits):
    gan = make(du.StableDCGAN, **{field: 0})
    start = [parameter.clone() for parameter in getattr(gan, frozen).parameters()]
    other = {"discriminator": "generator", "generator": "discriminator"}[frozen]
    moved = [parameter.clone() for parameter in getattr(gan, other).parameters()]
    gan.train(1, data=digits, callbacks=[])
    assert all(torch.equal(a, b) for a, b in zip(start, getattr(gan, frozen).parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(moved, getattr(gan, other).parameters(), strict=True))


def test_d_steps_take_a_batch_each_and_g_steps_none(digits):
    gan = make(d_steps=2, g_steps=3)
    gan.train(1, data=digits, callbacks=[])
    assert gan.step == 3  # 96 images, two batches of 16 an iteration
    moments = next(iter(gan.optimizer_D.state.values())), next(iter(gan.optimizer_G.state.values()))
    assert [int(m["step"]) for m in moments] == [6, 9]


def test_each_step_leaves_the_other_player_alone(digits):
    gan = make(du.StableDCGAN)
    gan._set_data(digits)
    real = du.normalise(gan.images[:16])
    fake = gan._fake(16, None)
    g_before, d_before = weights(gan.generator), weights(gan.discriminator)
    measured = du.train_discriminator(gan, real, fake, None)
    assert set(measured) == {"loss_D", "D_x", "D_G_z", "D_acc", "D_std", "gap", "grad_D", "leak", "real_logits"}
    assert torch.equal(weights(gan.generator), g_before)
    assert all(parameter.grad is None for parameter in gan.generator.parameters())
    assert not torch.equal(weights(gan.discriminator), d_before)
    d_before = weights(gan.discriminator)
    assert all(parameter.grad is None for parameter in gan.discriminator.parameters())  # nothing is left over
    measured |= du.train_generator(gan, fake, None)
    assert not any(value.requires_grad for value in measured.values())
    assert measured.pop("real_logits").shape == (16,)
    assert set(measured) == set(du.METRICS)
    assert all(value.shape == () for value in measured.values())
    assert torch.equal(weights(gan.discriminator), d_before)
    assert all(parameter.grad is None for parameter in gan.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in gan.discriminator.parameters())
    assert not torch.equal(weights(gan.generator), g_before)


def test_the_average_follows_the_generator_as_its_formula_says(digits):
    gan = make(ema=0.9)
    expected = weights(gan.generator)

    class Follows(du.Callback):
        def on_batch_end(self, gan):
            nonlocal expected
            decay = min(0.9, gan.step / (9 + gan.step))  # step was raised after the update
            expected = decay * expected + (1 - decay) * weights(gan.generator)

    gan.train(1, data=digits, callbacks=[Follows()])
    floats = torch.cat([v.double().flatten() for v in gan.average.state_dict().values() if v.is_floating_point()])
    mask = torch.cat([torch.full((v.numel(),), v.is_floating_point()) for v in gan.generator.state_dict().values()])
    assert torch.allclose(floats, expected[mask], atol=1e-5)
    z = gan.latent(4, seed=1)
    assert torch.equal(gan.generate(z), gan.sample(4, seed=1))
    gan.average = None
    assert not torch.equal(gan.generate(z), torch.zeros(4, 1, 28, 28))


def test_public_recipes_keep_no_average():
    assert make(du.DCGAN).average is None
    assert make(du.StableDCGAN).average is None


def test_noise_on_what_d_sees_fades():
    gan = make(noise_D=0.5, noise_D_batches=100)
    images = torch.zeros(64, 1, 28, 28)
    assert gan.noisy(images).std().item() == pytest.approx(0.5, rel=0.02)
    gan.step = 50
    assert gan.noisy(images).std().item() == pytest.approx(0.25, rel=0.02)
    gan.step = 100
    assert gan.noisy(images) is images
    assert make().noisy(images) is images


def test_linear_tail_is_flat_then_falls_to_the_last_batch(digits):
    seen = []

    class Reads(du.Callback):
        def on_batch_end(self, gan):
            seen.append(gan.optimizer_G.param_groups[0]["lr"])

    gan = make(num_epochs=2, lr_G=0.01)
    gan.train(data=digits, callbacks=[Reads()])
    assert seen[:7] == pytest.approx([0.01] * 7)
    assert seen[7:] == pytest.approx([0.01 * (12 - k) / 6 for k in range(7, 12)])  # by what is done before each
    assert all(a >= b for a, b in pairwise(seen))


def test_a_loss_that_is_no_number_stops_with_epoch_batch_and_checkpoint(digits, tmp_path):
    class Poisons(du.Callback):
        def on_batch_end(self, gan):
            if gan.step == 8:
                with torch.no_grad():
                    next(gan.discriminator.parameters()).fill_(float("nan"))

    gan = make(log_every=100)
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "good")
    with pytest.raises(du.DivergenceError, match=r"epoch 2, batch 3.*good"):
        gan.train(2, data=digits, callbacks=[Poisons()])
    assert gan.history["epoch"] == [1]
    again = du.FastDCGAN.load(tmp_path / "good")
    again.train(1, data=digits, callbacks=[])
    assert again.history["epoch"] == [1, 2]


def test_live_changes_act_from_the_next_batch(digits):
    gan = make(du.StableDCGAN)
    gan.train(1, data=digits, callbacks=[])
    gan.reconfigure(lr_G=0.05, d_steps=0, real_label_smooth=1.0, beta1=0.3)
    gan.train(1, data=digits, callbacks=[])
    assert gan.optimizer_G.param_groups[0]["lr"] == 0.05
    assert gan.optimizer_G.param_groups[0]["betas"][0] == 0.3
    assert gan.loss.real == 1.0
    with pytest.raises(ValueError, match="ngf is built in"):
        gan.reconfigure(ngf=8)


def test_data_are_resized_to_the_recipe(digits):
    gan = make(du.DCGAN, image_size=32)
    gan.train(1, data=digits[0], callbacks=[])
    assert gan.images.shape == (96, 32, 32)
    assert gan.images.dtype == torch.uint8
    assert gan.sample(2).shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x, y: (x[:8], y[:8]), r"needs 16 images.*hold 8.*at most 8"),
        (lambda x, y: x, r"class-conditional.*none"),
        (lambda x, y: (x, y + 1), r"labels 0 … 9.*1 … 10"),
        (lambda x, y: (x, y[:-1]), r"96 images but 95 labels"),
        (lambda x, y: (x.float(), y), r"needed are uint8"),
        (lambda x, y: (x[:, None, None], y), r"needed are uint8 \(N, H, W\)"),
        (lambda x, y: (x[0], y), r"needed are uint8 \(N, H, W\)"),
        (lambda x, y: (x[:, None].expand(-1, 3, -1, -1), y), r"images have 3 channels .*Config\.channels is 1"),
        (lambda x, y: (x[:0], y[:0]), r"N > 0"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, message, digits):
    with pytest.raises(ValueError, match=message):
        make().train(1, data=data(*digits), callbacks=[])


def test_a_conditional_generator_with_one_image_a_class_is_red(digits):
    gan = make()
    gan._set_data(digits)
    one_each = torch.stack([du.normalise(digits[0][digits[1] == k][:1])[0] for k in range(10)])
    gan.fixed_samples = lambda n: one_each[torch.arange(n) % 10]
    assert gan.sample_readings()["diversity"] < 0.01
    assert gan.sample_readings()["spacing"] < 0.01
    gan.fixed_samples = lambda n: du.normalise(digits[0][torch.arange(n) % 96])  # any digits: the variety is there
    assert gan.sample_readings()["diversity"] > 0.7
    gan.fixed_samples = lambda n: torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert gan.sample_readings()["spacing"] > 0.5  # noise repeats nothing


def test_training_can_go_on_after_divergence_without_hanging(digits):
    class Poisons(du.Callback):
        def on_batch_end(self, gan):
            with torch.no_grad():
                next(gan.generator.parameters()).fill_(float("nan"))

    gan = make()
    for _ in range(2):
        with pytest.raises(du.DivergenceError, match="epoch 1"):
            gan.train(1, data=digits, callbacks=[Poisons()])
    last = make(du.StableDCGAN, batch_size=96)  # one batch: only the samples can show it
    with pytest.raises(du.DivergenceError, match="its last batch"):
        last.train(1, data=digits, callbacks=[Poisons()])
    assert last.history["epoch"] == []


class PoisonsLast(du.Callback):
    """Write NaN into G after the last batch of an epoch: no loss has seen it yet."""

    def __init__(self, step):
        self.at = step

    def on_batch_end(self, gan):
        if gan.step == self.at:
            with torch.no_grad():
                next(gan.generator.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("epoch", [1, 2])
def test_nan_in_the_last_batch_is_red(kind, epoch, digits):
    gan = make(kind, ema=0.0)
    with pytest.raises(du.DivergenceError, match=f"epoch {epoch}, its last batch"):
        gan.train(2, data=digits, callbacks=[PoisonsLast(6 * epoch)])
    assert gan.history["epoch"] == [1, 2][: epoch - 1]
    diagnosis = gan.diagnose()
    assert (diagnosis.status, diagnosis.cause.name) == ("red", "losses are numbers")
    with pytest.raises(du.DivergenceError):  # and so it stays
        gan.train(1, data=digits, callbacks=[])
    assert gan.diagnose().cause.name == "losses are numbers"


def test_the_same_data_in_a_new_tuple_goes_on_with_the_epoch(digits):
    gan = make()
    gan.train(1, data=digits, callbacks=[StopAt(4)])
    gan.train(1, data=(digits[0], digits[1]), callbacks=[])
    assert (gan.step, gan.epoch) == (6, 1)
    gan.train(1, data=digits, callbacks=[StopAt(8)])
    gan.train(1, data=(digits[0][:32], digits[1][:32]), callbacks=[])  # other data: a whole epoch of it
    assert (gan.step, gan.epoch) == (10, 2)


def test_batch_size_may_change_within_an_epoch(digits):
    class Shrinks(du.Callback):
        def on_batch_end(self, gan):
            gan.reconfigure(batch_size=8)

    gan = make()
    gan.train(1, data=digits, callbacks=[Shrinks()])
    assert gan.step == 1 + 80 // 8


def test_numpy_data_and_uint8_labels_are_taken(digits):
    gan = make()
    gan.train(1, data=(digits[0].numpy(), digits[1].byte().numpy()), callbacks=[])
    make(du.StableDCGAN).train(1, data=digits[0].numpy(), callbacks=[])
    assert gan.labels.dtype == torch.long
    with pytest.raises(ValueError, match="max_seconds"):
        gan.train(1, data=digits, max_seconds=0)


def test_a_plain_class_is_a_callback_too(digits):
    class Plain:
        def on_epoch_end(self, gan):
            self.epoch = gan.epoch

    plain = Plain()
    make().train(1, data=digits, callbacks=[plain])
    assert plain.epoch == 1


@pytest.mark.parametrize("kind", RECIPES)
def test_samples_have_shape_range_and_seed(kind):
    gan = make(kind)
    side = gan.config.image_size
    gan.generator.train()
    next(gan.generator.children()).eval()
    images = gan.sample(5, seed=1)
    assert images.shape == (5, 1, side, side)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert torch.equal(images, gan.sample(5, seed=1))
    assert not torch.equal(images, gan.sample(5, seed=2))
    assert not torch.equal(gan.sample(5), gan.sample(5))
    assert gan.generator.training  # the mode of every part is put back
    assert not next(gan.generator.children()).training
    digits = [1] * 5 if gan.config.conditional else None
    assert gan.score(images, digits).shape == (5,)
    if gan.config.conditional:
        with pytest.raises(ValueError, match="pass digits"):
            gan.score(images)
    with pytest.raises(ValueError, match="at least one"):
        gan.sample(0)


def test_digits_choose_the_class():
    gan = make()
    assert gan._digits(25, None).bincount().tolist() == [3] * 5 + [2] * 5  # all alike often
    assert torch.equal(gan.sample(3, seed=1, digits=7), gan.sample(3, seed=1, digits=[7, 7, 7]))
    assert not torch.equal(gan.sample(3, seed=1, digits=7), gan.sample(3, seed=1, digits=8))
    for wrong in ([10, 1, 1], [-1, 0, 0], [1, 2], [0.5, 1.0, 2.0]):
        with pytest.raises(ValueError, match="whole numbers from 0 to 9"):
            gan.sample(3, digits=wrong)
    with pytest.raises(ValueError, match="no classes"):
        make(du.DCGAN).sample(3, digits=1)
    with pytest.raises(ValueError, match="no classes"):
        make(conditional=False).sample(3, digits=1)


def test_precision_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert du.pick_precision("auto", cpu) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert du.pick_precision("auto", cpu) == "fp32"
    assert du.pick_precision("bf16", cpu) == "bf16"
    with pytest.raises(ValueError, match="needs a GPU"):
        du.pick_precision("fp16", cpu)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert du.pick_precision("auto", cuda) == "fp16"  # a T4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert du.pick_precision("auto", cuda) == "bf16"


@pytest.mark.parametrize(
    ("kind", "width", "amx", "ways_taken"),  # DCGAN ends in a 4×4 → 1×1 convolution; wide, it takes other products
    [
        (du.DCGAN, 8, False, {"library"}), (du.DCGAN, 128, False, {"winograd"}),
        (du.DCGAN, 128, True, {"library", "winograd", "patches"}), (du.StableDCGAN, 8, True, {"library"}),
        (du.StableDCGAN, 64, True, {"library", "patches"}),
    ],
)  # fmt: skip
def test_bf16_agrees_with_fp32_over_the_first_iterations(kind, width, amx, ways_taken, digits, monkeypatch):
    histories, ways, choose = [], [], du.quickest_ways
    monkeypatch.setattr(du, "has_amx", lambda: amx)
    monkeypatch.setattr(du, "quickest_ways", lambda *x: ways.append(choose(*x)) or ways[-1])
    for precision in ("fp32", "bf16"):
        gan = make(kind, precision=precision, dropout_D=0.0, ngf=width, ndf=width, batch_size=32)
        histories.append(gan.train(2, data=digits, callbacks=[]))
    assert {way for taken in ways for way in taken} == {"patches"} | ways_taken
    for name in ("loss_D", "loss_G"):
        assert histories[1][name] == pytest.approx(histories[0][name], rel=0.03)


def test_training_learns_the_digits_that_one_asks_for():
    images, labels = du.load_images()
    images, labels = images[:6400], labels[:6400]
    gan = du.FastDCGAN(batch_size=64, num_epochs=1)
    gan.train(data=(images, labels), callbacks=[])
    asked = torch.arange(10).repeat_interleave(30)
    made = gan.sample(300, seed=0, digits=asked).view(10, 30, -1).mean(dim=1)
    real = torch.stack([du.normalise(images[labels == digit]).flatten(1).mean(dim=0) for digit in range(10)])
    likeness = torch.corrcoef(torch.cat([made - made.mean(dim=0), real - real.mean(dim=0)]))[:10, 10:]
    assert (likeness.argmax(dim=1) == torch.arange(10)).sum() >= 8  # untrained: about 1 of 10
    assert gan.history["diversity"][-1] > 0.3  # within each digit; one image a digit would give 0


# ----------------------------------------------------------------------------------------------- the history itself
def test_a_line_of_a_history_holds_what_was_measured():
    history = filled(3)
    assert history.line() == history.line(2) == history.last() == {name: values[2] for name, values in history.items()}
    assert history.line(0)["epoch"] == history.line(-3)["epoch"] == 1
    assert history.line(3) == history.line(-4) == {}
    assert du.History(du.Config()).line() == du.History(du.Config()).last() == {}
    history["move_BN_D"][-1] = None
    assert "move_BN_D" not in history.line()
    assert "move_BN_D" in history.line(1)


def test_until_is_the_history_as_it_was():
    history = filled(4)
    before = copy.deepcopy((dict(history), history.batches))
    for epochs in range(5):
        then = history.until(epochs)
        assert then == filled(epochs)
        assert then.batches == filled(epochs).batches
        assert then.config is history.config
    assert history.until(9) == history
    short = history.until(2)
    short["loss_D"][0] = -1.0
    short.batches["loss_D"][0] = -1.0
    short.record("fid", 3.0)
    assert (dict(history), history.batches) == before  # it is a copy
    history["epoch"][-1] = 3 + 2 / 3  # an epoch that was cut short after its second batch
    history.batches["epoch"][-1] = 3 + 2 / 3 + 0.1
    assert len(history.until(4).batches["step"]) == 11
    assert history.until(3).batches == filled(3).batches


def test_what_one_records_oneself_stands_in_step_with_the_epochs(digits):
    history = filled(3)
    history.record("mine", 5.0)
    assert history["mine"] == [None, None, 5.0]
    history.record("mine", 6.0)
    assert history["mine"] == [None, None, 6.0]
    assert history.line()["mine"] == 6.0
    assert "mine" not in history.line(0)

    class Records(du.Callback):
        def on_epoch_end(self, gan):
            if gan.epoch != 2:
                gan.history.record("mine", float(gan.epoch))

    gan = make()
    gan.train(3, data=digits, callbacks=[Records()])
    assert gan.history["mine"] == [1, None, 3]
    gan.train(1, data=digits, callbacks=[StopAt(20)])
    assert gan.history["mine"] == [1, None, 3, None]
    gan.train(1, data=digits, callbacks=[Records()])  # finishes the epoch that was cut short
    assert gan.history["mine"] == [1, None, 3, 4]
    assert {len(values) for values in gan.history.values()} == {4}


def test_a_history_survives_json_and_an_older_one_is_filled_up():
    history = filled(2)
    history.record("fid", 7.0)
    record = json.loads(json.dumps(history.to_json()))
    kept = copy.deepcopy(record)
    again = du.History.from_json(record)
    assert (dict(again), again.batches, again.config) == (dict(history), history.batches, history.config)
    assert record == kept
    again["loss_D"].append(9.0)
    again.batches["loss_D"].append(9.0)
    again.record("fid", 9.0)
    assert record == kept  # what is done to the history leaves the record alone
    for part in ("epochs", "batches"):
        for name in ("leak", "D_std", "spacing", "swing", "move_D"):
            record[part].pop(name, None)
    del record["config"]["detach"], record["config"]["batch_norm_G"]
    older = du.History.from_json(record)
    assert older["leak"] == older["spacing"] == [None, None]
    assert older.batches["leak"] == [None] * 6
    assert set(older) == set(history)
    assert older.config == history.config
    assert older.finite()


@pytest.mark.parametrize("name", du.METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_history_is_finite_while_its_newest_batches_are(name, value):
    history = filled(2)
    assert history.finite()
    assert du.History(du.Config()).finite()
    history.batches[name][0] = value  # long ago
    assert history.finite()
    history.batches[name][-1] = value
    assert not history.finite()
    assert history.until(1).finite() == (name not in ("step", "epoch"))
    history.batches[name][-1] = None  # was not measured
    assert history.finite()


# ----------------------------------------------------------------------------------------------- corners
def test_a_frozen_player_gives_no_gradient_and_does_not_move(digits):
    for field, player in (("d_steps", "D"), ("g_steps", "G")):
        gan = make(du.StableDCGAN, **{field: 0}, start_at_background=False)
        history = gan.train(1, data=digits, callbacks=[])
        other = {"D": "G", "G": "D"}[player]
        assert history[f"grad_{player}"] == history[f"move_{player}"] == [0]
        assert history[f"grad_{other}"][0] > 0
        assert history[f"move_{other}"][0] > 1e-4
        assert history["leak"] == [0]
        cause = du.diagnose(history).cause
        assert (cause.name, cause.changes) == ("a player stands still", {field: 1})
        assert cause.message.startswith(f"{player}'s weights")


def test_an_epoch_of_which_nothing_was_left_is_no_player_that_stands_still(digits):
    """A larger batch_size may leave too few images for another batch: nobody could move."""
    gan = make()
    gan.train(1, data=digits, callbacks=[StopAt(5)])
    gan.train(1, batch_size=32, data=digits, callbacks=[])
    assert (gan.epoch, gan.step) == (1, 5)
    assert gan.history["epoch"] == [1]
    assert gan.history["D_x"][0] > 0
    cause = gan.diagnose().cause
    assert cause is None or cause.name != "a player stands still"


def test_a_leak_is_only_there_without_detach(digits):
    for detach in (True, False):
        gan = make(du.StableDCGAN, detach=detach)
        history = gan.train(1, data=digits, callbacks=[])
        assert (history["leak"][0] > 0) == (not detach)
        cause = gan.diagnose().cause
        if detach:
            assert cause is None or cause.name != "detach"
        else:
            assert (cause.name, cause.changes) == ("detach", {"detach": True})
        gan.reconfigure(detach=True)  # the repair, live
        gan.train(1, data=digits, callbacks=[])
        assert history["leak"][1] == 0
        assert gan.diagnose().cause is None or gan.diagnose().cause.name != "detach"


def test_a_frozen_generator_does_not_hoard_what_leaks(digits):
    """Each batch's leak is its own, also where no step of G clears it away."""
    gan = make(du.StableDCGAN, detach=False, g_steps=0, lr_G=0.0, lr_D=0.0, dropout_D=0.0, log_every=1)
    history = gan.train(3, data=digits, callbacks=[])
    leaks = history.batches["leak"]
    assert min(leaks) > 0
    assert max(leaks) < 4 * min(leaks)


def test_the_readings_of_samples_go_into_a_diagnosis(digits):
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    asked = {**gan.sample_readings(), **gan.judge_samples(200, distances=False)}
    assert set(asked) == {"diversity", "spacing", "confidence", "class_gap"}
    assert asked["diversity"] == pytest.approx(gan.history["diversity"][-1], rel=1e-5)  # the same samples
    assert asked["spacing"] == pytest.approx(gan.history["spacing"][-1], rel=1e-5)
    gan.fixed_samples = lambda n: torch.zeros(n, 1, 28, 28)
    collapsed = du.diagnose(gan.history, samples=gan.sample_readings())
    assert collapsed.cause.name == "copies among samples"
    assert dataclasses.replace(gan.config, **collapsed.cause.changes) != gan.config


def test_the_last_batch_of_a_falling_rate_still_learns(digits):
    gan = make(num_epochs=1, lr_schedule="linear_tail", batch_size=96)
    gan.train(data=digits, callbacks=[])
    assert gan.step == 1
    assert gan.history["move_D"][0] > 0
    assert gan.history["move_G"][0] > 0


def test_a_batch_size_that_cannot_be_is_not_kept(digits):
    gan = make()
    with pytest.raises(ValueError, match="lower batch_size to at most 96"):
        gan.train(1, batch_size=97, data=digits)
    assert gan.config.batch_size == 16
    assert gan.images is None
    gan.train(1, data=digits, callbacks=[])
    with pytest.raises(ValueError, match="lower batch_size to at most 96"):
        gan.train(1, batch_size=97, data=digits)
    gan.train(1, data=digits, callbacks=[])
    assert gan.epoch == 2
    with pytest.raises(ValueError, match="the data hold 1; get more"):
        gan.train(1, data=(digits[0][:1], digits[1][:1]))


def test_a_run_that_is_done_says_so_and_a_started_epoch_is_finished(digits):
    gan = make(num_epochs=1)
    gan.train(2, data=digits, callbacks=[StopAt(8)])
    assert (gan.epoch, gan.batch) == (1, 2)
    gan.train(data=digits, callbacks=[])
    assert (gan.epoch, gan.batch, gan.step) == (2, 0, 12)
    with pytest.warns(UserWarning, match="num_epochs = 1 are done"):
        gan.train(data=digits, callbacks=[])
    assert gan.step == 12


@pytest.mark.parametrize("data", [[torch.zeros(4, 28, 28, dtype=torch.uint8)] * 3, {"images": 1}, 5])
def test_data_of_another_kind_are_refused_in_words(data):
    with pytest.raises(ValueError, match=rf"data is a {type(data).__name__}; needed: a source, images, or"):
        make().train(1, data=data)


def test_images_with_channels_last_are_refused_in_words():
    with pytest.raises(ValueError, match="they come first: N, C, H, W"):
        make(conditional=False, channels=3).train(1, data=torch.zeros(64, 28, 28, 3, dtype=torch.uint8))


def test_readings_of_ones_own_become_plain_numbers(digits):
    gan = make()
    with pytest.raises(ValueError, match="mine: no epoch has ended yet"):
        gan.history.record("mine", 1.0)
    gan.train(1, data=digits, callbacks=[])
    gan.history.record("mine", torch.tensor(2.5))
    assert json.loads(json.dumps(gan.history.to_json()))["epochs"]["mine"] == [2.5]


@pytest.mark.parametrize("kind", [du.StableDCGAN, du.ProgressiveGAN])
def test_recipes_without_classes_do_not_pretend(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} has no classes"):
        make(kind, conditional=True)


# --------------------------------------------------------------------------------------------- data of a later call
def test_a_later_call_goes_on_with_the_same_data(digits, monkeypatch):
    """Also mid-epoch, with arrays, and after equal ones; "mnist" is what the first call takes."""
    loaded = []
    monkeypatch.setattr(du, "load_images", lambda source, split="train": loaded.append(source) or digits)
    gan = make()
    gan.train(1, callbacks=[])
    assert (loaded, gan.trained_on) == (["mnist"], "mnist")
    for data in (digits, digits[0], (digits[0].numpy(), digits[1].numpy())):
        gan = make(conditional=False)
        gan.train(1, data=data, callbacks=[du.StopAt(2)])
        source, images = gan._source, gan.images
        gan.train(1, callbacks=[])
        assert gan._source is source
        assert gan.images is images
        assert gan.history["epoch"] == [1]
        gan.train(1, data="mnist", callbacks=[])  # not compared with an array
        assert gan.trained_on == "mnist"
    assert loaded == ["mnist"] * 4


def test_an_epoch_is_not_finished_on_other_images(digits):
    gan = make()
    gan.train(1, data=digits, callbacks=[du.StopAt(2)])
    gan.train(1, data=(digits[0].clone(), digits[1]), callbacks=[du.StopAt(3)])  # the same ones
    assert gan.history["epoch"] == [0.5]
    gan._rows = [torch.full((len(du.METRICS),), torch.nan)]  # as an exception leaves them; they would be counted
    gan.train(1, data=(255 - digits[0], digits[1]), callbacks=[])
    assert (gan.epoch, gan.step, gan.history["epoch"]) == (1, 9, [1])
    assert math.isfinite(gan.history["loss_D"][0])


def test_a_checkpoint_goes_on_with_the_data_that_it_names(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(du, "load_images", lambda source, split="train": digits)
    gan = make()
    gan.train(1, data="kmnist", callbacks=[du.StopAt(3)])
    again = du.FastDCGAN.load(gan.save(tmp_path / "named"))
    again.train(1, callbacks=[])
    assert (again.trained_on, again.step, again.history["epoch"]) == ("kmnist", 6, [1])
    other = du.FastDCGAN.load(tmp_path / "named")
    other.train(1, data="fashion-mnist", callbacks=[])  # as many images, but others: the epoch begins anew
    assert (other.trained_on, other.step) == ("fashion-mnist", 9)
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    nameless = du.FastDCGAN.load(gan.save(tmp_path / "nameless"))
    with pytest.warns(UserWarning, match="does not name its data"):
        nameless.train(1, callbacks=[])


def test_reconfigure_refuses_batches_that_the_data_cannot_fill(digits, mnist_small):
    """While they are trained on; between two calls the next one may bring more."""
    refused = []

    class Changes(du.Callback):
        def on_batch_end(self, gan):
            before = gan.config
            for fields in ({"batch_size": 128}, {"d_steps": 7}):
                with pytest.raises(ValueError, match="one iteration needs"):
                    gan.reconfigure(**fields)
                refused.append(gan.config is gan.history.config is before)

    gan = make()
    gan.train(1, data=digits, callbacks=[Changes()])
    assert refused == [True] * 12
    gan.train(1, batch_size=128, data=mnist_small, callbacks=[])
    assert gan.config.batch_size == 128
    gan.train(1, batch_size=16, data=digits, callbacks=[])
    before = gan.config
    gan.world = 2
    with pytest.raises(ValueError, match="multiple of the 2 processes"):
        gan.reconfigure(batch_size=17)
    assert gan.config is before
    gan.reconfigure(batch_size=32)
    assert gan.config.batch_size == gan.history.config.batch_size == 32
