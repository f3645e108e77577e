"""What a run prints, shows and saves while it trains; that none of it can end a run, and what trackers write."""

import io
import json
import os
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import BCE, make, same

import dcgan_utils as du


@pytest.fixture
def digits(mnist_small):
    """Return images and labels for six batches."""
    return mnist_small[0][:96], mnist_small[1][:96]


class Terminal(io.StringIO):
    """A stream that somebody watches."""

    def isatty(self):
        return True


# ----------------------------------------------------------------------------------------------- the screen
class BrokenPipe(Terminal):
    """A stream that somebody stops reading."""

    left = 2

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")


class Closed(io.StringIO):
    def __init__(self):
        self.close()


STREAMS = {
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), "closed": Closed, "missing": lambda: None,
    "broken pipe": type("Broken", (BrokenPipe,), {"left": 0}), "pipe that breaks": BrokenPipe,
}  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS)
def test_reports_cannot_end_training(stream, digits, tmp_path, monkeypatch):
    gan, out = make(du.StableDCGAN, out_dir=str(tmp_path), log_every=2, save_every=1), STREAMS[stream]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", STREAMS[stream]())
    gan.train(1, data=digits)
    monkeypatch.undo()
    assert (gan.epoch, len(list(tmp_path.rglob("epoch_001.png")))) == (1, 1)
    if stream == "cp1252":  # what it can show is there
        out.flush()
        assert b"? health after epoch 1" in out.buffer.getvalue()


@pytest.mark.parametrize(
    ("loss", "words"), [("bce", "D(G(z)) "), ("hinge", "D output, fake "), ("wasserstein", "gradient norm ")]
)
def test_the_report_names_what_the_loss_gives_meaning_to(loss, words, digits, tmp_path, capsys):
    penalty = {"batch_norm_D": False, "gradient_penalty": 1.0} if loss == "wasserstein" else {}
    gan = make(**{**BCE, "loss": loss, "out_dir": str(tmp_path)} | penalty)
    gan.train(1, data=digits, callbacks=[du.EpochReport()])
    line, head, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch 1/1  loss_D ")
    assert (words in line, "D(x)" in line) == (True, loss == "bce")
    assert head.startswith(tuple(du.ICONS.values()))
    assert (tmp_path / "fast" / "real_vs_fake.png").is_file()


@pytest.mark.parametrize("limit", [None, 1e6])
def test_the_bar_counts_images_or_the_time_limit_on_stdout(limit, digits, monkeypatch, capfd):
    monkeypatch.delenv("DCGAN_PROFILE", raising=False)  # smoke has no bar
    monkeypatch.setattr(sys, "stdout", Terminal())
    gan, progress, notes, seen = make(log_every=2), du.ProgressBar(), du.Callback(), []
    notes.on_batch_end = lambda gan: seen.append((progress.bar.n, gan.elapsed, progress.bar.total))
    gan.train(2, data=digits, max_seconds=limit, callbacks=[progress, notes, du.StopAt(7)])
    assert "epoch 1/2 D " in progress.bar.desc
    assert "stopped after 1 epochs and 1 batches: iteration 7" in sys.stdout.getvalue()
    if limit is None:
        assert [(n, total) for n, _, total in seen] == [(16 * k, 192) for k in range(1, 8)]
    else:
        assert all(n == pytest.approx(elapsed) and total == limit for n, elapsed, total in seen)
    assert capfd.readouterr().err == ""


