//! Cases of `nf4`.

use super::Case;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
