"""Scoring a trained model: batched greedy generation over ranks, predictions as JSONL, metrics beside them.

Runs on the saved model folder without DeepSpeed: ``running.evaluate`` takes an ``EvaluationSpec``. `docs/evaluation.md`
says what is guaranteed.
"""
