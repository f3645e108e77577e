"""Evaluation: the classifier, an independent formula beside each metric, real digits spoiled on purpose, bad input."""

import hashlib
import math
import shutil
import struct
import sys
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make, same
from torchvision.transforms.v2 import functional as tvf

import dcgan_utils as du

SCALARS = ("frechet", "kid", "precision", "recall", "density", "coverage", "confidence", "class_entropy", "near_copies")


# ------------------------------------------------------------------------------------------------ what the tests share
@pytest.fixture(scope="module")
def train_digits():
    images, labels = du.load_images("mnist")
    return images[:5000].clone(), labels[:5000].clone()


@pytest.fixture(scope="module")
def few(train_digits):
    return train_digits[0][:300], train_digits[1][:300]


@pytest.fixture(scope="module")
def test_classified(mnist_test):
    return du.classify(mnist_test[0])


@pytest.fixture(scope="module")
def statistics(train_digits, mnist_test):
    """Return what 3,000 training digits score against the first 2,000 test digits."""
    return du.RealStatistics(train_digits[0][:3000], mnist_test[0][:2000], 28, labels=train_digits[1][:3000])


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Move the code into an empty folder, and return the places where it looks for the classifier's weights."""
    (tmp_path / "code" / "data").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    finder = sys.modules[du.load_classifier.__module__].project_file
    monkeypatch.setattr(sys.modules[finder.__module__], "__file__", str(tmp_path / "code" / "module.py"))
    du.load_classifier.cache_clear()
    yield [tmp_path / "data", tmp_path / "code", tmp_path / "code" / "data"]
    du.load_classifier.cache_clear()


