"""transformers' own `ModelTesterMixin`, taken from the source release of the installed version, over every model.

Every skip must be in the list below, and everything in the list must be skipped.
"""

from pathlib import Path

import pytest
import transformers
import zoo
from upstream_release import fetched, run

HERE = Path(__file__).parent
FILES = ("test_modeling_common.py", "test_configuration_common.py")
# What those files import of upstream's test folder and the release leaves out.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
EXPECTED_SKIPS = {
    "a table's model has no attention": [
        "test_attention_outputs",
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically",
        "test_can_set_attention_dynamically_composite_model",
        "test_eager_matches_sdpa_inference_*",
        "test_sdpa_can_dispatch_composite_models",
        "test_sdpa_can_dispatch_non_composite_models",
        "test_sliding_window_mask",
    ],
    "nor tokens, positions, or text, and no head that would shift them": [
        "test_causal_lm_loss_honors_shift_labels",
        "test_encoder_decoder_loss_no_double_shift",
        "test_enable_input_require_grads_with_gradient_checkpointing",
        "test_inputs_embeds",
        "test_model_get_set_embeddings",
        "test_model_rope_*",
        "test_resize_embeddings_untied",
        "test_resize_embeddings_untied_no_reinit_on_post_init",
        "test_resize_position_vector_embeddings",
        "test_resize_tokens_embeddings",
        "test_vision_axial_rope",
    ],
    "its experts are dense, not routed through transformers' experts": [
        "test_eager_matches_batched_and_grouped_inference_*",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ],
    "it has no sub-config, no plan for tensor parallelism, no renamed weights, no module kept in float32": [
        "test_can_capture_specific_layers_hidden_states",
        "test_can_load_from_already_mapped_keys",
        "test_capture_outputs_decorator",
        "test_internal_model_config_and_subconfig_are_same",
        "test_keep_in_fp32_modules",
        "test_keep_in_fp32_modules_exist",
        "test_reverse_loading_mapping",
        "test_tied_head_has_a_tp_plan_entry",
        "test_tp_plan_matches_params",
    ],
    "needs an accelerator or a kernel library, or is slow": [
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_*",
        "test_flash_attn_*",
        "test_flex_attention_with_grads",
        "test_kernels_can_load_without_crashing",
        "test_model_parallelism",
        "test_resize_*_with_deepspeed",
        "test_resize_*_with_deepspeed_multi_gpu",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
        "test_torch_compile_for_training",
    ],
}


@pytest.fixture(scope="module")
def upstream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `upstream`: the release's two files and the stubs."""
    return fetched(request, tmp_path_factory.mktemp("download"), "transformers", transformers.__version__, FILES, STUBS)


def test_upstream_suite(upstream: Path, tmp_path: Path) -> None:
    """One process for all models: the import costs most."""
    skips = {reason: [f"*: {name}" for name in names] for reason, names in EXPECTED_SKIPS.items()}
    passed = run(HERE / "transformers_suite.py", upstream, tmp_path, skips, TRANSFORMERS_TEST_DEVICE="cpu")
    assert set(passed) == set(zoo.MODEL_TYPES)
    assert min(passed.values()) > 60, passed
    assert len(set(passed.values())) == 1, passed
