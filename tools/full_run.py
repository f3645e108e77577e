"""Train one recipe for long, in slices, and leave what the README and the notebooks show under results/.

    python tools/full_run.py --recipe dcgan --name dcgan --slice 300 [--epochs 30] [--minutes 90] [--set FIELD=VALUE …]

After every epoch, and every slice of `--slice` seconds where epochs are long: scores of 1,000 samples, a
frame, and a checkpoint under outputs/full_run/NAME, so that a stop loses nothing and the same command goes on. At the
end results/NAME holds history.json, scores.json (of 10,000 samples) and samples.png; without `--brief` also
grid.png, history.png and training.gif.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from study import stamp  # noqa: E402

import dcgan_utils as du  # noqa: E402


class Keep(du.Callback):
    """Keep a frame and a checkpoint of every epoch, also of one that was cut short."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def on_epoch_end(self, gan: du.GAN) -> None:
        """Save both, and say where training is."""
        gan.save(self.work / "newest")
        frame = du.plot_images(gan.fixed_samples(36), title(gan), columns=6)
        du.save_picture(frame, self.work / "frames" / f"{gan.step:07d}.png")
        now = gan.history.last()
        print(
            title(gan),
            gan.history,
            f"pixel std ratio {now['pixel_std_ratio']:.2f}, distance {now.get('frechet', math.nan):.2f}",
            flush=True,
        )


class StopAtTime(du.Callback):
    """End the slice; a limit given to `train` would have learning rates fall within every slice."""

    def __init__(self, end: float) -> None:
        self.end = end

    def on_batch_end(self, gan: du.GAN) -> None:
        """Stop when it is time."""
        if time.monotonic() >= self.end:
            gan.stop("the slice is over")


def main() -> None:
    """Train, or go on, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, choices=list(du.RECIPES))
    parser.add_argument("--name", required=True, help="folder under results/")
    parser.add_argument("--epochs", type=int, help="in all (default: the recipe's)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--slice", type=float, default=600, help="seconds between two checkpoints")
    parser.add_argument("--brief", action="store_true", help="no pictures but the samples")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    work, results = ROOT / "outputs" / "full_run" / options.name, ROOT / "results" / options.name
    overrides = {"out_dir": str(work), **du.parse_fields(options.set)}
    if options.epochs:
        overrides["num_epochs"] = options.epochs
    kind = du.RECIPES[options.recipe]
    gan = kind.load(work / "newest", **overrides) if (work / "newest").exists() else kind(**overrides)
    end = time.monotonic() + 60 * options.minutes
    while gan.epoch < gan.config.num_epochs and time.monotonic() < end:
        gan.train(
            callbacks=[du.EvaluateEachEpoch(), Keep(work), StopAtTime(min(end, time.monotonic() + options.slice))]
        )
    gan.set_data("mnist")
    results.mkdir(parents=True, exist_ok=True)
    record = gan.history.to_json() | {"stamp": list(stamp().values())}
    record["config"]["out_dir"] = work.relative_to(ROOT).as_posix()  # without the machine's own folders
    (results / "history.json").write_text(json.dumps(record, default=float))
    scores = gan.evaluate()
    print(scores)
    (results / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    du.save_picture(du.plot_images(gan.fixed_samples(50), title(gan), columns=10), results / "samples.png")
    if options.brief:
        return
    du.save_picture(du.plot_real_vs_fake(gan.real_samples(), gan.fixed_samples(), title(gan)), results / "grid.png")
    du.save_picture(gan.plot_history(), results / "history.png")
    du.make_animation(thin_out(sorted((work / "frames").glob("*.png")), 16), results / "training.gif")


def title(gan: du.GAN) -> str:
    """Say which recipe at which epoch."""
    return f"{type(gan).__name__}, epoch {gan.history['epoch'][-1]:.2f}"


def thin_out(paths: list[Path], most: int) -> list[Path]:
    """Keep at most so many frames, evenly spread, the first and the last among them."""
    if len(paths) <= most:
        return paths
    return [paths[round(k * (len(paths) - 1) / (most - 1))] for k in range(most)]


if __name__ == "__main__":
    main()
