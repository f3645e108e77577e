"""Write RESULTS.md from what runs left under results/: every row with commit, machine, seeds and date.

    python tools/results_table.py            # writes RESULTS.md
    python tools/results_table.py --check    # exit code 1 if that would change it

New runs carry their own stamp; those of older versions have theirs in results/stamps.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
STAMPS = json.loads((RESULTS / "stamps.json").read_text())
OLD_KEYS = {"fid": "frechet", "digit_accuracy": "class_accuracy", "diversity": "pixel_std_ratio"}
PUBLISHED_MODES = (  # stacked MNIST, 26,000 samples; from the papers' own tables
    ("DCGAN", 99, 3.40, "Lin et al. 2018"), ("ALI", 16, 5.40, "Lin et al. 2018"),
    ("Unrolled GAN", 48.7, 4.32, "Lin et al. 2018"), ("VEEGAN", 150, 2.95, "Lin et al. 2018"),
    ("PacDCGAN2", 1000, 0.06, "Lin et al. 2018"), ("PresGAN", 1000, 0.12, "Dieng et al. 2019"),
    ("WGAN-GP", 959, 0.73, "Huang et al. 2024"), ("StyleGAN2", 940, 0.42, "Huang et al. 2024"),
    ("R3GAN", 1000, 0.029, "Huang et al. 2024"),
)  # fmt: skip


def load(path: str) -> Any:
    """Return what a JSON file, or a file of JSON lines, under results/ holds, older keys translated."""
    text = (RESULTS / path).read_text()
    return translated([json.loads(line) for line in text.splitlines()] if path.endswith("jsonl") else json.loads(text))


def translated(value: Any) -> Any:
    """Return JSON data with the keys of older versions renamed."""
    if isinstance(value, list):
        return [translated(v) for v in value]
    if not isinstance(value, dict):
        return value
    names = {key: OLD_KEYS.get(key, key.replace("fid_floor", "frechet_baseline")) for key in value}
    return {names[key].replace("_floor", "_baseline"): translated(v) for key, v in value.items()}


def stamp(name: str) -> list[str]:
    """Return commit, machine and date of an older run."""
    found = STAMPS[name]
    return [found["commit"], found.get("machine", ""), found["date"]]


def rows(titles: Sequence[str], cells: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in cells)])


def spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation, – where nothing was measured."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def full_runs() -> str:
    """Return whole runs of the recipes, one row a run."""
    cells = []
    for folder in sorted(path.parent for path in RESULTS.glob("*/scores.json")):
        name, history, scores = folder.name, load(f"{folder.name}/history.json"), load(f"{folder.name}/scores.json")
        config, epochs = history["config"], history["epochs"]
        faithful = ", faithful" if name == "dcgan_literal" or config.get("init_output_bias") is False else ""
        faithful = "" if name.startswith("stable") else faithful
        cells.append([
            f"`{name}`{faithful}", *(history.get("stamp") or stamp(name)), config["seed"], f"{epochs['epoch'][-1]:g}",
            f"{sum(epochs['seconds']) / 60:.1f}", f"{scores['frechet']:.2f} / {scores['frechet_baseline']:.2f}",
            f"{scores['precision']:.3f}", f"{scores['recall']:.3f}", f"{scores['coverage']:.3f}",
            f"{scores['class_accuracy']:.3f}" if "class_accuracy" in scores else "–",
            *(f"{epochs[key][-1]:.2f}" for key in ("loss_D", "loss_G", "D_x", "D_G_z")),
        ])  # fmt: skip
    titles = ["run", "commit", "machine", "date", "seed", "epochs", "minutes", "Fréchet / baseline", "precision",
              "recall", "coverage", "class accuracy", "loss D", "loss G", "D(x)", "D(G(z))"]  # fmt: skip
    return rows(titles, cells)


def benchmarks() -> str:
    """Return images per second of every machine; a ratio is the median of the repeats' ratios to the textbook way."""
    cells = []
    for path in sorted((RESULTS / "benchmark").glob("*.json")):
        found = json.loads(path.read_text())
        mine = STAMPS.get(f"benchmark/{path.stem}", found)
        for recipe, cell in found["recipes"].items():
            rates = {
                way: [run["images_per_second"] for run in cell.get(way, [])] for way in ("textbook", "library", "ours")
            }
            texts = [f"{statistics.median(r):.0f}" if r else "–" for r in rates.values()]
            pairs = zip(rates["ours"], rates["textbook"], strict=False)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            memory = cell["ours"][-1]["mebibytes"]
            cells.append([f"`{recipe}`", mine["commit"], found["machine"], mine["date"], cell["precision"],
                          len(rates["ours"]), *texts, f"{ratio:.2f}", f"{memory:.0f}"])  # fmt: skip
    return rows(["recipe", "commit", "machine", "date", "numbers", "repeats", "textbook img/s", "library img/s",
                 "ours img/s", "ours / textbook", "MiB"], cells)  # fmt: skip


