"""Testing, for us and for other packages: contract suites, a simulated disk, a faulty one.

============  ===========================================================================
files         `MemoryFiles`, `FaultyFiles`: file engines that crash and fail by seed
file_engines  `FileEngineTests`: the suite that a file engine inherits
policies      `PolicyTests`: the suite that an eviction policy inherits
codecs        `CodecTests`: the suite that a codec inherits (needs torch)
engines       `EngineTests`: the suite that an adapter of an engine inherits
life          one life of an engine, in a process, with or without trouble
streams       `RecordingStreams`: a device's queues that find races and run in any order
memory_tiers  `TierTests`: the suite of tiers whose blocks are read and written in place
tiers         `ColdTierTests`: the suite that the cold tier passes on every file engine
============  ===========================================================================

The suites need pytest. Everything random is drawn from a seed that the caller gives.
"""
