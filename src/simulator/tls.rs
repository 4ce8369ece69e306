//! TLS for a simulated API, with a certificate authority of its own that lives as long as it does.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;

/// The names that the simulated API answers to.
const NAMES: [&str; 4] = ["api.constantcontact.com", "localhost", "127.0.0.1", "::1"];

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS: {0}")]
pub struct TlsError(String);

/// An acceptor, and the authority to trust as PEM.
pub(super) fn acceptor() -> Result<(TlsAcceptor, String), TlsError> {
    let make = |error: rcgen::Error| TlsError(error.to_string());
    let fault = |error: rustls::Error| TlsError(error.to_string());
    let now = SystemTime::now();
    let valid = |params: &mut CertificateParams, name: &str| {
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = (now - 2 * DAY).into();
        params.not_after = (now + 30 * DAY).into();
    };

    let mut authority = CertificateParams::default();
    valid(&mut authority, "optin-proxy simulated API");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate().map_err(make)?;
    let root = authority.self_signed(&authority_key).map_err(make)?;

    let mut leaf = CertificateParams::new(NAMES.map(str::to_owned)).map_err(make)?;
    valid(&mut leaf, "localhost");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(make)?;
    let leaf = leaf.signed_by(&key, &Issuer::new(authority, authority_key)).map_err(make)?;

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(fault)?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .map_err(fault)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((TlsAcceptor::from(Arc::new(config)), root.pem()))
}
