"""Notebooks built for Kaggle: the build, the client that pushes them, and a stand-in of the platform to run them in.

DCGAN_KAGGLE=all runs every built notebook and every form of MNIST in the stand-in; without it one notebook runs.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import save_file
from tiny import make

import dcgan_utils as du
import tools.kaggle_standin as standin

ROOT = Path(__file__).resolve().parent.parent
CASES = standin.cases(standin.BUILT) if os.environ.get("DCGAN_KAGGLE") == "all" else [(standin.BUILT[0], standin.MNIST)]
METADATA = sorted((ROOT / "kaggle").glob("[0-9]*/kernel-metadata.json"))
CLIENT = Path(sys.executable).with_name("kaggle")
needs_standin = pytest.mark.skipif(bool(standin.missing()), reason=standin.missing() or "-")
needs_client = pytest.mark.skipif(not CLIENT.exists(), reason="the kaggle client is not installed: pip install kaggle")


def code_of(notebook: Path) -> dict[str, str]:
    """Return the source of each code cell by its id."""
    cells = nbformat.read(notebook, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


def build(root: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the builder of a copy of the repository."""
    command = [sys.executable, str(root / "kaggle" / "build.py"), *options]
    return subprocess.run(command, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------- the build
def test_a_rebuild_changes_nothing():
    done = build(ROOT, "--check")
    assert done.returncode == 0, done.stdout


@pytest.fixture
def copy(tmp_path) -> Path:
    """Return a copy of what the builder reads, built once."""
    for name in ("kaggle", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("outputs", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "dcgan_utils.py", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "judge.safetensors", tmp_path / "data")
    assert build(tmp_path).returncode == 0
    return tmp_path


def test_the_check_names_what_a_changed_module_makes_stale(copy):
    with (copy / "dcgan_utils.py").open("a") as file:
        file.write("# one more line\n")
    done = build(copy, "--check")
    assert done.returncode == 1
    assert all(f"kaggle/{p.stem}/{p.name}" in done.stdout for p in standin.BUILT)
    assert build(copy).returncode == build(copy, "--check").returncode == 0
    assert code_of(copy / standin.BUILT[0].relative_to(ROOT))["setup-module"].endswith("# one more line")


def test_folders_come_and_go_with_the_notebooks(copy):
    (copy / "notebooks" / standin.BUILT[0].name).rename(copy / "notebooks" / "00_renamed.ipynb")
    assert build(copy, "--check").returncode == 1
    build(copy)
    assert (copy / "kaggle" / "00_renamed" / "00_renamed.ipynb").is_file()
    assert not (copy / "kaggle" / standin.BUILT[0].stem).exists()


def test_a_name_that_makes_too_long_a_title_is_refused(copy):
    (copy / "notebooks" / standin.BUILT[0].name).rename(copy / "notebooks" / f"00_{'long' * 12}.ipynb")
    done = build(copy)
    assert done.returncode == 1
    assert "Kaggle allows 5 to 50" in done.stderr.splitlines()[-1]


def test_the_judge_travels_with_the_notebooks_that_evaluate_only(copy, tmp_path, monkeypatch):
    weights = {"weight": torch.arange(6.0)}
    (copy / "data").mkdir(exist_ok=True)
    save_file(weights, copy / "data" / "judge.safetensors")
    for name, source in (("98_asks", "gan.evaluate(n=100)"), ("99_does_not", "evaluate = 3")):
        cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), copy / "notebooks" / f"{name}.ipynb")
    build(copy)
    assert "setup-judge" not in code_of(copy / "kaggle" / "99_does_not" / "99_does_not.ipynb")
    code = code_of(copy / "kaggle" / "98_asks" / "98_asks.ipynb")["setup-judge"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(code, {})
    assert Path("data/judge.safetensors").read_bytes() == (copy / "data" / "judge.safetensors").read_bytes()


@pytest.mark.parametrize("notebook", standin.BUILT, ids=lambda p: p.stem)
def test_a_built_notebook_is_whole_and_light(notebook):
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    assert content.metadata.kernelspec.name == "python3"  # papermill asks for it
    assert notebook.stat().st_size < 1_000_000  # so that Kaggle's editor stays quick
    code = code_of(notebook)
    assert next(iter(code)) == "setup-module"
    assert code["setup-module"].removeprefix("%%writefile dcgan_utils.py\n") + "\n" == du_source()
    assert [cell for cell in content.cells if cell.get("outputs")] == []
    assert not any(re.search(r"(?<![\w.])input\(", source) for name, source in code.items() if name != "setup-module")
    text = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    relative = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#", "attach"))]
    assert relative == []  # nothing lies beside it on Kaggle
    for badge in re.findall(r"github\.com/[^)\s]*\.ipynb|colab[^)\s]*\.ipynb", text):
        assert f"/blob/main/kaggle/{notebook.stem}/{notebook.name}" in badge, "a badge should open the built notebook"


def du_source() -> str:
    """Return the module's text."""
    return (ROOT / "dcgan_utils.py").read_text()


def test_every_notebook_has_its_folder():
    assert [p.name for p in standin.BUILT] == [p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert [p.parent.name for p in METADATA] == [p.stem for p in standin.BUILT]


@pytest.mark.parametrize("path", METADATA, ids=lambda p: p.parent.name)
def test_kernel_metadata(path):
    metadata = json.loads(path.read_text())
    owner, slug = metadata["id"].split("/")
    assert 5 <= len(metadata["title"]) <= 50
    assert re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower()) == slug
    assert (path.parent / metadata["code_file"]).is_file()
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["enable_gpu"] is metadata["is_private"] is True
    assert metadata["enable_internet"] is metadata["enable_tpu"] is False
    assert metadata["dataset_sources"] == ["hojjatk/mnist-dataset"]
    assert {owner} == {json.loads(p.read_text())["id"].split("/")[0] for p in METADATA}


# ------------------------------------------------------------------------------------------------------ the client
class Stub(http.server.BaseHTTPRequestHandler):
    """Answer as Kaggle's API does, as far as a push and a new data set need it, and note what was sent."""

    answers = {  # noqa: RUF012
        "SaveKernel": {"versionNumber": 1, "url": "https://www.kaggle.com/code/somebody/something"},
        "GetDatasetStatus": {"code": 404, "message": "not found"},
        "StartBlobUpload": {"token": "token", "createUrl": "http://localhost/upload"},
        "CreateDataset": {"status": "ok", "url": "https://www.kaggle.com/datasets/somebody/something"},
    }

    def do_POST(self) -> None:
        """Note the call, and answer it."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = self.path.rsplit("/", 1)[-1]
        self.server.calls.append((call, body))
        answer = self.answers.get(call, {})
        text = json.dumps(answer).encode()
        self.send_response(answer.get("code", 200))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def kaggle(tmp_path):
    """Return a function that runs the real client against the stub; it returns what it printed and what it sent."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.calls = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = f"http://127.0.0.1:{server.server_port}"  # with LOCALHOST the client asks http://localhost, through this
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE") and "proxy" not in k.lower()}
    environment |= {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": proxy, "https_proxy": proxy, "no_proxy": ""}
    environment |= {"KAGGLE_USERNAME": "somebody", "KAGGLE_KEY": "0" * 32}
    environment |= {"KAGGLE_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}

    def run(*arguments: str) -> tuple[str, list[tuple[str, bytes]]]:
        done = subprocess.run([CLIENT, *arguments], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, server.calls

    yield run
    server.shutdown()
    server.server_close()


@needs_client
@pytest.mark.parametrize("path", METADATA, ids=lambda p: p.parent.name)
def test_the_client_pushes_the_whole_notebook_without_a_warning(kaggle, path):
    printed, calls = kaggle("kernels", "push", "-p", str(path.parent))
    assert printed.strip().startswith("Kernel version 1 successfully pushed")
    assert len(printed.strip().splitlines()) == 1  # no word on title, slug, sources or tags
    assert [call for call, _ in calls] == ["SaveKernel"]
    sent, metadata = json.loads(calls[0][1]), json.loads(path.read_text())
    cells = json.loads(sent["text"])["cells"]
    built = nbformat.read(path.parent / metadata["code_file"], as_version=4).cells
    assert [cell["source"] for cell in cells] == [cell.source for cell in built]
    assert (sent["slug"], sent["newTitle"]) == (metadata["id"], metadata["title"])
    assert (sent["enableGpu"], sent["enableInternet"], sent["isPrivate"]) == (True, False, True)
    assert (sent["machineShape"], sent["datasetDataSources"]) == ("NvidiaTeslaT4", ["hojjatk/mnist-dataset"])


@needs_client
def test_the_client_notices_a_title_that_does_not_fit(kaggle, copy):
    path = copy / "kaggle" / METADATA[0].parent.name / "kernel-metadata.json"
    path.write_text(path.read_text().replace('"title": "DCGAN', '"title": "Other'))
    assert "does not resolve" in kaggle("kernels", "push", "-p", str(path.parent))[0]


@needs_client
def test_the_client_uploads_the_data_set(kaggle, copy):
    printed, calls = kaggle("datasets", "create", "-p", str(copy / "kaggle" / "dataset"))
    assert "being created" in printed
    uploads = [body for call, body in calls if call == "upload"]
    files = (ROOT / "dcgan_utils.py", ROOT / "data" / "judge.safetensors")
    assert sorted(uploads) == sorted(path.read_bytes() for path in files)
    created = next(json.loads(body) for call, body in calls if call == "CreateDataset")
    assert (created["slug"], created["licenseName"], len(created["files"])) == ("dcgan-utils", "MIT", 2)


# ---------------------------------------------------------------------------------------------------- the stand-in
def little_notebook(path: Path, *cells: str) -> Path:
    """Write a notebook with these code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)
    return path


@needs_standin
@pytest.mark.parametrize(("notebook", "layout"), CASES, ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_a_notebook_runs_in_the_stand_in_and_its_page_shows_all(tmp_path_factory, notebook, layout):
    folder = tmp_path_factory.getbasetemp() / "standin"  # what is attached is written once for all
    folder.mkdir(exist_ok=True)
    wrong, working = standin.case(notebook, layout, folder)
    assert wrong == []
    if notebook in standin.BUILT:
        assert (working / "dcgan_utils.py").read_text() == du_source()


ISOLATED = """
import os, pathlib, socket
assert (os.environ["KAGGLE_KERNEL_RUN_TYPE"], bool(os.environ["KAGGLE_DATA_PROXY_URL"])) == ("Batch", True)
for address in (("1.1.1.1", 80), ("example.org", 80)):
    try:
        socket.create_connection(address, timeout=3)
    except OSError:
        continue
    raise AssertionError("there is a network")
"""
READ_ONLY = """
assert pathlib.Path.cwd() == pathlib.Path("/kaggle/working")
assert sorted(p.name for p in pathlib.Path("/kaggle/input").iterdir()) == ["titanic"]
try:
    pathlib.Path("/kaggle/input/new").touch()
except OSError as error:
    print("refused:", error)
else:
    raise AssertionError("the input can be written")
"""


@needs_standin
@pytest.mark.parametrize("namespaces", [True, False])
def test_the_stand_in_is_shut_off(tmp_path, monkeypatch, namespaces):
    if namespaces and not standin.has_namespaces():
        pytest.skip("namespaces need Linux and root")
    monkeypatch.setattr(standin, "has_namespaces", lambda: namespaces)
    notebook = little_notebook(tmp_path / "probe.ipynb", ISOLATED, *([READ_ONLY] if namespaces else []))
    wrong, _ = standin.case(notebook, "titanic", tmp_path)
    assert wrong == ["0 pictures in the notebook, 0 on the page, 0 broken"]
    assert not Path("/kaggle/working").exists()


BAD_OUTPUTS = {
    "raise ValueError('no')": "exit code 1; ValueError: no",
    "import sys; print('hm', file=sys.stderr)": "stderr: hm",
    "import ipywidgets; print(ipywidgets.IntSlider(description='x'))": "raw text of an object",
    "from IPython.display import HTML; HTML('<img src=lost.png>')": "1 broken",
    "from pathlib import Path\nfor i in range(100): Path(f'{i}.txt').touch()": "100 files",
}


@needs_standin
def test_the_stand_in_sees_what_is_wrong(tmp_path):
    picture = "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()"
    bad = little_notebook(tmp_path / "bad.ipynb", picture, *list(BAD_OUTPUTS)[1:])
    complaint = "; ".join(standin.case(bad, "nothing", tmp_path)[0])
    stop = little_notebook(tmp_path / "stop.ipynb", picture, next(iter(BAD_OUTPUTS)))
    complaint += "; ".join(standin.case(stop, "nothing", tmp_path)[0])
    assert [part for part in BAD_OUTPUTS.values() if part not in complaint] == []


@needs_standin
def test_without_mnist_and_internet_a_run_stops_with_one_line_that_says_what_to_attach(tmp_path):
    module = f"%%writefile dcgan_utils.py\n{du_source()}"
    notebook = little_notebook(tmp_path / "load.ipynb", module, "import dcgan_utils\ndcgan_utils.load_images()")
    (complaint,), _ = standin.case(notebook, "nothing", tmp_path)
    assert "exit code 1; FileNotFoundError: mnist is not on this machine" in complaint
    assert "Add Input → hojjatk/mnist-dataset" in complaint
    assert "\n" not in complaint


# ---------------------------------------------------------------------------------------- the module on the platform
@pytest.fixture
def on_kaggle(monkeypatch):
    """Return a function that sets the variables of a run."""

    def set_run(kind: str | None, proxy: str | None = "https://dp.kaggle.net") -> None:
        for name, value in (("KAGGLE_KERNEL_RUN_TYPE", kind), ("KAGGLE_DATA_PROXY_URL", proxy)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    return set_run


def test_kaggle_is_where_both_variables_are_set(on_kaggle):
    expected = {("Batch", "url"): "Batch", ("Interactive", "url"): "Interactive"}
    for pair in [("Batch", "url"), ("Interactive", "url"), ("Batch", None), (None, "url"), (None, None), ("", "url")]:
        on_kaggle(*pair)
        assert du.kaggle_run() == expected.get(pair, "")


def test_a_run_without_gpu_says_so_and_is_smaller(on_kaggle, monkeypatch):
    monkeypatch.delenv("DCGAN_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    on_kaggle("Batch")
    line = du.describe_machine()
    assert "\n" not in line
    assert all(part in line for part in ("Kaggle, Batch run", "no GPU", "'cpu'", "Accelerator → GPU T4 x2"))
    assert du.scaled(1, 2, 3) == 2
    on_kaggle(None)
    assert "Accelerator" not in du.describe_machine()


def test_two_t4s_are_named(on_kaggle, monkeypatch):
    monkeypatch.delenv("DCGAN_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    on_kaggle("Interactive")
    expected = "Kaggle, Interactive run: 2 × Tesla T4, of which one is used; fp16, scale 'gpu'"
    assert du.describe_machine() == expected


@pytest.mark.parametrize(("kind", "lines"), [("Batch", 0), ("Interactive", 2), (None, 2)])
def test_a_batch_run_prints_by_the_epoch_only(on_kaggle, mnist_small, capsys, kind, lines):
    on_kaggle(kind)
    make(du.StableDCGAN, log_every=2).train(1, data=mnist_small[0][:64], callbacks=[du.BatchLines()])
    printed = capsys.readouterr().out
    assert len(re.findall(r"Batch \d", printed)) == lines
    assert printed.count("summary") == 1


def test_full_lengths_leave_fewer_than_a_hundred_files(mnist_small, tmp_path):
    for kind in (du.DCGAN, du.StableDCGAN, du.FastDCGAN):
        out = tmp_path / kind.__name__
        gan = make(kind, out_dir=str(out), ema=0.0)
        callbacks = [du.SaveGrids(), du.SaveCheckpoints(out)]
        gan.train(data=(mnist_small[0][:32], mnist_small[1][:32]), callbacks=callbacks)
        assert gan.epoch == kind.defaults.num_epochs
    assert 40 < sum(p.is_file() for p in tmp_path.rglob("*")) < 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a disk that is always full")
def test_a_full_disk_is_one_line(tmp_path, mnist_small):
    (tmp_path / "grid.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        du.save_picture(du.plot_images(du.normalise(mnist_small[0][:8])), tmp_path / "grid.png")
    assert "free some space" in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- where MNIST is looked for
@pytest.fixture
def mounts(tmp_path, monkeypatch) -> Path:
    """Return a folder that the module takes for Kaggle's input; nothing is embedded, nothing can be downloaded."""

    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(du, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setattr(du, "EMBEDDED_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(du.datasets, "MNIST", refuse)
    return tmp_path / "input"


def test_a_known_set_is_found_beside_a_huge_one(mounts, monkeypatch, capsys):
    monkeypatch.setattr(du, "SEARCH_LIMIT", 50)
    for i in range(60):
        (mounts / "datasets" / "a" / "huge" / f"{i}").mkdir(parents=True)
    standin.LAYOUTS[standin.MNIST](mounts / standin.MNIST)
    assert len(du.load_images()[0]) == 60_000
    assert "Kaggle" in capsys.readouterr().out


def test_the_search_goes_level_by_level_and_ends(mounts, monkeypatch, capsys):
    for i in range(60):
        (mounts / "a" / f"{i}" / "deep").mkdir(parents=True)
    standin.attach_idx(mounts / "unknown", splits=("t10k",))
    monkeypatch.setattr(du, "SEARCH_LIMIT", 80)  # enough for two levels, a first
    assert len(du.load_images("mnist", "test")[0]) == 10_000
    monkeypatch.setattr(du, "SEARCH_LIMIT", 40)
    with pytest.raises(FileNotFoundError, match="Add Input"):
        du.load_images("mnist", "test")


def test_half_of_a_set_does_not_hide_a_whole_one(mounts, capsys):
    standin.attach_idx(mounts / "mnist-dataset", splits=("train-images", "t10k"))
    standin.attach_idx(mounts / "datasets" / "hojjatk" / "mnist-dataset-2")
    assert len(du.load_images()[1]) == 60_000


@pytest.mark.parametrize(
    ("layout", "parts"),
    {
        "nothing": ["it holds nothing"],
        "titanic": ["titanic/train.csv has 3 pixel columns"],
        "half/mnist-dataset": ["train-labels-idx1-ubyte", "it holds half/mnist-dataset/t10k-images"],
    }.items(),
)
def test_what_is_attached_in_place_of_mnist_is_named(mounts, layout, parts):
    mounts.mkdir()
    standin.LAYOUTS[layout](mounts / layout)
    with pytest.raises(FileNotFoundError) as caught:
        du.load_images()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("no network", "Add Input → hojjatk/mnist-dataset", "attached now: ", *parts):
        assert part in message


def test_elsewhere_the_message_does_not_speak_of_what_is_attached(mounts):
    with pytest.raises(FileNotFoundError) as caught:
        du.load_images()
    assert "attached now" not in str(caught.value)
