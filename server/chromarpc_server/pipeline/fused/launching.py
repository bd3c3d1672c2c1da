"""Where kernels run: Triton launches on the thread's current device, wherever the tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_device_of_tensors(launches: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has a function run with the device of its first tensor as the current one."""

    @wraps(launches)
    def launch(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        with torch.cuda.device_of(next(value for value in arguments if isinstance(value, Tensor))):
            return launches(*arguments, **keywords)

    return launch
