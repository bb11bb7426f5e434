"""What strangers may hand over: files that want to run code, names that leave their folder, and plain rubbish."""

from __future__ import annotations

import ast
import functools
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pbrl import compare, evaluate, export, label
from pbrl.comparing.runs import ComparisonError, find_runs
from pbrl.labelling import teacher as labelling
from pbrl.labelling.drawing import unpack
from pbrl.labelling.store import LabelStore
from pbrl.launch.build import build
from pbrl.launch.configuration import ConfigError, options
from pbrl.launch.constructors import needs_trust
from pbrl.launch.one_run import run
from pbrl.launch.stored import lock, read_config
from pbrl.loop import Loop, Stopped
from pbrl.preferences import Preferences
from pbrl.preferences import main as preferences_main
from pbrl.records.checkpoint import CheckpointError
from teachers.recorded import RecordedTeacher
from tests.conftest import config, tiny_loop
from tests.hostile import builders
from tests.hostile.builders import Payload, npz, poison

ROOT = Path(__file__).parents[1]
HOLE = 2**42  # bytes of a file that takes no room: tar keeps such ones
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def resume(run: Path, *overrides: str) -> Loop:
    """The loop of `python -m pbrl.train resume=RUN`."""
    cfg, choices = composed()
    cfg = cfg.copy()
    cfg.resume = str(run)
    return build(cfg, choices, [f"resume={run}", *overrides])


@functools.cache
def composed() -> Any:
    return config("env=pointmass")


