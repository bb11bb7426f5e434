"""Robot policies from preferences: the library. It knows no particular environment and no particular teacher."""

from pathlib import Path

__version__ = "0.1.0"
ORACLES = Path(__file__).parent / "oracles"  # <env>.csv: curves of SAC paid the task's own reward
