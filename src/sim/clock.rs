//! Wall-clock stamps and fresh identifiers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

/// Seconds since 1970, with fraction.
pub(super) fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// `2026-01-10T12:00:00.123+00:00` of a time since 1970.
pub(super) fn iso8601(time: Duration) -> String {
    let [year, month, day] = civil(time.as_secs() / 86_400);
    let second = time.as_secs() % 86_400;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = time.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}+00:00")
}

/// Year, month and day of a count of days since 1970-01-01, proleptic Gregorian.
fn civil(days: u64) -> [u64; 3] {
    // Years begin in March here, so that the leap day is the last one.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    [era * 400 + year_of_era + u64::from(month <= 2), month, day]
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

/// Lower-case hexadecimal digits of `bytes`.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
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
