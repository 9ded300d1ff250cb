//! An address whose query is a secret.

use std::fmt;

/// Longest address that is taken, in bytes.
pub const MAX_LEN: usize = 8192;

/// An address from a job. Shown without its query, fragment and user, which may hold secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct JobUrl(String);

impl JobUrl {
    /// Checks the form of `text`: a scheme, a host (`file:` needs none), nothing that has no place in an address. Which schemes and
    /// hosts are fetched from is for the fetcher to say.
    ///
    /// # Errors
    /// What was found and what was expected, without secrets.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err("is empty, expected `https://...`".to_owned());
        }
        if text.len() > MAX_LEN {
            let len = text.len();
            return Err(format!("is {len} bytes long, expected at most {MAX_LEN}"));
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err("has a space or a control character in it; encode it".to_owned());
        }
        let url = Self(text.to_owned());
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(format!(
                "is `{url}`, which has no scheme; expected `https://...`"
            ));
        };
        let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || b"+-.".contains(&c));
        if !is_scheme {
            return Err(format!(
                "is `{url}`, which has no scheme; expected `https://...`"
            ));
        }
        let host = host_of(rest);
        if host.is_empty() && !scheme.eq_ignore_ascii_case("file") {
            return Err(format!(
                "is `{url}`, which has no host; expected `https://host/...`"
            ));
        }
        Ok(url)
    }

    /// The whole address, secrets included: to fetch from, not to show.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

/// Host and port of what follows `://`.
fn host_of(rest: &str) -> &str {
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let authority = &rest[..end];
    authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host)
}

impl fmt::Display for JobUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = &self.0;
        let end = text.find(['?', '#']).unwrap_or(text.len());
        let shown = &text[..end];
        let tail = if end < text.len() { "?..." } else { "" };
        if let Some((scheme, rest)) = shown.split_once("://") {
            let host = host_of(rest);
            let path = rest.find('/').map_or("", |at| &rest[at..]);
            write!(f, "{scheme}://{host}{path}{tail}")
        } else {
            let shown = shown.rsplit_once('@').map_or(shown, |(_, host)| host);
            write!(f, "{shown}{tail}")
        }
    }
}

impl fmt::Debug for JobUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
