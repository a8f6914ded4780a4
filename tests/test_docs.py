"""What README and docs show can be run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    for page in PAGES:
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.name}-{i}")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_examples_run(code):
    exec(compile(code, "example", "exec"), {})


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_flag_of_the_published_script_is_in_the_table_of_old_flags():
    page = (ROOT / "docs" / "from_spark.md").read_text()
    published = "exp_name exp_dir data_path init_weight resume_from mask model input_size sbn bs dataloader_workers dp "
    published += "base_lr wd wde ep wp_ep clip opt ada"
    missing = [flag for flag in published.split() if f"`--{flag}`" not in page]
    assert not missing


def test_the_messages_that_troubleshooting_explains_are_still_given():
    packages = ("spark_fast", "pipelines", "tools")
    source = "\n".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    explained = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(explained) > 10
    assert not [message for message in explained if message not in source]
