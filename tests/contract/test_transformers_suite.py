"""transformers' own `ModelTesterMixin`, taken from the source release of the installed version, over every model.

Every skip must be in the list below, and everything in the list must be skipped.
"""

import fnmatch
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers
import zoo
from upstream_release import fetched

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
    """In a process of its own: upstream's helpers set global state. One for all models: the import costs most."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(HERE / "transformers_suite.py"), "-q", "-c", "pytest.ini"]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "no:warnings", f"--junitxml={report}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "RUN_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(upstream), str(HERE), str(HERE.parents[1])]),
        "TRANSFORMERS_TEST_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert report.exists(), run.stdout + run.stderr

    patterns = [pattern for group in EXPECTED_SKIPS.values() for pattern in group]
    wrong, passed, matched = [], dict.fromkeys(zoo.MODEL_TYPES, 0), set()
    for case in ElementTree.parse(report).iter("testcase"):
        model_type = case.attrib["classname"].rpartition("Test_")[2]
        name = case.attrib["name"]
        expected = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        matched.update(expected)
        problem = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        skip = case.find("skipped")
        if problem is not None:
            wrong.append(f"{model_type}: {name} failed: {problem.attrib['message'][:500]}")
        elif skip is not None and not expected:
            wrong.append(f"{model_type}: {name} was skipped, which no list expects: {skip.attrib['message'][:200]}")
        elif skip is None and expected:
            wrong.append(f"{model_type}: {name} passed; take it off the list of skips")
        passed[model_type] += skip is None and problem is None
    assert not wrong, "\n".join(wrong)
    assert matched == set(patterns), f"on the list, but no such test: {set(patterns) - matched}"
    assert min(passed.values()) > 60, passed
    assert len(set(passed.values())) == 1, passed
