"""The two steps, the loop around them, the record that it keeps, and what it refuses."""

import copy
import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import RECIPES as KINDS
from tiny import FastCrossEntropy, make, same, weights

import dcgan_utils as du

NORM = torch.nn.utils.get_total_norm


@pytest.fixture(scope="module")
def digits(mnist_test):
    """Return 96 digits and their labels: six batches of 16."""
    return mnist_test[0][:96].clone(), mnist_test[1][:96].clone()


def after(act, step=None):
    """Return a callback that acts after every iteration, or after one of them."""
    callback = du.Callback()
    callback.on_batch_end = lambda gan: act(gan) if step in (None, gan.step) else None
    return callback


def inputs_of(network):
    """Return the list that what goes into a network in train mode will be written to."""
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs) if module.training else None)
    return seen


def batches_of(gan):
    """Return the list that the batches of every iteration will be written to."""
    seen, step = [], gan.train_step
    gan.train_step = lambda batches: (seen.append(batches), step(batches))[1]
    return seen


def fill(network, value):
    """Write a value into all weights."""
    torch.nn.utils.vector_to_parameters(torch.full((10**6,), value), network.parameters())


# ----------------------------------------------------------------------------------------------- the two steps
def bce(logits, target):
    """Return the cross-entropy of logits to one target, by its definition."""
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()


BY_HAND = {
    du.DCGAN: (lambda r, f: bce(r, 0.85) + bce(f, 0.2), lambda f, r: bce(f, 1.0)),
    du.StableDCGAN: (lambda r, f: bce(r, 0.9) + bce(f, 0.0), lambda f, r: bce(f, 1.0)),
    du.FastDCGAN: (lambda r, f: F.softplus(f - r).mean(), lambda f, r: F.softplus(r - f).mean()),
    du.WGANGP: (lambda r, f: f.mean() - r.mean(), lambda f, r: -f.mean()),
}


def penalty_by_hand(D, both, labels):
    """Return the mean squared norm of D's gradient at real and at fake images."""
    norms = []
    for images in both:
        images = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(D(images, labels).sum(), images, create_graph=True)
        norms.append(gradient.flatten(1).square().sum(dim=1))
    return torch.cat(norms).mean()


def iterations_by_hand(gan, D, G, batches, noise):
    """Take iterations in plain PyTorch; return, for each, both losses and the norms of both gradients."""
    c, (loss_D, loss_G), measured = gan.config, BY_HAND[type(gan)], []
    step_D, step_G = (
        torch.optim.Adam(network.parameters(), lr, (c.beta1, c.beta2), c.adam_eps)
        for network, lr in ((D, c.lr_D), (G, c.lr_G))
    )
    for k, (((real, labels),), (z, *_)) in enumerate(zip(batches, noise, strict=True)):
        fake, real_logits = G(z, labels), D(real, labels)
        cost_D = loss_D(real_logits, D(fake.detach(), labels))
        due = c.gradient_penalty and k % c.penalty_interval == 0
        penalty = c.penalty_interval * penalty_by_hand(D, (real, fake), labels) if due else 0.0
        (cost_D + c.gradient_penalty * penalty).backward()
        norm_D = NORM([p.grad for p in D.parameters()])
        step_D.step()
        cost_G = loss_G(D(fake, labels), real_logits.detach())
        cost_G.backward()
        measured.append([cost_D.item(), cost_G.item(), norm_D.item(), NORM([p.grad for p in G.parameters()]).item()])
        step_G.step()
        D.zero_grad()
        G.zero_grad()
    return list(zip(*measured, strict=True))


