"""What a checkpoint holds, and how it comes back: nothing is taken from a file that was not looked at first.

weights.safetensors holds tensors, state.json the rest; loading never runs code from them. See storage.py for the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .config import __version__, prepare_file
from .history import Callback
from .restoring import (
    UNUSABLE,
    adam_memory,
    checked_history,
    checked_sums,
    fitted_weights,
    part_of,
    restore_scalers,
    restored_rng,
    whole,
)
from .storage import (
    BAD_JSON,
    NEW_STATE,
    NEW_WEIGHTS,
    RUN_LOCK,
    SAVE_LOCK,
    STATE_FILE,
    WEIGHTS_FILE,
    only_writer,
    read_files,
    read_part,
    remove_files,
    replace_files,
    tidy,
)
from .training import Trainer

CHECKPOINT_FORMAT = 2  # 1 had no SHA-256, and other names in the networks
HARMLESS_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", SAVE_LOCK, RUN_LOCK}  # the first three are file managers'
NETWORKS, OPTIMIZERS = ("generator", "discriminator", "average"), ("optimizer_G", "optimizer_D")


class CheckpointError(ValueError):
    """Say why a checkpoint cannot be loaded, or its place not be taken, and what to do."""


# ------------------------------------------------------------------------------------------ save and read
def save_checkpoint(gan: Trainer, path: str | Path) -> Path:
    """Write all that training needs to go on into the folder `path`, and return it; a symbolic link is followed.

    Whatever ends the process meanwhile, a load finds the older checkpoint or the new one. Raises OSError that says what
    to do, and CheckpointError where `path` holds other things.
    """
    path = Path(path)
    check_replaceable(path)
    record, tensors = checkpoint_of(gan)
    weights = safetensors.torch.save(tensors)
    record["sha256"] = hashlib.sha256(weights).hexdigest()
    try:
        replace_files(Path(os.path.realpath(path)), json.dumps(record).encode(), weights)
    except OSError as error:
        raise OSError(f"cannot save {path} ({error}); free some space or choose another folder") from error
    gan.last_checkpoint = path
    return path


def check_replaceable(path: str | Path) -> None:
    """Raise CheckpointError where something exists that is neither an empty folder nor a checkpoint."""
    place = Path(os.path.realpath(path))
    if not os.path.lexists(place):
        return
    names = set(os.listdir(place)) - HARMLESS_FILES if place.is_dir() else {""}
    ours, cut_short = names & {STATE_FILE, WEIGHTS_FILE}, names & {NEW_STATE, NEW_WEIGHTS}
    files = all((place / name).is_file() for name in names) and (STATE_FILE not in names or is_state(place))
    if names != ours | cut_short or not files or (len(ours) == 1 and not cut_short):
        raise CheckpointError(f"{path} holds other things, which saving would replace; choose a folder of its own")


def is_state(folder: Path) -> bool:
    """Return whether state.json is a checkpoint's, or was one's before it was damaged."""
    with suppress(*BAD_JSON):
        return "recipe" in json.loads(read_part(folder, STATE_FILE))
    return True


def checkpoint_of(gan: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON record and the tensors that make up a checkpoint."""
    tensors = {f"rng.{gan.device.type}": gan.rng.get_state()}
    for name in NETWORKS:
        if (network := getattr(gan, name)) is not None:
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    for name in OPTIMIZERS:
        for index, values in getattr(gan, name).state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    record = {
        "format": CHECKPOINT_FORMAT,
        "version": __version__,
        "torch": torch.__version__,
        "recipe": gan.recipe,
        "data": gan.data_name,
        "classes": list(gan.classes) if gan.classes else None,
        "config": dataclasses.asdict(gan.config),
        "progress": {"epoch": gan.epoch, "step": gan.step, "position": gan.position, "length": gan.data_size},
        "sums": gan.sums,
        "history": gan.history.to_json(),
        "scalers": {player: scaler.state_dict() for player, scaler in getattr(gan.engine, "scalers", {}).items()},
    }
    plain = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return record, {name: value.detach().to(**plain) for name, value in tensors.items()}


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors of a checkpoint folder; raises FileNotFoundError or CheckpointError."""
    try:
        state, weights = read_files(Path(path))
        record = json.loads(state)
        if whole(record["format"]) > CHECKPOINT_FORMAT:
            message = f"{path} was written by version {record['version']}, this is {__version__}; update this one"
        elif weights is None or (record["format"] > 1 and "sha256" not in record):
            message = f"{path} is damaged: {WEIGHTS_FILE} is not as it was saved; load an older checkpoint"
        else:
            return record, safetensors.torch.load(weights)
    except (*BAD_JSON, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200}); load an older checkpoint") from error
    raise CheckpointError(message)


# ------------------------------------------------------------------------------------------ restore
def restore(gan: Trainer, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put what a checkpoint holds into a GAN of the same Config; raises CheckpointError when they do not fit."""
    try:
        history, sums = checked_history(gan, record["history"]), checked_sums(gan, record["sums"])
        epoch, step, position, length = (whole(record["progress"][n]) for n in ("epoch", "step", "position", "length"))
        data, classes = record.get("data"), record.get("classes")
        if position > length or not all(isinstance(name, str) for name in (data or "", *(classes or ()))):
            raise ValueError("position, data or classes are none")
        rng = restored_rng(gan, tensors, step)
        parts = {name: part_of(tensors, name) for name in (*NETWORKS, *OPTIMIZERS)}
        if record["config"].get("optimizer", "adam") != "adam":  # of an older version; Adam begins anew
            parts |= {name: {} for name in OPTIMIZERS}
        memories = {name: adam_memory(getattr(gan, name), parts[name], name) for name in OPTIMIZERS}
        networks = {name: getattr(gan, name) for name in NETWORKS if getattr(gan, name) is not None}
        weights = {name: fitted_weights(network, parts[name], name) for name, network in networks.items()}
        restore_scalers(gan, record["scalers"])
        for name, network in networks.items():
            network.load_state_dict(weights[name])
        for name, memory in memories.items():
            getattr(gan, name).state.clear()
            getattr(gan, name).state.update(memory)  # the groups stay as this machine and this Config need them
        gan.epoch, gan.step, gan.position, gan.data_size = epoch, step, position, length
        gan.history, gan.sums, gan.rng = history, sums, rng
        gan.data_name, gan.classes = data, tuple(classes) if classes else None
    except UNUSABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"the checkpoint is damaged or does not fit its config: {reason}") from error


