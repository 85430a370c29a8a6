"""Small runs of claims train the same networks several times."""

import pytest
import runs


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory):
        yield
