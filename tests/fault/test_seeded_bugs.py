"""The test of the tests, part two: bugs that somebody might write, each of which a named test must notice.

A test that does not fail for the bug it is there for is worth nothing. Each bug is put into a copy, the named test runs in
it and must fail (not error); without the bug the same test passes in the same way. See `tests/support/mutants.py`.
"""

# ruff: noqa: E501 - the texts that are exchanged stand here as they stand in the source

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mutants import Mutant, changed_source, run_in_copy, run_in_fork
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

STORAGE, PUBLISH, READER = "dstrain.base.storage", "dstrain.checkpoint.publish", "dstrain.checkpoint.reader"
KILLS = "fault/test_save_protocol.py::test_one_rank_is_killed_at_every_operation_of_a_save[{}]"
POWER = "fault/test_power_loss.py::test_the_power_is_lost_at_every_moment_of_a_save[{}-1]"
DAMAGE = "fault/test_damaged_checkpoints.py::test_every_way_of_damage_is_met_on_every_checkpoint[{}]"
ERRORS = "fault/test_save_protocol.py::test_every_operation_of_a_save_meets_every_error_once_and_for_good[first save]"
STORAGE_TEST, RETENTION_TEST = "unit/base/test_storage.py::{}", "unit/checkpoint/test_retention.py::{}"

