//! Content codings (RFC 9110 section 8.4.1): decoded within a cap, and encoded again.

use std::io::{Read, Write};

use brotli_decompressor::Decompressor;
use bytes::Bytes;
use flate2::Compression;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use ruzstd::decoding::StreamingDecoder;

/// A content coding that the proxy can undo and redo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    /// The zlib format, which is what the name means.
    Deflate,
    /// Bare deflate data, which some clients send under that name.
    RawDeflate,
}

/// Why content could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DecodeError {
    /// Not what its coding says, or cut off.
    Corrupt,
    /// Longer than the cap.
    TooLarge,
}

impl Coding {
    /// The coding of a message. `None` if it is one that the proxy does not know, or several.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut codings = headers
            .get_all(CONTENT_ENCODING)
            .into_iter()
            .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity"));
        let coding = match codings.next() {
            None => Self::Identity,
            Some(name) if is_any_of(name, &[b"gzip", b"x-gzip"]) => Self::Gzip,
            Some(name) if is_any_of(name, &[b"deflate"]) => Self::Deflate,
            Some(_) => return None,
        };
        codings.next().is_none().then_some(coding)
    }

    /// The content within `encoded`, and the coding that it really has.
    pub fn decode(self, encoded: &Bytes, cap: usize) -> Result<(Bytes, Self), DecodeError> {
        let read = |coding, reader: &mut dyn Read| {
            let mut decoded = Vec::new();
            let limit = u64::try_from(cap).unwrap_or(u64::MAX).saturating_add(1);
            reader.take(limit).read_to_end(&mut decoded).map_err(|_| DecodeError::Corrupt)?;
            if decoded.len() > cap {
                return Err(DecodeError::TooLarge);
            }
            Ok((Bytes::from(decoded), coding))
        };
        match self {
            Self::Identity => Ok((encoded.clone(), self)),
            Self::Gzip => read(self, &mut MultiGzDecoder::new(&encoded[..])),
            Self::RawDeflate => {
                let mut decoder = DeflateDecoder::new(&encoded[..]);
                let decoded = read(self, &mut decoder)?;
                whole(decoder.total_in(), encoded, decoded)
            }
            Self::Deflate => {
                let mut decoder = ZlibDecoder::new(&encoded[..]);
                match read(self, &mut decoder) {
                    Ok(decoded) => whole(decoder.total_in(), encoded, decoded),
                    Err(DecodeError::Corrupt) => Self::RawDeflate.decode(encoded, cap),
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// The content encoded again.
    pub fn encode(self, content: Bytes) -> Bytes {
        let encoded = match self {
            Self::Identity => return content,
            Self::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(&content).and_then(|()| encoder.finish())
            }
            Self::Deflate => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(&content).and_then(|()| encoder.finish())
            }
            Self::RawDeflate => {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(&content).and_then(|()| encoder.finish())
            }
        };
        encoded.expect("writing into a vector cannot fail").into()
    }
}

/// The start of an answer's content, of whose encoded bytes this is the start: as much as there is, up to `cap` bytes.
/// It is only read, never written again, so there are more codings than [`Coding`] has.
pub(super) fn start_of_answer(headers: &HeaderMap, encoded: &Bytes, cap: usize) -> Bytes {
    let read = |reader: &mut dyn Read| {
        let mut decoded = Vec::new();
        // What was decoded before an error stays; cut off is what a start is.
        let _ = reader.take(u64::try_from(cap).unwrap_or(u64::MAX)).read_to_end(&mut decoded);
        Bytes::from(decoded)
    };
    let mut source = &encoded[..];
    match Coding::of(headers) {
        Some(Coding::Gzip) => read(&mut MultiGzDecoder::new(source)),
        Some(Coding::Deflate | Coding::RawDeflate) => {
            let decoded = read(&mut ZlibDecoder::new(source));
            if decoded.is_empty() { read(&mut DeflateDecoder::new(source)) } else { decoded }
        }
        Some(Coding::Identity) => encoded.slice(..encoded.len().min(cap)),
        None => {
            let named = headers.get(CONTENT_ENCODING).map(|it| it.as_bytes().trim_ascii());
            let named = |name: &[u8]| named.is_some_and(|it| it.eq_ignore_ascii_case(name));
            if named(b"br") {
                read(&mut Decompressor::new(source, BROTLI_BUFFER))
            } else if named(b"zstd")
                && let Ok(mut decoder) = StreamingDecoder::new(&mut source)
            {
                read(&mut decoder)
            } else {
                // It may still be a wrong label on plain text.
                encoded.slice(..encoded.len().min(cap))
            }
        }
    }
}

/// What is read at once; there are 64 KiB at most.
const BROTLI_BUFFER: usize = 4096;

/// Data behind the end of the stream would be lost by encoding anew.
fn whole<T>(consumed: u64, encoded: &Bytes, decoded: T) -> Result<T, DecodeError> {
    if consumed == encoded.len() as u64 { Ok(decoded) } else { Err(DecodeError::Corrupt) }
}

fn is_any_of(name: &[u8], names: &[&[u8]]) -> bool {
    names.iter().any(|known| name.eq_ignore_ascii_case(known))
}
