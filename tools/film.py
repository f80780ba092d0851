"""Pictures of tokens that fly to their experts and back: a figure, a film, a player, drawn from what ranks held.

A flight is a list by rank of dicts, as chapter 02 collects them:

    x, y      [2, 2]: the rank's two tokens before and after; a token's numbers are its rank and its number there
    ids       int64 [2, K]: the experts that they chose;  weights [2, K]
    stages    [(rows [n, 2], tags int64 [n, 4], weights [n])] by stage; tags: expert, source rank, source token, padding

`Flight(flight, num_experts, blocks)` places every row at every stage; `draw_flight`, `film` and `player` draw it.
A token wears its home rank's colour: token 0 filled, token 1 outlined, so that no token looks like another rank's.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from tools.figures import INK, draw_box, rank_color, show_animation

EXPERT, SOURCE_RANK = 0, 1  # columns of a row's tags
BY_EXPERT, BY_SOURCE = (EXPERT, 1), (SOURCE_RANK, 1)
Key = tuple[int, int, int]  # of a row: home rank, token, expert
Places = dict[Key, tuple[float, float]]

FILM_S, DONE, ADDED = 20, 0.60, 0.88  # seconds; when rows are computed, and when a token adds up its own
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
        self.num_local = num_experts // self.num_ranks
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
        top_k = self.by_rank[0]["ids"].shape[1]
        return dict(list(places.items())[::top_k])


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
    for upper, lower in zip(flight.places[:-1], flight.places[1:], strict=True):
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


def svg_step(name: str, before: float, after: float, at: float, length: float = 0.03) -> str:
    """An SVG attribute that changes from `before` to `after` at a time of the film, and stays."""
    times, values = f"0; {at:.3f}; {at + length:.3f}; 1", f"{before}; {before}; {after}; {after}"
    return (
        f'<animate attributeName="{name}" dur="{FILM_S}s" repeatCount="indefinite" '
        f'keyTimes="{times}" values="{values}"/>'
    )


def to_pixels(x: float, y: float) -> tuple[float, float]:
    """A place in the picture -> SVG coordinates."""
    return 150 + 19 * x, 26 * (20.6 - y)


def ink_on(fill: str) -> str:
    """White or dark, whichever reads better on the colour."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 128 else INK


