"""Whose fault it is that a question has no answer: its own, or that of all questions, which would all be paid for."""

from typing import NamedTuple

from vp_rl.interfaces import Rejected

_SILENCE = 20  # questions in a row without any answer: the service is down, and asking on would only take hours
_NEW, _KNOWN = (8, 3), (20, 5)
"""Questions in a row, and prompts that they are of, after which it is not one prompt's fault: of a respondent that has
never done better, and of one that has. All questions of one prompt may be as hopeless as the first."""


class Systematic(ValueError):
    """What failed would fail for all questions."""


class Row:
    """Different questions in a row that ended badly."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, key: bytes, prompt: str) -> None:
        """One more."""
        self._prompts[key] = prompt

    def end(self) -> None:
        """One did not."""
        self._prompts.clear()

    def reaches(self, limit: tuple[int, int]) -> bool:
        """So many questions, of so many prompts."""
        return len(self) >= limit[0] and len(set(self._prompts.values())) >= limit[1]


class Refusal(NamedTuple):
    """A question that was not taken, and why."""

    text: str
    """What the server said."""
    advice: str
    """What to change if it takes none."""
    all: bool = False
    """See `Rejected`."""

    @classmethod
    def of(cls, error: Rejected) -> "Refusal":
        """What the error says."""
        return cls(str(error), str(error), error.all)


class Faults:
    """What ended badly in one run, and the moment from which on it is no longer one question's fault.

    Args:
        name: of the respondent.
        ever: whether any of its answers could be read, in this run or before.
    """

    def __init__(self, name: str, ever: bool) -> None:
        self._name, self._ever = name, ever
        self.taken = False
        """Whether any question was taken in this run, so that one which is not has itself to blame."""
        self._silent, self._unreadable, self._refused = Row(), Row(), Row()

    @property
    def ever(self) -> bool:
        """Whether any answer could be read."""
        return self._ever

    def answered(self, readable: bool) -> None:
        """An answer came."""
        self.taken = True
        self._silent.end()
        self._refused.end()
        if readable:
            self._ever = True
            self._unreadable.end()

    def silent(self, key: bytes, prompt: str, reason: str) -> None:
        """None came.

        Raises:
            OSError: none does.
        """
        self._silent.add(key, prompt)
        if len(self._silent) >= _SILENCE:
            raise OSError(
                f"{self._name} left {len(self._silent)} questions in a row without an answer, the last with: "
                f"{reason}. Everything answered is kept: start again when the service is up."
            )

    def unreadable(self, key: bytes, prompt: str, reason: str, hint: str, again: bool) -> None:
        """One came that cannot be read.

        Args:
            again: the question is one that had such an answer before, and says nothing of the others.

        Raises:
            Systematic: none can.
        """
        if again and self._ever:
            return
        self._unreadable.add(key, prompt)
        if self._unreadable.reaches(_KNOWN if self._ever else _NEW):
            way_out = (
                hint or "see the answers in the journal (its table `answers`), and try another model or structured=none"
            )
            raise Systematic(
                f"{len(self._unreadable)} answers of {self._name} in a row cannot be read, and no more are paid "
                f"for. The last: {reason}. What to do: {way_out}. Then start again: what could be read is kept."
            )

    def refused(self, key: bytes, prompt: str, refusal: Refusal) -> None:
        """A question was not taken.

        Raises:
            Systematic: none is.
        """
        self._silent.end()
        self._refused.add(key, prompt)
        if refusal.all and not self._ever and not self.taken:
            raise Systematic(refusal.advice)
        if self._refused.reaches(_KNOWN if self.taken else _NEW):
            raise Systematic(
                f"{self._name} took none of {len(self._refused)} questions in a row; of the last it is said: "
                f"{refusal.advice} They are asked again when you start again: everything answered is kept."
            )
