"""No input file runs code, hangs or eats the machine (promise P13): every hostile input is refused with a fault of ours.

Tars, blocks and arrays have their own cases in tests/unit/data/test_hostile_shards.py, URLs in tests/unit/base/test_locations.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from dstrain.base.config import Config, load_config, parse_overrides, parse_yaml
from dstrain.base.errors import CheckpointError, ConfigError, DataError, DstrainError
from dstrain.base.storage import read_json
from dstrain.base.world import expand_nodelist, world_from_environment
from dstrain.checkpoint.layout import MANIFEST
from dstrain.checkpoint.manifest import sealed
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from dstrain.cli.training import load_stage_config
from dstrain.data.tokenizer import Tokenizer
from dstrain.models.huggingface import load_folder_weights, read_architecture
from dstrain.monitor.goodput_meter import read_attempts
from tests.support.tiny_checkpoints import save

pytestmark = pytest.mark.fault

CANARY = "dstrain_" + "canary"  # in pieces: pytest compiles this very file again to show a failure
_LIMIT_S = 20  # promised: 5 s; the rest is room for a loaded machine
_LIMIT_GROWTH_KB = 1_500_000


class Watch:
    """What the interpreter was made to do while armed, from its audit events."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "pickle.find_class",
            "socket.connect",
        ):
            self.seen.append(f"{event} {args!r}"[:200])
        elif event == "exec" and isinstance(args[0], CodeType) and _mentions_canary(args[0]):
            self.seen.append(f"exec {args[0].co_filename}")
        elif event in ("compile", "import") and CANARY in repr(args[0]):
            self.seen.append(f"{event} {args[0]!r}"[:200])


def _mentions_canary(code: CodeType) -> bool:
    names = [*code.co_names, code.co_filename, *map(repr, code.co_consts)]
    return any(CANARY in name for name in names) or any(
        _mentions_canary(inner) for inner in code.co_consts if isinstance(inner, CodeType)
    )


