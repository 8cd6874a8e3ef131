"""LoRA experts beside PEFT's LoRA of the same rank: steps of training, tasks, what is left of a task, memory.

Every method does the same work: one base of random weights, which all share, one batch, all linear layers adapted, or
those that a method can take, and by LoRA beside it the same. Before anything is timed each method's output is held to
the base's, as adapters start at nothing. `r` is what a config calls so: of one expert where a method has several. So
LoRA is measured at `r`, and again at as many ranks as the method has in all. A method's own row holds everything it is
compared with, measured in turns; ratios are medians of ratios within a round. LoRA's row compares it with itself: what
its ratio differs from 1 by is noise.

Parts: `step` is forward, backward, AdamW and the balance of methods that have one; `mixed` a batch of several tasks
beside one of a single task; `more` the step with ten times the tasks; `forward` the base model, with the adapter beside
the weights, and with one task extracted and merged; `memory` what a step holds at its peak, and what trains.
"""

import copy
import dataclasses
import gc
import importlib.util
import io
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PolyConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ..tuners import METHODS, RankConfig, extract_task
from ..tuners._base import RankAdapter
from .memory import give_back_what_is_freed, peak_of_call
from .report import aligned, require_known, to_stderr, write
from .timing import Timing, alternate, torch_threads

PARTS = ("step", "mixed", "more", "forward", "memory")
PEERS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "POLY": PolyConfig}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MORE = 10
HEAD = 64
VOCABULARY = 512
# At most this multiple is asked for: of LoRA's step, of a batch of one task, of the step with fewer tasks, of the base.
ASKED = {"step": 1.25, "mixed": 1.15, "more": 1.20, "merged": 1.0}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Where not told: width, layers, tokens of a sample, dtype.
SIZES = {"cpu": (512, 4, 64, "float32"), "cuda": (2048, 8, 256, "bfloat16")}
# What a call of some method takes besides the batch, from a task's number per sample and the number of tasks.
CALLS: dict[str, Callable[[list[int], int], Any]] = {
    "tasks": lambda numbers, tasks: [task_names(tasks)[number] for number in numbers],
    "task_ids": lambda numbers, tasks: torch.tensor(numbers),
    "preference": lambda numbers, tasks: [1 / tasks] * tasks,
}
REFUSALS = (AttributeError, NotImplementedError, TypeError, ValueError)


class LeftOutError(Exception):
    """A method that cannot be measured here; says why."""


