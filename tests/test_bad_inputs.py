"""Whatever a user tries is said in one line with key, value, what is expected and the way out; never a traceback.

The table is tests/bad_inputs.txt: overrides | a part of the line.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pbrl.launch.build import build
from pbrl.launch.command import composed, prepare
from pbrl.launch.configuration import CONF, GROUPS, ConfigError, options
from pbrl.launch.sweep import launcher_error

LINES = (Path(__file__).parent / "bad_inputs.txt").read_text().splitlines()
TABLE = [tuple(part.strip() for part in line.split(" | ")) for line in LINES if line and not line.startswith("#")]
SOME = [
    row for at, row in enumerate(TABLE) if at % 14 == 0 or "there are" in row[1]
]  # those that list what exists, too
BASE = ["env=pointmass", "total_steps=20000", "run_dir=run", "threads=1", "agent.buffer_size=1000"]


def answer(overrides: list[str]) -> str | None:
    """What the command line says to these, or None if they can be run. Anything else than a ConfigError is raised."""
    try:
        if error := launcher_error(overrides):
            raise ConfigError(error)
        chosen = {override.partition("=")[0] for override in overrides}
        rewritten = prepare([*(o for o in BASE if o.partition("=")[0] not in chosen), *overrides])
        build(composed(rewritten), {}, rewritten).release()
    except ConfigError as error:
        return str(error)
    return None


def check_row(row: tuple[str, str]) -> None:
    typed, expected = row
    words = typed.split(" ") if "{" not in typed and "a b" not in typed else [typed]
    said = answer(words)
    assert said is not None, f"{typed} was accepted"
    assert "\n" not in said
    assert expected in said
    assert len(said) < 700


def test_the_table_is_long_and_has_no_row_twice() -> None:
    assert len({typed for typed, _ in TABLE}) == len(TABLE) >= 150


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", SOME, ids=lambda row: row[0])
def test_some_rows(row: tuple[str, str], elsewhere: Path) -> None:
    check_row(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_each_row(row: tuple[str, str], elsewhere: Path) -> None:
    check_row(row)


KEYS = [typed.split(" ")[-1].partition("=")[0].lstrip("+~") for typed, _ in TABLE]
VALUES = ["-1", "0", "1", "3.5", "null", "[]", "{}", "text", "true", ".nan", ".inf", "-.inf", "[1,2]", "[a]", "''"]
VALUES += ["1e9", "{_target_: x.Y}", "${seed}", "${nothing}", "a,b", "???", '"a b"', "/dev/null", "é", "off"]


def generated(rng: random.Random) -> list[str]:
    """One to three overrides: known keys with odd values, chosen options, garbled keys."""
    found = []
    for _ in range(rng.randint(1, 3)):
        group = rng.choice([group for group in GROUPS if group != "env"])
        key = rng.choice([key for key in KEYS if key not in ("replaced", "resume", "run_dir", "")])
        if rng.random() < 0.2:
            found.append(f"{group}={rng.choice(options(group))}")
        elif rng.random() < 0.1:
            found.append(f"{rng.choice('+~')}{key}")
        else:
            i = rng.randrange(len(key))
            key = key[:i] + key[i + 1 :] if rng.random() < 0.1 else key
            found.append(f"{key}={rng.choice(VALUES)}")
    return found


def check_generated(seed: int, count: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        overrides = generated(rng)
        try:
            said = answer(overrides)
        except Exception as error:
            raise AssertionError(f"{overrides}: {type(error).__name__}: {error}") from error
        assert said is None or "\n" not in said, overrides


def test_generated_overrides_make_no_traceback(elsewhere: Path) -> None:
    check_generated(0, 5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_generated_overrides_make_no_traceback(seed: int, elsewhere: Path) -> None:
    check_generated(seed, 25)


def test_every_option_is_listed_where_one_is_misspelt() -> None:
    for group in GROUPS:
        said = answer([f"{group}=nothing-like-it"])
        assert said is not None
        assert all(name in said for name in options(group)), (group, CONF)
