"""Words: errors, geometry, keys, registries, counters. Imports nothing of ours; needs no torch."""