@pytest.mark.parametrize("kind", BY_HAND)
def test_iterations_are_those_of_pytorch_by_hand(kind, digits):
    fields = {du.FastDCGAN: {"conditioning": "projection", "penalty_interval": 2}, du.WGANGP: {"gradient_penalty": 0.0}}
    gan = make(kind, log_every=1, dropout_D=0.0, init_output_bias=False, **fields.get(kind, {}))
    start = D, G = copy.deepcopy(gan.discriminator), copy.deepcopy(gan.generator)
    before, batches, noise = [weights(network) for network in start], batches_of(gan), inputs_of(gan.generator)
    gan.train(1, data=(digits[0][:48], digits[1][:48]), callbacks=[])
    expected = iterations_by_hand(gan, D, G, batches, noise)
    for name, values in zip(("loss_D", "loss_G", "grad_D", "grad_G"), expected, strict=True):
        assert gan.history.batches[name] == pytest.approx(list(values), rel=2e-3), name
    for network, theirs, old in zip((gan.discriminator, gan.generator), start, before, strict=True):
        assert (weights(network) - weights(theirs)).norm() < 0.01 * (weights(theirs) - old).norm()


def test_each_step_leaves_the_other_player_alone(digits):
    gan = make(du.StableDCGAN)
    gan.set_data(digits)
    D, G = gan.discriminator, gan.generator
    fake, before = gan.players["G"](gan.latent(16, 0), None), weights(G)
    measured = du.discriminator_step(gan, du.normalize(gan.images[:16]), fake, None)
    assert torch.equal(weights(G), before)
    assert all(p.grad is None for network in (D, G) for p in network.parameters())
    before = weights(D), weights(G)
    measured |= du.generator_step(gan, fake, None, measured["real_logits"])
    assert torch.equal(weights(D), before[0])
    assert not torch.equal(weights(G), before[1])
    assert all(p.grad is None and p.requires_grad for p in D.parameters())
    assert {*du.METRICS, "real_logits"} == set(measured)
    assert not any(value.requires_grad for value in measured.values())


@pytest.mark.parametrize("kind", [du.StableDCGAN, du.FastDCGAN, du.WGANGP])
def test_ds_step_reaches_g_only_without_detach(kind, digits):
    """D stays where it is, and G takes no step of its own: what moves it leaks, each batch's leak by itself."""
    gan = make(kind, detach=False, log_every=1, g_steps=0, lr_D=0.0, dropout_D=0.0, lr_G=1e-9, init_output_bias=False)
    start = weights(gan.generator)
    leaks = gan.train(3, data=digits, callbacks=[]).batches["grad_G_after_D_step"]
    assert 0 < max(leaks) < 5 * min(leaks)
    assert not torch.equal(weights(gan.generator), start)
    gan.reconfigure(detach=True)
    assert gan.train(1, data=digits, callbacks=[])["grad_G_after_D_step"][-1] == 0


def test_d_steps_take_a_batch_each_and_g_steps_noise_of_their_own(digits):
    gan = make(n_critic=2, g_steps=3, gradient_penalty=0.0)
    batches, z = batches_of(gan), inputs_of(gan.generator)
    gan.train(1, data=digits, callbacks=[])
    assert gan.step == 3  # 96 images, two batches of 16 an iteration
    assert [len(taken) for taken in batches] == [2] * 3
    assert not torch.equal(batches[0][0][0], batches[0][1][0])
    assert len({tuple(inputs[0].flatten().tolist()) for inputs in z}) == 3 * (2 + 2)  # G's first step takes D's fakes
    taken = [int(next(iter(part.state.values()))["step"]) for part in (gan.optimizer_D, gan.optimizer_G)]
    assert taken == [6, 9]


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, FastCrossEntropy])
@pytest.mark.parametrize(("player", "field"), [("D", "n_critic"), ("G", "g_steps")])
def test_a_frozen_player_keeps_weights_and_averages(kind, player, field, digits):
    gan = make(kind, **{field: 0}, init_output_bias=False)
    frozen, moving = (gan.discriminator, gan.generator)[:: 1 if player == "D" else -1]
    before = weights(frozen), weights(moving)
    history = gan.train(1, data=digits, callbacks=[])
    assert (torch.equal(weights(frozen), before[0]), torch.equal(weights(moving), before[1])) == (True, False)
    assert history[f"grad_{player}"] == history[f"update_ratio_{player}"] == [0]
    gan.reconfigure(**{field: 1})
    gan.train(1, data=digits, callbacks=[])
    assert not torch.equal(weights(frozen), before[0])


