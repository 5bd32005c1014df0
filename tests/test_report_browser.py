"""The report's page in a real browser, headless: it loads in silence, fits phone and desktop, and its controls work.

The browser is chromium, from ``SPECDEC_CHROMIUM`` or the PATH, with its ``chromedriver`` beside it or in the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from report_runs import DRAFTERS, QUESTIONS_PER_TASK, TASKS, TOKENS, Case, make_run
from specdec.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e .[dev]")

PHONE, DESKTOP = 390, 1440
ANSWERED = len(TASKS) * QUESTIONS_PER_TASK
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
)  # fmt: skip


def browser_and_driver() -> tuple[str, str] | None:
    """Where chromium and its driver are; None where either is missing."""
    named = os.environ.get("SPECDEC_CHROMIUM")
    browser = named or next((found for name in _NAMES if (found := shutil.which(name))), None)
    if browser is None:
        return None
    beside = Path(browser).resolve().parent / "chromedriver"
    driver = shutil.which("chromedriver") or (str(beside) if beside.is_file() else None)
    return (browser, driver) if driver else None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = browser_and_driver()
    if found is None:
        pytest.skip(
            "no chromium with its chromedriver: on Debian apt-get install chromium chromium-driver (on Ubuntu "
            "chromium-browser chromium-chromedriver), or set SPECDEC_CHROMIUM to the browser's path"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in (*_QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browsed")
    run = make_run(folder / "run", case=Case(batch_sizes=(1, 4)))
    write_report([run], folder / "report")
    return (folder / "report" / "index.html").as_uri()


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, page: str) -> Opened:
    """Open the page anew at a width and in a colour scheme; returns the driver."""

    def at(width: int = DESKTOP, scheme: str = "light") -> Any:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(page)
        unpacked = (
            "const wait = () => document.documentElement.dataset.ready ? arguments[0]() : setTimeout(wait, 20); wait()"
        )
        browser.execute_async_script(unpacked)
        return browser

    return at


def choose(browser: Any, form: str, name: str, value: str | bool) -> None:
    """Set a control as a user would, with its event."""
    browser.execute_script(
        "const field = document.querySelector(arguments[0]).elements[arguments[1]];"
        "field[typeof arguments[2] === 'boolean' ? 'checked' : 'value'] = arguments[2];"
        "field.dispatchEvent(new Event('input', {bubbles: true}));",
        *(form, name, value),
    )


def texts(browser: Any, selector: str) -> list[str]:
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)", selector
    )
    return found


def option(browser: Any, form: str, name: str, text: str) -> str:
    """The value of the option that reads so."""
    values = browser.execute_script(
        "return [...document.querySelector(arguments[0]).elements[arguments[1]].options].map((o) => [o.text, o.value])",
        *(form, name),
    )
    return str(dict(values)[text])


def test_it_loads_in_silence(opened: Opened, page: str) -> None:
    """No word on the console, and nothing asked of the network or of another file."""
    browser = opened()
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert page in asked
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page}


@pytest.mark.parametrize("width", [PHONE, 768, DESKTOP])
def test_nothing_is_wider_than_the_screen(opened: Opened, width: int) -> None:
    """Under every setting, with the answers side by side as well."""
    browser = opened(width)
    choose(browser, "#answer-filters", "beside", True)
    for index in range(2):
        browser.execute_script(f"document.querySelectorAll('input[name=setting]')[{index}].click()")
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
    scrolling = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter((e) => e.offsetParent)"
        ".map((e) => e.scrollWidth > e.clientWidth)"
    )
    if width == PHONE:
        assert all(scrolling), "tables scroll inside their own container"


@pytest.mark.parametrize(("width", "shown"), [(PHONE, "narrow"), (DESKTOP, "wide")])
def test_charts_are_drawn_for_the_screen(opened: Opened, width: int, shown: str) -> None:
    """Of each chart the version for this width; its text is at least 9 pixels high and lies within the screen."""
    browser = opened(width)
    script = """
        const charts = [...document.querySelectorAll('.chart > div')].filter((e) => e.offsetParent);
        const words = [...document.querySelectorAll('.chart svg text')].filter((e) => e.getBoundingClientRect().width);
        return [
            [...new Set(charts.map((e) => e.className))],
            Math.min(...words.map((e) => e.getBoundingClientRect().height)),
            words.filter((e) => {
                const box = e.getBoundingClientRect(), chart = e.closest('svg').getBoundingClientRect();
                return box.left < chart.left - 2 || box.right > chart.right + 2;
            }).map((e) => e.textContent),
        ]"""
    classes, smallest, outside = browser.execute_script(script)
    assert classes == [shown]
    assert smallest >= 9
    assert outside == []


def test_headers_stay_in_sight(opened: Opened) -> None:
    tops = opened(PHONE).execute_script("""
        const box = [...document.querySelectorAll('.scroll')].find((e) => e.offsetParent);
        box.style.maxHeight = '200px';
        box.scrollTop = 120;
        box.scrollLeft = 150;
        const place = (e) => e.getBoundingClientRect(), at = place(box);
        const head = place(box.querySelector('thead th:nth-child(2)')), name = place(box.querySelector('tbody th'));
        return [box.scrollTop, head.top - at.top, name.left - at.left]""")
    assert tops[0] == 120
    assert abs(tops[1]) <= 2
    assert abs(tops[2]) <= 2


def test_colours_follow_the_reader(opened: Opened) -> None:
    """The system's scheme, and the button over it; charts follow, since their colours are the page's."""
    colors = "const of = (e, p) => getComputedStyle(document.querySelector(e))[p];" \
        "return [of('body', 'backgroundColor'), of('.chart .wide text', 'fill')]"  # fmt: skip
    light = opened(scheme="light").execute_script(colors)
    browser = opened(scheme="dark")
    dark = browser.execute_script(colors)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    browser.execute_script("document.querySelector('#scheme').click()")
    assert browser.execute_script(colors) == light


def test_tokens_are_coloured_by_origin(opened: Opened) -> None:
    """Drafted tokens carry their drafter's colour, the target's own none; another drafter has another colour."""
    browser = opened()
    seen = {}
    for label in ("token_recycling · batch 1", "prompt_lookup · batch 1"):
        choose(browser, "#answer-filters", "method", option(browser, "#answer-filters", "method", label))
        seen[label] = browser.execute_script("""
            const spans = [...document.querySelector('.card .tokens').children];
            const distinct = (items) => [...new Set(items)].sort();
            const shadows = (kind) =>
                distinct(spans.filter((e) => e.className === kind).map((e) => getComputedStyle(e).boxShadow));
            return [spans.length, shadows('drafted'), shadows('own'), distinct(spans.map((e) => e.title))]""")
        assert seen[label][0] == TOKENS
        assert len(seen[label][1]) == 1
        assert seen[label][2] == ["none"]
        assert seen[label][3] == sorted([label.split()[0], "prefill", "target"])
    first, second = (found[1] for found in seen.values())
    assert first != second


def test_answers_are_filtered(opened: Opened) -> None:
    """By method, category, verdict and text; the counts are those of the records."""
    browser = opened()
    form = "#answer-filters"
    pick = lambda label: choose(browser, form, "method", option(browser, form, "method", label))  # noqa: E731
    pick("layer_skip · batch 1")
    assert texts(browser, "#answer-count") == [f"{ANSWERED} of {ANSWERED} answers"]
    assert len(texts(browser, ".card")) == 10
    browser.execute_script("[...document.querySelectorAll('#pager button')].at(-1).click()")
    assert len(texts(browser, ".card")) == ANSWERED - 10

    choose(browser, form, "category", TASKS[1])
    assert set(texts(browser, ".card header .muted")) == {"math reasoning"}
    assert len(texts(browser, ".card")) == QUESTIONS_PER_TASK
    choose(browser, form, "verdict", "near_tie")
    assert texts(browser, ".card h3") == ["Question 201"]
    choose(browser, form, "verdict", "")
    choose(browser, form, "search", "nearly")
    assert texts(browser, ".card h3") == ["Question 201"]
    choose(browser, form, "search", "no such words")
    assert texts(browser, ".card") == []
    choose(browser, form, "search", "QUESTION 2 OF")
    assert texts(browser, ".card h3") == ["Question 202"]
    assert f"{TOKENS} tokens" in texts(browser, ".card .turn-facts span")
    assert texts(browser, ".card .prompt") == ["Question 2 of math_reasoning: a < b?"]

    choose(browser, form, "category", "")
    choose(browser, form, "search", "")
    pick("prompt_lookup · batch 1")
    choose(browser, form, "verdict", "failed")
    assert texts(browser, ".card h3") == ["Question 302"]
    assert "RuntimeError: <simulated> failure" in texts(browser, ".card pre")[0]


def test_plain_beside_speculative(opened: Opened) -> None:
    """Both texts stand side by side; the first token that differs is marked in both."""
    browser = opened()
    form = "#answer-filters"
    choose(browser, form, "method", option(browser, form, "method", "layer_skip · batch 1"))
    choose(browser, form, "verdict", "near_tie")
    choose(browser, form, "beside", True)
    assert texts(browser, ".beside h4") == ["speculative", "plain"]
    ours, plain = texts(browser, ".tokens .differs")
    assert ours == " nearly"
    assert ours != plain
    choose(browser, form, "verdict", "identical")
    left, right = texts(browser, ".card:first-child .tokens")
    assert left == right
    assert texts(browser, ".differs") == []


def test_lossy_answers_are_no_bugs(opened: Opened) -> None:
    browser = opened()
    form = "#answer-filters"
    choose(browser, form, "method", option(browser, form, "method", "medusa_typical (lossy) · batch 1"))
    choose(browser, form, "verdict", "bug")
    assert "differs by design" in texts(browser, ".card .badge")
    assert "bug" not in texts(browser, ".card .badge")


def test_all_figures_are_filtered_and_sorted(opened: Opened) -> None:
    browser = opened()
    form = "#row-filters"
    methods = len(DRAFTERS) + 1 + 2  # one has two states
    assert len(texts(browser, "#rows tbody tr")) == 2 * 2 * methods, "all tasks as one, two subsets, two batch sizes"
    choose(browser, form, "setting", "batch 4")
    choose(browser, form, "subset", "non_looping")
    assert len(texts(browser, "#rows tbody tr")) == methods
    choose(browser, form, "task", "coding")
    assert set(texts(browser, "#rows tbody td:nth-of-type(2)")) == {"coding"}
    speeds = [float(text.rstrip("×")) for text in texts(browser, "#rows tbody td:nth-of-type(5)")]
    assert speeds == sorted(speeds, reverse=True)
    browser.execute_script("document.querySelector('#rows th[aria-sort=descending] button').click()")
    assert [float(text.rstrip("×")) for text in texts(browser, "#rows tbody td:nth-of-type(5)")] == sorted(speeds)
    browser.execute_script("document.querySelector('#rows thead button').click()")
    assert texts(browser, "#rows tbody th") == sorted(texts(browser, "#rows tbody th"))


def test_settings_are_switched(opened: Opened) -> None:
    """One at a time, by the radio buttons; links of the head lead into the one shown."""
    browser = opened()
    shown = "return [...document.querySelectorAll('.setting')].map((e) => !e.hidden)"
    assert browser.execute_script(shown) == [True, False]
    browser.execute_script("document.querySelectorAll('input[name=setting]')[1].click()")
    assert browser.execute_script(shown) == [False, True]
    place = "document.querySelector('.setting:not([hidden]) [data-name=time]').getBoundingClientRect().top"
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    browser.execute_script("document.querySelector('nav a[href=\"#time\"]').click()")
    assert 0 <= browser.execute_script(f"return {place}") < 120
