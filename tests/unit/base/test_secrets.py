import hashlib
import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base import secrets
from dstrain.base.config import dump_yaml, parse_yaml
from dstrain.base.errors import ConfigError
from dstrain.base.secrets import REDACTED, is_secret_name, redact, redacted, refuse_redacted
from tests.support.secret_formats import secret_formats

FORMATS = secret_formats()

INNOCENT = [
    "step 50/1,000 | loss 3.2500 | acc 12.5 % | lr 1.00e-04 | 12.3k tok/s | pad 2.3 % | ETA 0:31:40",
    hashlib.sha256(b"a shard").hexdigest(),
    f"fingerprint: sha256:{hashlib.sha256(b'data').hexdigest()}",
    f"model_fingerprint={hashlib.sha256(b'model').hexdigest()}",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b",
    "/data/runs/bert-base/checkpoints/step-00001000/model.safetensors",
    "runs/sk-learn-baseline-2024-01/tensorboard",
    "runs/task-sst2-large/step-00000010",
    "s3://bucket/shards/train",
    "abfs://container@account.dfs.core.windows.net/shards",
    "https://example.org/shards?version=3&page=2",
    "git@github.com:org/repository.git",
    "ssh://git@host/repository",
    "mask_token: '[MASK]'",
    "pad_token=[PAD]",
    "cls_token: [CLS]",
    "seconds_per_token=0.00001234567",
    "block_tokens=1048576 max_tokens: 123456789012",
    "real tokens per second: 12345678901",
    "tokenizer: /data/tokenizers/wordpiece-32768-lowercase",
    "tokenizer=tok/",
    "the last token: something long and harmless",
    "PWD=/home/anna/project",
    "ledger 4611686018427387904 of step 9223372036854775807",
    "rank 3 on host gpu-node-0123456789: bearer of bad news",
    "key train.max_steps stands twice",
    "the basic encoder",
    "cookies are not eaten here",
    "keyed by seeds.derive(seed, 'initial_weights')",
    "12:34:56 restored 123456789:AA",
    "bert.encoder.layer.11.attention.output.LayerNorm.weight",
    "microsoft/deberta-v3-base@8ccc9b6f36199bec6961081d44eb72fb3f7353f3",
    "a1b2c3d4-e5f6-7890-abcd-ef1234567890",
]


@pytest.fixture(autouse=True)
def _fresh_environment_values():
    secrets._environment_secrets.cache_clear()
    yield
    secrets._environment_secrets.cache_clear()


def test_there_are_enough_forms_to_mean_something():
    assert len(FORMATS) >= 50
    assert all(secret in text for text, secret in FORMATS.values())


@pytest.mark.parametrize("name", FORMATS)
def test_a_secret_is_gone_and_what_stands_around_it_stays(name):
    text, secret = FORMATS[name]
    cleaned = redact(f"before | {text} | after")
    assert secret not in cleaned
    assert REDACTED in cleaned
    assert cleaned.startswith("before | ")
    assert name == "cookie" or cleaned.endswith(" | after")
    assert not any(secret[i : i + 8] in cleaned for i in range(0, len(secret) - 8, 4)), cleaned


@pytest.mark.parametrize("name", FORMATS)
def test_a_secret_is_gone_from_within_json_and_other_secrets(name):
    text, secret = FORMATS[name]
    other, other_secret = FORMATS["hugging face"]
    for around in (
        json.dumps({"error": text, "list": [text, {"deep": text}]}),
        f"{text}\n{other}\n{text}",
        repr([text]),
    ):
        assert secret.splitlines()[0] not in redact(around), redact(around)
    assert other_secret not in redact(f"{text}\n{other}\n{text}")


@pytest.mark.parametrize("name", FORMATS)
def test_redacting_twice_changes_nothing_more(name):
    once = redact(FORMATS[name][0])
    assert redact(once) == once


@pytest.mark.parametrize("text", INNOCENT)
def test_ordinary_text_is_left_alone(text):
    assert redact(text) == text


