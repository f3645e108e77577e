"""Data: what every source gives, where MNIST is looked for, and what is said when a file is not what it should be."""

import ast
import gzip
import hashlib
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import dcgan_utils as du

DIGESTS = {  # of the four original files, uncompressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DASH, DOT = "{stem}-{kind}-idx{dims}-ubyte", "{stem}-{kind}.idx{dims}-ubyte"  # the two spellings on Kaggle
NESTED = DASH + "/" + DASH  # a folder named like the file that it holds


def idx_bytes(array) -> bytes:
    """Return an array as an IDX file of unsigned bytes, after the format's own description."""
    array = np.asarray(array, dtype=np.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(folder: Path, images, labels, split: str = "train", spelling: str = DASH, gz: bool = False) -> None:
    """Write images and labels as two IDX files; None leaves one out."""
    stem = {"train": "train", "test": "t10k"}[split]
    for kind, dims, array in (("images", 3, images), ("labels", 1, labels)):
        if array is None:
            continue
        path = folder / (spelling.format(stem=stem, kind=kind, dims=dims) + (".gz" if gz else ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx_bytes(array)) if gz else idx_bytes(array))


def write_csv(path: Path, images, labels=None, column: int = 0) -> None:
    """Write images as a Kaggle CSV, the label in the given column, or none."""
    rows = np.asarray(images).reshape(len(images), -1).astype(int).tolist()
    header = [f"pixel{i}" for i in range(len(rows[0]))]
    if labels is not None:
        header.insert(column, "label")
        for row, label in zip(rows, np.asarray(labels).tolist(), strict=True):
            row.insert(column, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")


def refused(kind: type[Exception], function, *arguments) -> str:
    """Return the message, one line, with which a function refuses its arguments."""
    with pytest.raises(kind) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Return five images that are neither square nor alike, and their labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 6, 7), dtype=np.uint8), np.array([3, 1, 4, 1, 5])


@pytest.fixture
def mounts(tmp_path, monkeypatch) -> Path:
    """Return an empty folder that the module takes for Kaggle's input."""
    folder = tmp_path / "kaggle" / "input"
    folder.mkdir(parents=True)
    monkeypatch.setattr(du, "KAGGLE_INPUT", folder)
    return folder


class FakeDownload:
    """Stand in for a torchvision data set: no network, and it notes how it was called."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error, self.calls = name, error, []

    def __call__(self, folder, train, download):
        self.calls.append({"folder": Path(folder), "train": train, "download": download})
        if self.error is not None:
            raise self.error
        self.data = torch.full((3, 28, 28), len(self.name), dtype=torch.uint8)
        self.targets = torch.tensor([7, 8, 9])
        return self


@pytest.fixture
def downloads(monkeypatch) -> dict[str, FakeDownload]:
    """Replace torchvision's three data sets."""
    fakes = {name: FakeDownload(name) for name in ("MNIST", "FashionMNIST", "KMNIST")}
    for name, fake in fakes.items():
        monkeypatch.setattr(du.datasets, name, fake)
    return fakes


@pytest.fixture
def no_embedded(tmp_path, monkeypatch) -> Path:
    """Take the embedded files away."""
    folder = tmp_path / "elsewhere" / "data" / "mnist"
    monkeypatch.setattr(du, "EMBEDDED_MNIST", folder)
    return folder


# ----------------------------------------------------------------------------------------------- the embedded files
def test_embedded_training_set(capsys):
    images, labels = du.load_images("mnist")
    assert (images.shape, images.dtype) == ((60_000, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((60_000,), torch.int64)
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (images.min(), images.max()) == (0, 255)
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert hashlib.sha256(images.numpy().tobytes()).digest() == hashlib.sha256(content("train-images")[16:]).digest()
    out = capsys.readouterr().out
    assert "60,000" in out
    assert "embedded" in out


def test_embedded_test_set(capsys):
    images, labels = du.load_images("mnist", "test")
    assert (images.shape, images.dtype) == ((10_000, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((10_000,), torch.int64)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.numpy().tobytes() == content("t10k-images")[16:]
    assert bytes(labels.tolist()) == content("t10k-labels")[8:]
    assert "10,000" in capsys.readouterr().out


def content(name: str) -> bytes:
    """Return one of the embedded files, uncompressed."""
    (path,) = du.EMBEDDED_MNIST.glob(f"{name}-*.gz")
    return gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("name", DIGESTS)
def test_embedded_files_are_the_originals(name):
    short = "-".join(name.split("-")[:2])
    assert hashlib.sha256(content(short)).hexdigest() == DIGESTS[name] == du.MNIST_SHA256[short]


def test_embedded_files_come_with_source_and_licence(root):
    text = (root / "data" / "mnist" / "README.md").read_text()
    assert all(name in text and digest in text for name, digest in DIGESTS.items())
    assert "LeCun" in text
    assert "CC BY-SA 3.0" in text


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_changed_embedded_file_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(du, "EMBEDDED_MNIST", tmp_path)
    for path in (du.Path(du.__file__).parent / "data" / "mnist").glob("t10k*.gz"):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        if kind in path.name:
            raw[5000] ^= 1  # one bit; header, length and gzip layer stay sound
        (tmp_path / path.name).write_bytes(gzip.compress(raw, 1))
    message = refused(ValueError, du.load_images, "mnist", "test")
    assert f"t10k-{kind}" in message
    assert "SHA-256" in message


def test_checksum_is_of_the_uncompressed_content(tmp_path, pair):
    raw = idx_bytes(pair[0])
    path = tmp_path / "a.gz"
    for level in (1, 9):
        path.write_bytes(gzip.compress(raw, level))
        assert torch.equal(du.read_idx(path, hashlib.sha256(raw).hexdigest()), torch.from_numpy(pair[0]))


# ----------------------------------------------------------------------------------------------- folders of IDX files
@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("spelling", [DASH, DOT, NESTED, "a/b/" + DOT], ids=["dash", "dot", "nested", "deep"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_of_idx_files(tmp_path, pair, capsys, split, spelling, gz):
    images, labels = pair
    other = "test" if split == "train" else "train"
    write_idx(tmp_path, 255 - images, labels[::-1], other, spelling, gz)  # the other split must not be taken
    write_idx(tmp_path, images, labels, split, spelling, gz)
    found, found_labels = du.load_images(tmp_path, split)
    assert found.dtype == torch.uint8
    assert found_labels.dtype == torch.int64
    assert np.array_equal(found.numpy(), images)
    assert np.array_equal(found_labels.numpy(), labels)
    out = capsys.readouterr().out
    assert str(tmp_path) in out
    assert "6×7" in out


def test_folder_with_both_spellings_at_once(tmp_path, pair):
    write_idx(tmp_path, *pair, spelling=DOT)
    write_idx(tmp_path, *pair, spelling=NESTED)
    images, labels = du.load_images(str(tmp_path))
    assert np.array_equal(images.numpy(), pair[0])
    assert np.array_equal(labels.numpy(), pair[1])


def test_images_of_one_folder_are_not_paired_with_labels_of_another(tmp_path, pair):
    write_idx(tmp_path / "a-half", 255 - pair[0], None)
    write_idx(tmp_path / "b-whole", *pair)
    images, labels = du.load_images(tmp_path)
    assert np.array_equal(images.numpy(), pair[0])
    assert np.array_equal(labels.numpy(), pair[1])


def test_hidden_folders_are_not_searched(tmp_path, pair):
    write_idx(tmp_path / ".trash", *pair)
    refused(FileNotFoundError, du.load_images, tmp_path)


def test_the_search_has_a_bottom(tmp_path, pair):
    write_idx(tmp_path / "1/2/3/4/5/6/7/8/9", *pair)
    assert "deep" in refused(FileNotFoundError, du.load_images, tmp_path)


# ----------------------------------------------------------------------------------------------- damaged IDX files
SOUND = idx_bytes(np.arange(5 * 4 * 4).reshape(5, 4, 4))
SQUEEZED = gzip.compress(SOUND)
DAMAGED = {
    "empty": (b"", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "is not an IDX file"),
    "web page in gzip": (gzip.compress(b"<!DOCTYPE html>"), "is not an IDX file"),
    "two bytes": (SOUND[:2], "is not an IDX file"),
    "IDX of floats": (b"\x00\x00\x0d" + SOUND[3:], "unsigned bytes"),
    "header cut after the type": (SOUND[:4], "truncated"),
    "header cut within the sizes": (SOUND[:10], "truncated"),
    "header cut one byte early": (SOUND[:15], "truncated"),
    "header and no pixels": (SOUND[:16], "truncated"),
    "last byte missing": (SOUND[:-1], "truncated"),
    "one byte too many": (SOUND + b"\x00", "padded"),
    "gzip cut": (SQUEEZED[:-12], "damaged gzip"),
    "gzip cut to its magic": (SQUEEZED[:2], "damaged gzip"),
    "gzip with a wrong CRC": (SQUEEZED[:-8] + bytes(4) + SQUEEZED[-4:], "damaged gzip"),
    "gzip with a damaged body": (SQUEEZED[:10] + b"\xff" * 8 + SQUEEZED[18:], "damaged gzip"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx_file(tmp_path, case):
    raw, words = DAMAGED[case]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(raw)
    message = refused(ValueError, lambda: du.read_idx(path, dims=3))
    assert words in message
    assert str(path) in message
    write_idx(tmp_path, None, [0] * 5)
    assert message in refused(ValueError, du.load_images, tmp_path)


def test_sound_idx_file_of_the_damage_tests(tmp_path):
    for raw in (SOUND, SQUEEZED):
        (tmp_path / "f").write_bytes(raw)
        assert torch.equal(du.read_idx(tmp_path / "f", dims=3), torch.arange(80, dtype=torch.uint8).view(5, 4, 4))


def test_truncation_says_how_many_bytes_are_there_and_needed(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(SOUND[:-3])
    message = refused(ValueError, du.read_idx, path)
    assert "77" in message
    assert "80" in message


def test_swapped_images_and_labels(tmp_path, pair):
    write_idx(tmp_path, *pair)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    images.rename(tmp_path / "x")
    labels.rename(images)
    (tmp_path / "x").rename(labels)
    message = refused(ValueError, du.load_images, tmp_path)
    assert "swapped" in message
    assert str(images) in message
    with pytest.raises(ValueError, match=r"holds images where labels belong.*swapped"):
        du.read_idx(labels, dims=1)


def test_images_and_labels_of_different_length(tmp_path, pair):
    write_idx(tmp_path, pair[0], pair[1][:4])
    message = refused(ValueError, du.load_images, tmp_path)
    assert "5 images" in message
    assert "4 labels" in message
    assert str(tmp_path) in message


def test_idx_files_without_a_single_image(tmp_path, pair):
    write_idx(tmp_path, pair[0][:0], pair[1][:0])
    assert "N > 0" in refused(ValueError, du.load_images, tmp_path)


# ----------------------------------------------------------------------------------------------- CSV
SQUARES = np.random.default_rng(1).integers(0, 256, (3, 4, 4))


@pytest.mark.parametrize("column", [0, 7, 16], ids=["first", "in the middle", "last"])
@pytest.mark.parametrize("name", ["train.csv", "mnist_train.csv", "deep/er/mnist-train.csv"])
def test_csv_with_labels(tmp_path, capsys, name, column):
    write_csv(tmp_path / name, SQUARES, [7, 0, 9], column)
    images, labels = du.load_images(tmp_path)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert np.array_equal(images.numpy(), SQUARES)
    assert labels.tolist() == [7, 0, 9]
    assert str(tmp_path) in capsys.readouterr().out


def test_csv_without_labels(tmp_path):
    write_csv(tmp_path / "train.csv", SQUARES[::-1], [1, 2, 3])
    write_csv(tmp_path / "test.csv", SQUARES)
    images, labels = du.load_images(tmp_path, "test")
    assert np.array_equal(images.numpy(), SQUARES)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [-1, -1, -1]


def test_csv_of_one_row(tmp_path):
    write_csv(tmp_path / "train.csv", SQUARES[:1], [4])
    images, labels = du.load_images(tmp_path)
    assert np.array_equal(images.numpy(), SQUARES[:1])
    assert labels.tolist() == [4]


def test_csv_of_real_digits_is_what_the_idx_files_hold(tmp_path, mnist_small):
    images, labels = mnist_small
    write_csv(tmp_path / "mnist_test.csv", images[:20].numpy(), labels[:20].numpy())
    found, found_labels = du.load_images(tmp_path, "test")
    assert torch.equal(found, images[:20])
    assert torch.equal(found_labels, labels[:20])


HEADER = "label," + ",".join(f"pixel{i}" for i in range(16))
ROW = "5," + ",".join(str(i) for i in range(16))
BAD_TABLES = {
    "one pixel column too few": (HEADER.rsplit(",", 1)[0] + "\n" + ROW.rsplit(",", 1)[0], ["15 pixel columns", "784"]),
    "one column too many": (HEADER + ",id\n" + ROW + ",1", ["17 pixel columns"]),
    "label under another name": (HEADER.replace("label", "y") + "\n" + ROW, ["17 pixel columns", "'label'"]),
    "labels alone": ("label\n5\n6\n", ["0 pixel columns"]),
    "empty file": ("", ["0 pixel columns"]),
    "header only": (HEADER + "\n", ["no rows"]),
    "header without an end of line": (HEADER, ["no rows"]),
    "a fraction": (HEADER + "\n" + ROW[:-2] + "1.5", ["not a whole number"]),
    "a word": (HEADER + "\n" + ROW[:-2] + "ink", ["not a whole number"]),
    "a gap": (HEADER + "\n" + ROW.replace(",7,", ",,"), ["not a whole number"]),
    "a fraction as label": (HEADER + "\n5.5" + ROW[1:], ["not a whole number"]),
    "a pixel above 255": (HEADER + "\n" + ROW[:-2] + "256", ["0 … 255"]),
    "a pixel below 0": (HEADER + "\n" + ROW[:-2] + "-1", ["0 … 255"]),
}


@pytest.mark.parametrize("case", BAD_TABLES)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_bad_csv(tmp_path, case):
    text, words = BAD_TABLES[case]
    path = tmp_path / "train.csv"
    path.write_text(text)
    message = refused(ValueError, du.load_images, tmp_path)
    assert str(path) in message
    assert all(word in message for word in words), message


def test_csv_with_rows_of_different_length(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"{HEADER}\n{ROW}\n{ROW},9\n")
    message = refused(ValueError, du.load_images, tmp_path)
    assert str(path) in message
    assert "column" in message
    assert "not a whole number" not in message  # all of them are: it is the row's length that is wrong


def test_csv_errors_come_without_numpy_warnings(tmp_path, recwarn):
    (tmp_path / "train.csv").write_text(HEADER + "\n")
    refused(ValueError, du.load_images, tmp_path)
    assert [str(w.message) for w in recwarn] == []


# ----------------------------------------------------------------------------------------------- folders without data
def test_folder_without_data_lists_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("x")
    (tmp_path / "train-images.png").write_text("x")
    message = refused(FileNotFoundError, du.load_images, tmp_path)
    for part in (str(tmp_path), "train-images-idx3-ubyte", "train-labels-idx1-ubyte", ".gz", "train.csv"):
        assert part in message
    assert os.path.join("notes", "readme.txt") in message
    assert "train-images.png" in message
    assert "t10k" not in message


def test_folder_with_training_data_only_has_no_test_data(tmp_path, pair):
    write_idx(tmp_path, *pair)
    message = refused(FileNotFoundError, du.load_images, tmp_path, "test")
    for part in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "test.csv", "train-images-idx3-ubyte"):
        assert part in message


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_half_of_a_pair_is_not_data_and_only_the_other_half_is_missing(tmp_path, pair, kind):
    write_idx(tmp_path, pair[0] if kind == "images" else None, pair[1] if kind == "labels" else None)
    message = refused(FileNotFoundError, du.load_images, tmp_path)
    looked_for, holds = message.split("it holds")
    assert f"train-{kind}" in holds
    assert f"train-{kind}" not in looked_for
    assert f"train-{'labels' if kind == 'images' else 'images'}" in looked_for


def test_empty_folder(tmp_path):
    assert "it holds nothing" in refused(FileNotFoundError, du.load_images, tmp_path)


def test_crowded_folder_is_not_listed_in_full(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03d}.png").write_text("x")
    message = refused(FileNotFoundError, du.load_images, tmp_path)
    assert "000.png" in message
    assert "199.png" not in message
    assert message.endswith("…")


@pytest.mark.parametrize(
    ("wrong", "right"), [("fashon-mnist", "fashion-mnist"), ("mnst", "mnist"), ("k-mnist", "kmnist")]
)
def test_unknown_source_is_refused_with_the_nearest_name(wrong, right):
    message = refused(FileNotFoundError, du.load_images, wrong)
    assert repr(wrong) in message
    assert f"did you mean {right!r}" in message


def test_a_folder_that_is_not_there(tmp_path):
    message = refused(FileNotFoundError, du.load_images, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert all(name in message for name in ("mnist", "fashion-mnist", "kmnist", "folder"))


@pytest.mark.parametrize("split", ["validation", "Train", "", None])
def test_unknown_split_is_refused(split):
    message = refused(ValueError, du.load_images, "mnist", split)
    assert repr(split) in message
    assert "'train' or 'test'" in message


# ----------------------------------------------------------------------------------------------- where MNIST is found
LAYOUTS = {
    "slug": "mnist-dataset",
    "owner and slug": "datasets/hojjatk/mnist-dataset",
    "competition": "competitions/digits",
}


@pytest.fixture
def attach_mnist(mounts, mnist_test):
    """Return a function that puts the real test digits, with their original content, into a mount."""

    def attach(place: str, spelling: str = DASH, labels: bool = True) -> None:
        images, targets = mnist_test
        write_idx(mounts / place, images.numpy(), targets.numpy() if labels else None, "test", spelling)

    return attach


@pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spelling", [DASH, DOT, NESTED], ids=["dash", "dot", "nested"])
def test_mnist_is_found_on_a_kaggle_mount(attach_mnist, no_embedded, downloads, mnist_test, capsys, place, spelling):
    attach_mnist(place, spelling)
    images, labels = du.load_images("mnist", "test")
    assert torch.equal(images, mnist_test[0])
    assert torch.equal(labels, mnist_test[1])
    assert "Kaggle" in capsys.readouterr().out
    assert downloads["MNIST"].calls == []


@pytest.mark.parametrize("place", ["mnist-in-csv", "datasets/oddrationale/mnist-in-csv", "competitions/mnist-in-csv"])
def test_mnist_in_csv_is_found_on_a_kaggle_mount(mounts, no_embedded, downloads, mnist_small, capsys, place):
    images, labels = mnist_small
    write_csv(mounts / place / "mnist_test.csv", images[:4].numpy(), labels[:4].numpy())
    write_csv(mounts / place / "mnist_train.csv", images[4:9].numpy(), labels[4:9].numpy())
    for split, part in (("test", slice(0, 4)), ("train", slice(4, 9))):
        found, found_labels = du.load_images("mnist", split)
        assert torch.equal(found, images[part])
        assert torch.equal(found_labels, labels[part])
        assert "Kaggle" in capsys.readouterr().out
    assert downloads["MNIST"].calls == []


@pytest.mark.parametrize("place", ["digit-recognizer", "competitions/digit-recognizer"])
def test_the_digit_recognizer_competition_is_found(mounts, no_embedded, downloads, mnist_small, place):
    images, labels = mnist_small
    write_csv(mounts / place / "train.csv", images[:4].numpy(), labels[:4].numpy())
    write_csv(mounts / place / "test.csv", images[4:9].numpy())
    (mounts / place / "sample_submission.csv").write_text("ImageId,Label\n1,0\n")
    found, found_labels = du.load_images("mnist", "train")
    assert torch.equal(found, images[:4])
    assert torch.equal(found_labels, labels[:4])
    found, found_labels = du.load_images("mnist", "test")
    assert torch.equal(found, images[4:9])
    assert found_labels.tolist() == [-1] * 5


def test_a_kaggle_mount_goes_before_the_embedded_files(attach_mnist, monkeypatch, capsys):
    attach_mnist("mnist-dataset")
    du.load_images("mnist", "test")
    out = capsys.readouterr().out
    assert "Kaggle" in out
    assert "embedded" not in out


def test_an_explicit_folder_goes_before_everything(attach_mnist, tmp_path, pair, capsys):
    attach_mnist("mnist-dataset")
    write_idx(tmp_path / "mine", *pair, "test")
    images, _ = du.load_images(tmp_path / "mine", "test")
    assert np.array_equal(images.numpy(), pair[0])
    out = capsys.readouterr().out
    assert str(tmp_path / "mine") in out
    assert "Kaggle" not in out


def test_an_explicit_folder_without_data_is_an_error_even_where_mnist_could_be_had(attach_mnist, tmp_path):
    attach_mnist("mnist-dataset")
    (tmp_path / "mine").mkdir()
    assert "it holds nothing" in refused(FileNotFoundError, du.load_images, tmp_path / "mine", "test")


def test_mounts_without_mnist_lead_to_the_embedded_files(mounts, capsys):
    (mounts / "other").mkdir()
    (mounts / "other" / "weights.bin").write_bytes(b"x")
    images, _ = du.load_images("mnist", "test")
    assert len(images) == 10_000
    assert "embedded" in capsys.readouterr().out


def test_half_of_the_files_on_a_mount_lead_to_the_embedded_files(attach_mnist, capsys):
    attach_mnist("mnist-dataset", labels=False)
    _, labels = du.load_images("mnist", "test")
    assert labels[:4].tolist() == [7, 2, 1, 0]
    assert "embedded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["titanic/train.csv", "competitions/titanic/train.csv", "datasets/a/b/x_train.csv"])
def test_a_foreign_table_on_a_mount_is_passed_over(mounts, mnist_small, capsys, name):
    path = mounts / name
    path.parent.mkdir(parents=True)
    path.write_text('PassengerId,Survived,Name\n1,0,"Braund, Mr. Owen"\n')
    path.with_name(path.name.replace("train", "test")).write_text('PassengerId,Name\n1,"Kelly, Mr. James"\n')
    images, _ = du.load_images("mnist", "test")
    assert torch.equal(images[:512], mnist_small[0])
    assert "embedded" in capsys.readouterr().out


def test_another_data_set_under_the_same_file_names_is_not_taken_for_mnist(mounts, mnist_test, capsys):
    """Fashion-MNIST's files have MNIST's names and shapes; both may be attached to one Kaggle notebook."""
    images, labels = mnist_test
    write_idx(mounts / "fashionmnist", 255 - images.numpy(), labels.numpy(), "test")
    found, _ = du.load_images("mnist", "test")
    assert torch.equal(found, images)


def test_without_mounts_and_embedded_files_torchvision_downloads(no_embedded, downloads, capsys):
    for split in ("train", "test"):
        images, labels = du.load_images("mnist", split)
        assert (images.shape, images.dtype) == ((3, 28, 28), torch.uint8)
        assert labels.tolist() == [7, 8, 9]
        assert "download" in capsys.readouterr().out
    calls = downloads["MNIST"].calls
    assert [call["train"] for call in calls] == [True, False]
    assert all(call["download"] for call in calls)
    assert downloads["FashionMNIST"].calls == []


def test_an_empty_folder_in_place_of_the_embedded_files_leads_to_the_download(no_embedded, downloads, capsys):
    no_embedded.mkdir(parents=True)
    images, _ = du.load_images("mnist", "train")
    assert len(images) == 3
    assert "download" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://example.org"),
        urllib.error.URLError("no route to host"),
        OSError(30, "Read-only file system"),
    ],
    ids=["RuntimeError", "URLError", "OSError"],
)
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_a_failed_download_says_what_to_do(no_embedded, downloads, name, error):
    for fake in downloads.values():
        fake.error = error
    message = refused(FileNotFoundError, du.load_images, name)
    for part in (name, "could not be downloaded", str(error).splitlines()[0], "internet", "folder"):
        assert part in message


@pytest.mark.parametrize(("name", "kind"), [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_other_sets_come_from_torchvision(attach_mnist, downloads, capsys, name, kind, split):
    attach_mnist("mnist-dataset")  # must not be taken
    images, labels = du.load_images(name, split)
    assert images.shape == (3, 28, 28)
    assert images.dtype == torch.uint8
    assert int(images[0, 0, 0]) == len(kind)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 8, 9]
    assert [(call["train"], call["download"]) for call in downloads[kind].calls] == [(split == "train", True)]
    assert sum(len(fake.calls) for fake in downloads.values()) == 1
    assert "torchvision" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- resizing, range
@pytest.mark.parametrize("size", [64, 32, 16, 40])
def test_resizing_is_torchvisions_with_antialias(mnist_small, size):
    images = mnist_small[0][:100]
    resized = du.resize_images(images, size)
    expected = v2.Resize((size, size), InterpolationMode.BILINEAR, antialias=True)(images[:, None])[:, 0]
    assert resized.dtype == torch.uint8
    assert torch.equal(resized, expected)


@pytest.mark.parametrize("size", [64, 16])
def test_resizing_is_what_pillow_does(mnist_small, size):
    images = mnist_small[0][:20]
    resized = du.resize_images(images, size).int()
    expected = [np.asarray(v2.Resize((size, size))(Image.fromarray(image.numpy()))) for image in images]
    difference = (resized - torch.from_numpy(np.stack(expected)).int()).abs()
    assert difference.max() <= 1  # the two round differently
    assert difference.float().mean() < 0.02


def test_shrinking_without_antialias_would_differ(mnist_small):
    images = mnist_small[0][:20]
    plain = v2.Resize((16, 16), antialias=False)(images[:, None])[:, 0]
    assert (du.resize_images(images, 16).int() - plain.int()).abs().max() > 50


def test_resizing_in_parts_is_resizing_at_once():
    images = torch.randint(0, 256, (9000, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = v2.Resize((16, 16), antialias=True)(images[:, None])[:, 0]
    assert torch.equal(du.resize_images(images, 16), expected)


def test_images_of_the_right_size_are_not_touched_and_others_become_square(mnist_small):
    images = mnist_small[0]
    assert du.resize_images(images, 28) is images
    assert du.resize_images(images[:3, :20, :], 32).shape == (3, 32, 32)
    assert du.resize_images(images[:3, :, :20], 28).shape == (3, 28, 28)


def test_normalise_maps_bytes_to_minus_one_to_one():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    values = du.normalise(images)
    assert (values.shape, values.dtype) == ((1, 1, 16, 16), torch.float32)
    assert torch.allclose(values.flatten(), torch.linspace(-1, 1, 256), atol=1e-6)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(images.flatten(), torch.arange(256, dtype=torch.uint8))  # the data stay as they are


# ----------------------------------------------------------------------------------------------- importing the module
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
import matplotlib.pyplot as plt
assert not plt.get_fignums(), "the import drew"
heavy = [name for name in ("torchmetrics", "ipywidgets", "wandb", "tensorboard") if name in sys.modules]
assert not heavy, f"the import brought {heavy}"
assert not os.listdir("."), "the import wrote files"
sys.stderr.write("END")
"""


def test_importing_prints_downloads_writes_and_seeds_nothing(root, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == "END"


def test_optional_libraries_are_imported_where_they_are_used(root):
    tree = ast.parse((root / "dcgan_utils.py").read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "torch" in top
    heavy = {"torchmetrics", "ipywidgets", "wandb", "tensorboard", "torch.utils.tensorboard"}
    assert not {name for name in top if name in heavy or name.split(".")[0] in heavy}


def test_csv_as_a_spreadsheet_writes_it(tmp_path):
    quoted = ",".join(f'"{cell}"' for cell in ROW.split(","))
    (tmp_path / "train.csv").write_text(f"\ufeff{HEADER}\n{quoted}\n", encoding="utf-8")
    images, labels = du.load_images(tmp_path)
    assert images.flatten().tolist() == list(range(16))
    assert labels.tolist() == [5]


def test_csv_whose_rows_are_all_shorter_than_its_header(tmp_path):
    (tmp_path / "train.csv").write_text(f"{HEADER}\n5,1,2\n6,1,2\n")
    assert "names 17 columns, its rows have 3" in refused(ValueError, du.load_images, tmp_path)


def test_one_hot_labels_are_refused_in_words():
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"4 images but 4 labels of shape \(10,\)"):
        du.FastDCGAN().train(1, data=(images, torch.eye(10, dtype=torch.long)[:4]))
