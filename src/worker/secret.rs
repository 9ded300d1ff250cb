//! Secrets, and their removal from text that leaves the process.
//!
//! Every log line, report and error passes a [`Redactor`]: it knows the run's own secrets by value and the usual
//! tokens by their shape.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

/// What stands in a text where a secret was.
pub const REDACTED: &str = "[redacted]";

/// Values shorter than this are not looked for: they would wreck ordinary text.
const SHORTEST_VALUE: usize = 6;

pub use crate::config::Secret;

/// Removes secrets from text, by value and by shape.
///
/// Shapes: `hf_`, `rpa_`, `sb_secret_`, `whsec_` tokens, JSON web tokens (`eyJ...`), the user and the query of URLs,
/// the value of `Authorization`, `apikey` and the like.
#[derive(Clone, Default)]
pub struct Redactor {
    /// Longest first, so that a secret inside another leaves no remainder.
    needles: Vec<Arc<str>>,
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redactor")
            .field("needles", &self.needles.len())
            .finish()
    }
}

impl Redactor {
    /// Knows the shapes and these values.
    pub fn new(secrets: impl IntoIterator<Item = Secret>) -> Self {
        let mut redactor = Self::default();
        for secret in secrets {
            redactor.add(&secret);
        }
        redactor
    }

    /// Adds a value, in its usual disguises too: base64, percent-encoded, escaped for JSON.
    pub fn add(&mut self, secret: &Secret) {
        let value = secret.expose();
        if value.len() < SHORTEST_VALUE {
            return;
        }
        let unpadded = STANDARD.encode(value).trim_end_matches('=').to_owned();
        let json = serde_json::Value::from(value).to_string();
        let forms = [
            value.to_owned(),
            unpadded,
            URL_SAFE_NO_PAD.encode(value),
            url::form_urlencoded::byte_serialize(value.as_bytes()).collect(),
            json.trim_matches('"').to_owned(),
        ];
        for form in forms {
            if !self.needles.iter().any(|n| **n == *form) {
                self.needles.push(Arc::from(form));
            }
        }
        self.needles.sort_by_key(|n| std::cmp::Reverse(n.len()));
    }

    /// `text` without any secret.
    pub fn redact(&self, text: &str) -> String {
        let mut text = Cow::Borrowed(text);
        for needle in &self.needles {
            if text.contains(&**needle) {
                text = Cow::Owned(text.replace(&**needle, REDACTED));
            }
        }
        redact_shapes(&text)
    }
}

/// Names whose value is a secret wherever `name: value` or `name=value` stands.
const SECRET_NAMES: [&str; 8] = [
    "authorization",
    "apikey",
    "api_key",
    "x-api-key",
    "cookie",
    "password",
    "x-signature",
    "token",
];

/// `text` without what looks like a secret; for text whose secrets nobody knows by value.
pub fn redact_shapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut at_start = true;
    while !rest.is_empty() {
        if let Some((kept, taken)) = shape(rest, at_start) {
            out.push_str(&rest[..kept]);
            if taken > kept {
                out.push_str(REDACTED);
            }
            rest = &rest[taken..];
            at_start = false;
            continue;
        }
        let Some(c) = rest.chars().next() else { break };
        out.push(c);
        rest = &rest[c.len_utf8()..];
        at_start = !(c.is_ascii_alphanumeric() || c == '_');
    }
    out
}

/// The shape that begins `rest`: bytes to keep and bytes to step over. `at_start`: a word may begin here.
fn shape(rest: &str, at_start: bool) -> Option<(usize, usize)> {
    if let Some(after) = rest.strip_prefix("://") {
        return user(after).map(|(kept, taken)| (3 + kept, 3 + taken));
    }
    if rest.starts_with(['?', '#']) {
        return query(rest);
    }
    if !at_start {
        return None;
    }
    token(rest).or_else(|| bearer(rest)).or_else(|| named(rest))
}

/// `hf_...` and its like, and `eyJ...`.
fn token(rest: &str) -> Option<(usize, usize)> {
    for (prefix, least) in [
        ("hf_", 8),
        ("rpa_", 8),
        ("sb_secret_", 1),
        ("whsec_", 1),
        ("eyJ", 10),
    ] {
        let Some(tail) = rest.strip_prefix(prefix) else {
            continue;
        };
        let plus = if prefix == "eyJ" { "-_." } else { "-_+/=" };
        let length = run(tail, |c| c.is_ascii_alphanumeric() || plus.contains(c));
        if length >= least {
            return Some((0, prefix.len() + length));
        }
    }
    None
}

/// `Bearer <token>`, `Basic <token>`.
fn bearer(rest: &str) -> Option<(usize, usize)> {
    for scheme in ["bearer ", "basic "] {
        if starts_with_ignoring_case(rest, scheme) {
            let length = run(&rest[scheme.len()..], |c| !ends_value(c) && c != ' ');
            return (length >= 8).then_some((scheme.len(), scheme.len() + length));
        }
    }
    None
}