# ----------------------------------------------------------------------------------------------- what training draws
def test_every_epoch_shows_each_image_once_in_another_order():
    number, orders = torch.arange(96), {}
    flat = number.to(torch.uint8)[:, None, None].expand(96, 28, 28)  # each as bright as its place says
    for seed in (1, 1, 2):
        gan = make(seed=seed)
        batches = batches_of(gan)
        gan.train(2, data=(flat, number % 10), callbacks=[])
        seen = torch.cat([(real[:, 0, 0, 0] * 127.5 + 127.5).round().long() for ((real, _),) in batches])
        assert torch.equal(torch.cat([labels for ((_, labels),) in batches]), seen % 10)  # labels go with images
        epochs = seen[:96].tolist(), seen[96:].tolist()
        assert sorted(epochs[0]) == sorted(epochs[1]) == number.tolist()
        assert epochs[0] != epochs[1]
        for epoch in epochs:  # shuffled over the whole epoch, not within its batches
            assert abs(torch.corrcoef(torch.tensor([epoch, number.tolist()]).float())[0, 1]) < 0.4
        assert orders.setdefault(seed, epochs) == epochs
    assert orders[1] != orders[2]


def test_training_and_sampling_draw_normal_noise(digits):
    gan = make(du.StableDCGAN, nz=64)
    z = inputs_of(gan.generator)
    gan.train(2, data=digits, callbacks=[])
    drawn = torch.cat([inputs[0] for inputs in z])
    assert len(drawn.unique(dim=0)) == 192
    for sample in (drawn, gan.latent(192), gan.latent(192, seed=3)):  # 12,288 numbers each
        assert abs(sample.mean()) < 0.05
        assert sample.std().item() == pytest.approx(1, abs=0.05)
        assert sample.pow(4).mean().item() == pytest.approx(3, abs=0.4)  # of uniform numbers 1.8


@pytest.mark.parametrize("kind", [FastCrossEntropy, du.DCGAN])
def test_d_sees_real_and_fake_through_noise_alike(kind):
    gan = make(kind, instance_noise=0.5, lr_G=0.0)
    fill(gan.generator, 0.0)  # images without any detail
    seen = inputs_of(gan.discriminator)
    gan.train(1, data=(torch.full((48, 28, 28), 127, dtype=torch.uint8), torch.arange(48) % 10), callbacks=[])
    assert len(seen) == 9  # real, fake, and fake again in G's step
    assert [images.std().item() for images, *_ in seen] == pytest.approx([0.5] * 9, rel=0.06)
    assert len({images[0, 0, 0, 0].item() for images, *_ in seen}) == 9
    gan.reconfigure(instance_noise_batches=100)  # it fades
    for gan.step, std in ((0, 0.5), (50, 0.25), (90, 0.05), (100, 0), (200, 0)):
        assert gan.noisy(torch.zeros(64, 1, 28, 28)).std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_all_and_a_cut_epoch_goes_on_as_if_it_were_whole(kind, digits, tmp_path):
    whole, cut, other = (make(kind, instance_noise=0.1, ema_decay=0.9, seed=seed) for seed in (42, 42, 7))
    for gan in (whole, other):
        gan.train(2, data=digits, callbacks=[])
    assert not same(whole, other)
    cut.train(2, data=digits, callbacks=[du.StopAt(4)])
    assert (cut.epoch, cut.batch, cut.history["epoch"]) == (0, 4, [pytest.approx(4 / 6)])
    for gan in (cut, kind.load(cut.save(tmp_path / "cut"))):
        gan.train(2, data=digits, callbacks=[])
        assert same(whole, gan)
        assert torch.equal(weights(whole.average), weights(gan.average))
        assert gan.history["epoch"] == [1, 2]
        for name in ("loss_G", "D_G_z_std"):
            assert gan.history[name] == pytest.approx(whole.history[name], rel=1e-9)


