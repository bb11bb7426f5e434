"""What README.md and docs/ tell people to type: it composes (every command), and the README's really runs (slow)."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbrl.launch.command import prepare
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {  # commands that are not Python modules of ours, and who runs them
    "pip": ".ci/run, word for word",
    "pytest": ".ci/run, word for word",
    "make": ".ci/run",
    "ray": "tests/test_sweep.py joins a cluster started so",
    "wandb": "needs an account",
    "eval": "tests/test_listing.py tries the completion it installs",
}
REDUCED = [option for option in TINY if not option.startswith(("env=", "updater=", "eval.every", "checkpoint_every"))]
REDUCED += ["total_steps=120", "agent.learning_starts=60", "pretraining.steps=20", "feedback.every=20"]
REDUCED += ["eval.episodes=1"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command in a page's bash blocks, without variables set before it and `&` after it."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = [word for word in shlex.split(part, comments=True) if word != "&"]
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words


def row(page: Path, words: list[str]) -> object:
    """A documented command as a case; with a launcher it needs plug-ins that the README's set-up does not install."""
    name = f"{page.name}: {' '.join(words)[:80]}"
    marks = [pytest.mark.slow] if any("launcher=" in word or "/launcher" in word for word in words) else []
    return pytest.param(page.name, words, id=name, marks=marks)


ALL = [row(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's Python files in it."""
    folder = tmp_path_factory.mktemp("newcomer")
    for block in blocks(ROOT / "README.md", "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, "a Python block of the README begins with its file's name"
        (folder / name[1]).write_text(block)
    return folder


@pytest.mark.parametrize(("page", "words"), ALL)
def test_a_documented_command_exists_and_its_options_compose(
    page: str, words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[:2] != ["python", "-m"]:
        assert words[0] in ELSEWHERE, f"{page}: who runs {' '.join(words)}?"
        return
    module, arguments = words[2], words[3:]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{page}: there is no {module}"
    if module != "pbrl.train":
        folders = Path(str(spec.origin)).parent, ROOT / "pbrl"  # experiments share options with the commands
        source = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
        for flag in (word for word in arguments if word.startswith("--")):
            assert f'"{flag.split("=")[0]}"' in source, f"{page}: {module} has no {flag}"
        return
    monkeypatch.syspath_prepend(str(workplace))
    prepare(arguments)  # composes; of a sweep, every member


def test_readme_is_short_enough_to_be_read() -> None:
    words = len((ROOT / "README.md").read_text().split())
    assert words <= 1250, f"README.md has {words} words; move something to docs/"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target} is not there"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        reached.add(page)
        linked = re.findall(r"\]\(([^)#]+\.md)(?:#[^)]*)?\)", page.read_text())
        open_pages += [path for target in linked if (path := (page.parent / target).resolve()) not in reached]
    assert not set(PAGES) - reached


README = [words for words in commands(ROOT / "README.md") if words[0] == "python" and "experiment=quick" not in words]


@pytest.mark.slow
@pytest.mark.parametrize("words", README, ids=[" ".join(words)[:80] for words in README])
def test_the_readme_runs(words: list[str], workplace: Path, tiny_run: Path) -> None:
    run = workplace / "RUN"
    if not run.exists():
        shutil.copytree(tiny_run, run)
    if words[2] == "pbrl.train" and "resume=RUN" not in words:
        words = [*words, *REDUCED, "segment_length=10"]
    if words[2] == "pbrl.evaluate":
        words = [*words, "--episodes", "1"]
    if words[2] == "pbrl.compare":
        shutil.rmtree(workplace / "runs", ignore_errors=True)  # other commands made runs of this seed
        shutil.copytree(tiny_run, workplace / "runs" / "first" / "tiny")
    environment = {**os.environ, "PYTHONPATH": f"{workplace}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=workplace, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
