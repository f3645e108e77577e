"""Train the judge, the small CNN whose features and readings every score uses, and write data/judge.safetensors.

    python tools/train_judge.py            # seeded; at most three minutes on 2 CPU cores

It sees the 60,000 training digits, each time turned, shifted and scaled a little, so that it reads digits that are
drawn somewhat differently, as generated ones are. The last line is the SHA-256 that dcgan_utils.py must name.
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
    """Turn each image by up to 12°, scale it by up to 10 % and shift it by up to 2 pixels."""
    n = len(images)
    angle, scale, dx, dy = (torch.rand(4, n, generator=rng) * 2 - 1).unbind()
    angle, scale, dx, dy = angle * math.radians(12), 1 + 0.1 * scale, dx * 4 / 28, dy * 4 / 28
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is background


def accuracy(judge: du.Judge, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (N, 1, 28, 28) that are read as their labels (N,) say."""
    with du.evaluating(judge):
        return torch.cat([judge(part).argmax(dim=1) for part in images.split(500)]).eq(labels).float().mean().item()


def train(epochs: int, batch_size: int, seed: int, data: tuple[Tensor, Tensor] | None = None) -> tuple[du.Judge, float]:
    """Return a judge and its accuracy on the 10,000 test digits; data: uint8 images and labels, None for MNIST's."""
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    images, labels = data or du.load_images("mnist", "train")
    test, test_labels = du.load_images("mnist", "test")
    images, test = du.normalise(images), du.normalise(test)
    judge = du.Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=rng)
        for picked in order.split(batch_size)[:steps]:
            batch = jitter(images[picked], rng).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(judge(batch), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = accuracy(judge, test, test_labels)
        print(f"epoch {epoch + 1}/{epochs}: {score:.2%} of the test digits, {time.perf_counter() - start:.0f} s")
    return judge, score


def main() -> None:
    """Train, store half-precision weights, and read them back for the accuracy that is written into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=du.EMBEDDED_MNIST.parent / "judge.safetensors")
    options = parser.parse_args()
    judge, _ = train(options.epochs, options.batch_size, options.seed)
    small = {name: value.half().contiguous() for name, value in judge.state_dict().items() if value.is_floating_point()}
    judge.load_state_dict({name: value.float() for name, value in small.items()}, strict=False)
    images, labels = du.load_images("mnist", "test")
    score = accuracy(judge, du.normalise(images), labels)  # of the rounded weights, which is what is shipped
    save_file(small, options.out, metadata={"accuracy": f"{score:.4f}", "seed": str(options.seed)})
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} KiB, {score:.2%} of the 10,000 test digits")
    print(f'JUDGE_SHA256 = "{hashlib.sha256(options.out.read_bytes()).hexdigest()}"')


if __name__ == "__main__":
    main()
