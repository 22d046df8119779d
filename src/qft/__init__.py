"""qft: quantized fine-tuning over any backend.

>>> import qft
>>> model = qft.quantize_and_wrap(model, "nf4")  # a peft.PeftModel, ready for any trainer
"""

import typing as _typing

from qft.core import console as _quiet

with _quiet.hushed():  # PEFT imports the backends that are installed, and some of them log on import
    import peft as _peft  # noqa: F401


from qft.core.packed import PackedLinear, TensorQuantizer
from qft.core.quantizer import Capabilities, QuantizedWeight, Quantizer
from qft.core.registry import QuantizerInfo, available_quantizers, capabilities, get_quantizer, register_quantizer
from qft.core.version import __version__ as __version__
from qft.data.calibration import Calibration
from qft.data.statistics import Statistics
from qft.errors import (
    AdapterMismatch,
    AlreadyQuantized,
    BadFolder,
    BadOption,
    BadShape,
    MissingDependency,
    NeedsCalibration,
    NeedsOriginal,
    NonFiniteWeights,
    NoTargets,
    PartlyQuantized,
    QftError,
    QftWarning,
    UnknownQuantizer,
    UnsupportedDevice,
    UnsupportedOperation,
)
from qft.lora.inits import QERA, AdapterInit, InitReport, LoftQ, OLoRA, PiSSA, QERAFull, register_init
from qft.lora.merging.merge import merge, merge_to_float, unmerge
from qft.lora.merging.report import MergeReport
from qft.pipeline.audit.measure import audit
from qft.pipeline.audit.result import Audit
from qft.pipeline.prepare import prepare_model_for_kbit_training
from qft.pipeline.quantize import quantize
from qft.pipeline.wrap import quantize_and_wrap, wrap
from qft.saving.export import export
from qft.saving.load import load
from qft.saving.save import save
from qft.saving.transfer import transfer
from qft.saving.transfer_weight import TransferReport

if _typing.TYPE_CHECKING:
    from qft.autopilot.auto import auto
    from qft.autopilot.result import AutoResult
    from qft.backends.aqlm import AQLM
    from qft.backends.auto_round import AutoRound
    from qft.backends.awq import AWQ
    from qft.backends.bitnet import BitNet
    from qft.backends.bnb import BitsAndBytes4bit, BitsAndBytes8bit
    from qft.backends.compressed_tensors import CompressedTensors
    from qft.backends.eetq import EETQ
    from qft.backends.fp8 import FP8
    from qft.backends.gguf import GGUF
    from qft.backends.gptq import GPTQ
    from qft.backends.hqq import HQQ
    from qft.backends.inc import INC
    from qft.backends.mxfp4 import MXFP4
    from qft.backends.quanto import Quanto
    from qft.backends.reference import Reference
    from qft.backends.sinq import SINQ
    from qft.backends.torchao import TorchAO
    from qft.core.doctor import Doctor, doctor
    from qft.data.packing import PackingCollator
    from qft.evaluation import Evaluation, evaluate
    from qft.memory.plan import plan
    from qft.memory.report import Plan
    from qft.optimize.optimize import optimize_training, unoptimize
    from qft.training.config import TrainConfig
    from qft.training.run import TrainResult, train


__all__ = [
    "AQLM",
    "AWQ",
    "EETQ",
    "FP8",
    "GGUF",
    "GPTQ",
    "HQQ",
    "INC",
    "MXFP4",
    "QERA",
    "SINQ",
    "AdapterInit",
    "AdapterMismatch",
    "AlreadyQuantized",
    "Audit",
    "AutoResult",
    "AutoRound",
    "BadFolder",
    "BadOption",
    "BadShape",
    "BitNet",
    "BitsAndBytes4bit",
    "BitsAndBytes8bit",
    "Calibration",
    "Capabilities",
    "CompressedTensors",
    "Doctor",
    "Evaluation",
    "InitReport",
    "LoftQ",
    "MergeReport",
    "MissingDependency",
    "NeedsCalibration",
    "NeedsOriginal",
    "NoTargets",
    "NonFiniteWeights",
    "OLoRA",
    "PackedLinear",
    "PackingCollator",
    "PartlyQuantized",
    "PiSSA",
    "Plan",
    "QERAFull",
    "QftError",
    "QftWarning",
    "QuantizedWeight",
    "Quantizer",
    "QuantizerInfo",
    "Quanto",
    "Reference",
    "Statistics",
    "TensorQuantizer",
    "TorchAO",
    "TrainConfig",
    "TrainResult",
    "TransferReport",
    "UnknownQuantizer",
    "UnsupportedDevice",
    "UnsupportedOperation",
    "audit",
    "auto",
    "available_quantizers",
    "capabilities",
    "doctor",
    "errors",
    "evaluate",
    "export",
    "get_quantizer",
    "load",
    "merge",
    "merge_to_float",
    "optimize_training",
    "plan",
    "prepare_model_for_kbit_training",
    "quantize",
    "quantize_and_wrap",
    "register_init",
    "register_quantizer",
    "save",
    "testing",
    "train",
    "transfer",
    "unmerge",
    "unoptimize",
    "wrap",
]

_LAZY = {
    "AQLM": "qft.backends.aqlm",
    "AWQ": "qft.backends.awq",
    "AutoResult": "qft.autopilot.result",
    "AutoRound": "qft.backends.auto_round",
    "BitNet": "qft.backends.bitnet",
    "CompressedTensors": "qft.backends.compressed_tensors",
    "EETQ": "qft.backends.eetq",
    "Evaluation": "qft.evaluation",
    "FP8": "qft.backends.fp8",
    "GGUF": "qft.backends.gguf",
    "GPTQ": "qft.backends.gptq",
    "HQQ": "qft.backends.hqq",
    "INC": "qft.backends.inc",
    "MXFP4": "qft.backends.mxfp4",
    "Quanto": "qft.backends.quanto",
    "PackingCollator": "qft.data.packing",
    "Plan": "qft.memory.report",
    "Reference": "qft.backends.reference",
    "SINQ": "qft.backends.sinq",
    "TorchAO": "qft.backends.torchao",
    "TrainConfig": "qft.training.config",
    "TrainResult": "qft.training.run",
    "BitsAndBytes4bit": "qft.backends.bnb",
    "BitsAndBytes8bit": "qft.backends.bnb",
    "Doctor": "qft.core.doctor",
    "auto": "qft.autopilot.auto",
    "doctor": "qft.core.doctor",
    "evaluate": "qft.evaluation",
    "optimize_training": "qft.optimize.optimize",
    "plan": "qft.memory.plan",
    "testing": "qft.testing",
    "train": "qft.training.run",
    "unoptimize": "qft.optimize.optimize",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> object:
    import importlib

    if name not in _LAZY:
        raise AttributeError(f"module 'qft' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "testing" else getattr(module, name)