/// `authorization: <value>`, `"apikey": "<value>"`, `token=<value>`.
fn named(rest: &str) -> Option<(usize, usize)> {
    let name = SECRET_NAMES
        .iter()
        .find(|name| starts_with_ignoring_case(rest, name))?;
    let after = &rest[name.len()..];
    let quote = run(after, |c| matches!(c, '"' | '\'' | '\\'));
    let space = run(&after[quote..], |c| c == ' ');
    let mut kept = name.len() + quote + space;
    let separator = rest[kept..].chars().next()?;
    // "per token: 3 ms" is no secret.
    let is_field = quote > 0 || *name != "token";
    if separator != '=' && (separator != ':' || !is_field) {
        return None;
    }
    kept += 1;
    kept += run(&rest[kept..], |c| matches!(c, ' ' | '"' | '\'' | '\\'));
    let spaces_belong = matches!(*name, "authorization" | "cookie");
    let length = run(&rest[kept..], |c| {
        !ends_value(c) && (spaces_belong || !matches!(c, ' ' | '&' | ';'))
    });
    (length > 0).then_some((kept, kept + length))
}

/// `user:password@` right after `://`.
fn user(after: &str) -> Option<(usize, usize)> {
    let authority = run(after, |c| {
        !c.is_whitespace() && !matches!(c, '/' | '?' | '#' | '"' | '\'' | '<' | '>')
    });
    let at = after[..authority].rfind('@')?;
    Some((0, at))
}

/// `?name=value...` or `#name=value...` of a URL, whole or relative.
fn query(rest: &str) -> Option<(usize, usize)> {
    let body = &rest[1..];
    let name = run(body, |c| {
        c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '%' | '[' | ']')
    });
    if name == 0 || !body[name..].starts_with('=') {
        return None;
    }
    let length = run(body, |c| {
        !c.is_whitespace() && !matches!(c, '"' | '\'' | '<' | '>' | '`')
    });
    Some((1, 1 + length))
}

fn ends_value(c: char) -> bool {
    c.is_control() || matches!(c, '"' | '\'' | ',' | '}' | ']' | '<' | '>' | '`' | '\\')
}

/// Bytes of the longest prefix whose characters all satisfy `belongs`.
fn run(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

fn starts_with_ignoring_case(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len())
        .is_some_and(|head| head.eq_ignore_ascii_case(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    const JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl-_x";

    #[test]
    fn shapes_are_removed() {
        let cases = [
            ("token hf_abcdefghijkl end", "hf_abcdefghijkl"),
            ("rpa_ABCDEFGH12345678", "ABCDEFGH12345678"),
            ("key sb_secret_abc-DEF_1 used", "abc-DEF_1"),
            ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "MfKQ9r8"),
            (JWT, "eyJ"),
            (
                "GET https://h.example/o/f.jsonl?token=eyJx&a=b failed",
                "eyJx",
            ),
            ("see /object/sign/b/p?token=abc", "abc"),
            ("https://h/p?X-Amz-Signature=deadbeef\"", "deadbeef"),
            ("https://h/p#access_token=deadbeef", "deadbeef"),
            ("https://user:hunter22@h/p", "hunter22"),
            ("Authorization: Bearer abc.def.ghi", "abc.def"),
            (
                "{\"authorization\": \"Basic Zm9vOmJhcg==\", \"x\": 1}",
                "Zm9v",
            ),
            ("authorization: RAWKEY with spaces\nnext", "RAWKEY"),
            ("sent with bearer 0123456789abcdef.", "0123456789"),
            ("headers {\"apikey\":\"0123456789\"}", "0123456789"),
            ("{\\\"apikey\\\":\\\"0123456789\\\"}", "0123456789"),
            ("{\"token\": \"abc123\"} token=abc123", "abc123"),
        ];
        for (text, secret) in cases {
            let shown = redact_shapes(text);
            assert!(!shown.contains(secret), "{text} -> {shown}");
            assert!(shown.contains(REDACTED), "{text} -> {shown}");
        }
    }

    #[test]
    fn ordinary_text_is_kept() {
        let kept = [
            "loss 1.25 at step 3 of 40? yes, 5 % done",
            "half_open hf_x",
            "https://h.example/a/b.jsonl",
            "12 tokens per second, token budget 4096",
            "time per token: 3 ms",
            "why? because = is rare, grüße",
            "",
        ];
        for text in kept {
            assert_eq!(redact_shapes(text), text);
        }
        assert_eq!(
            redact_shapes("GET https://h/p?a=b (status 400)"),
            "GET https://h/p?[redacted] (status 400)"
        );
    }

    #[test]
    fn values_are_removed_in_every_disguise() {
        let secret = Secret::new("p@ss/w\"ord 1+2\n");
        let redactor = Redactor::new([secret.clone(), Secret::new("p@ss/w"), Secret::new("")]);
        let base64 = STANDARD.encode(secret.expose());
        for text in [
            secret.expose(),
            "p%40ss%2Fw%22ord+1%2B2",
            "p@ss/w\\\"ord 1+2",
            base64.trim_end_matches('='),
        ] {
            let shown = redactor.redact(&format!("a {text} b"));
            assert!(
                shown.starts_with(&format!("a {REDACTED}")),
                "{text} -> {shown}"
            );
            assert!(shown.ends_with(" b") && !shown.contains("ord"), "{shown}");
        }
    }

    #[test]
    fn formatters_show_nothing() {
        let secret = Secret::new("canary-value");
        let redactor = Redactor::new([secret.clone()]);
        assert!(!format!("{secret:?} {redactor:?} {redactor:#?}").contains("canary"));
    }
}
