"""Config: every number has a range, a wrong one is refused by name, a variant is one `replace` away."""

import dataclasses
import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import dcgan_utils as du
from dcgan_utils import Config

RANGES = {  # field: the lowest and the highest value that is allowed, and one on either side that is not
    "image_size": (16, 1024, 15, 1025),
    "channels": (1, 16, 0, 17),
    "nz": (1, 4096, 0, 4097),
    "ngf": (1, 1024, 0, 1025),
    "ndf": (1, 1024, 0, 1025),
    "num_classes": (2, 1000, 1, 1001),
    "matching_weight": (0, 100, -0.1, 101),
    "batch_size": (2, 65536, 1, 65537),
    "num_epochs": (0, 100_000, -1, 100_001),
    "seed": (0, 2**31 - 1, -1, 2**31),
    "lr_G": (0, 1, -1e-4, 1.5),
    "lr_D": (0, 1, -1e-4, 1.5),
    "beta1": (0, 0.9999, -0.1, 1.0),
    "beta2": (0, 0.99999, -0.1, 1.0),
    "adam_eps": (1e-12, 1e-2, 0.0, 0.1),
    "pack": (1, 64, 0, 65),
    "d_steps": (0, 100, -1, 101),
    "g_steps": (0, 100, -1, 101),
    "gradient_penalty": (0, 10_000, -1.0, 10_001),
    "penalty_every": (1, 1000, 0, 1001),
    "growth": (0, 1, -0.1, 1.1),
    "real_label_smooth": (0.3, 1, -0.1, 1.1),
    "fake_label_smooth": (0, 0.8, -0.1, 1.1),
    "generator_target": (0, 1, -0.1, 1.1),
    "dropout_D": (0, 0.95, -0.1, 1.0),
    "dropout_G": (0, 0.95, -0.1, 1.0),
    "noise_D": (0, 10, -0.1, 11.0),
    "noise_D_batches": (0, 10**9, -1, 10**9 + 1),
    "ema": (0, 0.99999, -0.1, 1.0),
    "log_every": (1, 10**9, 0, 10**9 + 1),
    "save_every": (0, 10**9, -1, 10**9 + 1),
}
CHOICES = {
    "optimizer": ("adam", "rmsprop", "sgd"),
    "lr_schedule": ("constant", "linear_tail"),
    "loss": ("bce", "least_squares", "hinge", "wasserstein", "relativistic"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "tracker": ("", "wandb", "tensorboard"),
    "conditional": (True, False),
    "conditioning": ("projection", "matching", "concatenation", "auxiliary"),
    "start_at_background": (True, False),
    "matching_fades": (True, False),
    "compile": (True, False),
    "cuda_graphs": (True, False),
    "detach": (True, False),
    "batch_norm_G": (True, False),
    "batch_norm_D": (True, False),
}
WHOLE = [f.name for f in dataclasses.fields(Config) if f.type in (int, "int")]


def refused(**fields) -> str:
    """Return the one-line message with which Config refuses these fields."""
    with pytest.raises(ValueError, match="Config") as caught:
        Config(**fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_number_of_config_is_in_the_table_above():
    numbers = {f.name for f in dataclasses.fields(Config) if f.type in (int, float, "int", "float")}
    assert numbers == set(RANGES)


def test_every_other_field_is_a_choice_or_text():
    others = {f.name for f in dataclasses.fields(Config)} - set(RANGES)
    assert others == {*CHOICES, "device", "out_dir"}


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.FastDCGAN])
def test_no_recipe_is_broken_on_purpose(kind):
    """What is there only to see what goes wrong is off; D goes without BatchNorm only where a penalty holds it."""
    config = kind.resolve()
    assert (config.detach, config.batch_norm_G) == (True, True)
    assert config.batch_norm_D == (config.gradient_penalty == 0) == (kind is not du.FastDCGAN)
    assert config.d_steps == config.g_steps == 1


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_allowed(name):
    low, high, _, _ = RANGES[name]
    beside = {"batch_norm_D": False} if name == "gradient_penalty" else {}  # see test_losses.py
    assert getattr(Config(**{name: low}, **beside), name) == low
    assert getattr(Config(**{name: high}, **beside), name) == high


@pytest.mark.parametrize("name", RANGES)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(name):
    for value in RANGES[name][2:]:
        message = refused(**{name: value})
        assert f"Config.{name} " in message
        assert repr(value) in message
        stated = re.search(r"range (\S+) … (\S+)", message)
        assert stated, message
        assert not float(stated[1]) <= value <= float(stated[2])


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", ["64", None, [1], True, math.nan, math.inf], ids=repr)
def test_a_number_field_refuses_what_is_no_number(name, value):
    message = refused(**{name: value})
    assert f"Config.{name} " in message
    assert repr(value) in message


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_field_refuses_a_fraction(name):
    value = RANGES[name][0] + 2.5
    message = refused(**{name: value})
    assert f"Config.{name} " in message
    assert repr(value) in message
    assert "whole number" in message


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_refused_with_field_value_and_what_is_allowed(name):
    for value in CHOICES[name]:
        assert getattr(Config(**{name: value}), name) == value
    message = refused(**{name: "nonsense"})
    assert f"Config.{name} " in message
    assert "'nonsense'" in message
    assert all(str(value) in message for value in CHOICES[name])


