"""Pictures of tokens that fly to their experts and back: a figure, a film, a player, drawn from what ranks held.

A flight is a list by rank of dicts, as chapter 02 collects them:

    x, y      [2, 2]: the rank's two tokens before and after; a token's numbers are its rank and its number there
    ids       int64 [2, K]: the experts that they chose;  weights [2, K]
    stages    [(rows [n, 2], tags int64 [n, 4], weights [n])] by stage; tags: expert, source rank, source token, padding

`Flight(flight, num_experts, blocks)` places every row at every stage; `draw_flight`, `film` and `player` draw it.
A token wears its home rank's colour: token 0 filled, token 1 outlined, so that no token looks like another rank's.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from jinja2 import Template
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from tools.figures import INK, draw_box, ink_on, rank_color, show_animation

EXPERT, SOURCE_RANK = 0, 1  # columns of a row's tags
BY_EXPERT, BY_SOURCE = (EXPERT, 1), (SOURCE_RANK, 1)
Key = tuple[int, int, int]  # of a row: home rank, token, expert
Places = dict[Key, tuple[float, float]]

STOPS = (0.10, 0.17, 0.27, 0.40, 0.46, 0.53, 0.68, 0.82)  # leave, arrive, leave, ... as shares of the film


def token_style(rank: int, token: int) -> tuple[str, str, float]:
    """(fill, edge, width of the edge): token 0 in its home rank's colour, token 1 outlined in it, pale ones darker."""
    red, green, blue = to_rgb(rank_color(rank))
    is_pale = 0.3 * red + 0.59 * green + 0.11 * blue > 0.72
    outline = to_hex([value * (0.6 if is_pale else 1) for value in (red, green, blue)])
    return (to_hex((red, green, blue)), INK, 1.0) if token == 0 else ("#ffffff", outline, 3.0)


class Flight:
    """Where every row is at every stage: `places`, a {key: (x, y)} for the tokens, each stage, and the tokens again.

    blocks: for each stage the column and divisor by which its rows stand in blocks, (EXPERT, L) for instance.
    """

    def __init__(
        self, by_rank: list[dict[str, Any]], num_experts: int, blocks: Sequence[tuple[int, int]]
    ) -> None:
        self.by_rank, self.num_ranks, self.num_experts = by_rank, len(by_rank), num_experts
        self.num_local, self.top_k = num_experts // self.num_ranks, by_rank[0]["ids"].shape[1]
        stages = [[held["stages"][n] for held in by_rank] for n in range(len(blocks))]
        self.stages = stages
        self.width = max(len(rows) for rows, *_ in stages[1]) + 2
        self.heights = (18.4, 15.2, 8.8, 6.6, 0.0)  # the two flights between ranks get the most room
        self.places = [self.place_tokens(self.heights[0])]
        for stage, block, y in zip(stages, blocks, self.heights[1:4], strict=True):
            self.places.append(self.place_rows(stage, *block, y))
        self.places.append(self.place_tokens(self.heights[4]))

    def place_rows(self, by_rank: list[tuple], column: int, divisor: int, y: float) -> Places:
        """Boxes side by side, with a gap where tags[:, column] // divisor changes: between two blocks."""
        places = {}
        for r, (_, tags, _) in enumerate(by_rank):
            block = tags[:, column] // divisor
            x = torch.arange(len(tags)) + 0.5 * (block.diff(prepend=block[:1]) != 0).cumsum(0)
            left = r * (self.width + 1) + (self.width - x[-1].item() - 1) / 2
            keys = [(home, token, expert) for expert, home, token, _ in tags.tolist()]
            places |= {key: (left + slot, y) for key, slot in zip(keys, x.tolist(), strict=True)}
        return places

    def place_tokens(self, y: float) -> Places:
        """Two wide boxes a rank, with a place for each choice in them, in their order."""
        places = {}
        for r, held in enumerate(self.by_rank):
            for t, chosen in enumerate(held["ids"].tolist()):
                for k, expert in enumerate(chosen):
                    places[r, t, expert] = (
                        r * (self.width + 1) + self.width / 2 - 5.5 + 5.7 * t + 1.3 * k,
                        y,
                    )
        return places

    def owned(self, rank: int) -> str:
        """The experts of a rank, as a text."""
        return ", ".join(str(e) for e in range(rank * self.num_local, (rank + 1) * self.num_local))

    def one_of_each(self, places: Places) -> Places:
        """The first choice's place of every token, which is its box's."""
        return dict(list(places.items())[:: self.top_k])


