"""The command line and the reports: what a terminal shows and what is left on disk."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dcgan_utils as du

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--set", "ngf=4", "ndf=4", "batch_size=16", "nz=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold 64 real digits as IDX files."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = du.load_images("mnist", "test")
    for name, part in (("train-images-idx3-ubyte", images[:64]), ("train-labels-idx1-ubyte", labels[:64].byte())):
        header = bytes([0, 0, 8, part.ndim]) + b"".join(n.to_bytes(4, "big") for n in part.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + part.numpy().tobytes()))
    return str(folder)


@pytest.mark.parametrize("recipe", ["fast", "stable", "dcgan"])
def test_train_resume_and_sample(recipe, folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    small = [*SMALL, "image_size=16"] if recipe == "dcgan" else SMALL
    common = ["train", "--recipe", recipe, "--data", folder, "--out", out]
    assert du.main([*common, "--epochs", "1", *small]) == 0
    text = capsys.readouterr().out
    assert "epoch 1/1" in text
    assert "🟢" in text
    assert "sample diversity" in text
    assert re.search(r"(🟢|🟡|🔴) health after epoch 1: (healthy|watch|act)", text)
    assert du.main([*common, "--epochs", "2", *small]) == 1  # it would overwrite
    assert "--resume" in capsys.readouterr().err
    assert du.main(["train", "--out", out, "--epochs", "3", "--resume"]) == 0  # recipe and data are known
    assert folder in capsys.readouterr().out
    gan = du.GAN.load(out)
    assert gan.epoch == 3
    assert gan.config.nz == 8
    for name in ("class_gap", "confidence"):  # what the judge reads of each epoch
        assert all(0 <= value <= 1 for value in gan.history[name])
        assert len(gan.history[name]) == 3
    assert "fid" not in gan.history  # distances are asked for by those who want to wait for them
    assert (tmp_path / "run" / recipe / "real_vs_fake.png").stat().st_size > 1000
    assert (tmp_path / "run" / recipe / "images_FINAL.png").exists()
    assert du.main(["sample", "--checkpoint", out, "--n", "7", "--out", str(tmp_path / "s"), "--seed", "1"]) == 0
    assert str(tmp_path / "s.npz") in capsys.readouterr().out  # NumPy's ending, which one need not write
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["images"].shape == (7, 1, gan.config.image_size, gan.config.image_size)
    assert arrays["images"].dtype == np.float32
    assert torch.equal(torch.from_numpy(arrays["images"]), gan.sample(7, seed=1))
    assert ("digits" in arrays) == (recipe == "fast")


def test_stable_recipe_prints_its_readmes_lines(folder, tmp_path, capsys):
    gan = du.StableDCGAN(ngf=4, ndf=4, batch_size=16, nz=8, log_every=2, save_every=1, out_dir=str(tmp_path))
    gan.train(2, data=folder)
    text = capsys.readouterr().out
    assert "Epoch 2/2 | Batch 2 | D_loss: " in text
    assert " | D_acc: " in text
    assert " | G_loss: " in text
    assert "Epoch 2/2 summary" in text
    frames = sorted((tmp_path / "stable" / "frames").glob("*.png"))
    assert [p.name for p in frames] == ["epoch_001.png", "epoch_002.png"]
    assert du.make_animation(frames[0].parent, tmp_path / "a.gif").stat().st_size > 1000


def test_stable_recipe_saves_images_every_five_epochs(folder, tmp_path):
    gan = du.StableDCGAN(ngf=4, ndf=4, batch_size=32, nz=8, out_dir=str(tmp_path))
    gan.train(11, data=folder)
    frames = sorted(p.name for p in (tmp_path / "stable" / "frames").glob("*.png"))
    assert frames == ["epoch_005.png", "epoch_010.png"]


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.29, "Generator too strong"), (0.555, "✅ Training balanced!"), (0.81, "Discriminator too strong")],
)
def test_balance_line(accuracy, words):
    assert words in du.balance_line(accuracy)


def test_generate_images_is_saved_and_returned(tmp_path):
    gan = du.StableDCGAN(ngf=4, ndf=4, out_dir=str(tmp_path))
    figure = gan.generate_images(epoch="FINAL", n=36)
    assert len(figure.axes) == 1
    assert (tmp_path / "stable" / "images_FINAL.png").exists()


def test_pictures_that_cannot_be_saved_cost_no_training(folder, tmp_path):
    (tmp_path / "stable").write_text("a file where a folder should be")
    gan = du.StableDCGAN(ngf=4, ndf=4, batch_size=16, nz=8, save_every=1, out_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="was not saved") as warned:
        gan.train(1, data=folder)
    assert {str(w.message).split(" was not")[0] for w in warned} == {"the real-vs-fake grid", "the grid of epoch 1"}
    assert gan.epoch == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "dcgna"], "did you mean 'dcgan'"),
        (["train", "--set", "lrG=1"], "did you mean 'lr_G'"),
        (["train", "--set", "lr_G"], "FIELD=VALUE"),
        (["train", "--set", "lr_G=5"], "lr_G = 5 is outside its range"),
        (["train", "--data", "fashion-mnst"], "did you mean 'fashion-mnist'"),
        (["train", "--resume"], "no checkpoint"),
        (["sample", "--checkpoint", "nowhere", "--out", "x.npz"], "no checkpoint in nowhere"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert du.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_it_runs_as_a_script(folder, tmp_path):
    command = [sys.executable, str(ROOT / "dcgan_utils.py"), "train", "--data", folder, "--max-seconds", "0.01", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "max_seconds = 0.01 reached" in done.stdout
    assert "health after epoch" in done.stdout
    assert (tmp_path / "outputs" / "fast" / "real_vs_fake.png").exists()


def test_the_progress_bar_shows_rate_and_time_left(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gan = du.FastDCGAN(ngf=4, ndf=4, batch_size=16, nz=8, log_every=1, out_dir=str(tmp_path))
    gan.train(30, data=folder, callbacks=[du.ProgressBar()])
    shown = capsys.readouterr().err
    assert re.search(r"epoch \d+/30 D \d\.\d+ G \d\.\d+: +\d+%", shown)
    assert re.search(r"\d\d:\d\d<\d\d:\d\d, .*img/s", shown)  # elapsed < left, rate
