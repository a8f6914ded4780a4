"""What README and docs show can be run: Python, TOML, and command lines, which the commands' own parsers read."""

import argparse
import ast
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

import spark_fast.evaluation.eval_settings as evaluation
import spark_fast.training.settings as training
from spark_fast.commands import SCRIPTS
from spark_fast.run.config import tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
OURS = re.compile(
    r"\S*spark-fast-|torchrun |\S*python -m |(\S*python|bash) (tools|benchmarks|docs)/|pip install |pytest "
)
IN_PROSE = re.compile(
    r"spark-fast-\w+ .*--\w+ |(\S*python|bash) (tools|benchmarks|docs)/"
)  # others there are but names
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def blocks(language):
    for page in PAGES:
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.name}-{i}")


def commands():
    """Every command line of ours: in blocks of bash, and between backticks in the text."""
    for page in PAGES:
        shown = re.findall(r"^```bash\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE)
        text = re.sub(r"```\w+\n.*?```", "", page.read_text(), flags=re.DOTALL)
        lines = re.sub(r" *\\\n *", " ", "\n".join(shown)).splitlines()
        lines = [line.strip() for joined in lines for line in joined.split(" && ")]
        found = [line for line in lines if OURS.match(line)]
        found += [line for line in re.findall(r"`([^`\n]+)`", text) if IN_PROSE.match(line)]
        yield from (pytest.param(line, id=f"{page.name}: {line}") for line in found)


COMMANDS = list({param.id: param for param in commands()}.values())


class ReadError(Exception):
    """A command's words were read to the end; it must not go on and do its work."""


@pytest.fixture
def read(monkeypatch):
    """read(script, words): have a script's own parser read the words, and nothing more."""
    cli, parse_known = tyro.cli, argparse.ArgumentParser.parse_known_args

    def only_read(tool, **how):
        done = object()
        stub = tool if isinstance(tool, type) else functools.wraps(tool)(lambda *a, **k: done)
        cli(stub, **how)
        raise ReadError

    def only_parse(*words, **how):
        _, left = parse_known(*words, **how)
        if left and "demo" not in sys.argv[0]:  # the demonstration hands what is left to training
            raise SystemExit(f"{sys.argv[0]} has no {left}")
        training.parse([*left, "--exp_name=x", "--data_path=x"])
        raise ReadError

    def run(script, words):
        assert script.exists(), f"there is no {script}"
        if not words:
            return
        monkeypatch.setattr(tyro, "cli", only_read)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        monkeypatch.syspath_prepend(str(script.parent))
        with pytest.raises(ReadError):
            runpy.run_path(str(script), run_name="__main__")

    return run


def check(line, read):
    """Raise if a command line would be refused."""
    words = shlex.split(line, comments=True)
    program, words = Path(words[0]).name, words[1:]
    if program == "torchrun":
        at = words.index("-m")
        get_args_parser().parse_args([*words[:at], "-m", "x"])
        program, words = "python", words[at:]
    if program.endswith("python") and words[0] == "-m":
        module, words = words[1], words[2:]
        program = {"spark_fast.train": "spark-fast-train", "spark_fast.evaluate": "spark-fast-eval"}.get(module, module)
    if "..." in line:  # stands for what the reader adds
        words = [word for word in words if word != "..."] + ["--data_path=x"] * ("--data_path" not in line)
    if program == "spark-fast-train":
        training.parse(words)
    elif program == "spark-fast-eval":
        evaluation.parse(words)
    elif program.startswith("spark-fast-"):
        read(ROOT / "tools" / SCRIPTS[program.removeprefix("spark-fast-")], words)
    elif program.endswith("python"):
        read(ROOT / words[0], words[1:])
    elif program == "bash":
        check_script(ROOT / words[0], words[1:], read)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-"))
    else:
        extras = [e for found in re.findall(r"spark.fast\[(.*?)\]", line) for e in found.split(",")]
        assert not set(extras) - set(EXTRAS)


def check_script(script, words, read):
    if script.name == "pt.sh":
        assert not words[0].startswith("-")
        pattern = r"^  *if .*--\((.*?)\)"
        own = re.search(pattern, script.read_text(), re.MULTILINE)[1]
        training.parse([word for word in words if not re.match(rf"--({own})=", word)])
    elif script.name == "demo.sh":
        read(ROOT / "tools" / "demo.py", words)
    else:
        assert script.exists(), f"there is no {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_code_block_names_its_language_and_fits_the_page(page):
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.fullmatch(r" *```(\w*)", line)
        where = f"{page.name}:{number}: {line}"
        assert not (fence and not inside and not fence[1]), where
        assert not (inside and len(line) > 100), where
        inside = inside != bool(fence)
    prose = re.sub(r"```\w+\n.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"\n\n {4}\S", prose), f"{page.name} has an indented block"


def test_the_readme_is_short_and_has_its_picture_before_the_first_command():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 100
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    assert text.index("![") < text.index("5.9 GB") < text.index("```bash")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may train, which leaves a folder
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code", list(blocks("toml")))
def test_toml_examples_are_settings(code, tmp_path):
    (tmp_path / "example.toml").write_text(code)
    settings = training.parse(["example", "--config", str(tmp_path / "example.toml")])
    given = tomllib.loads(code)
    assert given
    assert all(settings.to_dict()[group] | values == settings.to_dict()[group] for group, values in given.items())


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_are_understood(line, read):
    check(line, read)


def test_the_command_lines_are_found():
    found = [param.values[0] for param in COMMANDS]
    for start in ("spark-fast-train", "spark-fast-eval knn", "torchrun", "spark-fast-export", "bash tools/pt.sh"):
        assert any(line.startswith(start) for line in found), start
    assert any("--rdzv-endpoint" in line and "--resume auto" in line for line in found), "lines that go on are joined"


@pytest.mark.parametrize(
    "line",
    [
        "spark-fast-train my_run --data_path x --no_such_flag 1",
        "spark-fast-eval knn my_eval --data_path x --weights x --epochs 3",
        "torchrun --no_such=2 -m spark_fast.train my_run --data_path x",
        "torchrun --nnodes=2 -m spark_fast.train my_run --data_path x --bs many",
        "python tools/export.py run --to nowhere --out x",
        "spark-fast-export run --to nowhere --out x",
        "spark-fast-no_such_command run",
        "python tools/no_such_tool.py",
        "python benchmarks/train_step.py --no_such_flag 1",
        "bash tools/demo.sh --no_such_flag 1",
        "bash tools/pt.sh my_run --num_node=2 --data_path x",
        "pytest tests/no_such_folder",
        "pip install 'spark-fast[nothing]'",
    ],
)
def test_a_wrong_command_line_would_be_found(line, read):
    with pytest.raises((SystemExit, AssertionError, ValueError, KeyError)):
        check(line, read)


def flags_of_a_script(path):
    """Names of a script's flags: parameters, fields of dataclasses, and what stands after -- in a text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.keyword) and node.arg == "name" and isinstance(node.value, ast.Constant):
            yield node.value.value
        elif isinstance(node, ast.Constant) and re.match(r"--\w", str(node.value)):
            yield node.value[2:]


def test_every_flag_in_the_text_is_one_of_a_command():
    known = {"help", "version", "config", "print_config", "full", "repeat_drills", "lr"}
    known |= set(
        re.findall(r"`--(\w+)`", (ROOT / "docs" / "reference" / "settings.md").read_text())
    )  # written from the settings
    known |= {flag.lstrip("-") for action in get_args_parser()._actions for flag in action.option_strings}
    known |= set("|".join(re.findall(r"--\((.*?)\)", (ROOT / "tools" / "pt.sh").read_text())).split("|"))
    for folder in ("tools", "benchmarks", "docs/generate", "spark_fast/cli"):
        known |= {flag for path in (ROOT / folder).glob("*.py") for flag in flags_of_a_script(path)}
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        spans = [s for s in re.findall(r"`([^`\n]+)`", text) if s.startswith("--") or OURS.match(s)]
        named = {name.replace("-", "_") for s in spans for name in re.findall(r"--([A-Za-z][\w-]*)", s)}
        assert not named - {name.replace("-", "_") for name in known}, page.name


def test_every_row_of_a_table_has_as_many_cells_as_its_header():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = [re.sub(r"`[^`]*`", "", row).rstrip() for row in table.splitlines()]
            assert all(row.endswith("|") for row in rows), f"{page.name}: {rows[0]}"
            assert {row.count("|") for row in rows} == {rows[0].count("|")}, f"{page.name}: {rows[0]}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_flag_of_the_published_script_is_in_the_table_of_old_flags():
    page = (ROOT / "docs" / "how_to" / "from_spark.md").read_text()
    published = "exp_name exp_dir data_path init_weight resume_from mask model input_size sbn bs dataloader_workers dp "
    published += "base_lr lr wd wde ep wp_ep clip opt ada"
    missing = [flag for flag in published.split() if f"`--{flag}`" not in page]
    assert not missing


def texts(path):
    """The texts in a source file, what is filled in as {expression}; docstrings and comments are none."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


def test_the_messages_that_troubleshooting_explains_are_still_given():
    packages = ("spark_fast", "pipelines", "tools")
    given = "\n".join(t for package in packages for path in (ROOT / package).rglob("*.py") for t in texts(path))
    explained = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "how_to" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(explained) > 10
    assert not [message for message in explained if message not in given]
    assert len(explained) == len(set(explained))