def known_methods() -> dict[str, type[PeftConfig]]:
    """Name -> config: the peers, then every method of the package."""
    return PEERS | {str(name): config for config, name in METHODS.items()}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        methods: names as PEFT knows them, like MTL_LORA; by default all, and POLY of PEFT. LORA is always there.
        parts: of step, mixed, more, forward, memory.
        r: rank of every method, and of LoRA; of one expert where a method has several.
        tasks: of methods that tell tasks apart; ten times as many for the part more.
        width: of the base model; by default 512, on a GPU 2048. Its MLP is 2.75 times as wide.
        layers: of the base model; by default 4, on a GPU 8.
        batch: samples of a step.
        length: tokens of a sample; by default 64, on a GPU 256.
        dtype: of the base model; by default float32, on a GPU bfloat16.
        device: cpu or cuda; by default cuda where there is one.
        rounds: measurements of each contender.
        slice_seconds: how long a measurement lasts at least.
        threads: of torch; its own choice by default.
        seed: of weights and tokens.
        output: folder for tuners.json and tuners.svg.
    """

    methods: tuple[str, ...] | None = None
    parts: tuple[str, ...] = PARTS
    r: int = 8
    tasks: int = 8
    width: int | None = None
    layers: int | None = None
    batch: int = 16
    length: int | None = None
    dtype: str | None = None
    device: str | None = None
    rounds: int = 9
    slice_seconds: float = 0.2
    threads: int | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        require_known(self, {"parts": PARTS})
        if self.methods is not None:
            require_known(self, {"methods": known_methods()})
        if self.device not in (None, *SIZES):
            raise ValueError(f"device: expected cpu or cuda, found {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected one that is here, found cuda")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, found {self.dtype!r}")
        least = {"r": 1, "tasks": 2, "width": 1, "layers": 1, "batch": 2, "length": 2, "rounds": 1}
        for name, number in least.items():
            found = getattr(self, name)
            if found is not None and found < number:
                raise ValueError(f"{name}: expected at least {number}, found {found}")
        if self.width is not None and self.width % 4:
            raise ValueError(f"width: expected a multiple of 4, found {self.width}")

    def resolved(self) -> "Options":
        """With every default of the device told."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        names = ("width", "layers", "length", "dtype")
        sizes = {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in zip(names, SIZES[device], strict=True)
        }
        chosen = dict.fromkeys(["LORA", *(known_methods() if self.methods is None else self.methods)])
        return dataclasses.replace(self, device=device, methods=tuple(chosen), **sizes)


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures.

    Returns:
        as JSON types: `rows`, one per method, each with what its contenders took; `left_out`, method -> why; and
        `criteria`, part -> the worst of the package's methods, beside what is asked.

    Raises:
        RuntimeError: a method computes something else than it should.
    """
    options = options.resolved()
    rows, left_out = [], {}
    with torch_threads(options.threads):
        threads = torch.get_num_threads()
        base = base_model(options)
        for name in options.methods or ():
            try:
                rows.append(_row(name, base, options))
                progress(f"{name}: timed")
            except LeftOutError as reason:
                left_out[name] = str(reason)
                progress(f"{name}: left out, {reason}")
            gc.collect()  # models are in cycles, and on a GPU many do not fit
        parameters = sum(p.numel() for p in base.parameters())
    del base
    if "memory" in options.parts:
        for row in rows:
            row["memory"] = _in_a_process(row["method"], options, threads)
            progress(f"{row['method']}: memory measured")
    result = {
        "bench": "tuners",
        "options": asdict(options),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": threads,
        "base_parameters": parameters,
        "rows": rows,
        "left_out": left_out,
        "criteria": criteria(rows),
    }
    write(result, options.output, plot(result))
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


# What is compared.


def base_model(options: Options) -> LlamaForCausalLM:
    """A Llama of random weights."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // HEAD),
        vocab_size=VOCABULARY,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device(options.device or "cpu"):
        return LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()


def batch_of(options: Options) -> Tensor:
    """Tokens, the same for every contender; they are the labels too."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(VOCABULARY, (options.batch, options.length), generator=generator).to(options.device)


def task_names(number: int) -> list[str]:
    return [f"task_{i}" for i in range(number)]


def settings(config_class: type[PeftConfig], options: Options, number: int, /, **given: Any) -> PeftConfig:
    """A config of a method, from the fields that its class has: the same rank, scale, layers and number of tasks.

    Raises:
        LeftOutError: it needs something of which nothing is known here.
    """
    known: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": list(TARGETS),
        "r": options.r,
        "alpha": 2.0 * options.r,
        "lora_alpha": 2 * options.r,
        "num_selected": max(1, options.r // 4),
        "n_tasks": number,
    }
    if _by_task(config_class):
        known["tasks"] = task_names(number)
    known |= given
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    no_default = dataclasses.MISSING
    needed = {name for name, f in fields.items() if f.default is no_default and f.default_factory is no_default}
    if "tasks" in needed:
        known.setdefault("tasks", task_names(number))
    if needed - known.keys():
        names = ", ".join(sorted(needed - known.keys()))
        raise LeftOutError(f"its config needs {names}, of which nothing is known here")
    try:
        return config_class(**{name: value for name, value in known.items() if name in fields})
    except REFUSALS as error:
        if _named(error) == "tasks" and "tasks" not in known:  # for all of which it does the same
            return settings(config_class, options, number, **given, tasks=task_names(number))
        raise LeftOutError(f"its config refuses what is known here: {_reason(error)}") from error


def _by_task(config_class: type[PeftConfig]) -> bool:
    return issubclass(config_class, RankConfig) and config_class.adapter_class.by_task


def _named(error: Exception) -> str:
    """The field or keyword that an error is about."""
    return str(error).partition(":")[0]


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def adapted(base: nn.Module, config: PeftConfig) -> PeftModel:
    """The base with an adapter, in training mode; the base's tensors are shared, not copied."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return get_peft_model(copy.deepcopy(base, shared), config).train()


