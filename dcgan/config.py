"""Every number of a recipe in one frozen dataclass, and how it is read from text and from files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__version__ = "0.2.0"


def bounded(default: float, low: float, high: float) -> Any:
    """Return a dataclass field for a number from `low` to `high`; an int default makes it a whole number."""
    return field(default=default, metadata={"range": (low, high)})


def choice(default: Any, *others: Any) -> Any:
    """Return a dataclass field that takes one of a few values."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Config:
    """Hold every number of a recipe; the defaults are those of the 64×64 `DCGAN`.

    Make a variant with `dataclasses.replace(config, lr_D=5e-5)`. Raises ValueError that names field, value and range.
    """

    # data and shapes
    image_size: int = bounded(64, 16, 1024)  # side in pixels; DCGAN doubles from 4×4, so it makes 16, 32, 64, …
    channels: int = bounded(1, 1, 16)  # 1 for gray images, 3 for color
    nz: int = bounded(100, 1, 4096)  # length of the latent z ~ N(0, I) (Radford et al. 2015)
    ngf: int = bounded(64, 1, 1024)  # the generator's narrowest hidden layer; deeper layers double it
    ndf: int = bounded(64, 1, 1024)  # the same for the discriminator
    conditional: bool = choice(False, True)  # True: G and D see the label, and one chooses the class
    num_classes: int = bounded(10, 2, 1000)  # classes of a conditional recipe
    conditioning: str = choice("projection", "matching", "concatenation", "auxiliary")  # how D sees the label
    matching_weight: float = bounded(0.5, 0, 100)  # of D's loss on wrong labels (Reed et al. 2016, algorithm 1)
    matching_decay: bool = choice(False, True)  # True: that weight falls with the learning rates
    # the run
    batch_size: int = bounded(128, 2, 65536)  # both public recipes
    num_epochs: int = bounded(30, 0, 100_000)  # the recipe's README: sharp from epoch 16 on
    seed: int = bounded(42, 0, 2**31 - 1)  # weights, order of the data and noise follow from it
    # optimization by Adam
    lr_G: float = bounded(0.0002, 0, 1)  # Radford et al. 2015
    lr_D: float = bounded(0.0001, 0, 1)  # half of G's, so that D does not run away
    lr_schedule: str = choice("constant", "constant_then_linear")  # the latter falls to 0 in the second half of the run
    beta1: float = bounded(0.5, 0, 0.9999)  # Adam's 0.9 oscillates here (Radford et al. 2015, §4)
    beta2: float = bounded(0.999, 0, 0.99999)  # Adam's default
    adam_eps: float = bounded(1e-8, 1e-12, 1e-2)  # PyTorch's default; TensorFlow's is 1e-7
    n_critic: int = bounded(1, 0, 100)  # D steps per iteration; 0 freezes D
    g_steps: int = bounded(1, 0, 100)  # G steps per iteration; 0 freezes G
    detach: bool = choice(True, False)  # False: D's step moves G too; only to see what goes wrong
    # the loss; the labels are those of bce and least_squares
    loss: str = choice("bce", "least_squares", "hinge", "wasserstein", "relativistic")
    real_label_smooth: float = bounded(0.85, 0, 1)  # a: D's target for real images
    fake_label_smooth: float = bounded(0.2, 0, 1)  # b: D's target for generated images
    generator_target: float = bounded(1.0, 0, 1)  # what G wants D to output for its images
    gradient_penalty: float = bounded(0.0, 0, 10_000)  # λ on the norm of D's gradient; 10 for wasserstein
    penalty_interval: int = bounded(1, 1, 1000)  # iterations between two penalties (lazy: Karras et al. 2020, §3.1)
    # the networks
    init_output_bias: bool = choice(True, False)  # G's output bias starts at the data's median; False is faithful
    batch_norm_G: bool = choice(True, False)  # False: G without BatchNorm; the 64×64 networks then hardly start
    batch_norm_D: bool = choice(True, False)  # False: D without BatchNorm
    dropout_D: float = bounded(0.0, 0, 0.95)  # share of D's hidden activations dropped: weakens D
    dropout_G: float = bounded(0.0, 0, 0.95)  # the same in G: more varied samples
    growth: float = bounded(0.75, 0, 1)  # share of the run in which `ProgressiveGAN` grows; 0: full size at once
    # remedies, off unless a recipe names them
    instance_noise: float = bounded(0.0, 0, 10)  # standard deviation of Gaussian noise on D's input in [-1, 1]
    instance_noise_batches: int = bounded(0, 0, 10**9)  # the noise fades to 0 over so many batches; 0 keeps it
    ema_decay: float = bounded(0.0, 0, 0.99999)  # of the moving average of G that samples are drawn from; 0 is off
    # the machine
    device: str = "auto"  # auto: a GPU where there is one, else cpu
    precision: str = choice("auto", "fp32", "bf16", "fp16")  # auto: what the device does well
    cuda_graphs: bool = choice(True, False)  # on a GPU, replay whole iterations; False for a loss that reads values
    # the record
    log_every: int = bounded(100, 1, 10**9)  # batches between two entries of history.batches
    save_every: int = bounded(1, 0, 10**9)  # epochs between two saved grids, the frames of the animation
    out_dir: str = "outputs"  # where pictures and checkpoints go
    tracker: str = choice("", "wandb", "tensorboard")  # where every epoch is also written

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, checked_value(f, getattr(self, f.name)))
        if not self.fake_label_smooth < self.real_label_smooth:
            raise ValueError(
                f"Config.fake_label_smooth = {self.fake_label_smooth} must be below "
                f"real_label_smooth = {self.real_label_smooth}; real is 1, fake is 0"
            )
        if self.gradient_penalty and self.batch_norm_D:
            raise ValueError(
                f"Config.gradient_penalty = {self.gradient_penalty:g} limits D's gradient at each image by itself, "
                "which BatchNorm makes depend on the whole batch; set batch_norm_D=False"
            )


