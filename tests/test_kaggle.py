"""The one-file module, notebooks built for Kaggle, the client that pushes them, and a stand-in of the platform.

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
from nbclient import NotebookClient

import dcgan_utils as du
import tools.kaggle_standin as standin

ROOT = Path(__file__).resolve().parent.parent
CLASSIFIER = Path("data", "classifier.safetensors")
CASES = standin.cases(standin.BUILT) if os.environ.get("DCGAN_KAGGLE") == "all" else [(standin.BUILT[0], standin.MNIST)]
METADATA = sorted((ROOT / "kaggle").glob("[0-9]*/kernel-metadata.json"))
CLIENT = Path(sys.executable).with_name("kaggle")
needs_standin = pytest.mark.skipif(bool(standin.missing()), reason=standin.missing() or "-")
needs_client = pytest.mark.skipif(not CLIENT.exists(), reason="the kaggle client is not installed: pip install kaggle")


def code_of(notebook: Path) -> dict[str, str]:
    """Return the source of each code cell by its id."""
    cells = nbformat.read(notebook, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


def little_notebook(path: Path, *cells: str) -> Path:
    """Write a notebook with a title and these code cells."""
    code = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *code])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)
    return path


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a command and keep what it prints."""
    return subprocess.run(command, capture_output=True, text=True, **options)


def build(root: Path, *options: str | Path) -> subprocess.CompletedProcess:
    """Run the builder of a copy of the repository."""
    return run(sys.executable, root / "kaggle" / "build.py", *options)


