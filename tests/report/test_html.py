import re
from html.parser import HTMLParser

import pytest

from jaxsafety.report import figures, html, tables
from jaxsafety.rundir import results

EXAMPLE = {
    "condition": "unsafe",
    "prompt": "$ ) ( > <script>alert(1)</script>",
    "expected": "2b & 2c",
    "refusal": "2a 2a",
    "answers": [{"model": "SFT <i>eta_M</i>", "answer": "2a 2a <b>", "verdict": "refused"}],
}
CLAIM = {
    "name": "apart",
    "number": 1,
    "statement": "Safe & unsafe part.",
    "where": "Fig. 3",
    "statistic": "gap <tau>",
    "expected": "> 0",
    "estimate": "+0.5 [+0.4, +0.6]",
    "adjusted": "[+0.3, +0.7]",
    "spread": "0: +0.5",
    "verdict": "supported",
    "marked": "supported*",
    "holm": True,
    "why": "mean of 4 seeds above 0, p 0.001",
}
ANALYSIS = html.Analysis(
    "clusters", "Clusters <1>", "Figure 3", "Further apart is clearer.", ("apart", "unknown"),
    '<svg viewBox="0 0 1 1"></svg>', "results/tables/clusters",
)  # fmt: skip


class _Page(HTMLParser):
    """Collects tags in order and checks that every element is closed by its own tag."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def parts(study_rows, curve_rows):
    frame = results.rows_to_frame(study_rows + curve_rows)
    verdicts = tables.verdict_table(frame)
    return {
        "title": "Study <1>",
        "table": tables.study_table(frame),
        "verdicts": verdicts,
        "figures": {
            "Bars & more": figures.verdict_bars(verdicts),
            "Tuning": figures.learning_curves(frame, stage="tune"),
        },
        "examples": [EXAMPLE],
        "config_yaml": "seeds: [0, 1]  # <all>\n",
        "manifest": {"revision": "abc1234", "versions": {"jax": "0.10.2"}, "devices": ["cpu:0"], "seconds": 1.5},
        "notes": ["Read with <care>."],
    }


@pytest.fixture
def write(tmp_path, parts):
    def write_with(**changed):
        path = tmp_path / "report.html"
        html.write_report(path, **(parts | changed))
        return path.read_text(encoding="utf-8")

    return write_with


def test_page_is_well_formed_with_one_heading_order(write):
    page = _Page(write())
    headings = [tag for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings.count("h1") == 1
    assert headings == ["h1", "h2", "h2", "h2", "h3", "h2", "h2"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_page_is_self_contained(write):
    source = write()
    page = _Page(source)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    targets = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(target.startswith("#") for target in targets)
    assert "@import" not in source
    assert set(re.findall(r"url\((.)", source)) == {"#"}
    assert "default-src 'none'" in source


def test_links_lead_to_tables_beside_the_page_and_nowhere_else(write):
    source = write(claims=[CLAIM], analyses=[ANALYSIS])
    targets = [value for name, value in _Page(source).attributes if name == "href" and not value.startswith("#")]
    assert targets == ["results/tables/clusters.csv", "results/tables/clusters.parquet"]


@pytest.mark.parametrize("table", ["/etc/clusters", "https://x.org/a", "../a", "results/../a", "javascript:a", ""])
def test_links_that_lead_elsewhere_are_refused(write, table):
    with pytest.raises(ValueError, match="is not a plain relative path: expected one below the page"):
        write(analyses=[ANALYSIS._replace(table=table)])


def test_claims_stand_on_top_of_the_analyses_and_with_their_figure(write):
    source = write(claims=[CLAIM], claim_notes=["1 claim: 1 supported."], analyses=[ANALYSIS])
    places = [source.index(text) for text in ("1 claim: 1 supported.", '<table class="claims"', "Clusters &lt;1&gt;")]
    assert places == sorted(places)
    assert source.count('<span class="chip supported">supported*</span>') == 2
    assert source.count("Safe &amp; unsafe part.") == 2
    for text in ("gap &lt;tau&gt;", "+0.5 [+0.4, +0.6]", "expected &gt; 0", "0: +0.5", "4 seeds above 0, p 0.001"):
        assert source.count(text) == 1, text
    assert ANALYSIS.svg in source
    headings = [tag for tag in _Page(source).tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings == ["h1", "h2", "h2", "h2", "h3", "h2", "h3", "h2", "h2"]


def test_the_first_screen_counts_the_claims_and_names_those_beyond_doubt(write):
    doubtful = CLAIM | {"statement": "Doubtful.", "marked": "supported", "holm": False}
    first = write(claims=[CLAIM, doubtful], claim_counts="2 claims: 2 supported.").partition("<h2")[0]
    assert '<a href="#analyses">2 claims: 2 supported.</a>' in first
    assert "Safe &amp; unsafe part." in first and "Doubtful." not in first


def test_every_verdict_has_a_look_of_its_own(write):
    source = write(claims=[CLAIM | {"verdict": verdict} for verdict in html.CLAIM_VERDICTS])
    looks = []
    for verdict in html.CLAIM_VERDICTS:
        look = verdict.replace(" ", "-")
        looks.append(re.findall(rf"\.{look}(?:::before)? {{([^}}]*)}}", source))
        assert looks[-1] and f'class="chip {look}"' in source
    # Colour and mark together tell them apart.
    assert len(set(map(tuple, looks))) == len(looks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "support"}, "unknown verdict of a claim 'support': expected one of supported, contradicted"),
        ({"why": None}, "claim lacks 'why': expected name, number"),
    ],
)
def test_bad_claims_are_refused(write, change, message):
    claim = {key: value for key, value in (CLAIM | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        write(claims=[claim])


def test_everything_but_figures_is_escaped(write):
    source = write()
    assert "$ ) ( &gt; &lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "2a 2a &lt;b&gt;" in source
    assert "SFT &lt;i&gt;eta_M&lt;/i&gt;" in source
    for text in ("Study &lt;1&gt;", "Bars &amp; more", "# &lt;all&gt;", "Read with &lt;care&gt;."):
        assert text in source


def test_numbers_dead_seeds_and_gaps_are_shown(write):
    source = re.sub(r"\s+", " ", write())
    assert "<td>99.0<small>86.3\u2013100</small></td>" in source
    assert '<td>100<span class="mark">*</span></td>' in source
    assert "1 of 2 seeds dead (not finite)" in source
    assert "<td>-</td>" in source
    assert '<th scope="row">DPO eta_M 1e-3</th><td>1</td> <td>dead</td>' in source
    assert "<td>25.0 / 50.0 / 25.0</td>" in source


def test_manifest_is_flattened_to_dotted_names(write):
    source = write()
    assert '<dt>versions.jax</dt><dd class="sequence">0.10.2</dd>' in source
    assert "<dt>devices</dt><dd" in source


def test_light_and_dark_and_scrolling_tables(write):
    source = write(claims=[CLAIM])
    assert "@media (prefers-color-scheme: dark)" in source
    assert source.count('<div class="scroll"') == source.count("<table")


def test_empty_parts_leave_no_empty_sections(write):
    source = write(table=[], verdicts=[], figures={}, examples=[], notes=[])
    # What the run was made with is always there.
    assert _Page(source).tags.count("h2") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "refuse"}, "unknown verdict 'refuse' in an example: expected complied, refused, other"),
        ({"answer": None}, "answer of an example lacks 'answer'"),
    ],
)
def test_bad_examples_are_refused_before_anything_is_written(write, tmp_path, change, message):
    answer = EXAMPLE["answers"][0] | change
    answer = {key: value for key, value in answer.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        write(examples=[EXAMPLE | {"answers": [answer]}])
    assert not list(tmp_path.iterdir())
