//! What stands in our certificates (RFC 5280), and how ours are told from others'.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::ca::CaError;
use super::host::Host;

/// How the common names of our authorities begin.
const ROOT_NAME: &str = "optin-proxy root";
const ISSUER_NAME: &str = "optin-proxy issuing authority";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Apple's clients take no longer ones than 825 days.
const AUTHORITY_LIFE: Duration = DAY.saturating_mul(730);
/// How long a leaf is valid.
pub(super) const LEAF_LIFE: Duration = DAY.saturating_mul(7);
/// A clock that is two days slow still sees a valid certificate.
const SKEW: Duration = DAY.saturating_mul(2);

/// The certificate of a root, that of the issuing authority that it vouches for, and the latter's key.
pub(super) fn authority(
    hosts: &[Host],
    now: SystemTime,
) -> Result<(CertificateDer<'static>, CertificateDer<'static>, KeyPair), CaError> {
    let not_after = now + AUTHORITY_LIFE;
    // Told apart by people, and by clients that trust several.
    let date = OffsetDateTime::from(now).date();
    let tag = random::<2>()?;
    let name_of = |name: &str| format!("{name} {date} {:02x}{:02x}", tag[0], tag[1]);
    let authority = |name: &str, path_length| {
        let mut params = params(name_of(name), now, not_after)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok::<_, CaError>(params)
    };
    // Never written anywhere, and gone when this function ends.
    let root_key = Zeroizing::new(KeyPair::generate().map_err(make)?);
    let root_params = authority(ROOT_NAME, 1)?;
    let root = root_params.self_signed(&*root_key).map_err(make)?;

    let key = KeyPair::generate().map_err(make)?;
    let mut params = authority(ISSUER_NAME, 0)?;
    params.name_constraints = Some(constraints(hosts));
    // Kinds of names that the constraint does not know of (mail addresses) are of no use to a thief either.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let issuing = params.signed_by(&key, &Issuer::new(root_params, &*root_key)).map_err(make)?;
    Ok((root.der().clone(), issuing.der().clone(), key))
}

/// The common name of a leaf whose host cannot be one.
const LEAF_NAME: &str = "optin-proxy";

/// A certificate for one host, and its key.
pub(super) fn leaf(
    host: &Host,
    issuer: &Issuer<'_, KeyPair>,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), CaError> {
    let key = Zeroizing::new(KeyPair::generate().map_err(make)?);
    let (common, san) = match host {
        Host::Name(name) => {
            let name = name.to_string();
            (name.clone(), SanType::DnsName(name.try_into().map_err(make)?))
        }
        // OpenSSL holds what looks like a name against the constraint of names, and an address does.
        Host::Address(address) => (LEAF_NAME.to_owned(), SanType::IpAddress(*address)),
    };
    let mut params = params(common, now, not_after)?;
    params.subject_alt_names = vec![san];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    // Python 3.13 refuses a leaf without.
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&*key, issuer).map_err(make)?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    Ok((certificate.der().clone(), key))
}

fn params(
    name: String,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // RFC 5280 appendix A.1: a common name has 64 characters at most.
    let name = if name.len() <= 64 { name } else { LEAF_NAME.to_owned() };
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, "optin-proxy");
    params.not_before = (now - SKEW).into();
    params.not_after = not_after.into();
    let mut serial = random::<16>()?;
    // RFC 5280 section 4.1.2.2: positive.
    serial[0] = serial[0] & 0x7F | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// These hosts and no other. RFC 5280 section 4.2.1.10: a kind of name that is not mentioned is not
/// constrained, so a kind that no host has is excluded.
fn constraints(hosts: &[Host]) -> NameConstraints {
    let permitted_subtrees = hosts.iter().map(|host| match host {
        Host::Name(name) => GeneralSubtree::DnsName(name.to_string()),
        Host::Address(address) => {
            let whole = if address.is_ipv4() { 32 } else { 128 };
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(*address, whole))
        }
    });
    let mut excluded_subtrees = Vec::new();
    if !hosts.iter().any(|host| matches!(host, Host::Name(_))) {
        excluded_subtrees.push(GeneralSubtree::DnsName(String::new()));
    }
    if !hosts.iter().any(|host| matches!(host, Host::Address(IpAddr::V4(_)))) {
        excluded_subtrees.push(GeneralSubtree::IpAddress(CidrSubnet::from_v4_prefix([0; 4], 0)));
    }
    if !hosts.iter().any(|host| matches!(host, Host::Address(IpAddr::V6(_)))) {
        excluded_subtrees.push(GeneralSubtree::IpAddress(CidrSubnet::from_v6_prefix([0; 16], 0)));
    }
    NameConstraints { permitted_subtrees: permitted_subtrees.collect(), excluded_subtrees }
}

fn random<const N: usize>() -> Result<[u8; N], CaError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|error| CaError::Make(error.to_string()))?;
    Ok(bytes)
}

fn make(error: rcgen::Error) -> CaError {
    CaError::Make(error.to_string())
}

/// Whether a certificate is an authority of ours, of this folder or of any other. The API never has one.
pub(crate) fn is_ours(certificate: &[u8]) -> bool {
    // Most are not, and parsing all of a system's takes a while.
    let ours = [ROOT_NAME, ISSUER_NAME];
    ours.iter().any(|name| memchr::memmem::find(certificate, name.as_bytes()).is_some())
        && X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| {
            let mut names = certificate.subject().iter_common_name().flat_map(|name| name.as_str());
            names.any(|name| ours.iter().any(|ours| name.starts_with(ours)))
        })
}
