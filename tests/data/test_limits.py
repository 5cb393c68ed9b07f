import pytest

from megatron_eslm.data.limits import check_documents, check_domains, check_order
from megatron_eslm.errors import ConfigError

FITS = {"seed": 1, "seq_length": 1024, "train_samples": 10**9, "epochs": {"a": 1.0, "b": 0.1}}


@pytest.mark.parametrize(
    ("check", "most", "says"),
    [
        (lambda n: check_documents("d/x", n), 2**31 - 1, "d/x has 2,147,483,648 documents"),
        (check_domains, 2**15, "mixture of 32,769 domains"),
        (lambda n: check_order(**{**FITS, "seed": n}), 2**32 - 1, "--seed 4294967296 cannot"),
        (lambda n: check_order(**{**FITS, "seed": -n}), 0, "--seed -1 cannot"),
        (lambda n: check_order(**{**FITS, "seq_length": n}), 2**31 - 2, "--seq-length 2147483647"),
        (lambda n: check_order(**{**FITS, "train_samples": n}), 2**53 - 1, "reads 9,007,"),
        (
            lambda n: check_order(**{**FITS, "epochs": {"d/x": n}}),
            2**31 - 1,
            r"reads d/x 2\.15e\+09",
        ),
    ],
)
def test_the_largest_fits_and_one_more_does_not(check, most: int, says: str) -> None:
    check(most)
    with pytest.raises(ConfigError, match=says) as caught:
        check(most + 1)
    assert "\n" not in str(caught.value)
