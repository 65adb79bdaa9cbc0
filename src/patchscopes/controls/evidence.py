"""The evidence of a reading: what its text tells about the vector that brought it forth, in bits.

A vector likes the words that it brought forth itself, so evidence is taken on a second look: v′ is the same position of the same
prompt, read again behind another neutral prefix. For a text t and a set of control runs k,

    evidence = log2 p(t | v′) − log2 mean_k p(t | k).

Against the second looks of n other sources it is an InfoNCE estimate of what the text tells about which source it was, and

    p = (1 + #{others at least as likely as v′}) / (n + 1)

is uniform when the text says nothing of its source: then v′ and the others are exchangeable. Neither says that the text is true.
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
