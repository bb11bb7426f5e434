"""People label pairs without any training.

    python -m pbrl.label RUN                   the pairs that a run has stored, asked again of people
    python -m pbrl.label FILE.npz              the same of an exported file
    python -m pbrl.label RUN --out LABELS.npz  where the answers go (else to RUN/labels.npz, FILE-people.npz)
    python -m pbrl.label RUN --trust my_env    an environment of your own (of a file alike)

The page is that of `teacher=human`. What was answered is kept beside the output (OUT.sqlite3), so the same command goes
on where it stopped; OUT is written at the end and on Ctrl-C, and `import_preferences=OUT` starts a run from it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pbrl.labelling.teacher import HumanTeacher, pair_keys
from pbrl.launch.command import look_here
from pbrl.launch.configuration import CONF, ConfigError, check_arguments, options, register_resolvers
from pbrl.launch.constructors import check_stored
from pbrl.launch.shipped import described
from pbrl.launch.stored import read_config, refuse_links
from pbrl.preferences import FILE_NAME, Preferences, of_run
from pbrl.types import Query

STORE = ".sqlite3"  # of what was answered: OUT with this behind it


def environment(source: Path, name: str | None, stored: Preferences, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Config of the environment in which clips are drawn: the run's, the file's, or the option of this name.

    Args:
        name: None: the source's own; of a file without a config (an older one) the option that it names.
        trust: see `pbrl.launch.stored.read_config`.

    Raises:
        ConfigError: if there is none of this name, or the stored config may not name it.
    """
    if source.is_dir() and name is None:
        cfg, _ = read_config(source, trust, ["env"])
        check_arguments("env", cfg.env)
        return dict(OmegaConf.to_container(cfg.env, resolve=True))  # type: ignore[arg-type]
    if name is None and (env := stored.about.get("env_config")):
        check_stored({"env": env}, source, trust)
        check_arguments("env", OmegaConf.create(env))
        return dict(env)
    name = name or str(stored.about.get("env"))
    if name not in options("env"):
        raise ConfigError(f"--env={name}; expected one of {', '.join(options('env'))}")
    return dict(described("env", name, name))


def words(env: dict[str, Any]) -> str | None:
    """What `teacher=human` says that the robot should do in this environment."""
    teacher = OmegaConf.load(CONF / "teacher" / "human.yaml")
    return OmegaConf.create({"env": env, "teacher": teacher}).teacher.task


def place(out: Path | None, source: Path) -> Path:
    """The file for the labels: `out`, or by default one beside the source.

    Raises:
        ValueError: if it is the file whose pairs are asked, or one that this command has not written.
    """
    if out is None:
        out = source / "labels.npz" if source.is_dir() else source.with_name(f"{source.stem}-people.npz")
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: there is no folder {out.parent}; make it first or name another")
    if out.exists():
        if out.samefile(source / FILE_NAME if source.is_dir() else source):
            raise ValueError(f"--out={out} is the file whose pairs are asked; name another")
        if not out.with_name(out.name + STORE).exists():
            raise ValueError(f"--out={out} exists, and no {out.name}{STORE} beside it: name another or delete it first")
    return out


def questions(stored: Preferences) -> Query:
    """The stored pairs as a query, without labels and without task rewards.

    Raises:
        ValueError: if there are none, or they have no simulator states.
    """
    if not len(stored):
        raise ValueError("there are no pairs in it")
    if stored.states is None:
        raise ValueError("its pairs have no simulator states, so nothing can be drawn")
    unknown = torch.full((len(stored), 2, stored.length), float("nan"))
    return Query(stored.first, stored.second, unknown, states=stored.states)


def labelled(stored: Preferences, query: Query, teacher: HumanTeacher) -> Preferences:
    """The pairs answered so far, with people's labels."""
    done, answer = teacher.collect(query, time.time_ns(), 0)
    index = done.nonzero()[:, 0][answer.given]
    chosen = stored.select(index, answer.prefers_first[answer.given])
    chosen.asked = int(done.sum())
    chosen.about = {**stored.about, "teacher": "human", "raters": teacher.raters()}
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pbrl.label", description="Label pairs without training.")
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="run directory, or preferences (.npz)")
    parser.add_argument("--out", type=Path, help="file for the labels, .npz (default: RUN/labels.npz, FILE-people.npz)")
    parser.add_argument("--task", help="what the robot should do, in words (default: those of teacher=human)")
    parser.add_argument("--env", help="option of the environment, in place of the stored one")
    parser.add_argument("--reviews", type=int, default=1, help="answers by different people per pair")
    parser.add_argument("--repeats", type=float, default=0.05, help="share of answers asked again, sides swapped")
    parser.add_argument("--host", default="localhost", help="another address lets others in who have the token")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--trust", nargs="*", default=[], help="modules of your own that the stored config may name")
    given = parser.parse_args(arguments)
    look_here()
    register_resolvers()
    try:
        if given.source.is_dir():
            refuse_links(given.source)
        stored = of_run(given.source) if given.source.is_dir() else Preferences.load(given.source)
        query = questions(stored)
        out = place(given.out, given.source)
        env = environment(given.source, given.env, stored, given.trust)
        teacher = HumanTeacher(
            env,
            given.task or words(env),
            reviews=given.reviews,
            repeats=given.repeats,
            host=given.host,
            port=given.port,
        )
        teacher.trains = False
        teacher.open(out.parent, stored.length, out.name + STORE)
    except (OSError, ValueError, RecursionError) as error:  # the last: tables nested without end
        print(f"error: {given.source}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    complete = collected = stopped = False
    try:
        while not (collected or stopped):  # an answer may be taken back until the labels are collected
            try:
                _until_answered(teacher, query)
            except KeyboardInterrupt:
                print("\nstopped; the same command goes on")
                stopped = True
            result = labelled(stored, query, teacher)
            collected = result.asked == len(stored)
        if len(result):
            result.save(out)
            print(f"{out}: {len(result)} of {len(stored)} pairs labelled by people")
        complete = collected
    except (OSError, ValueError) as error:  # a full disk, a server that cannot be started again
        print(f"error: {error}; what was answered is kept: the same command goes on", file=sys.stderr)
        return 1
    finally:
        teacher.close(complete)
    return 0


def _until_answered(teacher: HumanTeacher, query: Query) -> None:
    """Ask, and say how far people are, until all is answered and nothing can be undone any more."""
    from tqdm import tqdm

    teacher.post(query)
    total = len(set(pair_keys(query)))
    with tqdm(total=total, unit="pair") as bar:
        while bar.n < total:
            bar.n = teacher.answered(query)
            bar.refresh()
            teacher.watch({"env_step": 0})
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
