"""What the README says exists, and its tables hold what was measured."""

import json
import re
import statistics

import pytest

import dcgan_utils as du
from tools import benchmark


def cells(readme: str, start: str) -> list[str]:
    """Return the cells of the table row that starts so, without marks."""
    row = next(line for line in readme.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip().replace("*", "") for cell in row.strip("|").split("|")]


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_fields_that_the_readme_names_exist(readme):
    named = set(re.findall(r"\b([A-Za-z_]+)=[\d.T]", readme)) - {"max_seconds", "DCGAN_PROFILE", "digits"}
    named -= {"patience", "inception", "nproc_per_node", "nnodes"}  # arguments of functions and of torchrun
    named |= set(re.findall(r"`([A-Za-z_]+)` [÷×]", readme))
    assert {"noise_D", "lr_D", "start_at_background"} <= named
    assert named <= set(vars(du.Config()))


def test_files_that_the_readme_links_exist(readme, root):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (root / link).exists()] == []


def test_no_placeholder_is_left(readme):
    assert "@@" not in readme


@pytest.mark.parametrize(
    ("start", "folder"),
    [
        ("`DCGAN`, seed 42", "dcgan"),
        ("`DCGAN`, seed 7", "dcgan_seed7"),
        ("`StableDCGAN`, seed 42", "stable"),
        ("`FastDCGAN`, seed 42", "fast"),
    ],
)
def test_the_long_runs_ended_as_the_readme_says(readme, root, start, folder):
    epochs = json.loads((root / "results" / folder / "history.json").read_text())["epochs"]
    names = ("epoch", "loss_D", "loss_G", "D_x", "D_G_z", "diversity")
    said = cells(readme, start)
    assert said[1:2] + said[3:] == [f"{epochs[name][-1]:.2f}" for name in names]


@pytest.mark.parametrize(
    ("start", "folder"), [("`FastDCGAN`, 6", "fast"), ("`DCGAN`, 1", "dcgan"), ("`StableDCGAN`, ", "stable")]
)
def test_the_judge_said_what_the_readme_says(readme, root, start, folder):
    table = readme[readme.index("| 10,000 samples |") :]
    scores = json.loads((root / "results" / folder / "scores.json").read_text())
    said = [float(cell) for cell in cells(table, start)[1:]]
    names = ("fid", "kid", "precision", "recall", "density", "coverage", "confidence", "near_copies")
    for value, name in zip(said, names, strict=True):
        assert value == pytest.approx(scores[name], abs=0.0005, rel=0.03)


def test_the_speed_trials_gave_what_the_readme_says(readme, root):
    trials = [json.loads(line) for line in (root / "results" / "speed" / "trials.jsonl").read_text().splitlines()]
    table = readme[readme.index("| recipe | nominal seconds |") :].split("\n\n")[0]
    rows = [[cell.strip().replace("*", "") for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert len(rows) >= 6
    names = {
        "`FastDCGAN`": "FastDCGAN",
        "`L`": "L",
        "`U`": "U",
        "`FastDCGAN(conditional=False)`": "FastDCGAN, label-free",
    }
    for recipe, seconds, seeds, *said in rows:
        runs = [run for run in trials if (run["idea"], run["seconds"]) == (names[recipe], float(seconds))]
        assert len(runs) == int(seeds)
        for text, name in zip(said, ("fid", "recall", "precision", "digit_accuracy"), strict=True):
            values = [run[name] for run in runs if name in run]
            if values:
                mean, spread = (float(part) for part in text.split(" ± "))
                digits = len(text.split(" ± ")[1].split(".")[1])
                assert mean == pytest.approx(statistics.mean(values), abs=0.51 * 10**-digits)
                assert spread == pytest.approx(statistics.stdev(values), abs=0.51 * 10**-digits)
            else:
                assert text == ""


def test_the_benchmark_printed_what_the_readme_says(readme, root):
    results = json.loads((root / "results" / "benchmark" / "cpu.json").read_text())
    assert benchmark.table(results) in readme
