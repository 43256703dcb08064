"""The converters by name."""

from __future__ import annotations

from trainer.data.converters.base import Converter
from trainer.data.converters.chartqa import ChartQa
from trainer.data.converters.chats import Llava665k, MftCoder, ShareGpt, ShareGpt4V
from trainer.data.converters.gqa import Gqa
from trainer.data.converters.m3it import M3it
from trainer.data.converters.messages import Messages
from trainer.data.converters.ocrvqa import OcrVqa
from trainer.data.converters.refcoco import RefCocoBoxes, RefCocoCaptions
from trainer.data.converters.vqav2 import Vqav2
from trainer.data.converters.xtreme_up import XtremeUpQa
from trainer.errors import unknown_name

CONVERTERS: dict[str, Converter] = {
    converter.name: converter
    for converter in (
        ShareGpt4V(),
        Vqav2(),
        Gqa(),
        ChartQa(),
        OcrVqa(),
        RefCocoCaptions(),
        RefCocoBoxes(),
        ShareGpt(),
        Llava665k(),
        M3it(),
        XtremeUpQa(),
        MftCoder(),
        Messages(),
    )
}


def get_converter(name: str) -> Converter:
    """The converter of that name; UserError with the nearest valid name for an unknown one."""
    if name in CONVERTERS:
        return CONVERTERS[name]
    raise unknown_name("converter", name, CONVERTERS)
