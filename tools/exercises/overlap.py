"""The order in which a layer sends, computes and receives, as it happens: for chapter 12, and for its exercise."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ep_launcher.launcher import REGISTRIES, Communicator, EPMoE, Flight, Mesh, MoEConfig
from tools.exercises.on_ranks import try_on_ranks
from tools.exercises.verdict import NotYet, plain_verdict, shape_of

Event = tuple[str, str, str]  # begin, end or experts; of which pass; of which part: a, b, ..


def watch(layer: EPMoE, x: Tensor) -> list[Event]:
    """Forward and backward of x [T, D] on this rank -> what began, ended and was computed, in that order. Collective.

    Parts are named in the order in which they are dispatched. Only dispatchers made of Flights can be watched.
    """
    events: list[Event] = []
    parts = {name: iter("abcdefgh") for name in ("dispatch", "combine", "experts")}
    send, land, compute = Flight.send, Flight.land, layer.experts.forward

    def watched_send(flight: Flight, *messages: Tensor | None, is_backward: bool = False) -> None:
        if not is_backward:
            flight.part = next(parts[flight.purpose])
        flight.way = flight.purpose + " backward" * is_backward
        events.append(("begin", flight.way, flight.part))
        send(flight, *messages, is_backward=is_backward)

    def watched_land(flight: Flight) -> list[Tensor | None]:
        events.append(("end", flight.way, flight.part))
        return land(flight)

    def watched_compute(arrived: Any) -> Tensor:
        part = next(parts["experts"])
        events.append(("experts", "forward", part))
        y = compute(arrived)
        y.register_hook(lambda grad: events.append(("experts", "backward", part)))
        return y

    with (
        mock.patch.multiple(Flight, send=watched_send, land=watched_land),
        mock.patch.object(layer.experts, "forward", watched_compute),
    ):
        layer(x).sum().backward()
    return events


def hidden(events: list[Event]) -> dict[tuple[str, str], bool]:
    """{(pass, part): whether experts compute between this exchange's beginning and its end}. NotYet without an end."""
    found = {}
    for number, (what, name, part) in enumerate(events):
        if what == "begin":
            if ("end", name, part) not in events:
                raise NotYet(f"the {name} of part {part} begins, and nobody ends it")
            between = events[number : events.index(("end", name, part))]
            found[name, part] = any(kind == "experts" for kind, _, _ in between)
    return found


@plain_verdict(type)
def check_overlap(answer: type, ranks: int = 2, namespace: dict[str, Any] | None = None) -> str:
    """check_dispatcher for an order of chapter 12, a class that inherits from InOrder: equal results, and at least half
    of the exchanges, forward and backward, with experts at work between their beginning and their end."""
    REGISTRIES["overlap"]["yours"] = answer
    kinds = {"dispatcher": "all_to_all", "overlap": "yours", "balance": "none", "dtype": "float64"}
    layer = EPMoE(MoEConfig(8, 2, 16, 16, **kinds), Mesh(*[Communicator.alone()] * 3), seed=0)
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    y = answer.forward(layer, x, layer.router(x))
    if shape_of(y) != [12, 16]:
        raise NotYet(f"12 tokens: it must return [12, 16], and gave {shape_of(y)}")
    found = hidden(watch(layer, x))
    for way in ("forward", "backward"):
        own = {key: is_so for key, is_so in found.items() if ("backward" in key[0]) == (way == "backward")}
        if 2 * sum(own.values()) < len(own) or len(own) < 4:
            bare = ", ".join(" ".join(key) for key, is_hidden in own.items() if not is_hidden)
            beside = f"{sum(own.values())} of {len(own)} exchanges have experts beside them, and not {bare}"
            raise NotYet(f"{way}: {beside}")
    return try_on_ranks("overlap", answer, ranks, namespace)
