"""How often the health panel is right: the kept runs of known truth, read again, and a few recorded anew."""

import copy
import dataclasses
import gzip
import json
import math
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import RECIPES, make
from torch import nn

import dcgan_utils as du
from tools import failure_runs as runs

INDUCED = {  # what has to be told apart, and what it changes in a recipe's Config
    "lr_D × 20": lambda c: {"lr_D": 20 * c.lr_D},
    "lr_D × 100": lambda c: {"lr_D": 100 * c.lr_D},
    "lr_G × 20": lambda c: {"lr_G": 20 * c.lr_G},
    "lr_G × 100": lambda c: {"lr_G": 100 * c.lr_G},
    "no BatchNorm": lambda c: {"batch_norm_G": False, "batch_norm_D": False},
    "D frozen": lambda c: {"d_steps": 0},
    "G frozen": lambda c: {"g_steps": 0},
    "beta1 0.9, lr × 10": lambda c: {"beta1": 0.9, "lr_G": 10 * c.lr_G, "lr_D": 10 * c.lr_D},
    "labels swapped": lambda c: {},
    "no detach": lambda c: {"detach": False},
    "tiny latent": lambda c: {"nz": 1},
    "one image": lambda c: {},
    "one class": lambda c: {},
    "copies of the data": lambda c: {},
    "NaN in G": lambda c: {},
    "G left in eval mode": lambda c: {},
}
FINDINGS = {
    "losses are numbers", "a player stands still", "BatchNorm", "labels", "detach", "copies among samples",
    "sample diversity", "classes", "memorisation", "D's answers", "D too strong", "D too weak", "G's gradient",
    "oscillation",
}  # fmt: skip


def kept(which: str) -> list[dict]:
    """Return the kept runs of a set."""
    return json.loads(gzip.decompress((runs.RESULTS / f"{which}.json.gz").read_bytes()))


def harmless(record: dict) -> bool:
    """Say whether the change is known to do this recipe no harm: such a run counts neither as faulty nor as healthy."""
    return record["fault"] is not None and du.RECIPES[record["recipe"]] in runs.FAULTS[record["fault"]].harmless


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict]]:
    """Return both sets; without either the bars are not shown to hold."""
    return {which: kept(which) for which in runs.SETS}


@pytest.fixture(scope="module")
def sound(sets) -> dict:
    """Return a healthy run of which no epoch is red."""
    record = next(r for r in sets["tuning"] if r["recipe"] == "fast" and r["fault"] is None)
    assert not any(panel.cause for panel in runs.panels(record))
    return record


# ----------------------------------------------------------------------------------------------- the kept runs
@pytest.mark.parametrize("which", runs.SETS)
def test_the_panel_names_failures_early_and_rightly(which, sets, capsys):
    """The bars: 95 % of the faults named within an epoch of their onset, at most 1 % of healthy epochs red."""
    records, start = sets[which], time.process_time()
    figures = runs.report(records)
    assert time.process_time() - start < 10
    assert figures["named"] >= 0.95 * figures["faulty"]
    assert figures["red_healthy_epochs"] <= 0.01 * figures["healthy_epochs"]
    assert figures["faulty"] == sum(record["fault"] is not None and not harmless(record) for record in records)
    assert figures["healthy_epochs"] == runs.HEALTHY_EPOCHS * sum(record["fault"] is None for record in records)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("healthy", *runs.FAULTS))
    assert f"{figures['named']} of {figures['faulty']}" in printed
    assert f"{figures['red_healthy_epochs']} of {figures['healthy_epochs']}" in printed


@pytest.mark.parametrize("which", runs.SETS)
def test_the_figures_counted_in_another_way(which, sets, capsys):
    """Count what the panel says, without the tool's own counting."""
    figures, named, red, late = runs.report(sets[which]), 0, 0, Counter()
    for record in sets[which]:
        history, kind = du.History.from_json(record["history"]), du.RECIPES[record["recipe"]]
        lines = [history.until(k) for k in range(1, len(history["epoch"]) + 1)]
        causes = [du.diagnose(line, bands=kind.bands).cause for line in lines]
        names = [cause and cause.name for cause in causes]
        if record["fault"] is None:
            red += sum(name is not None for name in names)
            assert names[-1] is None  # whatever it began as, no healthy run ends red
        elif harmless(record):
            continue
        elif record["fault"] == "NaN in G":  # it comes in the second epoch, which has no line
            assert names == [None]
            assert du.diagnose(history, bands=kind.bands).cause.name == "losses are numbers"
            named += 1
        else:
            assert len(names) == runs.FAULTY_EPOCHS
            right = names[0] in runs.FAULTS[record["fault"]].names
            named += right
            late[record["fault"]] += not right
    assert (figures["named"], figures["red_healthy_epochs"]) == (named, red)
    for name, count in late.items():
        assert count < figures["faulty"] / len(runs.FAULTS) / 2, f"{name} is missed more often than it is named"


