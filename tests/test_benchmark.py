"""The benchmark: what it compares, how it counts, and the table it prints."""

import json
import subprocess
import sys

import pytest
import torch

import dcgan_utils as du
from tools import benchmark


def test_both_ways_are_measured_each_in_a_process_of_its_own(tmp_path, monkeypatch):
    """The command of the README, on the smallest recipe and for half a second."""
    out = tmp_path / "cpu.json"
    command = [sys.executable, benchmark.__file__, "--recipes", "fast", "--repeats", "1", "--seconds", "0.5"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert done.stdout.strip() == benchmark.table(results).strip()
    cell = results["recipes"]["fast"]
    for way in benchmark.WAYS:
        (run,) = cell[way]
        assert run["images_per_second"] > 50
        assert 100 < run["mebibytes"] < 8000
    assert cell["precision"] == du.pick_precision("auto", du.pick_device("auto"))


def test_the_table_holds_medians_and_the_median_of_ratios():
    runs = {
        "textbook": [{"images_per_second": v, "mebibytes": 900.0} for v in (100.0, 200.0, 400.0)],
        "ours": [{"images_per_second": v, "mebibytes": 700.0} for v in (300.0, 500.0, 900.0)],
    }
    results = {"machine": "M", "repeats": 3, "seconds": 1, "recipes": {"dcgan": {"precision": "fp32", **runs}}}
    row = benchmark.table(results).splitlines()[-1]
    assert row == "| `DCGAN` | fp32 | 200 | 500 | 2.50 | 900 | 700 |"  # ratios 3, 2.5, 2.25


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
    assert counts == [128, 128]
    assert len(seen) == 4  # D and G in turn
    assert seen[0] is seen[2] is not seen[1] is seen[3]


def test_the_clock_leaves_out_the_warm_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    clock = benchmark.Clock(seconds=10)
    for _ in range(benchmark.WARM_UP):
        now[0] += 100
        assert not clock.count(128)
    for end in (False, True):
        now[0] += 5
        assert clock.count(128) == end
    assert clock.rate() == 256 / 10
