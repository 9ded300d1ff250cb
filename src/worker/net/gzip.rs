//! Unpacking within bounds.

use std::io::{self, Read, Write};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use fs_err as fs;

use super::cancel::Cancel;
use super::error::{Error, Kind, Result};
use super::files::{remove, settle, with_suffix};

const BUFFER_BYTES: usize = 64 * 1024;
/// Below this size the ratio says nothing.
const RATIO_FROM_BYTES: u64 = 1 << 20;

/// Packings that are not unpacked here, by their first bytes.
const OTHERS: [(&str, &[u8]); 5] = [
    ("by gzip twice", b"\x1f\x8b"),
    ("by zstd", b"\x28\xb5\x2f\xfd"),
    ("by xz", b"\xfd7zXZ\0"),
    ("by bzip2", b"BZh"),
    ("into a zip file", b"PK\x03\x04"),
];

/// What an unpacked file may be.
#[derive(Debug, Clone, Copy)]
pub struct GzipCaps {
    /// Most bytes of the unpacked file.
    pub max_bytes: u64,
    /// Most unpacked bytes per packed byte, once the result is over 1 MiB.
    pub max_ratio: u64,
}

impl Default for GzipCaps {
    /// 5 GiB, 100 to 1.
    fn default() -> Self {
        Self {
            max_bytes: 5 << 30,
            max_ratio: 100,
        }
    }
}

/// Replaces `path` by its content unpacked, if it begins as gzip does. Tells the unpacked size, `None` if it was no gzip.
///
/// # Errors
/// [`Kind::TooLarge`] over a cap, [`Kind::Corrupt`] for broken gzip, [`Kind::Io`], [`Kind::Cancelled`]; `path` is as
/// it was then.
pub async fn decompress_if_gzip(
    path: &Path,
    caps: GzipCaps,
    cancel: &Cancel,
) -> Result<Option<u64>> {
    let mut packed = fs::File::open(path)?;
    let mut magic = [0; 2];
    let begins_as_gzip = match packed.read_exact(&mut magic) {
        Ok(()) => magic == [0x1f, 0x8b],
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
        Err(error) => return Err(error.into()),
    };
    if !begins_as_gzip {
        return Ok(None);
    }
    let fresh = with_suffix(path, ".unpacked");
    match unpack(path, &fresh, caps, cancel).await {
        Ok(bytes) => {
            settle(&fresh, path)?;
            Ok(Some(bytes))
        }
        Err(error) => {
            remove(&fresh)?;
            Err(error)
        }
    }
}

/// Refuses a file that is packed all the same, after [`decompress_if_gzip`].
///
/// # Errors
/// [`Kind::Corrupt`], naming the packing; [`Kind::Io`].
pub fn check_unpacked(path: &Path) -> Result<()> {
    let mut head = Vec::new();
    fs::File::open(path)?.take(8).read_to_end(&mut head)?;
    let Some((how, _)) = OTHERS.iter().find(|(_, magic)| head.starts_with(magic)) else {
        return Ok(());
    };
    let text = format!(
        "{} is packed {how}; send it plain, or packed once by gzip",
        path.display()
    );
    Err(Error::new(Kind::Corrupt, text))
}

async fn unpack(from: &Path, to: &Path, caps: GzipCaps, cancel: &Cancel) -> Result<u64> {
    let packed = fs::File::open(from)?;
    let packed_bytes = packed.metadata()?.len();
    let by_ratio = packed_bytes
        .saturating_mul(caps.max_ratio)
        .max(RATIO_FROM_BYTES);
    let mut decoder = MultiGzDecoder::new(io::BufReader::with_capacity(BUFFER_BYTES, packed));
    let mut out = fs::File::create(to)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut total = 0_u64;
    loop {
        let count = decoder.read(&mut buffer).map_err(|error| {
            Error::new(
                Kind::Corrupt,
                format!("{} is no whole gzip file: {error}", from.display()),
            )
        })?;
        if count == 0 {
            break;
        }
        total += count as u64;
        if total > caps.max_bytes || total > by_ratio {
            return Err(Error::new(
                Kind::TooLarge,
                format!(
                    "{} unpacks from {packed_bytes} to over {total} bytes; at most {} bytes and {} to 1 are taken",
                    from.display(),
                    caps.max_bytes,
                    caps.max_ratio
                ),
            ));
        }
        out.write_all(&buffer[..count])?;
        // Others on this thread have their turn, and a cancel is seen.
        tokio::task::yield_now().await;
        if cancel.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "cancelled"));
        }
    }
    out.sync_all()?;
    Ok(total)
}
