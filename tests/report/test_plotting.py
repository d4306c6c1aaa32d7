"""The shared look: colours that carry in light and dark, and pictures that are the same in every format."""

import io
import itertools
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from jaxsafety.report import plotting
from jaxsafety.report.tables import Model

# WCAG 2.2, success criterion 1.4.11: contrast of graphics with what is next to them.
LEAST_CONTRAST = 3.0
WHITE, NEAR_BLACK = "#ffffff", "#101317"
METHODS = ("pretrained", "sft", "dpo", "unlearn")


@pytest.fixture
def picture():
    def draw(figure):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=plotting.BLUE)
        axes.set_title("a < b")

    return plotting.Picture(draw, 100, "line & title")


def luminance(colour):
    """Relative luminance as WCAG defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_from_light_and_dark_grounds():
    assert contrast("#000000", WHITE) == pytest.approx(21)
    colours = {style["color"] for style in plotting.CONDITION_STYLES.values()} | set(plotting.VERDICT_COLOURS.values())
    assert len(colours) == 6
    for colour in colours:
        assert contrast(colour, WHITE) >= LEAST_CONTRAST
        assert contrast(colour, NEAR_BLACK) >= LEAST_CONTRAST


def test_what_colours_tell_dashes_and_markers_tell_too():
    styles = plotting.CONDITION_STYLES.values()
    for one, other in itertools.combinations(styles, 2):
        assert one["color"] != other["color"]
        assert one["linestyle"] != other["linestyle"]
        assert one["marker"] != other["marker"]


def test_models_differ_by_colour_and_marker_and_rates_by_dashes():
    named = [Model(method, "eta_M", 1e-3) for method in METHODS]
    own = [Model(name, "eta_M", 1e-3) for name in ("dpo_released", "dpo_textbook", "unlearn_released")]
    styles = plotting.model_styles([*named, Model("sft", "eta_S", 1e-4), *own])
    for models in (named, own):
        for one, other in itertools.combinations(models, 2):
            assert styles[one]["color"] != styles[other]["color"]
    assert len({styles[model]["marker"] for model in named + own}) == len(named + own)
    fast, slow = styles[named[1]], styles[Model("sft", "eta_S", 1e-4)]
    assert (slow["color"], slow["marker"]) == (fast["color"], fast["marker"])
    assert slow["linestyle"] != fast["linestyle"]


def test_svg_is_one_element_of_the_right_size_with_its_name(picture):
    root = ET.fromstring(plotting.svg(picture))
    assert root.get("viewBox") == "0 0 380 100"
    assert root.find("{http://www.w3.org/2000/svg}title").text == "line & title"


def test_png_is_opaque_and_three_pixels_a_unit(picture):
    data = plotting.image(picture, kind="png")
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (3 * plotting.WIDTH, 3 * picture.height)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_pdf_keeps_its_text_and_no_date(picture):
    data = plotting.image(picture, kind="pdf")
    assert data.startswith(b"%PDF")
    assert b"/TrueType" in data or b"/Type42" in data or b"/CIDFontType2" in data
    assert b"CreationDate" not in data


def test_the_same_picture_has_the_same_bytes(picture):
    assert plotting.svg(picture) == plotting.svg(picture)
    for kind in ("png", "pdf"):
        assert plotting.image(picture, kind=kind) == plotting.image(picture, kind=kind)
