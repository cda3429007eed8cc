"""The page: complete, of one file, safe against names, small; what is absent is named with the reason."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slrnet.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from slrnet.cli.main import main
from slrnet.config import Config, apply_overrides
from slrnet.evaluation.examine import Bins, GammaSweep
from slrnet.recipes import get_recipe
from slrnet.tools.report import runs
from slrnet.tools.report.charts import Chart, Series, draw_chart
from slrnet.tools.report.measurements import Measurements, gamma_advice
from slrnet.tools.report.page import MAX_BYTES, render
from slrnet.tools.report.runs import find_records, read_run, training_command, val_key
from slrnet.tracking.protocol import RunHandle


class Elements(HTMLParser):
    """Start tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def assert_loads_nothing(text: str) -> None:
    without_pictures = re.sub(r"data:image/webp;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_pictures)
    for _, attributes in Elements(text).found:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "default-src 'none'" in text


def saved(folder: Path, source: Path, **changes: Any) -> Path:
    """A run with the checkpoint of another one, some of its state and configuration changed."""
    checkpoint = load_checkpoint(source)
    config = checkpoint.config.model_copy(update=changes.pop("config", {}))
    state = replace(checkpoint.state, **changes)
    save_checkpoint(folder / "checkpoints", config=config, state=state, model=checkpoint.model, optimizer={})
    return folder


@pytest.fixture(scope="module")
def text(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(tiny_run), "--out", str(out), "--images", "2"]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


class TestPage:
    @pytest.mark.slow
    def test_it_loads_nothing_and_is_small(self, text: str) -> None:
        assert_loads_nothing(text)
        assert len(text.encode()) < MAX_BYTES

    def test_its_figures_are_the_checkpoints(self, text: str, tiny_run: Path) -> None:
        checkpoint = load_checkpoint(tiny_run)
        for name, key in (("ant", "val/iou/ant"), ("ant", "pseudo_mask/iou/ant"), ("cat", "val/fnr/cat")):
            row = re.search(rf"<tr><td data-value=\"{name}\">.*?</tr>", text)
            assert row
            assert f'data-value="{checkpoint.state.metrics[key]}"' in row[0]
        assert f"{100 * checkpoint.state.metrics[val_key(checkpoint.config)]:.1f} % (ss)" in text

    def test_every_section_has_its_content_and_protocol(self, text: str) -> None:
        elements = Elements(text)
        pictures = [attributes["alt"] or "" for attributes in elements.of("img")]
        for kind in ("prediction of val_", "truth of val_", "code maps of val_", "epoch 1", "epoch 2"):
            assert any(alt.startswith(kind) for alt in pictures), kind
        assert len(elements.of("input")) == 2  # evaluation.panel_images
        protocol = "fused 2 views, refined, gated by image labels"
        charts = re.findall(r"<figure class=\"chart\">.*?</figure>", text, re.DOTALL)
        assert len(charts) == 7
        notes = [re.search(r'<p class="protocol">(.+?)</p>', chart) for chart in charts]
        assert all(notes)
        assert protocol in text
        assert 'class="advice"' in text
        assert "out of reach" in text  # of the MLflow run
        assert elements.of("table")[0]["class"] == "sortable"

    def test_rows_of_the_confusion_matrix_add_up(self, text: str) -> None:
        matrix = re.search(r'<table class="matrix">.*?</table>', text, re.DOTALL)
        assert matrix
        for row in re.findall(r"<tr><td>.*?</tr>", matrix[0]):
            shares = [float(share) for share in re.findall(r"--share: ([\d.]+)", row)]
            assert sum(shares) == pytest.approx(1, abs=0.005)


def test_hostile_names_stay_text(tiny_run: Path, write_tiny: Any, tmp_path: Path) -> None:
    script, breakout = "<script>alert(1)</script>", "x\"'><img src=//evil onerror=alert(1)>"
    classes = ("background", script, breakout, "</svg></style>")
    shards = write_tiny(tmp_path / "shards", classes=classes)
    folder = saved(tmp_path / 'run"><b onclick=alert(1)>', tiny_run, classes=classes)
    panels = folder / "panels"
    panels.mkdir()
    Image.new("RGB", (9, 9)).save(panels / "<i>key<&>-epoch-001.png")
    assert main(["report", str(folder), "--data", str(shards.folder), "--out", str(tmp_path / "out.html")]) == 0
    elements = Elements((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert len(elements.of("script")) == 1
    assert not elements.of("i")
    assert all((attributes["src"] or "").startswith("data:") for attributes in elements.of("img"))
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert script in elements.text
    assert breakout in elements.text


class TestAbsent:
    def test_without_data_panels_and_mlflow(self, tiny_run: Path, tiny_config: Config, tmp_path: Path) -> None:
        nowhere = tiny_config.data.model_copy(update={"path": str(tmp_path / "gone")})
        folder = saved(tmp_path / "bare", tiny_run, metrics={}, config={"data": nowhere})
        assert main(["report", str(folder), "--out", str(tmp_path / "out.html")]) == 0
        text = (tmp_path / "out.html").read_text(encoding="utf-8")
        assert text.count("the training&#39;s data are not here; give their folder with --data") == 5
        assert "there is no folder panels with pictures and no MLflow run can be reached" in text
        assert "neither pseudo masks nor validation masks were measured" in text
        assert text.count("not measured in this run") == 3  # pseudo masks, validation, losses
        assert_loads_nothing(text)

    def test_without_masks(self, tiny_run: Path, write_tiny: Any, tmp_path: Path) -> None:
        shards = write_tiny(tmp_path / "shards", mask_bytes=lambda sample, png: None)
        out = tmp_path / "out.html"
        assert main(["report", str(tiny_run), "--data", str(shards.folder), "--out", str(out)]) == 0
        text = out.read_text(encoding="utf-8")
        assert text.count("have no masks in split &#39;val&#39; to compare with") >= 4
        assert "have no masks in split &#39;train&#39;" in text
        assert "are not those of the training" in text

    def test_where_the_training_sees_every_mask(self, tiny_run: Path, tiny_config: Config, tmp_path: Path) -> None:
        seen = tiny_config.data.model_copy(update={"train_subset": "pixels", "pixel_labeled_subset": "pixels"})
        folder = saved(tmp_path / "seen", tiny_run, config={"setting": "sss_image_labels", "data": seen})
        out = tmp_path / "out.html"
        assert main(["report", str(folder), "--out", str(out)]) == 0
        assert "the run trains on every true mask of its training images" in out.read_text(encoding="utf-8")


def test_several_runs_have_a_column_each(tiny_run: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", tiny_run)
    out = tmp_path / "out.html"
    assert main(["report", str(tiny_run), str(other), "--out", str(out), "--images", "1", "--measured", "2"]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.count("<h3>tiny</h3>") == text.count("<h3>other</h3>") == len(re.findall("<section>", text))
    assert "ss, 2 images of val" in text


def test_a_page_that_would_be_too_large_is_refused(tiny_run: Path) -> None:
    measured = Measurements(absent=dict.fromkeys(("masks", "codes", "sweep"), "not wanted"))
    with pytest.raises(ValueError, match=r"larger than 0\.01 MB .* give fewer runs, or fewer --images"):
        render([read_run(tiny_run)], [measured], max_bytes=10_000)


def test_mistakes_are_named(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.html"
    assert main(["report", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["report", str(tiny_run), "--data", str(tmp_path), "--out", str(out)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tiny_run), "--images", "0"])
    assert "'0' is not a whole number from 1" in capsys.readouterr().err
    (tmp_path / "evaluation.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        find_records(tmp_path, "evaluation.json")
    assert not out.exists()


PICTURE = Image.new("RGB", (4, 4))


def track(patch: pytest.MonkeyPatch, history: Callable[[str], list[tuple[int, float]]]) -> None:
    """Lets MLflow answer that it holds the run with these points of a metric."""
    patch.setattr(runs, "training_run", lambda checkpoint: RunHandle(uri="u", run_id="ab", experiment_id="1"))
    patch.setattr(runs, "metric_history", lambda handle, key: history(key))
    patch.setattr(runs, "run_tags", lambda handle: {"git_commit": "abc", "mlflow.user": "somebody"})
    patch.setattr(runs, "logged_pictures", lambda handle: {("cat", 1): PICTURE})


def test_curves_and_pictures_of_the_mlflow_run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first step was logged again after a restart.
    track(monkeypatch, lambda key: [(2, 0.1), (2, 0.3), (4, 0.5)])
    run = read_run(saved(tmp_path / "run", tiny_run))
    assert run.curves["val/mfdr"] == [(1.0, 0.3), (2.0, 0.5)]
    assert run.environment == {"git_commit": "abc"}
    assert run.panels == {"cat": {2: PICTURE}}  # MLflow counts the grids from 0
    assert run.panels_from == "the pictures in MLflow"


def test_curves_of_a_checkpoint_within_an_epoch(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps and epochs do not give the length of an epoch; before the first epoch's end nothing does."""
    checkpoint = load_checkpoint(tiny_run)
    for epoch, ends, expected in ((1, [(2, 1.0)], [(1.0, 0.3), (1.5, 0.5)]), (0, [], [])):
        state = replace(checkpoint.state, epoch=epoch, step=2 * epoch + 1, unfinished={"loss": 1.0}, metrics={})
        folder = tmp_path / str(epoch) / "checkpoints"
        path = save_checkpoint(folder, config=checkpoint.config, state=state, model=checkpoint.model, optimizer={})
        curves = {"epoch": ends, "train/loss": [(2, 0.3), (3, 0.5)]}
        track(monkeypatch, lambda key, curves=curves: curves.get(key, []))  # type: ignore[misc]
        assert read_run(path).curves["train/loss"] == expected


def test_the_command_gives_the_same_configuration(tiny_run: Path, tmp_path: Path) -> None:
    changed = apply_overrides(
        get_recipe("voc_wsss_lite"), ["views.scales=1.0", "train.epochs=9", "evaluation.gating=scores", "data.path=a b"]
    )
    checkpoint = replace(load_checkpoint(tiny_run), config=changed)
    words = shlex.split(training_command(checkpoint))
    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert apply_overrides(get_recipe("voc_wsss_lite"), ["data.path=a b", *overrides]) == changed
    assert len(overrides) == 3
    assert words[words.index("--data") + 1] == "a b"
    assert "--config config.json" in training_command(load_checkpoint(tiny_run))


class TestGammaAdvice:
    @staticmethod
    def sweep(fidelity: tuple[float, ...], completeness: tuple[float, ...]) -> GammaSweep:
        return GammaSweep("p", 3, (0.3, 0.6, 0.9), fidelity, completeness, Bins())

    def test_another_gamma_is_suggested_where_it_gains(self) -> None:
        text = gamma_advice(self.sweep((0.8, 0.9, 0.95), (0.8, 0.5, 0.1)), 0.6)
        assert "90.0 % of the foreground labels are right, and 50.0 %" in text
        assert "calibration.confidence_threshold=0.3, a lower gamma" in text

    def test_a_small_gain_suggests_nothing(self) -> None:
        assert "leave it" in gamma_advice(self.sweep((0.8, 0.8, 0.1), (0.504, 0.5, 0.1)), 0.6)

    def test_without_labels(self) -> None:
        nothing = (float("nan"),) * 3
        assert "suggests nothing" in gamma_advice(self.sweep(nothing, nothing), 0.6)


def test_charts_place_points_and_leave_out_what_is_not_finite() -> None:
    series = [Series("a", [(0, 10), (1, float("nan")), (4, 30)], labels=["first", "", "last"])]
    chart = draw_chart(Chart(title="t", series=series, x_label="x", y_label="y", note="n", diagonal=True))
    assert chart.lines[0].path == "M52 246 L404 14"
    assert [label for *_, label in chart.lines[0].points] == ["first", "last"]
    assert chart.diagonal == ""  # the axes share no range
    assert [text for _, text in chart.x_ticks] == ["0", "1", "2", "3", "4"]
    assert [text for _, text in chart.y_ticks][:: len(chart.y_ticks) - 1] == ["10", "30"]


def test_charts_that_are_compared_have_the_same_axes() -> None:
    def chart(*points: tuple[float, float]) -> Chart:
        return Chart(title="t", series=[Series("a", points)], x_label="x", y_label="y", note="n", diagonal=True)

    small, large = chart((0, 0), (1, 1)), chart((0, 0), (4, 2))
    assert draw_chart(small).lines[0].path == draw_chart(small).diagonal == "M52 246 L404 14"
    assert draw_chart(small, [large]).lines[0].path == "M52 246 L140 130"
    assert draw_chart(large, [small]).x_ticks == draw_chart(small, [large]).x_ticks
    empty = draw_chart(chart())
    assert [empty.lines[0].path, empty.x_ticks[0], empty.x_ticks[-1]] == ["", (52, "0"), (404, "1")]


@pytest.mark.parametrize("file", ["report/page.html.jinja", "figures/paper.md", "released_names.json"])
def test_templates_and_tables_are_part_of_the_package(file: str) -> None:
    root, path = Path(__file__).resolve().parents[3], Path("tools") / file
    assert f'"{path.parent}/*{path.suffix}"' in (root / "pyproject.toml").read_text()
    assert files("slrnet").joinpath(str(path)).is_file()
