"""What is not taken, and why: said once per process and reason, to the logger ``flash_attn_plus``.

For the places where a problem is prepared for the first time, never for a path that repeated calls take. Nothing is
printed and no handler is added: who wants to read it configures ``logging``.
"""

from __future__ import annotations

import logging
import threading

import torch

_logger = logging.getLogger(__package__)
_said: set[tuple] = set()
_lock = threading.Lock()


def once(reason: str, *args: object, level: int = logging.INFO) -> None:
    """Log ``reason % args``, unless the same was said before, nobody listens at that level, or a graph is traced.

    What nobody heard counts as not said: a program that turns the logger on later hears it at the next new problem.
    """
    said = (reason, args)
    if said in _said or not _logger.isEnabledFor(level) or torch.compiler.is_compiling():
        return
    with _lock:
        if said in _said:
            return
        _said.add(said)
    _logger.log(level, reason, *args, stacklevel=2)
