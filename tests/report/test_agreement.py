"""When two runs agree: verdicts that do not contradict, numbers within a tolerance, and nothing else."""

import pytest

from lowrank.report.agreement import AFTER_TRAINING, VERDICTS, settle_text, verdicts_agree


@pytest.mark.parametrize("here", VERDICTS)
@pytest.mark.parametrize("there", VERDICTS)
def test_only_supported_against_refuted_contradicts(here: str, there: str) -> None:
    text, reference = f"6 layers\n{here}: a beats b\n", f"6 layers\n{there}: a beats b\n"
    assert verdicts_agree(here, there) == ({here, there} != {"supported", "refuted"})
    assert (settle_text(text, reference) == reference) == verdicts_agree(here, there)


@pytest.mark.parametrize(
    ("text", "reference", "tolerance", "agrees"),
    [
        ("loss 0.1234, 12 layers", "loss 0.1235, 12 layers", 1e-3, True),  # one unit of the last digit
        ("loss 0.1234, 12 layers", "loss 0.1240, 12 layers", 1e-3, False),
        ("accuracy 0.513", "accuracy 0.973", AFTER_TRAINING, False),
        ("accuracy 0.960", "accuracy 0.973", AFTER_TRAINING, True),
        ("effective rank 61.5%", "effective rank 68.3%", 2e-3, False),  # a tenth less
        ("12 layers", "13 layers", 1e-3, False),  # a count
        ("1,000 layers", "1,001 layers", 2e-3, True),
        ("error 1.2e-05", "error 1.3e-05", 1e-3, True),
        ("error 1e-05", "error 1e-04", 1e-3, False),
        ("gain +0.1", "gain -0.1", 1e-3, False),
        ("block 0, fc1 is worst", "block 0, fc2 is worst", 1e-3, False),
        ("a 1.0 b", "a 1.0", 1e-3, False),
        ("keeps [1.0, 0.0]", "keeps [1.0, 0.0]", 0.0, True),
        ("inf", "1.0", 1.0, False),
    ],
)
def test_lines_agree_in_text_and_within_the_tolerance_in_numbers(
    text: str, reference: str, tolerance: float, agrees: bool
) -> None:
    assert (settle_text(text, reference, tolerance) == reference) == agrees
    assert (settle_text(reference, text, tolerance) == text) == agrees


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("inconclusive: a\n", "supported: b\n"),
        ("inconclusive: a\n", "maybe: a\n"),
        ("inconclusive: a\ninconclusive: c\n", "inconclusive: a\n"),
        ("inconclusive: a\n", "inconclusive: a\ninconclusive: c\n"),
        ("1 row\n", ""),
    ],
)
def test_what_does_not_agree_stays(text: str, reference: str) -> None:
    assert settle_text(text, reference) == text
