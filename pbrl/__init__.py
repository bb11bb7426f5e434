"""Robot policies from preferences: the library. It knows no particular environment and no particular teacher."""

__version__ = "0.1.0"
