"""Checkpoints: everything goes in, everything comes out, and a bad one says what is wrong."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import RECIPES, make, same, weights

import dcgan_utils as du

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def digits():
    images, labels = du.load_images("mnist", "test")
    return images[:64], labels[:64]


@pytest.mark.parametrize("kind", RECIPES)
def test_train_two_and_resume_two_equals_train_four(kind, digits, tmp_path):
    options = {"num_epochs": 4, "ema": 0.9, "dropout_G": 0.1, "noise_D": 0.1}
    whole, half = make(kind, **options), make(kind, **options)
    whole.train(4, data=digits, callbacks=[])
    half.train(2, data=digits, callbacks=[])
    half.save(tmp_path / "half")
    resumed = kind.load(tmp_path / "half")
    resumed.train(data=digits, callbacks=[])  # what num_epochs leaves: two more
    assert same(whole, resumed)
    assert torch.equal(weights(whole.average), weights(resumed.average))
    for name in ("optimizer_G", "optimizer_D"):
        first, second = getattr(whole, name), getattr(resumed, name)
        for index, parameter in enumerate(first.param_groups[0]["params"]):
            mine, other = first.state[parameter], second.state[second.param_groups[0]["params"][index]]
            assert all(torch.equal(mine[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    for name in (*du.METRICS, *du.EPOCH_READINGS, "epoch"):
        assert whole.history[name] == resumed.history[name]
    assert whole.history.batches == resumed.history.batches


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_other_optimisers_resume_too(optimizer, digits, tmp_path):
    whole, half = make(du.DCGAN, optimizer=optimizer), make(du.DCGAN, optimizer=optimizer)
    whole.train(2, data=digits, callbacks=[])
    half.train(1, data=digits, callbacks=[])
    half.save(tmp_path / "half")
    resumed = du.GAN.load(tmp_path / "half")
    resumed.train(1, data=digits, callbacks=[])
    assert same(whole, resumed)


def test_a_process_that_never_saw_the_config_gives_the_same_samples(digits, tmp_path):
    gan = make(nz=11, ngf=6, conditional=False)
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "ck")
    command = [sys.executable, str(ROOT / "dcgan_utils.py"), "sample", "--checkpoint", str(tmp_path / "ck")]
    command += ["--n", "5", "--seed", "3", "--out", str(tmp_path / "s.npz")]
    subprocess.run(command, check=True, cwd=tmp_path)
    import numpy as np

    images = torch.from_numpy(np.load(tmp_path / "s.npz")["images"])
    tell = "import dcgan_utils as du; print(du.pick_precision('auto', du.pick_device('cpu')))"
    seen = subprocess.check_output([sys.executable, "-c", tell], cwd=ROOT, text=True).strip()  # conftest.py hides bf16
    assert torch.allclose(images, du.GAN.load(tmp_path / "ck", precision=seen).sample(5, seed=3), atol=1e-6)
    assert torch.allclose(images, gan.sample(5, seed=3), atol=1e-6 if seen == "fp32" else 0.02)


def test_files_are_safetensors_and_json(digits, tmp_path):
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "ck")
    assert sorted(p.name for p in (tmp_path / "ck").iterdir()) == ["state.json", "weights.safetensors"]
    record = json.loads((tmp_path / "ck" / "state.json").read_text())
    assert record["version"] == du.__version__
    assert record["recipe"] == "fast"
    assert record["config"]["nz"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]  # no temporary folder stays behind
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "ck")  # over an older one
    assert du.FastDCGAN.load(tmp_path / "ck").epoch == 2


def test_a_full_disk_leaves_the_older_checkpoint_whole(digits, tmp_path, monkeypatch):
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "ck")

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(du, "save_file", full)
    gan.train(1, data=digits, callbacks=[])
    with pytest.raises(OSError, match=r"No space left.*free some space.*nothing was lost"):
        gan.save(tmp_path / "ck")
    with pytest.warns(UserWarning, match="No space left"):
        gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path / "many")])
    assert gan.history["epoch"] == [1, 2, 3]  # training went on
    monkeypatch.undo()
    assert du.FastDCGAN.load(tmp_path / "ck").epoch == 1


def test_checkpoints_of_a_run_keep_the_two_newest(digits, tmp_path):
    gan = make()
    gan.train(4, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0003", "epoch-0004"]
    assert du.newest_checkpoint(tmp_path).name == "epoch-0004"
    assert gan.last_checkpoint == tmp_path / "epoch-0004"


def test_saving_never_replaces_other_things(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    gan = make()
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(du.CheckpointError, match="holds other things"):
            gan.save(path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_move_that_fails_puts_the_older_checkpoint_back(digits, tmp_path, monkeypatch):
    gan = make()
    gan.save(tmp_path / "ck")
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    gan.train(1, data=digits, callbacks=[])
    with pytest.raises(OSError, match="nothing was lost"):
        gan.save(tmp_path / "ck")
    assert du.FastDCGAN.load(tmp_path / "ck").epoch == 0


def test_a_new_run_into_an_old_folder_keeps_its_own_checkpoints(digits, tmp_path):
    make().train(4, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    second = make(seed=5)
    second.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert second.last_checkpoint.is_dir()
    assert du.GAN.load(tmp_path).config.seed == 5


def test_loading_takes_changes_that_can_be_made(digits, tmp_path):
    gan = make(du.StableDCGAN)
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "ck")
    changed = du.StableDCGAN.load(tmp_path / "ck", beta1=0.2, real_label_smooth=1.0, out_dir="elsewhere", num_epochs=9)
    assert changed.optimizer_G.param_groups[0]["betas"][0] == 0.2
    assert changed.history.config is changed.config
    assert (changed.config.out_dir, changed.config.num_epochs, changed.loss.real) == ("elsewhere", 9, 1.0)
    with pytest.raises(ValueError, match="ngf is built in"):
        du.StableDCGAN.load(tmp_path / "ck", ngf=8)


def test_a_checkpoint_from_before_the_newer_readings_and_settings_goes_on(digits, tmp_path):
    gan = make(du.StableDCGAN)
    gan.train(2, data=digits, callbacks=[])
    gan.save(tmp_path / "old")
    state = tmp_path / "old" / "state.json"
    record = json.loads(state.read_text())
    newer = {*du.METRICS[5:], *du.EPOCH_READINGS} - {"diversity"}
    assert newer <= set(record["history"]["epochs"])
    for part in ("epochs", "batches"):
        record["history"][part] = {k: v for k, v in record["history"][part].items() if k not in newer}
    for name in ("detach", "batch_norm_G", "batch_norm_D"):
        del record["config"][name]
        record["history"]["config"].pop(name)
    record["sums"] = {k: v for k, v in record["sums"].items() if k not in newer and k != "D_G_z²"}
    state.write_text(json.dumps(record))
    again = du.GAN.load(tmp_path / "old")
    assert again.diagnose().findings
    again.train(1, data=digits, callbacks=[])
    assert again.history["epoch"] == [1, 2, 3]
    assert again.history["leak"] == [None, None, 0]
    assert again.history["spacing"][:2] == [None, None]
    assert {len(values) for values in again.history.values()} == {3}
    assert {len(values) for values in again.history.batches.values()} == {len(again.history.batches["step"])}
    gan.train(1, data=digits, callbacks=[])
    assert same(gan, again)
    assert gan.diagnose() == again.diagnose()


@pytest.mark.parametrize("field", ["detach", "batch_norm_G", "batch_norm_D"])
def test_a_gan_that_was_broken_on_purpose_comes_back_as_it_was(field, digits, tmp_path):
    gan = make(**{field: False})
    gan.train(1, data=digits, callbacks=[])
    gan.history.record("fid", 9.0)
    gan.save(tmp_path / "ck")
    again = du.FastDCGAN.load(tmp_path / "ck")
    assert getattr(again.config, field) is False
    assert again.history["fid"] == [9.0]
    assert again.diagnose() == gan.diagnose()
    for one in (gan, again):
        one.train(1, data=digits, callbacks=[])
    assert same(gan, again)
    assert again.history["leak"] == gan.history["leak"]


def break_checkpoint(folder, how):
    state, tensors = folder / "state.json", folder / "weights.safetensors"
    record = json.loads(state.read_text())
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "truncated json":
        state.write_text(state.read_text()[:50])
    elif how == "newer":
        state.write_text(json.dumps({**record, "format": 99, "version": "9.9"}))
    elif how == "unknown recipe":
        state.write_text(json.dumps({**record, "recipe": "fats"}))
    elif how == "unknown field":
        record["config"]["lr_Q"] = 1
        state.write_text(json.dumps(record))
    elif how == "other shapes":
        record["config"]["ngf"] = 5
        state.write_text(json.dumps(record))
    else:
        tensors.unlink()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("truncated tensors", du.CheckpointError, "damaged"),
        ("truncated json", du.CheckpointError, "damaged"),
        ("newer", du.CheckpointError, "9.9.*update"),
        ("unknown recipe", du.CheckpointError, "'fats'.*did you mean 'fast'"),
        ("unknown field", du.CheckpointError, "lr_Q"),
        ("other shapes", du.CheckpointError, "does not fit"),
        ("missing file", FileNotFoundError, "no weights.safetensors"),
    ],
)
def test_a_bad_checkpoint_says_what_is_wrong(how, error, message, tmp_path):
    make().save(tmp_path / "ck")
    break_checkpoint(tmp_path / "ck", how)
    with pytest.raises(error, match=message):
        du.FastDCGAN.load(tmp_path / "ck")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    make(du.StableDCGAN).save(tmp_path / "ck")
    with pytest.raises(du.CheckpointError, match=r"StableDCGAN.*not a DCGAN.*StableDCGAN\.load"):
        du.DCGAN.load(tmp_path / "ck")
    assert isinstance(du.GAN.load(tmp_path / "ck"), du.StableDCGAN)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        du.GAN.load(tmp_path)


def test_an_unwritable_folder_is_refused_before_training(digits, tmp_path):
    (tmp_path / "file").write_text("")
    gan = make()
    with pytest.raises(OSError, match="cannot write into"):
        gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path / "file" / "inner")])
    assert gan.step == 0
    with pytest.raises(OSError, match="cannot save"):
        gan.save(tmp_path / "file" / "ck")


def test_the_newest_of_a_checkpoint_and_those_in_it_goes_on(digits, tmp_path):
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "mine")
    gan.train(1, data=digits, callbacks=[])
    gan.save(tmp_path / "mine" / "epoch-0002")
    assert du.GAN.load(tmp_path / "mine").epoch == 2


def test_only_numbered_checkpoints_are_thinned_out(digits, tmp_path):
    gan = make()
    gan.save(tmp_path / "epoch-best")
    gan.train(4, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "epoch-0003",
        "epoch-0004",
        "epoch-best",
    ]


def test_a_folder_that_is_a_checkpoint_itself_survives_those_saved_into_it(digits, tmp_path):
    gan, folder = make(), tmp_path / "epoch-0001"
    gan.save(folder)
    gan.train(4, data=digits, callbacks=[du.SaveCheckpoints(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "epoch-0003", "epoch-0004", "state.json", "weights.safetensors",
    ]  # fmt: skip


def test_a_checkpoint_names_the_data_it_was_trained_on(digits, tmp_path):
    gan = make()
    gan.trained_on = "fashion-mnist"  # as a checkpoint would say
    assert du.GAN.load(gan.save(tmp_path / "named")).trained_on == "fashion-mnist"
    gan.train(1, data=digits, callbacks=[])
    assert du.GAN.load(gan.save(tmp_path / "nameless")).trained_on is None


def break_state(change):
    """Return a function that changes a checkpoint's record."""

    def act(folder):
        record = json.loads((folder / "state.json").read_text())
        change(record)
        (folder / "state.json").write_text(json.dumps(record))

    return act


