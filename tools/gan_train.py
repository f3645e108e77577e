"""Measure GAN-train (Shmelkov et al. 2018): what a CNN that has seen generated digits alone reads of real test digits.

    python tools/gan_train.py --checkpoint DIR [--epochs 2]     # any class-conditional recipe

The GAN draws 60,000 pairs of image and digit, 6,000 of each. One CNN (the judge's layers, not its weights) is trained
on them, its twin from the same seed on MNIST's 60,000, both with the judge's shifts and turns; both read the 10,000
real test digits. Adds a line to results/conditional/gan_train.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from train_classifier import train  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULT = ROOT / "results" / "conditional" / "gan_train.json"


def pairs(gan: du.GAN, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n generated images uint8 (n, 28, 28) and the digits (n,) that were asked for, all alike often."""
    if not gan.config.conditional:
        raise ValueError(f"{type(gan).__name__} cannot be asked for a digit; GAN-train needs a class-conditional GAN")
    digits = torch.arange(n) % gan.config.num_classes
    images = [
        du.resize_images(du.to_uint8(gan.generate(z, part)), 28)
        for z, part in zip(gan.latent(n, seed).split(5000), digits.split(5000), strict=True)
    ]
    return torch.cat(images), digits


def measure(gan: du.GAN, n: int, epochs: int, seed: int) -> dict[str, float]:
    """Return the accuracy on real test digits after n generated pairs and after n real ones."""
    images, labels = du.load_images("mnist", "train")
    generated = train(epochs, 128, seed, pairs(gan, n, seed))[1]
    return {"generated": generated, "real": train(epochs, 128, seed, (images[:n], labels[:n]))[1]}


def main() -> None:
    """Load, measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--n", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, gan = time.process_time(), du.GAN.load(options.checkpoint)
    found = measure(gan, options.n, options.epochs, options.seed)
    line = {"recipe": gan.recipe, "conditioning": gan.config.conditioning, "seed_of_gan": gan.config.seed}
    line |= {"gan_epochs": gan.history["epoch"][-1], "n": options.n, "cnn_epochs": options.epochs, **found}
    line["cpu_seconds"] = round(time.process_time() - start)
    kept = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    du.prepare_file(RESULT).write_text(json.dumps([*kept, line], indent=1))
    print(f"real test digits read right: {found['generated']:.2%} after generated, {found['real']:.2%} after real")


if __name__ == "__main__":
    main()
