"""What a checkpoint's files hold is looked at before it is used, and what older versions wrote still loads."""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from disk import FILES, rewrite
from safetensors.torch import load_file
from tiny import make, same

import dcgan_utils as du

OLD = Path(__file__).parent / "old_checkpoints"  # written by commit fcc9dc2, format 1, with four of its samples


@pytest.fixture(scope="module")
def digits():
    """Return 64 real digits: four iterations an epoch."""
    images, labels = du.load_images("mnist", "test")
    return images[:64], labels[:64]


@pytest.fixture
def trained(digits, tmp_path):
    """Return the folder of a checkpoint that one epoch has gone into."""
    gan = make()
    gan.train(1, data=digits, callbacks=[])
    return gan.save(tmp_path / "ck")


def setting(*path):
    """Return a change of a record: setting("progress", "step", -1)."""

    def change(record, tensors):
        *parents, key, value = path
        for parent in parents:
            record = record[parent]
        record[key] = value

    return change


def tensor(name, change):
    """Return a change of one tensor; None removes it."""

    def act(record, tensors):
        value = tensors.pop(name, torch.zeros(1))
        if (value := change(value)) is not None:
            tensors[name] = value.contiguous()

    return act


# ------------------------------------------------------------------------------------------ what older versions wrote
@pytest.mark.parametrize("recipe", sorted(du.RECIPES))
def test_an_older_checkpoint_draws_the_same_images_and_trains_on(recipe, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gan = du.GAN.load(OLD / recipe)
    saved, tensors = load_file(OLD / recipe / "samples.safetensors"), load_file(OLD / recipe / FILES[1])
    assert saved["images"].std(dim=0).mean() > 0.005  # they differ
    torch.testing.assert_close(gan.generate(saved["z"]), saved["images"], rtol=0, atol=1e-5)
    for name in ("optimizer_G", "optimizer_D"):
        state = getattr(gan, name).state_dict()["state"]
        kept = {f"{name}.{index}.{key}": value for index, values in state.items() for key, value in values.items()}
        assert kept.keys() == {key for key in tensors if key.startswith(name)}
        assert all(torch.equal(value, tensors[key]) for key, value in kept.items())
    assert torch.equal(gan.rng.get_state(), tensors["rng.cpu"])
    assert (gan.step, gan.history["epoch"]) == (2, [1.0])
    assert (
        gan.history["nn_distance_ratio"]
        == json.loads((OLD / recipe / FILES[0]).read_text())["history"]["epochs"]["spacing"]
    )
    keep = digits[1] < 3
    gan.train(1, data=(digits[0][keep][:16], digits[1][keep][:16]), callbacks=[])
    assert gan.history["epoch"] == [1.0, 2.0]
    assert all(math.isfinite(gan.history[name][-1]) for name in du.METRICS)
    assert {len(values) for values in gan.history.values()} == {2}


def test_an_older_epoch_that_was_cut_short_goes_on(tmp_path):
    def cut_short(record, tensors):
        record["progress"].update(epoch=0, step=1, position=16)
        record["sums"].update(D_G_z=0.75, D_x=0.25, count=1.0, images=16.0, seconds=1.0)
        record["history"]["epochs"]["epoch"] = [0.4]

    shutil.copytree(OLD / "dcgan", tmp_path / "ck")
    rewrite(tmp_path / "ck", cut_short)
    gan = du.GAN.load(tmp_path / "ck")
    gan.train(1, data=torch.zeros(40, 28, 28, dtype=torch.uint8) + 2, callbacks=[])
    assert gan.history["epoch"] == [1.0]
    assert gan.history["D_G_z_std"][0] < 0.3  # of the change from 0.75, not from 0


def test_older_fields_that_are_gone_are_named_once(tmp_path):
    shutil.copytree(OLD / "dcgan", tmp_path / "ck")
    rewrite(tmp_path / "ck", setting("config", "lr_Q", 1))
    rewrite(tmp_path / "ck", setting("config", "optimizer", "sgd"))
    rewrite(tmp_path / "ck", tensor("optimizer_G.0.exp_avg", lambda value: None))  # SGD keeps none
    with pytest.warns(UserWarning, match="lr_Q") as told:
        gan = du.GAN.load(tmp_path / "ck")
    assert len(told) == 1
    assert not gan.optimizer_D.state  # Adam begins anew
    assert gan.step == 2


def test_the_groups_of_an_optimizer_are_not_read_from_a_file(trained, digits):
    def swap(record, tensors):
        record["param_groups"] = {name: [{"params": [3, 2, 1, 0], "lr": -1}] for name in ("optimizer_G", "optimizer_D")}

    first = du.GAN.load(trained)
    rewrite(trained, swap)
    second = du.GAN.load(trained)
    for gan in (first, second):
        gan.train(1, data=digits, callbacks=[])
    assert same(first, second)


def test_on_another_kind_of_device_noise_follows_from_the_step(trained, digits):
    rewrite(trained, lambda record, tensors: tensors.update({"rng.cuda": tensors.pop("rng.cpu")[:16].clone()}))
    first, second = du.GAN.load(trained), du.GAN.load(trained)
    for gan in (first, second):
        gan.train(1, data=digits, callbacks=[])
    assert same(first, second)


class HalfEngine(du.Accelerated):
    """Scale losses as on a GPU in fp16."""

    def __init__(self, config):
        super().__init__(config)
        self.scalers = {player: torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) for player in "GD"}