@given(st.text(max_size=300))
def test_any_text_can_be_redacted_and_twice_is_once(text):
    once = redact(text)
    assert redact(once) == once


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "a_" * 100_000, "://" * 60_000, "-----BEGIN PRIVATE KEY-----" * 2_000, "sk-" * 60_000, "password" * 20_000,
     "eyJ" * 60_000, "token: " * 20_000, "https://" * 20_000, "a:b@" * 50_000, "bearer " * 20_000, " " * 200_000, '"' * 200_000],
)  # fmt: skip
def test_the_cost_of_hostile_text_grows_with_its_length_only(text):
    begun = time.process_time()
    redact(text)
    assert time.process_time() - begun < 20  # measured: below 1 s each; a quadratic pattern takes minutes


def test_mappings_are_cleaned_at_any_depth_and_by_name():
    data = {
        "run_folder": "runs/a",
        "steps": 5,
        "rate": 0.5,
        "none": None,
        "flag": True,
        "hf_token": "plain words",
        "nested": [{"password": "x"}, "https://a:b@c/d", 7],
        "mask_token": "[MASK]",
        "api_key": "",
    }
    assert redacted(data) == {
        "run_folder": "runs/a",
        "steps": 5,
        "rate": 0.5,
        "none": None,
        "flag": True,
        "hf_token": REDACTED,
        "nested": [{"password": REDACTED}, f"https://{REDACTED}@c/d", 7],
        "mask_token": "[MASK]",
        "api_key": "",
    }
    assert data["hf_token"] == "plain words"


@pytest.mark.parametrize(
    "name",
    ["password", "db_password", "HF_TOKEN", "token", "client_secret", "AWS_SECRET_ACCESS_KEY", "api-key", "WANDB_API_KEY",
     "credentials", "auth.token", "private_key", "GITHUB_TOKEN"],
)  # fmt: skip
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["mask_token", "pad_token", "tokens", "num_tokens", "tokenizer", "token_types", "key", "keys", "path", "keyboard", "step",
     "added_token", "sort_key", "secretary", "tokens_per_second"],
)  # fmt: skip
def test_names_that_only_look_like_it_are_not(name):
    assert not is_secret_name(name)


def test_no_key_of_the_configuration_is_taken_for_a_secret():
    from dstrain.base.config import _all_keys
    from dstrain.stages.config import FinetuneConfig, PretrainConfig

    keys = [key for model in (PretrainConfig, FinetuneConfig) for key in _all_keys(model)]
    assert [key for key in keys if is_secret_name(key)] == []


def test_what_was_redacted_reads_back_as_yaml_and_json():
    data = {"data": {"path": "https://a:b@c/d"}, "token": "x"}
    cleaned = redacted(data)
    assert parse_yaml(dump_yaml(cleaned), source="test") == cleaned
    assert yaml.safe_load(redact("password: hunter2")) == {"password": REDACTED}


for text in ('{"password": "hunter2"}', '{"a": "password: \\"hunter2\\" and so on"}', '{"a": "token=hunter22"}'):
    assert "hunter2" not in str(json.loads(redact(text)))


def test_a_value_of_the_environment_is_known_without_any_form(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("SHORT_TOKEN", "base")
    monkeypatch.setenv("TOKEN_FILE", "/etc/a-long-file-name")
    secrets._environment_secrets.cache_clear()
    assert redact("got correct-horse-battery in base from /etc/a-long-file-name") == (
        f"got {REDACTED} in base from /etc/a-long-file-name"
    )


def test_a_configuration_read_back_without_its_secret_is_refused_by_name():
    refuse_redacted({"data": {"path": "shards"}, "list": [1, "two"]}, source="config.yaml")
    with pytest.raises(ConfigError, match=r"config.yaml: data.path: its secret was not written .* data.path=\.\.\."):
        refuse_redacted({"data": {"path": f"https://{REDACTED}@c/d"}}, source="config.yaml")
    with pytest.raises(ConfigError, match=r"sources.1.path"):
        refuse_redacted({"sources": [{"path": "a"}, {"path": REDACTED}]}, source="config.yaml")
