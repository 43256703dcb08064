"""Scoring a trained model: batched greedy generation over ranks, predictions as JSONL, metrics beside them.

Runs on the saved model folder without DeepSpeed. `docs/evaluation.md` says what is guaranteed.
"""

from trainer.evaluation.ranks import RankProcesses
from trainer.evaluation.running import evaluate
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec

__all__ = ["EvaluationSet", "EvaluationSpec", "RankProcesses", "evaluate"]
