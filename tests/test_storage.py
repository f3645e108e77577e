"""A checkpoint on disk is whole at every moment, whatever ends the process, and replaces nothing else."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disk import FILES, full_disk, names
from tiny import make, same

import dcgan_utils as du


@pytest.fixture
def saved(tmp_path):
    """Return the folder of a checkpoint."""
    return make().save(tmp_path / "ck")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (FILES[1], lambda text: text[:-100]),
        (FILES[1], lambda text: text[:-1] + bytes([text[-1] ^ 1])),  # one bit
        (FILES[0], lambda text: text[:50]),
        (FILES[0], lambda text: b"\xff" + text),
        (FILES[0], lambda text: b"[" * 100_000),
        (FILES[0], lambda text: b"[]"),
        (FILES[0], lambda text: b'{"format": "2"}'),
        (FILES[0], lambda text: text.replace(b'"format": 2', b'"format": 99')),
        (FILES[0], lambda text: text.replace(b"sha256", b"sha255")),
    ],
    ids=["short", "one bit", "half", "no UTF-8", "deep", "a list", "no number", "newer", "no SHA-256"],
)
def test_files_that_changed_are_noticed(name, change, saved):
    (saved / name).write_bytes(change((saved / name).read_bytes()))
    with pytest.raises(du.CheckpointError):
        du.GAN.load(saved)


def test_what_is_no_checkpoint_or_of_another_recipe_is_named(saved, tmp_path):
    with pytest.raises(du.CheckpointError, match=r"FastDCGAN.*DCGAN"):
        du.DCGAN.load(saved)
    for missing in FILES[::-1]:
        (saved / missing).unlink()
        with pytest.raises(FileNotFoundError, match=missing):
            du.GAN.load(saved)
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            du.GAN.load(nothing)


# ------------------------------------------------------------------------------------------ what saving may replace
def listening(path):
    """Make a socket."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:  # paths of sockets are short
        listener.bind(path.name)


TAKEN = {
    "a file": lambda path: path.write_text("mine"),
    "a pipe": os.mkfifo,
    "a socket": listening,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a loop": lambda path: path.symlink_to(path),
    "a hidden file": lambda path: (path.mkdir(), (path / ".env").write_text("mine")),
    "a hidden folder": lambda path: (path / ".git").mkdir(parents=True),
    "a file beside a checkpoint": lambda path: (make().save(path), (path / "notes.txt").write_text("mine")),
    "somebody's state.json": lambda path: (path.mkdir(), (path / "state.json").write_text("{}")),
    "somebody's files": lambda path: (path.mkdir(), [(path / name).write_text("{}") for name in FILES]),
    "somebody's weights": lambda path: (path.mkdir(), (path / "weights.safetensors").write_bytes(b"mine")),
    "folders of these names": lambda path: [(path / name).mkdir(parents=True) for name in FILES],
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_saving_never_replaces_other_things(take, tmp_path):
    path = tmp_path / "ck"
    take(path)
    before = [(place.name, place.lstat().st_ino, place.lstat().st_mtime_ns) for place in sorted(tmp_path.rglob("*"))]
    with pytest.raises(du.CheckpointError):
        make().save(path)
    assert before == [(p.name, p.lstat().st_ino, p.lstat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(there, tmp_path):
    (tmp_path / "link").symlink_to("drive/ck")
    if there:
        make(seed=1).save(tmp_path / "drive" / "ck")
    (tmp_path / "link" if there else tmp_path).joinpath(".DS_Store").write_text("left by a file manager")
    make(seed=2).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert du.GAN.load(tmp_path / "link").config.seed == du.GAN.load(tmp_path / "drive" / "ck").config.seed == 2


# ------------------------------------------------------------------------------------------ whole at every moment
def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path):
    gan = make()
    gan.save(tmp_path / "ck")
    gan.step = 7
    with full_disk(), pytest.raises(OSError, match="cannot save"):
        gan.save(tmp_path / "ck")
    with full_disk(), pytest.raises(OSError, match="cannot save"):
        gan.save(tmp_path / "new" / "ck")
    assert (names(tmp_path), names(tmp_path / "ck")) == (["ck"], FILES)
    assert du.GAN.load(tmp_path / "ck").step == 0


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("turn", [1, 2])
def test_an_interrupt_at_a_rename_leaves_a_whole_checkpoint(turn, after, tmp_path, monkeypatch):
    gan, calls, replace = make(), [], os.replace
    gan.save(tmp_path / "ck")

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) != turn:
            return replace(*paths)
        if after:
            replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    gan.step = 7
    with pytest.raises(KeyboardInterrupt):
        gan.save(tmp_path / "ck")
    assert len(calls) >= turn
    assert names(tmp_path / "ck") == FILES
    assert du.GAN.load(tmp_path / "ck").step == (0 if (turn, after) == (1, False) else 7)


def test_files_and_folders_are_on_the_disk_before_they_count(tmp_path, monkeypatch):
    synced, counted, fsync, replace = [], [], os.fsync, os.replace

    def noted_sync(number):
        synced.append(os.fstat(number).st_ino)
        fsync(number)

    def noted_replace(source, target):
        files = [path.stat().st_ino for path in Path(source).parent.iterdir() if path.stat().st_size]
        counted.append(set(files) <= set(synced) and Path(source).parent.stat().st_ino == synced[-1])
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    make().save(tmp_path / "new" / "ck")
    assert counted
    assert all(counted)
    assert {place.stat().st_ino for place in (tmp_path, tmp_path / "new", tmp_path / "new" / "ck")} <= set(synced)


def test_a_load_while_two_threads_save_finds_one_of_their_checkpoints(tmp_path):
    gans, until = [make(seed=seed) for seed in (1, 2)], time.monotonic() + 2
    gans[0].save(tmp_path / "ck")

    def keep_saving(first):
        while time.monotonic() < until:
            for gan in (gans[first], gans[1 - first]):
                gan.save(tmp_path / "ck")

    with ThreadPoolExecutor(2) as pool:
        savers, seen = [pool.submit(keep_saving, first) for first in (0, 1)], set()
        while time.monotonic() < until:
            gan = du.GAN.load(tmp_path / "ck")
            assert same(gan, gans[gan.config.seed - 1])
            seen.add(gan.config.seed)
    assert [saver.result() for saver in savers] == [None, None]
    assert seen == {1, 2}
    assert names(tmp_path / "ck") == FILES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_leaves_the_older_or_the_newer_checkpoint(tmp_path):
    """At each file operation of a save or a removal, and at random moments; see tests/kill_saves.py."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path  # where syncing takes no time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, str(Path(__file__).with_name("kill_saves.py")), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 60  # so often it was killed
