"""Train healthy GANs and GANs that were broken on purpose, and say how often the health panel names what is wrong.

    python tools/failure_runs.py                     # seeds that set no threshold; 15 minutes on 2 CPU cores
    python tools/failure_runs.py --replay            # read the kept histories again; seconds

Narrow networks (16 channels, `StableDCGAN` 8) on 28×28 digits (`DCGAN`: 32×32, since it doubles from 4×4), 3,200
training digits an epoch, batches of 32. Every run is known to be healthy or to carry one fault. Histories are kept in
results/health/SET.json.gz; SET.json holds what the panel said of them: which finding it called the cause, how many
faults it named within one epoch of their onset, how many healthy epochs it called red. The thresholds in
dcgan_utils.py were set on the set `tuning` alone; `judged`, of other seeds, is what the README quotes.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULTS = ROOT / "results" / "health"
CODE = b"".join(path.read_bytes() for path in [Path(__file__), *sorted((ROOT / "dcgan").glob("*.py"))])
SOURCES = hashlib.sha256(CODE).hexdigest()[:8]
SETS = {"tuning": (range(0, 3), range(0, 2)), "judged": (range(200, 206), range(200, 202))}  # healthy, faulty seeds
IMAGES, HEALTHY_EPOCHS, FAULTY_EPOCHS = 4000, 6, 2
NARROW = {  # a quarter of the width bears, and in so few batches needs, five times the learning rates
    du.DCGAN: {"image_size": 32, "ngf": 16, "ndf": 16, "lr_G": 1e-3, "lr_D": 5e-4},
    du.StableDCGAN: {"ngf": 8, "ndf": 8, "lr_G": 5e-4, "lr_D": 5e-4},
    du.FastDCGAN: {"ngf": 16, "ndf": 16, "matching_weight": 0.15, "matching_decay": False},  # as it was when they ran
}


@dataclass(frozen=True)
class Fault:
    """One way to break a GAN: Config changes, other networks or another loss, or an act while it trains."""

    names: tuple[str, ...]  # the findings that name it rightly; the panel's cause must be one of them
    changes: Callable[[du.Config], dict] = lambda config: {}
    wrap: Callable[[type[du.GAN]], type[du.GAN]] = lambda kind: kind
    callbacks: tuple[Callable[[], du.Callback], ...] = ()
    onset: float = 0.0  # epochs before it begins
    recipes: tuple[type[du.GAN], ...] = tuple(NARROW)
    harmless: tuple[type[du.GAN], ...] = ()  # on the tuning seeds their distance stayed below 1.5 × healthy runs'


class Repeater(nn.Module):
    """Stand in for a generator that knows only some images and says one of them whatever z is."""

    def __init__(self, config: du.Config, bank: Tensor) -> None:
        super().__init__()
        self.register_buffer("bank", du.normalize(du.resize_images(bank, config.image_size)))
        self.gray = nn.Parameter(torch.zeros(()))  # something that the optimizer can move
        self.layers = nn.Sequential(nn.Conv2d(1, 1, 1))  # where init_output_bias looks for a bias

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images of the bank, chosen by z."""
        pick = (z[:, 0].mul(0.7071).erf().add(1).div(2) * len(self.bank)).long().clamp(0, len(self.bank) - 1)
        return self.bank[pick] + 0.01 * self.gray.tanh()


class SwappedLabels:
    """Take real for 0 and fake for 1 in D's loss, whichever it is; G's stays right."""

    def __init__(self, config: du.Config) -> None:
        self.right = du.LOSSES[config.loss](config)
        self.generator = self.right.generator

    def __getattr__(self, name: str) -> object:
        """Return everything else as the right loss has it."""
        return getattr(self.right, name)

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the loss of the wrong way round."""
        return self.right.discriminator(fake_logits, real_logits)


class LeftInEval(du.Callback):
    """Put G into eval mode before every batch, as who samples from it and forgets `train()`."""

    def on_train_begin(self, gan: du.Trainer) -> None:
        """Keep G from ever going back."""
        gan.generator.train = lambda mode=True: gan.generator
        gan.generator.eval()
        for module in gan.generator.modules():
            module.training = False


class NaNInG(du.Callback):
    """Write NaN into one of G's weights in the middle of the second epoch."""

    def on_batch_end(self, gan: du.Trainer) -> None:
        """Do it once."""
        if gan.epoch == 1 and gan.batch == 20:
            weight = next(gan.generator.parameters()).data
            weight[(0,) * weight.ndim] = math.nan


def repeating(pick: Callable[[Tensor, Tensor], Tensor]) -> Callable[[type[du.GAN]], type[du.GAN]]:
    """Return what gives a recipe a generator that repeats the images which `pick` takes from (images, labels)."""

    def wrap(kind: type[du.GAN]) -> type[du.GAN]:
        """Return the recipe with such a generator."""
        bank = pick(*_digits())

        class Repeating(kind):
            """Repeat."""

            networks = (lambda config: Repeater(config, bank), kind.networks[1])

        return Repeating

    return wrap


