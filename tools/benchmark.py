"""Compare each recipe's images per second with the same networks trained the textbook way, on this machine.

    python tools/benchmark.py                # about half an hour; results/benchmark/cpu.json or gpu.json and the table
    python tools/benchmark.py --recipes fast --ways ours --repeats 1 --seconds 5 --quality 0  # what else is there stays
    python tools/benchmark.py --layers       # milliseconds of each pass through each convolution, in each of its ways

The textbook way is that of public scripts: fp32, contiguous tensors, a DataLoader with two workers that resizes every
sample anew, D's weight gradients computed in G's step and thrown away, torch's own Dropout, cross-entropy, `.item()`
after every batch. Ours is the recipe as it is; compiled is the same with `Config.compile`, and its first batches, in
which torch.compile works without what it kept from earlier, are told apart. Each way is a process of its own and runs
for a second while the others stand still, so that a machine shared with others is unfair to all alike (on a GPU they
run one after the other); every repeat is kept at once. Then each recipe trains once for `--quality` seconds, and the
judge says when its samples came below each Fréchet distance; the clock stands still while it reads.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

import dcgan_utils as du  # noqa: E402

RESULTS = ROOT / "results" / "benchmark"
WAYS = ("textbook", "ours", "compiled")
COMPARED = ("dcgan", "stable", "fast")
LEVELS = (20, 5, 1)  # Fréchet distances of 1,000 samples
LOOK = 5  # seconds of training from one look to the next
TURN = 1.0  # seconds for which one way runs while the others stand still
WARM_UP = 3  # looks before the clock starts: allocations, kernels, CUDA graphs


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


def make_plain(layer: nn.Module) -> None:
    """Turn a layer of ours into torch's own."""
    for theirs in (nn.Dropout, nn.ConvTranspose2d, nn.Conv2d):
        if isinstance(layer, theirs):
            layer.__class__ = theirs


def textbook_batches(kind: type[du.GAN]) -> Iterator[int]:
    """Train as public scripts do and yield the images of each batch when it is done."""
    config = kind.resolve()
    device = du.pick_device(config.device)
    torch.manual_seed(config.seed)
    generator, discriminator = (network(config).to(device) for network in kind.networks)
    for layer in [*generator.modules(), *discriminator.modules()]:
        make_plain(layer)
    optimizer_G, optimizer_D = (
        torch.optim.Adam(network.parameters(), lr=lr, betas=(config.beta1, config.beta2))
        for network, lr in ((generator, config.lr_G), (discriminator, config.lr_D))
    )
    criterion = torch.nn.BCEWithLogitsLoss()
    judge = lambda images, labels: du.real_logit(discriminator(images, labels))  # noqa: E731
    loader = DataLoader(Digits(config.image_size), batch_size=config.batch_size, shuffle=True, num_workers=2)
    unmirrored = mock.patch.object(du, "mirror", lambda maps: maps)  # PyTorch's users pad on the other side instead
    for images, digits in loader:
        with unmirrored:
            real, labels = images.to(device), digits.to(device) if config.conditional else None
            discriminator.zero_grad()
            logits = judge(real, labels)
            loss_real = criterion(logits, torch.full_like(logits, config.real_label_smooth))
            loss_real.backward()
            fake = generator(torch.randn(len(real), config.nz, device=device), labels)
            logits = judge(fake.detach(), labels)
            loss_fake = criterion(logits, torch.full_like(logits, config.fake_label_smooth))
            loss_fake.backward()
            optimizer_D.step()
            generator.zero_grad()
            logits = judge(fake, labels)
            loss_G = criterion(logits, torch.full_like(logits, config.generator_target))
            loss_G.backward()
            optimizer_G.step()
            _ = (loss_real + loss_fake).item(), loss_G.item(), logits.sigmoid().mean().item()
        yield len(real)


