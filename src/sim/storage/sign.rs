//! Signed links: a token that names one object and a time, and needs no key.

use std::time::Duration;

use super::Refusal;
use crate::sim::{Shared, clock, files};

/// What a token allows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    Download,
    Upload { upsert: bool },
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Download => "get",
            Self::Upload { upsert: false } => "put",
            Self::Upload { upsert: true } => "upsert",
        }
    }
}

fn text(shared: &Shared, purpose: Purpose, bucket: &str, path: &str, expires: u64) -> String {
    let name = format!("{}:{bucket}/{path}", purpose.name());
    let token = files::token(&shared.settings.service_key, &name, expires);
    format!("{expires}.{}.{token}", purpose.name())
}

/// A new token.
pub(super) fn token(
    shared: &Shared,
    purpose: Purpose,
    bucket: &str,
    path: &str,
    lifetime: Duration,
) -> String {
    let expires = (clock::since_epoch() + lifetime).as_secs();
    text(shared, purpose, bucket, path, expires)
}

/// The link to a download, below `/storage/v1`.
pub(in crate::sim) fn signed_path(
    shared: &Shared,
    bucket: &str,
    path: &str,
    lifetime: Duration,
) -> String {
    let token = token(shared, Purpose::Download, bucket, path, lifetime);
    format!("/object/sign/{bucket}/{path}?token={token}")
}

/// Checks a token against one of `purposes`; which one it was made for.
pub(super) fn check(
    shared: &Shared,
    token: &str,
    purposes: &[Purpose],
    bucket: &str,
    path: &str,
) -> Result<Purpose, Refusal> {
    let invalid = |message| Refusal::new(400, "InvalidJWT", "InvalidJWT", message);
    let expires = token
        .split('.')
        .next()
        .and_then(|expires| expires.parse().ok());
    let expires: u64 = expires.ok_or_else(|| invalid("jwt malformed"))?;
    let purpose = purposes
        .iter()
        .find(|purpose| text(shared, **purpose, bucket, path, expires) == token);
    let purpose = purpose.ok_or_else(|| invalid("signature verification failed"))?;
    if expires <= clock::since_epoch().as_secs() {
        return Err(invalid("\"exp\" claim timestamp check failed"));
    }
    Ok(*purpose)
}
