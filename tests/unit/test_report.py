"""`ds-agsel report` and `ds-agsel watch`: what they read of a run, whole, going on or damaged, and what they show."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ds_agsel import cli
from ds_agsel.errors import DataError
from ds_agsel.report.runs import read_run

NUMELS = [100, 10, 10, 4]
NAMES = ["embedding", "model.layers.0", "model.layers.1", "final_norm"]


def write_run(folder: Path, steps: int = 6, *, blocks: bool = True, metrics: bool = True, finished=True) -> Path:
    """Even steps explore and update block 0, odd ones exploit and update blocks 1 and 2."""
    folder.mkdir(parents=True)
    selection, measured = [], []
    for step in range(steps):
        explore = step % 2 == 0
        chosen = [0] if explore else [1, 2]
        numel = sum(NUMELS[index] for index in chosen)
        line: dict = {"step": step, "phase": "explore" if explore else "exploit", "blocks": chosen}
        if blocks:
            with_gradient = sum(NUMELS) if explore else numel
            traffic = {"reduced_bytes": 0, "d2h_bytes": 4 * with_gradient, "h2d_bytes": 2 * numel, "gathered_bytes": 0}
            traffic["nvme_read_bytes"] = 12 * numel
            line |= {"explore_rate": 0.9**step, "traffic": traffic, "state_bytes": 8 * 120}
        selection.append(line)
        parts = {"forward_seconds": 0.2, "backward_seconds": 0.4 if explore else 0.2, "step_seconds": 0.1}
        measured.append({"event": "train", "step": step, "loss": 3 - step / 10, "seconds": 1.0, **parts})
    measured.append({"event": "validation", "step": steps, "loss": 2.25})
    (folder / "selection.jsonl").write_text("".join(json.dumps(line) + "\n" for line in selection))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    if blocks:
        described = [{"index": i, "name": n, "numel": k} for i, (n, k) in enumerate(zip(NAMES, NUMELS))]
        (folder / "blocks.json").write_text(
            json.dumps({"policy": "adagrad_select", "select_percent": 50, "total_numel": 124, "blocks": described})
        )
    if finished:
        (folder / "summary.json").write_text('{"steps": 6}')
    return folder


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.problems == [] and run.is_finished and run.block_names == NAMES
    assert run.counts() == [3, 3, 3, 0] and run.counts("explore") == [3, 0, 0, 0]
    assert run.share_of_parameters() == pytest.approx((3 * 100 + 3 * 20) / 6 / 124)
    assert run.state_bytes() == {"full": 8 * 124, "formula": 8 * 60, "measured": 960}
    assert run.traffic() == {  # a mean step, and what it would be with all 124 elements
        "d2h_bytes": (4 * (124 + 20) / 2, 4 * 124),
        "h2d_bytes": (2 * 60, 2 * 124),
        "nvme_read_bytes": (12 * 60, 12 * 124),
    }
    assert run.step_seconds()["exploit"] == {"all": 1.0, "forward": 0.2, "backward": 0.2, "step": 0.1}
    assert run.wall_seconds()[-1] == (6.0, 2.5)
    assert run.validation == [(6, 2.25)]


def test_states_are_a_ranks_share(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    described = json.loads((folder / "blocks.json").read_text())
    (folder / "blocks.json").write_text(json.dumps(described | {"ranks": 2}))
    assert read_run(folder).state_bytes() == {"full": 4 * 124, "formula": 4 * 60, "measured": 960}


def test_states_on_the_card_stand_beside_those_kept_where_a_log_has_them(tmp_path: Path, capsys) -> None:
    """States of all blocks are kept on the host with only a selection's on the card, and that is what is saved."""
    charts = pytest.importorskip("ds_agsel.report.charts")
    from matplotlib.figure import Figure

    def bars(folder: Path) -> list[float]:
        figure = Figure()
        charts.memory([read_run(folder)]).draw(figure, charts.LIGHT)
        return [bar.get_width() for bar in figure.axes[0].patches]

    folder = write_run(tmp_path / "run")
    assert bars(folder) == [8 * 124, 960]
    log = folder / "selection.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("\n".join(json.dumps(line | {"accelerator_state_bytes": 8 * line["step"]}) for line in lines))
    assert read_run(folder).state_bytes() == {"full": 992, "formula": 480, "measured": 960, "on_card": 40}
    assert bars(folder) == [992, 960, 40]
    assert cli.main(["watch", "--once", str(folder)]) == 0
    assert "states on the card 40 B of 992 B" in capsys.readouterr().out
    assert cli.main(["report", str(folder)]) == 0
    assert "<td>992 B</td><td>480 B</td><td>40 B</td><td>960 B</td>" in (folder / "report.html").read_text()


