"""The F-measure of edges, without MATLAB: thin, match one to one within a tolerance, count over the data set.

Martin, Fowlkes and Malik, "Learning to detect natural image boundaries", PAMI 2004, section 3.2, as the edge tasks of
multi-task papers use it: precision and recall are pooled over the data set at each threshold, and the best F is
reported (optimal data set scale).

Shapes: `B` maps of a batch, `H`, `W` height and width, `N`, `M` pixels that are set, `P` offsets within the tolerance.
"""

import math

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from ..data.ridges import non_maximum_suppression

THRESHOLDS = 33


class EdgeCounts:
    """Counts of matched edge pixels, batch after batch.

    Probabilities are thinned by non-maximum suppression, cut at each threshold and thinned again to lines of one pixel,
    as are the labels; each predicted pixel can then be matched with one labelled pixel. The matching is as large as can
    be (Hopcroft and Karp), over a whole batch at once.

    Args:
        max_dist: how far matched pixels may lie apart, as a fraction of the diagonal; at least one pixel.
        thresholds: how many, evenly spaced inside (0, 1).

    Differs from the official code in: 33 thresholds, not 99; the best F is that of a threshold, not interpolated
    between two; the matching is the largest, where `correspondPixels` looks for the cheapest and finds nearly the
    largest; nothing fades at the border, which in a small tile is a large part; predictions where the label is missing
    are left out.
    """

    def __init__(self, max_dist: float, thresholds: int = THRESHOLDS):
        self.max_dist = max_dist
        self.thresholds = np.arange(1, thresholds + 1) / (thresholds + 1)
        self.totals = np.zeros((3, thresholds))  # matched, predicted, labelled

    def add(self, probability_BHW: np.ndarray, edge_BHW: np.ndarray, counted_BHW: np.ndarray) -> None:
        """One batch: probabilities, which pixels are edges, and which carry a label at all."""
        edge_BHW = thin(edge_BHW & counted_BHW)
        height, width = edge_BHW.shape[1:]
        offsets = within(max(1.0, self.max_dist * math.hypot(height, width)))
        ridge_BHW = non_maximum_suppression(probability_BHW) * counted_BHW
        self.totals[2] += int(edge_BHW.sum())
        for i, threshold in enumerate(self.thresholds):
            predicted_BHW = thin(ridge_BHW >= threshold)
            self.totals[:2, i] += (matches(predicted_BHW, edge_BHW, offsets), int(predicted_BHW.sum()))

    def best_f(self) -> float:
        """See `best_f`."""
        return best_f(self.totals)


def best_f(totals: np.ndarray) -> float:
    """`2 P R / (P + R)` at the best threshold, from `EdgeCounts.totals`; NaN without any edge in the labels."""
    matched, predicted, labelled = totals
    if not labelled.any():
        return float("nan")
    # 2 (m / p) (m / l) / (m / p + m / l) = 2 m / (p + l)
    return float((2 * matched / (predicted + labelled)).max())


def thin(mask_BHW: np.ndarray) -> np.ndarray:
    """Lines of one pixel, by peeling: Guo and Hall, "Parallel thinning with two-subiteration algorithms", CACM 1989."""
    padded = _padded(mask_BHW, 1).view(np.uint8)
    flat, width = padded.reshape(-1), padded.shape[2]
    set_N = np.flatnonzero(flat)
    changed = True
    while changed:
        changed = False
        for table in _PEELED:
            code_N = np.zeros(len(set_N), np.uint8)
            for bit, (dy, dx) in enumerate(_AROUND):
                code_N |= flat[set_N + (dy * width + dx)] << bit
            gone_N = table[code_N]
            if gone_N.any():
                changed = True
                flat[set_N[gone_N]] = 0
                set_N = set_N[~gone_N]
    return padded[:, 1:-1, 1:-1].astype(bool)


_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from above


def _peeled(first: bool) -> np.ndarray:
    """bool `[256]`: whether a pixel goes, by its eight neighbours, in the first or the second half of a step.

    Which half is first is MATLAB's choice (`bwmorph`).
    """
    p2, p3, p4, p5, p6, p7, p8, p9 = (np.arange(256) >> bit & 1 for bit in range(8))
    crossings = (1 - p2) * (p3 | p4) + (1 - p4) * (p5 | p6) + (1 - p6) * (p7 | p8) + (1 - p8) * (p9 | p2)
    ends = np.minimum((p9 | p2) + (p3 | p4) + (p5 | p6) + (p7 | p8), (p2 | p3) + (p4 | p5) + (p6 | p7) + (p8 | p9))
    side = (p2 | p3 | 1 - p5) & p4 if first else (p6 | p7 | 1 - p9) & p8
    return (crossings == 1) & (ends >= 2) & (ends <= 3) & (side == 0)


_PEELED = (_peeled(True), _peeled(False))


def within(distance: float) -> list[tuple[int, int]]:
    """Offsets `(dy, dx)` of the pixels at most `distance` away."""
    reach = range(-int(distance), int(distance) + 1)
    return [(dy, dx) for dy in reach for dx in reach if dy * dy + dx * dx <= distance * distance]


def matches(first_BHW: np.ndarray, second_BHW: np.ndarray, offsets: list[tuple[int, int]]) -> int:
    """Size of the largest one-to-one matching of pixels that lie an offset apart, over all maps."""
    reach = max(dy for dy, _ in offsets)
    first, second = (_padded(mask, reach) for mask in (first_BHW, second_BHW))
    width = first.shape[2]
    first_N, second_M = np.flatnonzero(first), np.flatnonzero(second)
    number = np.full(second.size, -1, np.int32)  # of each pixel of the second, -1 where it is not set
    number[second_M] = np.arange(len(second_M), dtype=np.int32)
    near_NP = number[first_N[:, None] + [dy * width + dx for dy, dx in offsets]]
    pair_NP = near_NP >= 0
    if not pair_NP.any():
        return 0
    ends = np.concatenate([[0], pair_NP.sum(1).cumsum()]).astype(np.int32)
    columns = near_NP[pair_NP]
    graph = csr_array((np.ones(len(columns), bool), columns, ends), shape=(len(first_N), len(second_M)))
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def _padded(mask_BHW: np.ndarray, by: int) -> np.ndarray:
    return np.pad(mask_BHW, ((0, 0), (by, by), (by, by)))