def grouped(lines: Sequence[dict], keys: Sequence[str]) -> dict[tuple, list[dict]]:
    """Return lines by the values of some keys, in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line.get(key) for key in keys), []).append(line)
    return groups


def by_the_clock() -> str:
    """Return `FastDCGAN` and what it was measured against, at equal seconds."""
    named = [line for line in load("speed/clock.jsonl") if "choose" not in line["machine"]]
    cells = []
    for (machine, idea, seconds), mine in grouped(named, ("machine", "idea", "seconds")).items():
        keys = {"frechet": ".2f", "recall": ".3f", "precision": ".3f", "class_accuracy": ".3f"}
        figures = [spread([m.get(key) for m in mine], form) for key, form in keys.items()]
        images = statistics.mean(m["images"] for m in mine)
        commit, _, date = stamp("speed/clock")
        cells.append([idea, f"{seconds:g}", commit, machine, date, len(mine), f"{images:,.0f}", *figures])
    titles = ["recipe", "seconds", "commit", "machine", "date", "seeds", "images"]
    return rows([*titles, "Fréchet ↓", "recall ↑", "precision ↑", "class accuracy ↑"], cells)


def studies() -> str:
    """Return the studies of tools/study.py and, as they were kept, those of older versions."""
    parts, figures = [], {"frechet": ".2f", "precision": ".3f", "recall": ".3f", "pixel_std_ratio": ".2f"}
    for path in sorted((RESULTS / "studies").glob("*.jsonl")):
        cells = []
        for (arm,), mine in grouped(load(f"studies/{path.name}"), ["arm"]).items():
            first, images = mine[0], statistics.mean(m["images_seen"] for m in mine)
            cells.append([arm, first["commit"], first["machine"], first["date"], len(mine), f"{images:,.0f}",
                          *(spread([m.get(key) for m in mine], form) for key, form in figures.items())])  # fmt: skip
        titles = ["arm", "commit", "machine", "date", "seeds", "images", "Fréchet ↓", "precision ↑", "recall ↑",
                  "pixel std ratio"]  # fmt: skip
        parts.append(f"### {path.stem}\n\n{rows(titles, cells)}")
    return "\n\n".join(parts)


def start_study() -> str:
    """Return how the faithful 64×64 recipe starts beside one whose output bias is initialized."""
    cells = []
    runs = load("start/table.json")["runs"]
    for (biased,), mine in grouped(runs, ["start_at_background"]).items():
        name = "`init_output_bias=True`" if biased else "faithful"
        keys = (("pixel_std_ratio", ".2f"), ("D_x", ".2f"), ("D_G_z", ".2f"))
        cells.append([name, *stamp("start"), len(mine), *(spread([m[k] for m in mine], form) for k, form in keys)])
    return rows(["recipe", "commit", "machine", "date", "seeds", "pixel std ratio", "D(x)", "D(G(z))"], cells)


def variant_studies() -> str:
    """Return the public recipes in float32 and bf16, and with two targets of G."""
    cells = []
    for name in ("precision", "target", "whole"):
        for (recipe, variant, images), mine in grouped(
            load(f"variants/{name}.json"), ("recipe", "variant", "images")
        ).items():
            keys = (("frechet", ".1f"), ("precision", ".2f"), ("recall", ".2f"), ("loss_D", ".3f"), ("loss_G", ".3f"))
            width = "full" if name == "whole" else "narrow"
            figures = [spread([m[k] for m in mine], form) for k, form in keys]
            variant = variant.replace("G wants", "generator_target")
            cells.append(
                [f"`{recipe}`, {width}", variant, *stamp(f"variants/{name}"), len(mine), f"{images:,}", *figures]
            )
    return rows(["recipe", "variant", "commit", "machine", "date", "seeds", "images", "Fréchet ↓", "precision ↑",
                 "recall ↑", "loss D", "loss G"], cells)  # fmt: skip


def loss_studies() -> str:
    """Return five losses at equal iterations and at equal seconds."""
    cells = []
    for (loss, rate), mine in grouped(load("losses/runs.json")["runs"], ("loss", "rate")).items():
        for budget in ("iterations", "seconds"):
            at = [m["at"][budget] for m in mine if budget in m["at"]]
            keys = (("iterations", ".0f"), ("frechet", ".1f"), ("precision", ".2f"), ("recall", ".2f"))
            figures = [spread([a[k] for a in at], form) for k, form in keys]
            cells.append([loss, f"{rate:g}", f"equal {budget}", *stamp("losses"), len(at), *figures])
    return rows(["loss", "learning rate", "budget", "commit", "machine", "date", "seeds", "iterations", "Fréchet ↓",
                 "precision ↑", "recall ↑"], cells)  # fmt: skip


def growth_study() -> str:
    """Return growing beside full size from the start, at equal CPU seconds."""
    cells = []
    for (arm,), mine in grouped(load("growth/runs.json"), ["arm"]).items():
        keys = (("images", ",.0f"), ("frechet", ".1f"), ("precision", ".2f"), ("recall", ".2f"))
        cells.append([arm, *stamp("growth"), len(mine), *(spread([m[k] for m in mine], form) for k, form in keys)])
    return rows(
        ["networks", "commit", "machine", "date", "seeds", "images", "Fréchet ↓", "precision ↑", "recall ↑"], cells
    )


def mode_study() -> str:
    """Return stacked MNIST's modes, and published ones."""
    found = load("modes/runs.json")
    titles = {
        "dcgan": "`DCGAN` at 32×32, narrow",
        "pacgan2": "the same with PacGAN-2",
        "ours": "`FastDCGAN`, label-free",
    }
    cells = [[titles[name], *stamp("modes"), run["epochs"], run["modes"], f"{run['kl']:.3f}"]
             for name, run in found["runs"].items()]  # fmt: skip
    cells.append(["real test digits", *stamp("modes"), "–", found["real"]["modes"], f"{found['real']['kl']:.3f}"])
    cells += [
        [f"{name} ({source})", "–", "published", "–", 50, modes, f"{kl:g}"]
        for name, modes, kl, source in PUBLISHED_MODES
    ]
    return rows(["recipe", "commit", "machine", "date", "epochs", "modes of 1000", "KL ↓"], cells)


