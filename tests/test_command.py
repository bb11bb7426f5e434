"""The command line: `_target_`s of one's own, misspelt keys, flags, and printed lines that work when pasted."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from pbrl.interfaces import name_of
from pbrl.launch.build import build
from pbrl.launch.command import command_line, composed, evaluate_command, prepare, quoted, rewrite, train_command
from pbrl.launch.configuration import GROUPS, ConfigError, check
from tests.conftest import TINY, finish, tiny_loop

PARTS = """
import torch
from pbrl.types import Answer


class Lazy:
    def __init__(self, tolerance: float = 0.05):
        if tolerance < 0:
            raise ValueError(f"tolerance={tolerance}; expected at least 0")
        self.tolerance = tolerance

    def __call__(self, query):
        return Answer(torch.full((len(query),), self.tolerance), torch.ones(len(query), dtype=torch.bool))


def prefers(query, weight: float = 0.25):
    return Answer(torch.full((len(query),), weight), torch.ones(len(query), dtype=torch.bool))


class Constant:
    pairs = "fresh"

    def __init__(self, rate: float = 1.0):
        self.rate = rate

    def update(self, reward, preferences, session):
        return {"mine/rate": self.rate}


class Broken:
    def __init__(self):
        None.nothing
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of one's own in the present folder."""
    name = f"parts_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def made(*arguments: str) -> tuple[DictConfig, list[str]]:
    """The config that these arguments come to, and the overrides that Hydra got."""
    overrides = prepare(arguments)
    return composed(overrides), overrides


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ parts of one's own


@pytest.mark.slow
def test_a_target_drops_the_arguments_of_the_option_it_replaces(parts: str) -> None:
    cfg, _ = made(f"updater._target_={parts}.Constant", "updater.rate=3")
    assert dict(cfg.updater) == {"_target_": f"{parts}.Constant", "rate": 3}
    cfg, _ = made("updater=rime", "teacher=mistake", f"teacher._target_={parts}.Lazy", "teacher.tolerance=0.2")
    assert dict(cfg.teacher) == {"_target_": f"{parts}.Lazy", "tolerance": 0.2}
    cfg, _ = made("experiment=energy-walker-walk", f"updater._target_={parts}.Constant")
    assert dict(cfg.updater) == {"_target_": f"{parts}.Constant"}, "an experiment's arguments stayed"


@pytest.mark.parametrize("group", GROUPS)
def test_a_target_replaces_in_every_group(group: str) -> None:
    overrides = OverridesParser.create().parse_overrides([f"{group}._target_=my.Own", f"{group}.size=3"])
    cfg = composed(rewrite(overrides))
    assert dict(cfg[group]) == {"_target_": "my.Own", "size": 3}
    OmegaConf.to_container(cfg, resolve=True)  # nothing else leaned on what it replaced


def test_a_nested_target_replaces_its_own_node_only() -> None:
    cfg, _ = made("updater=aparl", "updater.gate._target_=pbrl.second_term.gate.Gate", "updater.gate.error=0.2")
    assert dict(cfg.updater.gate) == {"_target_": "pbrl.second_term.gate.Gate", "error": 0.2}
    assert cfg.updater.implicit.estimator == "fisher"
    cfg, _ = made("updater=aparl", "updater.utility._target_=experiments.energy.Energy", "updater.utility.cost=2.0")
    assert dict(cfg.updater.utility) == {"_target_": "experiments.energy.Energy", "cost": 2.0}


def test_an_argument_that_the_constructor_takes_needs_no_place_in_a_yaml() -> None:
    cfg, _ = made("teacher=oracle", "teacher.beta=2.0")
    assert cfg.teacher.beta == 2.0


def test_parts_of_ones_own_are_held_against_their_constructors(parts: str) -> None:
    assert "did you mean teacher.tolerance?" in refused(f"teacher._target_={parts}.Lazy", "teacher.tolernce=1")
    assert "teacher.tolerance=a is a str; expected float" in refused(
        f"teacher._target_={parts}.Lazy", "teacher.tolerance=a"
    )
    assert "there are: teacher.weight" in refused(f"teacher._target_={parts}.prefers", "teacher.wight=1")
    assert "cannot be imported: No module named 'nowhere'" in refused("teacher._target_=nowhere.Lazy")
    assert "expected a class or function with its module" in refused("teacher._target_=Lazy")
    assert "is a module" in refused(f"teacher._target_={parts}.torch")


