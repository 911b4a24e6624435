"""Workers as processes: all batches come back, a dead one costs only its batch, an error keeps what is done."""

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from PIL import Image

from lorafleet.core.errors import EvaluationFailed, GenerationFailed
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.crew import Processes, draw_all
from lorafleet.eval.images import Drawn
from lorafleet.eval.plan import Batch, Job, Sampling
from lorafleet.eval.systems import System

SYSTEM = System("base", "base", "", {"kind": "base"})


def batches(count: int, text: str = "a red apple") -> list[Batch]:
    sampling = Sampling(1, 1.0, "euler", None, None)
    return [Batch(SYSTEM, sampling, (Job(str(i), i, 0, text, "", i),), 1) for i in range(count)]


def paint(config: EvalConfig, connection: Connection) -> None:
    """A worker that paints the seed; it kills itself once for the prompt `die: FILE`, always for `die`."""
    while True:
        batch = connection.recv()
        text, seed = batch.jobs[0].text, batch.jobs[0].seed
        marker = Path(text.removeprefix("die: "))
        if text == "die" or (text.startswith("die: ") and seed == 2 and not marker.exists()):
            if text != "die":
                marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "fail" and seed == 1:
            connection.send(GenerationFailed("system base could not draw 'fail'"))
        else:
            connection.send((Drawn(Image.new("L", (1, 1), seed), 0.1),))


def drawn(wanted: Sequence[Batch], *, max_losses: int = 1) -> tuple[dict[str, int], list[int]]:
    """What was kept, by key, and the processes at the end."""
    kept: dict[str, int] = {}

    def keep(batch: Batch, pictures: Sequence[Drawn]) -> None:
        assert batch.jobs[0].key not in kept
        value = pictures[0].image.getpixel((0, 0))
        assert isinstance(value, int)
        kept[batch.jobs[0].key] = value

    crew = Processes(EvalConfig(), 2, work=paint)
    before = crew.pids()
    try:
        draw_all(wanted, crew, keep, max_losses=max_losses)
    finally:
        after = crew.pids()
        crew.close()
    assert not any(_runs(pid) for pid in after)
    return kept, [pid for pid in after if pid not in before]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_dies_costs_only_its_batch(tmp_path: Path) -> None:
    kept, new = drawn(batches(8, f"die: {tmp_path / 'died'}"))
    assert kept == {str(i): i for i in range(8)}
    assert len(new) == 1


def test_a_batch_that_kills_every_worker_ends_the_run() -> None:
    with pytest.raises(EvaluationFailed, match=r"draws 'die' and 0 more with base died 2 times \(out of memory\?\)"):
        drawn(batches(1, "die"))


def test_an_error_ends_the_run_and_what_was_done_is_kept() -> None:
    kept: list[str] = []
    crew = Processes(EvalConfig(), 1, work=paint)
    with pytest.raises(GenerationFailed, match="could not draw 'fail'"):
        draw_all(batches(3, "fail"), crew, lambda batch, _: kept.append(batch.jobs[0].key), max_losses=0)
    crew.close()
    assert kept == ["0"]


def test_workers_end_when_the_one_they_work_for_is_gone() -> None:
    crew = Processes(EvalConfig(), 1, work=paint)
    (pid,) = crew.pids()
    process, connection = crew._workers[0]
    connection.close()  # as the end of this process would
    process.join(10)
    assert not _runs(pid)
