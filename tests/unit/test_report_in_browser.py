"""Pages as a browser draws them. Skipped where there is no Chromium."""

import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_opd.report.comparison_page import write_comparison
from megatron_opd.report.page import write_report
from tests.unit.test_report import answers, some_right, write_run

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PAGE = (0xF6, 0xF7, 0xF9)  # the background
BETTER = (0x0F, 0x8A, 0x5F)  # the verdict's border
SHARE = (0xB9, 0xDC, 0xCF)  # of the problems that stayed right
CURVE = (0x2F, 0x6F, 0xDB)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def drawn(page: Path, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3], the page in a window of this size."""
    picture = page.with_suffix(f".{width}.png")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}"]
    command += [f"--screenshot={picture}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = matplotlib.image.imread(picture)
    return np.rint(255 * pixels[..., :3]).astype(np.uint8)


def count(pixels: np.ndarray, colour: tuple[int, int, int], within: int = 2) -> int:
    return int((np.abs(pixels.astype(int) - colour).max(axis=-1) <= within).sum())


@pytest.mark.parametrize(("width", "height"), [(1280, 1500), (480, 2600)])
def test_what_a_browser_draws(tmp_path: Path, width: int, height: int) -> None:
    """The verdict, the curves and the shares are there, and nothing reaches the window's edge."""
    heldout = {0: answers(some_right(10)), 20: answers(some_right(30))}
    run = write_run(tmp_path / "run", heldout, evaluated={0: 0.25, 20: 0.75})
    long = write_run(tmp_path / ("a_very_long_name_of_a_run_" * 3), heldout)
    pages = [write_report(run), write_comparison([run, long])[0]]
    pictures = [drawn(page, width, height) for page in pages]
    for page, pixels in zip(pages, pictures, strict=True):
        assert pixels.shape == (height, width, 3)
        assert count(pixels[:, -6:], PAGE) == 6 * height, f"{page.name} is wider than {width}"
        assert count(pixels, CURVE, within=60) > 100, "no curve is drawn"
    top = pictures[0][: height // 3]
    assert count(top, BETTER) > 5 * 60, "the verdict has no green border"
    assert count(pictures[0], SHARE) > 300, "the shares of problems are not drawn"
