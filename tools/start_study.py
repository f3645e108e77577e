"""Compare the literal 64×64 recipe with `start_at_background`: several seeds, narrow networks, equal iterations.

    python tools/start_study.py [--width 16] [--iterations 150] [--seeds 1 2 3]

Leaves results/start: table.json (D's readings and the samples' diversity) and grid.png (two rows a seed).
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dcgan_utils as du  # noqa: E402


def main() -> None:
    """Train each variant with each seed and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="ngf and ndf; the recipe has 64")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    images, _ = du.load_images()
    images = images[: 128 * options.iterations]
    table, rows = [], []
    for start_at_background in (False, True):
        for seed in options.seeds:
            widths = {"ngf": options.width, "ndf": options.width}
            gan = du.DCGAN(seed=seed, start_at_background=start_at_background, log_every=10, **widths)
            gan.train(1, data=images, callbacks=[])
            last = {name: sum(gan.history.batches[name][-3:]) / 3 for name in du.METRICS}  # the last 30 iterations
            table.append({"start_at_background": start_at_background, "seed": seed, **last})
            table[-1]["diversity"] = gan.history["diversity"][-1]
            rows.append(gan.fixed_samples(8))
            print({k: round(v, 3) for k, v in table[-1].items()}, flush=True)
    folder = ROOT / "results" / "start"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"width": options.width, "iterations": options.iterations, "runs": table}
    (folder / "table.json").write_text(json.dumps(record, indent=1))
    n = len(options.seeds)
    title = (
        f"width {options.width}, {options.iterations} iterations: upper {n} rows literal, lower {n} start_at_background"
    )
    du.save_picture(du.plot_images(torch.cat(rows), title), folder / "grid.png")


if __name__ == "__main__":
    main()
