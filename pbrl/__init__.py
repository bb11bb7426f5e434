"""Robot policies from preferences: the library. It knows no particular environment and no particular teacher."""

from pathlib import Path
from typing import Any

__version__ = "0.2.0"
__all__ = ["LearnedReward"]
ORACLES = Path(__file__).parent / "oracles"  # <env>.csv: curves of SAC paid the task's own reward


def __getattr__(name: str) -> Any:
    """`pbrl.LearnedReward`, imported when first asked for: it brings torch."""
    if name == "LearnedReward":
        from pbrl.learned_reward import LearnedReward

        return LearnedReward
    raise AttributeError(f"module 'pbrl' has no attribute {name!r}")
