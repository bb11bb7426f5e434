"""Timings of single parts; see each module for its command."""
