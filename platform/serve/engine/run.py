"""What the engine keeps of a job while it runs."""

import time
from collections.abc import Callable

from lorafleet.core.errors import DeadlineExceeded
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import PromptEmbedding
from lorafleet.serve.engine.job import Cancelled, Handle, Job
from lorafleet.serve.engine.sampler import Sampler


class Run:
    """A job's state and clock. Only the thread that has the job in hand changes it."""

    def __init__(self, job: Job, size: tuple[int, int], on_cancel: Callable[[], None]) -> None:
        """`size`: (width, height) in pixels."""
        self.job = job
        self.size = size
        self.deadline = job.deadline
        self.arrival = 0
        self.skipped_turns = 0
        self.handle = Handle(job, on_cancel)
        self.sampler: Sampler | None = None
        self.dropped = ("", "")
        self._arrived_s = self._begun_s = self._encoded_s = self._denoised_s = time.monotonic()

    def waits_for_step(self, *, is_prepared_elsewhere: bool) -> bool:
        """Whether it can be chosen for a batch, prepared on the way if nobody else does that."""
        if self.sampler is None:
            return not is_prepared_elsewhere
        return not self.sampler.is_done

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded."""
        if self.handle.is_cancelled:
            raise Cancelled("the job was cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded("the request's time was up before its images were done")

    def begin(self) -> None:
        self.check()
        self._begun_s = time.monotonic()

    def start_denoising(self, base: Base, positive: PromptEmbedding, negative: PromptEmbedding) -> None:
        self.dropped = (positive.dropped_text, negative.dropped_text)
        sampler = Sampler(base, self.job, self.size, positive, negative)
        self._encoded_s = time.monotonic()
        self.sampler = sampler  # last: from here on the engine's thread may take it

    def end_denoising(self) -> None:
        self._denoised_s = time.monotonic()

    def timings(self) -> dict[str, float]:
        """Seconds by stage until now, which is the end of decoding."""
        now = time.monotonic()
        return {
            "queue_s": self._begun_s - self._arrived_s,
            "encode_s": self._encoded_s - self._begun_s,
            "denoise_s": self._denoised_s - self._encoded_s,
            "decode_s": now - self._denoised_s,
            "total_s": now - self._arrived_s,
        }
