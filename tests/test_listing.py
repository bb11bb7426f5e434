"""What --help and the listing say, and tab completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pbrl.launch.configuration import options
from pbrl.listing import LISTED, description, keys, main
from tests.conftest import config

ROOT = Path(__file__).parent.parent


def pbrl_train(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """Output of the console script, as pip would write it."""
    script = tmp_path / "bin" / "pbrl-train"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!{sys.executable}\nfrom pbrl.train import main\nmain()\n")
    script.chmod(0o755)
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    ).stdout


@pytest.mark.parametrize("group", LISTED)
def test_every_option_has_one_line(group: str) -> None:
    for option in options(group):
        assert description(group, option), f"conf/{group}/{option}.yaml begins with no comment that says what it is"


def test_one_group_is_listed_alone_and_a_wrong_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main(["updater"])
    shown = capsys.readouterr().out
    assert "PEBBLE (Lee et al., ICML 2021)" in shown
    assert "walker-walk" not in shown
    with pytest.raises(SystemExit):
        main(["updaters"])
    assert "there are: env" in capsys.readouterr().err


def test_the_keys_of_help_are_those_of_the_config() -> None:
    shown = keys()
    for key in config()[0]:
        if key not in LISTED:
            assert f"{key}:" in shown
    assert max(len(line) for line in shown.splitlines()) < 150


@pytest.mark.slow
def test_help_shows_purpose_examples_options_and_keys(tmp_path: Path) -> None:
    shown = pbrl_train(tmp_path, "--help")
    for part in (
        "Trains a robot policy",
        "env=door-open",
        "walker-walk  ",
        "-m launcher=local",
        "total_steps: ${by_suite:{metaworld:75000",
    ):
        assert part in shown
    assert 'eval "$(pbrl-train -sc install=bash)"' in shown
    assert max(len(line) for line in shown.splitlines()) < 150


@pytest.mark.slow
def test_tab_completion_is_installed_and_completes(tmp_path: Path) -> None:
    assert "complete -o nospace" in pbrl_train(tmp_path, "-sc", "install=bash")
    line = "pbrl-train updater=peb"
    assert pbrl_train(tmp_path, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).split() == [
        "updater=pebble",
        "updater=pebble-published",
    ]


@pytest.mark.slow
def test_the_console_script_finds_modules_of_the_present_folder(tmp_path: Path) -> None:
    (tmp_path / "own_place.py").write_text("import gymnasium\n\n\nclass Place(gymnasium.Env):\n    pass\n")
    assert "_target_: own_place.Place" in pbrl_train(tmp_path, "env._target_=own_place.Place", "--cfg", "job")
