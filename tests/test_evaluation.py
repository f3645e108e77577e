"""The judge and its scores: closed forms, loops written here, real digits disturbed on purpose, bad input."""

import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import RECIPES, make, same, weights

import dcgan_utils as du
from tools import judge_study as study

LOW_IS_GOOD = ("fid", "kid")
SCALARS = (*LOW_IS_GOOD, "precision", "recall", "density", "coverage", "confidence", "class_entropy", "near_copies")


# ------------------------------------------------------------------------------------------------ what the tests share
@pytest.fixture(scope="module")
def train_digits():
    """Return the first 5,000 training digits and their labels, read without the module's own search."""
    images = du.read_idx(du.EMBEDDED_MNIST / "train-images-idx3-ubyte.gz", dims=3)
    labels = du.read_idx(du.EMBEDDED_MNIST / "train-labels-idx1-ubyte.gz", dims=1).long()
    return images[:5000].clone(), labels[:5000].clone()


@pytest.fixture(scope="module")
def train_reading(train_digits):
    return du.read_digits(train_digits[0])


@pytest.fixture(scope="module")
def test_reading(mnist_test):
    return du.read_digits(mnist_test[0])


@pytest.fixture(scope="module")
def reference(train_digits, mnist_test):
    """Return what 3,000 training digits score against the first 2,000 test digits."""
    return du.Reference(train_digits[0][:3000], mnist_test[0][:2000], 28)


@pytest.fixture
def no_judge_yet():
    """Make `load_judge` look for its file again, in the test and after it."""
    du.load_judge.cache_clear()
    yield
    du.load_judge.cache_clear()


@pytest.fixture
def empty_places(no_judge_yet, tmp_path, monkeypatch):
    """Let the module believe that it lies in an empty folder, and return the two folders where it looks."""
    monkeypatch.setattr(du, "EMBEDDED_MNIST", tmp_path / "data" / "mnist")
    monkeypatch.setattr(du, "__file__", str(tmp_path / "dcgan_utils.py"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data", tmp_path


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(n, d=4, seed=0, shift=0.0):
    """Return n points of N(shift, 1) in d dimensions."""
    return torch.randn(n, d, generator=rng(seed)) + shift


def draw_exactly(n, mean, covariance, seed=0):
    """Return n points whose sample mean and (unbiased) sample covariance are the given ones, in float64."""
    mean, covariance = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, covariance))
    points = torch.randn(n, len(mean), generator=rng(seed), dtype=torch.float64)
    points = points - points.mean(dim=0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(points.T.cov().view(covariance.shape)), points.T, upper=False
    )
    return white.T @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(d, seed):
    root = torch.randn(d, d, generator=rng(seed), dtype=torch.float64)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def serve_few(monkeypatch, images, labels, test_images, test_labels):
    """Let `load_images` answer with few digits, and return the list of what it was asked."""
    asked = []

    def load_images(source="mnist", split="train"):
        asked.append((source, split))
        return (images, labels) if split == "train" else (test_images, test_labels)

    monkeypatch.setattr(du, "load_images", load_images)
    return asked


# ------------------------------------------------------------------------------------------------------------ the judge
def test_the_judge_reads_the_test_digits(mnist_test, test_reading):
    accuracy = (test_reading.digits == mnist_test[1]).float().mean().item()
    assert accuracy >= 0.994
    assert accuracy == pytest.approx(du.load_judge()[1], abs=5e-5)  # the figure printed with every score
    assert test_reading.features.shape == (10_000, du.JUDGE_FEATURES)
    assert test_reading.probabilities.shape == (10_000, 10)
    torch.testing.assert_close(test_reading.probabilities.sum(dim=1), torch.ones(10_000))


def test_the_judges_file_is_small_and_the_one_that_the_module_names():
    raw = (du.EMBEDDED_MNIST.parent / "judge.safetensors").read_bytes()
    assert len(raw) <= 250_000
    assert hashlib.sha256(raw).hexdigest() == du.JUDGE_SHA256


def test_every_weight_of_the_judge_comes_from_its_file():
    names = set(du.load_tensors((du.EMBEDDED_MNIST.parent / "judge.safetensors").read_bytes()))
    expected = {name for name, value in du.Judge().state_dict().items() if value.is_floating_point()}
    assert names == expected  # loaded with strict=False, for BatchNorm's counters


