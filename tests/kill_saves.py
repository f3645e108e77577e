"""Kill processes while they save, and look at what is left: `python kill_saves.py FOLDER` prints how often."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]

import torch  # noqa: E402
from tiny import make  # noqa: E402

import dcgan_utils as du  # noqa: E402

torch.set_num_threads(1)  # threads do not live on in a fork
FOLDER = Path(sys.argv[1])
GAN = make(du.StableDCGAN, image_size=16, ngf=1, ndf=1)


def reach(step):
    """Let the GAN be so far, and its weights tell."""
    GAN.step = GAN.epoch = step
    for values in GAN.history.values():
        values[:] = [float(step)]
    next(GAN.generator.parameters()).data.fill_(step)


def save(step):
    """Save over an older checkpoint."""
    reach(step)
    GAN.save(FOLDER / "run" / "ck")


def save_epoch(step):
    """Begin a run, save its next epoch and remove the oldest one."""
    reach(step)
    saver = du.SaveCheckpoints(FOLDER / "run")
    saver.on_train_begin(GAN)
    saver.on_epoch_end(GAN)
    saver.on_train_end(GAN)


def killed(act, steps, at=None, after=None):
    """Return whether a process that saves was killed: at a file operation, or after so many seconds."""
    seen = []

    def count(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"):
            seen.append(event)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        if at is not None:
            sys.addaudithook(count)
        for step in steps:
            act(step)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def found(folder):
    """Return the step of the newest checkpoint, whose weights must be as far."""
    gan = du.GAN.load(folder)
    assert (next(gan.generator.parameters()) == gan.step).all()
    return gan.step


def check(act, older, newer):
    """Fail unless a load finds one of these steps, and the next save leaves nothing else behind."""
    folder = FOLDER / "run" / ("ck" if act is save else "")
    assert older <= found(folder) <= newer
    act(newer + 1)
    assert found(folder) == newer + 1
    places = [folder] if act is save else [*folder.iterdir()]
    assert act is save or 1 <= len(places) <= 2, places
    for place in places:
        assert sorted(os.listdir(place)) == ["state.json", "weights.safetensors"], os.listdir(place)


def main():
    """Kill at every file operation of each way to save, then at random moments."""
    kills = 0
    for act, before in ((save, 1), (save_epoch, 2)):
        for at in range(1, 1000):
            shutil.rmtree(FOLDER / "run", ignore_errors=True)
            for step in range(before):
                act(step + 1)
            if not killed(act, [before + 1], at=at):
                break
            check(act, before, before + 1)
            kills += 1
    random.seed(0)
    for _ in range(12):
        for act in (save, save_epoch):
            shutil.rmtree(FOLDER / "run", ignore_errors=True)
            act(1)
            kills += killed(act, range(2, 1000), after=random.uniform(0, 0.1))
            check(act, 1, 1000)
    print(kills)


main()
