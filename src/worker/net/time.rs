//! Calendar time in the two forms that HTTP and webhooks need.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::data::calendar::Date;

const SECONDS_PER_DAY: u64 = 86_400;
const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// Seconds since 1970-01-01, UTC; 0 on a clock before that.
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// `2026-11-28T12:44:07Z`.
pub fn iso8601(unix_seconds: u64) -> String {
    let days = u32::try_from(unix_seconds / SECONDS_PER_DAY).unwrap_or(0);
    let (year, month, day) = Date::from_days(days).civil();
    let of_day = unix_seconds % SECONDS_PER_DAY;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    )
}

/// How long a `Retry-After` value asks to wait: seconds, or an HTTP date (`Sun, 06 Nov 1994 08:49:37 GMT`).
pub fn retry_after(value: &str, now_unix_seconds: u64) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = http_date(value)?;
    Some(Duration::from_secs(at.saturating_sub(now_unix_seconds)))
}

/// `Retry-After` of an answer.
pub(crate) fn retry_after_of(headers: &reqwest::header::HeaderMap) -> Option<Duration> {
    let value = headers.get(reqwest::header::RETRY_AFTER)?.to_str().ok()?;
    retry_after(value, unix_seconds())
}

fn http_date(text: &str) -> Option<u64> {
    let (_, date) = text.split_once(", ")?;
    let parts: Vec<&str> = date.split([' ', ':']).collect();
    let &[day, month, year, hour, minute, second, "GMT"] = parts.as_slice() else {
        return None;
    };
    let month = MONTHS.iter().position(|name| *name == month)?;
    let days = days_from_civil(year.parse().ok()?, month as u64 + 1, day.parse().ok()?)?;
    let of_day = hour.parse::<u64>().ok()? * 3600
        + minute.parse::<u64>().ok()? * 60
        + second.parse::<u64>().ok()?;
    Some(days * SECONDS_PER_DAY + of_day)
}

/// The inverse of [`Date::civil`], for days from 1970-01-01 to the year 9999.
fn days_from_civil(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = if month <= 2 { year - 1 } else { year };
    let era = year / 400;
    let year_of_era = year % 400;
    let march_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Some(era * 146_097 + day_of_era - 719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(iso8601(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso8601(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(iso8601(1_614_265_330), "2021-02-25T15:02:10Z");
        for days in 0..100_000_u32 {
            let (year, month, day) = Date::from_days(days).civil();
            let back = days_from_civil(u64::from(year), month as u64, u64::from(day));
            assert_eq!(back, Some(u64::from(days)));
        }
    }

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        assert_eq!(retry_after(" 7 ", 0), Some(Duration::from_secs(7)));
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(
            retry_after(date, 784_111_777 - 30),
            Some(Duration::from_secs(30))
        );
        assert_eq!(retry_after(date, 784_111_800), Some(Duration::ZERO));
        for bad in [
            "",
            "-1",
            "soon",
            "Sun, 06 Xyz 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37",
        ] {
            assert_eq!(retry_after(bad, 0), None, "{bad}");
        }
    }
}
