"""Asks whatever has no answer yet: many questions at once, each answer journalled before the next is asked."""

import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple

from tqdm import tqdm

from vp_rl.interfaces import Annotator, Rejected, Rewriter, Unanswered
from vp_rl.types import Answer, Usage
from vp_rl.visionprefer.faults import Faults, Refusal, Systematic
from vp_rl.visionprefer.journal import Entry, Journal, Outcome

log = logging.getLogger(__name__)

_SHOWN = 5  # refusals that are told while a stage runs; all are in the journal


Respondent = Annotator | Rewriter
"""Whoever is asked."""


class Question(NamedTuple):
    """Something to ask one respondent."""

    key: bytes
    subject: str
    ask: Callable[[], Awaitable[Answer]]
    read: Callable[[str], object]
    """Raises ValueError where an answer is of no use."""
    estimate: Callable[[], Usage]
    prompt: str = ""
    """Which prompt it is about: what one of its questions meets, the others may meet too."""


class Held(NamedTuple):
    """A question that was not taken, of which it is not clear yet whether that is its own fault."""

    question: Question
    refusal: Refusal
    usage: Usage
    seconds: float


class BudgetReached(ValueError):
    """The money that was allowed is spent; everything answered is kept."""


class Interview:
    """Questions to respondents, through the journal.

    Args:
        journal: where every call is written down.
        budget_usd: no question is asked once all calls in the journal have cost that much; None: no limit.
        attempts: times that a question is asked until its answer can be read, over all runs. A refusal is final.

    Raises:
        ValueError: a limit that allows nothing.
    """

    def __init__(self, journal: Journal, budget_usd: float | None = None, attempts: int = 3) -> None:
        if budget_usd is not None and budget_usd <= 0:
            raise ValueError(f"budget_usd={budget_usd} allows no question: raise it, or set null for no limit.")
        if attempts < 1:
            raise ValueError(f"attempts={attempts} must be at least 1.")
        self._journal, self._budget, self._attempts = journal, budget_usd, attempts

    def ask(self, stage: str, respondent: Respondent, questions: Iterable[Question], total: int) -> Counter[str]:
        """Asks what is not answered yet, and returns how many questions ended how.

        The first signal to stop (Ctrl-C, SIGTERM), a fatal error and the end of the budget all let the calls in flight
        finish and be written down.

        Raises:
            ValueError, OSError: see `Annotator.ask`; the journal cannot be written.
            BudgetReached: not everything was asked.
        """
        return asyncio.run(_Run(self._journal, self._budget, self._attempts, stage, respondent, total).all(questions))

    def estimate(self, questions: Iterable[Question]) -> tuple[int, Usage]:
        """How many questions would be asked, and what one answer to each would cost."""
        accepted, failures = self._journal.accepted(), self._journal.failures()
        calls, total = 0, Usage()
        for question in questions:
            if question.key not in accepted and not _given_up(failures.get(question.key, []), self._attempts):
                calls += 1
                total = total.plus(question.estimate())
        return calls, total


def _given_up(failures: list[tuple[Outcome, str]], attempts: int) -> bool:
    return len(failures) >= attempts or any(outcome == "refused" for outcome, _ in failures)


