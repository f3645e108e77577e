"""What a tracker writes, read back from a real TensorBoard log and a real offline run of wandb; and who has neither."""

import json
import math
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import make, same

import dcgan_utils as du


@pytest.fixture(scope="module")
def digits():
    images, labels = du.load_images("mnist", "test")
    return images[:96], labels[:96]


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Be nobody: no key in the environment and no earlier login."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(du, "kaggle_run", lambda: "")
    return tmp_path


def tracked(digits, folder, kind, epochs=2):
    """Return a GAN that was trained with a tracker and the judge, and its tracker."""
    gan = make(out_dir=str(folder))
    gan.train(epochs, data=digits, callbacks=[du.JudgeSamples(100, distances=False), du.Tracker(kind)])
    return gan


# ----------------------------------------------------------------------------------------------- TensorBoard
def test_a_tensorboard_log_holds_every_reading_health_samples_and_config(digits, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gan = tracked(digits, tmp_path, "tensorboard")
    log = EventAccumulator(str(tmp_path / "fast" / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    log.Reload()
    known = {name for name, values in gan.history.items() if values[0] is not None}
    assert set(log.Tags()["scalars"]) == known | {"health"}
    assert {"loss_D", "diversity", "confidence", "class_gap"} <= known
    for name in known:
        events = log.Scalars(name)
        assert [event.step for event in events] == [6, 12]  # six batches an epoch
        assert [event.value for event in events] == pytest.approx(gan.history[name], rel=1e-5)
    assert log.Scalars("health")[-1].value == list(du.ICONS).index(gan.diagnose().status)
    images = log.Images("samples")
    assert [image.step for image in images] == [6, 12]
    assert images[-1].encoded_image_string[:4] == b"\x89PNG"
    assert (images[-1].width, images[-1].height) == (8 * 30 + 2, 4 * 30 + 2)  # 32 samples
    texts = {tag: log.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in log.Tags()["tensors"]}
    assert json.loads(texts["config/text_summary"].strip("`\n"))["batch_size"] == gan.config.batch_size
    assert "sample diversity" in texts["panel/text_summary"]


def test_a_resumed_run_goes_on_in_the_same_log(digits, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gan = tracked(digits, tmp_path, "tensorboard", epochs=1)
    gan.save(tmp_path / "c")
    again = du.GAN.load(tmp_path / "c")
    again.train(1, data=digits, callbacks=[du.Tracker("tensorboard")])
    log = EventAccumulator(str(tmp_path / "fast" / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("loss_D")] == [6, 12]


# ----------------------------------------------------------------------------------------------- wandb
def wandb_records(raw):
    """Yield the records of a .wandb file: LevelDB's log format, blocks of 32 KiB behind a header of seven bytes."""
    assert raw[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:  # too short for another header
            position += left
            continue
        length, kind = struct.unpack_from("<HB", raw, position + 4)  # after a checksum of four bytes
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield parts
            parts = b""


RUN = """
import json, sys
import dcgan_utils as du
from test_tracker import tracked

images, labels = du.load_images("mnist", "test")
gan = tracked((images[:96], labels[:96]), sys.argv[1], "wandb")
print(json.dumps({"history": gan.history, "status": gan.diagnose().status, "seed": gan.config.seed}))
"""


def test_wandb_without_a_key_writes_an_offline_run_with_every_reading(no_key):
    """In a process of its own, as a user's run is: wandb keeps a service beside each."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    command = [sys.executable, "-c", RUN, str(no_key)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trained = json.loads(done.stdout.splitlines()[-1])
    (file,) = (no_key / "fast" / "wandb").glob("offline-run-*/run-*.wandb")
    rows, config = [], {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert [row["_step"] for row in rows] == [6, 12]
    known = {name: values for name, values in trained["history"].items() if values[0] is not None}
    assert {"loss_D", "diversity", "confidence", "class_gap"} <= set(known)
    for name, values in known.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-6)
    assert rows[-1]["health"] == list(du.ICONS).index(trained["status"])
    assert (config["recipe"], config["batch_size"], config["seed"]) == ("fast", 16, trained["seed"])
    assert len(list(file.parent.glob("files/media/images/samples_*.png"))) == 2


def fake_secrets(monkeypatch, answer):
    """Let Kaggle's client be there and answer with a key, or raise."""

    class UserSecretsClient:
        def get_secret(self, name):
            assert name == "WANDB_API_KEY"
            if isinstance(answer, Exception):
                raise answer
            return answer

    module = types.ModuleType("kaggle_secrets")
    module.UserSecretsClient = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setattr(du, "kaggle_run", lambda: "Batch")


def test_a_key_is_looked_for_and_never_asked_for_or_shown(no_key, monkeypatch, capsys):
    assert not du._wandb_has_key()
    fake_secrets(monkeypatch, RuntimeError("no secret of that name"))
    assert not du._wandb_has_key()  # a fork
    assert "WANDB_API_KEY" not in os.environ
    fake_secrets(monkeypatch, "s3cret")
    assert du._wandb_has_key()
    assert os.environ.pop("WANDB_API_KEY") == "s3cret"
    monkeypatch.setattr(du, "kaggle_run", lambda: "")
    assert not du._wandb_has_key()
    (no_key / "netrc").write_text("machine api.wandb.ai login user password s3cret\n")
    assert du._wandb_has_key()
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err


# ----------------------------------------------------------------------------------------------- none, or not there
def test_a_tracker_is_in_the_default_callbacks_only_where_the_config_names_one():
    assert not any(isinstance(callback, du.Tracker) for callback in make().default_callbacks())
    for kind in ("wandb", "tensorboard"):
        trackers = [c for c in make(du.StableDCGAN, tracker=kind).default_callbacks() if isinstance(c, du.Tracker)]
        assert [tracker.kind for tracker in trackers] == [kind]


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_says_the_pip_line_before_the_first_batch(kind, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(du.importlib.util, "find_spec", lambda name: None)
    gan = make(out_dir=str(tmp_path), tracker=kind)
    with pytest.raises(ImportError, match=f"pip install {kind}"):
        gan.train(1, data=digits, callbacks=[du.Tracker(kind)])
    assert gan.step == 0


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(du.importlib.util, "find_spec", lambda name: None)
    assert (
        du.main(["train", "--recipe", "fast", "--out", str(tmp_path), "--set", "tracker=wandb", "ngf=4", "ndf=4"]) == 1
    )
    assert capsys.readouterr().err == "error: tracker = 'wandb' needs a package: pip install wandb\n"


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match=r"Config\.tracker = 'mlflow' is not one of"):
        make(tracker="mlflow")
    with pytest.raises(ValueError, match="'mlflow' is not one of wandb, tensorboard"):
        du.Tracker("mlflow")


def test_tracking_changes_nothing_and_a_full_disk_costs_only_the_log(digits, tmp_path, monkeypatch):
    lines = []

    def opened(gan):
        def write(step, line, grid, panel):
            lines.append((step, line, grid.shape, panel))
            raise OSError("No space left on device")

        return write, lambda: lines.append("closed")

    monkeypatch.setattr(du, "_open_tensorboard", opened)
    plain, gan = make(out_dir=str(tmp_path)), make(out_dir=str(tmp_path))
    plain.train(1, data=digits, callbacks=[])
    with pytest.warns(UserWarning, match="the tracker's log was not saved"):
        gan.train(1, data=digits, callbacks=[du.Tracker("tensorboard")])
    assert same(plain, gan)
    step, line, shape, panel = lines[0]
    assert (step, shape, lines[1]) == (6, (4 * 30 + 2, 8 * 30 + 2, 3), "closed")
    assert all(math.isfinite(value) for value in line.values())
    assert "sample diversity" in panel
    assert torch.is_tensor(gan.images)


def test_the_log_is_closed_when_training_diverges(digits, monkeypatch):
    closed = []
    monkeypatch.setattr(du, "_open_wandb", lambda gan: (lambda *line: None, lambda: closed.append(True)))

    class Poisons(du.Callback):
        def on_batch_end(self, gan):
            with torch.no_grad():
                next(gan.generator.parameters()).fill_(float("nan"))

    with pytest.raises(du.DivergenceError):
        make().train(1, data=digits, callbacks=[Poisons(), du.Tracker("wandb")])
    assert closed == [True]
