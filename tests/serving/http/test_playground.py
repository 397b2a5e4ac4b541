"""The page of the server, in a real browser."""

import contextlib
import http.server
import json
import math
import shutil
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest

from tests.helpers import EXPORT_OPTIONS

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

import bertgen_tf as bg  # noqa: E402

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver"
)
PAGE = Path(bg.__file__).parent / "serving/http/playground.html"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
TIMEOUT = 60


class Stub(http.server.ThreadingHTTPServer):
    """Answers as the server does, with what the tests put into its fields."""

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.models = [{"name": "m", "version": "1", "state": "AVAILABLE"}]
        self.signatures = ["serving_default", "beams", "attention", "generate_xla", "ids", "score"]
        self.requests = []  # (path, body)
        self.answers = {"serving_default": text_answer, "generate_xla": text_answer}
        self.answers |= {"beams": beams_answer, "attention": attention_answer}
        self.answers |= {"score": score_answer}

    def asked(self):
        """The signatures of all requests."""
        return [body["signature_name"] for _, body in self.requests]

    def handle_error(self, request, client_address):
        """Browsers hang up on what they no longer want."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        stub = self.server
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), {"Content-Security-Policy": POLICY})
        elif self.path == "/v1/models":
            self.reply(200, {"models": stub.models})
        else:
            self.reply(200, metadata(stub.signatures))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        inputs = body["inputs"]
        question = inputs["text"][0] if "text" in inputs else inputs["target"]
        answer = self.server.answers[body["signature_name"]](question)
        status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        self.reply(status, {"outputs": content} if status == 200 else content, headers)

    def reply(self, status, content, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def metadata(names):
    text = {"text": {"dtype": "DT_STRING"}}
    inputs = {"ids": {"input_ids": {}, "attention_mask": {}}, "score": {"source": {}, "target": {}}}
    signatures = {
        name: {"inputs": inputs.get(name, text), "outputs": text, "method_name": ""}
        for name in names
    }
    return {
        "model_spec": {"name": "m", "signature_name": "", "version": "1"},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def text_answer(text):
    return {"text": [f"<{text}>"], "score": [-0.25]}


def beams_answer(text):
    return {
        "text": [["one two three", "one four three", "one three", "one two three five"]],
        "score": [[-0.5, -1.0, -1.5, -3.0]],
    }


PROBABILITIES = [0.613, 0.2, 0.0174, 0.0004]


def score_answer(targets):
    return {"log_probability": [math.log(p) for p in PROBABILITIES[: len(targets)]]}


# "playing golf" -> "plays golf ."; distinct powers of two, so that each sum tells its parts.
SOURCE = ["[CLS]", "play", "##ing", "golf", "[SEP]", "", ""]
TARGET = ["[CLS]", "play", "##s", "golf", ".", ""]
WEIGHTS = [[2.0 ** -(1 + (t * 5 + s) % 11) for s in range(7)] for t in range(6)]
WEIGHTS[0][0] = 1.5  # the largest, of special tokens


def attention_answer(text):
    return {
        "text": ["plays golf."],
        "score": [-0.25],
        "source_tokens": [SOURCE],
        "target_tokens": [TARGET],
        "attention": [WEIGHTS],
    }


@pytest.fixture(scope="module")
def chrome():
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@contextlib.contextmanager
def running_stub(port=0):
    with Stub(port) as stub:
        thread = threading.Thread(target=stub.serve_forever, args=[0.02])
        thread.start()
        yield stub
        stub.shutdown()
        thread.join()


@pytest.fixture
def stub():
    with running_stub() as stub:
        yield stub


class Page:
    """The page as a user sees it."""

    def __init__(self, driver, url, size=(1280, 1000)):
        self.driver = driver
        driver.set_window_size(*size)
        driver.get("about:blank")  # a hash alone would load nothing
        driver.get_log("browser")
        driver.get(url)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).get_property("textContent")

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition):
        return WebDriverWait(self.driver, TIMEOUT, poll_frequency=0.02).until(lambda _: condition())

    def type(self, text):
        self.wait(lambda: self.find("#signature").is_enabled())
        self.find("#text").clear()
        self.find("#text").send_keys(text)

    def paste(self, text):
        """Any characters: send_keys knows only those of the first plane."""
        self.wait(lambda: self.find("#signature").is_enabled())
        self.script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            self.find("#text"),
            text,
        )

    def settle(self):
        """Waits until everything asked for is there."""
        self.wait(lambda: self.text("#output") and self.text("#status") == "")

    def heat_map(self):
        """Row words, column words, values [rows, columns]."""
        return self.script(
            """const words = (cells) => [...cells].map((cell) => cell.textContent);
            const value = (cell) => Number(cell.style.getPropertyValue('--a'));
            const rows = [...document.querySelectorAll('#map tbody tr')];
            return [words(document.querySelectorAll('#map tbody th')),
                    words(document.querySelectorAll('#map thead th')),
                    rows.map((row) => [...row.querySelectorAll('td')].map(value))]"""
        )

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


def test_generates_while_typing(chrome, stub):
    page = Page(chrome, stub.url)
    page.type("a first line\nand a second")
    page.settle()
    assert page.text("#output") == "<a first line\nand a second>"
    assert page.text("#facts").startswith("score −0.250 · answered in ")
    assert page.errors() == []
    path, body = stub.requests[-4]
    assert path == "/v1/models/m:predict"
    assert body == {
        "signature_name": "serving_default",
        "inputs": {"text": ["a first line\nand a second"]},
    }
    assert stub.asked()[-4:] == ["serving_default", "beams", "score", "attention"]
    assert len(stub.requests) < 20  # for pauses, not for keys

    page.find("#text").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    page.wait(lambda: page.text("#output") == "")
    assert not page.find("#map").is_displayed()


def test_generates_when_told(chrome, stub):
    page = Page(chrome, stub.url)
    page.type("")
    page.find("#live").click()
    page.find("#text").send_keys("one")
    assert page.script(
        "return new Promise((done) => setTimeout(() => done(true), 2 * TYPING_PAUSE))"
    )
    assert stub.requests == []
    page.find("#generate").click()
    page.wait(lambda: page.text("#output") == "<one>")
    page.find("#text").send_keys(" two", Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.text("#output") == "<one two>")

    # Half a character, which no UTF-8 has.
    page.script("document.getElementById('text').value = 'x\\ud83d'; generate()")
    page.wait(lambda: page.text("#output") == "<x\ufffd>")


def test_old_answer_stays_away(chrome, stub):
    arrived, go_on, sent = threading.Event(), threading.Event(), threading.Event()

    def answer(text):
        if text == "old":
            arrived.set()
            go_on.wait(TIMEOUT)
            sent.set()
        return text_answer(text)

    stub.answers["serving_default"] = answer
    page = Page(chrome, stub.url)
    page.paste("old")
    assert arrived.wait(TIMEOUT)
    page.paste("new")
    page.wait(lambda: page.text("#output") == "<new>")
    go_on.set()
    assert sent.wait(TIMEOUT)
    page.script("return ask('v1/models', new AbortController().signal).then(() => null)")
    page.settle()
    assert page.text("#output") == "<new>"
    others = [name for name in stub.asked() if name != "serving_default"]
    assert others == ["beams", "score", "attention"]


def test_signatures(chrome, stub):
    stub.models.append({"name": "a/b c", "version": "7", "state": "AVAILABLE"})
    stub.signatures.append("brief")
    stub.answers["generate_xla"] = lambda text: {"text": ["compiled"], "score": [-2]}
    page = Page(chrome, stub.url)
    page.type("text")
    options = [option.text for option in Select(page.find("#signature")).options]
    assert options == [
        "the best text",
        "the best text, with attention",
        "all candidates",
        "settings “brief”",
        "the best text (compiled)",
    ]
    Select(page.find("#signature")).select_by_value("generate_xla")
    page.wait(lambda: page.text("#output") == "compiled")
    Select(page.find("#model")).select_by_visible_text("a/b c, version 7")
    page.wait(lambda: stub.requests[-1][0] == "/v1/models/a%2Fb%20c:predict")
    page.wait(lambda: "a%2Fb" in chrome.current_url)

    again = Page(chrome, chrome.current_url)
    again.type("text")
    again.wait(lambda: again.text("#output") == "compiled")
    assert stub.requests[-1][0] == "/v1/models/a%2Fb%20c:predict"


def test_several_hypotheses_of_the_signature(chrome, stub):
    page = Page(chrome, stub.url + "#signature=beams")
    page.paste("text")
    page.settle()
    assert page.text("#output") == "one two three"
    assert stub.asked() == ["beams", "score", "attention"]  # one request for both places
    assert len(page.all("#beams li")) == 4


def test_beams(chrome, stub):
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    answer = beams_answer("")
    cards = page.all("#beams li")
    texts = [page.text(f"#beams li:nth-child({i + 1}) .hypothesis") for i in range(4)]
    assert texts == answer["text"][0]
    shares = page.script(
        "return [...document.querySelectorAll('#beams .bar > div')].map((bar) => "
        "bar.getBoundingClientRect().width / bar.parentNode.getBoundingClientRect().width)"
    )
    assert shares == pytest.approx(PROBABILITIES, abs=0.01)
    (asked,) = [body["inputs"] for _, body in stub.requests if body["signature_name"] == "score"]
    assert asked == {"source": ["text"] * 4, "target": texts}
    for card, line in zip(
        cards,
        [
            "1. 61 % · score −0.500",
            "2. 20 % · score −1.000",
            "3. 1.7 % · score −1.500",
            "4. < 0.1 % · score −3.000",
        ],
        strict=True,
    ):
        assert card.text.startswith(line)
    marks = [[mark.text for mark in card.find_elements(By.TAG_NAME, "mark")] for card in cards]
    assert marks == [[], ["four"], [], ["five"]]
    gaps = [gap.get_attribute("title") for gap in page.all("#beams li .gap")]
    assert gaps == ["here the best has: two"]


def test_candidates_without_probabilities(chrome, stub):
    stub.signatures.remove("score")
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    first = page.find("#beams li")
    assert first.text.startswith("1. score −0.500")
    assert first.find_elements(By.CLASS_NAME, "bar") == []


def test_begins_with_a_model_that_has_examples(chrome, stub):
    examples = ["one, two", "three; " + "and more " * 20]
    about = {"description": "Splits sentences.", "examples": examples}
    stub.models.append({"name": "n", "version": "3", "state": "LOADING", "metadata": about})
    page = Page(chrome, stub.url)
    page.wait(lambda: page.text("#status") == "Waiting for n, version 3 (LOADING) …")
    assert page.find("#about").text == "Splits sentences."
    assert stub.requests == []
    stub.models[1]["state"] = "AVAILABLE"
    page.wait(lambda: page.find("#signature").is_enabled())
    buttons = page.all("#examples button")
    assert [button.get_attribute("title") for button in buttons] == examples
    page.find("#live").click()  # a click is no typing
    for button, text in zip(buttons, examples, strict=True):
        button.click()
        page.wait(lambda text=text: page.text("#output") == f"<{text}>")
    assert {path for path, _ in stub.requests} == {"/v1/models/n:predict"}

    Select(page.find("#model")).select_by_value("m")
    page.wait(lambda: not page.find("#about").is_displayed())
    assert not page.find("#examples").is_displayed()


@pytest.mark.parametrize("about", [None, {"description": 3, "examples": "abc"}, {"examples": [1]}])
def test_metadata_of_others(chrome, stub, about):
    stub.models[0]["metadata"] = about
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    assert not page.find("#about").is_displayed() and not page.find("#examples").is_displayed()
    assert page.errors() == []


def test_heat_map(chrome, stub):
    page = Page(chrome, stub.url)
    page.paste("playing golf")
    page.settle()
    rows, columns, values = page.heat_map()
    assert rows == ["[CLS]", "plays", "golf", "."]
    assert columns == ["[CLS]", "playing", "golf", "[SEP]"]
    merged = [
        [
            sum(WEIGHTS[t][s] for t in of_row for s in of_column) / len(of_row)
            for of_column in ([0], [1, 2], [3], [4])
        ]
        for of_row in ([0], [1, 2], [3], [4])
    ]
    assert values == [pytest.approx(row) for row in merged]
    cell = page.find("#map tbody tr:nth-child(2) td:nth-child(3)")
    assert cell.get_attribute("title") == f"plays → playing: {merged[1][1]:.3f}"
    assert page.text("#most") == f"{max(map(max, merged)):.2f}"
    special = [word.text for word in page.all("#map th.special")]
    assert special == ["[CLS]", "[SEP]", "[CLS]"]

    page.find("#plain").click()
    assert [word.text for word in page.all("#map tbody th") if word.is_displayed()] == rows[1:]
    inner = [row[1:3] for row in merged[1:]]
    assert page.text("#most") == f"{max(map(max, inner)):.2f}"
    assert page.errors() == []


def test_heat_map_points_at_words(chrome, stub):
    page = Page(chrome, stub.url)
    page.paste("playing golf")
    page.settle()

    def share(word):
        return float(page.script("return arguments[0].style.getPropertyValue('--share')", word))

    plays, golf = page.all("#target > span")[1:3]
    source = page.all("#source > span")
    webdriver.ActionChains(chrome).move_to_element(golf).perform()
    assert golf.get_attribute("aria-selected") == "true"
    values = page.heat_map()[2][2]
    most = max(values[1:3])
    assert [share(word) for word in source] == pytest.approx(
        [0, values[1] / most, values[2] / most, 0]
    )
    assert page.text("#looked").startswith("golf ← ")
    assert [cell.text for cell in page.all("#map th.on")] == ["golf"]

    webdriver.ActionChains(chrome).move_to_element(page.find("h1")).perform()
    assert page.text("#looked") == ""
    page.script("arguments[0].focus()", plays)
    assert page.text("#looked").startswith("plays ← ")
    plays.send_keys(Keys.ARROW_RIGHT)
    assert page.text("#looked").startswith("golf ← ")

    cell = page.find("#map tbody tr:nth-child(2) td:nth-child(4)")
    webdriver.ActionChains(chrome).move_to_element(cell).perform()
    assert [cell.text for cell in page.all("#map th.on")] == ["golf", "plays"]


def test_sentence_pieces(chrome, stub):
    source = ["<s>", "▁", "(", "a", "▁bird", "s", "<0xE2>", "<0x82>", "<0xAC>", "</s>"]
    stub.answers["attention"] = lambda text: {
        "source_tokens": [source],
        "target_tokens": [["▁##", "##", "</s>"]],
        "attention": [[[0.1] * 10, [0.2] * 10, [0.3] * 10]],
    }
    page = Page(chrome, stub.url)
    page.paste("(a birds€")
    page.settle()
    rows, columns, values = page.heat_map()
    assert rows == ["####", "</s>"]
    assert columns == ["<s>", "(a", "birds€", "</s>"]
    assert values[0] == pytest.approx([0.15, 0.45, 0.75, 0.15])


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Pläying golf", None),
        ("playing golf ...", None),  # perhaps a tokenizer leaves these out
        ("unknown words, playing golf and more", None),
        ("[CLS] playing golf [SEP]", None),  # read as what they are
        ("Pläying golf for ever", "“… playing golf”"),
    ],
)
def test_tells_what_was_cut(chrome, stub, text, cut):
    page = Page(chrome, stub.url)
    page.paste(text)
    page.settle()
    assert page.find("#cut").is_displayed() == bool(cut)
    assert not cut or cut in page.text("#cut")


NASTY = "it's \"q\" \\ \\n $HOME `id` !x %s\n\tline é ☃ 😀 \x01 '' @file"


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_line(chrome, stub):
    chrome.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page = Page(chrome, stub.url)
    page.paste(NASTY)
    page.settle()
    sent = stub.requests[0]
    page.find("#copy").click()
    page.wait(lambda: page.text("#copied") == "Copied.")
    line = page.script("return navigator.clipboard.readText()")
    assert line == page.text("#curl")
    answer = subprocess.run(["sh", "-c", line], capture_output=True, check=True, timeout=TIMEOUT)
    assert json.loads(answer.stdout) == {"outputs": text_answer(NASTY)}
    assert stub.requests[-1] == sent


@pytest.mark.parametrize("secure", [True, False])
def test_copies(chrome, stub, secure):
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    if not secure:  # as a page from another machine sees it
        page.script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.find("#copy").click()
    page.wait(lambda: page.text("#copied") == "Copied.")


def test_markup_stays_text(chrome, stub):
    attack = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    stub.models[0]["version"] = attack
    stub.models[0]["metadata"] = {"description": attack, "examples": [attack]}
    stub.signatures.append(attack)
    stub.answers["serving_default"] = lambda text: {"text": [text], "score": [-1]}
    stub.answers["beams"] = lambda text: {"text": [[text, f"{text} {attack}"]], "score": [[0, -1]]}
    stub.answers["attention"] = lambda text: {
        "source_tokens": [["[CLS]", attack]],
        "target_tokens": [[attack]],
        "attention": [[[0.5, 0.5]]],
    }
    page = Page(chrome, stub.url)
    page.paste(attack)
    page.settle()
    assert page.text("#output") == attack
    assert page.text("#beams li:nth-child(2) .hypothesis") == f"{attack} {attack}"
    assert page.heat_map()[:2] == [[attack], ["[CLS]", attack]]
    assert attack in page.text("#signature")
    stub.answers["beams"] = lambda text: (500, {"error": attack}, {})
    page.find("#generate").click()
    page.wait(lambda: attack in page.text("#beams .message"))
    stub.answers["serving_default"] = lambda text: (500, {"error": attack}, {})
    page.find("#generate").click()
    page.wait(lambda: attack in page.text("#status"))
    assert page.script("return window.hit") is None
    assert len(page.all("script")) == 1 and page.all("img") == []


def test_busy_server(chrome, stub):
    replies = [(503, {"error": "a queue is full"}, {"Retry-After": "2"})]
    stub.answers["serving_default"] = lambda text: replies.pop() if replies else text_answer(text)
    page = Page(chrome, stub.url)
    page.paste("text")
    page.wait(lambda: page.text("#status"))
    page.wait(lambda: "trying again in 2 s. a queue is full" in page.text("#status"))
    page.wait(lambda: "trying again in 1 s." in page.text("#status"))
    page.settle()
    assert page.text("#output") == "<text>"
    assert stub.asked()[:2] == ["serving_default"] * 2


def test_errors(chrome, stub):
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    stub.answers["serving_default"] = lambda text: (400, {"error": "what is it?"}, {})
    page.paste("other")
    page.wait(lambda: page.text("#status") == "what is it? (HTTP 400)")
    assert page.text("#output") == "" and not page.find("#map").is_displayed()
    stub.answers["serving_default"] = text_answer
    stub.signatures.append("new")  # of another version
    stub.answers["beams"] = lambda text: (504, {"error": "too slow"}, {})
    page.find("#generate").click()
    page.settle()
    assert page.text("#output") == "<other>"
    assert "new" in page.text("#signature")
    assert page.text("#beams .message") == "too slow (HTTP 504)"
    assert not page.find("#beams ol").is_displayed() and page.find("#map").is_displayed()


def test_older_export(chrome, stub):
    stub.signatures = ["serving_default"]
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    assert page.text("#output") == "<text>"
    for panel, what in {"beams": "candidates", "attention": "attention"}.items():
        message = page.find(f"#{panel} .message").text
        assert message == f"This model was exported without {what}."
    assert stub.asked() == ["serving_default"]


def test_closed_panels_ask_nothing(chrome, stub):
    page = Page(chrome, stub.url)
    page.find("#beams summary").click()
    page.find("#attention summary").click()
    page.paste("text")
    page.settle()
    assert stub.asked() == ["serving_default"]
    page.find("#attention summary").click()
    page.wait(lambda: page.find("#map").is_displayed())
    assert "beams" not in stub.asked()


def test_model_that_still_loads(chrome, stub):
    stub.models[0]["state"] = "LOADING"
    page = Page(chrome, stub.url)
    page.wait(lambda: page.text("#status") == "Waiting for m, version 1 (LOADING) …")
    stub.models[0]["state"] = "AVAILABLE"
    page.paste("text")
    page.wait(lambda: page.text("#output") == "<text>")


def test_model_that_cannot_load(chrome, stub):
    stub.models[0] |= {"state": "END", "status": {"error_message": "a file is missing"}}
    page = Page(chrome, stub.url)
    page.wait(lambda: page.text("#status") == "m, version 1 (END): a file is missing")
    stub.models.append({"name": "other", "version": "2", "state": "AVAILABLE"})
    page.wait(lambda: "other" in page.text("#model"))
    Select(page.find("#model")).select_by_value("other")
    page.wait(lambda: page.find("#signature").is_enabled())


def test_server_that_went_away(chrome):
    with running_stub() as stub:
        page = Page(chrome, stub.url)
        page.paste("text")
        page.settle()
    page.paste("more")
    page.wait(lambda: page.text("#status").startswith("No answer from 127.0.0.1"))
    with running_stub(stub.server_address[1]):
        page.find("#generate").click()
        page.wait(lambda: page.text("#output") == "<more>")


def test_narrow_window(chrome, stub):
    long = "a" * 300
    size = 64
    stub.models[0]["name"] = long
    stub.answers["serving_default"] = lambda text: {"text": [long], "score": [-1]}
    stub.answers["beams"] = lambda text: {"text": [[long, f"{long} b"]], "score": [[0, -1]]}
    stub.answers["attention"] = lambda text: {
        "source_tokens": [["[CLS]", long, *(f"s{i}" for i in range(2 * size))]],
        "target_tokens": [["[CLS]", long, *(f"t{i}" for i in range(size))]],
        "attention": [[[0.01] * (2 * size + 2)] * (size + 2)],
    }
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = Page(chrome, stub.url)
        page.paste(long)
        page.settle()
        assert page.script("return window.innerWidth") == 360
        assert page.script("return document.documentElement.scrollWidth") <= 360
        # All of the map is there, and nothing of it needs scrolling sideways.
        left, right, narrowest, rows, clipped = page.script(
            "const cells = [...document.querySelectorAll('#map tbody td')]"
            "  .map((cell) => cell.getBoundingClientRect());"
            "const all = ['left', 'right', 'width'].map((side) => cells.map((cell) => cell[side]));"
            "const boxes = [document.body, ...document.querySelectorAll('#attention, #whole')];"
            "return [Math.min(...all[0]), Math.max(...all[1]), Math.min(...all[2]),"
            "  document.querySelectorAll('#map tbody tr').length,"
            "  boxes.some((box) => box.scrollWidth > box.clientWidth)]"
        )
        assert 0 < left < right < 360 and narrowest > 1
        assert rows == size + 2 and not clipped
    finally:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_names_for_screen_readers(chrome, stub):
    page = Page(chrome, stub.url)
    page.paste("text")
    page.settle()
    controls = "textarea, select, button, input, summary, [tabindex='0'], table"
    names = [element.accessible_name for element in page.all(controls)]
    assert all(names) and len(names) == 12
    assert page.find("#output").get_attribute("aria-live") == "polite"
    for word in page.all("[role='img']"):
        assert word.accessible_name


@pytest.fixture(scope="module")
def server(shared_export):
    """The model behind a real server, and the server's address."""
    uvicorn = pytest.importorskip("uvicorn")
    for package in ("prometheus_client", "starlette"):
        pytest.importorskip(package)
    from bertgen_tf.serving.exports import Models
    from bertgen_tf.serving.http.app import ServingApp

    model, path = shared_export
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(ServingApp(Models(path)), lifespan="on", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield model, f"http://127.0.0.1:{listener.getsockname()[1]}/"
    running.should_exit = True
    thread.join()


def ask(url, signature, text):
    inputs = text if isinstance(text, dict) else {"text": [text]}
    body = json.dumps({"signature_name": signature, "inputs": inputs}).encode()
    with urllib.request.urlopen(f"{url}v1/models", timeout=TIMEOUT) as answer:
        (entry,) = json.load(answer)["models"]
    path = f"v1/models/{entry['name']}:predict"
    with urllib.request.urlopen(url + path, body, timeout=TIMEOUT) as answer:
        return json.load(answer)["outputs"]


def words_of(tokens):
    """[(word, indices of its pieces)], of WordPiece."""
    found = []
    for i, token in enumerate(tokens):
        if token.startswith("##") and found:
            found[-1] = (found[-1][0] + token[2:], [*found[-1][1], i])
        elif token:
            found.append((token, [i]))
    return found


@pytest.mark.slow
def test_real_server(chrome, server):
    model, url = server
    settings = {**EXPORT_OPTIONS, "num_return_sequences": 3, "jit_compile": False}
    page = Page(chrome, url)
    outputs = set()
    for text in ("the old man sang birds", "a young woman"):
        page.paste(text)
        hypotheses = model.generate(text, **settings)
        page.wait(lambda best=hypotheses[0]: page.text("#output") == best)
        page.settle()
        outputs.add(hypotheses[0])
        answer = ask(url, "beams", text)
        assert f"score {answer['score'][0][0]:.3f} ".replace("-", "−") in page.text("#facts")
        cards = page.all("#beams li")
        for card, hypothesis, score in zip(cards, hypotheses, answer["score"][0], strict=True):
            assert card.find_element(By.CLASS_NAME, "hypothesis").text == hypothesis
            assert f"score {score:.3f} ".replace("-", "−") in f"{card.text.splitlines()[0]} "
        texts = [card.find_element(By.CLASS_NAME, "hypothesis").text for card in cards]
        inputs = {"source": [text] * 3, "target": texts}
        for card, log in zip(cards, ask(url, "score", inputs)["log_probability"], strict=True):
            bar = card.find_element(By.CSS_SELECTOR, ".bar > div").get_attribute("style")
            assert float(bar.split()[1].rstrip("%;")) == pytest.approx(
                100 * math.exp(log), rel=1e-3
            )

        answer = ask(url, "attention", text)
        rows, columns, values = page.heat_map()
        of_rows, of_columns = (
            words_of(answer[f"{side}_tokens"][0]) for side in ("target", "source")
        )
        assert rows == [word for word, _ in of_rows]
        assert columns == [word for word, _ in of_columns] == text.split()
        weights = answer["attention"][0]
        for row, (_, of_row) in zip(values, of_rows, strict=True):
            assert row == pytest.approx(
                [
                    sum(weights[t][s] for t in of_row for s in of_column) / len(of_row)
                    for _, of_column in of_columns
                ]
            )
            assert sum(row) == pytest.approx(1)
    assert len(outputs) == 2

    page.paste("the old man " * 20)
    page.wait(lambda: page.find("#cut").is_displayed())
    page.paste(NASTY)
    page.wait(lambda: not page.find("#cut").is_displayed())
    page.settle()
    if shutil.which("curl"):
        line = ["sh", "-c", page.text("#curl")]
        answer = subprocess.run(line, capture_output=True, check=True, timeout=TIMEOUT)
        assert json.loads(answer.stdout)["outputs"]["text"] == [page.text("#output")]
    assert page.errors() == []
