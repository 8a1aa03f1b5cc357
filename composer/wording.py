"""The common English words that requests are made of. Knows nothing of prompts or experts."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

_FUNCTION_WORDS = """
a about above after again all also am an and another any anyone are aren't as at away be because
been before being below both but by came can can't cannot could did didn't do does doesn't doing
don't done down each either else every everything few for from further had has have having he her
here hers him his how however i i'd i'll i'm i've if in instead into is isn't it it's its itself
just let let's lets like many may me might mine more most much must my myself no nor not now of off
on once one only onto or other others our ours out over own per quite rather really same shall she
should since so some such than that that's the their theirs them then there there's these they this
those through throughout to together too under until up upon us very via was we were what what's
whats whatever when whenever where where's whether which while who who's whom whose why will with
within without won't would wouldn't yet you you'd you'll you're you've your yours cant didnt doesnt
dont ill im isnt ive thats theres wheres whos wont wouldnt youre bye cheers dear hello hey hi howdy
kindly ok okay please pls plz pretty sorry thank thanks thx ty yes
"""
_REQUEST_WORDS = """
able actually alright already always anyway appreciate ask asked asking basically become becomes
bit bring build call called calling calls came change changed check choose come comes compute
containing convert converted converting correct correctly create curious currently describe
determine display easy ensure entire exact exactly explain express fast figure final find finding
first fix follow following friend fully gave generate get gets getting give given gives giving glad
go goes going gonna good got gotta grab grateful great guess handle happen happens help homework
hope hoping input instance keep know last left look looked looking looks love made make makes
making mean meaning means mind need needed needing needs new next nice nothing obtain offer
original output perform perhaps pick possible possibly prefer preferably present print printed
prints proceed process produce prompt provide provided provides put puts putting question quick
quickly quiz ran read reads ready receive remind render replace replaced replacing reply request
require required respond response result resulting results return returned returning returns
rewrite rewritten run running said say saying says see seen send set several show showing shown
shows simple simply solve somebody someone something somehow start starting stuff submit suppose
supply sure take taken takes taking talk task tell thing things think transform transformed
translate translated try trying turn turned turning turns type typed typing understand use used
uses using value version wanna want wanted wants way wish wonder wonders wondering work working
works write writes writing written wrong wrote alphabet alphabetic alphabetical answer answers char
character characters chars description english example expression form format formatted forms key
language letter letters line message name named noun nouns paragraph passage phrase quote quoted
sentence spell spelled spelling spells spelt statement string style term text token title word
wording words whole entirely entirety equivalent counterpart corresponding apply applied according
exist exists cross yield yields riddle puzzle crossword
"""

Skip = Literal["none", "function", "request"]

Skipped = dict[Skip, frozenset[str]]


@lru_cache(maxsize=4096)
def skipped_words(ignore: tuple[str, ...], context: tuple[str, ...]) -> Skipped:
    """The words that each kind of step passes over, in lower case: beside the common ones those of
    an expert's own block."""
    function = frozenset(_FUNCTION_WORDS.split()) | {word.lower() for word in ignore}
    request = function | {word.lower() for word in context} | frozenset(_REQUEST_WORDS.split())
    return {"none": frozenset(), "function": function, "request": request}


def is_skipped(token: str, skipped: frozenset[str]) -> bool:
    """Whether the token, or what it is the possessive of, is among the words."""
    word = token.lower()
    return not skipped.isdisjoint((word, word.removesuffix("'s")))
