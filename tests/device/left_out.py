"""What ``pytest --device sim`` skips: the tests of ``tests/e2e`` that pass on the CPU, and why not here."""

SPARSE = "the simulated device has no kernels for sparse tensors"
LEFT_OUT = {
    "tests/e2e/transparency/test_batches.py::test_what_cannot_be_cut_is_refused_and_one_microbatch_takes_it[sparse]": (
        SPARSE
    ),
    "tests/e2e/transparency/test_batches.py::test_evaluation_takes_what_cannot_be_cut[sparse]": SPARSE,
}
"""By test: what the device lacks, or the test on it."""
