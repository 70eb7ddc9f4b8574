"""Inputs that are nearly right: a valid one with some of its bytes, or some of its values, changed."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

_EXTREMES = tuple(struct.pack("<q", number) for number in (0, 1, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)))
_WORDS = (
    *(b"", b"\x00", b"\xff", b"\n", b"'", b'"', b"{", b"}", b"[", b"]", b":", b"-", b"#", b"&a", b"*a", b"../", b"/"),
    *(b"!!python/name:os.system", b"${a}", b"${oc.env:HOME}", b"???", b"null", b"true", b"NaN", b"1e999", b"9" * 400),
    *(b"0x10", b"1_000", b"\xed\xa0\x80", b"\x1b[2J"),
)
_PLAIN = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20)),
    st.sampled_from(["", "0", "-1", "1e400", "nan", "../x", "/", "${a}", "???", "a" * 5000, "\x00", "\ud800"]),
)


def _extend(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3))


_VALUES = st.recursive(_PLAIN, _extend)


@st.composite
def mutated_bytes(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds with up to six stretches replaced, taken out or doubled, or cut off."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 16))
        head, part, tail = content[:first], content[first : first + length], content[first + length :]
        put = draw(
            st.one_of(
                st.binary(max_size=16),
                st.sampled_from(_EXTREMES),
                st.sampled_from(_WORDS),
                st.just(part * 2),
                st.just(content[:64]),
            )
        )
        content = head + put + tail
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


@st.composite
def mutated_values(draw: st.DrawFn, seeds: list[bytes], dump: Callable[[Any], bytes]) -> bytes:
    """One of the seeds, a tree of values, with up to three of these replaced, taken out or added."""
    tree = copy.deepcopy(yaml.safe_load(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_list_places(tree))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        what = draw(st.integers(0, 9))
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder[key]
        else:
            holder[key] = draw(_VALUES)
    return dump(tree)


def _list_places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every holder with the key of each of its values."""
    if isinstance(tree, dict):
        keys: list[Any] = list(tree)
    elif isinstance(tree, list):
        keys = list(range(len(tree)))
    else:
        return []
    return [(tree, key) for key in keys] + [place for key in keys for place in _list_places(tree[key])]


def dump_json(tree: Any) -> bytes:
    """As json writes it; a lone surrogate is escaped."""
    return json.dumps(tree).encode()


def dump_yaml(tree: Any) -> bytes:
    """As yaml writes it; what it cannot write is written by json, which YAML nearly contains."""
    try:
        return yaml.safe_dump(tree).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return dump_json(tree)
