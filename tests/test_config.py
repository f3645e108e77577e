"""Config: every field refuses what it cannot be, by name; a variant is one call away; files and text are read."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny import RECIPES

import dcgan_utils as du
from dcgan.config import config_from_record
from dcgan_utils import Config

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
NUMBERS = [name for name, f in FIELDS.items() if "range" in f.metadata]
CHOICES = [name for name, f in FIELDS.items() if "choices" in f.metadata]
TEXTS = ["device", "out_dir"]
NO_NUMBERS = ("64", None, [1], True, math.nan, math.inf, -math.inf)


def refused(**fields) -> str:
    """Return the one-line message with which Config refuses these fields."""
    with pytest.raises(ValueError, match="Config") as caught:
        Config(**fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_a_range_choices_or_is_text():
    assert sorted(FIELDS) == sorted([*NUMBERS, *CHOICES, *TEXTS])


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_held_to_its_range(name):
    (low, high), default = FIELDS[name].metadata["range"], FIELDS[name].default
    assert low <= default <= high
    beside = {"batch_norm_D": False, "real_label_smooth": 1.0, "fake_label_smooth": 0.0}  # what fits most values
    for value in {low, high} - {"real_label_smooth": {0}, "fake_label_smooth": {1}}.get(name, set()):
        assert getattr(Config(**{**beside, name: value}), name) == value
    whole = isinstance(default, int)
    for value in (low - 1, high + 1) if whole else (low - 1e-6, high * (1 + 1e-6)):
        message = refused(**{name: value})
        assert all(part in message for part in (f"Config.{name} ", repr(value), str(low), str(high)))
    for value in (*NO_NUMBERS, low + 0.5) if whole else NO_NUMBERS:
        assert f"Config.{name} = {value!r} " in refused(**{name: value})


@pytest.mark.parametrize("name", [*CHOICES, *TEXTS])
def test_a_choice_or_text_is_refused_with_what_is_allowed(name):
    choices = FIELDS[name].metadata.get("choices", ())
    for value in (FIELDS[name].default, *choices):
        assert getattr(Config(**{name: value}), name) == value
    for wrong in (7, None, 1, "nonsense") if choices else (7, None, True, Path("runs")):
        message = refused(**{name: wrong})
        assert f"Config.{name} = {wrong!r} " in message
        assert all(str(value) in message for value in choices)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"real_label_smooth": 0.5, "fake_label_smooth": 0.5}, ("fake_label_smooth = 0.5", "real_label_smooth = 0.5")),
        ({"gradient_penalty": 10.0}, ("gradient_penalty = 10 ", "BatchNorm", "batch_norm_D=False")),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, named):
    assert all(part in refused(**fields) for part in named)


def test_whole_numbers_and_numpys_numbers_become_plain_ones():
    """Adam refuses a whole number beside a float, and JSON refuses NumPy's."""
    config = Config(beta1=0, lr_D=np.float32(0.5), num_epochs=np.int64(3))
    assert [type(value) for value in (config.beta1, config.lr_D, config.num_epochs)] == [float, float, int]
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == Config(beta1=0.0, lr_D=0.5, num_epochs=3)


def test_a_variant_leaves_the_frozen_config_alone():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr_D = 1.0
    variant = du.configure(config, lr_D=5e-5, nz=7)
    assert (variant.lr_D, variant.nz, config.lr_D) == (5e-5, 7, 1e-4)
    with pytest.raises(ValueError, match=r"Config\.nz = 0 "):
        du.configure(config, nz=0)


@pytest.mark.parametrize(("wrong", "right"), [("lr_g", "lr_G"), ("batchsize", "batch_size"), ("epochs", "num_epochs")])
def test_an_unknown_field_is_refused_with_the_nearest_name(wrong, right):
    for make in (lambda **fields: du.configure(Config(), **fields), du.FastDCGAN):
        with pytest.raises(ValueError, match=f"'{wrong}'.*did you mean '{right}'"):
            make(**{wrong: 1})
    with pytest.raises(ValueError, match="zzzz") as caught:
        du.configure(Config(), zzzz=1)
    assert all(name in str(caught.value) for name in FIELDS)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_takes_a_config_and_overrides(kind):
    small = dataclasses.replace(kind.defaults, ngf=5)
    assert kind.resolve(small, seed=9) == dataclasses.replace(kind.defaults, ngf=5, seed=9)
    assert kind.resolve() == kind.defaults


# ----------------------------------------------------------------------------------------------- files and text
def test_an_older_record_is_read_in_todays_words():
    old = {"d_steps": 5, "noise_D": 0.1, "noise_D_batches": 300, "start_at_background": False, "penalty_every": 8,
           "matching_fades": True, "ema": 0.99, "lr_schedule": "linear_tail", "nz": 7}  # fmt: skip
    today = {"n_critic": 5, "instance_noise": 0.1, "instance_noise_batches": 300, "init_output_bias": False,
             "penalty_interval": 8, "matching_decay": True, "ema_decay": 0.99, "nz": 7}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_from_record({**old, "optimizer": "adam", "pack": 1, "compile": False})  # gone, and no loss
        assert config == Config(**today, lr_schedule="constant_then_linear")
        assert config_from_record(dataclasses.asdict(config)) == config


def test_unknown_fields_of_a_record_are_ignored_with_one_warning_that_names_them():
    with pytest.warns(UserWarning, match="warp, optimizer$") as caught:
        assert config_from_record({"warp": 9, "optimizer": "sgd", "nz": 7, "pack": 1}) == Config(nz=7)
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"Config\.n_critic = -1 "):
        config_from_record({"d_steps": -1})


def test_fields_are_parsed_from_text():
    fields = du.parse_fields(["lr_D=1e-4", "nz=7", "detach=False", "loss=hinge", "out_dir=a=b", 'tracker=""'])
    assert fields == {"lr_D": 1e-4, "nz": 7, "detach": False, "loss": "hinge", "out_dir": "a=b", "tracker": ""}
    with pytest.raises(ValueError, match=r"'nz' is not FIELD=VALUE"):
        du.parse_fields(["nz"])


@pytest.mark.parametrize("text", ["lr_D=" + "[" * 9999, "nz=NaN", "lr_D=1e999", "nz={}", "config=5", "self=5"])
def test_text_that_is_no_value_of_a_field_is_a_value_error(text):
    with pytest.raises(ValueError, match="Config"):
        du.configure(Config(), **du.parse_fields([text]))


@pytest.mark.parametrize(("gpu", "default"), [(True, 3), (False, 2)])
def test_by_profile_follows_the_variable_and_else_the_machine(gpu, default, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    for name, value in (("", default), ("smoke", 1), ("cpu", 2), ("gpu", 3)):
        monkeypatch.setenv("DCGAN_PROFILE", name)
        assert du.by_profile(smoke=1, cpu=2, gpu=3) == value
    monkeypatch.setenv("DCGAN_PROFILE", "fast")
    with pytest.raises(ValueError, match=r"'fast'.*smoke, cpu or gpu"):
        du.by_profile(smoke=1, cpu=2, gpu=3)
