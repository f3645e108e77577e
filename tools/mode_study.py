"""Train on stacked MNIST and count the 1000 modes that each recipe finds; at most 60 CPU minutes a run.

    python tools/mode_study.py                  # all recipes; goes on from the last checkpoint of each
    python tools/mode_study.py --recipes ours   # one of them
    python tools/mode_study.py --table          # writes results/modes/table.md anew

Protocol (Srivastava et al. 2017; Lin et al. 2018): three random training digits as the channels of one 28×28 image,
128,000 of them; 26,000 samples, each channel read by a classifier; modes found of 1000, and the Kullback-Leibler
divergence to equally frequent modes. After every epoch 5,000 samples are read for the course. One thread; CPU time is
that of training alone. Leaves results/modes: runs.json, table.md, a picture of samples for each recipe.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULTS, RUNS = ROOT / "results" / "modes", ROOT / "outputs" / "modes"
SAMPLES = 26_000
NARROW = {"image_size": 32, "ngf": 32, "ndf": 32, "batch_size": 64, "channels": 3}
OURS = {
    "conditional": False, "channels": 3, "nz": 128, "loss": "relativistic", "gradient_penalty": 0.2, "penalty_every": 8,
    "batch_norm_D": False, "lr_G": 1e-3, "lr_D": 1e-3, "beta1": 0.5,
}  # fmt: skip
RECIPES: dict[str, tuple[str, type[du.GAN], dict[str, Any], int]] = {  # what it is, how made, epochs
    "dcgan": ("`DCGAN` at 32×32, ngf = ndf = 32", du.DCGAN, NARROW, 1),
    "pacgan2": ("the same, D judges pairs of images (PacGAN-2)", du.DCGAN, {**NARROW, "pack": 2}, 1),
    "ours": ("`FastDCGAN`, label-free, relativistic with R1 + R2", du.FastDCGAN, OURS, 6),
}
PUBLISHED = (  # modes, KL; 26,000 samples, all of 28×28×3
    ("DCGAN", "99", "3.40", "PacGAN 2018"), ("ALI", "16", "5.40", "PacGAN 2018"),
    ("Unrolled GAN", "48.7", "4.32", "PacGAN 2018"), ("VEEGAN", "150", "2.95", "PacGAN 2018"),
    ("PacDCGAN2", "1000", "0.06", "PacGAN 2018"), ("PresGAN", "1000", "0.12", "PresGAN 2019"),
    ("WGAN-GP", "959", "0.73", "as cited by R3GAN 2024"), ("StyleGAN2", "940", "0.42", "as cited by R3GAN 2024"),
    ("R3GAN", "1000", "0.029", "R3GAN 2024"),
)  # fmt: skip


class Course(du.Callback):
    """Note the CPU time and the modes among 5,000 samples after every epoch, in the history that checkpoints keep."""

    def on_train_begin(self, gan: du.GAN) -> None:
        """Start the clock where the checkpoint stopped it."""
        self.start = time.process_time() - (gan.history.last().get("cpu_seconds") or 0.0)

    def on_epoch_end(self, gan: du.GAN) -> None:
        """Read the samples with the clock stopped."""
        now = time.process_time()
        seen = {"cpu_seconds": now - self.start, **du.mode_coverage(gan.sample(5_000, seed=1))}
        for name, value in seen.items():
            gan.history.record(name, value)
        print(f"{gan.recipe} pack {gan.config.pack}, epoch {gan.epoch}: {seen['cpu_seconds'] / 60:.1f} CPU minutes, "
              f"{seen['modes']} modes among 5,000 samples, KL {seen['kl']:.3f}", flush=True)  # fmt: skip
        self.start += time.process_time() - now


def run(name: str, epochs: int | None = None) -> dict[str, Any]:
    """Train one recipe, or go on where it was stopped, and return what its samples show."""
    _, kind, config, all_epochs = RECIPES[name]
    folder = RUNS / name
    if list(folder.glob("epoch-*/state.json")):
        gan = du.GAN.load(folder)
    else:
        gan = kind(num_epochs=epochs or all_epochs, **config)
    if gan.epoch < gan.config.num_epochs or gan.position:
        gan.train(data=du.stacked_mnist(), callbacks=[Course(), du.SaveCheckpoints(folder)])
    du.save_picture(du.plot_images(gan.fixed_samples(48), RECIPES[name][0], columns=12), RESULTS / f"{name}.png")
    last, history = gan.history.last(), gan.history
    course = {key: history[key] for key in ("epoch", "cpu_seconds", "modes", "kl", "diversity", "images_per_second")}
    numbers = {**du.mode_coverage(gan.sample(SAMPLES, seed=0)), "cpu_minutes": last["cpu_seconds"] / 60}
    return {"config": config, "epochs": gan.epoch, **numbers, "course": course}


def ceiling() -> dict[str, Any]:
    """Return what as many stacks of real test digits score."""
    return du.mode_coverage(du.normalise(du.stacked_mnist(SAMPLES, "test", seed=1)[0]))


def table(record: dict[str, Any]) -> str:
    """Return what was measured, with the published figures below."""
    lines = ["| recipe | epochs of 128,000 | CPU minutes | modes of 1000 | KL ↓ |", "|---|---|---|---|---|"]
    for name, found in record["runs"].items():
        cells = (found["epochs"], f"{found['cpu_minutes']:.0f}", found["modes"], f"{found['kl']:.3f}")
        lines.append(f"| {RECIPES[name][0]} | " + " | ".join(map(str, cells)) + " |")
    real = record["real"]
    lines += [f"| real test digits | | | {real['modes']} | {real['kl']:.3f} |", "", "Published:", ""]
    lines += ["| recipe | modes | KL | from |", "|---|---|---|---|", *(f"| {' | '.join(line)} |" for line in PUBLISHED)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for; every finished run is kept at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--epochs", type=int, help="in place of each recipe's own, for a trial")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / "runs.json"
    for name in options.recipes if not options.table else []:
        found = run(name, options.epochs)
        record = json.loads(kept.read_text()) if kept.is_file() else {"real": ceiling(), "runs": {}}  # read anew: two
        record["runs"][name] = found  # recipes may run side by side
        du.prepare_file(kept).write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {found['modes']} modes, KL {found['kl']:.3f}, {found['cpu_minutes']:.1f} CPU minutes")
    (RESULTS / "table.md").write_text(table(json.loads(kept.read_text())))


if __name__ == "__main__":
    main()