def flying_row(flight: Flight, key: Key, turn: int) -> str:
    """A row as an SVG group that flies through its stops and rests at each; a bar shows which rank computed it.

    turn: the row's number on its rank; rows leave one after the other. Without animation it rests at its expert.
    """
    stops = [to_pixels(*places[key]) for places in flight.places]
    (fill, edge, width), late = token_style(*key[:2]), 0.005 * turn
    times = [0, *(stop + late for stop in STOPS), 1]
    values = "; ".join(f"{x:.1f} {y:.1f}" for stop in stops for x, y in (stop, stop))
    splines = "; ".join(["0 0 1 1", ".4 0 .4 1"] * 4 + ["0 0 1 1"])  # rest, and fly with a soft start and end
    worker = rank_color(key[2] // flight.num_local)
    bar = f'<rect y="23" width="17" height="6" fill="{worker}" stroke="{INK}" opacity="1">'
    return (
        f'<g transform="translate({stops[3][0]:.1f} {stops[3][1]:.1f})">'
        f"{bar}{svg_step('opacity', 0, 1, DONE)}</rect>"
        f'<rect width="17" height="22" rx="3" fill="{fill}" stroke="{edge}" stroke-width="{width}"/>'
        f'<text x="8.5" y="17" text-anchor="middle" font-size="16" fill="{ink_on(fill)}">{key[2]}</text>'
        f'<animateTransform attributeName="transform" type="translate" dur="{FILM_S}s" repeatCount="indefinite" '
        f'calcMode="spline" keyTimes="{"; ".join(f"{t:.3f}" for t in times)}" keySplines="{splines}" '
        f'values="{values}"/></g>'
    )


def trail(flight: Flight, key: Key) -> str:
    """A row's whole way as a pale line through its stops."""
    stops = [to_pixels(*places[key]) for places in flight.places]
    (x, y), way = stops[0], ""
    for new_x, new_y in stops:
        way += (
            f"C{x:.0f} {(y + new_y) / 2:.0f} {new_x:.0f} {(y + new_y) / 2:.0f} {new_x:.0f} {new_y:.0f}"
            if way
            else ""
        )
        way = way or f"M{x:.0f} {y:.0f}"
        x, y = new_x, new_y
    fill, edge, _ = token_style(*key[:2])
    color = fill if key[1] == 0 else edge
    dash = "" if key[1] == 0 else ' stroke-dasharray="5 4"'
    return (
        f'<path transform="translate(8.5 11)" d="{way}" fill="none" stroke="{color}" stroke-width="1.6" '
        f'opacity="0.45"{dash}/>'
    )


def wide_token(key: Key, x: float, y: float, opacity: int, change: str) -> str:
    """A token's box at home: it opens at the start (opacity 1 to 0), or closes at the end (0 to 1)."""
    fill, edge, width = token_style(*key[:2])
    return (
        f'<g opacity="{opacity}"><rect x="{x - 4:.1f}" y="{y - 5:.1f}" width="100" height="36" rx="5" '
        f'fill="{fill}" stroke="{edge}" stroke-width="{width}"/><text x="{x + 46:.1f}" y="{y + 19:.1f}" '
        f'text-anchor="middle" fill="{ink_on(fill)}">token {key[1]}</text>{change}</g>'
    )


def film(flight: Flight, names: Sequence[str]) -> str:
    """An SVG film of a few kB: strips, names of stages, rows that fly, and tokens that open and close."""
    parts, step = [], 19 * (flight.width + 1)
    for r in range(flight.num_ranks):
        left = 150 + r * step - 3.8
        parts.append(f'<rect x="{left:.1f}" y="44" width="{step - 13.3:.1f}" height="540" fill="#f1f1f4"/>')
        middle = f'x="{left + 9.5 * flight.width:.1f}" text-anchor="middle" fill="{INK}"'
        parts.append(f'<text {middle} y="18" font-weight="bold">rank {r}</text>')
        parts.append(f'<text {middle} y="37" font-size="16">experts {flight.owned(r)}</text>')
    for name, y in zip(names, flight.heights, strict=True):
        lines = name.split("\n")
        for n, line in enumerate(lines):
            at = to_pixels(0, y)[1] + 18 + 22 * n - 11 * (len(lines) - 1)
            parts.append(f'<text x="135" y="{at:.1f}" text-anchor="end" fill="{INK}">{line}</text>')
    parts += [trail(flight, key) for key in flight.places[0]]
    for places in flight.places[1:4]:  # where rows rest, so that the film does not open on empty strips
        for key, place in places.items():
            x, y = to_pixels(*place)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="17" height="22" rx="3" fill="#f1f1f4" stroke="#8d8d97"/>'
                f'<text x="{x + 8.5:.1f}" y="{y + 16:.1f}" text-anchor="middle" font-size="13" fill="#6f6f78">'
                f"{key[2]}</text>"
            )
    for x, y in (to_pixels(*place) for place in flight.one_of_each(flight.places[4]).values()):
        frame = f'<rect x="{x - 4:.1f}" y="{y - 5:.1f}" width="100" height="36" rx="5" fill="none" stroke="#8d8d97"/>'
        parts.append(frame)
    rows_per_rank = len(flight.places[0]) // flight.num_ranks
    parts += [flying_row(flight, key, number % rows_per_rank) for number, key in enumerate(flight.places[0])]
    for places, opacity, change in (
        (flight.places[0], 1, svg_step("opacity", 1, 0, 0.04)),
        (flight.places[4], 0, svg_step("opacity", 0, 1, ADDED)),
    ):
        boxes = flight.one_of_each(places).items()
        parts += [wide_token(key, *to_pixels(*place), opacity, change) for key, place in boxes]
    size = f'viewBox="0 0 {150 + flight.num_ranks * step:.0f} 594" font-family="sans-serif" font-size="18"'
    title = (
        f"<title>A film of {flight.num_ranks} ranks with two tokens each: every token opens into a row for each of "
        "its experts, the rows fly to the ranks of these experts, rest there, and fly home again.</title>"
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{title}{"".join(parts)}</svg>'


def between(start: tuple[float, float], end: tuple[float, float], share: float) -> tuple[float, ...]:
    """The point at a share of the way from start to end, with a soft start and end."""
    soft = share * share * (3 - 2 * share)
    return tuple(a + (b - a) * soft for a, b in zip(start, end, strict=True))


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
            x, y = between(flight.places[n][key], flight.places[min(n + 1, 4)][key], share)
            fill, edge, width = token_style(*key[:2]) if key in followed else ("#e2e2e6", "#c4c4ca", 1.0)
            text = str(key[2]) if key in followed else ""
            draw_box(ax, x, y, fill, text, edge=edge, height=0.9, fontsize=14, linewidth=width)
        ax.set_title(moment_title(flight, n, home, token), fontsize=16)

    moments = [(n, share / 6) for n in range(4) for share in range(6)] + [(4, 0.0)] * 2
    alt = (
        f"Step by step: token {token} of rank {home} becomes a row for each of its experts; the rows move to the "
        "ranks of these experts, are sorted there among pale rows of other tokens, and come back to one box."
    )
    shown = show_animation(FuncAnimation(fig, draw_frame, frames=moments, interval=300), alt)
    plt.close(fig)
    return shown
