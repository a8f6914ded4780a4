from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_fast.errors import SettingsError
from spark_fast.pipelines.convert.conversion_parts import Part


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.0/2", "1/99999", "1 / 2"])
def test_what_is_no_part_is_refused_with_an_example(text):
    with pytest.raises(
        SettingsError, match=r"must be I/N with 1 <= I <= N <= 9999, such as 2/4 for the second of four"
    ):
        Part.parse(text)


@given(st.integers(1, 40), st.integers(0, 100))
def test_parts_share_the_jobs_evenly_and_leave_none(of, jobs):
    shares = [Part.parse(f"{i}/{of}").share(list(range(jobs))) for i in range(1, of + 1)]
    assert sorted(job for share in shares for job in share) == list(range(jobs))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
