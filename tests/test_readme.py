"""README and docs: what they link to exists, what they show runs, and RESULTS.md is what the results give."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dcgan_utils as du

ROOT = Path(__file__).resolve().parent.parent

PAGES = ["README.md", "RESULTS.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(root, page):
    text = (root / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert ((root / page).parent / target).resolve().exists(), target


def test_the_code_in_the_readme_uses_names_that_exist(root):
    for code in re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "du":
                assert hasattr(du, node.attr), node.attr
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(du, alias.name) for alias in node.names)


def test_the_fields_that_the_readme_names_are_fields_of_config(root):
    fields = du.Config.__dataclass_fields__
    text = (root / "README.md").read_text()
    named = re.findall(r"`(?:\w+\()?(\w+)=[\w.\"]+", text)
    known = {"data", "max_seconds", "digits", "tracker"}
    assert named
    assert [name for name in named if name not in fields and name.lower() == name and name not in known] == []


@pytest.mark.parametrize(
    ("recipe", "generator", "discriminator"),
    re.findall(r"^\| `(\w+)` .*\| ([\d,]+) / ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE),
)
def test_the_readme_counts_parameters_right(recipe, generator, discriminator):
    networks = getattr(du, recipe).networks
    config = getattr(du, recipe).defaults
    counts = [du.count_parameters(network(config)) for network in networks]
    for (everything, trainable), said in zip(counts, (generator, discriminator), strict=True):
        assert int(said.replace(",", "")) in (everything, trainable)


def test_the_table_of_results_is_up_to_date(root):
    done = subprocess.run(
        [sys.executable, "tools/results_table.py", "--check"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
