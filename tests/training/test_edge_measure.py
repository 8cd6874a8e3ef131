"""The F-measure of edges, part by part: thinning, suppression and matching against loops and exhaustive search.

Shapes: `B` maps, `H`, `W` height and width.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import thin as reference_thin

from moe_mtl.data.ridges import non_maximum_suppression
from moe_mtl.training.edge_measure import EdgeCounts, matches, thin, within


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def blobs(rng, batch=4, height=17, width=23):
    """Lines and patches of many widths."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(batch, height, width)), (0, 2, 2))
    return np.abs(smooth) < np.quantile(np.abs(smooth), rng.uniform(0.1, 0.6))


def test_thinning_is_that_of_bwmorph(rng):
    for mask in (blobs(rng), rng.random((6, 9, 8)) < 0.6, np.ones((1, 12, 7), bool), np.zeros((1, 3, 3), bool)):
        expected = np.stack([reference_thin(one) for one in mask])
        assert np.array_equal(thin(mask), expected)
        assert np.array_equal(thin(expected), expected)  # thin lines stay


def suppressed_by_hand(edge_HW):
    """Pixel by pixel, in Python floats."""
    height, width = edge_HW.shape
    weight = [1, 2, 3, 4, 5, 4, 3, 2, 1]

    def mirrored(i, size):  # the border pixel counts twice
        i %= 2 * size
        return i if i < size else 2 * size - 1 - i

    def smooth(y, x):
        terms = (
            weight[a] * weight[b] * edge_HW[mirrored(y + a - 4, height), mirrored(x + b - 4, width)]
            for a in range(9)
            for b in range(9)
        )
        return sum(terms) / 625

    def slope(values, axis):
        lines = values if axis == 1 else values.T
        out = np.empty_like(lines)
        for j, line in enumerate(lines):
            for i in range(len(line)):
                low, high = max(i - 1, 0), min(i + 1, len(line) - 1)
                out[j, i] = (line[high] - line[low]) / (high - low)
        return out if axis == 1 else out.T

    def between(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
        a, b = y - y0, x - x0
        top = (1 - b) * edge_HW[y0, x0] + b * edge_HW[y0, x0 + 1]
        bottom = (1 - b) * edge_HW[y0 + 1, x0] + b * edge_HW[y0 + 1, x0 + 1]
        return (1 - a) * top + a * bottom

    blurred = np.array([[smooth(y, x) for x in range(width)] for y in range(height)])
    dy, dx = slope(blurred, 0), slope(blurred, 1)
    dyy, dxy, dxx = slope(dy, 0), slope(dx, 0), slope(dx, 1)
    out = np.zeros_like(edge_HW)
    for y, x in np.ndindex(edge_HW.shape):
        sign = int(dxy[y, x] < 0) - int(dxy[y, x] > 0)
        angle = math.atan(dyy[y, x] * sign / (dxx[y, x] + 1e-5))
        across = [between(y + s * math.sin(angle), x + s * math.cos(angle)) for s in (-1, 1)]
        if all(edge_HW[y, x] >= value - 1e-12 for value in across):
            out[y, x] = edge_HW[y, x]
    return out


def test_suppression_by_hand(rng):
    maps = rng.random((3, 9, 11))
    expected = np.stack([suppressed_by_hand(one) for one in maps])
    found = non_maximum_suppression(maps)
    np.testing.assert_allclose(found, expected)
    assert 0.1 < (found > 0).mean() < 0.8


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 120, 160])
def test_a_soft_line_becomes_one_pixel_wide_along_its_middle(degrees):
    y, x = np.mgrid[-20:21, -20:21]
    across = y * math.cos(math.radians(degrees)) - x * math.sin(math.radians(degrees))
    found = thin(non_maximum_suppression(np.exp(-(across**2) / 8)[None]) > 0.5)[0]
    inner = np.s_[3:-3, 3:-3]  # at the border the mirrored map bends the direction
    assert np.abs(across[inner][found[inner]]).max() < 0.75
    assert 35 <= found[inner].sum() <= 50  # the line is 35 to 49 pixels long


def largest_matching(first, second, distance):
    """By trying everything."""
    if not first:
        return 0
    y, x = first[0]
    best = largest_matching(first[1:], second, distance)
    for i, (v, u) in enumerate(second):
        if math.hypot(y - v, x - u) <= distance:
            best = max(best, 1 + largest_matching(first[1:], second[:i] + second[i + 1 :], distance))
    return best


