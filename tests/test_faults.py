"""A few of the faults of tests/tools/faults.py; all of them: ``python tests/tools/faults.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its trainings")
def test_nothing_that_was_reported_saved_is_lost(checkout, require_kind):
    if checkout.real:
        pytest.skip("the faults are tried on the miniature")
    pytest.importorskip("lightning", reason="what is tried includes the best checkpoint by validation")
    require_kind("lokr")
    line = [sys.executable, str(Path(__file__).with_name("tools") / "faults.py"), "--kills", "8"]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert int(re.search(r"(\d+)  kills", done.stdout)[1]) >= 8
    assert int(re.search(r"(\d+)  finished, bit for bit as without", done.stdout)[1]) >= 1
    assert "lost or damaged: 0" in done.stdout
