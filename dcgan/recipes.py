"""The classes that one imports: networks and numbers of each recipe, tied to pictures, health, evaluation and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .acceleration import Accelerated
from .callbacks import BatchLines, EpochReport, ProgressBar, SaveGrids, StopAt, Tracker, frames_folder, save_frame
from .checkpoints import CheckpointError, newest_checkpoint, read_checkpoint, restore, save_checkpoint
from .config import MACHINE_FIELDS, Config, config_from_record, configure, nearest_name, parse_fields
from .data import as_images
from .evaluation import (
    MIN_SAMPLES,
    EvaluateEachEpoch,
    RealStatistics,
    Scores,
    fixed_sample_scores,
    inception_distance,
    real_images,
    real_statistics,
    score_samples,
)
from .health import DCGAN_BANDS, STABLE_BANDS, Band, Diagnosis, diagnose, sample_readings
from .history import Callback, History
from .losses import gradient_norms
from .networks import (
    DCGANDiscriminator,
    DCGANGenerator,
    FastDiscriminator,
    FastGenerator,
    ProgressiveDiscriminator,
    ProgressiveGenerator,
    StableDiscriminator,
    StableGenerator,
)
from .plots import plot_history, plot_images, save_picture
from .sampling import FIXED_SAMPLES, eval_mode
from .training import Trainer


class GAN(Trainer):
    """Add pictures, health, evaluation and files to the training loop; the recipes below add networks and numbers."""

    engine_type = Accelerated
    bands: tuple[Band, ...] = ()  # what the recipe's README says of D's outputs

    @property
    def folder(self) -> Path:
        """Return the folder of this recipe's pictures."""
        return Path(self.config.out_dir) / self.recipe

    @property
    def frames(self) -> Path:
        """Return the folder of the saved grids of this run, for `make_animation`."""
        return frames_folder(self)

    def default_callbacks(self) -> list[Callback]:
        """Return progress bar, scores of the fixed samples, epoch report and saved grids."""
        scores = [EvaluateEachEpoch(FIXED_SAMPLES, distances=False)] if self.config.channels == 1 else []
        shown = [*scores, ProgressBar(), EpochReport(), SaveGrids()]
        return [*shown, Tracker(self.config.tracker)] if self.config.tracker else shown

    def epoch_readings(self) -> dict[str, float]:
        """Return what is read of the samples, and the norm of D's gradient where it is penalized."""
        readings = sample_readings(self)
        return readings | ({"gradient_norm": self.gradient_norm()} if self.config.gradient_penalty else {})

    def gradient_norm(self, n: int = 128) -> float:
        """Return the mean norm of D's gradient halfway between n training images and fixed samples."""
        real = self.real_samples(n)
        between = (real + self.fixed_samples(len(real))).div(2).to(self.device)
        labels = self.class_labels(len(real), None)
        with eval_mode(self.discriminator), torch.enable_grad():
            return gradient_norms(self.discriminator, between, labels).mean().item()

    def diagnose(self) -> Diagnosis:
        """Return the health panel of the newest epoch, with the recipe's own bands."""
        return diagnose(self.history, self.config, self.bands)

    def real_statistics(self) -> RealStatistics:
        """Return what real images score, computed once for the data of this GAN."""
        return real_statistics(self)

    def evaluate(self, n: int = 10_000, seed: int = 0, inception: bool = False) -> Scores:
        """Return the scores of n new samples beside those of real images; prints nothing, `print(scores)` a table.

        They are compared with the test images of the data that the GAN was trained on; of images without a test split,
        with one half of them. inception: add the usual FID where its weights can be had. Raises ValueError.
        """
        if n < MIN_SAMPLES:
            raise ValueError(f"n = {n}; these scores need at least {MIN_SAMPLES} samples")
        samples = self.sample(n, seed=seed)
        scores = score_samples(samples, self.real_statistics(), self.class_labels(n, None))
        if inception:
            scores["inception_fid"] = inception_distance(samples, real_images(self)[1])
        return scores

    def evaluate_fixed_samples(self, n: int, distances: bool = True) -> dict[str, float]:
        """Return scores of n fixed samples, see `fixed_sample_scores`."""
        return fixed_sample_scores(self, n, distances)

    def generate_images(self, epoch: int | str | None = None, n: int = 36) -> Figure:
        """Return a figure of n fixed samples, also saved under out_dir: a frame for a number, images_NAME.png else."""
        title = f"epoch {epoch}" if epoch is not None else f"after {self.history.last().get('epoch', 0):.4g} epochs"
        figure = plot_images(self.fixed_samples(n), f"{type(self).__name__}, {title}", columns=math.ceil(math.sqrt(n)))
        if isinstance(epoch, int):
            save_frame(self, figure, epoch)
        else:
            save_picture(figure, self.folder / f"images_{epoch or 'now'}.png")
        return figure

    def plot_history(self, history: History | None = None) -> Figure:
        """Return the figure of losses, D's outputs and the samples' variety over the epochs."""
        return plot_history(history or self.history)

    def save(self, path: str | Path) -> Path:
        """Save networks, optimizers, average, random state, config and history into a folder; raises OSError."""
        return save_checkpoint(self, path)

    @classmethod
    def load(cls, path: str | Path, /, **overrides: Any) -> GAN:
        """Return the GAN of a checkpoint, ready to sample or train on; `GAN.load` takes any recipe.

        overrides: Config fields that may change, such as device, out_dir or lr_D. Raises ValueError for others,
        FileNotFoundError, and CheckpointError for a damaged, newer or other recipe's checkpoint.
        """
        path = newest_checkpoint(path)
        record, tensors = read_checkpoint(path)
        recipe = str(record.get("recipe"))
        kind = RECIPES.get(recipe)
        if kind is None:
            raise CheckpointError(f"{path} is of recipe {recipe!r}{nearest_name(recipe, list(RECIPES))}")
        if not issubclass(kind, cls):
            if not issubclass(cls, kind):
                raise CheckpointError(f"{path} is a {kind.__name__}, not a {cls.__name__}; use {kind.__name__}.load")
            kind = cls  # a variant of one's own keeps its networks and its loss
        machine = {name: overrides.pop(name, getattr(cls.defaults, name)) for name in MACHINE_FIELDS}
        try:
            gan = kind(configure(config_from_record(record.get("config", {})), **machine))
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} has a config that does not fit: {error}") from error
        restore(gan, record, tensors)
        gan.reconfigure(**overrides)
        gan.last_checkpoint = path
        return gan

    @classmethod
    def replay(cls, text: str, data: Any = "mnist") -> GAN:
        """Return the GAN of a run that `run_text` wrote as one line, trained to its end on the same data.

        data: what `train` takes; as many images as the line says are taken from its beginning. Raises ValueError for a
        line or data that do not fit.
        """
        (recipe, *fields), *acts = (part.split() or [""] for part in text.split("|"))
        if recipe not in RECIPES:
            raise ValueError(f"{text!r} names no recipe{nearest_name(recipe, list(RECIPES))}")
        if not all(step.isdecimal() for step, *_ in acts):
            raise ValueError(f"{text!r}: after each | stands an iteration, then FIELD=VALUE")
        fields = parse_fields(fields)
        n, kind, (images, labels) = fields.pop("images", 0), RECIPES[recipe], as_images(data)
        if not 0 < n <= len(images):
            raise ValueError(f"the run was made with {n:,} images, the data hold {len(images):,}")
        gan, data = kind(configure(kind.defaults, **fields)), (images[:n], labels[:n])
        for step, *changes in acts:
            while gan.step < int(step):
                gan.train(1, data=data, callbacks=[StopAt(int(step))])
            gan.reconfigure(**parse_fields(changes))
        return gan


