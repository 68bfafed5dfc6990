"""Things of one kind by name: formats, quantizers, cache formats, families, importers."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from typing import Protocol


class Named(Protocol):
    """Anything that a registry can hold."""

    @property
    def name(self) -> str:
        """What it is called; unique within its kind."""
        ...


class Registry[T: Named](Mapping[str, T]):
    """An ordered mapping from names to objects of one kind, which users may add to.

    Examples:
      >>> class Sieve:
      ...     name = "sieve"
      >>> sieves = Registry("sieve")
      >>> _ = sieves.register(Sieve())
      >>> list(sieves)
      ['sieve']
      >>> sieves["seive"]
      Traceback (most recent call last):
          ...
      ValueError: Unknown sieve 'seive'. Did you mean 'sieve'? Known: sieve.
    """

    def __init__(self, kind: str, *members: T):
        """An empty registry, or one of `members`; `kind` is the word for one in messages."""
        self.kind = kind
        self._members: dict[str, T] = {}
        for member in members:
            self.register(member)

    def register(self, member: T, *, first: bool = False) -> T:
        """Adds an object and returns it; ValueError where its `name` is taken.

        With `first` it is asked before those that are there, where order matters.
        """
        if member.name in self._members:
            raise ValueError(f"{self.kind} {member.name!r} exists already. Choose another name.")
        added = {member.name: member}
        self._members = added | self._members if first else self._members | added
        return member

    def unregister(self, name: str) -> None:
        """Takes an object out again; ValueError if it is not there."""
        del self._members[self[name].name]

    @contextlib.contextmanager
    def registered(self, member: T, *, first: bool = False) -> Iterator[T]:
        """`register` for the length of a `with` block (tests, experiments)."""
        try:
            yield self.register(member, first=first)
        finally:
            self._members.pop(member.name, None)

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            near = difflib.get_close_matches(str(name), self._members, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            known = ", ".join(self._members) or "none"
            raise ValueError(f"Unknown {self.kind} {name!r}. {hint}Known: {known}.")
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
