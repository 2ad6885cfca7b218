import json

import pytest
from pydantic import ValidationError

from dstrain.base.config import Config, load_config
from dstrain.base.errors import ConfigError
from dstrain.train import ds_config
from dstrain.train.ds_config import (
    EngineConfig,
    RawDeepSpeed,
    check_overlay,
    check_raw_key,
    deepspeed_config,
    warnings_for,
)


class Run(Config):
    engine: EngineConfig = EngineConfig()
    deepspeed: RawDeepSpeed = RawDeepSpeed()


def made(*, precision="fp32", clip_norm=1.0, micro_batch=4, accumulation=3, world_size=2, raw=None, **engine):
    return deepspeed_config(
        EngineConfig(**engine), precision=precision, clip_norm=clip_norm, micro_batch=micro_batch,
        accumulation=accumulation, world_size=world_size, raw=raw,
    )  # fmt: skip


# --- keys handed through -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "home"), ds_config._OWNED.items())
def test_a_key_with_a_home_in_the_configuration_names_it(key, home):
    with pytest.raises(ValueError, match=rf"deepspeed\.{key}: set {home} instead; it has one home"):
        check_raw_key(key, 1)


def test_the_batch_precision_and_schedule_are_among_the_owned():
    homes = ds_config._OWNED
    assert homes["train_batch_size"] == "train.global_batch"
    assert homes["train_micro_batch_size_per_gpu"] == "train.micro_batch"
    assert homes["gradient_clipping"] == "optimizer.clip_norm"
    assert homes["bf16"] == homes["fp16"] == "engine.precision"
    assert (homes["optimizer"], homes["scheduler"]) == ("optimizer", "schedule")


@pytest.mark.parametrize(("key", "fact"), ds_config._REMOVED.items())
def test_a_key_that_deepspeed_dropped_says_when_and_what_instead(key, fact):
    version, instead = fact
    with pytest.raises(ValueError, match=rf"deepspeed\.{key}: removed from DeepSpeed in ") as caught:
        check_raw_key(key, {})
    assert str(caught.value).endswith(f"in {version}; instead: {instead}")


@pytest.mark.parametrize("key", ds_config._REFUSED)
def test_a_key_that_dstrain_decides_is_refused(key):
    with pytest.raises(ValueError, match=rf"deepspeed\.{key}: dstrain decides this"):
        check_raw_key(key, True)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("flops_profile", "Did you mean flops_profiler?"),
        ("optimiser", "Did you mean optimizer"),
        ("qqqq", "Passed through: compile, aio, timers"),
    ],
)
def test_an_unknown_key_which_deepspeed_would_swallow_is_refused_with_a_hint(key, hint):
    with pytest.raises(ValueError, match=rf"deepspeed\.{key}: not a key that dstrain passes through\.") as caught:
        check_raw_key(key, 1)
    assert hint in str(caught.value)


@pytest.mark.parametrize("key", ds_config._PASSED_THROUGH)
def test_a_passed_key_is_accepted(key):
    check_raw_key(key, {"offload_optimizer": {"device": "cpu"}} if key == "zero_optimization" else {"enabled": True})


def test_every_key_has_one_fate():
    fates = [*ds_config._OWNED, *ds_config._REMOVED, *ds_config._REFUSED, *ds_config._PASSED_THROUGH]
    assert len(fates) == len(set(fates))


@pytest.mark.parametrize("value", [{"stage": 3}, {"offload_param": {}, "reduce_bucket_size": 5}])
def test_of_zero_only_offloading_is_passed_through(value):
    name = next(key for key in value if key != "offload_param")
    with pytest.raises(ValueError, match=rf"deepspeed\.zero_optimization\.{name}: set engine\.zero_stage") as caught:
        check_raw_key("zero_optimization", value)
    assert "offload_optimizer, offload_param" in str(caught.value)


def test_zero_must_be_a_mapping():
    with pytest.raises(ValueError, match="not a mapping"):
        check_raw_key("zero_optimization", 2)


@pytest.mark.parametrize("value", ["auto", {"enabled": "auto"}, {"a": [{"b": "auto"}]}])
def test_auto_is_refused_wherever_it_stands(value):
    with pytest.raises(ValueError, match=r'deepspeed\.aio: "auto" is a habit of other tools'):
        check_raw_key("aio", value)
    check_raw_key("aio", {"path": "automatic"})


