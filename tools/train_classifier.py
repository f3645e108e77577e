"""Train the classifier, the small CNN whose features all scores use, and write data/classifier.safetensors.

    python tools/train_classifier.py            # seeded; at most three minutes on 2 CPU cores

It sees the 60,000 training digits, each time rotated, shifted and scaled a little, so that it also classifies digits
that are drawn somewhat differently, as generated ones are. The last line is the SHA-256 that dcgan/evaluation.py names.
"""

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import dcgan_utils as du


def jitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate each image by up to 12°, scale it by up to 10 % and shift it by up to 2 pixels."""
    n = len(images)
    angle, scale, dx, dy = (torch.rand(4, n, generator=rng) * 2 - 1).unbind()
    angle, scale, dx, dy = angle * math.radians(12), 1 + 0.1 * scale, dx * 4 / 28, dy * 4 / 28
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is background


def accuracy(classifier: du.DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (N, 1, 28, 28) that are classified as their labels (N,)."""
    with du.eval_mode(classifier):
        digits = torch.cat([classifier(part).argmax(dim=1) for part in images.split(500)])
    return digits.eq(labels).float().mean().item()


def train(
    epochs: int, batch_size: int, seed: int, data: tuple[Tensor, Tensor] | None = None
) -> tuple[du.DigitClassifier, float]:
    """Return a classifier and its accuracy on the test digits; data: uint8 images and labels, None for MNIST's."""
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    images, labels = data or du.load_images("mnist", "train")
    test, test_labels = du.load_images("mnist", "test")
    images, test = du.normalize(images), du.normalize(test)
    classifier = du.DigitClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01, fused=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=rng)
        for picked in order.split(batch_size)[:steps]:
            batch = jitter(images[picked], rng).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(classifier(batch), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score, seconds = accuracy(classifier, test, test_labels), time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}: {score:.2%} of the test digits, {seconds:.0f} s")
    return classifier, score


def main() -> None:
    """Train, store half-precision weights, and read them back for the accuracy that is written into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=du.EMBEDDED_MNIST.parent / "classifier.safetensors")
    options = parser.parse_args()
    classifier, _ = train(options.epochs, options.batch_size, options.seed)
    state = {name: value for name, value in classifier.state_dict().items() if value.is_floating_point()}
    small = {name: value.half().contiguous() for name, value in state.items()}
    classifier.load_state_dict({name: value.float() for name, value in small.items()}, strict=False)
    images, labels = du.load_images("mnist", "test")
    score = accuracy(classifier, du.normalize(images), labels)  # of the rounded weights, which is what is shipped
    save_file(small, options.out, metadata={"accuracy": f"{score:.4f}", "seed": str(options.seed)})
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} KiB, {score:.2%} of the 10,000 test digits")
    print(f'CLASSIFIER_SHA256 = "{hashlib.sha256(options.out.read_bytes()).hexdigest()}"')


if __name__ == "__main__":
    main()
