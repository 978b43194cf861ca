import base64
import io
import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic_runs import make_grid, make_run

from cifar_lab import summarize
from cifar_lab.run_dir import RunDir

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
    claims = [
        {
            "id": "S0-a",
            "metric": "test_accuracy",
            "value": 0.7,
            "source": "S0",
            "tolerance": 0.05,
            "where": {"choices.optimizer": "adam", "optimizer.lr": 0.01},
        }
    ]
    make_grid(folder, seeds=2, images=200, samples=True, study={"report": "S0", "claims": claims})
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


# --- the file -------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_reaches_for_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    addresses: list[str] = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            addresses.extend(v or "" for k, v in attrs if k in ("src", "href", "srcset", "action"))

    Finder().feed(text)
    assert addresses == ["data:,"]
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\((?!\$\{strip\}|data:)", text)
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|WebSocket|innerHTML", without_namespace)


def test_names_cannot_end_the_data(page: Path) -> None:
    assert page.read_text("utf-8").count("</script>") == 2
    failed = next(cell for cell in data_of(page)["cells"] if cell["status"] == "1 failed")
    assert failed["runs"][0]["error"].startswith("</script>")


def test_test_scores_are_the_best_cells_alone(page: Path) -> None:
    cells = data_of(page)["cells"]
    with_test = [cell for cell in cells if cell["scores"].get("test_accuracy")]
    assert [cell["rank"] for cell in with_test] == [1]
    splits = {cell["rank"]: cell["confusion"]["split"] for cell in cells if cell["confusion"]}
    assert splits == {rank: "test" if rank == 1 else "validation" for rank in range(1, 13)}


def test_thumbnails_are_the_stored_images(page: Path) -> None:
    best = data_of(page)["cells"][0]
    run = RunDir(page.parent / best["runs"][0]["folder"])
    arrays = run.read_arrays(run.samples_file)
    worst = arrays["images"][arrays["kind"] == "worst"]
    kind, text = best["mistakes"]["strip"].split(",", 1)
    assert kind == "data:image/png;base64"
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert (strip == np.concatenate(worst.transpose(0, 2, 3, 1), axis=1)).all()
    assert len(best["mistakes"]["items"]) == len(worst)


def test_settings_that_differ_from_the_best_cell(page: Path) -> None:
    cells = data_of(page)["cells"]
    assert cells[0]["difference"] == []
    other = next(c for c in cells if c["key"][0] == "sgd" and c["rank"])
    rows = {name: (here, best) for name, here, best in other["difference"]}
    assert rows["optimizer"] == ("sgd", "adam")
    assert rows["optimizer.momentum"] == ("0.9", "–")


def test_broken_samples_cost_their_pictures_only(tmp_path: Path) -> None:
    for seed, damage in enumerate((b"PK", None)):
        run = make_run(tmp_path, lr=0.1 * (seed + 1), samples=True)
        if damage is not None:
            run.samples_file.write_bytes(damage)
        else:
            run.write_arrays(
                run.samples_file, images=np.ones(1), labels=np.zeros(1), kind=np.array(["worst"])
            )
    assert summarize.main([str(tmp_path)]) == 0
    data = data_of(tmp_path / "report.html")
    assert [cell["mistakes"] for cell in data["cells"]] == [None, None]
    assert len(data["problems"]) == 2


# --- in a browser ---------------------------------------------------------------------------------


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
    "[...document.querySelectorAll('#cells tbody tr:not([hidden])')]"
    ".map(r => r.cells[0].textContent)"
)


@pytest.mark.browser
def test_sorting(page: Path, browse: Browse) -> None:
    steps = browse(
        page,
        f"const ranks = () => {RANKS}, found = [ranks()];"
        "const press = name => [...document.querySelectorAll('#cells th button')]"
        ".find(b => b.textContent === name).click();"
        "press('rank'); found.push(ranks()); press('val loss'); found.push(ranks());"
        "found.push([document.querySelector('[aria-sort]').textContent, location.hash]);"
        "return found",
    )
    ranks = [str(i) for i in range(1, 13)]
    assert steps[0] == [*ranks, "–"]
    assert steps[1] == [*reversed(ranks), "–"]  # what has no rank stays last
    cells = [cell for cell in data_of(page)["cells"] if cell["rank"]]
    by_loss = sorted(cells, key=lambda c: (c["scores"]["best_val_loss"]["value"], c["rank"]))
    assert steps[2] == [*(str(cell["rank"]) for cell in by_loss), "–"]
    assert steps[3][0] == "val loss"
    assert "sort=best_val_loss" in steps[3][1]


