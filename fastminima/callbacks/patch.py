"""Putting something around a method of one object, and taking it off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["around"]


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Make `owner.name(...)` call `wrapper(original, ...)`; returns what undoes it.

    Only this object changes, not its class. Somebody else's wrapper that came later
    stays in place; ours then passes calls through.

    Example:
        >>> from fastminima.callbacks.patch import around
        >>> class Dog:
        ...     def says(self):
        ...         return "wuff"
        >>> dog = Dog()
        >>> undo = around(dog, "says", lambda original: original() + "!")
        >>> dog.says(), Dog().says()
        ('wuff!', 'wuff')
        >>> undo()
        >>> dog.says(), vars(dog)
        ('wuff', {})
    """
    original = getattr(owner, name)
    own = vars(owner).get(name)
    is_undone = False

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if is_undone:
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)

    def undo() -> None:
        nonlocal is_undone
        is_undone = True
        if vars(owner).get(name) is replacement:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    return undo