BATCH = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_DATA_PROXY_URL": "https://here"}


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("environment", [{}, {"DCGAN_PROFILE": "smoke"}, BATCH])
def test_there_is_a_bar_only_where_somebody_watches(stream, environment, digits, monkeypatch):
    monkeypatch.delenv("DCGAN_PROFILE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream())
    make().train(1, data=digits, callbacks=[du.ProgressBar()])
    assert ("img/s" in sys.stdout.getvalue()) == (stream is Terminal and not environment)


def test_an_executed_notebook_has_lines_figure_and_panel_but_no_bar_and_nothing_red(root, tmp_path):
    code = f"""
import torch, dcgan_utils as du
data = du.load_images("mnist", "test")
gan = du.FastDCGAN(ngf=4, ndf=4, batch_size=16, out_dir={str(tmp_path)!r})
gan.train(1, data=(data[0][:96], data[1][:96]), max_seconds=60);"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(root)}}).execute()
    outputs = notebook.cells[0].outputs
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert {o.name for o in outputs if o.output_type == "stream"} == {"stdout"}
    assert "epoch 1/1" in text
    assert "\r" not in text
    assert [{"image/png", "text/html"} & set(o.data) for o in outputs if "data" in o] == [{"image/png"}, {"text/html"}]


# ----------------------------------------------------------------------------------------------- frames
def frames(folder):
    """Return the epochs of which there are frames, by folder."""
    return {path.name: sorted(int(p.stem[6:]) for p in path.glob("*.png")) for path in folder.glob("frames*")}


def test_each_run_has_frames_of_its_own(digits, tmp_path):
    def run(gan, epochs):
        gan.train(epochs, data=digits, callbacks=[du.SaveGrids()])
        return gan

    first = make(out_dir=str(tmp_path))
    (first.folder / "frames").mkdir(parents=True)
    (first.folder / "frames" / "epoch_009.png").write_text("somebody else's")
    run(first, 2).save(tmp_path / "after 2")
    run(first, 1)
    run(make(out_dir=str(tmp_path), save_every=2), 3)  # an equal GAN, another run
    assert frames(first.folder) == {"frames": [9], "frames-2": [1, 2, 3], "frames-3": [2]}
    run(first, 1).save(tmp_path / "after 4")
    run(du.GAN.load(tmp_path / "after 4", out_dir=str(tmp_path)), 1)
    assert frames(first.folder)["frames-2"] == [1, 2, 3, 4, 5]
    run(du.GAN.load(tmp_path / "after 2", out_dir=str(tmp_path)), 1)  # a branch: what it began with stays
    assert frames(first.folder) == {"frames": [9], "frames-2": [1, 2, 3, 4, 5], "frames-3": [2], "frames-4": [3]}


# ----------------------------------------------------------------------------------------------- trackers
def tracked(digits, folder, kind, epochs=2):
    """Return a GAN that was trained with a tracker and with scores of its samples."""
    gan = make(out_dir=str(folder))
    gan.train(epochs, data=digits, callbacks=[du.EvaluateEachEpoch(100, distances=False), du.Tracker(kind)])
    return gan


def test_a_tensorboard_log_holds_every_value_health_samples_and_config(digits, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gan = tracked(digits, tmp_path, "tensorboard")
    log = EventAccumulator(str(tmp_path / "fast" / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    log.Reload()
    known = {name for name, values in gan.history.items() if values[0] is not None}
    assert set(log.Tags()["scalars"]) == known | {"health"} > {"loss_D", "pixel_std_ratio", "confidence", "class_gap"}
    for name in known:
        assert [event.step for event in log.Scalars(name)] == [6, 12]  # six batches an epoch
        assert [event.value for event in log.Scalars(name)] == pytest.approx(gan.history[name], rel=1e-5)
    status = gan.diagnose().status
    assert log.Scalars("health")[-1].value == list(du.ICONS).index(status)
    image = log.Images("samples")[-1]
    assert (image.step, image.width, image.height) == (12, 8 * 30 + 2, 4 * 30 + 2)  # 32 samples
    texts = {tag: log.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in log.Tags()["tensors"]}
    assert json.loads(texts["config/text_summary"].strip("`\n"))["batch_size"] == gan.config.batch_size
    assert du.WORDS[status] in texts["panel/text_summary"]


RUN = """
import json, sys
import dcgan_utils as du
from test_callbacks import tracked

images, labels = du.load_images("mnist", "test")
gan = tracked((images[:96], labels[:96]), sys.argv[1], "wandb")
print(json.dumps([value for values in gan.history.values() for value in values if value is not None]))
"""


def test_wandb_with_a_bad_key_writes_an_offline_run_with_every_value(tmp_path, root):
    """In a process of its own, as a user's run is: wandb keeps a service beside each."""
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "WANDB_API_KEY": "too short"}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr.count("UserWarning: wandb could not start online") == 1, done.stderr
    (file,) = (tmp_path / "fast" / "wandb").glob("offline-run-*/run-*.wandb")
    written, values = file.read_bytes(), json.loads(next(x for x in done.stdout.splitlines() if x.startswith("[")))
    assert [value for value in values if json.dumps(value).encode() not in written] == []  # values stand there as JSON


