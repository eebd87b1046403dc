"""What is known so far, and what a question is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Request
    from sidestep_plugin.songs.dataset import Dataset


@dataclass
class Answers:
    """What is known so far.

    Attributes:
        request: the training as it would be.
        asked: names of what was not on the command line.
        models: model folders that were found, in the order of their numbers.
        dataset: the songs, once their folder is known.
        used: an output folder that was answered and holds the adapters of a training.
        checkpoint: the checkpoint that the training resumes from, in words.
    """

    request: Request
    asked: set[str]
    models: list[str] = field(default_factory=list)
    dataset: Dataset | None = None
    used: Path | None = None
    checkpoint: str = ""

    def set(self, **values: Any) -> None:
        self.request = replace(self.request, **values)

    def setting(self, name: str, value: Any) -> None:
        self.set(settings={**self.request.settings, name: value})

    def option(self, name: str, value: Any) -> None:
        self.set(options={**self.request.options, name: value})

    @property
    def songs(self) -> int:
        """Number of songs that are trained on, 1 as long as they are not known."""
        if self.dataset is None:
            return 1
        from sidestep_plugin.validation.held_out import number_of

        said = self.request.options.get("validate")
        return self.dataset.songs - (number_of(said, self.dataset.songs) if said else 0)

    @property
    def begins_anew(self) -> bool:
        """Whether the training does not resume another one."""
        return self.request.resume_from is None


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: what is asked for; left out if the command line has it.
        title: what is printed above, from the answers so far.
        prompt: what stands before the answer.
        default: what Enter means; None if there has to be an answer.
        take: puts an answer into the answers, and returns lines about it. Raises Refusal for one that cannot be used.
        wanted: whether the question is asked at all.
    """

    name: str
    title: Callable[[Answers], Sequence[str]]
    prompt: str
    default: Callable[[Answers], str | None]
    take: Callable[[Answers, str], Sequence[str]]
    wanted: Callable[[Answers], bool] = lambda _: True
