"""How each engine is started with tierkv, and what would keep it from working there.

`tierkv init` writes a configuration and shows what an engine's setup says to start it with;
`tierkv doctor --engine` asks the setup for findings. One file per engine, one line here. No engine
is imported into this process.
"""

from tierkv.core.registry import Registry

SETUPS = Registry(
    "setups",
    {
        "vllm": "tierkv.setups.vllm:VllmSetup",
        "sglang": "tierkv.setups.sglang:SglangSetup",
        "lmcache": "tierkv.setups.lmcache:LmcacheSetup",
        "transformers": "tierkv.setups.transformers:TransformersSetup",
    },
)
