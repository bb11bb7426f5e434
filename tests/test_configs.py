"""Every shipped option composes, names things that exist, and is refused in one line when misused."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from pbrl.launch.build import build
from pbrl.launch.command import prepare
from pbrl.launch.configuration import CONF, GROUPS, ConfigError, check, options
from pbrl.launch.stored import read_config
from pbrl.second_term.gate import as_gate, as_limit
from tests.conftest import config, option

ROOT = Path(__file__).parent.parent
ALL = [(group, name) for group in GROUPS for name in options(group)]
NEEDS = {  # mandatory values of generic options
    "env=metaworld": ["env.task=pick-place"],
    "env=dm_control": ["env.domain=reacher", "env.task=easy"],
    "env=gymnasium": ["env.id=Pendulum-v1"],
    "teacher=http": ["teacher.url=http://127.0.0.1:9/label"],
    "teacher=http-frames": ["teacher.url=http://127.0.0.1:9/label"],
    "teacher=recorded": ["teacher.path=labels.npz"],
}


def targets(node: DictConfig) -> list[str]:
    found = [node["_target_"]] if node.get("_target_") else []
    for value in node.values():
        if isinstance(value, DictConfig):
            found += targets(value)
    return found


@pytest.mark.parametrize(("group", "name"), ALL, ids=lambda value: str(value))
def test_every_option_composes_and_its_keys_fit_its_target(group: str, name: str) -> None:
    cfg, choices = config(f"{group}={name}", *NEEDS.get(f"{group}={name}", []))
    assert choices[group] == name
    check(cfg)
    for target in targets(cfg[group]):
        assert callable(get_object(target))


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name: str) -> None:
    cfg, _ = config(f"experiment={name}")
    check(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_our_methods_fit_the_answers_alike_and_published_settings_as_published() -> None:
    """So that methods differ by their pairs and terms only, and a published PEBBLE is the published one."""
    ours, published = (option("updater", name).fit for name in ("pebble", "pebble-published"))
    assert ours == option("updater", "aparl").fit == option("updater", "penalty").fit != published
    assert (published.batch_size, published.least_steps, published.crop, published.shrink) == (128, 0, None, 0)
    assert option("updater", "mrn").fit == published
    names = [name for name in options("experiment") if name.startswith(("pebble-", "rune-", "reed-"))]
    assert len(names) > 8
    expected = OmegaConf.to_container(config("updater=pebble-published")[0].updater.fit)
    for name in names:
        cfg = config(f"experiment={name}")[0]
        assert cfg.updater.fit == expected | {"epochs": 10 if "metaworld" in cfg.env._target_ else 50}, name


def published() -> list[str]:
    """The experiments with published settings: those that start from `experiment=published`, and it itself."""
    names = [
        name for name in options("experiment") if "- published\n" in (CONF / f"experiment/{name}.yaml").read_text()
    ]
    assert len(names) > 30
    return ["published", *names]


def test_published_settings_have_the_published_reward() -> None:
    """Whatever the default sees: B-Pref's networks see observation and action, as they are."""
    for name in published():
        reward = config(f"experiment={name}")[0].reward
        assert not reward.normalise and reward.get("sees_actions", True), name
        assert set(reward.hidden) == {256} and reward.learning_rate == 3e-4, name


def test_meta_worlds_networks_and_epochs_of_the_reward_are_the_defaults_alone() -> None:
    """Smaller, faster, over the answers less often: not in published settings, nor where runs are stored without."""

    def fitted(*overrides: str) -> tuple[Any, ...]:
        cfg = config(*overrides)[0]
        return list(cfg.reward.hidden), cfg.reward.learning_rate, cfg.updater.fit.epochs

    assert fitted("env=door-open") == ([128, 128, 128], 1e-3, 4)
    assert fitted("env=walker-walk") == ([256, 256, 256], 3e-4, 50)
    before = ([256, 256, 256], 3e-4, 10)
    assert fitted("env=door-open", "experiment=published", "updater=pebble-published") == before
    for name in ("first-light/pebble", "first-light/penalty"):
        assert fitted("env=door-open", f"experiment={name}") == before, name


