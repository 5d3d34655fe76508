"""The loader behind all loaders: the same batches on every machine and after every interruption.

What a batch holds is a function of the cut set, the settings, the seed and the epoch. Workers keep no state: which cuts to read comes
with each request, and where an utterance is cropped is computed from the seed, the epoch and its id. That is why the state of a loader is
one count: the batches handed out in this epoch. Going on from there means to read the manifest once more up to that point, no audio: some
45 to 60 microseconds a cut (15 s for 280 thousand cuts, a quarter of an hour for 15 million). Half of it is spent on making cuts out of JSON, which is
needed to know what they are, and a third on lhotse's bucketing, which is gone through as before so that every draw is the same.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import torch
from lhotse.cut import Cut
from torch.utils.data import DataLoader

from k2ssl.data.audio import AudioError
from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request
from k2ssl.data.hand_over import HandedOver
from k2ssl.data.intake import Intake
from k2ssl.data.mixture import Corpora
from k2ssl.data.sampler import ORDER, BatchSeconds, Cropped, Padded, RoundSampler, collection_paused, estimated_bins, even_bins
from k2ssl.data.stable_hash import stable_hash

_log = logging.getLogger(__name__)

_MOST_MISSED = 2  # batches in a row of which nothing can be read; more is no damaged file but a disk that is gone
_MOST_WORKERS = max(1024, 4 * (os.cpu_count() or 1))  # more is a slip of the pen, and would take the machine down

_BY_COUNT = "`start_at` (of training programs: --accept-changes True) goes on after as many batches of it"
_ANOTHER = f"it is another cut set; {_BY_COUNT}"

OnError = Callable[[str, str], None]


class Batch(Protocol):
    """Any of the batches of `k2ssl.batch`."""

    def pin_memory(self) -> Any: ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class SamplingConfig:
    """How cuts are gathered into batches.

    Attributes:
        max_duration: seconds of audio in a batch of one rank, counted as number of utterances times longest.
        quadratic_duration: count an utterance of d seconds as d + d^2 / quadratic_duration; None: as d.
        num_buckets: groups of similar duration, from one of which a batch is drawn.
        buffer_size: cuts that are held at a time; the larger, the better the shuffling.
        num_cuts_for_bins: cuts that are read ahead, once, to set the limits between the buckets.
        shuffle: draw at random out of the buffer.
        drop_incomplete: leave out the last batches of an epoch when they do not suffice for all ranks. False deals them to the first
            ranks: every cut exactly once, but not every rank the same number of batches.

    Raises:
        ValueError: a value out of range.
    """

    max_duration: float
    quadratic_duration: float | None = None
    num_buckets: int = 30
    buffer_size: int = 20000
    num_cuts_for_bins: int = 10000
    shuffle: bool = True
    drop_incomplete: bool = True

    def __post_init__(self) -> None:
        if not self.max_duration > 0:
            raise ValueError(f"SamplingConfig: max_duration is {self.max_duration}, a number of seconds > 0 is needed")
        if self.quadratic_duration is not None and not self.quadratic_duration > 0:
            raise ValueError(f"SamplingConfig: quadratic_duration is {self.quadratic_duration}, None or a number of seconds > 0 is needed")
        for name in ("num_buckets", "buffer_size", "num_cuts_for_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"SamplingConfig: {name} is {getattr(self, name)}, an integer >= 1 is needed")


class LoaderOptions(TypedDict, total=False):
    """By whom and how batches are read: the keywords that all loaders share. What is left out is as `BatchLoader` has it.

    Attributes:
        rank, world_size: which share of the batches.
        seed, epoch: of the order and of everything else that is drawn.
        num_workers: processes that read audio; 0 reads in this one. A batch for which they find no shared memory is an `OSError`.
        prefetch: batches that every worker reads ahead. They do not count as handed out.
        pin_memory: put batches into page-locked memory; needs a GPU.
        on_error: told (cut id, reason) of audio that cannot be read, which is then left out; None raises `AudioError`.
    """

    rank: int
    world_size: int
    seed: int
    epoch: int
    num_workers: int
    prefetch: int
    pin_memory: bool
    on_error: OnError | None


class BatchLoader(Generic[B]):
    """Batches of one epoch for one rank.

    Iterating starts at the epoch's beginning, or where `load_state_dict` or `start_at` called just before says. `set_epoch` chooses what
    is drawn.

    Args:
        corpora: what to read, and in which proportion.
        intake: which cuts to use.
        dataset: turns the cuts of a batch into the batch, here or in workers.
        sampling: see there.
        crop_seconds: what is beyond is cropped away, so that it does not count as duration; None where audio is padded instead.
        rank, world_size, seed, epoch, num_workers, prefetch, pin_memory, on_error: see `LoaderOptions`.

    Raises:
        ValueError: rank, world_size, num_workers or prefetch out of range.
    """

    def __init__(
        self,
        corpora: Corpora,
        intake: Intake,
        dataset: BatchDataset[B],
        sampling: SamplingConfig,
        *,
        crop_seconds: float | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        on_error: OnError | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} and world_size {world_size}, allowed is 0 <= rank < world_size")
        if not 0 <= num_workers <= _MOST_WORKERS:
            raise ValueError(f"num_workers is {num_workers}, allowed are 0 to {_MOST_WORKERS} processes")
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}, allowed is >= 1 batches")
        self.corpora = corpora
        self.intake = intake
        self.dataset = dataset
        self.sampling = sampling
        self.crop_seconds = crop_seconds
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.on_error = on_error
        self._consumed = 0
        self._digest: int | None = 0  # of what was consumed; None: whatever it was
        self._resume = False
        self._told: list[str] = []
        self._limits: tuple[Callable[[float], float], list[float]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`; nothing happens if it is the present one already."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._consumed = self._digest = 0
            self._resume = False

    @property
    def excluded(self) -> Mapping[str, int]:
        """Cuts left out so far in this pass over the manifest, by reason."""
        return dict(self.intake.excluded)

    def requests(self) -> Iterator[Request]:
        """What each batch of the whole epoch is made of, without reading audio; where iteration stands is not touched."""
        batches = iter(self._sampler(self.intake.copy()))
        while (cuts := next(batches, None)) is not None:  # `for` would call iter() again, which starts the sampler over
            yield Request(self.epoch, tuple(cuts))

    def read(self, request: Request) -> B:
        """The batch of one request, read in this process; where iteration stands is not touched.

        Raises:
            ValueError: none of its cuts could be read, or one could not and nobody is told (`on_error`).
        """
        loaded = self.dataset[request]
        self._tell(loaded.failures)
        if loaded.batch is None:
            raise ValueError(
                f"epoch {request.epoch}: none of the {len(request.cuts)} cuts asked for could be read: {_first_of(loaded.failures)}"
            )
        return loaded.batch

    def start_at(self, epoch: int, batches: int) -> None:
        """Let the next iteration go on after so many batches of `epoch`, whatever they hold; there is none left beyond the epoch's end.

        For a run that goes on with other settings than it was saved with (another number of ranks, other batches), which keeps how much
        audio it has seen but not which. `load_state_dict` is for one that goes on as it was.

        Raises:
            ValueError: a negative number.
        """
        if epoch < 0 or batches < 0:
            raise ValueError(f"start_at: epoch is {epoch} and batches {batches}, allowed is >= 0")
        self.epoch, self._consumed, self._digest = epoch, batches, None
        self._resume = True

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on all ranks: how many batches have been handed out in this epoch, and of what."""
        return {"epoch": self.epoch, "batches": self._consumed, "digest": self._digest, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that `state` says; the next iteration reads the manifest up to there, but no audio.

        Raises:
            ValueError: the state is of a loader with other settings or other labels, whose batches were other ones. (Another cut set is
                noticed, and refused with a ValueError, when iteration starts.)
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                was = state.get(name)
                raise ValueError(f"loader state: {name} was {was!r} when it was saved and is {ours!r} now; both must be equal; {_BY_COUNT}")
        digest = state["digest"]
        self.epoch, self._consumed, self._digest = int(state["epoch"]), int(state["batches"]), None if digest is None else int(digest)
        self._resume = True

    def __iter__(self) -> Iterator[B]:
        if not self._resume:
            self._consumed = self._digest = 0
        self._resume = False
        sampler = self._sampler(self.intake)
        digests: deque[int] = deque()
        before: B | None = None
        waiting: list[int] = []  # digests of the requests that nothing was handed out for yet
        for loaded in self._data_loader(self._remaining(sampler, digests)):
            waiting.append(digests.popleft())
            self._tell(loaded.failures)
            if loaded.batch is not None:
                yield from self._hand_out(loaded.batch, waiting)
                before, waiting = loaded.batch, []
            elif self.sampling.drop_incomplete:  # ranks must not fall out of step: the batch that follows stands in
                self._tell_of_nothing(loaded.failures, self._consumed + len(waiting) - 1, len(waiting))
            else:
                self._consumed, self._digest, waiting = self._consumed + 1, waiting[0], []
        if before is not None:  # none followed
            yield from self._hand_out(before, waiting)
        elif waiting and not self._consumed:
            raise ValueError(f"epoch {self.epoch}: nothing could be read of any of its {len(waiting)} batches")
        self._say_what_is_missing(sampler)

    def _hand_out(self, batch: B, digests: Iterable[int]) -> Iterator[B]:
        """The batch once for each request, which the state counts one by one: a loader that goes on in between does the same."""
        for digest in digests:
            self._consumed += 1
            self._digest = digest
            yield batch

    def _tell_of_nothing(self, failures: Sequence[tuple[str, str]], number: int, missed: int) -> None:
        what = f"batch {number} of epoch {self.epoch}: none of its cuts could be read: {_first_of(failures)}"
        if missed > _MOST_MISSED:
            raise ValueError(f"{what}; nor could those of the {missed - 1} batches before it")
        _log.error("%s; a neighbouring batch stands in for it", what)

    def _remaining(self, sampler: RoundSampler, digests: deque[int]) -> Iterator[Request]:
        """What to read, from the first batch that has not been consumed on. `digests` receives the sampler's digest with every request."""
        batches, checked = iter(sampler), self._digest is not None
        with collection_paused():
            for done in range(self._consumed):
                if next(batches, None) is not None:
                    continue
                if not checked:
                    return
                raise ValueError(f"loader state: {self._consumed} batches were consumed, this cut set gives {done}; {_ANOTHER}")
        if checked and sampler.digest != self._digest:
            raise ValueError(f"loader state: the first {self._consumed} batches are not those consumed before; {_ANOTHER}")
        while (cuts := next(batches, None)) is not None:
            digests.append(sampler.digest)
            yield Request(self.epoch, tuple(cuts))

    def _data_loader(self, requests: Iterable[Request]) -> Iterable[Loaded[B]]:
        generator = torch.Generator().manual_seed(stable_hash(self.seed, self.epoch, self.rank) >> 1)
        return DataLoader(
            HandedOver(self.dataset) if self.num_workers else self.dataset,
            batch_size=None,
            sampler=requests,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=self.pin_memory,
            generator=generator,
            worker_init_fn=_obey_parent_only,
        )

    def _sampler(self, intake: Intake) -> RoundSampler:
        sampling = self.sampling
        length, bins = self._bucket_limits()
        constraint = BatchSeconds(max_duration=sampling.max_duration, quadratic_duration=sampling.quadratic_duration, length=length)
        return RoundSampler(
            _Pass(intake, self.corpora, self.seed, self.epoch),
            constraint=constraint,
            duration_bins=bins,
            drop_incomplete=sampling.drop_incomplete,
            shuffle=sampling.shuffle,
            buffer_size=sampling.buffer_size,
            seed=stable_hash("order", self.seed, self.epoch),
            rank=self.rank,
            world_size=self.world_size,
        )

    def _bucket_limits(self) -> tuple[Callable[[float], float], list[float]]:
        """How long a cut counts and where buckets end; the same in every epoch."""
        if self._limits is None:
            sampling = self.sampling
            first = _Pass(self.intake.copy(), self.corpora, self.seed, 0, tell=False)
            if self.crop_seconds is not None:
                length: Callable[[float], float] = Cropped(self.crop_seconds)
                self._limits = length, estimated_bins(first, sampling.num_buckets, length, sampling.num_cuts_for_bins)
            else:
                estimate = estimated_bins(first, sampling.num_buckets, float, sampling.num_cuts_for_bins) if sampling.shuffle else []
                bins = even_bins(sampling.max_duration, estimate)
                self._limits = Padded(bins), list(bins)
        return self._limits

    def _identity(self) -> dict[str, Any]:
        sampling = {f"sampling.{name}": value for name, value in asdict(self.sampling).items()}
        return {
            "order": ORDER,
            "seed": self.seed,
            "world_size": self.world_size,
            "crop_seconds": self.crop_seconds,
            **sampling,
            **self.corpora.identity(),
            **self.intake.identity(),
            **self.dataset.identity(),
        }

    def _tell(self, failures: Sequence[tuple[str, str]]) -> None:
        for cut_id, reason in failures:
            if self.on_error is None:
                raise AudioError(cut_id, reason)
            self.on_error(cut_id, reason)

    def _say_what_is_missing(self, sampler: RoundSampler) -> None:
        reasons = [f"{count} {reason}" for reason, count in self.intake.excluded.most_common()]
        if sampler.dropped:
            reasons.append(f"{sampler.dropped} in the last batches, fewer than the {self.world_size} ranks")
        if not self._consumed and self.sampling.drop_incomplete:
            raise ValueError(
                f"epoch {self.epoch} has no batch for every rank; cuts left out: {', '.join(reasons) or 'none, there are none'}"
            )
        if reasons and reasons != self._told and self.rank == 0:
            self._told = reasons  # most epochs leave out the same
            _log.info("epoch %d: cuts left out: %s", self.epoch, ", ".join(reasons))


def _obey_parent_only(worker: int) -> None:
    """In a worker: signals that go to the whole process group (Ctrl-C, a scheduler's SIGTERM) are for the main process, which may need
    this worker until it has saved its work. SIGTERM from the main process itself ends the worker, as torch has it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # not Linux
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="SIGTERM", daemon=True).start()


def _first_of(failures: Sequence[tuple[str, str]]) -> str:
    """The first of at least one failure, for messages."""
    cut_id, reason = failures[0]
    return f"cut {cut_id}: {reason}"


@dataclass(frozen=True)
class _Pass:
    """One pass over the usable cuts of an epoch, as often as it is asked for."""

    intake: Intake
    corpora: Corpora
    seed: int
    epoch: int
    tell: bool = True

    def __iter__(self) -> Iterator[Cut]:
        return self.intake(self.corpora.cuts(self.seed, self.epoch), self.tell)
