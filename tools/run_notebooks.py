"""Run notebooks top to bottom and save them with their outputs as they are committed: no widget state, no bars.

python tools/run_notebooks.py [notebooks/01_data.ipynb …]    # all by default; DCGAN_PROFILE sets the scale
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def without_widget(output: dict) -> dict | None:
    """Return an output as it reads without a kernel: a widget as the picture it carries; None for what is left out."""
    if output.get("name") == "stderr":  # the bar, drawn a hundred times
        return None
    widget = output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return output if widget is None or "image/png" in output["data"] else None


def run(path: Path) -> None:
    """Execute one notebook in its own folder and write it back."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}, kernel_name="python3"
    ).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not the version: it would change with every machine
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in map(without_widget, cell.outputs) if out is not None]
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        run(Path(name).resolve())