@pytest.fixture
def on_disk(tmp_path, few, mnist_test):
    """Return a folder with 250 training and 200 test digits as IDX files."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for stem, (images, labels), n in (("train", few, 250), ("t10k", mnist_test, 200)):
        for kind, values, magic in (("images-idx3", images[:n], 2051), ("labels-idx1", labels[:n], 2049)):
            header = struct.pack(f">{1 + values.ndim}I", magic, *values.shape)
            (folder / f"{stem}-{kind}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())
    return folder


class StopAfterFive(du.Callback):
    def on_batch_end(self, gan):
        if gan.step == 5:
            gan.stop("test")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(n, d=4, seed=0, shift=0.0):
    """Return n points of N(shift, 1) in d dimensions, float64."""
    return torch.randn(n, d, generator=rng(seed), dtype=torch.float64) + shift


def trained(data, *args, **changes):
    gan = make(*args, **changes)
    gan.train(1, data=data, callbacks=[])
    return gan


def add_noise(images, deviation):
    grain = torch.randn(images.shape, generator=rng()) * deviation * 255
    return (images + grain).round().clamp(0, 255).to(torch.uint8)


def blur(images, sigma):
    return tvf.gaussian_blur(images[:, None], 13, sigma)[:, 0]


# ------------------------------------------------------------------------------------------------------- the classifier
def test_the_classifier_is_as_accurate_as_its_file_says(mnist_test, test_classified):
    accuracy = (test_classified.digits == mnist_test[1]).float().mean().item()
    assert accuracy >= 0.994
    assert accuracy == pytest.approx(du.load_classifier()[1], abs=5e-5)  # the figure printed with every score
    assert test_classified.features.shape == (10_000, 64)
    torch.testing.assert_close(test_classified.probabilities.sum(dim=1), torch.ones(10_000))
    assert torch.equal(test_classified.shares, torch.bincount(test_classified.digits, minlength=10) / 10_000)
    alone = torch.cat([du.classify(image[None]).features for image in mnist_test[0][:8]])  # not as a batch
    torch.testing.assert_close(test_classified.features[:8], alone, rtol=1e-4, atol=1e-4)


def test_the_weights_are_the_published_ones_and_all_of_them(root):
    path = root / "data" / "classifier.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == du.CLASSIFIER_SHA256
    expected = {name for name, value in du.DigitClassifier().state_dict().items() if value.is_floating_point()}
    assert set(load_file(path)) == expected


@pytest.mark.parametrize("place", range(3))
def test_the_weights_are_found_in_the_package_and_beside_a_single_file(place, places, root):
    with pytest.raises(FileNotFoundError, match="classifier"):
        du.load_classifier()
    shutil.copy(root / "data" / "classifier.safetensors", places[place])
    state = torch.get_rng_state()
    assert du.load_classifier()[1] >= 0.994
    assert torch.equal(torch.get_rng_state(), state)


def test_other_weights_are_refused_in_one_line(places, root):
    raw = bytearray((root / "data" / "classifier.safetensors").read_bytes())
    raw[-1] ^= 1
    (places[0] / "classifier.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=du.CLASSIFIER_SHA256[:12]) as error:
        du.load_classifier()
    assert str(places[0]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_samples_of_other_sizes_are_treated_as_real_digits_are(size, mnist_test):
    images = mnist_test[0][:300]
    made, real = du.classify(du.normalize(du.resize_images(images, size))), du.classify(images, size)
    assert torch.equal(made.features, real.features)
    assert (real.digits == mnist_test[1][:300]).float().mean() > (0.9 if size < 28 else 0.985)
    assert du.to_uint8(torch.tensor([-1.005, 1.005]).view(1, 1, 1, 2)).tolist() == [[[0, 255]]]


# ------------------------------------------------------------------------------------------------- Fréchet distance
@pytest.mark.parametrize(("spoil", "strengths"), [(add_noise, (0.1, 0.2, 0.4)), (blur, (0.5, 1.0, 2.0))])
def test_the_distance_rises_the_more_digits_are_spoiled(spoil, strengths, train_digits, test_classified):
    images = [train_digits[0][:1000], *(spoil(train_digits[0][:1000], strength) for strength in strengths)]
    distances = [du.frechet_distance(du.classify(part).features, test_classified.features) for part in images]
    assert all(low < high for low, high in pairwise(distances)), distances
    assert distances[-1] > 20 * distances[0]


def frechet_reference(fake, real):
    """Return ‖μ₁ - μ₂‖² + tr Σ₁ + tr Σ₂ - 2 ‖A Bᵀ‖* of centered data AᵀA = Σ₁, BᵀB = Σ₂: no matrix root is taken."""
    shift = (fake.mean(dim=0) - real.mean(dim=0)).square().sum()
    a, b = ((points - points.mean(dim=0)) / math.sqrt(len(points) - 1) for points in (fake, real))
    return (shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def mixed(n, d, seed):
    """Return n correlated points whose covariance does not commute with another seed's."""
    return cloud(n, d, seed) @ cloud(d, d, seed + 100) / math.sqrt(d) + cloud(1, d, seed + 200)


SETS = {
    "one dimension": (mixed(300, 1, 1), mixed(200, 1, 2)),
    "correlated": (mixed(300, 12, 1), mixed(200, 12, 2)),
    "far from 0": (mixed(300, 64, 1) + 1000, mixed(100, 64, 2) + 1000),
    "singular": (mixed(6, 12, 1), mixed(200, 12, 2)),
    "both singular": (mixed(6, 12, 1), mixed(5, 12, 2)),
    "dead features": (mixed(200, 12, 1) * torch.tensor([1.0, 0.0]).repeat(6), mixed(200, 12, 2)),
    "a point": (torch.zeros(50, 4, dtype=torch.float64), cloud(200)),
}


@pytest.mark.parametrize("name", SETS)
def test_frechet_distance_agrees_with_singular_values(name):
    fake, real = SETS[name]
    expected = frechet_reference(fake, real)
    assert du.frechet_distance(fake, real) == pytest.approx(expected, rel=1e-5)
    assert du.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-5)
    assert 0 <= du.frechet_distance(fake, fake.flip(0)) < 1e-5


# ------------------------------------------------------------------------------------------------------------------ KID
def kernel(x, y):
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def test_kernel_distance_of_two_points_is_the_formula():
    x, y = [1.0, 2.0, -1.0], [0.5, 0.0, 2.0]
    found = du.kernel_distance(torch.tensor([x]).repeat(40, 1), torch.tensor([y]).repeat(30, 1))
    assert found == pytest.approx((kernel(x, x) + kernel(y, y) - 2 * kernel(x, y), 0), rel=1e-12)