def test_the_configuration_of_a_run_refuses_in_one_message(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("deepspeed: {train_batch_size: 8}\nengine: {zero_stage: 4}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert "deepspeed.train_batch_size: set train.global_batch instead" in str(caught.value)
    assert "engine.zero_stage" in str(caught.value)


def test_passed_keys_survive_the_configuration():
    assert load_config(Run, None, ["deepspeed.aio.block_size=4096"]).deepspeed.values() == {"aio": {"block_size": 4096}}


# --- an overlay file -----------------------------------------------------------------------------------------------


def test_an_overlay_is_checked_like_the_section_and_named():
    data = {"comms_logger": {"enabled": True}}
    assert check_overlay(data, source="ds.json") == data
    with pytest.raises(ConfigError, match=r"^ds\.json: deepspeed\.fp16: set engine\.precision instead"):
        check_overlay({**data, "fp16": {"enabled": True}}, source="ds.json")


@pytest.mark.parametrize("data", [[], None, "x", 3])
def test_an_overlay_that_is_no_object_is_refused(data):
    with pytest.raises(ConfigError, match=r"ds\.json: a DeepSpeed configuration is a JSON object, found"):
        check_overlay(data, source="ds.json")


# --- the result ----------------------------------------------------------------------------------------------------

TOP_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "gradient_clipping", "gradient_allreduce_op", "prescale_gradients",
    "gradient_predivide_factor", "communication_data_type", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "bf16", "fp16", "torch_autocast", "data_types", "zero_optimization",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc", "tensorboard",
    "wandb", "csv_monitor", "comms_logger", "flops_profiler",
}  # fmt: skip
ZERO_KEYS = {
    "stage", "overlap_comm", "reduce_scatter", "use_multi_rank_bucket_allreduce", "contiguous_gradients",
    "allgather_partitions", "round_robin_gradients", "reduce_bucket_size", "allgather_bucket_size",
    "ignore_unused_parameters", "elastic_checkpoint",
}  # fmt: skip
ZERO3_KEYS = {
    "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_gradients",
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_key_is_written_at_every_stage_and_precision(stage, precision):
    result = made(zero_stage=stage, precision=precision, clip_norm=0.5)
    assert set(result) == TOP_KEYS
    assert set(result["zero_optimization"]) == ZERO_KEYS | (ZERO3_KEYS if stage == 3 else set())
    assert result["zero_optimization"]["stage"] == stage
    assert (result["bf16"]["enabled"], result["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert result["torch_autocast"] == {"enabled": False}
    assert result["communication_data_type"] == precision
    # DeepSpeed's plain engine (stage 0, fp32) does not clip; dstrain's optimizer does, and nobody does it twice.
    assert result["gradient_clipping"] == (0.0 if (stage, precision) == (0, "fp32") else 0.5)
    expected = None if stage == 0 and precision != "fp32" else "fp32"
    assert result["data_types"] == {"grad_accum_dtype": expected}
    assert json.loads(json.dumps(result)) == result


def test_no_monitor_or_profiler_of_deepspeed_is_left_on():
    result = made()
    for name in ("tensorboard", "wandb", "csv_monitor", "comms_logger", "flops_profiler"):
        assert result[name] == {"enabled": False}
    assert result["steps_per_print"] is None


def test_overlapped_communication_stays_off():
    assert all(made(zero_stage=stage)["zero_optimization"]["overlap_comm"] is False for stage in range(4))


def test_batch_arithmetic_adds_up():
    result = made(micro_batch=4, accumulation=3, world_size=5)
    assert result["train_batch_size"] == 60
    assert result["train_micro_batch_size_per_gpu"] == 4
    assert result["gradient_accumulation_steps"] == 3


def test_settings_of_the_engine_reach_their_keys():
    result = made(zero_stage=3, bucket_elements=12_345, initial_loss_scale_power=9, precision="fp16")
    zero = result["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 12_345
    assert result["fp16"]["initial_scale_power"] == 9


def test_raw_keys_are_laid_over_sections_and_keep_the_rest():
    raw = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        "comms_logger": {"enabled": True},
        "aio": {"x": 1},
    }
    result, plain = made(raw=raw), made()
    assert result["zero_optimization"] == {**plain["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    assert result["comms_logger"] == {"enabled": True}
    assert result["aio"] == {"x": 1}
    untouched = TOP_KEYS - {"zero_optimization", "comms_logger"}
    assert {key: result[key] for key in untouched} == {key: plain[key] for key in untouched}


# --- warnings and bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_costly_set_ups_are_warned_of_and_others_are_not(stage, precision, accumulation):
    found = warnings_for(EngineConfig(zero_stage=stage), precision=precision, accumulation=accumulation)
    if accumulation == 1 or stage == 1 or (stage == 0 and precision == "fp32"):
        assert found == []
    elif stage == 0:
        assert found == ["engine.zero_stage: 0 accumulates gradients in bf16; stage 1 accumulates in fp32"]
    else:
        assert len(found) == 1
        assert f"engine.zero_stage: {stage} reduces gradients at each of the 4 micro-batches" in found[0]


@pytest.mark.parametrize(
    "settings", [{"zero_stage": 4}, {"precision": "int8"}, {"device": "tpu"}, {"threads": 0}, {"timeout_s": 1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        EngineConfig(**settings)
