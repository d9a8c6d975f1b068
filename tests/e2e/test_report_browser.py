"""The report in a real browser, light and dark."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_report import write_run

from ds_agsel import cli

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
def test_it_opens_from_disk_in_light_and_dark(tmp_path):
    image = pytest.importorskip("PIL.Image")
    report = tmp_path / "report.html"
    assert cli.main(["report", str(write_run(tmp_path / "run", steps=40)), "--output", str(report)]) == 0
    shares = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{name}.png"
        subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,3600",
                f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / name}",
                f"--screenshot={picture}", report.as_uri(),
            ],
            check=True, timeout=120, capture_output=True,
        )  # fmt: skip
        pixels = image.open(picture).convert("RGB")
        assert pixels.size == (1000, 3600)
        colours = pixels.quantize(64).convert("RGB").getcolors(3_600_000)
        shares[name] = {colour: count / 3_600_000 for count, colour in colours}
        background = max(shares[name], key=shares[name].get)
        assert (sum(background) > 3 * 240) == (name == "light") and (sum(background) < 3 * 60) == (name == "dark")
        coloured = sum(share for (r, g, b), share in shares[name].items() if max(r, g, b) - min(r, g, b) > 80)
        assert coloured > 0.02  # the charts are there
