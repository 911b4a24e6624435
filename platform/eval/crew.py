"""Who draws: this process, or several of this machine. Each takes one batch at a time; a dead one costs only that."""

import contextlib
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Protocol

from lorafleet.core.errors import EvaluationFailed, LorafleetError
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.images import Drawn
from lorafleet.eval.plan import Batch

STOP_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What became of a worker's batch: pictures, or an error, or neither if the worker died (a new one is there)."""

    worker: int
    drawn: tuple[Drawn, ...] = ()
    error: LorafleetError | None = None

    @property
    def is_lost(self) -> bool:
        return not self.drawn and self.error is None


class Crew(Protocol):
    """Workers by number, each with one batch at most."""

    size: int

    def send(self, worker: int, batch: Batch) -> None:
        """Gives it work; does not wait."""

    def wait(self) -> Answer:
        """The next worker that is done with its batch."""

    def close(self) -> None:
        """Ends all workers."""


def draw_all(
    batches: Iterable[Batch], crew: Crew, keep: Callable[[Batch, tuple[Drawn, ...]], None], *, max_losses: int
) -> None:
    """Draws all batches; `keep` gets each one's pictures as soon as they are there.

    A batch whose worker dies is begun again, `max_losses` times. At the first error no more are begun, those in work
    are kept, and the error is raised.
    """
    waiting, losses = deque(batches), Counter[str]()
    working: dict[int, Batch] = {}
    idle = list(range(crew.size))
    error: LorafleetError | None = None
    while working or (waiting and error is None):
        while idle and waiting and error is None:
            worker, batch = idle.pop(0), waiting.popleft()
            crew.send(worker, batch)
            working[worker] = batch
        answer = crew.wait()
        if answer.worker not in working:  # it died idle
            continue
        batch = working.pop(answer.worker)
        idle.append(answer.worker)
        if answer.is_lost:
            losses[batch.jobs[0].key] += 1
            count = losses[batch.jobs[0].key]
            waiting.appendleft(batch)
            if count > max_losses:
                error = error or EvaluationFailed(
                    f"the worker that draws {batch.jobs[0].text[:60]!r} and {len(batch.jobs) - 1} more with "
                    f"{batch.system.name} died {count} times (out of memory?): lower run.batch_size or "
                    "run.workers, and start again: finished pictures are kept"
                )
        elif answer.error is not None:
            error = error or answer.error
        else:
            keep(batch, answer.drawn)
    if error is not None:
        raise error


class Alone:
    """This process itself."""

    size = 1

    def __init__(self, config: EvalConfig) -> None:
        from lorafleet.eval.draw import Studio

        self._studio = Studio(config)
        self._batch: Batch | None = None

    def send(self, worker: int, batch: Batch) -> None:
        self._batch = batch

    def wait(self) -> Answer:
        assert self._batch is not None
        try:
            return Answer(0, tuple(self._studio.draw(self._batch)))
        except LorafleetError as error:
            return Answer(0, error=error)

    def close(self) -> None:
        return


class Processes:
    """Processes of this machine, started anew when one dies."""

    def __init__(self, config: EvalConfig, size: int, *, work: "Work | None" = None) -> None:
        """`work`: what a process does, in place of drawing, for tests."""
        self.size = size
        self._config = config
        self._work = work or _work
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start() for _ in range(size)]

    def send(self, worker: int, batch: Batch) -> None:
        with contextlib.suppress(OSError):  # it died idle; `wait` sees that
            self._workers[worker][1].send(batch)

    def wait(self) -> Answer:
        numbers: dict[object, int] = {}
        for number, (process, connection) in enumerate(self._workers):
            numbers |= {connection: number, process.sentinel: number}
        for ready in wait(list(numbers)):  # type: ignore[arg-type]
            number = numbers[ready]
            process, connection = self._workers[number]
            with contextlib.suppress(EOFError, OSError):
                if connection.poll():
                    answer: tuple[Drawn, ...] | LorafleetError = connection.recv()
                    if isinstance(answer, LorafleetError):
                        return Answer(number, error=answer)
                    return Answer(number, answer)
            process.join(STOP_S)
            connection.close()
            self._workers[number] = self._start()
            return Answer(number)
        raise AssertionError("wait() returns what is ready")

    def close(self) -> None:
        for _, connection in self._workers:
            connection.close()  # a worker ends when nobody is there any more
        for process, _ in self._workers:
            process.join(STOP_S)
            if process.is_alive():  # in the middle of a batch
                process.terminate()
                process.join(STOP_S)

    def pids(self) -> list[int]:
        """Of the processes as they are now."""
        return [process.pid or 0 for process, _ in self._workers]

    def _start(self) -> "tuple[multiprocessing.process.BaseProcess, Connection]":
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=self._work, args=(self._config, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours


Work = Callable[[EvalConfig, "Connection"], None]


def _work(config: EvalConfig, connection: "Connection") -> None:
    """A process's life: batches in, pictures or an error out, until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends us
    from lorafleet.eval.draw import Studio

    studio: Studio | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            batch = connection.recv()
            try:
                studio = studio or Studio(config)
                connection.send(tuple(studio.draw(batch)))
            except LorafleetError as error:
                connection.send(error)
