//! Cases of `gated_delta`.

use super::Case;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
