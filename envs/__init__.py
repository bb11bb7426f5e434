"""Environments. Import gymnasium and simulators, never pbrl."""
