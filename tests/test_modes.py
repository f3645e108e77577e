"""Images of several channels, packs of images, stacked MNIST and its 1000 modes; and the study that counts them."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import make, same, weights

import dcgan_utils as du
from dcgan_utils import Config
from tools import mode_study

FREE = {"conditional": False}
STACKS = {"channels": 3, **FREE}


@pytest.fixture(scope="module")
def stacks():
    """Return 96 stacks of three digits and their modes."""
    return du.stacked_mnist(96, "test", seed=1)


@pytest.fixture
def dots(monkeypatch):
    """Let MNIST be a hundred images of one pixel, whose grey names their label: 20 × label + 5."""
    labels = torch.arange(100) % 10
    images = (20 * labels + 5).to(torch.uint8)[:, None, None]
    monkeypatch.setattr(du, "load_images", lambda source, split: (images, labels))
    return images, labels


@pytest.fixture
def reader(monkeypatch):
    """Let the judge read a channel's first pixel as its digit."""
    shapes = []

    def read(images):
        shapes.append(tuple(images.shape))
        return SimpleNamespace(digits=images.flatten(1)[:, 0].round().long())

    monkeypatch.setattr(du, "read_digits", read)
    return shapes


def samples_of(modes):
    """Return stacks of one pixel whose channels are read as these modes."""
    modes = torch.as_tensor(modes)
    return torch.stack([modes // 100, modes // 10 % 10, modes % 10], dim=1).float()[:, :, None, None]


# ----------------------------------------------------------------------------------------------- stacked MNIST
def test_a_stack_is_three_digits_and_its_mode_their_number(dots):
    images, modes = du.stacked_mnist(5000, seed=0)
    assert (images.shape, images.dtype) == ((5000, 3, 1, 1), torch.uint8)
    assert (modes.shape, modes.dtype) == ((5000,), torch.int64)
    read = (images[:, :, 0, 0].long() - 5) // 20
    assert torch.equal(modes, 100 * read[:, 0] + 10 * read[:, 1] + read[:, 2])


def test_all_modes_are_about_as_frequent(dots):
    images, modes = du.stacked_mnist()
    assert len(images) == len(modes) == 128_000
    counts = torch.bincount(modes, minlength=1000)
    assert len(counts) == 1000
    assert (counts - 128).abs().max() < 6 * math.sqrt(128)
    chi = ((counts - 128.0) ** 2 / 128).sum().item()
    assert chi == pytest.approx(999, abs=5 * math.sqrt(2 * 999))


def test_the_stacks_follow_from_their_seed_alone(dots):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (du.stacked_mnist(200, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_stacks_are_made_of_real_digits(mnist_test, stacks):
    images, modes = stacks
    assert images.shape == (96, 3, 28, 28)
    digits = du.read_digits(du.normalise(images).flatten(0, 1)[:, None]).digits.view(-1, 3)
    assert ((digits * torch.tensor([100, 10, 1])).sum(dim=1) == modes).float().mean() > 0.95  # the judge errs rarely
    originals = {image.numpy().tobytes() for image in mnist_test[0]}
    assert all(image.numpy().tobytes() in originals for image in images.flatten(0, 1))


# ----------------------------------------------------------------------------------------------- how many modes show
@pytest.mark.parametrize(
    ("modes", "found", "kl"),
    [
        ([427] * 50, 1, math.log(1000)),
        (range(1000), 1000, 0.0),
        ([*range(1000)] * 3, 1000, 0.0),
        (range(0, 1000, 2), 500, math.log(2)),
        ([5, 5, 5, 990], 2, math.log(1000) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
    ],
)
def test_modes_and_divergence_in_closed_form(modes, found, kl, reader):
    coverage = du.mode_coverage(samples_of(list(modes)))
    assert set(coverage) == {"modes", "kl"}
    assert (type(coverage["modes"]), type(coverage["kl"])) == (int, float)
    assert coverage["modes"] == found
    assert coverage["kl"] == pytest.approx(kl, abs=1e-5)
    assert reader == [(3 * len(modes), 1, 1, 1)]  # every channel by itself


def test_real_stacks_diverge_by_chance_alone(reader):
    """n draws of 1000 equal shares: (1000 - 1) / 2n nats on the average."""
    n = 26_000
    rng = torch.Generator().manual_seed(0)
    coverage = du.mode_coverage(samples_of(torch.randint(1000, (n,), generator=rng)))
    assert coverage["modes"] == 1000
    assert coverage["kl"] == pytest.approx(999 / (2 * n), rel=0.15)


def test_the_judge_reads_real_stacks(stacks):
    images, modes = stacks
    coverage = du.mode_coverage(du.normalise(images))
    assert coverage["modes"] == pytest.approx(len(modes.unique()), abs=4)
    assert coverage["kl"] == pytest.approx(math.log(1000 / len(modes)), abs=0.15)  # nearly all of them once
    alike = du.mode_coverage(du.normalise(images[:1]).expand(40, -1, -1, -1))
    assert alike["modes"] == 1
    assert alike["kl"] == pytest.approx(math.log(1000), abs=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 28, 28), (8, 28, 28), (8, 2, 28, 28), (3, 28)])
def test_samples_that_are_no_stacks_are_refused(shape):
    with pytest.raises(ValueError, match=r"needed is \(n, 3, H, H\)") as caught:
        du.mode_coverage(torch.zeros(shape))
    assert str(shape) in str(caught.value)


# ----------------------------------------------------------------------------------------------- channels
@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN, du.WGANGP])
@pytest.mark.parametrize("channels", [2, 3])
def test_images_of_several_channels(kind, channels):
    gan = make(kind, channels=channels, **FREE)
    side = gan.config.image_size
    images = gan.generator(torch.randn(6, 8))
    assert images.shape == (6, channels, side, side)
    assert images.abs().max() <= 1
    assert not torch.equal(images[:, 0], images[:, 1])
    logits = gan.discriminator(images)
    assert logits.shape == (6,)
    blank = images.clone()
    blank[:, -1] = 0
    assert not torch.equal(gan.discriminator.eval()(images), gan.discriminator(blank))  # D looks at the last one too
    assert gan.sample(5, seed=0).shape == gan.fixed_samples(5).shape == (5, channels, side, side)


def test_labels_go_with_channels():
    for way in ("projection", "matching", "concatenation", "auxiliary"):
        gan = make(du.FastDCGAN, channels=3, conditioning=way)
        first = next(m for m in gan.discriminator.modules() if isinstance(m, torch.nn.Conv2d))
        assert first.in_channels == (4 if way == "concatenation" else 3)
        images = gan.generator(torch.randn(4, 8), torch.arange(4))
        assert images.shape == (4, 3, 28, 28)
        assert du.real_logit(gan.discriminator(images, torch.arange(4))).shape == (4,)


@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN])
def test_data_of_another_number_of_channels_are_refused(kind, stacks, mnist_small):
    with pytest.raises(ValueError, match=r"the images have 1 channels .*Config\.channels is 3"):
        make(kind, **STACKS).train(1, data=mnist_small[0], callbacks=[])
    with pytest.raises(ValueError, match=r"the images have 3 channels .*Config\.channels is 1"):
        make(kind, **FREE).train(1, data=stacks[0], callbacks=[])


