"""The errors that qft raises.

QftError
├── UnknownQuantizer      (ValueError)           no quantizer of that name
├── BadOption             (ValueError)           an option that the quantizer, adapter or init does not take
├── NoTargets             (ValueError)           nothing to quantize or to adapt
├── MissingDependency     (ImportError)          a package is not installed
├── UnsupportedDevice     (RuntimeError)         no such device, no kernels for it, or weights on "meta"
├── BadFolder             (OSError)              a folder or file that is missing, corrupt or not ours
├── UnsupportedOperation  (NotImplementedError)  the backend cannot do this, by its capabilities
├── NeedsCalibration      (ValueError)           the method wants calibration data
├── NeedsOriginal         (ValueError)           the method wants the float weights
├── BadShape              (ValueError)           a weight, group size or rank that does not fit
├── NonFiniteWeights      (ValueError)           NaN or infinity in a weight or an adapter
├── AlreadyQuantized      (ValueError)           the model is quantized in another way
├── AdapterMismatch       (ValueError)           the adapter was trained over other original weights
└── PartlyQuantized       (RuntimeError)         an earlier run was interrupted halfway

Each says what happened, why, and what to do. A refusal leaves the model as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class QftError(Exception):
    """Base of every error that qft raises on purpose."""


@contextmanager
def about(name: str) -> Iterator[None]:
    """Put the name of a layer in front of the message of any `QftError` of the block that does not have it yet."""
    try:
        yield
    except QftError as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


class UnknownQuantizer(QftError, ValueError):
    """No quantizer is registered under that name."""


class BadOption(QftError, ValueError):
    """An option that is not known, or a value that it does not take."""


class NoTargets(QftError, ValueError):
    """No weight matches: there is nothing to quantize or to adapt."""


class MissingDependency(QftError, ImportError):
    """A package that the quantizer needs is not installed; the message holds the pip line."""


class UnsupportedDevice(QftError, RuntimeError):
    """The device does not exist, has no kernels for this quantizer, or is "meta"."""


class BadFolder(QftError, OSError):
    """A folder or file is missing, corrupt, or was not written by a tool that qft knows."""


class UnsupportedOperation(QftError, NotImplementedError):
    """The backend's capabilities do not allow this operation."""


class NeedsCalibration(QftError, ValueError):
    """The method needs calibration data and got none."""


class NeedsOriginal(QftError, ValueError):
    """The method needs the float weights, and the model is quantized already."""


class BadShape(QftError, ValueError):
    """A weight's shape, a group size or a rank does not fit."""


class NonFiniteWeights(QftError, ValueError):
    """A weight or an adapter holds NaN or infinity."""


class AlreadyQuantized(QftError, ValueError):
    """The model is already quantized, and not in the way that was asked for."""


class AdapterMismatch(QftError, ValueError):
    """The adapter was trained over other original weights than these."""


class PartlyQuantized(QftError, RuntimeError):
    """An earlier run was interrupted halfway; the model is a mixture and cannot be used."""


class QftWarning(UserWarning):
    """Something went on in another way than was asked for, and the message says how."""
