"""The processes that share an evaluation's work."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lingua_topk.errors import UserError


def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def broadcast(content: Any) -> Any:
    """What process 0 holds, in all."""
    if not dist.is_initialized():
        return content
    box = [content]
    dist.broadcast_object_list(box)
    return box[0]


def gather(content: Any) -> list[Any]:
    """What each holds, in all."""
    if not dist.is_initialized():
        return [content]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, content)
    return parts


def in_the_first(work: Callable[[], Any]) -> None:
    """Let process 0 do `work`; a UserError of it is raised in all, which would wait otherwise."""
    problem = None
    if rank_and_size()[0] == 0:
        problem = _problem(work)
    problem = broadcast(problem)
    if problem is not None:
        raise problem


def in_all(work: Callable[[], Any]) -> list[Any]:
    """What `work` gives in each process; the first UserError of any is raised in all."""
    results: list[Any] = []
    problem = _problem(lambda: results.append(work()))
    parts = gather((problem, results))
    for found, _ in parts:
        if found is not None:
            raise found
    return [result for _, (result,) in parts]


def _problem(work: Callable[[], Any]) -> UserError | None:
    try:
        work()
    except UserError as error:
        return error
    return None