# ------------------------------------------------------------------------------------------ folders of checkpoints
def newest_checkpoint(folder: str | Path) -> Path:
    """Return `folder` where it is a checkpoint itself, else the furthest epoch-… in it; raises FileNotFoundError."""
    folder = Path(folder)
    found = [folder] if (folder / STATE_FILE).is_file() else checkpoints_by_progress(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}: looked for {STATE_FILE} and epoch-*/{STATE_FILE}")
    return found[-1]


def checkpoints_by_progress(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, and itself if it is one, by the iterations they have seen; damaged first."""
    folder = Path(folder)
    found = [place for place in (folder, *sorted(folder.glob("epoch-*"))) if (place / STATE_FILE).is_file()]
    return sorted(found, key=saved_step)


def saved_step(folder: Path) -> int:
    """Return the iterations that a checkpoint has seen, -1 where it does not say."""
    with suppress(OSError, *BAD_JSON):
        return whole(json.loads(read_part(folder, STATE_FILE))["progress"]["step"])
    return -1


class SaveCheckpoints(Callback):
    """Save into folder/epoch-NNNN after every epoch and at the end; the two furthest are kept, and the last saved.

    A save that fails is a warning, since the older checkpoint is whole; after the last one `train` raises OSError.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.failure, self.held = Path(folder), None, ExitStack()

    def on_train_begin(self, gan: Trainer) -> None:
        """Take the folder; raises OSError where it cannot be written or another run saves into it."""
        self.failure = None
        self.held.enter_context(only_writer(prepare_file(self.folder / RUN_LOCK), patience=1))
        for place in (self.folder, *self.numbered()):
            with suppress(OSError):
                with only_writer(place / SAVE_LOCK, patience=0):
                    tidy(place)
                place.rmdir()  # where nothing else is in it
        found = checkpoints_by_progress(self.folder)
        if found and saved_step(found[-1]) > gan.step:
            warnings.warn(
                f"{found[-1]} is further than this GAN, and loaded first; choose another folder", stacklevel=2
            )

    def numbered(self) -> list[Path]:
        """Return the folders that may be this class's own."""
        found = [path for path in self.folder.glob("epoch-*") if re.fullmatch(r"epoch-\d+", path.name)]
        return [path for path in found if path.is_dir() and not path.is_symlink()]

    def on_epoch_end(self, gan: Trainer) -> None:
        """Save, then remove what is older than the two furthest."""
        try:
            saved = save_checkpoint(gan, self.folder / f"epoch-{math.ceil(gan.history['epoch'][-1]):04d}")
            self.failure = None
        except (OSError, CheckpointError) as error:
            self.failure = error
            warnings.warn(f"the checkpoint of epoch {gan.epoch} was not saved: {error}", stacklevel=2)
            return
        own = self.numbered()
        readable = [path for path in checkpoints_by_progress(self.folder) if path in own and saved_step(path) >= 0]
        for path in readable[:-2]:
            if path != saved:
                with suppress(OSError, CheckpointError):  # where other things lie beside it, it stays
                    check_replaceable(path)
                    remove_files(path)
                    shutil.rmtree(path)

    def on_train_end(self, gan: Trainer) -> None:
        """Let the folder go; raises OSError where the last checkpoint is not on the disk."""
        self.held.close()
        if self.failure is not None and sys.exc_info()[0] is None:  # else that error is the one to show
            raise OSError(
                f"the last epoch is not saved: {self.failure}; the newest checkpoint is {gan.last_checkpoint}"
            )
