"""What ``pytest --device sim`` skips of the tests that pass on the CPU, each with the reason."""

SPARSE = "the simulated device has no kernels for sparse tensors"
NESTED = "the simulated device has no kernels for nested tensors, which torch's encoder makes of padded samples"
_BATCHES = "tests/e2e/transparency/test_batches.py"
_OWN_GRADIENTS = "tests/e2e/transparency/test_own_gradients.py"
LEFT_OUT = {
    f"{_BATCHES}::test_what_cannot_be_cut_runs_once_and_says_so[sparse]": SPARSE,
    f"{_BATCHES}::test_who_wants_it_cut_reads_why_not_and_ways_out_that_are_exact[sparse]": SPARSE,
    f"{_BATCHES}::test_evaluation_takes_what_cannot_be_cut[sparse]": SPARSE,
    f"{_OWN_GRADIENTS}::test_an_encoder_leaves_padding_empty_in_evaluation[True-False]": NESTED,
    f"{_OWN_GRADIENTS}::test_an_encoder_leaves_padding_empty_in_evaluation[True-True]": NESTED,
}
"""By test: why it cannot run on the device."""
