"""The training loop of every recipe: a step of D, a step of G, and the record of what they did."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config, configure
from .data import normalize
from .engine import Batch, Engine, frozen, kept_statistics, stop_on_interrupt
from .history import METRICS, Callback, DivergenceError, History, positions, relative_change
from .losses import class_loss, make_loss, real_logit
from .networks import init_output_bias
from .randomness import draws_from, make_generator
from .sampling import DATA_FIELDS, Sampler

BUILT_IN = ("image_size", "channels", "nz", "ngf", "ndf", "conditional", "conditioning", "num_classes", "batch_norm_G",
            "batch_norm_D", "init_output_bias", "seed", "dropout_D", "dropout_G", "device", "precision")  # fmt: skip


# ------------------------------------------------------------------------------------------ the two steps of a GAN
def discriminator_step(gan: Trainer, real: Tensor, fake: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Take one step of D on real and fake images (N, C, S, S); return its METRICS and `real_logits` (N,)."""
    with gan.engine.autocast():
        real_logits, real_cost = discriminate(gan, gan.players["D"], real, labels, real=True)
        # detach: this step must not reach into G, whose turn comes next
        fake_logits, fake_cost = discriminate(
            gan, gan.players["D"], fake.detach() if gan.config.detach else fake, labels
        )
        loss = gan.loss.discriminator(real_logits, fake_logits)
    penalty = gan.gradient_penalty(real, fake, labels)
    gradient = gan.update("D", loss + real_cost + fake_cost + penalty)
    outputs = gan.loss.readings(real_logits.detach().float(), fake_logits.detach().float())
    leaked = gan.engine.finite(gradient_norm(gan.generator))
    measured = {"loss_D": loss.detach(), **outputs, "grad_D": gradient, "grad_G_after_D_step": leaked}
    return measured | {"real_logits": real_logits.detach()}


def generator_step(gan: Trainer, fake: Tensor, labels: Tensor | None, real_logits: Tensor) -> dict[str, Tensor]:
    """Take one step of G on fake images (N, C, S, S) that carry G's graph; return its METRICS.

    real_logits: from D's step, for a loss that compares pairs. They are one step old: new ones would cost a forward
    pass and give the same samples.
    """
    with gan.engine.autocast(), frozen(gan.discriminator):  # D passes gradients on to G and keeps none for itself
        # D(fake) again: D has just changed, and the graph of its own step ended at detach
        fake_logits, cost = discriminate(gan, gan.players["frozen D"], fake, labels)
        loss = gan.loss.generator(fake_logits, real_logits)
    return {"loss_G": loss.detach(), "grad_G": gan.update("G", loss + cost)}


def discriminate(
    gan: Trainer, network: nn.Module, images: Tensor, labels: Tensor | None, real: bool = False
) -> tuple[Tensor, Tensor]:
    """Return D's logits (N,) of images with instance noise, and the loss of its class logits, see `class_loss`."""
    outputs, config = network(gan.noisy(images), labels), gan.config
    decay = gan.lr_factor if config.matching_decay else 1.0
    return real_logit(outputs), class_loss(outputs, labels, config, real, config.matching_weight * decay)


def gradient_norm(network: nn.Module) -> Tensor:
    """Return the norm of the gradient that a network holds, 0 where it holds none."""
    weights = list(network.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=weights[0].device)


