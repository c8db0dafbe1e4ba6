"""pipeline(): from texts to results in one call. A task is a small class: how one input looks, how a batch is run."""

from gemmakit.pipelines.base import Pipeline
from gemmakit.pipelines.loading import ALIASES, TASKS, find_task, pipeline
from gemmakit.pipelines.text_classification import TextClassificationPipeline
from gemmakit.pipelines.text_generation import DEFAULT_NEW_TOKENS, TextGenerationPipeline
from gemmakit.pipelines.token_classification import TokenClassificationPipeline

__all__ = [
    "ALIASES",
    "DEFAULT_NEW_TOKENS",
    "TASKS",
    "Pipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TokenClassificationPipeline",
    "find_task",
    "pipeline",
]
