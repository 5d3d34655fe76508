"""A batch for which a worker finds no shared memory is an error that says what to do; nobody waits for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.data import DataLoader

from k2ssl.batch import AsrBatch, PretrainBatch
from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request
from k2ssl.data.hand_over import HandedOver

if TYPE_CHECKING:
    from tests.data.conftest import SmallCorpus

# A limit on the size of files is one on shared memory too, which is a file. The first line that is printed is the error, in one line.
READS_UNDER_A_LIMIT = """
import resource, sys
from lhotse import CutSet
from k2ssl.bin.program import one_line
from k2ssl.data.labels import LabelStore
from k2ssl.data.loader import audio_loader, pretrain_loader
folder, kind, workers, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cuts, stores = CutSet.from_jsonl_lazy(folder + "/cut.jsonl"), [LabelStore.open(folder + "/labels")]
options = {"max_duration": 20.0, "num_workers": workers}
loader = audio_loader(cuts, **options) if kind == "audio" else pretrain_loader(cuts, stores, num_buckets=3, **options)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print("read", sum(len(batch.ids) for batch in loader))
except OSError as error:
    print("refused:", one_line(error))
"""


def read_under_a_limit(folder: Path, kind: str, workers: int, limit: int) -> str:
    command = [sys.executable, "-c", READS_UNDER_A_LIMIT, str(folder), kind, str(workers), str(limit)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=120).stdout.strip()


@pytest.mark.parametrize("kind", ["audio", "crops"])
def test_a_batch_without_room_in_shared_memory_ends_the_loading(corpus: SmallCorpus, kind: str) -> None:
    said = read_under_a_limit(corpus.folder, kind, workers=2, limit=100_000)
    assert said.startswith("refused: a worker cannot hand over a batch of ") and said.count("\n") == 0
    assert all(word in said for word in ("File too large", "/dev/shm", "ulimit -f", "--data.num-workers 0"))


def test_without_workers_or_with_room_all_is_read(corpus: SmallCorpus) -> None:
    without = read_under_a_limit(corpus.folder, "audio", workers=0, limit=100_000)
    assert without == read_under_a_limit(corpus.folder, "audio", workers=2, limit=10_000_000) == f"read {len(list(corpus.cuts()))}"


class Ready(BatchDataset[PretrainBatch]):
    """Two label sets, one without labels, and lengths; the request's epoch is all that the audio holds."""

    def __getitem__(self, request: Request) -> Loaded[PretrainBatch]:
        audio = torch.full((3, 50), float(request.epoch))[:2]
        labels = (torch.arange(8).view(2, 4), torch.zeros(2, 0, dtype=torch.int64))
        return Loaded(PretrainBatch(audio, labels, torch.tensor([50, 40]), ("a", "b")), (("c", "gone"),))


def test_every_tensor_is_in_shared_memory_before_it_is_sent_and_arrives_as_it_was() -> None:
    loaded = HandedOver(Ready())[Request(7, ())]
    batch, plain = loaded.batch, Ready()[Request(7, ())].batch
    assert batch is not None and plain is not None and loaded.failures == (("c", "gone"),) and batch.ids == ("a", "b")
    assert batch.audio.is_shared() and batch.labels[0].is_shared() and batch.audio_lens is not None and batch.audio_lens.is_shared()
    assert not plain.audio.is_shared(), "the test can tell"
    requests = [Request(epoch, ()) for epoch in range(4)]
    sent = list(DataLoader(HandedOver(Ready()), batch_size=None, sampler=requests, num_workers=1))  # type: ignore[arg-type]
    for epoch, ours in enumerate(sent):
        assert ours.failures == (("c", "gone"),) and torch.equal(ours.batch.audio, torch.full((2, 50), float(epoch)))
        assert all(torch.equal(our, their) for our, their in zip(ours.batch.labels, plain.labels, strict=True))


class NoTokens(BatchDataset[AsrBatch]):
    def __getitem__(self, request: Request) -> Loaded[AsrBatch]:
        return Loaded(None) if request.epoch else Loaded(AsrBatch(torch.ones(1, 4), None, ("hello",), ("a",)))


def test_what_is_missing_from_a_batch_stays_missing() -> None:
    first, second = (HandedOver(NoTokens())[Request(epoch, ())] for epoch in (0, 1))
    assert first.batch is not None and first.batch.audio.is_shared() and first.batch.tokens is None and second.batch is None