class Clock(du.Callback):
    """Say after every batch, on a GPU after every fifty, how many images are done since the warm-up."""

    def __init__(self) -> None:
        self.images, self.looks, self.since, self.made, self.before = 0, 0, 0, time.perf_counter(), 0.0

    def count(self, images: int) -> None:
        """Take note of images that are done, and say where it stands once the warm-up is over."""
        self.looks += 1
        if self.looks == WARM_UP:
            self.before = time.perf_counter() - self.made
        if self.looks >= WARM_UP:
            self.images += images if self.looks > WARM_UP else 0
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            line = {"images": self.images, "mebibytes": memory, "warm_up_seconds": self.before}
            print(json.dumps(line), flush=True)

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
    """Train until somebody stops this process, and say after every batch how many images are done."""
    clock = Clock()
    if way == "textbook":
        while True:
            for images in textbook_batches(kind):
                clock.count(images)
    du.keep_memory()
    kind(compile=way == "compiled").train(10_000, callbacks=[clock])


class Levels(du.Callback):
    """Note after how many seconds of training the samples first came below each level; stop when time is over."""

    def __init__(self, seconds: float) -> None:
        images, test = (du.load_images("mnist", split)[0] for split in ("train", "test"))
        self.seconds, self.reference = seconds, (images, test)
        self.reached: dict[int, float] = {}
        self.spent, self.due, self.start = 0.0, LOOK, time.perf_counter()

    def on_train_begin(self, gan: du.GAN) -> None:
        """Read the real digits at this recipe's size, and start the clock."""
        self.reference = du.Reference(*self.reference, gan.config.image_size)
        self.start = time.perf_counter()

    def on_batch_end(self, gan: du.GAN) -> None:
        """Look every few seconds."""
        self.spent += time.perf_counter() - self.start
        if self.spent >= min(self.due, self.seconds):
            self.due += LOOK
            distance = du.score_samples(gan.sample(1000, seed=0), self.reference)["fid"]
            self.reached |= {level: self.spent for level in LEVELS if level not in self.reached and distance < level}
            if self.spent >= self.seconds or len(self.reached) == len(LEVELS):
                gan.stop("measured")
        self.start = time.perf_counter()


def quality(kind: type[du.GAN], seconds: float) -> dict[int, float]:
    """Return the seconds after which the recipe came below each level, of those that it reached."""
    levels = Levels(seconds)
    du.keep_memory()
    kind().train(callbacks=[levels], max_seconds=2 * seconds)
    return levels.reached


def layers_with_a_choice(gan: du.GAN) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield those of a GAN's convolutions that have a choice, each with an input as it gets it."""
    shapes = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the shape of a layer's input."""
        shapes[layer] = inputs[0].shape

    for layer in [*gan.generator.modules(), *gan.discriminator.modules()]:
        if isinstance(layer, (du.Halving, du.Doubling, du.Greying)):
            layer.register_forward_pre_hook(note)
    z = torch.randn(gan.config.batch_size, gan.config.nz, device=gan.device)
    labels = torch.arange(len(z), device=gan.device) % 10
    gan.discriminator(gan.generator(z, labels), labels)
    for layer, shape in shapes.items():
        x = torch.randn(shape, device=gan.device).contiguous(memory_format=torch.channels_last)
        yield layer, x.requires_grad_()


@torch.no_grad()
def layer_table(kind: type[du.GAN], repeats: int = 9) -> Iterator[str]:
    """Yield lines: milliseconds of each pass through each layer, in each way that it has; the ways take turns."""
    gan = kind()
    for layer, given in layers_with_a_choice(gan):
        with gan.autocast():
            made, dtype = layer(given), du.precision_of(given)
            given, weight = given.to(dtype), layer.weight.to(dtype)
            weight = weight.transpose(0, 1) if isinstance(layer, du.Greying) else weight
        (y, x), (k, stride) = (made, given), (layer.kernel_size[0], layer.stride[0])
        y, x = (y, x) if weight.shape[0] == y.shape[1] else (x, y)
        chosen, grey = du.quickest_ways(given, weight), weight.shape[1] == 1
        found = []
        for task, pair in {"convolve": (x, weight), "transpose": (y, weight), "slope": (y, x)}.items():
            has = {"library": True, "patches": grey or task != "transpose", "winograd": k == 4 and not grey}
            times = {way: [] for way in has if has[way]}
            for _ in range(repeats):
                for way, taken in times.items():
                    start = time.perf_counter()
                    du.PASSES[task][way](*pair, k, stride)
                    if gan.device.type == "cuda":
                        torch.cuda.synchronize()
                    taken.append(1000 * (time.perf_counter() - start))
            middles = ", ".join(f"{way} {statistics.median(taken[2:]):.1f}" for way, taken in times.items())
            found.append(f"{task} {middles} (takes {getattr(chosen, task)})")
        (_, wide, side, _), narrow = given.shape, made.shape[1]
        what = f"{kind.__name__} {type(layer).__name__} {wide} → {narrow} at {side}×{side}"
        yield f"{what}, kernel {k}, {gan.precision}, ms: {'; '.join(found)}"