@pytest.mark.parametrize("kind", [du.StableDCGAN, du.ProgressiveGAN])
@pytest.mark.parametrize("field", ["channels", "pack"])
def test_recipes_of_grey_images_refuse_more(kind, field):
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*channels and pack must be 1") as caught:
        make(kind, **{field: 2})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["channels", "pack"])
def test_what_shapes_the_networks_is_built_in(field):
    with pytest.raises(ValueError, match=f"{field} is built in"):
        make(du.FastDCGAN, **FREE).reconfigure(**{field: 2})


def test_a_grey_image_may_name_its_one_channel(mnist_small):
    """(N, 1, H, W) is (N, H, W), to the bit."""
    images, labels = mnist_small[0][:96], mnist_small[1][:96]
    plain, named = make(), make()
    plain.train(1, data=(images, labels), callbacks=[])
    named.train(1, data=(images[:, None], labels), callbacks=[])
    assert same(plain, named)
    assert torch.equal(plain.real_samples(8), named.real_samples(8))
    assert plain.history["diversity"] == named.history["diversity"]


@pytest.mark.parametrize("size", [16, 32])
def test_channels_are_resized_each_by_itself(size, stacks):
    images = stacks[0][:5]
    resized = du.resize_images(images, size)
    assert (resized.shape, resized.dtype) == ((5, 3, size, size), torch.uint8)
    for channel in range(3):
        assert torch.equal(resized[:, channel], du.resize_images(images[:, channel], size))
    assert du.resize_images(images, 28) is images
    assert torch.equal(du.normalise(images)[:, 1], du.normalise(images[:, 1])[:, 0])
    assert du.normalise(images).shape == (5, 3, 28, 28)


