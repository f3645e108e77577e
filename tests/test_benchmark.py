"""The benchmark: what it compares, how it counts, and the table it prints."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import dcgan_utils as du
from tools import benchmark

RATES = {"textbook": (100.0, 200.0, 400.0), "ours": (300.0, 500.0, 900.0), "compiled": (400.0, 600.0, 800.0)}
MEMORY, BEFORE = {"textbook": 900.0, "ours": 700.0, "compiled": 800.0}, {"textbook": 1.0, "ours": 1.0, "compiled": 40.0}
CELL = {
    way: [{"images_per_second": r, "mebibytes": MEMORY[way], "warm_up_seconds": BEFORE[way]} for r in rates]
    for way, rates in RATES.items()
} | {"precision": "fp32", "seconds": 1, "seconds_to_distance": {"20": 12.4, "5": 31.0}}


def test_all_ways_are_measured_each_in_a_process_of_its_own(tmp_path):
    """The command of the README, on the smallest recipe and for half a second; what was there stays."""
    out = tmp_path / "cpu.json"
    tell = "from tools import benchmark; print(benchmark.machine())"  # what conftest.py hides another process sees
    here = subprocess.check_output([sys.executable, "-c", tell], cwd=benchmark.ROOT, text=True).splitlines()[-1]
    out.write_text(json.dumps({"machine": here, "recipes": {"dcgan": CELL}}))
    command = [sys.executable, benchmark.__file__, "--recipes", "fast", "--repeats", "1", "--seconds", "0.5"]
    done = subprocess.run([*command, "--quality", "1", "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert done.stdout.strip() == benchmark.table(results).strip()
    cell = results["recipes"]["fast"]
    for way in benchmark.WAYS:
        (run,) = cell[way]
        assert run["images_per_second"] > 50
        assert 100 < run["mebibytes"] < 8000
        assert 0 < run["warm_up_seconds"] < 300
    assert cell["seconds_to_distance"] == {}  # nothing is good after a second
    assert results["recipes"]["dcgan"] == CELL
    assert list(results["products"]) == list(dict.fromkeys(("fp32", cell["precision"])))
    assert all(0.001 < rate < 10_000 for rate in results["products"].values())
    assert cell["precision"] in ("fp32", "bf16")  # what the machine does well


def test_the_table_holds_medians_and_the_median_of_ratios():
    first, *_, row = benchmark.table({"machine": "M", "recipes": {"dcgan": CELL}}).splitlines()
    assert first == "M; median of 3 runs of 1 s each"
    known = benchmark.table({"machine": "M", "products": {"fp32": 0.141, "bf16": 2.0}, "recipes": {"dcgan": CELL}})
    assert known.startswith("M; products of 2048×2048 matrices, TFLOP/s: fp32 0.14, bf16 2; median of 3 runs")
    # ours 3, 2.5 and 2.25 times the textbook's, compiled 4, 3 and 2 times
    assert row == "| `DCGAN` | fp32 | 200 | 500 (2.50) | 600 (3.00; 40) | 900 / 700 / 800 | 12 / 31 / – |"


def test_levels_are_noted_when_the_samples_first_came_below_them(monkeypatch):
    """Looks at 5, 10 and 15 seconds of training; what the judge takes does not count."""
    now, distances = [0.0], iter([30.0, 4.0, 0.5])

    def read(samples, reference):
        now[0] += 100.0
        return {"fid": next(distances)}

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.du, "score_samples", read)
    monkeypatch.setattr(benchmark.du, "Reference", lambda *parts: None)
    gan, levels = du.FastDCGAN(ngf=4, ndf=4), benchmark.Levels(60)
    levels.on_train_begin(gan)
    while gan.stop_reason is None:
        now[0] += 1.0
        levels.on_batch_end(gan)
    assert levels.reached == {20: 10.0, 5: 10.0, 1: 15.0}


@pytest.mark.parametrize("size", [28, 32])
def test_the_textbooks_digits_are_those_of_the_recipes(size):
    digits = benchmark.Digits(size)
    assert len(digits) == 60_000
    image, label = digits[7]
    ours = du.normalise(du.resize_images(digits.images[7:8], size))[0]
    assert image.shape == ours.shape == (1, size, size)
    assert (image - ours).abs().max() < 0.03  # Pillow rounds differently when it resizes
    assert label == digits.labels[7]


def test_the_textbook_way_trains(monkeypatch):
    """Its D learns: what it takes for loss goes down."""
    seen = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *rest: seen.append(self) or step(self, *rest))
    batches = benchmark.textbook_batches(du.FastDCGAN)
    counts = [next(batches) for _ in range(2)]
    batches.close()
    assert counts == [64, 64]
    assert len(seen) == 4  # D and G in turn
    assert seen[0] is seen[2] is not seen[1] is seen[3]


def test_the_clock_leaves_out_the_warm_up(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    clock = benchmark.Clock()
    for _ in range(benchmark.WARM_UP + 2):
        now[0] += 100
        clock.count(128)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["images"] for line in lines] == [0, 128, 256]
    assert {line["warm_up_seconds"] for line in lines} == {100 * benchmark.WARM_UP}


def test_on_a_gpu_the_clock_counts_what_is_done(monkeypatch, capsys):
    """Which is known when the host has waited for the device, after every fifty batches."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("waited"))
    gan, clock = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(batch_size=128)), benchmark.Clock()
    for gan.batch in range(1, 50 * (benchmark.WARM_UP + 2) + 20):
        clock.on_batch_end(gan)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["images"] for line in lines] == [0, 50 * 128, 100 * 128]
    assert len(waited) == benchmark.WARM_UP + 2