@pytest.mark.parametrize("name", ["device", "out_dir"])
@pytest.mark.parametrize("value", [7, None, True], ids=repr)
def test_a_text_field_refuses_what_is_no_text(name, value):
    message = refused(**{name: value})
    assert f"Config.{name} " in message
    assert repr(value) in message


@pytest.mark.parametrize(("real", "fake"), [(0.5, 0.5), (0.2, 0.85)])
def test_the_fake_label_must_lie_below_the_real_one(real, fake):
    message = refused(real_label_smooth=real, fake_label_smooth=fake)
    for part in ("fake_label_smooth", "real_label_smooth", str(real), str(fake)):
        assert part in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lr_g", "lr_G"), ("batchsize", "batch_size"), ("epochs", "num_epochs"), ("label_smooth", "real_label_smooth")],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(wrong, right):
    for make in (lambda **fields: du.configure(Config(), **fields), du.DCGAN, du.StableDCGAN, du.FastDCGAN):
        with pytest.raises(ValueError, match=f"'{wrong}'.*did you mean '{right}'"):
            make(**{wrong: 1})


def test_a_field_like_no_other_is_refused_with_all_names():
    with pytest.raises(ValueError, match="zzzz") as caught:
        du.configure(Config(), zzzz=1)
    assert all(f.name in str(caught.value) for f in dataclasses.fields(Config))


def test_config_is_frozen():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr_D = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.lr_D


def test_replace_makes_a_variant_and_leaves_the_first_alone():
    config = Config()
    variant = dataclasses.replace(config, lr_D=5e-5)
    assert (variant.lr_D, config.lr_D) == (5e-5, 1e-4)
    assert dataclasses.replace(variant, lr_D=1e-4) == config
    with pytest.raises(ValueError, match=r"Config\.lr_D = -1 "):
        dataclasses.replace(config, lr_D=-1)


def test_configure_checks_the_values_too():
    assert du.configure(Config(), nz=7, seed=3) == dataclasses.replace(Config(), nz=7, seed=3)
    with pytest.raises(ValueError, match=r"Config\.nz = 0 "):
        du.configure(Config(), nz=0)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (
            du.DCGAN,
            {
                "batch_size": 128, "image_size": 64, "nz": 100, "ngf": 64, "ndf": 64, "num_epochs": 30,
                "lr_G": 0.0002, "lr_D": 0.0001, "optimizer": "adam", "beta1": 0.5, "real_label_smooth": 0.85,
                "fake_label_smooth": 0.2, "conditional": False, "ema": 0.0, "d_steps": 1, "g_steps": 1,
                "dropout_D": 0.0, "dropout_G": 0.0,
            },
        ),
        (
            du.StableDCGAN,
            {
                "batch_size": 128, "image_size": 28, "nz": 100, "ngf": 64, "ndf": 64, "num_epochs": 40,
                "optimizer": "adam", "adam_eps": 1e-7, "real_label_smooth": 0.9, "fake_label_smooth": 0.0,
                "dropout_D": 0.3, "dropout_G": 0.0, "conditional": False, "ema": 0.0, "save_every": 5,
                "start_at_background": False,
            },
        ),
        (
            du.FastDCGAN,
            {
                "batch_size": 64, "image_size": 28, "nz": 64, "ngf": 32, "ndf": 32, "optimizer": "adam",
                "lr_G": 3e-3, "lr_D": 3e-3, "beta1": 0.0, "beta2": 0.99, "lr_schedule": "linear_tail",
                "num_epochs": 6, "ema": 0.99, "conditional": True, "conditioning": "matching", "matching_weight": 0.25,
                "matching_fades": True,
                "loss": "relativistic", "gradient_penalty": 0.2, "penalty_every": 8, "batch_norm_D": False,
                "batch_norm_G": True, "channels": 1, "pack": 1, "start_at_background": True, "dropout_D": 0.0,
                "dropout_G": 0.0,
            },
        ),
        (
            du.WGANGP,
            {
                "image_size": 28, "loss": "wasserstein", "gradient_penalty": 10.0, "d_steps": 5, "beta1": 0.0,
                "beta2": 0.9, "batch_norm_D": False, "batch_norm_G": True, "conditional": False,
            },
        ),
    ],
)  # fmt: skip
def test_the_recipes_numbers(kind, numbers):
    config = kind.resolve()
    assert {name: getattr(config, name) for name in numbers} == numbers