BUGS = (
    Mutant("a file gets its name before its content is synced", STORAGE,
           (("            self._operations.fsync(handle)\n", ""),), POWER.format("steady state")),
    Mutant("the folder around a rename is not synced", STORAGE,
           (("    try:\n        operations().sync_directory(path.parent)\n    except OSError as error:\n        raise NotDurableError(",
             "    try:\n        pass\n    except OSError as error:\n        raise NotDurableError("),), POWER.format("steady state")),
    Mutant("a new folder's own name is not synced", STORAGE,
           (("        operations().make_directory(path)\n        operations().sync_directory(path.parent)", "        operations().make_directory(path)"),),
           POWER.format("first save")),
    Mutant("a file is written in its place", STORAGE,
           (("    temporary = _beside(path)\n    try:\n        digest = _write_new(temporary, data, final=path)",
             "    temporary = path\n    remove_file(path)\n    try:\n        digest = _write_new(temporary, data, final=path)"),),
           "fault/test_fault_harness.py::test_the_protocol_of_the_door_shows_the_old_or_the_new_content_and_at_its_end_the_new"),
    Mutant("a short write counts as a whole one", STORAGE,
           (("        data = data[written:]\n", "        return\n"),), STORAGE_TEST.format("test_short_writes_are_carried_on")),
    Mutant("a failed sync is tried again on the same file", STORAGE,
           (("            self._operations.fsync(handle)\n",
             "            try:\n                self._operations.fsync(handle)\n            except OSError:\n                self._operations.fsync(handle)\n"),),
           STORAGE_TEST.format("test_a_file_is_never_synced_again_after_a_failed_sync")),
    Mutant("a failed sync is not told", STORAGE,
           (("        except OSError as error:\n            self.abandon()\n            raise _storage_error(self.path, error) from error\n        return self._digest",
             "        except OSError:\n            self.abandon()\n        return self._digest"),), ERRORS),
    Mutant("of two who make a file exclusively both succeed", STORAGE,
           (("        operations().link(temporary, final)\n", "        operations().rename(temporary, final)\n"),),
           STORAGE_TEST.format("test_of_two_who_create_a_file_the_first_has_it")),
    Mutant("a checkpoint is deleted in its place", STORAGE,
           (('    doomed = path.with_name(f".deleting-{path.name}-{uuid.uuid4().hex[:8]}")\n',
             "    return discard_directory(path)\n    doomed = path\n"),), KILLS.format("retention deletes one")),
    Mutant("the manifest is written after the rename", PUBLISH,
           (("    write_manifest(staging, manifest)\n    Checkpoint(staging, trust_owner=True)  # as a reader will see it: coverage, sizes\n", ""),
            ("    publish_directory(staging, final)\n", "    publish_directory(staging, final)\n    write_manifest(final, manifest)\n")),
           KILLS.format("steady state")),
    Mutant("nobody asks whose run it is before the rename", PUBLISH,
           (("    check_owner()\n    final =", "    final ="),),
           "fault/test_save_protocol.py::test_a_job_that_lost_its_run_publishes_nothing_whenever_it_notices"),
    Mutant("a checkpoint is published before all ranks have reported", "dstrain.checkpoint.background",
           (("            if not collector.missing:\n                return\n", "            return\n"),),
           "fault/test_save_protocol.py::test_each_of_two_ranks_is_killed_at_every_operation_of_a_save[first save]"),
    Mutant("what the disk gives back is not compared", "dstrain.checkpoint.rank_file",
           (("    if found != sha256:\n", "    if not found:\n"),),
           "fault/test_save_protocol.py::test_a_disk_that_lies_is_found_out_before_the_checkpoint_gets_its_name"),
    Mutant("hashes are not checked when a checkpoint is read", READER,
           (("            if found != entry.sha256:\n", "            if not found:\n"),), DAMAGE.format("flip_a_bit")),
    Mutant("the newest checkpoint is taken unverified", READER,
           (("    checkpoint.verify()\n    return checkpoint\n", "    return checkpoint\n"),), DAMAGE.format("overwrite_with_junk")),
    Mutant("a manifest is believed whatever became of it", "dstrain.checkpoint.manifest",
           (("    if _seal_of(data) != data.get(_SEAL):\n", "    if not data.get(_SEAL):\n"),), DAMAGE.format("forge_a_number")),
    Mutant("the newest checkpoint is the one that was touched last", "dstrain.checkpoint.layout",
           (("    return sorted(found, reverse=True)\n", "    return sorted(found, key=lambda pair: -pair[1].lstat().st_mtime)\n"),),
           "fault/test_damaged_checkpoints.py::test_the_newest_good_checkpoint_is_found_among_damaged_ones"),
    Mutant("a manifest may name any file", "dstrain.checkpoint.layout",
           (('    return ".." not in name and _EXTRA_FILE.fullmatch(name) is not None\n', "    return True\n"),),
           "fault/test_hostile_inputs.py::test_a_checkpoint_that_names_files_elsewhere_is_refused['/etc/passwd']"),
    Mutant("reports of an earlier save are taken for this one's", "dstrain.checkpoint.reports",
           (('    return report if isinstance(report, dict) and report.get("nonce") == nonce else None\n', "    return report\n"),),
           "unit/checkpoint/test_reports.py::test_reports_of_another_save_another_try_and_half_reports_are_not_there"),
    Mutant("retention forgets which one was verified", "dstrain.checkpoint.retention",
           ((" or step == safe or milestone", " or milestone"),),
           RETENTION_TEST.format("test_the_last_verified_one_outlives_newer_ones_that_nobody_read_back")),
    Mutant("room is made by deleting the last checkpoint", "dstrain.checkpoint.retention",
           (("[: max(1, kept.last - coming)]", "[: kept.last - coming]"),), RETENTION_TEST.format("test_one_checkpoint_is_always_left")),
    Mutant("an owner that was taken over goes on publishing", "dstrain.health.lease",
           (("        if newest > self.epoch:\n", "        if newest < 0:\n"),),
           "unit/health/test_lease.py::test_who_was_taken_over_notices_and_leaves_the_new_owners_lease_alone"),
    Mutant("run folders can be read by everybody", "dstrain.base.privacy",
           (("    os.umask(PRIVATE_UMASK)\n", "    os.umask(0o022)\n"),),
           "unit/base/test_privacy.py::test_what_is_written_afterwards_is_the_owners_only"),
    Mutant("every step drops the same activations", "dstrain.train.engine",
           (('derive(self.seed, "dropout", step, ', 'derive(self.seed, "dropout", '),),
           "unit/train/test_engine.py::test_dropout_is_a_function_of_seed_step_rank_and_micro_batch"),
    Mutant("dropout follows the order of calls", "dstrain.train.engine",
           (('torch.manual_seed(derive(self.seed, "dropout", step, self.control.world.rank, number) >> 1)', "pass"),),
           "unit/train/test_engine.py::test_dropout_is_a_function_of_seed_step_rank_and_micro_batch"),
    Mutant("every epoch has the same order", "dstrain.data.source_order",
           (('derive(self.seed, "plan.blocks", self.source, epoch)', 'derive(self.seed, "plan.blocks", self.source)'),),
           "unit/data/test_plan.py::test_known_batches_never_change"),
    Mutant("the ledger does not see the labels", "dstrain.data.ledger",
           (("        value[corrupted.targets] += scored\n", ""),), "unit/data/test_ledger.py::test_any_other_input_id_label_or_target_shows"),
    Mutant("ranks that judged a step differently go on", "dstrain.train.agreement",
           (("    if 0 < out < control.world.size:\n", "    if out < 0:\n"),),
           "unit/train/test_agreement.py::test_ranks_that_judged_a_step_differently_are_found_at_the_next"),
    Mutant("a gradient that is no number is trained on", "dstrain.health.guards",
           (("        if overflowed or not math.isfinite(gradient_norm):\n", "        if overflowed:\n"),),
           "unit/health/test_guards.py::test_gradients_that_are_not_finite_are_skipped_also_when_the_engine_has_not_noticed"),
    Mutant("a crash loop is started again for ever", "dstrain.launcher.policy",
           (("    if after.idle >= policy.idle_limit:\n", "    if after.idle < 0:\n"),),
           "unit/launcher/test_policy.py::test_a_crash_loop_ends_with_79_after_one_try_from_further_back"),
)  # fmt: skip

