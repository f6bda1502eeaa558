"""Backwards of a loop: what they have asked the blocks for is done before ``loss.backward()`` returns.

An output of a spread model starts a graph of its own. When a backward has reached it, the backwards of the microbatches
follow, in the same thread and after the loop's own, whoever has called it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..driver.capture.suspend import current_thread


class Backwards:
    """Follows every backward of this process, from :meth:`follow` until :meth:`leave`.

    Args:
        begin: Called before every backward, with the tensors that it starts from and those that it is restricted to;
            says whether it must leave its graph.
        complete: Does what a backward has left to do, given whether that keeps its graph; nothing if it did not reach
            the model.
        abandon: Drops that: the backward failed.
    """

    def __init__(
        self,
        begin: Callable[[Sequence[Tensor], Sequence[Any]], bool],
        complete: Callable[[bool], None],
        abandon: Callable[[], None],
    ) -> None:
        self._begin = begin
        self._complete = complete
        self._abandon = abandon
        self._original: Callable[..., Any] | None = None
        self._is_over = self._is_running = False

    def follow(self) -> None:
        """Begin."""
        autograd: Any = torch.autograd  # Any: its own name for the engine is private
        self._original = autograd._engine_run_backward  # what Tensor.backward(), backward() and grad() call
        autograd._engine_run_backward = self._run

    def leave(self) -> None:
        """End; who follows backwards since then keeps doing so."""
        autograd: Any = torch.autograd
        self._is_over = True
        if autograd._engine_run_backward == self._run:
            autograd._engine_run_backward = self._original

    def _run(self, outputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        assert self._original is not None
        # A backward inside of a step is the step's own matter, one inside of another (a checkpoint's) a part of that.
        if self._is_over or self._is_running or current_thread() is not None:
            return self._original(outputs, *args, **kwargs)
        stays = bool(len(args) > 1 and args[1])  # as torch passes them: gradients, retain_graph, create_graph, inputs
        tensors = [each for each in outputs if isinstance(each, Tensor)]
        if self._begin(tensors, args[3] if len(args) > 3 else ()) and not stays:
            args = (args[0], True, *args[2:])
        self._is_running = True
        try:
            result = self._original(outputs, *args, **kwargs)
            self._complete(stays)
        except BaseException:
            self._abandon()
            raise
        finally:
            self._is_running = False
        return result
