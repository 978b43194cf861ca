import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from synthetic_runs import make_grid, make_run

from cifar_lab import summarize

EVIL = "</script><script>document.title='evil'</script><img src=x onerror=document.title='evil'>"

Browse = Callable[..., Any]


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    make_grid(folder, seeds=2, images=200, samples=True)
    make_run(
        folder,
        optimizer="sgd",
        activation="Tanh",
        lr=1.0,
        status="failed",
        summary={"error": EVIL},
        choices={"model": "convnet", "optimizer": "sgd", "activation": EVIL},
    )
    assert summarize.main([str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(autouse=True)
def no_pictures(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `page` are drawn, before this."""
    monkeypatch.setattr(summarize, "_draw", lambda summary: [])


def test_the_page_is_one_file_that_reaches_for_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    addresses = re.findall(r'\b(?:src|href|srcset|action)="([^"]*)"', text)
    assert [address.partition(",")[0] for address in addresses] == [
        "data:",
        "data:image/png;base64",
    ]
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\((?!\$\{strip\}|data:)", text)
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|WebSocket|innerHTML", without_namespace)


def test_names_cannot_end_the_data_and_test_scores_are_the_best_settings_alone(page: Path) -> None:
    assert page.read_text("utf-8").count("</script>") == 2
    settings = data_of(page)["settings"]
    failed = next(setting for setting in settings if setting["status"] == "1 failed")
    assert failed["runs"][0]["error"].startswith("</script>")
    with_test = [setting for setting in settings if setting["scores"].get("test_accuracy")]
    assert [setting["rank"] for setting in with_test] == [1]


def test_runs_are_linked_with_their_pictures_and_a_warning_of_them_is_said_once(
    tmp_path: Path,
) -> None:
    """The addresses are relative, so that a folder that was moved keeps them."""
    for seed in range(2):
        warning = f"the accuracy 9{seed}.5 % is measured on 144 images"
        run = make_run(tmp_path / "a folder #1", seed=seed, summary={"warnings": [warning]})
        (run.path / "figures").mkdir()
        (run.path / "figures" / "curves.png").write_bytes(b"picture")
    assert summarize.main([str(tmp_path)]) == 0
    (setting,) = data_of(tmp_path / "report.html")["settings"]
    assert setting["warnings"] == ["the accuracy 90.5 % is measured on 144 images (2 of 2 runs)"]
    links = dict(setting["runs"][0]["links"])
    assert list(links) == ["folder", "curves", "config"]
    for address in links.values():
        assert address.startswith("./a%20folder%20%231/")
        assert (tmp_path / unquote(address)).exists()


def test_axes_that_follow_from_others_have_no_column(tmp_path: Path) -> None:
    """Label smoothing goes with the optimizer here, the learning rate does not."""
    for optimizer, decay in (("sgd", 0.0), ("adam", 0.1)):
        for lr in (0.1, 0.01):
            training = {"epochs": 5, "label_smoothing": decay}
            make_run(tmp_path, optimizer=optimizer, lr=lr, training=training)
    assert summarize.main([str(tmp_path)]) == 0
    assert "These follow from them: training.label_smoothing." in (
        tmp_path / "summary.md"
    ).read_text("utf-8")
    assert "training.label_smoothing" in (tmp_path / "summary.csv").read_text("utf-8")


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Open a page with a script at its end, in real Chromium; return what the script returns."""

    def open_page(page: Path, script: str, width: int = 1500, address: str = "") -> Any:
        copy = tmp_path / "page.html"
        probe = (
            "<script>addEventListener('load', () => {let result; try {result = (() => {"
            f"{script}"
            "})()} catch (error) {result = {error: String(error)}}"
            "const shown = document.createElement('pre'); shown.id = 'result';"
            "shown.textContent = JSON.stringify(result); document.body.append(shown)})</script>"
        )
        copy.write_text(page.read_text("utf-8").replace("</body>", probe + "</body>"), "utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update"]
        command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--window-size={width},1000", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run(
            [*command, f"{copy.as_uri()}{address}"], capture_output=True, text=True, timeout=120
        )
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
        assert found is not None, done.stderr[-2000:]
        text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        result = json.loads(text)
        assert not (isinstance(result, dict) and "error" in result), result
        return result

    return open_page


RANKS = (
    "[...document.querySelectorAll('#settings tbody tr:not([hidden])')]"
    ".map(r => r.cells[1].textContent)"
)


@pytest.mark.browser
def test_pointing_and_choosing_by_mouse_and_keys(page: Path, browse: Browse) -> None:
    found = browse(
        page,
        "const rows = document.querySelectorAll('#settings tbody tr'), found = {};"
        "rows[2].dispatchEvent(new PointerEvent('pointerenter'));"
        "found.hot = [...document.querySelectorAll('.hot')].map(n => n.tagName"
        " + n.dataset.setting);"
        "found.caption = document.getElementById('caption').textContent;"
        "rows[2].dispatchEvent(new PointerEvent('pointerleave'));"
        "const height = document.documentElement.scrollHeight;"
        "rows[3].focus();"
        "rows[3].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}));"
        "found.focus = document.activeElement.dataset.setting;"
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));"
        "found.detail = document.querySelector('#detail h3').textContent;"
        "found.grew = document.documentElement.scrollHeight - height;"
        "document.querySelector('.square[data-setting=\"7\"]').click();"
        "found.second = document.querySelector('#detail h3').textContent;"
        "found.selected = [...document.querySelectorAll('tr[aria-selected=true]')]"
        ".map(r => r.dataset.setting);"
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}));"
        "found.slash = document.activeElement.id; return found",
    )
    labels = [f"{c['rank']}. {c['label']}" for c in data_of(page)["settings"] if c["rank"]]
    assert sorted(found["hot"]) == ["BUTTON2", "TR2", "g2"]
    assert found["caption"].startswith(data_of(page)["settings"][2]["label"])
    assert found["focus"] == "4"
    assert found["detail"] == labels[4]
    assert found["grew"] == 0
    assert (found["second"], found["selected"]) == (labels[7], ["7"])
    assert found["slash"] == "filter"


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 1400])
def test_nothing_sticks_out_and_nothing_runs(page: Path, browse: Browse, width: int) -> None:
    found = browse(
        page,
        "const box = document.querySelector('#settings').parentNode.getBoundingClientRect();"
        "const verdict = document.querySelector('tr[data-setting=\"1\"] .verdict');"
        "return {wide: document.documentElement.scrollWidth - innerWidth, title: document.title,"
        "verdict: verdict.textContent, right: verdict.getBoundingClientRect().right - box.right,"
        "cut: Math.max(...[...document.querySelectorAll('#settings td.axis:not([hidden])')]"
        ".map(t => t.getBoundingClientRect().right)) - box.right,"
        "images: document.querySelectorAll('img').length,"
        "requests: performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(n => !n.startsWith('data:')),"
        "shown: [...document.querySelectorAll('#settings td')].some(t => t.textContent.startsWith("
        "'</' + 'script>'))}",
        width=width,
    )
    assert found["wide"] <= 0
    assert found["title"].endswith("· summary")
    assert (found["images"], found["requests"], found["shown"]) == (1, [], True)
    assert found["verdict"].startswith(("not told apart", "worse"))
    assert found["cut"] <= 0  # nor is an axis
    assert found["right"] <= 0  # the verdict stands beside the accuracy, in sight


@pytest.mark.browser
def test_the_address_brings_back_what_was_seen(page: Path, browse: Browse) -> None:
    settings = data_of(page)["settings"]
    label = settings[2]["label"]  # a rank may change, a name does not
    found = browse(
        page,
        f"return [{RANKS}, document.querySelector('#detail h3').textContent]",
        address=f"#sort=rank&down=1&filter=adam&axis%3Aactivation=Tanh&setting={quote(label)}",
    )
    expected = [str(c["rank"]) for c in settings if c["key"][:2] == ["adam", "Tanh"]]
    assert found[0] == expected[::-1]
    assert found[1].startswith("3. ")
