from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Page, chromium
from PIL import Image
from records import NAMES, histogram, latency, layers, record, save

from edgeres import result
from edgeres.data import ImageSet, Manifest
from edgeres.errors import MissingDependency
from edgeres.layouts import open_images
from edgeres.page import THUMBNAILS, content, page
from edgeres.publish import write_text

VOID = {"meta", "br", "img", "input"}
ODD = "<script>alert(1)</script> & \"q\" 'a' </style> {{ 7*7 }} --> é"


class Reader(HTMLParser):
    """Elements that are open, ids, texts; and whether every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""

    def ids(self) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get("id"))]


def words(*results: dict[str, Any], **more: Any) -> str:
    return re.sub(r"\s+", " ", Reader(page(list(results), **more)).text)


def only(picture: Path, *results: dict[str, Any]) -> ImageSet:
    """A set of one image, and ``results`` as if every changed answer were of it."""
    images = ImageSet(picture.parent, (picture.name,), None)
    for r in results:
        r["images_of"], r["provenance"]["digests"]["images"] = 1, Manifest.of(images).digest()
        r["flipped"] = [{**f, "path": picture.name} for f in r["flipped"]]
    return images


def unlabelled() -> dict[str, Any]:
    r = record(labels=False, drop=None, classes=10, verdict=None, reasons=[], flips=90)
    nothing = dict.fromkeys(("top1", "top5", "top1_interval", "top5_interval"))
    flipped = [{**f, "label": None, "kind": "changed"} for f in r["flipped"]]
    return {**r, "flips": None, "classes": None, "flipped": flipped, **{s: {**r[s], **nothing} for s in result.SIDES}}


def test_every_part_of_a_full_record_is_there() -> None:
    reader = Reader(page([record("fp16"), record()]))
    parts = ["accuracy", "latency", "layers", "ranges", "flips", "classes", "conditions", "fusion", "provenance"]
    assert [i for i in reader.ids() if i in parts] == parts
    links = {a["href"] for tag, a in reader.elements if tag == "a" and a.get("href")}
    assert links == {f"#{part}" for part in [*parts, "content"]}
    assert len(set(reader.ids())) == len(reader.ids())


def test_the_verdict_comes_first() -> None:
    text = words(record(verdict="NOT ENOUGH IMAGES", reasons=["drop not decided", "second reason"]))
    assert text.startswith(" NOT ENOUGH IMAGES: resnet50 v1.5: INT8")  # the title
    first = text.index("? NOT ENOUGH IMAGES")
    assert first < text.index("drop not decided") < text.index("second reason") < text.index("Loss of top-1")
    assert "86.25 → 86.20 %" in text
    assert "drop +0.05 points; 95% -0.09 to +0.19" in text
    assert "2.33 times as fast as FP32; 95% 2.29 to 2.38" in text
    assert "3.9 times smaller" in text


@pytest.mark.parametrize(
    ("word", "css"),
    [("PASS", "pass"), ("FAIL", "fail"), ("NOT ENOUGH IMAGES", "open"), ("NO LABELS", "open"), (None, "none")],
)
def test_a_verdict_has_a_style_and_a_word(word: str | None, css: str) -> None:
    reader = Reader(page([record(verdict=word, reasons=["why"] if word else [])]))
    assert [a["class"] for tag, a in reader.elements if tag == "section" and "verdict" in (a.get("class") or "")] == [
        f"verdict {css}"
    ]
    assert (word or "no verdict") in reader.text


def test_of_several_results_the_worst_verdict_is_in_the_title() -> None:
    assert words(record("fp16"), record(verdict="FAIL")).startswith(" FAIL: ")
    assert words(record("fp16"), record(verdict="NO LABELS")).startswith(" NO LABELS: ")


def test_numbers_are_those_of_the_record() -> None:
    text = words(record())
    p50 = latency()["runners"]["INT8"]["p50"]
    for shown in ("86.20", "85.51 to 86.86", "99.31 to 99.59", "+0.05", "0.580", "99.04", "34.8 dB", f"{p50:.2f}"):
        assert shown.replace(" to ", " to\N{NO-BREAK SPACE}") in text or shown in text, shown
    assert "0.0310" in text  # joules
    assert "governor is schedutil, not performance" in text
    assert "a" * 64 in text


def test_a_chart_has_a_mark_for_each_engine_where_its_numbers_are() -> None:
    made = content([record("fp16"), record()])
    drops = {row["name"]: row for row in made["drops"]["rows"]}
    zero, budget = made["drops"]["lines"]
    assert drops["INT8"]["lo"] < zero["at"] < drops["INT8"]["at"] < drops["INT8"]["hi"] < budget["at"]
    assert budget["label"] == "budget 0.5"
    points = {p["name"]: p for p in made["scatter"]["points"]}
    assert points["INT8"]["x"] < points["FP16"]["x"] < points["FP32"]["x"]
    assert points["INT8"]["top"] < points["INT8"]["y"] < points["INT8"]["bottom"]
    assert points["INT8"]["y"] > points["FP32"]["y"]  # lower, from the top


def test_a_benchmark_that_engines_share_is_shown_once() -> None:
    shared = latency()
    assert len(content([record("fp16", latency=shared), record(latency=latency())])["benchmarks"]) == 1
    two = content([record("fp16", latency=shared), record(latency=latency(seed=9))])["benchmarks"]
    assert [b["of"] for b in two] == ["FP16", "INT8"]


def test_distributions_lie_on_one_axis_and_stragglers_are_counted() -> None:
    record_of = latency(("FP32", "INT8"))
    edges, counts = (record_of["runners"]["INT8"]["histogram"][k] for k in ("edges", "counts"))
    edges.append(99.0)
    counts.append(7)
    (made,) = content([record(latency=record_of)])["benchmarks"]
    fp32, int8 = made["ridges"]["rows"]
    assert max(bar.at for bar in int8["bars"]) < min(bar.at for bar in fp32["bars"])
    assert int8["text"].endswith(" ms")
    edges[-2:] = [50.0, 99.0]
    (made,) = content([record(latency=record_of)])["benchmarks"]
    assert "7 samples beyond " in made["ridges"]["rows"][1]["text"] or "7" not in str(counts[-1])


def test_percentiles_that_were_not_measured_are_left_out() -> None:
    short = latency(("FP32", "INT8"))
    for run in short["runners"].values():
        run |= {"p99": None, "p99.9": None, "split": None, "enqueue": None, "energy": None}
    (made,) = content([record(latency=short)])["benchmarks"]
    names = [row["name"] for row in made["rows"]]
    assert names == ["p50", "p90", "p95", "mean", "variation", "throughput", "samples"]
    assert [mark["label"] for mark in made["ridges"]["rows"][0]["marks"]] == ["p50", "p90"]


def test_what_makes_a_measurement_doubtful_is_said() -> None:
    doubtful = latency()
    doubtful["runners"]["INT8"] |= {"stable": False, "warnings": ["times drift"]}
    doubtful["runners"]["FP16"] |= {"stable": False}
    text = words(record(latency=doubtful))
    assert "INT8 is not stable: times drift" in text
    assert "FP16 is not stable: governor is schedutil, not performance" in text


def test_a_headline_is_marked_where_latency_is_not_stable() -> None:
    r = record()
    assert "not stable" not in words(r)
    r["latency"]["runners"]["INT8"] |= {"stable": False, "warnings": ["times drift"]}
    headline = words(r).split("Loss of top-1 against")[0]
    assert "latency p50, not stable" in headline
    assert "Latency is not stable:INT8: times driftgovernor is schedutil, not performance" in headline
    texts = {p["name"]: p["text"] for p in content([r])["scatter"]["points"]}
    assert [name for name, text in texts.items() if text.endswith("not stable")] == ["INT8"]


def test_the_setting_names_every_batch_of_a_sweep() -> None:
    swept, alone = latency(), {**latency(), "sweep": [], "streams": 4}
    notes = [content([record(latency=of)])["benchmarks"][0]["note"] for of in (swept, alone)]
    assert notes == ["batch 1; sweep of batches 1, 8, 32 below; preset edgeres", "batch 1; 4 streams; preset edgeres"]


def test_where_it_was_measured_is_told() -> None:
    measured = latency()
    measured["machine"] = {"cpu": "Cortex-A78AE", "affinity": [0, 1]}
    text = words(record(latency=measured))
    assert "cpu Cortex-A78AE affinity 0, 1" in text


def test_the_worst_layers_are_named() -> None:
    known = layers()
    known[7]["sqnr_db"], known[20]["sqnr_db"], known[30]["sqnr_db"], known[3]["sqnr_db"] = 3.25, -1.5, -0.5, None
    (engine,) = content([record(layers=known)])["engines"]
    made = engine["layers"]
    worst = [(known[i]["name"], words) for i, words in ((20, "-1.5 dB"), (30, "-0.5 dB"), (7, "3.2 dB"))]
    assert made["worst"][:3] == worst
    assert made["exact"] == [known[3]["name"]]
    assert {bar["text"] for bar in made["bars"] if bar["css"]} == {f"{name}: {db}" for name, db in made["worst"]}
    low = sorted(bar["height"] for bar in made["bars"])
    assert 0 == low[0] < low[1] < low[2]
    assert len(made["bars"]) == len(known) - 1
    assert all(0 <= bar["height"] <= 100 for bar in made["bars"])


def test_ranges_show_every_method_and_what_is_in_use() -> None:
    (engine,) = content([record(ranges=[histogram("conv1", 0), {**histogram("dead", 0), "counts": [0] * 2048}])])[
        "engines"
    ]
    (made,) = engine["ranges"]
    assert made["tensor"] == "conv1"
    assert made["total"] == "200,000"
    assert {m["name"]: m["text"] for m in made["methods"]}["entropy"] == "0.000 to 5.100"
    minmax = next(m for m in made["methods"] if m["name"] == "minmax")
    assert made["used"]["at"] + made["used"]["width"] < minmax["at"][0]


def test_changed_answers_are_told_with_their_classes() -> None:
    r = record(flips=3)
    f = r["flipped"][0]
    f |= {"label": 3, "margin": 0.4321}
    f["baseline"], f["engine"] = {"answer": 3, "probability": 0.915}, {"answer": 5, "probability": 0.504}
    text = words(r)
    assert "3 of 10,000 answers differ" in text
    assert f"is cat FP32: cat 92%INT8: dog 50%margin 0.432 {f['path']}" in text
    r["classes"] = None
    assert "FP32: class 3 92%" in words(r)


def test_at_most_sixty_answers_have_a_picture_and_all_that_are_listed_are_there(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "one.png")
    both = [record(flips=150, images=20_000), record("fp16", flips=150, images=20_000)]
    images = only(tmp_path / "one.png", *both)
    for results in (both[:1], both):
        text = page(results, images=images.subset)
        assert text.count("data:image/jpeg") == THUMBNAILS
        cards = len([0 for tag, a in Reader(text).elements if "flip " in (a.get("class") or "")])
        assert cards == 150 * len(results)


def test_kinds_are_counted_among_all_that_are_listed() -> None:
    for engine in content([record(flips=150), record("fp16", flips=90)])["engines"]:
        made = engine["flips"]
        assert [n for *_, n in made["kinds"]] == [made["listed"] // 3] * 3
        assert len(made["first"]) + len(made["more"]) + len(made["rest"]) == made["listed"]


def test_what_can_be_scrolled_can_be_reached_by_keyboard() -> None:
    scrolled = [a for _, a in Reader(page([record()])).elements if a.get("class") == "scroll"]
    assert len(scrolled) >= 4
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolled)


def test_pictures_come_from_the_image_set(val_folder: Path) -> None:
    images = open_images(val_folder)
    r = record(flips=2)
    r["flipped"][0]["path"], r["flipped"][1]["path"] = images.paths[0], "gone.jpg"
    others = page([r], images=images.subset)
    assert "data:image/jpeg" not in others
    assert (
        f"There are no pictures: the 24 images in {val_folder} are not the 10,000 of the result: SHA-256 of " in others
    )
    r["images_of"], r["provenance"]["digests"]["images"] = len(images), Manifest.of(images).digest()
    text = page([r], images=images.subset)
    assert text.count("data:image/jpeg") == 1
    assert text.count("the image is not here") == 1
    assert "no pictures" not in text


def test_without_a_change_it_says_so() -> None:
    assert "0 of 10,000 answers differ from FP32" in words(record(flips=0))


def test_classes_that_changed_beyond_chance_come_first() -> None:
    (engine,) = content([record()])["engines"]
    made = engine["classes"]
    assert made["first"][0]["name"] == "cat"
    assert (made["first"][0]["sure"], made["sure"], made["total"]) == (True, 1, 10)
    assert made["rest"] == []
    many = content([record(images=100_000, classes=1000)])["engines"][0]["classes"]
    assert len(many["first"]) + len(many["rest"]) == many["total"] == 1000


def test_without_labels_answers_are_compared() -> None:
    text = words(unlabelled())
    assert "top-1 %" not in text
    assert "Accuracy: the images have no labels." in text
    assert "Damage by class: the images have no labels." in text
    assert "another answer" in text
    assert "no budget was set" in text


def test_a_former_result_says_what_it_lacks(tmp_path: Path) -> None:
    text = words(*result.load(Path(__file__).parent / "data" / "result-1.json"))
    assert "resnet50 v1.5" in text
    for missing in (
        "Intervals of latency",
        "Fidelity layer by layer",
        "Histograms of ranges",
        "Changed answers",
        "Damage by class",
    ):
        assert f"{missing}: " in text
    assert "200 samples each" in text


def test_a_shard_is_shown_without_latency() -> None:
    r = record(shard={"index": 1, "of": 2}, latency=None, verdict=None, reasons=[])
    r["baseline"]["latency_ms"] = r["engine"]["latency_ms"] = None
    text = words(r)
    assert "shard 1 of 2: a part of the images is not judged" in text
    assert "It was not measured" in text
    assert content([r])["scatter"] is None


def test_engines_bring_what_they_execute() -> None:
    engine = {"fusion": {"operators": {"QLinearConv": 53, "QLinearAdd": 16}}}
    text = words(record(notes=["fc stays in FP32"]), engines=[engine])
    assert "53 QLinearConv, 16 QLinearAdd" in text
    assert "fc stays in FP32" in text
    assert "Nothing was found that is not as asked." not in text


def test_whatever_a_name_holds_is_shown_and_not_run() -> None:
    r = record(
        names=(ODD, *NAMES[1:]), model=ODD, target=ODD, name=ODD, notes=[ODD], reasons=[ODD], ranges=[histogram(ODD, 0)]
    )
    for f in r["flipped"]:
        f["path"] = ODD
    r["layers"][0]["name"] = ODD
    measured = latency(("FP32", "INT8"))
    measured["runners"][ODD] = measured["runners"]["INT8"]
    measured["conditions"]["warnings"] = [ODD]
    measured["conditions"]["before"][ODD] = ODD
    r |= {"latency": measured}
    r["provenance"]["machine"] |= {ODD: ODD, "list": [ODD], "records": [{ODD: ODD}]}
    text = page([r], engines=[{"fusion": {"operators": {ODD: 1}}}])
    assert "<script" not in text
    assert text.count("</style>") == 1
    assert html.escape(ODD, quote=False).split(" &amp;")[0] in text
    reader = Reader(text)
    assert not [a for tag, a in reader.elements if any(key.startswith("on") for key in a)]
    assert reader.text.count(ODD) > 20


def test_nothing_is_asked_of_the_network() -> None:
    text = page([record("fp16"), record()])
    assert not re.search(r"(src|href|action|data|url|import)\s*[=(]\s*[\"']?(https?:)?//", text)
    assert "http" not in re.sub(r'http-equiv="', "", text)
    assert "default-src 'none'" in text


def test_a_page_of_ten_thousand_images_is_small_and_quick(tmp_path: Path) -> None:
    for i in range(THUMBNAILS // 2):
        Image.effect_noise((320, 240), 80 + i).convert("RGB").save(tmp_path / f"{i}.jpg")  # noise is the largest
    results, images = [], ImageSet(tmp_path, tuple(f"{i}.jpg" for i in range(THUMBNAILS // 2)), None)
    for precision in ("fp16", "int8"):
        r = record(precision, images=10_000, classes=1000, flips=200, ranges=[histogram(f"t{i}", i) for i in range(8)])
        for i, f in enumerate(r["flipped"]):
            f["path"] = f"{i}.jpg"
        r["provenance"]["digests"]["images"] = Manifest.of(images).digest()
        results.append(result.load(save(tmp_path / precision, r))[0])
    start = time.perf_counter()
    text = page(results, images=images.subset)
    assert time.perf_counter() - start < 5
    assert len(text.encode()) < 3e6
    assert text.count("data:image/jpeg") == THUMBNAILS


def test_without_jinja_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependency) as error:
        page([record()])
    assert error.value.hint == 'pip install "edgeres[report]"'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("there is no Chromium")
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def opened(browser: Page, tmp_path: Path) -> Page:
    """The page of two engines, 360 pixels wide."""
    Image.new("RGB", (64, 64), "green").save(tmp_path / "one.png")
    r = record(flips=150, images=20_000)
    images = only(tmp_path / "one.png", r)
    for i, f in enumerate(r["flipped"][1:]):
        f["path"] = f"gone/{i:03}.png"
    write_text(tmp_path / "page.html", page([record("fp16", flips=6), r], images=images.subset))
    browser.look(360)
    browser.open(tmp_path / "page.html")
    return browser


def visible(opened: Page, selector: str) -> int:
    shown = "e => e.checkVisibility({contentVisibilityAuto: true})"
    return int(opened.run(f"[...document.querySelectorAll({json.dumps(selector)})].filter({shown}).length"))


def test_it_opens_from_a_file_without_asking_for_another(opened: Page) -> None:
    assert [address[:5] for address in opened.requests if not address.startswith("data:image/jpeg")] == ["file:"]
    assert opened.errors == []
    assert opened.run("document.querySelector('img').naturalWidth") == 64


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_width_in_both_schemes(opened: Page, width: int, dark: bool) -> None:
    opened.look(width, dark)
    opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    page_width, window = opened.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert page_width <= window
    background = opened.run("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, re.findall(r"\d+", background))) < 60) is dark


CONTRAST = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const part = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = rgb(c).map(part);
    return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c } return 'rgb(255, 255, 255)' };
  let worst = [99, ''];
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    const style = getComputedStyle(e), a = light(e.tagName == 'text' ? style.fill : style.color), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.textContent.trim().slice(0, 40)];
  }
  return worst })()"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_stands_out_from_what_is_behind_it(opened: Page, dark: bool) -> None:
    opened.look(768, dark)
    ratio, where = opened.run(CONTRAST)
    assert ratio >= 4.5, where  # WCAG 2.1, 1.4.3


def test_a_click_opens_what_is_folded(opened: Page) -> None:
    count = opened.run("document.querySelectorAll('summary').length")
    assert count >= 4
    for i in range(count):
        opened.run(f"document.querySelectorAll('summary')[{i}].id = 'fold-{i}'")
        opened.click(f"#fold-{i}")
        assert opened.run(f"document.querySelector('#fold-{i}').parentElement.open"), i


def test_a_click_on_a_kind_leaves_its_answers_alone(opened: Page) -> None:
    opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert visible(opened, ".flip") == 156
    for kind in ("right_to_wrong", "wrong_to_right", "wrong_to_wrong"):
        opened.click(f"label[for='kind-2-{kind}']")
        assert visible(opened, f".flip.{kind}") == 52
        assert visible(opened, ".flip") == 52 + 4  # those of the first engine stay
    opened.click("label[for='kind-2-all']")
    assert visible(opened, ".flip") == 156


def test_every_link_leads_to_its_part(opened: Page) -> None:
    for target in opened.run("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))"):
        opened.click(f"nav a[href='{target}']")
        assert opened.until("location.hash", target) == target
        assert opened.run(f"document.querySelector('{target}').tagName") == "SECTION"


def test_a_keyboard_reaches_and_works_everything(opened: Page) -> None:
    stops = "a[href], summary, input:checked, [tabindex='0']"
    wanted = opened.run(f"[...document.querySelectorAll({json.dumps(stops)})].filter(e => e.checkVisibility()).length")
    seen = set()
    for _ in range(3 * wanted):
        opened.press("Tab", 9)
        opened.run("document.activeElement.dataset.seen = 1")
        if opened.run("document.activeElement.tagName") == "SUMMARY" and not seen:
            opened.press("Enter", 13, "\r")
            seen.add(opened.run("document.activeElement.parentElement.open"))
    assert seen == {True}
    assert opened.run("document.querySelectorAll('[data-seen]').length") >= wanted
    opened.run("document.getElementById('kind-2-all').focus()")
    opened.press("ArrowRight", 39)
    assert opened.run("document.getElementById('kind-2-right_to_wrong').checked")


def test_it_prints_with_the_provenance_unfolded(opened: Page, tmp_path: Path) -> None:
    opened.call("Emulation.setEmulatedMedia", media="print")
    opened.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # until it is drawn
    assert visible(opened, "details.whole dl.record > div") > 20
    assert visible(opened, "nav, fieldset") == 0
    for leads in ("h2", "h3", "section > p", ".caption"):
        breaks = f"[...document.querySelectorAll('main {leads}')].map(e => getComputedStyle(e).breakAfter)"
        assert set(opened.run(breaks)) == {"avoid"}, f"{leads} may end a page"
    opened.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    opened.call("Emulation.setEmulatedMedia", media="")
