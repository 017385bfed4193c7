"""A training that is stopped, as by a signal, after some lines of its log."""

from collections.abc import Callable, Iterator

from diffusion.training import Progress, fit


def stopped_after(count: int) -> Callable[..., Iterator[Progress]]:
    """A stand-in for fit that stops after so many lines, when the next one is asked for."""

    def begin(*arguments, **named) -> Iterator[Progress]:
        for i, line in enumerate(fit(*arguments, **named), 1):
            yield line
            if i == count:
                raise KeyboardInterrupt

    return begin
