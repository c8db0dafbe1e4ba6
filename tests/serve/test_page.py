"""The chat page in a real Chromium: what a person does, what a model may write, and what it costs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="driving the page takes `pip install playwright`")
pytest.importorskip("fastapi", reason="the server takes gemmakit[serve]")

from browsing import CHROMIUM, Script, refusal, scripted
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running_server import Running

from gemmakit.serve.settings import ServeSettings

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="driving the page takes a Chromium: apt-get install chromium")
expect.set_options(timeout=20_000)
WIDE, NARROW = {"width": 1200, "height": 800}, {"width": 360, "height": 640}
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted(Script()) as script:
        yield script


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a page in a browser that knows nothing yet. At the end: it asked its own server only, and nothing failed."""
    context = browser.new_context(viewport=WIDE)  # type: ignore[arg-type]
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    addresses, errors, homes = list[str](), list[str](), list[str]()

    def visit(url: str, viewport: Any = WIDE, failing: bool = False) -> Page:
        page = context.new_page()
        page.set_viewport_size(viewport)
        page.on("request", lambda request: addresses.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"a dialog: {dialog.message}"))
        if not failing:  # a status that says no is an error to the console
            page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        homes.append(url)
        page.goto(url)
        return page

    yield visit
    context.close()
    assert not errors
    away = [a for a in addresses if not a.startswith((*homes, "data:", "blob:"))]
    assert not away


def ask(page: Page, text: str, wait: bool = True) -> None:
    answers = page.locator(".assistant").count()
    page.fill("#input", text)
    page.keyboard.press("Enter")
    expect(page.locator(".assistant")).to_have_count(answers + 1)
    if wait:
        ended(page)


def ended(page: Page) -> None:
    expect(page.locator("#send")).to_have_text("Send")


