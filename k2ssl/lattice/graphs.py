"""Decoding graphs: lexicon, grammar, and what is composed of them.

    L    tokens to words
    G    words, scored by an n-gram model
    LG   tokens to words, scored: for transducers, whose topology the search itself knows
    H    frames to tokens: the topology of CTC
    HLG  frames to words, scored

Marks (#0, #1, ...) keep L and G deterministic while they are composed: #0 is where the n-gram model backs off, the others tell words of equal
or included spelling apart. They are taken out again before H is put in front.

Back-offs are ordinary arcs, so that one may be taken even where the longer n-gram is listed, if what comes behind makes up for it; such a path
scores more than the model says. Rescoring n-best paths (`k2ssl.lattice.rescoring.rescored`) asks the model itself.
Words of equal spelling that lead to the same state of G
are one path in LG and HLG, that of the more probable one: k2 drops the others when it takes the marks out.

Source: Mohri, Pereira and Riley 2002, "Weighted finite-state transducers in speech recognition", sections 3 and 4.
"""

from __future__ import annotations

import logging
from typing import Any

from k2ssl.lattice.arpa import END, START, Arpa, Ngram
from k2ssl.lattice.automaton import Arcs
from k2ssl.lattice.lexicon import Lexicon
from k2ssl.lattice.package import k2
from k2ssl.lattice.topologies import ctc_topology

_log = logging.getLogger(__name__)
_NAMED = 5  # examples in a message


def lexicon_graph(lexicon: Lexicon, num_tokens: int) -> Any:
    """L, with marks: token ids to word ids; mark k has token id `num_tokens` + k, and #0 the word id behind the last word's.

    With a delimiter, words have it between them, and a sequence may begin and end with it, or not.
    """
    arcs = Arcs()
    backoff = (num_tokens, len(lexicon.words) + 1)
    if lexicon.delimiter is None:
        before = behind = 0
    else:
        # the model backs off behind a word, before its delimiter, so that there is one way to do it
        before, behind = arcs.state(), arcs.state()
        arcs.add(0, before, 0, 0)
        arcs.add(before, before, lexicon.delimiter, 0)
        arcs.add(behind, before, lexicon.delimiter, 0)
        arcs.add(behind, behind, *backoff)
        arcs.end(before)
        arcs.end(behind)
    arcs.add(0, 0, *backoff)
    arcs.end(0)
    for (word, tokens), mark in zip(lexicon.spellings, lexicon.disambiguation()):
        labels = (*tokens, *([num_tokens + mark] if mark else []))
        state = before
        for place, label in enumerate(labels):
            target = behind if place == len(labels) - 1 else arcs.state()
            arcs.add(state, target, label, 0 if place else word)
            state = target
    return arcs.fsa()


def grammar_graph(arpa: Arpa, lexicon: Lexicon, backoff: int = 0, drop_words: bool = False) -> Any:
    """G: word ids, scored in nats; every arc takes what it gives, but a back-off gives nothing.

    Args:
        arpa: the model.
        lexicon: its words are those that G can know; those that the model lacks are counted in a warning and never recognised.
        backoff: label of arcs that back off; 0, nothing, for rescoring.
        drop_words: leave out n-grams with words that the lexicon lacks, instead of refusing them.

    Raises:
        ValueError: the model has words that the lexicon lacks, counted and named, or none that it has.
    """
    ids = lexicon.ids()
    _check_words(arpa, ids, drop_words)
    histories: dict[Ngram, int] = {(): 0}  # the history of which nothing is known
    for history in (*(ngram[:-1] for ngram in arpa.log_probs), *arpa.backoffs):  # of some nothing is listed that continues them
        if len(history) < arpa.order and all(word in ids for word in history if word != START):
            histories.setdefault(history, len(histories))
    arcs = Arcs()
    begin = (START,) if (START,) in histories else ()
    # k2 starts in state 0
    states = {history: 0 if history == begin else arcs.state() for history in histories}
    for ngram, score in arpa.log_probs.items():
        source = states.get(ngram[:-1])
        if source is None:
            continue
        if ngram[-1] == END:
            arcs.end(source, score)
        elif ngram[-1] in ids:
            word = ids[ngram[-1]]
            arcs.add(source, states[_known(ngram[-(arpa.order - 1) :] if arpa.order > 1 else (), histories)], word, word, score)
    for history, state in states.items():
        if history:
            arcs.add(state, states[_known(history[1:], histories)], backoff, 0, arpa.backoffs.get(history, 0.0))
    graph = k2.connect(arcs.fsa())
    if graph.num_arcs == 0:
        raise ValueError(f"{arpa.path}: no sentence of the lexicon's words has a probability; does the model list {END}?")
    return k2.arc_sort(graph)


