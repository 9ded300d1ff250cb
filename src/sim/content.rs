//! A file as a response: ranges, entity tags, and the faults of a bad connection.

use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::path::Path;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use axum::response::Response;

use super::fault::Action;
use super::server::{empty_reply, reply, set};
use super::wire::Outflow;

/// What to send, and how.
pub(super) struct Content<'a> {
    pub(super) path: &'a Path,
    pub(super) size: u64,
    pub(super) etag: String,
    pub(super) mime: &'a str,
    pub(super) headers: &'a HeaderMap,
    pub(super) head: bool,
    pub(super) action: Option<&'a Action>,
}

/// Answers GET or HEAD of a file.
pub(super) fn serve(content: &Content<'_>) -> io::Result<Response> {
    let mut file = fs_err::File::open(content.path)?;
    let text = |name| {
        content
            .headers
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let unchanged = text(header::IF_RANGE).is_none_or(|tag| tag == content.etag);
    let range = match text(header::RANGE)
        .filter(|_| unchanged)
        .map(|range| span(range, content.size))
    {
        None => None,
        Some(Some(range)) => Some(range),
        Some(None) => {
            let mut response = empty_reply(416);
            set(
                &mut response,
                header::CONTENT_RANGE,
                &format!("bytes */{}", content.size),
            );
            return Ok(response);
        }
    };
    let (from, length) = range.unwrap_or((0, content.size));
    file.seek(SeekFrom::Start(from))?;
    let mut response = body(Box::new(file), length, content)?;
    if range.is_some() {
        *response.status_mut() = axum::http::StatusCode::PARTIAL_CONTENT;
        let to = (from + length).saturating_sub(1);
        set(
            &mut response,
            header::CONTENT_RANGE,
            &format!("bytes {from}-{to}/{}", content.size),
        );
    }
    set(&mut response, header::ETAG, &content.etag);
    set(&mut response, header::ACCEPT_RANGES, "bytes");
    set(&mut response, header::CONTENT_TYPE, content.mime);
    Ok(response)
}

/// The body and the headers that tell its length.
fn body(source: Box<dyn Read + Send>, length: u64, content: &Content<'_>) -> io::Result<Response> {
    let flow = Outflow::new(source, length);
    let mut claimed = Some(length);
    let mut gzip = false;
    let flow = match content.action {
        Some(Action::CutAfter(bytes)) => flow.cut_after(*bytes),
        Some(Action::BytesPerSecond(rate)) => flow.bytes_per_second(*rate),
        Some(Action::WrongLength(wrong)) => {
            claimed = Some(*wrong);
            flow
        }
        Some(Action::Endless) => {
            claimed = None;
            Outflow::new(Box::new(io::repeat(b'x')), u64::MAX)
        }
        Some(Action::Gzip) => {
            gzip = true;
            let packed = gzipped(content.path)?;
            claimed = Some(packed.len() as u64);
            Outflow::new(Box::new(io::Cursor::new(packed)), u64::MAX)
        }
        _ => flow,
    };
    let body = if content.head {
        Body::empty()
    } else {
        Body::new(flow)
    };
    let mut response = reply(200, body);
    if let Some(claimed) = claimed {
        set(&mut response, header::CONTENT_LENGTH, &claimed.to_string());
    }
    if gzip {
        set(&mut response, header::CONTENT_ENCODING, "gzip");
    }
    Ok(response)
}

fn gzipped(path: &Path) -> io::Result<Vec<u8>> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&fs_err::read(path)?)?;
    packer.finish()
}

/// Start and length of a single byte range of a file of `size` bytes; `None` if it has no such bytes.
fn span(range: &str, size: u64) -> Option<(u64, u64)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    if from.is_empty() {
        let length = to.parse::<u64>().ok()?.min(size);
        return (length > 0).then(|| (size - length, length));
    }
    let from: u64 = from.parse().ok()?;
    let last = if to.is_empty() {
        u64::MAX
    } else {
        to.parse().ok()?
    };
    (from < size && from <= last).then(|| (from, last.min(size - 1) - from + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_clamped_to_the_file() {
        assert_eq!(span("bytes=0-", 10), Some((0, 10)));
        assert_eq!(span("bytes=4-5", 10), Some((4, 2)));
        assert_eq!(span("bytes=4-99", 10), Some((4, 6)));
        assert_eq!(span("bytes=-3", 10), Some((7, 3)));
        assert_eq!(span("bytes=10-", 10), None);
    }
}