def swapped(kind: type[du.GAN]) -> type[du.GAN]:
    """Return the recipe with real and fake swapped in D's loss."""

    class Swapped(kind):
        """Swap."""

        losses = SwappedLabels

    return Swapped


COLLAPSE = ("sample diversity", "copies among samples", "classes")
TOO_FAST_D = ("D too strong", "oscillation", *COLLAPSE)
TOO_FAST_G = ("D too weak", "D too strong", *COLLAPSE)  # noise for G's pictures, which D then tells apart easily
FAULTS: dict[str, Fault] = {
    "lr_D × 20": Fault(TOO_FAST_D, lambda c: {"lr_D": 20 * c.lr_D}, harmless=(du.DCGAN, du.StableDCGAN)),
    "lr_D × 100": Fault(TOO_FAST_D, lambda c: {"lr_D": 100 * c.lr_D}, recipes=(du.StableDCGAN, du.FastDCGAN)),
    "lr_G × 20": Fault(TOO_FAST_G, lambda c: {"lr_G": 20 * c.lr_G}, harmless=(du.DCGAN,)),
    "lr_G × 100": Fault(TOO_FAST_G, lambda c: {"lr_G": 100 * c.lr_G}, recipes=(du.StableDCGAN, du.FastDCGAN)),
    "no BatchNorm": Fault(
        ("G's gradient", *COLLAPSE),
        lambda c: {"batch_norm_G": False, "batch_norm_D": False},
        harmless=(du.StableDCGAN, du.FastDCGAN),
    ),
    "D frozen": Fault(("a player stands still",), lambda c: {"n_critic": 0}),
    "G frozen": Fault(("a player stands still",), lambda c: {"g_steps": 0}),
    "beta1 0.9, lr × 10": Fault(
        ("oscillation", "D too strong", *COLLAPSE), lambda c: {"beta1": 0.9, "lr_G": 10 * c.lr_G, "lr_D": 10 * c.lr_D}
    ),
    "labels swapped": Fault(("labels",), wrap=swapped),
    "no detach": Fault(("detach",), lambda c: {"detach": False}),
    "tiny latent": Fault(("copies among samples",), lambda c: {"nz": 1}),
    "one image": Fault(COLLAPSE, wrap=repeating(lambda images, labels: images[:1])),
    "one class": Fault(("classes",), wrap=repeating(lambda images, labels: images[labels == 3])),
    "copies of the data": Fault(("memorization",), wrap=repeating(lambda images, labels: images[:IMAGES])),
    "NaN in G": Fault(("losses are numbers",), callbacks=(NaNInG,), onset=1.0),
    "G left in eval mode": Fault(("BatchNorm",), callbacks=(LeftInEval,)),
}


def _digits() -> tuple[Tensor, Tensor]:
    """Return the 60,000 training digits."""
    images = du.read_idx(du.EMBEDDED_MNIST / "train-images-idx3-ubyte.gz")
    return images, du.read_idx(du.EMBEDDED_MNIST / "train-labels-idx1-ubyte.gz").long()


def run(kind: type[du.GAN], name: str | None, seed: int) -> dict:
    """Train one GAN, healthy (name None) or with one fault, and return what is known of it and its history."""
    torch.set_num_threads(1)
    fault = FAULTS.get(name, Fault(()))
    config = kind.resolve(**NARROW[kind], batch_size=32, num_epochs=HEALTHY_EPOCHS, seed=seed, log_every=25)
    gan = fault.wrap(kind)(du.configure(config, **fault.changes(config)))
    callbacks = [*(make() for make in fault.callbacks), du.EvaluateEachEpoch(500)]
    data = tuple(part[:IMAGES] for part in _digits())
    with contextlib.suppress(du.DivergenceError):  # it is in the history
        gan.train(FAULTY_EPOCHS if name else None, data=data, callbacks=callbacks)
    return {"recipe": kind.recipe, "fault": name, "seed": seed, "history": gan.history.to_json()}


def panels(record: dict) -> list[du.Diagnosis]:
    """Return what the panel said after each epoch of a kept run, and at the end."""
    history = du.History.from_json(record["history"])
    kind = du.RECIPES[record["recipe"]]
    said = [du.diagnose(history.until(k), bands=kind.bands) for k in range(1, len(history["epoch"]) + 1)]
    return [*said, du.diagnose(history, bands=kind.bands)] if not history.finite() else said


