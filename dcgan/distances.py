"""Distances between two sets of feature vectors: Fréchet, kernel (KID), precision, recall, density and coverage."""

from __future__ import annotations

import torch
from torch import Tensor

from .randomness import make_generator


def frechet_distance(fake: Tensor, real: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017).

    ‖μ₁ - μ₂‖² + tr Σ₁ + tr Σ₂ - 2 tr √(Σ₁Σ₂); the last trace is the sum of √λ over the eigenvalues λ of √Σ₁ Σ₂ √Σ₁.
    It falls with n: compare only distances of equally many samples. Raises ValueError for n or m < 2.
    """
    fake, real = float64_points(fake, real, needed=2)
    first, second = (points.T.cov().view(2 * points.shape[1:]) for points in (fake, real))  # (d, d) also for d = 1
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    shift = (fake.mean(dim=0) - real.mean(dim=0)).square().sum()
    return (shift + first.trace() + second.trace() - 2 * cross).clamp(min=0).item()


def kernel_distance(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """Return KID of features (n, d) and (m, d), the mean over ten disjoint random subsets, and its standard error.

    KID is the unbiased squared MMD under the kernel (x·y / d + 1)³ (Bińkowski et al. 2018, §4), so it can be slightly
    negative. Raises ValueError for n or m < 20.
    """
    fake, real = float64_points(fake, real, needed=20)
    n, rng, values = min(len(fake), len(real)) // 10, make_generator(0), []
    x_parts, y_parts = (p[torch.randperm(len(p), generator=rng)[: 10 * n]].split(n) for p in (fake, real))
    for x, y in zip(x_parts, y_parts, strict=True):
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()  # without each point's kernel with itself
        values.append(within / (n * (n - 1)) - 2 * xy.mean())
    return torch.stack(values).mean().item(), torch.stack(values).std().item() / 10**0.5


def float64_points(fake: Tensor, real: Tensor, needed: int) -> tuple[Tensor, Tensor]:
    """Return both sets of features as float64 on the CPU; raises ValueError unless both have `needed` points."""
    if min(len(fake), len(real)) < needed:
        raise ValueError(f"{len(fake)} and {len(real)} points; this metric needs at least {needed} of each")
    return fake.cpu().double(), real.cpu().double()


def manifold_metrics(fake: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020, §3).

    fake (n, d), real (m, d): features. Each point's ball extends to its k-th nearest neighbor in its own set.
    precision: share of fakes inside a real ball; recall: share of reals inside a fake ball; density: mean number of
    real balls around a fake, divided by k; coverage: share of real balls around a fake. Raises ValueError for few.
    """
    fake, real = float64_points(fake, real, needed=k + 1)
    radius_fake, radius_real = (
        torch.cat([squared_distances(part, p).topk(k + 1, largest=False).values[:, k] for part in p.split(2000)])
        for p in (fake, real)
    )
    balls = torch.zeros(len(fake))  # real balls around each fake
    covered, recalled = torch.zeros(2, len(real), dtype=torch.bool)
    for part in torch.arange(len(fake)).split(2000):
        distance = squared_distances(fake[part], real)
        inside = distance < radius_real
        balls[part] = inside.sum(dim=1).float()
        covered |= inside.any(dim=0)
        recalled |= (distance < radius_fake[part, None]).any(dim=0)
    shares = {"precision": balls > 0, "recall": recalled, "density": balls / k, "coverage": covered}
    return {name: values.float().mean().item() for name, values in shares.items()}


def nearest_distance(points: Tensor, others: Tensor) -> Tensor:
    """Return each point's distance (n,) to the nearest of the others; points (n, d), others (m, d)."""
    points, others = float64_points(points, others, needed=1)
    nearest = torch.cat([squared_distances(part, others).argmin(dim=1) for part in points.split(1000)])
    return (points - others[nearest]).norm(dim=1)  # exactly 0 for a copy, which the matrix product misses


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Return all squared distances (n, m) by one matrix product, three times as fast as cdist; use float64."""
    length = others.square().sum(dim=1)
    return torch.addmm(length, points, others.T, alpha=-2).add_(points.square().sum(dim=1, keepdim=True))
