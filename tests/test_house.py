"""The rules of the house that a machine can check: twins, docstrings, names, pages and presets that match the code."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dstrain.base.errors import ExitCode
from dstrain.cli.training import load_stage_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dstrain"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
ROOM_MODULES = [path for path in MODULES if len(path.parts) == 2 and path.name != "__init__.py"]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

TESTED_ELSEWHERE = {
    "data/blocks.py": "types without logic: mypy holds every dataset to them",
    "data/micro_batch.py": "through the loader, in tests/unit/data/test_loader.py",
    "data/evaluation.py": "through the loader's parts, in tests/unit/data/test_loader.py",
    "stages/training_data.py": "by every pretraining run: tests/stages/test_pipeline.py, tests/stages/test_bad_input.py",
    "data/remote_tokenizer.py": "by a run whose data is a URL, in tests/stages/test_data_sources.py",
    "foreign/block_reader.py": "through the dataset, in tests/unit/foreign/test_dataset.py and tests/unit/foreign/test_damage.py",
    "foreign/importers_dali.py": "with the other importers, in tests/unit/foreign/test_importers.py",
    "foreign/importers_energon.py": "with the other importers, in tests/unit/foreign/test_importers.py",
    "foreign/importers_wids.py": "with the other importers, in tests/unit/foreign/test_importers.py",
    "foreign/publish.py": "what indexing leaves, in tests/unit/foreign/test_index.py",
    "optim/adamw.py": "torch's own step behind the gate and the guard of tests/unit/optim/test_gates.py",
    "monitor/config.py": "settings without logic: tests/test_house.py builds every preset",
    "train/loop_config.py": "settings without logic: tests/test_house.py builds every preset",
    "cli/audit.py": "both commands on a real run, in tests/stages/test_audit.py",
    "cli/launch_here.py": "through the command, in tests/unit/cli/test_launch.py and tests/golden/test_golden_launch.py",
    "cli/launch_stages.py": "every stage's words, in tests/golden/test_golden_launch.py; faults in tests/unit/cli/test_launch.py",
    "cli/shards.py": "every subcommand, in tests/unit/cli/test_data_commands.py",
    "health/sanity.py": "all checks in order: tests/unit/stages/test_sanity.py, tests/fault/test_start.py",
    "stages/audit.py": "a sound run and every doctored copy of it, in tests/stages/test_audit.py",
    "stages/evaluate.py": "repeats the run's own numbers in tests/stages/test_pipeline.py, refuses in tests/stages/test_bad_input.py",
    "stages/passage.py": "what dropped layers leave to do, by a real bench: tests/unit/planner/test_bench_variant.py",
    "stages/pretrain.py": "any world size in tests/dist/test_world_size.py, refusals in tests/stages/test_bad_input.py",
    "stages/run.py": "bitwise resume in tests/dist/test_world_size.py, stops in tests/fault/test_stop.py, tests/stages/test_pipeline.py",
    "stages/training.py": "signals, lease and exit codes in tests/fault/test_stop.py, tests/fault/test_data_fault.py",
}
"""Modules without a twin: what covers them instead. A path named here must exist."""

VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "core", "lib"}


def _ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT) if path.is_absolute() else path) for path in paths]


@functools.cache
def _tracked() -> list[str]:
    """Files that git knows or would take in; only these are in a clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name]


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@pytest.mark.parametrize("module", MODULES, ids=_ids(MODULES))
def test_module_opens_with_what_it_does(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(docstring.split()) >= 4


@pytest.mark.parametrize("module", ROOM_MODULES, ids=_ids(ROOM_MODULES))
def test_module_has_a_twin_test(module: Path) -> None:
    if str(module) in TESTED_ELSEWHERE:
        return
    twin = ROOT / "tests/unit" / module.parent / f"test_{module.name}"
    assert twin.is_file(), f"write {twin.relative_to(ROOT)}, or name what covers dstrain/{module} in TESTED_ELSEWHERE"


def test_modules_that_are_tested_elsewhere_exist_and_have_no_twin() -> None:
    for name, elsewhere in TESTED_ELSEWHERE.items():
        module = Path(name)
        assert (PACKAGE / module).is_file(), f"{name} is gone: strike it from TESTED_ELSEWHERE"
        assert not (ROOT / "tests/unit" / module.parent / f"test_{module.name}").exists(), f"{name} has a twin now"
        for test in re.findall(r"tests/\S+\.py", elsewhere):
            assert (ROOT / test).is_file(), f"{name}: {test} does not exist"


def test_package_files_hold_only_a_docstring() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


@needs_git
def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [name for name in _tracked() if Path(name).stem.lower() in VAGUE_NAMES] == []


def test_imports_keep_floors_and_doors() -> None:
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=_ids(CONFIGS))
def test_every_preset_builds(path: Path) -> None:
    stage = "finetune" if "finetune" in str(path.relative_to(ROOT)) else "pretrain"
    assert str(load_stage_config(stage, path, []).run_folder) != ""


def test_demo_presets_are_the_packaged_ones() -> None:
    for stage in ("pretrain", "finetune"):
        packaged = load_stage_config(stage, PACKAGE / f"corpora/configs/{stage}.yaml", [])
        assert load_stage_config(stage, ROOT / f"configs/demo/{stage}.yaml", []) == packaged


def test_exit_code_page_is_the_enum() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (.+?) \| .+? \|$", page, re.MULTILINE)
    tree = ast.parse((PACKAGE / "base/errors.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ExitCode")
    meanings = {
        name.targets[0].id: text.value.value
        for name, text in itertools.pairwise(body)
        if isinstance(name, ast.Assign) and isinstance(name.targets[0], ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert rows == [(str(code.value), code.name, meanings[code.name]) for code in ExitCode]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_up_to_date() -> None:
    page = _load(ROOT / "tests/support/configuration_page.py")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text, "docs/configuration.md is out of date: run `make docs`"


def test_tests_named_in_pages_exist() -> None:
    named = {
        (page.name, *found)
        for page in (ROOT / "docs").rglob("*.md")
        for found in re.findall(r"`(tests/[^`\s*]*?\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    }
    assert len([page for page, _, _ in named if page == "faults.md"]) >= 25
    for page, file, test in sorted(named):
        assert (ROOT / file).is_file(), f"docs/{page} names {file}"
        source = (ROOT / file).read_text(encoding="utf-8")
        found = re.search(rf"^def {test}\(" if test else r"^def test_|^def main", source, re.MULTILINE)
        assert found, f"docs/{page} names {file}::{test}"


@needs_git
def test_readme_tree_is_the_top_level_on_disk() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```\n(.*?)```", readme, re.DOTALL)
    assert tree is not None
    named = {line.split()[0].rstrip("/") for line in tree[1].splitlines()}
    assert named == {name.split("/")[0] for name in _tracked()}


@needs_git
def test_links_between_pages_lead_somewhere() -> None:
    for name in _tracked():
        if not name.endswith(".md"):
            continue
        page = ROOT / name
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name} links to {target}"


@needs_git
def test_make_targets_named_in_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in _tracked():
        if name.endswith(".md"):
            named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
            assert named <= targets, f"{name}: {named - targets}"
