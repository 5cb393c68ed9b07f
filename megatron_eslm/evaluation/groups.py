"""Groups of lm-eval: the tasks that they stand for, and what is aggregated over these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_eslm.errors import ConfigError, first_line


def tasks_of(name: str, manager: Any) -> list[str]:
    """Tasks of a task, tag or group, those of groups in groups included; each once.

    Args:
        name: one of `manager.all_tasks`.
        manager: lm-eval's TaskManager.

    Raises:
        ConfigError: a group changes settings of its tasks, or defines tasks of its own.
    """
    if name in manager.all_subtasks:
        return [name]
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    from lm_eval.config.group import GroupConfig

    config = _config(name, manager)
    children = config.get("task")
    children = children if isinstance(children, list) else [children]
    changes = set(config) - set(GroupConfig.__dataclass_fields__)
    if changes or not all(isinstance(c, str) and c in manager.all_tasks for c in children):
        raise ConfigError(
            f"The group {name} changes settings of its tasks or defines tasks of its own, which "
            "is not supported. Name its tasks, and put settings into a YAML file of "
            "--include-path."
        )
    return list(dict.fromkeys(task for child in children for task in tasks_of(child, manager)))


def aggregating_groups(names: Sequence[str], manager: Any, tasks: Mapping[str, Any]) -> list[Any]:
    """lm-eval's Group of each name that is a group with metrics over its tasks.

    Args:
        names: tasks, tags or groups.
        manager: lm-eval's TaskManager.
        tasks: lm-eval's Task by name, for all tasks of the groups.

    Raises:
        ConfigError: lm-eval refuses the definition of a group.
    """
    from lm_eval.api.group import Group

    groups = []
    for name in dict.fromkeys(names):
        if name not in manager.all_groups:
            continue
        config = {k: v for k, v in _config(name, manager).items() if k != "task"}
        try:
            group = Group.from_config(config)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The group {name} cannot be used: {first_line(error)}") from error
        for task in tasks_of(name, manager):
            group.add(tasks[task])
        for metric in group.aggregate_metric_list or ():
            metric.filter_list = None  # results have one filter of each metric
        if group.has_aggregation:
            groups.append(group)
    return groups


def _config(group: str, manager: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    path = manager.task_index[group].yaml_path
    return load_yaml(path, resolve_func=False)
