"""Linear functions whose gradient is written by hand."""

from collections.abc import Callable
from typing import Any

import jax


def transposed_by(transpose: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes ``transpose(g, indices)`` the x-gradient of a linear ``fn(x, indices)``.

    Autodiff would turn a gather into a scatter, which is slow on a TPU; the transposes that are given are gathers, too.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        linear = jax.custom_vjp(fn)
        linear.defvjp(lambda x, indices: (fn(x, indices), indices), lambda indices, g: (transpose(g, indices), None))
        return linear

    return decorate
