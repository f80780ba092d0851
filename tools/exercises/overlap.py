"""The order in which a layer sends, computes and receives, as it happens: for chapter 12, and for its exercise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ep_launcher.launcher import REGISTRIES, Communicator, EPMoE, Flight, Mesh, MoEConfig, check_ended
from tools.exercises.meeting import Meeting
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

    def letter(number: int) -> str:
        return chr(ord("a") + number)

    def watched_send(flight: Flight, *messages: Tensor | None, is_backward: bool = False) -> None:
        own = flights.setdefault(flight.purpose, [])
        if flight not in own:
            own.append(flight)
        passes[id(flight)] = flight.purpose + " backward" * is_backward
        events.append(("begin", passes[id(flight)], letter(own.index(flight))))
        send(flight, *messages, is_backward=is_backward)

    def watched_land(flight: Flight) -> list[Tensor | None]:
        events.append(("end", passes[id(flight)], letter(flights[flight.purpose].index(flight))))
        return land(flight)

    def watched_compute(arrived: Any) -> Tensor:
        part = letter(sum(what == "experts" for what, _, _ in events))
        events.append(("experts", "forward", part))
        y = compute(arrived)
        y.register_hook(lambda grad: events.append(("experts", "backward", part)))
        return y

    patches = (mock.patch.object(Flight, "send", watched_send), mock.patch.object(Flight, "land", watched_land),
               mock.patch.object(layer.experts, "forward", watched_compute))  # fmt: skip
    with patches[0], patches[1], patches[2]:
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


def trace_overlap(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """NotYet where an order gives something else than [T, D], or hides fewer than half of its exchanges."""
    REGISTRIES["overlap"]["yours"] = answer
    config = MoEConfig(
        8, 2, 16, 16, dtype="float64", dispatcher="all_to_all", overlap="yours", balance="none"
    )
    layer = EPMoE(config, Mesh(comm, comm, Communicator.alone(comm.meter)), seed=0)
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    with meeting.phase("12 tokens a rank"):
        y = answer.forward(layer, x, layer.router(x))
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise NotYet(f"12 tokens: it must return [12, 16], and gave {shape_of(y)}")
        y.sum().backward()
        check_ended(comm.meter)
        found = hidden(watch(layer, x))
    for way in ("forward", "backward"):
        own = {
            key: is_hidden
            for key, is_hidden in found.items()
            if ("backward" in key[0]) == (way == "backward")
        }
        if 2 * sum(own.values()) < len(own) or len(own) < 4:
            bare = ", ".join(" ".join(key) for key, is_hidden in own.items() if not is_hidden)
            raise NotYet(
                f"{way}: {sum(own.values())} of {len(own)} exchanges have experts beside them, and not {bare}"
            )
