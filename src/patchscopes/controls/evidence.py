"""The evidence of a reading: what its text tells about the vector that brought it forth, in bits.

A vector likes the words that it brought forth itself, so evidence is taken on a second look: v′ is the same position of the same
prompt, read again behind another neutral prefix; behind several, v′_1 … v′_m, of whose log p the mean is taken. For a text t and a set of
control runs k,

    evidence  = mean_j log2 p(t | v′_j) − log2 mean_k p(t | k)                                  bits
    explained = evidence over others / −log2 mean_others p(t)                                   at most 1

Explained is the share of the text's own surprise, to somebody who does not know the source, that the source accounts for: a text that every
tenth source brings forth can have 3.3 bits and no more. Against the second looks of n other sources the evidence tells which source it
was: with v′ among the terms of the mean it is InfoNCE, a lower bound of their mutual information that cannot exceed log2 (n + 1) (van den
Oord et al. 2018); without it, as here, it has no such ceiling and is too high rather than too low (leave one out, Poole et al. 2019).

    p = (1 + #{others at least as likely as v′_1}) / (n + 1)

is uniform when the text says nothing of its source: then v′_1 and the others, read behind the same prefix, are exchangeable. None of these
says that the text is true.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Verdict = Literal["above", "same", "not run"]
SIGNIFICANT = 0.05
KINDS = ("nothing", "random", "others", "text")  # of controls that evidence is over: bits_over_nothing, …
DECIDING = KINDS[:3]  # those that the verdict needs


def bits_over(log_p: float, controls: Float[Tensor, " control"]) -> float:
    """log2 p − log2 mean p(control); log-probabilities of one text, in nats. NaN without controls."""
    if not len(controls):
        return math.nan
    mean = torch.logsumexp(controls.double(), 0) - math.log(len(controls))
    return (log_p - float(mean)) / math.log(2)


def explained(log_p: float, others: Float[Tensor, " control"]) -> float:
    """1 − log p / log mean p(other): the share of the text's surprise that its source accounts for; 0 where there is none to account for.
    NaN without others."""
    if not len(others):
        return math.nan
    surprise = math.log(len(others)) - float(torch.logsumexp(others.double(), 0))
    return 1 + log_p / surprise if surprise > 1e-9 else math.nan if math.isnan(surprise + log_p) else 0.0


def p_value(log_p: float, others: Float[Tensor, " control"]) -> float:
    """(1 + number of others at least as likely) / (n + 1). NaN without others, or where one is not a number."""
    if not len(others) or math.isnan(log_p) or bool(others.isnan().any()):
        return math.nan
    return (1 + int((others >= log_p).sum())) / (len(others) + 1)


def verdict(bits_over_nothing: float, bits_over_random: float, bits_over_others: float, p: float) -> Verdict:
    """ "above" if the text is likelier than under every kind of control vector and p ≤ 0.05; "not run" where a control is missing.

    The text control has no part in it: a reading may tell of its source and yet nothing that the text would not (bits_over_text ≤ 0).
    """
    bits = (bits_over_nothing, bits_over_random, bits_over_others)
    if any(math.isnan(x) for x in (*bits, p)):
        return "not run"
    return "above" if min(bits) > 0 and p <= SIGNIFICANT else "same"
