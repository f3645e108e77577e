"""The two files of a checkpoint on disk: replaced together, whole at every moment, by one process at a time.

A save writes two hidden files beside state.json and weights.safetensors. Renaming the hidden state.json is the moment
from which the new checkpoint counts: the SHA-256 in it says which of the two weights files belongs to it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

STATE_FILE, WEIGHTS_FILE = "state.json", "weights.safetensors"
NEW_STATE, NEW_WEIGHTS = ".state.json", ".weights.safetensors"  # of a save that is under way or was cut short
SAVE_LOCK, RUN_LOCK = ".save.lock", ".run.lock"
BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading a damaged state.json raises


# ------------------------------------------------------------------------------------------ writing
def replace_files(folder: Path, state: bytes, weights: bytes) -> None:
    """Put both files of a checkpoint into a folder, made if need be; they are on the disk before they count.

    Raises OSError; the older checkpoint is then whole, and nothing is left where there was none.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder / SAVE_LOCK, patience=30):
            try:
                tidy(folder)
                write_synced(folder / NEW_WEIGHTS, weights)
                write_synced(folder / NEW_STATE, state)
                sync_folder(folder)
                os.replace(folder / NEW_STATE, folder / STATE_FILE)  # from here on the new one is found
                sync_folder(folder)
                os.replace(folder / NEW_WEIGHTS, folder / WEIGHTS_FILE)
                sync_folder(folder)
            except BaseException:  # Ctrl-C, too
                with suppress(OSError):
                    tidy(folder)
                raise
        for place in made:
            sync_folder(place.parent)
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def tidy(folder: Path) -> None:
    """Finish or remove what a save or a removal that was cut short has left in a folder."""
    if expects(folder, NEW_WEIGHTS):
        os.replace(folder / NEW_WEIGHTS, folder / WEIGHTS_FILE)
    if os.path.lexists(folder / NEW_STATE) and not os.path.lexists(folder / STATE_FILE):
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # of a removal
    for name in (NEW_WEIGHTS, NEW_STATE):
        (folder / name).unlink(missing_ok=True)


def expects(folder: Path, name: str) -> bool:
    """Return whether a file is the one that state.json was written with."""
    if not (folder / name).is_file() or not (folder / STATE_FILE).is_file():
        return False
    try:
        expected = json.loads((folder / STATE_FILE).read_bytes())["sha256"]
    except BAD_JSON:
        return False
    return expected == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def remove_files(folder: Path) -> None:
    """Remove a checkpoint; when it is cut short, what is left is no checkpoint, and `tidy` goes on."""
    os.replace(folder / STATE_FILE, folder / NEW_STATE)
    tidy(folder)


# ------------------------------------------------------------------------------------------ reading
def read_files(folder: Path) -> tuple[bytes, bytes | None]:
    """Return state.json and the weights that belong to it, None for damaged ones.

    Raises FileNotFoundError for a folder that is no checkpoint, and what a damaged state.json raises, see BAD_JSON.
    """
    for _ in range(100):  # again where another process has saved meanwhile
        moment, state = state_moment(folder), read_part(folder, STATE_FILE)
        expected, weights = json.loads(state).get("sha256"), None
        for name in (NEW_WEIGHTS, WEIGHTS_FILE) if expected else (WEIGHTS_FILE,):  # in the order in which they move
            with suppress(FileNotFoundError):
                content = read_part(folder, name)
                if expected in (None, hashlib.sha256(content).hexdigest()):
                    weights = content
                    break
        if (weights is not None and expected is not None) or state_moment(folder) == moment:
            break
    if weights is None:
        read_part(folder, WEIGHTS_FILE)  # raises where it is missing
    return state, weights


def state_moment(folder: Path) -> tuple[int, int] | None:
    """Return what changes whenever state.json is replaced, even by an equal one; None where it is missing."""
    with suppress(FileNotFoundError):
        found = (folder / STATE_FILE).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def read_part(folder: Path, name: str) -> bytes:
    """Return a file's content; raises FileNotFoundError where there is none of a regular kind."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {name}; pass the folder that save() wrote")
    return (folder / name).read_bytes()


# ------------------------------------------------------------------------------------------ one process at a time
@contextmanager
def only_writer(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock file, which a process that dies lets go; raises OSError where another one keeps it."""
    end = time.monotonic() + patience
    while (file := locked_file(path)) is None:
        if time.monotonic() > end:
            raise OSError(f"another run saves into {path.parent}; wait for its end or choose another folder")
        time.sleep(0.02)
    try:
        yield
    finally:
        if os.name == "nt":  # which removes no open file
            file.close()
        with suppress(OSError):
            path.unlink()
        file.close()


def locked_file(path: Path) -> IO[bytes] | None:
    """Return a file, opened and locked; None where another one holds it. A drive without locks locks nothing."""
    file = open(path, "ab")  # noqa: SIM115, as long as the lock is held
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # else its last holder has removed it
            return file
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK, errno.ENOENT):
            return file
    file.close()
    return None
