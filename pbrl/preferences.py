"""The answered questions: a store that grows during a run, its file, and a command line for such files.

    python -m pbrl.preferences export RUN out.npz
    python -m pbrl.preferences info FILE
    python -m pbrl.preferences merge A.npz B.npz out.npz

A file holds what the teacher was shown and what it answered: no task reward, and no pair that was skipped.
It is an uncompressed npz without pickled objects. N pairs, W = H + 2 margin steps, of which the central H were asked
about; the margins are there if the run kept them (SURF's temporal crops need them):

    obs            float32 [N, 2, W, obs_dim]   axis 1: first, second
    actions        float32 [N, 2, W, act_dim]
    raw_actions    float32 [N, 2, W, act_dim]   optional: the Gaussian sample whose tanh is `actions`
    states         float64 [N, 2, S]            optional: simulator state before the first of the H steps
    prefers_first  float32 [N]                  1 first, 0 second, 0.5 equally good; between them a soft label
    session        int64 [N]                    the feedback session in which the pair was asked
    steps          int64 [N, 2]                 index, in its run, of the first of the H steps; −1 unknown
    fresh          bool [N]                     the pair was about the policy of its session
    metadata       JSON: format, version, pairs, asked, horizon, versions, about (env, env_config, teacher, …)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbrl import __version__
from pbrl.files import open_for_reading, printable, read_npz, replacing
from pbrl.types import Answer, Query, Segments, expect

FILE_NAME = "preferences.npz"  # of the store inside a run directory
FORMAT, FORMAT_VERSION = "pbrl-preferences", 2  # version 1: without steps and fresh

# dtype and shape of each column after its first axis; None: any
COLUMNS: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
    "obs": (torch.float32, (2, None, None)),
    "actions": (torch.float32, (2, None, None)),
    "raw_actions": (torch.float32, (2, None, None)),
    "states": (torch.float64, (2, None)),
    "prefers_first": (torch.float32, ()),
    "session": (torch.int64, ()),
    "steps": (torch.int64, (2,)),
    "fresh": (torch.bool, ()),
}
OPTIONAL = {"raw_actions", "states"}
TIMED = ("obs", "actions", "raw_actions")  # columns with an axis of steps
TASK = ("_target_", "domain", "task", "id")  # keys of an environment's config that say what is to be done

Columns = dict[str, Tensor]


class Preferences:
    """All answered pairs, on the CPU. Adding is amortised O(rows added); reading returns views, never copies.

    Simulator states, raw actions and margins are kept as long as every query that was added has them: one without
    them removes them from the whole store (margins shrink to the narrowest), as `Query.cat` does.

    Args:
        about: plain JSON values describing where the pairs come from; `env` (the option's name), `env_config` (its
            table, in which clips can be drawn) and `teacher` are looked at when data sets are joined. Written to the
            file.
    """

    def __init__(self, about: Mapping[str, Any] | None = None) -> None:
        self.about: dict[str, Any] = dict(about or {})
        self.asked = 0  # pairs put to the teacher, skipped ones included
        self.length = 0  # environment steps per segment; 0 until the first pair is added
        self._new = torch.zeros(0, dtype=torch.bool)
        self._columns: Columns = {}  # each with room for more rows than are in use
        self._size = 0

    # Reading

    def __len__(self) -> int:
        """Answered pairs, N."""
        return self._size

    @property
    def margin(self) -> int:
        """Extra steps kept before and after each segment, the same for all."""
        return (self._column("obs").shape[2] - self.length) // 2

    @property
    def first(self) -> Segments:
        """The first segment of each pair, [N, H, ...]."""
        return self.wide_first.steps(self.margin, self.margin + self.length)

    @property
    def second(self) -> Segments:
        """The second segment of each pair, [N, H, ...]."""
        return self.wide_second.steps(self.margin, self.margin + self.length)

    @property
    def wide_first(self) -> Segments:
        """The first segments with their margins, [N, H + 2 margin, ...]."""
        return self._segments(0)

    @property
    def wide_second(self) -> Segments:
        """The second segments with their margins, [N, H + 2 margin, ...]."""
        return self._segments(1)

    @property
    def prefers_first(self) -> Tensor:
        """Labels, float32 [N]: 1 first, 0 second, 0.5 equally good."""
        return self._column("prefers_first")

    @property
    def session(self) -> Tensor:
        """Feedback session of each pair, int64 [N]."""
        return self._column("session")

    @property
    def fresh(self) -> Tensor:
        """Which pairs were about the policy of their session, in this run: bool [N]."""
        return self._column("fresh")

    @property
    def new(self) -> Tensor:
        """Which pairs were added by the session's `add`: bool [N]. Not stored: after loading none."""
        return self._new

    @property
    def current(self) -> Tensor:
        """Which pairs are this session's and about the present policy: int64 [K], their rows, ascending."""
        return (self.new & self.fresh).nonzero().squeeze(1)

    @property
    def states(self) -> Tensor | None:
        """Simulator state before each segment, float64 [N, 2, S], or None if not every pair has one."""
        return self._column("states") if "states" in self._columns else None

    @property
    def counts(self) -> dict[str, int]:
        """How many pairs were asked, answered (`given`), skipped, and of the answered ones called `equal`."""
        equal = int((self.prefers_first == 0.5).sum()) if self._columns else 0
        return {"asked": self.asked, "given": self._size, "skipped": self.asked - self._size, "equal": equal}

    def select(self, index: Tensor, prefers_first: Tensor, new: bool = True) -> Preferences:
        """A copy of the pairs at `index`, int64 [K], with these labels, float32 [K], in place of their own.

        `new`: those that are new stay so; False: none is.
        """
        chosen = Preferences(self.about)
        chosen.asked, chosen.length, chosen._size = self.asked, self.length, len(index)
        chosen._columns = {name: self._column(name)[index] for name in self._columns}
        chosen._columns["prefers_first"] = prefers_first
        chosen._new = self.new[index] & new
        return chosen

    def _column(self, name: str) -> Tensor:
        if not self._columns:
            raise ValueError("the preferences are empty: no query was added yet")
        return self._columns[name][: self._size]

    def _segments(self, side: int) -> Segments:
        raw = self._column("raw_actions")[:, side] if "raw_actions" in self._columns else None
        step = self._column("steps")[:, side]
        wide_step = torch.where(step < 0, -1, step - self.margin)
        return Segments(self._column("obs")[:, side], self._column("actions")[:, side], raw, wide_step)

    # Adding

    def add(self, query: Query, answer: Answer, session: int) -> None:
        """Store the pairs that were answered and count those that were skipped.

        Raises:
            TypeError, ValueError: naming the field, if the answer does not fit the query, the shapes differ from those
                already stored, or a value is not finite or a label outside [0, 1]. The store is then unchanged.
        """
        expect("Answer.prefers_first", answer.prefers_first, torch.float32, (len(query),))
        expect("Answer.given", answer.given, torch.bool, (len(query),))
        rows = _pairs(query)
        rows["prefers_first"] = answer.prefers_first
        rows["session"] = torch.full((len(query),), session)
        given, before = answer.given.cpu(), len(self)
        self._append({name: value.detach().cpu()[given] for name, value in rows.items()}, query.first.length)
        self._new = torch.arange(len(self)) >= before
        self.asked += len(query)

    def begin_session(self) -> None:
        """No pair is new any more."""
        self._new = torch.zeros(len(self), dtype=torch.bool)

    def extend(self, other: Preferences) -> None:
        """Add all pairs of another store; they keep their session numbers, but are about no step of this run.

        Raises:
            ValueError: if the environments or their tasks, segment lengths or sizes differ.
        """
        added = _task(other.about)
        for key, mine in _task(self.about).items():
            theirs = added[key]
            if isinstance(mine, str) and isinstance(theirs, str) and mine != theirs:
                raise ValueError(f"these preferences are about {key} {mine!r}, those to add about {theirs!r}")
        if other._columns:
            rows = {name: other._column(name) for name in other._columns}
            elsewhere = {"steps": torch.full_like(rows["steps"], -1), "fresh": torch.zeros_like(rows["fresh"])}
            self._append({**rows, **elsewhere}, other.length)
        self.asked += other.asked

    def _append(self, rows: Columns, length: int) -> None:
        _check(rows, length)
        if not self._columns:
            self.length, self._columns = length, {name: value[:0] for name, value in rows.items()}
        if length != self.length:
            raise ValueError(f"segments of {length} steps cannot join preferences about {self.length} steps")
        for name in self._columns.keys() & rows.keys():
            held, new = self._columns[name].shape[-1], rows[name].shape[-1]
            if rows[name].ndim > 1 and held != new:
                raise ValueError(f"{name} of size {new} cannot join preferences with {name} of size {held}")
        margin = min(self.margin, (rows["obs"].shape[2] - length) // 2)
        common = self._columns.keys() & rows.keys()
        self._columns = {k: v for k, v in _narrow(self._columns, length, margin).items() if k in common}
        self._reserve(len(rows["obs"]))
        end = self._size + len(rows["obs"])
        for name, value in _narrow(rows, length, margin).items():
            if name in common:
                self._columns[name][self._size : end] = value
        self._size = end
        self._new = torch.zeros(end, dtype=torch.bool)

    def _reserve(self, count: int) -> None:
        capacity = len(self._columns["obs"])
        if self._size + count <= capacity:
            return
        capacity = max(self._size + count, 2 * capacity)
        for name, old in self._columns.items():
            self._columns[name] = old.new_empty((capacity, *old.shape[1:]))
            self._columns[name][: self._size] = old[: self._size]

    # Keeping

    def state(self) -> dict[str, np.ndarray]:
        """The whole store as arrays, for a checkpoint or a file; `from_state` is its inverse."""
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "pairs": self._size,
            "asked": self.asked,
            "horizon": self.length,
            "versions": {
                "pbrl": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "about": self.about,
        }
        arrays = {name: self._column(name).numpy() for name in self._columns}
        return {**arrays, "metadata": np.array(json.dumps(metadata))}

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Preferences:
        """The store that `state` describes.

        Raises:
            TypeError, ValueError: naming the array and what is wrong with it.
        """
        metadata = _metadata(arrays)
        preferences = cls(metadata["about"])
        if metadata["version"] == 1 and "session" in arrays:
            size = len(arrays["session"])
            arrays = {**arrays, "steps": np.full((size, 2), -1), "fresh": np.zeros(size, bool)}
        names = set(arrays) - {"metadata"}
        if names:  # none: a store to which nothing was added yet
            if unknown := names - COLUMNS.keys():
                raise ValueError(f"unknown arrays {sorted(unknown)}")
            if missing := COLUMNS.keys() - OPTIONAL - names:
                raise ValueError(f"arrays {sorted(missing)} are missing")
            preferences._append({name: _tensor(name, arrays[name]) for name in names}, metadata["horizon"])
        if metadata["pairs"] != len(preferences) or metadata["asked"] < len(preferences):
            raise ValueError(
                f"{len(preferences)} pairs; the metadata counts {metadata['pairs']}, and {metadata['asked']} asked"
            )
        preferences.asked = metadata["asked"]
        return preferences

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. A crash at any moment leaves the old file or the new one, never a part."""
        with replacing(Path(path)) as file:
            np.savez(file, **self.state())  # type: ignore[arg-type]  # numpy types **kwds as allow_pickle too

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preferences:
        """Read and check a file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is anything but an intact preference data set.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no preference data set at {path}; `python -m pbrl.preferences export` makes one")
        with open_for_reading(Path(path)) as file:
            try:
                return cls.from_state(read_npz(file))
            except Exception as error:  # whatever zipfile and numpy raise on a damaged file, OSError among it
                raise ValueError(f"{path} is not an intact preference data set: {printable(error)}") from error


def _task(about: Mapping[str, Any]) -> dict[str, Any]:
    """What says which task a store is about, by its key in a config; None where the store does not say it."""
    config = about.get("env_config", {})
    return {"env": about.get("env"), **{f"env.{key}": config.get(key) for key in TASK}}


def _pairs(query: Query) -> Columns:
    """The query's columns, with the margins of its context if it has one."""
    sides = query.context or (query.first, query.second)
    length = query.first.length
    margin, odd = divmod(sides[0].length - length, 2)
    for name, wide, narrow in zip(("first", "second"), sides, (query.first, query.second), strict=True):
        centre = wide.steps(margin, margin + length)
        if odd or margin < 0 or not torch.equal(centre.obs, narrow.obs):
            raise ValueError(
                f"Query.context must hold the {name} segments in its centre, with as many steps before as after"
            )
    rows = {
        "obs": torch.stack([side.obs for side in sides], 1),
        "actions": torch.stack([side.actions for side in sides], 1),
    }
    raws = [side.raw_actions for side in sides if side.raw_actions is not None]
    if len(raws) == 2:
        rows["raw_actions"] = torch.stack(raws, 1)
    if query.states is not None:
        rows["states"] = query.states
    unknown = torch.full((len(query),), -1)
    rows["steps"] = torch.stack([unknown if s.step is None else s.step for s in (query.first, query.second)], 1)
    rows["fresh"] = torch.zeros(len(query), dtype=torch.bool) if query.fresh is None else query.fresh
    return rows


def _check(rows: Columns, length: int) -> None:
    """Refuse what must not enter the store, by name. Whatever is stored can therefore be saved and loaded."""
    expect("obs", rows["obs"], torch.float32, (None, 2, None, None))
    size, _, width, _ = rows["obs"].shape
    for name, value in rows.items():
        dtype, shape = COLUMNS[name]
        expect(name, value, dtype, (size, *shape))
        if name in TIMED and value.shape[2] != width:
            raise ValueError(f"{name} has {value.shape[2]} steps and obs {width}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} of pair {_first_pair(~torch.isfinite(value))} is not finite")
    if length < 1 or width < length or (width - length) % 2:
        raise ValueError(f"segments of {length} steps cannot be the centre of {width} stored steps")
    if "raw_actions" in rows and rows["raw_actions"].shape != rows["actions"].shape:
        raise ValueError(f"raw_actions {list(rows['raw_actions'].shape)}, actions {list(rows['actions'].shape)}")
    labels = rows["prefers_first"]
    outside = (labels < 0) | (labels > 1)
    if outside.any():
        pair = _first_pair(outside)
        raise ValueError(f"prefers_first of pair {pair} is {labels[pair]:g}; expected a value in [0, 1]")


def _first_pair(bad: Tensor) -> int:
    """Index of the first row with a True."""
    return int(bad.flatten(1).any(1).int().argmax()) if bad.ndim > 1 else int(bad.int().argmax())


def _narrow(rows: Columns, length: int, margin: int) -> Columns:
    """The same columns with margins of `margin` steps."""
    cut = (rows["obs"].shape[2] - length) // 2 - margin
    return {
        name: value[:, :, cut : value.shape[2] - cut] if name in TIMED and cut else value
        for name, value in rows.items()
    }


def _tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype not in (np.float32, np.float64, np.int64, np.bool_):
        raise TypeError(f"{name} has dtype {array.dtype}; expected {COLUMNS[name][0]}")
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def of_run(run_dir: Path) -> Preferences:
    """The answered pairs of a run.

    Raises:
        FileNotFoundError: if it is none, or has none yet. ValueError: see `Preferences.load`.
    """
    if not (run_dir / FILE_NAME).is_file():
        if not (run_dir / "config.yaml").is_file():
            raise FileNotFoundError(f"{run_dir}: there is no run (no config.yaml in it)")
        raise FileNotFoundError(f"{run_dir} has no answers yet: its checkpoints write {FILE_NAME} once it has")
    return Preferences.load(run_dir / FILE_NAME)


def _metadata(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The checked metadata of a state."""
    if "metadata" not in arrays:
        raise ValueError("it holds no metadata, so it was not written by pbrl")
    metadata = json.loads(str(arrays["metadata"]))
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"its metadata do not say format {FORMAT!r}, so it was not written by pbrl")
    if metadata.get("version") not in (1, FORMAT_VERSION):
        raise ValueError(f"it has format version {metadata.get('version')!r}; this pbrl reads 1 and {FORMAT_VERSION}")
    for name in ("pairs", "asked", "horizon"):
        if type(metadata.get(name)) is not int or metadata[name] < 0:
            raise ValueError(f"metadata {name} is {metadata.get(name)!r}; expected a count")
    if not isinstance(metadata.get("about"), dict):
        raise ValueError("metadata about is not a table")
    config = metadata["about"].get("env_config", {"_target_": ""})
    if not isinstance(config, dict) or not isinstance(config.get("_target_"), str):
        raise ValueError("metadata about.env_config is not a table with a _target_")
    return metadata


def merge(stores: Sequence[Preferences]) -> Preferences:
    """One store from several about the same environment, segment length and sizes."""
    merged = Preferences({**stores[0].about, "teacher": _teachers(stores)})
    for store in stores:
        merged.extend(store)
    return merged


def _teachers(stores: Sequence[Preferences]) -> Any:
    """The stores' teacher if it is the same for all, else the list of them."""
    teachers: list[Any] = []
    for store in stores:
        if store.about.get("teacher") not in teachers:
            teachers.append(store.about.get("teacher"))
    return teachers[0] if len(teachers) == 1 else teachers


def describe(preferences: Preferences) -> str:
    """What is in a store, for people."""
    metadata = json.loads(str(preferences.state()["metadata"]))
    lines = [", ".join(f"{value} {name}" for name, value in preferences.counts.items())]
    if len(preferences):
        obs_dim, act_dim = preferences.first.obs.shape[2], preferences.first.actions.shape[2]
        lines += [
            f"segments of {preferences.length} steps, {preferences.margin} more kept before and after each",
            f"{obs_dim} observations and {act_dim} actions a step",
            f"sessions {int(preferences.session.min())} to {int(preferences.session.max())}",
            "simulator states: " + ("no" if preferences.states is None else "yes, the segments can be rendered again"),
        ]
    return "\n".join([*lines, "about: " + json.dumps(metadata["about"], indent=2)])


def _write(preferences: Preferences, out: Path) -> None:
    if not len(preferences):
        raise ValueError("there are no answered pairs to write")
    if out.exists():
        raise FileExistsError(f"{out} exists; name another file or delete it first")
    preferences.save(out)
    print(f"{out}: {len(preferences)} pairs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pbrl.preferences", description="Preference data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a run's answered pairs to a file")
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument("out", type=Path, help="file to write, .npz")
    info = commands.add_parser("info", help="say what is in a file")
    info.add_argument("file", type=Path)
    join = commands.add_parser("merge", help="join data sets of one environment")
    join.add_argument("files", type=Path, nargs="+")
    join.add_argument("out", type=Path, help="file to write, .npz")
    options = parser.parse_args(arguments)
    try:
        if options.command == "export":
            _write(of_run(options.run), options.out)
        elif options.command == "merge":
            _write(merge([Preferences.load(file) for file in options.files]), options.out)
        else:
            print(describe(Preferences.load(options.file)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
