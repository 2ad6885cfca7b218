"""Build, load and save Hugging Face models: any `...ForMaskedLM` or `...ForSequenceClassification`, from sizes or from weights.

Checks what a person typed against the configuration class, takes weights from safetensors only, and never runs code that
came with a checkpoint. How a model is fed is `models.encoders`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from dstrain.base.device import Precision, gpu_capability
from dstrain.base.errors import ConfigError, StorageError
from dstrain.base.logs import get_logger
from dstrain.models.anatomy import Anatomy, Sizes, anatomy_of
from dstrain.models.attention_kernels import Circumstances, KernelChoice, choose_kernel
from dstrain.models.config import DSTRAIN_ENCODER_TYPE, ModelConfig, ModelFacts
from dstrain.models.dstrain_encoder import DstrainMaskedLanguageModel
from dstrain.models.encoders import MaskedLanguageModel, SequenceClassifier
from dstrain.models.inputs import (
    position_offset,
)

_TOKEN_FIELDS = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
_HEAD_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
_UNLISTED_FIELDS = {
    "modernbert": ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"),
    "deberta": ("embedding_size", "talking_head", "cls_dropout"),
    "deberta-v2": (
        "attention_head_size", "cls_dropout", "conv_act", "conv_groups", "conv_kernel_size", "embedding_size", "norm_rel_ebd",
        "position_buckets", "share_att_key",
    ),
}  # fmt: skip
"""Fields that transformers reads and published configurations carry, but its configuration classes do not list."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_LOG = get_logger(__name__)


def build_masked_lm(
    config: ModelConfig, *, vocab_size: int, special: Mapping[str, int], architecture: Mapping[str, Any] | None = None
) -> MaskedLanguageModel | DstrainMaskedLanguageModel:
    """Build a masked-LM model with random weights.

    Args:
        config: the run's model section.
        vocab_size: ids of the tokenizer; the embedding is rounded up to `config.pad_vocab_to`.
        special: pad_token_id, cls_token_id, sep_token_id and the like, written into the configuration.
        architecture: transformers configuration of `init_from`, overlaid by `config.config`.

    Raises:
        ConfigError: unknown model type or field, or sizes that do not fit.
    """
    hf_config = _configuration(
        config.config, architecture or {}, vocab_size=vocab_size, pad_to=config.pad_vocab_to, special=special,
        own_encoder=config.kind == "dstrain-encoder",
    )  # fmt: skip
    _require_class(hf_config, MODEL_FOR_MASKED_LM_MAPPING, "ForMaskedLM")
    model = _construct(AutoModelForMaskedLM, hf_config)
    if config.kind == "dstrain-encoder":
        return DstrainMaskedLanguageModel(model)
    return MaskedLanguageModel(model, attention=config.attention)


def anatomy_without_weights(
    config: ModelConfig, *, vocab_size: int, architecture: Mapping[str, Any] | None = None
) -> Anatomy:
    """What `build_masked_lm` would build, counted on the meta device: no memory, no random numbers.

    Args:
        config: the run's model section.
        vocab_size: ids of the tokenizer.
        architecture: of `init_from`.

    Raises:
        ConfigError: as `build_masked_lm`.
    """
    hf_config = _configuration(
        config.config, architecture or {}, vocab_size=vocab_size, pad_to=config.pad_vocab_to, special={},
        own_encoder=config.kind == "dstrain-encoder",
    )  # fmt: skip
    _require_class(hf_config, MODEL_FOR_MASKED_LM_MAPPING, "ForMaskedLM")
    with torch.device("meta"):
        model = _construct(AutoModelForMaskedLM, hf_config)
    quadratic = config.attention == "padded" or not getattr(model, "_supports_attention_backend", False)
    at_head = type(model.get_output_embeddings()) is nn.Linear
    return anatomy_of(model, model.base_model, _sizes(hf_config, quadratic=quadratic), scores_at_head=at_head)


def anatomy(module: nn.Module) -> Anatomy:
    """What a wrapped model is made of; before an engine takes its parameters apart."""
    model = cast(PreTrainedModel, module.model)
    sizes = _sizes(model.config, quadratic=module.attention == "padded")
    base = model.base_model if hasattr(model, "base_model") else model.model  # dstrain's own encoder names its body so
    return anatomy_of(model, base, sizes, scores_at_head=bool(getattr(module, "scores_at_head", False)))


def _sizes(config: PretrainedConfig, *, quadratic: bool) -> Sizes:
    layers = _first_field(config, "num_hidden_layers", "n_layers")
    is_modern = config.model_type == "modernbert"
    local = [kind for kind in getattr(config, "layer_types", None) or () if "sliding" in kind or "local" in kind]
    dropouts = ("hidden_dropout_prob", "dropout", "mlp_dropout")
    return Sizes(
        family=str(config.model_type), layers=layers,
        hidden=_first_field(config, "hidden_size", "dim"),
        intermediate=_first_field(config, "intermediate_size", "hidden_dim"),
        heads=_first_field(config, "num_attention_heads", "n_heads"),
        vocab=int(config.vocab_size), gated=is_modern,
        window=int(config.local_attention) if local else None, local_layers=len(local),
        dropout=max(float(getattr(config, name, 0.0) or 0.0) for name in dropouts),
        composed_activation=getattr(config, "hidden_act", "") == "gelu_new",
        quadratic=quadratic,
    )  # fmt: skip


