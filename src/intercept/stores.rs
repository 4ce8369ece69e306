//! Trust stores: files of certificates, without keys, for programs that read no PEM.
//!
//! The certificates are public. The passwords only show a reader that nobody changed the file.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{self, Digest, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use aws_lc_rs::{hmac, rand};
use yasna::models::ObjectIdentifier;
use yasna::{DERWriter, DERWriterSeq, Tag, construct_der};

/// A Java trust store in the format JKS, which the source of Java's
/// `sun.security.provider.JavaKeyStore` describes.
///
/// `certificates` are pairs of an alias and a certificate in DER. Java finds an entry only by an
/// alias in lower case, and keeps one entry per alias. So aliases are written in lower case, the
/// second `root` as `root (2)`, and cut to 200 characters if they are longer.
///
/// `now` is the date that the entries bear.
pub(crate) fn jks<'c>(
    certificates: impl IntoIterator<Item = (String, &'c [u8])>,
    password: &str,
    now: SystemTime,
) -> Vec<u8> {
    const MAGIC: u32 = 0xFEED_FEED;
    const VERSION: u32 = 2;
    const TRUSTED_CERTIFICATE: u32 = 2;

    let millis = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let mut taken = HashSet::new();
    let mut count: u32 = 0;
    let mut entries = Vec::new();
    for (alias, certificate) in certificates {
        count += 1;
        entries.extend(TRUSTED_CERTIFICATE.to_be_bytes());
        push_utf(&mut entries, &unique(&alias, &mut taken));
        entries.extend(millis.to_be_bytes());
        push_utf(&mut entries, "X.509");
        entries.extend((certificate.len() as u32).to_be_bytes());
        entries.extend(certificate);
    }

    let mut store = [MAGIC, VERSION, count].map(u32::to_be_bytes).concat();
    store.append(&mut entries);
    let mut digest = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    digest.update(&utf16(password));
    // The salt of all stores of this format.
    digest.update(b"Mighty Aphrodite");
    digest.update(&store);
    store.extend(digest.finish().as_ref());
    store
}

/// `alias` as Java looks it up, told apart from those in `taken`, where it is put.
fn unique(alias: &str, taken: &mut HashSet<String>) -> String {
    /// Far below 65,535 bytes, which is what the length of an alias can say.
    const LONGEST: usize = 200;

    let alias: String = alias.to_lowercase().chars().take(LONGEST).collect();
    let mut unique = alias.clone();
    let mut number = 1;
    while !taken.insert(unique.clone()) {
        number += 1;
        unique = format!("{alias} ({number})");
    }
    unique
}

/// Adds `text`, which is short, as Java's `DataOutput.writeUTF` does: each unit of UTF-16 as if it
/// were a character in UTF-8, and zero in two bytes.
fn push_utf(store: &mut Vec<u8>, text: &str) {
    let mut bytes = Vec::with_capacity(text.len());
    for unit in text.encode_utf16() {
        let last = 0x80 | (unit & 0x3F) as u8;
        match unit {
            0x01..=0x7F => bytes.push(unit as u8),
            0x00 | 0x80..=0x7FF => bytes.extend([0xC0 | (unit >> 6) as u8, last]),
            0x800.. => {
                let middle = 0x80 | (unit >> 6 & 0x3F) as u8;
                bytes.extend([0xE0 | (unit >> 12) as u8, middle, last]);
            }
        }
    }
    store.extend((bytes.len() as u16).to_be_bytes());
    store.append(&mut bytes);
}

