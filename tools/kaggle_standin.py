"""Run notebooks in a stand-in of Kaggle, offline, and look at the pages that it would show.

    python tools/kaggle_standin.py --set-up           # once: nbconvert 6.4.5 in an environment of its own
    python tools/kaggle_standin.py                    # every built notebook, and one with every form of MNIST
    python tools/kaggle_standin.py --keep FOLDER NB…  # some notebooks; pages and screenshots stay in FOLDER

As on Kaggle: /kaggle/input is read-only and /kaggle/working the place to write; the variables of a batch run are set;
there is no network; papermill runs the notebook with the kernel that its metadata name; nbconvert 6.4.5's classic
template makes the page. Chromium then opens the page and tells what it shows. Not as on Kaggle: the image's versions
and its GPUs. Needs Linux namespaces, papermill, chromium and the environment of --set-up.
"""

import argparse
import gzip
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import venv
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAGE_PACKAGES = ("nbconvert==6.4.5", "packaging")  # Kaggle's nbconvert; it imports packaging without naming it
PAGE_ENVIRONMENT = ROOT / ".venv-kaggle-page"
BUILT = sorted((ROOT / "kaggle").glob("[0-9]*/*.ipynb"))
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000"),
)
WIDGET_TEXT = re.compile(
    r"\b(interactive|[VH]Box|Tab|Accordion|IntSlider|FloatSlider|Dropdown|Button|Output|Image|HTML|FloatProgress)"
    r"\((children|value|description|\))|<(Figure|Picture) size|<IPython|<PIL"
)
PROBE = """<script>
addEventListener("load", () => {
  const own = [...document.images].filter(image => !image.src.startsWith("http"));  // badges come from elsewhere
  const broken = own.filter(image => !image.naturalWidth).length;
  document.querySelectorAll("div.input").forEach(code => code.remove());  // it may name widgets
  const found = JSON.stringify({images: own.length, broken: broken, text: document.body.innerText});
  document.documentElement.innerHTML = "<pre id=found>" + encodeURIComponent(found) + "</pre>";
});
</script>
"""


# ---------------------------------------------------------------------------------------------- what may be attached
def attach_idx(folder: Path) -> None:
    """Write MNIST as hojjatk/mnist-dataset has it: plain IDX files, each once with a dot and once in its own folder."""
    for path in sorted((ROOT / "data" / "mnist").glob("*.gz")):
        name, content = path.name.removesuffix(".gz"), gzip.decompress(path.read_bytes())
        (folder / name).mkdir(parents=True)
        (folder / name / name).write_bytes(content)
        (folder / name.replace("-idx", ".idx")).write_bytes(content)


def attach_csv(train: str, test: str, test_labels: bool, folder: Path) -> None:
    """Write MNIST as CSV, a header and one image a row; the competition's test.csv has no labels."""
    folder.mkdir(parents=True)
    for stem, name, labeled in (("train", train, True), ("t10k", test, test_labels)):
        bodies = [gzip.decompress(path.read_bytes()) for path in sorted((ROOT / "data" / "mnist").glob(f"{stem}-*.gz"))]
        images, labels = (np.frombuffer(body, np.uint8, offset=4 + 4 * body[3]) for body in bodies)
        table = np.column_stack([labels, images.reshape(-1, 784)])[:, 0 if labeled else 1 :]
        header = ",".join(["label"] * labeled + [f"pixel{i}" for i in range(784)])
        np.savetxt(folder / name, table, fmt="%d", delimiter=",", header=header, comments="")


def attach_module(folder: Path) -> None:
    """Write the data set with the module, as `python kaggle/build.py` fills it, and MNIST beside it."""
    folder.mkdir(parents=True)
    command = [sys.executable, ROOT / "kaggle" / "build.py", "--single", folder / "dcgan_utils.py"]
    subprocess.run(command, check=True)
    shutil.copy(ROOT / "data" / "classifier.safetensors", folder)
    attach_idx(folder.parents[1] / "hojjatk" / "mnist-dataset")


