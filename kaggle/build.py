"""Build what is pushed to Kaggle, and the one-file module that it carries.

    python kaggle/build.py                  # after every change of notebooks/, dcgan_utils.py, dcgan/ or the settings
    python kaggle/build.py --check          # exit code 1, and the names of stale files, if a build would change one
    python kaggle/build.py --single PATH    # write dcgan_utils.py with the whole package in it, and nothing else

`kaggle kernels push` uploads one file. Each built notebook therefore begins with a folded cell that writes the one-file
module as plain text, which a reader can unfold and change. The classifier's weights follow as base64 in notebooks that
train or evaluate. kaggle/dataset/ holds the same files as a data set that one attaches to notebooks (the copies are not
committed). The build also writes the repository's address into the badges of notebooks/.
"""

import argparse
import ast
import base64
import builtins
import functools
import itertools
import json
import re
import shutil
import symtable
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# The settings: the repository on GitHub, and the owner of notebooks and data set on Kaggle; build again after a change
REPOSITORY, OWNER = "OWNER/dcgan-notebooks", "your-kaggle-name"

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "kaggle"
MODULE, PACKAGE = ROOT / "dcgan_utils.py", ROOT / "dcgan"
CLASSIFIER = ROOT / "data" / "classifier.safetensors"
MNIST = "hojjatk/mnist-dataset"
FOLDED = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}, "cellView": "form"}  # Kaggle, Jupyter, Colab
USES_CLASSIFIER = re.compile(
    r"classif|RealStatistics|\.evaluate\w*\(|\.train\((?!\)|mode|.*callbacks=)|Cockpit\(", re.IGNORECASE
)
OWN_ADDRESS = re.compile(r"(github(?:\.com)?/)[\w.-]+/[\w.-]+(?=/blob/main/kaggle/)")
SETUP = f"""**Setup.** The folded cell below writes `dcgan_utils.py`, the module behind this series, into the working
folder, so this notebook runs by itself. To change the module, edit that cell and restart the run.

- *Kaggle:* Settings → Accelerator → GPU T4 x2. MNIST comes from the attached data set (Add Input → `{MNIST}`); with
  Settings → Internet on it is downloaded where nothing is attached. Results go to `/kaggle/working`.
- *Colab:* Runtime → Change runtime type → T4 GPU. MNIST is downloaded."""


# ------------------------------------------------------------------------------------------ one file from the package
class Part(NamedTuple):
    """Hold one file, taken apart; `imports` are those of other people's modules."""

    name: str
    docstring: str
    imports: set[str]  # statements of one name each
    defines: set[str]
    body: str


@functools.cache
def one_file() -> str:
    """Return dcgan_utils.py with the package in it, in the order of `dcgan/__init__.py`; raises ValueError."""
    parts = [take_apart(path) for path in [*package_files(), MODULE]]
    check_names(parts)
    body = "\n\n\n".join([*(banner(part) + part.body for part in parts[:-1]), parts[-1].body])
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} | {"annotations"}
    imports = import_block({i for part in parts for i in part.imports if bound(i) in used})
    origin = f"# Built by kaggle/build.py of https://github.com/{REPOSITORY} from dcgan_utils.py and dcgan/"
    return f'"""{parts[-1].docstring}"""\n\n{origin}\n\n{imports}\n\n{body}\n'


def package_files() -> list[Path]:
    """Return the package's files as `dcgan/__init__.py` lists them: a → b → c; raises ValueError for a wrong list."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    listed = [name for chain in docstring.split("\n\n") if "→" in chain for name in re.findall(r"\w+", chain)]
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    if wrong := found.symmetric_difference(listed):
        raise ValueError(f"the list in dcgan/__init__.py and the files beside it differ: {', '.join(sorted(wrong))}")
    return [PACKAGE / f"{name}.py" for name in listed]


def take_apart(path: Path) -> Part:
    """Return a file's parts; raises ValueError for an import that cannot be joined with those of other files."""
    text = path.read_text()
    tree = ast.parse(text)
    head = list(itertools.takewhile(is_head, tree.body))
    bad = [n for top in tree.body[len(head) :] for n in ast.walk(top) if is_internal(n) or (n is top and is_head(n))]
    if bad := bad + [n for n in head if is_internal(n) and any(alias.asname for alias in n.names)]:
        raise ValueError(f"{path.name}:{bad[0].lineno}: imports belong at the top, and those from dcgan/ without `as`")
    foreign = [n for n in head if isinstance(n, (ast.Import, ast.ImportFrom)) and not is_internal(n)]
    origin = {n: f"from {n.module} " if isinstance(n, ast.ImportFrom) else "" for n in foreign}
    imports = {f"{origin[n]}import {ast.unparse(alias)}" for n in foreign for alias in n.names}
    symbols = symtable.symtable(text, path.name, "exec").get_symbols()
    defines = {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()} - {"__all__"}
    body = "\n".join(text.split("\n")[head[-1].end_lineno :]).strip()
    return Part(path.name, ast.get_docstring(tree, clean=False) or "", imports, defines, body)


