"""The console script `qft`.

Each verb is one file in `qft/cli/` that holds a function `command`; the file's name is the verb's name. Verb files
are loaded by path, since `import qft.cli.demo` would import qft, and with it torch, before `--help` can answer.
So a verb file imports typer and nothing heavy at its top, and imports qft in its function. Where the first word names a
verb, only its file is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

VERBS = Path(__file__).with_name("qft") / "cli"
QUANTIZERS = (
    "nf4", "fp4", "int8", "aqlm", "awq", "eetq", "auto-round", "bitnet", "compressed-tensors", "fp8", "gguf", "gptq", "hqq",
    "inc", "mxfp4", "quanto", "sinq", "torchao", "reference",
)  # fmt: skip
"""The registry's names, for tab completion, which has no time to import it; a test compares them."""
EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, with one line that says why; 2 a wrong option; 130 interrupted by Ctrl-C; "
    "143 ended by SIGTERM."
)

AT_A_SHELL = {"resume='restart'": "--restart", "skip_bad_rows=True": "--skip-bad-rows"}
"""What errors advise a caller from Python to write, and what that is here."""

# options that several verbs take
Base = Annotated[str | None, typer.Option(help="The base model of an adapter.", show_default="what it names")]
Original = Annotated[str | None, typer.Option(help="The float model: its weights are taken, not the dequantized ones.")]
FloatDtype = Annotated[str | None, typer.Option(help="Of the floats.", show_default="the base's")]
Device = Annotated[str | None, typer.Option(help="cuda, xpu, mps, cpu.", show_default="what there is")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the weights in an existing folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be written.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def complete_quantizer(incomplete: str) -> list[str]:
    """Names of quantizers that begin so."""
    return [name for name in QUANTIZERS if name.startswith(incomplete)]


def app(only: str | None = None) -> typer.Typer:
    """The command with all of its verbs, or with one."""
    cli = typer.Typer(
        name="qft",
        help="Quantized fine-tuning: quantize, tune and merge language models with any backend.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    cli.callback()(_options)
    files = sorted(VERBS.glob("[a-z]*.py"))
    for file in [f for f in files if _verb(f) == only] or files:
        cli.command(_verb(file))(_reporting(_load(file)))
    return cli


def main() -> None:
    """Run the command, with the verb that the first word names."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # other libraries' advice to us, none of the user's business
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels to fetch; qft bypasses them
    warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
    app(sys.argv[1] if len(sys.argv) > 1 else None)()


def _verb(file: Path) -> str:
    return file.stem.replace("_", "-")


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _version(asked), help="Show the version.")
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        print("qft", importlib.metadata.version("qft"))
        raise typer.Exit


def _load(file: Path) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"qft_cli_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.command


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning of qft on one line, like its errors."""
    if category.__module__ == "qft.errors":
        print("qft: warning:", " ".join(str(message).split()), file=sys.stderr)
    else:
        otherwise(message, category, *place)


def _reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Refusals become one line on stderr and exit code 1, Ctrl-C becomes 130; a defect keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _import_quietly()
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # such as `qft backends | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            errors = sys.modules.get("qft.errors")
            if errors is None or not isinstance(error, errors.QftError):
                raise
            text = " ".join(str(error).split())
            for python, here in AT_A_SHELL.items():
                text = text.replace(python, here)
            print("qft: error:", text, file=sys.stderr)
            raise typer.Exit(1) from None

    return run


def _import_quietly() -> None:
    """Import qft with its packages. torchao, where installed, tells stderr of kernels that this machine lacks."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        importlib.import_module("qft")
        importlib.import_module("peft")
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if __name__ == "__main__":
    sys.modules["qft_cli"] = sys.modules["__main__"]  # verb files import from it
    main()
