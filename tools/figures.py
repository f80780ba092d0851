"""One look for every figure of the book: the same colours for ranks and tokens, text that stays readable.

Ranks differ in lightness too, so figures survive printing in grey. A token wears its home rank's colour,
a shade per token, wherever it travels.
"""

import base64
import html
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import HTML
from matplotlib.animation import Animation
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

IMAGES = Path(__file__).resolve().parents[1] / "images"
# Lightness falls and rises again between neighbours: dark blue, orange, green, light blue, red, yellow, ...
RANK_COLORS = ("#0b4f8a", "#f2a33a", "#2a7f62", "#9fd0ee", "#b5372a", "#f4e04d", "#6d3f8c", "#c9c9c9")
# A way to compute a layer has one colour in every figure that compares several.
METHOD_COLORS = {
    "ours": RANK_COLORS[2], "plain PyTorch": RANK_COLORS[1], "loop": RANK_COLORS[4],
    "transformers": RANK_COLORS[6], "torchtitan": RANK_COLORS[3],
}  # fmt: skip
INK, FAINT = "#1d1d1f", "#b8bcc2"


def use_style() -> None:
    """Sets matplotlib's defaults for the book: large text, no frame, identical bytes for identical figures."""
    plt.rcParams.update({
        "font.size": 13, "axes.titlesize": 14, "axes.labelsize": 13, "legend.fontsize": 12,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "text.color": INK,
        "figure.dpi": 100, "savefig.bbox": "tight", "svg.hashsalt": "ep", "svg.fonttype": "path",
        "axes.prop_cycle": matplotlib.cycler(color=RANK_COLORS), "legend.frameon": False,
    })  # fmt: skip


def rank_color(rank: int) -> str:
    """The colour of a rank, the same in every chapter; repeats after 8."""
    return RANK_COLORS[rank % len(RANK_COLORS)]


def token_color(rank: int, token: int, num_tokens: int = 4) -> tuple[float, float, float]:
    """The colour of a token: its home rank's, lighter from token to token. RGB in 0 to 1."""
    share = 0.38 * (token % num_tokens) / max(1, num_tokens - 1)
    red, green, blue = (channel + (1 - channel) * share for channel in to_rgb(rank_color(rank)))
    return red, green, blue


def ink_on(color: str | Sequence[float]) -> str:
    """White or dark, whichever reads better on the colour."""
    red, green, blue = to_rgb(color)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK


def draw_box(
    ax: Axes, x: float, y: float, color: str | Sequence[float], text: str = "", *, width: float = 0.9,
    height: float = 0.8, edge: str = INK, hatch: str | None = None, fontsize: float = 12, linewidth: float = 1,
) -> None:  # fmt: skip
    """A box with its lower left corner at (x, y)."""
    ax.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=edge,
        linewidth=linewidth, hatch=hatch,
    ))  # fmt: skip
    middle = x + width / 2, y + height / 2
    ax.text(*middle, text, ha="center", va="center", fontsize=fontsize, color=ink_on(color))


def has_other_parameters() -> bool:
    """Whether papermill has put parameters into the notebook that runs here."""
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    return any(cell.startswith("# Parameters\n") for cell in cells)


def save_figure(fig: Figure, name: str, alt: str) -> None:
    """Writes the figure to images/NAME (SVG): the same figure gives the same bytes, without a date.

    To build/images/NAME where the notebook runs with other parameters: then it is not the book's figure.
    alt: what one sees, in words. It is the picture's title, and the text for it in the committed notebook and on the
    site.
    """
    folder = IMAGES.parent / "build" / "images" if has_other_parameters() else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    svg, path = io.BytesIO(), folder / name
    fig.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Title": alt})
    if not path.exists() or path.read_bytes() != svg.getvalue():  # another run may be looking at it
        path.write_bytes(svg.getvalue())


def fewer_colors(frame: re.Match[str]) -> str:
    """A PNG's base64 text -> that of the same picture in 64 colours, a fifth of the bytes."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(re.sub(r"[\\\s]", "", frame[0]))))
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def show_animation(animation: Animation, alt: str) -> HTML:
    """matplotlib's player, with its frames inside and without its icons, a font that it would load from a server.

    alt: what one sees, in words.
    """
    player = animation.to_jshtml(default_mode="once")
    player = re.sub(r"(?<=data:image/png;base64,)[\w+/=\\\s]+", fewer_colors, player)
    player = re.sub(r"<link [^>]*>", "", player).replace(" width: 36px;", "")
    player = re.sub(r'(title="(.+?)(?: frame)?"[^>]*>)\s*<i class="fa [^>]*></i>', r"\1\2", player)
    name = re.search(r"_anim_img(\w+)", player)[1]  # random; a committed output is the same in every run
    player = player.replace(name, f"{zlib.crc32(alt.encode()):08x}")
    return HTML(player.replace("<img id=", f'<img alt="{html.escape(alt)}" id='))
