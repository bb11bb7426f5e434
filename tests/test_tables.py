"""Every number of a results table in the pages is recomputed from stored data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from experiments import curves, tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_stored_data(page: Path) -> None:
    text = page.read_text()
    for name, shown in tables.MARK.findall(text):
        expected = tables.markdown(tables.TABLES[name]())
        assert shown == expected, f"{page.name}: run python -m experiments.tables --write {page.relative_to(ROOT)}"


def test_the_results_page_holds_no_table_of_numbers_without_its_mark() -> None:
    """All tables of docs/results.md are recomputed, but for the list of what was withdrawn; each stands somewhere."""
    assert set(tables.TABLES) == {name for page in PAGES for name, _ in tables.MARK.findall(page.read_text())}
    text = (ROOT / "docs/results.md").read_text()
    left = tables.MARK.sub("", text)
    headers = [before for before, line in zip(left.splitlines(), left.splitlines()[1:], strict=False) if "|---" in line]
    assert headers == ["| said before | why it is withdrawn |"]


def test_a_changed_number_is_found_and_renewed() -> None:
    page = f"text\n<!-- table: fp32 -->\n{tables.markdown(tables.fp32())}\nmore\n"
    assert tables.renewed(page) == page
    changed = page.replace("303, 270, 326", "393, 270, 326")
    assert changed != page and tables.renewed(changed) == page


def test_the_report_of_faults_is_that_of_its_data(tmp_path: Path) -> None:
    from experiments.faults.__main__ import write  # reads much of torch

    stored = ROOT / "experiments/results/faults"
    shutil.copy(stored / "table.csv", tmp_path)
    write([], tmp_path)
    for name in ("table.csv", "table.md"):
        assert (tmp_path / name).read_bytes() == (stored / name).read_bytes(), name


def test_the_command_of_a_run_is_kept_as_it_was_typed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "experiments/results/campaign/walker-walk/cand-s11", run)
    for stored, expected in (
        ("python -m pbrl.train 'env.task=a  b'", "python -m pbrl.train 'env.task=a  b'"),
        ("python -m experiments.blame run", "python -m experiments.blame run"),
        ("/some/where/pbrl/train.py seed=1", "python -m pbrl.train seed=1"),  # before version 0.2
    ):
        (run / "command.txt").write_text(stored + "\n")
        assert {row["command"] for row in curves.curve(run)} == {expected}


def test_a_kept_run_takes_no_others_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = ROOT / "experiments/results/campaign/walker-walk"
    first, second, kept = tmp_path / "a/run", tmp_path / "b/run", tmp_path / "kept"
    shutil.copytree(stored / "cand-s11", first)
    shutil.copytree(stored / "pebble-s10", second)
    for runs, named in (
        ([first, second], (first, second)),
        ([first], None),
        ([first], None),  # the same run again
        ([second], (second, kept / "run")),
    ):
        command = [*map(str, runs), "--keep", str(kept)]
        if named is None:
            curves.main(command)
            continue
        with pytest.raises(SystemExit):
            curves.main(command)
        error = capsys.readouterr().err
        assert all(str(path) in error for path in named)
    assert (kept / "run/config.yaml").read_bytes() == (first / "config.yaml").read_bytes()


def test_the_oracle_of_window_open_is_the_mean_of_its_stored_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sorted((ROOT / "experiments/results/figure-2/window-open").glob("oracle-s*"))
    assert len(runs) == 5
    monkeypatch.setattr(curves, "ORACLE", tmp_path)
    curves.oracle([row for run in runs for row in curves.curve(run)])
    assert (tmp_path / "window-open.csv").read_text() == (curves.pbrl.ORACLES / "window-open.csv").read_text()


def test_the_difference_is_welchs() -> None:
    """Scores 1, 2, 3 and 2, 4, 9: variances 1 and 13, (14/3)² / ((1/3)²/2 + (13/3)²/2) degrees of freedom."""
    x, y = np.array([1.0, 2.0, 3.0]) * 100, np.array([2.0, 4.0, 9.0]) * 100
    half = 100 * np.sqrt(14 / 3) * t.ppf(0.975, (14 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (13 / 3) ** 2 / 2))
    assert tables._welch(x, y) == f"-300 [{-300 - half:.0f}, {-300 + half:.0f}]"
    assert tables._welch(x[:1], y) == "-400", "one score has no interval"