def is_head(node: ast.AST) -> bool:
    """Return whether a statement is a docstring, an import, `__all__ = …` or `if TYPE_CHECKING:`; all are dropped."""
    name = node.test if isinstance(node, ast.If) else node.targets[0] if isinstance(node, ast.Assign) else None
    named = getattr(name, "id", "") in ("TYPE_CHECKING", "__all__")
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return named or text or isinstance(node, (ast.Import, ast.ImportFrom))


def is_internal(node: ast.AST) -> bool:
    """Return whether a node imports from the package."""
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module.partition(".")[0] == PACKAGE.name)


def check_names(parts: Iterable[Part]) -> None:
    """Raise ValueError where two files give one name to two things, or a file takes a name of Python's."""
    owners = {(name, "Python") for name in dir(builtins)} | {(name, p.name) for p in parts for name in p.defines}
    owners |= {(bound(i), i if place(i)[1] or " as " in i else bound(i)) for p in parts for i in p.imports}
    counts = Counter(name for name, _ in owners)
    if twice := [f"{name} of {owner}" for name, owner in sorted(owners) if counts[name] > 1]:
        raise ValueError(f"in one file names must differ, and these do not: {', '.join(twice)}")


def bound(statement: str) -> str:
    """Return the name that an import of one name gives to the file."""
    name = statement.split()[-1]
    return name if statement.startswith("from") else name.partition(".")[0]


def place(statement: str) -> tuple:
    """Return what sorts imports: the future, Python, others; `import` before `from`; by module. Equal ones merge."""
    word, module, *rest = statement.split()
    top, alone = module.partition(".")[0], word == "import" or "as" in rest
    group = 0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 2
    return group, word == "from", module.lower(), statement if alone else ""


def order(statement: str) -> tuple:
    """Return what sorts statements and, from one module, names: constants, classes, others."""
    name = bound(statement)
    return place(statement), 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2, name.lower()


def import_block(imports: Iterable[str]) -> str:
    """Return import statements, merged and sorted as ruff does; a name a line where a statement is too long."""
    groups: list[list[str]] = [[], [], []]
    for (group, *_), same in itertools.groupby(sorted(imports, key=order), key=place):
        first, *rest = same
        line = ", ".join([first, *map(bound, rest)])
        lines = line.replace(" import ", " import (\n    ").replace(", ", ",\n    ") + ",\n)"
        groups[group].append(line if len(line) <= 120 else lines)
    return "\n\n".join("\n".join(group) for group in groups if group)


def banner(part: Part) -> str:
    """Return a comment that names a file and says what it is about, with the empty lines below it."""
    lines = [f"{'=' * (117 - len(part.name))} {part.name}"]
    for paragraph in part.docstring.strip().split("\n\n"):
        lines += [*([""] if lines[1:] else []), *textwrap.wrap(paragraph, 118, break_on_hyphens=False)]
    empty = "\n\n" if re.match(r"(#.*\n)*(@|def |class )", part.body) else "\n"
    return "\n".join(f"# {line}".rstrip() for line in lines) + f"\n{empty}"


# ------------------------------------------------------------------------------------------ what Kaggle's client reads
def title_of(notebook: Path) -> str:
    """Return Kaggle's title; raises ValueError where it is longer than Kaggle allows."""
    title = f"DCGAN on MNIST {notebook.stem.replace('_', ' ')}"
    if not 5 <= len(title) <= 50:
        raise ValueError(f"the title {title!r} has {len(title)} characters, Kaggle allows 5 to 50; rename {notebook}")
    return title


def kaggle_id(notebook: Path) -> str:
    """Return the owner and the title as Kaggle writes them in an address."""
    return f"{OWNER}/{re.sub('[^a-z0-9]+', '-', title_of(notebook).lower())}"