@pytest.fixture(scope="session")
def one_file(tmp_path_factory) -> Path:
    """Return the one-file module, alone in a folder."""
    path = tmp_path_factory.mktemp("alone") / "dcgan_utils.py"
    done = build(ROOT, "--single", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def copy(tmp_path) -> Path:
    """Return a copy of what the builder reads, built once."""
    for name in ("kaggle", "notebooks", "dcgan"):
        left_out = shutil.ignore_patterns("outputs", ".ipynb_*", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    (tmp_path / "data").mkdir()
    for name in ("dcgan_utils.py", CLASSIFIER):
        shutil.copy(ROOT / name, tmp_path / name)
    assert build(tmp_path).returncode == 0
    return tmp_path


# ------------------------------------------------------------------------------------------------------- one file
TRAIN_A_LITTLE = """
import sys, torch
import dcgan_utils as du
assert [name for name in sys.argv[1:] if not hasattr(du, name)] == []
gan = du.FastDCGAN(ngf=4, ndf=4, nz=8, batch_size=16, conditional=False)
gan.train(1, data=torch.randint(256, (64, 28, 28), dtype=torch.uint8), callbacks=[du.SaveGrids()])
assert torch.equal(du.GAN.load(gan.save("saved")).sample(4, seed=1), gan.sample(4, seed=1))
assert gan.diagnose().findings
assert "dcgan" not in sys.modules
"""


def test_the_one_file_imports_and_trains_alone(one_file):
    public = [name for name in vars(du) if not name.startswith("_") and name != "sys"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in (["-c", TRAIN_A_LITTLE, *public], [one_file, "sample", "--checkpoint", "saved", "--out", "a.png"]):
        done = run(sys.executable, *command, cwd=one_file.parent, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
    assert (one_file.parent / "a.png").is_file()


def test_a_notebook_runs_with_the_one_file_and_the_classifier_alone(one_file, tmp_path, monkeypatch):
    alone, mounts = tmp_path / "alone", tmp_path / "input"
    (alone / "data").mkdir(parents=True)
    shutil.copy(one_file, alone)
    shutil.copy(ROOT / CLASSIFIER, alone / CLASSIFIER)
    standin.attach_idx(mounts / standin.MNIST)  # there is no internet to get MNIST from
    monkeypatch.setenv("DCGAN_KAGGLE_INPUT", str(mounts))
    monkeypatch.setenv("DCGAN_PROFILE", "smoke")
    notebook = nbformat.read(ROOT / "notebooks" / standin.BUILT[0].name, as_version=4)
    proof = f"assert du.__file__ == '{alone / one_file.name}' and 'dcgan' not in sys.modules\nprint(*gan.history)"
    notebook.cells.append(nbformat.v4.new_code_cell(proof))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(alone)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert "confidence" in notebook.cells[-1].outputs[0].text  # the classifier was found


def test_the_one_file_is_as_clean_as_its_parts(one_file):
    content, joined = one_file.read_text(), one_file.with_name("joined.py")  # dcgan_utils.py may import what it likes
    joined.write_text(content)
    for command in (["check"], ["format", "--check"]):
        done = run(sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", joined)
        assert done.returncode == 0, done.stdout
    assert re.findall(r"^from \.|^\s*from dcgan[. ]|^__all__|TYPE_CHECKING", content, re.MULTILINE) == []
    assert content.startswith((ROOT / "dcgan_utils.py").read_text().partition('"""\n')[0])
    assert content.endswith('if __name__ == "__main__":\n    sys.exit(main())\n')


REFUSED = {  # what is added to losses.py -> what the build says
    "def configure(): ...": "configure of config.py, configure of losses.py",
    "Path = 3": "Path of from pathlib import Path, Path of losses.py",
    "def print(): ...": "print of Python, print of losses.py",
    "def late():\n    from .config import Config": "imports belong at the top",
    "import abc": "imports belong at the top",
}


def test_what_cannot_be_joined_is_refused(copy):
    path, new = copy / "dcgan" / "losses.py", copy / "new.py"
    sound = path.read_text()
    for text, complaint in REFUSED.items():
        path.write_text(f"{sound}\n\n{text}\n")
        assert complaint in build(copy, "--single", new).stderr.splitlines()[-1]
    path.write_text(sound)
    shutil.copy(path, copy / "dcgan" / "another.py")
    assert "differ: another" in build(copy, "--single", new).stderr.splitlines()[-1]
    assert not new.exists()


# ------------------------------------------------------------------------------------------------------- the build
def test_a_rebuild_changes_nothing():
    done = build(ROOT, "--check")
    assert done.returncode == 0, done.stdout


def test_the_check_names_what_a_changed_module_makes_stale(copy):
    with (copy / "dcgan" / "losses.py").open("a") as file:
        file.write("# one more line\n")
    done = build(copy, "--check")
    assert done.returncode == 1
    assert all(f"kaggle/{p.stem}/{p.name}" in done.stdout for p in standin.BUILT)
    assert build(copy).returncode == build(copy, "--check").returncode == 0
    assert "\n# one more line\n" in code_of(copy / standin.BUILT[0].relative_to(ROOT))["setup-module"]


def test_folders_come_and_go_with_the_notebooks(copy):
    (copy / "notebooks" / standin.BUILT[0].name).rename(copy / "notebooks" / "00_renamed.ipynb")
    assert build(copy, "--check").returncode == 1
    build(copy)
    assert (copy / "kaggle" / "00_renamed" / "00_renamed.ipynb").is_file()
    assert not (copy / "kaggle" / standin.BUILT[0].stem).exists()
    (copy / "notebooks" / "00_renamed.ipynb").rename(copy / "notebooks" / f"00_{'long' * 12}.ipynb")
    assert "Kaggle allows 5 to 50" in build(copy).stderr.splitlines()[-1]


def test_every_address_comes_from_one_place(copy):
    script = copy / "kaggle" / "build.py"
    line, *old = re.search(r'REPOSITORY, OWNER = "(.*)", "(.*)"', script.read_text()).group(0, 1, 2)
    script.write_text(script.read_text().replace(line, 'REPOSITORY, OWNER = "someone/else", "somebody"'))
    build(copy)
    texts = {path: path.read_text() for path in copy.rglob("*") if path.suffix in (".ipynb", ".json")}
    assert [path for path, text in texts.items() for address in old if f"{address}/" in text] == []
    assert all("github.com/someone/else/blob/main/kaggle/" in texts[path] for path in texts if path.suffix == ".ipynb")


def test_the_classifier_travels_with_the_notebooks_that_need_it_only(copy, tmp_path, monkeypatch):
    cases = {"97_trains": "gan.train(1)", "98_asks": "gan.evaluate(n=100)", "99_does_not": "evaluate = D.train()"}
    for name, source in cases.items():
        little_notebook(copy / "notebooks" / f"{name}.ipynb", source)
    build(copy)
    codes = {name: code_of(copy / "kaggle" / name / f"{name}.ipynb") for name in cases}
    assert [name for name, code in codes.items() if "setup-classifier" in code] == ["97_trains", "98_asks"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(codes["98_asks"]["setup-classifier"], {})
    assert CLASSIFIER.read_bytes() == (ROOT / CLASSIFIER).read_bytes()


@pytest.mark.parametrize("notebook", standin.BUILT, ids=lambda p: p.stem)
def test_a_built_notebook_is_whole_and_light(notebook, one_file):
    content, code = nbformat.read(notebook, as_version=4), code_of(notebook)
    nbformat.validate(content)
    assert content.metadata.kernelspec.name == "python3"  # papermill asks for it
    assert notebook.stat().st_size < 1_000_000  # so that Kaggle's editor stays quick
    assert next(iter(code)) == "setup-module"
    assert code["setup-module"].removeprefix("%%writefile dcgan_utils.py\n") + "\n" == one_file.read_text()
    assert [cell for cell in content.cells if cell.get("outputs")] == []
    assert not any(re.search(r"(?<![\w.])input\(", source) for name, source in code.items() if name != "setup-module")
    text = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    relative = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#", "attach"))]
    assert relative == []  # nothing lies beside it on Kaggle
    badges = re.findall(r"github\.com/[^)\s]*\.ipynb|colab[^)\s]*\.ipynb", text)
    assert all(f"/blob/main/kaggle/{notebook.stem}/{notebook.name}" in badge for badge in badges)  # the built one


def test_kernel_metadata():
    assert [p.parent.name for p in METADATA] == [p.stem for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    records = {path: json.loads(path.read_text()) for path in METADATA}
    assert len({record["id"].split("/")[0] for record in records.values()}) == 1
    for path, record in records.items():
        assert 5 <= len(record["title"]) <= 50
        assert re.sub(r"[^a-z0-9]+", "-", record["title"].lower()) == record["id"].split("/")[1]
        assert (path.parent / record["code_file"]).is_file()
        assert (record["machine_shape"], record["dataset_sources"]) == ("NvidiaTeslaT4", ["hojjatk/mnist-dataset"])
        assert record["enable_gpu"] is record["is_private"] is True
        assert record["enable_internet"] is record["enable_tpu"] is False


# ------------------------------------------------------------------------------------------------------ the client
class Stub(http.server.BaseHTTPRequestHandler):
    """Answer as Kaggle's API does, as far as a push needs it, and note what was sent."""

    def do_POST(self) -> None:
        """Note the call, and answer it."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append((self.path.rsplit("/", 1)[-1], body))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"versionNumber": 1, "url": "https://www.kaggle.com/code/somebody/something"}')

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

    def call(*arguments: str | Path) -> tuple[str, list[tuple[str, bytes]]]:
        done = run(CLIENT, *arguments, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, server.calls

    yield call
    server.shutdown()
    server.server_close()


@needs_client
def test_the_client_pushes_the_whole_notebook_without_a_warning(kaggle):
    path = METADATA[0]
    printed, calls = kaggle("kernels", "push", "-p", path.parent)
    assert printed.strip().startswith("Kernel version 1 successfully pushed")
    assert len(printed.strip().splitlines()) == 1  # no word on title, slug, sources or tags
    assert [call for call, _ in calls] == ["SaveKernel"]
    sent, metadata = json.loads(calls[0][1]), json.loads(path.read_text())
    built = nbformat.read(path.parent / metadata["code_file"], as_version=4).cells
    assert [cell["source"] for cell in json.loads(sent["text"])["cells"]] == [cell.source for cell in built]
    assert (sent["slug"], sent["newTitle"]) == (metadata["id"], metadata["title"])
    assert (sent["enableGpu"], sent["enableInternet"], sent["isPrivate"]) == (True, False, True)
    assert (sent["machineShape"], sent["datasetDataSources"]) == ("NvidiaTeslaT4", ["hojjatk/mnist-dataset"])


# ---------------------------------------------------------------------------------------------------- the stand-in
@needs_standin
@pytest.mark.parametrize(("notebook", "layout"), CASES, ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_a_notebook_runs_in_the_stand_in_and_its_page_shows_all(tmp_path_factory, notebook, layout):
    folder = tmp_path_factory.getbasetemp() / "standin"  # what is attached is written once for all
    folder.mkdir(exist_ok=True)
    assert standin.case(notebook, layout, folder)[0] == []


ISOLATED = """
import os, pathlib, socket
assert pathlib.Path.cwd() == pathlib.Path("/kaggle/working")
for action in (lambda: socket.create_connection(("1.1.1.1", 80), timeout=3), pathlib.Path("/kaggle/input/new").touch):
    try:
        action()
    except OSError:
        continue
    raise AssertionError("there is a network, or the input can be written")
"""
PICTURE = "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()"
BAD_CELLS = {
    "import sys; print('hm', file=sys.stderr)": "stderr: hm",
    "import ipywidgets; print(ipywidgets.IntSlider(description='x'))": "raw text of an object",
    "from IPython.display import HTML; HTML('<img src=lost.png>')": "1 broken",
    "from pathlib import Path\nfor i in range(100): Path(f'{i}.txt').touch()": "100 files",
}


@needs_standin
def test_the_stand_in_is_shut_off_and_sees_what_is_wrong(tmp_path, one_file):
    load = f"%%writefile dcgan_utils.py\n{one_file.read_text()}", "import dcgan_utils\ndcgan_utils.load_images()"
    cases = {"shut_off": [ISOLATED, PICTURE], "bad": [PICTURE, *BAD_CELLS], "load": load}
    found = {}
    for name, cells in cases.items():
        found[name] = "; ".join(
            standin.case(little_notebook(tmp_path / f"{name}.ipynb", *cells), "nothing", tmp_path)[0]
        )
    assert found["shut_off"] == ""
    assert [part for part in BAD_CELLS.values() if part not in found["bad"]] == []
    assert "exit code 1; FileNotFoundError: mnist is not on this machine" in found["load"]
    assert "Add Input → hojjatk/mnist-dataset" in found["load"]
    assert "\n" not in found["load"]
    assert not Path("/kaggle/working").exists()


# ---------------------------------------------------------------------------------------- the module on the platform
def on_kaggle(monkeypatch, kind: str | None, proxy: str | None = "https://dp.kaggle.net") -> None:
    """Set the variables of a run on Kaggle."""
    for name, value in (("KAGGLE_KERNEL_RUN_TYPE", kind), ("KAGGLE_DATA_PROXY_URL", proxy), ("DCGAN_PROFILE", None)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


def test_the_machine_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for pair in [("Batch", None), (None, "url"), (None, None), ("", "url")]:  # at home some set one of them, never both
        on_kaggle(monkeypatch, *pair)
        assert du.describe_machine().startswith("not on Kaggle: no GPU; fp32, scale 'cpu'")
    on_kaggle(monkeypatch, "Batch")
    assert all(part in du.describe_machine() for part in ("Kaggle, Batch run", "no GPU", "Accelerator → GPU T4 x2"))
    t4s = {"is_available": lambda: True, "device_count": lambda: 2, "get_device_name": lambda index: "Tesla T4"}
    for name, answer in (t4s | {"is_bf16_supported": lambda including_emulation: including_emulation}).items():
        monkeypatch.setattr(torch.cuda, name, answer)
    on_kaggle(monkeypatch, "Interactive")
    expected = "Kaggle, Interactive run: 2 × Tesla T4, of which one is used; fp16, scale 'gpu'"
    assert du.describe_machine() == expected
