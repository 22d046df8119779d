"""Where an adapter starts: pure functions from (W, Ŵ) to (A, B), and the run that applies them to a model.

An init sees each weight once, while it is being quantized and W and Ŵ are both in hand.
"""

from qft.lora.inits.base import AdapterInit
from qft.lora.inits.loftq import LoftQ
from qft.lora.inits.names import make_init, need_original, register_init, resolve_init, settle_auto
from qft.lora.inits.principal import OLoRA, PiSSA
from qft.lora.inits.qera import QERA, Auto, QERAFull
from qft.lora.inits.run import InitReport, InitRun, WeightInit

__all__ = [
    "QERA",
    "AdapterInit",
    "Auto",
    "InitReport",
    "InitRun",
    "LoftQ",
    "OLoRA",
    "PiSSA",
    "QERAFull",
    "WeightInit",
    "make_init",
    "need_original",
    "register_init",
    "resolve_init",
    "settle_auto",
]