@pytest.mark.slow
def test_a_function_is_a_teacher_and_a_class_with_one_method_an_updater(parts: str, tmp_path: Path) -> None:
    own = [f"teacher._target_={parts}.prefers", "teacher.weight=0.75", f"updater._target_={parts}.Constant"]
    cfg, overrides = made(*TINY, *own, f"run_dir={tmp_path / 'run'}")
    loop = build(cfg, {"env": "pointmass"}, overrides)
    summary = finish(loop)
    assert summary["mine/rate"] == 1.0
    assert set(loop.parts.preferences.prefers_first.tolist()) == {0.75}
    assert name_of(loop.parts.teacher) == f"{parts}.prefers"


@pytest.mark.slow
def test_what_a_constructor_refuses_is_one_line_with_the_whole_key(parts: str, tmp_path: Path) -> None:
    for own, expected in (
        ([f"teacher._target_={parts}.Lazy", "teacher.tolerance=-1.0"], "teacher.tolerance=-1.0; expected at least 0"),
        ([f"teacher._target_={parts}.Broken"], "teacher: AttributeError: 'NoneType' object has no attribute 'nothing'"),
        (["updater=aparl", "updater.gate.error=3.0"], "updater.gate.error=3.0; expected"),
        (["updater=rime", "updater.inner.fit.epochs=0"], "updater.inner.fit.epochs=0; expected"),
        (["agent.precision=fp16"], "agent.precision=fp16; expected one of fp32, bf16"),
        (["teacher.mistake=2.0"], "teacher.mistake=2.0; expected a share in [0, 1]"),
    ):
        cfg, overrides = made(*TINY, *own, f"run_dir={tmp_path / 'run'}")
        with pytest.raises(ConfigError) as caught:
            build(cfg, {}, overrides)
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ one line, not a page


def test_misspelt_keys_are_checked_against_the_options_that_were_chosen() -> None:
    assert "did you mean teacher.mistake?" in refused("teacher=mistake", "teacher.mistke=0.2")
    assert "did you mean updater.inner." in refused("updater=rime", "updater.inner.epoch=3")
    assert "did you mean logger.project?" in refused("logger=wandb", "logger.projekt=x")
    assert "takes none" in refused("logger.projekt=x")


@pytest.mark.parametrize(
    "flags", [["-m"], ["--cfg", "job"], ["--cfg", "job", "--resolve"], ["-i", "defaults"], ["-cd", "."]]
)
def test_flags_change_nothing_about_errors(flags: list[str]) -> None:
    assert "did you mean feedback.budget?" in refused("env=pointmass", *flags, "feedback.budgett=3")
    assert "did you mean pebble?" in refused(*flags, "updater=pebbel")


def test_wrong_flags_are_one_line_and_overrides_may_stand_around_flags() -> None:
    assert "invalid choice: 'foo'" in refused("--cfg", "foo")
    assert "unrecognized arguments: --bogus" in refused("seed=1", "--bogus")
    assert "no such folder" in refused("-cd", "nowhere", "seed=1")
    assert "--resolve is for --cfg job" in refused("--resolve")
    assert "cannot be given together" in refused("-m", "--cfg", "job")
    assert prepare(["seed=1", "--cfg", "job", "env=pointmass"]) == ["--cfg", "job", "++seed=1", "env=pointmass"]
    assert prepare(["-cd", "pbrl", "total_steps=7"]) == ["-cd", "pbrl", "++total_steps=7"]


def test_a_sweep_with_a_wrong_member_starts_none() -> None:
    assert "did you mean teacher.tolerance?" not in refused("-m", "teacher=oracle,mistake", "teacher.mistke=0.2,0.3")
    assert "seed=-1; expected at least 0" in refused("-m", "seed=0,-1")
    assert "start the runs one by one" in refused("-m", "env=pointmass", "seed=0,1", "teacher=human")
    assert "updater option pebbel does not exist" in refused("-m", "updater=pebble,pebbel", "seed=range(40)")
    assert "env=pointmass,door-open names several values; add -m" in refused("env=pointmass,door-open")