def health_study() -> str:
    """Return how often the panel named the fault that was put in."""
    found = load("health/judged.json")
    cells = [[fault, sum(named.values()), ", ".join(f"{name} {n}" for name, n in named.items())]
             for fault, named in found["confusion"].items()]  # fmt: skip
    text = (
        f"Commit {STAMPS['health']['commit']}, {STAMPS['health']['machine']}, {STAMPS['health']['date']}: "
        f"{found['named']} of {found['faulty']} faulty runs named within one epoch, {found['red_healthy_epochs']} of "
        f"{found['healthy_epochs']} healthy epochs red, {found['yellow_healthy_epochs']} yellow. ✗: not named.\n\n"
    )
    return text + rows(["fault put in", "runs (healthy: epochs)", "what the panel named"], cells)


def gan_train() -> str:
    """Return the accuracy on real digits of a CNN trained on generated ones."""
    cells = []
    for line in load("conditional/gan_train.json"):
        figures = [f"{line[key]:.2%}" for key in ("generated", "real")]
        cells.append([f"`{line['recipe']}`", *stamp("conditional"), line["seed_of_gan"], *figures])
    cells += [[name, "–", "published, with differential privacy", "–", "–", value, "–"] for name, value in
              (("DPDM (arXiv 2210.09929)", "98.1%"), ("DP-FETA (DPImageBench)", "98.1%"))]  # fmt: skip
    return rows(
        ["generator", "commit", "machine", "date", "seed", "trained on 60,000 generated", "trained on real"], cells
    )


SECTIONS = (
    ("Full runs", "`python tools/full_run.py --recipe NAME --name NAME`. 10,000 samples; *baseline* is the score of "
     "10,000 real training digits. `FastDCGAN`'s D compares pairs.", full_runs),
    ("Images per second", "`python tools/benchmark.py`. *textbook*: float32 and a DataLoader; *library*: ours without "
     "its own CPU convolutions.", benchmarks),
    ("FastDCGAN by the clock", "`python tools/study.py speed`. L and U are the plain recipes with and without labels "
     "that it started from, N and *match 0.15* earlier versions of it (docs/fastdcgan.md).", by_the_clock),
    ("Studies", "`python tools/study.py NAME`.", studies),
    ("How the 64×64 recipe starts", "`python tools/study.py start`: 150 iterations, narrow networks.", start_study),
    ("Precision and G's target", "`python tools/study.py precision`, `target` and `precision_full`.", variant_studies),
    ("Five losses", "`python tools/study.py losses`: narrow networks without BatchNorm in D.", loss_studies),
    ("Growing", "`python tools/study.py growth`: 120 CPU seconds on one thread.", growth_study),
    ("Stacked MNIST", "Notebook 06 holds the protocol.", mode_study),
    ("The health panel", "`python tools/failure_runs.py`.", health_study),
    ("GAN-train", "`python tools/gan_train.py --checkpoint DIR`.", gan_train),
)  # fmt: skip


def document() -> str:
    """Return RESULTS.md."""
    text = (
        "Made by `python tools/results_table.py` from `results/`. Each row names the commit that it was measured with; "
    )
    parts = ["# Measured results", text + "a commit older than the newest one that changed `dcgan/` means older code."]
    for title, text, make in SECTIONS:
        if table := make():
            parts += [f"## {title}", text, table]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the file, or tell whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if RESULTS.md is stale")
    check, path, text = parser.parse_args().check, ROOT / "RESULTS.md", document()
    stale = not path.is_file() or path.read_text() != text
    if not check:
        path.write_text(text)
    print("RESULTS.md:", "stale" if check and stale else "written" if stale else "up to date")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
