"""Run a study: arms × seeds × a budget; every finished run is one line in results/studies/NAME.jsonl.

    python tools/study.py start                    # goes on where an earlier call stopped
    python tools/study.py losses --seeds 1 2 3 4   # further seeds
    python tools/study.py speed --smoke            # a few iterations of each arm, nothing kept: does it run?
    python tools/study.py --list

A budget is images (`images`), seconds by the clock (`seconds`), or CPU seconds on one thread (`cpu_seconds`). Each line
holds arm, seed, commit, machine, date, images seen, seconds, the scores of the samples and the newest readings. Arms
take turns, seed by seed, so that a machine shared with others is unfair to all alike. RESULTS.md is made from these
lines by tools/results_table.py.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULTS = ROOT / "results" / "studies"
Arm = tuple[type[du.GAN], dict[str, Any]]
READINGS = ("loss_D", "loss_G", "D_x", "D_G_z", "D_acc", "pixel_std_ratio", "nn_distance_ratio")


@dataclass(frozen=True)
class Study:
    """Hold what a study compares, for how long, on what data."""

    arms: dict[str, Arm]
    budget: dict[str, float]
    samples: int = 2000
    threads: int = 0  # 0: as the machine has
    data: Callable[[], Any] = lambda: du.load_images("mnist")
    common: dict[str, Any] = field(default_factory=dict)


NARROW_DCGAN = {"image_size": 32, "ngf": 16, "ndf": 16, "batch_size": 32, "lr_G": 1e-3, "lr_D": 5e-4}
NARROW_STABLE = {"ngf": 8, "ndf": 8, "batch_size": 32, "lr_G": 5e-4, "lr_D": 5e-4}
SMALL = {"image_size": 32, "ngf": 16, "ndf": 16, "batch_size": 64, "num_epochs": 1000}
PLAIN = {  # FastDCGAN with the loss alone changed: no BatchNorm in D, no penalty, hard labels
    "ngf": 16, "ndf": 16, "conditional": False, "gradient_penalty": 0.0, "penalty_interval": 1, "beta1": 0.5,
    "beta2": 0.999, "real_label_smooth": 1.0, "fake_label_smooth": 0.0, "lr_G": 3e-3, "lr_D": 3e-3,
    "lr_schedule": "constant",
}  # fmt: skip
CRITIC = {"gradient_penalty": 10.0, "n_critic": 5, "beta1": 0.0, "beta2": 0.9, "lr_G": 1e-3, "lr_D": 1e-3}
PAIRS = {"gradient_penalty": 0.2, "penalty_interval": 1, "beta1": 0.0, "beta2": 0.99}


def losses() -> dict[str, Arm]:
    """Return an arm for each loss, the same networks."""
    changes = {"bce": {}, "least_squares": {}, "hinge": {}, "wasserstein": CRITIC, "relativistic": PAIRS}
    return {name: (du.FastDCGAN, PLAIN | {"loss": name} | change) for name, change in changes.items()}


def precisions(narrow: bool) -> dict[str, Arm]:
    """Return the two public recipes in float32 and in bf16."""
    kinds = {"DCGAN": (du.DCGAN, NARROW_DCGAN), "StableDCGAN": (du.StableDCGAN, NARROW_STABLE)}
    return {
        f"{name}, {precision}": (kind, (fields if narrow else {"batch_size": 32}) | {"precision": precision})
        for name, (kind, fields) in kinds.items()
        for precision in ("fp32", "bf16")
    }


STUDIES: dict[str, Study] = {
    "start": Study(  # the faithful 64×64 recipe against an output bias that starts at the data's median
        {"faithful": (du.DCGAN, {"init_output_bias": False}), "init_output_bias": (du.DCGAN, {})},
        {"images": 19_200}, common={"ngf": 16, "ndf": 16}),
    "target": Study(  # what DCGAN's G wants D to output, which its README leaves open
        {f"generator_target {t:g}": (du.DCGAN, NARROW_DCGAN | {"generator_target": t}) for t in (1.0, 0.85)},
        {"images": 25_600}, threads=1),
    "precision": Study(precisions(narrow=True), {"images": 25_600}, threads=1),
    "precision_full": Study(precisions(narrow=False), {"images": 15_360}),
    "losses": Study(losses(), {"cpu_seconds": 24}, threads=1),
    "growth": Study(
        {"grows": (du.ProgressiveGAN, SMALL), "full size from the start": (du.ProgressiveGAN, SMALL | {"growth": 0.0}),
         "DCGAN": (du.DCGAN, SMALL | {"lr_G": 1e-3, "lr_D": 5e-4, "ema_decay": 0.99})},
        {"cpu_seconds": 120}, threads=1),
    "conditioning": Study(
        {way: (du.ConditionalDCGAN, NARROW_DCGAN | {"conditioning": way})
         for way in ("projection", "matching", "concatenation", "auxiliary")},
        {"images": 25_600}, threads=1),
    "speed": Study(  # FastDCGAN by the clock
        {"FastDCGAN": (du.FastDCGAN, {}), "FastDCGAN, label-free": (du.FastDCGAN, {"conditional": False})},
        {"seconds": 60}, samples=10_000),
}  # fmt: skip


def commit() -> str:
    """Return the commit that this runs from, with a + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "dcgan"], capture_output=True, text=True).stdout.strip()
    return (name or "unknown") + "+" * bool(changed)