# ----------------------------------------------------------------------------------------------- average and schedules
def test_the_average_follows_g_and_is_what_samples_are_made_by(digits):
    gan = make(ema_decay=0.9)
    expected = [p.detach().clone() for p in gan.generator.parameters()]

    def follow(gan):
        decay = min(0.9, gan.step / (9 + gan.step))  # step is raised after the update
        for mine, p in zip(expected, gan.generator.parameters(), strict=True):
            mine.lerp_(p.detach(), 1 - decay)

    gan.train(1, data=digits, callbacks=[after(follow)])
    for mine, p in zip(expected, gan.average.parameters(), strict=True):
        torch.testing.assert_close(p, mine, atol=1e-5, rtol=1e-4)
    z = gan.latent(4, seed=1)
    with torch.no_grad():
        by_average, by_generator = (net.eval()(z, torch.arange(4)) for net in (gan.average, gan.generator))
    assert not torch.allclose(by_average, by_generator, atol=1e-3)
    for images in (gan.generate(z), gan.sample(4, seed=1), gan.generate(z, [0, 1, 2, 3])):
        torch.testing.assert_close(images, by_average)
    assert make(du.DCGAN).average is make(du.StableDCGAN).average is None


def test_rates_are_constant_then_fall_to_the_last_batch(digits):
    seen = []
    gan = make(num_epochs=2, lr_G=0.01, lr_D=0.02)
    note = after(lambda gan: seen.append([part.param_groups[0]["lr"] for part in (gan.optimizer_G, gan.optimizer_D)]))
    gan.train(data=digits, callbacks=[note])
    left = [1.0] * 7 + [(12 - k) / 6 for k in range(7, 12)]  # by what is done before each of the twelve batches
    for rates, full in zip(zip(*seen, strict=True), (0.01, 0.02), strict=True):
        assert rates == pytest.approx([full * share for share in left])


def test_a_time_limit_ends_the_run_and_its_schedule(digits):
    gan, seen = make(lr_G=0.01), []
    gan.train(10_000, data=digits, max_seconds=0.4, callbacks=[after(lambda gan: seen.append(float(gan.lr_factor)))])
    assert "max_seconds" in gan.stop_reason
    assert 0.4 <= gan.elapsed < 5
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 1
    assert min(seen) < 0.9  # a batch may take long on a busy machine


def test_changes_act_from_the_next_batch_and_built_in_ones_are_refused(digits):
    gan = make(du.StableDCGAN)
    change = after(lambda gan: gan.reconfigure(batch_size=32, lr_G=0.05, beta1=0.3), step=2)
    gan.train(1, data=digits, callbacks=[change])
    assert gan.step == 2 + 64 // 32
    assert [gan.optimizer_G.param_groups[0][name] for name in ("lr", "betas")] == [0.05, (0.3, 0.999)]
    gan.reconfigure(real_label_smooth=1.0)
    assert gan.loss.labels[0] == gan.history.loss.labels[0] == 1.0
    for field, value in (("ngf", 8), ("seed", 1), ("precision", "bf16"), ("ema_decay", 0.9)):
        with pytest.raises(ValueError, match=f"{field} is built in; make a new StableDCGAN"):
            gan.reconfigure(**{field: value})
    with pytest.raises(ValueError, match="one iteration needs 128 images"):  # while they are trained on
        gan.train(1, callbacks=[after(lambda gan: gan.reconfigure(batch_size=128))])
    assert gan.config.batch_size == gan.history.config.batch_size == 32
    gan.reconfigure(batch_size=128)  # the next call may bring more


