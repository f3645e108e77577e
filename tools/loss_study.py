"""Train one pair of networks with each loss of the family and let the judge compare them; about 12 CPU minutes.

    python tools/loss_study.py                  # screen the learning rate, then several seeds of the best one
    python tools/loss_study.py --seeds 1 2 3 4  # more: runs that are kept are not made again

Every loss has the same networks (D without BatchNorm), data, batch size and latent. They are compared twice: after
equal iterations (steps of G) and after equal CPU seconds, on one thread; judging does not count. Leaves
results/losses: runs.json, table.md and for each loss a row of the first seed's samples at equal seconds.
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

RESULTS = ROOT / "results" / "losses"
COMMON = {
    "ngf": 16, "ndf": 16, "batch_size": 64, "loss": "bce", "gradient_penalty": 0.0, "d_steps": 1, "beta1": 0.5,
    "beta2": 0.999, "real_label_smooth": 1.0, "fake_label_smooth": 0.0,
}  # fmt: skip
LOSSES = {  # what each loss needs of its own, as its paper has it
    "bce": {},
    "least_squares": {},
    "hinge": {},
    "wasserstein": {"gradient_penalty": 10.0, "d_steps": 5, "beta1": 0.0, "beta2": 0.9},
    "relativistic": {"gradient_penalty": 1.0, "beta1": 0.0, "beta2": 0.99},
}
RATES = (1e-3, 3e-3)
FIGURES = ("fid", "precision", "recall", "coverage")
SAMPLES = 1000


class Snapshots(du.Callback):
    """Score the samples when each goal is reached, `seconds` of CPU time or `iterations`; stop when all are."""

    def __init__(self, reference: du.Reference, goals: dict[str, float]) -> None:
        self.reference, self.goals = reference, goals
        self.seen: dict[str, dict[str, float]] = {}
        self.grid: torch.Tensor | None = None
        self.start = time.process_time()

    def on_batch_end(self, gan: du.GAN) -> None:
        """Look at the clock, which stands still while the judge reads."""
        now = time.process_time()
        reached = {"seconds": now - self.start, "iterations": gan.step}
        for name, goal in self.goals.items():
            if name not in self.seen and reached[name] >= goal:
                scores = du.score_samples(gan.sample(SAMPLES, seed=0), self.reference)
                line = {figure: scores[figure] for figure in (*FIGURES, *(f"{f}_floor" for f in FIGURES))}
                self.seen[name] = reached | line | gan.sample_readings()
                self.grid = gan.fixed_samples(12) if name == "seconds" else self.grid
        self.start += time.process_time() - now
        if len(self.seen) == len(self.goals):
            gan.stop("all goals are reached")


def run(
    loss: str, rate: float, seed: int, goals: dict[str, float], data: torch.Tensor, reference: du.Reference
) -> dict:
    """Train once and return the record of the run; the first seed's samples are kept as a picture."""
    config = {**COMMON, **LOSSES[loss], "loss": loss, "lr_G": rate, "lr_D": rate, "seed": seed}
    watch = Snapshots(reference, goals)
    error = ""
    try:
        du.WGANGP(**config).train(1000, data=data, callbacks=[watch])
    except du.DivergenceError as divergence:
        error = str(divergence).split(":")[0]
    if seed == 1 and watch.grid is not None:
        du.save_picture(du.plot_images(watch.grid, loss, columns=12), RESULTS / f"{loss}.png")
    said = (f"{x['fid']:.1f} ({x['iterations']} its, {x['seconds']:.0f} s)" for x in watch.seen.values())
    print(f"{loss}, learning rate {rate:g}, seed {seed}:", ", ".join(said), error, flush=True)
    return {"loss": loss, "rate": rate, "seed": seed, "at": watch.seen, "error": error}


def best_rate(screened: list[dict], loss: str) -> float:
    """Return the learning rate whose screening run had the lowest Fréchet distance at equal seconds."""
    known = {r["rate"]: r["at"]["seconds"]["fid"] for r in screened if r["loss"] == loss and "seconds" in r["at"]}
    return min(known, key=known.get)


def table(record: dict) -> str:
    """Return what was measured as a Markdown table: mean ± standard deviation over the seeds."""
    runs, lines = record["runs"], []
    for goal in ("iterations", "seconds"):
        n = len({r["seed"] for r in runs})
        lines += [f"At equal {goal} ({record['goals'][goal]:g}), {n} seeds:", ""]
        lines += ["| loss | learning rate | iterations | CPU s | Fréchet ↓ | precision ↑ | recall ↑ | coverage ↑ |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for loss in LOSSES:
            mine = [r for r in runs if r["loss"] == loss]
            at = [r["at"][goal] for r in mine if goal in r["at"]]
            if len(at) < len(mine) or len(at) < 2:
                lines.append(f"| {loss} | {len(mine) - len(at)} of {len(mine)} runs did not get there | | | | | | |")
                continue
            cells = [f"{mine[0]['rate']:g}", f"{statistics.mean(a['iterations'] for a in at):.0f}"]
            cells += [f"{statistics.mean(a['seconds'] for a in at):.0f}"]
            for figure in FIGURES:
                values = [a[figure] for a in at]
                form = ".1f" if figure == "fid" else ".2f"
                cells.append(f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}")
            lines.append(f"| {loss} | {' | '.join(cells)} |")
        floor = runs[0]["at"][goal]
        lines.append(f"| real digits | | | | {floor['fid_floor']:.2f} | " + " | ".join(
            f"{floor[f'{name}_floor']:.2f}" for name in FIGURES[1:]) + " |")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Screen, run, and keep everything after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seconds", type=float, default=24, help="CPU seconds of a run")
    parser.add_argument("--iterations", type=int, default=200, help="steps of G of a run")
    options = parser.parse_args()
    goals = {"seconds": options.seconds, "iterations": options.iterations}
    path, plan = RESULTS / "runs.json", {"common": COMMON, "own": LOSSES, "samples": SAMPLES, "goals": goals}
    record = json.loads(path.read_text()) if path.is_file() else {**plan, "screened": [], "runs": []}
    if any(record[name] != value for name, value in plan.items()):
        raise SystemExit(f"{path} was made with other settings; move it away first")
    torch.set_num_threads(1)
    data, test = du.load_images()[0], du.load_images("mnist", "test")[0]
    reference = du.Reference(data[:10_000], test, 28)
    todo = [("screened", loss, rate, 0) for loss in LOSSES for rate in RATES]
    todo += [("runs", loss, None, seed) for seed in options.seeds for loss in LOSSES]
    for kind, loss, rate, seed in todo:
        rate = rate or best_rate(record["screened"], loss)
        if not any((r["loss"], r["rate"], r["seed"]) == (loss, rate, seed) for r in record[kind]):
            aims = goals if kind == "runs" else {"seconds": options.seconds / 2}
            record[kind].append(run(loss, rate, seed, aims, data, reference))
            du.prepare_file(path).write_text(json.dumps(record, indent=1))
    (RESULTS / "table.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
