"""Language models over tokens, as searches use them; and the n-gram model that is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from k2ssl.decode.arpa import END, START, UNKNOWN, Arpa, NgramTable, read_arpa

_NAMED = 5  # words in a message
_LOG10_OF_NOTHING = -99.0  # as ARPA files write it


class TokenLm(Protocol):
    """A language model over the ids of a tokenizer, for any number of hypotheses at a time.

    A state is a tensor whose first axis are hypotheses, so that a search picks and repeats them by indexing; what else is in it is the
    model's own. M stands for the number of hypotheses, V for the vocabulary size.
    """

    @property
    def vocab_size(self) -> int: ...

    def start(self, batch: int, device: torch.device) -> Tensor:
        """(batch, ...) states before the first token."""

    def log_probs(self, state: Tensor) -> Tensor:
        """(M, V) natural logarithms of the probabilities of the next token. The column of blank is 0.0 and carries no meaning."""

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        """(M, ...) states after the tokens (M,) int64, none of them blank."""

    def final(self, state: Tensor) -> Tensor:
        """(M,) natural logarithms of the probability that the sentence ends here."""


def waiting_is_free(device: torch.device) -> bool:
    """Whether a search asks about those hypotheses only that have a new token. A GPU would be waited for to know their number, and takes as
    long for all of them."""
    return device.type == "cpu"


class NgramLm(nn.Module):
    """A back-off n-gram model as an automaton, batched and on the device of its hypotheses; it waits for the device nowhere.

    A state is the number of a context, the longest suffix of the tokens so far that the model lists. `log_probs` starts from the row of
    1-grams and goes up order by order: it adds the back-off weight of the longer context and puts in the entries that this has.

    Special words: `<s>` is the context before the first token and never predicted; `</s>` is what `final` returns; `<unk>`, in small or
    large letters, is the tokenizer's unknown symbol, with a probability of 1e-99 where the model has none.

    Args:
        model: its words are tokens.
        pieces: the symbols of the tokenizer, blank first, `<unk>` among them.

    Raises:
        ValueError: the words of the model are others than the tokenizer's symbols, or an n-gram is listed twice or without its first
            words.
    """

    key: Tensor  # (A,) context * (V + 2) + word, of every n-gram, sorted; the contexts of fewer words come first
    log_prob: Tensor  # (A,) float32
    word: Tensor  # (A,) token, V for </s>, V + 1 for <s>
    target: Tensor  # (A,) context after the n-gram
    weight: Tensor  # (contexts,) float32 logarithm of the back-off weight
    lower: Tensor  # (contexts,) context to back off to; 0 is the empty one
    depth: Tensor  # (contexts,) number of words
    first: Tensor  # (contexts + 1,) where the n-grams of a context begin

    def __init__(self, model: Arpa, pieces: Sequence[str]) -> None:
        super().__init__()
        self.vocab_size = len(pieces)
        self.order = len(model.orders)
        self._end, self._start, self._width = self.vocab_size, self.vocab_size + 1, self.vocab_size + 2
        arrays, self._most = _automaton(model, _numbers(model.words, pieces), self._width)
        for name, values in arrays.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)
        begins = np.flatnonzero(arrays["key"] == self._start)  # the 1-gram <s>
        self._begin = int(arrays["target"][begins[0]]) if len(begins) else 0

    @classmethod
    def load(cls, path: str | Path, pieces: Sequence[str]) -> NgramLm:
        """Read an ARPA file whose words are tokens.

        Raises:
            ValueError: as the class, or the file is no ARPA file; names it.
            OSError: there is no such file.
        """
        model = read_arpa(path)
        try:
            return cls(model, pieces)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def start(self, batch: int, device: torch.device) -> Tensor:
        """(batch,) int64 states before the first token; the tables move to `device` if they are elsewhere."""
        self.to(device)
        return torch.full((batch,), self._begin, dtype=torch.int64, device=device)

    @torch.no_grad()
    def log_probs(self, state: Tensor) -> Tensor:
        """See `TokenLm`."""
        contexts = self._suffixes(state)
        rows = self._row_without_context().repeat(len(state), 1)
        for depth in range(1, self.order):
            context = contexts[:, depth : depth + 1]
            rows += self.weight[context]  # that of the empty context, which stands for none, is 0
            place = self.first[context] + torch.arange(self._most[depth], device=state.device)
            within = (place < self.first[context + 1]) & (context > 0)
            place = place.where(within, 0)
            rows.scatter_(1, self.word[place].where(within, self._start), self.log_prob[place])
        rows[:, 0] = 0.0
        return rows[:, : self.vocab_size]

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        """See `TokenLm`."""
        return self.step(state, token)[1]

    def final(self, state: Tensor) -> Tensor:
        """See `TokenLm`."""
        return self.step(state, torch.full_like(state, self._end))[0]

    @torch.no_grad()
    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) log-probabilities of the tokens (M,), and (M,) states after them; of few tokens cheaper than `log_probs`."""
        log_prob, target = torch.zeros_like(state, dtype=torch.float32), torch.zeros_like(state)
        found = torch.zeros_like(state, dtype=torch.bool)
        for _ in range(self.order):
            wanted = state * self._width + token
            place = torch.searchsorted(self.key, wanted).clamp_(max=len(self.key) - 1)
            hit = (self.key[place] == wanted) & ~found
            target = self.target[place].where(hit, target)
            log_prob = torch.where(hit, log_prob + self.log_prob[place], log_prob)
            found = found | hit
            log_prob = torch.where(found, log_prob, log_prob + self.weight[state])
            state = self.lower[state]
        return log_prob, target

    def _suffixes(self, state: Tensor) -> Tensor:
        """(M, order) the contexts that a state backs off to, itself included, by their number of words; 0 where there is none."""
        contexts = torch.zeros(len(state), self.order, dtype=torch.int64, device=state.device)
        for _ in range(self.order):
            contexts.scatter_(1, self.depth[state].unsqueeze(1), state.unsqueeze(1))
            state = self.lower[state]
        return contexts

    def _row_without_context(self) -> Tensor:
        count = self._most[0]
        row = torch.zeros(self._width, dtype=self.log_prob.dtype, device=self.log_prob.device)
        return row.scatter_(0, self.word[:count], self.log_prob[:count])


