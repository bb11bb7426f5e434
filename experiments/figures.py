"""The two pictures of PARL's experiments (Chakraborty et al., ICLR 2024), from stored runs.

    python -m experiments.figures curves RUNS… --out fig.png          figure 2: tasks side by side, methods and oracle
    python -m experiments.figures strips RUN_A RUN_B … --out strips.png   figure 3: film strips, methods as rows
    python -m experiments.figures strips RUN_A RUN_B … --frames 50 --out film.gif    the same as a film, side by side

Beside fig.png lie fig.csv with every number drawn, and the same picture as fig.svg; `--out fig.pdf` writes a PDF.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pbrl.compare import add_run_options, read_comparison
from pbrl.comparing import plots
from pbrl.comparing.report import save_figure
from pbrl.comparing.runs import ComparisonError, method_label, read_run
from pbrl.comparing.tables import curve_rows, write_tables
from pbrl.episodes import play

SIZE = 256  # pixels, of a film strip's frames
DPI = 120  # of film strips: small enough for a page
FILM, FILM_COLOURS, FRAME_TIME = 192, 64, 70  # pixels of a film's pictures, their colours, milliseconds of each


def draw_curves(arguments: argparse.Namespace) -> None:
    """Figure 2: learning curves with intervals over seeds; a CSV of the same name holds the numbers."""
    data = read_comparison(arguments)
    rows = curve_rows(data, arguments.axis, np.random.default_rng(0))
    write_tables({arguments.out.stem: rows}, arguments.out.parent)
    save_figure(plots.curves_figure(rows, arguments.axis, data.metrics, data.methods), arguments.out)
    for note in data.notes:
        print(f"note: {note}")


def draw_strips(arguments: argparse.Namespace) -> None:
    """Figure 3: one row of frames per run, in episodes of the same seed, between the same steps."""
    from pbrl.evaluate import load_run  # brings torch and the agent, which curves do without

    runs = [read_run(folder) for folder in arguments.runs]
    tasks = sorted({str(run.setting("env")) for run in runs})
    if len(tasks) > 1:
        raise ComparisonError(f"film strips compare runs on one task, but these are on {', '.join(tasks)}")
    keys = arguments.method_keys or ["updater"]
    strips = []
    for folder in arguments.runs:
        agent, env = load_run(folder)
        strips.append(film_strip(agent, env, arguments.seed, arguments.frames, arguments.until, arguments.since))
        env.close()
    labels = [method_label(run, keys) for run in runs]
    if arguments.out.suffix == ".gif":
        save_film(labels, strips, arguments.out)
    else:
        strips_figure(labels, strips, tasks[0]).savefig(arguments.out, dpi=DPI)


Strip = tuple[list[int], list[NDArray[np.uint8]], float]  # steps, their frames [SIZE, SIZE, 3], return of the episode


def film_strip(agent: Any, env: Any, seed: int, frames: int, until: int | None = None, since: int = 0) -> Strip:
    """Frames at even intervals of one episode of the mean policy, from step `since` to step `until` or its last.

    The episode is played twice with the same seed, as its length is known only at its end.
    """
    length, total, _ = _play(agent, env, seed, shown=set())
    last = length if until is None else min(length, until)
    steps = np.unique(np.linspace(min(since, last), last, frames).round().astype(int)).tolist()
    _, _, pictures = _play(agent, env, seed, shown=set(steps))
    return steps, pictures, total


def _play(agent: Any, env: Any, seed: int, shown: set[int]) -> tuple[int, float, list[NDArray[np.uint8]]]:
    """Length and task return of an episode, and the frames at the steps to be shown (0 is the state after reset)."""
    steps, pictures = count(), []

    def draw() -> None:
        if next(steps) in shown:
            pictures.append(env.render(SIZE, SIZE))

    played = play(env, lambda obs: agent.predict(obs, deterministic=True)[0], seed, draw)
    draw()  # where it ended
    return len(played), played.task_return, pictures


def strips_figure(labels: Sequence[str], strips: Sequence[Strip], task: str) -> Figure:
    """Rows of frames, each row named by its method and the return of the episode shown, each frame by its step."""
    columns = max(len(steps) for steps, _, _ in strips)
    figure = Figure(figsize=(1.5 * columns + 1.2, 1.75 * len(strips) + 0.4), layout="constrained")
    panels = figure.subplots(len(strips), columns, squeeze=False)
    for label, (steps, pictures, total), row in zip(labels, strips, panels, strict=True):
        for panel in row:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        for step, picture, panel in zip(steps, pictures, row, strict=False):
            panel.imshow(picture)
            panel.set_title(f"step {step}", fontsize=8)
        row[0].set_ylabel(f"{label}\nreturn {total:.0f}")
    figure.suptitle(task)
    return figure


def save_film(labels: Sequence[str], strips: Sequence[Strip], path: Path) -> None:
    """The strips as one film that runs forever, side by side; a shorter one waits at its last frame."""
    images = []
    for shown in range(max(len(steps) for steps, _, _ in strips)):
        image = Image.new("RGB", (FILM * len(strips), FILM))
        draw = ImageDraw.Draw(image)
        for column, (label, (_, pictures, total)) in enumerate(zip(labels, strips, strict=True)):
            picture = Image.fromarray(pictures[min(shown, len(pictures) - 1)]).resize((FILM, FILM))
            image.paste(picture, (FILM * column, 0))
            draw.text((FILM * column + 6, FILM - 18), f"{label}, return {total:.0f}", fill="white")
        images.append(image.quantize(FILM_COLOURS))
    images[0].save(path, save_all=True, append_images=images[1:], duration=FRAME_TIME, loop=0, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one figure into --out."""
    options = argparse.ArgumentParser(prog="python -m experiments.figures", description="Figures from stored runs.")
    kinds = options.add_subparsers(required=True)
    curves = kinds.add_parser("curves", help="learning curves, tasks side by side (PARL, figure 2)")
    add_run_options(curves)
    curves.add_argument("--axis", choices=("steps", "labels"), default="steps", help="horizontal axis (default: steps)")
    curves.set_defaults(draw=draw_curves)
    strips = kinds.add_parser("strips", help="film strips of learned behaviour, methods as rows (PARL, figure 3)")
    strips.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders with a checkpoint, one per row")
    strips.add_argument("--frames", type=int, default=8, help="frames per row (default: 8)")
    strips.add_argument("--since", type=int, default=0, help="the first step shown (default: 0, the first state)")
    strips.add_argument("--until", type=int, help="the last step shown (default: the episode's last)")
    strips.add_argument("--seed", type=int, default=0, help="of the episode shown (default: 0)")
    strips.add_argument("--method-keys", type=lambda text: text.split(","), help="what names a row (default: updater)")
    strips.set_defaults(draw=draw_strips)
    for kind in (curves, strips):
        kind.add_argument("--out", type=Path, required=True, help="picture file to write")
    arguments = options.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        arguments.draw(arguments)
    except ComparisonError as error:
        sys.exit(f"experiments.figures: {error}")
    print(arguments.out)


if __name__ == "__main__":
    main()
