"""What the wrappers of one attachment share: the plugins that they call, and the runs that have started."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.kinds import network_of
from ..errors import Refusal
from ..ranks import ranks
from ..run import AdapterType, ModelFacts, Run
from .answers import checked_lines
from .current import command_line

if TYPE_CHECKING:
    from ..registry import Registry
    from .journal import Journal


NEED_A_JOURNAL: Final = (
    "engine_resume",
    "acestep_epoch_finished",
    "acestep_between_epochs",
    "engine_plan_processes",
    "engine_epoch_ended",
    "engine_planned",
    "acestep_run_ended",
)
"""Hooks that need a record of the training."""


class Host:
    """The plugins of one attachment and the state of their runs."""

    def __init__(
        self,
        trainer: Any,
        registry: Registry,
        options: Mapping[str, Any],
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.registry = registry
        self.options = dict(options)
        self._say = announce or log_of(trainer).info
        self.listened_to = announce is not None  # by the user; upstream's log may be hidden
        self.attached = False  # whether the wrappers are in place
        self.refusal: Refusal | None = None  # that stopped the newest run
        self.interrupted: Path | None = None  # where the newest run was saved if it was stopped or failed
        self.told: list[str] = []  # lines that were announced since the newest run began
        self.journals: weakref.WeakKeyDictionary[Run, Journal] = weakref.WeakKeyDictionary()
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    def announce(self, line: str) -> None:
        """Tell the user a line. Of several processes, the first one speaks."""
        self.told.append(line)
        if ranks().first:
            self._say(line)

    @property
    def resumes(self) -> bool:
        """Whether a plugin reads checkpoints, so that runs can be resumed and are saved when they stop."""
        return self.registry.implements("engine_resume")

    @property
    def keeps_journal(self) -> bool:
        """Whether any plugin needs a run's journal."""
        return any(map(self.registry.implements, NEED_A_JOURNAL))

    def new_run(
        self, kind: AdapterType, owner: Any, model: Any, *, tensor_dir: Path | None = None, module: Any = None
    ) -> Run:
        """A run that has not started | owner: upstream's trainer or training module, which has the configurations."""
        return Run(
            adapter_type=kind,
            adapter_config=getattr(owner, f"{kind}_config", None),
            training_config=getattr(owner, "training_config", None),
            options=self.options,
            sampled_by=self.registry.asked("acestep_sample_timesteps"),
            tensor_dir=tensor_dir,
            with_lightning=bool(getattr(self.trainer, "LIGHTNING_AVAILABLE", True)),
            ranks=ranks(),
            model_ref=weakref.ref(model),
            module_ref=None if module is None else weakref.ref(module),
            loaded_vae=_vae_of(owner),
        )

    def start(self, run: Run) -> None:
        """Let the plugins decide about a run, and keep it if they accept. Raises Refusal."""
        self._runs.pop(run.model, None)
        if command_line.get() is None:  # which has asked before it loaded the model
            self.registry.call("acestep_model_chosen", facts=ModelFacts.from_model(run.model), options=self.options)
        self.ask_and_announce("acestep_run_started", run=run)
        self._runs[run.model] = run

    def run_of_step(self, module: Any, kind: AdapterType) -> Run:
        """The run of a training module. A module that is used without upstream's trainer starts its own."""
        run = self._runs.get(module.model)
        if run is not None and run.module_ref is None and run.adapter_type == kind:
            run.module_ref = weakref.ref(module)
        if run is None or run.module_ref is None or run.module_ref() is not module:
            run = self.new_run(kind, module, module.model, module=module)
            self.start(run)
        return run

    def run_of_save(self, saved: Any) -> Run | None:
        """The run of a model or a LyCORIS network; None if it was not trained with these plugins."""
        for run in list(self._runs.values()):
            module = run.module_ref() if run.module_ref else None
            if saved is run.model_ref() or (module is not None and saved is network_of(module)):
                return run
        return None

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """A block whose refusal is kept in :attr:`refusal`: upstream reports it like any other failure."""
        try:
            yield
        except Refusal as refusal:
            self.refusal = refusal
            raise

    def ask_and_announce(self, hook: str, **arguments: Any) -> None:
        """Call a hook of every plugin and announce the lines that they return. Raises Refusal."""
        for plugin, lines in self.registry.call(hook, **arguments):
            for line in checked_lines(plugin, hook, lines):
                self.announce(line)


def _vae_of(owner: Any) -> Callable[[], Any]:
    """Answers with the VAE of the app's handler. Weak: asking for it must not keep the app's models in memory."""
    held = weakref.ref(owner)
    return lambda: getattr(getattr(held(), "dit_handler", None), "vae", None)


def log_of(trainer: Any) -> Any:
    """Upstream's log, or ours in versions without one."""
    return getattr(trainer, "logger", None) or logging.getLogger("sidestep_plugin")
