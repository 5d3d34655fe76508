"""Topologies: which sequences of frames stand for which tokens."""

from __future__ import annotations

from typing import Any

from k2ssl.lattice.package import k2


def ctc_topology(num_tokens: int, modified: bool = False) -> Any:
    """H: frame labels, 0 for blank, to token ids, which are given where a token begins.

    Args:
        num_tokens: classes, blank (0) included.
        modified: leave out that equal tokens need a blank between them; a graph then has 3 arcs per token instead of `num_tokens`, and the
            same frames may be read as one token or as two.

    Raises:
        ValueError: no class besides blank.
    """
    if num_tokens < 2:
        raise ValueError(f"ctc_topology: num_tokens is {num_tokens}, at least 2 are needed: blank and a token")
    return k2.arc_sort(k2.ctc_topo(num_tokens - 1, modified=modified))


def transducer_topology(num_tokens: int) -> Any:
    """Any sequence of tokens, for a transducer search without a lexicon; blank (0) is the search's own.

    Raises:
        ValueError: no class besides blank.
    """
    if num_tokens < 2:
        raise ValueError(f"transducer_topology: num_tokens is {num_tokens}, at least 2 are needed: blank and a token")
    return k2.trivial_graph(num_tokens - 1)