def stamp() -> dict[str, str]:
    """Return commit, machine and date of a run."""
    from benchmark import machine

    return {"commit": commit(), "machine": machine(), "date": date.today().isoformat()}


class StopAtImages(du.Callback):
    """End the run after so many images."""

    def __init__(self, images: float) -> None:
        self.images = images

    def on_batch_end(self, gan: du.GAN) -> None:
        """Stop there."""
        if (gan.step + 1) * gan.images_per_iteration > self.images:
            gan.stop(f"{self.images:,.0f} images")


def run(study: Study, arm: str, seed: int, budget: dict[str, float], samples: int) -> dict[str, Any]:
    """Train one arm with one seed for the budget, and return its line."""
    kind, fields = study.arms[arm]
    gan = kind(seed=seed, **study.common | fields)
    clock = time.process_time if "cpu_seconds" in budget else time.perf_counter
    seconds = budget.get("seconds") or budget.get("cpu_seconds")
    callbacks = [StopAtImages(budget["images"])] if "images" in budget else []
    start = clock()
    with mock.patch.object(time, "perf_counter", clock):  # schedules and limits follow the budget's clock
        gan.train(None if seconds is None else 10_000, data=study.data(), max_seconds=seconds, callbacks=callbacks)
    line = {"arm": arm, "seed": seed, **budget, "images_seen": gan.step * gan.images_per_iteration}
    line |= {"trained_seconds": round(clock() - start, 1), **stamp(), "precision_of_numbers": gan.precision}
    labels = gan.class_labels(samples, None)
    scores = du.score_samples(gan.sample(samples, seed=0), statistics(gan.config.image_size), labels)
    line |= {name: value for name, value in scores.items() if isinstance(value, float | int | str)}
    return line | {name: value for name, value in gan.history.last().items() if name in READINGS}


@functools.cache
def statistics(size: int) -> du.RealStatistics:
    """Return what real digits score at a size, computed once for all arms."""
    return du.RealStatistics(*(du.load_images("mnist", split)[0][:10_000] for split in ("train", "test")), size)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are kept."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    """Run what is not kept yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", help="some of the study's arms (default: all)")
    parser.add_argument("--smoke", action="store_true", help="a few iterations, nothing is kept")
    parser.add_argument("--list", action="store_true", help="print the studies and their arms")
    options = parser.parse_args()
    if options.list or not options.study:
        print("\n".join(f"{name}: {', '.join(study.arms)} ({study.budget})" for name, study in STUDIES.items()))
        return
    study, path = STUDIES[options.study], RESULTS / f"{options.study}.jsonl"
    if study.threads:
        torch.set_num_threads(study.threads)
    budget, samples = ({"images": 256}, 100) if options.smoke else (study.budget, study.samples)
    done = {(line["arm"], line["seed"]) for line in read_lines(path)}
    for seed in options.seeds[:1] if options.smoke else options.seeds:
        for arm in options.arms or study.arms:
            if options.smoke or (arm, seed) not in done:
                line = run(study, arm, seed, budget, samples)
                print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
                if not options.smoke:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
