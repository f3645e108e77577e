"""Train GANs that grow, the same networks at full size from the start, and DCGAN, for equal CPU seconds each.

    python tools/growth_study.py                 # goes on where an earlier start stopped; about 15 CPU minutes
    python tools/growth_study.py --table         # the table again, from what is kept

One thread, and CPU seconds in the place of the clock's, so that a machine shared with others measures fairly. Leaves
results/growth: runs.json, table.md and a row of samples of every arm's first seed.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULTS = ROOT / "results" / "growth"
SMALL = {"image_size": 32, "ngf": 16, "ndf": 16, "batch_size": 64, "num_epochs": 1000}
ARMS: dict[str, tuple[type[du.GAN], dict]] = {
    "grows": (du.ProgressiveGAN, SMALL),
    "full size from the start": (du.ProgressiveGAN, {**SMALL, "growth": 0.0}),
    "DCGAN": (du.DCGAN, {**SMALL, "lr_G": 1e-3, "lr_D": 5e-4, "ema": 0.99}),
}
PICTURES = {"grows": "grows", "full size from the start": "full_size", "DCGAN": "dcgan"}
FIGURES = ("fid", "precision", "recall", "coverage")


def run(arm: str, seed: int, seconds: float, keep: bool) -> dict:
    """Train one GAN for so many CPU seconds and return its scores; keep a row of its samples if asked to."""
    torch.set_num_threads(1)
    du.time.perf_counter = time.process_time  # schedule and stop follow what the process was given, not the clock
    kind, fields = ARMS[arm]
    gan = kind(seed=seed, **fields)
    gan.train(max_seconds=seconds, callbacks=[])
    scores = gan.evaluate(2000)
    if keep:
        row = du.plot_images(gan.fixed_samples(12), f"{arm}, {seconds:g} CPU s", columns=12)
        du.save_picture(row, RESULTS / f"{PICTURES[arm]}.png")
    kept = {name: round(scores[name], 4) for name in (*FIGURES, *(f"{name}_floor" for name in FIGURES))}
    return {"arm": arm, "seed": seed, "seconds": seconds, "images": gan.step * gan.config.batch_size, **kept}


def table(runs: list[dict]) -> str:
    """Return mean ± standard deviation of every arm as a Markdown table."""
    seconds, n = runs[0]["seconds"], len({run["seed"] for run in runs})
    lines = [f"{seconds:g} CPU seconds on one thread, {n} seeds, 2,000 samples each:", ""]
    lines += ["| networks | images seen | Fréchet ↓ | precision ↑ | recall ↑ | coverage ↑ |", "|" + "---|" * 6]
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm]
        cells = [f"{statistics.mean(run['images'] for run in mine):,.0f}"]
        for name in FIGURES:
            values, form = [run[name] for run in mine], ".1f" if name == "fid" else ".2f"
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    floor = " | ".join(f"{runs[0][f'{name}_floor']:.2f}" for name in FIGURES)
    return "\n".join([*lines, f"| real digits | | {floor} |"]) + "\n"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    path = RESULTS / "runs.json"
    runs = json.loads(path.read_text()) if path.is_file() else []
    done = {(run["arm"], run["seed"], run["seconds"]) for run in runs}
    for seed in options.seeds if not options.table else []:
        for arm in ARMS:
            if (arm, seed, options.seconds) not in done:
                runs.append(run(arm, seed, options.seconds, keep=seed == options.seeds[0]))
                print(runs[-1], flush=True)
                du.prepare_file(path).write_text(json.dumps(runs, indent=1) + "\n")
    text = table(runs)
    du.prepare_file(RESULTS / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