@pytest.mark.browser
def test_filtering_by_words_and_by_axis(page: Path, browse: Browse) -> None:
    steps = browse(
        page,
        f"const ranks = () => {RANKS}, found = [];"
        "const type = text => {const box = document.getElementById('filter'); box.value = text;"
        "box.dispatchEvent(new Event('input'))};"
        "type('adam relu'); found.push(ranks()); found.push(document.getElementById('shown')"
        ".textContent); found.push(document.querySelectorAll('#chart path:not(.out)').length);"
        "type(''); const menu = document.querySelector('[data-axis=\"optimizer.lr\"]');"
        "menu.value = '0.01'; menu.dispatchEvent(new Event('change')); found.push(ranks());"
        "type('no such cell'); found.push(ranks()); return found",
    )
    cells = data_of(page)["cells"]
    adam_relu = [str(c["rank"]) for c in cells if c["key"][:2] == ["adam", "ReLU"]]
    assert steps[0] == adam_relu
    assert steps[1] == f"{len(adam_relu)} of 13 cells"
    assert steps[2] == len(adam_relu)
    assert steps[3] == [str(c["rank"]) for c in cells if c["key"][2] == "0.01"]
    assert steps[4] == []


@pytest.mark.browser
def test_pointing_and_choosing_by_mouse_and_keys(page: Path, browse: Browse) -> None:
    found = browse(
        page,
        "const rows = document.querySelectorAll('#cells tbody tr'), found = {};"
        "rows[2].dispatchEvent(new PointerEvent('pointerenter'));"
        "found.hot = [...document.querySelectorAll('.hot')].map(n => n.tagName + n.dataset.cell);"
        "found.caption = document.getElementById('caption').textContent;"
        "rows[2].dispatchEvent(new PointerEvent('pointerleave'));"
        "const height = document.documentElement.scrollHeight;"
        "rows[3].focus();"
        "rows[3].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}));"
        "found.focus = document.activeElement.dataset.cell;"
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));"
        "found.detail = document.querySelector('#detail h3').textContent;"
        "found.matrix = document.querySelectorAll('.matrix tbody td').length;"
        "found.grew = document.documentElement.scrollHeight - height;"
        "document.querySelector('.square[data-cell=\"7\"]').click();"
        "found.second = document.querySelector('#detail h3').textContent;"
        "found.selected = [...document.querySelectorAll('tr[aria-selected=true]')]"
        ".map(r => r.dataset.cell);"
        "document.querySelector('#claims tbody tr').click();"
        "found.claim = document.querySelector('#detail h3').textContent;"
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}));"
        "found.slash = document.activeElement.id; return found",
    )
    labels = [f"{c['rank']}. {c['label']}" for c in data_of(page)["cells"] if c["rank"]]
    assert sorted(found["hot"]) == ["BUTTON2", "TR2", "path2"]
    assert found["caption"].startswith(data_of(page)["cells"][2]["label"])
    assert found["focus"] == "4"
    assert found["detail"] == labels[4]
    assert found["matrix"] == 100
    assert found["grew"] == 0
    assert (found["second"], found["selected"]) == (labels[7], ["7"])
    assert "optimizer=adam" in found["claim"]
    assert found["slash"] == "filter"


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 800, 1500])
def test_nothing_sticks_out_and_nothing_runs(page: Path, browse: Browse, width: int) -> None:
    found = browse(
        page,
        "return {wide: document.documentElement.scrollWidth - innerWidth, title: document.title,"
        "images: document.querySelectorAll('img').length,"
        "requests: performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(n => !n.startsWith('data:')),"
        "shown: [...document.querySelectorAll('#cells td')].some(t => t.textContent.startsWith("
        "'</' + 'script>'))}",
        width=width,
    )
    assert found["wide"] <= 0
    assert found["title"].endswith("· summary")
    assert (found["images"], found["requests"], found["shown"]) == (0, [], True)


@pytest.mark.browser
def test_the_address_brings_back_what_was_seen(page: Path, browse: Browse) -> None:
    found = browse(
        page,
        f"return [{RANKS}, document.querySelector('#detail h3').textContent]",
        address="#sort=rank&down=1&filter=adam&axis%3Aactivation=Tanh&cell=2",
    )
    cells = data_of(page)["cells"]
    expected = [str(c["rank"]) for c in cells if c["key"][:2] == ["adam", "Tanh"]]
    assert found[0] == expected[::-1]
    assert found[1].startswith("3. ")


@pytest.mark.browser
def test_a_page_without_a_finished_run_and_one_without_axes(tmp_path: Path, browse: Browse) -> None:
    for status in ("queued", "finished"):
        folder = tmp_path / status
        make_run(folder, status=status)
        assert summarize.main([str(folder)]) == 0
        shown = browse(
            folder / "report.html",
            "return [document.querySelectorAll('#cells tbody tr').length,"
            "document.getElementById('heat-section').hidden, document.querySelector('#detail h3')"
            ".textContent]",
        )
        assert shown[:2] == [1, True]
        assert shown[2].endswith("the one setting")
