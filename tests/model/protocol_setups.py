"""The setups of the protocol that are explored: whole, or up to a number of states."""

from __future__ import annotations

from dataclasses import replace

from model.protocol_rules import Rules, Setup

RULES = Rules()

SHARED = replace(RULES, without=frozenset({"claim exclusive"}))
"""Two incarnations may hold one attempt number: safety rests on nonces, never on the number."""

NORMAL: dict[str, tuple[Setup, Rules]] = {
    "two incarnations": (Setup(), RULES),
    "one attempt number for two": (Setup(), SHARED),
    "retention and a reader": (
        Setup(incarnations=1, steps=4, daemons=1, collectors=1, readers=1),
        RULES,
    ),
    "incarnations, a collector and a reader": (Setup(daemons=1, collectors=1, readers=1), RULES),
    "two collectors with stale listings": (
        Setup(incarnations=1, steps=3, collectors=2, stale=True),
        RULES,
    ),
    "incarnations and a stale collector": (Setup(collectors=1, stale=True), RULES),
    "nobody is late": (Setup(incarnations=1, steps=3, timely=True), RULES),
    "host memory, and one host is lost": (
        Setup(memory=True, daemons=1, active=True, losses=1),
        RULES,
    ),
    "a power cut while committing": (Setup(incarnations=1, steps=3, cuts=1), RULES),
    "a power cut while giving up": (
        Setup(incarnations=1, steps=1, daemons=3, aborts=True, cuts=1),
        RULES,
    ),
    "a power cut while collecting": (
        Setup(incarnations=1, steps=4, daemons=1, collectors=2, cuts=1),
        RULES,
    ),
    "rot": (
        Setup(incarnations=1, steps=4, daemons=1, collectors=1, readers=1, damages=2),
        RULES,
    ),
}
"""Each is explored whole by the normal suite."""

FULL: dict[str, tuple[Setup, Rules]] = {
    "two incarnations, two steps each": (Setup(steps=2), RULES),
    "three incarnations and a collector": (
        Setup(incarnations=3, daemons=1, collectors=1),
        RULES,
    ),
    "two steps each, a collector and a reader": (
        Setup(steps=2, daemons=1, collectors=1, readers=1),
        RULES,
    ),
    "incarnations that are given up": (Setup(aborts=True), RULES),
    "incarnations and a power cut": (Setup(daemons=1, cuts=1), RULES),
    "incarnations, two daemons and a power cut": (Setup(cuts=1), RULES),
    "four steps, two stale collectors, a reader": (
        Setup(incarnations=1, steps=4, collectors=2, readers=1, stale=True),
        RULES,
    ),
    "two power cuts while collecting": (
        Setup(incarnations=1, steps=4, daemons=1, collectors=2, cuts=2),
        RULES,
    ),
    "host memory, two steps each": (
        Setup(steps=2, memory=True, daemons=1, active=True, losses=1),
        RULES,
    ),
    "rot and incarnations": (Setup(steps=2, daemons=1, collectors=1, damages=1), RULES),
}
"""Explored by `make reliability`, each up to its share of the ten million."""