@pytest.mark.parametrize("which", runs.SETS)
def test_the_kept_figures_are_those_of_the_kept_runs(which, sets, capsys):
    """What is quoted is what a replay prints today."""
    figures = json.loads((runs.RESULTS / f"{which}.json").read_text())
    assert figures == json.loads(json.dumps(runs.report(sets[which])))


def test_no_seed_that_is_judged_has_set_a_threshold(sets):
    seeds = {which: {record["seed"] for record in records} for which, records in sets.items()}
    assert set(seeds) == {"tuning", "judged"}
    assert not seeds["tuning"] & seeds["judged"]
    for which, (healthy, faulty) in runs.SETS.items():
        assert seeds[which] == {*healthy, *faulty}
        assert len(healthy) >= 3


@pytest.mark.parametrize("which", runs.SETS)
def test_a_set_holds_every_run_once(which, sets):
    healthy, faulty = runs.SETS[which]
    expected = {(kind.recipe, None, seed) for kind in runs.NARROW for seed in healthy}
    expected |= {
        (kind.recipe, n, seed) for n, fault in runs.FAULTS.items() for kind in fault.recipes for seed in faulty
    }
    held = [(record["recipe"], record["fault"], record["seed"]) for record in sets[which]]
    assert len(held) == len(set(held))
    assert set(held) == expected == set(runs.jobs(healthy, faulty))


@pytest.mark.parametrize("which", runs.SETS)
def test_every_kept_run_is_what_it_says(which, sets):
    """Its Config is the recipe's, narrowed, with this seed and this fault and nothing else."""
    for record in sets[which]:
        kind = du.RECIPES[record["recipe"]]
        config = kind.resolve(**runs.NARROW[kind])
        config = dataclasses.replace(config, **INDUCED[record["fault"]](config) if record["fault"] else {})
        config = dataclasses.replace(config, batch_size=32, num_epochs=runs.HEALTHY_EPOCHS, seed=record["seed"])
        assert du.History.from_json(record["history"]).config == dataclasses.replace(config, log_every=25)
        epochs = record["history"]["epochs"]
        wanted = 1 if record["fault"] == "NaN in G" else runs.FAULTY_EPOCHS if record["fault"] else runs.HEALTHY_EPOCHS
        assert epochs["epoch"] == list(range(1, wanted + 1))


@pytest.mark.parametrize("which", runs.SETS)
def test_every_kept_run_has_every_reading(which, sets):
    """A run that was recorded before a reading existed says nothing about the finding that goes by it."""
    judged = ("confidence", "class_gap", "fid", "precision", "recall", "near_copies")
    lacking = Counter()
    for record in sets[which]:
        epochs = record["history"]["epochs"]
        for name in {*du.METRICS, *du.EPOCH_READINGS, *judged} - {"gap", "slope"}:  # a critic's
            there = name in epochs and (epochs[name][-1] is not None or name.startswith("move_BN"))
            lacking[name] += not there
    assert not {name: count for name, count in lacking.items() if count}


@pytest.mark.parametrize("which", runs.SETS)
def test_the_faults_show_in_readings_that_the_panel_does_not_go_by(which, sets):
    """A lost class, a copy or a frozen player is there without the panel saying so."""
    for record in sets[which]:
        epochs, fault = record["history"]["epochs"], record["fault"]
        last = {name: values[-1] for name, values in epochs.items()}
        if fault in ("one image", "one class"):
            assert last["class_gap"] == pytest.approx(0.9, abs=0.04)
            assert last["recall"] < (0.01 if fault == "one image" else 0.4)
        elif fault == "copies of the data":
            assert last["fid"] < 15
        elif fault in ("D frozen", "G frozen"):
            assert last[f"grad_{fault[0]}"] == 0
            assert last[f"grad_{'G' if fault[0] == 'D' else 'D'}"] > 0


@pytest.mark.parametrize("which", runs.SETS)
def test_runs_without_a_fault_learn(which, sets):
    """Healthy means more than that no fault was put in: all kinds of digits, and many ways to write them."""
    for record in sets[which]:
        epochs = record["history"]["epochs"]
        if record["fault"] is None:
            fast = record["recipe"] == "fast"
            assert epochs["fid"][-1] < (12 if fast else 45)  # untrained: above 200
            assert epochs["recall"][-1] > (0.3 if fast else 0.2)  # untrained: 0
            assert epochs["precision"][-1] > (0.7 if fast else 0.35)  # untrained: 0
            assert epochs["class_gap"][-1] < (0.15 if fast else 0.5)
            assert epochs["diversity"][-1] > 0.7
            assert epochs["spacing"][-1] > 0.7


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in runs.RESULTS.glob("*.json.gz")) < 300 * 1024