def _numbers(words: Sequence[str], pieces: Sequence[str]) -> NDArray[np.int64]:
    """The token of each word of a model; V is `</s>`, V + 1 `<s>`. ValueError if they are not those of the tokenizer."""
    known = {piece: token for token, piece in enumerate(pieces)}
    ids = {**known, END: len(pieces), START: len(pieces) + 1, UNKNOWN.upper(): known[UNKNOWN]}
    ids.pop(pieces[0])
    strange = [word for word in words if word not in ids]
    named = {ids[word] for word in words if word in ids}
    missing = [piece for token, piece in enumerate(pieces) if token not in named and token not in (0, known[UNKNOWN])]
    if strange or missing:
        raise ValueError(
            "the language model is of another vocabulary than the tokenizer: "
            f"{_some(missing)} of the tokenizer's {len(pieces):,} symbols are missing in it, and "
            f"{_some(strange)} of its {len(words):,} words are none of the tokenizer's"
        )
    return np.array([ids[word] for word in words], dtype=np.int64)


def _some(words: Sequence[str]) -> str:
    shown = ", ".join(repr(word) for word in words[:_NAMED])
    return f"{len(words):,} ({shown}{', ...' if len(words) > _NAMED else ''})" if words else "0"


def _automaton(model: Arpa, ids: NDArray[np.int64], width: int) -> tuple[dict[str, NDArray[np.generic]], list[int]]:
    """The tables of `NgramLm`, and the largest number of n-grams of any context by its number of words."""
    keys, log_probs, weights = np.empty(0, np.int64), [], [np.zeros(1)]
    lower, depths = np.zeros(1, np.int64), [np.zeros(1, np.int64)]
    for order, table in enumerate(_with_unknown(model, ids, width).orders, start=1):
        words = table.words.astype(np.int64)
        context = np.zeros(len(words), np.int64)
        for column in range(order - 1):
            context, found = _find(keys, context * width + words[:, column])
            if not found.all():
                raise ValueError(f"the {order}-gram {model.text(order, int(found.argmin()))!r} is listed without its first words")
        new = context * width + words[:, -1]
        sorting = np.argsort(new, kind="stable")
        new = new[sorting]
        if len(twice := np.flatnonzero(new[1:] == new[:-1])):
            raise ValueError(f"the {order}-gram {model.text(order, int(sorting[twice[0] + 1]))!r} is listed twice")
        links = _suffix(keys, lower, new, width) if order > 1 else np.zeros(len(new), np.int64)
        keys = np.concatenate([keys, new])
        log_probs.append(table.log_prob[sorting])
        if order < len(model.orders):
            lower = np.concatenate([lower, links])
            weights.append(table.backoff[sorting])
            depths.append(np.full(len(new), order))
    contexts = len(lower)
    target = np.concatenate([np.arange(1, contexts), links]) if len(model.orders) > 1 else links
    depth = np.concatenate(depths)
    first = np.searchsorted(keys, np.arange(contexts + 1) * width)
    most = [int(np.diff(first)[depth == d].max(initial=0)) for d in range(len(model.orders))]
    arrays: dict[str, NDArray[np.generic]] = {"key": keys, "word": keys % width, "target": target}
    arrays |= {"lower": lower, "depth": depth, "first": first}
    arrays |= {"log_prob": (np.concatenate(log_probs) * math.log(10)).astype(np.float32)}
    arrays |= {"weight": (np.concatenate(weights) * math.log(10)).astype(np.float32)}
    return arrays, most


def _with_unknown(model: Arpa, ids: NDArray[np.int64], width: int) -> Arpa:
    """The model over tokens, with every token among its 1-grams."""
    tables = [NgramTable(ids[table.words].astype(np.int32), table.log_prob, table.backoff) for table in model.orders]
    single = tables[0]
    absent = np.setdiff1d(np.arange(1, width - 1, dtype=np.int32), single.words)  # the unknown symbol, the end
    tables[0] = NgramTable(
        np.concatenate([single.words, absent.reshape(-1, 1)]),
        np.concatenate([single.log_prob, np.full(len(absent), _LOG10_OF_NOTHING)]),
        np.concatenate([single.backoff, np.zeros(len(absent))]),
    )
    return Arpa(model.words, tuple(tables))


def _find(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The contexts that n-grams become, and which of them there are."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return place + 1, keys[place] == wanted


def _suffix(keys: NDArray[np.int64], lower: NDArray[np.int64], new: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Of each n-gram the longest proper suffix that is listed; `keys` and `lower` are of all shorter ones."""
    context, word = lower[new // width], new % width
    result = np.zeros(len(new), np.int64)
    unresolved = np.arange(len(new))
    while len(unresolved):
        place, found = _find(keys, context[unresolved] * width + word[unresolved])
        result[unresolved[found]] = place[found]
        unresolved = unresolved[~found & (context[unresolved] > 0)]
        context[unresolved] = lower[context[unresolved]]
    return result