def test_kernel_distance_and_its_error_are_exact():
    """Of ten points a and ten b against points c, disjoint subsets of two are t times aa, t times bb, 10 - 2 t ab."""
    a, b, c = [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]
    pairs = ((a, a), (a, b), (b, b))
    aa, ab, bb = (kernel(x, y) + kernel(c, c) - kernel(x, c) - kernel(y, c) for x, y in pairs)  # unbiased: no k(x, x)
    found, error = du.kernel_distance(torch.tensor([a, b]).repeat(10, 1), torch.tensor([c]).repeat(20, 1))
    t = 10 * (found - ab) / (aa + bb - 2 * ab)
    assert t == pytest.approx(round(t), abs=1e-9)
    assert 0 < t < 5
    values = [aa, bb] * round(t) + [ab] * (10 - 2 * round(t))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(10), rel=1e-9)


def test_kernel_distance_scatters_as_its_error_says_and_draws_no_global_numbers():
    state = torch.get_rng_state()
    draws = torch.tensor([du.kernel_distance(cloud(100, 4, 2 * s), cloud(120, 4, 2 * s + 1)) for s in range(400)])
    assert torch.equal(torch.get_rng_state(), state)
    scatter = draws[:, 0].std().item()
    assert abs(draws[:, 0].mean().item()) < 3 * scatter / math.sqrt(400)
    assert draws[:, 1].square().mean().sqrt().item() == pytest.approx(scatter, rel=0.1)
    assert du.kernel_distance(cloud(100, 4, 0), cloud(120, 4, 1)) == pytest.approx(draws[0].tolist())


# ------------------------------------------------------------------------- precision, recall, density, coverage
def manifold_reference(fake, real, k):
    """Return the four metrics from all differences, after the definitions of both papers."""
    ball_fake, ball_real = ((p[:, None] - p[None]).norm(dim=2).sort(dim=1).values[:, k] for p in (fake, real))
    between = (fake[:, None] - real[None]).norm(dim=2)
    return {
        "precision": (between < ball_real).any(dim=1).double().mean().item(),
        "recall": (between < ball_fake[:, None]).any(dim=0).double().mean().item(),
        "density": (between < ball_real).double().sum().item() / (k * len(fake)),
        "coverage": (between < ball_real).any(dim=0).double().mean().item(),
    }


@pytest.mark.parametrize(
    ("n", "m", "d", "k", "offset"), [(70, 50, 2, 3, 0), (40, 60, 5, 5, 0), (30, 30, 8, 1, 0), (70, 50, 4, 3, 1000)]
)
def test_manifold_metrics_agree_with_all_differences(n, m, d, k, offset):
    fake, real = cloud(n, d, seed=1, shift=0.5) + offset, cloud(m, d) + offset
    expected = manifold_reference(fake, real, k)
    assert all(0 < expected[name] < 1 for name in ("precision", "recall", "coverage"))
    assert du.manifold_metrics(fake, real, k) == pytest.approx(expected, abs=1e-6)


def test_manifold_metrics_are_exact_beyond_the_first_part():
    """Fakes come in parts of some thousand: the balls of the first ones are tiny here, of the last ones wide."""
    fake = torch.cat([0.01 * cloud(2100, 2, seed=1) - 3, cloud(300, 2, seed=2)])
    real = cloud(2050, 2, seed=3, shift=0.2)
    expected = manifold_reference(fake, real, 5)
    for order in (fake, fake.flip(0)):
        assert du.manifold_metrics(order, real) == pytest.approx(expected, abs=1e-6)
    assert du.manifold_metrics(real, fake) == pytest.approx(manifold_reference(real, fake, 5), abs=1e-6)