RESUMED = "fault/test_training_kills.py::test_a_run_killed_some_steps_after_a_save_goes_on_bit_for_bit"
BUGS_OF_RUNS = (
    Mutant("Adam counts its steps from nought again", "dstrain.checkpoint.fragments",
           (('                state["step"].fill_(float(step))\n', "                pass\n"),), RESUMED),
    Mutant("the weights in low precision do not follow the restored masters", "dstrain.checkpoint.fragments",
           (("            self._outer.update_lp_params()\n", "            pass\n"),), RESUMED),
    Mutant("one of Adam's moments is not restored", "dstrain.checkpoint.reader",
           (("            for fragment in fragments:\n                done = 0\n",
             "            for fragment in fragments:\n                if fragment.state == 'exp_avg_sq':\n                    continue\n                done = 0\n"),), RESUMED),
    Mutant("dropout depends on how far this process has come", "dstrain.train.engine",
           (('derive(self.seed, "dropout", step, ', 'derive(self.seed, "dropout", id(self), '),), RESUMED),
    Mutant("a forked child acts on its parent's stop signal", "dstrain.health.signals",
           (("        if os.getpid() != self._pid:  # a forked child: the parent decides\n", "        if not os.getpid():\n"),),
           "unit/health/test_signals.py::test_a_forked_child_neither_dies_of_a_stop_signal_nor_acts_on_it"),
)  # fmt: skip


def test_there_are_enough_bugs_and_no_two_are_the_same() -> None:
    every = [*BUGS, *BUGS_OF_RUNS]
    assert len(BUGS) >= 25
    assert len({(m.module, m.changes) for m in every}) == len(every)
    assert all(changed_source(mutant) for mutant in every)  # each still finds its place


@pytest.mark.parametrize("mutant", BUGS, ids=lambda m: m.bug)
def test_a_seeded_bug_is_caught(mutant: Mutant, tmp_path: Path, zygote: Zygote) -> None:
    verdict = run_in_fork(zygote, mutant.test, tmp_path, mutant)
    assert verdict.code == 1, f"{mutant.bug}: not noticed by {mutant.test}\n{verdict.output[-3000:]}"
    assert "FAILED" in verdict.output


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in BUGS}))
def test_without_a_bug_the_same_tests_pass_in_the_same_way(test: str, tmp_path: Path, zygote: Zygote) -> None:
    verdict = run_in_fork(zygote, test, tmp_path)
    assert verdict.code == 0, verdict.output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, *BUGS_OF_RUNS], ids=lambda m: "no bug" if m is None else m.bug)
def test_a_seeded_bug_is_caught_by_a_real_run(mutant: Mutant | None, tmp_path: Path) -> None:
    verdict = run_in_copy(mutant, RESUMED if mutant is None else mutant.test, tmp_path / "copy")
    assert verdict.code == (0 if mutant is None else 1), verdict.output[-3000:]