def machine() -> str:
    """Describe what it ran on, without naming it."""
    device = du.pick_device("auto")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    units, has = torch.backends.cpu.get_cpu_capability(), getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = " and AMX" if has.get("amx_bf16") else " with bf16" if has.get("avx512_bf16") else ""
    return f"{torch.get_num_threads()} threads, {platform.machine()} {units}{bf16}, torch {torch.__version__}"


def products(precision: str, size: int = 2048) -> dict[str, float]:
    """Return how many TFLOP/s a product of two square matrices does here, in float32 and in the machine's precision."""
    device, found = du.pick_device("auto"), {}
    for name in dict.fromkeys(("fp32", precision)):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        matrix, times = torch.ones(size, size, dtype=dtype, device=device), []
        for _ in range(7):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # on a GPU this waits for it
            times.append(time.perf_counter() - start)
        found[name] = 2 * size**3 / statistics.median(times[2:]) / 1e12
    return found


def middle(cell: dict, way: str, what: str, form: str) -> str:
    """Return the median of one reading over the runs of one way, – where there are none."""
    return format(statistics.median(run[what] for run in cell[way]), form) if cell.get(way) else "–"


def ratio(cell: dict, way: str) -> str:
    """Return the median of how much faster than the textbook one way was, turn by turn; – where they took no turns."""
    runs, plain_runs = cell.get(way, []), cell.get("textbook", [])
    pairs = zip(runs, plain_runs, strict=True) if len(runs) == len(plain_runs) else []
    ratios = [run["images_per_second"] / plain["images_per_second"] for run, plain in pairs]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def rate(cell: dict, way: str, *notes: str) -> str:
    """Return images per second, with notes in brackets."""
    text = middle(cell, way, "images_per_second", ".0f")
    return f"{text} ({'; '.join(notes)})" if notes and text != "–" else text


def table(results: dict) -> str:
    """Return the medians as a Markdown table."""
    levels = " / ".join(f"{level}" for level in LEVELS)
    rows = [
        "| recipe | precision | textbook img/s | ours img/s (ratio) | compiled img/s (ratio; s before) | "
        f"MiB textbook / ours / compiled | s to distance {levels} |",
        "|" + "---|" * 7,
    ]
    for recipe, cell in results["recipes"].items():
        reached = cell.get("seconds_to_distance", {})
        parts = [
            f"`{du.RECIPES[recipe].__name__}`", cell["precision"], rate(cell, "textbook"),
            rate(cell, "ours", ratio(cell, "ours")),
            rate(cell, "compiled", ratio(cell, "compiled"), middle(cell, "compiled", "warm_up_seconds", ".0f")),
            " / ".join(middle(cell, way, "mebibytes", ".0f") for way in WAYS),
            " / ".join(f"{reached[str(level)]:.0f}" if str(level) in reached else "–" for level in LEVELS),
        ]  # fmt: skip
        rows.append("| " + " | ".join(parts) + " |")
    cells = results["recipes"].values()
    repeats = {len(cell[way]) for cell in cells for way in WAYS if cell.get(way)}
    seconds = {cell["seconds"] for cell in cells}
    runs = f"{' or '.join(map(str, sorted(repeats)))} runs of {' or '.join(f'{s:g}' for s in sorted(seconds))} s each"
    does = ", ".join(f"{name} {rate:.2g}" for name, rate in results.get("products", {}).items())
    does = f"; products of 2048×2048 matrices, TFLOP/s: {does}" if does else ""
    return f"{results['machine']}{does}; median of {runs}\n\n" + "\n".join(rows)