def test_the_judge_is_in_eval_mode_and_reads_each_image_for_itself(mnist_test):
    judge, _ = du.load_judge()
    assert not any(module.training for module in judge.modules())
    together = du.read_digits(mnist_test[0][:40]).features
    alone = torch.cat([du.read_digits(image[None]).features for image in mnist_test[0][:40]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_missing_judge_is_named_with_the_places_looked_at(empty_places):
    with pytest.raises(FileNotFoundError, match="judge") as error:
        du.load_judge()
    assert all(str(place / "judge.safetensors") in str(error.value) for place in empty_places)


def test_a_judge_beside_the_module_is_found_as_on_kaggle(empty_places, root):
    shutil.copy(root / "data" / "judge.safetensors", empty_places[1])
    assert du.load_judge()[1] >= 0.994


def test_a_judge_with_another_hash_is_refused_in_one_line(empty_places, root):
    raw = bytearray((root / "data" / "judge.safetensors").read_bytes())
    raw[-1] ^= 1
    path = empty_places[0] / "judge.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="SHA-256") as error:
        du.load_judge()
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert du.JUDGE_SHA256[:12] in text
    assert hashlib.sha256(raw).hexdigest()[:12] in text


# ------------------------------------------------------------------------------------------- evidence that it judges
@pytest.mark.parametrize("name", study.DISTURBANCES)
def test_the_distance_rises_with_every_disturbance(name, train_digits, train_reading, test_reading):
    disturbance, n = study.DISTURBANCES[name], 1000
    distances = [du.frechet_distance(train_reading.features[:n], test_reading.features)]
    for strength in disturbance.strengths:
        reading = du.read_digits(disturbance.apply(train_digits[0][:n], strength))
        distances.append(du.frechet_distance(reading.features, test_reading.features))
    assert len(distances) == 6
    assert all(low < high for low, high in pairwise(distances)), distances
    assert distances[-1] > 20 * distances[0]


@pytest.mark.parametrize("order", study.drop_orders(5), ids=str)
def test_the_distance_rises_with_every_dropped_class(order, train_digits, train_reading, test_reading):
    distances = []
    for count in range(10):
        pick = study.without(order[:count], train_digits[1], 400)  # one class alone has little more among 5,000
        assert len(train_digits[1][pick].unique()) == 10 - count
        distances.append(du.frechet_distance(train_reading.features[pick], test_reading.features))
    assert all(low < high for low, high in pairwise(distances)), distances


def test_the_disturbances_do_what_they_say(train_digits):
    images = train_digits[0][:50]
    for name, disturbance in study.DISTURBANCES.items():
        before = images.clone()
        strongest = disturbance.apply(images, disturbance.strengths[-1])
        assert strongest.dtype == torch.uint8, name
        assert strongest.shape == images.shape, name
        assert torch.equal(images, before), name  # in place would disturb twice
        assert torch.equal(strongest, disturbance.apply(images, disturbance.strengths[-1])), name
        assert list(disturbance.strengths) == sorted(set(disturbance.strengths)), name
        assert len(disturbance.strengths) == 5, name
    for name in ("noise", "blackout", "swirl"):
        assert torch.equal(study.DISTURBANCES[name].apply(images, 0), images), name
    grain = study.noise(torch.full((50, 28, 28), 128, dtype=torch.uint8), 0.1).float()
    assert grain.std().item() == pytest.approx(25.5, rel=0.02)
    assert study.black_out(images + 1, 6)[:, :6].sum() == 0
    assert torch.equal(study.black_out(images, 6)[:, 6:], images[:, 6:])
    blocks = study.pixelate(images, 7)[:, ::7, ::7]
    assert torch.equal(blocks.repeat_interleave(7, 1).repeat_interleave(7, 2), study.pixelate(images, 7))
    dot = torch.zeros(1, 29, 29, dtype=torch.uint8)
    dot[0, 14, 14] = 255
    assert study.swirl(dot, 2.0)[0, 14, 14] == 255  # the centre stays
    assert study.blur(dot, 1.0)[0, 14, 14] == pytest.approx(255 / (2 * math.pi), rel=0.03)  # the Gaussian's peak


def test_too_few_images_without_the_dropped_classes_are_an_error(train_digits):
    with pytest.raises(ValueError, match="5000 are needed"):
        study.without(list(range(9)), train_digits[1], 5000)


# -------------------------------------------------------------------------------------------------- Fréchet distance
def frechet_reference(mean_a, cov_a, mean_b, cov_b):
    """Return ‖μa - μb‖² + tr(Σa + Σb) - 2 Σ√λ with λ the eigenvalues of Σa^½ Σb Σa^½, in float64."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def test_frechet_distance_in_one_dimension():
    fake, real = draw_exactly(500, [3.0], [[4.0]]), draw_exactly(700, [0.0], [[1.0]], seed=1)
    assert du.frechet_distance(fake.float(), real.float()) == pytest.approx(3**2 + (2 - 1) ** 2, rel=1e-4)


def test_frechet_distance_of_covariances_that_commute():
    mean, a, b = [1.0, -2.0, 0.5], [4.0, 1.0, 0.25], [1.0, 9.0, 0.25]
    fake = draw_exactly(400, mean, torch.diag(torch.tensor(a)))
    real = draw_exactly(300, [0.0] * 3, torch.diag(torch.tensor(b)), seed=1)
    expected = sum(m * m for m in mean) + sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in zip(a, b, strict=True))
    assert du.frechet_distance(fake.float(), real.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_covariances_that_do_not_commute():
    d = 12
    first, second = random_covariance(d, 0), random_covariance(d, 1)
    means = torch.randn(2, d, generator=rng(2), dtype=torch.float64)
    fake, real = draw_exactly(300, means[0], first, seed=3), draw_exactly(200, means[1], second, seed=4)
    expected = frechet_reference(means[0], first, means[1], second)
    assert du.frechet_distance(fake.float(), real.float()) == pytest.approx(expected, rel=1e-4)
    assert du.frechet_distance(real.float(), fake.float()) == pytest.approx(expected, rel=1e-4)
    moved = [points.float() @ torch.linalg.qr(random_covariance(d, 5).float())[0] + 3 for points in (fake, real)]
    assert du.frechet_distance(*moved) == pytest.approx(expected, rel=1e-3)  # a turn and a shift change nothing


def test_frechet_distance_agrees_with_scipys_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    first, second = random_covariance(8, 0), random_covariance(8, 1)
    cross = linalg.sqrtm((first @ second).numpy()).real.trace()
    expected = (first.trace() + second.trace()).item() - 2 * cross
    fake, real = draw_exactly(300, [0.0] * 8, first), draw_exactly(300, [0.0] * 8, second, seed=1)
    assert du.frechet_distance(fake.float(), real.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_judged_digits_agrees_with_the_formula(train_reading, test_reading):
    fake, real = train_reading.features[:2000].double(), test_reading.features.double()
    expected = frechet_reference(fake.mean(dim=0), fake.T.cov(), real.mean(dim=0), real.T.cov())
    found = du.frechet_distance(train_reading.features[:2000], test_reading.features)
    assert found == pytest.approx(expected, abs=1e-3)


def test_frechet_distance_of_degenerate_features_is_finite():
    real, flat = cloud(200), cloud(200)
    flat[:, 1] = 0
    one = torch.zeros(200, 4)
    assert du.frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    assert math.isfinite(du.frechet_distance(flat, real))
    expected = real.mean(dim=0).square().sum() + real.var(dim=0).sum()  # a point against a Gaussian
    assert du.frechet_distance(one, real) == pytest.approx(expected.item(), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------------ KID
def unbiased_mmd(fake, real):
    """Return the unbiased estimate of MMD² under the kernel (x·y/d + 1)³, in float64."""
    fake, real = fake.double(), real.double()
    n, m, d = len(fake), len(real), fake.shape[1]

    def kernel(x, y):
        return (x @ y.T / d + 1) ** 3

    within_fake, within_real = kernel(fake, fake), kernel(real, real)
    within_fake = (within_fake.sum() - within_fake.trace()) / (n * (n - 1))
    within_real = (within_real.sum() - within_real.trace()) / (m * (m - 1))
    return (within_fake + within_real - 2 * kernel(fake, real).mean()).item()


def test_kernel_distance_is_the_unbiased_mmd():
    fake, real = cloud(600, seed=1, shift=0.3), cloud(600)
    expected = unbiased_mmd(fake, real)
    found, error = du.kernel_distance(fake, real)
    assert expected > 0.3
    assert abs(found - expected) < max(4 * error, 1e-3 * expected)  # a subset of up to all points has no error


def test_kernel_distance_of_subsets_estimates_the_same(train_reading, test_reading):
    fake, real = train_reading.features[:2000], test_reading.features[:2000]
    for points in (fake, fake + 0.3 * cloud(*fake.shape)):
        found, error = du.kernel_distance(points, real)
        assert abs(found - unbiased_mmd(points, real)) < 4 * error
    assert found > 1.5 * error


def test_kernel_distance_within_one_distribution_is_zero_within_its_error():
    found, error = du.kernel_distance(cloud(10_000, d=16, seed=1), cloud(10_000, d=16))
    assert abs(found) < 3 * error
    assert error < 0.01


def test_the_standard_error_of_kid_is_how_far_estimates_scatter():
    """Of few samples too: a generator is scored with 1,000 after each epoch."""
    for n in (400, 1500):
        draws = [du.kernel_distance(cloud(n, seed=2 * s), cloud(n, seed=2 * s + 1)) for s in range(12)]
        scatter = torch.tensor([found for found, _ in draws]).std().item()
        claimed = sum(error for _, error in draws) / len(draws)
        assert scatter / 2 < claimed < 3 * scatter, (n, scatter, claimed)


def test_kernel_distance_leaves_random_numbers_alone_and_repeats():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = du.kernel_distance(cloud(1200), cloud(1200, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert du.kernel_distance(cloud(1200), cloud(1200, seed=1)) == first


# ------------------------------------------------------------------------- precision, recall, density, coverage
def brute_force(fake, real, k):
    """Return the four metrics by loops over points, after the definitions of both papers."""

    def ball(points, index):
        distances = sorted(math.dist(points[index], other) for j, other in enumerate(points) if j != index)
        return distances[k - 1]

    fake, real = fake.tolist(), real.tolist()
    balls_real = [ball(real, i) for i in range(len(real))]
    balls_fake = [ball(fake, j) for j in range(len(fake))]
    hits = [[math.dist(real[i], fake[j]) < balls_real[i] for i in range(len(real))] for j in range(len(fake))]
    recalled = [any(math.dist(x, fake[j]) < balls_fake[j] for j in range(len(fake))) for x in real]
    return {
        "precision": sum(any(row) for row in hits) / len(fake),
        "recall": sum(recalled) / len(real),
        "density": sum(sum(row) for row in hits) / (k * len(fake)),
        "coverage": sum(any(row[i] for row in hits) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize(("n", "m", "d", "k"), [(70, 50, 2, 3), (40, 60, 5, 5), (30, 30, 8, 1)])
def test_manifold_metrics_agree_with_loops(n, m, d, k):
    fake, real = cloud(n, d, seed=1, shift=0.5), cloud(m, d)
    expected = brute_force(fake, real, k)
    assert 0 < expected["precision"] < 1
    assert 0 < expected["coverage"] < 1
    assert du.manifold_metrics(fake, real, k) == pytest.approx(expected, abs=1e-6)


def test_manifold_metrics_do_not_depend_on_the_parts_they_are_computed_in():
    fake, real = cloud(2100, 2, seed=1), cloud(2050, 2, shift=0.2)  # both longer than one part
    radius_real = torch.cdist(real, real).topk(6, largest=False).values[:, 5]
    radius_fake = torch.cdist(fake, fake).topk(6, largest=False).values[:, 5]
    between = torch.cdist(fake, real)
    expected = {
        "precision": (between < radius_real).any(dim=1).float().mean().item(),
        "recall": (between < radius_fake[:, None]).any(dim=0).float().mean().item(),
        "density": (between < radius_real).sum().item() / (5 * len(fake)),
        "coverage": (between < radius_real).any(dim=0).float().mean().item(),
    }
    assert du.manifold_metrics(fake, real) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("d", [2, 16])
def test_density_and_coverage_of_one_distribution_have_known_means(d):
    """Naeem et al. 2020, Lemma 2: E[density] = 1, E[coverage] = 1 - Π (N - j) / (M + N - j) for N reals and M fakes."""
    n_real, n_fake, k, draws = 300, 150, 5, 40
    runs = [du.manifold_metrics(cloud(n_fake, d, 2 * s), cloud(n_real, d, 2 * s + 1), k) for s in range(draws)]
    missed = math.prod((n_real - j) / (n_fake + n_real - j) for j in range(1, k + 1))
    for name, expected in (("density", 1.0), ("coverage", 1 - missed)):
        values = torch.tensor([run[name] for run in runs])
        assert abs(values.mean().item() - expected) < 3.5 * values.std().item() / math.sqrt(draws), name
        assert values.mean().item() == pytest.approx(expected, rel=0.05), name


def test_precision_and_recall_change_places_with_the_sets():
    fake, real = cloud(300, seed=1, shift=0.4), cloud(500)
    there, back = du.manifold_metrics(fake, real), du.manifold_metrics(real, fake)
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])
    assert there["precision"] != there["recall"]


def test_sets_that_do_not_meet_score_zero():
    assert set(du.manifold_metrics(cloud(200, shift=100.0), cloud(200)).values()) == {0.0}


def test_half_of_the_modes_missing_halves_recall_and_coverage_and_leaves_precision():
    centres = torch.tensor([-10.0, 10.0])
    real = cloud(1000) + centres.repeat(500)[:, None]
    whole = du.manifold_metrics(cloud(1000, seed=1) + centres.repeat(500)[:, None], real)
    half = du.manifold_metrics(cloud(1000, seed=1) + centres[0], real)
    assert half["recall"] == pytest.approx(0.5, abs=0.02)
    assert half["coverage"] == pytest.approx(0.5, abs=0.02)
    assert half["precision"] == pytest.approx(whole["precision"], abs=0.03)
    assert min(whole["recall"], whole["coverage"]) > 0.9


def test_one_fake_repeated_recalls_nothing(reference):
    real = reference.test.features
    scores = du.manifold_metrics(real[:1].repeat(500, 1), real)
    assert scores["precision"] == 1  # it stands where real digits do
    assert scores["recall"] < 0.002
    assert scores["coverage"] < 0.02


@pytest.mark.parametrize(("n", "m"), [(5, 50), (50, 5)])
def test_manifold_metrics_of_too_few_points_say_how_many(n, m):
    with pytest.raises(ValueError, match=f"{n} and {m} points.*more than 5"):
        du.manifold_metrics(cloud(n), cloud(m))


def test_nearest_distance_agrees_with_a_loop():
    points, others = cloud(1100, 3), cloud(40, 3, seed=1)  # more than one part
    found = du.nearest_distance(points, others)
    expected = [min(math.dist(point, other) for other in others.tolist()) for point in points.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ sizes and grey levels
@pytest.mark.parametrize("size", [16, 32, 64])
def test_samples_of_other_sizes_are_read_as_real_digits_after_the_same_trip(size, mnist_test):
    images = mnist_test[0][:300]
    samples = du.normalise(du.resize_images(images, size))  # a perfect generator of this size
    assert samples.shape == (300, 1, size, size)
    made, real = du.read_digits(samples), du.read_digits(images, size)
    assert torch.equal(made.features, real.features)
    assert torch.equal(made.probabilities, real.probabilities)


def test_the_trip_over_64_pixels_costs_the_judge_little(mnist_test):
    accuracy = (du.read_digits(mnist_test[0][:2000], 64).digits == mnist_test[1][:2000]).float().mean()
    assert accuracy > 0.985


def test_samples_are_rounded_to_the_grey_that_they_came_from():
    greys = torch.arange(256, dtype=torch.uint8).repeat(28 * 28 // 256 + 1)[: 28 * 28].view(1, 28, 28)
    assert torch.equal(du.read_digits(du.normalise(greys)).features, du.read_digits(greys).features)


def test_scores_of_samples_at_64_pixels(train_digits, mnist_test):
    reference = du.Reference(train_digits[0][:600], mnist_test[0][:400], 64)
    perfect = du.normalise(du.resize_images(mnist_test[0][:400], 64))
    scores = du.score_samples(perfect, reference)
    assert scores["fid"] == pytest.approx(0, abs=1e-3)
    assert scores["recall"] == scores["coverage"] == 1
    for name, value in reference.floor(400).items():
        assert scores[f"{name}_floor"] == value


# ---------------------------------------------------------------------------------------------------------- near-copies
def test_copies_of_training_digits_are_called_copies(reference, train_digits):
    copies = train_digits[0][:500]
    assert du.score_samples(du.normalise(copies), reference)["near_copies"] == 1
    slightly = du.normalise(study.noise(copies, 0.005))
    assert du.score_samples(slightly, reference)["near_copies"] > 0.9


def test_about_one_in_a_hundred_new_digits_is_called_a_copy(reference, mnist_test):
    assert 0.003 < reference.floor(2000)["near_copies"] < 0.025
    new = du.score_samples(du.normalise(mnist_test[0][2000:4000]), reference)
    assert 0.003 < new["near_copies"] < 0.025
    assert new["near_copies_floor"] == reference.floor(2000)["near_copies"]


def test_real_digits_score_as_the_floor_does(reference, mnist_test):
    scores = du.score_samples(du.normalise(mnist_test[0][2000:4000]), reference, mnist_test[1][2000:4000])
    assert scores["fid"] < 0.5
    assert scores["digit_accuracy"] > 0.98
    for name in ("precision", "recall", "coverage", "confidence", "class_entropy"):
        assert scores[name] == pytest.approx(scores[f"{name}_floor"], abs=0.06), name


def test_the_floor_is_that_of_as_many_real_digits_as_are_scored(reference, mnist_test):
    """Distance and coverage depend on how many are scored: 300 real digits must look like real digits."""
    scores = du.score_samples(du.normalise(mnist_test[0][2000:2300]), reference)
    assert scores["coverage"] == pytest.approx(scores["coverage_floor"], abs=0.1)
    assert scores["fid"] < 2 * scores["fid_floor"]


# ------------------------------------------------------------------------------------------------------------- evaluate
@pytest.fixture(scope="module")
def few(train_digits):
    return train_digits[0][:300], train_digits[1][:300]


@pytest.fixture(scope="module")
def handful(few):
    """Return so few digits that an epoch takes a moment, where the judge is played by a list of answers."""
    return few[0][:64], few[1][:64]


def check_scores(scores, n):
    """Assert that every score is there, in range, and beside its floor."""
    assert scores["n"] == n
    assert scores["judge_accuracy"] >= 0.994
    assert scores["judge_sha256"] == du.JUDGE_SHA256
    for name in SCALARS:
        for key in (name, f"{name}_floor"):
            assert math.isfinite(scores[key]), key
            assert scores[key] >= (-0.1 if name == "kid" else 0), key
            assert scores[key] <= (math.inf if name in (*LOW_IS_GOOD, "density") else 1 + 1.31 * ("entropy" in name))
    assert scores["kid_se"] >= 0
    assert len(scores["class_histogram"]) == 10
    assert sum(scores["class_histogram"]) == pytest.approx(1, abs=1e-5)
    entropy = -sum(share * math.log(share) for share in scores["class_histogram"] if share)
    assert scores["class_entropy"] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, {}) for kind in RECIPES), (du.DCGAN, {"image_size": 32}), (du.FastDCGAN, {"conditional": False})],
)
def test_evaluate_scores_every_recipe_on_tensors(kind, changes, few):
    gan = make(kind, **changes)
    gan.train(1, data=few, callbacks=[])
    scores = gan.evaluate(200)
    check_scores(scores, 200)
    assert scores["fid"] > 5 * scores["fid_floor"]  # it has learnt next to nothing
    assert ("digit_accuracy" in scores) == gan.config.conditional
    assert len(gan.reference().test.features) == len(gan.reference().train.features) == 150  # halves


def test_evaluate_accepts_images_that_are_no_digits():
    stripes = (torch.arange(20)[:, None] * torch.randint(1, 30, (260, 1, 20), generator=rng()) % 256).to(torch.uint8)
    gan = make(du.DCGAN)
    gan.train(1, data=stripes, callbacks=[])
    check_scores(gan.evaluate(100), 100)


def test_evaluate_compares_with_the_test_split_of_what_it_was_trained_on(few, mnist_test, monkeypatch):
    asked = serve_few(monkeypatch, *few, mnist_test[0][:300], mnist_test[1][:300])
    gan = make(du.StableDCGAN)
    gan.train(1, data="fashion-mnist", callbacks=[])
    scores = gan.evaluate(150)
    check_scores(scores, 150)
    assert asked == [("fashion-mnist", "train"), ("fashion-mnist", "test")]
    assert torch.equal(gan.reference().test.features, du.read_digits(mnist_test[0][:300]).features)
    assert torch.equal(gan.reference().train.features, du.read_digits(few[0]).features)
    gan.evaluate(150)
    assert len(asked) == 2  # real digits are read once
    gan.train(1, data=few, callbacks=[])
    assert len(gan.reference().test.features) == 150
    assert torch.equal(gan.reference().seen, du.read_digits(few[0]).features)  # other data, read anew


def test_an_untrained_gan_is_compared_with_mnist(few, mnist_test, monkeypatch):
    asked = serve_few(monkeypatch, *few, mnist_test[0][:300], mnist_test[1][:300])
    check_scores(make().evaluate(150), 150)
    assert asked == [("mnist", "train"), ("mnist", "test")]


def test_evaluate_repeats_for_a_seed_and_changes_nothing(few):
    gan, twin = make(), make()
    for one in (gan, twin):
        one.train(1, data=few, callbacks=[])
    gan.generator.train()
    gan.discriminator.eval()
    state, modes, history = torch.get_rng_state(), gan.generator.training, gan.history.to_json()
    before = weights(gan.generator).clone()
    first, again, other = gan.evaluate(150, seed=1), gan.evaluate(150, seed=1), gan.evaluate(150, seed=2)
    assert first == again
    assert first["fid"] != other["fid"]
    assert torch.equal(torch.get_rng_state(), state)
    assert gan.generator.training == modes
    assert not gan.discriminator.training
    assert torch.equal(weights(gan.generator), before)
    assert gan.history.to_json() == history
    for one in (gan, twin):
        one.train(1, data=few, callbacks=[])
    assert same(gan, twin)  # training goes on as if nothing had been evaluated


def test_evaluate_leaves_the_place_in_an_epoch_as_it_was(few, tmp_path, mnist_test, monkeypatch):
    """Of a checkpoint from the middle of an epoch too, of which the data are not there yet."""

    class Stop(du.Callback):
        def on_batch_end(self, gan):
            if gan.step == 5:
                gan.stop("test")

    make_half = make()
    make_half.train(1, data=few, callbacks=[Stop()])
    make_half.save(tmp_path / "half")
    gan = du.FastDCGAN.load(tmp_path / "half")
    position, epochs = gan.position, list(gan.history["epoch"])
    assert position == 80
    serve_few(monkeypatch, few[0][:250], few[1][:250], mnist_test[0][:300], mnist_test[1][:300])
    gan.evaluate(100)
    assert gan.position == position
    assert gan.history["epoch"] == epochs
    gan.train(1, data=few, callbacks=[])
    make_half.train(1, data=few, callbacks=[])
    assert same(gan, make_half)


def stand_in(monkeypatch, gan, images, labels):
    """Let a conditional GAN generate real digits of the classes that it is asked for, each of them once."""
    pools = {digit: iter(du.normalise(images[labels == digit])) for digit in range(10)}

    def generate(z, digits=None):
        return torch.stack([next(pools[int(digit)]) for digit in gan._digits(len(z), digits)])

    monkeypatch.setattr(gan, "generate", generate)


def test_a_perfect_generator_scores_as_real_digits_do(few, mnist_test, monkeypatch):
    gan = make()
    gan.train(1, data=few, callbacks=[])
    stand_in(monkeypatch, gan, mnist_test[0], mnist_test[1])
    scores = gan.evaluate(600)
    assert scores["digit_accuracy"] > 0.98
    assert scores["fid"] < 2 * scores["fid_floor"]
    assert scores["class_entropy"] == pytest.approx(math.log(10), abs=0.01)
    assert scores["near_copies"] < 0.2  # the bar was set with 75 digits


def test_a_generator_that_repeats_training_digits_is_found_out(train_digits, monkeypatch):
    gan = make()
    images, labels = (part[:600] for part in train_digits)
    gan.train(1, data=(images, labels), callbacks=[])
    stand_in(monkeypatch, gan, images[::2], labels[::2])
    assert gan.evaluate(150)["near_copies"] == 1


def test_copies_of_any_training_digit_are_found(train_digits, monkeypatch):
    gan = make()
    images, labels = (part[:600] for part in train_digits)
    gan.train(1, data=(images, labels), callbacks=[])
    stand_in(monkeypatch, gan, images[1::2], labels[1::2])
    assert gan.evaluate(150)["near_copies"] == 1


def test_the_order_of_the_images_does_not_decide_the_floor(train_digits):
    images, labels = train_digits
    pairs = torch.stack([images[labels == 3][:150], images[labels == 8][:150]], dim=1).flatten(0, 1)  # 3, 8, 3, 8, …
    gan = make(conditional=False)
    gan.train(1, data=pairs, callbacks=[])
    shuffled = du.Reference(pairs[torch.arange(300) % 4 < 2], pairs[torch.arange(300) % 4 > 1], 28)
    assert gan.reference().floor(150)["fid"] < 3 * shuffled.floor(150)["fid"]


def test_a_generator_of_one_digit_is_found_out(few, mnist_test, monkeypatch):
    gan = make()
    gan.train(1, data=few, callbacks=[])
    sevens = du.normalise(mnist_test[0][mnist_test[1] == 7])
    monkeypatch.setattr(gan, "generate", lambda z, digits=None: sevens[: len(z)])
    scores = gan.evaluate(300)
    assert scores["class_histogram"][7] > 0.97
    assert scores["class_entropy"] < 0.2
    assert scores["digit_accuracy"] == pytest.approx(0.1, abs=0.02)
    assert scores["recall"] < 0.35
    assert scores["coverage"] < 0.2
    assert scores["fid"] > 5 * scores["fid_floor"]


def test_the_printed_table_names_judge_hash_and_floor(few):
    gan = make()
    gan.train(1, data=few, callbacks=[])
    scores = gan.evaluate(100)
    text = str(scores)
    assert f"{scores['judge_accuracy']:.2%}" in text
    assert du.JUDGE_SHA256[:12] in text
    assert text == repr(scores)
    row = next(line for line in text.splitlines() if line.startswith("Fréchet"))
    assert row.split()[-2:] == [f"{scores['fid']:.2f}", f"{scores['fid_floor']:.2f}"]
    assert all(title in text for name, (title, _) in du.SCORES.items() if name != "inception_fid")


def test_scores_leave_random_numbers_alone(reference, mnist_test):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    du.score_samples(du.normalise(mnist_test[0][:100]), reference)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------ bad input
def spoiled(value):
    samples = torch.zeros(120, 1, 28, 28)
    samples[3, 0, 5, 5] = value
    return samples


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (spoiled(1.5), r"reach from 0 to 1\.5; images are in \[-1, 1\]"),
        (spoiled(-3.0), r"reach from -3 to 0"),
        (spoiled(math.nan), "NaN"),
        (spoiled(math.inf), "NaN or infinite"),
        (torch.zeros(120, 28, 28), r"shape \(120, 28, 28\); needed is \(n, 1, H, H\)"),
        (torch.zeros(120, 3, 28, 28), r"shape \(120, 3, 28, 28\)"),
        (torch.zeros(120, 1, 28, 32), r"shape \(120, 1, 28, 32\)"),
        (torch.zeros(99, 1, 28, 28), r"there are 99 samples; these scores need at least 100"),
        (torch.zeros(0, 1, 28, 28), r"there are 0 samples; these scores need at least 100"),
        (torch.zeros(120, 1, 32, 32), r"samples are 32 pixels wide, the reference was read at 28"),
    ],
    ids=["above", "below", "nan", "inf", "no channel", "colour", "oblong", "few", "none", "another size"],
)
def test_samples_that_cannot_be_scored_are_refused_in_one_line(samples, says, reference):
    with pytest.raises(ValueError, match=says) as error:
        du.score_samples(samples, reference)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "samples", [spoiled(1.5), spoiled(math.nan), torch.zeros(9, 28, 28), torch.zeros(0, 1, 28, 28)]
)
def test_the_judge_reads_no_bad_samples(samples):
    with pytest.raises(ValueError, match="samples"):
        du.read_digits(samples)


def test_samples_a_rounding_error_outside_the_range_are_accepted():
    assert du.read_digits(spoiled(1.001)).digits.shape == (120,)


@pytest.mark.parametrize(("n_train", "n_test"), [(99, 200), (200, 99)])
def test_a_reference_of_too_few_images_says_how_many(n_train, n_test, mnist_test):
    images = mnist_test[0]
    with pytest.raises(ValueError, match=rf"{n_train} and {n_test} real images.*at least 100"):
        du.Reference(images[:n_train], images[:n_test], 28)


def test_evaluate_refuses_too_few(few):
    gan = make()
    gan.train(1, data=few, callbacks=[])
    with pytest.raises(ValueError, match="n = 99; these scores need at least 100"):
        gan.evaluate(99)
    gan.train(1, data=(few[0][:150], few[1][:150]), callbacks=[])
    with pytest.raises(ValueError, match="75 and 75 real images"):
        gan.evaluate(100)


# --------------------------------------------------------------------------------------------------------- JudgeSamples
def play(monkeypatch, gan, distances):
    """Let the judge say these Fréchet distances, one an epoch; an exception among them is raised."""
    answers = iter(distances)

    def judge_samples(n, with_distances=True):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return {"confidence": 0.9, "class_gap": 0.1, "fid": answer}

    monkeypatch.setattr(gan, "judge_samples", judge_samples)
    monkeypatch.setattr(du, "enough_images", lambda *_: None)


def test_judge_samples_writes_columns_in_step_with_the_epochs(few):
    gan = make()
    gan.train(2, data=few, callbacks=[])
    gan.train(2, data=few, callbacks=[du.JudgeSamples(100)])
    assert all(len(values) == 4 for values in gan.history.values())
    for name in ("confidence", "class_gap", "fid", "near_copies"):
        assert gan.history[name][:2] == [None, None], name
        assert all(math.isfinite(value) for value in gan.history[name][2:]), name
    gan.train(1, data=few, callbacks=[])
    assert gan.history["fid"][4] is None
    assert "fid" not in gan.history.last()
    now = gan.judge_samples(100)
    assert gan.judge_samples(100) == now  # the same latent vectors each time
    expected = du.read_digits(gan.fixed_samples(100))
    assert now["confidence"] == pytest.approx(expected.probabilities.max(dim=1).values.mean().item())
    assert now["fid"] == pytest.approx(du.frechet_distance(expected.features, gan.reference().test.features))


def test_judge_samples_without_distances_reads_classes_only(few):
    gan = make()
    gan.train(1, data=few, callbacks=[du.JudgeSamples(64, distances=False)])
    assert {"confidence", "class_gap"} <= set(gan.history)
    assert not {"fid", "near_copies"} & set(gan.history)
    assert gan._reference is None  # no real digits were measured for it


def test_the_class_gap_is_the_share_that_would_have_to_change_class(few, mnist_test, monkeypatch):
    gan = make(conditional=False)
    gan.train(1, data=few, callbacks=[])
    sevens = du.normalise(mnist_test[0][mnist_test[1] == 7])
    monkeypatch.setattr(gan, "fixed_samples", lambda n=32: sevens[:n])
    sevens_among_real = (few[1] == 7).float().mean().item()
    assert gan.judge_samples(100, distances=False)["class_gap"] == pytest.approx(1 - sevens_among_real, abs=0.02)
    monkeypatch.setattr(gan, "fixed_samples", lambda n=32: du.normalise(few[0][:n]))
    assert gan.judge_samples(300, distances=False)["class_gap"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("held", ["balanced", "mostly ones", "0 to 3"])
def test_a_perfect_conditional_g_has_no_class_gap_whatever_the_data_hold(held, few, mnist_test, monkeypatch):
    """Where classes are rare or missing, too: it is asked for all alike, and has learnt those that it saw."""
    images, labels = mnist_test
    ranks = torch.stack([(labels[: k + 1] == label).sum() - 1 for k, label in enumerate(labels[:3000])])
    most = {"balanced": torch.full((10,), 40), "mostly ones": torch.tensor([5, 250] + [5] * 8)}.get(
        held, torch.tensor([60] * 4 + [0] * 6)
    )
    kept = (ranks < most[labels[:3000]]).nonzero()[:, 0]
    gan = make(du.FastDCGAN)
    gan._set_data((images[kept], labels[kept]))
    by_digit = [du.normalise(images[labels == digit][-50:]) for digit in range(10)]
    perfect = torch.stack([by_digit[k % 10 if (labels[kept] == k % 10).any() else 0][k // 10] for k in range(300)])
    monkeypatch.setattr(gan, "fixed_samples", lambda n: perfect[:n])
    assert gan.judge_samples(300, distances=False)["class_gap"] < 0.03
    perfect = by_digit[1][torch.arange(300) % 50]  # collapse
    share = 1 - 1 / len(labels[kept].unique())
    assert gan.judge_samples(300, distances=False)["class_gap"] == pytest.approx(share, abs=0.03)


def test_an_epoch_cut_short_is_judged_and_replaced(few):
    class Stop(du.Callback):
        def on_batch_end(self, gan):
            if gan.step == 5:
                gan.stop("test")

    gan = make()
    gan.train(1, data=few, callbacks=[Stop(), du.JudgeSamples(100)])
    assert gan.history["epoch"] == [80 / 300]
    early = gan.history["fid"][0]
    gan.train(1, data=few, callbacks=[du.JudgeSamples(100)])
    assert gan.history["epoch"] == [1]
    assert len(gan.history["fid"]) == 1
    assert gan.history["fid"][0] != early


def test_the_best_generator_is_kept_and_loads(handful, tmp_path, monkeypatch):
    gan = make()
    play(monkeypatch, gan, [5.0, 3.0, 4.0, 3.5])
    kept = []

    class Keep(du.Callback):
        def on_epoch_end(self, gan):
            kept.append(weights(gan.generator).clone())

    gan.train(4, data=handful, callbacks=[Keep(), du.JudgeSamples(100, best=tmp_path / "best")])
    best = du.FastDCGAN.load(tmp_path / "best")
    assert best.epoch == 2
    assert best.history["fid"] == [5.0, 3.0]
    assert torch.equal(weights(best.generator), kept[1])
    assert best.sample(4, seed=0).shape == (4, 1, 28, 28)


def test_an_epoch_that_was_not_judged_is_not_kept_as_the_best(handful, tmp_path, monkeypatch):
    gan = make()
    play(monkeypatch, gan, [3.0, OSError("no judge")])
    with pytest.warns(UserWarning, match="no judge"):
        gan.train(2, data=handful, callbacks=[du.JudgeSamples(100, best=tmp_path / "best")])
    assert gan.history["fid"] == [3.0, None]
    assert du.FastDCGAN.load(tmp_path / "best").epoch == 1


def test_a_best_folder_that_cannot_be_written_costs_the_checkpoint_alone(handful, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    gan = make()
    play(monkeypatch, gan, [3.0, 2.0])
    with pytest.warns(UserWarning, match="best generator"):
        gan.train(2, data=handful, callbacks=[du.JudgeSamples(100, best=tmp_path / "file" / "best")])
    assert gan.epoch == 2


def test_patience_ends_training_when_epochs_stop_paying(handful, monkeypatch):
    gan = make()
    play(monkeypatch, gan, [5.0, 4.0, 3.99, 4.2, 1.0])
    gan.train(5, data=handful, callbacks=[du.JudgeSamples(100, patience=2)])
    assert gan.epoch == 4
    assert "Fréchet" in gan.stop_reason
    gan = make()
    play(monkeypatch, gan, [5.0, 4.0, 3.99, 3.0, 3.1])
    gan.train(5, data=handful, callbacks=[du.JudgeSamples(100, patience=2)])
    assert gan.epoch == 5
    assert gan.stop_reason is None


def test_judging_does_not_change_what_is_learnt(few):
    watched, alone = make(), make()
    watched.train(2, data=few, callbacks=[du.JudgeSamples(100)])
    alone.train(2, data=few, callbacks=[])
    assert same(watched, alone)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": 99}, "n = 99.* n must be at least 100"),
        ({"distances": False, "best": "folder"}, "need distances=True"),
        ({"distances": False, "patience": 3}, "need distances=True"),
        ({"patience": 0}, "patience = 0"),
        ({"patience": -1}, "patience = -1"),
        ({"n": 0, "distances": False}, "n = 0"),
    ],
)
def test_bad_arguments_of_judge_samples(arguments, says):
    with pytest.raises(ValueError, match=says):
        du.JudgeSamples(**arguments)


def test_without_the_judges_file_training_warns_and_goes_on(few, empty_places):
    gan = make()
    with pytest.warns(UserWarning, match="the judge's weights are not there"):
        gan.train(2, data=few, callbacks=[du.JudgeSamples(100, patience=1)])
    assert gan.epoch == 2
    assert "fid" not in gan.history


def test_with_a_wrong_judge_training_is_refused_before_the_first_batch(few, empty_places):
    (empty_places[0] / "judge.safetensors").write_bytes(b"a half-finished download")
    gan = make()
    with pytest.raises(ValueError, match="SHA-256"):
        gan.train(1, data=few, callbacks=[du.JudgeSamples(100)])
    assert gan.step == 0


@pytest.mark.parametrize(
    ("distances", "since"),
    [
        ([], 0),
        ([5.0], 0),
        ([5.0, 4.0, 3.0], 0),
        ([5.0, 4.0, 4.5], 1),
        ([5.0, 6.0, 7.0, 8.0], 3),
        ([5.0, 4.95, 4.91], 2),  # less than 2 % below the best
        ([5.0, 4.95, 4.91, 4.85], 0),  # small gains add up
        ([None, 5.0, None, 4.0], 0),
        ([5.0, None, 5.0, None], 1),  # epochs that were not judged count neither way
        ([5.0, math.nan, 4.0], 0),
    ],
)
def test_epochs_without_gain(distances, since):
    history = du.History(du.Config())
    assert du.epochs_without_gain(history) == 0  # never judged
    history["fid"] = distances
    assert du.epochs_without_gain(history) == since


def test_epochs_without_gain_with_another_least_gain():
    history = du.History(du.Config())
    history["fid"] = [5.0, 4.0, 3.5]
    assert du.epochs_without_gain(history, least=0.3) == 2
    assert du.epochs_without_gain(history, least=0.0) == 0


# -------------------------------------------------------------------------------------------------------- Inception FID
@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_torch_fidelity_one_line_says_what_is_missing(mnist_small, capsys):
    assert du.inception_distance(torch.zeros(4, 1, 28, 28), mnist_small[0]) is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "pip install torch-fidelity" in said


class Metric:
    """Stand in for torchmetrics' Inception FID: remember what it is given."""

    def __init__(self, feature):
        assert feature == 2048
        self.seen = {True: [], False: []}
        Metric.last = self

    def update(self, images, real):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.seen[real].append(images)

    def compute(self):
        return torch.tensor(12.5)


def test_inception_gets_all_images_in_three_equal_colours_at_the_samples_size(monkeypatch, mnist_small):
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Metric)
    images = mnist_small[0][:250]
    samples = du.normalise(du.resize_images(images[:130], 32))
    assert du.inception_distance(samples, images) == 12.5
    fake, real = (torch.cat(Metric.last.seen[kind]) for kind in (False, True))
    assert fake.shape == (130, 3, 32, 32)
    assert torch.equal(real[:, 2], du.resize_images(images, 32))
    assert torch.equal(fake[:, 1], real[:130, 0])


def test_inception_gets_white_where_a_sample_is_a_rounding_error_above_one(monkeypatch, mnist_small):
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Metric)
    du.inception_distance(torch.full((2, 1, 28, 28), 1.005), mnist_small[0][:2])
    assert (Metric.last.seen[False][0] == 255).all()