def check_power_of_two(kind: type[Trainer], size: int) -> None:
    """Raise ValueError unless size is 16, 32, 64, …, as networks that double from 4×4 make."""
    if size & (size - 1):
        below = 2 ** int(math.log2(size))
        raise ValueError(f"image_size = {size}: {kind.__name__} doubles from 4×4; use {below} or {2 * below}")


def check_multiple_of_four(kind: type[Trainer], size: int) -> None:
    """Raise ValueError unless size is a multiple of 4, as networks that double twice make."""
    if size % 4:
        below = size // 4 * 4
        raise ValueError(
            f"image_size = {size}: {kind.__name__} makes multiples of 4; the nearest are {below} and {below + 4}"
        )


class DCGAN(GAN):
    """The 64×64 recipe of *DCGAN for MNIST Digit Generation* (PyTorch): BatchNorm in G and D, labels 0.85 and 0.2."""

    recipe = "dcgan"
    networks = (DCGANGenerator, DCGANDiscriminator)
    bands = DCGAN_BANDS
    check_image_size = classmethod(check_power_of_two)


class ConditionalDCGAN(DCGAN):
    """The 64×64 recipe made to draw the digit one asks for; `conditioning` chooses how D sees the label."""

    recipe = "conditional"
    defaults = Config(conditional=True)

    def generate_images(self, epoch: int | str | None = None, n: int = 100) -> Figure:
        """Return a figure of n fixed samples, a column for each digit, saved as the other recipes save theirs."""
        return super().generate_images(epoch, n)


