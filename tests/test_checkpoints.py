"""Checkpoints: everything goes in and comes out; a folder of them knows the newest, and one run at a time."""

import contextlib
import os

import pytest
import torch
from disk import FILES, full_disk, names, rewrite
from tiny import RECIPES, make, same, weights

import dcgan_utils as du


@pytest.fixture(scope="module")
def digits():
    """Return 64 real digits: four iterations an epoch."""
    images, labels = du.load_images("mnist", "test")
    return images[:64], labels[:64]


# ------------------------------------------------------------------------------------------ there and back
@pytest.mark.parametrize("stop", [8, 6], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_resumed_run_equals_one_that_was_never_stopped(kind, stop, digits, tmp_path):
    options = {"num_epochs": 4, "ema_decay": 0.9, "dropout_G": 0.1, "instance_noise": 0.1, "log_every": 1}
    whole, half = make(kind, **options), make(kind, **options)
    whole.train(4, data=digits, callbacks=[])
    half.train(2, data=digits, callbacks=[du.StopAt(stop)])
    resumed = kind.load(half.save(tmp_path / "half"))
    resumed.train(data=digits, callbacks=[])  # what num_epochs leaves
    assert same(whole, resumed)
    assert torch.equal(weights(whole.average), weights(resumed.average))
    for name in ("optimizer_G", "optimizer_D"):
        first, second = (getattr(gan, name).state_dict()["state"] for gan in (whole, resumed))
        assert all(torch.equal(first[index][key], second[index][key]) for index in first for key in first[index])
    moved = () if stop == 8 else [name for name in du.EPOCH_READINGS if "ratio_" in name]  # since the run went on
    for name in {*du.METRICS, *du.EPOCH_READINGS, "epoch"} - {*moved}:
        assert whole.history[name] == resumed.history[name]
    assert whole.history.batches == resumed.history.batches


def test_a_gan_that_was_never_trained_or_is_saved_twice_comes_back(digits, tmp_path):
    gan = make(du.StableDCGAN)
    assert torch.equal(du.GAN.load(gan.save(tmp_path / "ck")).sample(4, seed=1), gan.sample(4, seed=1))
    assert names(tmp_path / "ck") == FILES
    gan.train(1, data=digits, callbacks=[])
    assert gan.save(tmp_path / "ck") == gan.last_checkpoint == tmp_path / "ck"
    assert torch.equal(du.GAN.load(tmp_path / "ck").sample(4, seed=1), gan.sample(4, seed=1))
    assert names(tmp_path / "ck") == FILES
    assert names(tmp_path) == ["ck"]


def test_classes_data_and_a_users_own_reading_come_back(digits, tmp_path):
    gan = make(num_classes=10)
    gan.train(1, data=digits, callbacks=[])
    gan.history.record("mine", 9.0)
    gan.data_name, gan.classes = "fashion-mnist", tuple("abcdefghij")
    again = du.GAN.load(gan.save(tmp_path / "ck"))
    assert (again.data_name, again.classes, again.history["mine"]) == ("fashion-mnist", gan.classes, [9.0])
    assert again.sample(1, 0, "c").equal(gan.sample(1, 0, "c"))


def test_loading_takes_changes_that_can_be_made(tmp_path):
    make(du.StableDCGAN).save(tmp_path / "ck")
    changed = du.StableDCGAN.load(tmp_path / "ck", beta1=0.2, real_label_smooth=1.0, out_dir="elsewhere", num_epochs=9)
    assert changed.optimizer_G.param_groups[0]["betas"][0] == 0.2
    assert changed.history.config is changed.config
    assert (changed.config.out_dir, changed.config.num_epochs, changed.loss.labels) == ("elsewhere", 9, (1.0, 0.0))
    with pytest.raises(ValueError, match="ngf"):
        du.StableDCGAN.load(tmp_path / "ck", ngf=8)


def test_a_checkpoint_decides_nothing_outside_itself(tmp_path):
    evil = {"out_dir": "/elsewhere", "tracker": "wandb", "device": "cuda", "precision": "fp16", "cuda_graphs": False}
    path = make().save(tmp_path / "ck")
    rewrite(path, lambda record, tensors: record["config"].update(evil))
    gan, usual = du.GAN.load(path), du.Config()
    assert {name: getattr(gan.config, name) for name in evil} == {name: getattr(usual, name) for name in evil}
    assert du.GAN.load(path, out_dir="mine").config.out_dir == "mine"


# ------------------------------------------------------------------------------------------ a folder of checkpoints
def touch(folder, ages):
    """Set the times of an epoch's files: copying and unzipping leave any order."""
    for number, age in ages.items():
        for file in (folder / f"epoch-{number:04d}").iterdir():
            os.utime(file, (2e9 - age, 2e9 - age))


@pytest.mark.parametrize("ages", [{1: 5, 2: 5}, {1: 0, 2: 100}, {1: -1e9, 2: -1e9}], ids=["same", "older", "ahead"])
def test_age_is_progress_not_the_time_of_files(ages, digits, tmp_path):
    gan = make()
    gan.train(2, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    touch(tmp_path, ages)
    assert du.newest_checkpoint(tmp_path) == tmp_path / "epoch-0002"
    again = du.GAN.load(tmp_path)
    again.train(2, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert again.last_checkpoint == tmp_path / "epoch-0004" == du.newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["epoch-0003", "epoch-0004"]


def test_what_was_just_saved_stays_though_another_run_was_further(digits, tmp_path):
    make().train(4, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    second = make(seed=5)
    with pytest.warns(UserWarning, match="epoch-0004"):
        second.train(2, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert du.GAN.load(second.last_checkpoint).config.seed == 5
    assert names(tmp_path) == ["epoch-0002", "epoch-0003", "epoch-0004"]


def test_a_folder_that_is_a_checkpoint_is_the_one_that_is_loaded(digits, tmp_path):
    gan, folder = make(), tmp_path / "epoch-0001"
    gan.save(folder)
    gan.train(4, data=digits, callbacks=[du.SaveCheckpoints(folder)])
    assert names(folder) == ["epoch-0003", "epoch-0004", *FILES]
    assert du.newest_checkpoint(folder) == folder
    assert du.GAN.load(folder).epoch == 0


def test_a_damaged_checkpoint_hides_no_whole_one(digits, tmp_path):
    make().train(2, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    for name in FILES:  # as a disk without fsync would have left it
        (tmp_path / "epoch-0002" / name).write_bytes(b"\0" * 10)
    assert du.GAN.load(tmp_path).epoch == 1


def test_others_files_cost_neither_training_nor_themselves(digits, tmp_path):
    gan = make()
    gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    gan.save(tmp_path / "epoch-best")
    (tmp_path / "epoch-0001" / ".DS_Store").write_text("left by a file manager")
    for number in (2, 3):
        (tmp_path / f"epoch-000{number}").mkdir()
        (tmp_path / f"epoch-000{number}" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="was not saved"):
        gan.train(4, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert names(tmp_path) == ["epoch-0002", "epoch-0003", "epoch-0004", "epoch-0005", "epoch-best"]
    assert names(tmp_path / "epoch-0002") == ["notes.txt"]


class DiskFillsUp(du.Callback):
    """Let saves fail in some epochs."""

    def __init__(self, epochs):
        self.epochs, self.full = epochs, contextlib.ExitStack()

    def on_batch_end(self, gan):
        """Fill the disk, or free it."""
        self.full.close()
        if gan.epoch + 1 in self.epochs:
            self.full.enter_context(full_disk())

    def on_train_end(self, gan):
        """Free the disk."""
        self.full.close()


def test_a_failed_save_is_a_warning_and_the_last_one_an_error(digits, tmp_path):
    gan = make()
    with pytest.warns(UserWarning, match="epoch 1 was not saved"):
        gan.train(2, data=digits, callbacks=[DiskFillsUp([1]), du.SaveCheckpoints(tmp_path)])
    assert names(tmp_path) == ["epoch-0002"]
    disk = DiskFillsUp([4])
    with pytest.warns(UserWarning, match="epoch 4 was not saved"), pytest.raises(OSError, match="epoch-0003"):
        gan.train(2, data=digits, callbacks=[disk, du.SaveCheckpoints(tmp_path)])
    assert gan.epoch == 4
    assert du.GAN.load(tmp_path).epoch == 3
    gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])  # the folder is free again
    assert du.GAN.load(tmp_path).epoch == 5


def test_an_error_in_training_is_not_hidden_by_a_failed_save(digits, tmp_path):
    class Breaks(du.Callback):
        def on_epoch_end(self, gan):
            if gan.epoch == 2:
                raise ZeroDivisionError

    callbacks = [DiskFillsUp([1, 2]), du.SaveCheckpoints(tmp_path), Breaks()]
    with pytest.warns(UserWarning, match="not saved"), pytest.raises(ZeroDivisionError):
        make().train(3, data=digits, callbacks=callbacks)


def test_one_run_at_a_time_saves_into_a_folder(digits, tmp_path):
    class Second(du.Callback):
        def on_epoch_end(self, gan):
            with pytest.raises(OSError, match="another run") as caught:
                make().train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
            assert "\n" not in str(caught.value)

    gan = make()
    gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path), Second()])
    assert names(tmp_path) == ["epoch-0001"]
    gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])


def test_a_folder_that_cannot_be_written_is_refused_before_training(digits, tmp_path):
    (tmp_path / "file").write_text("")
    gan = make()
    with pytest.raises(OSError, match="file"):
        gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path / "file" / "inner")])
    assert gan.step == 0
    with pytest.raises(OSError, match="cannot save"):
        gan.save(tmp_path / "file" / "ck")