# ----------------------------------------------------------------------------------------------- the loop
def test_callbacks_are_told_in_order_and_may_lack_methods(digits):
    class Listens:
        def __getattr__(self, name):
            return lambda gan: calls.append(name.removeprefix("on_"))

    calls, epoch, plain = [], ["batch_end", "batch_end", "epoch_end"], SimpleNamespace()
    plain.on_epoch_end = lambda gan: calls.append(gan.epoch)
    make(batch_size=48).train(2, data=digits, callbacks=[Listens(), plain])
    assert calls == ["train_begin", *epoch, 1, *epoch, 2, "train_end"]


@pytest.mark.parametrize(("event", "ended"), [
    ("on_train_begin", [0, 1]), ("on_batch_end", [0, 1, 2]), ("on_epoch_end", [0, 1, 2]), ("on_train_end", [0, 2]),
])  # fmt: skip
def test_every_callback_that_began_ends(event, ended, digits):
    said, callbacks, gan = [], [du.Callback() for _ in range(3)], make()
    for number, callback in enumerate(callbacks):
        callback.on_train_end = lambda gan, number=number: said.append(number)
    setattr(callbacks[1], event, lambda gan: gan.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        gan.train(1, data=digits, callbacks=callbacks)
    assert (sorted(said), gan.is_training) == (ended, False)


@pytest.mark.parametrize("where", ["thread", "callback"])
def test_a_second_trainer_is_refused_and_the_first_goes_on(where, digits):
    said, plain, gan = [], make(), make()

    def second(*_):
        try:
            gan.train(1, data=digits, callbacks=[])
        except RuntimeError as error:
            said.append(str(error))

    act = second if where == "callback" else lambda gan: ThreadPoolExecutor(1).submit(second).result()
    plain.train(1, data=digits, callbacks=[])
    gan.train(1, data=digits, callbacks=[after(act, step=2)])
    assert ["training already" in line and "\n" not in line for line in said] == [True]
    assert same(gan, plain)
    second()  # now it is free
    assert (len(said), gan.epoch) == (1, 2)


def test_ctrl_c_stops_after_the_batch_and_keeps_everything(digits):
    before, gan = signal.getsignal(signal.SIGINT), make()
    press = after(lambda gan: os.kill(os.getpid(), signal.SIGINT), step=3)
    history = gan.train(5, data=digits, callbacks=[press])
    assert gan.step in (3, 4)  # the signal may arrive one batch later
    assert gan.stop_reason == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    gan.train(1, data=digits, callbacks=[])
    assert history["epoch"] == [1]


@pytest.mark.parametrize("kind", [du.StableDCGAN, du.FastDCGAN])
@pytest.mark.parametrize(("player", "step"), [("discriminator", 8), ("generator", 8), ("generator", 12)])
def test_a_loss_that_is_no_number_stops_the_run(kind, player, step, digits):
    """A generator that the last update of an epoch broke shows in its samples only."""
    gan, where = make(kind, ema_decay=0.0), "batch 3" if step == 8 else "its last batch"
    gan.last_checkpoint = Path("kept/here")
    with pytest.raises(du.DivergenceError, match=rf"epoch 2, {where}:.*kept.here"):
        gan.train(2, data=digits, callbacks=[after(lambda gan: fill(getattr(gan, player), math.nan), step)])
    assert gan.history["epoch"] == [1]
    assert not gan.history.finite()
    with pytest.raises(du.DivergenceError):  # and it stays so
        gan.train(1, data=digits, callbacks=[])


def test_ones_own_generator_is_what_trains(digits):
    gan = make()
    gan.train(1, data=digits, callbacks=[du.StopAt(2)])
    old, kept = gan.generator, gan.optimizer_D
    mine = gan.generator = du.FastGenerator(gan.config)
    before, far = (weights(old), weights(mine)), []
    measure = after(lambda gan: far.extend((weights(net) - weights(gan.average)).norm() for net in (mine, old)), step=3)
    gan.train(1, data=digits, callbacks=[measure])
    assert (torch.equal(weights(old), before[0]), torch.equal(weights(mine), before[1])) == (True, False)
    assert gan.optimizer_D is kept  # D goes on as it was
    assert far[0] < far[1] / 10  # the average is of mine


@pytest.mark.parametrize(("name", "values"), [
    ("epochs", [1.5, -1, "3"]), ("max_seconds", [0, -1, math.nan]),
    ("epochs", [math.nan]), ("epochs", [math.inf]),
])  # fmt: skip
def test_a_length_that_cannot_be_is_refused(name, values, digits):
    for value in values:
        gan = make()
        with pytest.raises(ValueError, match=f"{name} = {value!r}; it must be"):
            gan.train(**{"epochs": 1, name: value}, data=digits, callbacks=[])
        assert (gan.step, gan.is_training) == (0, False)


def test_a_run_that_is_done_says_so_and_a_started_epoch_is_finished(digits):
    gan = make(num_epochs=1)
    gan.train(2, data=digits, callbacks=[du.StopAt(8)])
    assert (gan.epoch, gan.batch) == (1, 2)
    gan.train(data=digits, callbacks=[])
    assert (gan.epoch, gan.batch, gan.step) == (2, 0, 12)
    with pytest.warns(UserWarning, match="all 2 epochs are done"):
        gan.train(data=digits, callbacks=[])
    assert gan.step == 12


# ----------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize(("data", "message"), [
    (lambda x, y: (x[:8], y[:8]), r"needs 32 images.*hold 8.*at most 8"),
    (lambda x, y: (x[:1], y[:1]), r"the data hold 1; get more"),
    (lambda x, y: x, r"class-conditional.*none"),
    (lambda x, y: (x, torch.arange(96)), r"class-conditional.*have 0 … 95"),
    (lambda x, y: (x[:, None].expand(-1, 3, -1, -1), y), r"3 channels.*Config\.channels is 1"),
])  # fmt: skip
def test_data_that_do_not_fit_are_refused_and_not_kept(data, message, digits):
    gan = make()
    with pytest.raises(ValueError, match=message):
        gan.train(1, batch_size=32, data=data(*digits), callbacks=[])
    assert (gan.images, gan.config.batch_size, gan.is_training) == (None, 16, False)
    gan.train(1, data=digits, callbacks=[])
    assert gan.step == 6


