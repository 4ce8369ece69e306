//! Whom the proxy takes for the API.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::upstream::SetupError;
use crate::config;
use crate::intercept::is_ours;

/// Whom to trust: `upstream.ca_file` alone if given, else the system's roots, else Mozilla's. Never
/// the proxy's own authority, even where SSL_CERT_FILE names a bundle that holds it: who could sign with
/// its key would be the API to the proxy.
///
/// # Errors
/// If the TLS library refuses its own defaults.
pub(super) fn tls(upstream: &config::Upstream) -> Result<ClientConfig, SetupError> {
    let mut roots = RootCertStore::empty();
    let mut named = Vec::new();
    let foreign = |certificate: &CertificateDer<'_>| !is_ours(certificate);
    if let Some(authorities) = &upstream.authorities {
        named.extend(authorities.iter().filter(|it| foreign(it)).cloned());
        roots.add_parsable_certificates(named.iter().cloned());
    } else {
        let system = rustls_native_certs::load_native_certs().certs;
        roots.add_parsable_certificates(system.into_iter().filter(foreign));
        if !roots.is_empty() {
            tracing::info!(roots = roots.len(), "trusting this system's certificate authorities");
        } else {
            tracing::warn!(
                "no certificate authorities on this system: trusting the bundled Mozilla roots"
            );
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    if named.is_empty() || roots.is_empty() {
        return Ok(config.with_root_certificates(roots).with_no_client_auth());
    }
    let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
    let usual = usual.map_err(|error| Error::General(error.to_string()))?;
    let verifier = Arc::new(Named { usual, named });
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// What rustls trusts with these authorities; and one of them for itself. A server's own certificate that
/// `openssl req -x509` made says that it is an authority, and as such it is no server's to webpki. Whoever named it meant it.
#[derive(Debug)]
struct Named {
    usual: Arc<WebPkiServerVerifier>,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            Err(Error::InvalidCertificate(CertificateError::Other(_)))
                if self.named.contains(end_entity) =>
            {
                check_own(end_entity, now)?;
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// Whether a certificate is an authority's, may be a server's all the same, and is in its time (RFC 5280 sections 4.1.2.5
/// and 4.2.1.12). webpki, too, looks at the time before anything else; that it goes on to do so is not for us to trust.
fn check_own(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), CertificateError> {
    let malformed = |_| CertificateError::BadEncoding;
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(malformed)?;
    let usage = certificate.extended_key_usage();
    let usage = usage.map_err(|_| CertificateError::BadEncoding)?;
    let is_servers = usage.is_none_or(|usage| usage.value.server_auth || usage.value.any);
    let validity = certificate.validity();
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    match () {
        () if !certificate.is_ca() || !is_servers => Err(CertificateError::InvalidPurpose),
        () if now < validity.not_before.timestamp() => Err(CertificateError::NotValidYet),
        () if now > validity.not_after.timestamp() => Err(CertificateError::Expired),
        () => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
    };

    use super::*;

    fn checked(
        year: u64,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<(), CertificateError> {
        let mut params = CertificateParams::new(["own".to_owned()]).expect("a name");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2030, 1, 1);
        change(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().expect("a key"));
        let now = Duration::from_secs((year - 1970) * 31_556_952);
        check_own(certificate.expect("a certificate").der(), UnixTime::since_unix_epoch(now))
    }

    #[test]
    fn a_servers_own_certificate_counts_in_its_time_and_for_its_purpose() {
        let purposes = |purposes: &[ExtendedKeyUsagePurpose]| {
            let purposes = purposes.to_vec();
            move |params: &mut CertificateParams| params.extended_key_usages = purposes
        };
        use ExtendedKeyUsagePurpose::{Any, ClientAuth, ServerAuth};
        assert_eq!(checked(2025, |_| {}), Ok(()));
        assert_eq!(checked(2025, purposes(&[ServerAuth])), Ok(()));
        assert_eq!(checked(2025, purposes(&[Any, ClientAuth])), Ok(()));
        assert_eq!(checked(2025, purposes(&[ClientAuth])), Err(CertificateError::InvalidPurpose));
        let no_authority = |params: &mut CertificateParams| params.is_ca = IsCa::NoCa;
        assert_eq!(checked(2025, no_authority), Err(CertificateError::InvalidPurpose));
        assert_eq!(checked(2019, |_| {}), Err(CertificateError::NotValidYet));
        assert_eq!(checked(2031, |_| {}), Err(CertificateError::Expired));
    }
}
