"""Files of images: IDX, CSV, npz, Parquet; what they give, and what is said where they are not what they should be."""

import gzip
import hashlib
import io
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from samples import IMAGES, LABELS, idx_bytes, picture, refused, write_idx

import dcgan_utils as du

# ----------------------------------------------------------------------------------------------- IDX
SOUND = idx_bytes(np.arange(80).reshape(5, 4, 4))
SQUEEZED = gzip.compress(SOUND)
DAMAGED = {
    "empty": (b"", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "not an IDX file"),
    "web page in gzip": (gzip.compress(b"<!DOCTYPE html>"), "not an IDX file"),
    "two bytes": (SOUND[:2], "not an IDX file"),
    "IDX of floats": (b"\x00\x00\x0d" + SOUND[3:], "unsigned bytes"),
    "header cut after the type": (SOUND[:4], "truncated"),
    "header cut within the sizes": (SOUND[:10], "truncated"),
    "header and no pixels": (SOUND[:16], "0 bytes where [5, 4, 4] needs 80"),
    "last bytes missing": (SOUND[:-3], "77 bytes where [5, 4, 4] needs 80"),
    "one byte too many": (SOUND + b"\x00", "padded"),
    "one byte too many in gzip": (gzip.compress(SOUND + b"\x00"), "padded"),
    "gzip cut": (SQUEEZED[:-12], "damaged gzip"),
    "gzip cut to its magic": (SQUEEZED[:2], "damaged gzip"),
    "gzip with a wrong CRC": (SQUEEZED[:-8] + bytes(4) + SQUEEZED[-4:], "damaged gzip"),
    "gzip with a damaged body": (SQUEEZED[:10] + b"\xff" * 8 + SQUEEZED[18:], "damaged gzip"),
    "labels": (idx_bytes([1, 2, 3]), "holds labels"),
    "color": (idx_bytes(np.zeros((2, 3, 4, 4))), "4-dimensional"),
    "no image": (idx_bytes(np.zeros((0, 28, 28))), "0 images but 5 labels"),
    "no height": (idx_bytes(np.zeros((5, 0, 28))), "H > 0"),
    "more than any memory": (b"\0\0\x08\x03" + b"\x7f\xff\xff\xff" * 3 + b"0", "GiB"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx_file(tmp_path, case):
    raw, words = DAMAGED[case]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(raw)
    write_idx(tmp_path, None, [0] * 5)
    message = refused(du.load_images, tmp_path)
    assert words in message
    assert str(path) in message


def test_sound_idx_files_and_their_checksum(tmp_path):
    for raw in (SOUND, SQUEEZED, gzip.compress(SOUND, 1)):
        (tmp_path / "f").write_bytes(raw)
        found = du.read_idx(tmp_path / "f", hashlib.sha256(SOUND).hexdigest(), dims=3)  # of the uncompressed content
        assert torch.equal(found, torch.arange(80, dtype=torch.uint8).view(5, 4, 4))
    assert "SHA-256" in refused(du.read_idx, tmp_path / "f", "0" * 64)
    refused(du.read_idx, tmp_path / "g", kind=FileNotFoundError)


def test_swapped_or_unequal_idx_files(tmp_path):
    write_idx(tmp_path, IMAGES, LABELS[:4])
    assert "6 images but 4 labels" in refused(du.load_images, tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    images.rename(tmp_path / "x")
    labels.rename(images)
    (tmp_path / "x").rename(labels)
    assert "swapped" in refused(du.load_images, tmp_path)
    assert "holds images" in refused(du.read_idx, labels, dims=1)


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(SOUND[:16])
        for _ in range(32):
            file.write(bytes(2**24))  # half a GiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "padded" in refused(du.read_idx, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train.csv", "train.npz", "train.npy"])
def test_pipes_and_devices_are_not_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    write_idx(tmp_path, None, [1])
    assert name in refused(du.load_images, tmp_path)
    assert name in refused(du.load_images, tmp_path / name)
    assert "/dev/zero" in refused(du.load_images, "/dev/zero")


# ----------------------------------------------------------------------------------------------- CSV
SQUARES = np.random.default_rng(1).integers(0, 256, (3, 4, 4))
MANY = np.concatenate([SQUARES] * 50)


def table(label: str | None = None, labels=None, last=False, index: str | None = None, images=SQUARES) -> str:
    """Return images as CSV: under a header where `label` names the column, and row numbers first where `index` does."""
    lines = [",".join(str(v) for v in image.ravel()) for image in images]
    header = [",".join(f"p{i}" for i in range(images[0].size))] if label is not None else []
    lines, numbers = header + lines, [index] * len(header) + [str(i) for i in range(len(lines))]
    if labels is not None:
        cells = [label] * len(header) + labels
        lines = [f"{line},{cell}" if last else f"{cell},{line}" for line, cell in zip(lines, cells, strict=True)]
    if index is not None:
        lines = [f"{number},{line}" for number, line in zip(numbers, lines, strict=True)]
    return "\n".join(lines) + "\n"


QUOTED = "\r\n".join('"' + line.replace(",", '","') + '"' for line in table("label", [7, 0, 9]).split())
NUMBERED = f"label,{','.join(map(str, range(16)))}\n{table(None, [7, 0, 9])}"
GOOD_TABLES = {  # the text, its labels, their names where they are not digits
    "label first": (table("label", [7, 0, 9]), [7, 0, 9], None),
    "Label last": (table("Label", [7, 0, 9], last=True), [7, 0, 9], None),
    "class": (table("class", ["cat", "ant", "cat"]), [1, 0, 1], ("ant", "cat")),
    "target, far numbers": (table("target", [70, 10, 10]), [1, 0, 0], ("10", "70")),
    "whole floats": (table("label", ["1.0", "0.0", "2.0"]), [1, 0, 2], None),
    "no labels": (table(""), [-1] * 3, None),
    "no header": (table(), [-1] * 3, None),
    "no header, label first": (table(None, [7, 0, 9]), [7, 0, 9], None),
    "no header, label last": (table(None, [7, 0, 9], last=True), [7, 0, 9], None),
    "no header, text": (table(None, ["cat", "ant", "cat"]), [1, 0, 1], ("ant", "cat")),
    "index column": (table("label", [7, 0, 9], index=""), [7, 0, 9], None),
    "index column of pandas": (table("label", [7, 0, 9], index="Unnamed: 0"), [7, 0, 9], None),
    "no header, index column": (table(None, [7, 0, 9], index="x"), [7, 0, 9], None),
    "no header, row numbers alone": (table(index="x", images=MANY), [-1] * 150, None),
    "numbers as names of columns": (NUMBERED, [7, 0, 9], None),
    "one row": (table("label", [4], images=SQUARES[:1]), [0], ("4",)),
    "as a spreadsheet writes it": ("\ufeff" + QUOTED, [7, 0, 9], None),
}


@pytest.mark.parametrize("case", GOOD_TABLES)
@pytest.mark.parametrize("name", ["train.csv", "deep/er/mnist_train.csv"])
def test_csv(tmp_path, capsys, case, name):
    text, labels, classes = GOOD_TABLES[case]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    for source in (tmp_path, path):
        data = du.load_images(source)
        assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(data.images.numpy(), MANY[: len(labels)])
        assert data.labels.tolist() == labels
        assert classes is None or data.classes == classes
        assert str(path) in capsys.readouterr().out
    assert torch.equal(du.read_csv(path)[0], data.images)


ROW = "5," + ",".join(str(i) for i in range(16))
HEADER = "label," + ",".join(f"pixel{i}" for i in range(16))
LONG = f"{HEADER}\n{(ROW + chr(10)) * 2000}".encode()
BAD_TABLES = {  # the text, and what the line must name
    "one pixel column too few": (f"{HEADER[:-8]}\n{ROW[:-3]}", ["15 pixel columns", "784"]),
    "one column too many": (f"{HEADER},y\n{ROW},1", ["17 pixel columns"]),
    "label under another name": (HEADER.replace("label", "y") + "\n" + ROW, ["17 pixel columns", "'label'"]),
    "labels alone": ("label\n5\n6\n", ["0 pixel columns"]),
    "empty file": ("", ["0 pixel columns"]),
    "header only": (HEADER + "\n", ["no rows"]),
    "header without an end of line": (HEADER, ["no rows"]),
    "a fraction": (HEADER + "\n" + ROW[:-2] + "1.5", ["not a whole number 0 … 255", "'1.5'"]),
    "a word": (HEADER + "\n" + ROW[:-2] + "ink", ["not a whole number", "'ink'"]),
    "a gap": (HEADER + "\n" + ROW.replace(",7,", ",,"), ["not a whole number"]),
    "a fraction as label": (HEADER + "\n5.5" + ROW[1:], ["5.5"]),
    "a gap as label": (f"{HEADER}\n{ROW}\n{ROW[1:]}", ["labels"]),
    "a pixel above 255": (HEADER + "\n" + ROW[:-2] + "256", ["0 … 255", "'256'"]),
    "a pixel below 0": (HEADER + "\n" + ROW[:-2] + "-1", ["0 … 255", "'-1'"]),
    "rows of different length": (f"{HEADER}\n{ROW}\n{ROW},9\n", ["17 columns but 18"]),
    "all rows shorter than the header": (f"{HEADER}\n5,1,2\n6,1,2\n", ["17 columns but 3"]),
    "no header, last row shorter": (f"{ROW}\n{ROW}\n{ROW[:-3]}\n", ["17 columns but 16"]),
    "another encoding": (f"{HEADER}\n{ROW.replace('5', 'Käse', 1)}".encode("cp1252"), ["UTF-8"]),
    "another encoding, far down": (LONG + b"\xff," + ROW[2:].encode(), ["UTF-8"]),
    "UTF-16": (f"{HEADER}\n{ROW}".encode("utf-16"), ["UTF-8"]),
    "endless field": ('"' + "1" * 200_000, ["field"]),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_csv(tmp_path, case, recwarn):
    text, words = BAD_TABLES[case]
    path = tmp_path / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(du.load_images, tmp_path)
    assert str(path) in message
    assert all(word in message for word in words), message
    assert [str(w.message) for w in recwarn] == []


# ----------------------------------------------------------------------------------------------- npz, npy, Parquet
COLUMN = [[label] for label in LABELS]
ARCHIVES = {
    "named": ({"images": IMAGES, "labels": LABELS}, "train"),
    "labels first": ({"y": LABELS, "x": IMAGES}, "train"),
    "unnamed": ({"arr_0": IMAGES, "arr_1": LABELS}, "train"),
    "Keras": ({"x_test": IMAGES[:2], "x_train": IMAGES, "y_train": LABELS, "y_test": [0, 1]}, "train"),
    "Keras, test": ({"x_train": IMAGES[:2], "x_test": IMAGES, "y_test": LABELS}, "test"),
    "MedMNIST": ({"train_images": IMAGES, "val_images": IMAGES[:1], "train_labels": COLUMN}, "train"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(tmp_path, case, save, capsys):
    arrays, split = ARCHIVES[case]
    save(tmp_path / "a.npz", **arrays)
    images, labels = du.load_images(tmp_path / "a.npz", split)
    assert np.array_equal(images.numpy(), IMAGES)
    assert labels.tolist() == LABELS
    assert str(tmp_path / "a.npz") in capsys.readouterr().out


def test_npy_and_archives_that_are_not_what_they_should_be(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES.astype(">i4")[::-1])
    images, labels = du.load_images(tmp_path / "a.npy")
    assert np.array_equal(images.numpy(), IMAGES[::-1])
    assert labels.tolist() == [-1] * 6
    np.savez(tmp_path / "b.npz", images=IMAGES)
    for name in ("a.npy", "b.npz"):
        assert "test" in refused(du.load_images, tmp_path / name, "test", kind=FileNotFoundError)
    np.savez(tmp_path / "c.npz", images=np.array([IMAGES, None], dtype=object))  # pickled
    np.savez(tmp_path / "d.npz", images=IMAGES / 255)
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "f.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:200])
    (tmp_path / "g.xyz").write_bytes(b"x")
    for name in ("c.npz", "d.npz", "e.npz", "f.npy", "g.xyz"):
        assert name in refused(du.load_images, tmp_path / name)


def test_parquet_table_of_pictures(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    files = [io.BytesIO() for _ in IMAGES]
    for file, image in zip(files, IMAGES, strict=True):
        Image.fromarray(image).save(file, "png")
    cells = [{"bytes": file.getvalue(), "path": None} for file in files]
    pandas.DataFrame({"image": cells, "label": list("abcabc")}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data = du.load_images(tmp_path)
    assert np.array_equal(data.images.numpy(), IMAGES)
    assert (data.labels.tolist(), data.classes) == (LABELS, ("a", "b", "c"))


def test_a_parquet_file_that_cannot_be_read(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    message = refused(du.load_images, tmp_path / "x.parquet")
    assert all(part in message for part in ("x.parquet", "pandas"))


# ----------------------------------------------------------------------------------------------- mutated files
def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """Return bytes with up to five changes, half of them near the beginning."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 6)):
        i = int(rng.integers(0, max(1, min(len(raw), rng.choice([40, len(raw) + 1])))))
        change = rng.integers(0, 4)
        if change == 0:
            raw[i : i + 1] = rng.choice(np.frombuffer(b'0123456789,\n"\xff\x00-.e# ', np.uint8)).tobytes()
        elif change == 1:
            del raw[i : i + int(rng.integers(1, 20))]
        elif change == 2:
            raw[i:i] = rng.bytes(int(rng.integers(1, 20)))
        else:
            raw[i : i + 4] = rng.choice(np.array([0, 1, 127, 255], np.uint8), 4).tobytes()
    return bytes(raw)


def test_mutated_files_are_read_or_refused_in_one_line_that_names_them(tmp_path):
    rng, archive = np.random.default_rng(1), io.BytesIO()
    np.savez_compressed(archive, images=IMAGES, labels=LABELS)
    sound = {"train.csv": table("label", [7, 0, 9]).encode(), "a.npz": archive.getvalue()}
    sound |= {f"train-images-idx3-ubyte{end}": raw for end, raw in (("", SOUND), (".gz", SQUEEZED))}
    for ending, mode in (("png", "P"), ("jpg", "RGB"), ("webp", "RGB"), ("bmp", "L")):
        picture(path := tmp_path / f"x.{ending}", mode=mode)
        sound[path.name] = path.read_bytes()
        path.unlink()
    write_idx(tmp_path, None, [0, 1, 2, 0, 1])
    errors = []
    for i in range(1500):
        path = tmp_path / list(sound)[i % len(sound)]
        path.write_bytes(mutated(sound[path.name], rng))
        try:
            du.as_images(path if path.name.endswith(("csv", "npz")) else tmp_path)
        except ValueError as error:
            errors.append(error)
        path.unlink()
    assert {type(error) for error in errors} == {ValueError}
    assert all(str(tmp_path) in str(error) and "\n" not in str(error) for error in errors)
    assert 50 < len(errors) < 1450
