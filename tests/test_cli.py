"""The command line: what it writes, and that every error is one line."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from disk import full_disk
from PIL import Image

import dcgan_utils as du

SMALL = ["--set", "ngf=4", "ndf=4", "--set", "batch_size=16", "nz=8"]  # a second --set adds to the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold 160 real digits to train on and 200 to compare with, as one file each."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = (part.numpy() for part in du.load_images("mnist", "test"))
    np.savez(folder / "train.npz", images=images[:160], labels=labels[:160])
    np.savez(folder / "test.npz", images=images[160:360], labels=labels[160:360])
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Hold an untrained conditional GAN."""
    return du.FastDCGAN(ngf=4, ndf=4, batch_size=16, nz=8).save(tmp_path_factory.mktemp("made") / "ck")


def test_train_refuse_and_resume(folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    common = ["train", "--recipe", "stable", "--data", folder, "--out", out]
    assert du.main([*common, "--epochs", "5", *SMALL, "log_every=5"]) == 0
    line = r"Epoch 5/5 \| Batch 10 \| D_loss: \d\.\d{4} \| D_acc: \d+\.\d\d% \| G_loss: \d\.\d{4}\n"
    assert re.search(line + r"(.*\n)*.*health after epoch 5", capsys.readouterr().out)
    assert du.main([*common, "--epochs", "6", *SMALL]) == 1  # it would mix two runs
    assert "--resume" in capsys.readouterr().err
    assert du.main(["train", "--out", out, "--epochs", "6", "--resume", "--set", "lr_G=0"]) == 0  # recipe, data known
    gan = du.GAN.load(out)
    assert (gan.epoch, gan.config.ngf, gan.config.nz, gan.config.batch_size, gan.config.lr_G) == (6, 4, 8, 16, 0)
    assert None not in gan.history["class_gap"] + gan.history["confidence"]  # each epoch was scored, then saved
    assert all((tmp_path / "run" / "stable" / name).is_file() for name in ("real_vs_fake.png", "images_FINAL.png"))
    frames = [path.name for path in (tmp_path / "run" / "stable").rglob("epoch_*.png")]
    assert frames == ["epoch_005.png"]  # every five epochs


def test_the_furthest_checkpoint_is_resumed(folder, tmp_path):
    du.FastDCGAN(ngf=4, ndf=4, batch_size=16, nz=8).save(tmp_path)  # the folder itself is one
    seconds = []
    for epochs in (1, 2):
        assert du.main(["train", "--out", str(tmp_path), "--data", folder, "--resume", "--epochs", str(epochs)]) == 0
        seconds.append(du.GAN.load(tmp_path / f"epoch-000{epochs}").history["seconds"])
    assert seconds[1][:1] == seconds[0]


@pytest.mark.parametrize("name", ["s", "s.npz", "s.png", "s/"])
def test_samples_are_an_array_a_grid_or_pictures(name, checkpoint, tmp_path, capsys):
    command = ["sample", "--checkpoint", str(checkpoint), "--n", "9", "--seed", "1", "--digits", "3"]
    assert du.main([*command, "--out", f"{tmp_path}/new/{name}"]) == 0
    path = tmp_path / "new" / name
    assert str(path) in capsys.readouterr().out
    images = du.GAN.load(checkpoint).sample(9, 1, 3)
    if name in ("s", "s.npz"):
        arrays = np.load(path.with_suffix(".npz"))
        assert torch.equal(torch.from_numpy(arrays["images"]), images)
        assert arrays["digits"].tolist() == [3] * 9
        return
    file, place = (path / "00008_3.png", slice(0, 28)) if name == "s/" else (path, slice(-30, -2))
    pixels = np.array(Image.open(file).convert("L"))[place, place].astype(int)
    assert np.abs(pixels - du.to_uint8(images)[8].numpy()).max() <= 1


def test_evaluate_prints_and_writes_scores(checkpoint, folder, tmp_path, capsys):
    command = ["evaluate", "--checkpoint", str(checkpoint), "--data", folder, "--n", "120"]
    assert du.main([*command, "--json", str(tmp_path / "new" / "scores.json")]) == 0
    scores = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert (scores["n"], scores["frechet"] > scores["frechet_baseline"]) == (120, True)
    assert re.search(rf"{scores['frechet']:.3f}", capsys.readouterr().out)


SAMPLE = ["sample", "--checkpoint", "CHECKPOINT", "--out"]
ERRORS = {
    "no recipe": (["train", "--recipe", "dcgna"], "did you mean 'dcgan'"),
    "no field": (["train", "--set", "lrG=1"], "did you mean 'lr_G'"),
    **{f"field {name}": (["train", "--set", f"{name}=5"], name) for name in ("config", "self", "path", "cls")},
    "no value": (["train", "--set", "lr_G"], "FIELD=VALUE"),
    "deep": (["train", "--set", "lr_G=" + "[" * 100_000], "lr_G"),
    "out of range": (["train", "--set", "lr_G=5"], "outside its range"),
    "infinite": (["train", "--set", "seed=1e999"], "seed"),
    "device": (["train", "--set", "device=meta"], "device"),
    "empty data": (["train", "--data", ""], "--data"),
    "empty out": (["train", "--out", ""], "--out"),
    "no data": (["train", "--data", "fashion-mnst"], "fashion-mnst"),
    "no time": (["train", "--max-seconds", "nan"], "max_seconds"),
    "nothing to resume": (["train", "--resume"], "no checkpoint"),
    "no checkpoint": (["evaluate", "--checkpoint", "nowhere"], "no checkpoint in nowhere"),
    "no samples": ([*SAMPLE, "x.npz", "--n", "0"], "n = 0"),
    "no such digit": ([*SAMPLE, "x.npz", "--digits", "10"], "digits"),
    "no such kind of file": ([*SAMPLE, "x.jpg"], "x.jpg"),
    **{f"{n} samples": ([*SAMPLE, "x.npz", "--n", str(n)], "") for n in (10**13, 10**18, 10**30)},
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name, checkpoint, tmp_path, capsys, monkeypatch):
    arguments, words = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    assert du.main([str(checkpoint) if word == "CHECKPOINT" else word for word in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []  # nothing was begun


def test_a_report_that_fails_costs_no_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(du.FastDCGAN, "generate_images", lambda gan, epoch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        du.main(["train", "--data", folder, "--out", str(tmp_path), *SMALL])
    assert du.newest_checkpoint(tmp_path).name == "epoch-0001"


def test_a_last_checkpoint_that_fails_is_an_error(folder, tmp_path, capsys):
    with full_disk(), pytest.warns(UserWarning, match="not saved"):
        assert du.main(["train", "--data", folder, "--epochs", "1", "--out", str(tmp_path), *SMALL]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert os.listdir(tmp_path) == ["fast"]


def test_it_runs_as_a_script_into_a_log_without_emoji(folder, root, tmp_path):
    command = [sys.executable, str(root / "dcgan_utils.py"), "train", "--data", folder, "--max-seconds", "0.01", *SMALL]
    plain = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, env=plain)
    assert b"max_seconds = 0.01 reached" in done.stdout
    fresh = [
        "sample",
        "--checkpoint",
        str(tmp_path / "outputs"),
        "--n",
        "5",
        "--seed",
        "3",
        "--out",
        str(tmp_path / "s"),
    ]
    subprocess.run([*command[:2], *fresh], check=True)  # a process that never saw the Config
    images = torch.from_numpy(np.load(tmp_path / "s.npz")["images"])
    assert torch.allclose(images, du.GAN.load(tmp_path / "outputs").sample(5, 3), atol=0.02)  # it may compute in bf16