def draw_line(ax: Axes, start: tuple[float, float], end: tuple[float, float], key: Key) -> None:
    """A smooth line from the foot of the box at start to the head of the box at end; token 1's is hollow."""
    (x0, y0), (x1, y1) = (start[0] + 0.45, start[1]), (end[0] + 0.45, end[1] + 0.9)
    middle = (y0 + y1) / 2
    curve = Path([(x0, y0), (x0, middle), (x1, middle), (x1, y1)], [1, 4, 4, 4])
    fill, edge, _ = token_style(*key[:2])
    for color, width in ((edge, 2.6), (fill, 1.9 if key[1] == 0 else 1.0)):
        ax.add_patch(PathPatch(curve, facecolor="none", edgecolor=color, linewidth=width))


def draw_strips(ax: Axes, flight: Flight) -> None:
    """A grey strip for each rank, with its name and its experts."""
    top = flight.heights[0] + 1.7
    for r in range(flight.num_ranks):
        x = r * (flight.width + 1)
        strip = plt.Rectangle((x - 0.2, -0.6), flight.width + 0.3, top + 0.6, facecolor="#f1f1f4")
        ax.add_patch(strip)
        ax.text(x + flight.width / 2, top + 1.4, f"rank {r}", ha="center", fontsize=17, weight="bold")
        ax.text(x + flight.width / 2, top + 0.4, f"experts {flight.owned(r)}", ha="center", fontsize=15)


def draw_flight(flight: Flight, names: Sequence[str]) -> Figure:
    """All stages under one another, joined by lines. It knows no routing: colours are read from the rows."""
    fig, ax = plt.subplots(figsize=(1.4 + 2.6 * flight.num_ranks, 8.4))
    draw_strips(ax, flight)
    for upper, lower in pairwise(flight.places):
        for key in upper:
            draw_line(ax, upper[key], lower[key], key)
    for stage, places in zip(flight.stages, flight.places[1:4], strict=True):
        for rows, tags, _ in stage:
            for (home, token), (expert, *source, _) in zip(rows.long().tolist(), tags.tolist(), strict=True):
                fill, edge, width = token_style(home, token)
                x, y = places[*source, expert]
                draw_box(ax, x + 0.08, y, fill, str(expert), width=0.74, height=0.9, fontsize=13, edge=edge,
                         linewidth=min(width, 2.2))  # fmt: skip
    for name, places in (("x", flight.places[0]), ("y", flight.places[4])):
        corners = iter(flight.one_of_each(places).values())
        for held in flight.by_rank:
            for home, token in held[name].round().long().tolist():
                fill, edge, width = token_style(home, token)
                draw_box(ax, *next(corners), fill, f"token {token}", width=5.3, height=0.9, fontsize=14, edge=edge,
                         linewidth=width)  # fmt: skip
    for name, y in zip(names, flight.heights, strict=True):
        ax.text(-0.8, y + 0.45, name, ha="right", va="center", fontsize=16)
    ax.set(xlim=(-6, flight.num_ranks * (flight.width + 1)), ylim=(-0.8, flight.heights[0] + 4.2))
    ax.axis("off")
    return fig


def to_pixels(x: float, y: float) -> tuple[float, float]:
    """A place in the picture -> SVG coordinates."""
    return 150 + 19 * x, 26 * (20.6 - y)


def way_through(stops: Sequence[tuple[float, float]]) -> str:
    """A smooth SVG path through the stops."""
    way = f"M{stops[0][0]:.0f} {stops[0][1]:.0f}"
    for (x, y), (new_x, new_y) in pairwise(stops):
        middle = f"{(y + new_y) / 2:.0f}"
        way += f"C{x:.0f} {middle} {new_x:.0f} {middle} {new_x:.0f} {new_y:.0f}"
    return way