def test_no_network_is_said_in_one_line(monkeypatch, mnist_small, capsys):
    def fail(feature):
        raise OSError("<urlopen error: no route>\nmore")

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", fail)
    assert du.inception_distance(torch.zeros(4, 1, 28, 28), mnist_small[0]) is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "no route" in said


def test_evaluate_adds_inception_when_asked(few, monkeypatch):
    gan = make()
    gan.train(1, data=few, callbacks=[])
    monkeypatch.setattr(du, "inception_distance", lambda samples, real: (samples.shape, real.shape))
    scores = gan.evaluate(100, inception=True)
    assert scores["inception_fid"] == ((100, 1, 28, 28), (150, 28, 28))
    assert "inception_fid" not in gan.evaluate(100)


def test_importing_the_module_does_not_import_torchmetrics(root):
    code = "import sys, dcgan_utils; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_what_judging_lacks_is_said_before_the_first_batch(tmp_path, mnist_small):
    images, labels = mnist_small
    gan, few = make(), (images[:150], labels[:150])
    with pytest.raises(ValueError, match="75 and 75 real images"):
        gan.train(1, data=few, callbacks=[du.JudgeSamples(100)])
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes.txt").write_text("mine")
    with pytest.raises(du.CheckpointError, match="holds other things"):
        gan.train(1, data=(images[:250], labels[:250]), callbacks=[du.JudgeSamples(100, best=tmp_path / "best")])
    assert gan.step == 0


def test_a_folder_of_training_images_alone_is_judged_by_halves(tmp_path, mnist_small):
    images, labels = mnist_small
    rows = torch.cat([labels[:220, None], images[:220].flatten(1)], dim=1)
    header = "label," + ",".join(f"pixel{i}" for i in range(784))
    np.savetxt(tmp_path / "train.csv", rows.numpy(), fmt="%d", delimiter=",", header=header, comments="")
    gan = make()
    gan.train(1, data=tmp_path, callbacks=[])
    train, test = gan._real_images()
    assert (len(train), len(test)) == (110, 110)
    assert len(gan.reference().seen) == 220
