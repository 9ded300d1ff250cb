//! Cases of `adamw`.

use super::Case;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
