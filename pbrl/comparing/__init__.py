"""Finished runs, read from their files alone: curves, tables, figures, statistics, reports."""
