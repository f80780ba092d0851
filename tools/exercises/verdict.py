"""One sentence about an answer, whatever it is: "right", or "not yet: " and what is wrong."""

import functools
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor


class NotYet(Exception):
    """What is wrong with an answer, in one line."""


def shape_of(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def describe_error(error: BaseException, answer: Any) -> str:
    """An error of the answer's own code: what, and in which line of its cell; or of a cell that has not run."""
    parts = [answer, *vars(answer).values()] if hasattr(answer, "__dict__") else [answer]
    files = {part.__code__.co_filename for part in parts if hasattr(part, "__code__")}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f" (line {frames[-1].lineno} of the cell, in {frames[-1].name})" if frames else ""
    mend = "; run the cells above first, or mend the name" * (type(error) is NameError)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}{where}{mend}"


def plain_verdict(*types: type) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Decorates a check(answer): its verdict is one line for every answer.

    Also for a function that returns None, raises, or returns what is none of `types`; and for an answer that is no
    function, where that is not of these types. A class is handed on as it is; `type` stands for a class alone.
    """

    def expect(value: Any) -> Any:
        if value is None:
            raise NotYet("nothing came back")
        if types and not isinstance(value, types):
            wanted = " or ".join("a class" if kind is type else kind.__name__ for kind in types)
            raise NotYet(f"this wants {wanted}, and got {type(value).__name__}")
        return value

    def decorate(check: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(check)
        def checked(answer: Any, *arguments: Any, **options: Any) -> str:
            came = [answer]

            def watched(*given: Any, **named: Any) -> Any:
                try:
                    came.append(answer(*given, **named))
                except NotYet:
                    raise
                except (Exception, SystemExit) as error:
                    raise NotYet(describe_error(error, answer)) from None
                return expect(came[-1])

            is_class, is_function = isinstance(answer, type), callable(answer) and type not in types
            try:
                given = answer if is_class else watched if is_function else expect(answer)
                return check(given, *arguments, **options)
            except NotYet as wrong:
                return f"not yet: {wrong}"
            except (Exception, SystemExit) as error:
                # A class's own, or the check's at what it did not expect.
                is_its = not is_class and type(error) is not NameError
                what = f"the check cannot use {' '.join(repr(came[-1]).split())[:80]} " * is_its
                return f"not yet: {what}{describe_error(error, answer if is_class else None)}"

        return checked

    return decorate