def test_writing_into_ones_images_does_not_change_the_training(digits):
    plain = make(du.StableDCGAN)
    plain.train(1, data=digits[0], callbacks=[])
    for images in (digits[0].clone(), digits[0].numpy().copy()):
        gan = make(du.StableDCGAN)
        erase = after(lambda gan, images=images: images.__setitem__(slice(None), 0), step=2)
        gan.train(1, data=images, callbacks=[erase])
        assert same(plain, gan)


def test_the_same_data_are_taken_once_and_others_begin_the_epoch_anew(digits, monkeypatch):
    resized, resize = [], du.resize_images
    monkeypatch.setattr("dcgan.sampling.resize_images", lambda x, size: resized.append(len(x)) or resize(x, size))
    images, labels, gan = digits[0].clone(), digits[1], make(du.ConditionalDCGAN)
    gan.train(1, data=(images, labels), callbacks=[du.StopAt(2)])
    assert gan.images.shape == (96, 16, 16)
    for data in (None, (images, labels), [images, labels]):  # a new tuple of the same tensors
        gan.train(1, data=data, callbacks=[du.StopAt(gan.step + 1)])
    assert (resized, gan.step, gan.position) == ([96], 5, 80)
    gan.train(1, data=(images.clone(), labels), callbacks=[])  # equal ones: the epoch is finished
    assert (resized, gan.step, gan.history["epoch"]) == ([96, 96], 6, [1])
    gan.train(1, data=(images, labels), callbacks=[du.StopAt(8)])
    images[:] = 255 - images  # others in the same place
    gan.train(1, data=(images, labels), callbacks=[du.StopAt(10)])
    assert (resized, gan.position) == ([96] * 4, 32)
    gan.train(1, data=(images[:32], labels[:32]), callbacks=[])
    assert (gan.step, gan.history["epoch"]) == (12, [1, 2])
    monkeypatch.setattr("dcgan.sampling.as_images", lambda name: du.as_images(digits))
    for data, name in ((None, None), ("kmnist", "kmnist"), (None, "kmnist")):  # None: as before
        gan.train(1, data=data, callbacks=[])
        assert (gan.data_name, len(gan.images)) == (name, 96 if name else 32)


