"""The order in which a layer sends, computes and receives, as it happens: for chapter 12, and for its exercise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ep_launcher.launcher import REGISTRIES, Communicator, EPMoE, Flight, Mesh, MoEConfig, check_ended
from tools.exercises.on_ranks import Meeting
from tools.exercises.verdict import NotYet, shape_of

Event = tuple[str, str, str]  # begin, end or experts; of which pass; of which part: a, b, ..


def watch(layer: EPMoE, x: Tensor) -> list[Event]:
    """Forward and backward of x [T, D] on this rank -> what began, ended and was computed, in that order. Collective.

    Parts are named in the order in which they are dispatched. Only dispatchers made of Flights can be watched.
    """
    events: list[Event] = []
    flights: dict[str, list[Flight]] = {}
    passes: dict[int, str] = {}
    send, land, compute = Flight.send, Flight.land, layer.experts.forward

    def note(what: str, name: str, part: int) -> None:
        events.append((what, name, chr(ord("a") + part)))

    def watched_send(flight: Flight, *messages: Tensor | None, is_backward: bool = False) -> None:
        own = flights.setdefault(flight.purpose, [])
        if flight not in own:
            own.append(flight)
        passes[id(flight)] = flight.purpose + " backward" * is_backward
        note("begin", passes[id(flight)], own.index(flight))
        send(flight, *messages, is_backward=is_backward)

    def watched_land(flight: Flight) -> list[Tensor | None]:
        note("end", passes[id(flight)], flights[flight.purpose].index(flight))
        return land(flight)

    def watched_compute(arrived: Any) -> Tensor:
        part = sum(what == "experts" for what, _, _ in events)
        note("experts", "forward", part)
        y = compute(arrived)
        y.register_hook(lambda grad: note("experts", "backward", part))
        return y

    with (
        mock.patch.multiple(Flight, send=watched_send, land=watched_land),
        mock.patch.object(layer.experts, "forward", watched_compute),
    ):
        layer(x).sum().backward()
    return events


def hidden(events: list[Event]) -> dict[tuple[str, str], bool]:
    """{(pass, part): whether experts compute between the beginning and the end of this exchange}."""
    found = {}
    for number, (what, name, part) in enumerate(events):
        if what == "begin":
            between = events[number : events.index(("end", name, part))]
            found[name, part] = any(kind == "experts" for kind, _, _ in between)
    return found


def trace(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """NotYet where an order gives something else than [T, D], or hides fewer than half of its exchanges."""
    REGISTRIES["overlap"]["yours"] = answer
    kinds = {"dispatcher": "all_to_all", "overlap": "yours", "balance": "none", "dtype": "float64"}
    layer = EPMoE(MoEConfig(8, 2, 16, 16, **kinds), Mesh(comm, comm, Communicator.alone(comm.meter)), seed=0)
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    with meeting.phase("12 tokens a rank"):
        y = answer.forward(layer, x, layer.router(x))
        if shape_of(y) != [12, 16]:
            raise NotYet(f"12 tokens: it must return [12, 16], and gave {shape_of(y)}")
        y.sum().backward()
        check_ended(comm.meter)
        found = hidden(watch(layer, x))
    for way in ("forward", "backward"):
        own = {key: is_so for key, is_so in found.items() if ("backward" in key[0]) == (way == "backward")}
        if 2 * sum(own.values()) < len(own) or len(own) < 4:
            bare = ", ".join(" ".join(key) for key, is_hidden in own.items() if not is_hidden)
            beside = f"{sum(own.values())} of {len(own)} exchanges have experts beside them, and not {bare}"
            raise NotYet(f"{way}: {beside}")
