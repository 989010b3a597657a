"""What the documents say exists: modules, their options, files, anchors, make targets, Python names. Nothing is run
but `--help`, so it is fast; that the commands work is what the other tests and CI are for."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

import prune_env

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "runs/README.md") if p.exists())
OURS = ("agents", "baselines", "benchmarks", "prune_env")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}\S[^\n]*\n)+", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(path: Path, languages: set[str]) -> Iterator[str]:
    """Code blocks in one of some languages; an indented block counts as a shell block."""
    text = path.read_text(encoding="utf-8")
    yield from (body for language, body in FENCE.findall(text) if language in languages)
    if "sh" in languages:
        yield from INDENTED.findall(FENCE.sub("", text))


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every command in the shell blocks: continuation lines joined, comments dropped, `a && b` apart."""
    for block in blocks(path, {"sh", "bash", "shell", "console"}):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            yield words


def module_calls() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Document, module (with its subcommand) and options of each `python -m` on one of our modules."""
    for path in DOCUMENTS:
        for words in commands(path):
            if "-m" not in words or not Path(words[max(words.index("-m") - 1, 0)]).name.startswith("python"):
                continue
            module, *rest = words[words.index("-m") + 1 :]
            if module == "agents.train" and rest[:1] == ["runtime"]:
                module = "agents.train runtime"
            if module.split(".")[0] in OURS:
                yield path.name, module, tuple(word.partition("=")[0] for word in rest if word.startswith("--"))


def python_blocks() -> list[tuple[str, str]]:
    return [(path.name, block) for path in DOCUMENTS for block in blocks(path, {"python", "py"})]


@cache
def help_of(module: str) -> str:
    """What `python -m MODULE --help` prints, without the price of a process."""
    name, *words = module.split()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(said):
        patch.setattr(sys, "argv", [name, *words, "--help"])
        # The tests have imported the module already.
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert not end.value.code, f"python -m {module} --help ends with {end.value.code}"
    return said.getvalue()


def accepted(module: str) -> set[str]:
    """Options in a module's help; tyro prints a switch as `--name, --no-name` or `--name | --no-name`."""
    return set(re.findall(r"--[a-z][\w-]*", help_of(module))) | {"--help"}


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown page gives its headings."""
    titles = re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_a_reader_finds_the_usual_files(name: str):
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_readme_shows_the_main_job():
    assert any(name == "README.md" and module == "agents.train" for name, module, _ in module_calls())


@pytest.mark.parametrize("module", sorted({module for _, module, _ in module_calls()}))
def test_every_module_of_a_command_exists(module: str):
    assert importlib.util.find_spec(module.split()[0]) is not None


@pytest.mark.parametrize("module", sorted({module for _, module, _ in module_calls()}))
def test_every_option_of_a_command_is_accepted(module: str):
    asked = {(name, option) for name, called, options in module_calls() if called == module for option in options}
    unknown = sorted((name, option) for name, option in asked if option not in accepted(module))
    assert not unknown, f"python -m {module} does not know {unknown}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path):
    broken = []
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        for words in commands(path):
            if words[:1] == ["make"]:
                named = {word for word in words[1:] if re.fullmatch(r"[a-z]+", word)}
                assert named <= targets, f"{path.name}: {' '.join(words)}"


@pytest.mark.parametrize(("document", "block"), python_blocks())
def test_python_examples_name_what_exists(document: str, block: str):
    """They parse, and each `prune_env.name` and `from ours import name` in them is there."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "prune_env":
            assert hasattr(prune_env, node.attr), f"{document}: prune_env.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{document}: {node.module} has no {missing}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_no_path_of_one_machine(path: Path):
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|tmp|opt|Users)/\S*", path.read_text(encoding="utf-8"))
