"""The look that all figures share: one width, one set of colours, and a picture rendered as SVG, PNG or PDF.

Every picture is drawn for a phone (``WIDTH`` units wide, text of 11 to 12 units). As SVG it keeps its text as text,
has a transparent ground and takes its ink from ``currentColor`` with a fallback that follows ``prefers-color-scheme``,
so one file serves light and dark, inline and as a picture. The same data give the same bytes. What a colour tells, a
dash or a marker tells too.
"""

import contextlib
import hashlib
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, FigureBase
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from jaxsafety.report.tables import Dead, Model, dead_notes, model_label

# After Okabe and Ito, with a contrast of at least 3:1 on white and on near-black; the ink becomes currentColor.
INK = "#010203"
BLUE, ORANGE, GREEN, PINK, BROWN, GREY = "#1a82c4", "#d55e00", "#009e73", "#c0679a", "#9c6b30", "#8a8f98"
VERDICT_COLOURS = {"complied": ORANGE, "refused": BLUE, "other": GREY}
CONDITION_STYLES = {
    "safe": {"color": BLUE, "linestyle": "solid", "marker": "o"},
    "unsafe": {"color": ORANGE, "linestyle": (0, (4, 1.6)), "marker": "s"},
    "jb_co_task": {"color": GREEN, "linestyle": (0, (1.2, 1.2)), "marker": "^"},
    "jb_co_text": {"color": PINK, "linestyle": (0, (5, 1.4, 1.2, 1.4)), "marker": "D"},
    "jb_misgen": {"color": BROWN, "linestyle": (0, (2.4, 1.2)), "marker": "v"},
    "ood": {"color": GREY, "linestyle": (0, (6, 1.4, 1.2, 1.4, 1.2, 1.4)), "marker": "X"},
}
# Of conditions with other names, in the order of a figure's conditions.
_OTHER_CONDITIONS = tuple(CONDITION_STYLES[name] for name in ("jb_co_task", "jb_co_text", "jb_misgen", "ood"))
WIDTH = 380

_METHOD_LOOKS = {"pretrained": (INK, "D"), "sft": (BLUE, "o"), "dpo": (ORANGE, "s"), "unlearn": (GREEN, "^")}
# Of methods with other names, in the order of a figure's models: of six colours and seven markers no pair comes twice.
_OTHER_LOOKS = tuple(
    itertools.islice(zip(itertools.cycle((PINK, BROWN, GREY, BLUE, ORANGE, GREEN)), itertools.cycle("vPX<>*h")), 42)
)
_DASHES = {"eta_S": (0, (4, 2))}
# Of the notes below a figure: letters that fit across in the widest font; the height of a line and of the margin.
_NOTE_LETTERS, _NOTE_LINE, _NOTE_MARGIN = 62, 15, 6
_RASTER_DPI = 216
_STYLE = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "path.simplify": False,
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), 12),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 11),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width", "grid.linewidth"), 0.6),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    "axes.titlelocation": "left",
    # Nothing stands above a panel that its title would have to be moved over, for which every tick would be measured.
    "axes.titley": 1.0,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.6,
}
_CSS = (
    ".jaxsafety{color:#1f2328}@media(prefers-color-scheme:dark){.jaxsafety{color:#e6e8eb}}"
    ".jaxsafety text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',sans-serif"
    "!important}.jaxsafety *{stroke-linejoin:round;stroke-linecap:butt}"
)
_TIP = "tip:"
_METADATA = {
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    "png": {"Software": None},
    "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
}


@dataclass(frozen=True)
class Picture:
    """A figure that is yet to be drawn: ``draw`` puts everything on a fresh one, or part of one.

    Attributes:
        height: units (1/72 inch in print), for a width of ``WIDTH``.
        name: what it shows, for readers who cannot see it; its element ids are hashed with it, so a name of its own
            keeps a figure apart from the others of a page.
        notes: lines of text below it, which add to the height.
    """

    draw: Callable[[FigureBase], None]
    height: int
    name: str
    notes: tuple[str, ...] = ()


def svg(picture: Picture) -> str:
    """Returns the picture as one ``<svg>`` element that scales to its container."""
    return _themed(_rendered(picture, "svg").decode(), picture.name)


def image(picture: Picture, *, kind: Literal["png", "pdf"]) -> bytes:
    """Returns the picture on white as a PNG of three pixels a unit, or as a PDF with its text as text."""
    return _rendered(picture, kind)


class Drawn(Figure):
    """A figure of matplotlib's, drawn, that a notebook shows as the page of a report does.

    What is changed on it shows where it is saved, not in the notebook.
    """

    def __init__(self, picture: Picture):
        with _looks(picture):
            super().__init__(figsize=(WIDTH / 72, picture.height / 72), layout="constrained")
            FigureCanvasSVG(self)
            self.picture = picture
            picture.draw(self)
            self._page = _add_notes(self, picture) if picture.notes else None

    def savefig(self, *file: Any, **options: Any) -> None:
        """Saves it in the look that it was drawn in, with its notes, which stand below its page."""
        with _looks(self.picture):
            super().savefig(*file, **({"bbox_inches": self._page} | options))

    def _repr_svg_(self) -> str:
        return svg(self.picture)