def test_nearest_distance_agrees_with_all_differences():
    points, others = cloud(1100, 3), cloud(40, 3, seed=1)  # more than one part
    expected = (points[:, None] - others[None]).norm(dim=2).min(dim=1).values
    torch.testing.assert_close(du.nearest_distance(points, others), expected)
    assert (du.nearest_distance(others + 1e4, others + 1e4) == 0).all()


def test_too_few_points_are_refused():
    for metric, needed in ((du.frechet_distance, 2), (du.kernel_distance, 20), (du.manifold_metrics, 6)):
        for n, m in ((needed - 1, 50), (50, needed - 1)):
            with pytest.raises(ValueError, match=rf"{n} and {m} points.* {needed} of each"):
                metric(cloud(n), cloud(m))


# -------------------------------------------------------------------------------------- real statistics and near-copies
def test_copies_are_called_copies_and_new_digits_are_not(statistics, train_digits, mnist_test):
    copies = train_digits[0][:500]
    assert statistics.near_copies(du.classify(copies).features) == 1
    assert statistics.near_copies(du.classify(add_noise(copies, 0.005)).features) > 0.9
    new = statistics.near_copies(du.classify(mnist_test[0][2000:6000]).features)
    assert 0.003 < new < 0.025  # one in a hundred
    assert statistics.baseline(200)["near_copies"] == pytest.approx(new, abs=0.015)


def test_the_baseline_of_near_copies_is_taken_from_digits_that_did_not_set_the_bound(train_digits, mnist_test):
    """Of 100 test images, 50 set the bound by their 1 % quantile, above one of them; the others are counted."""
    found = set()
    for start in range(0, 600, 100):
        statistics = du.RealStatistics(train_digits[0][:400], mnist_test[0][start : start + 100], 28)
        baseline = statistics.baseline(100)["near_copies"]
        assert 100 * statistics.near_copies(statistics.test.features) == pytest.approx(1 + 50 * baseline, abs=1e-4)
        found.add(round(50 * baseline))
    assert len(found) > 1  # of those that set the bound it is one in every case


def test_real_digits_score_as_the_baseline_does(statistics, mnist_test):
    """Distance and coverage depend on how many are scored, so the baseline must be of as many."""
    for n in (300, 2000):
        images, labels = (part[2000 : 2000 + n] for part in mnist_test)
        scores = du.score_samples(du.normalize(images), statistics, labels)
        assert scores["frechet"] < 2 * scores["frechet_baseline"]
        assert abs(scores["kid"] - scores["kid_baseline"]) < 5 * (scores["kid_se"] + scores["kid_se_baseline"])
        for name in ("precision", "recall", "coverage", "confidence", "class_entropy", "class_accuracy"):
            assert scores[name] == pytest.approx(scores[f"{name}_baseline"], abs=0.1), (n, name)
        assert scores["class_accuracy"] > 0.98


def test_class_accuracy_is_left_out_where_labels_name_no_digits(few, mnist_test):
    """As of letters or clothes: the labels of the real images disagree with the classifier, too."""
    samples, labels = du.normalize(mnist_test[0][:150]), mnist_test[1][:150]
    for shown, real in ((True, few[1]), (False, 9 - few[1]), (True, None)):
        scores = du.score_samples(samples, du.RealStatistics(few[0], few[0], 28, labels=real), labels)
        assert ("class_accuracy" in scores) == shown
        assert ("class_accuracy_baseline" in scores) == (shown and real is not None)


def spoiled(value):
    samples = torch.zeros(120, 1, 28, 28)
    samples[3, 0, 5, 5] = value
    return samples


BAD_SAMPLES = [
    (spoiled(1.5), r"0 to 1\.5"), (spoiled(-3.0), "-3 to 0"), (spoiled(math.nan), "NaN"), (spoiled(math.inf), "NaN"),
    (torch.zeros(120, 28, 28), r"\(120, 28, 28\)"), (torch.zeros(120, 3, 28, 28), r"\(120, 3, 28, 28\).* gray"),
    (torch.zeros(120, 1, 28, 32), r"\(120, 1, 28, 32\)"), (torch.zeros(0, 1, 28, 28), "0 samples"),
    (torch.zeros(99, 1, 28, 28), r"99 samples.* 100"), (torch.zeros(120, 1, 32, 32), r"32 pixels.* 28"),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "says"), BAD_SAMPLES)
