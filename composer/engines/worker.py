"""The thread that owns one model: calls join its running batch between steps.

Knows nothing of HTTP or scheduling. All that touches the model or the tokenizer runs here, so
neither needs a lock; callers talk to it through one inbox and hear back on their event loops.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from composer.engines import prompts
from composer.engines.batch import Batch
from composer.engines.gated import Use
from composer.engines.job import Job, Row, Task, for_caller, put_all
from composer.engines.model import LocalModel, Output
from composer.engines.sampling import Knobs, sample, top_logprobs
from composer.engines.stopping import Answer
from composer.engines.traces import CallTrace
from composer.errors import ComposerError, EngineError, EngineUnavailable
from composer.types import Call, Chunk, TokenLogprob, Usage

if TYPE_CHECKING:
    from composer.engines.local import EmbeddedSettings

log = logging.getLogger(__name__)


class Worker:
    """Starts its thread at once; `started` resolves when the model has run once, or with why
    not. It cannot be cancelled, since a load cannot be interrupted: `stop` ends the thread after
    it."""

    def __init__(self, server: str, settings: EmbeddedSettings) -> None:
        self.started: Future[None] = Future()
        self.started.set_running_or_notify_cancel()
        self._server = server
        self._settings = settings
        self._inbox: queue.SimpleQueue[Job | Task | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing is put in after `_ending`
        self._ending = False
        self._waiting: deque[Job] = deque()
        self._rows: list[Row] = []
        self._mail: list[tuple[Job, Chunk | ComposerError]] = []
        self._thread = threading.Thread(target=self._run, name=f"embedded-{server}", daemon=True)
        self._thread.start()

    # --- called from event loops -----------------------------------------------------------

    def submit(self, call: Call, loop: asyncio.AbstractEventLoop) -> Job:
        """The call's chunks will come to the job's outbox, on `loop`; a chunk with usage or an
        error is the last."""
        job = Job(call, loop, asyncio.Queue())
        self._put(job)
        return job

    def do(self, work: Callable[[LocalModel], Any]) -> Future[Any]:
        """Runs `work` between two steps. Its exception is the future's."""
        task = Task(work, Future())
        self._put(task)
        return task.done

    def stop(self) -> None:
        """Ends after the current step; what is left fails with EngineUnavailable."""
        with self._gate:
            self._ending = True
            self._inbox.put(None)

    def join(self) -> None:
        """Blocks until the thread has ended."""
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Loading or running."""
        return self._thread.is_alive() and not self._ending

    @property
    def ready(self) -> bool:
        return self.started.done() and self.alive

    def _put(self, item: Job | Task) -> None:
        with self._gate:
            if self._ending:
                raise self._gone()
            self._inbox.put(item)

    def _gone(self) -> EngineUnavailable:
        return EngineUnavailable(f"the embedded engine of server {self._server!r} is closed")

    # --- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._settings.threads is not None:
                torch.set_num_threads(self._settings.threads)
            self._model = LocalModel(self._settings)
            self._batch = Batch(self._model)
            if not self._ending:
                self._warm_up()
        except BaseException as error:
            self._end()
            self.started.set_exception(error)
            return
        self.started.set_result(None)
        try:
            while self._receive():
                self._drop_cancelled()
                self._admit()
                self._step()
                self._deliver()
        except BaseException:
            log.exception("the embedded engine of server %r died", self._server)
        finally:
            self._end()
            del self._model, self._batch

    def _warm_up(self) -> None:
        """What torch sets up at the first forward is paid here, not by the first caller."""
        try:
            self._batch.prefill([[0]], [Use()])
            self._batch.step([0])
        except Exception as error:
            raise EngineUnavailable(
                f"the base model {self._settings.model!r} was loaded but cannot run ({error!r}); "
                "see whether `device` and `dtype` suit it, or serve it with vLLM"
            ) from error
        finally:
            self._batch.clear()

    def _receive(self) -> bool:
        """Takes what has come, waiting for it where there is nothing to run; False at the end."""
        while True:
            idle = not (self._rows or self._waiting or self._mail)
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, Task):
                self._do(item)
            else:
                self._prepare(item)

    def _do(self, task: Task) -> None:
        if not task.done.set_running_or_notify_cancel():
            return
        try:
            task.done.set_result(task.work(self._model))
        except Exception as error:
            task.done.set_exception(error)

    def _prepare(self, job: Job) -> None:
        """Queues a job whose prompt fits; refuses any other."""
        call = job.call
        try:
            job.use = self._model.use_of(call)
            if job.use.groups is not None and job.use.adapter is not None:
                members = self._model.members(job.use.adapter)
                job.trace = CallTrace(members, job.use.groups, call.sampling.n, self._model.piece)
            job.prompt = prompts.encode(self._model.tokenizer, call.messages, call.prompt)
            job.budget = prompts.budget(call, len(job.prompt), self._model.context)
        except Exception as error:
            self._post(job, for_caller(error))
        else:
            self._waiting.append(job)

    def _drop_cancelled(self) -> None:
        if any(job.cancelled for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        if any(row.job.cancelled for row in self._rows):
            try:
                self._keep([not row.job.cancelled for row in self._rows])
            except Exception as error:
                self._lose_batch(error)

    def _admit(self) -> None:
        """Prefills waiting jobs, first come first, as far as there is room, and lets them join."""
        jobs = self._next_jobs()
        if not jobs:
            return
        new = Batch(self._model)
        rows: list[Row] = []
        try:
            read = new.prefill([job.prompt for job in jobs], [job.use for job in jobs])
            for job, weights in zip(jobs, read.gates, strict=False):
                if job.trace is not None and weights is not None:
                    job.trace.add_prompt(job.prompt, weights)
            for i, means in read.weights.items():
                jobs[i].weights = means
            rows = [self._row(job, i) for job in jobs for i in range(job.call.sampling.n)]
            counts = [job.call.sampling.n for job in jobs]
            spread = [i for i, count in enumerate(counts) for _ in range(count)]
            gates = [read.gates[i] for i in spread] if read.gates else ()
            index = torch.tensor(spread, device=read.logits.device)
            self._advance(rows, Output(read.logits[index], gates))
            # Rows that ended or failed at their first token never join.
            alive = [not row.answer.ended and not row.job.cancelled for row in rows]
            joined = _count_by(spread, alive, len(jobs))
            self._batch.join(new, joined)
        except Exception as error:
            log.exception("prefill of %d calls failed on server %r", len(jobs), self._server)
            self._fail(jobs, error)
            return
        self._rows += [row for row, here in zip(rows, alive, strict=True) if here]

    def _next_jobs(self) -> list[Job]:
        settings = self._settings
        jobs: list[Job] = []
        rows = len(self._rows)
        longest = max((row.job.final_length for row in self._rows), default=0)
        widest = 0
        while self._waiting:
            job = self._waiting[0]
            rows += job.call.sampling.n
            longest = max(longest, job.final_length)
            widest = max(widest, len(job.prompt))
            if rows > settings.max_batch:
                break
            alone = not self._rows and not jobs
            if not alone and settings.kv_tokens is not None and rows * longest > settings.kv_tokens:
                break
            if jobs and (len(jobs) + 1) * widest > settings.prefill_tokens:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _row(self, job: Job, index: int) -> Row:
        sampling = job.call.sampling
        answer = Answer(
            index,
            decode=self._model.decode,
            prompt=job.prompt,
            stops=sampling.stop,
            ends=self._model.end_ids,
            budget=job.budget,
        )
        job.open_rows += 1
        seed = None if sampling.seed is None else f"{sampling.seed}/{index}"
        return Row(job, answer, random.Random(seed))

    def _step(self) -> None:
        if not self._rows:
            return
        try:
            self._advance(self._rows, self._batch.step([row.token for row in self._rows]))
            self._keep([not row.answer.ended for row in self._rows])
        except Exception as error:
            self._lose_batch(error)

    def _lose_batch(self, error: Exception) -> None:
        """A cache that is half changed serves nobody: its calls fail, the next begin afresh."""
        log.error("%d rows failed on server %r", len(self._rows), self._server, exc_info=error)
        self._fail([row.job for row in self._rows], error)
        self._rows = []
        self._batch.clear()

    @torch.inference_mode()
    def _advance(self, rows: Sequence[Row], read: Output) -> None:
        """One token more for each row. A row that fails fails its own call only."""
        logits, gates = read.logits, read.gates or [None] * len(rows)
        device = logits.device
        samplings = [row.job.call.sampling for row in rows]
        temperatures = [_or_one(s.temperature) for s in samplings]
        top_ps = [_or_one(s.top_p) for s in samplings]
        draws = [row.rng.random() for row in rows]
        knobs = Knobs(
            *torch.tensor([temperatures, top_ps, draws], dtype=torch.float64, device=device)
        )
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        tokens = sample(torch.nan_to_num(logits), knobs)
        logprobs = self._logprobs(rows, logits, tokens)
        for row, token, fine, logprob, weights in zip(
            rows, tokens.tolist(), sound, logprobs, gates, strict=True
        ):
            if row.job.cancelled:
                continue
            try:
                if not fine:
                    raise EngineError(
                        "the model's output is not finite: weights or adapter are broken"
                    )
                row.token = token
                if weights is not None:
                    self._trace(row, weights)
                self._emit(row, row.answer.push(token, logprob))
            except Exception as error:
                self._fail([row.job], error)

    def _trace(self, row: Row, weights: torch.Tensor) -> None:
        """`weights` (new, G, E): the last ones are those that the row's newest token came of."""
        if row.job.trace is not None and row.token not in self._model.end_ids:
            row.job.trace.add(row.answer.index, row.token, weights[-1])

    def _logprobs(
        self, rows: Sequence[Row], logits: torch.Tensor, tokens: torch.Tensor
    ) -> list[TokenLogprob | None]:
        asked = [row.job.call.sampling.logprobs for row in rows]
        result: list[TokenLogprob | None] = [None] * len(rows)
        index = [i for i, k in enumerate(asked) if k is not None]
        if not index:
            return result
        most = max(asked[i] or 0 for i in index)
        chosen, best, ids = top_logprobs(logits[index], tokens[index], most)
        piece = self._model.piece
        for i, own, values, others in zip(
            index, chosen.tolist(), best.tolist(), ids.tolist(), strict=True
        ):
            top = tuple((piece(t), v) for t, v in zip(others, values, strict=True))
            result[i] = TokenLogprob(piece(int(tokens[i])), own, top[: asked[i]])
        return result

    def _emit(self, row: Row, chunk: Chunk | None) -> None:
        if chunk is None:
            return
        job = row.job
        if row.answer.ended:
            job.open_rows -= 1
            job.tokens += row.answer.tokens
            if job.open_rows == 0:
                usage = Usage(len(job.prompt), job.tokens)
                gates = None if job.trace is None else job.trace.told()
                chunk = replace(chunk, usage=usage, gates=gates, weights=job.weights)
        self._post(job, chunk)

    def _keep(self, here: Sequence[bool]) -> None:
        self._batch.keep([i for i, stays in enumerate(here) if stays])
        self._rows = [row for row, stays in zip(self._rows, here, strict=True) if stays]

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in dict.fromkeys(jobs):
            if not job.cancelled:
                job.cancelled = True
                self._post(job, for_caller(error))

    def _post(self, job: Job, item: Chunk | ComposerError) -> None:
        self._mail.append((job, item))

    def _deliver(self) -> None:
        """One wake-up per event loop and step, however many chunks there are."""
        mail, self._mail = self._mail, []
        for loop in {job.loop for job, _ in mail}:
            mine = [(job, item) for job, item in mail if job.loop is loop]
            try:
                loop.call_soon_threadsafe(put_all, mine)
            except RuntimeError:  # that loop is closed: nobody is left to hear
                for job, _ in mine:
                    job.cancelled = True

    def _end(self) -> None:
        """Nothing comes in any more, and whoever still waits is told."""
        with self._gate:
            self._ending = True
        self._fail([row.job for row in self._rows] + list(self._waiting), self._gone())
        self._rows = []
        self._waiting.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Task):
                if item.done.set_running_or_notify_cancel():
                    item.done.set_exception(self._gone())
            elif item is not None:
                self._fail([item], self._gone())
        self._deliver()


def _count_by(owners: Sequence[int], here: Sequence[bool], n: int) -> list[int]:
    counts = [0] * n
    for owner, stays in zip(owners, here, strict=True):
        counts[owner] += stays
    return counts


def _or_one(knob: float | None) -> float:
    return 1.0 if knob is None else knob
