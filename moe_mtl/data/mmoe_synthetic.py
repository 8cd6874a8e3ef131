"""Two regression tasks whose relatedness is set by one number.

Source: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018,
section 3.2: orthonormal u1, u2; w1 = c u1; w2 = c (rho u1 + sqrt(1 - rho^2) u2); x ~ N(0, I);
y_t = w_t . x + sum_i sin(alpha_i w_t . x + beta_i) + noise.

alpha and beta are shared by the tasks and drawn from N(0, frequency^2) and N(0, 1): the correlation of the labels
varies from draw to draw, so average over at least 20 seeds.

Legend: `B` rows, `D` features, `T` tasks.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..tasks import Task
from .errors import DataError
from .splits import DataSplits, content_hash, sizes, take


@dataclass(frozen=True)
class Options:
    """Options of the generator; the defaults are the paper's.

    Attributes:
        correlation: rho, the cosine between the two weight vectors, in [-1, 1].
        num_features: length of x.
        scale: c, the length of the weight vectors.
        num_sines: terms in the sum of sines.
        frequency: standard deviation of alpha: how often the sines bend. The paper does not give its own.
        noise: standard deviation of the noise.
        train_rows, validation_rows, test_rows: how many rows.
        seed: of everything that is drawn.
    """

    correlation: float = 0.8
    num_features: int = 100
    scale: float = 0.3
    num_sines: int = 5
    frequency: float = 1.0
    noise: float = 0.1
    train_rows: int = 10_000
    validation_rows: int = 1_000
    test_rows: int = 1_000
    seed: int = 0


def load(options: Options) -> DataSplits:
    """Features x0, x1, ...; tasks y1 and y2.

    Raises:
        DataError: a correlation outside [-1, 1], fewer than two features, a part without rows.
    """
    o = options
    if not -1 <= o.correlation <= 1:
        raise DataError(f"mmoe-synthetic: correlation: expected a number in [-1, 1], found {o.correlation}")
    if o.num_features < 2:
        raise DataError(f"mmoe-synthetic: num_features: expected at least 2, found {o.num_features}")
    rows = (o.train_rows, o.validation_rows, o.test_rows)
    if min(rows) < 1:
        raise DataError(f"mmoe-synthetic: expected at least one row in each part, found {rows}")
    random = np.random.default_rng(o.seed)
    u_D2, _ = np.linalg.qr(random.standard_normal((o.num_features, 2)))
    mix = np.array([[1.0, o.correlation], [0.0, math.sqrt(1 - o.correlation**2)]])
    w_DT = o.scale * u_D2 @ mix
    alpha, beta = random.standard_normal((2, o.num_sines)) * np.array([[o.frequency], [1.0]])
    x_BD = random.standard_normal((sum(rows), o.num_features))
    s_BT = x_BD @ w_DT
    y_BT = s_BT + np.sin(s_BT[..., None] * alpha + beta).sum(-1) + o.noise * random.standard_normal(s_BT.shape)
    table = pa.table({f"x{i}": x_BD[:, i] for i in range(o.num_features)} | {"y1": y_BT[:, 0], "y2": y_BT[:, 1]})
    parts = take(table, np.repeat([0, 1, 2], rows))
    info = {"name": "mmoe-synthetic", "licence": "generated", "sha256": content_hash(x_BD, y_BT), "rows": sizes(parts)}
    features = [{"name": f"x{i}", "kind": "numeric", "bins": None} for i in range(o.num_features)]
    return DataSplits(**parts, features=features, tasks=[Task("y1", "regression"), Task("y2", "regression")], info=info)