def compare(results: dict, options: argparse.Namespace) -> Iterator[None]:
    """Measure every recipe in turns, each time in a process of its own; then how soon its samples are good.

    What is found goes into `results`, which is whole at every yield.
    """
    precision = du.pick_precision("auto", du.pick_device("auto"))
    results["products"] = products(precision)
    for recipe in options.recipes:
        cell = results["recipes"].setdefault(recipe, {})
        cell |= {"precision": precision, "seconds": options.seconds}
        cell |= {way: [] for way in options.ways}
        together = [options.ways] if not torch.cuda.is_available() else [[way] for way in options.ways]
        for _ in range(options.repeats):
            for ways in together:  # on a GPU what a process has begun goes on while it stands still
                for way, run in in_turns(ways, recipe, options.seconds).items():
                    cell[way].append(run)
            yield
    for recipe in options.recipes if options.quality else []:
        results["recipes"][recipe]["seconds_to_distance"] = time_to_levels(recipe, options.quality)
        yield


def in_turns(ways: list[str], recipe: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return images per second, memory (MiB) and the warm-up (s) of each way, measured side by side.

    Each way is a group of processes that stands still while another has its turn of a second: so a machine that others
    slow down for a while is slow for all alike.
    """
    groups, first, taken = {}, {}, dict.fromkeys(ways, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        said = {way: Path(folder) / way for way in ways}
        try:
            for way in ways:
                groups[way] = start(way, recipe, said[way])
                while not newest(said[way]):
                    if groups[way].poll() is not None:
                        why = errors(said[way]).read_text()[-2000:]
                        raise RuntimeError(f"measuring {way} of {recipe} failed:\n{why}")
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
    return {
        way: {
            "images_per_second": (last[way]["images"] - first[way]["images"]) / taken[way],
            "mebibytes": last[way]["mebibytes"],
            "warm_up_seconds": last[way]["warm_up_seconds"],
        }
        for way in ways
    }


def start(way: str, recipe: str, said: Path) -> subprocess.Popen:
    """Start this script as a group of processes of its own, for which torch compiles anew."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": f"{said}.cache", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, __file__, "--measure", way, "--recipes", recipe]
    with said.open("w") as out, errors(said).open("w") as err:  # files, since a full pipe would hold it up
        return subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | cache, start_new_session=True)


def errors(said: Path) -> Path:
    """Return the file of what a process complains about, beside that of what it says."""
    return said.with_suffix(".err")


def newest(said: Path) -> dict[str, float]:
    """Return the last whole line of what a process said about its images, nothing where there is none."""
    lines = [line for line in said.read_text().split("\n")[:-1] if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def time_to_levels(recipe: str, seconds: float) -> dict[str, float]:
    """Return the seconds to each level, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure", "quality", "--recipes", recipe, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the quality of {recipe} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure one way, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--quality", type=float, default=60, help="seconds of the run that is judged; 0: none")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="where results are kept (default: cpu.json or gpu.json there)")
    parser.add_argument(
        "--measure", choices=(*WAYS, "quality"), help=argparse.SUPPRESS
    )  # one measurement, in its own process
    parser.add_argument("--layers", action="store_true", help="time the convolutions alone")
    options = parser.parse_args()
    if options.layers:
        du.keep_memory()
        print(machine(), *(line for recipe in options.recipes for line in layer_table(du.RECIPES[recipe])), sep="\n")
        return
    if options.measure:
        kind = du.RECIPES[options.recipes[0]]
        if options.measure != "quality":
            measure(kind, options.measure)
        print(json.dumps(quality(kind, options.seconds)))
        return
    gpu = du.pick_device("auto").type == "cuda"
    if "compiled" in options.ways and not gpu and not shutil.which("g++"):
        print("no C++ compiler (g++): not compiled", file=sys.stderr)
        options.ways.remove("compiled")
    out = options.out or RESULTS / f"{'gpu' if gpu else 'cpu'}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "recipes": {}}
    if out.is_file() and (kept := json.loads(out.read_text()))["machine"] == results["machine"]:
        results = kept
    for _ in compare(results, options):
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
