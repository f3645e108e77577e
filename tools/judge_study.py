"""Show that the judge judges: disturb real digits more and more, and watch every score.

    python tools/judge_study.py            # about five minutes on one CPU core

Real training digits are compared with the 10,000 test digits after noise, blur, pixelation, blackout and swirl, five
strengths each, and after dropping 1 … 9 classes. Leaves results/judge: study.json (all scores) and study.png (curves).
tests/test_evaluation.py imports the disturbances from here and holds the rise.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure, SubFigure  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.transforms.v2 import InterpolationMode  # noqa: E402
from torchvision.transforms.v2 import functional as tvf  # noqa: E402

import dcgan_utils as du  # noqa: E402

STYLES = {  # of the curves: Okabe and Ito's colours, and a marker, since colour is never the only sign
    "fid": ("#0072B2", "o-"),
    "precision": ("#D55E00", "s-"),
    "recall": ("#009E73", "^-"),
    "coverage": ("#CC79A7", "D-"),
    "confidence": ("#555555", "x:"),
}
CLASSES = 10


# ------------------------------------------------------------------------------------------------------- disturbances
def noise(images: Tensor, deviation: float) -> Tensor:
    """Add Gaussian noise, always the same, to uint8 images (N, H, W); deviation: as a share of the 256 greys."""
    rng = torch.Generator().manual_seed(0)
    grain = torch.randn(images.shape, generator=rng) * deviation * 255
    return (images + grain).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur uint8 images (N, H, W) with a Gaussian of sigma pixels, cut at three of them."""
    return tvf.gaussian_blur(images[:, None], 2 * math.ceil(3 * sigma) + 1, sigma)[:, 0]


def pixelate(images: Tensor, block: float) -> Tensor:
    """Turn uint8 images (N, H, H) into blocks of about `block` pixels, each with its mean grey."""
    side = images.shape[1]
    small = du.resize_images(images, round(side / block))
    return tvf.resize(small[:, None], [side, side], interpolation=InterpolationMode.NEAREST)[:, 0]


def black_out(images: Tensor, rows: float) -> Tensor:
    """Blacken that many rows of uint8 images (N, H, W), from the top down."""
    dark = images.clone()
    dark[:, : int(rows)] = 0
    return dark


def swirl(images: Tensor, turn: float) -> Tensor:
    """Turn uint8 images (N, H, W) by `turn` radians at the centre, by half of it four pixels further out, and so on."""
    height, width = images.shape[1:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    radius = torch.hypot(x * (width - 1) / 2, y * (height - 1) / 2)
    angle = torch.atan2(y, x) + turn * 2 ** (-radius / 4)
    reach = torch.hypot(x, y)
    grid = torch.stack([reach * angle.cos(), reach * angle.sin()], dim=2).expand(len(images), -1, -1, -1)
    return F.grid_sample(images[:, None].float(), grid, align_corners=True)[:, 0].round().to(torch.uint8)


@dataclass(frozen=True)
class Disturbance:
    """Hold a function of uint8 images and a strength, five growing strengths, and what they are measured in."""

    apply: Callable[[Tensor, float], Tensor]
    strengths: tuple[float, ...]
    unit: str


DISTURBANCES = {
    "noise": Disturbance(noise, (0.1, 0.2, 0.3, 0.4, 0.5), "standard deviation (white = 1)"),
    "blur": Disturbance(blur, (0.5, 1.0, 1.5, 2.0, 3.0), "sigma of the Gaussian (pixels)"),
    "pixelation": Disturbance(pixelate, (2.0, 2.8, 4.0, 5.6, 7.0), "side of a block (pixels)"),
    "blackout": Disturbance(black_out, (6, 8, 10, 12, 14), "black rows from the top, of 28"),
    "swirl": Disturbance(swirl, (0.5, 1.0, 1.5, 2.0, 2.5), "turn at the centre (radians)"),
}


# ------------------------------------------------------------------------------------------------------ dropped classes
def drop_orders(count: int) -> list[list[int]]:
    """Return so many orders, always the same, in which the ten classes are dropped one after the other."""
    return [torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(count)]


def without(dropped: list[int], labels: Tensor, n: int) -> Tensor:
    """Return the indices of n images, drawn always alike, whose labels (N,) are none of the dropped classes."""
    kept = (~torch.isin(labels, torch.tensor(dropped, dtype=torch.long))).nonzero()[:, 0]
    if len(kept) < n:
        raise ValueError(f"{len(kept)} images are left without classes {dropped}; {n} are needed")
    return kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:n]]


# -------------------------------------------------------------------------------------------------------- measurements
def study_disturbances(images: Tensor, real: du.Reading) -> dict[str, dict]:
    """Return, for each disturbance, its strengths from 0 on and every score of uint8 images (N, H, W) at each."""
    untouched = du.score_reading(du.read_digits(images), real)
    record = {}
    for name, disturbance in DISTURBANCES.items():
        rows = [untouched]
        for strength in disturbance.strengths:
            rows.append(du.score_reading(du.read_digits(disturbance.apply(images, strength)), real))
        record[name] = {"unit": disturbance.unit, "strengths": [0, *disturbance.strengths], "scores": columns(rows)}
        report(name, record[name])
    return record