def fitted(config_class: type[PeftConfig], base: nn.Module, options: Options) -> tuple[PeftConfig, PeftModel]:
    """All linear layers adapted; of a method that does not take them, the layers of its own choice.

    Raises:
        LeftOutError: the base model cannot be adapted.
    """
    config = settings(config_class, options, options.tasks)
    try:
        return config, adapted(base, config)
    except REFUSALS as error:
        if _named(error) != "target_modules":
            raise LeftOutError(f"the base model cannot be adapted: {_reason(error)}") from error
        config = settings(config_class, options, options.tasks, target_modules=None)
        try:
            return config, adapted(base, config)
        except REFUSALS:
            raise LeftOutError(f"it adapts other layers: {_reason(error)}") from error


def keywords(names: Sequence[str], options: Options, tasks: int, single: bool = False) -> dict[str, Any]:
    """What a call takes besides the batch: tasks in turns, or one for all samples."""
    numbers = [0 if single else i % tasks for i in range(options.batch)]
    found = {name: CALLS[name](numbers, tasks) for name in names}
    return {name: value.to(options.device) if isinstance(value, Tensor) else value for name, value in found.items()}


def asked_by(config: PeftConfig, model: PeftModel, ids_BL: Tensor, options: Options) -> list[str]:
    """Names of what a call takes: what a refusal names is given in the next try.

    Raises:
        LeftOutError: a call needs something of which nothing is known here.
    """
    names = ["task_ids"] if isinstance(config, PolyConfig) else ["tasks"] if _by_task(type(config)) else []
    while True:
        try:
            forward_of(model, ids_BL, keywords(names, options, options.tasks))()
            return names
        except REFUSALS as error:
            if _named(error) not in CALLS or _named(error) in names:
                raise LeftOutError(f"a call is refused: {_reason(error)}") from error
            names.append(_named(error))


def step_of(model: PeftModel, ids_BL: Tensor, call: Mapping[str, Any]) -> Callable[[], object]:
    """Forward, backward, the optimiser, and the balance of a method that has one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    balances = any(
        isinstance(module, RankAdapter) and type(module).update_balance is not RankAdapter.update_balance
        for module in model.modules()
    )
    tuner: Any = model.base_model

    def step() -> None:
        model(input_ids=ids_BL, labels=ids_BL, **call).loss.backward()
        optimizer.step()
        if balances:
            tuner.update_balance()
        optimizer.zero_grad()

    return step


def forward_of(model: nn.Module, ids_BL: Tensor, call: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The logits, without gradients."""

    @torch.no_grad()
    def forward() -> Tensor:
        return model(input_ids=ids_BL, **call).logits

    return forward


def ranks_of(model: nn.Module) -> dict[str, int] | None:
    """Ranks in all of one adapter, before and after what is between its projections; None where not all have the two
    projections of the shared layer, as of peers."""
    adapters: Any = [module for module in model.modules() if isinstance(module, RankAdapter)]
    if not adapters or not all(hasattr(adapter, "a_RD") and hasattr(adapter, "b_OP") for adapter in adapters):
        return None
    return {
        "down": max(len(adapter.a_RD) for adapter in adapters),
        "up": max(adapter.b_OP.shape[1] for adapter in adapters),
    }


def linear_layers(base: nn.Module, model: PeftModel) -> list[str]:
    """Names of the base's linear layers that are adapted, or are inside of what is."""
    targeted = tuple(model.targeted_module_names)
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and any(f"{name}.".startswith(f"{target}.") for target in targeted)
    ]


class _Kernels(TorchDispatchMode):
    """Sees whether kernels of the package run, into which nobody looks."""

    ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran = self.ran or func.namespace == "moe_mtl"
        return func(*args, **(kwargs or {}))


def operations_of(step: Callable[[], object]) -> int | None:
    """Of the matrix products of a step; None where some are inside of kernels."""
    with FlopCounterMode(display=False) as counter, _Kernels() as kernels:
        step()
    return None if kernels.ran else counter.get_total_flops()


def _require_same(what: str, found: Tensor, expected: Tensor) -> None:
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not error < TOLERANCE[expected.dtype]:
        raise RuntimeError(f"{what} computes something else: its output is off by {error:.1e}")


# Measuring.


