"""Tables that settings name: what is wrong with one is said."""

import pytest

from depthprob.config import config_from_dict
from depthprob.errors import InputError


@pytest.mark.parametrize(
    ("text", "said"),
    [("file,defocus\na,1\n", "Did you mean 'defocus_A'"), ("file\na.tif\n", "needed is defocus_A"), ("defocus_A\nten\n", "allowed are numbers"),
     ("defocus_A,file\n1\n", "row 2 has 1 cells"), ("", "needed is defocus_A"), ("defocus_A\nnan\n", "finite")],
)  # fmt: skip
def test_a_faulty_table_of_foci_says_what_is_wrong(tmp_path, text, said):
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        config_from_dict({"focal_series": {"foci_table": "f.csv"}}, tmp_path)
