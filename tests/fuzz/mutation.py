"""What goes wrong with bytes and with replies: a few random edits of good ones."""

import random

_GARBAGE: tuple[object, ...] = (
    None, 0, -1, 2**63, b"", b"-1", b"garbage", b"\xff\xfe", b"9" * 5000, b"1.5", [], [None], [[b"x"], b"y"], {},
    {b"x": b"y"},
)  # fmt: skip


class Ours:
    """A result that our own code or the client library makes of replies: nothing can spoil it."""

    def __init__(self, result: object) -> None:
        self.result = result


class Together(list[object]):
    """Replies of one round trip: as many as there were commands, whatever each of them is."""


def mutated(seed: bytes, source: random.Random) -> bytes:
    """A few random edits: flips, cuts, repeats, and numbers that programs stumble over."""
    content = bytearray(seed)
    for _ in range(source.randrange(1, 8)):
        place = source.randrange(len(content) + 1)
        match source.randrange(6):
            case 0 if content:
                content[min(place, len(content) - 1)] ^= 1 << source.randrange(8)
            case 1:
                del content[place : place + source.randrange(1, 16)]
            case 2:
                content[place:place] = source.randbytes(source.randrange(1, 16))
            case 3:
                content[place : place + 4] = source.choice(
                    (b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xdd\xff\xff\xff", b"\xca\x7f\xc0\x00")
                )
            case 4:
                end = source.randrange(len(content) + 1)
                content[place:place] = content[min(place, end) : max(place, end)][:256]
            case _:
                del content[place:]
    return bytes(content)


def spoiled(reply: object, source: random.Random) -> object:
    """``reply`` with something in it of another type, length or value."""
    if isinstance(reply, Ours):
        return reply
    if isinstance(reply, Together):
        place = source.randrange(len(reply))
        return Together([*reply[:place], spoiled(reply[place], source), *reply[place + 1 :]])
    is_whole = source.random() < 0.7
    match reply:
        case [_, *_] if is_whole:
            return type(reply)(_with_one_spoiled(list(reply), source))  # type: ignore[call-arg]
        case {**fields} if fields and is_whole:
            pair = list(source.choice(list(fields.items())))
            del fields[pair[0]]
            pair[source.randrange(2)] = source.choice((b"", b"\xff", b"7", b"garbage", None, 3))
            return fields if source.random() < 0.3 else fields | {pair[0]: pair[1]}
        case bytes() if is_whole:
            return mutated(reply, source)
    return source.choice(_GARBAGE)


def _with_one_spoiled(parts: list[object], source: random.Random) -> list[object]:
    place = source.randrange(len(parts))
    match source.randrange(4):
        case 0:
            del parts[place]
        case 1:
            parts.insert(place, source.choice(_GARBAGE))
        case _:
            parts[place] = spoiled(parts[place], source)
    return parts
