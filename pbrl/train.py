"""`python -m pbrl.train env=door-open`: reads the config, builds the parts, hands them to the loop."""

from __future__ import annotations

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pbrl.launch.configuration import ConfigError, first_error, register_resolvers
from pbrl.launch.sweep import launcher_error, run_in_sweep
from pbrl.listing import register

register_resolvers()
register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def hydra_main(cfg: DictConfig) -> dict[str, Any] | None:
    """Hydra's entry: one run, or one of a sweep, whose outcome is returned."""
    runtime = HydraConfig.get()
    choices = {
        group: name
        for group, name in runtime.runtime.choices.items()
        if not group.startswith("hydra/") and group != "launcher"
    }
    if runtime.mode == RunMode.MULTIRUN:
        return run_in_sweep(cfg, choices, list(runtime.overrides.task), runtime)
    from pbrl.launch.one_run import run
    from pbrl.records.checkpoint import CheckpointError  # torch: neither --help nor the workers of a sweep need it

    try:
        run(cfg, choices, list(runtime.overrides.task))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return None


def main() -> None:
    """The command line. What Hydra would refuse in a page is refused in a line first."""
    arguments = sys.argv[1:]
    error = launcher_error(arguments)
    if error is None and not any(argument.startswith("-") for argument in arguments):  # flags are Hydra's own business
        error = first_error(arguments)
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    hydra_main()


if __name__ == "__main__":
    main()