class Wandb(types.ModuleType):
    """Stand in for wandb: note how runs begin and end, and fail where it is told to."""

    def __init__(self, *fails):
        super().__init__("wandb")
        self.__spec__, self.fails, self.calls = ModuleSpec("wandb", None, origin="here"), fails, []
        self.Settings, self.Image, self.Html = dict, bytes, str
        self.finish = lambda: self.init("finish")

    def init(self, mode, settings=None, **options):
        self.calls.append((mode, (settings or {}).get("api_key")))
        if mode in self.fails:
            raise RuntimeError("no")
        return self

    def log(self, values, step):
        self.init("log")


@pytest.mark.parametrize(
    ("fails", "calls", "warnings"),
    [
        ([], "online log log finish", 0),
        (["online"], "online offline log log finish", 1),
        (["online", "offline"], "online offline", 2),
        (["log", "finish"], "online log log finish", 3),
    ],
)
def test_a_tracker_cannot_end_or_change_training(fails, calls, warnings, digits, tmp_path, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb(*fails))
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    plain, gan = make(), make(out_dir=str(tmp_path))
    plain.train(2, data=digits, callbacks=[])
    recwarn.clear()
    gan.train(2, data=digits, callbacks=[du.Tracker("wandb")])
    assert [name for name, _ in wandb.calls] == calls.split()
    assert len([w for w in recwarn if "training goes on" in str(w.message)]) == warnings
    assert same(plain, gan)


LOGIN = "machine api.wandb.ai password s3cret"
KEYS = [  # environment, login, Kaggle's secrets: mode, key given
    ({}, "", {}, ("offline", None)),
    ({"WANDB_API_KEY": "s3cret"}, "", {}, ("online", None)),
    ({"WANDB_API_KEY": "s3cret", "WANDB_MODE": "offline"}, "", {}, ("offline", None)),
    ({}, LOGIN, {}, ("online", None)),
    ({}, "\xe9" + LOGIN, {}, ("online", None)),  # not UTF-8
    ({"NETRC": "/"}, "", {}, ("offline", None)),  # cannot be read
    ({"NETRC": "~nobody-of-that-name/netrc"}, "", {}, ("offline", None)),  # no home
    (BATCH, "", {"WANDB_API_KEY": "s3cret"}, ("online", "s3cret")),
    (BATCH, "", {}, ("offline", None)),  # a fork has no secret
]


@pytest.mark.parametrize(("environment", "login", "secrets", "opened"), KEYS)
def test_a_key_is_looked_for_and_never_asked_for(environment, login, secrets, opened, tmp_path, monkeypatch, capfd):
    (tmp_path / "netrc").write_text(login, encoding="latin-1")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in ({"NETRC": str(tmp_path / "netrc")} | environment).items():
        monkeypatch.setenv(name, value)
    client = types.SimpleNamespace(get_secret=secrets.__getitem__)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=lambda: client))
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    before = dict(os.environ)
    du.Tracker("wandb").on_train_begin(make(out_dir=str(tmp_path)))
    assert (wandb.calls, dict(os.environ)) == ([opened], before)
    assert "s3cret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_names_the_pip_line(kind, tmp_path, monkeypatch):
    (tmp_path / kind).mkdir()  # as an earlier run leaves it, no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, kind, raising=False)
    with pytest.raises(ImportError, match=f"pip install {kind}"):
        du.Tracker(kind)
