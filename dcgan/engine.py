"""How a step is computed: in plain PyTorch here; and the contexts that steps are taken in."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import Config

if TYPE_CHECKING:
    from .training import Trainer

Batch = tuple[Tensor, Tensor | None]  # real images (N, C, S, S) in [-1, 1], labels (N,)


class Engine:
    """Run the steps as plain PyTorch does, in float32, in one process; acceleration.py has the faster one."""

    rank, world, precision = 0, 1, "fp32"

    def __init__(self, config: Config) -> None:
        self.device = torch.device("cpu" if config.device == "auto" else config.device)

    def players(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, nn.Module]:
        """Return the networks as the steps call them: "G", "D", and "frozen D" in G's step."""
        return {"G": generator, "D": discriminator, "frozen D": discriminator}

    def optimizer(self, network: nn.Module, config: Config, lr: float) -> torch.optim.Optimizer:
        """Return Adam for a network."""
        return torch.optim.Adam(network.parameters(), lr, (config.beta1, config.beta2), config.adam_eps)

    def autocast(self) -> AbstractContextManager:
        """Return the context in which networks and losses compute."""
        return nullcontext()

    def backward(self, player: str, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Leave the gradient of the loss in the weights."""
        loss.backward()

    def step(self, player: str, optimizers: list[torch.optim.Optimizer]) -> None:
        """Move the weights by their gradients."""
        for optimizer in optimizers:
            optimizer.step()

    def finite(self, norm: Tensor) -> Tensor:
        """Return the norm of a gradient."""
        return norm

    def number(self, value: float, place: Any = None) -> Any:
        """Return a number that changes while training, as the device reads it; `place` is what it was before."""
        return value

    def iterate(self, gan: Trainer, batches: list[Batch]) -> Tensor:
        """Take one iteration; return its METRICS."""
        return gan.train_step(batches)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        return values

    def largest(self, values: list[float]) -> list[float]:
        """Return the largest of each number over all processes."""
        return values

    def session(self, gan: Trainer) -> AbstractContextManager:
        """Return the context of one call of `train`."""
        return nullcontext()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep a network's weights out of the graph: gradients pass through, none is kept; put the flags back after it."""
    flags = [(p, p.requires_grad) for p in network.parameters()]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def kept_statistics(network: nn.Module, keep: bool) -> Iterator[None]:
    """Keep BatchNorm's running averages where they are, as those of a frozen player must stay."""
    norms = [m for m in network.modules() if getattr(m, "track_running_stats", False)] if keep else []
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def or_warn(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a failure to write, and other `kinds` of error, into a warning: it costs the file, never the training."""
    try:
        yield
    except (OSError, *kinds) as error:
        warnings.warn(f"{what} was not saved: {error}", stacklevel=3)


@contextmanager
def stop_on_interrupt(gan: Trainer) -> Iterator[None]:
    """Turn the first Ctrl-C into a stop after the current batch, so that D, G and the record agree.

    Outside the main thread, where Python delivers no signals, it does nothing: call `gan.stop` there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: Any) -> None:
        """Stop the GAN, and let the next Ctrl-C act as usual."""
        signal.signal(signal.SIGINT, before)
        gan.stop("interrupted")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
