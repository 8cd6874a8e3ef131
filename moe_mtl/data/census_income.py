"""Census-Income (KDD): 299,285 persons of the US Current Population Surveys of 1994 and 1995, 40 attributes.

Source: UCI Machine Learning Repository, 2000 (doi:10.24432/C5N30T, CC BY 4.0). The multi-task protocol is that of Ma
et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018, section 5:
the label columns of the tasks in use are removed from the inputs. `instance_weight` is a survey weight and no input.

Two protocols:

- census-income, the papers': `path` is a folder with both UCI files, which you fetch yourself. Train on
  `census-income.data` (199,523 rows); `census-income.test` is halved into validation and test.
- census-income-half: the file `census-income.test` alone (99,762 rows), cut by the sha256 of the row number: 6 / 2 / 2
  tenths. This is the one file that is fetched where no `path` is given. Its numbers must not be set beside those of
  papers.
"""

import gzip
import hashlib
import io
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ..files import write_atomically
from ..naming import nearest
from ..tasks import Task
from .errors import DataError
from .splits import PARTS, DataSplits, sha256_tenth, sizes, take

COLUMNS = (
    *("age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college"),
    *("marital_stat", "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member"),
    *("unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat"),
    *("region_prev_res", "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa"),
    *("mig_chg_reg", "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father"),
    *("country_mother", "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked"),
    *("year", "income_50k"),
)
NUMERIC = ("age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked")
COLLEGE = (
    "Associates degree-occup /vocational",
    "Associates degree-academic program",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
LABELS: dict[str, dict[str, Any]] = {
    "income": {"column": "income_50k", "positive": "50000+.", "negative": "- 50000."},
    "never_married": {"column": "marital_stat", "positive": "Never married"},
    "education": {"column": "education", "positive": list(COLLEGE)},
}
# sha256 of the unpacked file, so that the packed and the plain one are the same data.
TEST_SHA256 = "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c"
TEST_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/census-income-mld/census-income.test.gz"
TEST_ROWS, TRAIN_ROWS = 99_762, 199_523
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Options:
    """Options of Census-Income.

    Attributes:
        path: the file `census-income.test`, or a folder with `census-income.data` and `census-income.test`, each plain
            or `.gz`. By default `census-income.test`, and that file only, is fetched from UCI and checked against a
            pinned hash: the protocol is then census-income-half.
        tasks: which of income (above 50,000 dollars), never_married, education (Associates degree and above).
        exclude: columns kept from the inputs beyond the label columns of `tasks`; a model that is to get the task
            education later must not have seen that column. `income_50k` and `instance_weight` never are inputs.
        cache: the folder that keeps the fetched file.
    """

    path: str | Path | None = None
    tasks: tuple[str, ...] = ("income", "never_married")
    exclude: tuple[str, ...] = ()
    cache: str | Path = "~/.cache/moe_mtl"


def load(options: Options) -> DataSplits:
    """Reads the file or files and cuts them; the tables keep all 42 columns, the features name the inputs among them.

    Raises:
        DataError: an unknown task or column, a file that is not the UCI one, no network for the download.
        FileNotFoundError: no such path.
    """
    for task in options.tasks:
        if task not in LABELS:
            raise DataError(f"census-income: unknown task {task!r}{nearest(task, LABELS)}")
    for column in options.exclude:
        if column not in COLUMNS:
            raise DataError(f"census-income: exclude: unknown column {column!r}{nearest(column, COLUMNS)}")
    path = Path(options.path).expanduser() if options.path is not None else None
    if path is not None and not path.exists():
        raise FileNotFoundError(f"census-income: no such file or folder: {path}")
    if path is not None and path.is_dir():
        name, parts, digest = _both(path)
    else:
        name, parts, digest = _one(path, Path(options.cache).expanduser())
    removed = {LABELS[task]["column"] for task in options.tasks} | {
        "instance_weight",
        "income_50k",
        *options.exclude,
    }
    features = [{"name": c, "kind": "numeric" if c in NUMERIC else "categorical"} for c in COLUMNS if c not in removed]
    return DataSplits(
        **parts,
        features=features,
        tasks=[Task(task, "binary") for task in options.tasks],
        labels={task: dict(LABELS[task]) for task in options.tasks},
        info={"name": name, "licence": "CC-BY-4.0", "sha256": digest, "rows": sizes(parts)},
    )


def _both(folder: Path) -> tuple[str, dict[str, pa.Table], str]:
    found = []
    for stem, rows in (("census-income.data", TRAIN_ROWS), ("census-income.test", TEST_ROWS)):
        present = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
        if not present:
            raise FileNotFoundError(f"census-income: expected {stem} or {stem}.gz in {folder}")
        content = _unpacked(present[0].read_bytes(), str(present[0]))
        found.append((parse(content, str(present[0]), rows), content))
    (train, train_bytes), (test, test_bytes) = found
    halves = take(test, 1 + sha256_tenth(len(test)) % 2)
    return "census-income", halves | {"train": train}, hashlib.sha256(train_bytes + test_bytes).hexdigest()


def _one(path: Path | None, cache: Path) -> tuple[str, dict[str, pa.Table], str]:
    where = str(path) if path is not None else TEST_URL
    content = _unpacked(path.read_bytes(), where) if path is not None else _fetched(cache)
    digest = hashlib.sha256(content).hexdigest()
    table = parse(content, where)
    if len(table) == TRAIN_ROWS:
        raise DataError(
            f"census-income: {where} holds the {TRAIN_ROWS} training rows alone; give the folder with both files"
        )
    tenth = sha256_tenth(len(table))
    name = "census-income-half" if digest == TEST_SHA256 else f"census-income-other-{digest[:8]}"
    parts = take(table, np.where(tenth < 6, 0, np.where(tenth < 8, 1, 2)))
    if not all(len(parts[part]) for part in PARTS):
        raise DataError(f"census-income: {where}: expected rows for train, validation and test, found {sizes(parts)}")
    return name, parts, digest


def parse(content: bytes, where: str, rows: int | None = None) -> pa.Table:
    """The UCI format as a table: numbers for the seven numeric columns, text elsewhere, null for `?`.

    Args:
        content: the unpacked file.
        where: names it in errors.
        rows: how many rows there must be.

    Raises:
        DataError: empty, not 42 columns, text where numbers belong, another number of rows.
    """
    if not content.strip():
        raise DataError(f"census-income: {where}: the file is empty")
    # In pyarrow's C++ the values stay as they are, with the blank that follows each comma.
    try:
        raw = pa.csv.read_csv(
            io.BytesIO(content),
            pa.csv.ReadOptions(column_names=list(COLUMNS)),
            pa.csv.ParseOptions(quote_char=False),
            pa.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False),
        )
        columns = {name: pc.utf8_trim_whitespace(raw[name]) for name in COLUMNS}
        for name in COLUMNS:
            if name in NUMERIC:
                columns[name] = columns[name].cast(pa.int64())
            elif name == "instance_weight":
                columns[name] = columns[name].cast(pa.float64())
            else:
                columns[name] = pc.if_else(pc.equal(columns[name], "?"), pa.scalar(None, pa.string()), columns[name])
    except pa.ArrowInvalid as error:
        raise DataError(f"census-income: {where}: not the UCI file of {len(COLUMNS)} columns: {error}") from None
    if rows is not None and raw.num_rows != rows:
        raise DataError(f"census-income: {where}: expected {rows} rows, found {raw.num_rows}")
    return pa.table(columns)


def _unpacked(content: bytes, where: str) -> bytes:
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            out = file.read(MAX_BYTES)
            if file.read(1):
                raise DataError(f"census-income: {where}: expected at most {MAX_BYTES} bytes once unpacked, found more")
            return out
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"census-income: {where}: broken gzip file: {error}") from None


def _fetched(cache: Path) -> bytes:
    """The unpacked test file from the cache, or from UCI; its hash is checked either way."""
    path = cache / TEST_URL.rsplit("/", 1)[1]
    if path.is_file():
        content = _unpacked(path.read_bytes(), str(path))
        if hashlib.sha256(content).hexdigest() == TEST_SHA256:
            return content
    try:
        with urllib.request.urlopen(TEST_URL, timeout=60) as response:
            packed = response.read(MAX_BYTES)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"census-income: cannot fetch {TEST_URL} ({error}); fetch it where there is a network and give its 'path'"
        ) from None
    content = _unpacked(packed, TEST_URL)
    if (digest := hashlib.sha256(content).hexdigest()) != TEST_SHA256:
        raise DataError(f"census-income: {TEST_URL}: expected content of sha256 {TEST_SHA256}, found {digest}")
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(path, packed)
    return content
