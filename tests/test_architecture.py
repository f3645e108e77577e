"""The shape of the package: arrows, sizes of functions, and names that are unique in the file that is built from it."""

import ast
import statistics

import pytest

import dcgan

ORDER = [name.strip() for name in dcgan.__doc__.split("\n\n", 1)[1].replace("→", " ").split()]


@pytest.fixture(scope="module")
def trees(root):
    """Return every file of the package, parsed."""
    return {path.stem: ast.parse(path.read_text()) for path in (root / "dcgan").glob("[!_]*.py")}


def test_a_file_imports_only_from_files_above_it(trees):
    assert sorted(trees) == sorted(ORDER)
    for name, tree in trees.items():
        blocks = [node for node in tree.body if isinstance(node, ast.If)]  # TYPE_CHECKING: for hints alone
        hints = {id(inner) for block in blocks for inner in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in hints:
                assert ORDER.index(node.module) < ORDER.index(name), f"{name} imports {node.module}"
                assert node in tree.body, f"{name} imports {node.module} inside a function"


def test_no_function_is_longer_than_forty_lines(trees):
    sizes = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                sizes[f"{name}.{node.name}"] = node.end_lineno - first.lineno + 1
    assert {name: size for name, size in sizes.items() if size > 40} == {}
    assert statistics.median(sizes.values()) <= 8


def test_no_loss_is_known_by_its_name_outside_losses(trees):
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and name not in ("losses", "config"):
                assert not ast.unparse(node).endswith("config.loss"), name
                assert "config.loss " not in ast.unparse(node), name
