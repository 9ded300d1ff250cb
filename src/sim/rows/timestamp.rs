//! Times as `PostgreSQL` reads them: ISO 8601 and `now`, not its many other ways to write one.

use serde_json::{Value, json};

use super::schema::Rejection;
use crate::sim::clock;

/// Last year of the server's times.
const LAST_YEAR: u32 = 294_276;

/// Why a text is no time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Syntax,
    /// A month, a day, an hour that there is not.
    Field,
    /// A date that the server cannot hold.
    Far,
    Zone,
}

/// The time of a text, as a column holds it.
pub(super) fn read(text: &str) -> Result<Value, Rejection> {
    if matches!(text, "now" | "now()") {
        return Ok(json!(clock::iso8601(clock::since_epoch())));
    }
    let Err(fault) = check(text.trim()) else {
        return Ok(json!(text.trim().replace(['Z', 'z'], "+00:00")));
    };
    let (code, what) = match fault {
        Fault::Syntax => (
            "22007",
            "invalid input syntax for type timestamp with time zone",
        ),
        Fault::Field => ("22008", "date/time field value out of range"),
        Fault::Far => ("22008", "timestamp out of range"),
        Fault::Zone => ("22009", "time zone displacement out of range"),
    };
    Err(Rejection::new(400, code, &format!("{what}: \"{text}\"")))
}

/// `2026-01-10`, alone or before `T12:00`, `T12:00:00.5`, each with or without a zone.
fn check(text: &str) -> Result<(), Fault> {
    let Some((date, time)) = text.split_once(['T', 't', ' ']) else {
        return check_date(text);
    };
    check_date(date)?;
    let zone = time.find(['Z', 'z', '+', '-']).unwrap_or(time.len());
    check_time(time[..zone].trim_end())?;
    check_zone(&time[zone..])
}

fn check_date(text: &str) -> Result<(), Fault> {
    let is_digits = text.bytes().all(|byte| byte.is_ascii_digit());
    // A long enough number is a date without hyphens; seconds since 1970 are one with an impossible month.
    let fields = match text.len() {
        length @ 6.. if is_digits => {
            vec![
                &text[..length - 4],
                &text[length - 4..length - 2],
                &text[length - 2..],
            ]
        }
        _ => text.split('-').collect(),
    };
    let [year, month, day] = numbers(&fields)?;
    let days = match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    match () {
        () if year == 0 || !(1..=12).contains(&month) || !(1..=days).contains(&day) => {
            Err(Fault::Field)
        }
        () if year > LAST_YEAR => Err(Fault::Far),
        () => Ok(()),
    }
}

fn check_time(text: &str) -> Result<(), Fault> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut fields: Vec<&str> = whole.split(':').collect();
    if fields.len() == 2 && whole.len() == text.len() {
        fields.push("0");
    }
    let [hour, minute, second] = numbers(&fields)?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::Syntax);
    }
    let is_there =
        minute < 60 && second <= 60 && (hour < 24 || (hour, minute, second) == (24, 0, 0));
    if is_there { Ok(()) } else { Err(Fault::Field) }
}

/// `Z`, `+02`, `+0200`, `+02:00`, or nothing.
fn check_zone(text: &str) -> Result<(), Fault> {
    let Some(shift) = text.strip_prefix(['+', '-']) else {
        return if matches!(text, "" | "Z" | "z") {
            Ok(())
        } else {
            Err(Fault::Syntax)
        };
    };
    let fields = match shift.split_once(':') {
        Some((hours, minutes)) => [hours, minutes],
        None if shift.len() == 4 && shift.is_ascii() => [&shift[..2], &shift[2..]],
        None => [shift, "0"],
    };
    let [hours, minutes] = numbers(&fields)?;
    if hours <= 15 && minutes < 60 {
        Ok(())
    } else {
        Err(Fault::Zone)
    }
}

/// So many numbers; one that is too large for any field is the largest.
fn numbers<const N: usize>(fields: &[&str]) -> Result<[u32; N], Fault> {
    let is_number =
        |field: &&str| !field.is_empty() && field.bytes().all(|byte| byte.is_ascii_digit());
    if !fields.iter().all(is_number) {
        return Err(Fault::Syntax);
    }
    let read: Vec<u32> = fields
        .iter()
        .map(|field| field.parse().unwrap_or(u32::MAX))
        .collect();
    read.try_into().map_err(|_| Fault::Syntax)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_told_apart() {
        for (text, expected) in [
            ("2026-01-10", Ok(())),
            ("20260110", Ok(())),
            ("2026-01-10T12:00", Ok(())),
            ("2026-01-10T24:00:00Z", Ok(())),
            ("2026-01-10 12:00:00.123456+00:00", Ok(())),
            ("2026-01-10T12:00:00 +02", Ok(())),
            ("2024-02-29T12:00:00-1559", Ok(())),
            ("", Err(Fault::Syntax)),
            ("yesterday-ish", Err(Fault::Syntax)),
            ("5", Err(Fault::Syntax)),
            ("1768046400.5", Err(Fault::Syntax)),
            ("2026-01-10T", Err(Fault::Syntax)),
            ("2026-01-10T12", Err(Fault::Syntax)),
            ("2026-01-10T12:00:00Q", Err(Fault::Syntax)),
            ("2026-01-10T12:00:00 02", Err(Fault::Syntax)),
            ("1768046400", Err(Fault::Field)),
            ("2026-13-01", Err(Fault::Field)),
            ("2026-02-29", Err(Fault::Field)),
            ("0000-01-01", Err(Fault::Field)),
            ("2026-01-10T24:30:00", Err(Fault::Field)),
            ("2026-01-10T12:61:00Z", Err(Fault::Field)),
            ("2026-01-10T12:00:61Z", Err(Fault::Field)),
            ("1768046400123", Err(Fault::Far)),
            ("2026-01-10T12:00:00+17:00", Err(Fault::Zone)),
            ("2026-01-10T12:00:00+02:61", Err(Fault::Zone)),
        ] {
            assert_eq!(check(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_rejection_names_the_text() {
        let body = read("1768046400").unwrap_err().body;
        assert_eq!(
            body["message"],
            "date/time field value out of range: \"1768046400\""
        );
        assert_eq!(
            read("2026-01-10T12:00:00Z").unwrap(),
            "2026-01-10T12:00:00+00:00"
        );
    }
}
