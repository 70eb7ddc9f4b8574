"""Who holds up the ranks: the ones that give no sign of life, that wait for nobody, or that are behind the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megalibi.runtime.hang.signs import RankSign, WatchedRank

_MAX_NAMED = 3
"""The most ranks that a message names."""


def name_culprits(own: RankSign, others: Mapping[int, WatchedRank], hosts: Sequence[str]) -> str:
    """Return in words which ranks hold up the others, as far as their signs tell; empty for a rank alone.

    Args:
        own: This rank's sign.
        others: What this rank has seen of the others.
        hosts: The host of each rank.
    """
    if not others:
        return ""
    silent = [
        f"{_name(rank, hosts)} gives no sign of life{_describe_last(seen.sign)}"
        for rank, seen in sorted(others.items())
        if not seen.is_alive
    ]
    if silent:
        return _join(silent)
    signs = sorted((own, *(seen.sign for seen in others.values() if seen.sign)), key=lambda sign: sign.rank)
    outside = [sign for sign in signs if not sign.is_collective]
    if outside and len(outside) < len(signs):
        return _join([_accuse(sign, own, hosts, "is in no collective") for sign in outside])
    behind = [sign for sign in signs if _place(sign) < max(map(_place, signs))]
    if behind:
        return _join([_accuse(sign, own, hosts, "is behind the others") for sign in behind])
    where = "in collectives" if not outside else "equally far"
    hint = f": look at the network between {', '.join(dict.fromkeys(hosts))}" if len(set(hosts)) > 1 else ""
    return f"all {len(signs)} ranks are {where}{hint}"


def _place(sign: RankSign) -> tuple[int, int]:
    return sign.step, sign.marks


def _name(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}"


def _accuse(sign: RankSign, own: RankSign, hosts: Sequence[str], why: str) -> str:
    if sign.rank == own.rank:
        return f"this rank {why}"
    return f"{_name(sign.rank, hosts)} {why}: it is in {sign.words}"


def _describe_last(sign: RankSign | None) -> str:
    return "" if sign is None else f" (after step {sign.step}, last seen in {sign.words})"


def _join(culprits: list[str]) -> str:
    more = f", and {len(culprits) - _MAX_NAMED} more" if len(culprits) > _MAX_NAMED else ""
    return ", ".join(culprits[:_MAX_NAMED]) + more