def study_dropping(reading: du.Reading, labels: Tensor, real: du.Reading, orders: int, n: int) -> dict:
    """Return the mean scores, and the range of the distance over the orders, of n images without 0 … 9 classes."""
    courses = []
    for order in drop_orders(orders):
        picks = [without(order[:count], labels, n) for count in range(CLASSES)]
        parts = [du.Reading(reading.features[pick], reading.probabilities[pick]) for pick in picks]
        courses.append([du.score_reading(part, real) for part in parts])
    counts = list(range(CLASSES))
    means = [{name: sum(course[k][name] for course in courses) / orders for name in courses[0][k]} for k in counts]
    record = {"unit": "dropped classes of 10", "strengths": counts, "images": n, "orders": drop_orders(orders)}
    record["scores"] = columns(means)
    for side in (min, max):
        record[f"fid_{side.__name__}"] = [round(side(course[k]["fid"] for course in courses), 4) for k in counts]
    report("dropping classes", record)
    return record


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return a list for each name of what the rows hold under it, to four significant digits."""
    return {name: [float(f"{row[name]:.4g}") for row in rows] for name in rows[0]}


def report(name: str, record: dict) -> None:
    """Print one line: the distance at each strength."""
    pairs = zip(record["strengths"], record["scores"]["fid"], strict=True)
    print(f"{name:18}" + "  ".join(f"{strength}: {fid:.2f}" for strength, fid in pairs), flush=True)


# -------------------------------------------------------------------------------------------------------------- figure
def draw(record: dict, images: Tensor, labels: Tensor) -> Figure:
    """Return the figure: for each disturbance examples, the distance, and the shares against its strength."""
    fig = plt.figure(figsize=(12.5, 9.5), dpi=80, layout="constrained")
    plt.close(fig)
    head = f"{record['images']:,} real training digits, disturbed, against the 10,000 test digits"
    head += f" (without classes: {record['dropped']['images']:,}, mean and range of {len(record['dropped']['orders'])}"
    judge = f"judge: {record['judge_accuracy']:.2%}, SHA-256 {record['judge_sha256'][:12]}"
    fig.suptitle(f"{head} orders); {judge}", fontsize=10)
    cells = fig.subfigures(2, 3, hspace=0.04, wspace=0.03).flatten()
    for cell, (name, course) in zip(cells, record["disturbances"].items(), strict=False):
        strip = [DISTURBANCES[name].apply(images[:1], strength)[0] for strength in course["strengths"][1:]]
        draw_cell(cell, name, course, [images[0], *strip])
    order = record["dropped"]["orders"][0]
    one_each = [images[(labels == digit).nonzero()[0, 0]] for digit in order]
    strip = [torch.zeros_like(images[0]), *one_each[:-1]]
    bottom = draw_cell(cells[-1], "dropped classes (shown: the first order)", record["dropped"], strip)
    fig.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return fig


def draw_cell(cell: SubFigure, title: str, course: dict, strip: list[Tensor]) -> plt.Axes:
    """Draw one disturbance, the examples above the strengths that they show, and return the axes of the shares."""
    top, middle, bottom = cell.subplots(3, 1, height_ratios=(1, 3, 2), sharex=True)
    x = range(len(strip))
    row = torch.cat(strip, dim=1)
    margin = max(0, (row.shape[1] // 6 - row.shape[0]) // 2)  # as high as six digits side by side would be
    top.imshow(F.pad(row, (0, 0, margin, margin)), cmap="gray", aspect="auto", extent=(-0.5, len(x) - 0.5, 0, 1))
    top.set_axis_off()
    top.set_title(title, fontsize=11)
    if "fid_min" in course:
        middle.fill_between(x, course["fid_min"], course["fid_max"], color=STYLES["fid"][0], alpha=0.2, lw=0)
    for ax, names in ((middle, ["fid"]), (bottom, ["precision", "recall", "coverage", "confidence"])):
        for name in names:
            colour, style = STYLES[name]
            ax.plot(x, course["scores"][name], style, color=colour, ms=4, label=name)
        ax.grid(alpha=0.3)
    middle.set(ylabel="Fréchet distance", ylim=(0, None))
    bottom.set(xlabel=course["unit"], ylabel="share", ylim=(-0.05, 1.05), xticks=list(x))
    bottom.set_xticklabels([f"{strength:g}" for strength in course["strengths"]])
    return bottom


def main() -> None:
    """Measure, write study.json, draw study.png and print the seconds it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="how many training digits are disturbed")
    parser.add_argument("--orders", type=int, default=5, help="orders in which classes are dropped, averaged")
    parser.add_argument("--left", type=int, default=5_000, help="how many digits are scored after dropping classes")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "judge")
    options = parser.parse_args()
    start = time.perf_counter()
    images, labels = du.load_images("mnist", "train")
    real, everything = du.read_digits(du.load_images("mnist", "test")[0]), du.read_digits(images)
    pick = without([], labels, options.images)
    record = {"judge_sha256": du.JUDGE_SHA256, "judge_accuracy": du.load_judge()[1], "images": options.images}
    record["disturbances"] = study_disturbances(images[pick], real)
    record["dropped"] = study_dropping(everything, labels, real, options.orders, options.left)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "study.json").write_text(json.dumps(record, indent=1))
    du.save_picture(draw(record, images[pick], labels[pick]), options.out / "study.png")
    wall, cpu = time.perf_counter() - start, time.process_time()
    print(f"{options.out}: study.json, study.png; {wall:.0f} s ({cpu:.0f} s of CPU)")


if __name__ == "__main__":
    main()
