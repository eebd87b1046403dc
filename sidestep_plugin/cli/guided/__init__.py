"""The guided start: what the command line left out is asked on a terminal.

questions    what is asked, in which order, and what Enter means
checks       whether an answer can be used, and what follows from it
answers      what is known so far
asking       the terminal: print, prompt, go back
summary      what will be done, before it is done
"""

from __future__ import annotations

from .asking import ask

__all__ = ["ask"]