class Half(du.FastDCGAN):
    """Train with a loss that is scaled."""

    engine_type = HalfEngine


def test_scales_of_the_loss_come_back_and_bad_ones_are_refused(digits, tmp_path):
    gan = Half(ngf=4, ndf=4, batch_size=16)
    gan.train(1, data=digits, callbacks=[])
    again = Half.load(gan.save(tmp_path / "ck"))
    assert again.engine.scalers["G"].state_dict() == gan.engine.scalers["G"].state_dict()
    assert gan.engine.scalers["G"].get_scale() == 16
    for scale in ("8", math.nan, 0.0, -1.0, None):
        rewrite(tmp_path / "ck", lambda record, tensors, scale=scale: record["scalers"]["D"].update(scale=scale))
        with pytest.raises(du.CheckpointError):
            Half.load(tmp_path / "ck")


# ------------------------------------------------------------------------------------------ what is refused
BAD = {
    "no config": lambda record, tensors: record.pop("config"),
    "config is a list": setting("config", []),
    "a field out of range": setting("config", "lr_G", -1.0),
    "wider networks": setting("config", "ngf", 5),
    "recipe is a list": setting("recipe", ["fast"]),
    "unknown recipe": setting("recipe", "fats"),
    "no progress": lambda record, tensors: record.pop("progress"),
    **{f"step {value!r}": setting("progress", "step", value) for value in (-1, 1.5, "4", True, None, 2**80)},
    "more images than there are": setting("progress", "position", 65),
    "data is a number": setting("data", 5),
    "classes are numbers": setting("classes", [1, 2]),
    **{f"a sum of {value!r}": setting("sums", "loss_D", value) for value in ("a lot", None, math.nan, [1])},
    "a count below 0": setting("sums", "changes", -1.0),
    "sums are a list": setting("sums", []),
    "no history": setting("history", None),
    "history of text": setting("history", "epochs", "loss_D", ["low"]),
    "history of lists": setting("history", "epochs", "D_std", [[1]]),
    "history is text": setting("history", "epochs", "D_std", "a"),
    "history with gaps": setting("history", "epochs", "loss_D", [None]),
    "history too long": setting("history", "epochs", "D_std", [1, 2, 3]),
    "history too short": setting("history", "batches", "loss_D", []),
    "an epoch that is no number": setting("history", "epochs", "epoch", [math.nan]),
    "diverged is a list": setting("history", "diverged", [1]),
    "scalers are none": setting("scalers", None),
    "no random numbers": tensor("rng.cpu", lambda state: None),
    "few random numbers": tensor("rng.cpu", lambda state: state[:100]),
    "no numbers at all": tensor("rng.cpu", torch.zeros_like),
    "random floats": tensor("rng.cpu", lambda state: state.float()),
    "a memory of another shape": tensor("optimizer_G.0.exp_avg", lambda value: value[:-1]),
    "a memory laid out otherwise": tensor("optimizer_D.1.exp_avg_sq", lambda value: value.mT.flatten()),
    "half of a memory": tensor("optimizer_G.0.exp_avg", lambda value: None),
    "a memory of more": tensor("optimizer_G.0.momentum_buffer", lambda value: value),
    "a complex memory": tensor("optimizer_G.0.exp_avg", lambda value: value.to(torch.complex64)),
    "two steps": tensor("optimizer_D.0.step", lambda value: torch.ones(2)),
    "no step": tensor("optimizer_D.0.step", lambda value: torch.ones(0)),
    "steps that are no number": tensor("optimizer_D.0.step", lambda value: value * math.nan),
    "memory of a weight that is not there": tensor("optimizer_D.99.step", lambda value: value),
    "memory of a negative weight": tensor("optimizer_D.-1.step", lambda value: value),
    "memory of a name": tensor("optimizer_D.weight.step", lambda value: value),
    "a missing weight": tensor("generator.dense.weight", lambda value: None),
    "a weight too many": tensor("discriminator.tail.weight", lambda value: value),
    "a weight of another shape": tensor("discriminator.head.weight", lambda value: value[:, :-1]),
    "whole numbers as weights": tensor("average.dense.weight", lambda value: value.long()),
    "no average": lambda record, tensors: [tensors.pop(key) for key in [*tensors] if key.startswith("average")],
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_before_it_trains(damage, trained):
    du.GAN.load(trained)
    rewrite(trained, damage)
    with pytest.raises(du.CheckpointError) as caught:
        du.GAN.load(trained)
    assert "\n" not in str(caught.value)


def test_a_network_that_grew_too_far_is_refused(tmp_path):
    make(du.ProgressiveGAN).save(tmp_path / "ck")
    rewrite(tmp_path / "ck", tensor("generator.grown", lambda value: value + 9))
    with pytest.raises(du.CheckpointError):
        du.GAN.load(tmp_path / "ck")
