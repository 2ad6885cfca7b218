"""Nothing in dstrain runs code that data names: what ruff's security rules (pyproject.toml) do not know is banned here."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("dstrain", "launch") for path in (ROOT / folder).rglob("*.py"))

BANNED_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "copyreg", "jsonpickle", "pty",
    "code", "codeop", "telnetlib", "ftplib", "xmlrpc", "runpy", "imp",
}  # fmt: skip
BANNED_CALLS = {
    "torch.load", "torch.hub.load", "torch.package", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.fromregex", "eval", "exec", "compile",
    "__import__", "builtins.eval", "builtins.exec", "tempfile.mktemp", "shutil.unpack_archive", "asyncio.create_subprocess_shell",
}  # fmt: skip
BANNED_METHODS = {"extractall", "extract"}
"""Of tar and zip archives: members are read, never unpacked to disk."""
KEYWORDS = {"weights_only": True, "allow_pickle": False, "trust_remote_code": False, "shell": False}
"""Keyword arguments whose only allowed value is this one, written out."""
IMPORTS_BY_VARIABLE = {"dstrain/base/remote.py": "a table of this module says which package opens which scheme"}
"""Where `import_module` gets something else than a written-out name, and why that is no name from data."""


def faults(source: str, name: str = "file.py") -> list[str]:
    """Every banned thing in a module's source, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module.split(".")[0] in BANNED_MODULES:
                found.append((node, node.module))
            found += [(node, n) for a in node.names if (n := f"{node.module}.{a.name}") in BANNED_CALLS]
        elif isinstance(node, ast.Call):
            found += [(node, fault) for fault in _call_faults(node, name)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in BANNED_CALLS:
            found.append((node, ast.unparse(node)))  # also when it is only handed on
    return [f"{name}:{node.lineno}: {what}" for node, what in found]


def _call_faults(node: ast.Call, name: str) -> list[str]:
    called = ast.unparse(node.func)
    found = [called] if called in BANNED_CALLS and isinstance(node.func, ast.Name) else []
    if isinstance(node.func, ast.Attribute) and node.func.attr in BANNED_METHODS:
        found.append(f".{node.func.attr}()")
    if called.startswith(("os.exec", "os.spawn")):
        found.append(called)
    for keyword in node.keywords:
        if keyword.arg in KEYWORDS:
            value = keyword.value
            if not (isinstance(value, ast.Constant) and value.value is KEYWORDS[keyword.arg]):
                found.append(f"{keyword.arg}={ast.unparse(value)}")
    if called in ("importlib.import_module", "import_module") and name not in IMPORTS_BY_VARIABLE:
        if not (node.args and isinstance(node.args[0], ast.Constant)):
            found.append(f"{called} of a name that is not written out")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_does_what_would_let_data_run_code(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))) == []


PLANTED = [
    "import pickle", "from pickle import loads", "import dill as d", "import marshal", "import torch\ntorch.load('x')",
    "from torch import load", "import torch\nopen_it = torch.load", "import os\nos.system('x')", "import os\nos.popen('x')",
    "import os\nos.execv('x', [])", "import os\nos.spawnl(0, 'x')", "eval('1')", "exec('1')", "compile('1', '', 'eval')",
    "__import__('x')", "import importlib\nimportlib.import_module(name)", "np.load(f, allow_pickle=True)",
    "load(f, allow_pickle=flag)", "load(f, weights_only=False)", "M.from_pretrained(p, trust_remote_code=True)",
    "M.from_pretrained(p, trust_remote_code=config.trust)", "subprocess.run('x', shell=True)", "tar.extractall('x')",
    "tar.extract(m)", "import shutil\nshutil.unpack_archive('x')", "import subprocess\nsubprocess.getoutput('x')",
    "import yaml\nyaml.load(x)", "import tempfile\ntempfile.mktemp()", "import runpy",
]  # fmt: skip


@pytest.mark.parametrize("source", PLANTED)
def test_every_planted_fault_is_found(source: str) -> None:
    assert len(faults(source)) >= 1


def test_harmless_code_is_not_accused() -> None:
    source = (
        "import json, importlib, re, subprocess\nre.compile('x')\nimportlib.import_module('deepspeed')\nnp.load(f, allow_pickle=False)\n"
        "M.from_pretrained(p, trust_remote_code=False)\nsubprocess.run(['ls'], shell=False)\njson.loads('1')\nmodel.eval()\n"
    )
    assert faults(source) == []


def test_exceptions_are_still_needed() -> None:
    for name in IMPORTS_BY_VARIABLE:
        assert "import_module" in (ROOT / name).read_text(encoding="utf-8"), (
            f"{name}: strike it from IMPORTS_BY_VARIABLE"
        )


RUFF_CASES = {
    "S102": "exec(text)", "S307": "eval(text)", "S301": "import pickle\n\npickle.loads(text)", "S506": "import yaml\n\nyaml.load(text)",
    "S602": "import subprocess\n\nsubprocess.run(text, shell=True)", "S605": "import os\n\nos.system(text)",
    "S607": "import subprocess\n\nsubprocess.run(['git'])", "S202": "import tarfile\n\ntarfile.open(text).extractall()",
    "S306": "import tempfile\n\ntempfile.mktemp()", "S103": "import os\n\nos.chmod(text, 0o777)", "S104": "bind = '0.0.0.0'",
    "S302": "import marshal\n\nmarshal.loads(text)", "S113": "import requests\n\nrequests.get(text)",
    "S324": "import hashlib\n\nhashlib.md5(text)",
    "S310": "import urllib.request\n\nurllib.request.urlopen(text)",
    "S501": "import requests\n\nrequests.get(text, verify=False, timeout=1)",
}  # fmt: skip


def test_ruff_is_told_to_ban_the_rest(tmp_path: Path) -> None:
    """Each planted line, linted as a module of dstrain, is refused by the rule that names it."""
    folder = tmp_path / "dstrain"
    folder.mkdir()
    for code, source in RUFF_CASES.items():
        (folder / f"{code.lower()}.py").write_text(f"{source}\n", encoding="utf-8")
    ruff = Path(sys.executable).parent / "ruff"
    command = [
        str(ruff),
        "check",
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--output-format",
        "json",
        str(folder),
    ]
    report = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = {(Path(entry["filename"]).stem.upper(), entry["code"]) for entry in json.loads(report.stdout)}
    assert {(code, code) for code in RUFF_CASES} <= found
