"""Tasks of EleutherAI's lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from qft.core import record
from qft.core.console import one_line
from qft.errors import BadOption, MissingDependency, QftError

Scores = dict[str, dict[str, float]]
"""task → {metric: value}; the standard error of a metric is under "metric stderr"."""


def require() -> None:
    """Raises MissingDependency where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependency("tasks= runs tasks of lm-eval, not installed here: pip install lm-eval")


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    batch_size: int,
    limit: int | None,
    folder: str | None = None,
) -> Scores:
    """Run lm-eval's tasks on a model as it stands, adapters included; the model's modes come back as they were.

    Args:
        tasks: names, or task configs as lm-eval takes them.
        limit: examples of each task at most.
        folder: with task files (yaml) of one's own.

    Raises:
        MissingDependency: lm-eval is not installed. BadOption: a task that it does not know, or cannot run.
    """
    require()
    base = record.base_model(model)
    modes = [(m, m.training) for m in model.modules()]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=folder)
            known = set(manager.all_tasks)
            unknown = [t for t in tasks if isinstance(t, str) and t not in known]
            if unknown:
                import difflib

                near = difflib.get_close_matches(unknown[0], known, 3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise BadOption(f"lm-eval has no task {unknown[0]!r}{hint}")
            kind = "seq2seq" if getattr(getattr(base, "config", None), "is_encoder_decoder", False) else "causal"
            wrapper = HFLM(pretrained=model, tokenizer=tokenizer, backend=kind, batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                model=wrapper, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
            )
    except QftError:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"lm-eval cannot run here: {error}; pip install -U lm-eval brings what it needs"
        ) from error
    except Exception as error:
        line = one_line(error)
        raise BadOption(f"lm-eval cannot run {', '.join(map(str, tasks))}: {line}") from error
    finally:
        for module, training in modes:
            module.training = training
    return {task: _scores(values) for task, values in (found or {}).get("results", {}).items()}


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc_stderr,none" is "acc stderr" here."""
    scores = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            if value == "N/A":
                value = math.nan
            else:
                continue
        metric, _, filter_name = key.partition(",")
        if metric == "sample_len":  # how many examples there were
            continue
        metric, stderr = metric.removesuffix("_stderr"), metric.endswith("_stderr")
        name = metric if filter_name in ("", "none") else f"{metric} ({filter_name})"
        scores[f"{name} stderr" if stderr else name] = float(value)
    return scores
