"""`python -m pbrl.train env=door-open`: reads the config, builds the parts, hands them to the loop."""

from __future__ import annotations

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pbrl import __version__
from pbrl.launch.command import look_here, own_names, prepare, searched
from pbrl.launch.configuration import ConfigError, register_resolvers
from pbrl.launch.sweep import end_interrupted, launcher_error, run_in_sweep
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
    choices = own_names(choices, cfg, runtime.overrides.task)
    if runtime.mode == RunMode.MULTIRUN:
        return run_in_sweep(cfg, choices, list(runtime.overrides.task), runtime)
    from pbrl.launch.one_run import run
    from pbrl.records.checkpoint import CheckpointError  # torch: neither --help nor the workers of a sweep need it

    try:
        searching = [] if cfg.resume else searched(runtime.runtime)
        run(cfg, choices, [*runtime.overrides.task, *searching])
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return None


def main() -> None:
    """The command line. What Hydra would refuse in a page is refused in a line first."""
    if "--version" in sys.argv[1:]:
        print(f"pbrl {__version__}")
        return
    look_here()
    try:
        if error := launcher_error(sys.argv[1:]):
            raise ConfigError(error)
        sys.argv[1:] = prepare(sys.argv[1:])
    except ConfigError as refused:
        print(f"error: {refused}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        hydra_main()
    except KeyboardInterrupt:
        end_interrupted()


if __name__ == "__main__":
    main()
