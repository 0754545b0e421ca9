"""Keywords of a text by RAKE (Rose et al., 2010): runs of content words, scored by the company their words keep.

A phrase is a run of words between stop words, numbers and anything but spaces. A word's score is its degree (the words
of all phrases it is in, itself included) divided by how often it occurs; a phrase's score is the sum over its words.
Words are lower-cased and not stemmed; a phrase that occurs several times counts once. No stop words are kept for other
languages than English: there, phrases come out longer, and `max_words` drops more of them.
"""

from __future__ import annotations

import re
from collections import Counter

_LIST = """
a about above after again against all also although am among an and any are aren as at be because been before being
below between both but by can cannot could couldn did didn do does doesn doing don done down during each either else
etc even ever every few for from further get gets given had hadn has hasn have haven having he her here hers herself
him himself his how however i if in instead into is isn it its itself just let like ll made make makes many may me
might more most much must my myself need neither no nor not now of off often on once one only onto or other others
our ours ourselves out over own per perhaps quite rather re s same see shall she should shouldn since so some such t
than that the their theirs them themselves then there therefore these they this those though through thus to too two
under unless until up upon us use used uses using ve very via was wasn way we well were weren what when where whether
which while who whom whose why will with within without won would wouldn yet you your yours yourself yourselves
"""
_STOP_WORDS = frozenset(_LIST.split())
_WORD_RUN = re.compile(r"[^\W\d_]+(?:[ \t]+[^\W\d_]+)*")


def candidate_phrases(text: str) -> list[tuple[str, ...]]:
    """The runs of content words of two letters or more, in order."""
    phrases: list[tuple[str, ...]] = []
    for run in _WORD_RUN.findall(text.lower()):
        phrase: list[str] = []
        for word in run.split():
            if len(word) > 1 and word not in _STOP_WORDS:
                phrase.append(word)
            elif phrase:
                phrases.append(tuple(phrase))
                phrase = []
        if phrase:
            phrases.append(tuple(phrase))
    return phrases


def keywords(text: str, *, max_words: int, min_score: float, num_keywords: int) -> dict[str, float]:
    """The best phrases of a text and their scores, highest first, equal ones in alphabetical order."""
    phrases = candidate_phrases(text)
    frequency, degree = Counter[str](), Counter[str]()
    for phrase in phrases:
        for word in phrase:
            frequency[word] += 1
            degree[word] += len(phrase)
    scores = {
        " ".join(phrase): sum(degree[word] / frequency[word] for word in phrase)
        for phrase in set(phrases)
        if len(phrase) <= max_words
    }
    best = sorted((item for item in scores.items() if item[1] >= min_score), key=lambda item: (-item[1], item[0]))
    return dict(best[:num_keywords])