def build_classifier(
    config: ModelConfig, *, num_labels: int, labels: tuple[str, ...], regression: bool, vocab_size: int,
    special: Mapping[str, int], architecture: Mapping[str, Any] | None = None,
) -> SequenceClassifier:  # fmt: skip
    """Build a sequence classifier (or regressor, with one output) with random weights.

    Raises:
        ConfigError: unknown model type or field, or sizes that do not fit.
    """
    if config.kind == "dstrain-encoder":
        raise ConfigError(
            "model.kind: dstrain-encoder pretrains; fine-tune its checkpoint with kind: huggingface, which takes it as it is"
        )
    names = labels or tuple(str(i) for i in range(num_labels))
    extra = {
        "num_labels": num_labels,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression" if regression else "single_label_classification",
    }
    hf_config = _configuration(
        {**config.config, **extra},
        architecture or {},
        vocab_size=vocab_size,
        pad_to=config.pad_vocab_to,
        special=special,
    )
    _require_class(hf_config, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "ForSequenceClassification")
    return SequenceClassifier(_construct(AutoModelForSequenceClassification, hf_config), attention=config.attention)


def read_architecture(folder: Path) -> dict[str, Any]:
    """The transformers configuration in `folder/config.json`, without anything that names code.

    Raises:
        ConfigError: the file is missing or names an unknown architecture.
    """
    try:
        data, _ = PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no readable transformers config.json: {error}") from None
    drop = {
        "auto_map",
        "architectures",
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
    }
    return {key: value for key, value in data.items() if key not in drop}


def load_folder_weights(folder: Path) -> dict[str, Tensor]:
    """All fp32 weights of a Hugging Face folder (safetensors only), under their own names.

    Raises:
        ConfigError: the folder has no safetensors weights (pickled `.bin` files are refused), or one is damaged.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  (kept beside its only use)
    from safetensors.torch import load_file  # noqa: PLC0415

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder}: no *.safetensors weights; pickled .bin files are not loaded: save the model again with safe_serialization"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            loaded = load_file(str(file))
        except (SafetensorError, OSError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"{file}: not a whole safetensors file: {error}") from None
        weights.update({name: tensor.float() for name, tensor in loaded.items()})
    return weights


def initialise(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Copy weights by name into a wrapped model; names are matched with and without the base model's prefix.

    Args:
        module: a MaskedLanguageModel or SequenceClassifier.
        weights: fp32 tensors under Hugging Face names.
        source: named in errors.

    Returns:
        Parameters that kept their random values (a new head).

    Raises:
        ConfigError: an encoder weight is missing or has another shape.
    """
    model = cast(PreTrainedModel, module.model)
    prefix = f"{model.base_model_prefix}."
    own = dict(model.named_parameters())
    fresh: list[str] = []
    with torch.no_grad():
        for name, parameter in own.items():
            candidates = (name, name.removeprefix(prefix), prefix + name)
            found = next((weights[c] for c in candidates if c in weights), None)
            if found is not None and found.shape == parameter.shape:
                parameter.copy_(found)
            elif found is None and (not name.startswith(prefix) or "pooler" in name):
                fresh.append(name)  # a head, or a pooler that masked-LM models do not have
            else:
                have = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise ConfigError(f"model.init_from: {source}: {name} {have}, the model needs {tuple(parameter.shape)}")
    return fresh


def facts(module: nn.Module) -> ModelFacts:
    """Sizes of a wrapped model, for FLOP counts and checks."""
    model = cast(PreTrainedModel, module.model)
    config = model.config
    positions = _first_field(config, "max_position_embeddings")
    if config.model_type == "modernbert":  # rotary positions: the field is a training length, not a table
        limit = None
    else:
        limit = positions - position_offset(model) if positions else None
    return ModelFacts(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_layers=_first_field(config, "num_hidden_layers", "n_layers"),
        hidden_size=_first_field(config, "hidden_size", "dim"),
        intermediate_size=_first_field(config, "intermediate_size", "hidden_dim"),
        vocab_size=int(config.vocab_size),
        gated=config.model_type == "modernbert",
        max_positions=limit,
        attention=str(module.attention),
        attention_reason=str(module.attention_reason),
    )


