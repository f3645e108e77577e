"""Build what is pushed to Kaggle: one folder with a self-contained notebook for each notebook of the series.

python kaggle/build.py            # after every change of notebooks/, dcgan_utils.py or the judge's weights
python kaggle/build.py --check    # exit code 1, and the names of what is stale, if a build would change a file

`kaggle kernels push` uploads one file and nothing beside it, so each built notebook begins with a folded cell that
writes `dcgan_utils.py`: as plain text, which a reader can unfold, read and change; compressed it would be a third of
the size and say nothing. The judge's weights follow as base64 in those notebooks alone that train or evaluate.
kaggle/dataset/ is the other way: the same files as a data set that one attaches to notebooks (its copies are not
committed). Everything here but this file is made by it.
"""

import argparse
import base64
import json
import re
import shutil
import sys
from pathlib import Path

OWNER = "your-kaggle-name"  # the one setting: whose notebooks and data set these are; build again after changing it

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "kaggle"
MODULE = ROOT / "dcgan_utils.py"
JUDGE = ROOT / "data" / "judge.safetensors"
MNIST = "hojjatk/mnist-dataset"
SERIES = "DCGAN on MNIST"  # with a notebook's name behind it: Kaggle's title, 5 to 50 characters
DATASET = "DCGAN utils"
FOLDED = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}, "cellView": "form"}  # Kaggle, Jupyter, Colab
USES_JUDGE = re.compile(r"judge|\.evaluate\(|\.train\(|Cockpit\(", re.IGNORECASE)  # training reads its samples
SETUP = f"""**Setup.** The folded cell below writes `dcgan_utils.py`, the module behind this series, into the working
folder, so this notebook runs by itself. To change the module, edit that cell and restart the run.

- *Kaggle:* Settings → Accelerator → GPU T4 x2. MNIST comes from the attached data set (Add Input → `{MNIST}`); with
  Settings → Internet on it is downloaded where nothing is attached. Results go to `/kaggle/working`.
- *Colab:* Runtime → Change runtime type → T4 GPU. MNIST is downloaded."""


def slug(title: str) -> str:
    """Return the title as Kaggle writes it in an address."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def title_of(notebook: Path) -> str:
    """Return Kaggle's title; raises ValueError where it is longer than Kaggle allows."""
    title = f"{SERIES} {notebook.stem.replace('_', ' ')}"
    if not 5 <= len(title) <= 50:
        raise ValueError(f"the title {title!r} has {len(title)} characters, Kaggle allows 5 to 50; rename {notebook}")
    return title


def kernel_metadata(notebook: Path) -> dict:
    """Return what `kaggle kernels push` reads: two T4s, internet off, MNIST attached."""
    title = title_of(notebook)
    return {
        "id": f"{OWNER}/{slug(title)}",
        "title": title,
        "code_file": notebook.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [MNIST],
        "competition_sources": [],
        "kernel_sources": [],
        "model_sources": [],
        "keywords": [],
    }


def dataset_metadata() -> dict:
    """Return what `kaggle datasets create` reads."""
    return {
        "title": DATASET,
        "id": f"{OWNER}/{slug(DATASET)}",
        "subtitle": "The helper module of the DCGAN on MNIST notebooks",
        "licenses": [{"name": "MIT"}],
    }


def cell(kind: str, name: str, source: str, **metadata: object) -> dict:
    """Return a notebook cell with a fixed id."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": metadata, **code, "source": source.splitlines(keepends=True)}


def setup_cells(notebook: dict) -> list[dict]:
    """Return the cells that make a notebook self-contained."""
    cells = [
        cell("markdown", "setup-text", SETUP),
        cell("code", "setup-module", f"%%writefile {MODULE.name}\n{MODULE.read_text().rstrip()}", **FOLDED),
    ]
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    if JUDGE.is_file() and USES_JUDGE.search(code):
        cells.append(cell("code", "setup-judge", judge_source(), **FOLDED))
    return [*cells, cell("code", "setup-machine", "import dcgan_utils\n\nprint(dcgan_utils.describe_machine())")]


def judge_source() -> str:
    """Return code that writes the judge's weights to where the module looks for them."""
    encoded = "\n".join(re.findall(".{1,1000}", base64.b64encode(JUDGE.read_bytes()).decode()))
    place = JUDGE.relative_to(ROOT)
    return (
        "# the weights of the judge, the small network that evaluation compares images with (safetensors, base64)\n"
        "import base64\nfrom pathlib import Path\n\n"
        f'Path("{place.parent}").mkdir(exist_ok=True)\n'
        f'size = Path("{place}").write_bytes(base64.b64decode("""\n{encoded}\n"""))\n'
        f'print("{place}:", size, "bytes")'
    )


def self_contained(path: Path) -> dict:
    """Return the notebook with its setup behind the first text cell, without outputs, its links leading to Kaggle."""
    notebook = json.loads(path.read_text())
    for c in notebook["cells"]:
        if c["cell_type"] == "code":
            c["outputs"], c["execution_count"] = [], None  # the push would strip them anyway
        else:
            c["source"] = to_kaggle_links("".join(c["source"])).splitlines(keepends=True)
    first_code = next(i for i, c in enumerate(notebook["cells"]) if c["cell_type"] == "code")
    notebook["cells"][first_code:first_code] = setup_cells(notebook)
    notebook["metadata"]["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def to_kaggle_links(text: str) -> str:
    """Return Markdown whose links to other notebooks of the series lead to their pages on Kaggle."""
    known = {p.name: p for p in notebooks()}

    def address(found: re.Match) -> str:
        """Return the link's end with Kaggle's address in it."""
        path = known.get(found[1])
        return f"](https://www.kaggle.com/code/{OWNER}/{slug(title_of(path))})" if path else found[0]

    return re.sub(r"\]\(([\w.-]+\.ipynb)\)", address, text)


def notebooks() -> list[Path]:
    """Return the notebooks of the series in reading order."""
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def built_files() -> dict[Path, str]:
    """Return every committed file of the build with its content."""
    files = {HERE / "dataset" / "dataset-metadata.json": as_json(dataset_metadata(), indent=2)}
    for path in notebooks():
        folder = HERE / path.stem
        files[folder / path.name] = as_json(self_contained(path), indent=1)
        files[folder / "kernel-metadata.json"] = as_json(kernel_metadata(path), indent=2)
    return files


def as_json(content: dict, indent: int) -> str:
    """Return JSON text that is the same on every machine."""
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"


def stale(files: dict[Path, str]) -> list[Path]:
    """Return what a build would change: files that differ or miss, and folders of notebooks that are gone."""
    differ = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    return differ + [p for p in sorted(HERE.glob("*/*.ipynb")) if p not in files and ".ipynb_checkpoints" not in str(p)]


def write(files: dict[Path, str]) -> None:
    """Write the files, remove folders of notebooks that are gone, and fill the data set's folder."""
    for path in stale(files):
        if path not in files:
            shutil.rmtree(path.parent)
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[path])
    for path in (MODULE, JUDGE):
        if path.is_file():
            shutil.copy(path, HERE / "dataset" / path.name)


def main() -> int:
    """Build, or tell whether a build would change something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a build would")
    check = parser.parse_args().check
    files = built_files()
    changed = stale(files)
    if not check:
        write(files)
    print(f"{'stale' if check else 'written'}: {', '.join(str(p.relative_to(ROOT)) for p in changed) or 'nothing'}")
    if check and changed:
        print("run: python kaggle/build.py")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