def _row(name: str, base: LlamaForCausalLM, options: Options) -> dict[str, Any]:
    ids_BL = batch_of(options)
    config, model = fitted(known_methods()[name], base, options)
    names = asked_by(config, model, ids_BL, options)
    found = forward_of(model, ids_BL, keywords(names, options, options.tasks))()
    _require_same(f"{name} before training", found, forward_of(base, ids_BL, {})())
    ranks = ranks_of(model)
    row: dict[str, Any] = {
        "method": name,
        "peer": name in PEERS,
        "call": names,
        "targets": sorted(_targets(config)),
        "ranks": ranks,
        "parameters": _trained(model),
    }
    row |= _steps(config, names, model, base, max(ranks.values()) if ranks else options.r, options)
    del model
    if "forward" in options.parts:
        row["forward"] = _forwards(config, names, base, options)
    return row


def _steps(
    config: PeftConfig,
    names: Sequence[str],
    model: PeftModel,
    base: LlamaForCausalLM,
    all_ranks: int,
    options: Options,
) -> dict[str, Any]:
    ids_BL = batch_of(options)
    parts = set(options.parts) - (set() if {"tasks", "task_ids"} & set(names) else {"mixed", "more"})
    calls: dict[str, Callable[[], object]] = {}
    if "step" in parts:
        layers = linear_layers(base, model)
        lora = settings(LoraConfig, options, options.tasks, target_modules=layers)
        calls["lora"] = step_of(adapted(base, lora), ids_BL, {})
        if all_ranks != options.r:
            more_ranks = {"r": all_ranks, "lora_alpha": 2 * all_ranks, "target_modules": layers}
            wide = settings(LoraConfig, options, options.tasks, **more_ranks)
            calls["lora_all_ranks"] = step_of(adapted(base, wide), ids_BL, {})
    if parts & {"step", "mixed", "more"}:
        calls["step"] = step_of(model, ids_BL, keywords(names, options, options.tasks))
    if "mixed" in parts:
        single = keywords(names, options, options.tasks, single=True)
        calls["single"] = step_of(adapted(base, config), ids_BL, single)
    if "more" in parts:
        number = MORE * options.tasks
        more = settings(type(config), options, number, target_modules=_targets(config))
        calls["more"] = step_of(adapted(base, more), ids_BL, keywords(names, options, number))
    if not calls:
        return {}
    operations = {name: operations_of(call) for name, call in calls.items()}
    timings = alternate(calls, options.rounds, options.slice_seconds, _wait(options))
    found: dict[str, Any] = {
        "seconds": {name: timing.median for name, timing in timings.items()},
        "operations": operations,
        "ratios": {},
    }
    for ratio, of, to in (
        ("step", "step", "lora"),
        ("step_all_ranks", "step", "lora_all_ranks"),
        ("mixed", "step", "single"),
        ("more", "more", "step"),
    ):
        if of in timings and to in timings:
            found["ratios"][ratio] = compared(timings[of], timings[to])
            counted, other = operations[of], operations[to]
            found["ratios"][ratio]["operations"] = counted / other if counted and other else None
    if "lora_all_ranks" in calls:
        found["lora_all_ranks"] = all_ranks
    return found


def _forwards(config: PeftConfig, names: Sequence[str], base: LlamaForCausalLM, options: Options) -> dict[str, Any]:
    """The base, and itself again; LoRA; the method's adapter; one task merged. Adapters are not at nothing here."""
    ids_BL = batch_of(options)
    given: dict[str, Any] = {"init_weights": False, "init_lora_weights": False}
    torch.manual_seed(options.seed)
    config = settings(type(config), options, options.tasks, target_modules=_targets(config), **given)
    model = adapted(base, config).eval()
    single = keywords(names, options, options.tasks, single=True)
    lora = adapted(base, settings(LoraConfig, options, options.tasks, **given)).eval()
    calls = {
        "base": forward_of(base, ids_BL, {}),
        "again": forward_of(base, ids_BL, {}),
        "lora": forward_of(lora, ids_BL, {}),
        "adapter": forward_of(model, ids_BL, single),
    }
    merged, why_not = merged_task(config, model, single)
    numbers: dict[str, Any] = {"why_not_merged": why_not, "merged_parameters": None}
    if merged is not None:
        calls["merged"] = forward_of(merged, ids_BL, {})
        _require_same(f"{type(config).__name__}, merged,", calls["merged"](), calls["adapter"]())
        numbers["merged_parameters"] = sum(parameter.numel() for parameter in merged.parameters())
        expected = sum(parameter.numel() for parameter in base.parameters())
        if numbers["merged_parameters"] != expected:
            raise RuntimeError(f"merged: expected {expected} parameters, found {numbers['merged_parameters']}")
    timings = alternate(calls, options.rounds, options.slice_seconds, _wait(options))
    return {
        "seconds": {name: timing.median for name, timing in timings.items()},
        "ratios": {name: compared(timing, timings["base"]) for name, timing in timings.items() if name != "base"},
        **numbers,
    }


