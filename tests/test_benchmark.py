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
    done = subprocess.run([*command, "--quality", "1", "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert done.stdout.strip() == benchmark.table(results).strip()
    cell = results["recipes"]["fast"]
    for way in benchmark.WAYS:
        (run,) = cell[way]
        assert run["images_per_second"] > 50
        assert 100 < run["mebibytes"] < 8000
    assert cell["seconds_to_distance"] == {}  # nothing is good after a second
    assert cell["precision"] == du.pick_precision("auto", du.pick_device("auto"))


def test_the_table_holds_medians_and_the_median_of_ratios():
    runs = {
        "textbook": [{"images_per_second": v, "mebibytes": 900.0} for v in (100.0, 200.0, 400.0)],
        "ours": [{"images_per_second": v, "mebibytes": 700.0} for v in (300.0, 500.0, 900.0)],
    }
    cell = {"precision": "fp32", **runs, "seconds_to_distance": {"20": 12.4, "5": 31.0}}
    results = {"machine": "M", "repeats": 3, "seconds": 1, "recipes": {"dcgan": cell}}
    row = benchmark.table(results).splitlines()[-1]
    assert row == "| `DCGAN` | fp32 | 200 | 500 | 2.50 | 900 | 700 | 12 / 31 / – |"  # ratios 3, 2.5, 2.25


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