def pace(*overrides: str) -> dict[str, Any]:
    """Episodes, clips, sessions and what comes before them."""
    cfg = config(*overrides)[0]
    found = {key: cfg.feedback[key] for key in ("per_session", "every", "schedule")}
    found |= {
        "segment": cfg.segment_length,
        "decay_to": cfg.feedback.decay_to,
        "pretraining": cfg.pretraining.steps,
        "whiten": cfg.pretraining.whiten,
        "random": cfg.agent.learning_starts,
    }
    return found | {key: cfg.env.get(key) for key in ("horizon", "action_repeat")}


@pytest.mark.slow
def test_meta_worlds_pace_is_the_defaults_alone() -> None:
    """Short episodes of held actions, many questions early: not in published settings."""
    door, walker = pace("env=door-open"), pace("env=walker-walk")
    assert all(door[key] != walker[key] for key in door)
    benchmark = {**walker, "horizon": 500}
    assert pace("experiment=published", "env=door-open") == {**benchmark, "per_session": 50}
    assert pace("experiment=published", "env=walker-walk") == walker
    for name in published():
        found = pace(f"experiment={name}")
        own = {key: found[key] for key in ("per_session", "every", "pretraining")}
        assert found == (walker if found["horizon"] == 1000 else benchmark) | own, name
    for path in (CONF / "experiment/first-light").glob("*.yaml"):
        assert pace(f"experiment=first-light/{path.stem}", "env=door-open") == benchmark, path
    quick = pace("experiment=quick", "env=door-close")
    assert (quick["horizon"], quick["action_repeat"], quick["schedule"]) == (100, 1, "decay")


@pytest.mark.slow
def test_meta_worlds_agent_and_questions_are_the_defaults_alone() -> None:
    """Small, in a hurry, standardised, asking about the last episodes: not elsewhere, nor in published settings."""
    changed = ("net_arch", "batch_size", "learning_rate", "target_update_interval", "n_steps")
    changed += ("normalise", "critic_layer_norm", "learning_starts", "noise_color")

    def settings(*overrides: str) -> dict[str, Any]:
        cfg = config(*overrides)[0]
        return {key: cfg.agent[key] for key in changed} | {
            "recent": cfg.query.recent_episodes,
            "novel": cfg.query.novel_share,
            "best": cfg.query.best_share,
            "convexity": cfg.reward.get("convexity", 0.0),
        }

    for rule in ("uniform", "k-center", "k-center-entropy", "entropy"):  # so that rules differ by how they choose alone
        door = settings("env=door-open", f"query={rule}")
        chosen = (0.0, 0.0) if rule == "uniform" else (0.2, 0.5)
        assert (door["recent"], door["novel"], door["best"]) == (20, *chosen), rule
        assert settings("env=walker-walk", f"query={rule}")["recent"] is None, rule
    lean = settings("env=walker-walk")
    assert all(value != lean[key] for key, value in settings("env=door-open").items())
    assert lean == settings("env=pointmass")
    for path in (CONF / "experiment/first-light").glob("*.yaml"):
        found = settings(f"experiment=first-light/{path.stem}", "env=door-open")
        assert {**found, "recent": None, "novel": 0.0, "best": 0.0} == lean, path
        assert path.stem in ("oracle", "common") or found["novel"] == found["best"] == 0, path
        assert path.stem in ("oracle", "common") or "near" in path.stem or found["recent"] is None, path
    for name in published():
        found = settings(f"experiment={name}")
        assert (found["normalise"], found["critic_layer_norm"], found["target_update_interval"]) == (False, False, 2)
        assert found["n_steps"] == 1 and (found["recent"] is None) == (not name.startswith("qpa-")), name
        assert (found["noise_color"], found["learning_starts"]) == (0, 1000), name
        assert found["novel"] == found["best"] == found["convexity"] == 0, name
    assert settings("experiment=quick", "env=door-open") == settings("env=door-open")


