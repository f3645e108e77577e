"""The study of variants: what it keeps, what its table says, and that what the repository carries is of this make."""

import json

import pytest

import dcgan_utils as du
from tools import variant_study as study


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Let the study train tiny networks, and keep its results apart."""
    tiny = {"image_size": 16, "ngf": 2, "ndf": 2, "nz": 4, "batch_size": 16}
    monkeypatch.setattr(study, "NARROW", {"dcgan": tiny, "stable": tiny})
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "SAMPLES", 200)
    return tmp_path


def start(monkeypatch, *words):
    """Run the command with so few images that it takes a second."""
    monkeypatch.setattr("sys.argv", ["variant_study.py", *words, "--images", "64"])
    threads = study.torch.get_num_threads()
    study.main()
    study.torch.set_num_threads(threads)


def test_what_is_kept_is_not_made_again(tiny, monkeypatch, capsys):
    start(monkeypatch, "target", "--seeds", "1")
    first = json.loads((tiny / "target.json").read_text())
    assert [(r["recipe"], r["variant"], r["seed"], r["images"]) for r in first] == [
        ("dcgan", "G wants 1", 1, 64), ("dcgan", "G wants 0.85", 1, 64),
    ]  # fmt: skip
    assert first[0]["loss_G"] != first[1]["loss_G"]
    trained = []
    monkeypatch.setattr(study, "run", lambda *a, run=study.run: trained.append(a[:3]) or run(*a))
    start(monkeypatch, "target", "--seeds", "1", "2")
    both = json.loads((tiny / "target.json").read_text())
    assert both[:2] == first
    assert trained == [("dcgan", {"generator_target": 1.0}, 2), ("dcgan", {"generator_target": 0.85}, 2)]
    assert (tiny / "target.md").read_text() == study.table(both)
    assert study.table(both) in capsys.readouterr().out


def test_the_study_of_precision_changes_nothing_else(monkeypatch):
    made = []

    class Noted(Exception):
        pass

    def note(**config):
        made.append(config)
        raise Noted

    monkeypatch.setitem(du.RECIPES, "stable", note)
    for (recipe, _), changes in study.STUDIES["precision"].items():
        if recipe == "stable":
            with pytest.raises(Noted):
                study.run(recipe, changes, 7, 100, None)
    assert [config.pop("precision") for config in made] == ["fp32", "bf16"]
    assert made[0] == made[1] == {"seed": 7, **study.NARROW["stable"]}


def test_whole_means_the_recipe_as_it_is():
    for (recipe, precision), changes in study.STUDIES["whole"].items():
        kind = du.RECIPES[recipe]
        assert kind.resolve(**study.NARROW[recipe] | changes) == kind.resolve(precision=precision)


def test_the_table_holds_mean_and_spread():
    lines = [
        {"recipe": "dcgan", "variant": "fp32", "images": 1000, "seed": seed} | dict.fromkeys(study.FIGURES, value)
        for seed, value in ((1, 1.0), (2, 3.0))
    ]
    *_, row = study.table(lines).splitlines()
    assert row.startswith("| `DCGAN` | fp32 | 2 | 1,000 | 2.0 ± 1.4 | 2.00 ± 1.41 |")


@pytest.mark.parametrize("name", list(study.STUDIES))
def test_the_kept_runs_are_of_this_study(name, root):
    folder = root / "results" / "variants"
    runs = json.loads((folder / f"{name}.json").read_text())
    assert {(r["recipe"], r["variant"]) for r in runs} == set(study.STUDIES[name])
    table = study.table(runs, "recipe") if name == "whole" else study.table(runs)
    assert (folder / f"{name}.md").read_text() == table
    assert table in (root / "README.md").read_text() + "\n"