def test_what_is_swept_is_known_to_the_runs() -> None:
    assert prepare(["-m", "seed=0,1", "env=pointmass"])[-1] == "hydra.callbacks.summary.swept=['seed']"


@pytest.mark.slow
def test_every_shipped_config_resolves_as_a_whole() -> None:
    command = [sys.executable, "-m", "pbrl.train", "--cfg", "job", "--resolve", "agent=sac-published"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "- 256\n  - 256\n  - 256\n" in done.stdout


def test_version_is_ours() -> None:
    done = subprocess.run([sys.executable, "-m", "pbrl.train", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pbrl 0.")


def test_no_gpu_is_said_and_never_quietly_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("cuda", "cuda:3"):
        with pytest.raises(ConfigError, match=f"device={device}: torch finds no CUDA device"):
            tiny_loop(tmp_path / "run", f"device={device}")
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        tiny_loop(tmp_path / "run", "device=tpu")


def test_a_run_says_device_and_teacher_by_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_loop(tmp_path / "run", "teacher=mistake").release()
    shown = capsys.readouterr().out
    assert "cpu (auto: no CUDA here)" in shown
    assert " · teacher mistake · " in shown


# ------------------------------------------------------------------------------------------------ lines to be pasted

STRANGE = [
    "runs/pointmass/pebble/seed=0,agent.net_arch=[16,16]",
    "a b/c'd",
    'x"y',
    "back\\",
    "${seed}",
    "12",
    "null",
    "ü",
    "läufe/日本",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_printed_path_is_read_back_by_the_shell_and_by_hydra(name: str) -> None:
    words = shlex.split(train_command(Path(name), ["my_module", "mödul"]))
    assert words[:3] == ["python", "-m", "pbrl.train"]
    resume, trust = OverridesParser.create().parse_overrides(words[3:])
    assert str(resume.value()).replace("\\${", "${") == name
    assert resume.value() == name or "${" in name
    assert trust.value() == ["my_module", "mödul"]
    assert shlex.split(evaluate_command(Path(name), ["my_module"], "--video"))[3:] == [
        name,
        "--video",
        "--trust",
        "my_module",
    ]


def test_the_stored_command_is_what_was_typed() -> None:
    typed = ["env=pointmass", "agent.net_arch=[16,16]", "teacher._target_=my.Own", "teacher.tolerance=0.2"]
    parser = OverridesParser.create()
    from pbrl.launch.command import rewrite

    stored = shlex.split(command_line(rewrite(parser.parse_overrides(typed))))
    assert stored == ["python", "-m", "pbrl.train", *typed]


def test_a_path_is_quoted_only_where_it_must_be() -> None:
    assert quoted("runs/door-open/aparl-s0-20261122-101500") == "runs/door-open/aparl-s0-20261122-101500"


@pytest.mark.slow
def test_a_stopped_run_with_parts_of_its_own_goes_on_by_the_printed_line(parts: str, tmp_path: Path) -> None:
    """The whole way, in processes: start, evaluate and resume by what was printed and stored."""
    run = tmp_path / "runs/seed=0,a=[1]"
    own = [f"teacher._target_={parts}.Lazy", "teacher.tolerance=0.2", f"run_dir={quoted(str(run))}"]

    def shell(line: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {"PATH": path, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shown = shell(shlex.join(["python", "-m", "pbrl.train", *TINY, "total_steps=300", *own]))
    watch = next(line.partition("watch it")[2] for line in shown.splitlines() if "watch it" in line)
    assert "step 300" in shell(watch.strip().replace("--video", "--episodes 1"))
    resume = f"{train_command(run, [parts])} total_steps=310"
    assert "resumed at step 300" in shell(resume)
    assert f"teacher._target_={parts}.Lazy" in (run / "command.txt").read_text()


def test_check_names_what_was_deleted() -> None:
    with pytest.raises(ConfigError, match="total_steps is missing"):
        check(composed(["~total_steps"]))