@pytest.fixture
def stored(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that may be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_two_processes_do_not_work_in_one_run(tiny_run: Path) -> None:
    cfg, choices = config("env=pointmass", f"resume={tiny_run}")
    with lock(tiny_run), pytest.raises(ConfigError, match=f"another process is at work in {tiny_run}"):
        run(cfg, choices, [f"resume={tiny_run}"])
    with lock(tiny_run):  # free again
        pass


def test_malicious_data_sets_do_not_run(tmp_path: Path) -> None:
    evil = npz(obs=np.array([Payload(tmp_path / "mark")], dtype=object), metadata="{}")
    bomb = npz(zipfile.ZIP_DEFLATED, obs=np.zeros(10**7, np.uint8), metadata="{}")
    for data in (evil, bomb):
        (tmp_path / "evil.npz").write_bytes(data)
        with pytest.raises(ValueError, match=r"evil\.npz"):
            Preferences.load(tmp_path / "evil.npz")
        with pytest.raises(ValueError, match=r"evil\.npz"):
            RecordedTeacher(str(tmp_path / "evil.npz"))
    assert not (tmp_path / "mark").exists()


def test_nothing_in_the_packages_loads_pickles() -> None:
    found = []
    for path in [p for package in ("pbrl", "envs", "teachers") for p in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                if {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names):
                    found.append(where)
            if not isinstance(node, ast.Call):
                continue
            call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if call.endswith("torch.load") and given.get("weights_only") != "True":
                found.append(where)
            if call in ("np.load", "numpy.load", "np.lib.format.read_array") and given.get("allow_pickle") != "False":
                found.append(where)
            if call == "yaml.load" and not ast.unparse(node.args[-1]).endswith("_PlainLoader"):  # a yaml.SafeLoader
                found.append(where)
            if call in (
                "eval",
                "exec",
                "yaml.unsafe_load",
                "SAC.load",
                "PreferenceSAC.load",
                "pd.read_pickle",
            ):
                found.append(where)
    # a sweep's process hands each run's config to a child of its own, through a pipe: no file, no stranger
    assert [where for where in found if not where.startswith("pbrl/launch/sweep.py")] == []


# Folders of runs: tests/hostile/attacks.yaml


def unpacked(value: Any, mark: str) -> Any:
    """A value of the table with MARK and $repeat put in."""
    if isinstance(value, dict):
        if "$repeat" in value:
            return value["$repeat"][0] * value["$repeat"][1]
        if "$number" in value:
            return int(value["$number"] * value["times"])
        return {key: unpacked(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [unpacked(item, mark) for item in value]
    return value.replace("MARK", mark) if isinstance(value, str) else value


ATTACKS = yaml.safe_load((ROOT / "tests" / "hostile" / "attacks.yaml").read_text())


def merged(good: Any, value: Any) -> Any:
    """A new node as it stands; one of the same constructor keeps the good arguments that it does not name."""
    if isinstance(good, dict) and isinstance(value, dict) and value.get("_target_", 0) in (0, good.get("_target_")):
        return good | value
    return value


def attacked(run: Path, attack: dict[str, Any], outside: Path, mark: Path) -> None:
    """Do to the folder of a run what a row of the table says."""
    attack = unpacked(attack, str(mark))
    if "set" in attack:
        good = yaml.safe_load((run / "config.yaml").read_text())
        edit(run, **{key: merged(good.get(key), value) for key, value in attack["set"].items()})
    if "text" in attack:
        (run / attack["text"][0]).write_text(attack["text"][1])
    if "run" in attack:
        poison(run, "run.json", lambda data: json.dumps(json.loads(data) | attack["run"]).encode())
    if "make" in attack:
        getattr(builders, attack["make"])(run, mark)
    place = next((attack[kind] for kind in ("link", "hard", "pipe", "folder", "hole") if kind in attack), None)
    if place is None:
        return
    path, folder = run / place.rstrip("/"), place.endswith("/")
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if "link" in attack:
        path.symlink_to(outside / ("folder" if folder else "precious" if "nowhere" not in place else "nowhere"))
    elif "hard" in attack:
        path.hardlink_to(outside / "precious")
    elif "folder" in attack:
        path.mkdir()
    elif "hole" in attack:
        path.touch()
        os.truncate(path, HOLE)
    else:
        os.mkfifo(path)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def outcome(command: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The line that a command ends with, or None if it did its work; anything else fails the test."""
    capsys.readouterr()
    try:
        code = command()
    except (ConfigError, CheckpointError) as error:  # `main` prints them
        line = str(error)
    except SystemExit as error:
        said = capsys.readouterr().err.strip() if isinstance(error.code, int) else str(error.code)
        line = next((line for line in said.splitlines() if line.startswith("error at step")), said)
    else:
        line = capsys.readouterr().err.strip() if code in (1, 2) else ""
        if not line:
            assert capsys.readouterr().out.replace("\n", "").replace("\r", "").isprintable()
            return None
    assert line.isprintable() and len(line) < 2000, line[:3000]
    return line


LABELLED = {"env"}  # the part of a config from which `pbrl.label` makes something


class Draws:
    """In place of the labelling page's server and its drawing process: makes the environment, as that does."""

    link = "http://127.0.0.1:1/#token"

    def __init__(self, settings: dict[str, Any], port: int = 0) -> None:
        try:
            env = instantiate(dict(settings["env"]), _convert_="all")
        except Exception as error:  # as `pbrl.labelling.drawing` does
            raise ValueError(f"the labelling page cannot be opened: {error.__cause__ or error}") from error
        env.reset(seed=0)
        env.close()

    def tell(self, **said: Any) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """There is nothing to end."""


@pytest.mark.parametrize(
    ("attack", "every_command"),
    [
        *(pytest.param(attack, True, marks=pytest.mark.slow) for attack in ATTACKS),
        *((attack, False) for attack in ATTACKS[::8]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "all" if value else "resume",
)
def test_an_attack_is_refused_in_a_line_or_does_nothing(
    attack: dict[str, Any],
    every_command: bool,
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outside, mark = tmp_path / "outside", tmp_path / "mark"
    (outside / "folder").mkdir(parents=True)
    for path in (outside / "precious", outside / "folder" / "precious"):
        path.write_text("precious\n")
    (tmp_path / "payload.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    attacked(stored, attack, outside, mark)
    before, cfg, (_, choices) = contents(outside), composed()[0].copy(), composed()
    cfg.resume = str(stored)
    monkeypatch.setattr(labelling, "Service", Draws)
    monkeypatch.setattr(label, "_until_answered", nobody_answers)

    def labelled() -> str | None:
        out = ["--out", str(stored / "labels.npz")]
        said = outcome(lambda: label.main([str(stored), *out]), capsys)
        outcome(lambda: label.main([str(stored / "preferences.npz"), "--env", "pointmass", *out]), capsys)
        return said

    if "label" in attack:  # before a resumed run writes its pairs anew
        assert attack["label"] in (labelled() or "")
    resumed = outcome(lambda: run(cfg, choices, [f"resume={stored}", "total_steps=610"]), capsys)
    if "says" in attack:
        assert resumed is not None and attack["says"] in resumed, resumed
    else:
        assert resumed is None
    if every_command and "label" not in attack:
        assert (labelled() is not None) == (LABELLED & attack.get("set", {}).keys() != set()) or resumed
    if every_command:
        looked = outcome(lambda: evaluate.main([str(stored), "--episodes", "1"]), capsys)
        assert looked is None or resumed is not None
        outcome(lambda: export.main([str(stored), "--to", str(tmp_path / "exported")]), capsys)
        outcome(lambda: preferences_main(["export", str(stored), str(tmp_path / "out.npz")]), capsys)
        if resumed is not None:
            assert all(line.isprintable() for line in damaged_runs(stored))
        else:
            outcome(lambda: compare.main([str(stored), "--out", str(tmp_path / "out"), "--repetitions", "9"]), capsys)
    assert contents(outside) == before
    assert not mark.exists()
    assert "payload" not in sys.modules


def nobody_answers(teacher: Any, query: Any) -> None:
    """In place of people at the page: it is shown, and stopped with Ctrl-C."""
    teacher.post(query)
    raise KeyboardInterrupt


def damaged_runs(folder: Path) -> list[str]:
    """What `pbrl.compare` says of runs that it leaves out."""
    damaged: list[str] = []
    try:
        find_runs([folder], damaged)
    except ComparisonError as error:
        damaged.extend(str(error).splitlines())  # a line for each run, below one that says so
    return damaged


def test_the_table_of_attacks_is_long() -> None:
    assert len(ATTACKS) >= 60
    assert len({attack["name"] for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("make", [name for name in dir(builders) if name.startswith("store_")])
def test_a_strangers_store_of_answers_is_refused_in_a_line(make: str, tmp_path: Path) -> None:
    getattr(builders, make)(tmp_path, tmp_path / "mark")
    with pytest.raises(ValueError, match="is not a store of labels") as refused:
        LabelStore(tmp_path / "labels.npz.sqlite3")
    assert str(refused.value).isprintable()


# Configs in run folders


def edit(stored: Path, **changes: Any) -> None:
    path = stored / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


NEEDED = {
    "http": ["teacher.url=http://x/"],
    "http-frames": ["teacher.url=http://x/"],
    "recorded": ["teacher.path=x.npz"],
    "metaworld": ["env.task=hammer"],
    "dm_control": ["env.domain=hopper", "env.task=hop"],
    "gymnasium": ["env.id=Pendulum-v1"],
}


def check_shipped(group: str, tmp_path: Path) -> None:
    """The stored configs of all options of a group are read; only addresses and files elsewhere need trust."""
    for option in options(group):
        cfg, choices = config(f"{group}={option}", *NEEDED.get(option, []))
        plain = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(plain, dict)
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**plain, "choices": choices})))
        trust = needs_trust(plain, tmp_path)
        assert trust == [value.partition("=")[2] for value in NEEDED.get(option, []) if group == "teacher"]
        read_config(tmp_path, trust)


@pytest.mark.parametrize(
    "group", ["reward", "query", *(pytest.param(group, marks=pytest.mark.slow) for group in ("teacher", "logger"))]
)
def test_what_the_shipped_options_store_is_read_again(group: str, tmp_path: Path) -> None:
    check_shipped(group, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["env", "agent", "updater", "experiment"])
def test_what_all_other_shipped_options_store_is_read_again(group: str, tmp_path: Path) -> None:
    check_shipped(group, tmp_path)


def test_an_own_part_is_called_when_it_is_trusted(stored: Path) -> None:
    edit(stored, teacher={"_target_": "tests.test_resume.GlobalTeacher"})
    with pytest.raises(ConfigError, match=r"trust=\[tests.test_resume\]"):
        resume(stored)
    assert read_config(stored, ["tests.test_resume"])[0].teacher._target_ == "tests.test_resume.GlobalTeacher"


@pytest.mark.parametrize(
    ("trust", "url"),
    [
        ("http://judge.org", "http://judge.org.evil.com/"),
        ("http://judge.org", "http://judge.org:x@evil.com/"),
        ("http", "http://evil.com/"),
    ],
)
def test_trust_in_one_address_is_no_trust_in_those_that_begin_alike(stored: Path, trust: str, url: str) -> None:
    edit(stored, teacher={"_target_": "teachers.http.HTTPTeacher", "url": url})
    with pytest.raises(ConfigError, match=r"is outside what .* --trust http"):
        read_config(stored, [trust])
    assert read_config(stored, [url])[0].teacher.url == url


def test_what_names_no_module_is_not_trusted(stored: Path) -> None:
    edit(stored, teacher={"_target_": "tests.test_resume.GlobalTeacher.__subclasses__"})
    with pytest.raises(ConfigError, match="is defined elsewhere"):
        read_config(stored, ["tests.test_resume"])


def test_a_clip_that_unpacks_to_more_is_not_drawn() -> None:
    bomb = npz(zipfile.ZIP_DEFLATED, states=np.zeros((1, 2**20)), actions=np.zeros((1, 2, 3), np.float32))
    assert len(bomb) < 2**16
    with pytest.raises(ValueError, match="a stored question is damaged"):
        unpack(bomb)


def test_names_of_folders_are_escaped_where_runs_cannot_be_compared(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a\x1b]0;owned\x07", "b\n<script>"):
        shutil.copytree(tiny_run, tmp_path / name)
    with pytest.raises(SystemExit) as refused:
        compare.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "seed 0 occurs 2 times" in str(refused.value)
    assert str(refused.value).replace("\n", "").isprintable()


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(st.data())
def test_any_stored_config_is_read_or_refused_in_one_line(tiny_run: Path, tmp_path: Path, data: st.DataObject) -> None:
    good = yaml.safe_load((tiny_run / "config.yaml").read_text())
    kind = data.draw(st.sampled_from(["bytes", "value", "key", "tree"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=200))
    elif kind == "tree":
        content = yaml.safe_dump(data.draw(JSONISH)).encode()
    elif kind == "key":
        del good[data.draw(st.sampled_from(sorted(good)))]
        content = yaml.safe_dump(good).encode()
    else:
        good[data.draw(st.sampled_from(sorted(good)))] = data.draw(JSONISH)
        content = yaml.safe_dump(good).encode()
    run = tmp_path / "any"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_bytes(content)
    try:
        resume(run, "total_steps=10").close(False)
    except (ConfigError, CheckpointError) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("rubbish", [b"", b"\0" * 100, b"[]", b"{}", b'{"a": ', "é".encode("latin1"), b"null"])
@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "answers.jsonl", "metrics.jsonl"])
def test_a_garbled_file_of_a_run_is_survived_or_named(stored: Path, name: str, rubbish: bytes) -> None:
    (stored / name).write_bytes(rubbish)
    try:
        resume(stored).close(False)
    except ConfigError as error:
        assert name in str(error)
        assert "\n" not in str(error)


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", Path("/dev/null"), Path("/proc/self")):
        with pytest.raises(ConfigError, match="there is no run"):
            resume(folder)


# Names and paths


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/../../b"])
def test_the_name_of_an_option_cannot_lead_out_of_the_folder_of_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, choices = config("env=pointmass")
    with pytest.raises(ConfigError, match="would lead out of the folder of runs"):
        build(cfg, {**choices, "env": name}, [])


@pytest.mark.parametrize("member", ["../../evil.npy", "/tmp/evil.npy", "obs/../../evil.npy"])
def test_a_data_set_writes_nothing_outside(tmp_path: Path, member: str) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros(3))
    path = tmp_path / "a" / "b" / "set.npz"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, buffer.getvalue())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="not an intact preference data set"):
        Preferences.load(path)
    with pytest.raises(ValueError, match="not a preference data set"):
        RecordedTeacher(str(path))
    assert sorted(tmp_path.rglob("*")) == before


# Overrides


KEYS = ["total_steps", "seed", "threads", "checkpoint_every", "segment_length", "feedback.budget", "feedback.every"]
KEYS += ["feedback.schedule", "eval.episodes", "agent.tau", "agent.net_arch", "reward.members", "query.pool", "device"]
KEYS += [
    "updater.fit.epochs",
    "teacher.seed",
    "env.horizon",
    "pretraining.steps",
    "oracle",
    "callbacks",
    "trust",
    "foo",
]
VALUES = st.sampled_from(["-1", "0", "1", "1.5", "null", "[]", "{}", "text", "true", ".nan", ".inf", "[1,2]", "''"])


@pytest.mark.slow
@quick
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=2))
def test_any_overrides_build_or_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    from hydra.errors import HydraException

    run = tmp_path_factory.mktemp("any") / "run"
    try:
        tiny_loop(run, *(f"{key}={value}" for key, value in pairs)).close(False)
    except ConfigError as error:
        assert "\n" not in str(error)
    except HydraException:
        pass  # said in one line by pbrl.launch.command; see test_command


# Servers


def test_the_example_server_is_reached_from_this_machine_only() -> None:
    command = [sys.executable, "-m", "teachers.example_server", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split(":")[2].split("/")[0])
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            listening = [row[1] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
            assert [socket.inet_ntoa(bytes.fromhex(a.split(":")[0])[::-1]) for a in listening] == ["127.0.0.1"]
        finally:
            server.terminate()


# Divergence


def test_a_critic_that_explodes_is_reported_with_step_and_quantity(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run")
    loop.agent._sums.fill_(1.0)
    loop.agent._sums[4] = 1e9
    loop.agent._summed = 1
    with pytest.raises(FloatingPointError, match=r"train/q_mean became 1e\+09 before update 0 \(environment step 0\)"):
        loop.agent.metrics()
    loop.close(False)


@pytest.mark.parametrize(
    "part", ["reward", *(pytest.param(part, marks=pytest.mark.slow) for part in ("actor", "critic"))]
)
def test_a_network_that_became_nan_is_found_at_once_and_never_saved(tmp_path: Path, part: str) -> None:
    loop = tiny_loop(tmp_path / "run")
    loop.stop = lambda: loop.step >= 310  # trained, with a checkpoint at step 300
    with pytest.raises(Stopped):
        loop.run()
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    network = loop.parts.reward if part == "reward" else getattr(loop.agent, part)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="it is not saved"):
        loop.save()
    loop.stop = lambda: loop.step >= 330
    with pytest.raises(FloatingPointError, match=r"(the policy's action|the learned reward) became nan .*step 31\d"):
        loop.run()
    loop.close(False)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
