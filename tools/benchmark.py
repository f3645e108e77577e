"""Compare each recipe's images per second with the same networks trained the textbook way, on this machine.

    python tools/benchmark.py                                   # about ten minutes; results/benchmark/MACHINE.json
    python tools/benchmark.py --recipes fast --ways ours --repeats 1 --seconds 5

The textbook way is that of public scripts: float32, contiguous tensors, a DataLoader with two workers that resizes
every sample anew, D's weight gradients computed in G's step and thrown away, cross-entropy, `.item()` after each batch.
*ours* is the recipe as it is, *library* the same without the CPU's own convolutions (`accelerate`). Each way is a
process of its own and runs for a second while the others stand still, so that a machine shared with others is unfair to
all alike (on a GPU they run one after the other).
"""

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

import dcgan_utils as du  # noqa: E402
from dcgan.convolutions import cpu_features  # noqa: E402

RESULTS = ROOT / "results" / "benchmark"
WAYS = ("textbook", "library", "ours")
TURN = 1.0  # seconds for which one way runs while the others stand still
WARM_UP = 3  # lines before the clock starts: allocations, kernels, CUDA graphs


class Digits(Dataset):
    """Serve digits as `torchvision.datasets.MNIST` does: each resized when it is asked for."""

    def __init__(self, size: int) -> None:
        self.images, self.labels = du.load_images("mnist")
        steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def textbook_batches(kind: type[du.GAN]) -> Iterator[int]:
    """Train as public scripts do and yield the images of each batch when it is done."""
    config = kind.resolve()
    device = du.pick_device(config.device)
    torch.manual_seed(config.seed)
    generator, discriminator = (network(config).to(device) for network in kind.networks)
    optimizer_G, optimizer_D = (
        torch.optim.Adam(network.parameters(), lr=lr, betas=(config.beta1, config.beta2))
        for network, lr in ((generator, config.lr_G), (discriminator, config.lr_D))
    )
    criterion = torch.nn.BCEWithLogitsLoss()
    loader = DataLoader(Digits(config.image_size), batch_size=config.batch_size, shuffle=True, num_workers=2)
    for images, digits in loader:
        real, labels = images.to(device), digits.to(device) if config.conditional else None
        discriminator.zero_grad()
        logits = du.real_logit(discriminator(real, labels))
        loss_real = criterion(logits, torch.full_like(logits, config.real_label_smooth))
        loss_real.backward()
        fake = generator(torch.randn(len(real), config.nz, device=device), labels)
        logits = du.real_logit(discriminator(fake.detach(), labels))
        loss_fake = criterion(logits, torch.full_like(logits, config.fake_label_smooth))
        loss_fake.backward()
        optimizer_D.step()
        generator.zero_grad()
        logits = du.real_logit(discriminator(fake, labels))
        loss_G = criterion(logits, torch.full_like(logits, config.generator_target))
        loss_G.backward()
        optimizer_G.step()
        _ = (loss_real + loss_fake).item(), loss_G.item(), logits.sigmoid().mean().item()
        yield len(real)


class Clock(du.Callback):
    """Print after every batch, on a GPU after every fifty, how many images are done since the warm-up."""

    def __init__(self) -> None:
        self.images, self.lines, self.since = 0, 0, 0

    def count(self, images: int) -> None:
        """Count images that are done, and print their number once the warm-up is over."""
        self.lines += 1
        self.images += images if self.lines > WARM_UP else 0
        if self.lines >= WARM_UP:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"images": self.images, "mebibytes": memory}), flush=True)

    def on_batch_end(self, gan: du.Trainer) -> None:
        """Count a batch of ours, done on the device."""
        self.since += gan.config.batch_size
        if gan.device.type == "cuda":
            if gan.batch % 50:
                return
            torch.cuda.synchronize()
        self.count(self.since)
        self.since = 0


def measure(kind: type[du.GAN], way: str) -> None:
    """Train until somebody stops this process, and print after every batch how many images are done."""
    clock = Clock()
    if way == "textbook":
        while True:
            for images in textbook_batches(kind):
                clock.count(images)
    gan = kind()
    if way == "library":
        gan.engine.players = lambda generator, discriminator: du.Engine.players(gan.engine, generator, discriminator)
    gan.train(10_000, callbacks=[clock])