def compile_lg(lexicon: Lexicon, arpa: Arpa, num_tokens: int, drop_words: bool = False) -> Any:
    """LG: token ids to word ids, deterministic, without marks; `lm_scores` are the model's part of the scores, here all of them.

    Raises:
        ValueError: see `grammar_graph`; a token outside 1..num_tokens-1.
    """
    if wrong := [token for _, tokens in lexicon.spellings for token in tokens if not 0 < token < num_tokens]:
        raise ValueError(f"compile_lg: the lexicon has the token {wrong[0]}, allowed are 1..{num_tokens - 1}")
    spelled = lexicon_graph(lexicon, num_tokens)
    grammar = grammar_graph(arpa, lexicon, len(lexicon.words) + 1, drop_words)
    graph = k2.connect(k2.compose(spelled, grammar))
    graph = k2.connect(k2.determinize(graph))
    graph.labels = graph.labels.masked_fill(graph.labels >= num_tokens, 0)
    outputs = graph.aux_labels
    if isinstance(outputs, k2.RaggedTensor):
        outputs.values[outputs.values > len(lexicon.words)] = 0
    else:
        graph.aux_labels = outputs.masked_fill(outputs > len(lexicon.words), 0)
    graph = k2.arc_sort(k2.connect(k2.remove_epsilon(graph)))
    graph.lm_scores = graph.scores.clone()
    return graph


def compile_hlg(lexicon: Lexicon, arpa: Arpa, num_tokens: int, modified: bool = False, drop_words: bool = False) -> Any:
    """HLG: frames to word ids; `tokens` are the token ids that begin on an arc, `lm_scores` the model's part of the scores.

    Args:
        lexicon, arpa, drop_words: see `grammar_graph`.
        num_tokens: classes of the acoustic model, blank (0) included.
        modified: the topology, see `ctc_topology`.

    Raises:
        ValueError: see `compile_lg`.
    """
    graph = compile_lg(lexicon, arpa, num_tokens, drop_words)
    topology = ctc_topology(num_tokens, modified)
    graph = k2.arc_sort(k2.connect(k2.compose(topology, graph, inner_labels="tokens")))
    return k2.create_fsa_vec([graph])


def _known(history: Ngram, histories: dict[Ngram, int]) -> Ngram:
    """The longest end of a history that is one of `histories`."""
    while history not in histories:
        history = history[1:]
    return history


def _check_words(arpa: Arpa, ids: dict[str, int], drop_words: bool) -> None:
    listed = set(arpa.words)
    outside = [word for word in arpa.words if word not in ids]
    if len(outside) == len(listed):
        raise ValueError(f"{arpa.path}: of its {len(listed)} words none is in the lexicon, which has {len(ids)}")
    if outside and not drop_words:
        raise ValueError(
            f"{arpa.path}: {len(outside)} of its {len(listed)} words are not in the lexicon: {_listed(outside)}; add them to the lexicon, or "
            "have n-grams with them left out"
        )
    if outside:
        _log.warning("%s: %s of its %s words are not in the lexicon, n-grams with them are left out", arpa.path, len(outside), len(listed))
    if missing := [word for word in ids if word not in listed]:
        _log.warning(
            "%s: it lacks %s of the %s words of the lexicon, which can not be recognised: %s",
            arpa.path,
            len(missing),
            len(ids),
            _listed(missing),
        )


def _listed(words: list[str]) -> str:
    return ", ".join(map(repr, words[:_NAMED])) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")