def choose_attention_kernel(module: nn.Module, wanted: KernelChoice, *, device: str, precision: Precision) -> str:
    """Choose what attends inside segments, tell the wrapped model, and say why; padded models have transformers' own.

    Args:
        module: a wrapped model.
        wanted: `model.attention_kernel`.
        device: that it will train on, cpu or cuda.
        precision: that it will compute in.

    Raises:
        ConfigError: the kernel asked for cannot serve there.
    """
    if module.attention != "unpadded":
        return f"attention kernel: transformers' own, for padded rows ({module.attention_reason})"
    config = cast(PreTrainedModel, module.model).config
    heads = _first_field(config, "num_attention_heads", "n_heads")
    dropouts = (getattr(config, name, None) for name in ("attention_probs_dropout_prob", "attention_dropout"))
    at = Circumstances(
        device=device, dtype=_DTYPES[precision], head_width=_first_field(config, "hidden_size", "dim") // max(1, heads),
        dropout=float(next((value for value in dropouts if value is not None), 0.0)),
        capability=gpu_capability(device),
    )  # fmt: skip
    choice = choose_kernel(wanted, at)
    module.kernel = choice.name  # type: ignore[assignment]
    return f"attention kernel: {choice.name} ({choice.reason})"


def _first_field(config: PretrainedConfig, *names: str) -> int:
    """The first of some names that the configuration has; 0 when it has none."""
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)


def architecture_of(module: nn.Module) -> dict[str, Any]:
    """The wrapped model's transformers configuration as JSON-able data."""
    return cast("dict[str, Any]", cast(PreTrainedModel, module.model).config.to_dict())


def save_folder(module: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors of the wrapped model, as plain transformers would.

    Raises:
        StorageError: the disk is full or failing.
    """
    model = cast(PreTrainedModel, module.model)
    try:
        model.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: cannot be written: {error}. Make room there, or write to another disk"
        ) from error


def accepted_inputs(module: nn.Module) -> frozenset[str]:
    """Names of the forward arguments of the wrapped model."""
    return frozenset(inspect.signature(cast(PreTrainedModel, module.model).forward).parameters)


def plain_logits(module: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of one unpadded text (T,) by the wrapped model itself, without hook or packing; call in eval mode."""
    model = cast(PreTrainedModel, module.model)
    return cast(Tensor, model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None]).logits[0])


def reload_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the same text by the folder, loaded as any user would."""
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    is_masked_lm = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    factory = AutoModelForMaskedLM if is_masked_lm else AutoModelForSequenceClassification
    model = factory.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    return cast(Tensor, model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None]).logits[0])


def _configuration(
    typed: Mapping[str, Any],
    architecture: Mapping[str, Any],
    *,
    vocab_size: int,
    pad_to: int,
    special: Mapping[str, int],
    own_encoder: bool = False,
) -> PretrainedConfig:
    """What a person typed, over what came with a model; only the former is checked for unknown names."""
    fields = {**architecture, **typed}
    model_type = fields.pop("model_type", DSTRAIN_ENCODER_TYPE if own_encoder else None)
    if own_encoder and model_type != DSTRAIN_ENCODER_TYPE:
        raise ConfigError(
            f"model.kind: dstrain-encoder has the architecture {DSTRAIN_ENCODER_TYPE}, not {model_type!r}; "
            "use kind: huggingface for others"
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.config.model_type: {model_type!r} is not known to transformers (bert, roberta, modernbert, ...)"
        )
    known = CONFIG_MAPPING[model_type]()
    allowed = {"model_type", *known.to_dict(), *known.attribute_map, *_UNLISTED_FIELDS.get(model_type, ())}
    unknown = sorted(key for key in typed if key not in allowed and key not in (*_HEAD_FIELDS, *_TOKEN_FIELDS))
    if unknown:
        import difflib  # noqa: PLC0415

        near = difflib.get_close_matches(unknown[0], sorted(allowed), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"model.config.{unknown[0]}: not a field of transformers' {model_type} configuration.{hint}")
    given = fields.pop("vocab_size", None)
    if given is not None and int(given) < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size: {given} is smaller than the tokenizer's {vocab_size}; leave it out"
        )
    size = int(given) if given is not None else -(-vocab_size // pad_to) * pad_to
    # Types carry defaults of their own vocabulary (ModernBERT's 50282); the run's tokenizer wins.
    tokens = {name: special.get(name) for name in _TOKEN_FIELDS}
    try:
        return AutoConfig.for_model(model_type, vocab_size=size, **{**fields, **tokens})
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: transformers refuses these {model_type} fields: {error}") from None


def _require_class(config: PretrainedConfig, mapping: Any, kind: str) -> None:
    if type(config) not in mapping:
        raise ConfigError(f"model.config.model_type: {config.model_type!r} has no {kind} class in transformers")


def _construct(factory: Any, config: PretrainedConfig) -> PreTrainedModel:
    try:
        return cast(PreTrainedModel, factory.from_config(config, dtype=torch.float32))
    except (TypeError, ValueError, LookupError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.config: transformers cannot build this {config.model_type}: {error}") from None
