"""Codecs: one file per codec, one line here."""

from tierkv.core.registry import Registry

CODECS = Registry(
    "codecs",
    {
        "raw": "tierkv.codecs.raw:Raw",
        "int8": "tierkv.codecs.grouped:Int8",
        "int4": "tierkv.codecs.grouped:Int4",
    },
)
