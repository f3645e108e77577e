"""Checkpoints as files, changed by hand, and a disk that is full: for tests of what is saved."""

import contextlib
import hashlib
import json
import os
import resource

from safetensors.torch import load_file, save_file

FILES = ["state.json", "weights.safetensors"]


def names(folder):
    """Return all names in a folder, hidden ones too."""
    return sorted(os.listdir(folder))


def rewrite(folder, change):
    """Change a checkpoint's record and tensors as somebody would who knows the format, SHA-256 included."""
    record, tensors = json.loads((folder / FILES[0]).read_text()), load_file(folder / FILES[1])
    change(record, tensors)
    save_file(tensors, folder / FILES[1])
    if record.get("format") != 1:
        record["sha256"] = hashlib.sha256((folder / FILES[1]).read_bytes()).hexdigest()
    (folder / FILES[0]).write_text(json.dumps(record))


@contextlib.contextmanager
def full_disk(size=1000):
    """Let no file of this process grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
