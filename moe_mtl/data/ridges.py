"""Lines of one pixel from a map of how likely each pixel is an edge.

Shapes: `B` maps, `H`, `W` height and width in pixels.
"""

import numpy as np
from scipy import ndimage


def non_maximum_suppression(map_BHW: np.ndarray) -> np.ndarray:
    """Keeps what is no smaller than its two neighbours across the edge, and sets all else to 0.

    The direction across is that of the greatest second derivative of the smoothed map (Dollar and Zitnick, "Fast edge
    detection using structured forests", PAMI 2015, section 2.4); the neighbours, one pixel away, are interpolated.
    """
    map_BHW = map_BHW.astype(np.float64)
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    smooth_BHW = map_BHW
    for axis in (1, 2):
        smooth_BHW = ndimage.convolve1d(smooth_BHW, triangle, axis=axis, mode="reflect")
    dy_BHW, dx_BHW = np.gradient(smooth_BHW, axis=(1, 2))
    dyy_BHW = np.gradient(dy_BHW, axis=1)
    dxy_BHW, dxx_BHW = np.gradient(dx_BHW, axis=(1, 2))
    angle_BHW = np.arctan(dyy_BHW * np.sign(-dxy_BHW) / (dxx_BHW + 1e-5))
    cos_BHW, sin_BHW = np.cos(angle_BHW), np.sin(angle_BHW)
    b_B11, y_1H1, x_11W = np.ogrid[tuple(slice(n) for n in map_BHW.shape)]
    b_BHW = np.broadcast_to(b_B11, map_BHW.shape)
    largest_BHW = np.ones(map_BHW.shape, bool)
    for step in (-1, 1):
        place = np.stack([b_BHW, y_1H1 + step * sin_BHW, x_11W + step * cos_BHW])
        largest_BHW &= map_BHW >= ndimage.map_coordinates(map_BHW, place, order=1, mode="nearest")
    return np.where(largest_BHW, map_BHW, 0.0)
