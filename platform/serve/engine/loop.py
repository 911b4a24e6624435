"""The engine: at every turn it chooses who takes a step, runs the UNet once for all of them, and advances each."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Self

import torch
from PIL import Image

from lorafleet.core.errors import ConfigError, GenerationFailed, LorafleetError, NotReady
from lorafleet.core.metrics import OK
from lorafleet.sdxl.base import Base
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import caches, cross_attention, fp8
from lorafleet.serve.engine.bank import AdapterBank, Lease
from lorafleet.serve.engine.checks import check_job
from lorafleet.serve.engine.cross_attention import CrossAttention
from lorafleet.serve.engine.ends import Ends
from lorafleet.serve.engine.forward import filled_up, predict
from lorafleet.serve.engine.job import Cancelled, Failed, Finished, Handle, ImageResult, Job, Started, Step
from lorafleet.serve.engine.observer import Guarded, Observer
from lorafleet.serve.engine.order import by_urgency, choose, seat
from lorafleet.serve.engine.preview import Previewer
from lorafleet.serve.engine.prompts import PromptCache
from lorafleet.serve.engine.run import Run
from lorafleet.serve.engine.sampler import Sampler
from lorafleet.serve.engine.self_attention import SelfAttention
from lorafleet.serve.engine.unet_runner import UNetRunner

logger = logging.getLogger(__name__)

AHEAD: Final = 2  # full batches that are prepared at a time, twice as many if more urgent jobs keep coming
WAYS: Final = 4  # of computing a convolution that cuDNN tries (one H200, SDXL: as quick as with 10, 5 s sooner ready)
NOTABLE_S: Final = 0.5  # parts of the start that take longer are logged
IDLE_S: Final = 0.5  # how often an idle engine shows that it lives


class Engine:
    """Runs jobs on one loaded base, in a thread of its own (`with engine:`, or start and close) or in the caller's
    (`run_until_idle`).

    Whether an image depends on its neighbours is set by `settings.exact`. On a CPU a row's result depends on how
    many rows its forward has, because the libraries choose other kernels (1e-6 in the model's output; 15 linears and
    8 convolutions of emojixl's UNet do it), but not on what the other rows hold or where it stands. So exact mode,
    the default there, fixes the number of rows: a recipe then gives the identical image, alone or under load.
    Measured on emojixl, one core, 20 steps, images per CPU second at 1, 2, 4 and 8 requests at a time:

    exact, one job a forward      1.6   1.6   1.5   1.6   (the default on a CPU; one at a time in diffusers: 1.6)
    exact, exact_jobs=4           0.7   1.4   2.4   2.5
    exact=false                   1.6   2.2   2.5   2.6   (pixels of neighbours' images change by one level at most)

    Every public method is safe for all threads.
    """

    def __init__(self, base: Base, settings: EngineSettings | None = None) -> None:
        self.base = base
        self.settings = settings or EngineSettings()
        if self.settings.fp8:
            fp8.require(base)
        self._fp8: fp8.Fp8Weights | None = None
        caches.keep_compiled()
        on_gpu = base.device.type == "cuda"
        stays = on_gpu and not base.config.low_memory  # on the device, for graphs to find it there
        if self.settings.cuda_graphs and not stays:
            raise ConfigError(
                "engine.cuda_graphs needs the base on a CUDA GPU, without base.low_memory: leave it out",
                param="engine.cuda_graphs",
            )
        self._is_exact = not on_gpu if self.settings.exact is None else self.settings.exact
        # On a CPU a second thread would take cores from the step and start a second pool of OpenMP threads.
        by_default = on_gpu and not base.config.low_memory  # whose weights move to and fro for one thread only
        background = by_default if self.settings.background is None else self.settings.background
        self._background = ThreadPoolExecutor(1, "engine-background") if background else None
        self._background_stream: torch.cuda.Stream | None = None
        if on_gpu and background:
            # First in line: the steps' kernels fill the GPU, and a prompt that waits behind them joins seconds late.
            self._background_stream = torch.cuda.Stream(base.device, priority=-1)  # type: ignore[no-untyped-call]
        self._wake = threading.Event()
        self._observer = Guarded(Observer())
        computes_text_once = cross_attention.is_possible(base)
        self.bank: AdapterBank | None = None
        """The adapters' slots, of which jobs lease theirs; the base is wrapped until the engine is closed."""
        if self.settings.bank is not None:
            self.bank = AdapterBank(
                base, self.settings.bank, on_filled=self._slot_filled, cross_apart=computes_text_once
            )
        self._self_attention = SelfAttention(base, self.bank) if stays else None
        self._cross_attention: CrossAttention | None = None
        if computes_text_once:
            most_rows = max(2 * self._batch_size(), *(self.settings.row_buckets or (0,)))
            self._cross_attention = CrossAttention(base, most_rows, self.bank)
        compile_mode = self.settings.compile or ("regional" if stays else "none")
        cuda_graphs = stays if self.settings.cuda_graphs is None else self.settings.cuda_graphs
        self._ends = Ends(base, compile_mode, cuda_graphs=cuda_graphs)
        self._unet = UNetRunner(
            base,
            compile_mode,
            cuda_graphs=cuda_graphs,
            cross_attention=self._cross_attention,
            has_bank=self.bank is not None,
            reuses_steps=self.settings.step_reuse,
        )
        self._last_step: torch.cuda.Event | None = None
        self.prompts = PromptCache(base, self.settings.prompt_cache_entries, self.bank, self._ends.encode)
        self._previewer = Previewer(base)
        self._runs: list[Run] = []
        self._lock = threading.Lock()  # guards _runs, their leases, _arrivals and _seated_s
        self._arrivals = 0
        self._seated_s = time.monotonic()  # when a run last got slots
        self._turn_lock = threading.RLock()  # one turn at a time; a listener may close
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._is_resting = True
        self._background_failure: Exception | None = None
        self.failure: BaseException | None = None
        """What ended the loop, if anything did. Such an engine takes no more jobs."""
        self.heartbeat = time.monotonic()
        """When the loop last showed that it lives, on `time.monotonic()`'s clock; one turn may take a forward."""

    def observe(self, observer: Observer) -> None:
        """From now on this one is told what happens, in place of another one."""
        self._observer = Guarded(observer)

    def warm_up(self) -> None:
        """Compiles and records the UNet for what the settings name; `start` does it by itself."""
        sizes = self.settings.warm_sizes or ((self.base.limits.default_width_px, self.base.limits.default_height_px),)
        for width, height in sizes:
            self.base.check_size(width, height)
        if self.settings.fp8 and self._fp8 is None:
            with _timed("quantising the weights"):
                self._fp8 = fp8.Fp8Weights(self.base, fp8.calibrate(self.base, sizes[0]))
                if self._self_attention is not None:
                    self._self_attention.share_weights()
        factor = self.base.pipeline.vae_scale_factor
        latents = [(height // factor, width // factor) for width, height in sizes]
        with _quickest_convolutions(self.base, is_exact=self._is_exact):
            with _timed("warming up the UNet"):
                self._unet.warm_up([(rows, *size) for rows in self._row_buckets() for size in latents])
            with _timed("warming up the text encoders and the VAE"):
                self._ends.warm_up(latents)
            if self._unet.cuda_graphs and self._cross_attention is not None:
                with _timed("warming up the text's keys and values"):
                    self._cross_attention.warm_up()

    def start(self) -> Self:
        """Warms up, then starts the thread. Raises InvalidRequest for a size to warm up that this base cannot do."""
        assert self._thread is None, "the engine runs already"
        self.warm_up()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stops after the step that is running; jobs that are not done fail with NotReady, and loaders that are at
        work are waited for. May be called twice."""
        with self._lock:
            self._is_closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        if self._background is not None:
            self._background.shutdown(cancel_futures=True)
        with self._turn_lock:
            self._fail_all(NotReady("the engine was closed before this image was done: try again"))
            self._unet.close()
            self._ends.close()
            if self._fp8 is not None:
                self._fp8.close()  # before the bank, in whose linears it is
            if self._self_attention is not None:
                self._self_attention.close()
            if self.bank is not None:
                self.bank.detach()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job) -> Handle:
        """Queues a job. Raises InvalidRequest (a size or step count this base cannot do, adapters that no bank could
        hold, steps reused where that is off), or NotReady when the engine is closed or has failed."""
        self.base.limits.check(job.request)
        check_job(job, self.bank, reuses_steps=self._unet.reuses_steps)
        run = Run(job, self.base.limits.size_of(job.request), on_cancel=self._wake.set)
        with self._lock:
            if self._is_closed or self.failure is not None:
                raise NotReady("the engine is closed" if self.failure is None else f"the engine failed: {self.failure}")
            run.arrival = self._arrivals
            self._arrivals += 1
            self._runs.append(run)
            self._seat()
            self._hand_over()
        self._wake.set()
        return run.handle

    def run_until_idle(self) -> None:
        """Does all the work there is, in this thread; for an engine that is not started."""
        assert self._thread is None, "the engine runs in its own thread"
        while self._turn():
            pass

    # ---- the algorithm ----

    def _turn(self) -> bool:
        """One forward for those whose turn it is. False when there is nothing left to do."""
        with self._turn_lock, torch.inference_mode():
            self.heartbeat = time.monotonic()
            self._wake.clear()
            if self._background_failure is not None:
                raise self._background_failure
            if self.bank is not None:
                self.bank.publish()
            self._drop_hopeless()
            with self._lock:
                self._seat()
                self._hand_over()
                runs = list(self._runs)
            if not runs:
                self._rest()
                return False
            self._is_resting = False
            for run in runs:
                run.skipped_turns += run.waits_outside(is_prepared_elsewhere=self._background is not None)
            waiting = [run for run in runs if run.waits_for_step(is_prepared_elsewhere=self._background is not None)]
            if not waiting:
                # all of them are being encoded or decoded, or wait for adapters
                deadline = min(math.inf if run.deadline is None else run.deadline for run in runs)
                self._wake.wait(min(IDLE_S, max(0.0, deadline - time.monotonic())))
                return True
            batch = choose(waiting, max_jobs=self._batch_size(), max_skipped_turns=self.settings.max_skipped_turns)
            if self._background is None:
                batch = [run for run in batch if run.sampler is not None or self._attempt(run, self._prepare)]
            if batch:
                self._step(batch)
            return True

    def _step(self, batch: list[Run]) -> None:
        samplers = [run.sampler for run in batch if run.sampler is not None]
        row_buckets = self._row_buckets()
        start = time.perf_counter()
        outputs = predict(self._unet, samplers, row_buckets, self.bank)
        seconds = time.perf_counter() - start
        for run, output in zip(batch, outputs, strict=True):
            if isinstance(output, Exception):
                self._end(run, Failed(run.handle.context.run(_in_our_words, output)))
            elif self._attempt(run, self._advance, output) and run.sampler is not None and run.sampler.is_done:
                run.end_denoising()
                self._release(run)
                if self._background is not None:
                    if self._background_stream is not None:
                        self._background_stream.wait_stream(torch.cuda.current_stream(self.base.device))
                    self._background.submit(self._in_background, run, self._decode)
                else:
                    self._attempt(run, self._decode)
        start = time.perf_counter()
        self._wait_for_the_step_before()
        seconds += time.perf_counter() - start
        rows = sum(sampler.rows for sampler in samplers)
        self._observer.step_taken(seconds, len(samplers), rows, filled_up(rows, row_buckets))

    def _wait_for_the_step_before(self) -> None:
        """Lets the GPU be one step behind: enough to keep it busy, and cancelling still works within a step."""
        if self.base.device.type == "cuda":
            before, self._last_step = self._last_step, torch.cuda.current_stream(self.base.device).record_event()
            if before is not None:
                before.synchronize()

    def _prepare(self, run: Run) -> None:
        run.begin()
        run.handle.emit(Started())
        with self._lend(run) as adapters:
            positive, negative = self.prompts.pair(run.job.request.prompt, run.job.request.negative_prompt, adapters)
            slots = [(lease.slot, weight) for lease, weight in adapters]
            sampler = Sampler(self.base, run.job, run.size, positive, negative, slots)
            if self._cross_attention is not None:
                sampler.replace_text(self._cross_attention.compute(sampler.hidden, slots))
            if self._background_stream is not None:
                # From here on it belongs to the stream of the steps, where nobody waits for this one.
                for tensor in sampler.tensors():
                    tensor.record_stream(torch.cuda.default_stream(self.base.device))
                self._background_stream.synchronize()
        run.start_denoising(sampler, positive.dropped_text, negative.dropped_text)
        self._wake.set()

    def _advance(self, run: Run, output: torch.Tensor) -> None:
        sampler = run.sampler
        assert sampler is not None
        sampler.advance(output)
        every = run.job.preview_every
        preview = self._previewer.render(sampler.latents) if every and sampler.done % every == 0 else None
        run.handle.emit(Step(sampler.done, sampler.total, preview))

    def _decode(self, run: Run) -> None:
        assert run.sampler is not None
        run.check()
        image = Image.fromarray(self._ends.decode(run.sampler.latents)[0])
        self._end(run, Finished(ImageResult(image, run.timings(), *run.dropped)))

    # ---- adapters ----

    def _seat(self) -> None:
        """Gives adapter slots to those who wait for some. The lock is held."""
        bank = self.bank
        waiting = [run for run in self._runs if run.leases is None]
        if bank is None or not waiting or self._is_closed or self.failure is not None:
            return

        def claim(run: Run, only_resident: bool) -> bool:
            is_seated = run.claim(bank, only_resident=only_resident)
            if is_seated and run.job.adapters:
                self._seated_s = time.monotonic()
            return is_seated

        seat(waiting, claim, max_skipped_turns=self.settings.max_skipped_turns)

    def _hand_over(self) -> None:
        """Lets the background prepare those whose adapters are there, as far as they will be in a batch soon: prepared,
        each takes memory (51 MB with SDXL and guidance). The lock is held."""
        if self._background is None or self._is_closed:
            return
        ready = [run for run in self._runs if run.has_adapters and not run.is_denoised]
        room = 2 * AHEAD * self._batch_size() - sum(run.is_handed_over for run in ready)
        next_ones = by_urgency(ready, self.settings.max_skipped_turns)[: AHEAD * self._batch_size()]
        for run in [run for run in next_ones if not run.is_handed_over][: max(0, room)]:
            run.is_handed_over = True
            self._background.submit(self._in_background, run, self._prepare)

    @contextmanager
    def _lend(self, run: Run) -> Iterator[list[tuple[Lease, float]]]:
        """A run's adapters and their weights, held although the job may end meanwhile in another thread."""
        with self._lock:
            if run not in self._runs:
                raise Cancelled("the job has ended")
            leases = [lease.share() for lease in run.leases or ()]
        try:
            yield [(lease, adapter.weight) for lease, adapter in zip(leases, run.job.adapters, strict=True)]
        finally:
            for lease in leases:
                lease.release()

    def _release(self, run: Run) -> None:
        """Gives a run's slots to those who wait for some."""
        with self._lock:
            run.release()
            self._seat()

    def _slot_filled(self, seconds: float | None) -> None:
        self._wake.set()
        if seconds is not None:
            self._observer.slot_filled(seconds)

    # ---- what can go wrong ----

    def _attempt(self, run: Run, stage: Callable[..., None], *arguments: object) -> bool:
        """Runs a stage of one job; a failure there is that job's own. False if the job is over."""
        try:
            stage(run, *arguments)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            self._end(run, Failed(run.handle.context.run(_in_our_words, error)))
        return not run.handle.is_done

    def _in_background(self, run: Run, stage: Callable[[Run], None]) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._background_stream):
                self._attempt(run, stage)
        except Exception as error:  # the thread's edge: the loop fails with it
            self._background_failure = error
            self._wake.set()

    def _drop_hopeless(self) -> None:
        """Ends who is cancelled, late, without a usable adapter, or has waited for slots long enough."""
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            try:
                run.check()
                if self.bank is not None:
                    run.check_wait(self.bank.config.max_wait_s, self._seated_s)
            except LorafleetError as error:
                self._end(run, Failed(error))

    def _end(self, run: Run, event: Finished | Failed) -> None:
        """The job's last event; only the first one counts."""
        with self._lock:
            if run not in self._runs:
                return
            self._runs.remove(run)
            run.release()
            self._seat()
        if isinstance(event, Finished):
            self._observer.image_ended(OK, event.result.timings)
        else:
            self._observer.image_ended(event.error.code, {})
        run.handle.emit(event)
        self._wake.set()

    def _fail_all(self, error: LorafleetError) -> None:
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            self._end(run, Failed(error))

    def _loop(self) -> None:
        try:
            while not self._is_closed:
                if not self._turn():
                    self._wake.wait(IDLE_S)
        except BaseException as error:  # the thread's edge: callers must not wait for a thread that is gone
            logger.exception("the engine stopped")
            with self._lock:
                self.failure = error
            self._fail_all(NotReady("the engine failed while it worked on this image: try again"))

    def _rest(self) -> None:
        if not self._is_resting:
            self._is_resting = True
            self.base.pipeline.maybe_free_model_hooks()  # low_memory: the weights may leave the GPU now

    def _batch_size(self) -> int:
        return self.settings.exact_jobs if self._is_exact else self.settings.max_batch

    def _row_buckets(self) -> tuple[int, ...]:
        """In exact mode one bucket for all; one job alone needs none, its rows are always as many."""
        if self._is_exact:
            return (2 * self.settings.exact_jobs,) if self.settings.exact_jobs > 1 or self._unet.has_shapes else ()
        if self.settings.row_buckets is not None:
            return self.settings.row_buckets
        if not self._unet.has_shapes:
            return ()
        most = 2 * self.settings.max_batch
        if self._unet.shapes_are_costly:
            return *(2**i for i in range(1, most.bit_length()) if 2**i < most), most
        # Else eighths of the largest: images that leave and join are fewer than the most half of the time, and rows
        # that only fill up a batch cost as much as others.
        return tuple(sorted({rows for rows in (2, 4, *range(0, most, -(-most // 16) * 2)) if 0 < rows < most} | {most}))


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Logs what takes a start its seconds."""
    start = time.perf_counter()
    yield
    if (seconds := time.perf_counter() - start) > NOTABLE_S:
        logger.info("%s took %.1f s", what, seconds)


@contextmanager
def _quickest_convolutions(base: Base, *, is_exact: bool) -> Iterator[None]:
    """Lets cuDNN try its ways and take the quickest, which may be another one at the next start."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark = base.device.type == "cuda" and not is_exact
    torch.backends.cudnn.benchmark_limit = WAYS
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before


def _in_our_words(error: Exception) -> LorafleetError:
    if isinstance(error, LorafleetError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return GenerationFailed("out of GPU memory: ask for a smaller size, or set base.low_memory=true")
    logger.error("a generation failed", exc_info=error)
    return GenerationFailed("the model failed on this request: the log says why")