# ----------------------------------------------------------------------------------------------- the list of faults
def test_every_fault_is_induced_as_it_is_called(few_digits):
    assert set(runs.FAULTS) == set(INDUCED)
    for name, fault in runs.FAULTS.items():
        assert set(fault.recipes) == set(runs.NARROW) - ({du.DCGAN} if name.endswith("× 100") else set())
        assert set(fault.harmless) <= set(fault.recipes)
        assert set(fault.names) <= FINDINGS
        assert fault.onset == (name == "NaN in G")
        for kind in fault.recipes:
            config = kind.resolve(**runs.NARROW[kind])
            assert fault.changes(config) == pytest.approx(INDUCED[name](config))
            other = bool(fault.callbacks) or fault.wrap(kind) is not kind
            assert other != bool(INDUCED[name](config))  # one fault at a time, and never none


def test_every_name_is_one_that_the_panel_can_say(sound):
    history = du.History.from_json(copy.deepcopy(sound["history"]))
    said = {finding.name for finding in du.diagnose(history).findings}
    history["diversity"][-1] = math.nan
    said |= {finding.name for finding in du.diagnose(history).findings}
    assert said >= FINDINGS


def test_the_broken_generators_make_what_they_are_called(few_digits):
    config = du.FastDCGAN.resolve(**runs.NARROW[du.FastDCGAN])
    z = torch.randn(400, config.nz, generator=torch.Generator().manual_seed(0))
    made = {}
    for name in ("one image", "one class", "copies of the data"):
        kind = runs.FAULTS[name].wrap(du.FastDCGAN)
        assert issubclass(kind, du.FastDCGAN)
        assert kind.networks[1] is du.FastDCGAN.networks[1]
        with torch.no_grad():
            made[name] = kind.networks[0](config)(z)
        assert made[name].shape == (400, 1, 28, 28)
        assert made[name].abs().max() <= 1
    assert len(made["one image"].flatten(1).unique(dim=0)) == 1
    assert len(made["copies of the data"].flatten(1).unique(dim=0)) > 350
    assert len(made["one class"].flatten(1).unique(dim=0)) > 150
    assert (du.read_digits(made["one class"]).digits == 3).float().mean() > 0.99
    assert len(du.read_digits(made["copies of the data"]).digits.unique()) == 10


def test_swapped_labels_are_the_loss_with_real_and_fake_exchanged():
    real, fake = torch.tensor([2.0, 3.0]), torch.tensor([-1.0, -4.0])
    for kind, rivals in ((du.StableDCGAN, []), (du.DCGAN, []), (du.FastDCGAN, [real])):
        config = kind.resolve()
        right, wrong = du.LOSSES[config.loss](config), runs.SwappedLabels(config)
        assert wrong.discriminator(real, fake) == right.discriminator(fake, real) != right.discriminator(real, fake)
        assert wrong.generator(fake, *rivals) == right.generator(fake, *rivals)  # G's step is left as it is


# ----------------------------------------------------------------------------------------------- the tool's counting
def edited(record: dict, fault: str | None = None, **readings: dict[int, float]) -> dict:
    """Return a record with other readings in some epochs, and what is known of it."""
    record = copy.deepcopy(record)
    record["fault"] = fault
    for name, changes in readings.items():
        values = record["history"]["epochs"].setdefault(name, [0.0] * len(record["history"]["epochs"]["epoch"]))
        for epoch, value in changes.items():
            values[epoch] = value
    return record


