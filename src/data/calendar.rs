//! The date of a run: what a chat template's `strftime_now` tells.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];
const SECONDS_PER_DAY: u64 = 86_400;

/// A day in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    /// Days since 1970-01-01.
    pub days: u32,
}

impl Date {
    /// A day by its number since 1970-01-01.
    pub fn from_days(days: u32) -> Self {
        Self { days }
    }

    /// Today.
    pub fn today() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let days = since.map_or(0, |since| since.as_secs() / SECONDS_PER_DAY);
        Self::from_days(u32::try_from(days).unwrap_or(0))
    }

    /// Year, month (1-12) and day (1-31) of the Gregorian calendar.
    pub fn civil(self) -> (u32, usize, u32) {
        // Years that begin in March end with the leap day, so that months have a regular pattern.
        let shifted = self.days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        let year = era * 400 + year_of_era + u32::from(month <= 2);
        (year, month as usize, day)
    }

    /// `strftime` for the date's fields; times are midnight; what is not known stays as it is.
    pub fn format(self, format: &str) -> String {
        let (year, month, day) = self.civil();
        let (month_name, weekday) = (MONTHS[month - 1], WEEKDAYS[(self.days % 7) as usize]);
        let mut out = String::new();
        let mut characters = format.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                out.push(character);
                continue;
            }
            match characters.next() {
                Some('d') => out.push_str(&format!("{day:02}")),
                Some('m') => out.push_str(&format!("{month:02}")),
                Some('Y') => out.push_str(&year.to_string()),
                Some('y') => out.push_str(&format!("{:02}", year % 100)),
                Some('B') => out.push_str(month_name),
                Some('b') => out.push_str(&month_name[..3]),
                Some('A') => out.push_str(weekday),
                Some('a') => out.push_str(&weekday[..3]),
                Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
                Some('H' | 'M' | 'S') => out.push_str("00"),
                Some('%') | None => out.push('%'),
                Some(other) => out.extend(['%', other]),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (days, expected) in [
            (0, "Thursday 01 January 1970"),
            (11_016, "Tuesday 29 February 2000"),
            (20_000, "Friday 04 October 2024"),
            (20_781, "Tuesday 24 November 2026"),
        ] {
            assert_eq!(Date::from_days(days).format("%A %d %B %Y"), expected);
        }
    }
}