def test_samples_that_cannot_be_scored_are_refused_in_one_line(samples, says, statistics):
    with pytest.raises(ValueError, match=says) as error:
        du.score_samples(samples, statistics)
    assert "\n" not in str(error.value)
    if len(samples) != 99 and samples.shape[-2:] != (32, 32):  # these two can be classified
        with pytest.raises(ValueError, match="samples"):
            du.classify(samples)


def test_images_that_cannot_be_classified_are_refused(mnist_test):
    du.classify(spoiled(1.001))  # a rounding error is accepted
    with pytest.raises(ValueError, match="3 channels"):
        du.classify(torch.zeros(5, 3, 28, 28, dtype=torch.uint8))
    for n_train, n_test in ((99, 200), (200, 99)):
        with pytest.raises(ValueError, match=rf"{n_train} and {n_test} real images.* 100"):
            du.RealStatistics(mnist_test[0][:n_train], mnist_test[0][:n_test], 28)


# ------------------------------------------------------------------------------------------------------------- evaluate
def check_scores(scores, n):
    """Assert that every score is there, in range, and beside its baseline, in the dictionary and in print."""
    assert scores["n"] == n
    assert scores["classifier_accuracy"] >= 0.994
    assert scores["classifier_sha256"] == du.CLASSIFIER_SHA256
    for name in SCALARS:
        high = math.inf if name in ("frechet", "kid", "density", "class_entropy") else 1
        assert all((-1 if name == "kid" else 0) <= scores[key] <= high for key in (name, f"{name}_baseline")), name
    assert sum(scores["class_histogram"]) == pytest.approx(1, abs=1e-5)
    entropy = -sum(share * math.log(share) for share in scores["class_histogram"] if share)
    assert scores["class_entropy"] == pytest.approx(entropy, abs=1e-5)
    row = next(line for line in str(scores).splitlines() if line.startswith("precision")).split()[-2:]
    assert list(map(float, row)) == pytest.approx([scores["precision"], scores["precision_baseline"]], abs=1e-3)
    assert du.CLASSIFIER_SHA256[:12] in str(scores)


@pytest.mark.parametrize("kind", ["DCGAN", "StableDCGAN", "FastDCGAN", "ProgressiveGAN"])
def test_evaluate_scores_a_recipe_against_the_halves_of_its_images(kind, few):
    gan = trained(few, getattr(du, kind))
    scores = gan.evaluate(150)
    check_scores(scores, 150)
    assert scores["frechet"] > 5 * scores["frechet_baseline"]  # it has learnt next to nothing
    assert ("class_accuracy" in scores) == gan.config.conditional == ("class accuracy" in str(scores))
    assert len(gan.real_statistics().test.features) == len(gan.real_statistics().train.features) == 150
    assert gan.real_statistics() is gan.real_statistics()


def test_images_that_are_no_digits_are_scored_and_colors_are_refused():
    stripes = (torch.arange(20)[:, None] * torch.randint(1, 30, (260, 1, 20), generator=rng()) % 256).to(torch.uint8)
    check_scores(trained(stripes, du.DCGAN).evaluate(100), 100)
    gan = make(du.DCGAN, channels=3)
    colors = torch.full((260, 3, 16, 16), 200, dtype=torch.uint8)
    for score in (gan.evaluate, gan.evaluate_fixed_samples):
        with pytest.raises(ValueError, match=r"channels = 3.* gray"):
            score(100)
    with pytest.raises(ValueError, match=r"channels = 3.* gray"):
        gan.train(1, data=colors, callbacks=[du.EvaluateEachEpoch(100)])
    assert gan.step == 0


