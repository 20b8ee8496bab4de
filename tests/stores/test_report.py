"""The table of docs/stores.md says what ran, and why what did not run did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stores.report import BEGIN, END

TESTS = Path(__file__).parents[1]

SAMPLE = """
import pytest

@pytest.mark.stores(place="one")
def test_good(): pass

@pytest.mark.stores(place="one")
def test_bad(): assert 0

@pytest.mark.stores(place="other")
def test_missing(): pytest.skip("no server")

def test_of_no_store(): pass
"""


def test_the_table_counts_each_store_and_leaves_the_page_alone(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = stores: of a store\n")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, "-m", "pytest", "-p", "stores.report", "--stores-table", page, "."]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    for _ in range(2):  # the second time finds what the first one wrote
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stdout + done.stderr
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| one | `test_sample.py` | 1 | 1 | 0 |\n" in text
    assert "| other | `test_sample.py` | 0 | 0 | 1: no server |\n" in text
    assert "old" not in text