# ----------------------------------------------------------------------------------------------- the record
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_one_line_of_finite_numbers(kind, digits):
    gan = make(kind, log_every=2)
    history = gan.train(2, data=digits, callbacks=[])
    norms = {"D": gan.discriminator, "G": gan.generator}
    without = {f"update_ratio_BN_{k}" for k, net in norms.items() if "running_mean" not in str(net.state_dict().keys())}
    without |= set() if gan.config.gradient_penalty else {"gradient_norm"}
    for name, values in history.items():
        known = [value is None if name in without else math.isfinite(value) for value in values]
        assert known == [True] * 2, name
    positive = ("grad_D", "grad_G", "D_std", "D_G_z_std", "update_ratio_D", "update_ratio_G", "seconds")
    assert all(value > 0 for name in positive for value in history[name])
    assert (history["grad_G_after_D_step"], history["epoch"]) == ([0, 0], [1, 2])
    assert history.batches["step"] == [2, 4, 6, 8, 10, 12]  # 96 images are 6 batches of 16
    for name in du.METRICS:
        assert history[name][0] == pytest.approx(sum(history.batches[name][:3]) / 3, rel=1e-6, abs=1e-9)
    assert history["images_per_second"][1] * history["seconds"][1] == pytest.approx(96, rel=1e-6)


@pytest.mark.parametrize("log_every", [1, 7, 100])
@pytest.mark.parametrize(("course", "std"), [
    (lambda k: 0.1 + 0.008 * k, 0.008 / math.sqrt(2)),  # a ramp: hardly anything
    (lambda k: 0.5 + 0.3 * (-1) ** k, 0.3 * math.sqrt(2)),
    (lambda k: 0.5 + 0.2 * math.sin(2.4 * k), 0.2 * math.sin(1.2)),
])  # fmt: skip
def test_d_g_z_std_measures_swings_and_not_a_trend(course, std, log_every, digits):
    gan, place = make(du.StableDCGAN, batch_size=2, log_every=log_every), du.METRICS.index("D_G_z")
    gan.train_step = lambda batches: torch.eye(len(du.METRICS))[place] * course(gan.step % 48)
    assert gan.train(2, data=digits, callbacks=[])["D_G_z_std"] == pytest.approx([std, std], rel=0.1, abs=1e-6)


def filled(epochs):
    """Return a history of so many epochs of three batches each, all values different."""
    known = du.History(du.Config())
    lines = {name: [e + k / 100 for e in range(epochs)] for k, name in enumerate(known)}
    batches = {name: [b + k / 100 for b in range(3 * epochs)] for k, name in enumerate(known.batches)}
    lines["epoch"], batches["epoch"] = [e + 1 for e in range(epochs)], [(b + 1) / 3 for b in range(3 * epochs)]
    return du.History(du.Config(), lines, batches)


def test_a_line_holds_what_was_measured_and_until_what_was_known():
    history = filled(4)
    history["update_ratio_BN_D"][-1] = None
    known = {name: values[3] for name, values in history.items() if name != "update_ratio_BN_D"}
    assert history.line() == history.line(3) == history.last() == known
    assert history.line(4) == history.line(-5) == du.History(du.Config()).last() == {}
    for epochs in range(4):
        then = history.until(epochs)
        assert (then, then.batches) == (filled(epochs), filled(epochs).batches)
    then["loss_D"][0] = then.batches["loss_D"][0] = -1.0  # it is a copy
    assert (history["loss_D"], history.batches["loss_D"]) == (filled(4)["loss_D"], filled(4).batches["loss_D"])


