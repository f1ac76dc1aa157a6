"""Decisions: which block lives where. Pure: no clock, no I/O, no thread, no torch."""
