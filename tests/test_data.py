"""Where images come from: MNIST's places, names, folders; and their size, range and what is printed."""

import gzip
import hashlib
import importlib
import io
import os
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from samples import DASH, DOT, IMAGES, LABELS, NESTED, picture, refused, write_csv, write_idx
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

import dcgan_utils as du
from dcgan.data import DIGIT_RECOGNIZER, project_file

DIGESTS = {  # of the four original files, uncompressed
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Return five images that are neither square nor alike, and their labels."""
    return np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8), np.array([3, 0, 4, 0, 5])


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """Return an empty folder that the module takes for Kaggle's input."""
    folder = tmp_path / "kaggle" / "input"
    folder.mkdir(parents=True)
    monkeypatch.setattr("dcgan.data.KAGGLE_INPUT", folder)
    return folder


@pytest.fixture
def no_embedded(tmp_path, monkeypatch):
    """Take the embedded files away, and return the folder in which torchvision keeps what it downloads."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("dcgan.data.EMBEDDED_MNIST", tmp_path / "elsewhere" / "mnist")
    return tmp_path / "elsewhere" / "download"


def content(name: str) -> bytes:
    """Return one of the embedded files, uncompressed."""
    (path,) = du.EMBEDDED_MNIST.glob(f"{name}-*.gz")
    return gzip.decompress(path.read_bytes())


# ----------------------------------------------------------------------------------------------- the embedded files
@pytest.mark.parametrize(
    ("split", "stem", "first", "counts"),
    [
        ("train", "train", [5, 0, 4, 1, 9], [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("test", "t10k", [7, 2, 1, 0, 4], [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ],
)
def test_embedded_mnist(capsys, split, stem, first, counts):
    data = du.load_images("mnist", split)
    images, labels = data
    assert (images.shape, images.dtype) == ((sum(counts), 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((sum(counts),), torch.int64)
    assert labels[:5].tolist() == first
    assert labels.bincount().tolist() == counts
    assert images.numpy().tobytes() == content(f"{stem}-images")[16:]
    assert bytes(labels.tolist()) == content(f"{stem}-labels")[8:]
    assert (data.name, data.classes) == ("mnist", tuple("0123456789"))
    (line,) = capsys.readouterr().out.splitlines()
    assert all(part in line for part in (f"{sum(counts):,}", "28×28", "gray", "10 classes", f"{stem}-images-idx3"))


@pytest.mark.parametrize("name", DIGESTS)
def test_embedded_files_are_the_originals(name, root):
    assert hashlib.sha256(content(name)).hexdigest() == DIGESTS[name] == du.MNIST_SHA256[name]
    text = (root / "data" / "mnist" / "README.md").read_text()
    assert all(part in text for part in (name, DIGESTS[name], "LeCun", "CC BY-SA 3.0"))


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_changed_embedded_file_is_refused(kind, tmp_path, monkeypatch):
    for path in du.EMBEDDED_MNIST.glob("t10k*.gz"):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        if kind in path.name:
            raw[5000] ^= 1  # one bit; header, length and gzip layer stay sound
        (tmp_path / path.name).write_bytes(gzip.compress(raw, 1))
    monkeypatch.setattr("dcgan.data.EMBEDDED_MNIST", tmp_path)
    assert str(tmp_path) in refused(du.load_images, "mnist", "test")


@pytest.mark.parametrize("package", ["", "inner"])
def test_files_are_found_where_the_package_is_joined_to_one_file(root, tmp_path, monkeypatch, package):
    texts = [(root / "dcgan" / f"{name}.py").read_text() for name in ("config", "arrays", "files", "data")]
    lines = [line for text in texts for line in text.splitlines() if not line.startswith(("from .", "from __future"))]
    folder = tmp_path / package
    (folder / "data").mkdir(parents=True)
    (folder / f"joined{package}.py").write_text("\n".join(["from __future__ import annotations", *lines]))
    (folder / "data" / "mnist").symlink_to(root / "data" / "mnist")
    monkeypatch.syspath_prepend(tmp_path)
    joined = importlib.import_module(f"{package}.joined{package}".strip("."))
    assert folder / "data" / "mnist" == joined.EMBEDDED_MNIST
    assert len(joined.load_images("mnist", "test").images) == 10_000
    assert package or joined.project_file("data/none") == folder / "data" / "none"
    assert project_file("data/none") == root / "data" / "none"


# ----------------------------------------------------------------------------------------------- where MNIST is found
@pytest.mark.parametrize("place", ["mnist-dataset", "datasets/hojjatk/mnist-dataset", "competitions/digits"])
@pytest.mark.parametrize("spelling", [DASH, DOT, NESTED], ids=["dash", "dot", "nested"])
def test_mnist_is_found_on_a_kaggle_mount_before_the_embedded_files(mounts, mnist_test, capsys, place, spelling):
    write_idx(mounts / place, *map(np.asarray, mnist_test), "test", spelling)
    images, labels = du.load_images("mnist", "test")
    assert torch.equal(images, mnist_test[0])
    assert torch.equal(labels, mnist_test[1])
    line = capsys.readouterr().out
    assert str(mounts / place) in line
    assert "embedded" not in line


@pytest.mark.parametrize("change", ["", "pixel", "label", "order"])
def test_a_table_is_mnist_by_its_content_alone(mounts, mnist_test, capsys, change):
    images, labels = (part.numpy().copy() for part in mnist_test)
    images[5000, 14, 14] ^= change == "pixel"
    labels[5000] ^= change == "label"
    order = slice(None, None, -1 if change == "order" else 1)
    path = write_csv(mounts / "mnist-in-csv" / "mnist_test.csv", images[order], labels[order])
    found = du.load_images("mnist", "test")
    assert torch.equal(found.images, mnist_test[0])
    assert torch.equal(found.labels, mnist_test[1])
    assert (str(path) in capsys.readouterr().out) == (not change)
    assert (du.load_images(path, "test").name == "mnist") == (not change)


def test_the_digit_recognizer_competition_is_found_by_its_digits(mounts, capsys):
    everything = torch.cat([du.load_images("mnist", split).images for split in ("train", "test")])
    images = everything[torch.randperm(70_000, generator=torch.Generator().manual_seed(0))[:28_000]]
    path = write_csv(mounts / "competitions" / "digit-recognizer" / "test.csv", images)
    capsys.readouterr()
    found = du.load_images("mnist", "test")
    assert torch.equal(found.images, images)
    assert set(found.labels.tolist()) == {-1}
    assert str(path) in capsys.readouterr().out
    rows, _, last = path.read_text().rstrip().rpartition("\n")
    path.write_text(f"{rows}\n77{last[last.index(',') :]}")  # one digit is not MNIST's
    assert len(du.load_images("mnist", "test").images) == 10_000


def test_the_competition_is_recognized_without_mnist_at_hand(mounts, monkeypatch, mnist_small, tmp_path):
    n, total, squares = DIGIT_RECOGNIZER["train"]  # as published: mean and deviation of its pixels
    assert total / (n * 784) == 33.408911169825075
    assert squares / (n * 784) - (total / (n * 784)) ** 2 == pytest.approx(78.677739760763**2, rel=1e-13)
    pixels = torch.frombuffer(bytearray(content("train-images")[16:] + content("t10k-images")[16:]), dtype=torch.uint8)
    counts, values = pixels.bincount(minlength=256), torch.arange(256)
    both = [sum(row) for row in zip(*DIGIT_RECOGNIZER.values(), strict=True)]
    assert both == [70_000, int((counts * values).sum()), int((counts * values**2).sum())]

    small, labels = mnist_small[0][:50], mnist_small[1][:50].tolist()
    sums = (50, int(small.long().sum()), int((small.long() ** 2).sum()))
    monkeypatch.setattr("dcgan.data.DIGIT_RECOGNIZER", {"train": sums})
    monkeypatch.setattr("dcgan.data.EMBEDDED_MNIST", tmp_path / "nowhere")
    write_csv(mounts / "any" / "train.csv", small.flip(0), labels[::-1])
    data = du.load_images("mnist")
    assert torch.equal(data.images, small.flip(0))
    assert data.labels.tolist() == labels[::-1]


FOREIGN = {  # what else may lie in a folder of Kaggle's input
    "nothing of ours": lambda place, images, labels: (place / "weights.bin").write_bytes(b"x"),
    "another table": lambda place, images, labels: (place / "test.csv").write_text('Id,Name\n1,"Kelly, Mr."\n'),
    "an unreadable table": lambda place, images, labels: (place / "test.csv").write_bytes(b"\xff\xfe\x00label"),
    "a pipe": lambda place, images, labels: os.mkfifo(place / "test.csv"),
    "a broken link": lambda place, images, labels: (place / "test.csv").symlink_to("/nowhere"),
    "a folder": lambda place, images, labels: (place / "test.csv").mkdir(),
    "images alone": lambda place, images, labels: write_idx(place, images, None, "test"),
    "the same form, IDX": lambda place, images, labels: write_idx(place, 255 - images, labels, "test"),
    "the same form, CSV": lambda place, images, labels: write_csv(place / "test.csv", 255 - images[:500], labels[:500]),
    "a few true digits": lambda place, images, labels: write_csv(place / "test.csv", images[:500], labels[:500]),
}


@pytest.mark.parametrize("slug", ["mnist-in-csv", "kannada"])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_else_is_attached_is_not_taken_for_mnist(mounts, mnist_test, capsys, case, slug):
    (mounts / slug).mkdir()
    FOREIGN[case](mounts / slug, *map(np.asarray, mnist_test))
    images, labels = du.load_images("mnist", "test")
    assert torch.equal(images, mnist_test[0])
    assert torch.equal(labels, mnist_test[1])
    assert "embedded" in capsys.readouterr().out


def test_a_named_folder_goes_before_everything(mounts, mnist_test, tmp_path, pair):
    write_idx(mounts / "mnist-dataset", *map(np.asarray, mnist_test), "test")
    (tmp_path / "mine").mkdir()
    assert "holds nothing" in refused(du.load_images, tmp_path / "mine", "test", kind=FileNotFoundError)
    write_idx(tmp_path / "mine", *pair, "test")
    data = du.load_images(tmp_path / "mine", "test")
    assert np.array_equal(data.images.numpy(), pair[0])
    assert data.name == str(tmp_path / "mine")


# ----------------------------------------------------------------------------------------------- torchvision's sets
CACHED = {  # the set, its folder, its files' stem, the labels in them, the labels given, the first and last class
    "mnist": ("MNIST", "{stem}", [7, 0, 9], [7, 0, 9], ("0", "9")),
    "fashion-mnist": ("FashionMNIST", "{stem}", [7, 0, 9], [7, 0, 9], ("T-shirt/top", "Ankle boot")),
    "kmnist": ("KMNIST", "{stem}", [7, 0, 9], [7, 0, 9], ("o", "wo")),
    "emnist": ("EMNIST", "emnist-letters-{split}", [26, 1, 2], [2, 0, 1], ("a", "z")),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", CACHED)
def test_torchvisions_sets_come_from_its_cache(no_embedded, capsys, name, split):
    kind, stem, labels, expected, ends = CACHED[name]
    raw = no_embedded / kind / "raw"
    for other in ("train", "test"):  # torchvision wants both
        images = IMAGES[:3] if other == split else IMAGES[3:]
        named = stem.format(stem={"train": "train", "test": "t10k"}[other], split=other)
        write_idx(raw, images, labels, spelling=f"{named}-{{kind}}-idx{{dims}}-ubyte")
    data = du.load_images(name, split)
    upright = IMAGES[:3].transpose(0, 2, 1) if name == "emnist" else IMAGES[:3]  # its files hold columns first
    assert np.array_equal(data.images.numpy(), upright)
    assert data.labels.tolist() == expected
    assert (data.classes[0], data.classes[-1], data.name) == (*ends, name)
    line = capsys.readouterr().out
    assert "torchvision" in line
    assert name in line


class FakeCIFAR10:
    """Stand in for a torchvision data set: no network."""

    data, targets, classes = np.zeros((3, 32, 32, 3), np.uint8), [7, 0, 9], [str(i) for i in range(10)]

    def __init__(self, folder, download, split=None, train=None):
        assert download
        self.data = self.data + np.uint8(9 if train or split == "train" else 99)


class FakeSVHN(FakeCIFAR10):
    data, targets, labels = np.zeros((3, 3, 32, 32), np.uint8), None, np.array([7, 0, 9])


class FakeQMNIST(FakeCIFAR10):
    data, targets = np.zeros((3, 28, 28), np.uint8), torch.tensor([[7, 5], [0, 5], [9, 5]])


@pytest.mark.parametrize("fake", [FakeCIFAR10, FakeSVHN, FakeQMNIST])
def test_torchvisions_other_sets(monkeypatch, fake):
    kind = fake.__name__.removeprefix("Fake")
    monkeypatch.setattr(datasets, kind, fake)
    for split, value in (("train", 9), ("test", 99)):
        images, labels = du.load_images(kind.lower(), split)
        assert images.shape == ((3, 28, 28) if fake is FakeQMNIST else (3, 3, 32, 32))
        assert images.unique().tolist() == [value]
        assert labels.tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    "error", [RuntimeError("Error:\nTried x"), urllib.error.URLError("no route"), ImportError("x")]
)
@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("svhn", "SVHN")])
def test_a_failed_download_says_what_to_do(no_embedded, mounts, monkeypatch, name, kind, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, kind, fail)
    (mounts / "train.csv").write_text("not a table of images")
    message = refused(du.load_images, name, kind=FileNotFoundError)
    assert all(part in message for part in (name, "could not be downloaded", "internet", "folder"))
    assert (str(mounts / "train.csv") in message) == (name == "mnist")


# ----------------------------------------------------------------------------------------------- folders and options
@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("spelling", [DASH, DOT, NESTED, "a/b/" + DOT], ids=["dash", "dot", "nested", "deep"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_of_idx_files(tmp_path, pair, capsys, split, spelling, gz):
    images, labels = pair
    other = "test" if split == "train" else "train"
    write_idx(tmp_path, 255 - images, labels[::-1], other, spelling, gz)  # the other split must not be taken
    write_idx(tmp_path / "half", 255 - images, None, split, spelling)  # nor a half of a pair
    write_idx(tmp_path / ".trash", 255 - images, labels, split)  # nor what is hidden
    write_idx(tmp_path / "z", images, labels, split, spelling, gz)
    found, found_labels = du.load_images(str(tmp_path), split)
    assert (found.dtype, found_labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(found.numpy(), images)
    assert np.array_equal(found_labels.numpy(), labels)
    line = capsys.readouterr().out
    assert all(part in line for part in (str(tmp_path), "6×7", "-images", " 5 of"))


def test_the_search_ends_below_six_folders_and_in_circles(tmp_path, pair):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    write_idx(tmp_path / "1/2/3/4/5/6/7", *pair)
    refused(du.load_images, tmp_path, kind=FileNotFoundError)
    picture(tmp_path / "a" / "x.png")
    assert len(du.load_images(tmp_path).images) == 1


def test_folder_without_data_lists_what_was_looked_for_and_what_is_there(tmp_path, pair):
    write_idx(tmp_path, *pair)
    (tmp_path / "notes").mkdir()
    for i in range(20):
        (tmp_path / "notes" / f"{i:02d}.txt").write_text("x")
    message = refused(du.load_images, tmp_path, "test", kind=FileNotFoundError)
    for part in (str(tmp_path), "t10k-images-idx3", "t10k-labels-idx1", ".gz", "test.csv", "PNG", "train-images"):
        assert part in message
    assert os.path.join("notes", "00.txt") in message
    assert "19.txt" not in message


@pytest.mark.parametrize(
    ("wrong", "right"), [("fashon-mnist", "fashion-mnist"), ("mnst", "mnist"), ("cifar-10", "cifar10")]
)
def test_unknown_source_is_refused_with_the_nearest_name(wrong, right):
    message = refused(du.load_images, wrong, kind=FileNotFoundError)
    assert repr(wrong) in message
    assert f"did you mean {right!r}" in message


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        *((("mnist", split), {}, repr(split)) for split in ("validation", "Train", "", None, ["train"])),
        *(((source,), {}, repr(source)) for source in ("", "  ", None, 5, b"mnist", ["mnist"])),
        *((("mnist",), {"limit": value}, repr(value)) for value in (0, -1, 1.5, True, "5")),
        *((("mnist",), {"size": value}, repr(value)) for value in (0, 10_000, 28.0)),
        *((("mnist",), {"channels": value}, repr(value)) for value in (0, 2, 4)),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, word):
    assert word in refused(du.load_images, *arguments, **options)


def test_options_apply_to_every_source(mnist_test, capsys):
    images, labels = du.load_images("mnist", "test", limit=100, size=16, channels=3)
    assert images.shape == (100, 3, 16, 16)
    assert torch.equal(images[:, 1], du.resize_images(mnist_test[0][::100], 16))
    assert torch.equal(labels, mnist_test[1][::100])
    line = capsys.readouterr().out
    assert all(part in line for part in ("100 of 16×16", "color", "28×28"))


# ----------------------------------------------------------------------------------------------- size, range, output
@pytest.mark.parametrize("size", [64, 32, 16, 40])
def test_resizing_is_torchvisions_with_antialias(mnist_small, size):
    images = mnist_small[0][:100]
    expected = v2.Resize((size, size), InterpolationMode.BILINEAR, antialias=True)(images[:, None])[:, 0]
    assert torch.equal(du.resize_images(images, size), expected)
    assert torch.equal(du.resize_images(images[:, None].repeat(1, 3, 1, 1), size)[:, 2], expected)
    assert torch.equal(du.resize_images(images.repeat(50, 1, 1), size)[4900:], expected)  # in several parts
    assert du.resize_images(images, 28) is images
    assert "20×28" in refused(du.resize_images, images[:, :20], size)


def test_normalize_maps_bytes_to_minus_one_to_one():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    values = du.normalize(images)
    assert (values.shape, values.dtype) == ((1, 1, 16, 16), torch.float32)
    assert torch.allclose(values.flatten(), torch.linspace(-1, 1, 256), atol=1e-6)
    assert torch.equal(images.flatten(), torch.arange(256, dtype=torch.uint8))  # the data stay as they are


@pytest.mark.parametrize("stdout", ["ascii", "cp1252", "closed", "missing"])
def test_what_cannot_be_printed_stops_nothing(tmp_path, monkeypatch, stdout):
    write_idx(tmp_path / "数字", IMAGES, LABELS)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8" if stdout in ("closed", "missing") else stdout)
    if stdout == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", None if stdout == "missing" else stream)
    assert len(du.load_images(tmp_path / "数字").images) == 6


PROBE = """
import os, random, socket, sys
import numpy, torch

def refuse(*arguments, **options):
    raise AssertionError("the import reached for the network")

socket.socket.connect = socket.getaddrinfo = refuse
torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
def state():
    return torch.get_rng_state().tolist(), [list(map(str, s)) if hasattr(s, "__len__") else s
                                            for s in numpy.random.get_state()], random.getstate()
before = state()
import dcgan_utils
assert state() == before, "the import drew or seeded random numbers"
heavy = [name for name in ("torchmetrics", "ipywidgets", "wandb", "tensorboard", "pandas") if name in sys.modules]
assert not heavy, f"the import brought {heavy}"
assert not os.listdir("."), "the import wrote files"
assert dcgan_utils.EMBEDDED_MNIST.is_dir(), "the working folder matters"
sys.stderr.write("END")
"""


def test_importing_prints_downloads_writes_and_seeds_nothing(root, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "END")
