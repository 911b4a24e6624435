"""What the engine keeps of a job while it runs."""

import time
from collections.abc import Callable

from lorafleet.core.errors import AdapterBusy, DeadlineExceeded
from lorafleet.serve.engine.bank import AdapterBank, Lease
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
        self.leases: tuple[Lease, ...] | None = None if job.adapters else ()
        """On its adapters' slots; None while it waits for these. The engine's lock guards it."""
        self.is_handed_over = False
        self.sampler: Sampler | None = None
        self.dropped = ("", "")
        self._arrived_s = self._begun_s = self._encoded_s = self._denoised_s = time.monotonic()

    def waits_for_step(self, *, is_prepared_elsewhere: bool) -> bool:
        """Whether it can be chosen for a batch, prepared on the way if nobody else does that."""
        if self.sampler is None:
            return self.has_adapters and not is_prepared_elsewhere
        return not self.sampler.is_done

    def waits_outside(self, *, is_prepared_elsewhere: bool) -> bool:
        """Whether it waits for something else than to be chosen, and is not being prepared either."""
        return self.leases is None or (is_prepared_elsewhere and not self.is_handed_over)

    @property
    def is_denoised(self) -> bool:
        return self.sampler is not None and self.sampler.is_done

    @property
    def is_shallow(self) -> bool:
        """Whether its next step runs only the outer part of the UNet."""
        return self.sampler is not None and self.sampler.is_shallow

    @property
    def has_adapters(self) -> bool:
        """Whether all its adapters are in slots, ready to be used."""
        return self.leases is not None and all(lease.is_published for lease in self.leases)

    def claim(self, bank: AdapterBank, *, only_resident: bool) -> bool:
        """Tries to get a slot for each adapter; see `AdapterBank.claim`."""
        wanted = [(adapter.key, adapter.load) for adapter in self.job.adapters]
        self.leases = bank.claim(wanted, only_resident=only_resident)
        return self.leases is not None

    def release(self) -> None:
        """Gives the slots back; it needs none from here on."""
        leases, self.leases = self.leases, ()
        for lease in leases or ():
            lease.release()

    def check(self) -> None:
        """Raises Cancelled, DeadlineExceeded, or what keeps an adapter out of its slot."""
        if self.handle.is_cancelled:
            raise Cancelled("the job was cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded("the request's time was up before its images were done")
        for lease in self.leases or ():
            lease.check()

    def check_wait(self, max_wait_s: float, others_seated_s: float) -> None:
        """Raises AdapterBusy when it has waited for slots for so long and nobody else got any, at `others_seated_s`
        the last time on `time.monotonic()`'s clock: a queue that moves is no reason."""
        if self.leases is None and time.monotonic() - max(self._arrived_s, others_seated_s) >= max_wait_s:
            raise AdapterBusy(
                f"no adapter slot got free for {max_wait_s:g} seconds: try again later or raise bank.slots",
                param="adapters",
            )

    def begin(self) -> None:
        self.check()
        self._begun_s = time.monotonic()

    def start_denoising(self, sampler: Sampler, dropped_prompt: str, dropped_negative: str) -> None:
        self.dropped = (dropped_prompt, dropped_negative)
        self._encoded_s = time.monotonic()
        self.sampler = sampler  # last: from here on the engine's thread may take it

    def end_denoising(self) -> None:
        if self.sampler is not None:
            self.sampler.release()
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