@pytest.mark.parametrize("kind", [du.DCGAN, du.StableDCGAN, du.ConditionalDCGAN, du.ProgressiveGAN, du.WGANGP])
def test_the_other_recipes_judge_grey_images_one_by_one(kind):
    config = kind.resolve()
    assert (config.channels, config.pack, config.penalty_every) == (1, 1, 1)
    assert config.conditioning == "projection"
    assert config.loss == ("wasserstein" if kind is du.WGANGP else "bce")


@pytest.mark.parametrize(("pack", "batch_size"), [(2, 127), (3, 128), (64, 96), (64, 32)])
def test_packs_must_fill_the_batch(pack, batch_size):
    message = refused(pack=pack, batch_size=batch_size)
    for part in (f"Config.pack = {pack} ", f"not {batch_size}", "divides"):
        assert part in message
    assert Config(pack=pack, batch_size=pack * 2).pack == pack


def test_a_pack_has_no_one_label():
    message = refused(pack=2, conditional=True)
    assert "Config.pack = 2 " in message
    assert "conditional=False" in message
    with pytest.raises(ValueError, match=r"Config\.pack = 2 .*conditional=False"):
        du.FastDCGAN(pack=2)
    assert du.FastDCGAN.resolve(pack=2, conditional=False).pack == 2


def test_the_label_free_fast_recipe_is_the_same_but_for_the_labels():
    free = du.FastDCGAN.resolve(conditional=False)
    assert (free.conditional, free.lr_G, free.lr_D, free.beta2, free.ema) == (False, 3e-3, 3e-3, 0.99, 0.99)
    assert (free.loss, free.gradient_penalty, free.penalty_every, free.batch_norm_D) == ("relativistic", 0.2, 8, False)
    assert dataclasses.replace(free, conditional=True) == du.FastDCGAN.resolve() == du.FastDCGAN.defaults
    told = du.FastDCGAN.resolve(conditional=False, lr_G=2e-3)
    assert (told.lr_G, told.lr_D) == (2e-3, 3e-3)


def test_a_recipe_takes_a_config_and_overrides():
    small = dataclasses.replace(du.FastDCGAN.defaults, nz=5)
    config = du.FastDCGAN.resolve(small, seed=9)
    assert (config.nz, config.seed, config.lr_G) == (5, 9, small.lr_G)
    assert du.FastDCGAN.resolve(small, conditional=False).lr_G == small.lr_G  # a given Config is not second-guessed


def test_a_path_as_out_dir_does_not_break_saving_later():
    """Checkpoints hold the Config as JSON, so a Path is refused at once or kept as text."""
    config = None
    with suppress(ValueError):
        config = Config(out_dir=Path("runs"))
    assert config is None or json.loads(json.dumps(dataclasses.asdict(config)))["out_dir"] == "runs"


@pytest.mark.parametrize("name", ["gpu", "tpu7", ""])
def test_a_device_that_torch_does_not_know_is_a_value_error(name):
    with pytest.raises(ValueError, match="device"):
        du.FastDCGAN(device=name, ngf=2, ndf=2)


def test_scaled_follows_the_profile(monkeypatch):
    for profile, value in (("smoke", 1), ("cpu", 2), ("gpu", 3)):
        monkeypatch.setenv("DCGAN_PROFILE", profile)
        assert du.scaled(smoke=1, cpu=2, gpu=3) == value
    monkeypatch.setenv("DCGAN_PROFILE", "fast")
    with pytest.raises(ValueError, match=r"'fast'.*smoke, cpu or gpu"):
        du.scaled(smoke=1, cpu=2, gpu=3)
    monkeypatch.delenv("DCGAN_PROFILE")
    for there, value in ((True, 3), (False, 2)):
        monkeypatch.setattr(du.torch.cuda, "is_available", lambda there=there: there)
        assert du.scaled(smoke=1, cpu=2, gpu=3) == value


def test_whole_numbers_will_do_for_rates():
    """Adam refuses a whole number beside another one, and a tensor of one would cut off what lies behind the point."""
    config = du.Config(beta1=0, lr_D=0, gradient_penalty=0)
    assert [type(value) for value in (config.beta1, config.lr_D, config.gradient_penalty)] == [float] * 3
    gan = du.FastDCGAN(ngf=4, ndf=4, beta1=0, lr_D=0)
    assert gan.optimizer_D.param_groups[0]["betas"] == (0, 0.99)


def test_numbers_of_numpy_will_do():
    config = du.Config(num_epochs=np.int64(3), lr_D=np.float32(0.5))
    assert (config.num_epochs, config.lr_D) == (3, 0.5)
    assert (type(config.num_epochs), type(config.lr_D)) == (int, float)
    assert "must be a number" in refused(lr_D="1e-4")
    assert "must be a whole number" in refused(batch_size=1.5)