@pytest.mark.parametrize("task", ["button-press", "door-open", "window-open"])
def test_meta_worlds_default_is_what_its_stored_runs_were_run_with(task: str) -> None:
    """docs/campaign.md, section 9, AY; the budget is what they asked."""
    runs = sorted((ROOT / "experiments/results/novel" / task).glob("longer-pretraining-s*"))
    assert len(runs) == 5
    run_with(runs, f"env={task}")


def test_the_readmes_first_command_is_what_its_stored_runs_were_run_with() -> None:
    """docs/campaign.md, section 9, AW; every one of them learned it."""
    runs = sorted((ROOT / "experiments/results/quick/door-close").iterdir())
    assert len(runs) == 6
    assert all(json.loads((run / "summary.json").read_text())["eval/success"] == 1 for run in runs)
    run_with(runs, "env=door-close", "experiment=quick")


def test_few_answers_is_what_its_stored_runs_were_run_with() -> None:
    """docs/campaign.md, section 9, BF: the fresh seeds."""
    runs = sorted((ROOT / "experiments/results/agent/100-answers").glob("lnc-ar2-parts-skip-s6*"))
    assert len(runs) == 5
    run_with(runs, "env=walker-walk", "experiment=few-answers")


def run_with(runs: list[Path], *overrides: str) -> None:
    """All that decides what is learned, but for the seed."""
    now: Any = OmegaConf.to_container(config(*overrides)[0], resolve=True)
    for run in runs:
        then: Any = OmegaConf.to_container(read_config(run)[0], resolve=True)
        labels = json.loads((run / "summary.json").read_text())["feedback/labels"]
        assert labels == now["feedback"]["budget"] <= then["feedback"]["budget"]  # what is not spent decides nothing
        then["feedback"] |= {"budget": labels, "fresh_steps": now["feedback"]["fresh_steps"]}  # nor what takes no steps
        parts = ("env", "agent", "reward", "query", "teacher", "updater", "feedback", "pretraining")
        for name in (*parts, "total_steps", "segment_length", "threads"):
            assert then[name] == now[name], name


@pytest.mark.parametrize(
    ("task", "aparl", "penalty"),
    [("walker-walk", 500, 100), ("door-open", 1000, 1000), ("button-press", 10_000, 10_000)],
)
def test_the_bilevel_methods_as_printed_have_their_whole_second_term(task: str, aparl: int, penalty: int) -> None:
    """No gate, no clip, on-policy pairs only, PARL's curvature; agent and fitting are B-Pref's."""
    expected = config(f"env={task}", "agent=sac-published", "updater=pebble-published")[0]
    for method, budget in (("aparl", aparl), ("penalty", penalty)):
        cfg = config(f"experiment={method}-{task}")[0]
        assert as_gate(cfg.updater.gate) is None and as_limit(cfg.updater.clip) == math.inf
        assert (cfg.feedback.budget, cfg.feedback.fresh_share) == (budget, 1)
        assert cfg.agent == expected.agent and cfg.updater.fit == expected.updater.fit
        assert method == "penalty" or cfg.updater.implicit.estimator == "paper"