def machine() -> str:
    """Describe what this runs on, without naming it."""
    device = du.pick_device("auto")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    units, has = torch.backends.cpu.get_cpu_capability(), cpu_features()
    bf16 = " and AMX" if has.get("amx_bf16") else " with bf16" if has.get("avx512_bf16") else ""
    return f"{torch.get_num_threads()} threads, {platform.machine()} {units}{bf16}, torch {torch.__version__}"


def in_turns(ways: list[str], recipe: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return images per second and memory (MiB) of each way, measured side by side, `seconds` each."""
    groups, first, taken = {}, {}, dict.fromkeys(ways, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        said = {way: Path(folder) / way for way in ways}
        try:
            for way in ways:
                groups[way] = start(way, recipe, said[way])
                while not newest(said[way]):
                    if groups[way].poll() is not None:
                        raise RuntimeError(f"{way} of {recipe} failed:\n{errors(said[way]).read_text()[-2000:]}")
                    time.sleep(0.05)
                os.killpg(groups[way].pid, signal.SIGSTOP)
                first[way] = newest(said[way])
            for _ in range(max(1, round(seconds / TURN))):
                for way, group in groups.items():
                    begun = time.perf_counter()
                    os.killpg(group.pid, signal.SIGCONT)
                    time.sleep(TURN)
                    os.killpg(group.pid, signal.SIGSTOP)
                    taken[way] += time.perf_counter() - begun
            last = {way: newest(said[way]) for way in ways}
        finally:
            for group in groups.values():
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.killpg(group.pid, signal.SIGKILL)
                group.wait()
    rates = {way: (last[way]["images"] - first[way]["images"]) / taken[way] for way in ways}
    return {way: {"images_per_second": rates[way], "mebibytes": last[way]["mebibytes"]} for way in ways}


def start(way: str, recipe: str, said: Path) -> subprocess.Popen:
    """Start this script as a group of processes of its own."""
    command = [sys.executable, __file__, "--measure", way, "--recipes", recipe]
    with said.open("w") as out, errors(said).open("w") as err:  # files, since a full pipe would hold it up
        return subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)


def errors(said: Path) -> Path:
    """Return the file of a process's error messages, beside that of its output."""
    return said.with_suffix(".err")


def newest(said: Path) -> dict[str, float]:
    """Return the last whole line that a process printed about its images, nothing where there is none."""
    lines = [line for line in said.read_text().split("\n")[:-1] if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def table(results: dict) -> str:
    """Return medians over the repeats as a Markdown table; a ratio is the median of the repeats' ratios."""
    titles = ["recipe", "precision", "textbook img/s", "library img/s (ratio)", "ours img/s (ratio)"]
    rows = ["| " + " | ".join([*titles, "MiB textbook / ours"]) + " |", "|" + "---|" * 6]
    for recipe, cell in results["recipes"].items():
        rates = {way: [run["images_per_second"] for run in cell.get(way, [])] for way in WAYS}
        texts = []
        for way in WAYS:
            pairs = zip(rates[way], rates["textbook"], strict=False) if way != "textbook" else []
            ratios = [mine / theirs for mine, theirs in pairs]
            text = f"{statistics.median(rates[way]):.0f}" if rates[way] else "–"
            texts.append(text + (f" ({statistics.median(ratios):.2f})" if ratios else ""))
        memory = [cell[way][-1]["mebibytes"] if cell.get(way) else float("nan") for way in ("textbook", "ours")]
        memory = " / ".join(f"{value:.0f}" for value in memory)
        rows.append(f"| `{du.RECIPES[recipe].__name__}` | {cell['precision']} | {' | '.join(texts)} | {memory} |")
    return f"{results['machine']}, commit {results['commit']}\n\n" + "\n".join(rows)


def main() -> None:
    """Measure one way, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["dcgan", "stable", "fast"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS / "newest.json")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)  # one way, in its own process
    options = parser.parse_args()
    if options.measure:
        measure(du.RECIPES[options.recipes[0]], options.measure)
    from study import stamp  # which imports this file

    results = {**stamp(), "recipes": {}}
    precision = du.pick_precision("auto", du.pick_device("auto"))
    together = [[way] for way in options.ways] if torch.cuda.is_available() else [options.ways]
    for recipe in options.recipes:
        cell = {"precision": precision, "seconds": options.seconds, **{way: [] for way in options.ways}}
        for _ in range(options.repeats):
            for ways in together:  # on a GPU what a process has begun goes on while it stands still
                for way, run in in_turns(ways, recipe, options.seconds).items():
                    cell[way].append(run)
        results["recipes"][recipe] = cell
        du.prepare_file(options.out).write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
