"""What stands in a checkpoint's files is looked at before it is used: each function raises what UNUSABLE lists."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from .history import METRICS, History
from .networks import Growing
from .randomness import make_generator
from .training import Trainer

UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError)
EVERY_RECORD = {  # lines that histories of every version have, without gaps
    "epochs": ("epoch", "seconds", "images_per_second", *METRICS[:5]),
    "batches": ("step", "epoch", *METRICS[:5]),
}


# ------------------------------------------------------------------------------------------ of state.json
def whole(value: Any) -> int:
    """Return a whole number from 0 on."""
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{value!r:.40} stands where a whole number from 0 on belongs")
    return value


def number(value: Any, low: float = -math.inf) -> float:
    """Return a number, which may be NaN unless `low` is given."""
    if type(value) not in (int, float) or (low > -math.inf and not low <= value < math.inf):
        raise ValueError(f"{value!r:.40} stands where a number belongs")
    return float(value)


def checked_sums(gan: Trainer, found: dict[str, Any]) -> dict[str, float]:
    """Return the sums of the current epoch; older records lack some of them and have others, which are dropped."""
    for name, value in found.items():
        number(value, low=0 if name in ("count", "changes", "D_G_z_change²", "images", "seconds") else -1e300)
    sums = {name: float(found.get(name, 0)) for name in gan.sums}
    if "last_D_G_z" not in found and sums["count"]:
        sums["last_D_G_z"] = sums["D_G_z"] / sums["count"]
    return sums


def checked_history(gan: Trainer, record: dict[str, Any]) -> History:
    """Return the history of a record, with the Config and the loss of the GAN."""
    for part, required in EVERY_RECORD.items():
        epochs = record[part]["epoch"]
        for name, values in record[part].items():
            if not isinstance(values, list) or len(values) > len(epochs):
                raise ValueError(f"the history of {name} has another length than that of the epochs")
            for value in values:
                number(0 if value is None else value)
        for name in required:
            if len(record[part][name]) != len(epochs) or None in record[part][name]:
                raise ValueError(f"the history of {name} has gaps")
        for epoch in epochs:
            number(epoch, low=0)
    if not isinstance(record.get("diverged", ""), str):
        raise ValueError("the history does not say where training diverged")
    history = History.from_json({**record, "config": dataclasses.asdict(gan.config)})
    history.config, history.loss = gan.config, gan.loss
    return history


def restore_scalers(gan: Trainer, found: dict[str, Any]) -> None:
    """Set fp16's loss scales, where this GAN and the saved one have them."""
    for player, scaler in getattr(gan.engine, "scalers", {}).items():
        if found.get(player) and scaler.is_enabled():
            scale, growth = number(found[player]["scale"], low=1e-30), whole(found[player]["_growth_tracker"])
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": growth})


# ------------------------------------------------------------------------------------------ of weights.safetensors
def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `name` and a dot, by the rest of their names."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def fitted_weights(network: nn.Module, found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return a network's tensors by its own names; those of an older version are matched by their order."""
    own = network.state_dict()
    if found.keys() != own.keys():
        old, new = sorted(found, key=layer_order), sorted(own, key=layer_order)
        if [key.rpartition(".")[2] for key in old] != [key.rpartition(".")[2] for key in new]:
            raise ValueError(f"the {name} has other layers")
        found = {key: found[other] for key, other in zip(new, old, strict=True)}
    for key, value in own.items():
        check_fits(f"{name}.{key}", found[key], value)
    if isinstance(network, Growing) and not 0 <= float(found["grown"]) <= network.doublings:
        raise ValueError(f"the {name} has grown to {float(found['grown'])} of {network.doublings} doublings")
    return found


def layer_order(key: str) -> str:
    """Return what sorts tensors by layer; a head comes after the numbered layers, which it once was one of."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(9), re.sub(r"^head\.", f"layers.{'9' * 9}.", key))


def check_fits(name: str, value: Tensor, like: Tensor) -> None:
    """Raise ValueError unless a tensor has the shape and the kind of numbers of another."""
    if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, needed is {like.dtype} {tuple(like.shape)}")


def adam_memory(optimizer: torch.optim.Optimizer, found: dict[str, Tensor], name: str) -> dict[Tensor, dict]:
    """Return what Adam remembers of each weight, in the memory layout of the weight, which fused Adam needs."""
    weights = [(weight, group) for group in optimizer.param_groups for weight in group["params"]]
    memory: dict[Tensor, dict[str, Tensor]] = {}
    for index in sorted({key.partition(".")[0] for key in found}):
        weight, group = weights[whole(int(index))]
        part = part_of(found, index)
        if part.keys() != {"step", "exp_avg", "exp_avg_sq"} or part["step"].numel() != 1:
            raise ValueError(f"{name} does not remember of weight {index} what Adam does")
        steps = number(float(part["step"]), low=0)
        device = weight.device if group.get("fused") or group.get("capturable") else "cpu"
        memory[weight] = {"step": torch.tensor(steps, dtype=torch.float32, device=device)}
        for key in ("exp_avg", "exp_avg_sq"):
            check_fits(f"{name}.{index}.{key}", part[key], weight)
            memory[weight][key] = torch.empty_like(weight, requires_grad=False).copy_(part[key])
    return memory


def restored_rng(gan: Trainer, tensors: dict[str, Tensor], step: int) -> torch.Generator:
    """Return the generator of all that training draws; a new one on another kind of device, and in other processes."""
    states = part_of(tensors, "rng")
    if not states:
        raise ValueError("it holds no random numbers")
    if gan.rank or gan.device.type not in states:
        return make_generator(step + 1_000_003 * gan.rank, gan.device)
    rng = torch.Generator(gan.device)
    rng.set_state(states[gan.device.type])
    return rng