def drop_tensor(name):
    """Return a function that removes one tensor of a checkpoint."""

    def act(folder):
        tensors = load_file(folder / "weights.safetensors")
        del tensors[name]
        save_file(tensors, folder / "weights.safetensors")

    return act


@pytest.mark.parametrize(
    "damage",
    [
        break_state(lambda record: record.pop("config")),
        break_state(lambda record: record.update(recipe=["fast"])),
        break_state(lambda record: record["param_groups"].update(optimizer_G=[])),
        drop_tensor("rng.cpu"),
        drop_tensor("optimizer_G.0.exp_avg"),
    ],
    ids=["no config", "a list as recipe", "no groups", "no random numbers", "half of a memory"],
)
def test_a_checkpoint_that_lacks_something_is_refused_before_it_trains(damage, digits, tmp_path):
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    damage(gan.save(tmp_path / "ck"))
    with pytest.raises(du.CheckpointError):
        du.GAN.load(tmp_path / "ck")


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupt_between_the_renames_leaves_a_whole_checkpoint(digits, tmp_path, monkeypatch, after):
    """After the old one moved away it comes back; after the new one is in place it stays."""
    gan, path, calls = make(), tmp_path / "kept", []
    gan.train(1, data=digits, callbacks=[])
    gan.save(path)
    before = (path / "state.json").read_text()
    rename = Path.rename

    def interrupted(self, target):
        rename(self, target)
        calls.append(target)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gan.save(path)
    monkeypatch.undo()
    assert (path / "state.json").read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    du.FastDCGAN.load(path)


def test_what_others_put_beside_a_checkpoint_costs_neither_training_nor_their_files(digits, tmp_path):
    gan = make()
    gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    (tmp_path / "epoch-0001" / ".DS_Store").write_text("left by a file manager")
    (tmp_path / "epoch-0002").mkdir()
    (tmp_path / "epoch-0002" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="epoch 2 was not saved"):
        gan.train(1, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    gan.save(tmp_path / "epoch-0003")
    (tmp_path / "epoch-0003" / "notes.txt").write_text("mine, too")
    with pytest.warns(UserWarning, match="epoch 3 was not saved"):
        gan.train(3, data=digits, callbacks=[du.SaveCheckpoints(tmp_path)])
    assert (tmp_path / "epoch-0002" / "notes.txt").exists()
    assert (tmp_path / "epoch-0003" / "notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"epoch-0004", "epoch-0005"}
    assert not (tmp_path / "epoch-0001").exists()
