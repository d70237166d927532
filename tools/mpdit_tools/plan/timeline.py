"""A step of the pipeline, simulated: who works when, how long the others wait, what each rank holds at once."""

import dataclasses
from collections.abc import Callable

from mpdit.config import Parallel
from mpdit.parallel.schedule import Task, order


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A task with the time at which it begins and ends, in seconds from the start of the step."""

    task: Task
    begin_s: float
    end_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Spans of each pipeline rank, in order."""

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        return max(spans[-1].end_s for spans in self.ranks)

    def busy_s(self, rank: int) -> float:
        return sum(span.end_s - span.begin_s for span in self.ranks[rank])

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they wait; 0 without a pipeline."""
        busy = sum(self.busy_s(rank) for rank in range(len(self.ranks)))
        return 1 - busy / (self.seconds * len(self.ranks))


def simulate(parallel: Parallel, micro_batches: int, seconds: Callable[[Task], float], hop_s: float = 0.0) -> Timeline:
    """The step's timeline when a task takes `seconds(task)` and what it sends arrives `hop_s` later.

    A forward pass waits for the chunk before, a backward pass for the chunk after (the last chunk's for its own forward
    pass); a rank does its tasks in Megatron's order and never overtakes itself.
    """
    orders = [order(parallel, stage, micro_batches) for stage in range(parallel.pp)]
    chunks = parallel.pp * parallel.vpp
    ends: dict[Task, float] = {}
    spans: list[list[Span]] = [[] for _ in orders]
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, tasks in enumerate(orders):
            while len(spans[rank]) < len(tasks):
                task = tasks[len(spans[rank])]
                needed = _needed(task, chunks)
                if needed is not None and needed not in ends:
                    break
                free = spans[rank][-1].end_s if spans[rank] else 0.0
                ready = 0.0 if needed is None else ends[needed] + (hop_s if needed.chunk != task.chunk else 0.0)
                begin = max(free, ready)
                ends[task] = begin + seconds(task)
                spans[rank].append(Span(task=task, begin_s=begin, end_s=ends[task]))
                left -= 1
        assert left < before, "a schedule in which every rank waits for another"
    return Timeline(ranks=tuple(map(tuple, spans)))


def _needed(task: Task, chunks: int) -> Task | None:
    if task.kind == "forward":
        return task._replace(chunk=task.chunk - 1) if task.chunk else None
    if task.chunk == chunks - 1:
        return task._replace(kind="forward")
    return task._replace(chunk=task.chunk + 1)


def most_held(tasks: list[Task], held: Callable[[Task], int], during: Callable[[Task], int]) -> int:
    """The most bytes that a rank holds at once: `held(forward task)` from a micro-batch's forward to its backward pass,
    and `during(task)` on top while a task runs (on what it leaves behind, for a forward pass)."""
    now = most = 0
    for task in tasks:
        forward = task._replace(kind="forward")
        if task.kind == "forward":
            most = max(most, now + max(held(task), during(task)))
            now += held(task)
        else:
            most = max(most, now + during(task))
            now -= held(forward)
    return most
