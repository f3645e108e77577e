"""What the README says exists."""

import re

import pytest

import dcgan_utils as du


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_fields_that_the_readme_names_exist(readme):
    named = set(re.findall(r"\b([A-Za-z_]+)=[\d.T]", readme)) - {"max_seconds", "DCGAN_PROFILE", "digits"}
    named -= {"patience", "inception", "nproc_per_node", "nnodes"}  # arguments of functions and of torchrun
    named |= set(re.findall(r"`([A-Za-z_]+)` [÷×]", readme))
    assert {"noise_D", "lr_D", "start_at_background"} <= named
    assert named <= set(vars(du.Config()))


def test_files_that_the_readme_links_exist(readme, root):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (root / link).exists()] == []


def test_no_placeholder_is_left(readme):
    assert "@@" not in readme