def test_a_loaded_gan_is_compared_with_its_own_data_and_goes_on_as_before(on_disk, few, mnist_test, tmp_path):
    gan = make()
    gan.train(1, data=on_disk, callbacks=[StopAfterFive()])
    assert torch.equal(gan.real_statistics().train.features, du.classify(few[0][:250]).features)
    assert torch.equal(gan.real_statistics().test.features, du.classify(mnist_test[0][:200]).features)
    loaded = du.GAN.load(gan.save(tmp_path / "saved"))
    assert loaded.evaluate_fixed_samples(120) == gan.evaluate_fixed_samples(120)
    assert loaded.evaluate(150) == gan.evaluate(150)
    assert (loaded.position, list(loaded.history["epoch"])) == (80, gan.history["epoch"])
    for one in (gan, loaded):
        one.train(1, data=on_disk, callbacks=[])
    assert same(gan, loaded)
    gan.train(1, data=few, callbacks=[])
    assert torch.equal(gan.real_statistics().seen, du.classify(few[0]).features)  # other data, read anew


def test_a_loaded_gan_without_the_name_of_its_data_asks_for_them(few, tmp_path):
    gan = trained(few)
    loaded = du.GAN.load(gan.save(tmp_path / "saved"))
    for score in (loaded.evaluate, loaded.evaluate_fixed_samples):
        with pytest.raises(ValueError, match=r"set_data\(") as error:
            score(100)
        assert "\n" not in str(error.value)
    loaded.set_data(few)
    assert loaded.evaluate_fixed_samples(100) == gan.evaluate_fixed_samples(100)


def test_training_images_alone_are_halved_and_data_that_are_gone_are_named(on_disk, tmp_path):
    for path in on_disk.glob("t10k*"):
        path.unlink()
    gan = trained(on_disk)
    assert [len(gan.real_statistics().train.features), len(gan.real_statistics().test.features)] == [125, 125]
    loaded = du.GAN.load(gan.save(tmp_path / "saved"))
    shutil.move(on_disk, tmp_path / "elsewhere")
    gan.statistics_cache = None
    for one in (gan, loaded):  # with and without its images in memory
        with pytest.raises(FileNotFoundError, match="digits"):
            one.evaluate(100)


def test_evaluate_repeats_for_a_seed_and_changes_nothing(few):
    gan, twin = trained(few), trained(few)
    gan.generator.train()
    gan.discriminator.eval()
    state, history = torch.get_rng_state(), gan.history.to_json()
    first, again, other = (gan.evaluate(150, seed=seed) for seed in (1, 1, 2))
    gan.evaluate_fixed_samples(150)
    assert first == again
    assert first["frechet"] != other["frechet"]
    assert torch.equal(torch.get_rng_state(), state)
    assert (gan.generator.training, gan.discriminator.training, gan.history.to_json()) == (True, False, history)
    for one in (gan, twin):
        one.train(1, data=few, callbacks=[])
    assert same(gan, twin)


def stand_in(monkeypatch, gan, images, labels):
    """Let a conditional GAN generate real digits of the classes that it is asked for, each of them once."""
    pools = {digit: iter(du.normalize(images[labels == digit])) for digit in range(10)}

    def generate(z, digits=None):
        return torch.stack([next(pools[int(digit)]) for digit in gan.class_labels(len(z), digits)])

    monkeypatch.setattr(gan, "generate", generate)


def test_a_perfect_generator_and_one_of_a_single_digit_are_told_apart(few, mnist_test, monkeypatch):
    gan = trained(few)
    stand_in(monkeypatch, gan, *mnist_test)
    scores = gan.evaluate(600)
    assert scores["class_accuracy"] > 0.98
    assert scores["frechet"] < 2 * scores["frechet_baseline"]
    assert scores["class_entropy"] == pytest.approx(math.log(10), abs=0.01)
    assert scores["near_copies"] < 0.2  # 75 digits set the bound
    sevens = du.normalize(mnist_test[0][mnist_test[1] == 7])
    monkeypatch.setattr(gan, "generate", lambda z, digits=None: sevens[: len(z)])
    scores = gan.evaluate(300)
    assert scores["class_histogram"][7] > 0.97
    assert scores["class_accuracy"] == pytest.approx(0.1, abs=0.02)
    assert max(scores["class_entropy"], scores["recall"], scores["coverage"]) < 0.35
    assert scores["frechet"] > 5 * scores["frechet_baseline"]