def test_a_healthy_epoch_that_is_red_counts_as_such(sound, capsys):
    figures = runs.report([sound, edited(sound, leak={1: 1.0, 3: 1.0})])
    assert (figures["healthy_epochs"], figures["red_healthy_epochs"]) == (12, 2)
    assert figures["confusion"]["healthy"] == {"nothing red": 10, "detach": 2}
    assert (figures["faulty"], figures["named"]) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "readings", "right", "seen", "delay"),
    [
        ("no detach", {"leak": {0: 1.0}}, 1, "detach", 1),
        ("no detach", {"leak": {1: 1.0}}, 0, "nothing red ✗", 2),  # too late
        ("no detach", {}, 0, "nothing red ✗", None),
        ("no detach", {"move_G": {0: 0.0}}, 0, "a player stands still ✗", None),  # something else
        ("no detach", {"leak": {0: 1.0}, "move_G": {0: 0.0}}, 0, "a player stands still ✗", None),  # the first counts
        ("NaN in G", {"loss_G": {1: math.nan}}, 1, "losses are numbers", 1),  # it begins after an epoch
        ("NaN in G", {"loss_G": {2: math.nan}}, 0, "nothing red ✗", 2),
    ],
)  # fmt: skip
def test_a_fault_counts_as_named_when_the_cause_is_right_and_in_time(
    fault, readings, right, seen, delay, sound, capsys
):
    figures = runs.report([edited(sound, fault, **readings)])
    assert (figures["faulty"], figures["named"], figures["healthy_epochs"]) == (1, right, 0)
    assert figures["confusion"] == {fault: {seen: 1}}
    assert figures["epochs_to_detection"] == {fault: [delay]}
    assert f"{right} of 1" in capsys.readouterr().out


def test_reporting_leaves_the_records_alone(sound, capsys):
    before = copy.deepcopy(sound)
    assert runs.report([sound]) == runs.report([sound])
    assert sound == before


def test_replay_reads_the_judged_set_and_trains_and_writes_nothing(monkeypatch, capsys):
    """The command of the README."""

    def refuses(*arguments, **options):
        raise AssertionError("it trains or writes")

    monkeypatch.setattr(runs, "run", refuses)
    monkeypatch.setattr(runs.multiprocessing, "get_context", refuses)
    monkeypatch.setattr(sys, "argv", ["failure_runs.py", "--replay"])
    before = {path: path.stat().st_mtime_ns for path in runs.RESULTS.iterdir()}
    runs.main()
    assert {path: path.stat().st_mtime_ns for path in runs.RESULTS.iterdir()} == before
    figures = json.loads((runs.RESULTS / "judged.json").read_text())
    assert f"{figures['named']} of {figures['faulty']}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- recorded anew
@pytest.fixture
def few_digits(mnist_test, monkeypatch):
    """Give the tool 2,000 digits, already read."""
    images, labels = (part[:2000] for part in mnist_test)
    monkeypatch.setattr(runs, "_digits", lambda: (images, labels))


@pytest.fixture
def briefly(few_digits, monkeypatch):
    """Shorten the tool's runs: 704 digits and 4 channels, 22 batches an epoch."""
    monkeypatch.setattr(runs, "IMAGES", 704)
    narrow = {kind: {**fields, "ngf": 4, "ndf": 4} for kind, fields in runs.NARROW.items()}
    monkeypatch.setattr(runs, "NARROW", narrow)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # a run of the tool takes one


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (du.StableDCGAN, "NaN in G"), (du.FastDCGAN, "G left in eval mode"), (du.DCGAN, "no detach"),
        (du.FastDCGAN, "one image"), (du.DCGAN, "G left in eval mode"), (du.FastDCGAN, "labels swapped"),
    ],
)  # fmt: skip
def test_a_fault_induced_now_is_named(kind, name, briefly, capsys):
    record = json.loads(json.dumps(runs.run(kind, name, 11)))  # as the file keeps it
    assert (record["recipe"], record["fault"], record["seed"]) == (kind.recipe, name, 11)
    epochs = record["history"]["epochs"]
    assert epochs["epoch"] == ([1] if name == "NaN in G" else [1, 2])
    said = runs.panels(record)
    assert said[-1].cause.name in runs.FAULTS[name].names
    assert runs.report([record])["named"] == 1
    if name == "NaN in G":
        assert said[0].cause is None or said[0].cause.name != "losses are numbers"
        assert not math.isfinite(record["history"]["batches"]["loss_G"][-1])
        assert 1 < record["history"]["batches"]["epoch"][-1] <= 2
    elif name == "G left in eval mode":
        assert epochs["move_BN_G"] == [0, 0]
        assert min(epochs["move_G"]) > 1e-4  # its weights do learn
        if kind is du.DCGAN:
            assert min(epochs["move_BN_D"]) > 0
        else:
            assert epochs["move_BN_D"] == [None, None]  # it has no BatchNorm in D
    elif name == "no detach":
        assert min(epochs["leak"]) > 0
    elif name == "one image":
        assert max(epochs["spacing"]) < 0.01
        assert max(epochs["diversity"]) < 0.01


def test_a_run_can_be_repeated(briefly, monkeypatch):
    monkeypatch.setattr(runs, "IMAGES", 256)
    monkeypatch.setattr(runs, "FAULTY_EPOCHS", 1)
    first, second = (runs.run(du.FastDCGAN, "tiny latent", 5)["history"] for _ in range(2))
    assert first["epochs"]["epoch"] == [1]
    for record in (first, second):
        record["epochs"] = {k: v for k, v in record["epochs"].items() if k not in ("seconds", "images_per_second")}
    assert first == second


