"""`python -m pbrl.listing [GROUP …]`: what can be chosen on the command line, one line each; also a part of --help.

The lines are the first comments of the files in pbrl/conf, and those of train.yaml beside its keys.
"""

from __future__ import annotations

import argparse

from omegaconf import OmegaConf

from pbrl.launch.configuration import CONF, GROUPS, options

LISTED = (*GROUPS, "fit", "launcher", "experiment")
PURPOSE = {
    "env": "the task",
    "agent": "the SAC that learns to act",
    "reward": "the network fitted to the answers",
    "query": "which pairs are asked about",
    "teacher": "who answers",
    "updater": "how answers change the reward",
    "logger": "where numbers go beside metrics.jsonl",
    "fit": "how an updater fits answers",
    "launcher": "where the runs of a sweep are computed",
    "experiment": "settings as published, a quick one, to teach by hand, and of first light's comparison",
}


def description(group: str, option: str) -> str:
    """The first sentence of the comment that an option's file begins with, as far as its first line goes."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @")]
    return comments[0].split(". ")[0].removesuffix(".") if comments else ""


def listing(groups: tuple[str, ...] = LISTED) -> str:
    """All options of these groups with their descriptions."""
    blocks = []
    for group in groups:
        names = options(group)
        width = max(map(len, names))
        lines = [f"  {name:{width}}  {description(group, name)}".rstrip() for name in names]
        typed = "fit@updater.fit" if group == "fit" else group
        blocks.append("\n".join([f"{typed}=…  {PURPOSE[group]}", *lines]))
    return "\n\n".join(blocks)


def keys() -> str:
    """The keys of train.yaml with their default values and comments."""
    text = (CONF / "train.yaml").read_text()
    return text[text.index("total_steps:") : text.index("\nhydra:")].strip()


def register() -> None:
    """`${listing:}` and `${keys:}` for Hydra's help template, in which a dollar sign is written twice."""
    chosen = tuple(group for group in LISTED if group != "experiment")
    OmegaConf.register_new_resolver("listing", lambda: listing(chosen).replace("$", "$$"), replace=True)
    OmegaConf.register_new_resolver("keys", lambda: keys().replace("$", "$$"), replace=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pbrl.listing", description="What can be chosen, one line each.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(LISTED)} (default: all)")
    groups = parser.parse_args(arguments).groups
    unknown = [group for group in groups if group not in LISTED]
    if unknown:
        parser.error(f"there is no group {unknown[0]}; there are: {', '.join(LISTED)}")
    print(listing(tuple(groups) or LISTED))


if __name__ == "__main__":
    main()