class _Run:
    """One pass over the questions of a stage."""

    def __init__(
        self, journal: Journal, budget: float | None, attempts: int, stage: str, respondent: Respondent, total: int
    ) -> None:
        self._journal, self._budget, self._attempts = journal, budget, attempts
        self._stage, self._respondent, self._total = stage, respondent, total
        self._accepted, self._failures = journal.accepted(), journal.failures()
        self._usd, self._pending, self._calls, self._paid = journal.usd(), 0.0, 0, 0.0
        self._stop: BaseException | None = None
        self._outcomes: Counter[str] = Counter()
        self._faults = Faults(respondent.name, journal.has_accepted(stage, respondent.name))
        self._again: deque[Question] = deque()
        self._held: list[Held] = []

    async def all(self, questions: Iterable[Question]) -> Counter[str]:
        waiting = iter(questions)
        with tqdm(total=self._total, desc=self._stage, unit="answer", mininterval=1) as bar, self._stopped_by_signals():
            async with asyncio.TaskGroup() as group:
                for _ in range(max(1, self._respondent.concurrency)):
                    group.create_task(self._work(waiting, bar))
            await self._decide()
        if self._stop is not None:
            raise self._stop
        return self._outcomes

    async def _work(self, waiting: Iterator[Question], bar: tqdm) -> None:
        """One of several workers. Errors are kept, not raised: in a task group they would cancel calls already paid."""
        while self._stop is None:
            try:
                question = next(waiting, None)
                if question is not None:
                    outcome = await self._settle(question)
                elif self._again:  # when all others were asked once: an answer may be better at another time
                    outcome = await self._call(self._again.popleft())
                else:
                    return
            except Exception as error:
                self._end(error)
                return
            if outcome is not None:
                self._outcomes[outcome] += 1
                bar.update()
            if self._usd:
                bar.set_postfix_str(f"${self._usd:.2f}", refresh=False)

    def _end(self, why: BaseException) -> None:
        """Nothing more is asked. What is in flight may finish, but is not tried again, unless only money is lacking."""
        self._stop = self._stop or why
        if not isinstance(why, BudgetReached):
            self._respondent.stop_retrying()

    async def _settle(self, question: Question) -> str | None:
        """Brings one question to its end: how it ended; None: that is not decided yet."""
        if question.key in self._accepted:
            return "answered before"
        known = self._failures.get(question.key, [])
        for outcome, text in known:  # a better reader than the last run's may read what that one could not
            if outcome == "unreadable" and self._readable(question, text) is None:
                await self._write(question, "accepted", Answer(text), "read anew", 0.0)
                return "read anew"
        return known[-1][0] if _given_up(known, self._attempts) else await self._call(question)

    async def _call(self, question: Question) -> str | None:
        self._journal.check_room()
        cost = self._reserve(question)
        started = time.monotonic()
        try:
            answer = await question.ask()
        except Unanswered as error:
            await self._write(question, "unanswered", Answer(""), str(error), time.monotonic() - started)
            if self._stop is None:
                self._faults.silent(*_identity(question), str(error))
            return "unanswered"
        except Rejected as error:
            return self._hold(Held(question, Refusal.of(error), Usage(), time.monotonic() - started))
        finally:
            self._pending -= cost
        seconds = time.monotonic() - started
        if answer.refused and answer.hint and not self._faults.taken:
            return self._hold(Held(question, Refusal(answer.text, answer.hint), answer.usage, seconds))
        if answer.refused:
            return await self._refuse(question, answer, seconds)
        return await self._judge(question, answer, seconds)

    async def _judge(self, question: Question, answer: Answer, seconds: float) -> str | None:
        """Whether an answer can be read; if not, it is asked for again, as often as is allowed."""
        self._calls, self._paid = self._calls + 1, self._paid + answer.usage.usd
        problem = self._readable(question, answer.text)
        self._faults.answered(problem is None)
        if problem is None:
            await self._write(question, "accepted", answer, "", seconds)
            return "accepted"
        reason = f"{problem}; {answer.hint}" if answer.hint else problem
        await self._write(question, "unreadable", answer, reason, seconds)
        known = self._failures.setdefault(question.key, [])
        known.append(("unreadable", answer.text))
        if not _given_up(known, self._attempts):
            self._again.append(question)
        self._faults.unreadable(*_identity(question), problem, answer.hint, again=len(known) > 1)
        return "unreadable" if _given_up(known, self._attempts) else None

    async def _refuse(self, question: Question, answer: Answer, seconds: float) -> str:
        reason = answer.text
        if question.prompt and question.prompt != question.subject:
            reason = f"{reason} (prompt: {question.prompt[:500]!r})"
        await self._write(question, "refused", answer, reason, seconds)
        if self._outcomes["refused"] < _SHOWN:
            log.warning("%s refuses %s: %s", self._respondent.name, question.subject[:200], reason[:800])
        return "refused"

    def _hold(self, held: Held) -> None:
        self._held.append(held)
        if self._stop is None:
            self._faults.refused(*_identity(held.question), held.refusal)

    async def _decide(self) -> None:
        """What was not taken while others were is refused; where none were, it may be the fault of all."""
        own_fault = self._faults.taken and not isinstance(self._stop, Systematic)
        try:
            for question, refusal, usage, seconds in self._held:
                if own_fault:
                    outcome = await self._refuse(question, Answer(refusal.text, usage), seconds)
                else:
                    outcome = "unanswered"
                    await self._write(question, outcome, Answer("", usage), refusal.text, seconds)
                self._outcomes[outcome] += 1
        except OSError as error:
            self._stop = self._stop or error
        if self._held and self._stop is None and not self._faults.ever:
            self._stop = Systematic(self._held[-1].refusal.advice)

    def _reserve(self, question: Question) -> float:
        """Sets money aside for a call, so that those in flight together stay within the budget too."""
        if self._budget is None:
            return 0.0
        cost = question.estimate().usd
        if cost <= 0:
            raise ValueError(f"budget_usd={self._budget} needs prices, and {self._respondent.name} has none: set them.")
        cost = max(cost, self._paid / max(1, self._calls))  # estimates know nothing of what a model thinks
        if self._usd + self._pending + cost > self._budget:
            raise BudgetReached(
                f"budget_usd={self._budget:g} is reached: ${self._usd + self._pending:.4f} are spent, and the next "
                f"call needs about ${cost:.4f}. Everything answered is kept; raise the budget to go on."
            )
        self._pending += cost
        return cost

    async def _write(self, question: Question, outcome: Outcome, answer: Answer, reason: str, seconds: float) -> None:
        self._usd += answer.usage.usd
        respondent = self._respondent
        entry = (question.key, self._stage, question.subject, respondent.name, respondent.version)
        await self._journal.write(Entry(*entry, outcome, answer.text, reason, answer.usage, seconds))

    @staticmethod
    def _readable(question: Question, text: str) -> str | None:
        """Why not, or None."""
        try:
            question.read(text)
        except Exception as error:  # a reader that fails in another way must not lose what was paid for
            return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return None

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        loop, caught = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

        def stop() -> None:
            log.warning("stopping when the calls in flight are answered; once more to drop them")
            self._end(KeyboardInterrupt())
            for each in caught:
                loop.remove_signal_handler(each)

        try:
            for each in caught:
                loop.add_signal_handler(each, stop)
        except (ValueError, RuntimeError, NotImplementedError):  # not the main thread, or Windows: no graceful stop
            yield
            return
        try:
            yield
        finally:
            for each in caught:
                loop.remove_signal_handler(each)


def _identity(question: Question) -> tuple[bytes, str]:
    return question.key, question.prompt or question.subject