class StableDCGAN(GAN):
    """The 28×28 recipe of *Stable DCGAN for MNIST Digit Generation* (TensorFlow), rebuilt: labels 0.9 and 0, Dropout.

    G has 2,330,944 parameters, D 212,865.
    """

    recipe = "stable"
    networks = (StableGenerator, StableDiscriminator)
    bands = STABLE_BANDS
    check_image_size = classmethod(check_multiple_of_four)
    defaults = Config(
        image_size=28,
        num_epochs=40,
        lr_G=1e-4,  # the README leaves it open
        lr_D=1e-4,
        adam_eps=1e-7,  # TensorFlow's default
        real_label_smooth=0.9,  # one-sided smoothing (Salimans et al. 2016)
        fake_label_smooth=0.0,
        dropout_D=0.3,
        init_output_bias=False,  # no biases in G: the parameter count is the README's
        save_every=5,
    )

    def default_callbacks(self) -> list[Callback]:
        """Return what every recipe shows, with the lines and blocks of this recipe's README."""
        return [BatchLines(), *super().default_callbacks()]


class FastDCGAN(GAN):
    """Ours: digits in seconds, of the class one asks for; `conditional=False` for the label-free one.

    Each choice was tried at equal time: see docs/fastdcgan.md and notebook 10.
    """

    recipe = "fast"
    networks = (FastGenerator, FastDiscriminator)
    check_image_size = classmethod(check_multiple_of_four)
    defaults = Config(
        image_size=28,
        nz=64,
        ngf=32,
        ndf=32,
        conditional=True,  # one chooses the digit, and labels speed learning up
        conditioning="matching",  # fewer than one misread sample in a hundred in place of three
        matching_weight=0.25,  # half of the usual: more variety early on, and 99 % still read as the class asked for
        matching_decay=True,  # a steady weight gains less recall the longer one trains
        batch_size=64,  # twice the updates for the same images
        num_epochs=6,
        lr_G=3e-3,  # fifteen times DCGAN's: small networks bear it, and the schedule ends at 0
        lr_D=3e-3,
        lr_schedule="constant_then_linear",
        beta1=0.0,  # no momentum: better in every score once a penalty bounds D's gradient
        beta2=0.99,
        loss="relativistic",  # with the penalty: variety near that of real digits
        gradient_penalty=0.2,
        penalty_interval=8,  # a penalty costs as much as D's whole step, and a lazy one does as well
        batch_norm_D=False,  # the penalty takes its place
        ema_decay=0.99,  # averages out the last steps' noise
    )


class WGANGP(GAN):
    """A Wasserstein GAN with gradient penalty (Gulrajani et al. 2017): D is a critic with five steps to one of G."""

    recipe = "wgan-gp"
    networks = (FastGenerator, FastDiscriminator)
    check_image_size = classmethod(check_multiple_of_four)
    defaults = Config(
        image_size=28,
        ngf=32,
        ndf=32,
        num_epochs=20,
        loss="wasserstein",
        gradient_penalty=10.0,
        batch_norm_D=False,  # the penalty is on D's gradient at one image, which BatchNorm ties to its whole batch
        n_critic=5,  # the estimate is one only while the critic is near its best
        lr_G=2e-4,
        lr_D=2e-4,
        beta1=0.0,  # ibid., algorithm 1
        beta2=0.9,
    )


class ProgressiveGAN(GAN):
    """Grow from 4×4 to full size, each size faded in (Karras et al. 2018)."""

    recipe = "progressive"
    networks = (ProgressiveGenerator, ProgressiveDiscriminator)
    check_image_size = classmethod(check_power_of_two)
    defaults = Config(
        image_size=32,
        num_epochs=10,
        lr_G=1e-3,  # ibid., appendix A
        lr_D=1e-3,
        beta1=0.0,
        beta2=0.99,
        real_label_smooth=0.9,
        fake_label_smooth=0.0,
        ema_decay=0.99,
    )


RECIPES: dict[str, type[GAN]] = {
    kind.recipe: kind for kind in (DCGAN, StableDCGAN, FastDCGAN, ConditionalDCGAN, WGANGP, ProgressiveGAN)
}
