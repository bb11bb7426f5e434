"""Range checks of what a config may say."""

from __future__ import annotations

from typing import Any


def check(where: str, **values: tuple[Any, bool, str]) -> None:
    """Refuse the first value that is not as it should be, by its key.

        check("feedback", budget=(budget, budget >= 1, "at least 1"))

    Args:
        where: the config's node, such as feedback.
        values: by name: the value, whether it is good, and what is expected.

    Raises:
        ValueError: naming the key, the value and what is expected.
    """
    for name, (value, good, expected) in values.items():
        if not good:
            raise ValueError(f"{where}.{name}={'null' if value is None else value}; expected {expected}")
