"""Testing, for us and for other packages: contract suites, a simulated disk, a faulty one.

============  ===========================================================================
files         `MemoryFiles`, `FaultyFiles`: file engines that crash and fail by seed
file_engines  `FileEngineTests`: the suite that a file engine inherits
tiers         `ColdTierTests`: the suite that the cold tier passes on every engine
============  ===========================================================================

The suites need pytest. Everything random is drawn from a seed that the caller gives.
"""