def film(flight: Flight, names: Sequence[str]) -> str:
    """An SVG film of a few kB, as film.svg.j2 has it: strips, names of stages, rows that fly, and tokens that open and
    close. A rank's rows leave one after the other."""
    rows, per_rank, lines = [], len(flight.places[0]) // flight.num_ranks, []
    for number, key in enumerate(flight.places[0]):
        stops = [to_pixels(*places[key]) for places in flight.places]
        times = [0, *(stop + 0.005 * (number % per_rank) for stop in STOPS), 1]
        fill, edge, width = token_style(*key[:2])
        rows.append({
            "key": key, "stops": stops, "fill": fill, "edge": edge, "width": width, "ink": ink_on(fill),
            "way": way_through(stops), "worker": rank_color(key[2] // flight.num_local),
            "times": "; ".join(f"{time:.3f}" for time in times),
            "flies": "; ".join(f"{x:.1f} {y:.1f}" for stop in stops for x, y in (stop, stop)),
        })  # fmt: skip
    for name, y in zip(names, flight.heights, strict=True):
        parts = name.split("\n")
        lines += [(to_pixels(0, y)[1] + 29 + 22 * n - 11 * len(parts), part) for n, part in enumerate(parts)]
    resting = [(*to_pixels(*at), key[2]) for places in flight.places[1:4] for key, at in places.items()]
    template = Template((FilePath(__file__).parent / "film.svg.j2").read_text("utf-8"))
    strips = [flight.owned(rank) for rank in range(flight.num_ranks)]
    values = {"rows": rows, "resting": resting, "lines": lines, "strips": strips, "top_k": flight.top_k}
    return template.render(values, ink=INK, step=19 * (flight.width + 1)).replace("\n", "")


def moment_title(flight: Flight, moment: int, home: int, token: int) -> str:
    """What happens to the token at this moment (the number of a stage)."""
    chosen, weights = (flight.by_rank[home][name][token].tolist() for name in ("ids", "weights"))
    owners = [expert // flight.num_local for expert in chosen]
    return (
        f"token {token} of rank {home} becomes a row for each of its experts, {', '.join(map(str, chosen))}",
        f"permute, send: to ranks {', '.join(map(str, owners))}, which own these experts",
        "sort: beside the rows that other ranks sent to the same expert",
        "compute and weigh: "
        + ", ".join(f"{w:.2f} * expert {e}" for w, e in zip(weights, chosen, strict=True)),
        "add: the weighted results are the token's output",
    )[moment]


def player(flight: Flight, names: Sequence[str], home: int = 0, token: int = 0) -> HTML:
    """Buttons and a slider to follow one token: its rows in its colour, everybody else's pale."""
    fig, ax = plt.subplots(figsize=(1.4 + 2.6 * flight.num_ranks, 7.6), dpi=64)

    def draw_frame(moment: tuple[int, float]) -> None:
        n, share = moment
        ax.clear()
        ax.axis("off")
        ax.set(xlim=(-6.5, flight.num_ranks * (flight.width + 1)), ylim=(-1.2, flight.heights[0] + 4.5))
        draw_strips(ax, flight)
        for name, y in zip(names, flight.heights, strict=True):
            ax.text(-0.8, y + 0.45, name, ha="right", va="center", fontsize=15)
        followed = [key for key in flight.places[0] if key[:2] == (home, token)]
        for key in followed:
            for passed in range(n):  # the way so far
                draw_line(ax, flight.places[passed][key], flight.places[passed + 1][key], key)
        for key in sorted(flight.places[0], key=lambda key: key in followed):
            (x0, y0), (x1, y1) = flight.places[n][key], flight.places[min(n + 1, 4)][key]
            fill, edge, width = token_style(*key[:2]) if key in followed else ("#e2e2e6", "#c4c4ca", 1.0)
            text = str(key[2]) if key in followed else ""
            soft = share * share * (3 - 2 * share)  # a soft start and end
            place = x0 + (x1 - x0) * soft, y0 + (y1 - y0) * soft
            draw_box(ax, *place, fill, text, edge=edge, height=0.9, fontsize=14, linewidth=width)
        ax.set_title(moment_title(flight, n, home, token), fontsize=16)

    moments = [(n, share / 6) for n in range(4) for share in range(6)] + [(4, 0.0)] * 2
    alt = (
        f"Step by step: token {token} of rank {home} becomes a row for each of its experts; the rows move to the "
        "ranks of these experts, are sorted there among pale rows of other tokens, and come back to one box."
    )
    shown = show_animation(FuncAnimation(fig, draw_frame, frames=moments, interval=300), alt)
    plt.close(fig)
    return shown