def kernel_metadata(notebook: Path) -> dict:
    """Return what `kaggle kernels push` reads: two T4s, internet off, MNIST attached."""
    metadata = {"id": kaggle_id(notebook), "title": title_of(notebook), "code_file": notebook.name}
    metadata |= {"language": "python", "kernel_type": "notebook", "is_private": True, "enable_gpu": True}
    metadata |= {"enable_tpu": False, "enable_internet": False, "machine_shape": "NvidiaTeslaT4"}
    metadata |= {"dataset_sources": [MNIST], "competition_sources": [], "kernel_sources": [], "model_sources": []}
    return metadata | {"keywords": []}


# ------------------------------------------------------------------------------------------ the notebooks
def cell(kind: str, name: str, source: str, **metadata: object) -> dict:
    """Return a notebook cell with a fixed id."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": metadata, **code, "source": source.splitlines(keepends=True)}


def setup_cells(notebook: dict) -> list[dict]:
    """Return the cells that make a notebook self-contained."""
    module = f"%%writefile {MODULE.name}\n{one_file().rstrip()}"
    cells = [cell("markdown", "setup-text", SETUP), cell("code", "setup-module", module, **FOLDED)]
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    if USES_CLASSIFIER.search(code):
        cells.append(cell("code", "setup-classifier", classifier_source(), **FOLDED))
    return [*cells, cell("code", "setup-machine", "import dcgan_utils\n\nprint(dcgan_utils.describe_machine())")]


def classifier_source() -> str:
    """Return code that writes the classifier's weights to where the module looks for them."""
    encoded = "\n".join(re.findall(".{1,1000}", base64.b64encode(CLASSIFIER.read_bytes()).decode()))
    return (
        "# the weights of the digit classifier, whose features evaluation compares (safetensors, base64)\n"
        'import base64\nfrom pathlib import Path\n\nPath("data").mkdir(exist_ok=True)\n'
        f'size = Path("data/{CLASSIFIER.name}").write_bytes(base64.b64decode("""\n{encoded}\n"""))\n'
        f'print("data/{CLASSIFIER.name}:", size, "bytes")'
    )


def self_contained(path: Path) -> dict:
    """Return the notebook with its setup behind the first text cell, without outputs, its links leading to Kaggle."""
    notebook = json.loads(with_address(path))
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
    known = {p.name: f"https://www.kaggle.com/code/{kaggle_id(p)}" for p in notebooks()}
    return re.sub(r"\]\(([\w.-]+\.ipynb)\)", lambda found: f"]({known.get(found[1], found[1])})", text)


def with_address(path: Path) -> str:
    """Return a file's text, its links to built notebooks leading to the repository that the settings name."""
    return OWN_ADDRESS.sub(rf"\g<1>{REPOSITORY}", path.read_text())


def notebooks() -> list[Path]:
    """Return the notebooks of the series in reading order."""
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


# ------------------------------------------------------------------------------------------ the build
def built_files() -> dict[Path, str]:
    """Return every committed file that the build writes, with its content."""
    dataset = {"title": "DCGAN utils", "id": f"{OWNER}/dcgan-utils"}
    dataset |= {"subtitle": "The helper module of the DCGAN on MNIST notebooks", "licenses": [{"name": "MIT"}]}
    files = {HERE / "dataset" / "dataset-metadata.json": as_json(dataset, indent=2)}
    for path in notebooks():
        files[path] = with_address(path)
        files[HERE / path.stem / path.name] = as_json(self_contained(path), indent=1)
        files[HERE / path.stem / "kernel-metadata.json"] = as_json(kernel_metadata(path), indent=2)
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
        if path in files:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path])
        else:
            shutil.rmtree(path.parent)
    (HERE / "dataset" / MODULE.name).write_text(one_file())
    shutil.copy(CLASSIFIER, HERE / "dataset")


def main() -> int:
    """Build, or tell whether a build would change something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a build would")
    parser.add_argument("--single", type=Path, metavar="PATH", help="write the one-file dcgan_utils.py there, and stop")
    options = parser.parse_args()
    if options.single:
        options.single.write_text(one_file())
        return 0
    changed = stale(files := built_files())
    names = ", ".join(str(p.relative_to(ROOT)) for p in changed) or "nothing"
    if options.check:
        print(f"stale: {names}" + ("\nrun: python kaggle/build.py" if changed else ""))
        return int(bool(changed))
    write(files)
    print(f"written: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