def model_styles(models: Sequence[Model]) -> dict[Model, dict[str, Any]]:
    """Line styles of a figure's models: a colour and a marker per method, solid for eta_M and dashed for eta_S."""
    others = [method for method in dict.fromkeys(model.method for model in models) if method not in _METHOD_LOOKS]
    looks = _METHOD_LOOKS | dict(zip(others, itertools.cycle(_OTHER_LOOKS), strict=False))
    return {
        model: dict(zip(("color", "marker"), looks[model.method], strict=True))
        | {"linestyle": _DASHES.get(model.lr_name, "solid")}
        for model in models
    }


def condition_styles(conditions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Styles of a figure's conditions, which keep their order; those without a style of their own share a few."""
    others = itertools.cycle(_OTHER_CONDITIONS)
    return {name: CONDITION_STYLES[name] if name in CONDITION_STYLES else next(others) for name in conditions}


def with_dead(picture: Picture, dead: Mapping[Model, Dead]) -> Picture:
    """Returns the picture with a star at every label of a model that has dead seeds, and below it a note of how many.

    A model without a living seed, which has nothing to draw, is in the note all the same. No dead seed: no change.
    """
    if not dead:
        return picture
    wrapped = [textwrap.wrap(f"* {note}", _NOTE_LETTERS) for note in dead_notes(dead)]

    def draw(figure: FigureBase) -> None:
        picture.draw(figure)
        _star(figure, {model_label(model): f"{model_label(model)}*" for model in dead})

    return replace(picture, draw=draw, notes=tuple(itertools.chain.from_iterable(wrapped)))


def tip(text: str) -> str:
    """Returns the ``gid`` of an artist of which an SVG shows a text under the pointer."""
    return f"{_TIP}{text}"


def _star(figure: FigureBase, starred: Mapping[str, str]) -> None:
    for text in figure.findobj(Text):
        text.set_text(starred.get(text.get_text(), text.get_text()))
    for axis in figure.findobj(Axis):
        # Labels of ticks are written anew when the figure is laid out.
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if not starred.keys().isdisjoint(labels):
            axis.set_ticks(axis.get_ticklocs(), [starred.get(label, label) for label in labels])


@contextlib.contextmanager
def _looks(picture: Picture) -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": picture.name})
        yield


def _rendered(picture: Picture, kind: str) -> bytes:
    with _looks(picture):
        figure = Figure(figsize=(WIDTH / 72, picture.height / 72), layout="constrained")
        figure.get_layout_engine().set(h_pad=6 / 72, w_pad=5 / 72, hspace=0, wspace=0)
        FigureCanvasSVG(figure)
        picture.draw(figure)
        page = _add_notes(figure, picture) if picture.notes else None
        if kind == "svg" and figure.axes:
            # By the figure's own canvas: to have it laid out, saving would draw everything an extra time.
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine(None)
        output = io.BytesIO()
        figure.savefig(
            output, format=kind, transparent=kind == "svg", dpi=_RASTER_DPI, metadata=_METADATA[kind], bbox_inches=page
        )
    return output.getvalue()


def _add_notes(figure: Figure, picture: Picture) -> Bbox:
    """Writes the notes below the figure, whose layout stays as it is; returns the page with them, in inches."""
    below = _NOTE_LINE * len(picture.notes) + _NOTE_MARGIN
    where = {"x": _NOTE_MARGIN / WIDTH, "y": (_NOTE_MARGIN - below) / picture.height}
    figure.text(s="\n".join(picture.notes), fontsize=11, va="bottom", in_layout=False, **where)
    return Bbox.from_extents(0, -below / 72, WIDTH / 72, picture.height / 72)


def _themed(source: str, name: str) -> str:
    body = source[source.index("<svg") :].replace(INK, "currentColor")
    # Matplotlib's own style sheet and running element ids would reach beyond the figure once it stands in a page.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", body)
    body = _renamed_ids(re.sub(r'<g id="[^"]*"', "<g", body), name)
    view_box = re.search(r'viewBox="([^"]*)"', body).group(1)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="jaxsafety" '
        f'role="img" width="100%" viewBox="{view_box}"><title>{escape(name)}</title><style>{_CSS}</style>'
    )
    return head + body[body.index(">") + 1 :]


def _renamed_ids(body: str, name: str) -> str:
    """Numbers the ids in the order in which they stand, after a prefix of the figure's own.

    Matplotlib hashes them from coordinates, in whose last bits the layout's solver is not the same twice.
    """
    prefix = f"f{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    ids = {old: f"{prefix}-{number}" for number, old in enumerate(re.findall(r' id="([^"]*)"', body))}
    return re.sub(
        r'( id="|url\(#|href="#)([^")]*)', lambda found: found.group(1) + ids.get(found.group(2), found.group(2)), body
    )
