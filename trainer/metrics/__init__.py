"""Metrics of generated answers, each with the numbers its community reports.

A metric compares one prediction per sample with the references of that sample and returns the value in
the units the community prints: accuracies, F1 and BLEU in percent (0-100), CIDEr as pycocoevalcap's ``Cider``
returns it (mean similarity times 10, so 0-10 and usually below 2). Perplexity takes losses instead of answers:
its value comes from the function.
"""

from __future__ import annotations

from trainer.errors import unknown_name
from trainer.metrics.base import Metric, MetricResult
from trainer.metrics.bleu import Bleu, BleuOfConstants
from trainer.metrics.boxes import AccuracyIoU, Box, intersection_over_union, parse_box
from trainer.metrics.charts import ChartAccuracy
from trainer.metrics.cider import Cider, CiderCorpus
from trainer.metrics.exact import ExactMatch, GqaAccuracy, normalize_answer
from trainer.metrics.perplexity import Perplexity, perplexity
from trainer.metrics.spans import SpanF1
from trainer.metrics.vqa import VqaAccuracy, process_vqa_answer

__all__ = [
    "METRICS",
    "AccuracyIoU",
    "Bleu",
    "BleuOfConstants",
    "Box",
    "ChartAccuracy",
    "Cider",
    "CiderCorpus",
    "ExactMatch",
    "GqaAccuracy",
    "Metric",
    "MetricResult",
    "Perplexity",
    "SpanF1",
    "VqaAccuracy",
    "get_metric",
    "intersection_over_union",
    "normalize_answer",
    "parse_box",
    "perplexity",
    "process_vqa_answer",
    "takes_losses",
]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ExactMatch(),
        AccuracyIoU(),
        Cider(),
        VqaAccuracy(),
        GqaAccuracy(),
        ChartAccuracy(None, "chartqa_strict", "ChartQA strict"),
        ChartAccuracy(0.05, "chartqa_relaxed", "ChartQA relaxed"),
        SpanF1(),
        Bleu(),
        Perplexity(),
    )
}


def get_metric(name: str) -> Metric:
    """The metric of that name; UserError with the nearest valid name for an unknown one."""
    if name in METRICS:
        return METRICS[name]
    raise unknown_name("metric", name, METRICS)


def takes_losses(name: str) -> bool:
    """Whether the metric of that name is computed from losses of the given answers instead of generated ones."""
    return isinstance(get_metric(name), Perplexity)