# ------------------------------------------------------------------------------------------ the loop
class Trainer(Sampler):
    """Hold two networks, their optimizers and all that training needs to go on; a recipe adds the networks.

    Raises ValueError for an unknown Config field, a value out of range, or images that the networks cannot make.
    """

    recipe = ""  # the name in checkpoints and on the command line
    defaults = Config()
    networks: tuple[Callable[[Config], nn.Module], Callable[[Config], nn.Module]]
    losses: Callable[[Config], Any] | None = None  # None: the loss that the Config names
    engine_type: Callable[[Config], Engine] = Engine

    def __init__(self, /, config: Config | None = None, **overrides: Any) -> None:
        self.config = self.resolve(config, **overrides)
        self.engine = self.engine_type(self.config)
        self.device, self.precision = self.engine.device, self.engine.precision
        self.rank, self.world = self.engine.rank, self.engine.world
        self._check_config()
        initial = make_generator(self.config.seed)
        with draws_from(initial):
            self.generator, self.discriminator = (self._place(kind(self.config)) for kind in self.networks)
        seed = int(torch.randint(2**31, (), generator=initial)) + 1_000_003 * self.rank  # each process its own noise
        self.rng = make_generator(seed, self.device)  # all that training draws
        self._follow_networks()
        self.loss = make_loss(self.config, type(self).losses)
        self.history = History(self.config, loss=self.loss)
        self.epoch, self.step, self.position = 0, 0, 0  # finished epochs, iterations, images seen of this epoch
        self.last_epoch = 0  # where the current call of train ends
        self.stop_reason: str | None = None
        self.last_checkpoint: Path | None = None
        self.data_size = 0  # images of the data that position counts in
        self._rows: list[Tensor] = []  # measurements on the device, fetched every log_every batches
        self.new_share = self.engine.number(0.0)  # of the new weights in the average
        self.lr_factor = self.engine.number(1.0)  # share of the learning rates that the schedule leaves
        self.sums: dict[str, float] = self._no_sums()  # of the current epoch

    @classmethod
    def resolve(cls, config: Config | None = None, /, **overrides: Any) -> Config:
        """Return the recipe's Config, or the given one, with overrides."""
        if not isinstance(config, Config | None):
            raise ValueError(f"config = {config!r} is no Config; give fields by name: {cls.__name__}(lr_D=1e-4)")
        return configure(config or cls.defaults, **overrides)

    @classmethod
    def check_image_size(cls, size: int) -> None:
        """Raise ValueError, naming sizes that work, unless the recipe's networks can make this one."""

    def _check_config(self) -> None:
        """Raise ValueError where the Config does not fit the recipe's networks or the processes that share a batch."""
        self.check_image_size(self.config.image_size)
        for network in self.networks:
            for name, needed in getattr(network, "requires", {}).items():
                if getattr(self.config, name) != needed:
                    raise ValueError(f"{type(self).__name__} needs {name}={needed}, see FastDCGAN for another")
        if self.config.batch_size % self.world:
            raise ValueError(f"batch_size = {self.config.batch_size} must be a multiple of the {self.world} processes")

    def _place(self, network: nn.Module) -> nn.Module:
        """Return the network on the device, its convolutions in the layout that is fastest on CPU and GPU."""
        return network.to(self.device, memory_format=torch.channels_last)

    def _follow_networks(self) -> None:
        """Make what hangs on the networks: steps' views of them, optimizers, average; anew where one was replaced."""
        self.players = self.engine.players(self.generator, self.discriminator)
        optimizers = {}
        for name, network, lr in (("G", self.generator, self.config.lr_G), ("D", self.discriminator, self.config.lr_D)):
            old = getattr(self, f"optimizer_{name}", None)
            theirs = [p for group in old.param_groups for p in group["params"]] if old else []
            kept = old and [id(p) for p in theirs] == [id(p) for p in network.parameters()]
            optimizers[name] = old if kept else self.engine.optimizer(self._place(network), self.config, lr)
            if name == "G" and not kept:
                self.average = copy.deepcopy(network).requires_grad_(False) if self.config.ema_decay else None
        self.optimizer_G, self.optimizer_D = optimizers["G"], optimizers["D"]

    def reconfigure(self, /, **changes: Any) -> None:
        """Change Config fields from the next batch on; raises ValueError for those that shape the networks."""
        config = configure(self.config, **changes)
        changed = [name for name in BUILT_IN if getattr(config, name) != getattr(self.config, name)]
        if changed or bool(config.ema_decay) != bool(self.config.ema_decay):
            raise ValueError(
                f"{', '.join(changed) or 'ema_decay'} is built in; make a new {type(self).__name__} to change it"
            )
        before, self.config = self.config, config
        try:
            self._check_config()
            if self.is_training:  # else the next call may bring other data
                self.check_number(len(self.images))
        except ValueError:
            self.config = before
            raise
        self.loss = make_loss(config, type(self).losses)
        self.history.config, self.history.loss = config, self.loss
        for optimizer in (self.optimizer_D, self.optimizer_G):
            for group in optimizer.param_groups:
                group.update(betas=(config.beta1, config.beta2), eps=config.adam_eps)

    def restart(self) -> None:
        """Begin anew with fresh networks and an empty history; Config and data stay."""
        data = {name: getattr(self, name) for name in DATA_FIELDS}
        self.__dict__.pop("optimizer_G"), self.__dict__.pop("optimizer_D")
        self.__init__(self.config)
        vars(self).update(data)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: all but the mark that this one is training."""
        return {name: value for name, value in vars(self).items() if name != "_busy"}

    @property
    def is_training(self) -> bool:
        """Return whether `train` is running, in whatever thread."""
        return "_busy" in self.__dict__

    @property
    def images_per_iteration(self) -> int:
        """Count the real images that one iteration takes: a batch for each step of D."""
        return self.config.batch_size * max(1, self.config.n_critic)

    @property
    def batch(self) -> int:
        """Count the iterations of the current epoch."""
        return self.position // self.images_per_iteration

    def train(
        self,
        epochs: int | None = None,
        batch_size: int | None = None,
        *,
        data: Any = None,
        max_seconds: float | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> History:
        """Train on, from where the last call or checkpoint ended, and return the history.

        epochs: how many further ones (None: what config.num_epochs leaves). data: what `as_images` takes: a source,
        images, (images, labels), a Dataset; None: what it was trained on before, at first "mnist". max_seconds: stop
        after the batch that reaches it; a schedule ends within the limit, and begins again in the next call.
        callbacks: None for the recipe's own; [] for silence. Ctrl-C stops after the batch: all is kept, and the next
        call goes on there. Several processes stop together, at every `log_every` batches. Raises ValueError for data
        that do not fit, RuntimeError while another thread trains this GAN, DivergenceError for a NaN loss.
        """
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds = {max_seconds!r}; it must be above 0")
        if epochs is not None and not (isinstance(epochs, Integral) and epochs >= 0):
            raise ValueError(f"epochs = {epochs!r}; it must be a whole number from 0 on")
        token = object()
        if self.__dict__.setdefault("_busy", token) is not token:  # one atomic step: two threads cannot both pass
            raise RuntimeError("this GAN is training already, in another thread or callback; wait or stop it first")
        try:
            self._begin(epochs, batch_size, data, max_seconds)
            callbacks = self.default_callbacks() if callbacks is None else list(callbacks)
            with stop_on_interrupt(self), self.engine.session(self):
                self._run(callbacks if self.rank == 0 else [])  # one process shows and saves
        finally:
            del self._busy
        return self.history

    def _begin(self, epochs: int | None, batch_size: int | None, data: Any, max_seconds: float | None) -> None:
        """Take in what `train` was called with; what cannot be is not kept."""
        before = self.config
        try:
            if batch_size is not None:
                self.config = configure(self.config, batch_size=batch_size)
                self._check_config()
            self.set_data(data)
        except Exception:
            self.config = before
            raise
        self.history.config = self.config
        self._follow_networks()
        started = 1 if self.position else 0  # an epoch that was cut short is finished in any case
        left = max(self.config.num_epochs - self.epoch, started) if epochs is None else int(epochs)
        if epochs is None and not left and self.config.num_epochs:
            warnings.warn(f"all {self.epoch} epochs are done, nothing was trained; train(n) adds n", stacklevel=3)
        self.last_epoch, self.stop_reason = self.epoch + left, None
        self._clock, self.max_seconds, self.elapsed = time.perf_counter(), max_seconds, 0.0

    def _run(self, callbacks: Sequence[Callback]) -> None:
        """Train epoch after epoch, between the callbacks' first and last word."""
        begun: list[Callback] = []
        try:
            for callback in callbacks:
                begun.append(callback)
                self._tell([callback], "on_train_begin")
            while self.epoch < self.last_epoch and not self.stop_reason:
                self._train_epoch(callbacks)
        finally:
            with ExitStack() as ends:  # every callback that began gets its last word, even after another's error
                for callback in reversed(begun):
                    ends.callback(self._tell, [callback], "on_train_end")

    def stop(self, reason: str) -> None:
        """Ask the loop to end after the current batch; `reason` is kept in `gan.stop_reason`."""
        self.stop_reason = reason

    def default_callbacks(self) -> list[Callback]:
        """Return what `train` calls when it is given no callbacks."""
        return []

    def _tell(self, callbacks: Sequence[Callback], event: str) -> None:
        for callback in callbacks:
            getattr(callback, event, lambda gan: None)(self)

    def _train_epoch(self, callbacks: Sequence[Callback]) -> None:
        """Go through the data once, or through what an interrupted epoch has left."""
        self.generator.train()
        self.discriminator.train()
        if self.step == 0 and self.config.init_output_bias:
            init_output_bias(self.generator, self.images)
        self._drop_unfinished_line()
        step, before = self.step, positions(self.generator, self.discriminator)
        for batches in self._epoch_batches():
            start = time.perf_counter()
            self._follow_schedule()
            with draws_from(self.rng):
                self._iterate(batches)
            self.sums["seconds"] += time.perf_counter() - start
            self._tell(callbacks, "on_batch_end")
            if self.world == 1 or self.batch % self.config.log_every == 0:
                self._agree()
                if self.stop_reason:
                    break
        start = time.perf_counter()
        self._fetch_rows()  # on a GPU this waits for what was launched
        self.sums["seconds"] += time.perf_counter() - start
        self._average_buffers()
        self._close_epoch(step, before)
        self._tell(callbacks, "on_epoch_end")
        self._agree()

    def _epoch_batches(self) -> Iterator[list[Batch]]:
        """Yield, for each iteration, one batch for every D step, in an order that follows from seed and epoch.

        The last, smaller batch is dropped: its statistics would be noisier, and shapes that never change run faster.
        """
        rng = make_generator(self.config.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.images), generator=rng).to(self.device)
        while self.position + self.images_per_iteration <= len(order):
            batches, size = [], self.config.batch_size  # read anew: a callback may change it
            for _ in range(max(1, self.config.n_critic)):
                picked = order[self.position : self.position + size][self.rank :: self.world]
                real = normalize(self.images[picked]).contiguous(memory_format=torch.channels_last)
                batches.append((real, self.labels[picked] if self.config.conditional else None))
                self.position += size
            yield batches

    def _iterate(self, batches: list[Batch]) -> None:
        """Take one iteration and note what was measured."""
        if self.average is not None:  # faster at first (Yazıcı et al. 2019)
            share = 1 - min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            self.new_share = self.engine.number(share, self.new_share)
        self._rows.append(self.engine.iterate(self, batches))
        self.step += 1
        self.sums["images"] += self.world * sum(len(real) for real, _ in batches)
        if self.batch % self.config.log_every == 0:
            self._fetch_rows()

    def train_step(self, batches: list[Batch]) -> Tensor:
        """Take D's steps, each on a batch of its own, then G's; return METRICS. A variant swaps networks or loss.

        Nothing here waits for the device or decides by a value on it, so that a CUDA graph can hold it.
        """
        for real, labels in batches:
            fake = self._fake(len(real), labels)  # fakes carry the labels of the real batch
            with kept_statistics(self.discriminator, not self.config.n_critic):
                measured = discriminator_step(self, real, fake, labels)
        for turn in range(max(1, self.config.g_steps)):
            if turn or not self.config.detach:  # the graph of the first fakes is used up
                fake = self._fake(len(real), labels)
            with kept_statistics(self.discriminator, not self.config.n_critic):
                measured |= generator_step(self, fake, labels, measured["real_logits"])
        if self.average is not None and self.config.g_steps:
            self._update_average()
        return torch.stack([measured[name] for name in METRICS])

    def _fake(self, n: int, labels: Tensor | None) -> Tensor:
        """Return n generated images that carry G's graph."""
        with self.engine.autocast(), kept_statistics(self.generator, not self.config.g_steps):
            z = torch.randn(n, self.config.nz, device=self.device)
            return self.players["G"](z, labels).float()

    def update(self, player: str, loss: Tensor) -> Tensor:
        """Take one step of player "D" or "G" and return the norm of its gradient; a frozen player keeps its weights."""
        mine = {"D": (self.discriminator, self.optimizer_D), "G": (self.generator, self.optimizer_G)}
        network, optimizer = mine[player]
        leaks = player == "D" and not self.config.detach  # the mistake in full: G follows the gradient that reaches it
        moved = [optimizer, self.optimizer_G] if leaks else [optimizer]
        for each in moved:
            each.zero_grad(set_to_none=True)
        if not (self.config.n_critic if player == "D" else self.config.g_steps):
            return torch.zeros((), device=self.device)
        self.engine.backward(player, loss, optimizer)
        norm = self.engine.finite(gradient_norm(network))
        self.engine.step(player, moved)
        optimizer.zero_grad(set_to_none=True)  # so that what G holds after D's step has leaked there
        return norm

    def gradient_penalty(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor | float:
        """Return λ times the loss's penalty on D's gradient, k times as much if taken every k-th iteration only."""
        if not self.penalty_is_due():
            return 0.0
        penalty = self.loss.penalty(self.discriminator, real, fake.detach(), labels)
        return self.config.gradient_penalty * self.config.penalty_interval * penalty

    def penalty_is_due(self) -> bool:
        """Return whether this iteration has a gradient penalty."""
        return self.config.gradient_penalty > 0 and self.step % self.config.penalty_interval == 0

    def noisy(self, images: Tensor) -> Tensor:
        """Return D's input: with Gaussian noise where the Config asks for it (Arjovsky & Bottou 2017, §3)."""
        std = self.noise_std()
        return images + std * torch.randn_like(images) if std else images

    def noise_std(self) -> float:
        """Return the standard deviation of the instance noise, which may fade."""
        batches = self.config.instance_noise_batches
        return self.config.instance_noise * max(0.0, 1 - self.step / batches if batches else 1.0)

    def _follow_schedule(self) -> None:
        """Set learning rates, `lr_factor` and the size of networks that grow, for the share of the run that is done.

        Of the run as long as it is known to be: when it is made longer, rates rise again.
        """
        begun = self.position - self.images_per_iteration  # this iteration is still to come
        share = (self.epoch + begun / len(self.images)) / max(self.config.num_epochs, self.last_epoch, 1)
        if self.max_seconds is not None:
            share = max(share, self.elapsed / self.max_seconds)
        falls = self.config.lr_schedule == "constant_then_linear"
        factor = max(0.0, min(1.0, 2 * (1 - share))) if falls else 1.0
        self.lr_factor = self.engine.number(factor, self.lr_factor)
        for optimizer, lr in ((self.optimizer_D, self.config.lr_D), (self.optimizer_G, self.config.lr_G)):
            for group in optimizer.param_groups:
                group["lr"] = self.engine.number(lr * factor, group["lr"])
        for network in (self.generator, self.discriminator, self.average):
            if getattr(network, "grows", False):
                network.grow(share / self.config.growth if self.config.growth else 1.0)

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged generator toward the present one."""
        for mine, new in zip(self.average.state_dict().values(), self.generator.state_dict().values(), strict=True):
            mine.lerp_(new, self.new_share) if mine.is_floating_point() else mine.copy_(new)

    # -------------------------------------------------------------------------------------- the record
    def _no_sums(self) -> dict[str, float]:
        """Return the sums of an epoch before its first batch."""
        return dict.fromkeys((*METRICS, "D_G_z_change²", "changes", "last_D_G_z", "count", "images", "seconds"), 0.0)

    def _fetch_rows(self) -> None:
        """Bring the measurements since the last look from the device, check them and add them up."""
        if not self._rows:
            return
        rows = self.engine.mean(torch.stack(self._rows).double()).cpu()
        self._rows = []
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        epoch = self.epoch + self.position / len(self.images)
        for name, value in zip(
            ("step", "epoch", *METRICS), (self.step, epoch, *rows.mean(dim=0).tolist()), strict=True
        ):
            self.history.batches[name].append(value)
        if len(bad):
            self._diverged(f"batch {self.batch - len(rows) + int(bad[0]) + 1}")
        for name, value in zip(METRICS, rows.sum(dim=0).tolist(), strict=True):
            self.sums[name] += value
        series = rows[:, METRICS.index("D_G_z")]
        if self.sums["count"]:  # the change from the last row of the fetch before
            series = torch.cat([series.new_tensor([self.sums["last_D_G_z"]]), series])
        self.sums["D_G_z_change²"] += series.diff().square().sum().item()
        self.sums["changes"] += len(series) - 1
        self.sums["last_D_G_z"] = series[-1].item()
        self.sums["count"] += len(rows)

    def _agree(self) -> None:
        """Let all processes go by the same clock and stop together; alone, a stop takes effect after every batch."""
        self.elapsed = time.perf_counter() - self._clock
        self.elapsed, stopped = self.engine.largest([self.elapsed, float(self.stop_reason is not None)])
        if stopped and not self.stop_reason:
            self.stop("another process stopped")
        if self.max_seconds is not None and self.elapsed >= self.max_seconds and not self.stop_reason:
            self.stop(f"max_seconds = {self.max_seconds:g} reached")

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Average BatchNorm's running averages over all processes, so that all sample and save the same."""
        for network in (self.generator, self.discriminator, self.average) if self.world > 1 else ():
            for buffer in network.buffers() if network is not None else ():
                if buffer.is_floating_point():
                    buffer.copy_(self.engine.mean(buffer.clone()))

    def _diverged(self, where: str) -> None:
        """Raise the error that names the place and the last good checkpoint."""
        self.history.diverged = f"epoch {self.epoch + 1}, {where}"
        saved = self.last_checkpoint
        kept = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved"
        raise DivergenceError(
            f"a loss is not a number in {self.history.diverged}: training has stopped, the history is kept, "
            f"{kept}; load it or start anew with a lower lr_G and lr_D"
        )

    def _close_epoch(self, step: int, before: dict[str, Tensor]) -> None:
        """Write the epoch's line; one that was cut short keeps its sums and gets a fractional number."""
        sums = self.sums
        line = {name: sums[name] / max(sums["count"], 1) for name in METRICS}
        line["D_G_z_std"] = math.sqrt(sums["D_G_z_change²"] / max(sums["changes"], 1) / 2)  # a trend hardly counts
        if self.step > step:  # else nothing could move
            after = positions(self.generator, self.discriminator)
            line |= {name: relative_change(before[name], now) for name, now in after.items()}
        line |= self.epoch_readings()
        if not math.isfinite(line.get("pixel_std_ratio", 0.0)):  # the last update broke G before any loss showed it
            self._diverged("its last batch")
        line["seconds"] = sums["seconds"]
        line["images_per_second"] = sums["images"] / max(sums["seconds"], 1e-9)
        if self.position + self.images_per_iteration > len(self.images):
            self.epoch, self.position, self.sums = self.epoch + 1, 0, self._no_sums()
        line["epoch"] = self.epoch + self.position / len(self.images)
        for name in self.history:
            self.history[name].append(line.get(name))

    def epoch_readings(self) -> dict[str, float]:
        """Return what is read of the networks at the end of an epoch; a recipe adds readings of its samples."""
        return {}

    def _drop_unfinished_line(self) -> None:
        """Remove the line of an epoch that was cut short; it is written anew when the epoch is whole."""
        if self.history["epoch"] and self.history["epoch"][-1] > self.epoch:
            for values in self.history.values():
                values.pop()

    def set_data(self, data: Any = None) -> None:
        """Take training images, see `Sampler.set_data`; other ones than before begin the current epoch anew."""
        changed = self.hold_data(data)
        if self.position and (changed or len(self.images) != self.data_size):
            self._drop_unfinished_line()
            self.position, self.sums, self._rows = 0, self._no_sums(), []
        self.data_size = len(self.images)
