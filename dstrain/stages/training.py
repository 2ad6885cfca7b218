"""From start-up to exit code: watchdog, processes, lease, the run, and what is left behind when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack

from dstrain.base.errors import DstrainError, ExitCode
from dstrain.base.logs import get_logger
from dstrain.base.peer_loss import peer_loss_named
from dstrain.base.protocols import Interrupted
from dstrain.base.world import World
from dstrain.health.lease import RunLease
from dstrain.health.outcomes import Ending, clear_exits, ending_of, write_exit
from dstrain.health.signals import StopRequest
from dstrain.health.stop_relay import StopRelay
from dstrain.health.watchdog import Watchdog
from dstrain.monitor.goodput import Outcome
from dstrain.monitor.goodput_meter import GoodputMeter
from dstrain.stages.assembly import AnyConfig, Assembly, Site, open_site
from dstrain.stages.cross_checks import agree_on_start
from dstrain.stages.oversight import Oversight, limits_watched
from dstrain.stages.run import Run

_LOG = get_logger(__name__)


def run_training(
    config: AnyConfig, world: World, assemble: Callable[[Site], Assembly], *, stop: StopRequest | None = None
) -> ExitCode:
    """Collective. Train until complete or asked to stop.

    Args:
        config: of the run.
        world: this process's place.
        assemble: builds the stage's parts; local to each rank, its faults are agreed.
        stop: in force already, since before the slow imports; None puts one in force for this call.

    Returns:
        COMPLETE, or after a stop request SAVED_REQUEUE or SAVED_END.

    Raises:
        DstrainError: a user's fault, the same exit code on every rank.
    """
    with ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopRequest(watch_parent=world.size > 1))
        watchdog = Watchdog(config.watchdog, world, config.run_folder)
        fault = _watch(stack, watchdog)
        oversight = Oversight(
            stop, RunLease(config.run_folder, patient=True), watchdog.heartbeat,
            GoodputMeter(config.run_folder, active=world.is_first), config.stop, config.run_folder,
        )  # fmt: skip
        stack.enter_context(peer_loss_named(oversight.where))
        oversight.enter("rendezvous", 0)
        try:
            site = _join(stack, oversight, config, world, fault)
        except Interrupted as left:
            return _not_begun(left, oversight, config, world)
        oversight.relay = stack.enter_context(StopRelay(stop, site.control.store))
        site = dataclasses.replace(site, should_leave=oversight.should_leave)
        oversight.enter("start_up", 0)
        site.control.together(lambda: _take(stack, oversight, config, world))
        return _run(config, site, assemble, oversight)


def _watch(stack: ExitStack, watchdog: Watchdog) -> DstrainError | None:
    """Put the watchdog beside this rank; returns why it cannot be, which the other ranks are to hear before this one leaves."""
    try:
        stack.enter_context(watchdog)
    except DstrainError as error:
        return error
    return None


def _join(stack: ExitStack, oversight: Oversight, config: AnyConfig, world: World, fault: DstrainError | None) -> Site:
    """Collective. Meet the other ranks; one that cannot take part leaves its word for the launcher, as after a step."""
    try:
        with peer_loss_named(oversight.where):
            return stack.enter_context(
                open_site(
                    config.engine, config.start, world, fault=fault,
                    should_leave=lambda: oversight.stop.reason is not None,
                )
            )  # fmt: skip
    except DstrainError as error:
        _leave_word(config, world, oversight, ending_of(error))
        raise


def _not_begun(left: Interrupted, oversight: Oversight, config: AnyConfig, world: World) -> ExitCode:
    """Asked to stop before all ranks were there."""
    code = ExitCode.SAVED_REQUEUE
    _leave_word(config, world, oversight, Ending(code, "request", oversight.stop.reason or code.name.lower()))
    if world.is_first:
        _LOG.info("stopped before all ranks had met, nothing new to save: %s", left)
    return code


def _leave_word(config: AnyConfig, world: World, oversight: Oversight, ending: Ending) -> None:
    write_exit(
        config.run_folder, world, code=ending.code, cause=ending.cause, kind=ending.kind, step=None,
        signal=oversight.stop.signal, phase=oversight.phase,
    )  # fmt: skip


def _take(stack: ExitStack, oversight: Oversight, config: AnyConfig, world: World) -> None:
    """Rank 0 takes the run folder for this job."""
    if world.is_first:
        stack.enter_context(oversight.lease)
        clear_exits(config.run_folder)
        oversight.goodput.start()
        stack.enter_context(limits_watched(oversight, config, world))


def _run(config: AnyConfig, site: Site, assemble: Callable[[Site], Assembly], oversight: Oversight) -> ExitCode:
    run: Run | None = None
    ending = Ending(ExitCode.DEFECT, "defect", "unexpected error")
    try:
        with peer_loss_named(oversight.where):
            try:
                parts = site.control.together(lambda: assemble(site))
                agree_on_start(site.control, config, parts.loader.state_dict())
                run = site.control.together(lambda: Run(config, site, parts, oversight))
                code = run.execute()
            except (
                Interrupted
            ) as left:  # on all ranks, before a step was taken: what is on disk is all there is to save
                code = _left(left, site, oversight)
        asked = code is not ExitCode.COMPLETE
        ending = Ending(code, "request" if asked else "complete", oversight.stop.reason or code.name.lower())
        return code
    except BaseException as error:
        ending = ending_of(error)
        raise
    finally:
        if run is not None:
            run.close()
        oversight.goodput.end(_outcome(ending))
        write_exit(
            config.run_folder, site.world, code=ending.code, cause=ending.cause, kind=ending.kind,
            step=run.state.step if run else None, signal=oversight.stop.signal, phase=oversight.phase,
            last_saved_step=run.saving.last_saved_step if run else None, attempt=oversight.lease.epoch,
        )  # fmt: skip


def _left(interrupted: Interrupted, site: Site, oversight: Oversight) -> ExitCode:
    """Collective. Asked to stop while waiting, before the first step."""
    if site.world.is_first:
        _LOG.info("stopped (%s) before the first step, nothing new to save: %s", oversight.why(), interrupted)
    return oversight.code_of_a_stop(site.control)


def _outcome(ending: Ending) -> Outcome:
    if ending.code is ExitCode.COMPLETE:
        return "complete"
    return "saved" if ending.code in (ExitCode.SAVED_REQUEUE, ExitCode.SAVED_END) else "failed"
