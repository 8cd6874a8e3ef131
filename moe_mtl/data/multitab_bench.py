"""Any number of regression tasks, polynomials of projections whose pairwise cosine is set.

Source: Sinodinos et al., AAAI 2026 (arXiv 2511.09970), the synthetic benchmark MultiTab-Bench: x ~ N(0, I) of length D;
W W^T = P, the matrix with 1 on the diagonal and `correlation` elsewhere;
y_t = sum_{k = 1..degree_t} (x . w_t)^k + noise.

The correlation is the cosine of the weights, not that of the labels; it reaches the labels where all degrees are 1.
Differs from the official code in: a correlation that no such matrix can have is an error, where the code clamps
negative eigenvalues. Standardise the labels, as the processor does: a degree of 4 would else dominate the loss.

Legend: `B` rows, `D` features, `T` tasks.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..tasks import Task
from .errors import DataError
from .splits import DataSplits, content_hash, sizes, take


@dataclass(frozen=True)
class Options:
    """Options of the generator; the defaults are the paper's but for the number of rows (there 1,000,000).

    Attributes:
        degrees: the degree of each task's polynomial; its length is the number of tasks T.
        num_features: D, at least T.
        correlation: cosine between any two tasks' weights, in [-1 / (T - 1), 1].
        noise: sigma, standard deviation of the noise of every task.
        num_rows: rows in all.
        train_share: share of the rows to train on; the rest is halved into validation and test.
        seed: of everything that is drawn.
    """

    degrees: tuple[int, ...] = (1, 3, 2, 3, 4, 2, 3)
    num_features: int = 32
    correlation: float = 0.4
    noise: float = 0.01
    num_rows: int = 100_000
    train_share: float = 0.7
    seed: int = 0


def load(options: Options) -> DataSplits:
    """Features x0, x1, ...; tasks y1, y2, ...

    Raises:
        DataError: a correlation that no matrix has, more tasks than features, a part without rows.
    """
    o = options
    tasks = len(o.degrees)
    if not tasks or min(o.degrees) < 1:
        raise DataError(f"multitab-bench: degrees: expected integers of at least 1, found {list(o.degrees)}")
    if tasks > o.num_features:
        raise DataError(
            f"multitab-bench: num_features: expected at least one per task, {tasks}, found {o.num_features}"
        )
    low = -1 / (tasks - 1) if tasks > 1 else -1.0
    if not low <= o.correlation <= 1:
        raise DataError(
            f"multitab-bench: correlation: expected a number in [{low:.4f}, 1] for {tasks} tasks, found {o.correlation}"
        )
    train = round(o.num_rows * o.train_share)
    rows = (train, (o.num_rows - train) // 2, o.num_rows - train - (o.num_rows - train) // 2)
    if min(rows) < 1:
        raise DataError(f"multitab-bench: expected at least one row in each part, found {rows}")
    random = np.random.default_rng(o.seed)
    w_TD = task_weights(tasks, o.num_features, o.correlation, random)
    x_BD = random.standard_normal((o.num_rows, o.num_features))
    s_BT = x_BD @ w_TD.T
    y_BT = o.noise * random.standard_normal(s_BT.shape)
    for t, degree in enumerate(o.degrees):
        y_BT[:, t] += sum(s_BT[:, t] ** k for k in range(1, degree + 1))
    names = [f"y{t + 1}" for t in range(tasks)]
    columns = {f"x{i}": x_BD[:, i] for i in range(o.num_features)} | {name: y_BT[:, t] for t, name in enumerate(names)}
    parts = take(pa.table(columns), np.repeat([0, 1, 2], rows))
    info = {"name": "multitab-bench", "licence": "generated", "sha256": content_hash(x_BD, y_BT), "rows": sizes(parts)}
    features = [{"name": f"x{i}", "kind": "numeric", "bins": None} for i in range(o.num_features)]
    return DataSplits(**parts, features=features, tasks=[Task(name, "regression") for name in names], info=info)


def task_weights(tasks: int, num_features: int, correlation: float, random: np.random.Generator) -> np.ndarray:
    """W `[T, D]` with W W^T = P: the square root of P times orthonormal rows."""
    gram_TT = np.full((tasks, tasks), correlation) + (1 - correlation) * np.eye(tasks)
    eigenvalues, vectors = np.linalg.eigh(gram_TT)
    u_DT, _ = np.linalg.qr(random.standard_normal((num_features, tasks)))
    return vectors @ np.diag(np.sqrt(np.maximum(eigenvalues, 0))) @ u_DT.T  # the maximum only removes rounding below 0