# ----------------------------------------------------------------------------------------------- the readings
class Watches(du.Callback):
    """Read weights and BatchNorm means by ways of its own at the start and after every epoch."""

    def __init__(self):
        self.places = []

    def look(self, gan):
        place = {}
        for key, network in (("D", gan.discriminator), ("G", gan.generator)):
            weights = [p.detach().double().numpy().ravel() for p in network.parameters()]
            norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            place[f"move_{key}"] = np.concatenate(weights)
            if norms:
                place[f"move_BN_{key}"] = np.concatenate([m.running_mean.double().numpy() for m in norms])
        self.places.append(place)

    def on_train_begin(self, gan):
        self.look(gan)

    def on_epoch_end(self, gan):
        self.look(gan)


def watch_gradients(gan) -> dict[str, list[float]]:
    """Return lists that fill up with the lengths of the gradients at every step, by autograd's other door."""
    lengths, update = {"D": [], "G": [], "leak": []}, gan.update

    def length(loss, network):
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        return math.sqrt(sum(part.double().square().sum().item() for part in parts if part is not None))

    def watched(player, loss):
        if player == "D":
            lengths["leak"].append(length(loss, gan.generator))
        lengths[player].append(length(loss, {"D": gan.discriminator, "G": gan.generator}[player]))
        return update(player, loss)

    gan.update = watched
    return lengths


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(
    "fields", [{}, {"detach": False}, {"d_steps": 2, "g_steps": 2}], ids=["plain", "leaks", "twice"]
)
def test_recorded_readings_agree_with_another_computation(kind, fields, mnist_small):
    data = (mnist_small[0][:128], mnist_small[1][:128])
    gan = make(kind, log_every=1, start_at_background=False, precision="fp32", device="cpu", **fields)
    watches, lengths = Watches(), watch_gradients(gan)
    history = gan.train(2, data=data, callbacks=[watches])
    steps = len(history.batches["step"])
    assert steps == 2 * 8 // gan.config.d_steps
    for name, player, taken in (("grad_D", "D", gan.config.d_steps), ("grad_G", "G", gan.config.g_steps)):
        last = lengths[player][taken - 1 :: taken]  # of several steps in one iteration the last one is recorded
        assert history.batches[name] == pytest.approx(last, rel=1e-4)
        assert history[name] == pytest.approx(np.reshape(last, (2, -1)).mean(axis=1).tolist(), rel=1e-4)
    leaks = lengths["leak"][gan.config.d_steps - 1 :: gan.config.d_steps]
    assert history.batches["leak"] == pytest.approx(leaks, rel=1e-4)
    assert (min(leaks) > 0) == (not gan.config.detach)
    answers = np.reshape(history.batches["D_G_z"], (2, -1))
    assert history["swing"] == pytest.approx(answers.std(axis=1).tolist(), abs=1e-6)
    for epoch, (before, after) in enumerate(zip(watches.places, watches.places[1:], strict=False)):
        for name in ("move_D", "move_G", "move_BN_D", "move_BN_G"):
            if name not in before:
                assert history[name][epoch] is None
                continue
            longer = max(np.linalg.norm(before[name]), np.linalg.norm(after[name]))
            moved = np.linalg.norm(after[name] - before[name]) / longer
            assert history[name][epoch] == pytest.approx(moved, rel=1e-3)
            assert moved > 1e-4


def test_the_move_of_a_resumed_epoch_covers_what_was_trained_of_it(mnist_small, tmp_path):
    """An epoch that goes on after a stop counts from there; it is not taken for a player that stands still."""

    class Stops(du.Callback):
        def on_batch_end(self, gan):
            if gan.step == 7:
                gan.stop("test")

    data = (mnist_small[0][:128], mnist_small[1][:128])
    gan = make(du.StableDCGAN, batch_size=16)
    gan.train(1, data=data, callbacks=[Stops()])
    assert gan.history["epoch"] == [7 / 8]
    gan.save(tmp_path / "ck")
    again = du.StableDCGAN.load(tmp_path / "ck")
    watches = Watches()
    history = again.train(1, data=data, callbacks=[watches])
    assert history["epoch"] == [1]
    before, after = (place["move_G"] for place in watches.places)
    moved = np.linalg.norm(after - before) / max(np.linalg.norm(before), np.linalg.norm(after))
    assert history["move_G"][0] == pytest.approx(moved, rel=1e-3)
    assert 1e-6 < moved < 0.1