@pytest.mark.parametrize("distance", [1.0, 1.5, 2.3])
def test_matching_against_exhaustive_search(rng, distance):
    total = 0
    for _ in range(12):
        masks = [np.zeros((2, 5, 4), bool) for _ in range(2)]
        for mask, b in itertools.product(masks, range(2)):
            mask[b].flat[rng.choice(20, rng.integers(0, 7), replace=False)] = True
        pairs = [[list(map(tuple, np.argwhere(mask[b]))) for mask in masks] for b in range(2)]
        expected = sum(largest_matching(*pair, distance) for pair in pairs)
        assert matches(*masks, within(distance)) == expected
        total += expected
    assert total > 20


def test_a_greedy_matching_would_be_smaller():
    first, second = np.zeros((1, 1, 5), bool), np.zeros((1, 1, 5), bool)
    first[0, 0, [1, 2]] = True
    second[0, 0, [0, 1]] = True  # 1 must go to 0, not to 1, so that 2 has 1
    assert matches(first, second, within(1)) == 2


def test_no_pixel_is_matched_across_borders_or_pictures():
    first, second = np.zeros((2, 3, 3), bool), np.zeros((2, 3, 3), bool)
    first[0, 2, 2] = second[1, 0, 0] = second[0, 2, 0] = True
    assert matches(first, second, within(1)) == 0


def test_offsets_within_a_distance():
    assert sorted(within(1)) == [(-1, 0), (0, -1), (0, 0), (0, 1), (1, 0)]
    assert len(within(1.5)) == 9
    assert len(within(2)) == 13


def f_by_hand(probabilities, edges, counted, distance, thresholds):
    """ODS F of small maps, from the parts above, map by map."""
    best = 0.0
    for threshold in thresholds:
        matched = predicted = labelled = 0
        for p, e, c in zip(probabilities, edges, counted, strict=True):
            ridge = thin(non_maximum_suppression(p[None]) * c >= threshold)[0]
            truth = thin((e & c)[None])[0]
            pair = [list(map(tuple, np.argwhere(mask))) for mask in (ridge, truth)]
            matched += largest_matching(*pair, distance)
            predicted, labelled = predicted + len(pair[0]), labelled + len(pair[1])
        precision, recall = matched / max(predicted, 1), matched / labelled
        if matched:
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def test_counts_are_pooled_over_batches(rng):
    edges = rng.random((4, 5, 6)) < 0.25
    counted = rng.random((4, 5, 6)) < 0.8
    probabilities = np.clip(edges * 0.3 + rng.random((4, 5, 6)) * 0.7, 0, 1)
    counts = EdgeCounts(0.0075, thresholds=5)
    for start in (0, 3):
        counts.add(*(values[start : start + 3] for values in (probabilities, edges, counted)))
    assert counts.best_f() == pytest.approx(f_by_hand(probabilities, edges, counted, 1, counts.thresholds))


def test_perfect_shifted_and_absent_edges():
    edges = np.zeros((1, 40, 40), bool)
    edges[0, 20] = True
    every = np.ones_like(edges)

    def f(probability, max_dist=0.0075):
        counts = EdgeCounts(max_dist)
        counts.add(probability, edges, every)
        return counts.best_f()

    sure = edges.astype(np.float32)
    assert f(sure) == 1
    assert f(np.roll(sure, 1, 1)) == 1  # one pixel off is within the tolerance
    assert f(np.roll(sure, 2, 1)) == 0
    assert f(np.roll(sure, 2, 1), max_dist=2.1 / math.hypot(40, 40)) == 1
    assert f(np.zeros_like(sure)) == 0
    # Edges everywhere: the plateau is thinned to little, not rewarded.
    assert f(np.ones_like(sure)) < 0.2
    nothing = EdgeCounts(0.0075)
    nothing.add(sure, np.zeros_like(edges), every)
    assert math.isnan(nothing.best_f())


def test_wide_labels_are_thinned_too():
    wide = np.zeros((1, 40, 40), bool)
    wide[0, 19:22] = True
    counts = EdgeCounts(0.0075)
    counts.add(ndimage.gaussian_filter(wide.astype(float), (0, 1, 1)), wide, np.ones_like(wide))
    assert counts.best_f() > 0.95
