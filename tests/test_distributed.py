"""Training in two processes that `torchrun` starts: one process's weights, the same everywhere, one set of files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import make

import dcgan_utils as du

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
WHOLE = {  # nothing is a process's own: no statistics of a batch, no random numbers but z
    "ngf": 4, "ndf": 4, "nz": 8, "batch_size": 16, "device": "cpu", "precision": "fp32", "log_every": 2,
    "batch_norm_G": False, "conditioning": "projection",
}  # fmt: skip
SCRIPT = """
import sys, torch, torch.distributed as dist
import dcgan_utils as du
dist.init_process_group("gloo")
place, whole = sys.argv[1], eval(sys.argv[2])
data = torch.arange(128 * 784).remainder(251).to(torch.uint8).view(128, 28, 28), torch.arange(128) % 10
found = {}

gan = du.FastDCGAN(**whole)  # one step of each player, on this process's share of a batch
real, z = torch.randn(16, 1, 28, 28, generator=du.make_generator(5)), gan.latent(16, seed=6)
labels, mine = torch.arange(16) % 10, slice(gan.rank, None, gan.world)
fake = gan.players["G"](z[mine], labels[mine])
measured = du.discriminator_step(gan, real[mine], fake, labels[mine])
du.generator_step(gan, fake, labels[mine], measured["real_logits"])
found["step"] = {"D": gan.discriminator.state_dict(), "G": gan.generator.state_dict()}

gan, seen = du.FastDCGAN(**whole | {"batch_norm_G": True}), []  # two epochs
step = gan.train_step
gan.train_step = lambda batches: (seen.extend(batches), step(batches))[1]
told = du.Callback()
told.on_epoch_end = lambda gan: found.setdefault("told", []).append(gan.epoch)
gan.train(2, data=data, callbacks=[told])
found["images"] = torch.cat([real[:, 0, 0, :9] for real, _ in seen])
networks = gan.generator, gan.discriminator, gan.average
found["weights"] = torch.cat([v.double().flatten() for net in networks for v in net.state_dict().values()])
if gan.rank == 0:
    gan.save(f"{place}/kept")
dist.barrier()
again = du.FastDCGAN.load(f"{place}/kept")
found["history"], found["z"] = gan.history["loss_D"], [torch.randn(3, generator=one.rng) for one in (gan, again)]
gan.train(100_000, max_seconds=1.0, callbacks=[])  # until the time is over
found["stopped"] = gan.stop_reason, gan.step
torch.save(found, f"{place}/rank{gan.rank}.pt")
dist.barrier()  # else one leaves while the other still needs it
dist.destroy_process_group()
"""


def run(command, root):
    """Run a command with one thread a process, and return what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ranks(root, tmp_path_factory):
    """Return what each of two processes found."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "each.py").write_text(SCRIPT)
    run([*TORCHRUN, str(place / "each.py"), str(place), repr(WHOLE)], root)
    return [torch.load(place / f"rank{rank}.pt") for rank in (0, 1)]


def test_a_step_of_two_processes_is_that_of_one_on_the_whole_batch(ranks):
    gan = make(**WHOLE)
    assert gan.config.gradient_penalty > 0  # and so is the penalty's part
    real, z = torch.randn(16, 1, 28, 28, generator=du.make_generator(5)), gan.latent(16, seed=6)
    labels = torch.arange(16) % 10
    fake = gan.players["G"](z, labels)
    measured = du.discriminator_step(gan, real, fake, labels)
    du.generator_step(gan, fake, labels, measured["real_logits"])
    for name, network in (("D", gan.discriminator), ("G", gan.generator)):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(ranks[0]["step"][name][key], value, rtol=1e-3, atol=2e-5)
            assert torch.equal(ranks[0]["step"][name][key], ranks[1]["step"][name][key])


def test_two_processes_share_the_batches_and_hold_the_same(ranks):
    first, second = ranks
    assert torch.equal(first["weights"], second["weights"])
    assert first["history"] == second["history"]
    for mine, other in zip(first["z"], second["z"], strict=True):  # each draws its own noise, after a load, too
        assert not torch.equal(mine, other)
    assert torch.equal(*first["z"])
    both = torch.cat([first["images"], second["images"]])
    assert len(first["images"]) == len(second["images"]) == 2 * 64
    assert len(both.unique(dim=0)) == 128  # each image is in one of them
    assert (first["told"], second.get("told")) == ([1, 2], None)  # one process shows and saves


def test_a_time_limit_stops_both_together(ranks):
    assert ranks[0]["stopped"] == ranks[1]["stopped"]
    assert ranks[0]["stopped"][0] == "max_seconds = 1 reached"


def test_torchrun_trains_on_the_command_line_and_saves_once(root, tmp_path, mnist_small):
    data, out = tmp_path / "digits.npz", tmp_path / "out"
    np.savez(data, images=mnist_small[0][:64].numpy(), labels=mnist_small[1][:64].numpy())
    small = ["--epochs", "1", "--set", "ngf=4", "ndf=4", "nz=8", "batch_size=16", "device=cpu", "log_every=2"]
    command = ["dcgan_utils.py", "train", "--recipe", "fast", "--data", str(data), "--out", str(out), *small]
    assert run([*TORCHRUN, *command], root).count("epoch 1/1") == 1  # one process reports
    gan = du.GAN.load(out)
    assert (gan.epoch, gan.history["epoch"]) == (1, [1])
    assert gan.sample(2, seed=1).shape == (2, 1, 28, 28)  # and it goes on alone


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ValueError, match="batch_size = 16 must be a multiple of the 3 processes"):
        make()