def test_readings_of_ones_own_stand_in_step_with_the_epochs(digits):
    callback, gan = du.Callback(), make()
    callback.on_epoch_end = lambda gan: gan.epoch == 2 or gan.history.record("mine", torch.tensor(float(gan.epoch)))
    with pytest.raises(ValueError, match="mine: no epoch has ended yet"):
        gan.history.record("mine", 1.0)
    gan.train(3, data=digits, callbacks=[callback])
    gan.train(1, data=digits, callbacks=[du.StopAt(20)])
    assert gan.history["mine"] == [1, None, 3, None]
    gan.train(1, data=digits, callbacks=[callback])  # finishes the epoch that was cut short
    assert {len(values) for values in gan.history.values()} == {4}
    assert json.loads(json.dumps(gan.history.to_json()))["epochs"]["mine"] == [1, None, 3, 4]


def test_a_history_survives_json_and_an_older_one_is_read():
    history = filled(2)
    history.record("frechet", 7.0)
    history.diverged = "epoch 3, batch 1"
    record = json.loads(json.dumps(history.to_json()))
    again = du.History.from_json(record)
    assert (dict(again), again.batches, again.config) == (dict(history), history.batches, history.config)
    assert (again.diverged, again.finite()) == ("epoch 3, batch 1", False)
    again["loss_D"].append(9.0)  # which leaves the record alone
    old = {"grad_G_after_D_step": "leak", "D_gap": "gap", "D_G_z_std": "swing", "update_ratio_BN_G": "move_BN_G",
           "pixel_std_ratio": "diversity", "nn_distance_ratio": "spacing", "frechet": "fid"}  # fmt: skip
    for part in ("epochs", "batches"):  # an older version's: other names, and fewer
        record[part] = {old.get(name, name): v for name, v in record[part].items() if name != "D_std"}
    record["config"]["d_steps"] = record["config"].pop("n_critic") + 2
    del record["diverged"]
    older = du.History.from_json(record)
    assert (older["D_std"], older.batches["D_std"], older.config.n_critic) == ([None] * 2, [None] * 6, 3)
    assert {**older, "D_std": history["D_std"]} == history
    assert older.batches["D_gap"] == history.batches["D_gap"]


@pytest.mark.parametrize("name", du.METRICS)
def test_a_history_is_finite_while_its_newest_batches_are(name):
    history = filled(2)
    history.batches[name][0] = math.nan  # long ago
    for newest, finite in ((math.nan, False), (-math.inf, False), (None, True), (1.0, True)):  # None: not measured
        history.batches[name][-1] = newest
        assert history.finite() == finite


# ----------------------------------------------------------------------------------------------- and it learns
def test_a_narrow_gan_learns_the_digits_that_one_asks_for(mnist_test):
    """Over seeds all ten classes, variety 0.43 to 0.50, and D tells 95 % of the pairs of real and fake apart."""
    images, labels = (part[:3200] for part in mnist_test)
    gan = make(ngf=8, ndf=8, nz=64, batch_size=32, num_epochs=1)
    gan.train(data=(images, labels), callbacks=[])
    asked = torch.arange(10).repeat_interleave(30)
    made = gan.sample(300, seed=0, digits=asked).view(10, 30, -1).mean(dim=1)
    real = torch.stack([du.normalize(images[labels == digit]).flatten(1).mean(dim=0) for digit in range(10)])
    likeness = torch.corrcoef(torch.cat([made - made.mean(dim=0), real - real.mean(dim=0)]))[:10, 10:]
    assert (likeness.argmax(dim=1) == torch.arange(10)).sum() >= 8  # untrained: about 1 of 10
    assert gan.history["pixel_std_ratio"][-1] > 0.3  # within each digit; one image a digit would give 0
    new, shown = mnist_test[0][-500:], mnist_test[1][-500:]  # D has seen none of these
    fake = gan.score(gan.sample(500, seed=1), torch.arange(500) % 10)
    assert (gan.score(du.normalize(new), shown)[:, None] > fake).float().mean() > 0.85