MNIST, MODULE = "datasets/hojjatk/mnist-dataset", "datasets/somebody/dcgan-utils"
LAYOUTS = {  # where it is mounted -> what writes it
    MNIST: attach_idx,
    "datasets/oddrationale/mnist-in-csv": partial(attach_csv, "mnist_train.csv", "mnist_test.csv", True),
    "competitions/digit-recognizer": partial(attach_csv, "train.csv", "test.csv", False),
    MODULE: attach_module,
    "nothing": lambda folder: None,
}


# ---------------------------------------------------------------------------------------------------- the platform
UNSHARE = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--mount", "--net", "--propagation", "private"]


def run_notebook(notebook: Path, inputs: Path, working: Path, profile: str = "smoke") -> subprocess.CompletedProcess:
    """Run a notebook as a batch run does; its result is __notebook__.ipynb in the working folder.

    It sees /kaggle/working, a read-only /kaggle/input and no network but loopback. Its root folder holds all that the
    real one does, and /kaggle: so nothing is left on the machine.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PYTHONPATH")}
    environment |= {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_DATA_PROXY_URL": "https://dp.kaggle.net"}
    environment |= {"DCGAN_PROFILE": profile}
    options = ["--no-progress-bar", "--no-log-output", "--execution-timeout", "1800"]
    command = [sys.executable, "-m", "papermill", str(notebook), "__notebook__.ipynb", *options]
    script = """
        set -e
        ip link set lo up
        root=$3
        mount -t tmpfs none "$root"
        for path in /*; do
            if [ -L "$path" ]; then cp -P "$path" "$root"; continue; fi
            [ -d "$path" ] && [ "$path" != /kaggle ] || continue
            mkdir "$root$path"
            mount --rbind "$path" "$root$path"
        done
        mkdir -p "$root/kaggle/input" "$root/kaggle/working"
        mount --bind "$1" "$root/kaggle/input"
        mount -o remount,bind,ro "$root/kaggle/input"
        mount --bind "$2" "$root/kaggle/working"
        shift 3
        exec chroot "$root" bash -c 'cd /kaggle/working && exec "$@"' - "$@"
    """
    with tempfile.TemporaryDirectory() as root:
        wrapped = [*UNSHARE, "bash", "-c", script, "-", str(inputs), str(working), root, *command]
        return subprocess.run(wrapped, env=environment, capture_output=True, text=True)


# -------------------------------------------------------------------------------------------------------- the page
def make_page(working: Path) -> Path:
    """Convert __notebook__.ipynb to the page __results__.html with its pictures as files, as Kaggle does."""
    template = ["--template", "kaggle_page", f"--TemplateExporter.extra_template_basedirs={ROOT / 'tools'}"]
    options = ["--to", "html", *template, "--ExtractOutputPreprocessor.enabled=True", "--output", "__results__"]
    command = [PAGE_ENVIRONMENT / "bin" / "jupyter-nbconvert", *options, "__notebook__.ipynb"]
    subprocess.run(command, cwd=working, check=True, capture_output=True)
    return working / "__results__.html"


def chromium(*arguments: str) -> str:
    """Run Chromium with a new profile, without any network, and return what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *CHROMIUM_FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def look_at(page: Path) -> dict:
    """Return what a browser makes of a page: number of images, how many of them are broken, and the visible text."""
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text().replace("</head>", PROBE + "</head>", 1))
    shown = chromium("--dump-dom", probe.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)
    if found is None:
        raise RuntimeError(f"Chromium did not finish loading {page}")
    return json.loads(urllib.parse.unquote(html.unescape(found[1])))


# ------------------------------------------------------------------------------------------------------- the verdict
def outputs_of(notebook: Path) -> list[dict]:
    """Return all outputs of a notebook's cells."""
    cells = json.loads(notebook.read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def complaints(working: Path) -> list[str]:
    """Return what is wrong with a finished run and its page; an empty list is what one wants."""
    outputs = outputs_of(working / "__notebook__.ipynb")
    wrong = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    wrong += [f"stderr: {''.join(o['text'])[:200]}" for o in outputs if o.get("name") == "stderr"]
    pictures = sum(any(kind in o.get("data", {}) for kind in ("image/png", "image/gif")) for o in outputs)
    files = [p for p in working.rglob("*") if p.is_file() and not p.name.startswith("__notebook__")]
    if len(files) >= 100:
        wrong.append(f"{len(files)} files in the working folder, where fewer than 100 should be")
    shown = look_at(make_page(working))
    if shown["broken"] or shown["images"] < pictures or not pictures:
        wrong.append(f"{pictures} pictures in the notebook, {shown['images']} on the page, {shown['broken']} broken")
    wrong += [f"raw text of an object on the page: {found[0]}" for found in WIDGET_TEXT.finditer(shown["text"])]
    if "Kaggle, Batch run" not in shown["text"] and "setup-machine" in (working / "__notebook__.ipynb").read_text():
        wrong.append("the notebook does not see that this is a batch run on Kaggle")
    return wrong


def case(notebook: Path, layout: str, folder: Path, profile: str = "smoke") -> tuple[list[str], Path]:
    """Run one notebook with one thing attached; return the complaints and the working folder."""
    inputs = folder / "inputs" / layout.replace("/", "+")
    if not inputs.exists():
        inputs.mkdir(parents=True)
        LAYOUTS[layout](inputs / layout)
    working = folder / f"{notebook.stem}+{layout.replace('/', '+')}"
    working.mkdir()
    done = run_notebook(notebook, inputs, working, profile)
    if done.returncode:
        errors = [o for o in outputs_of(working / "__notebook__.ipynb") if o["output_type"] == "error"]
        said = [f"{o['ename']}: {o['evalue']}" for o in errors] or done.stderr.splitlines()[-1:]
        return [f"papermill: exit code {done.returncode}; {' '.join(said)}"], working
    return complaints(working), working


def missing() -> str:
    """Return what this machine lacks for the stand-in and how to get it, "" where nothing is missing."""
    if subprocess.run([sys.executable, "-c", "import papermill"], capture_output=True).returncode:
        return "papermill is not installed: pip install papermill"
    if not shutil.which("unshare") or not shutil.which("ip") or subprocess.run([*UNSHARE, "true"]).returncode:
        return "there are no Linux namespaces for mounts and network"
    if not shutil.which("chromium"):
        return "chromium is not installed: apt-get install chromium"
    if not (PAGE_ENVIRONMENT / "bin" / "jupyter-nbconvert").exists():
        return "Kaggle's nbconvert is not installed: python tools/kaggle_standin.py --set-up"
    return ""


def set_up() -> None:
    """Install Kaggle's nbconvert in an environment of its own: it needs older packages than today's Jupyter."""
    venv.create(PAGE_ENVIRONMENT, with_pip=True, clear=True)
    subprocess.run([PAGE_ENVIRONMENT / "bin" / "pip", "install", "-q", *PAGE_PACKAGES], check=True)


def cases(notebooks: list[Path]) -> list[tuple[Path, str]]:
    """Return every notebook with the data set that its metadata attach, and the first one with every other form."""
    every = [(path, MNIST) for path in notebooks] + [(notebooks[0], layout) for layout in list(LAYOUTS)[1:3]]
    return [*every, (ROOT / "notebooks" / notebooks[0].name, MODULE)]


def main() -> int:
    """Run what was asked for and print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set-up", action="store_true", help="install nbconvert 6.4.5 in .venv-kaggle-page, and stop")
    parser.add_argument("--keep", type=Path, help="an empty folder for pages and screenshots")
    parser.add_argument("--profile", default="smoke", help="scale: smoke (default), cpu or gpu")
    parser.add_argument("notebooks", nargs="*", type=Path, help="built ones; default: all, and every form of MNIST")
    options = parser.parse_args()
    if options.set_up:
        set_up()
        return 0
    if missing():
        print(missing())
        return 1
    failed, start = 0, time.monotonic()
    chosen = [(path.resolve(), MNIST) for path in options.notebooks] or cases(BUILT)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep.resolve() if options.keep else Path(scratch)
        for notebook, layout in chosen:
            begin = time.monotonic()
            wrong, working = case(notebook, layout, folder, options.profile)
            if options.keep and not wrong:
                page = (working / "__results__.html").as_uri()
                chromium("--window-size=1000,1400", f"--screenshot={working / 'page.png'}", page)
            failed += bool(wrong)
            seconds = time.monotonic() - begin
            print(f"{notebook.stem}, {layout}: {'; '.join(wrong) or 'good'} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed\n{time.monotonic() - start:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
