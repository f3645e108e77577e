"""Training in several processes that `torchrun` starts: the same weights everywhere, one set of files, resume."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from tiny import make

import dcgan_utils as du

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = ["--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 128 digits as IDX files, since a command line takes a folder."""
    place = tmp_path_factory.mktemp("digits")
    images = du.read_idx(du.EMBEDDED_MNIST / "t10k-images-idx3-ubyte.gz")[:128]
    labels = du.read_idx(du.EMBEDDED_MNIST / "t10k-labels-idx1-ubyte.gz")[:128]
    for stem in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
        (place / f"{stem}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big")
        (place / f"{stem}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return place


def run(command, root, **environment):
    """Run a command with one thread a process and return what it printed."""
    import os

    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def command(folder, out, epochs, *more):
    """Return the arguments of a small training run."""
    small = ["--set", "ngf=4", "ndf=4", "nz=8", "batch_size=16", "log_every=2"]
    return ["dcgan_utils.py", "train", "--recipe", "fast", "--epochs", str(epochs), "--data", str(folder), "--out",
            str(out), *small, *more]  # fmt: skip


def test_two_processes_hold_the_same_weights_and_share_the_batch(root, folder, tmp_path):
    script = tmp_path / "each.py"
    script.write_text(
        textwrap.dedent(f"""
        import json, sys, torch, torch.distributed as dist
        import dcgan_utils as du
        dist.init_process_group("gloo")
        gan = du.FastDCGAN(ngf=4, ndf=4, nz=8, batch_size=16, log_every=2)
        seen = []
        original = gan._iterate
        gan._iterate = lambda batches: (seen.append([len(real) for real, _ in batches]), original(batches))
        gan.train(2, data={str(folder)!r}, callbacks=[])
        record = {{"rank": dist.get_rank(), "batches": seen, "history": gan.history["loss_D"]}}
        for name in ("generator", "discriminator", "average"):
            state = getattr(gan, name).state_dict()
            record[name] = torch.cat([v.double().flatten() for v in state.values()]).tolist()
        record["z"] = torch.randn(3, generator=torch.Generator().set_state(gan._rng["cpu"])).tolist()
        path = {str(tmp_path)!r} + f"/rank{{dist.get_rank()}}.json"
        json.dump(record, open(path, "w"))
        dist.barrier()  # else one leaves while the other still needs it
        dist.destroy_process_group()
        """)
    )
    run([*TORCHRUN, *TWO, str(script)], root)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for name in ("generator", "discriminator", "average"):
        assert first[name] == second[name], name
    assert first["history"] == second["history"]
    assert first["z"] != second["z"]  # each draws its own noise
    assert {n for step in first["batches"] for n in step} == {8}  # half of the batch of 16
    assert len(first["batches"]) == 2 * 128 // 16


def test_the_gradient_of_two_processes_is_that_of_the_whole_batch(root, tmp_path):
    # halves of a batch add up to the whole exactly, the penalty's too, where nothing is a process's own: neither the
    # statistics of BatchNorm nor the wrong labels that matching draws
    script = tmp_path / "step.py"
    script.write_text(
        textwrap.dedent(f"""
        import torch, torch.distributed as dist
        import dcgan_utils as du
        dist.init_process_group("gloo")
        tiny = dict(ngf=4, ndf=4, nz=8, batch_size=16, precision="fp32")
        gan = du.FastDCGAN(batch_norm_G=False, conditioning="projection", **tiny)
        data = torch.Generator().manual_seed(5)
        real, fake = torch.randn(2, 16, 1, 28, 28, generator=data)
        labels = torch.arange(16) % 10
        mine = slice(gan.rank, None, gan.world)
        du.train_discriminator(gan, real[mine], fake[mine], labels[mine])
        if gan.rank == 0:
            gan.save({str(tmp_path / "two")!r})
        dist.barrier()  # else one leaves while the other still needs it
        dist.destroy_process_group()
        """)
    )
    run([*TORCHRUN, *TWO, str(script)], root)
    gan = make(batch_norm_G=False, conditioning="projection")
    assert gan.config.gradient_penalty > 0
    assert not gan.config.batch_norm_D
    real, fake = torch.randn(2, 16, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    du.train_discriminator(gan, real, fake, torch.arange(16) % 10)
    two = load_file(tmp_path / "two" / "weights.safetensors")
    for name, value in gan.discriminator.state_dict().items():
        torch.testing.assert_close(two[f"discriminator.{name}"], value, rtol=1e-3, atol=1e-5)


def test_torchrun_trains_saves_once_and_resumes(root, folder, tmp_path):
    out = tmp_path / "out"
    printed = run([*TORCHRUN, *TWO, *command(folder, out, 1)], root)
    assert printed.count("epoch 1/1") == 1  # one process reports
    assert [p.name for p in sorted(out.glob("epoch-*"))] == ["epoch-0001"]
    run([*TORCHRUN, *TWO, *command(folder, out, 2, "--resume")], root)
    gan = du.GAN.load(out)
    assert gan.epoch == 2
    assert gan.history["epoch"] == [1, 2]
    assert gan.sample(2, seed=1).shape == (2, 1, 28, 28)  # and it goes on alone


def test_a_time_limit_stops_all_processes_together(root, folder, tmp_path):
    out = tmp_path / "out"
    printed = run([*TORCHRUN, *TWO, *command(folder, out, 100_000), "--max-seconds", "2"], root)
    assert "max_seconds = 2 reached" in printed


def test_two_agents_meet_on_the_loopback_address(root, folder, tmp_path):
    import os
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    agents = [
        subprocess.Popen(
            [*TORCHRUN, *meet, "--rdzv-id=digits", *command(folder, out, 1)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=root,
        )
        for _ in range(2)
    ]  # fmt: skip
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)[-3000:]
    assert sum(text.count("epoch 1/1") for text in printed) == 1
    assert du.GAN.load(out).epoch == 1


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(du.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(du.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(du.dist, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size = 16 must be a multiple of the 3 processes"):
        make()
