"""From start-up to exit code: stop requests, processes, lease, the run, and what is left behind when it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from dstrain.base.errors import DstrainError, ExitCode
from dstrain.base.world import World
from dstrain.health.lease import RunLease
from dstrain.health.outcomes import write_exit
from dstrain.health.signals import StopRequest
from dstrain.stages.assembly import AnyConfig, Assembly, Site, open_site
from dstrain.stages.run import Run


def run_training(config: AnyConfig, world: World, assemble: Callable[[Site], Assembly]) -> ExitCode:
    """Collective. Train until complete or asked to stop.

    Args:
        config: of the run.
        world: this process's place.
        assemble: builds the stage's parts; local to each rank, its faults are agreed.

    Returns:
        COMPLETE, or SAVED_REQUEUE after a stop request.

    Raises:
        DstrainError: a user's fault, the same exit code on every rank.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(watch_parent=world.size > 1))
        site = stack.enter_context(open_site(config, world))
        lease = RunLease(config.run_folder)
        site.control.together(lambda: stack.enter_context(lease) if world.is_first else None)
        run: Run | None = None
        code, cause = ExitCode.DEFECT, "unexpected error"
        try:
            run = Run(config, site, site.control.together(lambda: assemble(site)), lease)
            code = run.execute(stop)
            cause = stop.reason or "complete"
            return code
        except DstrainError as error:
            code, cause = ExitCode(error.exit_code), str(error)
            raise
        finally:
            write_exit(config.run_folder, world, code=code, cause=cause, step=run.state.step if run else None)
