"""Taking turns by weight, evenly and for ever: whose turn any one is, without going through those before it."""

import heapq
from collections.abc import Sequence

import numpy as np


class Turns:
    """Turns 0, 1, 2, … shared out among as many rows as there are weights.

    Two rows share turns as Bresenham draws a line: of the first s, the one has round(s · its share). More rows are the
    leaves of a Huffman tree whose nodes share in this way, so that after any number of turns each row has had its
    share to within ½ for two rows, 1 for three, and 1.68 for any number (half the sum of the Fibonacci numbers'
    reciprocals: nodes on the way to the root weigh at least 1, 1, 2, 3, 5, … times the leaf).

    All in whole numbers: the same on every machine.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Raises ValueError without weights, or for one that is not above 0."""
        if not weights or min(weights) <= 0:
            raise ValueError(f"no turns by weights {weights}")
        heap: list[tuple[int, int, _Tree]] = [(weight, row, row) for row, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            node = _Node(first[2], second[2], first[0], first[0] + second[0])
            heapq.heappush(heap, (node.total, min(first[1], second[1]), node))
        self._tree = heap[0][2]

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of turns `start` … `start` + `count` - 1: whose each is, and the how-manieth of that row, from 0.

        Both int64 (count,).
        """
        return _take(self._tree, start, count)


class _Node:
    __slots__ = ("left", "right", "share", "total")

    def __init__(self, left: "_Tree", right: "_Tree", share: int, total: int) -> None:
        """`share` of each `total` turns are the left's."""
        self.left, self.right, self.share, self.total = left, right, share, total


_Tree = int | _Node


def _take(tree: _Tree, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(tree, int):
        return np.full(count, tree, np.int64), np.arange(start, start + count, dtype=np.int64)
    lefts = [(2 * turn * tree.share + tree.total) // (2 * tree.total) for turn in range(start, start + count + 1)]
    is_left = np.diff(np.array(lefts, np.int64)) == 1
    rows, nths = np.empty(count, np.int64), np.empty(count, np.int64)
    rows[is_left], nths[is_left] = _take(tree.left, lefts[0], lefts[-1] - lefts[0])
    rows[~is_left], nths[~is_left] = _take(tree.right, start - lefts[0], count - (lefts[-1] - lefts[0]))
    return rows, nths
