"""Train the public recipes, narrow, with one thing changed, over several seeds, and let the judge compare them.

    python tools/variant_study.py precision     # float32 and half precision: do they end alike?
    python tools/variant_study.py target        # what DCGAN's G wants D to say, which its README leaves open
    python tools/variant_study.py whole         # as the first, but the recipes as they are (DCGAN: --images 15360)

Narrow networks (16 channels, `StableDCGAN` 8), `DCGAN` at 32×32, batches of 32 and five times the learning rates, so
that a short run gets somewhere; one thread. *whole* is at full width, on all threads. Runs that are kept are not made
again. A CPU without units for bf16 rounds to it in software: slowly, and good enough for this. Leaves results/variants:
STUDY.json and STUDY.md.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULTS = ROOT / "results" / "variants"
NARROW = {
    "dcgan": {"image_size": 32, "ngf": 16, "ndf": 16, "batch_size": 32, "lr_G": 1e-3, "lr_D": 5e-4},
    "stable": {"ngf": 8, "ndf": 8, "batch_size": 32, "lr_G": 5e-4, "lr_D": 5e-4},
}
AS_THEY_ARE = {
    recipe: {name: getattr(du.RECIPES[recipe].defaults, name) for name in NARROW[recipe]} for recipe in NARROW
}
STUDIES: dict[str, dict[tuple[str, str], dict[str, Any]]] = {  # (recipe, what it is called): what is changed
    "precision": {(recipe, name): {"precision": name} for recipe in NARROW for name in ("fp32", "bf16")},
    "whole": {
        (recipe, name): {**AS_THEY_ARE[recipe], "precision": name} for recipe in NARROW for name in ("fp32", "bf16")
    },
    "target": {("dcgan", f"G wants {wish:g}"): {"generator_target": wish} for wish in (1.0, 0.85)},
}
FIGURES = {
    "fid": ("Fréchet ↓", ".1f"), "precision": ("precision ↑", ".2f"), "recall": ("recall ↑", ".2f"),
    "loss_D": ("D loss", ".3f"), "loss_G": ("G loss", ".3f"), "D_x": ("D(x)", ".3f"), "D_G_z": ("D(G(z))", ".3f"),
}  # fmt: skip
SAMPLES = 2000


def run(recipe: str, changes: dict[str, Any], seed: int, images: int, reference: du.Reference) -> dict[str, float]:
    """Train for one pass of so many digits and return the scores of the samples and the means of the losses."""
    gan = du.RECIPES[recipe](**{"precision": "fp32", "seed": seed} | NARROW[recipe] | changes)
    start = time.process_time()
    gan.train(1, data=du.load_images()[0][:images], callbacks=[])
    seconds = time.process_time() - start
    scores, means = du.score_samples(gan.sample(SAMPLES, seed=0), reference), gan.history.last()
    found = {name: scores[name] if name in scores else means[name] for name in FIGURES}
    return {"images": images, "cpu_seconds": round(seconds)} | found


def table(runs: list[dict], first: str = "recipe, narrow") -> str:
    """Return mean ± standard deviation over the seeds as a Markdown table; `first` heads its first column."""
    titles = [first, "variant", "seeds", "images", *(title for title, _ in FIGURES.values())]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for recipe, variant in dict.fromkeys((r["recipe"], r["variant"]) for r in runs):
        mine = [r for r in runs if (r["recipe"], r["variant"]) == (recipe, variant)]
        cells = [f"`{du.RECIPES[recipe].__name__}`", variant, str(len(mine)), f"{mine[0]['images']:,}"]
        for name, (_, form) in FIGURES.items():
            values = [r[name] for r in mine]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not kept yet, and keep everything after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=25_600)
    parser.add_argument("--recipes", nargs="+", choices=list(NARROW), default=list(NARROW))
    options = parser.parse_args()
    if options.study != "whole":
        torch.set_num_threads(1)
    path = RESULTS / f"{options.study}.json"
    study = {key: changes for key, changes in STUDIES[options.study].items() if key[0] in options.recipes}
    runs = json.loads(path.read_text()) if path.is_file() else []
    train, test = (du.load_images("mnist", split)[0] for split in ("train", "test"))
    references = {
        recipe: du.Reference(train[:10_000], test, du.RECIPES[recipe].resolve(**NARROW[recipe] | changes).image_size)
        for (recipe, _), changes in study.items()
    }
    for seed in options.seeds:
        for (recipe, variant), changes in study.items():
            key = {"recipe": recipe, "variant": variant, "seed": seed}
            if not any(key.items() <= kept.items() for kept in runs):
                runs.append(key | run(recipe, changes, seed, options.images, references[recipe]))
                print(runs[-1], flush=True)
                du.prepare_file(path).write_text(json.dumps(runs, indent=1) + "\n")
    made = table(runs, "recipe") if options.study == "whole" else table(runs)
    path.with_suffix(".md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
