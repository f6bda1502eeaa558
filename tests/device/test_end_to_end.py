"""Some of the end-to-end tests, of each kind a few, where ``pytest`` without ``--device sim`` runs them too."""

from tests.e2e.test_accelerate import test_gradient_accumulation
from tests.e2e.test_checkpoints import test_the_file_is_the_plain_trainers
from tests.e2e.test_dropout import (
    test_all_layouts_have_equal_losses,
    test_neither_a_lost_worker_nor_a_resume_changes_a_loss,
)
from tests.e2e.test_verify import test_settings_agree
from tests.e2e.transparency.test_class_weights import test_what_follows_from_samples_is_cut

__all__ = [
    "test_all_layouts_have_equal_losses",
    "test_gradient_accumulation",
    "test_neither_a_lost_worker_nor_a_resume_changes_a_loss",
    "test_settings_agree",
    "test_the_file_is_the_plain_trainers",
    "test_what_follows_from_samples_is_cut",
]
