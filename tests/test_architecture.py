"""Who may import whom, and where the packages lie."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"train", "evaluate", "compare", "listing", "label", "export", "learned_reward", "__init__"}
ALGORITHM = {"loop", "session", "schedule", "asking", "parts", "questions", "dialogue"}  # what runs the parts
# Folders of pbrl, and what none of their files may import; the files of pbrl itself that are neither command nor
# algorithm are the data and the learned reward, which everything may import.
FORBIDDEN = {
    "bilevel": {"second_term", "updaters", "agent", "records", "launch", "comparing", *ALGORITHM, *COMMANDS},
    "": {"second_term", "updaters", "agent", "records", "launch", "comparing", *ALGORITHM, *COMMANDS},
    "second_term": {"updaters", "agent", "records", "launch", "comparing", *ALGORITHM, *COMMANDS},
    "updaters": {"agent", "records", "launch", "comparing", *ALGORITHM, *COMMANDS},
    "labelling": {
        *("bilevel", "second_term", "updaters", "agent", "records", "launch", "comparing", "reward"),
        *ALGORITHM,
        *COMMANDS,
    },
    "agent": {"second_term", "updaters", "records", "launch", "comparing", *ALGORITHM, *COMMANDS},
    "records": {
        "second_term",
        "updaters",
        "launch",
        "comparing",
        "loop",
        "session",
        "questions",
        "dialogue",
        *COMMANDS,
    },
    "loop": {"second_term", "updaters", "launch", "comparing", *COMMANDS},
    "launch": {"second_term", "updaters", "comparing", *(COMMANDS - {"listing"})},
    "comparing": {"second_term", "updaters", "agent", "records", "launch", "reward", *ALGORITHM, *COMMANDS},
}
SIMULATORS = {"metaworld", "dm_control", "mujoco"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules imported anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def layer(path: Path) -> str | None:
    """The key of FORBIDDEN under which a file of pbrl falls; None for commands."""
    parts = path.relative_to(ROOT / "pbrl").with_suffix("").parts
    if len(parts) > 1:
        return parts[0]
    return None if parts[0] in COMMANDS else "loop" if parts[0] in ALGORITHM else ""


def runtime_imports(path: Path) -> Iterator[str]:
    """Imports outside `if TYPE_CHECKING:` blocks."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", modules("pbrl"), ids=lambda p: str(p.relative_to(ROOT)))
def test_pbrl_knows_no_environment_no_teacher_and_no_experiment(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"envs", "teachers", "experiments", "tests", *SIMULATORS}


@pytest.mark.parametrize("path", modules("pbrl"), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_a_higher_layer(path: Path) -> None:
    forbidden = FORBIDDEN.get(layer(path) or "", set()) if layer(path) is not None else set()
    for name in runtime_imports(path):
        if name.startswith("pbrl."):
            assert name.split(".")[1] not in forbidden, f"{path.name} imports {name}"


def test_no_two_files_import_each_other_even_around_a_corner() -> None:
    known = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules("pbrl")
    }
    arrows: dict[str, set[str]] = {}
    for path in modules("pbrl"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())  # imports for type checkers only count too
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        named = {f"{node.module}.{alias.name}" for node in froms for alias in node.names} & known
        arrows[name] = (named | set(imports(path)) & known) - {name, "pbrl"}
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"in a circle: {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}


def test_no_updater_imports_another() -> None:
    for path in modules("pbrl/updaters"):
        others = [name for name in imports(path) if name.startswith("pbrl.updaters")]
        assert not others, f"{path.name} imports {others}"


def test_sb3_stays_with_the_agent() -> None:
    allowed = {*modules("pbrl/agent"), *(ROOT / "pbrl" / name for name in ("loop.py", "launch/build.py"))}
    for path in modules("pbrl"):
        if any(name.startswith("stable_baselines3") for name in imports(path)):
            assert path in allowed, path


def test_teachers_import_of_pbrl_its_types_and_files_only() -> None:
    for path in modules("teachers"):
        assert {name for name in imports(path) if name.split(".")[0] == "pbrl"} <= {"pbrl.types", "pbrl.files"}, path


def test_environments_do_not_import_pbrl() -> None:
    for path in modules("envs"):
        assert "pbrl" not in {name.split(".")[0] for name in imports(path)}, path


def test_the_packages_lie_beside_each_other() -> None:
    import envs
    import pbrl
    import teachers

    places = {Path(str(package.__file__)).parent.parent for package in (envs, pbrl, teachers)}
    assert places == {ROOT}