_WATCH = Watch()
sys.addaudithook(_WATCH.hook)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"still busy after {_LIMIT_S} s")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file a payload would make; afterwards neither it nor any event of code running may be there."""
    path = tmp_path / f"{CANARY}.marker"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(_LIMIT_S)
    _WATCH.seen, _WATCH.armed = [], True
    try:
        yield path
    finally:
        _WATCH.armed = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert _WATCH.seen == []
    assert not path.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _LIMIT_GROWTH_KB


def test_the_watch_sees_what_it_is_there_for(tmp_path: Path) -> None:
    _WATCH.seen, _WATCH.armed = [], True
    try:
        exec(f"{CANARY} = 1")
        compile(f"{CANARY} + 1", "x", "eval")
        with pytest.raises(ImportError):
            __import__(f"{CANARY}_module")
        import pickle

        pickle.loads(b"cos\ngetpid\n.")
        import os

        os.system("true")
    finally:
        _WATCH.armed = False
    kinds = {line.split()[0] for line in _WATCH.seen}
    assert kinds >= {"exec", "compile", "import", "pickle.find_class", "os.system"}


# --- configuration -------------------------------------------------------------------------------------------------------


def _bomb(levels: int, width: int) -> str:
    lines = (f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels))
    return "\n".join(["a0: &a0 [lol, lol]", *lines]) + f"\nseed: *a{levels - 1}\n"


def _shell(marker: Path) -> str:
    return f"touch {marker}"


YAMLS: dict[str, Callable[[Path], str]] = {
    "apply os.system": lambda m: f"seed: !!python/object/apply:os.system ['{_shell(m)}']",
    "apply subprocess": lambda m: f"seed: !!python/object/apply:subprocess.check_output [[touch, '{m}']]",
    "apply eval": lambda m: f"seed: !!python/object/apply:builtins.eval [\"open('{m}', 'w')\"]",
    "apply exec in a list": lambda m: f"model: [!!python/object/apply:builtins.exec [\"open('{m}', 'w')\"]]",
    "new": lambda m: f"seed: !!python/object/new:os.system ['{_shell(m)}']",
    "new with state": lambda m: f"seed: !!python/object/new:type {{args: [{CANARY}, !!python/tuple [], {{}}], state: {{}}}}",
    "object": lambda m: "seed: !!python/object:os._wrap_close {}",
    "name": lambda m: "seed: !!python/name:os.system",
    "module": lambda m: f"seed: !!python/module:{CANARY}",
    "tuple": lambda m: "seed: !!python/tuple [1, 2]",
    "bytes": lambda m: "seed: !!python/bytes YQ==",
    "long": lambda m: "seed: !!python/long 5",
    "tag as a key": lambda m: f"? !!python/object/apply:os.system ['{_shell(m)}']\n: 1",
    "tag by url": lambda m: f"seed: !<tag:yaml.org,2002:python/object/apply:os.system> ['{_shell(m)}']",
    "tag by directive": lambda m: f"%TAG !p! tag:yaml.org,2002:python/object/apply:\n---\nseed: !p!os.system ['{_shell(m)}']",
    "unknown local tag": lambda m: "seed: !run x",
    "instantiation by target": lambda m: f"model: {{_target_: os.system, command: '{_shell(m)}'}}",
    "environment expansion": lambda m: "seed: ${oc.env:HOME}",
    "jinja": lambda m: "seed: \"{{ self.__init__.__globals__ }}\"",
    "include of an absolute file": lambda m: "include: [/etc/passwd]",
    "include of a device": lambda m: "include: [/dev/null]\nseed: x",
    "include of a mapping": lambda m: "include: {a: b}",
    "include upwards": lambda m: "include: [../../../../../../etc/hostname]",
    "double key": lambda m: "seed: 1\nseed: 2",
    "double key in a tag": lambda m: "model: {config: {a: 1, a: 2}}",
    "list as a key": lambda m: "? [1, 2]\n: 3",
    "mapping as a key": lambda m: "? {a: 1}\n: 3",
    "NUL": lambda m: "seed: \"a\0b\"",
    "escaped NUL in a path": lambda m: 'run_folder: "a\\0b"\nseed: x',
    "control characters": lambda m: "seed: \x07\x1b[2J",
    "lone surrogate": lambda m: 'run_folder: "\\ud800"',
    "tabs": lambda m: "\tseed: 1",
    "unclosed": lambda m: "seed: [1, 2",
    "several documents": lambda m: "seed: 1\n---\nseed: 2",
    "a list": lambda m: "- 1",
    "a word": lambda m: "hello",
    "huge integer": lambda m: "seed: " + "9" * 100_000,
    "huge integer in hex": lambda m: "seed: 0x" + "f" * 100_000,
    "sexagesimal": lambda m: "seed: 1" + ":59" * 50_000,
    "huge exponent": lambda m: "seed: 1e999999999",
    "not a number": lambda m: "seed: .nan",
    "infinity": lambda m: "optimizer: {learning_rate: .inf}",
    "negative": lambda m: "seed: -1",
    "date": lambda m: "seed: 2024-02-30",
    "merge of a word": lambda m: "<<: word\nseed: 1",
    "merge of itself": lambda m: "a: &a\n  <<: *a\n  b: 1",
    "recursive list": lambda m: "seed: &a [*a]",
    "recursive mapping": lambda m: "model: &a {config: *a}",
    "unknown alias": lambda m: "seed: *nowhere",
    "anchor bomb": lambda m: _bomb(9, 9),
    "wide anchor bomb": lambda m: _bomb(5, 60),
    "merge bomb": lambda m: "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)),
    "deep flow": lambda m: "seed: " + "[" * 20_000,
    "deep closed flow": lambda m: "seed: " + "[" * 5_000 + "]" * 5_000,
    "deep mapping": lambda m: "seed: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "deep block": lambda m: "\n".join(" " * n + "a:" for n in range(1_000)),
    "a million characters": lambda m: "seed: " + "a" * 1_000_000,
    "twenty thousand keys": lambda m: "\n".join(f"key{n}: 1" for n in range(20_000)),
    "unknown key with a shell": lambda m: f"\"$({_shell(m)})\": 1",
}  # fmt: skip

NOT_UTF8 = {
    "latin": b"seed: \xe9",
    "utf-16": "seed: x".encode("utf-16"),
    "binary": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08" * 50,
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_hostile_configuration_is_refused(tmp_path: Path, marker: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAMLS[name](marker), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError) as raised:
        load_stage_config("pretrain", path, [])
    assert len(str(raised.value)) < 100_000


@pytest.mark.parametrize("name", NOT_UTF8)
def test_a_configuration_that_is_no_text_is_refused(tmp_path: Path, marker: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_bytes(NOT_UTF8[name])
    with pytest.raises(ConfigError):
        load_stage_config("pretrain", tmp_path / "run.yaml", [])


HEAVY = ["seed=" + "[" * 20_000, "seed=" + "9" * 100_000, "seed=&a [*a]"]


@pytest.mark.parametrize(
    "text",
    ["=1", ".=1", "a..b=1", "seed", "seed=!!python/name:os.system", "seed=!!python/object/apply:os.system [x]", "seed=[", "seed=*a",
     "seed=\0", *HEAVY],
)  # fmt: skip
def test_a_hostile_override_is_refused(marker: Path, text: str) -> None:
    class Simple(Config):
        """One key."""

        seed: int = 0
        """A number."""

    with pytest.raises(ConfigError):
        load_config(Simple, None, [text])


def test_a_value_is_data_whatever_it_looks_like(marker: Path) -> None:
    for text in (
        f"$({_shell(marker)})",
        f"`{_shell(marker)}`",
        f"; {_shell(marker)}",
        "__import__('os').system('x')",
        "\u202egnp.exe",
    ):
        assert parse_overrides([f"run_folder='{text.replace(chr(39), chr(39) * 2)}'"]) == {"run_folder": text}
        assert parse_yaml(json.dumps(text), source="test") == text


# --- JSON: manifests, records ----------------------------------------------------------------------------------------------

JSONS: dict[str, bytes] = {
    "empty": b"", "a word": b"word", "deep list": b"[" * 1_000_000, "deep mapping": b'{"a":' * 200_000, "NUL": b'{"a": "\0"}',
    "deep and closed": b"[" * 200_000 + b"]" * 200_000, "latin": b'"\xe9"', "binary": bytes(range(256)), "unclosed": b'{"a": 1',
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00cos\nsystem\n.", "huge integer": b'{"format_version": ' + b"9" * 100_000 + b"}",
    "trailing": b'{"format_version": 1} {"format_version": 1}', "utf-16 bomb": "[".encode("utf-16") + b"[\0" * 300_000,
}  # fmt: skip


@pytest.mark.parametrize("name", JSONS)
def test_hostile_json_is_refused_wherever_it_is_read(tmp_path: Path, marker: Path, name: str) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    (folder / MANIFEST).write_bytes(JSONS[name])
    with pytest.raises(CheckpointError):
        Checkpoint(folder)
    (tmp_path / "x.json").write_bytes(JSONS[name])
    if name != "huge integer":  # JSON all right; what reads it wants a version
        with pytest.raises(DataError):
            read_json(tmp_path / "x.json")
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0001.json").write_bytes(JSONS[name])
    assert read_attempts(tmp_path) == []


def test_json_larger_than_its_limit_is_not_read(tmp_path: Path, marker: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(DataError, match="larger than"):
        read_json(tmp_path / "x.json")


# --- checkpoints -----------------------------------------------------------------------------------------------------------

NAMES = [
    "../evil", "a/../../evil", "/etc/passwd", "..", ".", "", "./a", "a//b", "a/", "a\0b", "a\\..\\b", "~/x", "-rf", "a\nb", "$(x)",
    "`x`", "a;b", "a|b", "\u202eevil", "a" * 5_000, ".hidden", "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path: Path, marker: Path, name: str) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    some = next(iter(manifest["files"]))
    manifest["files"][name] = manifest["files"].pop(some)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    by_name = name not in ("a" * 5_000, "manifest.json")  # fine as names; there is no such file, or it is another
    with pytest.raises(CheckpointError, match="refused file name" if by_name else None):
        Checkpoint(folder).verify()
    assert newest_valid(tmp_path / "checkpoints").checkpoint is None


def _changed(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[next(iter(place)) if key == "*" else key]
        place[next(iter(place)) if path[-1] == "*" else path[-1]] = to

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "other format": _changed("format", to="pickle"), "future version": _changed("format_version", to=10**6),
    "version as text": _changed("format_version", to="2"), "negative step": _changed("step", to=-1),
    "step 2^64": _changed("step", to=2**64), "huge shape": _changed("parameters", "*", to=[2**31, 2**31]),
    "negative shape": _changed("parameters", "*", to=[-1, -1]), "shape 2^63": _changed("parameters", "*", to=[2**63]),
    "shape as text": _changed("parameters", "*", to="[1]"), "no parameters": _changed("parameters", to={}),
    "negative size": _changed("files", "*", "size_bytes", to=-1), "size 2^63": _changed("files", "*", "size_bytes", to=2**63),
    "hash as a path": _changed("files", "*", "sha256", to="../../../x"), "no hash": _changed("files", "*", "sha256", to=""),
    "unknown key": _changed("__reduce__", to=["os.system"]), "files as a list": _changed("files", to=[]),
    "no files": _changed("files", to={}),
    "world of none": _changed("world_size", to=0), "stage 9": _changed("zero_stage", to=9),
    "not a mapping inside": _changed("state", to=[]),
    "unknown states": _changed("states", to=["fp32", "../x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(tmp_path: Path, marker: Path, name: str) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    MANIFESTS[name](manifest)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    if name != "step 2^64":  # a number like any other, but not the folder's
        with pytest.raises(CheckpointError):
            _use(folder)
    assert newest_valid(tmp_path / "checkpoints").checkpoint is None or name == "unknown states"


def _use(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    checkpoint.tensors()


@pytest.mark.parametrize("place", ["offset", "count", "negative", "overlap", "parameter", "state"])
def test_fragments_that_lie_are_refused(tmp_path: Path, marker: Path, place: str) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    fragment = next(entry["fragments"][0] for entry in manifest["files"].values() if entry["fragments"])
    changes = {
        "offset": (2, 2**62), "count": (3, 2**62), "negative": (2, -1), "overlap": (3, fragment[3] + 1),
        "parameter": (0, "__class__"), "state": (1, "../x"),
    }  # fmt: skip
    index, value = changes[place]
    fragment[index] = value
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError):
        Checkpoint(folder).tensors()


# --- safetensors ------------------------------------------------------------------------------------------------------------


def _safetensors(header: bytes | dict[str, Any], data: bytes = b"\0" * 16, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(**fields: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}}


SAFETENSORS: dict[str, bytes] = {
    "empty": b"", "short": b"\1\2\3", "header of 2^63": _safetensors(b"{}", length=2**63),
    "header of 2^64-1": _safetensors(b"{}", length=2**64 - 1),
    "header past the end": _safetensors(b"{}", length=10_000), "no header": _safetensors(b"", b""), "header is a list": _safetensors(b"[]"),
    "header is a pickle": _safetensors(b"\x80\x04cos\nsystem\n."), "header of NaN": _safetensors(b'{"w": NaN}'),
    "deep header": _safetensors(b"[" * 100_000), "not UTF-8": _safetensors(b'{"\xff": 1}'),
    "overlap": _safetensors({**_tensor(), "v": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, b"\0" * 24),
    "gap": _safetensors(_tensor(data_offsets=[8, 24]), b"\0" * 24), "trailing": _safetensors(_tensor(), b"\0" * 64),
    "past the end": _safetensors(_tensor(data_offsets=[0, 2**40])), "backwards": _safetensors(_tensor(data_offsets=[16, 0])),
    "negative offset": _safetensors(_tensor(data_offsets=[-16, 0])), "negative shape": _safetensors(_tensor(shape=[-4])),
    "huge shape": _safetensors(_tensor(shape=[2**62, 2**62])), "wrapping shape": _safetensors(_tensor(shape=[2**32, 2**32, 4])),
    "dtype lie": _safetensors(_tensor(dtype="F64")), "unknown dtype": _safetensors(_tensor(dtype="PICKLE")),
    "shape lie": _safetensors(_tensor(shape=[5])), "torch pickle": b"PK\3\4" + b"\0" * 200,
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_tensor_files_are_refused_also_when_their_manifest_vouches_for_them(
    tmp_path: Path, marker: Path, name: str
) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    file = next(n for n, entry in manifest["files"].items() if entry["fragments"])
    (folder / file).write_bytes(SAFETENSORS[name])
    assert newest_valid(tmp_path / "checkpoints").checkpoint is None
    manifest["files"][file]["size_bytes"] = len(SAFETENSORS[name])
    manifest["files"][file]["sha256"] = hashlib.sha256(SAFETENSORS[name]).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError):
        Checkpoint(folder).tensors()


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_tensor_files_of_a_model_folder_are_refused(tmp_path: Path, marker: Path, name: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(SAFETENSORS[name])
    with pytest.raises(DstrainError):
        load_folder_weights(tmp_path / "hf")


def test_pickled_weights_are_not_opened(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'{_shell(marker)}'\ntR.".encode())
    with pytest.raises(ConfigError, match=r"pickled \.bin files are not loaded"):
        load_folder_weights(tmp_path)


# --- Hugging Face folders ---------------------------------------------------------------------------------------------------

PAYLOAD = "import pathlib\n{canary} = 1\npathlib.Path({marker!r}).write_text('ran')\nclass Evil:\n    pass\n"


def _model_folder(folder: Path, marker: Path, config: dict[str, Any], **files: str) -> Path:
    folder.mkdir()
    code = PAYLOAD.format(canary=CANARY, marker=str(marker))
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil", "AutoModelForMaskedLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}  # fmt: skip


def test_a_model_that_brings_code_is_read_without_it(tmp_path: Path, marker: Path) -> None:
    from dstrain.models.config import ModelConfig
    from dstrain.models.huggingface import build_masked_lm

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = _model_folder(
        tmp_path / "hf", marker, {"model_type": "bert", **sizes, "auto_map": AUTO_MAP, "trust_remote_code": True}
    )
    architecture = read_architecture(folder)
    assert "auto_map" not in architecture
    architecture.pop("trust_remote_code", None)
    special = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    build_masked_lm(
        ModelConfig(config={"model_type": "bert"}), vocab_size=100, special=special, architecture=architecture
    )


@pytest.mark.parametrize(
    "config",
    [{"model_type": "evil", "auto_map": AUTO_MAP}, {"auto_map": AUTO_MAP}, {"model_type": f"../{CANARY}"},
     {"model_type": ["bert"]}, {}],
    ids=["unknown type", "no type", "path as type", "list as type", "empty"],
)  # fmt: skip
def test_a_model_of_an_unknown_kind_is_refused(tmp_path: Path, marker: Path, config: dict[str, Any]) -> None:
    from dstrain.models.config import ModelConfig
    from dstrain.models.huggingface import build_masked_lm

    folder = _model_folder(tmp_path / "hf", marker, config)
    with pytest.raises(DstrainError):
        build_masked_lm(
            ModelConfig(config={"hidden_size": 32}, init_from=str(folder)),
            vocab_size=100,
            special={},
            architecture=read_architecture(folder),
        )


def _wordpiece(number: int) -> str:
    return json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": {"a": number}, "unk_token": "a"}})


TOKENIZERS: dict[str, dict[str, str]] = {
    "code in auto_map": {
        "tokenizer__json": "{}",
        "tokenizer_config__json": json.dumps({"auto_map": AUTO_MAP, "tokenizer_class": "Evil", "trust_remote_code": True}),
    },
    "code and no file": {"tokenizer__json": "", "tokenizer_config__json": json.dumps({"auto_map": AUTO_MAP})},
    "class as a path": {"tokenizer__json": "{}", "tokenizer_config__json": json.dumps({"tokenizer_class": f"{CANARY}.Evil"})},
    "deep": {"tokenizer__json": "[" * 100_000},
    "deep mapping": {"tokenizer__json": '{"model":' * 50_000},
    "a list": {"tokenizer__json": "[]"},
    "unknown model": {"tokenizer__json": json.dumps({"version": "1.0", "model": {"type": "Pickle", "vocab": {}}})},
    "negative ids": {"tokenizer__json": _wordpiece(-1)},
    "ids of 2^63": {"tokenizer__json": _wordpiece(2**63)},
    "not UTF-8 text": {"tokenizer__json": "\udcff"},
    "regex bomb that does not compile": {
        "tokenizer__json": json.dumps(
            {"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
             "model": {"type": "BPE", "vocab": {}, "merges": []}}
        )
    },
    "vocabulary that is a pickle": {"vocab__txt": "cos\nsystem\n.", "tokenizer_config__json": "\x80\x04."},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, marker: Path, name: str) -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenization_evil.py").write_text(PAYLOAD.format(canary=CANARY, marker=str(marker)))
    for file, text in TOKENIZERS[name].items():
        (folder / file.replace("__", ".")).write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(DstrainError):
        Tokenizer.load(folder)


# --- hosts and ranks --------------------------------------------------------------------------------------------------------

HOSTS = [
    "a;touch x", "$(touch x)", "`touch x`", "a|b", "a&b", "a\nb", "a b", "-oProxyCommand=x", "a[1-2];x", "\u202ea", "a\0b", "a'b", 'a"b',
    "a>b", "a/../b", "a[1-999999999999]", "a[1-1000]b[1-1000]c[1-1000]d[1-1000]", "a" * 100_000, "a[" * 10_000, "[" + "1," * 200_000 + "1]",
    "a[1-2", "a]1[", "a[1-2]]", "a[٣-٤]", "a[1-2][", "a,,;", "a\\b", "é", "a[0x1-0x2]", "user@a",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTS, ids=lambda text: repr(text)[:30])
def test_a_hostile_node_list_is_refused(marker: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        expand_nodelist(text)
    environment = {
        "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": text, "SLURM_TASKS_PER_NODE": "2",
    }  # fmt: skip
    with pytest.raises(ConfigError):
        world_from_environment(environment)


@pytest.mark.parametrize(
    "change",
    [{"SLURM_NTASKS": "9" * 5_000}, {"SLURM_TASKS_PER_NODE": "1(x99999999999)"}, {"SLURM_TASKS_PER_NODE": "2;x"}, {"SLURM_PROCID": "$(x)"},
     {"SLURM_TASKS_PER_NODE": "٢"}, {"SLURM_NODEID": "-5"}, {"MASTER_ADDR": "$(touch x)"}, {"MASTER_PORT": "70000"}, {"MASTER_PORT": "-1"}],
    ids=str,
)  # fmt: skip
def test_a_hostile_environment_is_refused(marker: Path, change: dict[str, str]) -> None:
    environment = {
        "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_TASKS_PER_NODE": "2",
    }  # fmt: skip
    with pytest.raises(ConfigError):
        world_from_environment({**environment, **change})


def test_there_are_as_many_inputs_as_promised() -> None:
    tables = (YAMLS, NOT_UTF8, JSONS, NAMES, MANIFESTS, SAFETENSORS, TOKENIZERS, HOSTS)
    assert sum(map(len, tables)) >= 180
    assert math.isfinite(_LIMIT_S)
