//! Content codings (RFC 9110 section 8.4.1): decoded within a cap, and encoded again.

use std::io::{Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;

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

    /// The start of the content within the start of an encoded message: as much of it as there is, up
    /// to `cap` bytes.
    pub fn decode_start(self, encoded: &Bytes, cap: usize) -> Bytes {
        let read = |reader: &mut dyn Read| {
            let mut decoded = Vec::new();
            // What was decoded before an error stays; cut off is what a start is.
            let _ = reader.take(u64::try_from(cap).unwrap_or(u64::MAX)).read_to_end(&mut decoded);
            Bytes::from(decoded)
        };
        match self {
            Self::Identity => encoded.slice(..encoded.len().min(cap)),
            Self::Gzip => read(&mut MultiGzDecoder::new(&encoded[..])),
            Self::RawDeflate => read(&mut DeflateDecoder::new(&encoded[..])),
            Self::Deflate => {
                let decoded = read(&mut ZlibDecoder::new(&encoded[..]));
                if decoded.is_empty() {
                    return Self::RawDeflate.decode_start(encoded, cap);
                }
                decoded
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

/// Data behind the end of the stream would be lost by encoding anew.
fn whole<T>(consumed: u64, encoded: &Bytes, decoded: T) -> Result<T, DecodeError> {
    if consumed == encoded.len() as u64 { Ok(decoded) } else { Err(DecodeError::Corrupt) }
}

fn is_any_of(name: &[u8], names: &[&[u8]]) -> bool {
    names.iter().any(|known| name.eq_ignore_ascii_case(known))
}