def test_the_judge_reads_grey_images_with_or_without_their_one_channel(mnist_small):
    images = mnist_small[0][:64]
    plain, named = du.read_digits(images), du.read_digits(images[:, None])
    assert torch.equal(plain.features, named.features)
    assert (named.digits == mnist_small[1][:64]).float().mean() > 0.95


def test_the_judge_refuses_stacks(stacks):
    """In one line, whether they come as data, as samples or by way of a GAN that makes them."""
    for images in (stacks[0], du.normalise(stacks[0])):
        with pytest.raises(ValueError, match=r"needed is \(n, 1, H, H\)|\(N, H, W\)"):
            du.read_digits(images)
    gan = make(du.FastDCGAN, **STACKS)
    gan.train(1, data=torch.cat([stacks[0]] * 3), callbacks=[])
    with pytest.raises(ValueError, match=r"needed is|\(N, H, W\)") as caught:
        gan.evaluate(100)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- packs
@pytest.mark.parametrize("kind", [du.DCGAN, du.FastDCGAN, du.WGANGP])
@pytest.mark.parametrize(("channels", "pack"), [(1, 2), (3, 2), (1, 4)])
def test_d_has_one_answer_for_a_pack(kind, channels, pack):
    gan = make(kind, channels=channels, pack=pack, **FREE)
    images = torch.randn(16, channels, gan.config.image_size, gan.config.image_size)
    D = gan.discriminator.eval()
    assert D(images).shape == (16 // pack,)
    seen = D.seen(images, None)
    for number in range(16 // pack):  # neighbours of the batch, one after the other
        assert torch.equal(seen[number], torch.cat(list(images[number * pack : (number + 1) * pack])))
    other = images.clone()
    other[pack - 1] = -other[pack - 1]  # the last of the first pack
    changed = ~torch.isclose(D(images), D(other), atol=1e-7)
    assert changed.tolist() == [True] + [False] * (16 // pack - 1)


def test_the_slope_of_a_pack_is_that_of_all_its_images():
    gan = make(du.FastDCGAN, pack=2, **FREE)
    images = torch.randn(6, 1, 28, 28).requires_grad_()
    D = gan.discriminator.eval()
    slopes = du.slopes(D, images, None)
    assert slopes.shape == (3,)
    for number, slope in enumerate(slopes):
        (gradient,) = torch.autograd.grad(D(images)[number], images)
        assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert gradient[2 * number : 2 * number + 2].norm() == pytest.approx(gradient.norm().item())


@pytest.mark.parametrize("loss", ["bce", "relativistic", "wasserstein"])
def test_packs_train_with_every_kind_of_loss(loss, stacks):
    penalty = {"gradient_penalty": 0.0 if loss == "bce" else 1.0, "penalty_every": 2, "batch_norm_D": False}
    gan = make(du.FastDCGAN, loss=loss, pack=4, **STACKS, **penalty)
    history = gan.train(2, data=stacks[0], callbacks=[])
    assert all(math.isfinite(history[name][-1]) for name in du.METRICS)
    assert min(history["move_D"][0], history["move_G"][0]) > 1e-4
    assert gan.diagnose().findings


@pytest.mark.parametrize(("pack", "batch_size", "n"), [(3, 15, 96), (2, 16, 95), (5, 20, 96)])
def test_a_penalty_goes_with_packs_that_the_data_do_not_fill(pack, batch_size, n, stacks):
    """The slope of every epoch is read at so many images as make whole packs."""
    gan = make(du.FastDCGAN, pack=pack, batch_size=batch_size, **STACKS)
    history = gan.train(1, data=stacks[0][:n], callbacks=[])
    assert 0 < history["slope"][0] < math.inf


@pytest.mark.parametrize(("pack", "n"), [(2, 20), (3, 21), (3, 600)])
def test_every_image_of_a_pack_has_its_score(pack, n):
    gan = make(du.FastDCGAN, pack=pack, batch_size=6 * pack, **FREE)
    images = gan.sample(n, seed=0)
    scores = gan.score(images)
    assert scores.shape == (n,)
    with torch.no_grad():
        answers = gan.discriminator.eval()(images)
    assert torch.allclose(scores.view(-1, pack), answers[:, None].expand(-1, pack), atol=1e-5)
    with pytest.raises(ValueError, match="pack"):
        gan.score(images[:-1])


@pytest.mark.parametrize("pack", [2, 3])
def test_packs_can_be_looked_at(pack, stacks):
    gan = make(du.FastDCGAN, pack=pack, batch_size=6 * pack, gradient_penalty=0.0, **FREE)
    gan.train(1, data=stacks[0][:, 0], callbacks=[])
    look = du.take_look(gan)
    assert len(look.images) == len(look.scores) >= 18
    assert du.figure_png(du.plot_look(look, gan.history))[:4] == b"\x89PNG"


# ----------------------------------------------------------------------------------------------- saving and showing
@pytest.mark.parametrize(
    ("kind", "fields"),
    [(du.FastDCGAN, STACKS), (du.DCGAN, {"channels": 3, "pack": 2}), (du.FastDCGAN, {**STACKS, "pack": 2})],
)
def test_stacks_train_are_saved_and_go_on_bit_for_bit(kind, fields, stacks, tmp_path):
    options = {"num_epochs": 3, "noise_D": 0.1, "dropout_D": 0.1, **fields}
    whole, half = make(kind, **options), make(kind, **options)
    whole.train(3, data=stacks[0], callbacks=[])
    half.train(1, data=stacks[0], callbacks=[])
    half.save(tmp_path / "half")
    resumed = du.GAN.load(tmp_path / "half")
    assert type(resumed) is kind
    assert (resumed.config.channels, resumed.config.pack) == (3, fields.get("pack", 1))
    assert torch.equal(resumed.sample(3, seed=0), half.sample(3, seed=0))
    resumed.train(data=stacks[0], callbacks=[])
    assert same(whole, resumed)
    assert resumed.history["loss_D"] == whole.history["loss_D"]
    assert not torch.equal(weights(half.generator), weights(resumed.generator))


def test_a_checkpoint_from_before_channels_and_packs_is_grey_and_judged_one_by_one(mnist_small, tmp_path):
    gan = make(du.DCGAN)
    gan.train(1, data=mnist_small[0][:64], callbacks=[])
    gan.save(tmp_path / "old")
    state = tmp_path / "old" / "state.json"
    record = json.loads(state.read_text())
    for config in (record["config"], record["history"]["config"]):
        for name in ("channels", "pack", "penalty_every"):
            config.pop(name, None)
    state.write_text(json.dumps(record))
    again = du.GAN.load(tmp_path / "old")
    assert (again.config.channels, again.config.pack, again.config.penalty_every) == (1, 1, 1)
    assert same(gan, again)


def test_stacks_are_shown_and_not_judged_as_digits(stacks, tmp_path, capsys):
    """The recipe's own callbacks run: grids in colour, no reading of classes that are none."""
    gan = make(du.FastDCGAN, **STACKS, out_dir=str(tmp_path))
    assert not any(isinstance(callback, du.JudgeSamples) for callback in gan.default_callbacks())
    assert any(isinstance(callback, du.JudgeSamples) for callback in make().default_callbacks())
    gan.train(1, data=stacks[0])
    assert "class_gap" not in gan.history
    assert list(tmp_path.rglob("*.png"))
    grid = du.plot_images(gan.fixed_samples(6)).axes[0].images[0].get_array()
    assert grid.shape[2] == 3
    assert (grid[..., 0] != grid[..., 1]).any()  # in colour


# ----------------------------------------------------------------------------------------------- tools/mode_study.py
def clocked(monkeypatch, seconds):
    """Let the study read these seconds of CPU time, one after the other."""
    times = iter(seconds)
    monkeypatch.setattr(mode_study.time, "process_time", lambda: next(times))


def test_the_course_counts_training_alone(monkeypatch, capsys):
    """The clock stands still while samples are read: 10 s of training, 90 of reading, 20 of training."""
    clocked(monkeypatch, [100.0, 110.0, 200.0, 220.0, 300.0])
    seen = []
    monkeypatch.setattr(du, "mode_coverage", lambda samples: seen.append(samples) or {"modes": 12, "kl": 4.5})
    gan = make(du.FastDCGAN, **STACKS)
    course = mode_study.Course()
    course.on_train_begin(gan)
    for epoch in (1, 2):
        for name in gan.history:
            gan.history[name].append(float(epoch) if name == "epoch" else None)
        course.on_epoch_end(gan)
    assert gan.history["cpu_seconds"] == pytest.approx([10, 30])
    assert (gan.history["modes"], gan.history["kl"]) == ([12, 12], [4.5, 4.5])
    assert [samples.shape for samples in seen] == [(5000, 3, 28, 28)] * 2
    assert torch.equal(*seen)  # of the same noise
    assert "12 modes" in capsys.readouterr().out
    clocked(monkeypatch, [1000.0, 1005.0, 1006.0])  # another process goes on from the checkpoint
    later = mode_study.Course()
    later.on_train_begin(gan)
    later.on_epoch_end(gan)
    assert gan.history["cpu_seconds"][-1] == pytest.approx(35)


@pytest.fixture
def tiny_study(monkeypatch, tmp_path, stacks):
    """Let the study be one of four channels on 96 stacks, with a judge that sees one mode."""
    tiny = {"ngf": 4, "ndf": 4, "nz": 8, "batch_size": 16, "conditional": False, "channels": 3}
    monkeypatch.setattr(mode_study, "RECIPES", {"ours": ("ours, tiny", du.FastDCGAN, tiny, 2)})
    monkeypatch.setattr(mode_study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(mode_study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(mode_study, "SAMPLES", 60)
    monkeypatch.setattr(du, "stacked_mnist", lambda n=96, split="train", seed=0: stacks)
    monkeypatch.setattr(du, "mode_coverage", lambda samples: {"modes": 1 + len(samples) % 7, "kl": 6.5})
    return tmp_path


def test_a_run_of_the_study_is_kept_and_goes_on(tiny_study):
    first = mode_study.run("ours", epochs=1)
    assert first["epochs"] == 1
    assert first["modes"] == 1 + 60 % 7
    assert first["cpu_minutes"] == pytest.approx(first["course"]["cpu_seconds"][-1] / 60)
    assert first["course"]["modes"] == [1 + 5000 % 7]
    assert (tiny_study / "results" / "ours.png").is_file()
    assert (tiny_study / "runs" / "ours" / "epoch-0001" / "state.json").is_file()
    again = mode_study.run("ours")  # the checkpoint's own number of epochs is done: nothing is trained
    assert again["epochs"] == 1
    assert json.loads(json.dumps(again)) == again
    assert {key: again[key] for key in ("modes", "kl", "cpu_minutes")} == {
        key: first[key] for key in ("modes", "kl", "cpu_minutes")
    }


def test_the_study_writes_what_it_measured(tiny_study, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mode_study.py", "--epochs", "1"])
    threads = torch.get_num_threads()
    try:
        mode_study.main()
        written = (tiny_study / "results" / "table.md").read_text()
        (tiny_study / "results" / "table.md").unlink()
        monkeypatch.setattr(sys, "argv", ["mode_study.py", "--table"])
        mode_study.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tiny_study / "results" / "runs.json").read_text())
    assert set(record) == {"real", "runs"}
    assert record["runs"]["ours"]["config"]["channels"] == 3
    assert (tiny_study / "results" / "table.md").read_text() == written == mode_study.table(record)


def test_the_table_holds_measured_and_published_figures():
    runs = {
        "dcgan": {"epochs": 4, "cpu_minutes": 59.6, "modes": 801, "kl": 1.2345},
        "ours": {"epochs": 6, "cpu_minutes": 41.2, "modes": 1000, "kl": 0.0519},
    }
    text = mode_study.table({"runs": runs, "real": {"modes": 1000, "kl": 0.0196}})
    lines = text.splitlines()
    assert f"| {mode_study.RECIPES['dcgan'][0]} | 4 | 60 | 801 | 1.234 |" in lines
    assert f"| {mode_study.RECIPES['ours'][0]} | 6 | 41 | 1000 | 0.052 |" in lines
    assert "| real test digits | | | 1000 | 0.020 |" in lines
    assert "| PacDCGAN2 | 1000 | 0.06 | PacGAN 2018 |" in lines
    tables = text.split("Published:")
    for part, columns, rows in ((tables[0], 5, 5), (tables[1], 4, 2 + len(mode_study.PUBLISHED))):
        table = [line for line in part.splitlines() if line]
        assert len(table) == rows
        assert {line.count("|") for line in table} == {columns + 1}
    assert text.endswith("|\n")


def test_the_studys_recipes_can_be_made():
    """Each is a Config that training accepts, of 128,000 stacks an epoch and within the published protocol."""
    for name, (what, kind, config, epochs) in mode_study.RECIPES.items():
        made = kind.resolve(**config)
        assert isinstance(made, Config)
        assert (made.channels, made.conditional) == (3, False)
        assert made.pack == (2 if name == "pacgan2" else 1)
        assert 128_000 % made.batch_size == 0
        assert what
        assert epochs >= 1
    assert mode_study.SAMPLES == 26_000
