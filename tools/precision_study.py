"""Train both public recipes, narrow, in float32 and in half precision, and let the judge say whether they differ.

    python tools/precision_study.py                      # three seeds of each; runs that are kept are not made again
    python tools/precision_study.py --precision fp16     # on a GPU

Narrow networks (16 channels, `StableDCGAN` 8), `DCGAN` at 32×32, batches of 32 and five times the learning rates, so
that a short run gets somewhere. A CPU without units for bf16 rounds to it in software: slowly, with the same results
for this purpose. Leaves results/precision: runs.json and table.md.
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

RESULTS = ROOT / "results" / "precision"
NARROW = {
    "dcgan": {"image_size": 32, "ngf": 16, "ndf": 16, "batch_size": 32, "lr_G": 1e-3, "lr_D": 5e-4},
    "stable": {"ngf": 8, "ndf": 8, "batch_size": 32, "lr_G": 5e-4, "lr_D": 5e-4},
}
FIGURES = {"fid": ".1f", "precision": ".2f", "recall": ".2f", "loss_D": ".3f", "loss_G": ".3f"}


def run(recipe: str, precision: str, seed: int, images: int, reference: du.Reference) -> dict:
    """Train once on so many digits and return the record of the run: scores of 2,000 samples, mean losses."""
    gan = du.RECIPES[recipe](precision=precision, seed=seed, **NARROW[recipe])
    start = time.process_time()
    gan.train(1, data=du.load_images()[0][:images], callbacks=[])
    seconds = time.process_time() - start
    scores, losses = du.score_samples(gan.sample(2000, seed=0), reference), gan.history.last()
    figures = {name: scores[name] if name in scores else losses[name] for name in FIGURES}
    line = {"recipe": recipe, "arithmetic": precision, "seed": seed, "images": images, "cpu_seconds": round(seconds)}
    print(line | {name: round(value, 3) for name, value in figures.items()}, flush=True)
    return line | figures


def table(runs: list[dict]) -> str:
    """Return mean ± standard deviation over the seeds as a Markdown table."""
    lines = ["| recipe, narrow | arithmetic | seeds | images | Fréchet ↓ | precision ↑ | recall ↑ | D loss | G loss |"]
    lines.append("|" + "---|" * 9)
    for recipe, precision in sorted({(r["recipe"], r["arithmetic"]) for r in runs}):
        mine = [r for r in runs if (r["recipe"], r["arithmetic"]) == (recipe, precision)]
        cells = [f"`{du.RECIPES[recipe].__name__}`", precision, str(len(mine)), f"{mine[0]['images']:,}"]
        for name, form in FIGURES.items():
            values = [r[name] for r in mine]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not kept yet, and keep everything after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--images", type=int, default=25_600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "runs.json"
    runs = json.loads(path.read_text()) if path.is_file() else []
    known = {(r["recipe"], r["arithmetic"], r["seed"], r["images"]) for r in runs}
    todo = [(recipe, p, seed) for seed in options.seeds for recipe in NARROW for p in options.precision]
    train, test = (du.load_images("mnist", split)[0] for split in ("train", "test"))
    sizes = {recipe: NARROW[recipe].get("image_size", 28) for recipe in NARROW}
    references = {recipe: du.Reference(train[:10_000], test, size) for recipe, size in sizes.items()}
    for recipe, precision, seed in todo:
        if (recipe, precision, seed, options.images) not in known:
            runs.append(run(recipe, precision, seed, options.images, references[recipe]))
            du.prepare_file(path).write_text(json.dumps(runs, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