def defaults(target: Any) -> dict[str, Any]:
    """What a constructor takes for an argument that is not given."""
    parameters = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def nodes(name: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """All tables with a `_target_` inside a table, with their names."""
    if isinstance(value, dict):
        if value.get("_target_"):
            yield name, value
        for key, item in value.items():
            yield from nodes(f"{name}.{key}", item)


def is_variant(group: str, name: str) -> bool:
    """Whether an option only changes another one of its group, which is then the one to agree with."""
    listed = OmegaConf.load(CONF / group / f"{name}.yaml").get("defaults", [])
    return any(isinstance(item, str) and item != "_self_" for item in listed)


@pytest.mark.parametrize(("group", "name"), ALL, ids=lambda value: str(value))
def test_constructors_have_no_second_opinion(group: str, name: str) -> None:
    """A setting's value stands in the config; a constructor requires it, or agrees. Meta-World's is the benchmark's."""
    if is_variant(group, name):
        pytest.skip("changes another option, by name")
    task = [] if group == "env" else ["env=pointmass"]
    cfg, _ = config(*task, f"{group}={name}", *NEEDS.get(f"{group}={name}", []), "total_steps=1000", "seed=0")
    if name == "metaworld":
        cfg.metaworld = config("experiment=published", "env=door-open")[0].metaworld
    for where, node in nodes(group, OmegaConf.to_container(cfg[group], resolve=True)):
        for key, default in defaults(get_object(node["_target_"])).items():
            default = list(default) if isinstance(default, tuple) else default
            assert node.get(key, default) == default, f"{where}.{key}"


def test_an_experiment_overrides_the_defaults_and_the_command_line_overrides_it() -> None:
    default, quick = config()[0], config("experiment=quick")[0]
    assert quick.total_steps != default.total_steps
    assert config("experiment=quick", "total_steps=77")[0].total_steps == 77


def test_each_yaml_says_what_it_is_for_or_names_a_target() -> None:
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        assert "_target_" in text or "defaults" in text or text.startswith("# "), path


def test_published_settings_follow_the_environment() -> None:
    walker = config("env=walker-walk", "agent=sac-published")[0].agent
    door = config("env=door-open", "agent=sac-published")[0].agent
    quadruped = config("env=quadruped-walk", "agent=sac-published")[0].agent
    assert (list(walker.net_arch), walker.batch_size, walker.learning_rate) == ([1024, 1024], 1024, 5e-4)
    assert (list(door.net_arch), door.batch_size, door.learning_rate) == ([256, 256, 256], 512, 3e-4)
    assert quadruped.learning_rate == 1e-4


WRONG = {
    "env=dor-open": "did you mean door-open?",
    "updater=pebbel": "did you mean pebble?",
    "lrr=1": "key lrr does not exist",
    "feedback.budgett=3": "did you mean feedback.budget?",
    "agent.batchsize=3": "did you mean agent.batch_size?",
}
REFUSED = {
    "+lrr=1": "key lrr does not exist",
    "+feedback.foo=2": "key feedback.foo does not exist",
    "+teacher.foo=1": "key teacher.foo does not exist",
    "+agent.nets=1": "key agent.nets does not exist",
    "total_steps=abc": "total_steps=abc is a str; expected int",
    "feedback.every=1.5": "feedback.every=1.5 is a float; expected int",
    "agent.batch_size=a": "agent.batch_size=a is a str; expected int",
    "segment_length=900": "longer than an episode of 150 steps",
    "feedback.budget=5": "smaller than feedback.per_session=25",
    "feedback.schedule=sometimes": "expected constant, decay or increase",
    "reward.members=0": "expected at least 1",
    "query.pool=0": "expected at least 1",
    "env=metaworld": "env.task must be given",
    "teacher._target_=nope.X": "No module named 'nope'",
    "device=cuda9x": "expected auto, cpu, cuda or cuda:N",
    "resume=/nowhere": "there is no run",
    "updater.pairs=sometimes": "expected buffer or fresh",
    "import_preferences=/nowhere.npz": "no preference data set",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_hydra_refuses_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare([override])
    assert "\n" not in str(caught.value)
    assert WRONG[override] in str(caught.value)


@pytest.mark.parametrize("override", REFUSED)
def test_what_hydra_accepts_but_cannot_work_is_refused_in_one_line(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, choices = config("updater=pebble", override)
    with pytest.raises(ConfigError) as caught:
        build(cfg, choices, [override])
    assert "\n" not in str(caught.value)
    assert REFUSED[override] in str(caught.value)
    assert not (tmp_path / "runs").exists(), "a refused run left a folder behind"


def test_the_command_line_refuses_with_code_2_and_one_line() -> None:
    command = [sys.executable, "-m", "pbrl.train", "env=pointmass", "feedback.budget=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: feedback.budget=0; expected at least 1"]


def test_numbers_in_configs_are_numbers() -> None:
    for path in CONF.rglob("*.yaml"):
        for key, value in OmegaConf.to_container(OmegaConf.load(path)).items():  # type: ignore[union-attr]
            assert not (isinstance(value, str) and value.replace(".", "").replace("e-", "").isdigit()), (path, key)