def test_an_answer_streams_in_with_its_figures(visit: Visit, script: Script):
    script.answers["hello"], script.pause_s = "Hello, *you*. What would you like to know?", 0.02
    page = visit(script.url)
    ask(page, "hello")
    assert page.locator(".assistant .text").inner_text() == "Hello, you. What would you like to know?"
    assert re.search(
        r"\d+ tokens · [\d.]+ tokens/s · first after \d+ ms", page.locator(".assistant .under").inner_text()
    )
    assert page.title() == "hello"
    assert script.asked[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_the_demo_model_answers_and_tells_its_probabilities(visit: Visit, server: Running):
    page = visit(f"{server.url}/")
    page.click("#view")
    page.get_by_role("button", name="What is 34 + 58?").click()
    expect(page.locator(".assistant .tokens:not(.legend)")).to_have_text("34 + 58 = 92<end_of_turn>")
    expect(page.locator("#model")).to_have_text("gemmakit-demo")
    page.locator(".assistant .tokens:not(.legend) span").first.hover()
    expect(page.locator("#tip tr")).to_have_count(5)
    expect(page.locator(".assistant .under")).to_contain_text("tokens/s")


def test_a_key_is_asked_for_once_and_goes_with_the_tab(visit: Visit, serve: Callable[..., Running]):
    page = visit(f"{serve(ServeSettings(api_keys=('secret',))).url}/", failing=True)
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Escape")
    expect(page.locator("#model")).to_have_text("A key is needed")
    page.keyboard.press("Control+,")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Escape")
    expect(page.locator("#model")).to_have_text("gemmakit-demo")
    ask(page, "What is 34 + 58?")
    page.reload()
    ask(page, "Sort 41, 7, 23")
    expect(page.locator(".assistant .text")).to_have_text(["34 + 58 = 92", "7, 23, 41"])
    assert "secret" not in page.evaluate("() => JSON.stringify(localStorage)")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_what_was_said_and_the_server_learns_of_it(visit: Visit, script: Script, how: str):
    script.answers["long"], script.pause_s = "word " * 2000, 0.01
    page = visit(script.url)
    ask(page, "long", wait=False)
    expect(page.locator(".assistant .text")).to_contain_text("word word")
    page.keyboard.press("Escape") if how == "Escape" else page.click("#send")
    ended(page)
    assert "stopped" in page.locator(".assistant .under").inner_text()
    said = page.locator(".assistant .text").inner_text()
    script.pause_s = 0
    ask(page, "and?")
    assert script.left == 1
    assert script.asked[1]["messages"][1] == {"role": "assistant", "content": said} or said in str(script.asked[1])


def test_an_edit_and_a_retry_are_versions_beside_what_was_there(visit: Visit, script: Script):
    page = visit(script.url)
    ask(page, "one")
    ask(page, "two")
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("three")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .text")).to_have_text(["You said three."])
    ended(page)
    assert script.asked[-1]["messages"] == [{"role": "user", "content": "three"}]
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Version before").click()
    expect(page.locator(".user .body")).to_have_text(["one", "two"])
    page.locator(".assistant").last.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant").last).to_contain_text("2/2")
    assert script.asked[-1]["messages"] == script.asked[1]["messages"]


def test_a_reload_keeps_conversations_and_the_part_of_an_answer_it_broke(visit: Visit, script: Script):
    page = visit(script.url)
    ask(page, "first")
    page.click("#new")
    script.answers["long"], script.pause_s = "word " * 2000, 0.01
    ask(page, "long", wait=False)
    expect(page.locator(".assistant .text")).to_contain_text("word word word")
    page.reload()
    expect(page.locator(".assistant .under")).to_contain_text("broken off")
    expect(page.locator(".assistant .text")).to_contain_text("word word word")
    expect(page.locator("#talks li")).to_have_count(2)
    page.locator("#talks").get_by_role("button", name="first", exact=True).click()
    expect(page.locator(".assistant .text")).to_have_text("You said first.")


def test_code_is_copied_as_it_was_written(visit: Visit, script: Script):
    code = 'if a < b and c["x"] > 0:\n    return "<b>"  # \\*\n\n\tx'
    script.answers["code"] = f"Here:\n\n```python\n{code}\n```\nDone."
    page = visit(script.url)
    ask(page, "code")
    page.get_by_role("button", name="Copy the code").click()
    expect(page.get_by_role("button", name="Copy the code")).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == code
    assert page.locator(".code .k").all_inner_texts() == ["if", "and", "return"]


def test_the_token_view_shades_by_probability_and_tells_what_else_was_likely(visit: Visit, script: Script):
    script.answers["q"] = "one two three four five"
    page = visit(script.url)
    page.click("#view")
    ask(page, "q")
    assert script.asked[0]["logprobs"] is True
    assert script.asked[0]["top_logprobs"] == 5
    tokens = page.locator(".assistant .tokens:not(.legend) span")
    assert "".join(tokens.all_text_contents()) == "one two three four five"
    assert [tokens.nth(k).get_attribute("class") for k in range(5)] == ["p0", "p0", "p0", "p4", "p0"]
    tokens.nth(3).hover()
    assert page.locator("#tip td").all_text_contents() == ["␣else", "", "76.0 %", "␣four", "", "5.0 %"]
    page.mouse.move(5, 5)
    expect(page.locator("#tip")).to_be_hidden()
    page.locator(".tokens:not(.legend)").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip td").all_text_contents()[:3] == ["one", "", "97.0 %"]
    page.click("#view")
    expect(page.locator(".assistant .text")).to_have_text("one two three four five")


def test_html_scripts_and_links_in_an_answer_stay_text(visit: Visit, script: Script):
    script.answers["evil"] = (
        "<img src=x onerror=alert(1)><script>fetch('http://evil.invalid/')</script> <b>b</b> &amp;\n\n"
        "[a](javascript:alert(1)) [b](data:text/html,x) [c](//evil.invalid) [d](https://ok.invalid/x?y=1)\n\n"
        "![i](https://evil.invalid/i.png) **<i>x</i>**\n\n```html\n<script>alert(1)</script>\n```\n"
    )
    script.answers["names"] = "[x](https://user:secret@ok.invalid/) <a href=https://evil.invalid>y</a>"
    page = visit(script.url)
    ask(page, "evil")
    text = page.locator(".assistant .text").inner_text()
    for part in ("<img src=x onerror=alert(1)>", "</script> <b>b</b> &amp;", "[a](javascript:alert(1))", "<i>x</i>"):
        assert part in text
    body = page.locator(".assistant .text")
    assert body.locator("img, script, iframe, b, i, form, style, object").count() == 0
    hrefs = [link.get_attribute("href") for link in body.locator("a").all()]
    assert hrefs == ["http://evil.invalid/", "https://ok.invalid/x?y=1", "https://evil.invalid/i.png"]
    assert {link.get_attribute("rel") for link in body.locator("a").all()} == {"noopener noreferrer nofollow"}
    ask(page, "<img src=x onerror=alert(2)>")
    page.evaluate("() => draw()")


MARKDOWN = """# Title *with* `code`

A paragraph of **bold**, _slanted_, ***both***, ~~gone~~ and `a ** b`.
Second line with snake_case_name, __init__, 2 * 3 * 4 and https://example.org/a_(b), see.

1. one
   - inner *a*
   - inner b

     ```js
     let x = "y"; // z
     ```
2. two
lazy line
3) other

- [ ] open
- [x] done

| a | b \\| c |
|:--|--:|
| 1 | 2 |
text after

> quote
> - list
>
> more

---
```
open fence
# no heading
"""


def test_markdown_becomes_the_elements_it_names(visit: Visit, script: Script):
    page = visit(script.url)
    html: str = page.evaluate(
        "(text) => { const d = document.createElement('div'); render(d, text); return d.innerHTML }", MARKDOWN
    )
    for part in (
        "<h1>Title <em>with</em> <code>code</code></h1>",
        "<strong>bold</strong>, <em>slanted</em>, <strong><em>both</em></strong>, <del>gone</del>",
        " and <code>a ** b</code>",
        'snake_case_name, __init__, 2 * 3 * 4 and <a href="https://example.org/a_(b)"',
        '<ul><li><p>inner <em>a</em></p></li><li><p>inner b</p><div class="code">',
        "<li><p>two\nlazy line</p></li>",
        '<li class="task"><p>☐ open</p></li><li class="task"><p>☑ done</p></li>',
        '<th class="right">b | c</th>',
        "<blockquote><p>quote</p><ul><li><p>list</p></li></ul><p>more</p></blockquote><hr>",
        "open fence\n# no heading\n</code>",
    ):
        assert part in html


def test_a_growing_answer_shows_at_every_moment_what_a_whole_one_would(visit: Visit, script: Script):
    """Elements that are kept while a text grows are those that it would have been given at once."""
    page = visit(script.url)
    rng = random.Random(0)
    pieces = re.split(r"(?<=\n)", MARKDOWN)
    for _ in range(12):
        rng.shuffle(pieces)
        text = "".join(pieces)
        cuts = sorted({*rng.sample(range(len(text)), 60), len(text)})
        wrong = page.evaluate(
            """([text, cuts]) => {
                const grown = document.createElement("div");
                return cuts.filter((cut) => {
                    const whole = document.createElement("div");
                    render(grown, text.slice(0, cut));
                    render(whole, text.slice(0, cut));
                    return grown.innerHTML !== whole.innerHTML;
                });
            }""",
            [text, cuts],
        )
        assert wrong == [], text


@pytest.mark.parametrize(
    "text",
    ["**a " * 20000, "*a " * 20000, "_a " * 20000, "[" * 50000, "[a](" * 15000, "`" * 50001, "`a``b```" * 6000,
     ">" * 20000, "- " * 20000, "|" * 50000, "| a |\n|--|--|\n" * 3000, "# " + " " * 50000 + "x",
     "```" + " " * 50000 + "`",
     "-" + " " * 50000 + "x", "- - " + " " * 50000 + "x", "https://" + "(" * 50000, "\\" * 50000, "~~a " * 20000],
    ids=lambda text: repr(text[:6]),
)  # fmt: skip
def test_a_text_made_to_be_slow_is_drawn_in_time(visit: Visit, script: Script, text: str):
    page = visit(script.url)
    took = page.evaluate(
        """(text) => {
            const element = document.createElement("div"), start = performance.now();
            render(element, text);
            return performance.now() - start;
        }""",
        text,
    )
    assert took < 2000  # a bound for a machine that does other things; most take a few ms


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("lines", "Line {}: the quick brown fox jumps over **the lazy dog** and `code` follows.\n"),
        ("paragraphs", "Paragraph {}: the quick brown fox.\n\n"),
        ("code", "x_{} = function('text')  # remark\n"),
        ("list", "- Item {}: the quick brown fox\n"),
        ("tokens", "Line {}: the quick brown fox jumps over the lazy dog.\n"),
    ],
)
def test_a_thousand_lines_cost_a_frame_no_more_at_their_end(visit: Visit, script: Script, kind: str, line: str):
    """Drawing the newest piece and laying it out, both measured on the page that a person has open."""
    text = "".join(line.format(n) for n in range(1000))
    script.answers["much"] = f"```python\n{text}```" if kind == "code" else text
    page = visit(script.url)
    if kind == "tokens":
        page.click("#view")
    page.evaluate(
        """() => {
            window.costs = [];
            const plain = fill;
            fill = (...given) => {
                const start = performance.now();
                plain(...given);
                document.getElementById("scroll").scrollHeight;
                window.costs.push(performance.now() - start);
            };
        }"""
    )
    ask(page, "much", wait=False)
    expect(page.locator("#send")).to_have_text("Send", timeout=120_000)
    costs: list[float] = page.evaluate("() => window.costs")
    shown = page.locator(".assistant").inner_text()
    assert "999" in shown
    # A frame is 16.7 ms. The quicker ones of the later half, as other tests may have the processor in the midst of one.
    late = sorted(costs[len(costs) // 2 :])[len(costs) // 8]
    assert late < 16
    print(f"{kind}: {len(costs)} frames, median {sorted(costs)[len(costs) // 2]:.1f} ms, late {late:.1f} ms")


def test_a_refusal_and_a_broken_stream_are_told_and_can_be_retried(visit: Visit, script: Script):
    script.refusals = [refusal(429, "The queue is full.", **{"Retry-After": "3"})]
    page = visit(script.url, failing=True)
    ask(page, "again")
    expect(page.locator(".wrong")).to_contain_text("The queue is full. Try again in 3 s.")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant .text")).to_have_text("You said again.")
    ended(page)
    script.faults = {"half": 'data: {"error": {"message": "The engine failed."}}\n\n', "cut": ""}
    ask(page, "half")
    expect(page.locator(".assistant").last).to_contain_text("You said half.")
    expect(page.locator(".wrong")).to_contain_text("The engine failed.")
    ask(page, "cut")
    expect(page.locator(".wrong").last).to_contain_text("ended in the middle")
    script.refusals = [refusal(400, "No.")]
    ask(page, "nothing")
    ask(page, "next")
    roles = [m["role"] for m in script.asked[-1]["messages"]]
    assert roles == ["user", "assistant"] * 3 + ["user"]  # the question without an answer is left out


def test_a_server_that_is_not_there_is_told(visit: Visit, script: Script):
    page = visit(script.url, failing=True)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "hello?")
    expect(page.locator(".wrong")).to_contain_text("The server does not answer")


def test_settings_travel_and_what_is_empty_is_the_models_own(visit: Visit, script: Script):
    page = visit(script.url)
    ask(page, "plain")
    assert set(script.asked[0]) == {"model", "messages", "stream", "stream_options"}
    page.keyboard.press("Control+,")
    for label, value in {"Temperature": "0.5", "top_p": "0.9", "top_k": "40", "Max tokens": "12", "Seed": "0"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System message").fill("Be brief.")
    page.keyboard.press("Escape")
    page.reload()
    ask(page, "set")
    sent = script.asked[1]
    assert {k: sent[k] for k in ("temperature", "top_p", "top_k", "max_tokens", "seed")} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 12, "seed": 0,
    }  # fmt: skip
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_keyboard_does_it_all(visit: Visit, script: Script):
    page = visit(script.url)
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant")).to_have_count(1)
    ended(page)
    assert script.asked[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#empty")).to_be_visible()
    ask(page, "apples")
    page.keyboard.press("Control+k")
    page.keyboard.type("you said one")  # in the text, not in the title
    page.keyboard.press("Enter")
    expect(page.locator(".user .body")).to_have_text("one\ntwo")
    page.keyboard.press("Control+k")
    page.keyboard.type("dark")
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    page.locator("#scroll").click(position={"x": 3, "y": 300})
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()


def test_conversations_are_deleted_brought_back_exported_and_imported(visit: Visit, script: Script, tmp_path: Any):
    page = visit(script.url)
    ask(page, "keep me")
    page.locator("#talks li").hover()
    page.get_by_role("button", name="Delete keep me").click()
    expect(page.locator("#talks li")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#talks li")).to_have_count(1)
    page.keyboard.press("Control+,")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    file = tmp_path / "talks.json"
    download.value.save_as(file)
    content = json.loads(file.read_text())
    assert [node["text"] for node in content["conversations"][0]["nodes"]] == ["keep me", "You said keep me."]
    page.get_by_role("button", name="Delete all").click()
    content["conversations"].append(
        {"id": "x", "title": "broken", "nodes": [{"role": "user", "text": 1, "up": 5}], "leaf": 9}
    )
    file.write_text(json.dumps(content))
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(file)
    expect(page.locator("#talks li")).to_have_count(1)
    assert page.evaluate("() => localStorage.length") > 0


def test_thoughts_and_calls_are_shown_apart(visit: Visit, script: Script):
    call = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": '{"city": '}}
    script.extra["w"] = [
        {"reasoning_content": "They ask "}, {"reasoning_content": "for weather."},
        {"tool_calls": [call]}, {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
    ]  # fmt: skip
    page = visit(script.url)
    ask(page, "w")
    thought = page.locator("details.thought")
    assert thought.text_content() == "ThoughtThey ask for weather." and thought.get_attribute("open") is None
    assert page.locator(".assistant .code").inner_text().split("\n")[-1] == '{"city": "Oslo"}'
    assert "calls weather" in page.locator(".assistant .code").inner_text()


@pytest.mark.parametrize("capabilities", [[], ["thinking"]])
def test_a_model_that_can_is_told_to_think(visit: Visit, script: Script, capabilities: list[str]):
    script.capabilities = capabilities
    page = visit(script.url)
    expect(page.locator("#model")).to_have_text("scripted")
    page.get_by_role("button", name="Settings").click()
    field = page.get_by_label("Thinking")
    if capabilities:
        field.select_option("high")
    else:
        expect(field).to_be_hidden()
    page.get_by_role("button", name="Done").click()
    ask(page, "hello")
    assert script.asked[-1].get("reasoning_effort") == ("high" if capabilities else None)


def test_a_narrow_screen_holds_everything(visit: Visit, script: Script):
    script.answers["wide"] = (
        "```\n" + "x" * 400 + "\n```\n" + "y" * 400 + "\n\n|" + "a|" * 40 + "\n|" + "-|" * 40 + "\n"
    )
    page = visit(script.url, NARROW)
    ask(page, "wide")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= NARROW["width"]
    assert page.evaluate("() => document.getElementById('scroll').scrollWidth") <= NARROW["width"]
    expect(page.get_by_role("button", name="Settings")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="Settings").click()
    box = page.locator("#settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= NARROW["width"]


def test_everything_that_can_be_used_has_a_name_and_text_has_contrast(visit: Visit, script: Script):
    page = visit(script.url)
    page.click("#view")
    ask(page, "hello")
    for scheme in ("light", "dark"):
        page.evaluate("(scheme) => theme(scheme)", scheme)
        found = page.evaluate(
            """() => {
                const named = (e) => e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim();
                const usable = [...document.querySelectorAll("button, input, textarea, select")];
                const nameless = usable.filter((e) => !named(e));
                const style = getComputedStyle(document.documentElement);
                const light = (name) => {
                    const hex = style.getPropertyValue(name).trim();
                    const part = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
                    const [r, g, b] = part.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const contrast = (a, b) => {
                    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
                    return (x + 0.05) / (y + 0.05);
                };
                const pairs = [["--ink", "--paper"], ["--soft", "--paper"], ["--soft", "--panel"],
                    ["--accent", "--paper"], ["--on-accent", "--accent"], ["--wrong", "--wrong-wash"],
                    ["--comment", "--code"], ["--keyword", "--code"], ["--string", "--code"], ["--number", "--code"]];
                return [nameless.map((e) => e.outerHTML), pairs.filter(([a, b]) => contrast(a, b) < 4.5)];
            }"""
        )
        assert found == [[], []], scheme  # 4.5:1 is what WCAG asks of text


def test_the_page_is_one_small_file_whose_policy_names_its_own_script_alone(script: Script):
    import httpx

    answer = httpx.get(script.url)
    assert len(answer.content) < 62_000
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert answer.text.count("<script>") == answer.text.count("<style>") == 1
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", answer.text)
    assert "innerHTML" not in answer.text
