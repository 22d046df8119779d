"""What a model is worth: held-out perplexity, drift from its float baseline, ranges, weights, tasks, and a report."""

from qft.evaluation.evaluate import evaluate
from qft.evaluation.report import Report
from qft.evaluation.result import Evaluation

__all__ = ["Evaluation", "Report", "evaluate"]
