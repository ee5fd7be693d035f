"""What libraries have to say to their own developers is not said to ours."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from simulations.use.export import ExportRequest, export


@pytest.mark.slow
def test_a_process_that_imports_the_models_says_nothing():
    """Whether bitsandbytes is there or not: PEFT imports it, where no weight has 8 or 4 bits."""
    code = "import deal_core.models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    # Whatever this machine's processor: the warning is of some alone.
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_a_merged_export_warns_of_nothing(
    encoder, tmp_path, recwarn: pytest.WarningsRecorder
) -> None:
    export(ExportRequest(str(encoder), str(tmp_path / "merged"), merge=True))
    assert [str(warning.message) for warning in recwarn] == []