@pytest.mark.parametrize("half", [0, 1])
def test_copies_of_any_training_digit_are_found(half, train_digits, monkeypatch):
    images, labels = (part[:600] for part in train_digits)
    gan = trained((images, labels))
    stand_in(monkeypatch, gan, images[half::2], labels[half::2])
    assert gan.evaluate(150)["near_copies"] == 1


def test_the_order_of_the_images_does_not_decide_the_baseline(train_digits):
    threes, eights = (train_digits[0][train_digits[1] == digit][:150] for digit in (3, 8))
    for data in (torch.cat([threes, eights]), torch.stack([threes, eights], dim=1).flatten(0, 1)):
        assert trained(data, conditional=False).real_statistics().baseline(150)["frechet"] < 5


def test_inception_gets_all_images_in_three_equal_channels_at_the_samples_size(monkeypatch, on_disk):
    metric = Mock(**{"return_value.compute.return_value": torch.tensor(12.5)})
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", Mock(FrechetInceptionDistance=metric))
    gan = trained(on_disk, du.DCGAN)
    assert gan.evaluate(130, inception=True)["inception_fid"] == 12.5
    calls = metric.return_value.update.call_args_list
    fake, real = (torch.cat([call.args[0] for call in calls if call.kwargs["real"] == kind]) for kind in (False, True))
    assert (fake.shape, real.shape, real.dtype) == ((130, 3, 16, 16), (200, 3, 16, 16), torch.uint8)
    assert torch.equal(fake[:, 2], du.to_uint8(gan.sample(130, seed=0)))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert "inception_fid" not in gan.evaluate(130)  # without torchmetrics


# ---------------------------------------------------------------------------------------- fixed samples, epoch by epoch
def test_the_class_gap_is_the_share_that_would_have_to_change_class(few, mnist_test, monkeypatch):
    assert 0 < make().evaluate_fixed_samples(100, distances=False)["class_gap"] < 1  # untrained: MNIST is meant
    gan = trained(few, conditional=False)
    sevens = du.normalize(mnist_test[0][mnist_test[1] == 7])
    for samples, gap in ((sevens[:100], 1 - (few[1] == 7).float().mean().item()), (du.normalize(few[0]), 0.0)):
        monkeypatch.setattr(gan, "fixed_samples", lambda n, samples=samples: samples[:n])
        scores = gan.evaluate_fixed_samples(300, distances=False)
        assert set(scores) == {"confidence", "class_gap"}
        assert scores["class_gap"] == pytest.approx(gap, abs=0.02)


