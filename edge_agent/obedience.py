"""Does what the operator wants: makes a wish durable, switches the generation, tells the episode.

The conductor owns it and calls it on its own thread. A wish that cannot be obeyed for want of disk
space is tried again; one that cannot be obeyed at all is reported as a problem.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from adapter_store.errors import DiskFullError
from adapter_store.wire import Desired
from edge_agent import episode_events as ev
from edge_agent.agent import Agent
from edge_agent.desired import DesiredState
from edge_agent.episode_actions import RETRY_S
from ood.errors import DriftkeelError

log = logging.getLogger(__name__)


class Obedience:
    """The operator's wishes, taken in and obeyed.

    Args:
        agent: Its generations are switched.
        tell: Takes in an event for the episode as it stands.
        after: Runs a function some seconds later.
        report: Sends the reported state.

    Attributes:
        desired: The newest wish taken in.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        tell: Callable[[ev.Event], None],
        after: Callable[[float, Callable[[], None]], None],
        report: Callable[[], None],
    ) -> None:
        self.desired = DesiredState.load(agent.state)
        self._agent = agent
        self._tell = tell
        self._after = after
        self._report = report

    def take(self, wanted: Desired) -> None:
        """Take in a wish and obey it; one that is not newer changes nothing.

        Raises:
            DiskFullError: It could not be made durable, and is not obeyed.
        """
        if wanted.version > self.desired.version:
            desired = DesiredState(wanted.version, wanted.generation, wanted.pinned)
            # Taken in once it is durable: what cannot be kept now is told again.
            desired.save(self._agent.state)
            self.desired = desired
            self._obey()
        self._report()

    def resume(self) -> None:
        """Obey a wish that was taken in before a restart, if it was not obeyed then."""
        if not self.desired.applied:
            self._obey()

    def _obey(self) -> None:
        wanted, problem = self.desired, ""
        serving = self._agent.serving
        running = None if serving is None else serving.number
        if wanted.generation is not None and wanted.generation != running:
            try:
                self._agent.activate(wanted.generation)
            except (DiskFullError, OSError) as error:
                problem = f"generation {wanted.generation} cannot be activated yet: {error}"
                waiting = self.desired = replace(wanted, problem=problem)
                self._after(RETRY_S, lambda: self._retry(waiting))
                log.warning("%s", problem)
                return
            except DriftkeelError as error:
                problem = f"generation {wanted.generation} cannot be activated: {error}"
                log.warning("%s", problem)
            else:
                log.info("the operator switched to generation %d", wanted.generation)
                self._tell(ev.OperatorChose(wanted.generation))
        self._tell(ev.PinChanged(wanted.pinned))
        self.desired = replace(wanted, applied=True, problem=problem)
        try:
            self.desired.save(self._agent.state)
        except (DriftkeelError, OSError) as error:
            # The next start obeys once more, which changes nothing.
            log.warning("what was obeyed cannot be noted: %s", error)

    def _retry(self, waiting: DesiredState) -> None:
        if self.desired is waiting:
            self._obey()
            self._report()
