"""The tools run: every study a few iterations long, the benchmark a second, a whole run two epochs on few digits."""

import json
import subprocess
import sys

import pytest

SMOKE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(root, *arguments, env):
    """Run a tool and return what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def env(monkeypatch):
    """Return an environment with one thread and no GPU."""
    import os

    return os.environ | SMOKE


@pytest.mark.parametrize("study", ["start", "losses"])
def test_a_study_runs_every_arm_and_scores_it(root, env, study):
    lines = [
        json.loads(line)
        for line in run(root, "tools/study.py", study, "--smoke", env=env).splitlines()
        if line[0] == "{"
    ]
    assert len({line["arm"] for line in lines}) == len(lines) > 1
    for line in lines:
        assert line["frechet"] > 0
        assert line["images_seen"] > 0
        assert {"commit", "machine", "date", "seed"} <= line.keys()


def test_the_benchmark_measures_every_way_and_prints_a_table(root, env, tmp_path):
    out = tmp_path / "found.json"
    text = run(
        root, "tools/benchmark.py", "--recipes", "fast", "--repeats", "1", "--seconds", "2", "--out", str(out), env=env
    )
    cell = json.loads(out.read_text())["recipes"]["fast"]
    assert all(cell[way][0]["images_per_second"] > 0 for way in ("textbook", "library", "ours"))
    assert "`FastDCGAN`" in text