def _job(arguments: tuple[str, str | None, int]) -> dict:
    """Run one, or read what an earlier start of this tool has left of it."""
    recipe, name, seed = arguments
    kept = ROOT / "outputs" / "failure_runs" / SOURCES / f"{recipe}-{name or 'healthy'}-{seed}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    start = time.perf_counter()
    record = run(du.RECIPES[recipe], name, seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(record))
    print(f"{recipe:7} {name or 'healthy':20} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return record


def jobs(healthy: range, faulty: range) -> list[tuple[str, str | None, int]]:
    """Return all runs of a set."""
    well = [(kind.recipe, None, seed) for kind in NARROW for seed in healthy]
    return well + [(kind.recipe, name, seed) for name, f in FAULTS.items() for kind in f.recipes for seed in faulty]


def title(record: dict) -> str:
    """Return the row of the table that a run belongs to."""
    if record["fault"] is None:
        return "healthy"
    harmless = du.RECIPES[record["recipe"]] in FAULTS[record["fault"]].harmless
    return record["fault"] + (", harmless" if harmless else "")


def count(records: list[dict]) -> dict:
    """Return the figures: what the panel named as the cause of each fault, when, and how often it was right."""
    causes, remedies, delays = defaultdict(Counter), defaultdict(Counter), defaultdict(list)
    statuses = Counter()
    for record in records:
        said, row = panels(record), title(record)
        named = [panel.cause.name if panel.cause else "nothing red" for panel in said]
        if row not in FAULTS:
            causes[row].update(named)
            statuses.update(panel.status for panel in said if row == "healthy")
            continue
        if said[-1].cause:
            remedies[row][", ".join(said[-1].cause.changes) or "mend the code"] += 1
        fault = FAULTS[row]
        # within one epoch of the onset: what stands in the first panel after one whole epoch with the fault
        late = next((k for k, name in enumerate(named) if name in fault.names), None)
        first = next(k for k, p in enumerate(said) if p.epoch >= fault.onset + 1 or k == len(said) - 1)
        delays[row].append(None if late is None else said[late].epoch - fault.onset)
        causes[row][named[first] + ("" if late is not None and late <= first else " ✗")] += 1
    return {
        "faulty": sum(map(len, delays.values())),
        "named": sum(n for row in delays for name, n in causes[row].items() if not name.endswith("✗")),
        "healthy_epochs": statuses.total(),
        "red_healthy_epochs": statuses["red"],
        "yellow_healthy_epochs": statuses["yellow"],
        "confusion": {row: dict(counter) for row, counter in causes.items()},
        "remedies": {row: dict(counter) for row, counter in remedies.items()},  # fields, of runs red at their end
        "epochs_to_detection": dict(delays),
    }


def harm(records: list[dict]) -> dict[str, dict[str, float]]:
    """Return by fault and recipe how many times farther from real digits its samples are than those of healthy runs.

    Fréchet distances at the end of the faulty runs, medians over the seeds; a run that broke off has none.
    """
    distances = defaultdict(list)
    for record in records:
        epochs = du.History.from_json(record["history"])["frechet"]
        if len(epochs) >= FAULTY_EPOCHS:
            distances[title(record), record["recipe"]].append(epochs[FAULTY_EPOCHS - 1])
    median = {run: statistics.median(values) for run, values in distances.items()}
    ratios = defaultdict(dict)
    for (row, recipe), value in median.items():
        if row != "healthy" and ("healthy", recipe) in median:
            ratios[row][recipe] = round(value / median["healthy", recipe], 2)
    return dict(ratios)


def report(records: list[dict]) -> dict:
    """Print the confusion table and return the figures."""
    figures = count(records) | {"distance_beside_healthy": harm(records)}
    for name, causes in figures["confusion"].items():
        print(f"{name:22} " + ", ".join(f"{cause}: {n}" for cause, n in Counter(causes).most_common()))
    for name, ratios in figures["distance_beside_healthy"].items():
        print(f"{name:22} Fréchet distance over healthy runs':", ", ".join(f"{k} {v:g}" for k, v in ratios.items()))
    print(f"named within one epoch of the onset: {figures['named']} of {figures['faulty']}")
    epochs = figures["healthy_epochs"]
    print(
        f"healthy epochs red: {figures['red_healthy_epochs']} of {epochs}, yellow: {figures['yellow_healthy_epochs']}"
    )
    return figures


def main() -> None:
    """Run or replay a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="judged", dest="which")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay", action="store_true", help="read the kept histories, train nothing")
    options = parser.parse_args()
    path = RESULTS / f"{options.which}.json.gz"
    start = time.perf_counter()
    if options.replay:
        records = json.loads(gzip.decompress(path.read_bytes()))
    else:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            records = pool.map(_job, jobs(*SETS[options.which]), chunksize=1)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(records).encode(), mtime=0))
    figures = report(records)
    if not options.replay:
        (RESULTS / f"{options.which}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    minutes, size = (time.perf_counter() - start) / 60, path.stat().st_size / 1024
    print(f"{len(records)} runs in {minutes:.1f} minutes, {size:.0f} KiB")


if __name__ == "__main__":
    main()