/// A PKCS#12 store (RFC 7292) of one certificate in DER, unencrypted, with an HMAC-SHA256 over it.
///
/// An attribute of Oracle's tells Java that the certificate is one to trust; without it, Java shows
/// an empty store. Java takes only a `password` in printable ASCII. Two calls differ in their
/// random salt.
pub(crate) fn pkcs12(alias: &str, certificate: &[u8], password: &str) -> Vec<u8> {
    const VERSION: u8 = 3;
    /// As many as Java takes itself.
    const ITERATIONS: u32 = 10_000;

    let mut salt = [0; 20];
    rand::fill(&mut salt).expect("AWS-LC's RAND_bytes ends the process instead of failing");
    let contents = construct_der(|der| {
        der.write_sequence(|contents| write_data(contents.next(), &safe(alias, certificate)));
    });
    let key = hmac::Key::new(hmac::HMAC_SHA256, mac_key(password, &salt, ITERATIONS).as_ref());
    let mac = hmac::sign(&key, &contents);

    construct_der(|der| {
        der.write_sequence(|pfx| {
            pfx.next().write_u8(VERSION);
            write_data(pfx.next(), &contents);
            pfx.next().write_sequence(|mac_data| {
                mac_data.next().write_sequence(|digest_info| {
                    digest_info.next().write_sequence(|algorithm| {
                        algorithm.next().write_oid(&oid(oids::SHA256));
                        algorithm.next().write_null();
                    });
                    digest_info.next().write_bytes(mac.as_ref());
                });
                mac_data.next().write_bytes(&salt);
                mac_data.next().write_u32(ITERATIONS);
            });
        });
    })
}

/// The `SafeContents` of RFC 7292, section 4.2, with one `CertBag` (section 4.2.3).
fn safe(alias: &str, certificate: &[u8]) -> Vec<u8> {
    construct_der(|der| {
        der.write_sequence(|safe| {
            safe.next().write_sequence(|bag| {
                write_typed(bag, oids::CERT_BAG, |value| {
                    value.write_sequence(|cert_bag| {
                        write_typed(cert_bag, oids::X509_CERTIFICATE, |value| {
                            value.write_bytes(certificate);
                        });
                    });
                });
                bag.next().write_set_of(|attributes| {
                    write_attribute(attributes.next(), oids::FRIENDLY_NAME, |value| {
                        value.write_bmp_string(alias);
                    });
                    write_attribute(attributes.next(), oids::TRUSTED_KEY_USAGE, |value| {
                        value.write_oid(&oid(oids::ANY_EXTENDED_KEY_USAGE));
                    });
                });
            });
        });
    })
}

/// Writes a `ContentInfo` of plain data (RFC 5652, sections 3 and 4).
fn write_data(der: DERWriter<'_>, data: &[u8]) {
    der.write_sequence(|info| write_typed(info, oids::DATA, |value| value.write_bytes(data)));
}

/// Writes what a `ContentInfo`, a `SafeBag` and a `CertBag` begin with: a type and its value.
fn write_typed(der: &mut DERWriterSeq<'_>, of: &[u64], value: impl FnOnce(DERWriter<'_>)) {
    der.next().write_oid(&oid(of));
    der.next().write_tagged(Tag::context(0), value);
}

/// Writes an attribute with one value.
fn write_attribute(der: DERWriter<'_>, of: &[u64], value: impl FnOnce(DERWriter<'_>)) {
    der.write_sequence(|attribute| {
        attribute.next().write_oid(&oid(of));
        attribute.next().write_set_of(|values| value(values.next()));
    });
}

/// The key of the MAC (RFC 7292, appendix B.2): as long as a digest, so one round makes all of it.
fn mac_key(password: &str, salt: &[u8], iterations: u32) -> Digest {
    /// The block of SHA-256, in bytes.
    const BLOCK: usize = 64;
    /// The appendix's ID of keys for a MAC.
    const MAC_KEY: u8 = 3;

    let mut password = utf16(password);
    password.extend([0, 0]);
    let mut input = vec![MAC_KEY; BLOCK];
    for part in [salt, &password] {
        input.extend(part.iter().cycle().take(part.len().next_multiple_of(BLOCK)));
    }
    let first = digest::digest(&SHA256, &input);
    (1..iterations).fold(first, |key, _| digest::digest(&SHA256, key.as_ref()))
}

/// In UTF-16, high bytes first: how both formats take a password.
fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

fn oid(components: &[u64]) -> ObjectIdentifier {
    ObjectIdentifier::from_slice(components)
}