def checked_value(f: dataclasses.Field, value: Any) -> Any:
    """Return a Config field's value as plain Python; raises ValueError that names field, value and allowed values."""
    if (choices := f.metadata.get("choices")) is not None:
        if not any(value == c and type(value) is type(c) for c in choices):
            raise ValueError(f"Config.{f.name} = {value!r:.60} is not one of {', '.join(map(str, choices))}")
        return value
    if (limits := f.metadata.get("range")) is None:
        if not isinstance(value, str):
            raise ValueError(f"Config.{f.name} = {value!r:.60} must be text")
        return value
    whole = isinstance(f.default, int)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"Config.{f.name} = {value!r:.60} must be a {'whole ' * whole}number")
    if not limits[0] <= value <= limits[1]:
        raise ValueError(f"Config.{f.name} = {value!r:.60} is outside its range {limits[0]} … {limits[1]}")
    return int(value) if whole else float(value)  # NumPy's numbers too; Adam refuses whole numbers as beta


MACHINE_FIELDS = ("device", "precision", "cuda_graphs", "out_dir", "tracker")  # a file does not decide these
RENAMED_FIELDS = {  # spellings of older files
    "d_steps": "n_critic", "noise_D": "instance_noise", "noise_D_batches": "instance_noise_batches",
    "start_at_background": "init_output_bias", "penalty_every": "penalty_interval",
    "matching_fades": "matching_decay", "ema": "ema_decay",
}  # fmt: skip
OLD_DEFAULTS = {"optimizer": "adam", "pack": 1, "compile": False}  # fields of older files that are gone


def configure(config: Config, /, **overrides: Any) -> Config:
    """Return `config` with some fields replaced.

    Raises ValueError for an unknown field, naming the nearest one, and for a value out of range.
    """
    known = [f.name for f in dataclasses.fields(Config)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"Config has no field {name!r}{nearest_name(name, known)}")
    return dataclasses.replace(config, **overrides)


def config_from_record(record: Mapping[str, Any]) -> Config:
    """Return the Config that a file holds, also an older one's; unknown fields are ignored with one warning.

    Raises ValueError for a value out of range.
    """
    fields = {RENAMED_FIELDS.get(name, name): value for name, value in record.items()}
    if fields.get("lr_schedule") == "linear_tail":
        fields["lr_schedule"] = "constant_then_linear"
    known = {f.name for f in dataclasses.fields(Config)}
    unknown = [n for n in fields if n not in known and (n not in OLD_DEFAULTS or fields[n] != OLD_DEFAULTS[n])]
    if unknown:
        warnings.warn(f"fields that this version does not have are ignored: {', '.join(unknown)}", stacklevel=2)
    return Config(**{name: value for name, value in fields.items() if name in known})


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Return '; did you mean …?' for the known name closest to `name`, or a list of what is known."""
    close = [k for k in known if k.lower() == name.lower()] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def parse_fields(pairs: Sequence[str]) -> dict[str, Any]:
    """Return Config fields from FIELD=VALUE texts; a value that is not JSON is taken as a word. Raises ValueError."""
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not FIELD=VALUE")
        try:
            fields[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (json.JSONDecodeError, RecursionError):
            fields[name] = value
    return fields


def profile() -> str:
    """Return this run's scale: DCGAN_PROFILE = smoke | cpu | gpu, by default what the machine has."""
    return os.environ.get("DCGAN_PROFILE") or ("gpu" if torch.cuda.is_available() else "cpu")


def by_profile(smoke: Any, cpu: Any, gpu: Any) -> Any:
    """Return the value for this run's scale, see `profile`; raises ValueError for another value of the variable."""
    values = {"smoke": smoke, "cpu": cpu, "gpu": gpu}
    if profile() not in values:
        raise ValueError(f"DCGAN_PROFILE = {profile()!r}; it is smoke, cpu or gpu")
    return values[profile()]


def kaggle_run() -> str:
    """Return "Interactive" or "Batch" (Save & Run All) on Kaggle, "" elsewhere."""
    kind = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "")
    return kind if os.environ.get("KAGGLE_DATA_PROXY_URL") else ""  # at home some set one of them, never both


def prepare_file(path: str | Path) -> Path:
    """Return the path with its folder made; raises OSError that says which folder cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write into {path.parent} ({error.strerror}); choose another with out_dir=…") from error
    return path
