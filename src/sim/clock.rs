//! Wall-clock stamps and fresh identifiers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use crate::data::calendar::Date;
use crate::hex::hex;

/// Seconds since 1970, with fraction.
pub(super) fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// `2026-01-10T12:00:00.123+00:00` of a time since 1970.
pub(super) fn iso8601(time: Duration) -> String {
    let days = u32::try_from(time.as_secs() / 86_400).unwrap_or(0);
    let (year, month, day) = Date::from_days(days).civil();
    let second = time.as_secs() % 86_400;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = time.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}+00:00")
}

/// A new UUID, unique in this process and unlikely to repeat elsewhere.
pub(super) fn uuid() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let digest = Sha256::digest(format!(
        "{} {} {count}",
        since_epoch().as_nanos(),
        std::process::id()
    ));
    let text = hex(&digest);
    format!(
        "{}-{}-4{}-a{}-{}",
        &text[..8],
        &text[8..12],
        &text[13..16],
        &text[17..20],
        &text[20..32]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_name_the_civil_date() {
        assert_eq!(
            iso8601(Duration::from_secs(0)),
            "1970-01-01T00:00:00.000+00:00"
        );
        assert_eq!(
            iso8601(Duration::from_millis(951_782_400_500)),
            "2000-02-29T00:00:00.500+00:00"
        );
        assert_eq!(
            iso8601(Duration::from_secs(1_767_225_599)),
            "2025-12-31T23:59:59.000+00:00"
        );
    }

    #[test]
    fn identifiers_differ() {
        assert_ne!(uuid(), uuid());
        assert_eq!(uuid().len(), 36);
    }
}