mod oids {
    pub const DATA: &[u64] = &[1, 2, 840, 113549, 1, 7, 1];
    pub const FRIENDLY_NAME: &[u64] = &[1, 2, 840, 113549, 1, 9, 20];
    pub const X509_CERTIFICATE: &[u64] = &[1, 2, 840, 113549, 1, 9, 22, 1];
    pub const CERT_BAG: &[u64] = &[1, 2, 840, 113549, 1, 12, 10, 1, 3];
    pub const SHA256: &[u64] = &[2, 16, 840, 1, 101, 3, 4, 2, 1];
    pub const ANY_EXTENDED_KEY_USAGE: &[u64] = &[2, 5, 29, 37, 0];
    /// Oracle's own.
    pub const TRUSTED_KEY_USAGE: &[u64] = &[2, 16, 840, 1, 113894, 746875, 1, 1];
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_small_jks_is_known_to_the_byte() {
        let now = UNIX_EPOCH + Duration::from_millis(1234);
        let store = jks([("Root".to_owned(), &b"DER"[..])], "changeit", now);
        // By Python's struct and hashlib.
        let known = "feedfeed0000000200000001\
                     000000020004726f6f7400000000000004d20005582e35303900000003444552\
                     cf0187cff524847814c6e3f49a191e1a74852e1b";
        assert_eq!(hex(&store), known);
    }

    #[test]
    fn aliases_are_unique_and_in_lower_case() {
        let mut taken = HashSet::new();
        let mut of = |alias: &str| unique(alias, &mut taken);
        assert_eq!(
            ["Root", "ROOT (2)", "root", "CA"].map(&mut of),
            ["root", "root (2)", "root (3)", "ca"]
        );
        assert_eq!(of(&"X".repeat(70_000)), "x".repeat(200));
        assert_eq!(of(&"x".repeat(70_000)), "x".repeat(200) + " (2)");
    }

    #[test]
    fn text_is_written_in_javas_own_utf_8() {
        let mut written = Vec::new();
        push_utf(&mut written, "a\0é€𝄞");
        assert_eq!(hex(&written), "000e61c080c3a9e282aceda0b4edb49e");
    }

    #[test]
    fn the_key_of_the_mac_is_the_one_of_openssl() {
        let salt: Vec<u8> = (0..20).collect();
        // By `openssl kdf -kdfopt id:3 -kdfopt iter:1000 ... PKCS12KDF`.
        let known = "172f661caf711678e25c52a09ab4be3a626584b102413d5046ce8a52f6096fe7";
        assert_eq!(hex(mac_key("changeit", &salt, 1000).as_ref()), known);
    }

    #[test]
    fn a_pkcs12_reads_back() {
        let store = pkcs12("Root 𝄞", b"DER", "changeit");
        let (contents, mac, salt) = yasna::parse_der(&store, |der| {
            der.read_sequence(|pfx| {
                assert_eq!(pfx.next().read_u8()?, 3);
                let contents = pfx.next().read_sequence(|info| {
                    assert_eq!(info.next().read_oid()?, oid(oids::DATA));
                    info.next().read_tagged(Tag::context(0), |value| value.read_bytes())
                })?;
                pfx.next().read_sequence(|mac_data| {
                    let mac = mac_data.next().read_sequence(|digest_info| {
                        digest_info.next().read_der()?;
                        digest_info.next().read_bytes()
                    })?;
                    let salt = mac_data.next().read_bytes()?;
                    assert_eq!(mac_data.next().read_u32()?, 10_000);
                    Ok((contents, mac, salt))
                })
            })
        })
        .unwrap();

        let verify = |password| {
            let key = mac_key(password, &salt, 10_000);
            hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, key.as_ref()), &contents, &mac)
        };
        assert!(verify("changeit").is_ok());
        assert!(verify("changeme").is_err());
        let contents = hex(&contents);
        for part in [
            // The certificate.
            "0403444552",
            // The name.
            "1e0e0052006f006f00740020d834dd1e",
            // Oracle's attribute, and anyExtendedKeyUsage in it.
            "060c6086480186f966adca7b010131060604551d2500",
        ] {
            assert!(contents.contains(part), "no {part}");
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
