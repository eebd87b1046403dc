"""Asks the questions on a terminal: prints, prompts, and goes back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from sidestep_plugin.errors import Refusal

from ..command_line import command_line
from ..terminal import echo
from .answers import Answers, Question
from .checks import check_said
from .extras import add, offered
from .questions import QUESTIONS
from .summary import summary

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Request

BACK: Final = "b"


class GoBack(Exception):
    """Somebody wants the question before."""


def ask(request: Request, missing: set[str]) -> Request:
    """Ask for what is missing, show what was decided, and return the complete request.

    Raises:
        click.Abort: Ctrl-C, or nobody there to answer.
        SystemExit: somebody does not want to start.
    """
    answers = Answers(request, missing)
    echo(f"A few questions. Enter takes the answer in brackets, {BACK} goes back, Ctrl-C leaves.")
    how = f"with the plugin {', '.join(request.plugins)}" if request.plugins else "without a plugin, as ACE-Step trains"
    echo(f"Training {how}. For everything else: acestep-train --help")
    questions = [question for question in QUESTIONS if question.name in missing]
    number, checked = 0, False
    before: list[tuple[int, Answers]] = []
    while True:
        if number == len(questions):
            try:
                _confirm(answers)
            except GoBack:
                number, answers = before.pop()
                continue
            return answers.request
        question = questions[number]
        if not question.wanted(answers):
            number += 1
            continue
        if not checked and question.name != "acestep_root":
            checked = True
            check_said(answers)
        kept = replace(answers)
        try:
            _put(question, answers)
        except GoBack:
            if before:
                number, answers = before.pop()
            continue
        before.append((number, kept))
        number += 1


def _put(question: Question, answers: Answers) -> None:
    echo()
    for line in question.title(answers):
        echo(line)
    while True:
        text = str(click.prompt(question.prompt, default=question.default(answers), type=str)).strip()
        if text == BACK:
            raise GoBack
        # A folder that was dragged into the terminal comes in quotes.
        text = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
        try:
            lines = question.take(answers, text)
        except Refusal as refusal:
            echo(f"  {refusal}")
            continue
        except OSError as error:  # a name that is too long, a folder that may not be opened
            echo(f"  {text[:80]}: {error.strerror or error}. Type another.")
            continue
        for line in lines:
            echo(f"  {line}")
        return


def _confirm(answers: Answers) -> None:
    echo("\nThis training will start:")
    for line in summary(answers):
        echo(f"  {line}")
    echo("\nThe same without questions:")
    echo(f"  {command_line(answers.request)}\n")
    if more := offered(answers):
        echo("Type one or more of these, with commas between them, to add:")
        width = max(map(len, more))
        for name, what in more.items():
            echo(f"  {name:<{width}}  {what}")
    while True:
        text = str(click.prompt(f"Start? [Y/n/{BACK}]", default="y", show_default=False)).strip()
        if text.lower() in ("y", "yes"):
            return
        if text.lower() in ("n", "no"):
            echo("Nothing was started, nothing was written.")
            raise SystemExit(0)
        if text.lower() == BACK:
            raise GoBack
        try:
            add(answers, text)
        except Refusal as refusal:
            echo(f"  {refusal}")
            continue
        _confirm(answers)
        return
