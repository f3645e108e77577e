"""What `train(data=…)` takes beside files: arrays, labels, data sets; and pictures of every kind."""

import copy
import io
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from samples import IMAGES, LABELS, Items, picture, refused, unreadable, write_idx
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import dcgan_utils as du

TENSOR = torch.from_numpy(IMAGES)
COLOR = np.stack([IMAGES, 255 - IMAGES, IMAGES], 1)


# ----------------------------------------------------------------------------------------------- arrays and data sets
TAKEN = {
    "tensor": TENSOR,
    "array": IMAGES,
    "negative strides": IMAGES[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "steps": np.repeat(IMAGES, 2, 1)[:, ::2],
    "Fortran order": np.asfortranarray(IMAGES),
    **{f"array of {kind}": IMAGES.astype(kind) for kind in (">i4", "<i8", ">u2", "u8", "i2")},
    **{f"tensor of {kind}": TENSOR.to(kind) for kind in (torch.int64, torch.int16, torch.uint16)},
    "not contiguous": TENSOR.transpose(1, 2).contiguous().transpose(1, 2),
    "read-only": np.frombuffer(IMAGES.tobytes(), np.uint8).reshape(IMAGES.shape),
    "images alone": Items(list(IMAGES)),
    "color, channels first": COLOR,
    "color, channels last": COLOR.transpose(0, 2, 3, 1),
    "color, channels last, tensor": torch.from_numpy(COLOR).permute(0, 2, 3, 1),
    "labeled pair": (IMAGES, LABELS),
    "labeled pair of lists": [list(IMAGES), tuple(LABELS)],
    "labeled TensorDataset": TensorDataset(TENSOR, torch.tensor(LABELS)),
    "labeled PIL images": Items([(Image.fromarray(x), k) for x, k in zip(IMAGES, LABELS, strict=True)]),
    "labeled by ToTensor": Items([(v2.functional.to_dtype(x[None], scale=True), i % 3) for i, x in enumerate(TENSOR)]),
    "labeled floats": Items([(x / 255.1, k) for x, k in zip(TENSOR, LABELS, strict=True)]),
    "labeled, color": Items([(x, np.int64(i % 3)) for i, x in enumerate(COLOR)]),
    "labeled, longer items": Items([(x, i % 3, "more") for i, x in enumerate(IMAGES)]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_taken_as_data(case):
    data = du.as_images(TAKEN[case])
    assert np.array_equal(data.images.numpy(), COLOR if "color" in case else IMAGES)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.images.is_contiguous()
    assert data.labels.tolist() == (LABELS if "labeled" in case else [-1] * 6)


def test_data_share_no_memory_with_the_callers():
    labels = torch.tensor(LABELS)
    for given in (TENSOR.clone(), IMAGES.copy(), (TENSOR.clone(), labels), du.as_images((TENSOR, labels))):
        data = du.as_images(given)
        for part in given if isinstance(given, tuple) else (given,):
            part[:] = 0
        assert torch.equal(data.images, TENSOR)
        assert data.labels.tolist() == (LABELS if isinstance(given, tuple) else [-1] * 6)
        labels[:] = torch.tensor(LABELS)


def test_names_stay_with_the_data_through_copies_and_a_second_call():
    data = du.as_images((IMAGES, list("cabcab")))
    for again in (du.as_images(data), copy.deepcopy(data)):
        assert again.classes == ("a", "b", "c")
        assert again.labels.tolist() == [2, 0, 1, 2, 0, 1]
    images, labels = data
    assert (images is data.images, labels is data.labels, len(data)) == (True, True, 2)


NUMBERED = {  # labels as given, as numbers, their names
    "texts": (["cat", "ant", "cat", "bee", "ant", "cat"], [2, 0, 2, 1, 0, 2], ("ant", "bee", "cat")),
    "pandas' texts": (np.array(list("babbab"), dtype=object), [1, 0, 1, 1, 0, 1], ("a", "b")),
    "from 1": ([1, 2, 3, 1, 2, 3], LABELS, ("1", "2", "3")),
    "far apart": ([70, -5, 10**12, 70, -5, 70], [1, 0, 2, 1, 0, 1], ("-5", "70", "1000000000000")),
    "two signs": ([-1, 1, -1, 1, -1, 1], [0, 1, 0, 1, 0, 1], ("-1", "1")),
    "a part of the digits": ([0, 7, 8, 0, 7, 8], [0, 7, 8, 0, 7, 8], tuple("012345678")),
    "whole floats": ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], LABELS, ("0", "1", "2")),
    "truth values": ([True, False] * 3, [1, 0] * 3, ("False", "True")),
    "none": ([-1] * 6, [-1] * 6, None),
    **{f"{kind}": (np.array(LABELS, kind)[::-1], LABELS[::-1], ("0", "1", "2")) for kind in (">i4", "u2", "u8", "u1")},
    "one column": (np.array([[0], [1]] * 3), [0, 1] * 3, ("0", "1")),
    "tensor": (torch.tensor([1.0, 0.0] * 3), [1, 0] * 3, ("0", "1")),
    "uint16 tensor": (torch.tensor([1, 0] * 3).to(torch.uint16), [1, 0] * 3, ("0", "1")),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_any_labels_become_numbers_with_names(case, capsys):
    given, numbers, names = NUMBERED[case]
    data = du.as_images((IMAGES, given))
    assert (data.labels.tolist(), data.labels.dtype, data.classes) == (numbers, torch.int64, names)
    renumbered = names is not None and names[0] != "0"
    assert (f"{len(names or ())} classes" in capsys.readouterr().out) == renumbered
    if isinstance(given, list):
        items = du.as_images(Items(list(zip(IMAGES, given, strict=True))))
        assert (items.labels.tolist(), items.classes) == (numbers, names)


def test_letters_take_their_names_from_the_data_set():
    letters = Items([(x, 26 - i) for i, x in enumerate(IMAGES)], classes=["N/A", *"abcdefghijklmnopqrstuvwxyz"])
    data = du.as_images(letters)
    assert (data.labels.tolist(), data.classes) == ([5, 4, 3, 2, 1, 0], tuple("uvwxyz"))


class Broken(Items):
    """A data set that raises in two lines."""

    def __getitem__(self, i):
        raise KeyError(f"no\nitem {i}")


REFUSED = {  # what is given, and what the line must name
    "nothing": (None, "NoneType"),
    "a number": (5, "int"),
    "a list": ([1, 2, 3], "list"),
    "three parts": ((IMAGES, LABELS, 5), "tuple"),
    "a dictionary": ({"images": IMAGES}, "dict"),
    "a function": (len, "builtin"),
    "an iterator": (iter(IMAGES), "iterator"),
    "an empty name": ("", "''"),
    "floats": (IMAGES / 255, "* 255"),
    "float tensor": (TENSOR / 255, "float32"),
    "above 255": (IMAGES.astype(int) + 1, "256"),
    "below 0": (IMAGES.astype(int) - 1, "-1"),
    "one image": (IMAGES[0], "(8, 8)"),
    "a scalar": (np.array(5), "()"),
    "too many axes": (IMAGES[None, None], "(1, 1, 6, 8, 8)"),
    "texts": (np.array(["a", "b"]), "<U1"),
    "objects": (np.array([None, 1]), "object"),
    "no images": (IMAGES[:0], "N > 0"),
    "no height": (np.zeros((5, 0, 28), np.uint8), "H > 0"),
    "not square": (np.zeros((5, 28, 56), np.uint8) + 9, "28×56"),
    "ragged images": (([IMAGES[0], IMAGES[0, :4]], [0, 1]), "images"),
    "fewer labels": ((IMAGES, [0, 1]), "6 images but 2 labels"),
    "one-hot labels": ((IMAGES, np.eye(10)[:6]), "argmax"),
    "fractions as labels": ((IMAGES, [0, 1, 2, 0, 1, 3.7]), "3.7"),
    "NaN as label": ((IMAGES, [0, 1, 2, 0, 1, np.nan]), "nan"),
    "None as label": ((IMAGES, [0, 1, 2, 0, 1, None]), "None"),
    "None as labels": ((IMAGES, None), "None"),
    "empty text as label": ((IMAGES, ["a", "b", "c", "a", "b", " "]), "text"),
    "a number as labels": ((IMAGES, 5), "5"),
    "ragged labels": ((IMAGES, [[1], [1, 2], 3, 4, 5, 6]), "labels"),
    "complex labels": ((IMAGES, np.zeros(6, complex)), "0"),
    "floats of [-1, 1] in a Dataset": (Items([(x[None] / 127.5 - 1, 0) for x in TENSOR]), "float32"),
    "no image in a Dataset": (Items([({}, 0), (None, 1)]), "2 of 2"),
    "fractions as a Dataset's labels": (Items([(x, i / 3) for i, x in enumerate(IMAGES)]), "0.333"),
    "floats above 1 in a Dataset": (Items([(x / 254, 0) for x in TENSOR]), "float32"),
    "NaN in a Dataset": (Items([(x / x.new_zeros(1), 0) for x in TENSOR]), "float32"),
    "a Dataset of nothing": (Items([]), "N > 0"),
    "a Dataset that raises": (Broken([1, 2]), "KeyError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_data(case):
    given, word = REFUSED[case]
    assert word in refused(du.as_images, given)


@pytest.mark.parametrize("case", ["array", "file", "data set"])
def test_images_of_zeros_and_ones_are_named(tmp_path, case):
    small = IMAGES % 2
    write_idx(tmp_path, small, LABELS)
    given = {"array": small, "file": tmp_path, "data set": Items(list(small))}[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(du.as_images(given).images, torch.from_numpy(small))
    (warning,) = caught
    assert "255" in str(warning.message)


def test_as_images_takes_sources_by_name_and_resizes(tmp_path):
    assert du.as_images((IMAGES, LABELS), size=4, channels=3).images.shape == (6, 3, 4, 4)
    assert du.as_images(COLOR, channels=1).images.shape == (6, 8, 8)
    assert "16 channels" in refused(du.as_images, np.repeat(IMAGES[:, None], 16, 1), channels=3)
    write_idx(tmp_path, IMAGES, LABELS)
    assert np.array_equal(du.as_images(str(tmp_path)).images.numpy(), IMAGES)
    write_idx(tmp_path, IMAGES[:, :6], LABELS)
    assert "6×8" in refused(du.as_images, tmp_path)


# ----------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("ending", ["png", "PNG", "bmp", "webp", "jpg", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_flat_folder_of_pictures(tmp_path, capsys, ending, mode):
    best = {"webp": {"lossless": True}, "j": {"quality": 95, "subsampling": 0}}
    options = next((o for start, o in best.items() if ending.startswith(start)), {})
    expected = [picture(tmp_path / f"{i}.{ending}", mode=mode, seed=i, **options) for i in range(5)]
    (tmp_path / "._0.png").write_bytes(b"a Mac's notes")
    data = du.load_images(tmp_path)
    assert data.images.shape == ((5, 20, 20) if mode == "L" else (5, 3, 20, 20))
    pixels = data.images.numpy() if mode == "L" else data.images.permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(int) - np.stack(expected)).mean() <= 2 * ending.startswith("j")
    assert (data.labels.tolist(), data.classes) == ([-1] * 5, None)
    line = capsys.readouterr().out
    assert all(part in line for part in ("5 of 20×20", "gray" if mode == "L" else "color", "no labels", str(tmp_path)))
    assert "cropped" not in line


@pytest.mark.parametrize("top", ["", "train"])
def test_a_folder_for_each_class(tmp_path, capsys, top):
    for i, name in enumerate(["10", "9", "dog", "cat", "cat"]):
        picture(tmp_path / top / name / f"{i}.png", seed=i)
    if top:
        picture(tmp_path / "val" / "cat" / "5.png", seed=5)  # classes keep their numbers where a split lacks some
        picture(tmp_path / "val" / "eel" / "6.png", seed=6)
        assert du.load_images(tmp_path, "test").labels.tolist() == [2, 4]
    else:
        assert "test" in refused(du.load_images, tmp_path, "test", kind=FileNotFoundError)
    data = du.load_images(tmp_path)
    assert data.classes == ("9", "10", "cat", "dog", *(["eel"] if top else []))
    assert sorted(data.labels.tolist()) == [0, 1, 2, 2, 3]
    assert np.array_equal(data.images[data.labels == 3][0].numpy(), picture(tmp_path / "x.png", seed=2))
    assert f"{len(data.classes)} classes (9 … " in capsys.readouterr().out
    (tmp_path / "x.png").rename(tmp_path / top / "x.png")
    assert "beside folders" in refused(du.load_images, tmp_path)


def test_other_sizes_are_cropped_and_resized_as_pillow_does(tmp_path, capsys):
    for name, size in (("a.png", (90, 64)), ("b.png", (32, 32)), ("c.png", (40, 50))):
        picture(tmp_path / name, size)
    images = du.load_images(tmp_path, size=16).images
    line = capsys.readouterr().out
    assert all(part in line for part in ("16×16", "cropped", "resized"))
    cropped = Image.open(tmp_path / "a.png").crop((13, 0, 77, 64)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(images[0].numpy() - np.asarray(cropped).astype(int)).max() <= 3  # at the edges Pillow looks beyond
    assert du.load_images(tmp_path).images.shape == (3, 40, 40)  # the median of the short sides


def test_gray_or_color_is_chosen_by_what_the_files_show(tmp_path):
    for i in range(4):
        gray = picture(tmp_path / f"{i}.png", seed=i)
        Image.fromarray(np.stack([gray] * 3, 2)).save(tmp_path / f"{i}.png")  # gray, kept as RGB
    assert du.load_images(tmp_path).images.ndim == 3
    assert du.load_images(tmp_path, channels=3).images.shape[1] == 3
    color = picture(tmp_path / "4.png", mode="RGB")
    assert np.array_equal(du.load_images(tmp_path).images[4].numpy(), color.transpose(2, 0, 1))
    luma = np.asarray(Image.fromarray(color).convert("L"))
    assert np.array_equal(du.load_images(tmp_path, channels=1).images[4].numpy(), luma)


def test_unusual_pictures_are_read_as_one_sees_them(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    transparent = Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (16, 16), 0)])
    turned = Image.Exif()
    turned[0x0112] = 3  # the camera stood on its head
    kinds = {
        "1.png": (Image.fromarray(ramp.astype(np.uint16) * 257), {}, ramp),
        "2.png": (transparent, {}, np.full_like(ramp, 255)),
        "3.png": (Image.fromarray(ramp), {"exif": turned}, ramp[::-1, ::-1]),
        "4.png": (Image.fromarray(ramp).convert("P"), {}, ramp),
        "5.png": (Image.fromarray(ramp > 99), {}, (ramp > 99) * np.uint8(255)),
    }
    for name, (image, options, _) in kinds.items():
        image.save(tmp_path / name, **options)
    images = du.load_images(tmp_path, channels=1).images.numpy()
    for found, (name, (_, _, expected)) in zip(images, kinds.items(), strict=True):
        assert np.array_equal(found, expected), name


def test_a_large_photo_is_resized_without_losing_what_is_in_it(tmp_path):
    picture(tmp_path / "a.jpg", (1200, 800), "RGB", quality=95)
    image = ImageOps.fit(Image.open(tmp_path / "a.jpg"), (32, 32), Image.Resampling.BILINEAR)
    found = du.load_images(tmp_path, size=32).images[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 4
    assert du.load_images(tmp_path).images.shape == (1, 3, 800, 800)


@pytest.mark.parametrize("content", [b"junk", b"", b"\x89PNG\r\n", None], ids=["junk", "empty", "cut", "pipe"])
def test_up_to_one_percent_of_broken_pictures_are_left_out(tmp_path, content):
    for i in range(300):
        picture(tmp_path / f"{i % 2}" / f"{i:03d}.png", seed=i)
    whole = du.load_images(tmp_path)
    broken = [tmp_path / name for name in ("0/010.png", "0/290.png", "1/011.png", "1/299.png")]
    for path in broken[:3]:
        unreadable(path, content)
    with pytest.warns(UserWarning, match=r"010\.png.*290\.png.*011\.png|290\.png.*010\.png|011\.png") as caught:
        found = du.load_images(tmp_path)
    assert len(caught) == 1
    assert all(path.name in str(caught[0].message) for path in broken[:3])
    keep = [i for i in range(300) if i not in (5, 145, 155)]  # class 0 comes first
    assert torch.equal(found.images, whole.images[keep])
    assert torch.equal(found.labels, whole.labels[keep])
    unreadable(broken[3], content)
    message = refused(du.load_images, tmp_path)
    assert all(part in message for part in ("4 of 300", "1 %", *map(str, broken)))


def test_limit_takes_of_every_class(tmp_path):
    for i in range(40):
        picture(tmp_path / "abcd"[i // 10] / f"{i}.png", seed=i)
    assert du.load_images(tmp_path, limit=8).labels.bincount().tolist() == [2, 2, 2, 2]
    assert len(du.load_images(tmp_path, limit=400).labels) == 40


def test_memory_has_a_limit(tmp_path, monkeypatch):
    for i in range(4):
        picture(tmp_path / f"{i}.png", (64, 64))
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 64, 64), np.uint8))
    monkeypatch.setattr("dcgan.arrays.MEMORY_LIMIT", 4 * 64 * 64 - 1)
    for source in (tmp_path, tmp_path / "x.npz", Items([Image.new("L", (64, 64))] * 4)):
        message = refused(du.as_images, source)
        assert all(part in message for part in ("GiB", "size=", "limit="))
    assert du.as_images(tmp_path, size=63).images.shape == (4, 63, 63)
    monkeypatch.setattr("dcgan.arrays.PIXEL_LIMIT", 64 * 64 - 1)
    assert "64×64" in refused(du.load_images, tmp_path, size=8)


def test_many_pictures_show_their_progress(tmp_path, capsys, monkeypatch):
    raw = io.BytesIO()
    Image.new("L", (2, 2), 9).save(raw, "bmp")
    (tmp_path / "0.bmp").write_bytes(raw.getvalue())
    for i in range(1, 2000):
        os.link(tmp_path / "0.bmp", tmp_path / f"{i}.bmp")
    assert len(du.load_images(tmp_path).images) == 2000
    assert "2000/2000" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert len(du.load_images(tmp_path).images) == 2000
