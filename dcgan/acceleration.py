"""What makes the same mathematics faster, and nothing else: precision, CUDA graphs, several processes.

`Accelerated` is the engine of every recipe; `Engine` does the same in plain PyTorch. convolutions.py has the faster
form of the networks, which the two steps of training call.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import Config, kaggle_run, profile
from .convolutions import accelerate, cpu_features
from .engine import Batch, Engine
from .training import Trainer


# ------------------------------------------------------------------------------------------ device and precision
def pick_device(name: str) -> torch.device:
    """Return the torch device: for "auto" the GPU where there is one; raises ValueError for one that is not there."""
    if name == "auto":  # torchrun names a process's own GPU by LOCAL_RANK
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r} is not one that torch knows; use 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {name!r} is not supported; use 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but torch sees no GPU; use device='auto'")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": for "auto" what the device does well.

    CPU: bf16 needs AMX or AVX512-BF16, else it is slower than fp32. GPU: bf16 from compute capability 8 on; a T4 (7.5)
    only emulates it, so fp16. Raises ValueError for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision = 'fp16' needs a GPU; use 'auto', 'fp32' or 'bf16'")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    features = cpu_features()
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


def describe_machine() -> str:
    """Return one line: where this runs, on which device, in which precision, at which scale, and how to get a GPU."""
    where = f"Kaggle, {kaggle_run()} run" if kaggle_run() else "not on Kaggle"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    what = f"{len(gpus)} × {gpus[0]}" if gpus else "no GPU"
    what += ", of which one is used" if len(gpus) > 1 else ""
    line = f"{where}: {what}; {pick_precision('auto', pick_device('auto'))}, scale {profile()!r}"
    advice = "; training is shorter than on a GPU (Settings → Accelerator → GPU T4 x2)"
    return line + (advice if kaggle_run() and not gpus else "")


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Compute with subnormal numbers as 0, which early training is full of and CPUs are slow at; put it back after."""
    torch.zeros(2**15 * torch.get_num_threads()).add_(1)  # worker threads inherit the setting when they are made
    before = bool(torch.full((), 1e-40).mul(1.0) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


# ------------------------------------------------------------------------------------------ the engine
class Accelerated(Engine):
    """Run the steps in the device's best precision, over all processes that torchrun started, by CUDA graphs."""

    def __init__(self, config: Config) -> None:
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.graphs: IterationGraphs | None = None
        scaling = self.precision == "fp16"  # gradients below fp16's range are lost without it
        self.scalers = {player: torch.amp.GradScaler(self.device.type, enabled=scaling) for player in "GD"}

    def players(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, nn.Module]:
        """Return the networks as the steps call them: with fast layers on a CPU, gradients averaged over processes."""
        fast = accelerate if self.device.type == "cpu" else lambda network: network
        D, G = fast(discriminator), fast(generator)
        return {"D": self._parallel(D), "frozen D": D, "G": self._parallel(G)}

    def _parallel(self, network: nn.Module) -> nn.Module:
        """Return the network as every process runs it on its share of the batch.

        BatchNorm's buffers stay apart within an epoch: D runs twice before its backward pass, which a broadcast into
        them would break. On a GPU it is made in a second stream, as graphs of it need (PyTorch, "CUDA semantics").
        """
        if self.world == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        idle = any(getattr(m, "grows", False) for m in network.modules())  # layers without gradients yet
        with second_stream(self.device):
            return DistributedDataParallel(
                network, device_ids=devices, broadcast_buffers=False, find_unused_parameters=idle
            )

    def optimizer(self, network: nn.Module, config: Config, lr: float) -> torch.optim.Optimizer:
        """Return fused Adam."""
        betas, graphs = (config.beta1, config.beta2), self.device.type == "cuda"
        rate = self.number(lr)
        return torch.optim.Adam(network.parameters(), rate, betas, config.adam_eps, fused=True, capturable=graphs)

    def autocast(self) -> torch.autocast:
        """Return the context in which the networks compute in this device's precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        kept = self.graphs is None  # all threads share the cache, and what is cast while recording has no values
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=kept)

    def backward(self, player: str, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Leave the gradient in the weights; in fp16 the loss is scaled up before and the gradient down after."""
        self.scalers[player].scale(loss).backward()
        self.scalers[player].unscale_(optimizer)

    def step(self, player: str, optimizers: list[torch.optim.Optimizer]) -> None:
        """Move the weights; in fp16 a step whose gradient overflowed is skipped."""
        for optimizer in optimizers:
            self.scalers[player].step(optimizer)
        self.scalers[player].update()

    def finite(self, norm: Tensor) -> Tensor:
        """Return the norm of a gradient, 0 for one that overflowed in fp16."""
        return norm.nan_to_num(0, 0, 0) if self.precision == "fp16" else norm

    def number(self, value: float, place: Any = None) -> Any:
        """Return a number that changes between replays of a graph: on a GPU a tensor, `place` once there is one."""
        if isinstance(place, Tensor):
            return place.fill_(value)
        return torch.tensor(value, device=self.device) if self.device.type == "cuda" else value

    def iterate(self, gan: Trainer, batches: list[Batch]) -> Tensor:
        """Take one iteration, on a GPU by replaying a recorded one; return its METRICS."""
        return self.graphs.iterate(batches) if self.graphs else gan.train_step(batches)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def largest(self, values: list[float]) -> list[float]:
        """Return the largest of each number over all processes."""
        if self.world == 1:
            return values
        shared = torch.tensor(values, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    @contextmanager
    def session(self, gan: Trainer) -> Iterator[None]:
        """Record and replay for as long as a call of `train` lasts: between two of them everything may change."""
        grows = getattr(gan.generator, "grows", False)  # its graph would change with it
        wanted = self.device.type == "cuda" and gan.config.cuda_graphs and not grows
        self.graphs = IterationGraphs(gan) if wanted else None
        try:
            with flushed_denormals(), second_stream(self.device):
                yield
        finally:
            self.graphs = None

    def __deepcopy__(self, memo: dict) -> Accelerated:
        """Return the engine of a copied GAN, without graphs, which write into the tensors of the first one."""
        twin = copy.copy(self)
        twin.graphs, twin.scalers = None, copy.deepcopy(self.scalers, memo)
        return twin


class IterationGraphs:
    """Replay a GAN's iterations as CUDA graphs: one launch in place of a thousand, for which small networks wait.

    A graph repeats its kernels with the numbers that Python gave them, so each set of `constants` has one of its own,
    recorded when they come for the fourth time (the twelfth with several processes, as DDP's documentation asks): by
    then cuDNN has chosen its kernels, and Adam has its memory. What changes meanwhile lies in tensors (batch, learning
    rates, share of the average) or in the state of the GAN's random generator.
    """

    def __init__(self, gan: Trainer) -> None:
        self.gan, self.warmup = gan, 4 if gan.world == 1 else 12
        self.forget()

    def forget(self) -> None:
        """Begin anew, as is due when the tensors that a graph writes into are replaced."""
        self.config, self.refused = self.gan.config, False
        self.seen: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()  # shared: no two of them run at a time

    def constants(self) -> tuple[Any, ...]:
        """Return what Python decides of the next iteration."""
        gan = self.gan
        modes = tuple(m.training for network in (gan.generator, gan.discriminator) for m in network.modules())
        return id(gan.loss), gan.penalty_is_due(), gan.noise_std(), modes

    def iterate(self, batches: list[Batch]) -> Tensor:
        """Take an iteration as `gan.train_step` does, and return its METRICS."""
        if self.gan.config is not self.config:  # what was recorded for the old one would only take memory
            self.forget()
        key = (self.constants(), tuple(real.shape for real, _ in batches))
        self.seen[key] += 1
        if self.config.cuda_graphs and self.seen[key] >= self.warmup and key not in self.graphs and not self.refused:
            self._record(key, batches)
        if key not in self.graphs:
            return self.gan.train_step(batches)
        graph, places, row = self.graphs[key]
        for place, batch in zip(places, batches, strict=True):
            for tensor, new in zip(place, batch, strict=True):
                if tensor is not None:
                    tensor.copy_(new)
        graph.replay()
        return row.clone()  # the next replay writes over it

    def _record(self, key: tuple, batches: list[Batch]) -> None:
        """Record an iteration, which takes no step: the graph, its batches' places and METRICS; or go on without."""
        gan, state = self.gan, self.gan.rng.get_state()
        places = [tuple(None if tensor is None else tensor.clone() for tensor in batch) for batch in batches]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        graph.register_generator_state(gan.rng)  # so that every replay draws new numbers
        try:  # thread_local: what other threads ask of the GPU meanwhile does not break it off
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                row = gan.train_step(places)
        except BaseException as error:
            self.refused = True
            self._clear_up(state)
            if not isinstance(error, RuntimeError):
                raise
            warnings.warn(
                f"training goes on without CUDA graphs, several times slower: {str(error).splitlines()[0]}. A loss or "
                "network that reads values (.item(), if) cannot be recorded; cuda_graphs=False ends this warning",
                stacklevel=2,
            )
        else:
            self.graphs[key] = graph, places, row

    def _clear_up(self, state: Tensor) -> None:
        """Undo what a recording that broke off leaves: gradients, scalers, a generator that still waits for it."""
        gan = self.gan
        self.graphs.clear()  # they would draw from the generator that waits
        for optimizer in (gan.optimizer_D, gan.optimizer_G):
            optimizer.zero_grad(set_to_none=True)
        for player, scaler in gan.engine.scalers.items():
            fresh = torch.amp.GradScaler(gan.device.type, enabled=scaler.is_enabled())
            fresh.load_state_dict(scaler.state_dict())
            gan.engine.scalers[player] = fresh
        gan.rng = torch.Generator(gan.device)
        gan.rng.set_state(state)


@contextmanager
def second_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU in a stream beside the default one, whose work cannot go into a CUDA graph."""
    if device.type != "cuda":
        yield
        return
    before, stream = torch.cuda.current_stream(device), stream_of(device, threading.get_ident())
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


@functools.cache
def stream_of(device: torch.device, thread: int) -> torch.cuda.Stream:
    """Return a GPU's second stream, one for each thread: each keeps memory of its own, and records by itself."""
    return torch.cuda.Stream(device)
