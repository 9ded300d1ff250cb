//! Types of columns: how `PostgreSQL` reads a value from its text, and what it says if it cannot.

use serde_json::{Value, json};

use super::schema::Rejection;
use super::timestamp;

/// Type of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Integer,
    Bigint,
    Float,
    /// Decimal with this many digits, and this many of them behind the point.
    Numeric(u32, u32),
    Timestamp,
    Json,
    Uuid,
    /// Text that must be one of these; who stores it has to look.
    Choice(&'static [&'static str]),
}

impl Kind {
    /// Its name in the server's messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Text | Self::Choice(_) => "text",
            Self::Integer => "integer",
            Self::Bigint => "bigint",
            Self::Float => "double precision",
            Self::Numeric(..) => "numeric",
            Self::Timestamp => "timestamp with time zone",
            Self::Json => "jsonb",
            Self::Uuid => "uuid",
        }
    }

    /// The value that a column of this type holds.
    pub(super) fn read(self, text: &str) -> Result<Value, Rejection> {
        match self {
            Self::Text | Self::Choice(_) => Ok(json!(text)),
            Self::Integer => self.integer(text, i64::from(i32::MIN), i64::from(i32::MAX)),
            Self::Bigint => self.integer(text, i64::MIN, i64::MAX),
            Self::Float => self.float(text),
            Self::Numeric(digits, scale) => numeric(self.number(text)?, digits, scale),
            Self::Timestamp => timestamp::read(text),
            Self::Json => serde_json::from_str(text).map_err(|_| syntax("json", text)),
            Self::Uuid => uuid(text).ok_or_else(|| syntax(self.name(), text)),
        }
    }

    /// The value that an operand in a filter on such a column stands for: a decimal of any size, where the column has a limit.
    pub(super) fn read_operand(self, text: &str) -> Result<Value, Rejection> {
        if matches!(self, Self::Numeric(..)) {
            return Ok(value_of(self.number(text)?));
        }
        self.read(text)
    }

    fn integer(self, text: &str, least: i64, most: i64) -> Result<Value, Rejection> {
        use std::num::IntErrorKind::{NegOverflow, PosOverflow};
        match text.trim().parse::<i64>() {
            Ok(number) if (least..=most).contains(&number) => Ok(json!(number)),
            Err(error) if !matches!(error.kind(), NegOverflow | PosOverflow) => {
                Err(syntax(self.name(), text))
            }
            _ => {
                let message = format!("value \"{text}\" is out of range for type {}", self.name());
                Err(Rejection::new(400, "22003", &message))
            }
        }
    }

    fn float(self, text: &str) -> Result<Value, Rejection> {
        let number = self.number(text)?;
        let is_word = |text: &str| text.contains(['i', 'I']);
        let is_zero = |text: &str| {
            !text
                .split(['e', 'E'])
                .next()
                .unwrap_or_default()
                .contains(|c| matches!(c, '1'..='9'))
        };
        if (number.is_infinite() && !is_word(text)) || (number == 0.0 && !is_zero(text)) {
            let message = format!("\"{text}\" is out of range for type {}", self.name());
            return Err(Rejection::new(400, "22003", &message));
        }
        Ok(value_of(number))
    }

    fn number(self, text: &str) -> Result<f64, Rejection> {
        let number = text.trim().parse();
        number.map_err(|_| syntax(self.name(), text))
    }
}

fn syntax(kind: &str, text: &str) -> Rejection {
    let message = format!("invalid input syntax for type {kind}: \"{text}\"");
    Rejection::new(400, "22P02", &message)
}

/// A number as JSON; what is no number there is its name.
fn value_of(number: f64) -> Value {
    let name = || match number {
        f64::INFINITY => json!("Infinity"),
        f64::NEG_INFINITY => json!("-Infinity"),
        _ => json!("NaN"),
    };
    serde_json::Number::from_f64(number).map_or_else(name, Value::Number)
}

fn numeric(number: f64, digits: u32, scale: u32) -> Result<Value, Rejection> {
    let unit = 10f64.powf(f64::from(scale));
    let rounded = (number * unit).round() / unit;
    let overflow = |limit: &str| {
        let details = format!("A field with precision {digits}, scale {scale} {limit}.");
        Err(Rejection::new(400, "22003", "numeric field overflow").details(&details))
    };
    if number.is_infinite() {
        return overflow("cannot hold an infinite value");
    }
    let whole = digits - scale;
    if rounded.abs() >= 10f64.powf(f64::from(whole)) {
        return overflow(&format!(
            "must round to an absolute value less than 10^{whole}"
        ));
    }
    Ok(value_of(rounded))
}

/// 32 hexadecimal digits, in braces or not, with or without a hyphen between groups of four.
fn uuid(text: &str) -> Option<Value> {
    let inside = match text.strip_prefix('{') {
        Some(rest) => rest.strip_suffix('}')?,
        None => text,
    };
    let mut digits = String::new();
    for group in inside.split('-') {
        let is_group = !group.is_empty() && group.len() % 4 == 0;
        if !is_group || !group.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        digits.push_str(&group.to_ascii_lowercase());
    }
    if digits.len() != 32 {
        return None;
    }
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &digits[part]);
    Some(json!(parts.join("-")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(read: Result<Value, Rejection>) -> String {
        match read {
            Ok(value) => value.to_string(),
            Err(rejection) => rejection.body["code"].as_str().unwrap().to_owned(),
        }
    }

    #[test]
    fn values_are_what_postgresql_reads() {
        for (kind, text, expected) in [
            (Kind::Integer, " +5 ", "5"),
            (Kind::Integer, "4.5", "22P02"),
            (Kind::Integer, "", "22P02"),
            (Kind::Integer, "99999999999", "22003"),
            (Kind::Bigint, "99999999999", "99999999999"),
            (Kind::Bigint, "99999999999999999999", "22003"),
            (Kind::Float, "1e-320", "1e-320"),
            (Kind::Float, "1e400", "22003"),
            (Kind::Float, "1e-400", "22003"),
            (Kind::Float, "0e5", "0.0"),
            (Kind::Float, "-inf", "\"-Infinity\""),
            (Kind::Float, "low", "22P02"),
            (Kind::Numeric(10, 2), "12.345", "12.35"),
            (Kind::Numeric(10, 2), "99999999.995", "22003"),
            (Kind::Numeric(10, 2), "Infinity", "22003"),
            (Kind::Numeric(10, 2), "nan", "\"NaN\""),
            (Kind::Numeric(10, 2), "", "22P02"),
            (Kind::Json, "[1,2", "22P02"),
            (Kind::Uuid, "job-1", "22P02"),
            (Kind::Uuid, "000-00000-0000-4000-a000-0000000000aa", "22P02"),
        ] {
            assert_eq!(code(kind.read(text)), expected, "{kind:?} {text:?}");
        }
        let id = json!("00000000-0000-4000-a000-0000000000aa");
        for text in [
            "00000000-0000-4000-A000-0000000000AA",
            "{00000000-0000-4000-a000-0000000000aa}",
            "0000000000004000a0000000000000aa",
        ] {
            assert_eq!(Kind::Uuid.read(text).unwrap(), id);
        }
    }

    #[test]
    fn an_operand_knows_no_limit_of_its_column() {
        let kind = Kind::Numeric(10, 2);
        assert_eq!(code(kind.read_operand("1e12")), "1000000000000.0");
        assert_eq!(code(kind.read_operand("Infinity")), "\"Infinity\"");
        assert_eq!(code(kind.read_operand("x")), "22P02");
        assert_eq!(code(Kind::Choice(&["a"]).read_operand("b")), "\"b\"");
    }
}