@pytest.mark.parametrize("counts", [[40] * 10, [5, 250] + [5] * 8, [60] * 4 + [0] * 6], ids=str)
def test_a_perfect_conditional_generator_has_no_class_gap_whatever_the_data_hold(counts, mnist_test, monkeypatch):
    """It is asked for all classes equally often, and has learnt those that it saw."""
    images, labels = mnist_test
    kept = torch.cat([(labels == digit).nonzero()[:count, 0] for digit, count in enumerate(counts)])
    gan = make()
    gan.set_data((images[kept], labels[kept]))
    by_digit = [du.normalize(images[labels == digit][-50:]) for digit in range(10)]
    perfect = torch.stack([by_digit[k % 10 if counts[k % 10] else 0][k // 10] for k in range(300)])
    collapsed = by_digit[1][torch.arange(300) % 50]
    for samples, gap in ((perfect, 0), (collapsed, 1 - 1 / sum(count > 0 for count in counts))):
        monkeypatch.setattr(gan, "fixed_samples", lambda n, samples=samples: samples[:n])
        assert gan.evaluate_fixed_samples(300, distances=False)["class_gap"] == pytest.approx(gap, abs=0.03)


def play(monkeypatch, gan, distances):
    """Let the evaluation return these Fréchet distances, one an epoch; an exception among them is raised."""
    script = [value if isinstance(value, Exception) else {"frechet": value} for value in distances]
    monkeypatch.setattr(gan, "evaluate_fixed_samples", Mock(side_effect=script))


def test_each_epoch_is_evaluated_also_one_that_was_cut_short(few):
    gan, alone, evaluate = make(), make(), du.EvaluateEachEpoch(100)
    gan.train(1, data=few, callbacks=[StopAfterFive(), evaluate])
    early = list(gan.history["frechet"])
    gan.train(1, data=few, callbacks=[evaluate])
    assert len(early) == len(gan.history["frechet"]) == 1
    assert gan.history["frechet"] != early
    gan.train(1, data=few, callbacks=[evaluate])
    alone.train(2, data=few, callbacks=[])
    assert same(gan, alone)
    now = gan.evaluate_fixed_samples(100)
    assert now == {name: gan.history[name][1] for name in now}  # the same latent vectors
    assert set(now) == {"confidence", "class_gap", "frechet", "precision", "recall", "near_copies"}
    features = du.classify(gan.fixed_samples(100)).features
    assert now["frechet"] == du.frechet_distance(features, gan.real_statistics().test.features)
    gan.train(1, data=few, callbacks=[du.EvaluateEachEpoch(64, distances=False)])
    assert gan.history["frechet"][2] is None
    assert gan.history["confidence"][2] is not None


def test_the_best_generator_is_kept_and_loads(few, tmp_path, monkeypatch):
    gan = make()
    play(monkeypatch, gan, [5.0, 3.0, OSError("not there"), 3.5])
    with pytest.warns(UserWarning, match="not there"):
        gan.train(4, data=few, callbacks=[du.EvaluateEachEpoch(100, best=tmp_path / "best")])
    assert gan.history["frechet"] == [5.0, 3.0, None, 3.5]
    best, again = du.GAN.load(tmp_path / "best"), make()
    assert best.history["frechet"] == [5.0, 3.0]
    again.train(2, data=few, callbacks=[])
    assert same(best, again)


@pytest.mark.parametrize(("distances", "epochs"), [([5, 4, 3.99, 4.2, 1], 4), ([5, 4, 3.99, 3, 3.1], 5)])
def test_patience_ends_training_when_epochs_bring_no_gain(distances, epochs, few, monkeypatch):
    gan = make()
    play(monkeypatch, gan, distances)
    gan.train(5, data=few, callbacks=[du.EvaluateEachEpoch(100, patience=2)])
    assert gan.epoch == epochs
    assert ("Fréchet" in (gan.stop_reason or "")) == (epochs < 5)


def test_bad_arguments_are_refused():
    unranked = ({"distances": False, "best": "folder"}, {"distances": False, "patience": 3})
    for arguments in ({"n": 99}, {"n": 0, "distances": False}, {"patience": 0}, *unranked):
        with pytest.raises(ValueError, match="distances=True" if arguments in unranked else "n = .*patience = "):
            du.EvaluateEachEpoch(**arguments)


def test_what_cannot_be_evaluated_is_said_before_the_first_batch(few, tmp_path):
    gan = make()
    gan.set_data(few)
    with pytest.raises(ValueError, match="99"):
        gan.evaluate(99)
    with pytest.raises(ValueError, match="75 and 75 real images"):
        gan.train(1, data=(few[0][:150], few[1][:150]), callbacks=[du.EvaluateEachEpoch(100)])
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes.txt").write_text("mine")
    with pytest.raises(du.CheckpointError, match="best"):
        gan.train(1, data=few, callbacks=[du.EvaluateEachEpoch(100, best=tmp_path / "best")])
    assert gan.step == 0


def test_a_missing_classifier_costs_the_scores_and_a_wrong_one_is_refused(few, places):
    gan = make()
    with pytest.warns(UserWarning, match="classifier"):
        gan.train(2, data=few, callbacks=[du.EvaluateEachEpoch(100, patience=1)])
    assert gan.epoch == 2
    assert "frechet" not in gan.history
    (places[0] / "classifier.safetensors").write_bytes(b"a half-finished download")
    with pytest.raises(ValueError, match="SHA-256"):
        gan.train(1, data=few, callbacks=[du.EvaluateEachEpoch(100)])
    assert gan.epoch == 2