def merged_task(config: PeftConfig, model: PeftModel, call: Mapping[str, Any]) -> tuple[nn.Module | None, str | None]:
    """A base model of its own with one task of the adapter merged; or None and why not."""
    task = call["tasks"][0] if "tasks" in call else None
    more = {name: call[name] for name in ("preference",) if name in call}
    own = copy.deepcopy(model)  # merging writes into the base's weights
    try:
        merged: Any = (extract_task(own, task, **more) if isinstance(config, RankConfig) else own).merge_and_unload()
    except REFUSALS as error:
        return None, str(error) or f"{type(error).__name__} from PEFT's {config.peft_type.value}"
    return merged.eval(), None


def compared(timing: Timing, other: Timing) -> dict[str, float]:
    """Median over the rounds of one's time over the other's, and between which the middle half of them lies."""
    ratios = sorted(a / b for a, b in zip(timing.seconds, other.seconds, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratio": timing.ratio(other), "low": low, "high": high}


def _in_a_process(name: str, options: Options, threads: int) -> int | None:
    """Of its own: what `peak_of_call` does to it may make it slow."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, name, options, threads).result()


def _peak(name: str, options: Options, threads: int) -> int | None:
    give_back_what_is_freed()
    warnings.simplefilter("ignore")  # as the command line does in its own process
    with torch_threads(threads):
        config, model = fitted(known_methods()[name], base_model(options), options)
        names = asked_by(config, model, batch_of(options), options)
        step = step_of(model, batch_of(options), keywords(names, options, options.tasks))
        return peak_of_call(step, options.device or "cpu")


def _targets(config: Any) -> list[str]:
    return [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules or ())


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _wait(options: Options) -> Callable[[], object]:
    return torch.cuda.synchronize if options.device == "cuda" else lambda: None


# Telling.


def ratio_of(row: Mapping[str, Any], part: str) -> Mapping[str, float] | None:
    """What a row found for one of the parts that something is asked of."""
    place = row.get("forward", {}) if part == "merged" else row
    return place.get("ratios", {}).get(part)


def criteria(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Part -> the worst ratio of the package's methods, whose it is, and what is asked. Peers do not count."""
    found = {}
    for part, asked in ASKED.items():
        own = {row["method"]: ratio_of(row, part) for row in rows if not row["peer"]}
        ratios = {name: ratio["ratio"] for name, ratio in own.items() if ratio is not None}
        if ratios:
            worst = max(ratios, key=ratios.__getitem__)
            found[part] = {"worst": ratios[worst], "method": worst, "asked": asked}
    return found


def table(result: Mapping[str, Any]) -> str:
    """Steps, then forwards, then what is asked; what was not measured is told at the end."""
    options, rows = result["options"], result["rows"]
    lines = [
        f"torch {result['torch']}, {result['device']}, {result['threads']} threads, {options['dtype']}; base of "
        f"{result['base_parameters']:,} parameters, width {options['width']}, {options['layers']} layers; "
        f"{options['batch']} x {options['length']} tokens, {options['tasks']} tasks, r {options['r']}"
    ]
    if any("seconds" in row or "memory" in row for row in rows):
        lines += [
            "",
            "training step: milliseconds; a multiple of LoRA's time and operations, of LoRA of the same r and of LoRA "
            "of as many ranks in all;",
            f"a mixed batch as a multiple of a single task's; {MORE} times the tasks; what a step holds at its peak "
            "beyond weights and the optimiser's state.",
            "In brackets where the middle half of the rounds lies.",
            "",
            *_step_table(rows),
        ]
    if any("forward" in row for row in rows):
        lines += ["", "forward: milliseconds of the base; the others as multiples of it", "", *_forward_table(rows)]
    lines.append("")
    for name, reason in result["left_out"].items():
        lines.append(f"left out: {name}, {reason}")
    for row in rows:
        if row["targets"] != sorted(TARGETS):
            lines.append(
                f"not all linear layers: {row['method']} adapts {', '.join(row['targets'])}, LoRA beside it the same"
            )
        if row.get("forward", {}).get("why_not_merged"):
            lines.append(f"not merged: {row['forward']['why_not_merged']}")
    told = {"step": "step / LoRA", "mixed": "mixed / single", "more": "ten times the tasks", "merged": "merged / base"}
    worst = [
        f"{told[part]} {found['worst']:.2f} ({found['method']}; asked {found['asked']:.2f})"
        for part, found in result["criteria"].items()
    ]
    if worst:
        lines.append(f"worst: {'; '.join(worst)}{_noise(rows)}")
    return "\n".join(lines)


def _noise(rows: Sequence[Mapping[str, Any]]) -> str:
    itself = next((row for row in rows if row["method"] == "LORA"), {})
    noise = [("LoRA", ratio_of(itself, "step")), ("the base", itself.get("forward", {}).get("ratios", {}).get("again"))]
    told = [f"{name} {found['ratio']:.2f}" for name, found in noise if found is not None]
    return f"; beside itself {', '.join(told)}" if told else ""


def _step_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["method", "ranks down", "up", "trained", "ms", "/ LoRA", "operations", "/ LoRA all", "operations"]
    header += ["mixed", "more", "MiB"]
    cells = []
    for row in rows:
        ratios, ranks, seconds = row.get("ratios", {}), row["ranks"] or {}, row.get("seconds", {})
        line = [row["method"], *(str(ranks.get(name, "")) for name in ("down", "up")), f"{row['parameters']:,}"]
        line.append(f"{seconds['step'] * 1e3:,.1f}" if seconds else "")
        for name in ("step", "step_all_ranks"):
            found = ratios.get(name, {})
            line += [_told(found), f"{found['operations']:.2f}" if found.get("operations") else ""]
        line += [_told(ratios.get(name, {})) for name in ("mixed", "more")]
        line.append(f"{row['memory'] / 2**20:,.1f}" if row.get("memory") is not None else "")
        cells.append(line)
    return aligned(header, cells)


def _forward_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("again", "lora", "adapter", "merged")
    cells = []
    for row in rows:
        found = row["forward"]
        line = [row["method"], f"{found['seconds']['base'] * 1e3:,.1f}"]
        line += [_told(found["ratios"].get(name, {})) for name in names]
        cells.append([*line, "" if found["merged_parameters"] is None else f"{found['merged_parameters']:,}"])
    return aligned(["method", "base ms", "base again", "LoRA", "adapter", "merged", "parameters merged"], cells)


def _told(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})" if found else ""


def plot(result: Mapping[str, Any]) -> bytes | None:
    """The ratios that something is asked of, as an SVG; None where matplotlib is not installed or there is none."""
    parts = [part for part in ASKED if any(ratio_of(row, part) for row in result["rows"])]
    if not parts or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    titles = {
        "step": "training step, multiple of LoRA's",
        "mixed": "mixed batch, multiple of one task's",
        "more": f"{MORE} times the tasks, multiple of the step",
        "merged": "task merged, multiple of the base's forward",
    }
    figure = Figure(figsize=(9, 2.8 * len(parts)), layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        found = {row["method"]: ratio_of(row, part) for row in result["rows"]}
        shown = {name: ratio for name, ratio in found.items() if ratio is not None}
        heights = [ratio["ratio"] for ratio in shown.values()]
        below = [ratio["ratio"] - ratio["low"] for ratio in shown.values()]
        above = [ratio["high"] - ratio["ratio"] for ratio in shown.values()]
        axes.bar(list(shown), heights, 0.6, yerr=[below, above], capsize=3)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.axhline(ASKED[part], color="black", linewidth=0.8, linestyle="--", label=f"asked: {ASKED[part]:.2f}")
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(titles[part], fontsize=9)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
