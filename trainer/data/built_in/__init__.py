"""Seven visual tasks and chat, made from published material and written as records a user could bring."""

from trainer.data.built_in.catalogue import BUILT_IN_TASKS, BuiltInTask, Sizes, Source, TaskInfo
from trainer.data.built_in.pretraining import write_pretraining
from trainer.data.built_in.writing import write_built_in_tasks

__all__ = [
    "BUILT_IN_TASKS",
    "BuiltInTask",
    "Sizes",
    "Source",
    "TaskInfo",
    "write_built_in_tasks",
    "write_pretraining",
]
