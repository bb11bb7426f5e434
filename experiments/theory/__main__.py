"""`python -m experiments.theory`: check every claim, write table.md, CSVs and figures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.theory.algorithms import claim_v
from experiments.theory.complexity import claim_ix
from experiments.theory.constants import claim_viii
from experiments.theory.convergence import claim_ii, claim_iv
from experiments.theory.examples import claim_vi
from experiments.theory.gaming import claim_vii
from experiments.theory.hypergradient import claim_i, claim_iii
from experiments.theory.report import Result, write

CLAIMS: dict[str, Callable[[bool], Result]] = {
    "i": claim_i,
    "ii": claim_ii,
    "iii": claim_iii,
    "iv": claim_iv,
    "v": claim_v,
    "vi": claim_vi,
    "vii": claim_vii,
    "viii": claim_viii,
    "ix": claim_ix,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen claims; the exit status is 1 if one of them does not hold."""
    parser = argparse.ArgumentParser(prog="python -m experiments.theory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller problems and fewer seeds, for tests")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/theory"), help="where to write")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="only these")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    results = []
    for key in chosen.claims:
        began = time.perf_counter()
        results.append(CLAIMS[key](chosen.quick))
        print(f"({key}) {results[-1].title}: {time.perf_counter() - began:.0f} s", flush=True)
        for finding in results[-1].findings:
            verdict = {True: "ok  ", False: "FAIL", None: "    "}[finding.holds]
            print(f"  {verdict} {finding.quantity}: {finding.measured} (theory: {finding.theory})", flush=True)
    print(f"written to {write(results, chosen.out, 'python -m experiments.theory' + ' --quick' * chosen.quick)}")
    return int(any(finding.holds is False for result in results for finding in result.findings))


if __name__ == "__main__":
    raise SystemExit(main())
