"""Models for images: patches, blocks of a transformer, one head per task. A paper's file says what its blocks are.

Shapes: `T` tasks (1 while the tokens are the same for all), `B` images, `L` tokens of an image, `D` width, `C` outputs
of a task, `P` width of a task's condition, `H`, `W` height and width in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from ..data.vision_processor import VisionProcessor
from ..layers.balance import TaskExpertStatistics
from ..layers.heads import ClassHead, UpHead
from ..layers.vit import MLP, Block, Computed, PatchEmbedding, SelfAttention
from ..outputs import MultiTaskOutput
from ..tasks import UnknownTaskError, check_task_names
from ._base import MultiTaskConfig, MultiTaskModel
from ._tabular import MAX_WIDTH, check_count, check_probability
from ._upcycle import backbone_config, check_backbone, copy_backbone

MAX_PIXELS = 16_384


@strict
class VisionConfig(MultiTaskConfig):
    """Fields of every model for images.

    Args:
        image_size: height and width in pixels, both multiples of the patch.
        patch_size: side of a patch in pixels.
        num_channels: of the pixels.
        hidden_size: `D`.
        num_hidden_layers: blocks.
        num_attention_heads: heads of dense attention.
        mlp_ratio: hidden width of a dense MLP, as a multiple of `D`.
        qkv_bias: whether query, key and value have biases.
        cls_token: whether a class token goes before the patches.
        dropout: after attention and after the MLP.
        drop_path: of the last block; of the others less, from 0 on in equal steps.
        layer_norm_eps: of all layer norms.
        layer_scale: first value of a factor per channel on each branch; None for none.
        decoder_dim: channels of a dense task's head.
        decoder_stages: its convolutions; `2 ** stages` is the patch in the papers.
        initializer_range: standard deviation of weights at the start.
    """

    model_type = "moe_mtl_vision"

    image_size: list[int] = field(default_factory=lambda: [64, 64])
    patch_size: int = 8
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    mlp_ratio: float | int = 4
    qkv_bias: bool = True
    cls_token: bool = True
    dropout: float | int = 0.0
    drop_path: float | int = 0.0
    layer_norm_eps: float | int = 1e-6
    layer_scale: float | int | None = None
    decoder_dim: int = 256
    decoder_stages: int = 4
    initializer_range: float | int = 0.02

    def validate_image(self) -> None:
        check_count("patch_size", self.patch_size, MAX_PIXELS)
        check_count("num_channels", self.num_channels, MAX_WIDTH)
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be height and width, found {self.image_size}")
        for side in self.image_size:
            check_count("image_size", side, MAX_PIXELS)
            if side % self.patch_size:
                raise ValueError(f"image_size must be multiples of the patch of {self.patch_size}, found {side}")

    def validate_transformer(self) -> None:
        check_count("hidden_size", self.hidden_size, MAX_WIDTH)
        check_count("num_hidden_layers", self.num_hidden_layers)
        check_count("num_attention_heads", self.num_attention_heads)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, found {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if not 1 <= self.mlp_ratio * self.hidden_size <= MAX_WIDTH:
            raise ValueError(f"mlp_ratio must give a width in [1, {MAX_WIDTH}], found {self.mlp_ratio}")
        for name in ("dropout", "drop_path"):
            check_probability(name, getattr(self, name))
        if not 0 < self.layer_norm_eps < 1 or not 0 <= self.initializer_range < 1e6:
            raise ValueError(
                "layer_norm_eps must be in (0, 1) and initializer_range in [0, 1e6), found "
                f"{self.layer_norm_eps} and {self.initializer_range}"
            )
        if self.layer_scale is not None and not abs(self.layer_scale) < 1e6:
            raise ValueError(f"layer_scale must be a finite number, found {self.layer_scale}")

    def validate_heads(self) -> None:
        check_count("decoder_dim", self.decoder_dim, MAX_WIDTH)
        check_count("decoder_stages", self.decoder_stages, 8)
        for task in self.parsed_tasks:
            if task.space is not None or task.product_of is not None:
                raise ValueError(f"task {task.name!r}: space and product_of are for tables, not for images")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def levels(self, count: int) -> list[int]:
        """After how many blocks a decoder of `count` levels reads the tokens: in equal steps, the last after all."""
        return [(i + 1) * self.num_hidden_layers // count for i in range(count)]


def block_of(name: str) -> str | None:
    """The number of the block that a parameter or layer is in, as keys of `experts_kept` have it; None for others."""
    start, _, rest = name.partition(".")
    return rest.partition(".")[0] if start == "blocks" else None


class VisionModel(MultiTaskModel):
    """Patches, blocks, heads.

    A subclass gives `build_attention(i)` and `build_mlp(i)`, the two parts of block `i`; dense unless it says
    otherwise; or `build_decoder()`, what stands between blocks and heads. Tokens are the same for all tasks until the
    first part that depends on the task: what stands before it is computed once, however many tasks are asked for.
    """

    config: VisionConfig
    processor_class = VisionProcessor
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def __init__(self, config: VisionConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self._parsed_tasks, self._task_names = config.parsed_tasks, config.task_names
        self.patches = PatchEmbedding(
            config.image_size, config.patch_size, config.num_channels, config.hidden_size, config.cls_token
        )
        steps = max(config.num_hidden_layers - 1, 1)
        self.blocks = nn.ModuleList(
            Block(
                self.build_attention(i),
                self.build_mlp(i),
                config.hidden_size,
                config.layer_norm_eps,
                config.dropout,
                config.drop_path * i / steps,
                config.layer_scale,
            )
            for i in range(config.num_hidden_layers)
        )
        self.conditions = self.build_conditions()
        self.decoder = self.build_decoder()
        self.heads = nn.ModuleDict({task.name: self.build_head(task) for task in self._parsed_tasks})
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_model: str | Path | PreTrainedModel, config: VisionConfig) -> Self:
        """A model whose patches, positions and blocks are those of a plain vision transformer.

        What has no like in the backbone (gates, attention made of experts, decoders, heads) starts anew. An MLP of
        experts takes up slices of the dense MLP, see `models/_upcycle.py`; positions are interpolated to the grid; the
        second token of a DeiT is dropped, and the class token too where the config has none. The config's
        `layer_norm_eps` stands.

        Args:
            name_or_model: a ViT, DeiT or DINOv2 of transformers: its name on the Hub, a folder, or the model itself,
                with or without a head. Of files only safetensors are read.
            config: of the model to be built.

        Raises:
            ValueError: a backbone of another type or of other sizes than the config's, before its weights are read.
        """
        check_backbone(backbone_config(name_or_model), config)
        if isinstance(name_or_model, PreTrainedModel):
            backbone = name_or_model.base_model
        else:
            backbone = AutoModel.from_pretrained(name_or_model, use_safetensors=True)
        model = cls(config).eval()
        copy_backbone(model, backbone)
        return model

    def build_attention(self, layer: int) -> nn.Module:
        """The attention of a block."""
        return SelfAttention(self.config.hidden_size, self.config.num_attention_heads, self.config.qkv_bias)

    def build_mlp(self, layer: int) -> nn.Module:
        """The MLP of a block."""
        return MLP(self.config.hidden_size, int(self.config.mlp_ratio * self.config.hidden_size))

    def build_head(self, task: Any) -> nn.Module:
        """What answers a task: a map for dense tasks, else one answer per image."""
        c = self.config
        width = c.hidden_size if self.decoder is None else c.decoder_dim
        if task.dense:
            sizes = (c.decoder_dim, c.decoder_stages, task.num_outputs)
            return UpHead(width, *sizes, c.grid, c.image_size, c.layer_norm_eps)
        return ClassHead(width, task.num_outputs, c.cls_token and self.decoder is None, c.layer_norm_eps)

    def build_decoder(self) -> nn.Module | None:
        """What makes of the tokens after each block those that the heads read; none by default.

        Its forward takes the tokens `[1 or T, B, L, D]` before and after each block, the tasks and whether to record;
        it gives a `Computed` of patches alone, `[T, B, L, decoder_dim]`.
        """
        return None

    def build_conditions(self) -> nn.Module | None:
        """A module that makes of the tasks' names what they tell every layer, `[T, P]`; none by default."""
        return None

    def example_inputs(self) -> dict[str, Tensor]:
        """A grey image."""
        return {"pixel_values": torch.zeros(1, self.config.num_channels, *self.config.image_size, device=self.device)}

    def rows_kept(self, config: MultiTaskConfig, name: str) -> list[int] | None:
        """Of stacked experts those that `config.experts_kept` has, found among those that this model has."""
        block = block_of(name)
        if block is None or ".experts." not in name:
            return None
        kept, stored = ((getattr(c, "experts_kept", None) or {}).get(block) for c in (config, self.config))
        if kept is None or kept == stored:
            return None
        if missing := [expert for expert in kept if stored is not None and expert not in stored]:
            raise ValueError(f"experts_kept: expected some of {stored} for block {block}, found {missing}")
        return kept if stored is None else [stored.index(expert) for expert in kept]

    def enter(self, layer: int, x_TBLD: Tensor, tasks: Sequence[str]) -> Tensor:
        """What is done to the tokens before a block; nothing, unless the architecture says so."""
        return x_TBLD

    def _init_weights(self, module: nn.Module) -> None:
        if (initialise := getattr(module, "initialise", None)) is not None:
            initialise(self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for name, tensor in state.items():
                (init.ones_ if name in ("weight", "running_var") else init.zeros_)(tensor)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Mapping[str, Tensor] | None = None,
        sample_weights: Mapping[str, Tensor] | None = None,
        tasks: str | Sequence[str] | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple:
        """Answers `tasks` (all by default).

        Args:
            pixel_values: floats `[B, C, H, W]`, normalised as the model's processor does.
            labels: task -> labels as `Task` describes; missing ones are NaN or -100. Tasks without labels give no loss.
            sample_weights: task -> `[B]`, non-negative.
            tasks: names of the tasks to compute; no gate, expert or head is run for another.
            output_routing: also return who used which expert.

        Returns:
            logits `[B, C, H, W]` of dense tasks, `[B, C]` of the others; `last_hidden_state` `[B, T, L, D]`.

        Raises:
            UnknownTaskError: a task that the model does not have, in `tasks`, `labels` or `sample_weights`.
            ValueError: pixels of another shape, or not finite.
        """
        names = self._task_names
        wanted = names if tasks is None else check_task_names(tasks, names)
        for what, given in (("labels", labels), ("sample_weights", sample_weights)):
            if given is None:
                continue
            if not isinstance(given, Mapping):
                raise ValueError(f"{what}: expected a mapping from task to tensor, found {type(given).__name__}")
            if unknown := [name for name in given if name not in names]:
                raise UnknownTaskError(unknown, names)
        self.patches.check(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        x_TBLD = self.patches(pixel_values.to(self.patches.position.dtype)).unsqueeze(0)
        condition_TP = None if self.conditions is None else self.conditions(wanted)
        auxiliary: list[Tensor] = []
        routing: list[Any] = []
        hidden = [x_TBLD]
        for i, block in enumerate(self.blocks):
            found = self._through(block, self.enter(i, x_TBLD, wanted), wanted, condition_TP, output_routing)
            x_TBLD = found.hidden
            auxiliary += found.auxiliary
            routing += found.routing
            hidden.append(x_TBLD)
        if self.decoder is None:
            decoded = Computed(x_TBLD.expand(len(wanted), -1, -1, -1))
        else:
            decoded = self.decoder(hidden, wanted, output_routing)
        logits = {task: self.heads[task](x_BLD) for task, x_BLD in zip(wanted, decoded.hidden, strict=True)}
        auxiliary += decoded.auxiliary
        routing += decoded.routing
        if self.training:
            for module in self.modules():
                if isinstance(module, TaskExpertStatistics):
                    module.update()

        auxiliary_loss = torch.stack([a.float() for a in auxiliary]).sum() if auxiliary else None
        loss, losses = None, None
        if labels is not None:
            weights = sample_weights or {}
            computed = [task for task in self._parsed_tasks if task.name in logits and task.name in labels]
            losses = {t.name: t.loss(logits[t.name], labels[t.name], weights.get(t.name)) for t in computed}
            terms = [task.weight * losses[task.name] for task in computed]
            if auxiliary_loss is not None:
                terms.append(auxiliary_loss)
            if terms:
                loss = torch.stack([term if term.dtype == torch.float64 else term.float() for term in terms]).sum()
        output = MultiTaskOutput(
            loss=loss,
            last_hidden_state=decoded.hidden.transpose(0, 1),
            logits=logits,
            task_losses=losses,
            auxiliary_loss=auxiliary_loss,
            routing=tuple(routing) if output_routing else None,
            hidden_states=tuple(one.transpose(0, 1) for one in hidden) if output_hidden_states else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _through(self, block: nn.Module, *inputs: Any) -> Computed:
        if self.gradient_checkpointing and self.training:
            # With the buffers of now: running means may have moved when the backward computes the block again.
            return checkpoint(functional_call, block, dict(block.named_buffers()), inputs, use_reentrant=False)
        return block(*inputs)