def test_ways_take_turns_and_one_that_fails_says_why(monkeypatch, tmp_path):
    """A way runs in its turn only: two that do the same are as fast, and the whole takes as long as both."""
    script = tmp_path / "way.py"
    script.write_text(
        "import json, sys, time\n"
        "if 'compiled' in sys.argv: sys.exit('no compiler here')\n"
        "n = 0\n"
        "while True:\n"
        "    time.sleep(0.01)\n"
        "    n += 1\n"
        "    print(json.dumps({'images': n, 'mebibytes': 5, 'warm_up_seconds': 1}), flush=True)\n"
    )
    monkeypatch.setattr(benchmark, "__file__", str(script))
    monkeypatch.setattr(benchmark, "TURN", 0.25)
    begun = time.perf_counter()
    runs = benchmark.in_turns(["textbook", "ours"], "fast", 1.0)
    assert time.perf_counter() - begun >= 2
    assert list(runs) == ["textbook", "ours"]
    for run in runs.values():
        assert 20 < run["images_per_second"] < 101  # while it stood still for a second, it counted nothing
        assert (run["mebibytes"], run["warm_up_seconds"]) == (5, 1)
    with pytest.raises(RuntimeError, match=r"measuring compiled of fast failed:\nno compiler here"):
        benchmark.in_turns(["ours", "compiled"], "fast", 1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_are_timed_in_each_way(precision, monkeypatch):
    """Every convolution that has a choice: what it is, a time for each way, and the one it takes."""
    small = du.StableDCGAN.resolve(ngf=2, ndf=2, batch_size=2, device="cpu", precision=precision)
    monkeypatch.setattr(du.StableDCGAN, "defaults", small)
    lines = list(benchmark.layer_table(du.StableDCGAN, repeats=3))
    assert [line.split(", kernel")[0] for line in lines] == [
        "StableDCGAN SameConvTranspose2d 8 → 4 at 7×7", "StableDCGAN SameConvTranspose2d 4 → 2 at 14×14",
        "StableDCGAN Greying 2 → 1 at 28×28", "StableDCGAN SameConv2d 1 → 2 at 28×28",
        "StableDCGAN SameConv2d 2 → 4 at 14×14",
    ]  # fmt: skip
    taken = [re.findall(r"\(takes (\w+)\)", line) for line in lines]
    assert taken == [["library"] * 3, ["library"] * 3, ["patches"] * 3, ["patches"] * 3, ["library"] * 3]
    for line, grey in zip(lines, (False, False, True, True, False), strict=True):
        times = r" library [\d.]+, patches [\d.]+ \(takes \w+\)"
        alone = times if grey else r" library [\d.]+ \(takes \w+\)"
        assert re.search(precision + f", ms: convolve{times}; transpose{alone}; slope{times}$", line)