def test_a_policy_that_has_no_percentage_is_shown_without(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    folder = write_run(tmp_path / "run")
    page = {}
    for policy in ("adagrad_select", "all"):
        described = json.loads((folder / "blocks.json").read_text())
        (folder / "blocks.json").write_text(json.dumps(described | {"policy": policy}))
        assert cli.main(["report", str(folder)]) == 0
        page[policy] = (folder / "report.html").read_text()
    assert "<td>adagrad_select 50 %</td>" in page["adagrad_select"] and "<td>all</td>" in page["all"]


def test_thousands_of_steps_share_columns(tmp_path: Path) -> None:
    """Every step of a long run stands in the heat map, each column stronger the more of its steps updated the block."""
    charts = pytest.importorskip("ds_agsel.report.charts")
    from matplotlib.figure import Figure

    run = read_run(write_run(tmp_path / "run", steps=2000, metrics=False))
    figure = Figure()
    charts.heat_map(run).draw(figure, charts.LIGHT)
    [axes] = figure.axes
    [image] = axes.get_images()
    alpha = image.get_array()[..., 3]
    assert alpha.shape == (4, charts.MANY_STEPS_COLUMNS)
    assert (alpha[:3] > 0.5).all() and (alpha[3] == 0).all()  # blocks 0 to 2 every other step, block 3 never
    assert "8 a column" in axes.get_xlabel()


def test_a_line_of_several_steps_took_the_time_of_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", metrics=False)
    lines = [{"event": "train", "step": step, "loss": 1.0, "seconds": 2.0} for step in (1, 3, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [seconds for seconds, _ in read_run(folder).wall_seconds()] == [4, 8, 12]


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("selection.jsonl", '{"step": 6, "pha', r"selection\.jsonl, line 7: half-written"),
        ("selection.jsonl", 'gar\x00bage\n{"step": 6, "phase": "exploit", "blocks": [3]}\n', r"line 7: Expecting"),
        ("selection.jsonl", '{"step": 6, "blocks": [0]}\n', "line 7: 'phase' is missing"),
        ("selection.jsonl", '{"step": 6, "phase": "exploit", "blocks": [-1]}\n', "line 7: .*not a list of indices"),
        ("selection.jsonl", "[1, 2]\n", "line 7: not an object"),
        ("metrics.jsonl", '{"event": "train", "loss": 1}\n', r"metrics\.jsonl, line 8: 'step' is missing"),
        ("blocks.json", "{", r"blocks\.json: "),
        ("summary.json", "[]", r"summary\.json: "),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path: Path, name: str, damage: str, problem: str) -> None:
    folder = write_run(tmp_path / "run")
    with open(folder / name, "a") as file:
        file.write(damage)
    run = read_run(folder)
    assert len(run.problems) == 1 and re.search(problem, run.problems[0]), run.problems
    assert len(run.steps) >= 6 and len(run.measured) == 6
    assert run.block_names == (NAMES if name != "blocks.json" else ["block 0", "block 1", "block 2"])


def test_bytes_that_are_no_text_do_not_stop_the_reading(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with open(folder / "selection.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    assert len(read_run(folder).steps) == 6


def test_a_run_of_any_trainer_has_its_losses(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    history = [{"loss": 2.0, "step": 2}, {"eval_loss": 1.9, "step": 2}, {"loss": 1.5, "step": 4}, {"train_loss": 1}]
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = read_run(tmp_path)
    assert [(line.step, line.loss) for line in run.measured] == [(1, 2.0), (3, 1.5)]
    assert run.validation == [(2, 1.9)] and run.steps == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, exists: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    with pytest.raises(DataError, match=r"empty (has no selection.jsonl|is not a folder).*Give the --output"):
        read_run(folder)
    assert cli.main(["report", str(folder)]) == 2
    assert "not a run" in capsys.readouterr().err


def test_the_page_has_all_and_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, old = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", blocks=False, finished=False)
    with open(old / "selection.jsonl", "a") as file:
        file.write('{"ste')
    output = tmp_path / "out" / "report.html"
    assert cli.main(["report", str(whole), str(old), "--output", str(output)]) == 0
    html = output.read_text()
    said = capsys.readouterr()
    assert "half-written" in html and "selection.jsonl, line 7: half-written" in said.err
    assert "a/run" in html and "b/run" in html  # two runs of one name are told apart
    assert not re.search(r'(src|href|srcset)="(?!data:)', html) and "http" not in html
    images = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(images) == 4 * 10 == 4 * len(list((tmp_path / "out" / "report_files").iterdir()))
    for file in (tmp_path / "out" / "report_files").iterdir():  # a light and a dark one each, wide and narrow
        assert ElementTree.fromstring(file.read_text()).tag.endswith("}svg") and file.stat().st_size > 2000
    assert "1.57" not in html and "992 B" in html  # 8 · 124
    assert "model.layers.1" in html and "block 2" in html and "unfinished" in html and "finished" in html


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<script>alert(1)<")
    described = json.loads((folder / "blocks.json").read_text())
    described["blocks"][0]["name"] = "<img src=x onerror=alert(2)>$\\frac"
    (folder / "blocks.json").write_text(json.dumps(described))
    output = tmp_path / "report.html"
    assert cli.main(["report", str(folder), "--output", str(output)]) == 0
    html = output.read_text()
    assert "<script" not in html and "<img src=x" not in html and "&lt;script&gt;alert(1)" in html


def test_a_run_that_has_not_stepped_yet_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "selection.jsonl").write_text("")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "has not stepped yet" in (tmp_path / "report.html").read_text()


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert cli.main(["report", str(folder), "--output", str(folder / "summary.json" / "x.html")]) == 2
    assert "--output=" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = write_run(tmp_path / "run")
    for name in [name for name in sys.modules if name.startswith(("ds_agsel.report.", "rich"))]:
        if name != "ds_agsel.report.runs":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["watch", str(folder), "--once"]) == 2
    assert "pip install 'ds-agsel[report]'" in capsys.readouterr().err


def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    code = (
        "import sys; from ds_agsel import cli; cli.main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    for command in (["watch", "--once"], ["report"]):
        done = subprocess.run([sys.executable, "-c", code, *command, str(folder)], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


class Terminal:
    """`watch` on a console of our own."""

    def __init__(self, **options: object) -> None:
        from rich.console import Console

        self.file = io.StringIO()
        self.console = Console(file=self.file, width=100, color_system=None, **options)

    def text(self) -> str:
        return self.file.getvalue()


def test_a_sparkline_is_as_wide_as_asked() -> None:
    from ds_agsel.report.watch import sparkline

    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0] * 5, 3) == "▁▁▁" and len(sparkline(list(range(1000)), 40)) == 40


def test_a_snapshot_has_what_matters(tmp_path: Path) -> None:
    from ds_agsel.report.watch import watch

    terminal = Terminal()
    watch(write_run(tmp_path / "run", finished=False), once=True, console=terminal.console)
    text = terminal.text()
    for part in ("run (unfinished, written ", "steps 6", "explore 3, exploit 3", "ε 0.590", "loss 2.500",
                 "validation 2.250", "48.4 % of parameters", "model.layers.1", "5: 1,2",
                 "states 960 B of 992 B"):  # fmt: skip
        assert part in text, text
    lines = {line.split()[2]: line for line in text.splitlines() if "█" in line and "model" in line}
    assert set(lines) == {"model.layers.0", "model.layers.1"} and all("●" in line for line in lines.values())


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("prefix", ["model.layers", "base_model.model.model.layers"])
def test_a_view_fits_its_terminal(tmp_path: Path, width: int, prefix: str) -> None:
    """An ssh terminal has 24 lines and a model more blocks: they share lines, or some are only counted."""
    from rich.console import Console

    from ds_agsel.report.watch import view

    folder = write_run(tmp_path / "run", steps=40, finished=False)
    described = json.loads((folder / "blocks.json").read_text())
    described["blocks"] += [{"index": 4 + i, "name": f"{prefix}.{i}", "numel": 10} for i in range(30)]
    (folder / "blocks.json").write_text(json.dumps(described))
    with open(folder / "selection.jsonl", "a") as file:
        for step in range(40, 70):
            file.write(json.dumps({"step": step, "phase": "exploit", "blocks": [step - 36]}) + "\n")
        file.write("{")
    console = Console(file=io.StringIO(), width=width, height=24, color_system=None)
    console.print(view(read_run(folder), width, 24))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= 24 and all(len(line) == width for line in lines)
    text = "\n".join(lines)
    for part in ("steps 70", "explore 20, exploit 50", "loss -0.900", "embedding", "last steps", "1 unreadable"):
        assert part in text, text
    assert "selection.jsonl, line" in text
    shown = sum(text.count(name) for name in ("embedding", "layers.", "final_norm"))
    assert shown == 34 or f"… and {34 - shown} blocks more" in text, text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_watch_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    from ds_agsel.report import watch

    folder = write_run(tmp_path / "run", steps=2, finished=False)
    later = write_run(tmp_path / "later", steps=4)
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            for name in ("selection.jsonl", "metrics.jsonl"):
                (folder / name).write_text((later / name).read_text())
        else:
            (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    terminal = Terminal(force_terminal=is_terminal)
    watch.watch(folder, interval_seconds=0.5, console=terminal.console)
    assert naps == [0.5, 0.5] and "steps 4" in terminal.text()


def test_ctrl_c_ends_watching_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_agsel.report import watch

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    terminal = Terminal(force_terminal=True)
    watch.watch(write_run(tmp_path / "run", finished=False), console=terminal.console)
    assert "the run goes on" in terminal.text()
