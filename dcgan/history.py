"""The record of a training run, and the callbacks that follow it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .config import Config, config_from_record
from .losses import Loss, make_loss

if TYPE_CHECKING:
    from .training import Trainer

METRICS = ("loss_D", "loss_G", "D_x", "D_G_z", "D_acc", "D_std", "grad_D", "grad_G", "grad_G_after_D_step", "D_gap")
EPOCH_READINGS = ("D_G_z_std", "update_ratio_D", "update_ratio_G", "update_ratio_BN_D", "update_ratio_BN_G",
                  "pixel_std_ratio", "nn_distance_ratio", "gradient_norm")  # fmt: skip
RENAMED_KEYS = {  # spellings of older histories
    "leak": "grad_G_after_D_step", "gap": "D_gap", "swing": "D_G_z_std", "move_D": "update_ratio_D",
    "move_G": "update_ratio_G", "move_BN_D": "update_ratio_BN_D", "move_BN_G": "update_ratio_BN_G",
    "diversity": "pixel_std_ratio", "spacing": "nn_distance_ratio", "slope": "gradient_norm", "fid": "frechet",
}  # fmt: skip


class History(dict):
    """Map each name to a list with one value per epoch; `.batches` does so per `log_every` batches.

    An epoch that was cut short stands last with a fractional `epoch` and is replaced when training goes on.
    """

    def __init__(
        self, config: Config, epochs: dict | None = None, batches: dict | None = None, loss: Loss | None = None
    ) -> None:
        super().__init__({name: [] for name in (*METRICS, *EPOCH_READINGS, "epoch", "seconds", "images_per_second")})
        self.update({RENAMED_KEYS.get(name, name): list(values) for name, values in (epochs or {}).items()})
        self.batches: dict[str, list[float]] = {name: [] for name in ("step", "epoch", *METRICS)}
        self.batches.update({RENAMED_KEYS.get(name, name): list(values) for name, values in (batches or {}).items()})
        self.diverged = ""  # where a loss, or G itself, stopped being a number
        for lines in (self, self.batches):  # an older record lacks some readings
            for values in lines.values():
                values[:0] = [None] * (len(lines["epoch"]) - len(values))
        self.config, self.loss = config, loss or make_loss(config)

    def to_json(self) -> dict[str, Any]:
        """Return config, epochs and batches as JSON-ready dictionaries."""
        epochs = {"epochs": dict(self), "batches": self.batches, "diverged": self.diverged}
        return {"config": dataclasses.asdict(self.config), **epochs}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Return the history that `to_json`, or an older version of it, wrote."""
        history = cls(config_from_record(record["config"]), record["epochs"], record["batches"])
        history.diverged = record.get("diverged", "")
        return history

    def record(self, name: str, value: float) -> None:
        """Write a value for the newest epoch under a name of one's own; epochs without one hold None.

        Raises ValueError before the first epoch has ended.
        """
        if not self["epoch"]:
            raise ValueError(f"{name}: no epoch has ended yet; record it in on_epoch_end")
        values = self.setdefault(name, [])
        values += [None] * (len(self["epoch"]) - len(values))
        values[-1] = float(value)

    def line(self, index: int = -1) -> dict[str, float]:
        """Return the values of one epoch, by default the newest; empty before the first one."""
        present = {name: values for name, values in self.items() if -len(values) <= index < len(values)}
        return {name: values[index] for name, values in present.items() if values[index] is not None}

    def last(self) -> dict[str, float]:
        """Return the newest epoch's values, empty before the first one."""
        return self.line(-1)

    def until(self, epochs: int) -> Self:
        """Return this history as it was when it had so many lines."""
        lines = {name: values[:epochs] for name, values in self.items()}
        known = sum(epoch <= lines["epoch"][-1] for epoch in self.batches["epoch"]) if lines["epoch"] else 0
        batches = {name: values[:known] for name, values in self.batches.items()}
        return type(self)(self.config, lines, batches, self.loss)

    def finite(self) -> bool:
        """Return whether training has not diverged and the newest measurements are numbers."""
        newest = [self.batches[name][-1] for name in METRICS if self.batches[name]]
        return not self.diverged and all(value is None or math.isfinite(value) for value in newest)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.last().items() if name in METRICS)
        return f"History({len(self['epoch'])} epochs{'; last: ' + shown if shown else ''})"


class DivergenceError(RuntimeError):
    """Say that a loss became NaN or infinite; the history up to then is kept."""


class Callback:
    """Do something while a GAN trains; every method may be left out and receives the GAN.

    Look at `gan.epoch` (finished ones), `gan.batch`, `gan.step`, `gan.history`; call `gan.stop(reason)` to end the run.
    """

    def on_train_begin(self, gan: Trainer) -> None:
        """Run before the first batch."""

    def on_batch_end(self, gan: Trainer) -> None:
        """Run after every iteration."""

    def on_epoch_end(self, gan: Trainer) -> None:
        """Run after every epoch, a last one cut short included."""

    def on_train_end(self, gan: Trainer) -> None:
        """Run at the end, however training ended."""


def positions(generator: nn.Module, discriminator: nn.Module) -> dict[str, Tensor]:
    """Return where each network stands: its weights, and the running means of its BatchNorm layers, as vectors."""
    where = {}
    for key, network in (("D", discriminator), ("G", generator)):
        where[f"update_ratio_{key}"] = torch.cat([p.detach().flatten() for p in network.parameters()])
        means = [value for name, value in network.named_buffers() if name.endswith("running_mean")]
        where |= {f"update_ratio_BN_{key}": torch.cat(means)} if means else {}
    return where


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return how far a vector has moved, as a share of the longer of the two."""
    return float((after - before).norm() / torch.maximum(before.norm(), after.norm()).clamp(min=1e-12))
